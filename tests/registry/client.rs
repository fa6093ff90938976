//! The client, against docker-registry and against servers that misbehave.

use std::fs;
use std::io::{Cursor, Read};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::registry::{Client, Credentials, Manifest, Options, Pushed, Reference, not_found};
use serde_json::json;

use crate::tools::Nginx;
use crate::tools::registry::{GOOGLE_KEY, PROGRAM, Registry, fails, insecure, noise, run, temp};
use crate::tools::server::{Cut, Proxy, Reply, Server};

fn read(mut reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn push(client: &Client, to: &Reference, blob: &[u8], from: &[&str]) -> anyhow::Result<Pushed> {
    let open = |offset: u64| -> std::io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&blob[offset as usize..])))
    };
    client.push_blob(to, Digest::of(blob), blob.len() as u64, from, &open, &|_| {})
}

/// An image of one layer, pushed by us.
fn push_image(client: &Client, to: &Reference, layer: &[u8]) -> Manifest {
    let config = json!({ "architecture": "arm64", "os": "linux", "rootfs": { "type": "layers",
        "diff_ids": [Digest::of(layer).oci()] } });
    let config = config.to_string().into_bytes();
    push(client, to, &config, &[]).unwrap();
    push(client, to, layer, &[]).unwrap();
    let blob = |kind: &str, bytes: &[u8]| {
        json!({ "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": Digest::of(bytes).oci(), "size": bytes.len() })
    };
    let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", &config), "layers": [blob("layer.v1.tar", layer)] });
    let bytes = manifest.to_string().into_bytes();
    let media_type = "application/vnd.oci.image.manifest.v1+json".into();
    let manifest = Manifest { digest: Digest::of(&bytes), bytes, media_type };
    client.push_manifest(to, &manifest).unwrap();
    manifest
}

fn tar(content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, "file", content).unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn with_tls_and_a_password() {
    let tmp = temp();
    let registry = Registry::secure(tmp.path());
    let client = registry.client();
    let name = registry.reference("a/b/c:v1");
    let layer = tar(&noise(1, 3_000_000));
    let manifest = push_image(&client, &name, &layer);

    // As skopeo sees it, and as we see what skopeo makes of it.
    let there = format!("docker://{name}");
    let flags = registry.flags("");
    let flags = [flags[0].as_str(), &flags[1]];
    let raw = run(&[&["skopeo", "inspect", "--raw"][..], &flags, &[&there]].concat());
    assert_eq!(raw.as_bytes(), manifest.bytes);
    let (from, to) = (registry.flags("src-"), registry.flags("dest-"));
    let copy = format!("docker://{}/copy:v2", registry.address);
    let both = [&from[0], &from[1], &to[0], &to[1], "--preserve-digests", &there, &copy];
    run(&[&["skopeo", "copy"][..], &both].concat());
    let copy: Reference = copy.parse().unwrap();
    assert_eq!(client.digest(&copy).unwrap(), manifest.digest);
    let found = client.manifest(&copy).unwrap();
    assert_eq!((found.bytes, found.media_type), (manifest.bytes.clone(), manifest.media_type.clone()));
    assert_eq!(client.manifest(&copy.with_digest(manifest.digest)).unwrap().digest, manifest.digest);

    let (digest, size) = (Digest::of(&layer), layer.len() as u64);
    assert!(read(client.blob(&copy, digest, size).unwrap()).unwrap() == layer);
    let range = client.blob_range(&copy, digest, 1_000_000..1_004_321, size).unwrap();
    assert!(read(range).unwrap() == layer[1_000_000..][..4321]);
    assert!(client.has_blob(&copy, digest).unwrap());
    let none = Digest::of(b"none");
    assert!(!client.has_blob(&copy, none).unwrap());
    let e = read(client.blob(&copy, none, 1).unwrap()).unwrap_err().to_string();
    assert!(e.ends_with(": 404 Not Found: blob unknown to registry"), "{e}");
    let e = client.manifest(&name.with_tag("none").unwrap()).unwrap_err();
    assert!(not_found(&e), "{e:#}");
    assert!(format!("{e:#}").ends_with(": 404 Not Found: manifest unknown"), "{e:#}");

    // What is there is not sent, and what another repository has neither.
    assert_eq!(push(&client, &copy, &layer, &[]).unwrap(), Pushed::Present);
    let third = registry.reference("third");
    assert_eq!(push(&client, &third, &layer, &["copy"]).unwrap(), Pushed::Mounted);
    assert_eq!(push(&client, &third, &noise(2, 1000), &["copy"]).unwrap(), Pushed::Sent);
    assert_eq!(push(&client, &third, b"", &[]).unwrap(), Pushed::Sent);

    // The command line.
    let digest = [&[PROGRAM, "digest"][..], &flags].concat();
    let line = format!("{}\n", manifest.digest.oci());
    assert_eq!(run(&[&digest[..], &[&there]].concat()), line);
    assert_eq!(run(&[&digest[..], &[&name.to_string(), "--arch=aarch64"]].concat()), line);
    let e = fails(&[&digest[..], &[&there, "--arch=x86_64"]].concat());
    assert_eq!(e, format!("rehydrator: {name}: no image for linux/amd64; it is one for linux/arm64\n"));

    // Without the right password, the right authority.
    let wrong = Options { credentials: Credentials::parse("user:wrong"), ..registry.options() };
    let e = format!("{:#}", Client::new(wrong).manifest(&name).unwrap_err());
    assert!(e.ends_with(": 401 Unauthorized: authentication required"), "{e}");
    let start = Instant::now();
    let stranger = Options { cert_dir: None, ..registry.options() };
    let e = format!("{:#}", Client::new(stranger).manifest(&name).unwrap_err());
    assert!(e.contains("invalid peer certificate: UnknownIssuer"), "{e}");
    assert!(start.elapsed() < Duration::from_secs(2), "tried again");
    let unchecked = Options { cert_dir: None, tls_verify: false, ..registry.options() };
    assert_eq!(Client::new(unchecked).digest(&name).unwrap(), manifest.digest);
    let command = [PROGRAM, "digest", flags[0], "--tls-verify=false", &there];
    assert_eq!(run(&command), line);
}

