//! What is served, over plain HTTP: names, pairs while tags are pushed, parts of files, requests that make no sense.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use rehydrator::digest::Digest;
use rehydrator::openpgp::Keys;
use rehydrator::registry::Client;
use serde_json::json;

use crate::sysupdate::common::{Serve, TAR, document, key, manifest, push, tar_gz};
use crate::tools::registry::{Registry, insecure, noise, run, temp};

/// A server over a registry, which is reached without TLS and passwords.
fn serve(registry: &Registry, more: &[&str]) -> (Client, Serve) {
    let address = format!("--registry=http://{}", registry.address);
    (registry.client(), Serve::start(&[&[&*address, "--authfile=/dev/null"], more].concat()))
}

#[test]
fn names_for_what_tools_push() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (client, serve) = serve(&registry, &[]);
    let at = |name: &str| registry.reference(name);

    // Images of one layer as skopeo makes them, in all kinds.
    let layout = tmp.path().join("layout").display().to_string();
    let layer = tmp.path().join("layer.tar.gz");
    fs::write(&layer, tar_gz("x", &noise(1, 5000))).unwrap();
    run(&["umoci", "init", "--layout", &layout]);
    run(&["umoci", "new", "--image", &format!("{layout}:v")]);
    run(&["umoci", "raw", "add-layer", "--image", &format!("{layout}:v"), &unpacked(&layer)]);
    let copy = |tag: &str, more: &[&str]| {
        let to = format!("docker://{}", at(&format!("kinds:{tag}")));
        let from = format!("oci:{layout}:v");
        run(&[&["skopeo", "copy", "--quiet", "--dest-tls-verify=false"][..], more, &[&from, &to]].concat());
    };
    copy("1", &["--format=oci"]);
    copy("2", &["--format=v2s2"]);
    push(&client, &at("kinds:3"), &[("application/vnd.oci.image.layer.v1.tar+zstd", "", b"not looked at")]);
    // Files as oras pushes them, some of which have no name that could be used.
    let disk = noise(2, 300);
    push(&client, &at("kinds:4"), &[(TAR, "disk.img.xz", &disk)]);
    push(&client, &at("kinds:5"), &[("application/zstd", "", &disk)]);
    let several =
        [(TAR, "./boot/uki_6.efi", &b"uki"[..]), (TAR, "root.raw", b"root"), (TAR, "a b.raw", b"space")];
    push(&client, &at("kinds:6"), &several);
    push(&client, &at("kinds:7"), &[(TAR, "", b"one"), (TAR, "", b"two")]);
    // A signature as cosign names it.
    let signature = format!("kinds:sha256-{}.sig", Digest::of(b"x"));
    push(&client, &at(&signature), &[(TAR, "x.raw", b"x")]);
    assert_eq!(
        serve.names("kinds"),
        [
            "boot-uki_6.efi",
            "kinds-1.tar.gz",
            "kinds-2.tar.gz",
            "kinds-3.tar.zst",
            "kinds-4.raw.xz",
            "kinds-5.raw.zst",
            "kinds-6.root.raw",
        ]
    );
    // The digests are those of what comes.
    for line in serve.text("kinds/SHA256SUMS").lines() {
        let (digest, name) = line.split_once("  ").unwrap();
        let (status, bytes) = serve.get(&format!("kinds/{name}"), &[]);
        assert_eq!((status, Digest::of(&bytes).to_string()), (200, digest.to_owned()), "{name}");
    }
    // Without a key there is no signature.
    assert_eq!(serve.get("kinds/SHA256SUMS.gpg", &[]).0, 404);
    let log = serve.log();
    assert!(
        log.contains(r#"/kinds:6: "kinds-6.a b.raw" left out: systemd-sysupdate takes no such name"#),
        "{log}"
    );
    assert!(log.contains("/kinds:7: left out: 2 layers without titles are not one file"), "{log}");
}

/// The archive without its compression.
fn unpacked(path: &std::path::Path) -> String {
    let to = path.with_extension("");
    let tar = std::process::Command::new("gzip").arg("-dc").arg(path).output().unwrap();
    fs::write(&to, tar.stdout).unwrap();
    to.display().to_string()
}

#[test]
fn listing_and_signature_fit_while_tags_are_pushed() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (secret, gpg, fingerprint) = key(tmp.path());
    let (client, serve) =
        serve(&registry, &["--ttl=0s", "--repository=os", &format!("--sign-key={}", secret.display())]);
    let mut keys = Keys::default();
    keys.add(&gpg.export(&fingerprint)).unwrap();
    push(&client, &registry.reference("os:0"), &[(TAR, "disk.raw", b"0")]);

    let done = AtomicBool::new(false);
    let fetch = |first: &str, second: &str| {
        // docker-registry answers 500 while a tag is being written, now and then for as long as it is asked again.
        let get = |name: &str| loop {
            match serve.get(&format!("os/{name}"), &[]) {
                (200, bytes) => return bytes,
                (status, _) => assert_eq!(status, 502, "{name}"),
            }
        };
        (get(first), get(second))
    };
    std::thread::scope(|scope| {
        // All of them have the same address.
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let (sums, signature) = fetch("SHA256SUMS", "SHA256SUMS.gpg");
                    keys.verify(&signature, &sums[..]).unwrap();
                }
            });
        }
        for n in 1..=40 {
            push(&client, &registry.reference(&format!("os:{n}")), &[(TAR, "disk.raw", b"n")]);
        }
        done.store(true, Ordering::Relaxed);
    });
    // The other way round, and as gpg sees it.
    let (signature, sums) = fetch("SHA256SUMS.gpg", "SHA256SUMS");
    assert_eq!(sums.iter().filter(|b| **b == b'\n').count(), 41);
    let at = |name: &str, bytes: &[u8]| {
        fs::write(tmp.path().join(name), bytes).unwrap();
        tmp.path().join(name).display().to_string()
    };
    gpg.run("", &["--verify", &at("sig", &signature), &at("sums", &sums)], b"");
}

