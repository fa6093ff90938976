//! Proofs: that a published file is made again, bit for bit, of what was peeled out of it. They are kept in the working
//! directory, as the proof for `xz -9` takes as long as the compression took.
//!
//! # A kept proof
//!
//! `proofs/HEX`, where HEX is the SHA-256 of the published file: one line with the encoders and their versions, then the
//! segment map. It is used only when the map says the same encoders, so that another version proves anew.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::catalog::Item;
use crate::fold::{self, Compression, Effort, MAX_MAP, Map, Peeled};
use crate::progress::{Progress, Task};
use crate::source::{self, Source};
use crate::staging::write_file;
use crate::workdir::read_limited;

/// Bytes that are compared at a time.
const PART: usize = 1 << 18;

/// Finds and keeps proofs.
pub(crate) struct Proofs<'a> {
    dir: PathBuf,
    /// For all encoders together, in bytes.
    memory: u64,
    progress: &'a Progress,
    /// xz takes all cores and all the memory there is for encoders: one at a time.
    xz: Mutex<()>,
}

impl<'a> Proofs<'a> {
    /// Keeps proofs in `dir`, which need not exist.
    pub(crate) fn new(dir: PathBuf, memory: u64, progress: &'a Progress) -> Self {
        Self { dir, memory, progress, xz: Mutex::new(()) }
    }

    /// The map that makes the published file of `item`, which is `file`, of what was peeled out of it; the reason when
    /// there is none. `file` is what the stream metadata names: its digest was checked.
    pub(crate) fn find(&self, item: &Item, file: &File, peeled: &Peeled) -> Result<Result<Map, String>> {
        let len = file.metadata()?.len();
        if let Some(map) = self.kept(item)
            && map.folded_len() == len
            && map.plain_len() == peeled.form.len()
        {
            return Ok(Ok(map));
        }
        let _only = (peeled.compression == Compression::Xz)
            .then(|| self.xz.lock().unwrap_or_else(PoisonError::into_inner));
        let mut reason = String::new();
        for effort in [Effort::Beginning, Effort::Whole] {
            let map = fold::wrap(file, peeled.compression, &peeled.form, effort, self.memory)
                .context("finding the encoder failed")?;
            match map {
                Err(why) => reason = why,
                Ok(map) => {
                    let task = self.progress.task(format!("{}: prove as published", item.label()), Some(len));
                    match self.prove(&map, file, peeled, &task) {
                        Ok(()) => {
                            task.finish();
                            self.keep(item, &map)?;
                            return Ok(Ok(map));
                        }
                        Err(e) if e.kind() == io::ErrorKind::InvalidData => reason = e.to_string(),
                        Err(e) => return Err(e).context("making the published file again failed"),
                    }
                }
            }
        }
        Ok(Err(reason))
    }

    fn prove(&self, map: &Map, file: &File, peeled: &Peeled, task: &Task) -> io::Result<()> {
        let wanted = source::File::new(file.try_clone()?)?;
        let mut same = Same { wanted: &wanted, pos: 0, buf: Vec::new(), task };
        fold::fold(map, &mut source::Reader::new(&*peeled.form), &mut same, self.memory)
    }

    fn path(&self, item: &Item) -> PathBuf {
        self.dir.join(item.sha256.to_string())
    }

    /// A proof that was kept and is of these encoders.
    fn kept(&self, item: &Item) -> Option<Map> {
        let bytes = read_limited(&self.path(item), MAX_MAP as u64).ok()?;
        let (line, map) = bytes.split_at_checked(bytes.iter().position(|&b| b == b'\n')?)?;
        let map = Map::from_bytes(map.strip_prefix(b"\n")?, u64::MAX).ok()?;
        (line == encoders(&map).as_bytes()).then_some(map)
    }

    fn keep(&self, item: &Item, map: &Map) -> Result<()> {
        std::fs::create_dir_all(&self.dir).with_context(|| self.dir.display().to_string())?;
        let bytes = [encoders(map).as_bytes(), b"\n", &map.to_bytes()].concat();
        write_file(&self.path(item), &bytes)
    }
}

fn encoders(map: &Map) -> String {
    Vec::from_iter(map.encoders()).join(", ")
}

/// Compares what is written to it with a file.
struct Same<'a> {
    wanted: &'a source::File,
    pos: u64,
    buf: Vec<u8>,
    task: &'a Task,
}

impl Write for Same<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(PART)];
        self.buf.resize(bytes.len(), 0);
        let inside = self.pos + bytes.len() as u64 <= self.wanted.len();
        if inside {
            self.wanted.read_at(self.pos, &mut self.buf)?;
        }
        if !inside || self.buf != bytes {
            let what =
                format!("the encoder that was found makes other bytes from about byte {} on", self.pos);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.pos += bytes.len() as u64;
        self.task.advance(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
