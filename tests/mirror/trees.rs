//! The trees of Container Linux: that of the README of oppositus, and what grew out of it.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::mirror::site::{Entry, Site, fails, names, ok, rehydrator};
use crate::tools::{Nginx, noise};

/// The configuration in the README of oppositus, to the letter.
const OPPOSITUS: &str = r#"{
    "channels": ["stable", "beta"],
    "filters": [
        "+ coreos_production_pxe[._]*",
        "+ coreos_developer_container[._]*",
        "- *"
    ]
}
"#;

/// The files that it takes. The README shows twelve of the twenty it has for a version, and `...` for the rest.
const TAKEN: [&str; 10] = [
    "coreos_developer_container.bin.bz2",
    "coreos_developer_container.bin.bz2.DIGESTS",
    "coreos_developer_container_contents.txt",
    "coreos_production_pxe.DIGESTS",
    "coreos_production_pxe.README",
    "coreos_production_pxe.grub",
    "coreos_production_pxe.sh",
    "coreos_production_pxe.vmlinuz",
    "coreos_production_pxe.zip",
    "coreos_production_pxe_image.cpio.gz",
];

/// Files that it does not take, all of them signed.
const LEFT: [&str; 3] =
    ["coreos_production_image.bin.bz2", "coreos_production_pxelinux.txt", "xcoreos_production_pxe."];

fn oppositus() -> Site {
    let site = Site::new();
    for (seed, (channel, version)) in [("stable", "899.17.0"), ("beta", "1010.3.0")].into_iter().enumerate() {
        let bytes: Vec<_> = (0..13).map(|i| noise((seed * 100 + i) as u64, 20_000 + i)).collect();
        let names = TAKEN.iter().chain(&LEFT);
        let files: Vec<_> = names.zip(&bytes).map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        site.release(channel, version, &files);
        site.put(&format!("{channel}/amd64-usr/{version}/coreos_production_pxe.unsigned"), b"no signature");
    }
    fs::write(site.dir.path().join("config.json"), OPPOSITUS).unwrap();
    site
}

#[test]
fn the_tree_of_the_oppositus_readme() {
    let site = oppositus();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    let url = format!("{}/{{channel}}/{{arch}}-usr/", nginx.url);
    let keys = site.dir.path().join("keys");
    let more = ["--url", &url, "--key", keys.to_str().unwrap()];
    let summary = site.mirror(&more).good();
    assert_eq!(summary.counts(), (20, 0));

    let mut expected = vec!["all/".to_owned(), "beta/".into(), "stable/".into()];
    expected.extend(["beta/current -> ../all/1010.3.0".into(), "stable/current -> ../all/899.17.0".into()]);
    for version in ["1010.3.0", "899.17.0"] {
        expected.push(format!("all/{version}/"));
        expected.extend(
            TAKEN
                .iter()
                .flat_map(|name| [format!("all/{version}/{name}"), format!("all/{version}/{name}.sig")]),
        );
    }
    expected.sort();
    let tree = site.tree();
    let mut found = names(&tree);
    found.sort();
    assert_eq!(found, expected);
    // As tree counts them: links to directories are directories.
    let files = tree.values().filter(|e| matches!(e, Entry::File(_))).count();
    assert_eq!((tree.len() - files, files), (7, 40));
    for (path, entry) in &tree {
        if let Entry::File(bytes) = entry {
            let channel = if path.contains("899") { "stable" } else { "beta" };
            let served = path.replace("all/", &format!("{channel}/amd64-usr/"));
            assert!(*bytes == fs::read(site.www(&served)).unwrap(), "{path}");
        }
    }
    let readme = fs::read(site.dest("stable/current/coreos_production_pxe.README")).unwrap();
    assert!(!readme.is_empty());

    // The second time no body of a file, nor of a signature, is transferred.
    let before = nginx.log();
    let summary = site.mirror(&more).good();
    assert_eq!(summary.counts(), (0, 20));
    assert_eq!(summary.0["bytes"], 0);
    let mut after = nginx.log();
    for line in before {
        after.remove(after.iter().position(|l| *l == line).unwrap());
    }
    assert!(
        after.iter().all(|l| l.contains("version.txt") || l.contains("/ 200 ")) && after.len() == 10,
        "only version.txt of the channel and of the version, their signatures, and the index: {after:#?}"
    );
    assert_eq!(site.tree(), tree);
}

