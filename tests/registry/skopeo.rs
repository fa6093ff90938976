//! What skopeo reads for us: the storage of podman, and registries under the policy and with the mirrors of a machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::json;

use crate::registry::image::{Podman, Release, skopeo, tagged};
use crate::registry::trust::openpgp;
use crate::tools::registry::{PROGRAM, Registry, run};

/// Runs this program where skopeo finds its files in `home`, and is found itself in `path`.
fn ours(home: &Path, path: &str, words: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(words).env("HOME", home).env("PATH", path).env("REHYDRATOR_CACHE", "no");
    command.env_remove("XDG_CONFIG_HOME").stdin(Stdio::null()).output().unwrap()
}

/// What finds the skopeo of Debian 13 first, whose proxy is another than that of Debian 12.
fn with_new_skopeo(bin: &Path) -> String {
    // The home is another.
    let words = skopeo();
    let tree = run(&[&words[0], "--where"]);
    let script = format!("#!/bin/sh\nREHYDRATOR_TRIXIE='{}' exec {} \"$@\"\n", tree.trim(), words.join(" "));
    fs::create_dir(bin).unwrap();
    fs::write(bin.join("skopeo"), script).unwrap();
    fs::set_permissions(bin.join("skopeo"), fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())
}

/// What it prints; a failure fails the test.
fn good(output: Output) -> Vec<u8> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The error; success fails the test.
fn bad(output: Output) -> String {
    assert!(!output.status.success(), "it should have failed");
    String::from_utf8(output.stderr).unwrap()
}

/// Writes a file for skopeo.
fn configure(home: &Path, name: &str, text: &str) {
    let path = home.join(".config/containers").join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn the_storage_of_podman() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let there = format!("docker://{}/x:1", registry.address);
    release.build(&there, &["--tls-verify=false"]);
    // One whose layers are compressed, which the storage keeps otherwise; in another registry, as skopeo sends none
    // that is there under another digest.
    let other = Registry::plain(release.tmp.path());
    let packed = format!("docker://{}/x:gzip", other.address);
    let copy = ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"];
    run(&[&copy[..], &["--dest-compress-format=gzip", &there, &packed]].concat());
    let raw = run(&["skopeo", "inspect", "--raw", "--tls-verify=false", &packed]);
    assert!(raw.contains("tar+gzip"), "{raw}");

    let home = release.path("home");
    // To one podman both would be the same image.
    let podmans = [&there, &packed].map(|image| {
        let podman = Podman::new(&home);
        podman.run(&["pull", "--quiet", "--tls-verify=false", image]);
        (podman.stored(image.strip_prefix("docker://").unwrap()), podman)
    });
    let [(stored, podman), (stored_packed, _)] = &podmans;
    let new = with_new_skopeo(&release.path("bin"));
    for path in [&std::env::var("PATH").unwrap(), &new] {
        let ours = |words: &[&str]| ours(&home, path, words);
        let disk = ours(&["rehydrate", "-", "--disk=openstack", "--from", stored]);
        assert!(good(disk) == release.openstack);
        let tree = release.text("tree");
        for image in [stored, stored_packed] {
            good(ours(&["pull", "--force", image, &tree]));
            let data = format!("{tree}/srv/dehydrated");
            let disk = ours(&["rehydrate", "-", "--disk=openstack", "--data", &data]);
            assert!(good(disk) == release.openstack);
        }
        let copy = tagged(&there, "copy");
        good(ours(&["mirror", "image", "--tls-verify=false", stored_packed, &copy]));
        good(ours(&["pull", "--force", "--tls-verify=false", &copy, &tree]));
        let e = bad(ours(&["list", "--from", &podman.stored("localhost/none")]));
        assert!(e.contains("skopeo: ") && e.contains("localhost/none"), "{e}");
    }
    let e = bad(ours(&home, "/nowhere", &["list", "--from", stored]));
    assert!(e.contains("skopeo, which is to read it, cannot be run: No such file"), "{e}");

    configure(&home, "policy.json", r#"{"default": [{"type": "reject"}]}"#);
    let tree = release.text("refused");
    let e = bad(ours(&home, &new, &["pull", stored, &tree]));
    assert!(e.contains("rejected by policy"), "{e}");
    assert!(!Path::new(&tree).exists());
}

#[test]
fn registries_as_the_machine_has_them() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    let (secret, public) = openpgp(&release);
    let name = |repository: &str| format!("docker://{}/{repository}:1", registry.address);
    release.build(&name("signed"), &["--tls-verify=false", "--sign-key", &secret]);
    release.build(&name("unsigned"), &["--tls-verify=false"]);
    let home = release.path("home");
    let tree = release.text("tree");
    let path = with_new_skopeo(&release.path("bin"));
    let pull = |image: &str| ours(&home, &path, &["pull", "--force", "--skopeo", image, &tree]);

    // A mirror, and a registry that nobody may use.
    let mirror = format!(
        "[[registry]]\nlocation = \"coreos.invalid\"\n[[registry.mirror]]\nlocation = \"{0}\"\ninsecure = true\n\
         [[registry]]\nlocation = \"{0}\"\ninsecure = true\n[[registry]]\nlocation = \"bad.invalid\"\nblocked = true\n",
        registry.address
    );
    configure(&home, "registries.conf", &mirror);
    configure(&home, "policy.json", r#"{"default": [{"type": "insecureAcceptAnything"}]}"#);
    let direct =
        good(ours(&home, &path, &["pull", "--tls-verify=false", &name("unsigned"), &release.text("direct")]));
    assert_eq!(good(pull("coreos.invalid/unsigned:1")), direct);
    run(&["diff", "-r", &tree, &release.text("direct")]);
    let disk =
        ["rehydrate", "-", "--disk=openstack", "--skopeo", "--from", "docker://coreos.invalid/unsigned:1"];
    assert!(good(ours(&home, &path, &disk)) == release.openstack);
    let e = bad(pull("bad.invalid/x:1"));
    assert!(e.contains("blocked in "), "{e}");
    let e = bad(pull("unsigned:1"));
    assert!(e.contains("docker.io/library/unsigned:1 is one with a registry"), "{e}");

    // A policy that demands a signature.
    let lookaside =
        format!("docker:\n  {}:\n    lookaside: file://{}\n", registry.address, release.text("sigstore"));
    configure(&home, "registries.d/test.yaml", &lookaside);
    let demand = json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": public });
    let policy = json!({ "default": [{ "type": "reject" }],
        "transports": { "docker": { registry.address.clone(): [demand] } } });
    configure(&home, "policy.json", &policy.to_string());
    assert_eq!(good(pull(&name("signed"))), direct);
    let e = bad(pull(&name("unsigned")));
    assert!(e.contains("A signature was required, but no signature exists"), "{e}");
    let e = bad(ours(&home, &path, &["list", "--skopeo", "--from", &name("unsigned")]));
    assert!(e.contains("A signature was required, but no signature exists"), "{e}");
    let words = ["mirror", "image", "--skopeo", &name("signed"), &name("copy")];
    assert!(bad(ours(&home, &path, &words)).contains("--skopeo: "));
}
