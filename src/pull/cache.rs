//! The cache of layers: blobs by digest, shared by all processes of a user.
//!
//! ```text
//! sha256/HEX           a blob, whole when it got its name
//! sha256/HEX.partial   one that is being fetched, or of which a fetch that was killed left a part
//! ```
//!
//! There is no lock of the whole cache. A file is locked with `flock` by those who use it: shared while it is read,
//! exclusive while it is written or removed. The kernel ends the locks of a process that is killed. Since a file may be
//! renamed or removed between opening and locking it, whoever has locked it looks whether it still has its name.
//!
//! A blob is checked against its digest each time before it is used: what has been damaged is fetched again.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, futimens};
use rustix::io::Errno;

use crate::digest::Digest;

/// The variable that names the cache.
pub const VARIABLE: &str = "REHYDRATOR_CACHE";

/// What stands for no cache at all.
pub const NONE: &str = "no";

/// Where root's cache is.
const SYSTEM: &str = "/var/cache/rehydrator";

/// Where in the cache blobs are.
const BLOBS: &str = "sha256";

/// What the name of a blob that is not whole ends with.
const PARTIAL: &str = ".partial";

/// Time between two attempts to get a lock that another process has. Not one that waits: it could not be given up.
const LOCK_EVERY: Duration = Duration::from_millis(50);

/// A cache.
#[derive(Clone, Debug)]
pub struct Cache {
    blobs: PathBuf,
}

/// A file of the cache, locked as long as this lives.
pub(super) enum Entry {
    /// It is there; whether it is right has not been looked at.
    Whole(File),
    /// It is not there, and nobody else fetches it.
    Partial(File),
}

/// What `purge` has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Blobs that were removed.
    pub removed: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs that are still there.
    pub kept: u64,
    /// How many of them because they are in use.
    pub in_use: u64,
}

/// Where the cache is unless told otherwise: root's is of the system, that of others in their home.
pub fn default_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(SYSTEM.into());
    }
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    Some(cache?.join("rehydrator"))
}

impl Cache {
    /// The cache in `dir`, which is made when it is not there. Layers may be secret: it is for its owner alone.
    pub fn open(dir: &Path) -> Result<Self> {
        let blobs = dir.join(BLOBS);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&blobs);
        made.with_context(|| format!("cache {}", dir.display()))?;
        Ok(Self { blobs })
    }

    fn whole(&self, digest: Digest) -> PathBuf {
        self.blobs.join(digest.to_string())
    }

    fn partial(&self, digest: Digest) -> PathBuf {
        self.blobs.join(format!("{digest}{PARTIAL}"))
    }

    /// Keeps a blob from being purged, if it is there.
    pub(super) fn hold(&self, digest: Digest) -> Option<File> {
        let file = File::open(self.whole(digest)).ok()?;
        flock(&file, FlockOperation::NonBlockingLockShared).ok()?;
        Some(file)
    }

    /// The blob, or the file that it is to be fetched into. Waits for another process that is fetching it, until
    /// `cancelled`.
    pub(super) fn entry(&self, digest: Digest, cancelled: &AtomicBool) -> Result<Entry> {
        let (whole, partial) = (self.whole(digest), self.partial(digest));
        loop {
            match File::open(&whole) {
                Ok(file) => {
                    if lock(&file, &whole, FlockOperation::NonBlockingLockShared, cancelled)? {
                        // The time of its last use, by which purge goes.
                        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
                        let _ = futimens(&file, &Timestamps { last_access: now, last_modification: now });
                        return Ok(Entry::Whole(file));
                    }
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| whole.display().to_string()),
            }
            let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
            let file = file.with_context(|| partial.display().to_string())?;
            if lock(&file, &partial, FlockOperation::NonBlockingLockExclusive, cancelled)? {
                // Another may have fetched it between the two looks.
                if whole.exists() {
                    fs::remove_file(&partial).with_context(|| partial.display().to_string())?;
                    continue;
                }
                return Ok(Entry::Partial(file));
            }
        }
    }

    /// Removes a blob that has been found damaged.
    pub(super) fn discard(&self, digest: Digest, file: &File) -> Result<()> {
        let path = self.whole(digest);
        if has_name(file, &path)? {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// Removes what has been fetched of a blob, whose file `entry` gave.
    pub(super) fn abandon(&self, digest: Digest, file: &File) -> Result<()> {
        let path = self.partial(digest);
        if has_name(file, &path)? {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// Gives a blob that is whole and right its name. It stays locked, but for others to read. What a crash of the machine
    /// makes of it is found when it is used, so that nobody has to wait for the disk.
    pub(super) fn keep(&self, digest: Digest, file: &File) -> Result<()> {
        let partial = self.partial(digest);
        fs::rename(&partial, self.whole(digest)).with_context(|| partial.display().to_string())?;
        Ok(flock(file, FlockOperation::LockShared)?)
    }

    /// Removes blobs that nobody uses: those that were last used longer ago than `older_than`, and as many of the others,
    /// the oldest first, as are more than `keep` bytes together; all if neither is given.
    pub fn purge(&self, older_than: Option<Duration>, keep: Option<u64>) -> Result<Purged> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.blobs).with_context(|| self.blobs.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // Whatever else is there is not ours.
            if name.strip_suffix(PARTIAL).unwrap_or(&name).parse::<Digest>().is_err() {
                continue;
            }
            match path.metadata() {
                Ok(found) => files.push((found.modified()?, found.len(), path)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| path.display().to_string()),
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        let limit = older_than.and_then(|age| SystemTime::now().checked_sub(age));
        let mut purged = Purged::default();
        for (used, len, path) in files {
            let old = older_than.is_some() && limit.is_some_and(|limit| used < limit);
            let much = keep.is_some_and(|keep| total > keep);
            if !(old || much || (older_than, keep) == (None, None)) {
                purged.kept += 1;
                continue;
            }
            if remove_unused(&path)? {
                total -= len;
                purged.removed += 1;
                purged.bytes += len;
            } else {
                purged.kept += 1;
                purged.in_use += 1;
            }
        }
        Ok(purged)
    }
}

/// Removes a file unless somebody uses it.
fn remove_unused(path: &Path) -> Result<bool> {
    let context = || path.display().to_string();
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file.with_context(context)?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(false),
        locked => locked.with_context(context)?,
    }
    // Another file has the name by now: it is new, and somebody uses it.
    if !has_name(&file, path)? {
        return Ok(false);
    }
    fs::remove_file(path).with_context(context)?;
    Ok(true)
}

/// Locks a file; false when it has another name by then, or none.
fn lock(file: &File, path: &Path, how: FlockOperation, cancelled: &AtomicBool) -> Result<bool> {
    loop {
        match flock(file, how) {
            Ok(()) => return has_name(file, path),
            // What was fetched while this waited has got its final name, and is read until who fetched it has done
            // with all of its image, which may well be waiting for this process.
            Err(Errno::WOULDBLOCK) if !has_name(file, path)? => return Ok(false),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_EVERY),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e).with_context(|| format!("{}: lock failed", path.display())),
        }
        if cancelled.load(Ordering::Relaxed) {
            bail!("given up");
        }
    }
}

