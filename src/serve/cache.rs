//! Files that took work to make, on disk within a bound: published files, and live media that whole fleets ask for.
//!
//! However many ask, a file is made once. It has no name, so that nobody else can change it and nothing is left of it
//! when the process ends; who asked for all of it reads behind the one who writes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::sync::watch;

use super::mapped::Mapped;
use super::metrics::Metrics;
use crate::digest::Digest;
use crate::io::{SparseWriter, scratch_file};
use crate::sink::Output;

/// How far a file is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stage {
    /// Bytes that can be read.
    pub written: u64,
    /// Whether it is whole and checked, or never will be.
    pub end: Option<bool>,
}

/// A file that is made, or being made.
pub struct Made {
    /// Its name, for people.
    pub name: String,
    /// Its length when it is whole.
    pub size: u64,
    /// Its bytes.
    pub file: File,
    stage: watch::Sender<Stage>,
    mapped: OnceLock<Option<Arc<Mapped>>>,
}

impl Made {
    /// How far it is, now and from now on.
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Its bytes to be sent by the kernel, once it is whole.
    pub fn mapped(&self) -> Option<&Arc<Mapped>> {
        let whole = self.stage.borrow().end == Some(true) && self.size > 0;
        let map = || self.file.try_clone().and_then(Mapped::new).ok();
        whole.then(|| self.mapped.get_or_init(map).as_ref()).flatten()
    }
}

/// Why a file cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{size} bytes: the cache of {limit} has no room for them now")]
pub struct NoRoom {
    size: u64,
    limit: u64,
}

struct Kept {
    made: Arc<Made>,
    /// When it was last asked for, by [`State::clock`].
    used: u64,
}

#[derive(Default)]
struct State {
    files: HashMap<Digest, Kept>,
    /// Bytes of all files when they are whole, and of what else was reserved.
    held: u64,
    clock: u64,
    running: usize,
}

/// The files.
pub struct Cache {
    dir: PathBuf,
    limit: u64,
    /// How many files are made at a time.
    jobs: usize,
    state: Mutex<State>,
    /// A job ended.
    ended: Condvar,
    metrics: Arc<Metrics>,
}

