//! Fetches blobs, several at once, for a reader that takes them in order and need not wait for their ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::Descriptor;

use super::cache::{Cache, Entry};
use crate::digest::{Digest, Hasher, Mismatch};
use crate::io::scratch_file;
use crate::progress::{Progress, Task};
use crate::transport::Transport;

/// The size of the buffer of each fetch, in bytes.
const BUFFER: usize = 256 << 10;

/// A blob on its way.
#[derive(Default)]
struct Blob {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    file: Option<Arc<File>>,
    /// How much of the file may be read.
    available: u64,
    /// It is whole, or will never be.
    end: Option<Result<(), ()>>,
    /// It was not in the cache before.
    new: bool,
}

/// There is more of a blob than there is to be.
#[derive(Debug, thiserror::Error)]
#[error("more than {size} bytes, which the manifest says it has")]
struct TooMuch {
    size: u64,
}

impl Blob {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in there can be half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }
}

/// Blobs that are being fetched.
pub(super) struct Fetcher<'a> {
    pub(super) transport: &'a dyn Transport,
    pub(super) cache: Option<&'a Cache>,
    /// Where there is room for a file without a name.
    pub(super) scratch: &'a Path,
    pub(super) progress: &'a Progress,
    pub(super) cancelled: AtomicBool,
    /// What was in the cache was not right, and is not there any more.
    pub(super) damaged: AtomicBool,
    blobs: Vec<(Descriptor, Digest, Blob)>,
    next: AtomicUsize,
    /// What went wrong first.
    failed: Mutex<Option<anyhow::Error>>,
    /// How many blobs came from elsewhere.
    fetched: AtomicUsize,
}

impl<'a> Fetcher<'a> {
    pub(super) fn new(
        transport: &'a dyn Transport,
        cache: Option<&'a Cache>,
        scratch: &'a Path,
        progress: &'a Progress,
        blobs: &[Descriptor],
    ) -> Result<Self> {
        let blobs = blobs.iter().map(|blob| {
            let digest = blob.digest().to_string().parse().context("layer")?;
            Ok((blob.clone(), digest, Blob::default()))
        });
        Ok(Self {
            transport,
            cache,
            scratch,
            progress,
            cancelled: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            blobs: blobs.collect::<Result<_>>()?,
            next: AtomicUsize::new(0),
            failed: Mutex::new(None),
            fetched: AtomicUsize::new(0),
        })
    }

