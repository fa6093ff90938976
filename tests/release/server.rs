//! From a web server to an image in one command, and to a mirror.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tools::Nginx;
use crate::tools::example::{example, ok, rehydrator, sha256sum};

/// Of the release, what shows each way an artifact goes, in little time.
const PLATFORMS: [&str; 3] = ["metal", "openstack", "vmware"];

/// Serves the example from `dir`, and gives its stream document.
fn serve(example: &Path, dir: &Path) -> (Nginx, Value) {
    let www = dir.join("www");
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
    (nginx, stream)
}

fn the_example() -> PathBuf {
    example("release", &["--arch", "x86_64", "--arch", "ppc64le"])
}

#[test]
fn mirrored_from_a_server() {
    let (example, dir) = (the_example(), tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let (nginx, stream) = serve(&example, dir.path());
    let (config, dest) = (dir.path().join("mirror.json"), dir.path().join("mirror"));
    let source = json!({"type": "stream", "url": format!("{}/stable.json", nginx.url),
        "keys": [example.join("signing-key.asc")], "architectures": ["x86_64"]});
    fs::write(&config, json!({"sources": [source]}).to_string()).unwrap();
    ok(rehydrator().args(["mirror", "releases"]).arg(&config).arg(&dest));
    let mut artifacts = 0;
    for (_, platform) in stream["architectures"]["x86_64"]["artifacts"].as_object().unwrap() {
        let formats = platform["formats"].as_object().unwrap().values();
        for artifact in formats.flat_map(|files| files.as_object().unwrap().values()) {
            let name = artifact["location"].as_str().unwrap().rsplit('/').next().unwrap();
            let path = dest.join("stable/current/x86_64").join(name);
            assert_eq!(sha256sum(&path), artifact["sha256"].as_str().unwrap(), "{name}");
            artifacts += 1;
        }
    }
    // Each with its signature, and nothing else.
    let there = fs::read_dir(dest.join("stable/current/x86_64")).unwrap().count();
    assert_eq!((there, there > 10), (2 * artifacts, true));
    let said = ok(rehydrator().args(["mirror", "releases"]).arg(&config).arg(&dest));
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains(&format!("\n0 new (0 B), {artifacts} kept, 0 skipped, 0 failed\n")), "{said}");
}

#[test]
fn build_run_from_a_server() {
    let (example, dir) = (the_example(), tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let (nginx, stream) = serve(&example, dir.path());
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let image = work.join("image");
    let mut run = rehydrator();
    run.args(["build", "run", "--arch", "x86_64", "--stream-url", &format!("{}/stable.json", nginx.url)]);
    run.arg("--key").arg(example.join("signing-key.asc")).arg("--workdir").arg(&work);
    // As umoci knows no zstd.
    run.arg("-o").arg(format!("oci:{}:now", image.display())).arg("--program-compression=gzip");
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
    ok(crate::tools::example::tool("umoci").args(["unpack", "--image", &image]).arg(root));
}
