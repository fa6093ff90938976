//! `pull`: an image into a directory, from wherever it is.
//!
//! ```text
//! transport ─► manifest for the platform ─► blobs (several at once, through the cache) ─► unpack (in order) ─► DIR
//! ```
//!
//! Everything happens in a directory beside `DIR`, which gets that name when all is there and has been checked. Blobs are
//! checked against their digests, and what they decompress to against the diff IDs of the configuration, which is checked
//! against the manifest; the manifest against its digest where the reference has one.

pub mod cache;
mod fetch;
mod tree;
pub mod unpack;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
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
pub use self::tree::Owners;
use self::unpack::Unpacker;
use crate::digest::{Digest, Hasher};
use crate::oci::sign::Policy;
use crate::progress::Progress;
use crate::registry::Platform;
use crate::transport::{self, Image, Transport};

/// How many blobs are fetched at once.
const PARALLEL: usize = 4;

/// The most that a directory takes unless told otherwise, in bytes: more than any image of a system has.
pub const MAX_SIZE: u64 = 64 << 30;

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
    /// What is done about owners.
    pub owners: Owners,
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
        let mut unpacker = Unpacker::new(staging.fd.try_clone()?, options.owners, options.max_size)?;
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
    let notices = unpacker.finish()?;
    staging.publish(dir, options.force)?;
    for line in notices.lines() {
        tracing::warn!("{line}");
    }
    if options.owners == Owners::Dropped {
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
        "layer {}: of media type {media_type}, which cannot be unpacked",
        layer.digest()
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

/// A directory beside the one that it will be, removed unless it becomes that.
struct Staging {
    path: PathBuf,
    /// Open, and locked for as long as somebody works on it.
    fd: OwnedFd,
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
        let made = tempfile::Builder::new().prefix(&prefix).make_in(parent, |path| {
            // For nobody else before it is finished: files in it may be setuid.
            DirBuilder::new().mode(0o700).create(path)
        });
        let (_, path) = made.with_context(at)?.into_parts();
        let path = path.keep().map_err(|e| e.error).with_context(at)?;
        let fd = OwnedFd::from(File::open(&path).with_context(at)?);
        let staging = Self { path, fd };
        rustix::fs::flock(&staging.fd, FlockOperation::NonBlockingLockExclusive).with_context(at)?;
        Ok(staging)
    }

    fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Makes it `dir`. What is there takes its place, and is removed with it.
    fn publish(self, dir: &Path, force: bool) -> Result<()> {
        let at = || dir.display().to_string();
        // All of it before the name.
        rustix::fs::syncfs(&self.fd).with_context(at)?;
        match rustix::fs::renameat_with(CWD, &self.path, CWD, dir, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                check_dir(dir, force)?;
                match rustix::fs::renameat_with(CWD, &self.path, CWD, dir, RenameFlags::EXCHANGE) {
                    // Not all file systems can.
                    Err(Errno::INVAL | Errno::NOSYS) => self.swap(dir)?,
                    swapped => swapped.with_context(at)?,
                }
            }
            Err(Errno::INVAL | Errno::NOSYS) => {
                check_dir(dir, force)?;
                if dir.exists() { self.swap(dir)? } else { fs::rename(&self.path, dir).with_context(at)? }
            }
            Err(e) => return Err(e).with_context(at),
        }
        File::open(self.parent()).and_then(|parent| parent.sync_all()).with_context(at)
    }

    /// Takes the place of `dir` with two renames; between them, there is none.
    fn swap(&self, dir: &Path) -> Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push("-old");
        fs::rename(dir, &old)
            .and_then(|()| fs::rename(&self.path, dir))
            .and_then(|()| fs::rename(&old, &self.path))
            .with_context(|| dir.display().to_string())
    }
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
        let old = || SystemTime::now().duration_since(entry.metadata().ok()?.modified().ok()?).ok();
        if entry.file_name().as_bytes().starts_with(prefix)
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
            && old().is_some_and(|age| age > ABANDONED)
            && let Ok(dir) = File::open(&path)
            && rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            remove(&path);
        }
    }
}
