//! `serve` as clients use it: curl and gpg for the files of a release, browsers, iPXE, monitors; and as the network treats it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

#[path = "release/common.rs"]
mod common;
#[path = "tools/release.rs"]
mod release;
#[path = "tools/serving.rs"]
mod serving;
#[path = "tools/small.rs"]
mod small;

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{ok, rehydrator};
use rehydrator::digest::Digest;
use rehydrator::recipe::{Index, SourceSpec, Tier};
use serde_json::{Value, json};
use serving::Serving;
use small::{Random, sh, small_stream};
use tempfile::TempDir;

/// A release of four disks, three of which come back as published; and one of which there is only the live system. Made
/// once for all tests.
fn releases() -> &'static (PathBuf, PathBuf) {
    static RELEASES: OnceLock<(TempDir, TempDir, (PathBuf, PathBuf))> = OnceLock::new();
    let (_, _, dirs) = RELEASES.get_or_init(|| {
        let disks = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        small_stream(disks.path());
        ok(rehydrator().args(["build", "dehydrate", "--workdir"]).arg(disks.path()));
        let live = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        write_live(live.path());
        let dirs = (disks.path().join("dehydrated"), live.path().to_owned());
        (disks, live, dirs)
    });
    dirs
}

fn write_live(dir: &Path) {
    let mut random = Random(3);
    let files = ["kernel.pxe", "initramfs.pxe", "rootfs.pxe", "disk.iso"];
    let blobs: Vec<Vec<u8>> = files.iter().map(|_| random.bytes(3_000_000)).collect();
    let mut artifacts = Vec::new();
    let (mut pxe, mut iso) = (json!({}), json!({}));
    for (i, file) in files.iter().enumerate() {
        let mut artifact = release::artifact("x86_64", "metal", file, i, release::blob_of(&blobs[i]));
        artifact.published = artifact.output.clone();
        artifact.tier = Tier::Published;
        let location = format!("https://example.invalid/{}", artifact.output.name);
        let entry = json!({ "location": location, "sha256": artifact.output.blob.sha256 });
        match file.split_once('.').unwrap() {
            (part, "pxe") => pxe[part] = entry,
            _ => iso["disk"] = entry,
        }
        artifacts.push(artifact);
    }
    let stream = json!({ "stream": "stable", "metadata": {}, "architectures": { "x86_64": { "artifacts": {
        "metal": { "release": "44.1", "formats": { "pxe": pxe, "iso": iso } } } } } });
    let sources = blobs.iter().map(|b| SourceSpec::Stored { blob: release::blob_of(b) }).collect();
    let blobs: Vec<&[u8]> = blobs.iter().map(Vec::as_slice).collect();
    release::write(dir, stream.to_string().as_bytes(), artifacts, sources, &blobs);
}

/// The program as it serves.
struct Serve {
    serving: Serving,
    url: String,
    dir: TempDir,
}

impl Serve {
    fn start(data: &[&Path], args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut all: Vec<OsString> = args.iter().map(Into::into).collect();
        all.extend(["--access-log".into(), dir.path().join("log").into()]);
        all.extend(["--cache".into(), dir.path().into()]);
        all.extend(data.iter().flat_map(|data| ["--data".into(), data.into()]));
        let serving = Serving::start(all);
        let scheme = if args.contains(&"--tls-cert") { "https" } else { "http" };
        Self { url: format!("{scheme}://{}", serving.address), serving, dir }
    }

    fn both() -> Self {
        let (disks, live) = releases();
        Self::start(&[disks, live], &[])
    }

    fn address(&self) -> &str {
        &self.serving.address
    }

    /// What curl says and gets with these arguments, the last of which is a path.
    fn curl(&self, args: &[&str]) -> Output {
        let (path, args) = args.split_last().unwrap();
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--max-time", "60", "--path-as-is", "--globoff"])
            .args(args)
            .arg(format!("{}{path}", self.url));
        command.output().expect("curl is needed: install curl")
    }

