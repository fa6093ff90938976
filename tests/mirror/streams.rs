//! Streams: Fedora CoreOS with signatures, RHEL CoreOS without, and clients that use the mirror.

use std::fs;
use std::path::Path;

use rehydrator::catalog::Catalog;
use rehydrator::digest::Digest;
use rehydrator::http::{Http, Retry};
use rehydrator::mirror::config::{Config, Defaults};
use rehydrator::mirror::release;
use rehydrator::stream::Stream;
use serde_json::{Map, Value, json};

use crate::mirror::site::{Entry, Site, names, ok, rehydrator, text};
use crate::tools::{Nginx, noise};

pub(crate) const NEW: &str = "44.20260707.3.1";
const OLD: &str = "44.20260601.3.0";
const OLDER: &str = "43.20260501.3.0";

/// Files of a release: architecture, platform, format, file, name.
pub(crate) const FILES: [(&str, &str, &str, &str, &str); 7] = [
    ("x86_64", "aws", "vmdk.xz", "disk", "aws.x86_64.vmdk.xz"),
    ("x86_64", "metal", "iso", "disk", "live-iso.x86_64.iso"),
    ("x86_64", "metal", "pxe", "kernel", "live-kernel.x86_64"),
    ("x86_64", "metal", "pxe", "rootfs", "live-rootfs.x86_64.img"),
    ("x86_64", "qemu", "qcow2.xz", "disk", "qemu.x86_64.qcow2.xz"),
    ("aarch64", "metal", "iso", "disk", "live-iso.aarch64.iso"),
    ("aarch64", "qemu", "qcow2.xz", "disk", "qemu.aarch64.qcow2.xz"),
];

pub(crate) fn name(version: &str, file: &str) -> String {
    format!("fedora-coreos-{version}-{file}")
}

/// Serves a release and gives its artifacts: by architecture, platform, format and file.
fn release(site: &Site, nginx: &Nginx, version: &str, signed: bool) -> Map<String, Value> {
    let mut archs = Map::new();
    for (i, (arch, platform, format, file, rest)) in FILES.into_iter().enumerate() {
        let name = name(version, rest);
        let path = format!("prod/{version}/{arch}/{name}");
        // No installer takes less than a mebibyte.
        let bytes = noise(i as u64 + version.len() as u64, (1 << 20) + i);
        let mut artifact =
            json!({"location": format!("{}/{path}", nginx.url), "sha256": Digest::of(&bytes).to_string()});
        if signed {
            site.put_signed(&path, &bytes);
            artifact["signature"] = json!(format!("{}/{path}.sig", nginx.url));
        } else {
            site.put(&path, &bytes);
        }
        archs.entry(arch).or_insert(json!({}))[platform][format][file] = artifact;
    }
    archs
}

/// The stream document of a release.
fn document(version: &str, archs: &Map<String, Value>) -> Value {
    let mut architectures = Map::new();
    for (arch, platforms) in archs {
        let artifacts: Map<_, _> = platforms
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, formats)| (name.clone(), json!({"release": version, "formats": formats})))
            .collect();
        let images = json!({"aws": {"regions": {"eu-west-1": {"release": version, "image": "ami-1"}}}});
        architectures.insert(arch.clone(), json!({"artifacts": artifacts, "images": images}));
    }
    json!({"stream": "stable", "metadata": {"last-modified": "2026-07-07T00:00:00Z"}, "architectures": architectures})
}

/// `release.json` of a release.
fn metadata(version: &str, archs: &Map<String, Value>) -> Value {
    let mut architectures = Map::new();
    for (arch, platforms) in archs {
        let mut media = Map::new();
        for (name, formats) in platforms.as_object().unwrap() {
            media.insert(name.clone(), json!({"artifacts": formats}));
        }
        media.insert("gcp".into(), Value::Null);
        architectures.insert(arch.clone(), json!({"commit": "0", "media": media}));
    }
    json!({"release": version, "stream": "stable", "architectures": architectures})
}

/// A server with three releases of a stream.
pub(crate) fn server() -> (Site, Nginx) {
    let site = Site::new();
    let nginx = Nginx::serve(&site.www(""));
    let mut pointers = Vec::new();
    for version in [OLDER, OLD, NEW] {
        let archs = release(&site, &nginx, version, true);
        let metadata = metadata(version, &archs).to_string();
        site.put(&format!("builds/{version}/release.json"), metadata.as_bytes());
        pointers.push(
            json!({"version": version, "metadata": format!("{}/builds/{version}/release.json", nginx.url)}),
        );
        if version == NEW {
            site.put("streams/stable.json", document(version, &archs).to_string().as_bytes());
        }
    }
    site.put("releases.json", json!({"stream": "stable", "releases": pointers}).to_string().as_bytes());
    (site, nginx)
}

