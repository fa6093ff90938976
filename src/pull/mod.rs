//! `pull`: an image into a directory, from wherever it is.
//!
//! ```text
//! transport ─► manifest for the platform ─► blobs (several at once, through the cache) ─► unpack (in order) ─► DIR
//! ```
//!
//! Everything happens in a directory beside `DIR` that is its owner's alone. The tree in it is moved to `DIR` when all is
//! there and has been checked. Blobs are checked against their digests, and what they decompress to against the diff IDs of the configuration, which is checked
//! against the manifest; the manifest against its digest where the reference has one.

pub mod cache;
mod fetch;
mod tree;
pub mod unpack;

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::Descriptor;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;
use serde::Deserialize;

use self::cache::Cache;
use self::fetch::Fetcher;
pub use self::tree::{Owners, Rules};
use self::unpack::{TooLarge, Unpacker};
use crate::bounded::shown;
use crate::digest::{Digest, Hasher};
use crate::oci::sign::Policy;
use crate::progress::Progress;
use crate::registry::{MAX_ARCHIVE, Platform};
use crate::transport::{self, Image, Transport};

/// How many blobs are fetched at once.
const PARALLEL: usize = 4;

/// The most that a directory takes unless told otherwise, in bytes: as much as the archive of an image.
pub const MAX_SIZE: u64 = MAX_ARCHIVE;

/// The name of the tree in the directory where it is made.
const TREE: &str = "root";

/// The name of what was replaced, there.
const OLD: &str = "old";

/// The mode of a directory that only its owner may enter.
const OWN: u32 = 0o700;

/// How old what a killed run left must be to be removed: one that has just begun may not have locked it yet.
const ABANDONED: Duration = Duration::from_secs(60);

/// What to do and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which image of several.
    pub platform: Platform,
    /// Replace the directory that is there.
    pub force: bool,
    /// Where blobs are kept.
    pub cache: Option<Cache>,
    /// What is made as the image says.
    pub rules: Rules,
    /// The most that the directory may take, in bytes.
    pub max_size: u64,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The digest of the manifest.
    pub digest: Digest,
    /// How many layers there are.
    pub layers: usize,
    /// How many of them were not in the cache.
    pub fetched: usize,
}

/// The part of a configuration that says what layers are when decompressed.
#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// Unpacks the image at `transport` into `dir`, if `policy` has nothing against it.
pub fn pull(
    transport: &dyn Transport,
    dir: &Path,
    options: &Options,
    policy: &Policy,
    progress: &Progress,
) -> Result<Pulled> {
    // Before anything is fetched.
    check_dir(dir, options.force)?;
    let image = transport::image(transport, &options.platform)?;
    policy.check("signature", transport, image.root.digest)?;
    let config = transport::document(transport, image.manifest.config()).context("configuration")?;
    // Of one from an index, the index says what it is for.
    if image.digest == image.root.digest
        && let Some(notice) = options.platform.check(&config)?
    {
        tracing::warn!("{notice}");
    }
    let config: Config = serde_json::from_slice(&config).context("not an image configuration")?;
    let layers = image.manifest.layers();
    for layer in layers {
        check_layer(layer)?;
    }
    // Before anything is fetched: files that are longer compressed than they may be are too long in any case.
    let total = layers.iter().fold(0, |total: u64, layer| total.saturating_add(layer.size()));
    ensure!(
        total <= options.max_size,
        "the layers have {total} bytes, more than {}; --max-size allows more",
        options.max_size
    );
    let diff_ids = config.rootfs.diff_ids;
    ensure!(
        diff_ids.len() == layers.len(),
        "the manifest has {} layers, the configuration {}",
        layers.len(),
        diff_ids.len()
    );

    let mut attempts = layers.len() + 1;
    let (staging, unpacker, fetched) = loop {
        let staging = Staging::new(dir)?;
        let mut unpacker = Unpacker::new(staging.tree.try_clone()?, options.rules, options.max_size)?;
        if transport.local() {
            for (layer, diff_id) in layers.iter().zip(&diff_ids) {
                let checked = Checked::new(transport.part(layer, 0, layer.size())?, layer)?;
                unpacker
                    .layer(checked, Some(*diff_id))
                    .with_context(|| format!("layer {}", layer.digest()))?;
            }
            break (staging, unpacker, 0);
        }
        attempts -= 1;
        let scratch = staging.parent();
        match fetch_and_unpack(transport, &image, &diff_ids, &mut unpacker, scratch, options, progress)? {
            Some(fetched) => break (staging, unpacker, fetched),
            // Each time there is less in the cache that may be damaged.
            None => ensure!(attempts > 0, "the cache is damaged again and again"),
        }
    };
    let finished = unpacker.finish(is_closed(staging.parent())?)?;
    staging.publish(dir, options.force)?;
    for line in finished.notices.lines() {
        tracing::warn!("{line}");
    }
    if finished.withheld {
        tracing::warn!(
            "{at}: only its owner can enter it: the image has setuid files, capabilities or devices, and others can \
             reach {at}; chmod 755 opens it to them; --no-setuid and --no-devices leave these out",
            at = dir.display()
        );
    }
    if options.rules.owners == Owners::Dropped {
        tracing::warn!("all files belong to you: only root can set their owners; --rootless records them");
    }
    Ok(Pulled { digest: image.digest, layers: layers.len(), fetched })
}

