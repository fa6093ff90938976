//! `rehydrate --published`: the files as they were published, so that upstream's signatures verify.

use std::fs;
use std::path::Path;

use crate::tools::example::{Workdir, example, ok, release, tool};

/// Checks that the signature beside `path` is a good one of the file, with the key of the release.
fn gpg_verifies(example: &Path, path: &Path) {
    let home = tempfile::tempdir().unwrap();
    let gpg = || {
        let mut gpg = tool("gpg");
        gpg.arg("--homedir").arg(home.path()).args(["--batch", "--quiet"]);
        gpg
    };
    ok(gpg().arg("--import").arg(example.join("signing-key.asc")));
    let mut signature = path.as_os_str().to_owned();
    signature.push(".sig");
    ok(gpg().arg("--verify").arg(signature).arg(path));
}

/// The name of the published file of a disk.
fn published_name(workdir: &Workdir, platform: &str) -> String {
    let formats = &workdir.stream["architectures"]["x86_64"]["artifacts"][platform]["formats"];
    let files = formats.as_object().unwrap().values().next().unwrap();
    files["disk"]["location"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()
}

#[test]
fn published_files_verify() {
    let workdir = release();
    let release = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let disks = ["aws", "applehv", "digitalocean", "gcp", "hyperv", "kubevirt"];
    let mut options: Vec<&str> = disks.iter().flat_map(|d| ["--disk", d]).collect();
    options.extend(["--arch", "x86_64", "--published"]);

    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    ok(&mut workdir.rehydrate(dir.path(), &options));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2 * disks.len());
    for disk in disks {
        gpg_verifies(&release, &dir.path().join(published_name(workdir, disk)));
    }

    let untarred = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let tar = dir.path().join("tar");
    ok(workdir.rehydrate(Path::new("-"), &options).stdout(fs::File::create(&tar).unwrap()));
    ok(tool("tar").arg("-xf").arg(&tar).arg("-C").arg(untarred.path()));
    for disk in disks {
        gpg_verifies(&release, &untarred.path().join(published_name(workdir, disk)));
    }
    let out = dir.path().join("stdout");
    let one = ["--disk", "aws", "--arch", "x86_64", "--published"];
    ok(workdir.rehydrate(Path::new("-"), &one).stdout(fs::File::create(&out).unwrap()));
    assert!(fs::read(&out).unwrap() == fs::read(dir.path().join(published_name(workdir, "aws"))).unwrap());
}

/// Every artifact of the example is made by tools that are known.
#[test]
fn every_artifact_is_of_tier_published() {
    let index = fs::read(release().data().join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    for artifact in index["artifacts"].as_array().unwrap() {
        assert_eq!(artifact["tier"], "published", "{artifact}");
    }
}
