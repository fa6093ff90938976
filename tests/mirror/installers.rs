//! The installers of machines, coreos-installer and flatcar-install, which no distribution of CI has: `ci/deps full` builds
//! the one and fetches the other.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::mirror::site::{Site, ok, rehydrator, text};
use crate::mirror::streams::{FILES, NEW, name, server, source};
use crate::tools::serving::Serving;
use crate::tools::{Nginx, noise};

/// coreos-installer has Fedora's keys built in, and gives them to `gpg --import`: to one that adds the key of the site.
fn with_our_key(site: &Site) -> String {
    let bin = site.dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let gpg = ok(Command::new("sh").args(["-c", "command -v gpg"]));
    let (gpg, key) = (gpg.trim(), site.dir.path().join("keys/signer.asc"));
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *\" --import \"*) (cat; echo; cat {}) | {gpg} \"$@\";; *) exec {gpg} \"$@\";; esac\n",
        key.display()
    );
    fs::write(bin.join("gpg"), script).unwrap();
    fs::set_permissions(bin.join("gpg"), fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())
}

/// Downloads all of a server with its signatures checked.
fn coreos_installer(site: &Site, path: &str, base: &str) {
    let run = |path: &str, args: &[&str]| {
        let mut command = Command::new("coreos-installer");
        command.args(args).args(["-s", "stable", "--stream-base-url", base]).env("PATH", path);
        command.output().expect("coreos-installer is needed: ci/deps full")
    };
    let list = text(&run(path, &["list-stream"]).stdout);
    let out = tempfile::tempdir_in(site.dir.path()).unwrap();
    let dir = out.path().to_str().unwrap();
    for (arch, platform, format, _, file) in FILES {
        let mut rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(rows.any(|row| row == [arch, platform, format]), "{list}");
        let args = ["download", "-a", arch, "-p", platform, "-f", format, "-C", dir];
        let output = run(path, &args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("Good signature"), "{}", text(&output.stderr));
        let (file, served) = (name(NEW, file), format!("prod/{NEW}/{arch}"));
        for name in [file.clone(), format!("{file}.sig")] {
            let expected = fs::read(site.www(&served).join(&name)).unwrap();
            assert!(fs::read(out.path().join(&name)).unwrap() == expected, "{name}");
            fs::remove_file(out.path().join(name)).unwrap();
        }
    }
    // Without our key it must not: then it was checked.
    let output = run(&std::env::var("PATH").unwrap(), &["download", "-a", "x86_64", "-f", "iso", "-C", dir]);
    assert!(text(&output.stderr).contains("GPG verification failure"), "{}", text(&output.stderr));
}

#[test]
fn coreos_installer_reads_a_mirror_and_a_server() {
    let (site, nginx) = server();
    let path = with_our_key(&site);
    site.config(&json!({"sources": [source(&nginx)]}));
    let mirror = Nginx::serve(site.dir.path());
    let base = format!("{}/dest", mirror.url);
    site.mirror(&["--base-url", &base]).good();
    coreos_installer(&site, &path, &format!("{base}/streams/"));

    let work = site.dir.path().join("work");
    let build =
        |step: &str, more: &[&str]| ok(rehydrator().args(["build", step, "--workdir"]).arg(&work).args(more));
    build("init", &["--stream-url", &format!("{base}/streams/stable.json")]);
    build("download", &["--key", site.dir.path().join("keys").to_str().unwrap()]);
    build("dehydrate", &[]);
    let serving = Serving::start(["--data".as_ref(), work.join("dehydrated").as_os_str()]);
    coreos_installer(&site, &path, &format!("http://{}/streams/", serving.address));
}

#[test]
fn flatcar_install_reads_a_mirror() {
    let site = Site::new();
    let image = noise(3, 2_000_000);
    let file = "flatcar_production_image.bin.bz2";
    site.release("stable", "4230.2.1", &[(file, &image)]);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&json!({"sources": [{"type": "container-linux", "name": "flatcar", "keys": ["keys"],
        "filters": ["+ flatcar_production_image*", "- *"],
        "url": format!("{}/{{channel}}/{{arch}}-usr/", nginx.url)}]}));
    site.mirror(&[]).good();
    let mirror = Nginx::serve(&site.dest(""));
    let mut command = Command::new("flatcar-install");
    command.args(["-D", "-b", &format!("{}/flatcar/stable", mirror.url), "-k"]);
    let output = command.arg(site.dir.path().join("keys/signer.asc")).current_dir(site.dir.path()).output();
    let output = output.expect("flatcar-install is needed: ci/deps full");
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("Good signature"), "{said}");
    assert!(fs::read(Path::new(site.dir.path()).join(file)).unwrap() == image);
}
