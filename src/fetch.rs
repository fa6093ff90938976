//! Getting files that count only once they have been checked: what `build download` and `mirror` have in common.
//!
//! A file is got under a temporary name, which a later run goes on with. It has its final name only when it has been
//! found right, its signature before it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::HumanBytes;
use rayon::prelude::*;

use crate::catalog::{ETAG, PARTIAL, SIGNATURE};
use crate::http::Http;
use crate::progress::Task;

/// The most downloads at once: more only makes a server angry.
pub const MAX_PARALLEL: usize = 64;

/// A file that is being got.
pub struct Partial {
    /// What has been got so far.
    pub file: PathBuf,
    /// What the server calls the version of which that is a part.
    pub etag: PathBuf,
}

impl Partial {
    /// What will be `path` in the end, beside it. The directory must be there.
    pub fn of(path: &Path) -> Self {
        Self { file: beside(path, PARTIAL), etag: beside(path, ETAG) }
    }

    /// How many bytes are there.
    pub fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.len())
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Removes what is there.
    pub fn remove(&self) -> Result<()> {
        remove(&self.file)?;
        remove(&self.etag)
    }

    /// Gets `url`, going on with what is there. What does not pass `check` is removed, and when an earlier run had
    /// begun it, got once more from its start.
    pub fn get(
        &self,
        http: &Http,
        url: &str,
        task: &Task,
        check: impl Fn(&Path) -> Result<()>,
    ) -> Result<()> {
        loop {
            let resumed = http.get_file(url, &self.file, &self.etag, task)?;
            // It goes to the disk while it is checked: one waits for the disk, the other for the processor.
            let (checked, synced) = std::thread::scope(|scope| {
                let sync = scope.spawn(|| sync(&self.file));
                (check(&self.file), sync.join())
            });
            synced.unwrap_or_else(|_| Err(anyhow::anyhow!("sync failed")))?;
            let Err(e) = checked else { return Ok(()) };
            self.remove()?;
            if !resumed {
                return Err(e);
            }
            tracing::warn!("{url}: not what an earlier run began: starting over: {e:#}");
        }
    }

    /// Gives the file its final name, `path`, and keeps its signature beside it. The signature comes first: whoever
    /// sees the file sees what vouches for it, too.
    pub fn publish(&self, path: &Path, signature: Option<&[u8]>) -> Result<()> {
        if let Some(signature) = signature {
            write_through(&beside(&self.file, SIGNATURE), &beside(path, SIGNATURE), signature)?;
        }
        // What an earlier run got may not have reached the disk.
        sync(&self.file)?;
        std::fs::rename(&self.file, path).context("rename failed")?;
        remove(&self.etag)?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))
    }
}

/// Writes `path` by way of `temporary`, so that it is there either as it was or whole.
///
/// Unlike [`crate::staging::write_file`], this never shows a temporary name beside `path`.
pub fn write_through(temporary: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(temporary, path)
    };
    write().with_context(|| format!("{}: write failed", path.display()))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// `path` with `suffix` added to its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_path_buf().into_os_string();
    name.push(suffix);
    name.into()
}

/// Checks that there is room in `dir` for `count` files of `needed` bytes.
pub fn check_space(dir: &Path, needed: u64, count: usize, what: &str) -> Result<()> {
    let stat = rustix::fs::statvfs(dir).with_context(|| format!("{}: statvfs failed", dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    ensure!(
        needed <= free,
        "{}: not enough space: {} needed for {count} {what}, {} free",
        dir.display(),
        HumanBytes(needed),
        HumanBytes(free)
    );
    Ok(())
}

/// What `f` makes of each item, in the order of the items, several at once.
pub fn each<T: Send + Sync + Copy, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<(T, R)> {
    // One at a time for each thread: the items take seconds to minutes.
    items.into_par_iter().with_max_len(1).map(|item| (item, f(item))).collect()
}

/// A pool in which [`each`] has so many threads.
pub fn pool(parallel: usize) -> Result<rayon::ThreadPool> {
    Ok(rayon::ThreadPoolBuilder::new().num_threads(parallel.clamp(1, MAX_PARALLEL)).build()?)
}

/// Removes a file that need not be there.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("{}: remove failed", path.display()))
        }
        _ => Ok(()),
    }
}

/// Waits until the file is on the disk.
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).context("sync failed")
}

/// Makes what was renamed in `dir` last through a crash.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("{}: sync failed", dir.display()))
}
