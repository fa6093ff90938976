//! Commands that write, killed at any moment and started again: the result is right, and nothing else is left. What a living
//! run has made out of sight stays.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::mirror::site::tree;
use crate::pull::layers::{Layer, Tar, layout};
use crate::registry::image::Release;
use crate::tools::example::{fails, ok, rehydrator};
use crate::tools::registry::{PROGRAM, noise, temp};
use crate::tools::release::stub_for;
use crate::tools::server::{Reply, Server};

/// What temporary names begin with.
const TEMPORARY: &str = ".rehydrator-";

/// How often each command is killed.
const KILLS: u64 = 8;

/// What is in all files of a directory, those with temporary names included.
type Files = BTreeMap<String, Vec<u8>>;

fn files(dir: &Path) -> Files {
    let files = tree(dir).into_iter().filter_map(|(name, entry)| match entry {
        crate::mirror::site::Entry::File(bytes) => Some((name, bytes)),
        _ => None,
    });
    files.collect()
}

/// Runs `command` once, and then again and again: killed, and run to its end. Before each of these, `prepare` makes `place`, the
/// directory that the command writes into. `check` looks at it after each kill.
fn kill(name: &str, place: &Path, prepare: &dyn Fn(), command: &dyn Fn() -> Command, check: &dyn Fn(&Files)) {
    let again = || {
        let _ = fs::remove_dir_all(place);
        fs::create_dir(place).unwrap();
        prepare();
    };
    again();
    let start = Instant::now();
    ok(&mut command());
    let whole = start.elapsed();
    let expected = files(place);
    assert!(!expected.is_empty());
    let seed = u64::from(std::process::id());
    let (mut killed, mut left) = (0, 0);
    for (i, point) in (0..KILLS).zip(noise(seed, KILLS as usize)) {
        again();
        let mut child = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let part = (256 * i + u64::from(point)) as u32;
        std::thread::sleep(whole * part / (256 * KILLS as u32));
        child.kill().unwrap();
        killed += u32::from(child.wait().unwrap().code().is_none());
        let found = files(place);
        left += usize::from(found.keys().any(|file| file.contains(TEMPORARY)));
        check(&found);
        ok(&mut command());
        let found = files(place);
        let names: Vec<_> = found.keys().collect();
        assert!(found == expected, "{name}, seed {seed}, kill {i}: {names:?}");
    }
    println!("{name}: {whole:?}, killed {killed} of {KILLS} times, {left} times something was left");
    assert!(killed > 0, "{name}: never in the middle");
}

#[test]
fn every_command_that_writes_images_or_disks() {
    let release = Release::new();
    let place = release.path("place");
    let stub = release.text("stub");
    fs::write(&stub, stub_for(62)).unwrap();
    let image = |output: &str| {
        let mut command = rehydrator();
        command.args(["build", "image", "--binary", &stub, "-o", output, "--workdir", &release.text("")]);
        command
    };
    let source = format!("oci:{}", release.text("source"));
    ok(&mut image(&source));
    let mirror = |output: &str| {
        let mut command = rehydrator();
        command.args(["mirror", "image", &source, output]);
        command
    };
    let rehydrate = |more: &[&str]| {
        let mut command = rehydrator();
        command
            .arg("rehydrate")
            .arg(&place)
            .args(["--all", "--data", &release.text("dehydrated")])
            .args(more);
        command
    };
    let other = {
        let tar = Tar::default().add(b'0', "other", "", &noise(7, 1000)).end();
        layout(&release.path("other"), &[Layer::gzip(&tar)])
    };

    // A layout is not there, or there under its name and whole.
    let dir = format!("oci:{}", place.join("image").display());
    let is_layout = |found: &Files| {
        let final_names = found.keys().filter(|name| !name.contains(TEMPORARY)).count();
        assert!(final_names == 0 || found.contains_key("image/index.json"), "{:?}", found.keys());
    };
    let nothing = || {};
    kill("build image oci:", &place, &nothing, &|| image(&dir), &is_layout);
    kill("mirror image oci:", &place, &nothing, &|| mirror(&dir), &is_layout);

    // In a layout with another image, that one stays.
    let with_other = || drop(ok(rehydrator().args(["mirror", "image", &other, &format!("{dir}:other")])));
    let has_other = |found: &Files| {
        let index: Value = serde_json::from_slice(&found["image/index.json"]).unwrap();
        let tags: Vec<_> = index["manifests"].as_array().unwrap().iter().map(|m| &m["annotations"]).collect();
        assert!(tags.iter().any(|tag| tag["org.opencontainers.image.ref.name"] == "other"), "{tags:?}");
    };
    kill("build image oci:, in place", &place, &with_other, &|| image(&dir), &has_other);
    kill("mirror image oci:, in place", &place, &with_other, &|| mirror(&dir), &has_other);

    let file = format!("oci-archive:{}", place.join("image.tar").display());
    let old = || fs::write(place.join("image.tar"), "old").unwrap();
    let whole = {
        ok(&mut image(&format!("oci-archive:{}", release.text("whole.tar"))));
        fs::read(release.path("whole.tar")).unwrap()
    };
    let is_whole = |found: &Files| {
        assert!(found["image.tar"] == b"old" || found["image.tar"] == whole, "half an archive");
    };
    kill("build image oci-archive:", &place, &old, &|| image(&file), &is_whole);
    kill("mirror image oci-archive:", &place, &old, &|| mirror(&file), &|found| {
        assert!(!found["image.tar"].is_empty());
    });

    // Disks: as they were, or as they must be.
    fs::create_dir_all(&place).unwrap();
    let _ = fs::remove_dir_all(&place);
    fs::create_dir(&place).unwrap();
    ok(&mut rehydrate(&[]));
    let disks = files(&place);
    assert_eq!(disks.len(), 3);
    let are_right = |old: Option<&'static [u8]>| {
        let disks = disks.clone();
        move |found: &Files| {
            for (name, bytes) in found.iter().filter(|(name, _)| !name.contains(TEMPORARY)) {
                assert!(Some(&bytes[..]) == old || disks[name] == *bytes, "{name}");
            }
        }
    };
    kill("rehydrate", &place, &nothing, &|| rehydrate(&[]), &are_right(None));
    let old = || disks.keys().for_each(|name| fs::write(place.join(name), "old").unwrap());
    kill("rehydrate --force", &place, &old, &|| rehydrate(&["--force"]), &are_right(Some(b"old")));
}

