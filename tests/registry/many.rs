//! Many architectures, releases after each other, large layers, little room.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use rehydrator::digest::Digest;
use rehydrator::recipe::{Blob, SourceSpec};
use serde_json::{Value, json};

use crate::registry::image::{Podman, RUNS, Release};
use crate::registry::trust::openpgp;
use crate::tools::peak;
use crate::tools::registry::{PROGRAM, Registry, fails, noise, run, temp};
use crate::tools::release::{artifact, blob_of, stub_for, write};
use crate::tools::server::{Cut, Proxy};

/// What images call the architecture of this machine, and what they call another.
fn here_and_elsewhere() -> (&'static str, &'static str) {
    if cfg!(target_arch = "aarch64") { ("arm64", "amd64") } else { ("amd64", "arm64") }
}

#[test]
fn data_and_programs_for_several_architectures() {
    let release = Release::of(&["x86_64", "aarch64"], 11);
    let registry = Registry::plain(release.tmp.path());
    let (here, elsewhere) = here_and_elsewhere();
    // A program for another machine, as far as its header goes.
    let other = release.text("other");
    fs::write(&other, stub_for(if elsewhere == "arm64" { 183 } else { 62 })).unwrap();
    let (secret, public) = openpgp(&release);
    let there = format!("docker://{}/many:1", registry.address);
    let binaries = [format!("{here}={PROGRAM}"), format!("{elsewhere}={other}")];
    let programs = ["--binary", &binaries[0], "--binary", &binaries[1]];
    let wrong = format!("s390x={PROGRAM}");
    let build = [PROGRAM, "build", "image", "--workdir", &release.text(""), "-o", &there];
    let e = fails(&[&build[..], &["--binary", &wrong]].concat());
    assert!(e.contains(&format!("program {PROGRAM}: it is for {here}, not for s390x")), "{e}");
    release.build(&there, &[&programs[..], &["--tls-verify=false", "--sign-key", &secret, RUNS[2]]].concat());

    // Where it is.
    let from = ["--tls-verify=false", "--from", &there];
    let rehydrate = |words: &[&'static str]| [&[PROGRAM, "rehydrate", "-"][..], &from, words].concat();
    let disk = |arch: &'static str| release.stdout(&rehydrate(&["--disk=openstack", "--arch", arch])[1..]);
    assert!(disk("x86_64") == release.openstack);
    assert!(disk("aarch64") == release.other);
    let e = fails(&rehydrate(&["--disk=openstack", "--arch=s390x"]));
    assert!(e.contains("no artifacts for architecture s390x; this release has aarch64, x86_64"), "{e}");
    let e = fails(&rehydrate(&["--disk=qemu", "--arch=aarch64"]));
    assert!(e.contains("aarch64: no disk image for qemu in this release; it has openstack"), "{e}");
    let inspect = |place: [&str; 2]| {
        let words = ["inspect", "qemu", "--arch=x86_64", "--json", "--tls-verify=false"];
        let found: Value = serde_json::from_slice(&release.stdout(&[&words[..], &place].concat())).unwrap();
        found
    };
    assert_eq!(inspect(["--from", &there]), inspect(["--data", &release.text("dehydrated")]));

    // A policy that demands a signature, which podman looks for at the image that it picks.
    let home = release.path("home");
    let config = home.join(".config/containers/registries.d");
    fs::create_dir_all(&config).unwrap();
    let yaml =
        format!("docker:\n  {}:\n    lookaside: file://{}\n", registry.address, release.text("sigstore"));
    fs::write(config.join("test.yaml"), yaml).unwrap();
    let policy = release.text("policy.json");
    let demand = json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": public,
        "signedIdentity": { "type": "matchRepoDigestOrExact" } });
    let demands = json!({ "default": [{ "type": "reject" }],
        "transports": { "docker": { registry.address.clone(): [demand] } } });
    fs::write(&policy, demands.to_string()).unwrap();
    let podman = Podman::new(&home);
    let pull = ["pull", "--quiet", "--tls-verify=false", "--signature-policy", &policy];
    for arch in [elsewhere, here] {
        let id = podman.run(&[&pull[..], &["--arch", arch, &there]].concat());
        let id = String::from_utf8(id).unwrap();
        let words = ["image", "inspect", "--format", "{{.Architecture}}", id.trim()];
        assert_eq!(String::from_utf8(podman.run(&words)).unwrap().trim(), arch);
    }
    let refused = podman.output(&[&pull[..], &["--arch=s390x", &there]].concat());
    let e = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && e.contains("s390x"), "{e}");
    // What it runs on, and what it has for others, are two things.
    let name = there.strip_prefix("docker://").unwrap();
    let confined = ["run", "--rm", "--read-only", "--network=none", "--cap-drop=all", "--user=1000"];
    let words = [name, "rehydrate", "-", "--disk=openstack", "--arch=aarch64"];
    assert!(podman.run(&[&confined[..], &["--arch", here], &words].concat()) == release.other);
}

