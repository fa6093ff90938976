//! Releases that are built on an earlier one.

use std::fs;

use serde_json::Value;

use crate::tools::example::{Workdir, example, ok, rehydrator, sha256sum, tool};
use crate::tools::small::sh;

/// The live PXE set and one disk of the example; in the live rootfs there is `extra` besides.
fn release(extra: &str) -> Workdir {
    let mut workdir = Workdir::new(&example("release", &["--arch", "x86_64", "--arch", "ppc64le"]));
    let dir = workdir.dir.path();
    let architectures = &mut workdir.stream["architectures"];
    architectures.as_object_mut().unwrap().retain(|arch, _| arch == "x86_64");
    let artifacts = architectures["x86_64"]["artifacts"].as_object_mut().unwrap();
    artifacts.retain(|platform, _| ["metal", "openstack"].contains(&platform.as_str()));
    let formats = artifacts["metal"]["formats"].as_object_mut().unwrap();
    formats.retain(|format, _| format == "pxe");
    let rootfs = &mut formats["pxe"]["rootfs"];
    let name = rootfs["location"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    // Its length is odd, so that what follows is elsewhere in every block.
    let program = format!(
        "mkdir tree; cd tree; cpio --quiet -idm < ../artifacts/{name}
         head -c 100001 /dev/urandom > {extra}
         (echo {extra}; cpio --quiet -it < ../artifacts/{name}) | cpio --quiet -o -H newc > ../rootfs
         cd ..; rm artifacts/{name}; mv rootfs artifacts/{name}"
    );
    sh(dir, &program);
    rootfs["sha256"] = sha256sum(&dir.join("artifacts").join(&name)).into();
    fs::write(dir.join("changed.json"), workdir.stream.to_string()).unwrap();
    let init = ["build", "init", "--stream-file"];
    ok(rehydrator().args(init).arg(dir.join("changed.json")).arg("--workdir").arg(dir));
    workdir
}

fn index(workdir: &Workdir) -> Value {
    serde_json::from_slice(&fs::read(workdir.data().join("index.json")).unwrap()).unwrap()
}

/// What is stored of the live rootfs.
fn stored(index: &Value) -> u64 {
    let artifacts = index["artifacts"].as_array().unwrap();
    artifacts.iter().find(|a| a["file"] == "rootfs").unwrap()["stored"].as_u64().unwrap()
}

#[test]
fn a_registry_with_the_last_release_receives_little() {
    let tmp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layout = tmp.path().join("layout");
    let size = || -> u64 {
        let files = fs::read_dir(layout.join("blobs/sha256")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
    };
    let image = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let build = |workdir: &Workdir, tag: &str| {
        let mut command = rehydrator();
        ok(command.args(["build", "image", "--workdir"]).arg(workdir.dir.path()).args(["-o", &image(tag)]));
        size()
    };
    let first = release("first");
    first.dehydrate(&["--skip-published"]);
    let before = build(&first, "1");
    let whole = stored(&index(&first));

    // From the image; then from a directory, which is itself built on another: there is no chain.
    let second = release("second");
    let table = second.dehydrate(&["--skip-published", "--previous", &image("1")]);
    assert!(table.contains("\nbuilt on fedora-coreos-"), "{table}");
    let third = release("third");
    third.dehydrate(&["--skip-published", "--previous", second.data().to_str().unwrap()]);
    // What is the same is no reason.
    let again = first.dehydrate(&["--skip-published", "--previous", &image("1")]);
    assert!(again.contains("total") && index(&first)["previous"] == Value::Null, "{again}");
    let mut known = before;
    for (workdir, tag) in [(&second, "2"), (&third, "3")] {
        let index = index(workdir);
        let previous = &index["previous"][0];
        let of_first = first.expected("x86_64").into_iter().find(|a| a.file == "rootfs").unwrap();
        assert_eq!(previous["sha256"], of_first.sha256, "{previous}");
        assert_eq!((&previous["arch"], &previous["name"]), (&"x86_64".into(), &of_first.published.into()));
        assert!(stored(&index) < 150_000, "{} of {whole}", stored(&index));
        let now = build(workdir, tag);
        assert!(now - known < 400_000, "{} of {known}", now - known);
        known = now;
    }
    ok(tool("rm").arg("-r").args([first.dir.path(), second.dir.path()]));

    for (workdir, tag) in [(&second, "2"), (&third, "3")] {
        let out = tmp.path().join(tag);
        ok(rehydrator().arg("rehydrate").arg(&out).args(["--all", "--from", &image(tag)]));
        for artifact in workdir.expected("x86_64") {
            assert_eq!(sha256sum(&out.join(artifact.output())), artifact.sha256, "{artifact:?}");
        }
    }
    ok(rehydrator().args(["verify", "--rehydrate", &image("3")]));
}
