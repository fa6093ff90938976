//! The image of the release, run by podman as a user would who trusts it with nothing: no network, no capabilities, no
//! root, nothing that can be written.

use std::fs::File;
use std::path::Path;

use crate::common::{ok, rehydrator, release, sha256sum, tool};

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
    ok(tool("podman").args(["rmi", "--force", &name]));
}
