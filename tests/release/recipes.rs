//! What a pipeline calls: the Containerfile and `ci/pipeline`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::tools::Nginx;
use crate::tools::example::{ok, rehydrator, sha256sum, tool};
use crate::tools::registry::{PROGRAM, Registry};
use crate::tools::small::{sh, small_stream};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// `build` in the context of a build, without network, in a builder image that was made here.
#[test]
fn containerfile() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let context = dir.path().join("context");
    small_stream(&context);
    fs::copy(Path::new(ROOT).join("Containerfile"), context.join("Containerfile")).unwrap();
    fs::copy(PROGRAM, context.join("program")).unwrap();
    // All that the build takes besides the program: a shell and coreutils.
    sh(
        dir.path(),
        "mkdir -p builder/tmp
         for tool in sh mkdir cp chmod rm mv ln; do
             path=$(command -v $tool)
             cp -L --parents $path $(ldd $path | grep -o '/[^ ]*') builder
         done
         [ -e builder/bin/sh ] || cp -L --parents /bin/sh builder
         tar -C builder -cf builder.tar .",
    );
    let name = format!("localhost/rehydrator-{}", std::process::id());
    let (builder, image, mirror) =
        (format!("{name}-builder"), format!("{name}-image"), format!("{name}-mirror"));
    ok(tool("podman").arg("import").arg(dir.path().join("builder.tar")).arg(&builder));
    for (target, image) in [(&[][..], &image), (&["--target", "mirror"], &mirror)] {
        let mut build = tool("buildah");
        build.args(["bud", "--isolation=chroot", "--pull=never"]).args(target);
        build.args(["--build-arg", &format!("BUILDER={builder}"), "--build-arg", "PROGRAM=program"]);
        ok(build.args(["-t", image]).arg(&context));
    }
    let run = |args: &[&str]| {
        let mut command = tool("bash");
        command.arg(Path::new(ROOT).join("ci/podman"));
        ok(command.args(["run", "--rm", "-i", "--read-only", "--network=none", "--cap-drop=all"]).args(args))
    };
    assert!(run(&[&image, "rehydrate", "-", "--disk", "a"]) == fs::read(context.join("a.raw")).unwrap());
    let help = String::from_utf8(run(&[&mirror, "releases", "--help"])).unwrap();
    assert!(help.contains("mirror releases"), "{help}");
    ok(tool("podman").args(["rmi", "--force", &image, &mirror, &builder]));
}

/// From a web server into a registry.
#[test]
fn pipeline() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let www = dir.path().join("www");
    small_stream(&www);
    sh(&www, "gpg --homedir gnupg --batch --export --armor > key.asc; mv artifacts/* .");
    let nginx = Nginx::serve(&www);
    let stream = fs::read_to_string(www.join("stream.json")).unwrap();
    fs::write(www.join("test.json"), stream.replace("https://example.invalid", &nginx.url)).unwrap();
    let registry = Registry::plain(dir.path());
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let repository = format!("{}/coreos/test", registry.address);
    // Of the program the tests have a large build, which zstd takes half a minute for.
    let program = dir.path().join("program");
    let script = format!(
        "#!/bin/sh\n[ \"$1 $2\" != 'build image' ] || set -- \"$@\" --program-compression=gzip\nexec {PROGRAM} \"$@\"\n"
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let run = || {
        let mut pipeline = tool("bash");
        pipeline.arg(Path::new(ROOT).join("ci/pipeline"));
        pipeline.env("STREAM_URL", format!("{}/test.json", nginx.url)).env("ARCHITECTURES", "x86_64");
        pipeline.env("KEYS", www.join("key.asc")).env("WORKDIR", &work).env("REHYDRATOR", &program);
        ok(pipeline.env("REPOSITORY", &repository).env("SKOPEO_FLAGS", "--dest-tls-verify=false"))
    };
    run();
    for tag in ["1", "latest"] {
        let out = dir.path().join(tag);
        let mut rehydrate = rehydrator();
        rehydrate.args(["rehydrate", "-", "--disk", "b", "--tls-verify=false", "--from"]);
        rehydrate.arg(format!("docker://{repository}:{tag}"));
        ok(rehydrate.stdout(fs::File::create(&out).unwrap()));
        assert_eq!(sha256sum(&out), sha256sum(&www.join("b.raw")), "{tag}");
    }
    // Once more: nothing is downloaded again.
    let bodies =
        || nginx.log().iter().filter(|line| line.starts_with("GET") && !line.contains("json")).count();
    let before = bodies();
    run();
    assert_eq!(bodies(), before);
}