pub(crate) fn source(nginx: &Nginx) -> Value {
    json!({"type": "stream", "url": format!("{}/streams/{{stream}}.json", nginx.url), "keys": ["keys"],
        "releases": format!("{}/releases.json", nginx.url)})
}

fn links(site: &Site) -> Vec<String> {
    names(&site.tree()).into_iter().filter(|n| n.contains("->")).collect()
}

#[test]
fn a_stream_and_who_installs_from_it() {
    let (site, nginx) = server();
    let mut source = source(&nginx);
    source["architectures"] = json!(["x86_64"]);
    source["formats"] = json!(["iso", "pxe", "qcow2.xz"]);
    source["filters"] = json!(["- *kernel*"]);
    site.config(&json!({"sources": [source]}));
    let mirror = Nginx::serve(site.dir.path());
    let base = format!("{}/dest", mirror.url);
    let summary = site.mirror(&["--base-url", &base]).good();
    assert_eq!(summary.counts(), (3, 0));
    assert_eq!(links(&site), [NEW, "current"].map(|l| format!("stable/{l} -> ../all/{NEW}")));
    let files: Vec<_> =
        names(&site.tree()).into_iter().filter(|n| n.contains("/fedora") && !n.ends_with(".sig")).collect();
    let expected = ["live-iso.x86_64.iso", "live-rootfs.x86_64.img", "qemu.x86_64.qcow2.xz"];
    assert_eq!(files, expected.map(|f| format!("all/{NEW}/x86_64/{}", name(NEW, f))));
    // The original is kept; the other names what is here, and from here, with everything else as it was.
    let published = fs::read(site.www("streams/stable.json")).unwrap();
    assert_eq!(fs::read(site.dest("streams/stable.upstream.json")).unwrap(), published);
    let here: Value = serde_json::from_slice(&fs::read(site.dest("streams/stable.json")).unwrap()).unwrap();
    let published: Value = serde_json::from_slice(&published).unwrap();
    assert_eq!(here["metadata"], published["metadata"]);
    let x86 = &here["architectures"]["x86_64"];
    assert_eq!(x86["images"], published["architectures"]["x86_64"]["images"]);
    assert_eq!(here["architectures"].as_object().unwrap().len(), 1);
    assert_eq!(x86["artifacts"].as_object().unwrap().keys().collect::<Vec<_>>(), ["metal", "qemu"]);

    // A client: the document, a file that it names, its digest and its signature.
    let get = |url: &str| {
        ok(std::process::Command::new("curl")
            .args(["--fail", "--silent", "--show-error", "--output"])
            .arg(site.dir.path().join(url.rsplit('/').next().unwrap()))
            .arg(url))
    };
    let disk = &x86["artifacts"]["qemu"]["formats"]["qcow2.xz"]["disk"];
    get(&format!("{base}/streams/stable.json"));
    get(disk["location"].as_str().unwrap());
    get(disk["signature"].as_str().unwrap());
    let file = name(NEW, "qemu.x86_64.qcow2.xz");
    assert_eq!(
        Digest::of(&fs::read(site.dir.path().join(&file)).unwrap()).to_string(),
        disk["sha256"].as_str().unwrap()
    );
    let path = |f: &str| site.dir.path().join(f).to_str().unwrap().to_owned();
    site.gpg.run("", &["--verify", &path(&format!("{file}.sig")), &path(&file)], b"");
    // So does the download of this program.
    let work = path("work");
    ok(rehydrator().args([
        "build",
        "init",
        "--workdir",
        &work,
        "--stream-url",
        &format!("{base}/streams/stable.json"),
    ]));
    ok(rehydrator().args(["build", "download", "--workdir", &work, "--key", &path("keys")]));

    // Nothing the second time, and all of it checked again on demand.
    let before = nginx.log();
    assert_eq!(site.mirror(&["--base-url", &base, "--verify"]).good().counts(), (0, 3));
    let after: Vec<_> = nginx.log();
    assert_eq!(
        after.iter().filter(|l| l.contains("/prod/")).count(),
        before.iter().filter(|l| l.contains("/prod/")).count()
    );
}