    fn get(&self, path: &str) -> Vec<u8> {
        let output = self.curl(&["-f", path]);
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn text(&self, path: &str) -> String {
        String::from_utf8(self.get(path)).unwrap()
    }

    /// The status code and the headers, in small letters.
    fn head(&self, args: &[&str]) -> (u16, String) {
        let output = self.curl(&[&["-D", "-", "-o", "/dev/null"], args].concat());
        let text = String::from_utf8(output.stdout).unwrap().to_ascii_lowercase();
        let code = text.split(' ').nth(1).unwrap_or_else(|| panic!("{args:?}: {text}")).parse().unwrap();
        (code, text)
    }

    fn signal(&self, name: &str) {
        sh(Path::new("/"), &format!("kill -{name} {}", self.serving.child.id()));
    }
}

/// The document of a stream, and the path of each file in it, with the digest that it is to have.
fn files(serve: &Serve, stream: &str) -> Vec<(String, Digest, bool)> {
    let document: Value = serde_json::from_slice(&serve.get(&format!("/streams/{stream}.json"))).unwrap();
    let mut files = Vec::new();
    let mut todo = vec![&document];
    while let Some(value) = todo.pop() {
        if let Some(location) = value["location"].as_str() {
            let path = location.strip_prefix(&serve.url).unwrap_or_else(|| panic!("{location}"));
            let signed = value.get("signature").is_some();
            files.push((path.to_owned(), value["sha256"].as_str().unwrap().parse().unwrap(), signed));
        }
        todo.extend(value.as_object().into_iter().flat_map(|o| o.values()));
    }
    files
}

#[test]
fn files_of_a_release() {
    let serve = Serve::both();
    let (disks, live) = releases();
    let original = |dir: &Path| fs::read(dir.join("stream.json")).unwrap();
    assert_eq!(serve.get("/streams/test.json?original"), original(disks));
    assert_eq!(serve.get("/streams/stable.json?original"), original(live));
    let index = |dir: &Path| Index::from_json(&fs::read(dir.join("index.json")).unwrap()).unwrap();
    let mut random = Random(9);
    let dir = tempfile::tempdir().unwrap();
    let (mut published, mut plain) = (0, 0);
    for stream in ["test", "stable"] {
        for (path, digest, signed) in files(&serve, stream) {
            let bytes = serve.get(&path);
            assert_eq!(Digest::of(&bytes), digest, "{path}");
            published += 1;
            if signed {
                fs::write(dir.path().join("file"), &bytes).unwrap();
                fs::write(dir.path().join("file.sig"), serve.get(&format!("{path}.sig"))).unwrap();
                let home = disks.parent().unwrap().join("gnupg");
                sh(dir.path(), &format!("gpg --homedir {} --verify file.sig file", home.display()));
            }
            ranges(&serve, &path, &bytes, &mut random);
        }
    }
    // Every output under its own name, also where the published file does not come back.
    for artifact in index(disks).artifacts {
        let path = format!("/prod/streams/test/builds/1/x86_64/{}", artifact.output.name);
        let bytes = serve.get(&path);
        assert_eq!(release::blob_of(&bytes), artifact.output.blob, "{path}");
        ranges(&serve, &path, &bytes, &mut random);
        plain += 1;
    }
    assert_eq!((published, plain), (7, 4));
}

/// Conditions and ranges, against what was got in one piece.
fn ranges(serve: &Serve, path: &str, bytes: &[u8], random: &mut Random) {
    let (code, headers) = serve.head(&["-I", path]);
    let name = path.rsplit_once('/').unwrap().1.to_ascii_lowercase();
    assert_eq!(code, 200, "{path}");
    assert!(headers.contains(&format!("content-length: {}\r\n", bytes.len())), "{path}: {headers}");
    assert!(headers.contains("accept-ranges: bytes\r\n"), "{path}: {headers}");
    assert!(headers.contains(&format!("filename=\"{name}\"")), "{path}: {headers}");
    let etag = format!("\"{}\"", Digest::of(bytes));
    assert!(headers.contains(&format!("etag: {etag}\r\n")), "{path}: {headers}");
    let with = |name: &str, value: &str| serve.head(&["-H", &format!("{name}: {value}"), path]).0;
    assert_eq!(with("If-None-Match", &format!("\"x\", W/{etag}")), 304, "{path}");
    assert_eq!(with("If-Match", "\"x\""), 412, "{path}");
    assert_eq!(with("Range", &format!("bytes={}-", bytes.len())), 416, "{path}");
    let range = |range: &str, more: &[&str]| serve.curl(&[&["-r", range], more, &[path]].concat()).stdout;
    for _ in 0..6 {
        let start = random.below(bytes.len());
        let end = start + random.below(bytes.len() - start);
        assert!(range(&format!("{start}-{end}"), &[]) == bytes[start..=end], "{path}: {start}-{end}");
    }
    let tail = bytes.len() - 1000.min(bytes.len());
    assert!(range("-1000", &[]) == bytes[tail..], "{path}");
    assert!(range(&format!("{tail}-"), &["-H", &format!("If-Range: {etag}")]) == bytes[tail..], "{path}");
    assert!(range("0-9", &["-H", "If-Range: \"x\""]) == bytes, "{path}");
}

#[test]
fn what_is_damaged_is_not_taken_for_whole() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write_live(dir.path());
    let serve = Serve::start(&[dir.path()], &[]);
    for (path, digest, _) in files(&serve, "stable") {
        let blob = dir.path().join(format!("blobs/sha256/{digest}"));
        let mut bytes = fs::read(&blob).unwrap();
        bytes[2_000_000] ^= 1;
        fs::write(&blob, bytes).unwrap();
        let output = serve.curl(&[&path]);
        assert!(!output.status.success(), "{path}");
        assert!(output.stdout.len() < 3_000_000, "{path}: all of it came");
    }
    // Who watches the server sees it.
    let metrics = serve.text("/metrics");
    let count = |name: &str| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("rehydrator_{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {metrics}")).parse().unwrap()
    };
    assert_eq!(
        count("digest_mismatches_total") + count("rehydrations_total{result=\"failed\"}"),
        4,
        "{metrics}"
    );
    assert_eq!(serve.text("/healthz"), "ok\n");
}

