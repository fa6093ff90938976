//! The main job on a release made by the release tools: every artifact comes back with the digest that the stream
//! metadata names, in both profiles, from EROFS and from squashfs, to stdout, as tar and into a directory.

mod container;
mod damage;
mod page;
mod previous;
mod published;
mod recipes;
mod served;
mod server;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::tools::example::{
    Workdir, example, fails, ok, rehydrator, release, sha256sum, testing, tool, with_squashfs,
};

const STDOUT: &str = "-";

/// Rehydrates everything of `arch` into a directory and compares with the stream metadata, then again to stdout.
fn all_come_back(workdir: &Workdir, arch: &str) {
    let out = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    ok(&mut workdir.rehydrate(out.path(), &["--all", "--arch", arch]));
    let expected = workdir.expected(arch);
    for artifact in &expected {
        assert_eq!(sha256sum(&out.path().join(artifact.output())), artifact.sha256, "{artifact:?}");
    }
    let names: BTreeSet<String> =
        fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, expected.iter().map(|a| a.output()).collect(), "nothing else is there");

    for artifact in expected.iter().filter(|a| a.format != "pxe") {
        let path = out.path().join("stdout");
        let stdout = fs::File::create(&path).unwrap();
        ok(workdir.rehydrate(Path::new(STDOUT), &artifact.option()).args(["--arch", arch]).stdout(stdout));
        assert_eq!(sha256sum(&path), artifact.sha256, "stdout: {artifact:?}");
    }
}

#[test]
fn every_artifact_in_profile_small() {
    let workdir = release();
    for arch in ["x86_64", "ppc64le"] {
        all_come_back(workdir, arch);
    }
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(workdir.data().join("index.json")).unwrap()).unwrap();
    let kinds: BTreeSet<&str> =
        index["sources"].as_array().unwrap().iter().map(|s| s["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains("rootfs"), "the base is made of the live rootfs: {kinds:?}");
    assert!(!kinds.contains("zstd"), "nothing is stored beside the live rootfs: {kinds:?}");
}

#[test]
fn every_artifact_in_profile_fast() {
    let workdir = Workdir::new(&example("release", &["--arch", "x86_64", "--arch", "ppc64le"]));
    let table = workdir.dehydrate(&["--profile", "fast", "--arch", "x86_64"]);
    assert!(table.contains("total"), "{table}");
    all_come_back(&workdir, "x86_64");
    let error = fails(&mut workdir.rehydrate(Path::new(STDOUT), &["--iso", "--arch", "ppc64le"]));
    assert!(error.contains("no artifacts for architecture ppc64le; this release has x86_64"), "{error}");
}

#[test]
fn live_rootfs_as_squashfs() {
    all_come_back(testing(), "x86_64");
    for kind in ["squashfs-xz", "squashfs-gzip"] {
        all_come_back(&with_squashfs(kind, ""), "x86_64");
    }
}

#[test]
fn the_stream_document_is_kept_byte_for_byte() {
    let workdir = release();
    let printed = ok(rehydrator().arg("print-stream-json").arg("--data").arg(workdir.data()));
    assert!(printed == fs::read(workdir.dir.path().join("stream.json")).unwrap());
}

#[test]
fn several_artifacts_are_a_tar_stream() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let tar = dir.path().join("pxe.tar");
    let which = ["--pxe", "--disk", "openstack", "--arch", "x86_64"];
    ok(workdir.rehydrate(Path::new(STDOUT), &which).stdout(fs::File::create(&tar).unwrap()));
    let listed = String::from_utf8(ok(tool("tar").arg("-tf").arg(&tar))).unwrap();
    let wanted: Vec<_> = workdir
        .expected("x86_64")
        .into_iter()
        .filter(|a| a.format == "pxe" || a.platform == "openstack")
        .collect();
    assert_eq!(listed.lines().count(), 4);
    ok(tool("tar").arg("-xf").arg(&tar).arg("-C").arg(dir.path()));
    for artifact in wanted {
        assert_eq!(sha256sum(&dir.path().join(artifact.output())), artifact.sha256, "{artifact:?}");
    }
}

#[test]
fn disks_are_what_qemu_img_says() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let disks = ["openstack", "nutanix", "aws", "azure", "hyperv", "hetzner", "metal"];
    let options: Vec<&str> = disks.iter().flat_map(|d| ["--disk", d]).chain(["--arch", "x86_64"]).collect();
    ok(&mut workdir.rehydrate(dir.path(), &options));
    for (disk, format, checked) in [
        ("openstack", "qcow2", true),
        ("nutanix", "qcow2", true),
        ("aws", "vmdk", true),
        ("azure", "vpc", false),
        ("hyperv", "vhdx", true),
        ("hetzner", "raw", false),
    ] {
        let artifact = workdir.expected("x86_64").into_iter().find(|a| a.platform == disk).unwrap();
        let path = dir.path().join(artifact.output());
        let info = ok(tool("qemu-img").args(["info", "--output=json", "-f", format]).arg(&path));
        assert!(String::from_utf8_lossy(&info).contains("virtual-size"));
        if checked {
            ok(tool("qemu-img").args(["check", "-f", format]).arg(&path));
        }
    }
    // Zeros of a raw disk are holes.
    let metal = workdir
        .expected("x86_64")
        .into_iter()
        .find(|a| a.format == "raw.xz" && a.platform == "hetzner")
        .unwrap();
    let metadata = fs::metadata(dir.path().join(metal.output())).unwrap();
    assert!(
        metadata.blocks() * 512 < metadata.size() / 2,
        "{} of {} bytes",
        metadata.blocks() * 512,
        metadata.size()
    );
}

