//! Damage and accidents: a clear error that names the artifact, a non-zero exit, no file under a final name that is not
//! whole, and a rerun that completes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::tools::example::{self, Workdir, example, fails, ok, rehydrator, release, sha256sum, tool};
use serde_json::Value;

/// A copy of the release's dehydrated directory whose files are linked until they are changed.
struct Damaged {
    dir: tempfile::TempDir,
    index: Value,
}

impl Damaged {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(release().dir.path()).unwrap();
        ok(tool("cp").arg("-al").arg(release().data()).arg(dir.path()));
        let index = serde_json::from_slice(&fs::read(release().data().join("index.json")).unwrap()).unwrap();
        Self { dir, index }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("dehydrated")
    }

    /// The blob of an artifact's own delta.
    fn delta_of(&self, platform: &str) -> PathBuf {
        let artifacts = self.index["artifacts"].as_array().unwrap();
        let artifact = artifacts.iter().find(|a| a["platform"] == platform && a["arch"] == "x86_64").unwrap();
        let source = &self.index["sources"][artifact["source"].as_u64().unwrap() as usize];
        self.data().join("blobs/sha256").join(source["sha256"].as_str().unwrap())
    }

    /// Replaces a file by what `change` makes of its bytes.
    fn change(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::remove_file(path).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Rehydrating into a directory fails, and leaves nothing there.
    fn refuses(&self, which: &[&str]) -> String {
        let out = tempfile::tempdir_in(self.dir.path()).unwrap();
        let mut command = rehydrator();
        command
            .arg("rehydrate")
            .arg(out.path())
            .args(which)
            .args(["--arch", "x86_64", "--data"])
            .arg(self.data());
        let error = fails(&mut command);
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "something is left: {error}");
        error
    }
}

#[test]
fn a_flipped_byte_in_a_blob() {
    let damaged = Damaged::new();
    let blob = damaged.delta_of("openstack");
    damaged.change(&blob, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
    let error = damaged.refuses(&["--disk", "openstack"]);
    assert!(error.contains("artifact openstack") && error.contains("sha256 mismatch"), "{error}");
    assert!(error.contains(blob.file_name().unwrap().to_str().unwrap()), "the blob is named: {error}");
    let error = fails(rehydrator().args(["verify", "--data"]).arg(damaged.data()));
    assert!(error.contains("needed by openstack"), "{error}");
    // Others do not need it.
    let mut other = rehydrator();
    ok(other.args(["rehydrate", "-", "--disk", "aliyun", "--arch", "x86_64", "--data"]).arg(damaged.data()));
}

#[test]
fn flipped_bytes_all_over_the_live_rootfs() {
    let damaged = Damaged::new();
    let rootfs =
        damaged.index["artifacts"].as_array().unwrap().iter().find(|a| a["file"] == "rootfs").unwrap();
    let blob = damaged.data().join("blobs/sha256").join(rootfs["output"]["sha256"].as_str().unwrap());
    let len = fs::metadata(&blob).unwrap().len() as usize;
    for at in [300, len / 3, len / 2, len - len / 5] {
        let damaged = Damaged::new();
        damaged.change(&blob_in(&damaged, &blob), |bytes| bytes[at] ^= 0x10);
        let out = tempfile::tempdir_in(damaged.dir.path()).unwrap();
        let mut command = rehydrator();
        command
            .arg("rehydrate")
            .arg(out.path())
            .args(["--disk", "qemu", "--pxe", "--arch", "x86_64", "--data"]);
        let error = fails(command.arg(damaged.data()));
        assert!(error.contains("mismatch"), "byte {at}: {error}");
    }
}

fn blob_in(damaged: &Damaged, blob: &Path) -> PathBuf {
    damaged.data().join("blobs/sha256").join(blob.file_name().unwrap())
}

#[test]
fn a_truncated_and_a_missing_blob() {
    let damaged = Damaged::new();
    let blob = damaged.delta_of("aws");
    damaged.change(&blob, |bytes| bytes.truncate(bytes.len() - 1));
    let error = damaged.refuses(&["--disk", "aws"]);
    assert!(error.contains("artifact aws") && error.contains("bytes, got"), "{error}");
    fs::remove_file(&blob).unwrap();
    let error = damaged.refuses(&["--disk", "aws"]);
    assert!(error.contains("artifact aws") && error.contains("is missing"), "{error}");
}

#[test]
fn a_changed_index() {
    let damaged = Damaged::new();
    let index = damaged.data().join("index.json");
    let original = fs::read(&index).unwrap();
    for at in (0..original.len()).step_by(original.len() / 50) {
        damaged.change(&index, |bytes| bytes[at] ^= 1);
        let error = damaged.refuses(&["--disk", "openstack"]);
        assert!(error.contains("index.json") || error.contains("format version"), "byte {at}: {error}");
        fs::write(&index, &original).unwrap();
    }
    let text = String::from_utf8(original).unwrap();
    fs::write(&index, text.replacen("\"format-version\": 2", "\"format-version\": 99", 1)).unwrap();
    let error = damaged.refuses(&["--disk", "openstack"]);
    assert!(error.contains("format version 99: this program reads versions 1 to 2"), "{error}");
}

#[test]
fn a_stream_that_names_a_file_elsewhere() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let text = fs::read_to_string(release().dir.path().join("stream.json")).unwrap();
    for name in ["..", "a\\b", ""] {
        let mut stream: Value = serde_json::from_str(&text).unwrap();
        stream["architectures"]["x86_64"]["artifacts"]["openstack"]["formats"]["qcow2.xz"]["disk"]["location"] =
            format!("https://example.invalid/x/{name}").into();
        let file = dir.path().join("hostile.json");
        fs::write(&file, stream.to_string()).unwrap();
        let mut command = rehydrator();
        command.args(["build", "init", "--stream-file"]).arg(&file).arg("--workdir").arg(dir.path());
        let error = fails(&mut command);
        assert!(error.contains("openstack"), "{name:?}: {error}");
        assert!(!dir.path().join("stream.json").exists());
    }
}

