//! Registries that lie, repeat themselves, or do not answer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rehydrator::digest::Digest;
use serde_json::{Value, json};

use crate::sysupdate::common::{MANIFEST, Serve, System, TAR, TITLE, key};
use crate::tools::registry::{noise, temp};
use crate::tools::server::{Reply, Request, Server};

/// What a registry says a layer is, and what it gives.
struct Layer {
    title: String,
    digest: Digest,
    size: usize,
    content: Vec<u8>,
}

impl Layer {
    fn honest(title: &str, content: &[u8]) -> Self {
        Self {
            title: title.into(),
            digest: Digest::of(content),
            size: content.len(),
            content: content.into(),
        }
    }

    fn manifest(&self) -> Value {
        json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": [{ "mediaType": TAR, "size": self.size,
            "digest": self.digest.oci(), "annotations": { TITLE: self.title } }] })
    }
}

/// A registry in which every repository has these tags, in pages of 100.
fn registry(layers: Vec<(String, Layer)>) -> Server {
    Server::start(move |request: &Request| {
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let what = path.rsplit('/').next().unwrap();
        if path.ends_with("/tags/list") {
            let start = query.strip_prefix("last=").map_or(0, |last| last.parse::<usize>().unwrap());
            let tags: Vec<_> = layers.iter().skip(start).take(100).map(|(tag, _)| tag).collect();
            let page = Reply::new(200, json!({ "tags": tags }).to_string());
            let next = start + 100;
            return match next < layers.len() {
                true => page.header("Link", format!("<?last={next}>; rel=\"next\"")),
                false => page,
            };
        }
        if path.contains("/blobs/") {
            let found = layers.iter().find(|(_, layer)| layer.digest.oci() == what);
            return found.map_or(Reply::new(404, ""), |(_, layer)| Reply::range(request, &layer.content));
        }
        let found = layers.iter().find(|(tag, layer)| {
            tag == what || Digest::of(layer.manifest().to_string().as_bytes()).oci() == what
        });
        let Some((tag, layer)) = found else { return Reply::new(404, "") };
        let bytes = layer.manifest().to_string().into_bytes();
        let digest = if tag == "lie" { Digest::of(b"lie") } else { Digest::of(&bytes) };
        Reply::new(200, bytes).header("Content-Type", MANIFEST).header("Docker-Content-Digest", digest.oci())
    })
}

fn serve(server: &Server, more: &[&str]) -> Serve {
    let address = format!("--registry=http://{}", server.address);
    Serve::start(&[&[&*address, "--authfile=/dev/null"], more].concat())
}

#[test]
fn all_of_250_tags() {
    let tmp = temp();
    let layers =
        (0..250).map(|n| (format!("1.{n}"), Layer::honest("disk.raw", format!("disk of 1.{n}").as_bytes())));
    let server = registry(layers.collect());
    let (secret, gpg, fingerprint) = key(tmp.path());
    let serve = serve(&server, &["--ttl=0s", "--repository=**", &format!("--sign-key={}", secret.display())]);
    assert_eq!(serve.names("deep/in/os").len(), 250);
    let asked = server.lines();
    assert_eq!(asked.iter().filter(|line| line.contains("/tags/list")).count(), 3);
    assert_eq!(
        asked.iter().filter(|line| line.starts_with("GET") && line.contains("/manifests/")).count(),
        250
    );
    // Manifests that are known are not read again.
    serve.text("deep/in/os/SHA256SUMS");
    let gets =
        server.lines().iter().filter(|line| line.starts_with("GET") && line.contains("/manifests/")).count();
    assert_eq!(gets, 250);

    let system = System::new(&tmp.path().join("system"), &gpg.run("", &["--export", &fingerprint], b""));
    let url = format!("{}/deep/in/os", serve.url);
    system.transfer("many", &url, ["url-file", "os-@v.raw"], ["regular-file", "os_@v.raw"]);
    let list = system.sysupdate("many", "list");
    for n in 0..250 {
        assert!(list.contains(&format!("1.{n}")), "1.{n}: {list:?}");
    }
    system.sysupdate("many", "update");
    assert_eq!(std::fs::read(system.path("srv/many/os_1.249.raw")).unwrap(), b"disk of 1.249");
}

