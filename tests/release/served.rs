//! The release over HTTP: every file of it, to many clients at the same time, out of a directory, a registry and a layout.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::tools::example::{ok, release, testing, tool};
use crate::tools::registry::{Registry, run};
use crate::tools::serve::{Serve, files, ranges};
use crate::tools::small::{Random, sh};

#[test]
fn sixty_four_disks_at_the_same_time() {
    let serve = Serve::start(&[&release().data(), &testing().data()], &["--memory=256M"]);
    let mut files: Vec<_> = ["stable", "testing"].iter().flat_map(|stream| files(&serve, stream)).collect();
    let different: BTreeSet<_> = files.iter().map(|(path, ..)| path.clone()).collect();
    assert_eq!(different.len(), files.len());
    // The disks first, one to each client: there are more of them than processors, sources and memory for each.
    files.sort_by_key(|(path, ..)| path.contains("-live-"));
    let disks = files.iter().take_while(|(path, ..)| !path.contains("-live-")).count();
    assert!(disks >= 64, "{disks} disks");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                while let Some((path, digest, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let script = "set -o pipefail; curl -sSf \"$0\" | sha256sum";
                    let sum = ok(Command::new("bash").args(["-c", script, &format!("{}{path}", serve.url)]));
                    assert_eq!(String::from_utf8(sum).unwrap(), format!("{digest}  -\n"), "{path}");
                }
            });
        }
    });
    assert!(serve.peak() < 512, "{} MiB", serve.peak());
    // Each was made once, and all signatures are those of the published files.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let made = serve.count("rehydrations_total{result=\"good\"}");
    let (mut random, mut kinds) = (Random(64), BTreeSet::new());
    for (path, _, signed) in &files {
        if *signed {
            let home = if path.contains("/testing/") { testing() } else { release() }.example.join("gnupg");
            let url = format!("{}{path}", serve.url);
            sh(dir.path(), &format!("curl -sSf -o file {url} -o file.sig {url}.sig"));
            sh(
                dir.path(),
                &format!("gpg --homedir {} --batch --quiet --verify file.sig file", home.display()),
            );
        }
        // One of each kind: qcow2, vmdk, vhd, vhdx.zip, tar.gz …
        if kinds.insert(path.rsplit('/').next().unwrap().split_once("x86_64.").map_or("", |(_, kind)| kind)) {
            ranges(&serve, path, &serve.get(path), &mut random);
        }
    }
    assert!(kinds.len() > 15, "{kinds:?}");
    assert_eq!(serve.count("rehydrations_total{result=\"good\"}"), made);
}

/// Servers over an image keep no state: what one has begun, another ends.
#[test]
fn out_of_a_registry_and_a_layout() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let registry = Registry::plain(dir.path());
    let layout = format!("oci:{}", dir.path().join("image").display());
    ok(crate::tools::example::rehydrator()
        .args(["build", "image", "-o", &layout, "--workdir"])
        .arg(release().dir.path()));
    let remote = format!("docker://{}", registry.reference("coreos/stable:44"));
    run(&["skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", &layout, &remote]);
    let servers = [&remote, &layout].map(|from| {
        Serve::start(&[], &["--from", from, "--tls-verify=false", "--authfile=/dev/null", "--memory=256M"])
    });
    let [one, other] = &servers;
    let (first, second) = (files(one, "stable"), files(other, "stable"));
    assert_eq!(first, second);
    for end in ["x86_64.vmdk.xz", "x86_64.vmdk", "ppc64le.iso"] {
        let (path, digest, _) = first.iter().find(|(path, ..)| path.ends_with(end)).unwrap();
        let part = |serve: &Serve, range: &str, to: &str| {
            let to = dir.path().join(to).display().to_string();
            let output = serve.curl(&["-f", "-r", range, "-o", &to, path]);
            assert!(output.status.success(), "{path}: {output:?}");
        };
        part(one, "0-9999999", "a");
        part(other, "10000000-", "b");
        let sum = ok(tool("bash").args(["-c", "cat a b | sha256sum"]).current_dir(dir.path()));
        assert_eq!(String::from_utf8(sum).unwrap(), format!("{digest}  -\n"), "{path}");
    }
}
