//! Files that took work to make, on disk within a bound: published files, and live media that whole fleets ask for.
//!
//! However many ask, a file is made once. It has no name, so that nobody else can change it and nothing is left of it
//! when the process ends; who asked for all of it reads behind the one who writes. When nobody waits for a file any more,
//! making it stops.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;

use super::mapped::Mapped;
use super::metrics::Metrics;
use super::pool::Busy;
use crate::digest::Digest;
use crate::io::{SparseWriter, scratch_file};
use crate::sink::Output;

/// How long a file is made on when nobody waits for it: a client whose connection broke comes back by then.
const GRACE: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 3000 });

/// How far a file is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stage {
    /// Whether its turn to be made has come.
    pub begun: bool,
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
    /// How many want it.
    wanted: watch::Sender<usize>,
    /// Nobody wanted it any more.
    cancelled: AtomicBool,
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

/// A file that somebody wants: it is made while there is one of these.
pub struct Wanted(Arc<Made>);

impl Wanted {
    fn new(made: Arc<Made>) -> Self {
        made.wanted.send_modify(|n| *n += 1);
        Self(made)
    }

    /// Waits until its turn to be made has come, but no longer than `patience`.
    pub async fn begun(&self, patience: Duration) -> Result<()> {
        let mut stage = self.stage();
        let begun = stage.wait_for(|stage| stage.begun || stage.end.is_some());
        let stage = *timeout(patience, begun).await.map_err(|_| Busy(patience))??;
        ensure!(stage.end != Some(false), "{}: it could not be made", self.name);
        Ok(())
    }
}

impl Clone for Wanted {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Deref for Wanted {
    type Target = Made;

