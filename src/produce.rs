//! Produces artifacts: source, fold, digest, sink. The one way in which an artifact comes out, used to rehydrate it and
//! to prove, before it is stored, that it will.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result, ensure};

use crate::digest::{Blake3, Digest, Hasher};
use crate::fold::{self, Folded, Map};
use crate::io::Buffers;
use crate::progress::Task;
use crate::recipe::Blob;
use crate::sink::Output;
use crate::source::Source;
use crate::source::cluster::Cache;
use crate::store;

/// Bytes that are read, hashed and written together.
const CHUNK: usize = 1 << 20;

/// Chunks that the hash may lag behind.
const BEHIND: usize = 8;

/// Zeros from this length on are passed on as such and not read.
const LONG_ZEROS: u64 = 64 << 10;

/// What an artifact is made of.
pub struct Parts {
    /// The plain bytes.
    pub source: Arc<dyn Source>,
    /// What makes the output of them; without it, they are the output.
    pub map: Option<Map>,
}

/// What makes the published file of the output.
pub struct Published {
    /// Its map.
    pub map: Map,
    /// What must come out.
    pub expected: Blob,
    /// Memory for encoders, in bytes; one at a time is used whatever it takes.
    pub memory: u64,
}

impl Parts {
    /// Checks that the lengths of what the output is made of fit each other and its `size`, before anything is read.
    fn check(&self, size: u64) -> io::Result<()> {
        let plain = self.source.len();
        let (wanted, made) =
            self.map.as_ref().map_or((plain, plain), |map| (map.plain_len(), map.folded_len()));
        if (plain, size) == (wanted, made) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "size mismatch: {made} bytes are made of {wanted}: expected {size} bytes, made of the {plain} of its source"
            ),
        ))
    }

    /// The output, to be looked into here and there.
    pub fn view(self) -> Result<Arc<dyn Source>> {
        Ok(match self.map {
            Some(map) => Arc::new(Folded::new(map, self.source)?),
            None => self.source,
        })
    }
}

/// What is checked of what comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing.
    Nothing,
    /// The quickest digest that there is a record of: BLAKE3 for an output, SHA-256 for a published file.
    Quick,
    /// The SHA-256 digest too.
    Sha256,
}

/// What came out: its length, and those of its digests that were asked for.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// In bytes.
    pub size: u64,
    /// The digest that the stream metadata has.
    pub sha256: Option<Digest>,
    /// The digest that is recorded when that one is proven.
    pub blake3: Option<Blake3>,
}

/// How to produce.
pub struct How<'a> {
    /// The cache that the sources share.
    pub cache: &'a Cache,
    /// Threads that decode ahead.
    pub threads: usize,
    /// What to check of what comes out.
    pub check: Check,
    /// Counts the bytes that came out.
    pub task: &'a Task,
}

/// Writes the artifact `name` to `out` and checks that it is `expected`, and what `recorded` says where there is a record.
/// On an error `out` holds bytes that are not the artifact: whoever calls makes sure that nobody takes them for it.
pub fn produce(
    name: &str,
    parts: &Parts,
    expected: &Blob,
    recorded: Option<Blake3>,
    how: &How,
    out: &mut dyn Output,
) -> Result<Found> {
    let what = format!("artifact {name}");
    let hashes = match how.check {
        Check::Nothing => Hashes::default(),
        Check::Quick => Hashes { sha256: recorded.is_none(), blake3: recorded.is_some() },
        Check::Sha256 => Hashes { sha256: true, blake3: true },
    };
    let found = output(parts, expected.size, how, hashes, out).with_context(|| what.clone())?;
    matches(&what, &found, expected)?;
    if let (Some(found), Some(recorded)) = (found.blake3, recorded) {
        ensure!(found == recorded, "{what}: blake3 mismatch: expected {recorded}, got {found}");
    }
    Ok(found)
}

/// Checks the length of what came out, and its SHA-256 digest where it is known.
fn matches(what: &str, found: &Found, expected: &Blob) -> Result<()> {
    let sha256 = found.sha256.unwrap_or(expected.sha256);
    store::matches(what, &Blob { sha256, size: found.size }, expected)
}

