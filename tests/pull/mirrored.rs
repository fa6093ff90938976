//! Mirroring images: digests stay what they are, what belongs to an image comes along, what is there is not sent again.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use rehydrator::digest::Digest;
use serde_json::{Value, json};

use crate::pull::layers::{Layer, Tar, layout};
use crate::tools::example::{fails, ok, rehydrator, tool};
use crate::tools::registry::{Registry, noise};
use crate::tools::server::{Reply, Server};

fn mirror(args: &[&str]) -> Command {
    let mut command = rehydrator();
    command.args(["mirror", args[0], "--tls-verify=false"]).args(&args[1..]);
    command
}

fn said(command: &mut Command) -> String {
    String::from_utf8(ok(command)).unwrap().trim().to_owned()
}

/// The manifest, byte for byte, as skopeo finds it.
fn raw(image: &str) -> Vec<u8> {
    ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", image]))
}

fn push(from: &str, to: &str) {
    ok(tool("skopeo").args(["copy", "--quiet", "--all", "--dest-tls-verify=false", from, to]));
}

fn image(dir: &Path, name: &str, seed: u64) -> String {
    let tar = Tar::default().file("name", name).add(b'0', "noise", "", &noise(seed, 300_000)).end();
    let shared = Tar::default().add(b'0', "shared", "", &noise(99, 300_000)).end();
    layout(&dir.join(name), &[Layer::gzip(&shared), Layer::gzip(&tar)])
}

/// Makes a layout with one image one with an index of three platforms of it.
fn with_index(dir: &Path) {
    let platform = |arch: &str| json!({ "os": "linux", "architecture": arch });
    let arm = json!({ "os": "linux", "architecture": "arm", "variant": "v7" });
    with_platforms(dir, &[platform("amd64"), arm, platform("s390x")]);
}

/// The same, with an index of these platforms; `null` is none.
fn with_platforms(dir: &Path, platforms: &[Value]) {
    let index: Value = serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
    let manifest = |platform: &Value| {
        let mut manifest = index["manifests"][0].clone();
        if !platform.is_null() {
            manifest["platform"] = platform.clone();
        }
        manifest
    };
    let manifests: Vec<_> = platforms.iter().map(manifest).collect();
    let media_type = "application/vnd.oci.image.index.v1+json";
    let list = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests }).to_string();
    let digest = Digest::of(list.as_bytes());
    fs::write(dir.join("blobs/sha256").join(digest.to_string()), &list).unwrap();
    let entry = json!({ "mediaType": media_type, "digest": digest.oci(), "size": list.len(),
        "annotations": { "org.opencontainers.image.ref.name": "latest" } });
    fs::write(dir.join("index.json"), json!({ "schemaVersion": 2, "manifests": [entry] }).to_string())
        .unwrap();
}

