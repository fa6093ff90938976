//! `serve` as clients use it: curl and gpg for the files of a release, browsers, iPXE, monitors; and as the network treats it.

mod boot;
mod clients;
mod load;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::tools::example::{ok, rehydrator};
use crate::tools::fixture::fixture;
use crate::tools::release;
use crate::tools::serve::{Serve, files, ranges};
use crate::tools::small::{Random, sh, small_stream};
use rehydrator::digest::Digest;
use rehydrator::recipe::{Index, SourceSpec, Tier};
use serde_json::{Value, json};

/// A release of four disks, three of which come back as published; and one of which there is only the live system. Made
/// once for all tests.
fn releases() -> (PathBuf, PathBuf) {
    let dir = fixture("serve", "", |dir| {
        let [disks, live] = ["disks", "live"].map(|name| dir.join(name));
        fs::create_dir(&disks).unwrap();
        small_stream(&disks);
        ok(rehydrator().args(["build", "dehydrate", "--workdir"]).arg(&disks));
        write_live(&live, &live_files());
    });
    (dir.join("disks/dehydrated"), dir.join("live"))
}

/// Kernel, initramfs, rootfs and ISO of a live system.
fn live_files() -> [Vec<u8>; 4] {
    let mut random = Random(3);
    std::array::from_fn(|_| random.bytes(3_000_000))
}

/// A release of only these.
fn write_live(dir: &Path, blobs: &[Vec<u8>; 4]) {
    let files = ["kernel.pxe", "initramfs.pxe", "rootfs.pxe", "disk.iso"];
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

/// Both of them, served.
fn both() -> Serve {
    let (disks, live) = releases();
    Serve::start(&[&disks, &live], &[])
}

#[test]
fn files_of_a_release() {
    let serve = both();
    let (disks, live) = releases();
    let original = |dir: &Path| fs::read(dir.join("stream.json")).unwrap();
    assert_eq!(serve.get("/streams/test.json?original"), original(&disks));
    assert_eq!(serve.get("/streams/stable.json?original"), original(&live));
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
    for artifact in index(&disks).artifacts {
        let path = format!("/prod/streams/test/builds/1/x86_64/{}", artifact.output.name);
        let bytes = serve.get(&path);
        assert_eq!(release::blob_of(&bytes), artifact.output.blob, "{path}");
        ranges(&serve, &path, &bytes, &mut random);
        plain += 1;
    }
    // Three disks as published and plain, and four files of the live system; the plain form of each disk.
    assert_eq!((published, plain), (10, 4));
}

#[test]
fn what_is_damaged_is_not_taken_for_whole() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write_live(dir.path(), &live_files());
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
    let failed = serve.count("rehydrations_total{result=\"failed\"}");
    assert_eq!(serve.count("digest_mismatches_total") + failed, 4);
    assert_eq!(serve.text("/healthz"), "ok\n");
}

#[test]
fn a_page_for_people() {
    let serve = both();
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
    let serve = both();
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
    for hosts in ["Host: h\r\nHost: h", "Host: a\r\nHost: b", "Host: a\r\nX: y\r\nhost:"] {
        let answer = raw(&serve, format!("GET /boot.ipxe HTTP/1.1\r\n{hosts}\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400 "), "{hosts}: {answer}");
    }
    // As curl sends them, which refuses blanks.
    for path in paths.iter().filter(|path| !path.contains(' ')) {
        let (code, _) = serve.head(&[path]);
        assert!(matches!(code, 200 | 400 | 404 | 414), "{path:.100}: {code}");
    }
    assert_eq!(serve.text("/readyz"), "ready\n");
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
    let mut serve = Serve::start(&[&disks, &live], &args);
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

#[test]
fn systemd_hands_over_the_socket() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let socket = dir.path().join("socket");
    let mut server = Command::new("systemd-socket-activate");
    server.arg("-l").arg(&socket).arg(env!("CARGO_BIN_EXE_rehydrator"));
    server.args(["serve", "--access-log=none", "--cache"]).arg(dir.path()).arg("--data").arg(&releases().1);
    let mut server = server.stderr(Stdio::null()).spawn().expect("it is needed: install systemd");
    let start = Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    let answer = ok(Command::new("curl")
        .args(["-sSf", "--max-time", "60", "--unix-socket"])
        .arg(&socket)
        .arg("http://h/readyz"));
    assert_eq!(answer, b"ready\n");
    server.kill().unwrap();
    server.wait().unwrap();
}