/// A process that makes a name between the name of a file and the file: the moment at which a kill leaves something, made certain.
#[test]
fn what_is_left_of_any_kind_goes_with_the_next_run() {
    let release = Release::new();
    let out = release.path("out");
    let left = |dir: &Path| {
        fs::create_dir_all(dir.join(".rehydrator-aaaaaaaaaaaa/blobs/sha256")).unwrap();
        fs::write(dir.join(".rehydrator-aaaaaaaaaaaa/blobs/sha256/x"), "x").unwrap();
        fs::write(dir.join(".rehydrator-bbbbbbbbbbbb"), "x").unwrap();
    };
    let hidden = |dir: &Path| {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with(TEMPORARY)).count()
    };
    // What a process without a number of its own would have had for every run.
    fs::create_dir(&out).unwrap();
    for pid in ["1", "2"] {
        fs::write(out.join(format!(".stable-44.1-qemu.x86_64.qcow2.{pid}")), "x").unwrap();
    }
    left(&out);
    let mut command = rehydrator();
    command.arg("rehydrate").arg(&out).args(["--all", "--data", &release.text("dehydrated")]);
    ok(&mut command);
    assert_eq!(hidden(&out), 0);
    for place in ["layout", "archive"] {
        let dir = release.path(place);
        left(&dir);
        let output = match place {
            "layout" => format!("oci:{}", dir.join("new").display()),
            _ => format!("oci-archive:{}", dir.join("file").display()),
        };
        release.build(&output, &[]);
        assert_eq!(hidden(&dir), 0);
    }
    // Both where a new layout would have been staged, and in the layout that is there.
    let (parent, layout) = (release.path("layout"), release.path("layout/new"));
    left(&parent);
    left(&layout);
    release.build(&format!("oci:{}", layout.display()), &[]);
    assert_eq!((hidden(&parent), hidden(&layout)), (0, 0));
    // The working directory.
    left(release.tmp.path());
    let stream = release.path("stream.json");
    fs::write(&stream, r#"{"stream":"stable","metadata":{},"architectures":{}}"#).unwrap();
    let mut init = rehydrator();
    init.args(["build", "init", "--stream-file"]).arg(&stream).args(["--workdir", &release.text("")]);
    ok(&mut init);
    assert_eq!(hidden(release.tmp.path()), 0);
}