/// What refers to an image of a layout, as oras and zot write it: a manifest without a tag.
#[test]
fn referrers_of_a_layout() {
    let dir = tempfile::tempdir().unwrap();
    let here = image(dir.path(), "here", 8);
    let root = dir.path().join("here");
    let mut index: Value = serde_json::from_slice(&fs::read(root.join("index.json")).unwrap()).unwrap();
    let blob = |bytes: &[u8], media_type: &str| {
        let digest = Digest::of(bytes);
        fs::write(root.join("blobs/sha256").join(digest.to_string()), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.oci(), "size": bytes.len() })
    };
    let empty = blob(b"{}", "application/vnd.oci.empty.v1+json");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let mut subject = index["manifests"][0].clone();
    subject.as_object_mut().unwrap().remove("annotations");
    let referrer = json!({ "schemaVersion": 2, "mediaType": kind, "artifactType": "application/vnd.example.sbom",
        "config": empty, "layers": [empty], "subject": subject });
    let entry = blob(referrer.to_string().as_bytes(), kind);
    index["manifests"].as_array_mut().unwrap().push(entry.clone());
    fs::write(root.join("index.json"), index.to_string()).unwrap();

    // It is not taken for another image, and goes along when asked for, into a layout and into a registry.
    let registry = Registry::plain(dir.path());
    let to = dir.path().join("there");
    for to in [format!("oci:{}", to.display()), format!("{}/x:1", registry.address)] {
        ok(&mut mirror(&["image", &here, &to, "--referrers"]));
    }
    let copied =
        to.join("blobs/sha256").join(entry["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    assert_eq!(fs::read(copied).unwrap(), referrer.to_string().as_bytes());
    let tag = subject["digest"].as_str().unwrap().replace(':', "-");
    let list: Value =
        serde_json::from_slice(&raw(&format!("docker://{}/x:{tag}", registry.address))).unwrap();
    assert_eq!(list["manifests"][0]["digest"], entry["digest"]);
    assert_eq!(list["manifests"][0]["artifactType"], "application/vnd.example.sbom");
}

/// Indexes that say less of their images than they could: skopeo takes an image out of each.
#[test]
fn platforms_that_say_little() {
    let dir = tempfile::tempdir().unwrap();
    let amd64 = json!({ "os": "linux", "architecture": "amd64" });
    let empty_variant = json!({ "os": "linux", "architecture": "amd64", "variant": "" });
    let attestation = json!({ "os": "unknown", "architecture": "unknown" });
    for (n, platforms) in [
        vec![empty_variant],
        vec![amd64.clone(), json!({})],
        vec![json!({ "architecture": "arm64" }), amd64],
        vec![Value::Null],
        vec![attestation, Value::Null],
    ]
    .into_iter()
    .enumerate()
    {
        let here = image(dir.path(), &n.to_string(), 7);
        with_platforms(&dir.path().join(n.to_string()), &platforms);
        let copy = dir.path().join(format!("skopeo.{n}"));
        let to = format!("dir:{}", copy.display());
        ok(tool("skopeo").args([
            "copy",
            "--quiet",
            "--override-arch=amd64",
            "--insecure-policy",
            &here,
            &to,
        ]));
        let expected = Digest::of(&fs::read(copy.join("manifest.json")).unwrap());
        let mut pull = rehydrator();
        let out = dir.path().join(format!("out.{n}"));
        pull.args(["pull", "--cache=no", "--arch=amd64", &here]).arg(out);
        assert_eq!(said(&mut pull), expected.oci(), "{platforms:?}");
    }
}

#[test]
fn images_are_copied_as_they_are() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (from, to) = (Registry::plain(dir.path()), Registry::plain(dir.path()));
    let (from, to) = (&from.address, &to.address);
    let app = image(dir.path(), "app", 1);
    with_index(&dir.path().join("app"));
    let other = image(dir.path(), "other", 2);
    let signature = image(dir.path(), "signature", 3);
    for (image, tag) in [(&app, "v1"), (&other, "v2"), (&other, "v2-debug"), (&other, "latest")] {
        push(image, &format!("docker://{from}/team/app:{tag}"));
    }
    let digest = Digest::of(&raw(&format!("docker://{from}/team/app:v1")));
    for suffix in [".sig", ""] {
        push(&signature, &format!("docker://{from}/team/app:sha256-{digest}{suffix}"));
    }

    let source = format!("{from}/team/app:v1");
    let copied = format!("{to}/copy/app");
    let line = said(&mut mirror(&["image", "--dry-run", &source, &copied]));
    assert!(line.contains("images: 2, blobs: 6 (1."), "{line}");
    assert!(
        !tool("skopeo")
            .args(["inspect", "--tls-verify=false", &format!("docker://{copied}")])
            .output()
            .unwrap()
            .status
            .success()
    );
    let line = said(&mut mirror(&["image", &source, &copied]));
    // The signature has one blob that the image has, too.
    assert!(line.contains("images: 2, blobs: 5"), "{line}");
    assert_eq!(raw(&format!("docker://{copied}:latest")), raw(&format!("docker://{source}")));
    let appended = |repository: &str, suffix: &str| format!("docker://{repository}:sha256-{digest}{suffix}");
    assert_eq!(raw(&appended(&copied, ".sig")), raw(&appended(&format!("{from}/team/app"), ".sig")));
    let line = said(&mut mirror(&["image", "--referrers", &source, &copied]));
    assert!(line.ends_with("images: 3, blobs: 0 (0 B), already there: 9"), "{line}");
    raw(&appended(&copied, ""));

    // By tags, into another repository of the same registry, and into a layout.
    let line = said(&mut mirror(&[
        "image",
        "--tags",
        "- *-debug",
        "--tags",
        "v*",
        &source,
        &format!("{to}/copy/tags"),
    ]));
    assert!(line.contains("images: 3"), "{line}");
    let tags =
        ok(tool("skopeo").args(["list-tags", "--tls-verify=false", &format!("docker://{to}/copy/tags")]));
    let mut tags: Value = serde_json::from_slice(&tags).unwrap();
    tags["Tags"].as_array_mut().unwrap().sort_by_key(|tag| tag.to_string());
    assert_eq!(tags["Tags"], json!([format!("sha256-{digest}.sig"), "v1", "v2"]));
    let layout = format!("oci:{}", dir.path().join("layout").display());
    said(&mut mirror(&["image", "--tags", "v?", &source, &layout]));
    assert_eq!(raw(&format!("{layout}:v1")), raw(&format!("docker://{source}")));
    // From there back into a registry, as one archive, and one platform alone.
    said(&mut mirror(&["image", &format!("{layout}:v1"), &format!("{to}/back/app:v1")]));
    assert_eq!(raw(&format!("docker://{to}/back/app:v1")), raw(&format!("docker://{source}")));
    let archive = format!("oci-archive:{}", dir.path().join("app.tar").display());
    said(&mut mirror(&["image", &source, &archive]));
    ok(tool("skopeo").args(["inspect", &archive]));
    let one = format!("oci:{}:one", dir.path().join("one").display());
    said(&mut mirror(&["image", "--platform", "linux/arm/v7", &source, &one]));
    let index: Value = serde_json::from_slice(&raw(&one)).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    let said = fails(&mut mirror(&["image", "--platform", "linux/mips", &source, &one]));
    assert!(
        said.contains("no image for linux/mips; there are: linux/amd64, linux/arm/v7, linux/s390x"),
        "{said}"
    );
}