    fn deref(&self) -> &Made {
        &self.0
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.wanted.send_modify(|n| *n -= 1);
    }
}

/// Bytes of the cache that are taken until this is dropped.
#[must_use]
pub struct Room {
    held: Arc<AtomicU64>,
    size: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.held.fetch_sub(self.size, Ordering::Relaxed);
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
    /// What it takes of the cache.
    _room: Room,
    /// When it was last asked for, by [`State::clock`].
    used: u64,
}

#[derive(Default)]
struct State {
    files: HashMap<Digest, Kept>,
    clock: u64,
}

/// The files.
pub struct Cache {
    dir: PathBuf,
    limit: u64,
    /// As many as are made at a time.
    jobs: Arc<Semaphore>,
    state: Mutex<State>,
    /// Bytes of all files when they are whole, and of what else was reserved. Grows only while `state` is locked.
    held: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
}

impl Cache {
    /// Keeps at most `limit` bytes in `dir`, and makes `jobs` files at a time.
    pub fn new(dir: PathBuf, limit: u64, jobs: usize, metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        scratch_file(&dir).with_context(|| format!("cannot write into {}", dir.display()))?;
        let jobs = Arc::new(Semaphore::new(jobs.max(1)));
        Ok(Arc::new(Self { dir, limit, jobs, state: Mutex::default(), held: Arc::default(), metrics }))
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
        (self.held.load(Ordering::Relaxed), self.limit)
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

    /// Takes `size` bytes of the cache.
    pub fn reserve(&self, size: u64) -> Result<Room, NoRoom> {
        self.room(&mut self.state(), size)
    }

    /// Removes what was not asked for longest until there is room for `size` bytes, and takes them. What is being read or
    /// made stays: its space would not become free.
    fn room(&self, state: &mut State, size: u64) -> Result<Room, NoRoom> {
        let no_room = NoRoom { size, limit: self.limit };
        if size > self.limit {
            return Err(no_room);
        }
        while self.held.load(Ordering::Relaxed) > self.limit - size {
            let unused = state.files.iter().filter(|(_, kept)| Arc::strong_count(&kept.made) == 1);
            let Some(oldest) = unused.min_by_key(|(_, kept)| kept.used).map(|(digest, _)| *digest) else {
                return Err(no_room);
            };
            state.files.remove(&oldest);
            self.metrics.evictions.add(1);
        }
        self.held.fetch_add(size, Ordering::Relaxed);
        Ok(Room { held: self.held.clone(), size })
    }

    /// The file with this digest: the one that is there, or one that `make` writes on a thread of its own, when `prepare`
    /// is done and it is its turn. What `make` writes is checked by it.
    pub fn get(
        self: &Arc<Self>,
        digest: Digest,
        name: &str,
        size: u64,
        prepare: impl Future<Output = Result<()>> + Send + 'static,
        make: impl FnOnce(&mut dyn Output) -> Result<()> + Send + 'static,
    ) -> Result<Wanted> {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        if let Some(kept) = state.files.get_mut(&digest) {
            kept.used = now;
            self.metrics.hits.add(1);
            return Ok(Wanted::new(kept.made.clone()));
        }
        self.metrics.misses.add(1);
        let file = scratch_file(&self.dir).with_context(|| self.dir.display().to_string())?;
        let out = file.try_clone()?;
        // Who reads behind the writer reads holes, too, before there is anything after them.
        file.set_len(size).with_context(|| self.dir.display().to_string())?;
        let room = self.room(&mut state, size)?;
        let (stage, wanted) = (watch::Sender::default(), watch::Sender::default());
        let (cancelled, mapped) = (AtomicBool::new(false), OnceLock::new());
        let made = Arc::new(Made { name: name.to_owned(), size, file, stage, wanted, cancelled, mapped });
        let wanted = Wanted::new(made.clone());
        state.files.insert(digest, Kept { made: made.clone(), _room: room, used: now });
        drop(state);
        let job = Job { cache: self.clone(), made, digest, good: false, started: None };
        tokio::spawn(job.run(out, prepare, make));
        Ok(wanted)
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
    async fn run(
        mut self,
        file: File,
        prepare: impl Future<Output = Result<()>>,
        make: impl FnOnce(&mut dyn Output) -> Result<()> + Send + 'static,
    ) {
        let (cache, made, digest) = (self.cache.clone(), self.made.clone(), self.digest);
        let abandoned = abandoned(&cache, &made, digest);
        tokio::pin!(abandoned);
        let turn = async {
            let turn = cache.jobs.clone().acquire_owned().await?;
            made.stage.send_modify(|stage| stage.begun = true);
            prepare.await?;
            anyhow::Ok(turn)
        };
        let turn = tokio::select! {
            turn = turn => turn,
            () = &mut abandoned => return,
        };
        let turn = match turn {
            Ok(turn) => turn,
            Err(e) => return tracing::error!("{}: {e:#}", made.name),
        };
        self.started = Some(Instant::now());
        let (done, mut is_done) = oneshot::channel();
        let work = move || {
            let mut out = Follower { out: SparseWriter::new(file), written: 0, made: &self.made };
            match make(&mut out).and_then(|()| Ok(out.out.finish()?)) {
                Ok(_) => self.good = true,
                Err(e) => tracing::error!("{}: {e:#}", self.made.name),
            }
            drop(self);
            let _ = (turn, done.send(()));
        };
        if let Err(e) = std::thread::Builder::new().name("make".into()).spawn(work) {
            return tracing::error!("{}: {e}", made.name);
        }
        tokio::select! {
            _ = &mut is_done => {}
            // The thread finds out when it writes.
            () = abandoned => {}
        }
    }
}

/// Returns when nobody has wanted a file for a while. Nobody can get it then: who asks for it next has it made.
async fn abandoned(cache: &Cache, made: &Made, digest: Digest) {
    let mut wanted = made.wanted.subscribe();
    loop {
        // The file itself keeps the sender.
        let _ = wanted.wait_for(|n| *n == 0).await;
        if timeout(GRACE, wanted.wait_for(|n| *n > 0)).await.is_ok() {
            continue;
        }
        let mut state = cache.state();
        // Under the lock: nobody begins to want it meanwhile.
        if *made.wanted.borrow() == 0 {
            made.cancelled.store(true, Ordering::Relaxed);
            if made.stage.borrow().end.is_none() {
                state.files.remove(&digest);
            }
            return;
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let metrics = &self.cache.metrics;
        if let Some(started) = self.started {
            metrics.rehydration_millis.add(started.elapsed().as_millis() as u64);
        }
        {
            let mut state = self.cache.state();
            let own = state.files.get(&self.digest).is_some_and(|kept| Arc::ptr_eq(&kept.made, &self.made));
            if !self.good && own {
                // Whoever asks next tries again.
                state.files.remove(&self.digest);
            }
            // Under the lock, as `abandoned` looks at it.
            self.made.stage.send_modify(|stage| stage.end = Some(self.good));
        }
        let done = match (self.good, self.made.cancelled.load(Ordering::Relaxed)) {
            (true, _) => &metrics.rehydrations,
            (false, true) => &metrics.cancelled_rehydrations,
            (false, false) => &metrics.failed_rehydrations,
        };
        done.add(1);
    }
}

/// Writes a file and tells readers how far it is.
struct Follower<'a> {
    out: SparseWriter,
    written: u64,
    made: &'a Made,
}

impl Follower<'_> {
    fn advance(&mut self, n: u64) -> io::Result<()> {
        if self.made.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("cancelled: nobody waits for it any more"));
        }
        self.written += n;
        self.made.stage.send_modify(|stage| stage.written = self.written);
        Ok(())
    }
}

