//! One suite for every fold: what real tools compressed must come back bit for bit.
//!
//! Every test here runs the tool that a release is made with; where one is missing, the test fails and names it.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use rehydrator::fold::{Map, Unfolded, fold, unfold};
use rehydrator::source::{File, Source};

/// Runs a shell command in `dir`; a failure names it.
fn sh(dir: &Path, command: &str) {
    let out = Command::new("bash").args(["-euo", "pipefail", "-c", command]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

fn open(path: &Path) -> Arc<dyn Source> {
    Arc::new(File::new(fs::File::open(path).unwrap()).unwrap())
}

/// Compares what is written to it with a file.
struct Compare {
    wanted: io::BufReader<fs::File>,
    buf: Vec<u8>,
    len: u64,
}

impl Write for Compare {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.buf.resize(buf.len(), 0);
        self.wanted.read_exact(&mut self.buf)?;
        assert!(self.buf == buf, "other bytes within {} at {}", buf.len(), self.len);
        self.len += buf.len() as u64;
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Unfolds `path`, folds it back and compares. Gives what came of it, and how long both took.
fn round_trip(path: &Path) -> (Unfolded, f64, f64) {
    let form = open(path);
    let start = Instant::now();
    let unfolded = unfold(&form, path.parent().unwrap()).unwrap();
    let unfold_time = start.elapsed().as_secs_f64();
    let start = Instant::now();
    if let Some(map) = &unfolded.map {
        let bytes = map.to_bytes();
        let map = Map::from_bytes(&bytes).unwrap();
        assert_eq!(map.to_bytes(), bytes, "a map that is read and written again");
        assert_eq!(map.plain_len(), unfolded.plain.len());
        assert_eq!(map.folded_len(), form.len());
        let wanted = io::BufReader::new(fs::File::open(path).unwrap());
        let mut compare = Compare { wanted, buf: Vec::new(), len: 0 };
        fold(&map, &mut source::Reader::new(&*unfolded.plain), &mut compare).unwrap();
        assert_eq!(compare.len, form.len());
    } else {
        assert!(Arc::ptr_eq(&unfolded.plain, &form));
    }
    (unfolded, unfold_time, start.elapsed().as_secs_f64())
}

/// Figures for the files named in `FOLD_FILES`: `cargo test --test folds measure -- --ignored --nocapture`.
#[test]
#[ignore = "needs FOLD_FILES"]
fn measure() {
    for path in std::env::var("FOLD_FILES").unwrap().split_whitespace().map(PathBuf::from) {
        let (unfolded, out, back) = round_trip(&path);
        let map = unfolded.map.map(|map| map.to_bytes()).unwrap_or_default();
        let len = fs::metadata(&path).unwrap().len();
        let peak = fs::read_to_string("/proc/self/status").unwrap();
        let peak = peak.lines().find(|l| l.starts_with("VmHWM")).unwrap().to_string();
        eprintln!(
            "{}: {len} bytes, plain {}, unfold {out:.1} s, fold {back:.1} s, map {} ({} zstd, {:.3} %), {peak}",
            path.display(),
            unfolded.plain.len(),
            map.len(),
            zstd::encode_all(&map[..], 19).unwrap().len(),
            100.0 * map.len() as f64 / len as f64,
        );
    }
}