/// A registry that knows itself what refers to an image, and says so in pages: a bill of materials, and its signature.
#[test]
fn referrers_that_the_registry_names() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut blobs = HashMap::new();
    let digests = ["app", "sbom", "signature"].map(|name| {
        let image = image(dir.path(), name, name.len() as u64);
        for entry in fs::read_dir(dir.path().join(name).join("blobs/sha256")).unwrap() {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            blobs.insert(Digest::of(&bytes).oci(), bytes);
        }
        Digest::of(&raw(&image)).oci()
    });
    let [app, sbom, signature] = digests.clone();
    let server = Server::start(move |request| {
        let (path, last) = request.path.rsplit_once('/').unwrap();
        let json = |body: Value| {
            Reply::new(200, body.to_string())
                .header("Content-Type", "application/vnd.oci.image.index.v1+json")
        };
        let one = |digest: &str| {
            json!([{ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
                "size": blobs[digest].len(), "artifactType": "application/x-test" }])
        };
        if path == "/v2/x/referrers" {
            let next = format!("{app}?page=2");
            return match last {
                last if last == app => json(json!({ "manifests": [] }))
                    .header("Link", format!("</v2/x/referrers/{next}>; rel=\"next\"")),
                last if last == next => json(json!({ "manifests": one(&sbom) })),
                last if last == sbom => json(json!({ "manifests": one(&signature) })),
                _ => json(json!({ "manifests": [] })),
            };
        }
        match blobs.get(if last == "v1" { app.as_str() } else { last }) {
            Some(bytes) => Reply::new(200, bytes.clone())
                .header("Content-Type", "application/vnd.oci.image.manifest.v1+json"),
            None => Reply::new(404, ""),
        }
    });
    let registry = Registry::plain(dir.path());
    let copied = format!("{}/copy", registry.address);
    let line = said(&mut mirror(&["image", "--referrers", &format!("{}/x:v1", server.address), &copied]));
    assert!(line.contains("images: 3, "), "{line}");
    let [app, sbom, signature] = digests;
    for (subject, referrer) in [(app, &sbom), (sbom.clone(), &signature)] {
        let tag = format!("docker://{copied}:{}", subject.replace(':', "-"));
        let index: Value = serde_json::from_slice(&raw(&tag)).unwrap();
        assert_eq!(index["manifests"][0]["digest"], *referrer);
        assert_eq!(index["manifests"][0]["artifactType"], "application/x-test");
        assert_eq!(Digest::of(&raw(&format!("docker://{copied}@{referrer}"))).oci(), *referrer);
    }
}

#[test]
fn one_that_fails_does_not_end_the_rest() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let registry = Registry::plain(dir.path());
    let to = &registry.address;
    let (first, last) = (image(dir.path(), "first", 1), image(dir.path(), "last", 2));
    let config = dir.path().join("images.json");
    let gone = format!("{to}/not/there:v1");
    let entry =
        |source: &str, name: &str| json!({ "source": source, "destination": format!("{to}/all/{name}") });
    let images = [entry(&first, "first"), entry(&gone, "gone"), entry(&last, "last")];
    fs::write(&config, json!({ "images": images }).to_string()).unwrap();
    let config = config.to_str().unwrap();
    let said = fails(&mut mirror(&["images", config]));
    assert!(said.contains(&format!("1 of 3 images failed:\n{gone} -> {to}/all/gone: ")), "{said}");
    for name in ["first", "last"] {
        raw(&format!("docker://{to}/all/{name}"));
    }
    fs::write(config, r#"{"images":[{"source":"a","destination":"b","tag":["x"]}]}"#).unwrap();
    let said = fails(&mut mirror(&["images", config]));
    assert!(said.contains("unknown field `tag`"), "{said}");
}