/// Gives how many layers were fetched; nothing where a damaged one was removed from the cache, after which all is to be
/// done once more.
fn fetch_and_unpack(
    transport: &dyn Transport,
    image: &Image,
    diff_ids: &[Digest],
    unpacker: &mut Unpacker,
    scratch: &Path,
    options: &Options,
    progress: &Progress,
) -> Result<Option<usize>> {
    let layers = image.manifest.layers();
    let cache = options.cache.as_ref();
    // What is there stays there: it takes a while until the last layer is read.
    let digests = layers.iter().filter_map(|layer| layer.digest().to_string().parse().ok());
    let _held: Vec<_> = digests.filter_map(|digest| cache?.hold(digest)).collect();
    let fetcher = Fetcher::new(transport, cache, scratch, progress, layers)?;
    let unpacked = std::thread::scope(|scope| {
        for _ in 0..PARALLEL.min(layers.len()) {
            scope.spawn(|| fetcher.run());
        }
        let unpacked = diff_ids.iter().enumerate().try_for_each(|(i, diff_id)| {
            let unpacked = unpacker.layer(fetcher.reader(i), Some(*diff_id));
            unpacked.with_context(|| format!("layer {}", layers[i].digest()))
        });
        if unpacked.is_err() {
            fetcher.cancelled.store(true, Ordering::Relaxed);
        }
        unpacked
    });
    if unpacked.as_ref().is_err_and(|e| e.is::<TooLarge>()) {
        fetcher.forget()?;
    }
    let damaged = fetcher.damaged.load(Ordering::Relaxed);
    let (failed, fetched) = fetcher.finish();
    if damaged {
        return Ok(None);
    }
    match (unpacked, failed) {
        // A layer that is wrong when unpacked may be so because it came wrong; that is the one to name then.
        (Err(e), Some(cause)) => Err(if cause.root_cause().to_string() == "given up" { e } else { cause }),
        (Err(e), None) | (Ok(()), Some(e)) => Err(e),
        (Ok(()), None) => Ok(Some(fetched)),
    }
}

/// Checks that a layer is one: artifacts have other things in their place.
fn check_layer(layer: &Descriptor) -> Result<()> {
    let media_type = layer.media_type().to_string();
    let known = media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.");
    ensure!(
        known && media_type.contains("tar") && !media_type.contains("encrypted"),
        "layer {}: of media type {}, which cannot be unpacked",
        layer.digest(),
        shown(media_type.as_bytes())
    );
    Ok(())
}

/// A reader that checks at the end whether it was all of a blob.
struct Checked<R> {
    inner: io::Take<R>,
    hasher: Option<Hasher<io::Sink>>,
    expected: Digest,
    size: u64,
}

impl<R: Read> Checked<R> {
    fn new(inner: R, blob: &Descriptor) -> Result<Self> {
        let expected = blob.digest().to_string().parse()?;
        let size = blob.size();
        Ok(Self {
            inner: inner.take(size.saturating_add(1)),
            hasher: Some(Hasher::new(io::sink())),
            expected,
            size,
        })
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        if n > 0 {
            if let Some(hasher) = &mut self.hasher {
                hasher.write_all(&buf[..n])?;
            }
        } else if let Some((found, size)) = self.hasher.take().map(Hasher::finish).filter(|_| !buf.is_empty())
            && (found, size) != (self.expected, self.size)
        {
            let e = format!("sha256 mismatch: expected {}, got {found} of {size} bytes", self.expected);
            return Err(io::Error::new(io::ErrorKind::InvalidData, e));
        }
        Ok(n)
    }
}

/// Checks that `dir` may be made, or replaced.
fn check_dir(dir: &Path, force: bool) -> Result<()> {
    let at = || dir.display().to_string();
    ensure!(dir.file_name().is_some(), "{}: not a name for a directory", at());
    match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(at),
        Ok(found) if !found.is_dir() => bail!("{}: exists, and is not a directory", at()),
        Ok(_) if !force => bail!("{}: exists; --force replaces it", at()),
        Ok(_) => Ok(()),
    }
}