#[test]
fn the_next_release_is_mostly_there() {
    let (first, next) = (Release::of(&["x86_64"], 11), Release::of(&["x86_64"], 22));
    let registry = Registry::plain(first.tmp.path());
    let push = |release: &Release, tag: &str| {
        let proxy = Proxy::start(&registry.address, Cut::Never);
        release.build(&format!("docker://{}/x:{tag}", proxy.address), &["--tls-verify=false"]);
        proxy.up()
    };
    let whole = push(&first, "1");
    assert!(whole > 11_000_000, "{whole}");
    let changed = push(&next, "2");
    assert!(changed < 30_000, "{changed} bytes for a release in which 3000 are new");
    let from = format!("docker://{}/x:2", registry.address);
    let rehydrate = ["rehydrate", "-", "--disk=openstack", "--tls-verify=false", "--from", &from];
    assert!(next.stdout(&rehydrate) == next.openstack);
}

#[test]
fn little_room_is_enough() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    release.build(&format!("docker://{}/x:1", registry.address), &["--tls-verify=false"]);
    let proxy = Proxy::start(&registry.address, Cut::Never);
    let from = format!("docker://{}/x:1", proxy.address);
    let rehydrate = ["rehydrate", "-", "--disk=openstack", "--tls-verify=false", "--from-cache=1M", "--from"];
    assert!(release.stdout(&[&rehydrate[..], &[&from]].concat()) == release.openstack);
    // Once to check it, once to use it.
    let times = proxy.down() as f64 / release.rootfs.len() as f64;
    assert!(times < 2.2, "{times} times the bytes");
}

/// docker-registry gives up an upload of which it got a part of a chunk, so that a cut costs the layers on their way.
#[test]
fn small_layers_cost_little_when_cut() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let rootfs = noise(14, 64 << 20);
    let (blob, size) = (blob_of(&rootfs), rootfs.len() as u64);
    let artifacts = vec![artifact("x86_64", "metal", "rootfs.pxe", 0, blob)];
    let stream = br#"{"stream":"stable","architectures":{}}"#;
    write(&tmp.path().join("dehydrated"), stream, artifacts, vec![SourceSpec::Stored { blob }], &[&rootfs]);
    let (workdir, stub) = (tmp.path().to_str().unwrap(), tmp.path().join("stub"));
    fs::write(&stub, stub_for(62)).unwrap();
    for percent in [30, 60, 90] {
        let proxy = Proxy::start(&registry.address, Cut::All(size * percent / 100));
        let there = format!("docker://{}/cut{percent}:1", proxy.address);
        let build = [PROGRAM, "build", "image", "--workdir", workdir, "-o", &there, "--tls-verify=false"];
        run(&[&build[..], &["--max-layer=1228800", "--binary", stub.to_str().unwrap()]].concat());
        let sent = proxy.up() as f64 / size as f64;
        assert!(sent < 1.1, "cut at {percent} %: {sent} times the bytes");
        let there = format!("docker://{}/cut{percent}:1", registry.address);
        run(&[PROGRAM, "verify", "--tls-verify=false", &there]);
    }
}

#[test]
fn a_layer_of_a_gigabyte_needs_little_memory() {
    let tmp = temp();
    let registry = Registry::plain(tmp.path());
    let size = 1 << 30;
    let hole = tmp.path().join("hole");
    File::create(&hole).unwrap().set_len(size).unwrap();
    let (sha256, _) = Digest::of_reader(File::open(&hole).unwrap()).unwrap();
    let blob = Blob { sha256, size };
    let dir = tmp.path().join("dehydrated");
    let rootfs = artifact("x86_64", "metal", "rootfs.pxe", 0, blob);
    let stream = br#"{"stream":"stable","architectures":{}}"#;
    write(&dir, stream, vec![rootfs], vec![SourceSpec::Stored { blob }], &[]);
    fs::rename(&hole, dir.join(format!("blobs/sha256/{sha256}"))).unwrap();
    let there = format!("docker://{}/x:1", registry.address);
    let start = |words: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(words).arg("--tls-verify=false");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (workdir, stub) = (tmp.path().to_str().unwrap(), tmp.path().join("stub"));
    fs::write(&stub, stub_for(62)).unwrap();
    let stub = stub.to_str().unwrap();
    let used = peak(start(&["build", "image", "--workdir", workdir, "-o", &there, "--binary", stub]));
    assert!(used < 64 << 20, "{} MiB", used >> 20);
}