/// In a container every process has the number 1. Two of them replace the same file, one after the other has been killed.
#[test]
fn as_the_first_process_of_a_container() {
    let release = Release::new();
    let out = release.path("out");
    fs::create_dir(&out).unwrap();
    let run = |kill: bool| {
        let script = r#"mount -t proc proc /proc && exec "$@""#;
        let mut command = Command::new("unshare");
        command.args([
            "-rpf",
            "--kill-child",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            PROGRAM,
            "--progress=none",
        ]);
        command.arg("rehydrate").arg(&out).args(["--all", "--force", "--data", &release.text("dehydrated")]);
        if !kill {
            ok(&mut command);
            return;
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(150));
        child.kill().unwrap();
        child.wait().unwrap();
    };
    run(false);
    let names: Vec<_> = files(&out).into_keys().collect();
    for name in &names {
        fs::write(out.join(name), "old").unwrap();
        // As the program named it before it was killed.
        fs::write(out.join(format!(".{name}.1")), "left").unwrap();
    }
    run(true);
    run(false);
    let found = files(&out);
    assert!(names.iter().all(|name| found[name].len() > 1000), "replaced");
    assert!(!found.keys().any(|name| name.contains(TEMPORARY)), "{:?}", found.keys());
}

#[test]
fn two_runs_into_one_layout() {
    let dir = temp();
    let tar = Tar::default().add(b'0', "a", "", &noise(1, 100_000)).end();
    let fast = layout(&dir.path().join("fast"), &[Layer::gzip(&tar)]);
    let slow_dir = dir.path().join("slow");
    layout(&slow_dir, &[Layer::gzip(&Tar::default().add(b'0', "b", "", &noise(2, 400_000)).end())]);
    // A registry over the layout, which takes two seconds for a layer.
    let index: Value = serde_json::from_slice(&fs::read(slow_dir.join("index.json")).unwrap()).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap()[7..].to_owned();
    let server = Server::start(move |request| {
        let name = request.path.rsplit('/').next().unwrap();
        let hex = name.strip_prefix("sha256:").unwrap_or(if name == "latest" { &manifest } else { "none" });
        let Ok(bytes) = fs::read(slow_dir.join("blobs/sha256").join(hex)) else { return Reply::new(404, "") };
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let reply = Reply::range(request, &bytes).header("Content-Type", media_type);
        Reply { slow: (bytes.len() > 100_000).then_some(Duration::from_millis(80)), ..reply }
    });
    for (n, exists) in [false, true].into_iter().enumerate() {
        let place = dir.path().join(format!("place-{n}"));
        fs::create_dir(&place).unwrap();
        let to = |tag: &str| format!("oci:{}:{tag}", place.join("image").display());
        if exists {
            ok(rehydrator().args(["mirror", "image", &fast, &to("first")]));
        }
        let mut slow = rehydrator();
        slow.args(["mirror", "image", "--tls-verify=false", &format!("{}/slow:latest", server.address)]);
        let slow = slow.arg(to("slow")).stderr(Stdio::piped()).spawn().unwrap();
        let staged = if exists { place.join("image") } else { place.clone() };
        let is_staged = || {
            let mut entries = fs::read_dir(&staged).unwrap().flatten();
            entries.any(|entry| entry.file_name().to_str().unwrap().starts_with(TEMPORARY))
        };
        let start = Instant::now();
        while !is_staged() {
            assert!(start.elapsed() < Duration::from_secs(20), "it does not begin");
            std::thread::sleep(Duration::from_millis(5));
        }
        ok(rehydrator().args(["mirror", "image", &fast, &to("fast")]));
        assert!(is_staged(), "the slow run has lost what it has made, or has ended already");
        let output = slow.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let index: Value =
            serde_json::from_slice(&fs::read(place.join("image/index.json")).unwrap()).unwrap();
        let mut tags: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap())
            .collect();
        tags.sort_unstable();
        assert_eq!(tags, if exists { &["fast", "first", "slow"][..] } else { &["fast", "slow"] });
        ok(rehydrator().arg("pull").arg(to("slow")).arg(place.join("tree")).args(["--cache", "no"]));
        assert!(!files(&place).keys().any(|name| name.contains(TEMPORARY)));
    }
    // What is no layout does not become one, also not in the last moment.
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = fails(rehydrator().args(["mirror", "image", &fast, &format!("oci:{}", file.display())]));
    assert!(error.contains("Not a directory"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
}

/// Many at a time, each with a tag of its own: none is lost.
#[test]
fn many_runs_into_one_layout() {
    let dir = temp();
    let tar = Tar::default().add(b'0', "a", "", &noise(1, 1000)).end();
    let source = layout(&dir.path().join("source"), &[Layer::gzip(&tar)]);
    let place: PathBuf = dir.path().join("image");
    let runs: Vec<_> = (0..8)
        .map(|n| {
            let mut command = rehydrator();
            command.args(["mirror", "image", &source, &format!("oci:{}:t{n}", place.display())]);
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for run in runs {
        let output = run.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let index: Value = serde_json::from_slice(&fs::read(place.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 8);
    assert_eq!(fs::read_dir(&place).unwrap().count(), 3);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