#[test]
fn every_channel_without_a_configuration_to_speak_of() {
    let site = Site::new();
    for (channel, version) in [("stable", "3.0.0"), ("beta", "3.1.0"), ("alpha", "3.1.0")] {
        site.release(channel, version, &[("image.bin", b"image")]);
    }
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&json!({}));
    let keys = site.dir.path().join("keys");
    let url = format!("{}/{{channel}}/{{arch}}-usr/", nginx.url);
    let summary = site.mirror(&["--url", &url, "--key", keys.to_str().unwrap()]).good();
    // Two versions of two files: beta and alpha share one.
    assert_eq!(summary.counts(), (4, 0));
    let links: Vec<_> = names(&site.tree()).into_iter().filter(|n| n.contains("->")).collect();
    let expected =
        ["alpha/current -> ../all/3.1.0", "beta/current -> ../all/3.1.0", "stable/current -> ../all/3.0.0"];
    assert_eq!(links, expected);
}

fn flatcar(nginx: &Nginx) -> serde_json::Value {
    json!({"type": "container-linux", "url": format!("{}/{{channel}}/{{arch}}-usr", nginx.url), "keys": ["keys"]})
}

/// Links of versions, a directory for another architecture, `version.txt` for the installer, garbage collection.
#[test]
fn versions_come_and_go() {
    let site = Site::new();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    let image = |version: &str| format!("image of {version}").into_bytes();
    let release = |version: &str| {
        for arch in ["amd64", "arm64"] {
            site.release_for(
                arch,
                "stable",
                version,
                &[("flatcar_production_image.bin.bz2", &image(version))],
            );
        }
    };
    let mut source = flatcar(&nginx);
    source["architectures"] = json!(["amd64", "arm64"]);
    source["filters"] = json!(["+ flatcar_production_image.bin.bz2", "- *"]);
    source["name"] = json!("flatcar");
    source["keep"] = json!(2);
    site.config(&json!({"sources": [source.clone()]}));
    let links = || -> Vec<String> {
        names(&site.tree())
            .into_iter()
            .filter_map(|n| Some(n.strip_prefix("flatcar/")?.to_owned()))
            .filter(|n| n.contains("->"))
            .collect()
    };
    release("9.0.0");
    assert_eq!(site.mirror(&[]).good().counts(), (4, 0));
    let version_txt = fs::read(site.dest("flatcar/stable/current/version.txt")).unwrap();
    assert_eq!(version_txt, fs::read(site.www("stable/amd64-usr/9.0.0/version.txt")).unwrap());
    release("10.0.0");
    site.mirror(&[]).good();
    assert_eq!(
        links(),
        [
            "stable/10.0.0 -> ../all/10.0.0",
            "stable/9.0.0 -> ../all/9.0.0",
            "stable/arm64/10.0.0 -> ../../all/10.0.0/arm64",
            "stable/arm64/9.0.0 -> ../../all/9.0.0/arm64",
            "stable/arm64/current -> ../../all/10.0.0/arm64",
            "stable/current -> ../all/10.0.0",
        ]
    );
    // The third one is too many.
    release("10.1.0");
    let summary = site.mirror(&[]).good();
    assert_eq!(summary.0["removed"], json!(["flatcar/all/9.0.0"]));
    assert!(!site.dest("flatcar/all/9.0.0").exists());
    assert_eq!(links().len(), 6);
    assert!(site.dest("flatcar/stable/10.0.0/flatcar_production_image.bin.bz2").exists());

    // A smaller limit, by the command: it goes by the limit of the last run.
    source["keep"] = json!(1);
    site.config(&json!({"sources": [source]}));
    let gc = |more: &[&str]| ok(rehydrator().args(["mirror", "gc"]).args(more).arg(site.dest("")));
    assert_eq!(gc(&[]), "");
    let state = site.dest(".rehydrator/state.json");
    let json = fs::read_to_string(&state).unwrap();
    fs::write(&state, json.replace("\"keep\": 2", "\"keep\": 1")).unwrap();
    let before = site.tree();
    assert!(gc(&["--dry-run"]).starts_with("would remove flatcar/all/10.0.0, "));
    assert_eq!(site.tree(), before);
    assert!(gc(&[]).starts_with("removed flatcar/all/10.0.0, "));
    assert_eq!(gc(&[]), "");
    let left: Vec<_> = names(&site.tree()).into_iter().filter(|n| n.starts_with("flatcar/all/1")).collect();
    assert!(left.iter().all(|n| n.starts_with("flatcar/all/10.1.0/")), "{left:?}");
    assert_eq!(links().len(), 4);

    // A link that a killed collection left behind.
    std::os::unix::fs::symlink("../all/10.0.0", site.dest("flatcar/stable/10.0.0")).unwrap();
    fs::create_dir_all(site.dest(".rehydrator/trash/x/it")).unwrap();
    std::os::unix::fs::symlink("../flatcar", site.dest(".rehydrator/new")).unwrap();
    gc(&[]);
    assert_eq!(links().len(), 4);
    assert!(!site.dest(".rehydrator/trash").exists());

    // Upstream goes back: what `current` names stays, whatever else is newer.
    release("8.0.0");
    let refused = |arch: &str, channel: &str| {
        format!(
            "flatcar/{channel}: the server offers version 8.0.0 for {arch}, older than 10.1.0, which the mirror had: \
             --allow-downgrade takes it"
        )
    };
    assert_eq!(site.mirror(&[]).failed(), [refused("arm64", "stable/arm64"), refused("amd64", "stable")]);
    assert!(links().contains(&"stable/current -> ../all/10.1.0".to_owned()), "{:?}", links());
    site.mirror(&["--allow-downgrade"]).good();
    assert!(links().contains(&"stable/current -> ../all/8.0.0".to_owned()), "{:?}", links());
    // What was allowed once is what the mirror has now.
    site.mirror(&[]).good();
    assert!(site.dest("flatcar/all/8.0.0").exists());
    gc(&[]);
    assert!(site.dest("flatcar/all/8.0.0").exists() && site.dest("flatcar/all/10.1.0").exists());
}