impl Cache {
    /// Keeps at most `limit` bytes in `dir`, and makes `jobs` files at a time.
    pub fn new(dir: PathBuf, limit: u64, jobs: usize, metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        scratch_file(&dir).with_context(|| format!("cannot write into {}", dir.display()))?;
        let (state, ended) = (Mutex::default(), Condvar::new());
        Ok(Arc::new(Self { dir, limit, jobs: jobs.max(1), state, ended, metrics }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes held, and how many may be.
    pub fn held(&self) -> (u64, u64) {
        (self.state().held, self.limit)
    }

    /// What is being made: its name, how much there is of it, its length.
    pub fn making(&self) -> Vec<(String, u64, u64)> {
        let state = self.state();
        let running = state.files.values().filter_map(|kept| {
            let stage = *kept.made.stage.borrow();
            stage.end.is_none().then(|| (kept.made.name.clone(), stage.written, kept.made.size))
        });
        let mut running: Vec<_> = running.collect();
        running.sort();
        running
    }

    /// Takes `size` bytes of the cache for good.
    pub fn reserve(&self, size: u64) -> Result<(), NoRoom> {
        self.room(&mut self.state(), size)
    }

    /// Removes what was not asked for longest until there is room for `size` bytes, and takes them. What is being read or
    /// made stays: its space would not become free.
    fn room(&self, state: &mut State, size: u64) -> Result<(), NoRoom> {
        let no_room = NoRoom { size, limit: self.limit };
        if size > self.limit {
            return Err(no_room);
        }
        while state.held + size > self.limit {
            let unused = state.files.iter().filter(|(_, kept)| Arc::strong_count(&kept.made) == 1);
            let Some(oldest) = unused.min_by_key(|(_, kept)| kept.used).map(|(digest, _)| *digest) else {
                return Err(no_room);
            };
            if let Some(kept) = state.files.remove(&oldest) {
                state.held -= kept.made.size;
                self.metrics.evictions.add(1);
            }
        }
        state.held += size;
        Ok(())
    }

    /// The file with this digest: the one that is there, or one that `make` writes from now on, on a thread of its own.
    /// What it writes is checked by it.
    pub fn get(
        self: &Arc<Self>,
        digest: Digest,
        name: &str,
        size: u64,
        make: impl FnOnce(&mut dyn Output) -> Result<()> + Send + 'static,
    ) -> Result<Arc<Made>> {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        if let Some(kept) = state.files.get_mut(&digest) {
            kept.used = now;
            self.metrics.hits.add(1);
            return Ok(kept.made.clone());
        }
        self.metrics.misses.add(1);
        let file = scratch_file(&self.dir).with_context(|| self.dir.display().to_string())?;
        let out = file.try_clone()?;
        // Who reads behind the writer reads holes, too, before there is anything after them.
        file.set_len(size).with_context(|| self.dir.display().to_string())?;
        self.room(&mut state, size)?;
        let stage = watch::Sender::new(Stage::default());
        let made = Arc::new(Made { name: name.to_owned(), size, file, stage, mapped: OnceLock::new() });
        state.files.insert(digest, Kept { made: made.clone(), used: now });
        drop(state);
        let job = Job { cache: self.clone(), made: made.clone(), digest, good: false, started: None };
        std::thread::Builder::new().name("make".into()).spawn(move || job.run(out, make))?;
        Ok(made)
    }
}

/// Makes one file. Whatever happens, who waits for it gets to know.
struct Job {
    cache: Arc<Cache>,
    made: Arc<Made>,
    digest: Digest,
    good: bool,
    started: Option<Instant>,
}

impl Job {
    fn run(mut self, file: File, make: impl FnOnce(&mut dyn Output) -> Result<()>) {
        let mut state = self.cache.state();
        while state.running >= self.cache.jobs {
            state = self.cache.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.running += 1;
        drop(state);
        self.started = Some(Instant::now());
        let mut out = Follower { out: SparseWriter::new(file), written: 0, stage: &self.made.stage };
        match make(&mut out).and_then(|()| Ok(out.out.finish()?)) {
            Ok(_) => self.good = true,
            Err(e) => tracing::error!("{}: {e:#}", self.made.name),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let metrics = &self.cache.metrics;
        let mut state = self.cache.state();
        if let Some(started) = self.started {
            state.running -= 1;
            metrics.rehydration_millis.add(started.elapsed().as_millis() as u64);
        }
        if !self.good {
            // Whoever asks next tries again.
            state.files.remove(&self.digest);
            state.held -= self.made.size;
        }
        drop(state);
        let done = if self.good { &metrics.rehydrations } else { &metrics.failed_rehydrations };
        done.add(1);
        self.made.stage.send_modify(|stage| stage.end = Some(self.good));
        self.cache.ended.notify_all();
    }
}

/// Writes a file and tells readers how far it is.
struct Follower<'a> {
    out: SparseWriter,
    written: u64,
    stage: &'a watch::Sender<Stage>,
}

impl Follower<'_> {
    fn advance(&mut self, n: u64) {
        self.written += n;
        self.stage.send_modify(|stage| stage.written = self.written);
    }
}

impl Write for Follower<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.advance(n as u64);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Follower<'_> {
    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.out.skip(len);
        self.advance(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_hole_can_be_read_while_the_rest_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_owned(), 1 << 20, 1, Arc::default()).unwrap();
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let made = cache.get(Digest::of(b""), "x", 5007, move |out| {
            out.zeros(5000)?;
            wait.recv()?;
            Ok(out.write_all(b"the end")?)
        });
        let made = made.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut stage = made.stage();
        runtime.block_on(stage.wait_for(|stage| stage.written == 5000)).unwrap();
        let mut bytes = [1; 5000];
        made.file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == [0; 5000] && made.mapped().is_none());
        go_on.send(()).unwrap();
        runtime.block_on(stage.wait_for(|stage| stage.end == Some(true))).unwrap();
        assert_eq!(&made.mapped().unwrap().slice(4999..5007)[..], b"\0the end");
    }
}
