//! `build download` against a real server (nginx), against one that does what no real server does on demand, and with
//! keys and signatures made by the real gpg.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::download::{self, Options, Summary};
use rehydrator::http::{Http, Retry, Settings};
use rehydrator::openpgp::{Keys, SignatureError};
use rehydrator::progress::{Mode, Progress};
use rehydrator::workdir::{Origin, Workdir};
use tempfile::TempDir;

use crate::tools::{Gpg, LATER, Nginx, Request, Server, THEN, answer, noise, whole};

fn keys(of: &[&[u8]]) -> Keys {
    let mut keys = Keys::default();
    of.iter().for_each(|bytes| keys.add(bytes).unwrap());
    keys
}

#[test]
fn signatures_of_gpg() {
    let gpg = Gpg::new();
    let data = b"a disk image";
    let good = gpg.key("", "good", "never");
    let expired = gpg.key(THEN, "expired", "1y");
    let retired = gpg.key(THEN, "retired", "never");
    let revoked = gpg.key(THEN, "revoked", "never");
    let by_good = gpg.sign("", &good, data);
    let by_expired = gpg.sign(THEN, &expired, data);
    let by_retired = gpg.sign(THEN, &retired, data);
    let by_revoked = gpg.sign(THEN, &revoked, data);
    let before = keys(&[&gpg.export(&retired), &gpg.export(&revoked)]);
    let not_yet_revoked = gpg.export(&revoked);
    before.verify(&by_retired, &data[..]).unwrap();
    before.verify(&by_revoked, &data[..]).unwrap();
    let copy = Gpg::new();
    copy.run("", &["--import"], &gpg.run("", &["--export-secret-keys"], b""));
    copy.run("20200201T000000", &["--quick-set-expire", &expired, "never"], b"");
    let by_copies = [&retired, &expired].map(|key| copy.sign("20230101T000000", key, data));
    gpg.revoke(LATER, &retired, 3);
    gpg.revoke(LATER, &revoked, 1);

    // All keys of the home, armored in one block.
    let all = keys(&[&gpg.run("", &["--armor", "--export"], b"")]);
    all.verify(&by_good, &data[..]).unwrap();
    let armored = gpg.run("", &["--enarmor"], &by_good);
    all.verify(&armored, &data[..]).unwrap();
    all.verify(&by_expired, &data[..]).unwrap();
    all.verify(&by_retired, &data[..]).unwrap();
    let error = all.verify(&by_revoked, &data[..]).unwrap_err();
    assert!(matches!(&error, SignatureError::Revoked(key) if *key == revoked), "{error}");
    // A copy of the key from before the revocation does not undo it, in whatever order they come.
    for both in [[not_yet_revoked.clone(), gpg.export(&revoked)], [gpg.export(&revoked), not_yet_revoked]] {
        let error = keys(&[&both.concat()]).verify(&by_revoked, &data[..]).unwrap_err();
        assert!(matches!(error, SignatureError::Revoked(_)), "{error}");
    }

    let error = all.verify(&by_good, &b"another disk image"[..]).unwrap_err();
    assert!(matches!(error, SignatureError::Bad(_)), "{error}");
    for garbage in [&b""[..], b"garbage", &by_good[..20], data] {
        let error = all.verify(garbage, &data[..]).unwrap_err();
        assert!(matches!(error, SignatureError::Bad(_)), "{error}");
    }
    let error = keys(&[&gpg.export(&expired)]).verify(&by_good, &data[..]).unwrap_err();
    assert!(matches!(&error, SignatureError::UnknownKey(id) if good.ends_with(id)), "{error}");
    assert_eq!(error.to_string(), format!("signed by an unknown key: {good}"));
    // Of several signatures one is enough.
    keys(&[&gpg.export(&good)]).verify(&[by_expired, by_good].concat(), &data[..]).unwrap();
    // Signed by a copy of the key when it was retired, and when it had expired, already.
    let error = all.verify(&by_copies[0], &data[..]).unwrap_err();
    assert!(matches!(&error, SignatureError::Revoked(key) if *key == retired), "{error}");
    let error = all.verify(&by_copies[1], &data[..]).unwrap_err();
    assert!(matches!(&error, SignatureError::Bad(why) if why.contains("could not sign when")), "{error}");
}

