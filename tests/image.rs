//! The container image, judged by the tools that will carry it: skopeo, umoci, podman, GNU tar.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rehydrator::digest::Digest;
use rehydrator::oci::image::{build, build_at};
use rehydrator::recipe::{Artifact, Index, SourceSpec};
use serde_json::Value;
use tempfile::TempDir;

use crate::tools::release::{MACHINE, artifact, blob_of, stub_for, write};

/// The program of the image: static when the tests are built as ci/build builds, and refused otherwise.
const PROGRAM: &str = env!("CARGO_BIN_EXE_rehydrator");

/// The name of what images hold for a program where none is run.
const STUB: &str = "stub";

/// Runs a tool and gives its stdout; a tool that is missing or fails, fails the test.
fn run(command: &[&str]) -> String {
    run_in(Path::new("."), command)
}

/// [`run`], in a directory.
fn run_in(dir: &Path, command: &[&str]) -> String {
    let output = Command::new(command[0])
        .args(&command[1..])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}: ci/deps installs what the tests need", command[0]));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The blobs of the directory: the live rootfs that all share, a delta of one disk, a map that two disks share.
const BLOBS: [&[u8]; 3] = [&[0xA5; 300_000], b"delta of openstack", b"map of two disks"];

/// A dehydrated directory made by hand: a live rootfs, and two disks over it.
fn dehydrated(dir: &Path) -> Index {
    let stream_json = br#"{"stream":"stable","architectures":{"x86_64":{"artifacts":{
        "metal":{"release":"44.20260707.3.1"},"openstack":{"release":"44.20260707.3.1"}}}}}"#;
    let signed = |platform: &str, file: &str, source, map: Option<&[u8]>| {
        let artifact = artifact("x86_64", platform, file, source, blob_of(b"output"));
        let signature = format!("signature of {}", artifact.output.name);
        Artifact { signature: Some(blob_of(signature.as_bytes())), map: map.map(blob_of), ..artifact }
    };
    let [rootfs, delta, map] = BLOBS;
    let artifacts = vec![
        signed("metal", "rootfs.pxe", 0, None),
        signed("metal", "disk.raw", 0, Some(map)),
        signed("openstack", "disk.qcow2", 1, Some(map)),
    ];
    let sources = vec![
        SourceSpec::Stored { blob: blob_of(rootfs) },
        SourceSpec::Delta { blob: blob_of(delta), plain_size: 1, base: vec![0] },
    ];
    let index = write(dir, stream_json, artifacts, sources, &BLOBS);
    fs::create_dir_all(dir.join("signatures")).unwrap();
    fs::write(dir.join("stream.json.sig"), "signature of the stream").unwrap();
    for artifact in &index.artifacts {
        let signature = format!("signature of {}", artifact.output.name);
        fs::write(dir.join(format!("signatures/{}.sig", artifact.published.name)), signature).unwrap();
    }
    index
}

/// A temporary directory with a dehydrated directory in it.
struct Fixture {
    tmp: TempDir,
    index: Index,
}

impl Fixture {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let index = dehydrated(&tmp.path().join("dehydrated"));
        fs::write(tmp.path().join(STUB), stub_for(MACHINE)).unwrap();
        Self { tmp, index }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    fn at(&self, transport: &str, name: &str) -> String {
        format!("{transport}:{}", self.path(name).display())
    }

    /// With the stub for a program.
    fn build(&self, output: &str) -> Digest {
        build_at(&self.path("dehydrated"), &self.path(STUB), output, 0).unwrap()
    }

    fn fails(&self, output: &str) -> String {
        format!("{:#}", build(&self.path("dehydrated"), &self.path(STUB), output).unwrap_err())
    }

    /// With the program itself. gzip takes a fifth of the time of zstd.
    fn build_to_run(&self, output: &str) {
        let gzip = ["--program-compression=gzip", "--workdir", self.tmp.path().to_str().unwrap()];
        run(&[&[PROGRAM, "build", "image", "--output", output], &gzip[..]].concat());
    }

    /// What is there but the dehydrated directory and the stub.
    fn left(&self) -> Vec<String> {
        let names =
            fs::read_dir(self.tmp.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "dehydrated" && name != STUB).collect()
    }
}