#[test]
fn what_is_not_what_it_should_be() {
    let (large, small) = (noise(1, 2_000_000), noise(2, 1000));
    let mut changed = large.clone();
    changed[1_999_999] ^= 1;
    let lie = |content: &[u8], size: usize, seed: &[u8]| Layer {
        title: "disk.raw".into(),
        digest: Digest::of(seed),
        size,
        content: content.into(),
    };
    let missing = Layer { digest: Digest::of(b"gone"), ..Layer::honest("disk.raw", b"x") };
    let evil = |title: &str, content: &str| Layer::honest(title, content.as_bytes());
    let server = registry(vec![
        ("changed".into(), lie(&changed, changed.len(), &large)),
        ("other".into(), lie(&small[..999], 999, &small)),
        ("long".into(), lie(&large, 500, b"long")),
        ("short".into(), lie(&large, 4_000_000, b"short")),
        ("huge".into(), lie(&small, usize::MAX / 2, b"huge")),
        ("gone".into(), missing),
        ("lie".into(), Layer::honest("disk.raw", b"lie")),
        ("../up".into(), evil("disk.raw", "up")),
        ("a\nb".into(), evil("disk.raw", "line")),
        ("good".into(), evil("../../etc/passwd.raw", "good")),
        ("nothing".into(), evil("disk.raw", "")),
    ]);
    let serve = serve(&server, &[]);
    let names = ["changed", "gone", "good", "huge", "long", "nothing", "other", "short"];
    assert_eq!(serve.names("os"), names.map(|name| format!("os-{name}.raw")));
    assert_eq!(serve.get("os/os-good.raw", &[]), (200, b"good".to_vec()));
    assert_eq!(serve.get("os/os-nothing.raw", &[]), (200, vec![]));

    // All but the last piece came, and then the connection broke: curl says that it is not whole.
    let (exit, status, body) = serve.curl("os/os-changed.raw", &[]);
    assert_eq!((exit, status), (18, 200));
    assert!(body.len() < large.len() && large.starts_with(&body), "{}", body.len());
    // What does not even begin well is not begun.
    for name in ["other", "long", "short", "huge", "gone"] {
        assert_eq!(serve.get(&format!("os/os-{name}.raw"), &[]).0, 502, "{name}");
    }
    let log = serve.log();
    for line in
        ["/os:lie: manifest: sha256 mismatch: expected", "blob sha256:", ": sha256 mismatch: expected "]
    {
        assert!(log.contains(line), "{line}: {log}");
    }
}

#[test]
fn a_registry_that_does_not_answer() {
    let (answers, asked) = (Arc::new(Mutex::new(500)), Arc::new(AtomicUsize::new(0)));
    let (status, count) = (answers.clone(), asked.clone());
    let server = Server::start(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Reply::new(*status.lock().unwrap(), r#"{"tags":[]}"#)
    });
    let serve = serve(&server, &["--ttl=0s"]);
    for (code, expected) in [(500, 502), (401, 502), (404, 404), (200, 200)] {
        *answers.lock().unwrap() = code;
        assert_eq!(serve.get("os/SHA256SUMS", &[]).0, expected, "{code}");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 3 + 1 + 1 + 1);
}

/// Manifests of four megabytes: of more layers than an image has, and of one layer with annotations without end.
#[test]
fn manifests_that_are_large() {
    let layer = |title: &str| {
        json!({ "mediaType": TAR, "size": 1, "digest": Digest::of(title.as_bytes()).oci(),
            "annotations": { TITLE: title } })
    };
    let layers = json!({ "schemaVersion": 2, "mediaType": MANIFEST,
        "layers": (0..17_000).map(|n| layer(&format!("f{n}.raw"))).collect::<Vec<_>>() });
    let mut annotated = layer("disk.raw");
    for n in 0..300_000 {
        annotated["annotations"][format!("{n:x}")] = "".into();
    }
    let annotated = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": [annotated] });
    let documents = [layers.to_string(), annotated.to_string()];
    assert!(documents.iter().all(|document| (3 << 20..4 << 20).contains(&document.len())));
    let tags: Vec<_> = (0..30).map(|n| format!("{n}")).collect();
    let server = Server::start(move |request| {
        let what = request.path.rsplit('/').next().unwrap();
        match what.parse::<usize>() {
            Ok(n) => Reply::new(200, documents[n % 2].clone()).header("Content-Type", MANIFEST),
            Err(_) => Reply::new(200, json!({ "tags": tags }).to_string()),
        }
    });
    let serve = serve(&server, &[]);
    assert!(serve.names("os").is_empty());
    assert!(serve.peak() < 200, "{} MiB", serve.peak());
    let log = serve.log();
    assert_eq!(log.matches(": left out: a document of ").count(), 30, "{log}");
}