    /// Fetches one blob after the other until there are none left. To be run by several threads.
    pub(super) fn run(&self) {
        while let Some((descriptor, digest, blob)) = self.blobs.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            let result = match self.cancelled.load(Ordering::Relaxed) {
                true => Err(anyhow::anyhow!("given up")),
                false => self.fetch(descriptor, *digest, blob),
            };
            let end = result.map_err(|e| {
                self.cancelled.store(true, Ordering::Relaxed);
                let e = e.context(format!("layer {}", digest.oci()));
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            });
            blob.change(|state| state.end = Some(end));
        }
    }

    /// Removes from the cache what was not there before.
    pub(super) fn forget(&self) -> Result<()> {
        let Some(cache) = self.cache else { return Ok(()) };
        for (_, digest, blob) in &self.blobs {
            let state = blob.state();
            if let Some(file) = state.file.as_ref().filter(|_| state.new) {
                cache.abandon(*digest, file)?;
                cache.discard(*digest, file)?;
            }
        }
        Ok(())
    }

    /// What went wrong, and how many blobs have been fetched.
    pub(super) fn finish(self) -> (Option<anyhow::Error>, usize) {
        let failed = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        (failed, self.fetched.into_inner())
    }

    /// Reads a blob, by its place in the list, as far as it has come.
    pub(super) fn reader(&self, index: usize) -> impl Read + Send {
        Reader { blob: &self.blobs[index].2, pos: 0 }
    }

    fn fetch(&self, descriptor: &Descriptor, digest: Digest, blob: &Blob) -> Result<()> {
        let Some(cache) = self.cache else {
            let file = Arc::new(scratch_file(self.scratch)?);
            return self.download(descriptor, digest, blob, &file);
        };
        match cache.entry(digest, &self.cancelled)? {
            Entry::Whole(file) => {
                let (file, size) = (Arc::new(file), descriptor.size());
                let right = if file.metadata()?.len() == size {
                    // It is checked while it is unpacked.
                    blob.change(|state| (state.file, state.available) = (Some(Arc::clone(&file)), size));
                    let mut all = Hasher::new(io::sink());
                    io::copy(&mut ReadAt { file: &file, pos: 0, end: size }, &mut all).context("cache")?;
                    all.finish() == (digest, size)
                } else {
                    false
                };
                if !right {
                    tracing::warn!("layer {}: damaged in the cache: fetching it again", digest.oci());
                    cache.discard(digest, &file)?;
                    self.damaged.store(true, Ordering::Relaxed);
                    bail!("damaged in the cache");
                }
                Ok(())
            }
            Entry::Partial(file) => {
                let file = Arc::new(file);
                blob.change(|state| state.new = true);
                if let Err(e) = self.download(descriptor, digest, blob, &file) {
                    let wrong = e.is::<Mismatch>() || e.is::<TooMuch>();
                    if wrong || file.metadata()?.len() == 0 {
                        // Nothing to go on with.
                        cache.abandon(digest, &file)?;
                    }
                    return Err(e);
                }
                cache.keep(digest, &file)
            }
        }
    }

    /// Fetches what `file` lacks of a blob.
    fn download(&self, descriptor: &Descriptor, digest: Digest, blob: &Blob, file: &Arc<File>) -> Result<()> {
        let size = descriptor.size();
        let task = self.progress.task(format!("layer {:.12}", digest.to_string()), Some(size));
        self.fetched.fetch_add(1, Ordering::Relaxed);
        let have = file.metadata()?.len();
        if have > 0 && have <= size {
            // It may be wrong, and is shown to nobody before it has been found right.
            if self.transfer(descriptor, file, have, &task, |_| {})? == digest {
                blob.change(|state| (state.file, state.available) = (Some(Arc::clone(file)), size));
                task.finish();
                return Ok(());
            }
            tracing::warn!("layer {}: not what an earlier run began: starting over", digest.oci());
        }
        file.set_len(0)?;
        blob.change(|state| state.file = Some(Arc::clone(file)));
        let found = self.transfer(descriptor, file, 0, &task, |available| {
            blob.change(|state| state.available = available);
        })?;
        found.must_be(digest)?;
        task.finish();
        Ok(())
    }

    /// Appends what comes from `have` on, and gives the digest of all.
    fn transfer(
        &self,
        descriptor: &Descriptor,
        file: &File,
        have: u64,
        task: &Task,
        available: impl Fn(u64),
    ) -> Result<Digest> {
        let mut hasher = Hasher::new(io::sink());
        io::copy(&mut ReadAt { file, pos: 0, end: have }, &mut hasher)?;
        task.restart(have);
        let mut pos = have;
        let mut content = self
            .transport
            .part(descriptor, have, descriptor.size() - have)?
            .take(descriptor.size() - have + 1);
        let mut buffer = vec![0; BUFFER];
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                bail!("given up");
            }
            let n = match content.read(&mut buffer) {
                Ok(0) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                n => n?,
            };
            ensure!(pos + n as u64 <= descriptor.size(), TooMuch { size: descriptor.size() });
            file.write_all_at(&buffer[..n], pos).context("write failed")?;
            pos += n as u64;
            available(pos);
            hasher.write_all(&buffer[..n])?;
            task.advance(n as u64);
        }
        ensure!(pos == descriptor.size(), "expected {} bytes, got {pos}", descriptor.size());
        Ok(hasher.finish().0)
    }
}

/// Reads a part of a file.
struct ReadAt<'a> {
    file: &'a File,
    pos: u64,
    end: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.end - self.pos).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..len], self.pos)?;
        self.pos += n as u64;
        Ok(n)
    }
}

/// Reads a blob that may still be growing.
struct Reader<'a> {
    blob: &'a Blob,
    pos: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.blob.state();
        let (file, available) = loop {
            if let Some(Err(())) = state.end {
                return Err(io::Error::other("the layer could not be fetched"));
            }
            match &state.file {
                Some(file) if state.available > self.pos => break (Arc::clone(file), state.available),
                _ if state.end.is_some() => return Ok(0),
                _ => state = self.blob.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(state);
        let len = buf.len().min(usize::try_from(available - self.pos).unwrap_or(usize::MAX));
        let n = file.read_at(&mut buf[..len], self.pos)?;
        if n == 0 {
            // Somebody has truncated it.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pos += n as u64;
        Ok(n)
    }
}