#[test]
fn an_artifact_that_is_not_what_the_stream_says() {
    let example = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let workdir = Workdir::new(&example);
    let artifact = workdir.expected("ppc64le").into_iter().find(|a| a.platform == "openstack").unwrap();
    let path = workdir.dir.path().join("artifacts").join(&artifact.published);
    fs::remove_file(&path).unwrap();
    let error = fails(workdir.dehydrate_command().args(["--arch", "ppc64le"]));
    assert!(error.contains(&artifact.published) && error.contains("--allow-unhandled"), "{error}");
    fs::write(&path, "something else").unwrap();
    let error = fails(workdir.dehydrate_command().args(["--arch", "ppc64le"]));
    assert!(error.contains("artifact openstack") && error.contains("sha256 mismatch"), "{error}");
    assert!(!workdir.data().exists());
    let mut left: Vec<_> =
        fs::read_dir(workdir.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    // What was proven of other artifacts is kept for the next time.
    left.retain(|name| name != "proofs");
    left.sort();
    assert_eq!(left, ["artifacts", "stream.json"], "something is left");
    fs::remove_file(&path).unwrap();
    let table = workdir.dehydrate(&["--arch", "ppc64le", "--allow-unhandled"]);
    assert!(table.contains("unhandled: not downloaded"), "{table}");
}

#[test]
fn a_decompression_bomb() {
    let example = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut stream: Value = serde_json::from_slice(&fs::read(example.join("stream.json")).unwrap()).unwrap();
    // 3 GB of zeros, where a disk of half a GB would be.
    let bomb = dir.path().join("artifacts/bomb.raw.zst");
    fs::create_dir(dir.path().join("artifacts")).unwrap();
    ok(tool("bash").args(["-c", "head -c 3000000000 /dev/zero | zstd -q -o \"$0\""]).arg(&bomb));
    let mut artifact = stream["architectures"]["x86_64"]["artifacts"]["metal"]["formats"]["raw.xz"].take();
    artifact["disk"]["location"] = "https://example.invalid/bomb.raw.zst".into();
    artifact["disk"]["sha256"] = sha256sum(&bomb).into();
    stream["architectures"]["x86_64"]["artifacts"] =
        serde_json::json!({ "metal": { "release": "1", "formats": { "raw.zst": artifact } } });
    stream["architectures"].as_object_mut().unwrap().retain(|arch, _| arch == "x86_64");
    let file = dir.path().join("bomb.json");
    fs::write(&file, stream.to_string()).unwrap();
    ok(rehydrator().args(["build", "init", "--stream-file"]).arg(&file).arg("--workdir").arg(dir.path()));
    let mut command = rehydrator();
    command.args(["build", "dehydrate", "--max-size", "1G", "--workdir"]).arg(dir.path());
    let error = fails(&mut command);
    assert!(
        error.contains("artifact metal") && error.contains("more than 1073741824 bytes inside"),
        "{error}"
    );
    assert!(!dir.path().join("dehydrated").exists());
}

#[test]
fn a_full_disk() {
    let workdir = release();
    let dir = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=8m none {dir} && {{ {program} --progress=none rehydrate {dir} --disk hetzner --arch x86_64 \
         --data {data}; echo code $?; ls -A {dir}; }}",
        dir = dir.path().display(),
        program = env!("CARGO_BIN_EXE_rehydrator"),
        data = workdir.data().display()
    );
    let output = tool("unshare").args(["-rm", "sh", "-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "code 1\n", "{}", example::stderr(&output));
    assert!(example::stderr(&output).contains("No space left on device"), "{}", example::stderr(&output));
}

/// Starts `command`, kills it after `delay`, and says whether it was still running.
fn kill_after(command: &mut std::process::Command, delay: Duration) -> bool {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while start.elapsed() < delay {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

#[test]
fn killed_in_the_middle() {
    let example = example("release", &["--arch", "x86_64", "--arch", "ppc64le"]);
    let workdir = Workdir::new(&example);
    let dehydrate = || {
        let mut command = workdir.dehydrate_command();
        command.args(["--arch", "ppc64le"]);
        command
    };
    let mut first = dehydrate().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let error = fails(&mut dehydrate());
    assert!(error.contains("another process is at it"), "{error}");
    first.kill().unwrap();
    first.wait().unwrap();
    let mut killed = 0;
    for ms in [100, 700, 2000] {
        killed += u32::from(kill_after(&mut dehydrate(), Duration::from_millis(ms)));
        assert!(killed == 0 || !workdir.data().exists(), "half a directory after {ms} ms");
    }
    assert!(killed > 0, "never in the middle");
    ok(&mut dehydrate());
    ok(rehydrator().args(["verify", "--data"]).arg(workdir.data()));

    let out = tempfile::tempdir_in(workdir.dir.path()).unwrap();
    let whole = workdir.expected("ppc64le");
    let mut killed = 0;
    for ms in [50, 150, 300, 600] {
        killed +=
            u32::from(kill_after(&mut workdir.rehydrate(out.path(), &["--all"]), Duration::from_millis(ms)));
        for entry in fs::read_dir(out.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let artifact =
                whole.iter().find(|a| a.output() == name).unwrap_or_else(|| panic!("{name} is left"));
            assert_eq!(sha256sum(&path), artifact.sha256, "{name} after {ms} ms");
        }
    }
    assert!(killed > 0, "never in the middle");
    ok(&mut workdir.rehydrate(out.path(), &["--all"]));
    for artifact in whole {
        assert_eq!(sha256sum(&out.path().join(artifact.output())), artifact.sha256);
    }
}

#[test]
fn stdout_that_nobody_reads() {
    let workdir = release();
    let mut child = workdir
        .rehydrate(Path::new("-"), &["--disk", "hetzner", "--arch", "x86_64"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(example::stderr(&output), "");
}