#[test]
fn older_releases() {
    let (site, nginx) = server();
    let mut source = source(&nginx);
    source["architectures"] = json!(["aarch64"]);
    source["keep"] = json!(2);
    source["versions"] = json!({"minimum": "43"});
    site.config(&json!({"sources": [source.clone()]}));
    // No more than are kept.
    assert_eq!(site.mirror(&[]).good().counts(), (4, 0));
    assert_eq!(
        links(&site),
        [OLD, NEW, "current"]
            .map(|l| format!("stable/{l} -> ../all/{}", if l == "current" { NEW } else { l }))
    );
    assert!(!site.dest("streams/stable.json").exists() && site.dest("streams/stable.upstream.json").exists());
    source["versions"] = json!({"pin": [OLDER]});
    source["keep"] = json!(1);
    site.config(&json!({"sources": [source.clone()]}));
    let summary = site.mirror(&["--base-url", "http://mirror.example/coreos/"]).good();
    assert_eq!(summary.counts(), (2, 0));
    assert_eq!(summary.0["removed"], json!([format!("all/{OLD}")]));
    assert!(links(&site).contains(&format!("stable/current -> ../all/{OLDER}")));
    // There is no published document of it: this one is made of its release.json.
    let text = fs::read_to_string(site.dest("streams/stable.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let disk = &document["architectures"]["aarch64"]["artifacts"]["qemu"];
    assert_eq!(disk["release"], OLDER);
    let file = name(OLDER, "qemu.aarch64.qcow2.xz");
    assert_eq!(
        disk["formats"]["qcow2.xz"]["disk"]["location"],
        format!("http://mirror.example/coreos/all/{OLDER}/aarch64/{file}")
    );
    assert!(!text.contains("x86_64") && !text.contains("127.0.0.1"));
    source["versions"] = json!({"pin": [OLDER, "42.0"]});
    site.config(&json!({"sources": [source]}));
    assert_eq!(site.mirror(&[]).failed(), ["42.0: there is no such release"]);
}

/// A file that fails keeps the release from becoming current, and nothing else.
#[test]
fn incomplete_is_not_current() {
    let (site, nginx) = server();
    let archs = release(&site, &nginx, OLD, true);
    site.put("streams/stable.json", document(OLD, &archs).to_string().as_bytes());
    site.config(&json!({"sources": [source(&nginx)]}));
    let base = ["--base-url", "http://mirror.example/"];
    site.mirror(&base).good();
    let complete = site.tree();
    let stale = site.mirror(&[]).good().skipped();
    assert_eq!(stale, ["streams/stable.json: it is not renewed without a base URL"]);
    let archs = release(&site, &nginx, NEW, true);
    site.put("streams/stable.json", document(NEW, &archs).to_string().as_bytes());
    let bad = format!("prod/{NEW}/x86_64/{}", name(NEW, "aws.x86_64.vmdk.xz"));
    let unsigned = format!("prod/{NEW}/x86_64/{}.sig", name(NEW, "live-iso.x86_64.iso"));
    let bytes = fs::read(site.www(&bad)).unwrap();
    let signature = fs::read(site.www(&unsigned)).unwrap();
    site.put(&bad, b"something else");
    fs::remove_file(site.www(&unsigned)).unwrap();
    let summary = site.mirror(&base);
    assert_eq!(summary.counts(), (5, 0));
    let path = |f: &str| format!("all/{NEW}/x86_64/{}", name(NEW, f));
    assert_eq!(
        summary.failed(),
        [
            format!(
                "{}: sha256 mismatch: expected {}, got {}",
                path("aws.x86_64.vmdk.xz"),
                Digest::of(&bytes),
                Digest::of(b"something else")
            ),
            format!("{}: there is no signature", path("live-iso.x86_64.iso")),
        ]
    );
    assert_eq!(summary.0["channels"], json!([{"channel": "stable", "current": OLD, "complete": false}]));
    let mut tree = site.tree();
    tree.retain(|path, _| !path.starts_with(&format!("all/{NEW}")));
    assert_eq!(tree, complete);
    site.put(&bad, &bytes);
    site.put(&unsigned, &signature);
    assert_eq!(site.mirror(&base).good().counts(), (2, 5));
    assert_eq!(fs::read_link(site.dest("stable/current")).unwrap(), Path::new("../all").join(NEW));
}

#[test]
fn without_signatures_only_when_told_so() {
    let site = Site::new();
    let nginx = Nginx::serve(&site.www(""));
    let archs = release(&site, &nginx, "9.6.20260101-0", false);
    let mut document = document("9.6.20260101-0", &archs);
    document["stream"] = json!("rhcos");
    site.put("streams/rhcos.json", document.to_string().as_bytes());
    let mut source = json!({"type": "stream", "streams": ["rhcos"], "url": format!("{}/streams/{{stream}}.json", nginx.url)});
    site.config(&json!({"sources": [source.clone()]}));
    let failed = site.mirror(&[]).failed();
    assert!(
        failed.len() == 1 && failed[0].starts_with("rhcos: no signing keys are known for it: "),
        "{failed:?}"
    );
    source["keys"] = json!(["keys"]);
    site.config(&json!({"sources": [source.clone()]}));
    let summary = site.mirror(&[]);
    assert_eq!((summary.counts(), summary.failed().len()), ((0, 0), 7));
    assert!(summary.failed().iter().all(|f| f.ends_with("there is no signature")));
    assert!(!names(&site.tree()).iter().any(|n| n.contains("fedora")));
    source["unsigned"] = json!(true);
    site.config(&json!({"sources": [source]}));
    assert_eq!(site.mirror(&[]).good().counts(), (7, 0));
    assert!(
        site.tree().values().filter(|e| matches!(e, Entry::File(_))).count() == 8,
        "seven, and the document"
    );
    let disk = format!("all/9.6.20260101-0/x86_64/{}", name("9.6.20260101-0", "qemu.x86_64.qcow2.xz"));
    fs::write(site.dest(&disk), b"damaged").unwrap();
    assert_eq!(site.mirror(&["--verify"]).good().counts(), (1, 6));
}

#[test]
fn hostile_documents() {
    let (site, nginx) = server();
    site.config(&json!({"sources": [source(&nginx)]}));
    let archs = release(&site, &nginx, NEW, true);
    let attempts: [(&str, Value, &str); 6] = [
        ("location", json!(format!("{}/prod/..", nginx.url)), "not a file name: \"..\""),
        (
            "location",
            json!(format!("{}/prod/.hidden", nginx.url)),
            "not the name of a file of a mirror: \".hidden\"",
        ),
        (
            "location",
            json!(format!("{}/prod/a%2fb", nginx.url)),
            "not the name of a file of a mirror: \"a%2fb\"",
        ),
        ("location", json!(format!("{}/prod/x.sig", nginx.url)), "may not end in .sig"),
        ("release", json!("../../x"), "not the name of a version: \"../../x\""),
        ("release", json!("current"), "not the name of a version: \"current\""),
    ];
    for (key, value, error) in attempts {
        let mut document = document(NEW, &archs);
        let qemu = &mut document["architectures"]["x86_64"]["artifacts"]["qemu"];
        if key == "release" {
            qemu["release"] = value;
        } else {
            qemu["formats"]["qcow2.xz"]["disk"][key] = value;
        }
        site.put("streams/stable.json", document.to_string().as_bytes());
        let failed = site.mirror(&[]).failed();
        assert!(failed.len() == 1 && failed[0].contains(error), "{error}: {failed:?}");
    }
    assert_eq!(names(&site.tree()), [""; 0]);
}

/// Real documents: every artifact of them has its place, and what the mirror serves in their stead is complete.
#[test]
fn the_published_documents() {
    let site = Site::new();
    let nginx = Nginx::serve(&site.www(""));
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("stream-metadata/samples");
    for (stream, file, unsigned) in [("stable", "fcos.json", false), ("rhcos-4.21", "rhcos.json", true)] {
        let published = fs::read(samples.join(file)).unwrap();
        site.put(&format!("streams/{stream}.json"), &published);
        let config = json!({"sources": [{"type": "stream", "streams": [stream], "unsigned": unsigned,
            "url": format!("{}/streams/{{stream}}.json", nginx.url)}]});
        let config =
            Config::parse(config.to_string().as_bytes(), site.dir.path(), &Defaults::default()).unwrap();
        let http = Http::new(Retry::default()).unwrap();
        let base = "https://mirror.example/".parse().unwrap();
        let plan = release::plan(&config.sources[0], stream, Some(&base), &http).unwrap();
        assert!(plan.problems.is_empty(), "{:?}", plan.problems);
        let count = |json: &[u8]| Catalog::new(&Stream::parse(json).unwrap()).unwrap().items.len();
        let files: usize = plan.versions.iter().map(|v| v.files.len()).sum();
        assert!(files == count(&published) && files > 40, "{files}");
        let (path, rewritten) = plan.documents.last().unwrap();
        assert_eq!(path, Path::new(&format!("streams/{stream}.json")));
        assert_eq!(count(rewritten), files);
        let locations = text(rewritten).matches("\"location\": \"https://mirror.example/all/").count();
        assert_eq!(locations, files);
        assert_eq!(plan.current.as_ref(), plan.versions.first().map(|v| &v.name));
    }
}

/// A stream is what was asked for, no older than it was, and signed if it was.
#[test]
fn a_stream_does_not_go_backwards() {
    let (site, nginx) = server();
    let mut source = source(&nginx);
    source["formats"] = json!(["iso"]);
    let configure = |source: &Value| site.config(&json!({"sources": [source]}));
    configure(&source);
    let archs = |version| release(&site, &nginx, version, true);
    let (old, new) = (archs(OLD), archs(NEW));
    let put = |document: &Value| site.put("streams/stable.json", document.to_string().as_bytes());
    let put_signed =
        |document: &Value| site.put_signed("streams/stable.json", document.to_string().as_bytes());
    let current = || fs::read_link(site.dest("stable/current")).unwrap();
    let failed = |more: &[&str]| {
        let failed = site.mirror(more).failed();
        assert_eq!(failed.len(), 1, "{failed:?}");
        failed[0].clone()
    };
    let url = format!("{}/streams/stable.json", nginx.url);

    // Another stream, signed by the same key.
    let mut testing = document(NEW, &new);
    testing["stream"] = json!("testing");
    put_signed(&testing);
    let expected = format!("stable: {url}: stream metadata: expected stream \"stable\", found \"testing\"");
    assert_eq!(failed(&["--allow-downgrade"]), expected);
    assert_eq!(names(&site.tree()), [""; 0]);

    put_signed(&document(NEW, &new));
    site.mirror(&[]).good();
    let before = site.tree();
    // One architecture is older, then both are.
    let mut mixed = document(NEW, &new);
    mixed["architectures"]["aarch64"] = document(OLD, &old)["architectures"]["aarch64"].clone();
    put_signed(&mixed);
    let older = |arch: &str| {
        format!(
            "stable: the server offers version {OLD} for {arch}, older than {NEW}, which the mirror had: --allow-downgrade takes it"
        )
    };
    assert_eq!(failed(&[]), older("aarch64"));
    put_signed(&document(OLD, &old));
    assert_eq!(failed(&[]), older("aarch64"));
    // The same document without its signature.
    put(&document(NEW, &new));
    fs::remove_file(site.www("streams/stable.json.sig")).unwrap();
    let unsigned = "stable: the server has no signature for what names the current version, which was signed before: \
                    --allow-downgrade takes it";
    assert_eq!(failed(&[]), unsigned);
    assert_eq!(site.tree(), before);

    // The option takes it, and no signature of another document stays.
    put(&document(OLD, &old));
    let output = site.command().arg("--allow-downgrade").output().unwrap();
    assert!(output.status.success() && text(&output.stderr).contains("taken because of --allow-downgrade"));
    assert_eq!(current(), Path::new("../all").join(OLD));
    let upstream = site.dest("streams/stable.upstream.json");
    assert_eq!(fs::read_to_string(&upstream).unwrap(), document(OLD, &old).to_string());
    assert!(!site.dest("streams/stable.upstream.json.sig").exists());
    site.mirror(&[]).good();

    // The configuration may say which version is current, and a minimum holds for all.
    source["versions"] = json!({"minimum": NEW});
    configure(&source);
    assert_eq!(failed(&[]), format!("stable: the current version is {OLD}, which is before {NEW}"));
    put(&mixed);
    assert_eq!(failed(&[]), format!("stable: the current version is {OLD}, which is before {NEW}"));
    put(&document(NEW, &new));
    site.mirror(&[]).good();
    assert_eq!(current(), Path::new("../all").join(NEW));
    source["versions"] = json!({"pin": [OLD]});
    configure(&source);
    site.mirror(&[]).good();
    assert_eq!(current(), Path::new("../all").join(OLD));

    // What was mirrored by a program that did not write down what it had.
    let state = site.dest(".rehydrator/state.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    let channel = json["channels"]["stable"].as_object_mut().unwrap();
    assert!(channel.remove("newest").is_some());
    fs::write(&state, json.to_string()).unwrap();
    source["versions"] = json!({});
    configure(&source);
    put(&document(OLDER, &archs(OLDER)));
    let expected = format!(
        "stable: the server offers version {OLDER}, older than {OLD}, which is current: --allow-downgrade takes it"
    );
    assert_eq!(failed(&[]), expected);
}
