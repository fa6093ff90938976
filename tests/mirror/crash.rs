//! Killed at any moment, started twice, in little memory: nothing that is not right has a final name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::mirror::site::{Entry, Site, fails, rehydrator, text, tree};
use crate::tools::{Nginx, noise, peak};

/// Two versions of a dozen files of 100 KB, so slowly that a run takes about a second.
fn slow() -> (Site, Nginx) {
    let site = Site::new();
    for (v, (channel, version)) in [("stable", "1.0.0"), ("beta", "1.1.0")].into_iter().enumerate() {
        let files: Vec<_> =
            (0..12).map(|i| (format!("file{i}"), noise((v * 100 + i) as u64, 100_000))).collect();
        let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        site.release(channel, version, &files);
    }
    let nginx = Nginx::with(&site.www(""), "autoindex on; limit_rate 600k;");
    site.config(
        &json!({"sources": [{"type": "container-linux", "channels": ["stable", "beta"], "keys": ["keys"],
        "url": format!("{}/{{channel}}/{{arch}}-usr/", nginx.url)}]}),
    );
    (site, nginx)
}

/// Looks at the mirror until told to stop: every file that is seen must be right, and have its signature; every
/// `current` must lead to a version that is complete.
fn watch(dest: &Mutex<PathBuf>, expected: &BTreeMap<String, Entry>, stop: &AtomicBool, looks: &AtomicUsize) {
    fn look(top: &Path, dir: &Path, expected: &BTreeMap<String, Entry>) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = path.strip_prefix(top).unwrap().to_str().unwrap();
            if name == ".rehydrator" {
                continue;
            }
            match expected.get(name) {
                Some(Entry::File(bytes)) => {
                    assert!(fs::read(&path).unwrap() == *bytes, "{name} is not what it must be");
                    if !name.ends_with(".sig") {
                        assert!(top.join(format!("{name}.sig")).exists(), "{name} has no signature");
                    }
                }
                Some(Entry::Link(target)) => {
                    assert_eq!(fs::read_link(&path).unwrap(), *target);
                    let version = format!("all/{}/", target.file_name().unwrap().to_str().unwrap());
                    for file in expected.keys().filter(|f| f.starts_with(&version)) {
                        assert!(top.join(file).exists(), "{name} is there, {file} is not");
                    }
                }
                Some(Entry::Dir) => look(top, &path, expected),
                None => panic!("{name} is visible"),
            }
        }
    }
    while !stop.load(Ordering::SeqCst) {
        // Whoever holds it removes the mirror.
        let dest = dest.lock().unwrap();
        look(&dest, &dest, expected);
        looks.fetch_add(1, Ordering::SeqCst);
    }
}

/// How many bytes there are in all files of the mirror, finished or not.
fn bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let meta = entry.path().symlink_metadata().ok()?;
            Some(if meta.is_dir() { bytes(&entry.path()) } else { meta.len() })
        })
        .sum()
}

#[test]
fn killed_at_ten_points() {
    let (site, _nginx) = slow();
    site.mirror(&[]).good();
    let expected = site.tree();
    assert_eq!(expected.values().filter(|e| matches!(e, Entry::File(_))).count(), 52);
    let whole = bytes(&site.dest("all"));
    let (stop, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let dest = Mutex::new(site.dest(""));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&dest, &expected, &stop, &looks));
        let points = noise(seed, 10);
        for (i, point) in points.iter().enumerate() {
            fs::remove_dir_all(&*dest.lock().unwrap()).unwrap();
            let mut child = site.command().spawn().unwrap();
            // One in each tenth of a run, the last when every byte has arrived, and the links are still to be made.
            let part = if i == 9 { 2550 } else { 255 * i as u64 + u64::from(*point) };
            while bytes(&site.dest("")) < whole * part / 2550 {
                // It may end between the count and the question.
                assert!(
                    child.try_wait().unwrap().is_none() || bytes(&site.dest("")) >= whole * part / 2550,
                    "it ended before it was killed"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            site.mirror(&[]).good();
            assert_eq!(site.tree(), expected);
            assert!(!site.dest(".rehydrator/partial").exists());
        }
        stop.store(true, Ordering::SeqCst);
        watcher.join().unwrap();
    });
    assert!(looks.into_inner() > 50);
}

#[test]
fn two_at_once() {
    let (site, _nginx) = slow();
    let first = site.command().spawn().unwrap();
    let lock = site.dest(".rehydrator/lock");
    while !lock.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(100));
    let busy =
        format!("{}: another process changes this mirror; --wait waits for it", site.dest("").display());
    assert!(fails(&mut site.command()).contains(&busy));
    assert!(fails(rehydrator().args(["mirror", "gc"]).arg(site.dest(""))).contains(&busy));
    let summary = site.mirror(&["--wait"]).good();
    assert_eq!(summary.counts(), (0, 26));
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("26 new"), "{}", text(&output.stdout));
}

#[test]
fn in_little_memory() {
    let site = Site::new();
    let big = noise(7, 100 << 20);
    let names: Vec<_> = (0..300).map(|i| format!("small{i}")).collect();
    let mut files: Vec<_> = names.iter().map(|name| (name.as_str(), name.as_bytes())).collect();
    files.truncate(20);
    files.extend(["big0", "big1", "big2", "big3"].map(|name| (name, big.as_slice())));
    site.release("stable", "1.0.0", &files);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&json!({"parallel": 4, "sources": [{"type": "container-linux", "keys": ["keys"],
        "url": format!("{}/{{channel}}/{{arch}}-usr/", nginx.url)}]}));
    let peaks = [&[][..], &["--verify"]].map(|more| peak(site.command().args(more).spawn().unwrap()));
    println!("peaks: {} and {} KiB", peaks[0] >> 10, peaks[1] >> 10);
    assert!(peaks.iter().all(|&p| p > 0 && p < 64 << 20), "{peaks:?}");
    assert_eq!(tree(&site.dest("all/1.0.0")).len(), 2 * 25);
}

/// All transfers together keep to the rate.
#[test]
fn at_a_rate() {
    let site = Site::new();
    let (a, b) = (noise(1, 500_000), noise(2, 500_000));
    site.release("stable", "1.0.0", &[("a", &a), ("b", &b)]);
    let nginx = Nginx::with(&site.www(""), "autoindex on;");
    site.config(&json!({"rate": "1M", "sources": [{"type": "container-linux", "keys": ["keys"],
        "url": format!("{}/{{channel}}/{{arch}}-usr/", nginx.url)}]}));
    let start = Instant::now();
    site.mirror(&[]).good();
    let took = start.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_secs(5), "{took:?}");
}
