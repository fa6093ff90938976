//! Trees as `umoci unpack` and `podman export` make them: from images that buildah has made of a small system, with all
//! that a layer can hold, in every compression and from every place.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat};

use crate::pull::layers::{Layer, Tar, assert_same, gzip, layout, may_mknod, pull, rooted, tree, xattrs};
use crate::tools::example::{ok, rehydrator, stderr, tool};

/// `cap_dac_override,cap_fowner,cap_net_raw=ep`: the first two make a byte that is a newline.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0x0A, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// buildah and podman, with a storage of their own.
struct Storage {
    dir: PathBuf,
    /// With a short name, as podman wants it.
    run: tempfile::TempDir,
}

impl Storage {
    /// In a directory that is closed to others: trees in it are as they are in the image.
    fn new(dir: &Path) -> Self {
        fs::set_permissions(dir, PermissionsExt::from_mode(0o700)).unwrap();
        Self { dir: dir.into(), run: tempfile::tempdir().unwrap() }
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = tool(name);
        command.arg("--root").arg(self.dir.join("root")).arg("--runroot").arg(self.run.path());
        command.args(["--storage-driver", "vfs"]);
        command
    }

    /// Copies an image to where skopeo can write.
    fn copy(&self, args: &[&str], name: &str, to: &str) {
        let (root, run) = (self.dir.join("root"), self.run.path());
        let stored = format!("containers-storage:[vfs@{}+{}]{name}", root.display(), run.display());
        ok(tool("skopeo").args(["copy", "--quiet"]).args(args).args([&stored, to]));
    }

    fn buildah(&self, args: &[&str]) -> String {
        String::from_utf8(ok(self.tool("buildah").args(args))).unwrap().trim().to_owned()
    }

    /// Changes the image `from` with `change`, and gives the result the name `to`.
    fn commit(&self, from: &str, to: &str, change: impl FnOnce(&Path)) {
        let container = self.buildah(&["from", "--pull-never", from]);
        change(Path::new(&self.buildah(&["mount", &container])));
        self.buildah(&["commit", "--quiet", "--rm", &container, to]);
    }
}