#[test]
fn a_file_stays_what_was_listed() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (client, serve) = serve(&registry, &["--ttl=0s"]);
    let name = registry.reference("os:1");
    push(&client, &name, &[(TAR, "disk.raw", b"old")]);
    let other = ["-H", "X-Forwarded-For: 192.0.2.1"];
    let file = |args: &[&str]| String::from_utf8(serve.get("os/os-1.raw", args).1).unwrap();
    serve.text("os/SHA256SUMS");
    push(&client, &name, &[(TAR, "disk.raw", b"new")]);
    assert_eq!((file(&[]), file(&other)), ("old".into(), "new".into()));
    assert_eq!(serve.names("os"), ["os-1.raw"]);
    assert_eq!(file(&[]), "new");
}

#[test]
fn parts_of_files_and_requests_that_make_no_sense() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (client, serve) = serve(&registry, &[]);
    let disk = noise(3, 3_000_000);
    push(&client, &registry.reference("a/b:1"), &[(TAR, "disk.raw", &disk)]);
    let path = "a/b/b-1.raw";
    let etag = format!("\"{}\"", Digest::of(&disk));

    let head = String::from_utf8(serve.get(path, &["-I"]).1).unwrap().to_lowercase();
    for line in ["content-length: 3000000", "accept-ranges: bytes", &format!("etag: {etag}")] {
        assert!(head.lines().any(|found| found.trim_end() == line), "{line}: {head}");
    }
    assert!(serve.get(path, &[]) == (200, disk.clone()));
    assert!(serve.get(path, &["-H", &format!("If-None-Match: {etag}")]) == (304, vec![]));
    for (range, part) in [
        ("0-0", 0..1),
        ("0-", 0..3_000_000),
        ("131071-131073", 131_071..131_074),
        ("1234567-2345678", 1_234_567..2_345_679),
        ("2999999-", 2_999_999..3_000_000),
        ("-1000", 2_999_000..3_000_000),
        ("2999000-99999999", 2_999_000..3_000_000),
    ] {
        assert!(serve.get(path, &["-r", range]) == (206, disk[part].to_vec()), "{range}");
    }
    let range = |more: &str| serve.get(path, &["-H", "Range: bytes=5-9", "-H", more]);
    assert!(range(&format!("If-Range: {etag}")) == (206, disk[5..10].to_vec()));
    assert!(range("If-Range: \"other\"") == (200, disk.clone()));
    assert_eq!(serve.get(path, &["-r", "3000000-"]).0, 416);
    assert_eq!(serve.get(path, &["-X", "POST"]).0, 405);

    for path in [
        "SHA256SUMS",
        "a",
        "a/b",
        "a/b/",
        "a/b/b-2.raw",
        "a/b/SHA256SUMS.gpg",
        "a/none/SHA256SUMS",
        "none/none-1.raw",
        "a/b/../b/SHA256SUMS",
        "a/../a/b/SHA256SUMS",
        "a/b/..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "a//b/SHA256SUMS",
        "a%2fb%00/SHA256SUMS",
        "a%ff/SHA256SUMS",
        "A/B/SHA256SUMS",
        "a/b:1/SHA256SUMS",
        "a/b@sha256:00/SHA256SUMS",
        "a/b%3f/SHA256SUMS",
        "a/b%23x/SHA256SUMS",
        "v2/_catalog",
        "a/b/manifests/1",
        "a/b/tags/list",
        "[]/SHA256SUMS",
    ] {
        let (_, status, _) = serve.curl(path, &["-g"]);
        assert!([400, 404].contains(&status), "{path}: {status}");
    }
    let long = "x/".repeat(3000);
    assert!((400..500).contains(&serve.curl(&long, &[]).1));
}

#[test]
fn clients_are_sent_to_the_registry() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let (client, serve) = serve(&registry, &["--redirect"]);
    let disk = noise(4, 100_000);
    push(&client, &registry.reference("a/os:1"), &[(TAR, "disk.raw", &disk)]);
    assert_eq!(serve.get("a/os/os-1.raw", &[]), (307, vec![]));
    assert!(serve.get("a/os/os-1.raw", &["-L", "-r", "7-99"]) == (206, disk[7..100].to_vec()));
}

#[test]
fn an_index_of_files() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let client = Client::new(insecure());
    let to = registry.reference("files:1");
    // For no platform, and for one that nobody knows: provenance, as docker adds it.
    let images: HashMap<_, _> = [("", "disk.raw"), ("unknown", "x.raw")].into_iter().collect();
    let mut entries = Vec::new();
    for (os, title) in images {
        let image = manifest(&client, &to, &[(TAR, title, title.as_bytes())]);
        client.push_manifest(&to.with_digest(image.digest), &image).unwrap();
        let mut entry = json!({ "mediaType": image.media_type.to_string(), "digest": image.digest.oci(),
            "size": image.bytes.len() });
        if !os.is_empty() {
            entry["platform"] = json!({ "os": os, "architecture": os });
        }
        entries.push(entry);
    }
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    let index = json!({ "schemaVersion": 2, "mediaType": docker, "manifests": entries });
    client.push_manifest(&to, &document(docker, &index)).unwrap();
    let (_, serve) = serve(&registry, &[]);
    assert_eq!(serve.names("files"), ["files-1.raw"]);
}