#[test]
fn weak_signatures_are_bad() {
    let gpg = Gpg::new();
    gpg.run("", &["--quick-generate-key", "rsa", "rsa2048", "sign", "never"], b"");
    let signature =
        gpg.run("", &["--digest-algo", "SHA1", "--allow-weak-digest-algos", "--detach-sign"], b"x");
    let error = keys(&[&gpg.export("rsa")]).verify(&signature, &b"x"[..]).unwrap_err();
    assert!(matches!(&error, SignatureError::Bad(why) if why.contains("SHA1")), "{error}");
}

#[test]
fn keys_come_from_files_and_directories() {
    let gpg = Gpg::new();
    let fingerprints: Vec<_> = ["a", "b", "c"].map(|name| gpg.key("", name, "never")).into();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.asc"), gpg.export("=a")).unwrap();
    fs::write(dir.path().join("b.gpg"), gpg.run("", &["--export", "=b"], b"")).unwrap();
    fs::write(dir.path().join(".hidden"), "not a key").unwrap();
    fs::create_dir(dir.path().join("subdir")).unwrap();
    let mut keys = Keys::default();
    keys.read(dir.path()).unwrap();
    let expected = |n: usize| {
        let mut f = fingerprints[..n].to_vec();
        f.sort();
        f
    };
    assert_eq!(keys.fingerprints().collect::<Vec<_>>(), expected(2));
    // Armored blocks one after the other, with text around them, as coreos-installer keeps its keys.
    let file = dir.path().join("subdir/all.asc");
    let export = |name: &str| String::from_utf8(gpg.export(name)).unwrap();
    fs::write(&file, format!("# a\n{}\n# b\r\n{}{}", export("=a"), export("=b"), export("=c"))).unwrap();
    let mut keys = Keys::default();
    keys.read(&file).unwrap();
    assert_eq!(keys.fingerprints().collect::<Vec<_>>(), expected(3));

    let error = |name: &str, contents: &[u8]| {
        let file = dir.path().join(name);
        fs::write(&file, contents).unwrap();
        let message = format!("{:#}", Keys::default().read(&file).unwrap_err());
        assert!(message.starts_with(&format!("keys {}: ", file.display())), "{message}");
    };
    error("empty", b"");
    error("text", b"this is not a key");
    error("signature", &gpg.sign("", "=a", b"data"));
    error("cut", &gpg.export("=a")[..100]);
    assert!(format!("{:#}", Keys::default().read(&dir.path().join("none")).unwrap_err()).contains("none: "));
}

// ---- a release ------------------------------------------------------------------------------------------------------

/// What the server has: files by name.
struct Release {
    /// Served, and beside it the working directory.
    dir: TempDir,
    gpg: Gpg,
    files: Vec<(String, Vec<u8>)>,
}

impl Release {
    /// `count` files of about a megabyte, signed.
    fn new(count: usize) -> Self {
        let gpg = Gpg::new();
        let key = gpg.key("", "signer", "never");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("www")).unwrap();
        let files: Vec<_> =
            (0..count).map(|i| (format!("disk{i}.raw"), noise(i as u64, 1_000_000 + i))).collect();
        for (name, bytes) in &files {
            fs::write(dir.path().join("www").join(name), bytes).unwrap();
            fs::write(dir.path().join("www").join(format!("{name}.sig")), gpg.sign("", &key, bytes)).unwrap();
        }
        fs::write(dir.path().join("key.asc"), gpg.export(&key)).unwrap();
        Self { dir, gpg, files }
    }

    fn www(&self, name: &str) -> PathBuf {
        self.dir.path().join("www").join(name)
    }

    fn artifact(&self, name: &str) -> PathBuf {
        self.dir.path().join("artifacts").join(name)
    }

    /// The working directory, with a stream document whose files lie at `base`.
    fn workdir(&self, base: &str) -> Workdir {
        let platforms: serde_json::Map<_, _> = self
            .files
            .iter()
            .enumerate()
            .map(|(i, (name, bytes))| {
                let location = format!("{base}/{name}");
                let disk = serde_json::json!({"disk": {"location": location, "signature": format!("{location}.sig"),
                    "sha256": Digest::of(bytes).to_string()}});
                (format!("p{i}"), serde_json::json!({"formats": {"raw": disk}}))
            })
            .collect();
        let stream =
            serde_json::json!({"stream": "test", "architectures": {"x86_64": {"artifacts": platforms}}});
        let workdir = Workdir::new(self.dir.path());
        fs::write(workdir.stream(), stream.to_string()).unwrap();
        workdir
    }

    fn options(&self) -> Options {
        Options {
            keys: vec![self.dir.path().join("key.asc")],
            skip_signatures: false,
            arch: Vec::new(),
            parallel: 4,
        }
    }

    fn download(&self, base: &str) -> Result<Summary, String> {
        run(&self.workdir(base), &self.options())
    }

    /// All files are there, with their signatures, and nothing else is.
    fn check(&self) {
        for (name, bytes) in &self.files {
            assert!(fs::read(self.artifact(name)).unwrap() == *bytes, "{name} differs");
            let signature = format!("{name}.sig");
            assert_eq!(fs::read(self.artifact(&signature)).unwrap(), fs::read(self.www(&signature)).unwrap());
        }
        assert_eq!(fs::read_dir(self.dir.path().join("artifacts")).unwrap().count(), 2 * self.files.len());
    }
}