#[test]
fn pinned_versions_and_a_minimum() {
    let site = Site::new();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    for version in ["8.9.0", "9.0.0", "10.0.0", "10.2.0"] {
        site.release("stable", version, &[("image", version.as_bytes())]);
    }
    let versions = || fs::read_dir(site.dest("all")).map_or(0, Iterator::count);
    let mut source = flatcar(&nginx);
    source["versions"] = json!({"minimum": "9.0"});
    source["keep"] = json!(2);
    site.config(&json!({"sources": [source.clone()]}));
    assert_eq!(site.mirror(&[]).good().counts(), (4, 0));
    assert!(site.dest("all/10.2.0").exists() && site.dest("all/10.0.0").exists());
    assert_eq!(versions(), 2);
    source["keep"] = json!(5);
    site.config(&json!({"sources": [source.clone()]}));
    assert_eq!(site.mirror(&[]).good().counts(), (2, 4));
    assert_eq!(versions(), 3);
    source["versions"] = json!({"pin": ["8.9.0", "9.0.0"]});
    site.config(&json!({"sources": [source.clone()]}));
    site.mirror(&[]).good();
    assert_eq!(fs::read_link(site.dest("stable/current")).unwrap(), Path::new("../all/9.0.0"));
    source["versions"] = json!({"pin": ["8.9.0", "7.0.0"]});
    site.config(&json!({"sources": [source]}));
    let summary = site.mirror(&[]);
    assert_eq!(summary.failed().len(), 1);
    assert!(summary.failed()[0].contains("all/7.0.0: GET "), "{:?}", summary.failed());
}