#[test]
fn boots_over_the_network() {
    let (disks, live) = releases();
    let configs = tempfile::tempdir().unwrap();
    fs::write(configs.path().join("a.ign"), "{}").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", configs.path().join("b.ign")).unwrap();
    let serve = Serve::start(&[live, disks], &["--ignition", configs.path().to_str().unwrap()]);
    let script = serve.text("/boot.ipxe?ignition=http://h/${mac:hexhyp}.ign");
    assert!(
        script.starts_with("#!ipxe\n") && script.contains("ignition.config.url=http://h/${mac:hexhyp}.ign")
    );
    assert_eq!(serve.text("/boot/stable/x86_64.ipxe"), serve.text("/boot.ipxe"));
    let base = script.lines().find_map(|l| l.strip_prefix("set base ")).unwrap();
    let mut found = 0;
    for word in script.split_whitespace() {
        let word = word.strip_prefix("coreos.live.rootfs_url=").unwrap_or(word);
        if let Some(name) = word.strip_prefix("${base}") {
            let url = format!("{base}{name}");
            assert_eq!(serve.get(url.strip_prefix(&serve.url).unwrap()).len(), 3_000_000);
            found += 1;
        }
    }
    assert_eq!(found, 3, "{script}");
    assert_eq!(serve.text("/ignition/a.ign"), "{}");
    for path in
        ["/ignition/b.ign", "/ignition/c.ign", "/ignition/", "/boot/stable/riscv64.ipxe", "/boot/x.ipxe"]
    {
        assert_eq!(serve.head(&[path]).0, 404, "{path}");
    }
    assert_eq!(serve.head(&["/boot.ipxe?ignition=http://h/a%20b"]).0, 400);
}

#[test]
fn a_page_for_people() {
    let serve = Serve::both();
    let page = serve.text("/");
    for wanted in
        ["<html lang", "<title>", "stable", "44.1", "podman run", "a.raw.xz", "prefers-color-scheme"]
    {
        assert!(page.contains(wanted), "{wanted} is missing");
    }
    assert!(!page.contains("src=\"http") && !page.contains("@import"), "resources from elsewhere");
    let mut links = 0;
    for link in page.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let path = link.strip_prefix(&serve.url).unwrap_or(link);
        if path.starts_with('/') {
            assert_eq!(serve.head(&["-I", path]).0, 200, "{link}");
            links += 1;
        }
    }
    assert!(links >= 11, "{links} links");
}