/// A small system: a program that runs with its libraries, and one of each thing that a tree can hold.
fn system(root: &Path) {
    let mut files = vec!["/usr/bin/true".to_owned()];
    let libraries = String::from_utf8_lossy(&ok(tool("ldd").arg(&files[0]))).into_owned();
    files.extend(libraries.split_whitespace().filter(|word| word.starts_with('/')).map(Into::into));
    for file in &files {
        let to = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    // Where the program is in every system.
    let bin = root.join("bin");
    if !bin.exists() {
        symlink("usr/bin", &bin).unwrap();
    }

    let write = |name: &str, content: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    };
    let mode = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    for i in 0..200 {
        write(&format!("usr/share/doc/package-{}/file-{i}", i % 20), &format!("content {i}\n").repeat(i));
    }
    write("lower/keep", "keep");
    write("lower/gone", "gone");
    write("lower/dir/deep/file", "deep");
    write("replaced/by/file", "was a directory");
    write("becomes-a-directory", "was a file");
    write("becomes-a-link/x", "was a directory");
    symlink("usr/share", root.join("link-to-dir")).unwrap();
    symlink("/usr/share/../share/doc", root.join("absolute")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    lchown(root.join("dangling"), Some(5), Some(6)).unwrap();
    let linked = write("links/a", "linked");
    for name in ["b", "c", "d"] {
        fs::hard_link(&linked, root.join("links").join(name)).unwrap();
    }
    fs::hard_link(root.join("dangling"), root.join("links/symlink")).unwrap();

    mode(&write("modes/nothing", "nobody reads this"), 0o000);
    mode(&write("modes/setuid", "setuid"), 0o4755);
    fs::create_dir(root.join("modes/closed")).unwrap();
    write("modes/closed/inside", "closed");
    mode(&root.join("modes/closed"), 0o000);
    fs::create_dir(root.join("modes/tmp")).unwrap();
    mode(&root.join("modes/tmp"), 0o1777);
    fs::create_dir(root.join("modes/group")).unwrap();
    let owned = write("owners/file", "owned");
    lchown(&owned, Some(1000), Some(100)).unwrap();
    mode(&owned, 0o6711);
    lchown(root.join("owners"), Some(33), Some(33)).unwrap();
    lchown(root.join("modes/group"), Some(0), Some(8)).unwrap();
    mode(&root.join("modes/group"), 0o2775);

    let capable = write("capable", "capable");
    rustix::fs::setxattr(&capable, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
    let attributes = write("attributes", "attributes");
    rustix::fs::setxattr(&attributes, "user.one", b"1=\n\0 \xFF", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(root.join("owners"), "user.dir", b"dir", XattrFlags::empty()).unwrap();

    fs::write(root.join(OsStr::from_bytes(b"not-utf8-\xFF\xFE")), "bytes").unwrap();
    fs::write(root.join("white space\nand a newline"), "odd").unwrap();
    write(&format!("long/{}/{}", "d".repeat(120), "f".repeat(250)), "long");
    let big = fs::File::create(root.join("holes")).unwrap();
    big.set_len(3 << 20).unwrap();
    fs::create_dir(root.join("dev")).unwrap();
    mknodat(CWD, root.join("dev/fifo"), FileType::Fifo, Mode::from_raw_mode(0o620), 0).unwrap();
    if may_mknod(root) {
        let node = |name: &str, kind, dev| {
            mknodat(CWD, root.join("dev").join(name), kind, Mode::from_raw_mode(0o660), dev).unwrap();
        };
        node("null", FileType::CharacterDevice, makedev(1, 3));
        node("loop300", FileType::BlockDevice, makedev(7, 300));
    }
    let old = rustix::fs::Timespec { tv_sec: 1_234_567_890, tv_nsec: 987_654_321 };
    let times = rustix::fs::Timestamps { last_access: old, last_modification: old };
    for name in ["capable", "dangling", "modes/closed", "usr/share/doc"] {
        rustix::fs::utimensat(CWD, root.join(name), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// The second layer: removes, replaces, adds.
fn second(root: &Path) {
    fs::remove_file(root.join("lower/gone")).unwrap();
    fs::remove_dir_all(root.join("lower/dir")).unwrap();
    fs::remove_dir_all(root.join("replaced")).unwrap();
    fs::write(root.join("replaced"), "is a file").unwrap();
    fs::remove_file(root.join("becomes-a-directory")).unwrap();
    fs::create_dir(root.join("becomes-a-directory")).unwrap();
    fs::write(root.join("becomes-a-directory/x"), "in it").unwrap();
    fs::remove_dir_all(root.join("becomes-a-link")).unwrap();
    symlink("lower", root.join("becomes-a-link")).unwrap();
    // The other names keep the old content.
    fs::remove_file(root.join("links/b")).unwrap();
    fs::write(root.join("links/b"), "no longer linked").unwrap();
    fs::set_permissions(root.join("owners"), PermissionsExt::from_mode(0o700)).unwrap();
    rustix::fs::removexattr(root.join("owners"), "user.dir").unwrap();
    fs::write(root.join("usr/share/doc/new"), "new").unwrap();
    fs::remove_file(root.join("usr/share/doc/package-3/file-3")).unwrap();
    fs::remove_dir_all(root.join("usr/share/doc/package-4")).unwrap();
}

/// The third layer: puts back what the second has removed, and links to what is below.
fn third(root: &Path) {
    fs::create_dir(root.join("lower/dir")).unwrap();
    fs::write(root.join("lower/dir/other"), "other").unwrap();
    fs::write(root.join("lower/gone"), "back again").unwrap();
    fs::remove_file(root.join("links/c")).unwrap();
    fs::remove_file(root.join("dangling")).unwrap();
}

/// A real system: the Debian 13 of ci/trixie, without what only makes it large.
fn debian(root: &Path) {
    let tree = ok(tool(concat!(env!("CARGO_MANIFEST_DIR"), "/ci/trixie")).arg("--where"));
    let large = [
        "var/cache",
        "var/lib/apt/lists",
        "usr/share/locale",
        "usr/share/doc",
        "usr/lib/cni",
        "usr/lib/python3.13",
        "proc/*",
        "sys/*",
        "dev/*",
        "tmp/*",
        "run/*",
    ];
    ok(tool("sh")
        .args(["-ec", r#"from=$1 to=$2; shift 2; tar -C "$from" "$@" -cf - . | tar -C "$to" -xpf -"#, "sh"])
        .args([String::from_utf8(tree).unwrap().trim().as_ref(), root.as_os_str()])
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "--anchored"])
        .args(large.map(|path| format!("--exclude=./{path}"))));
}

/// Pulls an image, and fails unless umoci and podman make the same tree of it.
fn pull_and_compare(storage: &Storage, name: &str) -> BTreeMap<Vec<u8>, String> {
    let at = |name: &str| storage.dir.join(name);
    let gzip = format!("oci:{}:gzip", at("layout").display());
    storage.copy(&["--dest-compress", "--dest-compress-format=gzip"], name, &gzip);
    ok(pull(&gzip, &at("gzip")).env("REHYDRATOR_LOG", "off"));
    let pulled = tree(&at("gzip"));
    ok(tool("chroot").arg(at("gzip")).arg("/bin/true"));

    let image = format!("{}:gzip", at("layout").display());
    ok(tool("umoci").args(["unpack", "--image", &image]).arg(at("umoci")));
    assert_same(&pulled, &tree(&at("umoci/rootfs")));

    let container = ok(storage.tool("podman").args(["create", name, "/bin/true"]));
    let container = String::from_utf8(container).unwrap();
    ok(storage.tool("podman").args(["export", "-o"]).arg(at("export.tar")).arg(container.trim()));
    fs::create_dir(at("podman")).unwrap();
    let options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "-xf"];
    ok(tool("tar").args(options).arg(at("export.tar")).arg("-C").arg(at("podman")));
    let (mut expected, mut exported) = (pulled.clone(), tree(&at("podman")));
    for tree in [&mut expected, &mut exported] {
        // The mount points of the container, and the time that making them changed.
        for name in ["", "run", "run/secrets", "proc", "sys", "etc", "dev"] {
            tree.remove(name.as_bytes());
        }
    }
    // Podman's storage keeps an attribute that a layer no longer has.
    let [here, there] = [&mut expected, &mut exported].map(|tree| tree.remove(&b"owners"[..]).is_some());
    assert_eq!(here, there);
    assert_same(&expected, &exported);
    pulled
}

#[test]
fn a_debian_of_debootstrap() {
    if !rooted("pull::trees::a_debian_of_debootstrap") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let storage = Storage::new(dir.path());
    storage.commit("scratch", "localhost/debian:1", debian);
    // Packages leave: whiteouts as they are in every image that is built upon another.
    storage.commit("localhost/debian:1", "localhost/debian:2", |root| {
        let purge = ["dpkg", "--purge", "--force-depends", "xfsprogs", "erofs-utils"];
        ok(tool("chroot").arg(root).args(purge).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"));
    });
    let pulled = pull_and_compare(&storage, "localhost/debian:2");
    assert!(pulled.len() > 2000, "{}", pulled.len());
    assert!(!pulled.contains_key(&b"usr/sbin/mkfs.xfs"[..]) && pulled.contains_key(&b"usr/bin/dpkg"[..]));
}

#[test]
fn trees_are_those_of_umoci_and_podman() {
    if !rooted("pull::trees::trees_are_those_of_umoci_and_podman") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let storage = Storage::new(dir.path());
    storage.commit("scratch", "localhost/test:1", system);
    storage.commit("localhost/test:1", "localhost/test:2", second);
    storage.commit("localhost/test:2", "localhost/test:3", third);
    let image = "localhost/test:3";
    let pulled = pull_and_compare(&storage, image);
    assert!(pulled.contains_key(&b"owners"[..]));

    // The same tree from wherever it comes, and however it is compressed.
    let zstd = format!("oci:{}:zstd", at("layout").display());
    storage.copy(&["--dest-compress", "--dest-compress-format=zstd"], image, &zstd);
    let chunked = format!("oci:{}", at("chunked").display());
    storage.copy(&["--dest-compress", "--dest-compress-format=zstd:chunked"], image, &chunked);
    let raw = ok(tool("skopeo").args(["inspect", "--raw", &chunked]));
    assert!(String::from_utf8_lossy(&raw).contains("zstd-chunked.manifest-checksum"));
    let mut places = vec![zstd, chunked];
    for (transport, name) in [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar"), ("dir", "dir")] {
        let reference = format!("{transport}:{}", at(name).display());
        storage.copy(
            &[],
            image,
            &if transport == "docker-archive" { format!("{reference}:test:3") } else { reference.clone() },
        );
        places.push(reference);
    }
    places.push(format!("docker-archive:{}:test:3", at("docker.tar").display()));
    ok(tool("gzip").arg("-k").arg(at("oci.tar")));
    places.push(format!("oci-archive:{}.gz", at("oci.tar").display()));
    for place in places {
        ok(pull(&place, &at("other")).env("REHYDRATOR_LOG", "off"));
        assert_same(&pulled, &tree(&at("other")));
        ok(tool("rm").arg("-r").arg(at("other")));
    }

    let said =
        crate::tools::example::fails(&mut pull(&format!("oci:{}", at("layout").display()), &at("none")));
    assert!(said.contains("there are: gzip, zstd: several images: one must be named"), "{said}");
    let said = crate::tools::example::fails(&mut pull(
        &format!("docker-archive:{}:x", at("docker.tar").display()),
        &at("none"),
    ));
    assert!(said.contains("no image \"x\"; there are: docker.io/library/test:3"), "{said}");
}

/// What buildah does not make: whiteouts in every order, opaque directories, sparse members in all notations.
#[test]
fn layers_made_by_hand() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let tar = Tar::default;
    let lower = tar().dir("d").file("d/1", "1").file("d/2", "2").dir("d/sub").file("d/sub/3", "3");
    let lower = lower
        .dir("e")
        .file("e/1", "1")
        .dir("e/sub")
        .file("e/sub/2", "2")
        .file("f", "f")
        .dir("g")
        .file("g/1", "1");
    let lower = lower.symlink("link", "d").dir("h").file("h/1", "1").dir("h/s").file("h/s/2", "2");
    let upper = tar()
        // After what is new in it, and before.
        .dir("d")
        .file("d/new", "new")
        .file("d/.wh..wh..opq", "")
        .dir("e")
        .file("e/.wh..wh..opq", "")
        .file("e/new", "new")
        .dir("e/sub")
        .file("e/sub/new", "new")
        // Of what this layer has as well: only the lower one goes.
        .file("f", "upper")
        .file(".wh.f", "")
        .dir("g")
        .file("g/new", "new")
        .file(".wh.g", "")
        // Without the directories above it.
        .file("h/s/new", "new")
        .file(".wh.h", "")
        .file(".wh.nothing", "");
    let layers = [&lower, &upper].map(|tar| Layer::gzip(&tar.clone().end()));
    let image = layout(&at("layout"), &layers);
    ok(&mut pull(&image, &at("out")));
    let names = |root: &Path| -> Vec<String> {
        tree(root)
            .into_iter()
            .filter(|(_, text)| text.starts_with("100"))
            .map(|(name, _)| String::from_utf8(name).unwrap())
            .collect()
    };
    assert_eq!(names(&at("out")), ["d/new", "e/new", "e/sub/new", "f", "g/new", "h/s/new"]);
    assert_eq!(fs::read_to_string(at("out/f")).unwrap(), "upper");
    if rustix::process::geteuid().is_root() {
        ok(tool("umoci")
            .args(["unpack", "--image"])
            .arg(format!("{}:latest", at("layout").display()))
            .arg(at("umoci")));
        // Whatever else hides or makes something in a directory leaves umoci's times; here they are those of the layer.
        let without = |root: &Path| {
            let mut tree = tree(root);
            tree.remove(&b""[..]);
            for name in ["g", "h", "h/s"] {
                tree.remove(name.as_bytes());
            }
            tree
        };
        assert_same(&without(&at("out")), &without(&at("umoci/rootfs")));
    }

    // GNU tar writes each of its notations; the file is 3 MiB with something at two places.
    let holes = fs::File::create(at("holes")).unwrap();
    use std::os::unix::fs::FileExt;
    holes.write_all_at(b"first", 4096).unwrap();
    holes.write_all_at(&[7; 9000], 1 << 20).unwrap();
    // Many pieces, so that the map of the old notation goes on in further headers.
    for i in 0..40 {
        holes.write_all_at(b"piece", (2 << 20) + i * 16384).unwrap();
    }
    holes.set_len(4 << 20).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        ok(tool("tar")
            .args(["-S", "-cf"])
            .arg(at("sparse.tar"))
            .args(format)
            .arg("-C")
            .arg(dir.path())
            .arg("holes"));
        let layer = fs::read(at("sparse.tar")).unwrap();
        assert!(layer.len() < 1 << 20, "{format:?}: not sparse");
        let image = layout(&at("sparse"), &[Layer::gzip(&layer)]);
        ok(pull(&image, &at("out")).arg("--force"));
        assert!(fs::read(at("out/holes")).unwrap() == fs::read(at("holes")).unwrap(), "{format:?}");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(at("out/holes")).unwrap());
        assert!(blocks < 2048, "{format:?}: {blocks} blocks");
    }

    // Several members of gzip, frames of zstd with skippable ones between, as eStargz and zstd:chunked have them.
    let plain = tar().file("a", &"a".repeat(5000)).file("b", &"b".repeat(5000)).end();
    let (first, rest) = plain.split_at(3000);
    let skippable = [&[0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
    let frame = |bytes| zstd::encode_all(bytes, 3).unwrap();
    let xz = |bytes: &[u8]| {
        fs::write(at("x"), bytes).unwrap();
        ok(tool("xz").arg("-c").arg(at("x")))
    };
    for blob in [
        [gzip(first), gzip(rest)].concat(),
        [skippable.clone(), frame(first), skippable.clone(), frame(rest), skippable].concat(),
        xz(&plain),
        plain.clone(),
    ] {
        let image = layout(&at("packed"), &[Layer { blob, diff_id: rehydrator::digest::Digest::of(&plain) }]);
        ok(pull(&image, &at("out")).arg("--force"));
        assert_eq!(fs::read_to_string(at("out/b")).unwrap(), "b".repeat(5000));
    }
}

/// Without root: owners are recorded, devices are left out, closed directories are no obstacle.
#[test]
fn without_root() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let owned = |tar: Tar, owner: &[u8]| tar.pax(&[("uid", owner), ("gid", b"300")]);
    let tar = owned(Tar::default().dir("closed"), b"1").file("closed/f", "f");
    let tar = tar.dir("closed").with(|h| h[100..107].copy_from_slice(b"0000000"));
    let tar =
        tar.add(b'3', "null", "", b"").add(b'6', "fifo", "", b"").file("mine", "mine").symlink("s", "t");
    let tar = tar.file("readonly", "").with(|h| h[100..107].copy_from_slice(b"0000444"));
    let second = owned(Tar::default(), b"5").file("closed/g", "g");
    let image = layout(&at("image"), &[Layer::gzip(&tar.end()), Layer::gzip(&second.end())]);
    let program = at("rehydrator");
    fs::copy(env!("CARGO_BIN_EXE_rehydrator"), &program).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let root = rustix::process::geteuid().is_root();
    let run = |options: &[&str]| {
        let mut command = match root {
            true => tool("setpriv"),
            false => Command::new(&program),
        };
        if root {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        }
        let output =
            command.args(["pull", "--cache=no", &image]).arg(at("out")).args(options).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let said = run(&[]);
    assert!(said.contains("null: a device or fifo, left out"), "{said}");
    assert!(said.contains("all files belong to you"), "{said}");
    let said = run(&["--force", "--rootless"]);
    assert!(!said.contains("all files belong to you"), "{said}");
    let found = tree_as(&at("out"), root);
    assert!(found.iter().any(|(name, text)| name == b"fifo" && text.starts_with("10")), "{found:?}");
    assert!(!found.iter().any(|(name, _)| name == b"null"), "{found:?}");
    assert!(found.iter().any(|(name, text)| name == b"closed" && text.starts_with("40000 ")), "{found:?}");
    if root {
        // As umoci records it.
        let recorded = |name: &str| xattrs(&at("out").join(name)).get("user.rootlesscontainers").cloned();
        assert_eq!(recorded("closed/f").as_deref(), Some("080110ac02"));
        assert_eq!(recorded("closed/g").as_deref(), Some("080510ac02"));
        assert_eq!(recorded("mine"), None);
    }
    // Once more over what is closed to its own owner.
    run(&["--force"]);
    if !root {
        ok(tool("chmod").arg("-R").arg("u+rwx").arg(at("out")));
    }
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 3, "image, program, out");
}

/// The tree, if it can be read.
fn tree_as(root: &Path, readable: bool) -> Vec<(Vec<u8>, String)> {
    if !readable {
        ok(tool("chmod").arg("u+rx").arg(root.join("closed")));
    }
    tree(root).into_iter().collect()
}

/// Which image is taken of several.
#[test]
fn platforms() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let image = layout(&at("image"), &[Layer::gzip(&Tar::default().file("f", "x").end())]);
    ok(pull(&image, &at("out")).args(["--arch", "x86_64"]));
    let said = crate::tools::example::fails(pull(&image, &at("none")).args(["--arch", "s390x"]));
    assert!(said.contains("no image for linux/s390x; it is one for linux/amd64"), "{said}");
    // The same as an index of two.
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(at("image/index.json")).unwrap()).unwrap();
    let mut both = vec![];
    for (arch, variant) in [("arm", Some("v7")), ("s390x", None)] {
        let mut manifest = index["manifests"][0].clone();
        manifest["platform"] = serde_json::json!({ "os": "linux", "architecture": arch, "variant": variant });
        if variant.is_none() {
            manifest["platform"].as_object_mut().unwrap().remove("variant");
        }
        both.push(manifest);
    }
    let list = serde_json::json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": both });
    let list = list.to_string().into_bytes();
    let digest = rehydrator::digest::Digest::of(&list);
    fs::write(at("image/blobs/sha256").join(digest.to_string()), &list).unwrap();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{ "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest.oci(), "size": list.len() }] });
    fs::write(at("image/index.json"), index.to_string()).unwrap();
    let said = crate::tools::example::fails(pull(&image, &at("none")).args(["--arch", "amd64"]));
    assert!(said.contains("no image for linux/amd64; there are: linux/arm/v7, linux/s390x"), "{said}");
    ok(pull(&image, &at("arm")).args(["--arch", "arm", "--variant", "v7"]));
    let mut help = rehydrator();
    assert!(String::from_utf8(ok(help.args(["pull", "--help"]))).unwrap().contains("--rootless"));
}