/// Makes the output of `parts`, of `size` bytes.
fn output(parts: &Parts, size: u64, how: &How, hashes: Hashes, out: &mut dyn Output) -> io::Result<Found> {
    parts.check(size)?;
    how.cache.with_plan(how.cache.plan(&*parts.source), how.threads, || {
        std::thread::scope(|scope| -> io::Result<Found> {
            let mut tee = Tee::new(scope, Some(how.task), hashes, size, out);
            let mut plain = Plain { source: &*parts.source, cache: how.cache, pos: 0 };
            match &parts.map {
                Some(map) => fold::fold(map, &mut plain, &mut tee, 0)?,
                None => plain.copy_to(&mut tee)?,
            }
            tee.finish()
        })
    })
}

/// As [`produce`], but writes the published file. The output, of `size` bytes, is made on a thread of its own and goes
/// through memory.
pub fn produce_published(
    name: &str,
    parts: &Parts,
    size: u64,
    published: &Published,
    how: &How,
    out: &mut dyn Output,
) -> Result<()> {
    let (to, chunks) = sync_channel(BEHIND);
    let found = std::thread::scope(|scope| {
        let inner = scope.spawn(move || output(parts, size, how, Hashes::default(), &mut PipeWriter(to)));
        let hashes = Hashes { sha256: how.check != Check::Nothing, blake3: false };
        let mut tee = Tee::new(scope, None, hashes, published.expected.size, out);
        let mut pipe = PipeReader { chunks, held: Vec::new(), used: 0 };
        let made =
            fold::fold(&published.map, &mut pipe, &mut tee, published.memory).and_then(|()| tee.finish());
        // If the other end waits for room, it ends now.
        drop(pipe);
        let inner =
            inner.join().map_err(|_| io::Error::other("the thread that makes the output panicked"))?;
        match (inner, made) {
            // It stopped because nobody listened: why that was says more.
            (Err(e), Err(why)) if e.kind() == io::ErrorKind::NotConnected => Err(why),
            (Err(e), _) if e.kind() != io::ErrorKind::NotConnected => Err(e),
            (_, made) => made,
        }
    });
    let what = format!("artifact {name}");
    matches(&what, &found.with_context(|| what.clone())?, &published.expected)
}

/// The writing end of a pipe between threads.
struct PipeWriter(SyncSender<Vec<u8>>);

impl Write for PipeWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(buf.to_vec()).map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?;
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for PipeWriter {}

/// The reading end.
struct PipeReader {
    chunks: Receiver<Vec<u8>>,
    held: Vec<u8>,
    used: usize,
}

impl Read for PipeReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.used == self.held.len() {
            // A sender that is gone has sent all.
            self.held = self.chunks.recv().unwrap_or_default();
            self.used = 0;
        }
        let n = buf.len().min(self.held.len() - self.used);
        buf[..n].copy_from_slice(&self.held[self.used..self.used + n]);
        self.used += n;
        Ok(n)
    }
}

/// Reads a source from start to end, and tells the cache how far it is.
struct Plain<'a> {
    source: &'a dyn Source,
    cache: &'a Cache,
    pos: u64,
}

impl Plain<'_> {
    fn copy_to(&mut self, out: &mut Tee) -> io::Result<()> {
        let mut buf = vec![0; CHUNK];
        while self.pos < self.source.len() {
            let zeros = self.source.zeros_at(self.pos);
            if zeros >= LONG_ZEROS {
                out.zeros(zeros)?;
                self.pos += zeros;
                continue;
            }
            let n = self.read(&mut buf)?;
            out.write_all(&buf[..n])?;
        }
        Ok(())
    }
}

impl Read for Plain<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (self.source.len() - self.pos).min(buf.len() as u64) as usize;
        self.cache.advance(self.pos);
        self.source.read_at(self.pos, &mut buf[..n])?;
        self.pos += n as u64;
        Ok(n)
    }
}

enum Piece {
    Bytes(Vec<u8>),
    Zeros(u64),
}

/// Which digests are made.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Hashes {
    sha256: bool,
    blake3: bool,
}

