//! From a web server to an image in one command.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::{example, ok, rehydrator, sha256sum};
use crate::tools::Nginx;

/// Of the release, what shows each way an artifact goes, in little time.
const PLATFORMS: [&str; 3] = ["metal", "openstack", "vmware"];

#[test]
fn build_run_from_a_server() {
    let example = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let www = dir.path().join("www");
    fs::create_dir(&www).unwrap();
    std::os::unix::fs::symlink(example.join("builds"), www.join("builds")).unwrap();
    let nginx = Nginx::serve(&www);

    // As published, but for where it lies.
    let text = fs::read_to_string(example.join("stream.json")).unwrap();
    let text = text.replace("https://example.invalid/prod/streams/stable", &nginx.url);
    let mut stream: Value = serde_json::from_str(&text).unwrap();
    let x86_64 = stream["architectures"]["x86_64"]["artifacts"].as_object_mut().unwrap();
    x86_64.retain(|platform, _| PLATFORMS.contains(&platform.as_str()));
    fs::write(www.join("stable.json"), stream.to_string()).unwrap();

    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let image = work.join("image");
    let mut run = rehydrator();
    run.args(["build", "run", "--arch", "x86_64", "--stream-url", &format!("{}/stable.json", nginx.url)]);
    run.arg("--key").arg(example.join("signing-key.asc")).arg("--workdir").arg(&work);
    run.arg("-o").arg(format!("oci:{}:now", image.display()));
    let said = String::from_utf8(ok(&mut run)).unwrap();
    assert!(said.contains("total") && said.contains("sha256:"), "{said}");
    let left: Vec<_> = fs::read_dir(&work).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "artifacts" || name == "dehydrated"), "{left:?}");
    let log = nginx.log();
    assert!(log.iter().any(|line| line.contains(".sig 200 ")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains("ppc64le")), "only what was asked for: {log:#?}");

    // What is in the image makes the disk again.
    let root = dir.path().join("root");
    unpack(&image, &root);
    let disk = dir.path().join("disk.qcow2");
    let mut rehydrate = rehydrator();
    rehydrate.args(["rehydrate", "-", "--disk", "openstack", "--arch", "x86_64", "--data"]);
    rehydrate.arg(root.join("rootfs/srv/dehydrated")).stdout(fs::File::create(&disk).unwrap());
    ok(&mut rehydrate);
    let openstack =
        &stream["architectures"]["x86_64"]["artifacts"]["openstack"]["formats"]["qcow2.xz"]["disk"];
    assert_eq!(sha256sum(&disk), openstack["uncompressed-sha256"].as_str().unwrap());
}

/// `umoci unpack`.
fn unpack(image: &Path, root: &Path) {
    let image = format!("{}:now", image.display());
    ok(crate::common::tool("umoci").args(["unpack", "--image", &image]).arg(root));
}