fn run(workdir: &Workdir, options: &Options) -> Result<Summary, String> {
    let http = Http::new(Retry { attempts: 4, delay: Duration::from_millis(10) }).unwrap();
    download::run(workdir, options, &http, &Progress::new(Mode::None)).map_err(|e| format!("{e:#}"))
}

#[test]
fn a_release_from_nginx_and_nothing_the_second_time() {
    let release = Release::new(7);
    let nginx = Nginx::serve(&release.dir.path().join("www"));
    assert_eq!(release.download(&nginx.url).unwrap(), Summary { present: 0, downloaded: 7 });
    release.check();
    let log = nginx.log();
    assert!(log.contains(&"GET /disk6.raw 200 1000006".into()), "{log:#?}");
    assert_eq!(release.download(&nginx.url).unwrap(), Summary { present: 7, downloaded: 0 });
    assert_eq!(nginx.log(), log);

    // One that was damaged since, and one whose signature is gone.
    let mut damaged = fs::read(release.artifact("disk1.raw")).unwrap();
    damaged[500_000] ^= 1;
    fs::write(release.artifact("disk1.raw"), damaged).unwrap();
    fs::remove_file(release.artifact("disk2.raw.sig")).unwrap();
    assert_eq!(release.download(&nginx.url).unwrap(), Summary { present: 5, downloaded: 2 });
    release.check();
    let again: Vec<_> = nginx.log().into_iter().filter(|line| !log.contains(line)).collect();
    assert!(again.iter().all(|l| l.contains(" 416 ")), "only ranges past the end are new: {again:#?}");
}

/// What a killed run leaves behind is gone on with, if it is of the same file.
#[test]
fn an_earlier_run_is_continued() {
    let release = Release::new(5);
    let nginx = Nginx::serve(&release.dir.path().join("www"));
    fs::create_dir(release.dir.path().join("artifacts")).unwrap();
    let part =
        |i: usize, bytes: &[u8]| fs::write(release.artifact(&format!("disk{i}.raw.partial")), bytes).unwrap();
    let bytes = |i: usize| release.files[i].1.clone();
    // The first half; all of it; half of another file, of which nothing is known; half of another version, which is
    // known to be another; more than there is.
    part(0, &bytes(0)[..400_000]);
    part(1, &bytes(1));
    part(2, &noise(99, 400_000));
    part(3, &noise(99, 400_000));
    fs::write(release.artifact("disk3.raw.etag"), "\"another-version\"").unwrap();
    part(4, &noise(99, 2_000_000));
    assert_eq!(release.download(&nginx.url).unwrap(), Summary { present: 0, downloaded: 5 });
    release.check();
    let gets: Vec<_> =
        nginx.log().into_iter().filter(|l| l.starts_with("GET") && !l.contains(".sig")).collect();
    let without_416_body: Vec<_> =
        gets.iter().map(|l| if l.contains(" 416 ") { l.rsplit_once(' ').unwrap().0 } else { l }).collect();
    assert_eq!(
        without_416_body,
        [
            "GET /disk0.raw 206 600000",
            "GET /disk1.raw 416",
            // Glued together, found wrong, and started over.
            "GET /disk2.raw 200 1000002",
            "GET /disk2.raw 206 600002",
            "GET /disk3.raw 200 1000003",
            "GET /disk4.raw 200 1000004",
            "GET /disk4.raw 416",
        ]
    );
}

