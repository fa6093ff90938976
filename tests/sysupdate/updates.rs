//! systemd-sysupdate itself: `list` and `update`, with signatures checked.

use std::fs;

use crate::sysupdate::common::{Serve, System, TAR, key, push, push_index, tar_gz};
use crate::tools::Gpg;
use crate::tools::registry::{Registry, noise, temp};

#[test]
fn sysupdate_keeps_files_and_trees_up_to_date() {
    let tmp = temp();
    let registry = Registry::secure(tmp.path());
    let client = registry.client();
    let (secret, gpg, fingerprint) = key(tmp.path());
    let address = format!("--registry=https://{}/team", registry.address);
    let sign = format!("--sign-key={}", secret.display());
    let [auth, certs] = &registry.flags("")[..] else { panic!() };
    let serve = Serve::start(&[
        &address,
        &sign,
        "--repository=*",
        "--repository=os/**",
        "--repository=a/*/c/os",
        "--ttl=0s",
        auth,
        certs,
    ]);
    let public = gpg.run("", &["--export", &fingerprint], b"");
    let system = System::new(&tmp.path().join("system"), &public);

    let url = |repository: &str| format!("{}/{repository}", serve.url);
    system.transfer("raw", &url("os/disk"), ["url-file", "disk-@v.raw"], ["regular-file", "disk-@v.raw"]);
    system.transfer("tar", &url("tree"), ["url-tar", "tree-@v.tar.gz"], ["directory", "tree-@v"]);
    system.transfer("arch", &url("a/b/c/os"), ["url-file", "os-@v-%a.raw"], ["regular-file", "os_@v"]);
    let at = |name: &str| registry.reference(&format!("team/{name}"));

    let disks: Vec<_> = (1..=2).map(|n| noise(n, 1_000_000 + n as usize)).collect();
    for (n, version) in ["1.9", "1.10"].iter().enumerate() {
        // As oras pushes a file.
        push(&client, &at(&format!("os/disk:{version}")), &[(TAR, "disk.raw", &disks[n])]);
        // As docker builds an image.
        let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        let layer = tar_gz("version", version.as_bytes());
        push(&client, &at(&format!("tree:{version}")), &[(docker, "", &layer)]);
        let images = [format!("amd64 {version}"), format!("arm64 {version}"), format!("other {version}")];
        let of = |n: usize| ("application/octet-stream", "", images[n].as_bytes());
        let index = [("amd64", of(0)), ("arm64", of(1)), ("s390x", of(2)), ("vax", of(2))];
        push_index(&client, &at(&format!("a/b/c/os:{version}")), &index);
        // A tag that is no version, and is older than all that are.
        push(&client, &at("os/disk:latest"), &[(TAR, "disk.raw", &disks[n])]);

        for component in ["raw", "tar", "arch"] {
            let list = system.sysupdate(component, "list");
            let has = |version: &str| list.iter().any(|word| word == version);
            assert!(has("1.9") && has("1.10") == (n == 1), "{list:?}");
            system.sysupdate(component, "update");
        }
        let raw = system.path(&format!("srv/raw/disk-{version}.raw"));
        assert!(fs::read(raw).unwrap() == disks[n]);
        let tree = system.path(&format!("srv/tar/tree-{version}/version"));
        assert_eq!(fs::read_to_string(tree).unwrap(), *version);
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let os = system.path(&format!("srv/arch/os_{version}"));
        assert_eq!(fs::read_to_string(os).unwrap(), format!("{arch} {version}"));
        for (component, name) in [
            ("raw", format!("disk-{version}.raw")),
            ("tar", format!("tree-{version}")),
            ("arch", format!("os_{version}")),
        ] {
            let current = fs::read_link(system.path(&format!("srv/{component}/current"))).unwrap();
            assert_eq!(current.file_name().unwrap().to_str().unwrap(), name);
        }
    }
    assert_eq!(
        serve.names("a/b/c/os"),
        [
            "os-1.10-arm64.raw",
            "os-1.10-s390x.raw",
            "os-1.10-x86-64.raw",
            "os-1.9-arm64.raw",
            "os-1.9-s390x.raw",
            "os-1.9-x86-64.raw",
        ]
    );
    assert!(serve.text("tree/SHA256SUMS").ends_with("  tree-1.9.tar.gz\n"));

    // A key that nobody trusts.
    let stranger = Gpg::new();
    let other = stranger.key("", "Stranger <x@example.com>", "never");
    let keys = stranger.run("", &["--export", &other], b"");
    let system = System::new(&tmp.path().join("other"), &keys);
    system.transfer("raw", &url("os/disk"), ["url-file", "disk-@v.raw"], ["regular-file", "disk-@v.raw"]);
    let (good, _, text) = system.try_sysupdate("raw", "update");
    assert!(!good && text.contains("Signature verification failed"), "{text}");
    let log = serve.log();
    assert!(log.contains("/team/a/b/c/os:1.10: left out: no name for an image for linux/vax\n"), "{log}");
}
