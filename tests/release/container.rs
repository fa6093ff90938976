//! The image of the release, run by podman as a user would who trusts it with nothing: no network, no capabilities, no
//! root, nothing that can be written.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use serde_json::Value;

use crate::tools::example::{ok, rehydrator, release, sha256sum, tool};

#[test]
fn a_container_gives_the_same_bytes() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    // podman makes an image's name of the path, and wants it in lower case.
    let image = format!("oci:{}", dir.path().join("image").display());
    let said = ok(rehydrator().args(["build", "image", "-o", &image, "--workdir"]).arg(workdir.dir.path()));
    let said = String::from_utf8(said).unwrap();
    assert!(said.starts_with("sha256:"), "{said}");

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let name = format!("localhost/rehydrator-test-{}", std::process::id());
    ok(tool("skopeo").args(["copy", "--quiet", &image, &format!("containers-storage:{name}")]));
    let run = |args: &[&str], out: &Path| {
        let mut command = tool("bash");
        command.arg(root.join("ci/podman")).args(["run", "--rm", "-i", "--read-only", "--network=none"]);
        command.args(["--cap-drop=all", "--user", "1000", &name]).args(args);
        ok(command.stdout(File::create(out).unwrap()));
    };
    let out = dir.path().join("out");
    for artifact in workdir.expected("x86_64") {
        if ["openstack", "aws", "hyperv", "gcp"].contains(&artifact.platform.as_str())
            || artifact.format == "iso"
        {
            let option = artifact.option();
            run(&[&["rehydrate", "-", "--arch", "x86_64"][..], &option].concat(), &out);
            assert_eq!(sha256sum(&out), artifact.sha256, "{artifact:?}");
        }
    }
    run(&["print-stream-json"], &out);
    assert_eq!(sha256sum(&out), sha256sum(&workdir.dir.path().join("stream.json")));
    serves(root, &dir.path().join("run"), &name);
    ok(tool("podman").args(["rmi", "--force", &name]));
}

/// `serve` in it, on a socket in the only directory that it may write.
fn serves(root: &Path, run: &Path, image: &str) {
    fs::create_dir(run).unwrap();
    fs::set_permissions(run, Permissions::from_mode(0o777)).unwrap();
    let container = format!("rehydrator-serve-{}", std::process::id());
    let mut server = tool("bash");
    server.arg(root.join("ci/podman")).args(["run", "--rm", "--read-only", "--network=none"]);
    server.args(["--read-only-tmpfs=false", "--cap-drop=all", "--user", "1000", "--name", &container]);
    server.arg("-v").arg(format!("{}:/run:z", run.display())).arg(image);
    server.args(["serve", "--listen=unix:/run/socket", "--cache=/run", "--memory=256M", "--access-log=none"]);
    let mut server = server.stderr(Stdio::null()).spawn().unwrap();
    let get = |path: &str| {
        let mut curl = tool("curl");
        curl.args(["-sSf", "--max-time", "60", "--unix-socket"]).arg(run.join("socket"));
        curl.arg(format!("http://h{path}")).output().unwrap()
    };
    let start = Instant::now();
    while !get("/readyz").status.success() {
        assert!(server.try_wait().unwrap().is_none(), "it ended");
        assert!(start.elapsed() < Duration::from_secs(60), "it does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
    let document: Value = serde_json::from_slice(&get("/streams/stable.json").stdout).unwrap();
    let disk = &document["architectures"]["x86_64"]["artifacts"]["openstack"]["formats"]["qcow2.xz"]["disk"];
    let bytes = get(disk["location"].as_str().unwrap().strip_prefix("http://h").unwrap()).stdout;
    assert_eq!(Digest::of(&bytes).to_string(), disk["sha256"].as_str().unwrap());
    ok(tool("podman").args(["stop", "--time=60", &container]));
    assert!(server.wait().unwrap().success());
}