impl Hashes {
    /// Hashes `pieces`.
    fn of(self, pieces: &Receiver<Piece>, buffers: &Buffers) -> (Option<Digest>, Option<Blake3>) {
        let mut sha256 = self.sha256.then(|| Hasher::new(io::sink()));
        let mut blake3 = self.blake3.then(blake3::Hasher::new);
        for piece in pieces {
            let hash = |hasher: &mut dyn Output| match &piece {
                Piece::Bytes(bytes) => hasher.write_all(bytes),
                Piece::Zeros(n) => hasher.zeros(*n),
            };
            // Writing to a hash cannot fail.
            let _ = sha256.as_mut().map(|hasher| hash(hasher));
            let _ = blake3.as_mut().map(|hasher| hash(hasher));
            if let Piece::Bytes(bytes) = piece {
                buffers.give(bytes);
            }
        }
        (sha256.map(|hasher| hasher.finish().0), blake3.as_ref().map(Blake3::from_hasher))
    }
}

/// The thread that hashes: where pieces go, and what comes out.
type Hashing<'scope> = (SyncSender<Piece>, ScopedJoinHandle<'scope, (Option<Digest>, Option<Blake3>)>);

/// Writes to an output, and hashes on another thread.
struct Tee<'scope, 'a> {
    out: &'a mut dyn Output,
    task: Option<&'a Task>,
    pending: Vec<u8>,
    buffers: Arc<Buffers>,
    /// Bytes that may come, and those of them that may still: a damaged or hostile recipe does not fill a disk.
    size: u64,
    left: u64,
    hash: Option<Hashing<'scope>>,
}

impl<'scope, 'a> Tee<'scope, 'a> {
    fn new(
        scope: &'scope std::thread::Scope<'scope, '_>,
        task: Option<&'a Task>,
        hashes: Hashes,
        size: u64,
        out: &'a mut dyn Output,
    ) -> Self {
        let buffers = Arc::new(Buffers::default());
        let hash = (hashes != Hashes::default()).then(|| {
            let (to, pieces) = sync_channel(BEHIND);
            let buffers = buffers.clone();
            (to, scope.spawn(move || hashes.of(&pieces, &buffers)))
        });
        Self { out, task, pending: Vec::with_capacity(CHUNK), buffers, size, left: size, hash }
    }

    fn count(&mut self, n: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(n).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "size mismatch: more bytes come out than expected")
        })?;
        Ok(())
    }

    fn advance(&self, n: u64) {
        if let Some(task) = self.task {
            task.advance(n);
        }
    }

    fn send(&mut self, piece: Piece) -> io::Result<()> {
        match &self.hash {
            Some((to, _)) => to.send(piece).map_err(|_| io::Error::other("the hashing thread is gone")),
            None => Ok(()),
        }
    }

    fn flush_pending(&mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            self.count(self.pending.len() as u64)?;
            self.out.write_all(&self.pending)?;
            self.advance(self.pending.len() as u64);
            match &self.hash {
                Some(_) => {
                    let mut next = self.buffers.take();
                    next.reserve_exact(CHUNK);
                    let full = std::mem::replace(&mut self.pending, next);
                    self.send(Piece::Bytes(full))?;
                }
                None => self.pending.clear(),
            }
        }
        Ok(())
    }

    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.flush_pending()?;
        self.count(len)?;
        self.out.zeros(len)?;
        self.advance(len);
        self.send(Piece::Zeros(len))
    }

    fn finish(mut self) -> io::Result<Found> {
        self.flush_pending()?;
        self.out.flush()?;
        let (sha256, blake3) = match self.hash.take() {
            Some((to, thread)) => {
                drop(to);
                thread.join().map_err(|_| io::Error::other("the hashing thread panicked"))?
            }
            None => (None, None),
        };
        Ok(Found { size: self.size - self.left, sha256, blake3 })
    }
}

impl Write for Tee<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = buf.len().min(CHUNK - self.pending.len());
        self.pending.extend_from_slice(&buf[..n]);
        if self.pending.len() == CHUNK {
            self.flush_pending()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