/// Whether `path` is a name of the open `file`.
fn has_name(file: &File, path: &Path) -> Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn put(cache: &Cache, content: &[u8]) -> (Digest, File) {
        let digest = Digest::of(content);
        let Entry::Partial(mut file) = cache.entry(digest, &AtomicBool::new(false)).unwrap() else {
            panic!()
        };
        file.write_all(content).unwrap();
        cache.keep(digest, &file).unwrap();
        (digest, file)
    }

    #[test]
    fn purge_leaves_what_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let never = AtomicBool::new(false);
        let (used, _file) = put(&cache, b"used");
        drop(put(&cache, b"unused"));
        let fetching = cache.entry(Digest::of(b"fetching"), &never).unwrap();
        fs::write(dir.path().join("sha256/mine"), "mine").unwrap();
        let purged = cache.purge(None, None).unwrap();
        assert_eq!(purged, Purged { removed: 1, bytes: 6, kept: 2, in_use: 2 });
        assert!(matches!(cache.entry(used, &never).unwrap(), Entry::Whole(_)));
        drop((_file, fetching));
        assert_eq!(cache.purge(Some(Duration::from_secs(60)), None).unwrap().removed, 0);
        assert_eq!(cache.purge(None, Some(1 << 20)).unwrap().removed, 0);
        assert_eq!(cache.purge(None, Some(0)).unwrap().kept, 0);
        assert_eq!(fs::read_dir(dir.path().join("sha256")).unwrap().count(), 1);
    }

    /// Who fetched a blob goes on reading it while others wait for it.
    #[test]
    fn two_do_not_fetch_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let digest = Digest::of(b"x");
        let never = AtomicBool::new(false);
        let Entry::Partial(mut first) = cache.entry(digest, &never).unwrap() else { panic!() };
        std::thread::scope(|scope| {
            let second = scope.spawn(|| cache.entry(digest, &never).unwrap());
            std::thread::sleep(Duration::from_millis(120));
            assert!(!second.is_finished());
            first.write_all(b"x").unwrap();
            cache.keep(digest, &first).unwrap();
            assert!(matches!(second.join().unwrap(), Entry::Whole(_)));
        });
        // One that gives up does not wait.
        let Entry::Partial(_held) = cache.entry(Digest::of(b"y"), &never).unwrap() else { panic!() };
        assert!(cache.entry(Digest::of(b"y"), &AtomicBool::new(true)).is_err());
    }
}