#[test]
fn four_signature_errors() {
    let release = Release::new(5);
    let nginx = Nginx::serve(&release.dir.path().join("www"));
    let sign = |name: &str, key: &str, data: &[u8]| {
        fs::write(release.www(&format!("{name}.sig")), release.gpg.sign("", key, data)).unwrap();
    };
    let stranger = release.gpg.key("", "stranger", "never");
    let revoked = release.gpg.key("", "revoked", "never");
    fs::remove_file(release.www("disk0.raw.sig")).unwrap();
    sign("disk1.raw", &stranger, &release.files[1].1);
    sign("disk2.raw", "=signer", b"something else");
    sign("disk3.raw", &revoked, &release.files[3].1);
    release.gpg.revoke("20400101T000000", &revoked, 0);
    fs::create_dir(release.dir.path().join("keys")).unwrap();
    fs::write(release.dir.path().join("keys/revoked.asc"), release.gpg.export(&revoked)).unwrap();
    let mut options = release.options();
    options.keys.push(release.dir.path().join("keys"));

    let workdir = release.workdir(&nginx.url);
    let message = run(&workdir, &options).unwrap_err();
    let lines: Vec<_> = message.lines().collect();
    assert_eq!(lines.len(), 5, "{message}");
    assert_eq!(lines[0], "4 of 5 artifacts failed:");
    assert_eq!(lines[1], "artifact disk0.raw: there is no signature");
    assert_eq!(lines[2], format!("artifact disk1.raw: signed by an unknown key: {stranger}"));
    assert!(lines[3].starts_with("artifact disk2.raw: bad signature: "), "{message}");
    assert_eq!(lines[4], format!("artifact disk3.raw: signed by a revoked key: {revoked}"));
    // None of them has its final name, the good one has.
    let names = ["disk0.raw", "disk1.raw", "disk2.raw", "disk3.raw", "disk4.raw"];
    assert_eq!(names.map(|n| release.artifact(n).exists()), [false, false, false, false, true]);

    // Without signatures they are all right, and with them no longer.
    let skip = Options { keys: Vec::new(), skip_signatures: true, ..options.clone() };
    assert_eq!(run(&workdir, &skip).unwrap(), Summary { present: 1, downloaded: 4 });
    assert_eq!(run(&workdir, &skip).unwrap(), Summary { present: 5, downloaded: 0 });
    assert_eq!(run(&workdir, &options).unwrap_err(), message);
    assert_eq!(names.map(|n| release.artifact(n).exists()), [false, false, false, false, true]);

    let none = Options { keys: Vec::new(), ..options };
    assert!(
        run(&workdir, &none).unwrap_err().starts_with("stream \"test\": no signing keys are known for it")
    );
}

#[test]
fn a_stream_document_that_is_signed_must_be_signed_right() {
    let release = Release::new(1);
    let nginx = Nginx::serve(&release.dir.path().join("www"));
    let workdir = release.workdir(&nginx.url);
    let document = fs::read(workdir.stream()).unwrap();
    fs::write(release.www("stream.json"), &document).unwrap();
    let origin = Origin::Url(format!("{}/stream.json", nginx.url));
    let http = Http::new(Retry::default()).unwrap();
    fs::remove_file(workdir.stream()).unwrap();
    workdir.init(&origin, &http).unwrap();
    assert_eq!(fs::read(workdir.stream()).unwrap(), document);
    assert!(!workdir.stream_signature().exists());

    fs::write(release.www("stream.json.sig"), release.gpg.sign("", "=signer", &document)).unwrap();
    workdir.init(&origin, &http).unwrap();
    assert_eq!(run(&workdir, &release.options()).unwrap(), Summary { present: 0, downloaded: 1 });
    fs::write(release.www("stream.json.sig"), release.gpg.sign("", "=signer", b"another")).unwrap();
    workdir.init(&origin, &http).unwrap();
    assert!(run(&workdir, &release.options()).unwrap_err().contains("stream.json: bad signature"));

    let gone = Origin::Url(format!("{}/none.json", nginx.url));
    let message = workdir.init(&gone, &http).unwrap_err().to_string();
    assert_eq!(message, format!("GET {}/none.json: 404 Not Found", nginx.url));
    assert!(
        workdir
            .init(&Origin::Url("not a url".into()), &http)
            .unwrap_err()
            .to_string()
            .starts_with("GET not a url: ")
    );
}