/// A file without a signature of its own, which a signed list of digests has.
#[test]
fn lists_of_digests() {
    let site = Site::new();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    let dir = "stable/amd64-usr/1.0.0";
    let sha512 = |bytes: &[u8]| hex::encode(ring::digest::digest(&ring::digest::SHA512, bytes));
    let list = format!(
        "# MD5 HASH\n0cc175b9c0f1b6a831c399e269772661  only-md5\n# SHA512 HASH\n{}  listed.txt\n{}  wrong.txt\n",
        sha512(b"listed"),
        sha512(b"something else")
    );
    site.release("stable", "1.0.0", &[("image", b"image"), ("image.DIGESTS", list.as_bytes())]);
    for (name, bytes) in
        [("listed.txt", &b"listed"[..]), ("wrong.txt", b"wrong"), ("only-md5", b"a"), ("not", b"x")]
    {
        site.put(&format!("{dir}/{name}"), bytes);
    }
    let mut source = flatcar(&nginx);
    source["filters"] = json!(["- *.DIGESTS"]);
    site.config(&json!({"sources": [source]}));
    let summary = site.mirror(&[]);
    assert_eq!(
        summary.failed(),
        [format!(
            "all/1.0.0/wrong.txt: sha512 mismatch: expected {}, got {}",
            sha512(b"something else"),
            sha512(b"wrong")
        )]
    );
    let why = "there is no signature, and no signed list of digests has it";
    assert_eq!(summary.skipped(), ["not", "only-md5"].map(|n| format!("{}/{dir}/{n}: {why}", nginx.url)));
    assert_eq!(fs::read(site.dest("all/1.0.0/listed.txt")).unwrap(), b"listed");
    // It is what vouches for the other.
    assert!(site.dest("all/1.0.0/image.DIGESTS.sig").exists());
    assert!(!site.dest("all/1.0.0/wrong.txt").exists() && !site.dest("stable/current").exists());

    site.put(&format!("{dir}/wrong.txt"), b"something else");
    assert_eq!(site.mirror(&[]).good().counts(), (1, 4));
    assert_eq!(fs::read_link(site.dest("stable/current")).unwrap(), Path::new("../all/1.0.0"));

    // Damage is found by --verify, and mended.
    for (name, bytes) in [("listed.txt", &b"damaged"[..]), ("image", b"damaged")] {
        fs::write(site.dest("all/1.0.0").join(name), bytes).unwrap();
    }
    assert_eq!(site.mirror(&[]).good().counts(), (0, 5));
    assert_eq!(site.mirror(&["--verify"]).good().counts(), (2, 3));
    assert_eq!(fs::read(site.dest("all/1.0.0/listed.txt")).unwrap(), b"listed");
    assert_eq!(fs::read(site.dest("all/1.0.0/image")).unwrap(), b"image");

    // Also in versions that are not current any more, which cannot be got again.
    site.release("stable", "1.1.0", &[("image", b"new image")]);
    site.mirror(&[]).good();
    for name in ["listed.txt", "image"] {
        fs::write(site.dest("all/1.0.0").join(name), "damaged").unwrap();
    }
    let failed = site.mirror(&["--verify"]).failed();
    assert!(
        failed.len() == 2
            && failed[0].starts_with("all/1.0.0/image: bad signature: ")
            && failed[1].starts_with("all/1.0.0/listed.txt: sha512 mismatch: "),
        "{failed:?}"
    );
    assert!(!site.dest("all/1.0.0/image").exists() && !site.dest("all/1.0.0/listed.txt").exists());
    site.mirror(&["--verify"]).good();
}

#[test]
fn metrics_and_a_summary_for_people() {
    let site = Site::new();
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.release("stable", "1.0.0", &[("image", &[7; 5000])]);
    site.put("stable/amd64-usr/1.0.0/unsigned", b"x");
    site.config(&json!({"sources": [flatcar(&nginx)]}));
    let metrics = site.dir.path().join("rehydrator.prom");
    let metric = |name: &str| -> u64 {
        let text = fs::read_to_string(&metrics).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(&format!("rehydrator_mirror_{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
    };
    let text = ok(site.command().arg("--prometheus").arg(&metrics));
    assert!(text.starts_with("stable: current 1.0.0, complete\nskipped http"), "{text}");
    assert!(text.ends_with(", 0 kept, 1 skipped, 0 failed\n") && text.contains("\n2 new ("), "{text}");
    let success = metric("last_success_timestamp_seconds");
    assert!(success > 1_700_000_000 && metric("last_run_timestamp_seconds") >= success);
    assert_eq!(
        (metric("failures"), metric("files{state=\"new\"}"), metric("files{state=\"skipped\"}")),
        (0, 2, 1)
    );
    assert!(metric("new_bytes") > 5000);

    std::thread::sleep(std::time::Duration::from_millis(1100));
    site.release("stable", "1.1.0", &[("image", b"image")]);
    site.put("stable/amd64-usr/1.1.0/image", b"another");
    let message = fails(site.command().arg("--prometheus").arg(&metrics));
    assert!(message.contains("1 failed"), "{message}");
    assert_eq!((metric("failures"), metric("last_success_timestamp_seconds")), (1, success));
    assert!(metric("last_run_timestamp_seconds") > success);
}