impl Write for Follower<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.advance(n as u64)?;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Follower<'_> {
    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.out.skip(len);
        self.advance(len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    async fn ready() -> Result<()> {
        Ok(())
    }

    fn cache(dir: &Path, jobs: usize) -> Arc<Cache> {
        Cache::new(dir.to_owned(), 1 << 20, jobs, Arc::default()).unwrap()
    }

    async fn end(wanted: &Wanted) -> bool {
        wanted.stage().wait_for(|stage| stage.end.is_some()).await.unwrap().end.unwrap()
    }

    #[tokio::test]
    async fn a_hole_can_be_read_while_the_rest_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1);
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let made = cache.get(Digest::of(b""), "x", 5007, ready(), move |out| {
            out.zeros(5000)?;
            wait.recv()?;
            Ok(out.write_all(b"the end")?)
        });
        let made = made.unwrap();
        made.stage().wait_for(|stage| stage.written == 5000).await.unwrap();
        let mut bytes = [1; 5000];
        made.file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == [0; 5000] && made.mapped().is_none());
        go_on.send(()).unwrap();
        assert!(end(&made).await);
        assert_eq!(&made.mapped().unwrap().slice(4999..5007)[..], b"\0the end");
    }

    #[tokio::test]
    async fn what_fails_gives_its_room_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 2);
        for i in 0..20_u8 {
            let half = 1 << 19;
            let room = cache.reserve(half).unwrap();
            assert!(cache.reserve(half + 1).is_err());
            drop(room);
            let make = |out: &mut dyn Output| {
                out.write_all(b"a beginning")?;
                anyhow::bail!("no space left on device")
            };
            let made = cache.get(Digest::of(&[i]), "x", 1 << 20, ready(), make).unwrap();
            assert!(!end(&made).await);
            let unprepared = async { anyhow::bail!("no base") };
            let made = cache.get(Digest::of(&[i]), "x", 1 << 20, unprepared, |_| Ok(())).unwrap();
            assert!(!end(&made).await);
        }
        assert_eq!(cache.held(), (0, 1 << 20));
        let _all = cache.reserve(1 << 20).unwrap();
        assert!(cache.reserve(1).is_err() && cache.reserve(u64::MAX).is_err());
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1);
        let endless = |out: &mut dyn Output| -> Result<()> {
            loop {
                out.write_all(b"more")?;
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let first = cache.get(Digest::of(b"1"), "x", 1 << 10, ready(), endless).unwrap();
        first.begun(GRACE).await.unwrap();
        // Its turn does not come while the first is made.
        let second = cache.get(Digest::of(b"2"), "y", 1 << 10, ready(), |_| Ok(())).unwrap();
        let refused = second.begun(GRACE).await.unwrap_err();
        assert!(refused.downcast_ref::<Busy>().is_some(), "{refused}");
        let (waiting, mut stage) = (second.clone(), first.stage());
        drop((first, second));
        assert_eq!(stage.wait_for(|stage| stage.end.is_some()).await.unwrap().end, Some(false));
        // The second has somebody who waits, and is made then.
        assert!(end(&waiting).await);
        assert_eq!(cache.held().0, 1 << 10);
        assert_eq!(cache.metrics.cancelled_rehydrations.get(), 1);
    }
}