/// Every file and directory below `dir`, by path from there, with mode, and content of a file.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (u32, Option<Vec<u8>>)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = meta.is_file().then(|| fs::read(&path).unwrap());
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        found.insert(path.strip_prefix(dir).unwrap().into(), (meta.permissions().mode() & 0o7777, content));
    }
    found
}

#[test]
fn skopeo_reads_what_it_says() {
    let f = Fixture::new();
    let digest = f.build(&f.at("oci", "image:v1"));
    let inspect = json(&run(&["skopeo", "inspect", &f.at("oci", "image:v1")]));
    assert_eq!(inspect["Digest"], digest.oci());
    assert_eq!(inspect["Os"], "linux");
    assert_eq!(inspect["Architecture"], json(&run(&["podman", "info", "--format=json"]))["host"]["arch"]);
    assert_eq!(inspect["Created"], "1970-01-01T00:00:00Z");
    let labels = &inspect["Labels"];
    assert_eq!(labels["org.opencontainers.image.version"], "44.20260707.3.1");
    assert_eq!(labels["org.opencontainers.image.title"], "CoreOS disk images, stable");
    assert_eq!(labels["dev.rehydrator.stream"], "stable");
    assert_eq!(labels["dev.rehydrator.architectures"], "x86_64");
    // The program, the metadata, the rootfs that three need, the map that two need, the delta that one needs.
    assert_eq!(inspect["Layers"].as_array().unwrap().len(), 5);

    let config = json(&run(&["skopeo", "inspect", "--config", &f.at("oci", "image:v1")]));
    assert_eq!(config["config"]["Entrypoint"], json(r#"["/usr/bin/rehydrator"]"#));
    assert_eq!(config["config"]["User"], Value::Null);
    assert_eq!(config["history"].as_array().unwrap().len(), 5);
    // Copies each blob and checks its digest.
    run(&["skopeo", "copy", &f.at("oci", "image:v1"), &f.at("dir", "copy")]);
}

#[test]
fn layers_are_what_their_annotations_say() {
    let f = Fixture::new();
    f.build(&f.at("oci", "image"));
    let manifest = json(&run(&["skopeo", "inspect", "--raw", &f.at("oci", "image")]));
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers[0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
    let mut artifacts = Vec::new();
    let mut files = Vec::new();
    for layer in layers {
        let digest: Digest = layer["digest"].as_str().unwrap().parse().unwrap();
        let path = f.path("image/blobs/sha256").join(digest.to_string());
        // Owner, mode and time of every entry, and the names of the files.
        let list = run(&["tar", "--numeric-owner", "--utc", "-tvf", path.to_str().unwrap()]);
        let mut names = Vec::new();
        for line in list.lines() {
            let fields: Vec<_> = line.split_whitespace().collect();
            assert!(["drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"].contains(&fields[0]), "{line}");
            assert_eq!((fields[1], fields[3], fields[4]), ("0/0", "1970-01-01", "00:00"), "{line}");
            if fields[0].starts_with('-') {
                names.push(fields[5].to_string());
            }
        }
        let Some(annotation) = layer["annotations"]["dev.rehydrator.files"].as_str() else {
            assert_eq!(names, ["usr/bin/rehydrator"]);
            continue;
        };
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar");
        artifacts.push(layer["annotations"]["dev.rehydrator.artifacts"].as_str());
        let tar = fs::read(&path).unwrap();
        for (file, name) in annotation.split(',').zip(&names) {
            let (path, range) = file.split_once('@').unwrap();
            let (offset, size) = range.split_once('+').unwrap();
            assert_eq!(&format!("srv/dehydrated/{path}"), name);
            let content = &tar[offset.parse().unwrap()..][..size.parse().unwrap()];
            assert_eq!(content, fs::read(f.path("dehydrated").join(path)).unwrap(), "{path}");
            files.push(path.to_string());
        }
        assert_eq!(annotation.split(',').count(), names.len());
    }
    let [rootfs, raw, qcow2] = [0, 1, 2].map(|i| f.index.artifacts[i].output.name.as_str());
    assert_eq!(
        artifacts,
        [None, Some(&*format!("{raw},{rootfs},{qcow2}")), Some(&*format!("{raw},{qcow2}")), Some(qcow2)]
    );
    files.sort();
    let stored = tree(&f.path("dehydrated")).into_iter().filter(|(_, (_, content))| content.is_some());
    assert_eq!(
        files,
        stored.map(|(path, _)| path.into_os_string().into_string().unwrap()).collect::<Vec<_>>()
    );
}

#[test]
fn umoci_unpacks_what_was_put_in() {
    let f = Fixture::new();
    // It knows no zstd.
    f.build_to_run(&f.at("oci", "image:v1"));
    let bundle = f.path("bundle");
    let image = f.path("image:v1");
    run(&["umoci", "unpack", "--rootless", "--image", image.to_str().unwrap(), bundle.to_str().unwrap()]);
    let mut expected = BTreeMap::new();
    for dir in ["", "usr", "usr/bin", "srv"] {
        expected.insert(PathBuf::from(dir), (0o755, None));
    }
    expected.insert("usr/bin/rehydrator".into(), (0o755, Some(fs::read(PROGRAM).unwrap())));
    for (path, (_, content)) in tree(&f.path("dehydrated")) {
        let path = if path == Path::new("") {
            "srv/dehydrated".into()
        } else {
            Path::new("srv/dehydrated").join(path)
        };
        expected.insert(path, (if content.is_some() { 0o644 } else { 0o755 }, content));
    }
    let found = tree(&bundle.join("rootfs"));
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (path, found) in &found {
        assert!(found == &expected[path] || path == Path::new(""), "{}: {:o}", path.display(), found.0);
    }
}

#[test]
fn same_input_same_digest() {
    let (a, b) = (Fixture::new(), Fixture::new());
    // As much of a real program as several blocks of zstd take, not tens of megabytes of it.
    let mut program = stub_for(MACHINE);
    program.extend_from_slice(&fs::read(PROGRAM).unwrap()[..8 << 20]);
    let [one, other] = [a.path("one-program"), b.path("program")];
    fs::write(&one, &program).unwrap();
    let digest = build_at(&a.path("dehydrated"), &one, &a.at("oci", "one"), 0).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    // Other modes, other times, other directory, other program name, other kind of output.
    for path in tree(&b.path("dehydrated")).keys() {
        fs::set_permissions(b.path("dehydrated").join(path), fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(b.path("dehydrated/.left-over"), "not named in the index").unwrap();
    fs::write(&other, &program).unwrap();
    let archive = b.at("oci-archive", "two.tar:v2");
    assert_eq!(build_at(&b.path("dehydrated"), &other, &archive, 0).unwrap(), digest);

    let digest = b.build(&archive);
    let first = fs::read(b.path("two.tar")).unwrap();
    assert_eq!(a.build(&a.at("oci-archive", "two.tar:v2")), digest);
    assert!(fs::read(a.path("two.tar")).unwrap() == first, "the archive itself differs");
    assert_ne!(build_at(&b.path("dehydrated"), &b.path(STUB), &archive, 1).unwrap(), digest);
}

#[test]
fn skopeo_reads_an_archive() {
    let f = Fixture::new();
    let digest = f.build(&f.at("oci-archive", "image.tar:v1"));
    let archive = f.at("oci-archive", "image.tar:v1");
    assert_eq!(json(&run(&["skopeo", "inspect", &archive]))["Digest"], digest.oci());
    run(&["skopeo", "copy", &archive, &f.at("dir", "copy")]);
    assert_eq!(
        run(&["tar", "-tf", f.path("image.tar").to_str().unwrap()])
            .lines()
            .filter(|l| !l.starts_with("blobs/"))
            .count(),
        2
    );
}

#[test]
fn a_second_tag_keeps_the_first() {
    let f = Fixture::new();
    let first = f.build(&f.at("oci", "image:first"));
    // As skopeo writes them too: a layout with images of several tools.
    run(&["skopeo", "copy", &f.at("oci", "image:first"), &f.at("oci", "image:copied")]);
    let second = build_at(&f.path("dehydrated"), &f.path(STUB), &f.at("oci", "image:second"), 1).unwrap();
    let list = run(&["umoci", "list", "--layout", f.path("image").to_str().unwrap()]);
    let mut tags: Vec<_> = list.lines().collect();
    tags.sort();
    assert_eq!(tags, ["copied", "first", "second"]);
    for (tag, digest) in [("first", first), ("copied", first), ("second", second)] {
        let image = f.at("oci", &format!("image:{tag}"));
        assert_eq!(json(&run(&["skopeo", "inspect", &image]))["Digest"], digest.oci());
    }
    assert_eq!(f.left(), ["image"]);
    let inside = fs::read_dir(f.path("image")).unwrap().count();
    assert_eq!(inside, 3, "something is left in the layout");
}

#[test]
fn a_flipped_byte_is_an_error_and_leaves_nothing() {
    let f = Fixture::new();
    let digest = Digest::of(BLOBS[0]);
    let path = f.path("dehydrated/blobs/sha256").join(digest.to_string());
    let mut content = BLOBS[0].to_vec();
    content[200_000] ^= 1;
    fs::write(&path, &content).unwrap();
    let expected = format!("blob {digest}: sha256 mismatch: expected {digest}, got {}", Digest::of(&content));
    assert_eq!(f.fails(&f.at("oci", "image")), expected);
    assert_eq!(f.fails(&f.at("oci-archive", "image.tar")), expected);
    assert_eq!(f.left(), [""; 0]);

    fs::write(&path, &content[1..]).unwrap();
    let expected = format!("blob {digest}: expected 300000 bytes, got 299999");
    assert_eq!(f.fails(&f.at("oci", "image")), expected);
    fs::remove_file(&path).unwrap();
    let missing = f.fails(&f.at("oci", "image"));
    assert!(missing.starts_with(&format!("blob {digest} is missing")), "{missing}");

    // An image that is there already stays as it is.
    fs::write(&path, BLOBS[0]).unwrap();
    f.build(&f.at("oci", "image"));
    let before = tree(&f.path("image"));
    fs::write(&path, &content).unwrap();
    f.fails(&f.at("oci", "image"));
    assert!(tree(&f.path("image")) == before);
}

#[test]
fn metadata_is_checked_too() {
    let f = Fixture::new();
    let signature = format!("signatures/{}.sig", f.index.artifacts[1].published.name);
    for name in ["stream.json", &signature] {
        let path = f.path("dehydrated").join(name);
        let good = fs::read(&path).unwrap();
        let bad = good.to_ascii_uppercase();
        fs::write(&path, &bad).unwrap();
        let (good_digest, bad_digest) = (Digest::of(&good), Digest::of(&bad));
        let expected = format!("{name}: sha256 mismatch: expected {good_digest}, got {bad_digest}");
        assert_eq!(f.fails(&f.at("oci", "image")), expected);
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(f.left(), [""; 0]);
}

#[test]
fn a_program_that_cannot_run_alone_is_refused() {
    let f = Fixture::new();
    let shell = "/bin/sh";
    let e = build(&f.path("dehydrated"), Path::new(shell), &f.at("oci", "image")).unwrap_err();
    let expected = "program /bin/sh: it needs a dynamic loader, and the image has none: build a static one with ci/build";
    assert_eq!(format!("{e:#}"), expected);
    let e =
        build(&f.path("dehydrated"), &f.path("dehydrated/index.json"), &f.at("oci", "image")).unwrap_err();
    assert!(format!("{e:#}").ends_with("index.json: not an ELF executable"), "{e:#}");
    assert_eq!(f.left(), [""; 0]);
}

#[test]
fn podman_runs_it() {
    let f = Fixture::new();
    build_at(&f.path("dehydrated"), Path::new(PROGRAM), &f.at("oci", "image"), 0).unwrap();
    f.build_to_run(&f.at("oci-archive", "image.tar"));
    // A store of its own, without a driver that needs anything of the file system.
    let (root, state) = (f.path("root"), f.path("run"));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/podman");
    let podman = [script, "--storage-driver=vfs", "--root", root.to_str().unwrap()];
    let podman = [&podman[..], &["--runroot", state.to_str().unwrap()]].concat();
    let confined = ["run", "--rm", "-i", "--read-only", "--network=none", "--cap-drop=all", "--user=1000"];
    // By relative paths: podman makes a name of the path, and takes only small letters for that.
    for image in ["oci:image", "oci-archive:image.tar"] {
        let stdout = run_in(f.tmp.path(), &[&podman[..], &confined, &[image, "--version"]].concat());
        assert_eq!(stdout, format!("rehydrator {}\n", env!("CARGO_PKG_VERSION")), "{image}");
    }
}