// ---- a server that misbehaves ---------------------------------------------------------------------------------------

fn served(release: &Release) -> HashMap<String, Vec<u8>> {
    let entries = fs::read_dir(release.dir.path().join("www")).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn what_can_be_tried_again_is() {
    let release = Release::new(5);
    let files = served(&release);
    let server = Server::new(move |request, n| {
        let good = whole(&files, request);
        match (request.method.as_str(), request.name.as_str(), n) {
            // Slow down, and the date form of the same, which has passed.
            ("GET", "disk0.raw", 0) => answer("429 Too Many Requests", "Retry-After: 2\r\n", b""),
            ("GET", "disk0.raw", 1) => {
                answer("503 Service Unavailable", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n", b"")
            }
            ("GET", "disk1.raw", 0 | 1) => answer("500 Internal Server Error", "", b"oh"),
            // Cut in the middle, twice; then cut before a single byte of an answer.
            ("GET", "disk2.raw", 0) => good[..500_000].to_vec(),
            ("GET", "disk2.raw", 1) => good[..200_000].to_vec(),
            ("GET", "disk2.raw", 2) => Vec::new(),
            // Ranges are not for everyone: all of it, every time; and another range than that which was asked for.
            ("GET", "disk3.raw", 0) => good[..500_000].to_vec(),
            ("GET", "disk3.raw", 1) => answer("200 OK", "", &files["disk3.raw"]),
            ("GET", "disk4.raw", 0) => good[..500_000].to_vec(),
            ("GET", "disk4.raw", 1) => {
                let body = &files["disk4.raw"];
                answer(
                    "206 Partial Content",
                    &format!("Content-Range: bytes 0-{}/{}\r\n", body.len() - 1, body.len()),
                    body,
                )
            }
            _ => good,
        }
    });
    let start = Instant::now();
    assert_eq!(release.download(&server.url).unwrap(), Summary { present: 0, downloaded: 5 });
    assert!(start.elapsed() >= Duration::from_secs(2), "Retry-After was not honoured");
    release.check();
    assert_eq!(server.gets("disk0.raw"), [None; 3]);
    assert_eq!(server.gets("disk1.raw"), [None; 3]);
    let gets = server.gets("disk2.raw");
    assert!(gets.len() == 4 && gets.is_sorted() && gets[1] > Some(400_000) && gets[2] == gets[3], "{gets:?}");
    assert_eq!(server.gets("disk3.raw").len(), 2);
    let gets = server.gets("disk4.raw");
    assert!(gets.len() == 3 && gets[1].is_some() && gets[2].is_none(), "{gets:?}");
}

#[test]
fn what_cannot_fails_at_once_and_alone() {
    let release = Release::new(6);
    let files = served(&release);
    let server = Server::new(move |request, _| match request.name.as_str() {
        "disk1.raw" => answer("404 Not Found", "", b""),
        "disk2.raw" => answer("403 Forbidden", "", b""),
        "disk3.raw" => answer("500 Internal Server Error", "", b""),
        "disk4.raw" => answer("429 Too Many Requests", "Retry-After: 86400\r\n", b""),
        "disk5.raw" => answer("200 OK", "", b"something else"),
        _ => whole(&files, request),
    });
    let message = release.download(&server.url).unwrap_err();
    let url = &server.url;
    assert_eq!(
        message,
        format!(
            "5 of 6 artifacts failed:\n\
             artifact disk1.raw: GET {url}/disk1.raw: 404 Not Found\n\
             artifact disk2.raw: GET {url}/disk2.raw: 403 Forbidden\n\
             artifact disk3.raw: GET {url}/disk3.raw: gave up after 4 attempts: 500 Internal Server Error\n\
             artifact disk4.raw: GET {url}/disk4.raw: the server asks to wait for 86400 s\n\
             artifact disk5.raw: sha256 mismatch: expected {}, got {}",
            Digest::of(&release.files[5].1),
            Digest::of(b"something else")
        )
    );
    assert_eq!(server.gets("disk1.raw").len(), 1);
    assert_eq!(server.gets("disk3.raw").len(), 4);
    assert_eq!(server.gets("disk5.raw").len(), 1);
    assert!(release.artifact("disk0.raw").exists());
    for name in ["disk5.raw", "disk5.raw.partial", "disk5.raw.etag", "disk5.raw.sig"] {
        assert!(!release.artifact(name).exists(), "{name}");
    }
}

#[test]
fn a_server_that_is_not_there() {
    let release = Release::new(1);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let message = release.download(&format!("http://127.0.0.1:{port}")).unwrap_err();
    assert!(message.contains("gave up after 4 attempts: ") && message.contains("refused"), "{message}");
}

#[test]
fn a_signature_without_end_is_refused() {
    let release = Release::new(1);
    let files = served(&release);
    let server = Server::new(move |request, _| {
        if request.name.ends_with(".sig") {
            answer("200 OK", "", &[0; 1 << 20])
        } else {
            whole(&files, request)
        }
    });
    assert!(release.download(&server.url).unwrap_err().ends_with("more than 65536 bytes"));
}

#[test]
fn several_at_once() {
    let release = Release::new(6);
    let files = served(&release);
    let (now, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let server = Server::new(move |request, _| {
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(200));
        now.fetch_sub(1, Ordering::SeqCst);
        whole(&files, request)
    });
    let options = Options { parallel: 3, ..release.options() };
    assert_eq!(run(&release.workdir(&server.url), &options).unwrap(), Summary { present: 0, downloaded: 6 });
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn space_is_checked_before_anything_is_downloaded() {
    let release = Release::new(2);
    let files = served(&release);
    let server = Server::new(move |request, _| match request.method.as_str() {
        "HEAD" => {
            b"HTTP/1.1 200 OK\r\nContent-Length: 1152921504606846976\r\nConnection: close\r\n\r\n".to_vec()
        }
        _ => whole(&files, request),
    });
    let message = release.download(&server.url).unwrap_err();
    assert!(message.contains("artifacts: not enough space: 2.00 EiB needed for 2 artifacts, "), "{message}");
    assert!(server.gets("disk0.raw").is_empty() && server.gets("disk0.raw.sig").is_empty());
}

#[test]
fn two_downloads_into_one_directory_do_not_mix() {
    let release = Release::new(1);
    fs::create_dir(release.dir.path().join("artifacts")).unwrap();
    let lock = fs::File::open(release.dir.path().join("artifacts")).unwrap();
    lock.lock().unwrap();
    let message = release.download("http://127.0.0.1:9").unwrap_err();
    assert!(message.contains("artifacts: another download is under way"), "{message}");
}

// ---- servers that do not end ----------------------------------------------------------------------------------------

/// Gets `file` from a server, with `http`, and gives the error.
fn refused(http: &Http, server: &Server) -> String {
    let dir = tempfile::tempdir().unwrap();
    let task = Progress::new(Mode::None).task("file", None);
    let (partial, etag) = (dir.path().join("partial"), dir.path().join("etag"));
    let started = Instant::now();
    let error = http.get_file(&format!("{}/file", server.url), &partial, &etag, &task).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(20), "{error}");
    error.to_string()
}

const QUICK: Retry = Retry { attempts: 4, delay: Duration::from_millis(1) };

/// What `get` says when the server sends this again and again, and how often it is asked.
#[track_caller]
fn ends(answer: impl Fn(&Request, usize) -> Vec<u8> + Send + Sync + 'static, error: &str, gets: usize) {
    let server = Server::new(answer);
    let found = refused(&Http::new(QUICK).unwrap(), &server);
    assert!(found.contains(error), "{found}");
    assert_eq!(server.gets("file").len(), gets, "{found}");
}

#[test]
fn only_what_is_new_counts_as_progress() {
    let body = noise(1, 8 << 20);
    let (cut, more) = (body.clone(), body.clone());
    // Two MiB, whatever range is asked for.
    ends(
        move |_, _| answer("200 OK", "ETag: \"x\"\r\n", &cut)[..2 << 20].to_vec(),
        "gave up after 4 attempts",
        4,
    );
    // A little more each time is progress: six attempts of a client that makes four in a row.
    let server = Server::new(move |_, n| {
        let all = answer("200 OK", "", &more);
        all[..((n + 1) * (3 << 19)).min(all.len())].to_vec()
    });
    let dir = tempfile::tempdir().unwrap();
    let (partial, task) = (dir.path().join("partial"), Progress::new(Mode::None).task("file", None));
    let url = format!("{}/file", server.url);
    Http::new(QUICK).unwrap().get_file(&url, &partial, &dir.path().join("etag"), &task).unwrap();
    assert_eq!(server.gets("file").len(), 6);
    // A document of which a part is lost with each attempt.
    let server = Server::new(move |_, _| answer("200 OK", "", &body)[..2 << 20].to_vec());
    let error = Http::new(QUICK).unwrap().get(&server.url, 16 << 20).unwrap_err().to_string();
    assert!(error.contains("gave up after 4 attempts"), "{error}");
}

#[test]
fn wrong_ranges_end() {
    let part = |headers: &str, body: &[u8]| answer("206 Partial Content", headers, body);
    let begin = || answer("200 OK", "", &noise(1, 3_000_000))[..1_000_000].to_vec();
    // Each begins well, and then sends something else than the range that was asked for.
    let start = move |_: &Request, n: usize| match n % 2 {
        0 => begin(),
        _ => part("Content-Range: bytes 0-9/3000000\r\n", &[0; 10]),
    };
    ends(start, "gave up after 4 attempts", 4);
    let total = move |_: &Request, n: usize| match n % 2 {
        0 => begin(),
        _ => part("Content-Range: bytes 0-9/10\r\n", &[0; 10]),
    };
    ends(total, "gave up after 4 attempts", 4);
    let beyond = move |_: &Request, n: usize| match n % 2 {
        0 => begin(),
        _ => answer("416 Range Not Satisfiable", "Content-Range: bytes */7\r\n", b""),
    };
    ends(beyond, "gave up after 4 attempts", 4);
    ends(move |_, _| part("Content-Range: bytes 0-9/10\r\n", &[0; 10]), "206 Partial Content", 1);
    ends(|_, _| answer("416 Range Not Satisfiable", "", b""), "416 Range Not Satisfiable", 1);
    // The right range, with less and with more in it than it says.
    let ranges = |lie: i64| {
        move |request: &Request, _: usize| match request.from {
            None => begin(),
            Some(from) => {
                let body = vec![0; (3_000_000 - from as i64 + lie) as usize];
                part(&format!("Content-Range: bytes {from}-2999999/3000000\r\n"), &body)
            }
        }
    };
    ends(ranges(1_000_000), "more than the 3000000 bytes that it announced", 4);
    let nothing = move |request: &Request, _: usize| match request.from {
        None => begin(),
        Some(from) => part(&format!("Content-Range: bytes {from}-2999999/3000000\r\n"), b""),
    };
    ends(nothing, "of 3000000 bytes", 4);
}

#[test]
fn what_is_too_long_is_not_downloaded() {
    // Announced, by one file and by all together.
    let huge = |length: u64| {
        move |_: &Request, _: usize| {
            format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes()
        }
    };
    ends(huge(1 << 50), "/file: more than 68719476736 bytes", 1);
    let server = Server::new(huge(1 << 30));
    let http = Http::new(QUICK).unwrap().with_max_download(1 << 20);
    let error = refused(&http, &server);
    assert!(error.ends_with("/file: more than 1048576 bytes in all: --max-download allows more"), "{error}");
    // Not announced: chunks without an end.
    let endless = || {
        Server::streaming(|_, _, to| {
            let chunk = [&b"10000\r\n"[..], &[0; 1 << 16], b"\r\n"].concat();
            let _ = to.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            while to.write_all(&chunk).is_ok() {}
        })
    };
    let server = endless();
    assert!(refused(&http, &server).contains("more than 1048576 bytes in all"));
    assert_eq!(server.gets("file").len(), 1);
    // Nothing is left for another file.
    assert!(refused(&http, &endless()).contains("more than 1048576 bytes in all"));
    // A document has its own limit.
    let error = http.get(&format!("{}/file", endless().url), 1 << 20).unwrap_err().to_string();
    assert!(error.contains("more than 1048576 bytes"), "{error}");
}

/// A byte now and then is no stall, and still not a transfer.
#[test]
fn a_drip_is_too_slow() {
    let drip = Server::streaming(|_, _, to| {
        let _ = to.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
        while to.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let retry = Retry { attempts: 2, delay: Duration::from_millis(1) };
    let settings = Settings { retry, slow: Duration::from_millis(500), ..Settings::default() };
    let http = Http::with(&settings).unwrap();
    let error = refused(&http, &drip);
    assert!(error.contains("gave up after 2 attempts: less than 1000 bytes a second"), "{error}");
    let error = http.get(&format!("{}/file", drip.url), 1 << 20).unwrap_err().to_string();
    assert!(error.contains("less than 1000 bytes a second"), "{error}");
    // Waiting of our own is none of the server's.
    let server = Server::new(|_, _| answer("200 OK", "", &[0; 1000]));
    let http = Http::with(&settings).unwrap().with_rate(Some(500));
    let dir = tempfile::tempdir().unwrap();
    let task = Progress::new(Mode::None).task("file", None);
    http.get_file(&server.url, &dir.path().join("partial"), &dir.path().join("etag"), &task).unwrap();
}

#[test]
fn a_directory_of_keys_may_hold_a_readme() {
    let gpg = Gpg::new();
    let key = gpg.key("", "a", "never");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("README"), "Keys that may sign.\n").unwrap();
    let error = format!("{:#}", Keys::default().read(dir.path()).unwrap_err());
    assert!(error.ends_with("a directory without an OpenPGP key"), "{error}");
    fs::write(dir.path().join("a.asc"), gpg.export("=a")).unwrap();
    let mut keys = Keys::default();
    keys.read(dir.path()).unwrap();
    assert_eq!(keys.fingerprints().collect::<Vec<_>>(), [key]);
    // A key that is damaged may be one that was revoked.
    for damaged in [&gpg.export("=a")[..100], &gpg.run("", &["--export", "=a"], b"")[..60]] {
        fs::write(dir.path().join("b.asc"), damaged).unwrap();
        assert!(format!("{:#}", Keys::default().read(dir.path()).unwrap_err()).contains("b.asc: "));
    }
}

// ---- stream documents -----------------------------------------------------------------------------------------------

/// A document of the stream `name` at `release`, without any artifact to speak of.
fn document(name: &str, release: &str) -> String {
    serde_json::json!({"stream": name, "architectures": {"x86_64": {"artifacts": {
        "qemu": {"release": release, "formats": {}}}}}})
    .to_string()
}

#[test]
fn a_document_does_not_go_backwards() {
    let dir = tempfile::tempdir().unwrap();
    let www = dir.path().join("www");
    fs::create_dir(&www).unwrap();
    let nginx = Nginx::serve(&www);
    let workdir = Workdir::new(dir.path().join("work"));
    let http = Http::new(Retry::default()).unwrap();
    let url = Origin::Url(format!("{}/x.json", nginx.url));
    let init = |workdir: &Workdir, document: &str, signed: bool| {
        fs::write(www.join("x.json"), document).unwrap();
        let _ = fs::remove_file(www.join("x.json.sig"));
        if signed {
            fs::write(www.join("x.json.sig"), "a signature").unwrap();
        }
        workdir.init(&url, &http).map(|_| ()).map_err(|e| format!("{e:#}"))
    };
    init(&workdir, &document("stable", "9.0"), false).unwrap();
    init(&workdir, &document("stable", "10.0"), true).unwrap();
    let older = document("stable", "9.0");
    let error = init(&workdir, &older, true).unwrap_err();
    assert!(error.ends_with("the server offers release 9.0 for x86_64, older than 10.0, which is here: --allow-downgrade takes it"), "{error}");
    let error = init(&workdir, &document("stable", "11.0"), false).unwrap_err();
    assert!(
        error.ends_with(
            "the server has no signature for it, the one here is signed: --allow-downgrade takes it"
        ),
        "{error}"
    );
    // What is here is still what it was.
    assert_eq!(fs::read_to_string(workdir.stream()).unwrap(), document("stable", "10.0"));
    assert!(workdir.stream_signature().exists());
    // The same again, another stream, a file of the user, and the option.
    init(&workdir, &document("stable", "10.0"), true).unwrap();
    workdir.init(&Origin::File(www.join("x.json")), &http).unwrap();
    init(&workdir, &document("testing", "1.0"), false).unwrap();
    init(&workdir, &document("stable", "10.0"), true).unwrap();
    init(&workdir.clone().allow_downgrade(true), &older, false).unwrap();
    assert_eq!(fs::read_to_string(workdir.stream()).unwrap(), older);
    assert!(!workdir.stream_signature().exists());
}