#[test]
fn a_directory_is_not_overwritten() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let iso = workdir.expected("x86_64").into_iter().find(|a| a.format == "iso").unwrap();
    let path = dir.path().join(iso.output());
    let rehydrate = |more: &[&str]| {
        let mut command = workdir.rehydrate(dir.path(), &["--iso", "--arch", "x86_64"]);
        command.args(more);
        command
    };
    fs::write(&path, "mine").unwrap();
    let error = fails(&mut rehydrate(&[]));
    assert!(error.contains("exists and differs; --force replaces it"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    ok(&mut rehydrate(&["--force"]));
    assert_eq!(sha256sum(&path), iso.sha256);
    let before = fs::metadata(&path).unwrap();
    ok(&mut rehydrate(&[]));
    let after = fs::metadata(&path).unwrap();
    assert_eq!(
        (before.ino(), before.mtime_nsec()),
        (after.ino(), after.mtime_nsec()),
        "a right file is left alone"
    );
}

#[test]
fn rdiff_applies_a_delta() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    for disk in ["openstack", "hetzner"] {
        let said = ok(rehydrator()
            .args(["inspect", disk, "--arch", "x86_64", "--extract"])
            .arg(dir.path())
            .arg("--data")
            .arg(workdir.data()));
        let said = String::from_utf8(said).unwrap();
        let artifact = workdir.expected("x86_64").into_iter().find(|a| a.platform == disk).unwrap();
        assert!(said.contains("rdiff patch"), "{said}");
        let [base, delta, out] =
            ["base", "delta", "out"].map(|s| dir.path().join(format!("{}.{s}", artifact.output())));
        ok(tool("rdiff").arg("patch").args([base, delta, out.clone()]));
        assert_eq!(sha256sum(&out), artifact.sha256);
    }
}

#[test]
fn inspect_looks_into_artifacts() {
    let workdir = release();
    for artifact in workdir.expected("x86_64").iter().filter(|a| a.file == "disk" && a.format != "iso") {
        let mut inspect = rehydrator();
        inspect.args(["inspect", &artifact.output(), "--json", "--data"]).arg(workdir.data());
        let report = String::from_utf8(ok(&mut inspect)).unwrap();
        let id = format!("\"platform-id\": \"{}\"", artifact.platform);
        assert!(report.contains(&id), "{artifact:?}: {report}");
        assert!(report.contains("\"virtual-size\""), "{artifact:?}: {report}");
    }
}

#[test]
fn completions_and_man_pages() {
    let dir = tempfile::tempdir().unwrap();
    ok(rehydrator().arg("man-pages").arg(dir.path()));
    let page = fs::read_to_string(dir.path().join("rehydrator-rehydrate.1")).unwrap();
    assert!(page.contains("metal4k"), "{page}");
    let script = dir.path().join("completions");
    fs::write(&script, ok(rehydrator().args(["completions", "bash"]))).unwrap();
    ok(tool("bash").arg("-n").arg(&script));
}

#[test]
fn list_and_verify() {
    let workdir = release();
    let list = ok(rehydrator().args(["list", "--json", "--data"]).arg(workdir.data()));
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    assert_eq!(
        list.as_array().unwrap().len(),
        workdir.expected("x86_64").len() + workdir.expected("ppc64le").len()
    );
    let table = String::from_utf8(ok(rehydrator().args(["list", "--data"]).arg(workdir.data()))).unwrap();
    assert!(table.lines().any(|l| l.contains("openstack") && l.contains("published")), "{table}");
    assert!(table.lines().any(|l| l.contains("gcp") && l.contains("published")), "{table}");
    ok(rehydrator().args(["verify", "--data"]).arg(workdir.data()));

    // No blob is there that nothing needs.
    let index = fs::read_to_string(workdir.data().join("index.json")).unwrap();
    for blob in fs::read_dir(workdir.data().join("blobs/sha256")).unwrap() {
        let name = blob.unwrap().file_name().into_string().unwrap();
        assert!(index.contains(&name), "blob {name} is in no source and no map");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let example = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let indexes = [(); 2].map(|()| {
        let workdir = Workdir::new(&example);
        workdir.dehydrate(&["--arch", "ppc64le"]);
        fs::read(workdir.data().join("index.json")).unwrap()
    });
    assert!(indexes[0] == indexes[1]);
}
