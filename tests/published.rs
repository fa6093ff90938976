//! The published file itself, made again from what is inside it: the encoders against the tools they stand for.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests too")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rehydrator::fold::{fold, unfold};
use rehydrator::source::{self, File, Source};

/// Runs a shell command in `dir`; a failure names it.
fn sh(dir: &Path, command: &str) {
    let out =
        Command::new("bash").args(["-euo", "pipefail", "-c", command]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Numbers that look random and are always the same.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }

    /// Text, program code, zeros, noise, and repeats of what was there before, near and far.
    fn mixture(&mut self, n: usize, code: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while out.len() < n {
            let len = 1 + self.below(40_000);
            match self.below(6) {
                0 => out.resize(out.len() + len, 0),
                1 => out.extend(self.bytes(len)),
                2 => {
                    let at = self.below(code.len() - len);
                    out.extend(&code[at..at + len]);
                }
                3 => {
                    for _ in 0..len / 50 {
                        let (back, run) = (1 + self.below(40_000), 3 + self.below(300));
                        let from = out.len().saturating_sub(back);
                        let run: Vec<u8> = out[from..].iter().copied().take(run).collect();
                        out.extend(run);
                        out.push(self.below(256) as u8);
                    }
                }
                4 => out.extend((0..len).map(|_| b"ab"[self.below(2)])),
                _ => {
                    let from = out.len().saturating_sub(1 + self.below(70_000));
                    let run: Vec<u8> = out[from..].iter().copied().take(len).collect();
                    out.extend(run);
                }
            }
        }
        out.truncate(n);
        out
    }
}

/// GNU gzip's bytes at every level: inputs of awkward lengths, from a file and from a pipe that gives little at a time.
#[test]
fn gnu_gzip_at_every_level() {
    let dir = tempfile::tempdir().unwrap();
    let code = fs::read("/bin/bash").unwrap();
    let mut random = Random(1);
    let lengths = [0, 1, 3, 10, 263, 32_768, 65_275, 65_537, 98_304];
    for (i, len) in lengths.into_iter().chain([200_000, 600_000]).enumerate() {
        let plain = match i % 3 {
            0 => random.mixture(len, &code),
            1 => random.bytes(len),
            _ => (0..len).map(|i| if i % 5000 < 3 { i as u8 } else { b'x' }).collect(),
        };
        fs::write(dir.path().join("plain"), &plain).unwrap();
        for level in 1..=9 {
            sh(
                dir.path(),
                &format!(
                    "gzip -{level} -c plain > a.gz; dd if=plain bs=7777 status=none | gzip -{level} > b.gz"
                ),
            );
            for name in ["a.gz", "b.gz"] {
                let path = dir.path().join(name);
                let form: Arc<dyn Source> = Arc::new(File::new(fs::File::open(&path).unwrap()).unwrap());
                let unfolded = unfold(&form, dir.path()).unwrap();
                let map = unfolded.map.unwrap_or_else(|| panic!("{name}, {len} bytes, level {level}"));
                assert!(
                    map.to_bytes().len() < 40,
                    "{name}, {len} bytes, level {level}: not by the encoder alone"
                );
                let mut made = Vec::new();
                fold(&map, &mut source::Reader::new(&*unfolded.plain), &mut made).unwrap();
                assert!(made == fs::read(&path).unwrap(), "{name}, {len} bytes, level {level}: other bytes");
            }
        }
    }
}
