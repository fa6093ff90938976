//! The tree of a mirror, and how it changes: by renaming alone, so that whoever reads it at any moment sees files and
//! links that are right.
//!
//! ```text
//! all/VERSION/…                 files, and their signatures
//! CHANNEL/current               link to the newest version
//! CHANNEL/VERSION               links to the versions seen in that channel
//! streams/STREAM.json           stream documents
//! .rehydrator/lock              held by whoever changes the mirror
//!             state.json        what garbage collection must know
//!             new               a link or document that is about to get its name
//!             partial/          files that are being got, in the same tree
//!             trash/            what is being removed
//!             work/             images that are being built
//! ```
//!
//! A source with a name has the first four in a directory of that name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::fetch::{self, Partial, sync_dir};
use crate::workdir::read_limited;

/// Where a mirror has what is not for its readers.
pub const OWN: &str = ".rehydrator";

/// What is about to get its name, in [`OWN`].
const NEW: &str = "new";

/// The directory of all versions.
pub const ALL: &str = "all";

/// The directory of stream documents.
pub const STREAMS: &str = "streams";

/// The link to the newest version.
pub const CURRENT: &str = "current";

/// The format of `state.json`.
const STATE_VERSION: u32 = 1;

/// The longest `state.json` that is read, in bytes.
const MAX_STATE: u64 = 16 << 20;

/// What a mirror remembers from run to run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    /// When a run ended without a failure, in seconds since 1970.
    pub last_success: Option<u64>,
    /// By the directory of the channel.
    pub channels: BTreeMap<String, Channel>,
}

/// What is remembered of a channel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Channel {
    /// The directory that has `all/`; empty for the top.
    pub root: String,
    /// How many versions to keep; all without it.
    pub keep: Option<usize>,
    /// Versions that must be kept: pinned, named by the document of the stream, or being mirrored.
    pub needs: BTreeSet<String>,
    /// What the server said is current when the channel was last complete, by architecture.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub newest: BTreeMap<String, String>,
    /// Whether what said so was signed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub signed: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { version: STATE_VERSION, last_success: None, channels: BTreeMap::new() }
    }
}

/// A mirror that nobody else changes.
pub struct Dest {
    /// Its top.
    pub dir: PathBuf,
    lock: File,
}

impl Dest {
    /// Takes the mirror in `dir` for this process alone; `wait` for whoever has it.
    pub fn open(dir: &Path, wait: bool) -> Result<Self> {
        let own = dir.join(OWN);
        fs::create_dir_all(&own).with_context(|| format!("{}: mkdir failed", own.display()))?;
        let path = own.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.with_context(|| format!("{}: open failed", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if wait => {
                tracing::warn!("{}: another process changes this mirror: waiting for it", dir.display());
                lock.lock().with_context(|| format!("{}: lock failed", path.display()))?;
            }
            Err(TryLockError::WouldBlock) => {
                bail!("{}: another process changes this mirror; --wait waits for it", dir.display())
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("{}: lock failed", path.display()));
            }
        }
        let dest = Self { dir: dir.to_path_buf(), lock };
        // A link, perhaps, which must not be written through.
        fetch::remove(&own.join(NEW))?;
        dest.empty_trash()?;
        remove_all(&dest.work())?;
        Ok(dest)
    }

    /// Where images are built; what a run that was killed left there is gone.
    pub fn work(&self) -> PathBuf {
        self.dir.join(OWN).join("work")
    }

    /// Where the file that will be `path`, relative to the mirror, is until it has been checked.
    pub fn partial(&self, path: &Path) -> Partial {
        Partial::of(&self.dir.join(OWN).join("partial").join(path))
    }

    /// Removes what has been got of files other than these.
    pub fn tidy(&self, keep: &BTreeSet<PathBuf>) -> Result<()> {
        tidy(&self.dir.join(OWN).join("partial"), keep)
    }

    /// Reads `state.json`.
    pub fn state(&self) -> Result<State> {
        let path = self.dir.join(OWN).join("state.json");
        let json = match read_limited(&path, MAX_STATE) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            json => json.with_context(|| format!("{}: read failed", path.display()))?,
        };
        let state: State = serde_json::from_slice(&json).with_context(|| path.display().to_string())?;
        ensure!(state.version == STATE_VERSION, "{}: unknown version {}", path.display(), state.version);
        Ok(state)
    }

    /// Writes `state.json`.
    pub fn write_state(&self, state: &State) -> Result<()> {
        self.write(&Path::new(OWN).join("state.json"), &serde_json::to_vec_pretty(state)?)
    }

    /// Writes the file `path`, relative to the mirror, from one moment to the next.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(path);
        let dir = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(dir).with_context(|| format!("{}: mkdir failed", dir.display()))?;
        fetch::write_through(&self.dir.join(OWN).join(NEW), &path, bytes)
    }

    /// Makes the link `link`, relative to the mirror, point at `target`, from one moment to the next. True if it did
    /// not before.
    pub fn link(&self, link: &Path, target: &Path) -> Result<bool> {
        let path = self.dir.join(link);
        match fs::read_link(&path) {
            Ok(old) if old == target => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                bail!("{}: is there, and is no link", path.display())
            }
            _ => {}
        }
        let parent = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).with_context(|| format!("{}: mkdir failed", parent.display()))?;
        let new = self.dir.join(OWN).join(NEW);
        let swap = || symlink(target, &new).and_then(|()| fs::rename(&new, &path));
        fetch::remove(&new)?;
        swap().with_context(|| format!("{}: link failed", path.display()))?;
        sync_dir(parent)?;
        Ok(true)
    }

    /// Takes `path`, relative to the mirror, out of it at once; its space comes back with [`Self::empty_trash`].
    pub fn discard(&self, path: &Path) -> Result<()> {
        let trash = self.dir.join(OWN).join("trash");
        fs::create_dir_all(&trash).with_context(|| format!("{}: mkdir failed", trash.display()))?;
        let from = self.dir.join(path);
        let into =
            tempfile::tempdir_in(&trash).with_context(|| format!("{}: mkdir failed", trash.display()))?;
        let to = into.keep().join("it");
        fs::rename(&from, to).with_context(|| format!("{}: rename failed", from.display()))?;
        sync_dir(from.parent().unwrap_or(&self.dir))
    }

    /// Removes what was discarded, here or by a run that was killed.
    pub fn empty_trash(&self) -> Result<()> {
        remove_all(&self.dir.join(OWN).join("trash"))
    }
}

/// Removes a directory that need not be there.
fn remove_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("{}: remove failed", dir.display()))
        }
        _ => Ok(()),
    }
}

impl Drop for Dest {
    fn drop(&mut self) {
        // Not left to the closing of the file: a process that is being started right now may still hold a copy of it.
        let _ = self.lock.unlock();
    }
}

/// Removes all files below `dir` but those of `keep`, and directories that are empty then.
fn tidy(dir: &Path, keep: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in entries(dir)? {
        let path = dir.join(&entry);
        if path.is_dir() {
            tidy(&path, keep)?;
        } else if !keep.contains(&path) {
            fs::remove_file(&path).with_context(|| format!("{}: remove failed", path.display()))?;
        }
    }
    // It fails, as it must, when there is something in it.
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// The names in a directory, sorted; none when it is not there.
pub fn entries(dir: &Path) -> Result<Vec<String>> {
    let read = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // Names of ours are plain; what is not was not put there by us.
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    };
    match read() {
        Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => {
            Ok(Vec::new())
        }
        names => names.with_context(|| format!("{}: read failed", dir.display())),
    }
}