/// A request as it is, and the first line of the answer; empty when the connection was closed without one.
fn raw(serve: &Serve, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(serve.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The server may have had enough before the end.
    let _ = stream.write_all(request);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.take(1 << 20).read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    assert!(!text.contains("root:x:0"), "{}", String::from_utf8_lossy(request));
    text.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn hostile_requests() {
    let serve = Serve::both();
    let path = files(&serve, "stable").pop().unwrap().0;
    let mut requests: Vec<Vec<u8>> = Vec::new();
    let mut paths: Vec<String> = Vec::new();
    for up in ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "..%5c", "%c0%ae%c0%ae/", "....//", ".%00./"] {
        for base in ["/", "/streams/", "/prod/streams/stable/", "/boot/", "/ignition/"] {
            paths.push(format!("{base}{}etc/passwd", up.repeat(12)));
            paths.push(format!("{base}{up}index.json"));
        }
    }
    paths.extend(
        ["//etc/passwd", "/./", "/?", "/%", "/%zz", "/%00", "/%ff%fe", "/streams/%ff.json", "/*", "/a b"]
            .map(String::from),
    );
    paths.extend(
        ["/streams/.json", "/streams/../stable.json", "/boot/.ipxe", "/boot//.ipxe", "/prod/"]
            .map(String::from),
    );
    paths.push(format!("/{}", "a".repeat(10_000)));
    paths.push(format!("/{}", "%41".repeat(5_000)));
    requests.extend(
        paths
            .iter()
            .map(|p| format!("GET {p} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").into_bytes()),
    );
    let ranges = [
        "bytes=",
        "bytes=-",
        "bytes=--1",
        "bytes=0",
        "bytes=a-b",
        "bytes=1-0",
        "bytes=99999999999999999999-",
        "bytes=-0",
        "bytes=0-99999999999999999999999",
        "bytes=-99999999999999999999",
        "bits=0-1",
        "bytes=0-0,2-3",
        "bytes =0-1",
        "bytes=18446744073709551615-18446744073709551615",
        "bytes=-18446744073709551616",
        "=",
        "bytes=0-0x10",
        "bytes=+1-2",
    ];
    requests.extend(ranges.iter().map(|r| {
        format!("GET {path} HTTP/1.1\r\nHost: h\r\nRange: {r}\r\nConnection: close\r\n\r\n").into_bytes()
    }));
    let hosts =
        ["", "h/x", "h\" onload=\"x", "<script>", "h:99999", "a@b", "[::1", "%00", "h h", &"h".repeat(300)]
            .map(String::from);
    for target in ["/", "/streams/stable.json", "/boot.ipxe"] {
        requests.extend(hosts.iter().map(|h| {
            format!("GET {target} HTTP/1.1\r\nHost: {h}\r\nConnection: close\r\n\r\n").into_bytes()
        }));
    }
    for method in [
        "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PROPFIND", "get", "\u{1}",
        "GET\tGET",
    ] {
        requests.push(format!("{method} / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc").into_bytes());
    }
    let headers = [
        format!("X: {}", "a".repeat(1 << 20)),
        "X: a\r\n".repeat(5_000),
        "X".into(),
        ": x".into(),
        "Content-Length: -1".into(),
        "Content-Length: 1\r\nContent-Length: 2".into(),
        "Transfer-Encoding: chunked\r\nContent-Length: 4".into(),
        "Transfer-Encoding: x".into(),
        "Expect: y".into(),
        "If-None-Match: \"".into(),
        "If-Range: \u{7f}".into(),
        "Upgrade: h2c\r\nConnection: Upgrade".into(),
        "Accept-Encoding: gzip, br".into(),
        format!("If-None-Match: {}", "\"a\",".repeat(3000)),
    ];
    requests.extend(
        headers.iter().map(|h| format!("GET {path} HTTP/1.1\r\nHost: h\r\n{h}\r\n\r\n").into_bytes()),
    );
    requests.extend(
        [
            &b"\r\n\r\n"[..],
            b"GET",
            b"GET /",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\0\x01\0",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxxxxxxxxxxxxx",
        ]
        .map(<[u8]>::to_vec),
    );
    let mut random = Random(77);
    for i in 0..60 {
        let mut noise =
            format!("GET {path} HTTP/1.1\r\nHost: h\r\nRange: bytes=0-9\r\nConnection: close\r\n\r\n")
                .into_bytes();
        for _ in 0..=i / 20 {
            let at = random.below(noise.len());
            noise[at] = random.below(256) as u8;
        }
        requests.push(noise);
    }
    assert!(requests.len() >= 200, "{}", requests.len());
    for request in &requests {
        let answer = raw(&serve, request);
        let code = answer.split(' ').nth(1).unwrap_or_default();
        let shown = || String::from_utf8_lossy(&request[..request.len().min(200)]).into_owned();
        assert!(!code.starts_with('5') || code == "505", "{answer}: {}", shown());
    }
    // As curl sends them, which refuses blanks.
    for path in paths.iter().filter(|path| !path.contains(' ')) {
        let (code, _) = serve.head(&[path]);
        assert!(matches!(code, 200 | 400 | 404 | 414), "{path:.100}: {code}");
    }
    assert_eq!(serve.text("/readyz"), "ready\n");
}

#[test]
fn slow_clients_and_many() {
    let (disks, live) = releases();
    let serve = Serve::start(&[disks, live], &["--timeout", "5s", "--memory", "256M"]);
    // Who never finishes a request does not keep others from theirs, and is thrown out.
    let slow: Vec<TcpStream> = (0..300)
        .map(|_| {
            let mut stream = TcpStream::connect(serve.address()).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
            stream
        })
        .collect();
    let wanted = files(&serve, "test");
    std::thread::scope(|scope| {
        for i in 0..64 {
            let (path, digest, _) = &wanted[i % wanted.len()];
            let serve = &serve;
            scope.spawn(move || assert_eq!(Digest::of(&serve.get(path)), *digest, "{path}"));
        }
    });
    for mut stream in slow {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let _ = stream
            .read_to_end(&mut Vec::new())
            .map_err(|e| assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", serve.serving.child.id())).unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB");
    let peak: u64 = peak.parse().unwrap();
    assert!(peak < 512 << 10, "{peak} KiB");
    let log = fs::read_to_string(serve.dir.path().join("log")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().filter(|l| l["path"].as_str().unwrap().starts_with("/prod/")).count() >= 64);
}

#[test]
fn tls_sockets_and_the_end() {
    let (disks, live) = releases();
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        sh(
            dir.path(),
            &format!(
                "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name} \
                 -addext subjectAltName=IP:127.0.0.1 -keyout new.key -out new.pem 2>/dev/null
                 mv new.key key.pem; mv new.pem cert.pem; cp cert.pem {name}.pem"
            ),
        );
    };
    make("one");
    let text = |name: &str| dir.path().join(name).display().to_string();
    let (cert, key, socket) = (text("cert.pem"), text("key.pem"), text("socket"));
    let listen = format!("--listen=unix:{socket}");
    let args = ["--tls-cert", &cert, "--tls-key", &key, &listen];
    let mut serve = Serve::start(&[disks, live], &args);
    let with = |ca: &str| serve.curl(&["--cacert", &text(ca), "--http2", "/healthz"]).status.success();
    assert!(with("one.pem"));
    make("two");
    assert!(!with("two.pem"));
    serve.signal("HUP");
    let start = Instant::now();
    while !with("two.pem") {
        assert!(start.elapsed() < Duration::from_secs(30), "the certificate is not read again");
    }
    let output = serve.curl(&["--unix-socket", &socket, "--cacert", &text("two.pem"), "/healthz"]);
    assert_eq!(output.stdout, b"ok\n", "{}", String::from_utf8_lossy(&output.stderr));

    // A download that goes on when the server is told to end, ends well; then there is nobody any more.
    let (path, digest, _) = {
        let document = serve.curl(&["--cacert", &text("two.pem"), "/streams/stable.json"]).stdout;
        let document: Value = serde_json::from_slice(&document).unwrap();
        let iso = &document["architectures"]["x86_64"]["artifacts"]["metal"]["formats"]["iso"]["disk"];
        let path = iso["location"].as_str().unwrap().strip_prefix(&serve.url).unwrap().to_owned();
        (path, iso["sha256"].as_str().unwrap().parse::<Digest>().unwrap(), ())
    };
    let mut download = Command::new("curl");
    download
        .args(["-sS", "--limit-rate", "1M", "--cacert", &text("two.pem")])
        .arg(format!("{}{path}", serve.url));
    let mut download = download.stdout(Stdio::piped()).spawn().unwrap();
    let mut bytes = vec![0; 1000];
    let mut out = download.stdout.take().unwrap();
    out.read_exact(&mut bytes).unwrap();
    serve.signal("TERM");
    out.read_to_end(&mut bytes).unwrap();
    assert!(download.wait().unwrap().success());
    assert_eq!(Digest::of(&bytes), digest);
    assert!(serve.serving.child.wait().unwrap().success());
    assert!(!Path::new(&socket).exists());
}