#[test]
fn without_tls_only_where_asked_for() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let name = registry.reference("x:1");
    let manifest = push_image(&registry.client(), &name, &tar(b"1"));
    assert_eq!(registry.client().digest(&name).unwrap(), manifest.digest);
    let strict = Client::new(Options { tls_verify: true, ..registry.options() });
    let e = format!("{:#}", strict.digest(&name).unwrap_err());
    assert!(e.contains("corrupt message of type InvalidContentType"), "{e}");
}

#[test]
fn all_pages_of_tags() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let client = registry.client();
    let manifest = push_image(&client, &registry.reference("x:t000"), &tar(b"1"));
    let tags: Vec<_> = (0..30).map(|i| format!("t{i:03}")).collect();
    for tag in &tags {
        client.push_manifest(&registry.reference(&format!("x:{tag}")), &manifest).unwrap();
    }
    let mut found = client.tags(&registry.reference("x")).unwrap();
    found.sort();
    assert_eq!(found, tags);

    // A registry that gives less than is asked for.
    let server = Server::start(|request| match request.path.as_str() {
        "/v2/x/y/tags/list?n=1000" => Reply::new(200, r#"{"name":"x/y","tags":["a","b"]}"#)
            .header("Link", r#"</v2/x/y/tags/list>; rel="first""#)
            .header("Link", r#"</v2/x/y/tags/list?last=b&n=2>; rel="next""#),
        "/v2/x/y/tags/list?last=b&n=2" => Reply::new(200, r#"{"name":"x/y","tags":["c"]}"#),
        _ => Reply::new(404, ""),
    });
    let name: Reference = format!("{}/x/y", server.address).parse().unwrap();
    assert_eq!(Client::new(insecure()).tags(&name).unwrap(), ["a", "b", "c"]);
}

/// Registries that refuse `Range`, and what they are not asked for.
#[test]
fn ranges_that_are_refused() {
    let blob = noise(3, 300_000);
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    for status in [400, 416, 501] {
        let content = blob.clone();
        let server = Server::start(move |request| match request.header("range") {
            Some(_) => Reply::new(status, ""),
            None => Reply::new(200, content.clone()),
        });
        let name: Reference = format!("{}/x", server.address).parse().unwrap();
        let client = Client::new(insecure());
        let part = client.blob_range(&name, digest, 100_000..200_000, size).unwrap();
        assert!(read(part).unwrap() == blob[100_000..200_000], "{status}");
        // All of it is no range.
        assert!(read(client.blob_range(&name, digest, 0..size, size).unwrap()).unwrap() == blob);
        let log = server.log();
        let ranges: Vec<_> = log.iter().filter(|r| r.path != "/v2/").map(|r| r.header("range")).collect();
        assert_eq!(ranges, [Some("bytes=100000-199999"), None, None]);
    }
}

/// Answers of registries that keep no track of referrers, and pages of tags that lead to themselves.
#[test]
fn registries_as_they_are() {
    let digest = Digest::of(b"image");
    for (status, body) in [
        (400, ""),
        (404, "404 page not found"),
        (405, ""),
        (406, ""),
        (200, "<!DOCTYPE html><html>hello</html>"),
        (200, "null"),
        (200, r#"{"schemaVersion":2,"manifests":null}"#),
    ] {
        let server = Server::start(move |request| match request.path.ends_with("/tags/list?n=1000") {
            true => {
                Reply::new(200, r#"{"tags":["a","b"]}"#).header("Link", "</v2/x/tags/list?n=1000>; rel=next")
            }
            false => Reply::new(status, body),
        });
        let name: Reference = format!("{}/x", server.address).parse().unwrap();
        let client = Client::new(insecure());
        let found = client.referrers(&name, digest).unwrap_or_else(|e| panic!("{status} {body}: {e:#}"));
        assert!(found.unwrap_or_default().is_empty(), "{status} {body}");
        assert_eq!(client.tags(&name).unwrap(), ["a", "b"]);
    }
    let server = Server::start(|_| Reply::new(500, ""));
    let name: Reference = format!("{}/x", server.address).parse().unwrap();
    assert!(Client::new(insecure()).referrers(&name, digest).is_err());
}

/// A registry that wants tokens: the one that gives them is at the same address.
fn bearer(want: &'static str) -> Server {
    let tokens = AtomicUsize::new(0);
    let realm = std::sync::Arc::new(std::sync::OnceLock::<String>::new());
    let told = realm.clone();
    let server = Server::start(move |request| {
        if request.path.starts_with("/token") {
            let n = tokens.fetch_add(1, Ordering::Relaxed);
            // The first ends at once.
            let ends = if n == 0 { 0 } else { 300 };
            let known = request.header("authorization").unwrap_or_default() == want
                || String::from_utf8_lossy(&request.body).contains(want);
            return match known {
                true => Reply::new(200, format!(r#"{{"token":"t{n}","expires_in":{ends}}}"#)),
                false => Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}"#),
            };
        }
        if request.header("authorization").is_some_and(|value| value.starts_with("Bearer t")) {
            return Reply::new(200, "{}");
        }
        let realm = realm.get().unwrap();
        let challenge = format!(r#"Bearer realm="{realm}",service="s p",scope="repository:x/y:pull""#);
        Reply::new(401, "").header("WWW-Authenticate", challenge)
    });
    told.set(format!("http://{}/token", server.address)).unwrap();
    server
}

#[test]
fn tokens() {
    let options = |text: &str| Options { credentials: Credentials::parse(text), ..insecure() };
    let server = bearer("");
    let name: Reference = format!("{}/x/y:1", server.address).parse().unwrap();
    let client = Client::new(insecure());
    for _ in 0..3 {
        client.manifest(&name).unwrap();
    }
    let token = "GET /token?service=s+p&scope=repository%3Ax%2Fy%3Apull";
    let get = "GET /v2/x/y/manifests/1";
    // The first token does not last until the second request.
    assert_eq!(server.lines(), [get, token, get, get, token, get, get]);

    let server = bearer("Basic bWU6cHc=");
    let name: Reference = format!("{}/x/y:1", server.address).parse().unwrap();
    Client::new(options("me:pw")).manifest(&name).unwrap();
    let e = format!("{:#}", Client::new(options("me:other")).manifest(&name).unwrap_err());
    assert!(e.ends_with(": 401 Unauthorized: who?") && e.contains("/token?"), "{e}");

    let server = bearer("grant_type=refresh_token");
    let name: Reference = format!("{}/x/y:1", server.address).parse().unwrap();
    Client::new(options("<token>:r+t")).manifest(&name).unwrap();
    let post = &server.log().into_iter().find(|r| r.method == "POST").unwrap();
    let body = String::from_utf8_lossy(&post.body);
    assert!(body.ends_with("scope=repository%3Ax%2Fy%3Apull&service=s+p&refresh_token=r%2Bt"), "{body}");
}

#[test]
fn a_credential_helper() {
    let tmp = temp();
    let helper = tmp.path().join("docker-credential-test");
    let asked = tmp.path().join("asked");
    let script = format!(
        "#!/bin/sh\ncat > '{}'\nprintf '{{\"Username\":\"user\",\"Secret\":\"secret\"}}'\n",
        asked.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let registry = Registry::secure(tmp.path());
    let name = registry.reference("x:1");
    let manifest = push_image(&registry.client(), &name, &tar(b"1"));
    let path = format!("{}:{}", tmp.path().display(), std::env::var("PATH").unwrap());
    for config in [
        format!(r#"{{"credHelpers":{{"{}":"test"}}}}"#, registry.address),
        format!(r#"{{"auths":{{"{}":{{}}}},"credsStore":"test"}}"#, registry.address),
    ] {
        // Where docker keeps it.
        fs::create_dir_all(tmp.path().join("home/.docker")).unwrap();
        fs::write(tmp.path().join("home/.docker/config.json"), config).unwrap();
        let output = std::process::Command::new(PROGRAM)
            .args(["digest", &name.to_string(), "--cert-dir"])
            .arg(registry.certs())
            .env_clear()
            .env("HOME", tmp.path().join("home"))
            .env("PATH", &path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.trim(), manifest.digest.oci(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read_to_string(&asked).unwrap(), registry.address);
        fs::remove_file(&asked).unwrap();
    }
}

#[test]
fn a_key_of_google_is_who_we_are() {
    let tmp = temp();
    let registry = Registry::secure(tmp.path());
    let name = registry.reference("project/x:1");
    let manifest = push_image(&registry.client(), &name, &tar(b"1"));
    let key = tmp.path().join("account.json");
    let (certs, name) = (format!("--cert-dir={}", registry.certs().display()), name.to_string());
    let auth = format!("--auth={}", key.display());
    fs::write(&key, GOOGLE_KEY).unwrap();
    assert_eq!(run(&[PROGRAM, "digest", &name, &certs, &auth]).trim(), manifest.digest.oci());
    run(&[
        PROGRAM,
        "pull",
        &name,
        &tmp.path().join("pulled").display().to_string(),
        &certs,
        &auth,
        "--cache=no",
    ]);
    fs::write(&key, GOOGLE_KEY.replace("secret", "other")).unwrap();
    let said = fails(&[PROGRAM, "digest", &name, &certs, &auth]);
    assert!(said.contains("401") && !said.contains("other"), "{said}");
}

#[test]
fn trouble_is_retried_or_refused_and_never_wrong_bytes() {
    let blob = noise(3, 3_000_000);
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    let content = blob.clone();
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let n = asked.fetch_add(1, Ordering::Relaxed);
        let part = Reply::range(request, &content);
        match n {
            0 => Reply::new(500, ""),
            1 => Reply::new(429, "").header("Retry-After", "1"),
            2 => Reply { cut: Some(1_000_000), ..part },
            // A server that forgot what a range is.
            3 => Reply { cut: Some(2_500_000), ..Reply::new(200, content.clone()) },
            4 => Reply { slow: Some(Duration::from_millis(10)), ..part },
            _ => Reply::new(404, ""),
        }
    });
    let name: Reference = format!("{}/x", server.address).parse().unwrap();
    let client = Client::new(insecure());
    let start = Instant::now();
    assert!(read(client.blob(&name, digest, size).unwrap()).unwrap() == blob);
    assert!(start.elapsed() >= Duration::from_secs(1), "Retry-After was not heeded");
    let log = server.log();
    let ranges: Vec<_> = log.iter().filter(|r| r.path != "/v2/").map(|r| r.header("range")).collect();
    assert_eq!(ranges, [None, None, None, Some("bytes=1000000-2999999"), Some("bytes=2500000-2999999")]);
    let e = read(client.blob(&name, digest, size).unwrap()).unwrap_err().to_string();
    assert!(e.ends_with(": 404 Not Found"), "{e}");
}

#[test]
fn lies() {
    let other = Digest::of(b"other");
    let server = Server::start(move |request| match request.path.as_str() {
        "/v2/x/manifests/claimed" => Reply::new(200, "{}").header("Docker-Content-Digest", other.oci()),
        "/v2/x/manifests/huge" => Reply::new(200, vec![b' '; (4 << 20) + 1]),
        "/v2/x/manifests/endless" => {
            Reply::new(200, vec![b' '; 5 << 20]).header("Transfer-Encoding", "identity")
        }
        path if path.starts_with("/v2/x/manifests/sha256:") => Reply::new(200, "{}"),
        path if path.starts_with("/v2/x/blobs/") => Reply::new(200, "wrong"),
        _ => Reply::new(404, ""),
    });
    let client = Client::new(insecure());
    let name: Reference = format!("{}/x", server.address).parse().unwrap();
    let e = |tag: &str| format!("{:#}", client.manifest(&name.with_tag(tag).unwrap()).unwrap_err());
    let found = Digest::of(b"{}");
    let mismatch = format!("manifest: sha256 mismatch: expected {other}, got {found}");
    assert!(e("claimed").ends_with(&mismatch), "{}", e("claimed"));
    assert!(e("huge").ends_with(": more than 4194304 bytes"), "{}", e("huge"));
    assert!(e("endless").ends_with(": more than 4194304 bytes"), "{}", e("endless"));
    let e = format!("{:#}", client.manifest(&name.with_digest(other)).unwrap_err());
    assert!(e.ends_with(&mismatch), "{e}");
    let blob = |size| client.blob(&name, other, size).unwrap();
    let e = read(blob(5)).unwrap_err().to_string();
    assert!(e.ends_with(&format!("sha256 mismatch: expected {other}, got {}", Digest::of(b"wrong"))));
    for size in [4, 6] {
        let e = read(blob(size)).unwrap_err().to_string();
        assert!(e.ends_with(&format!(": expected {size} bytes, the registry has 5")), "{e}");
    }
    let mut reader = blob(5);
    let mut buf = [0; 100];
    assert!((0..2).any(|_| reader.read(&mut buf).is_err()));
    assert!(reader.read(&mut buf).is_err(), "an end after an error");
}

/// A registry that keeps all it got of an upload, as the specification has it.
/// Each attempt brings two megabytes, always the same ones: that is no progress.
#[test]
fn what_comes_once_more_is_no_progress() {
    let blob = noise(7, 8 << 20);
    let body = blob.clone();
    let server = Server::start(move |_| Reply { cut: Some(2 << 20), ..Reply::new(200, body.clone()) });
    let name: Reference = format!("{}/x:1", server.address).parse().unwrap();
    let reader = Client::new(insecure()).blob(&name, Digest::of(&blob), blob.len() as u64).unwrap();
    let e = read(reader).unwrap_err().to_string();
    assert!(e.contains("gave up after 4 attempts"), "{e}");
    assert_eq!(server.lines().len(), 4);
}

fn keeps_uploads() -> (Server, Arc<Mutex<Vec<u8>>>) {
    let got = Arc::<Mutex<Vec<u8>>>::default();
    let have = got.clone();
    let server = Server::start(move |request| {
        let mut have = have.lock().unwrap();
        let range = |have: &[u8]| format!("0-{}", have.len().saturating_sub(1));
        match request.method.as_str() {
            "HEAD" => Reply::new(404, ""),
            "POST" => {
                have.clear();
                Reply::new(202, "").header("Location", "/upload")
            }
            "GET" => Reply::new(204, "").header("Location", "/upload").header("Range", range(&have)),
            "PATCH" => {
                let start = request.header("content-range").unwrap().split_once('-').unwrap().0;
                if start != have.len().to_string() {
                    return Reply::new(416, "");
                }
                have.extend(&request.body);
                Reply::new(202, "").header("Location", "/upload").header("Range", range(&have))
            }
            _ => {
                let digest = Digest::of(&have).oci().replace(':', "%3A");
                Reply::new(if request.path.ends_with(&digest) { 201 } else { 400 }, "")
            }
        }
    });
    (server, got)
}

#[test]
fn an_upload_that_is_cut_goes_on() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let pass = format!(
        "client_max_body_size 0; location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; }}",
        registry.address
    );
    let nginx = Nginx::with(tmp.path(), &pass);
    let before = nginx.url.strip_prefix("http://").unwrap().to_owned();
    let blob = noise(4, 20 << 20);
    let size = blob.len() as u64;
    let push_through = |proxy: &Proxy, name: &str, chunk| {
        let name: Reference = format!("{}/{name}", proxy.address).parse().unwrap();
        let client = Client::new(Options { chunk, ..insecure() });
        assert_eq!(push(&client, &name, &blob, &[]).unwrap(), Pushed::Sent);
        proxy.up() as f64 / size as f64
    };
    for percent in [30, 60, 90] {
        let at = size * percent / 100;
        // In the middle of a chunk, of which the registry keeps what it got.
        let (server, got) = keeps_uploads();
        let sent = push_through(&Proxy::start(&server.address, Cut::Byte(at)), "x", 8 << 20);
        assert!(sent < 1.1, "cut at {percent} %: {sent} times the bytes");
        assert!(*got.lock().unwrap() == blob);

        // Between chunks of docker-registry, and in the middle of one where a proxy stands before it that passes on
        // what is whole, as most do. Alone it gives up an upload that has a part of a chunk, which starts over; it may
        // take another chunk before it notices.
        let alone = 1.25 + percent as f64 / 100.0;
        for (to, cut, most) in [
            (&registry.address, Cut::Patch(at), 1.1),
            (&before, Cut::Byte(at), 1.1),
            (&registry.address, Cut::Byte(at), alone),
        ] {
            let sent = push_through(&Proxy::start(to, cut), &format!("x{percent}"), 1 << 20);
            assert!(sent < most, "cut at {percent} %: {sent} times the bytes");
            let name = registry.reference(&format!("x{percent}"));
            assert!(read(registry.client().blob(&name, Digest::of(&blob), size).unwrap()).unwrap() == blob);
            registry.forget(&name, Digest::of(&blob));
        }
    }
}

#[test]
fn a_registry_that_knows_no_chunks() {
    let blob = noise(5, 1_000_000);
    let server = Server::start(|request| match request.method.as_str() {
        "HEAD" => Reply::new(404, ""),
        "POST" => Reply::new(202, "").header("Location", "/upload?state=1"),
        "PATCH" => Reply::new(405, ""),
        "PUT" => Reply::new(201, ""),
        _ => Reply::new(404, ""),
    });
    let name: Reference = format!("{}/x", server.address).parse().unwrap();
    let client = Client::new(Options { chunk: 100_000, ..insecure() });
    assert_eq!(push(&client, &name, &blob, &[]).unwrap(), Pushed::Sent);
    let put = server.log().pop().unwrap();
    assert_eq!((put.method.as_str(), put.body == blob), ("PUT", true));
    let digest = Digest::of(&blob).oci().replace(':', "%3A");
    assert_eq!(put.path, format!("/upload?state=1&digest={digest}"));
}
