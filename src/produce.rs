//! Produces artifacts: source, fold, digest, sink. The one way in which an artifact comes out, used to rehydrate it and
//! to prove, before it is stored, that it will.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result};

use crate::digest::{Digest, Hasher};
use crate::fold::{self, Folded, Map};
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
    /// The output, to be looked into here and there.
    pub fn view(self) -> Arc<dyn Source> {
        match self.map {
            Some(map) => Arc::new(Folded::new(map, self.source)),
            None => self.source,
        }
    }
}

/// How to produce.
pub struct How<'a> {
    /// The cache that the sources share.
    pub cache: &'a Cache,
    /// Threads that decode ahead.
    pub threads: usize,
    /// Whether to hash what comes out.
    pub validate: bool,
    /// Counts the bytes that came out.
    pub task: &'a Task,
}

/// Writes the artifact `name` to `out` and checks that it is `expected`. On an error `out` holds bytes that are not the
/// artifact: whoever calls makes sure that nobody takes them for it.
pub fn produce(name: &str, parts: &Parts, expected: &Blob, how: &How, out: &mut dyn Output) -> Result<()> {
    let found = output(parts, expected.size, how, how.validate, out);
    if let Some(found) = found.with_context(|| format!("artifact {name}"))? {
        store::matches(&format!("artifact {name}"), &found, expected)?;
    }
    Ok(())
}

/// Makes the output of `parts`, of `size` bytes, and gives what came out if it is to be validated.
fn output(
    parts: &Parts,
    size: u64,
    how: &How,
    validate: bool,
    out: &mut dyn Output,
) -> io::Result<Option<Blob>> {
    let mut uses = Vec::new();
    parts.source.trace(0, parts.source.len(), 0, &mut uses);
    how.cache.with_plan(uses, how.threads, || {
        std::thread::scope(|scope| -> io::Result<Option<Blob>> {
            let mut tee = Tee::new(scope, Some(how.task), validate, size, out);
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
        let inner = scope.spawn(move || output(parts, size, how, false, &mut PipeWriter(to)));
        let mut tee = Tee::new(scope, None, how.validate, published.expected.size, out);
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
    if let Some(found) = found.with_context(|| format!("artifact {name}"))? {
        store::matches(&format!("artifact {name}"), &found, &published.expected)?;
    }
    Ok(())
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

/// The thread that hashes: where pieces go, and what comes out.
type Hashing<'scope> = (SyncSender<Piece>, ScopedJoinHandle<'scope, (Digest, u64)>);

/// Writes to an output, and hashes on another thread.
struct Tee<'scope, 'a> {
    out: &'a mut dyn Output,
    task: Option<&'a Task>,
    pending: Vec<u8>,
    /// Bytes that may still come: a damaged or hostile recipe does not fill a disk.
    left: u64,
    hash: Option<Hashing<'scope>>,
}

impl<'scope, 'a> Tee<'scope, 'a> {
    fn new(
        scope: &'scope std::thread::Scope<'scope, '_>,
        task: Option<&'a Task>,
        validate: bool,
        size: u64,
        out: &'a mut dyn Output,
    ) -> Self {
        let hash = validate.then(|| {
            let (to, pieces) = sync_channel(BEHIND);
            let thread = scope.spawn(move || {
                let mut hasher = Hasher::new(io::sink());
                for piece in pieces {
                    // Writing to a hash cannot fail.
                    let _ = match piece {
                        Piece::Bytes(bytes) => hasher.write_all(&bytes),
                        Piece::Zeros(n) => hasher.zeros(n),
                    };
                }
                hasher.finish()
            });
            (to, thread)
        });
        Self { out, task, pending: Vec::with_capacity(CHUNK), left: size, hash }
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
            let full = std::mem::replace(&mut self.pending, Vec::with_capacity(CHUNK));
            self.send(Piece::Bytes(full))?;
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

    fn finish(mut self) -> io::Result<Option<Blob>> {
        self.flush_pending()?;
        self.out.flush()?;
        let Some((to, thread)) = self.hash.take() else { return Ok(None) };
        drop(to);
        let (sha256, size) = thread.join().map_err(|_| io::Error::other("the hashing thread panicked"))?;
        Ok(Some(Blob { sha256, size }))
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