/// Whether nobody but root and the owner of this process can reach what is in `dir`: one of the directories on the way
/// there lets nobody else in.
fn is_closed(dir: &Path) -> Result<bool> {
    let at = || dir.display().to_string();
    let user = rustix::process::geteuid().as_raw();
    for dir in dir.canonicalize().with_context(at)?.ancestors() {
        let found = dir.metadata().with_context(|| dir.display().to_string())?;
        // With an access control list, the bits of the group are what it allows anybody at most.
        if found.mode() & 0o011 == 0 && [0, user].contains(&found.uid()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A directory beside the one that is to be made, with the tree in it; nobody else may enter it, since files in the tree
/// may be setuid. It is removed with all that is in it then.
struct Staging {
    path: PathBuf,
    /// Locked for as long as somebody works on it.
    _lock: OwnedFd,
    tree: OwnedFd,
}

impl Staging {
    fn new(dir: &Path) -> Result<Self> {
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let at = || parent.display().to_string();
        fs::create_dir_all(parent).with_context(at)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(dir.file_name().unwrap_or_default());
        prefix.push(".rehydrator-");
        remove_abandoned(parent, prefix.as_bytes());
        let own = |path: &Path| DirBuilder::new().mode(OWN).create(path);
        let made = tempfile::Builder::new().prefix(&prefix).make_in(parent, own);
        let (_, path) = made.with_context(at)?.into_parts();
        let path = path.keep().map_err(|e| e.error).with_context(at)?;
        let lock = OwnedFd::from(File::open(&path).with_context(at)?);
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).with_context(at)?;
        let tree = path.join(TREE);
        own(&tree).with_context(at)?;
        let tree = OwnedFd::from(File::open(&tree).with_context(at)?);
        Ok(Self { path, _lock: lock, tree })
    }

    fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Makes the tree `dir`. What is there takes its place, and is removed.
    fn publish(self, dir: &Path, force: bool) -> Result<()> {
        let at = || dir.display().to_string();
        // All of it before the name.
        rustix::fs::syncfs(&self.tree).with_context(at)?;
        let tree = self.path.join(TREE);
        let mode = make_movable(&tree);
        match rustix::fs::renameat_with(CWD, &tree, CWD, dir, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                check_dir(dir, force)?;
                let mode = make_movable(dir);
                let swapped = match rustix::fs::renameat_with(CWD, &tree, CWD, dir, RenameFlags::EXCHANGE) {
                    // Not all file systems can.
                    Err(Errno::INVAL | Errno::NOSYS) => self.swap(dir),
                    swapped => swapped.map_err(Into::into),
                };
                if let (Err(_), Some(mode)) = (&swapped, mode) {
                    let _ = fs::set_permissions(dir, mode);
                }
                swapped.with_context(at)?;
            }
            Err(Errno::INVAL | Errno::NOSYS) => {
                check_dir(dir, force)?;
                if dir.exists() { self.swap(dir) } else { fs::rename(&tree, dir) }.with_context(at)?;
            }
            Err(e) => return Err(e).with_context(at),
        }
        if let Some(mode) = mode {
            fs::set_permissions(dir, mode).with_context(at)?;
        }
        File::open(self.parent()).and_then(|parent| parent.sync_all()).with_context(at)
    }

    /// Takes the place of `dir` with two renames; between them, there is none.
    fn swap(&self, dir: &Path) -> io::Result<()> {
        let old = self.path.join(OLD);
        fs::rename(dir, &old)?;
        fs::rename(self.path.join(TREE), dir).inspect_err(|_| {
            // Back, or it would be removed.
            let _ = fs::rename(&old, dir);
        })
    }
}

/// Lets its owner write to a directory, which it takes to move it into another; gives the mode that it had. If that is not
/// possible, the move will tell.
fn make_movable(dir: &Path) -> Option<Permissions> {
    let had = fs::metadata(dir).ok()?.permissions();
    if had.mode() & 0o200 != 0 || rustix::process::geteuid().is_root() {
        return None;
    }
    fs::set_permissions(dir, Permissions::from_mode(had.mode() | 0o200)).ok()?;
    Some(had)
}

impl Drop for Staging {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a directory that is of no use any more. It is not worth failing for.
fn remove(path: &Path) {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let removed = File::open(parent)
        .map_err(Into::into)
        .and_then(|parent| tree::remove(parent.as_fd(), path.file_name().unwrap_or_default().as_bytes()));
    if let Err(e) = removed {
        tracing::warn!("{}: left behind: {e:#}", path.display());
    }
}

/// Removes what killed runs have left in `parent`.
fn remove_abandoned(parent: &Path, prefix: &[u8]) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let own = entry.metadata().is_ok_and(|found| found.uid() == rustix::process::geteuid().as_raw());
        let old = || SystemTime::now().duration_since(entry.metadata().ok()?.modified().ok()?).ok();
        if entry.file_name().as_bytes().starts_with(prefix)
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
            && own
            && old().is_some_and(|age| age > ABANDONED)
            && let Ok(dir) = File::open(&path)
            && rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            remove(&path);
        }
    }
}
