//! Makes a dehydrated directory.
//!
//! Order of writing: blobs and signatures into `NAME.partial`, each under its digest only when whole; then the index;
//! then all is synced and the directory gets its name. What was there under that name is moved away first and removed
//! last, so that at any moment NAME is whole or absent. A run that was killed leaves `NAME.partial`, which the next one
//! removes.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;

use super::{BLOBS, INDEX, INDEX_DIGEST, SIGNATURES, Store, index_digest, matches};
use crate::digest::Hasher;
use crate::recipe::{Blob, Index};
use crate::source::Reader;

/// A dehydrated directory that is being made.
pub struct Writer {
    dir: PathBuf,
    partial: PathBuf,
    /// Held until the end: two writers of one directory would remove each other's files.
    _lock: File,
}

/// A file that is being written; it is nowhere until [`Writer::keep`].
pub type BlobWriter = Hasher<tempfile::NamedTempFile>;

impl Writer {
    /// Begins to make `dir`.
    pub fn create(dir: &Path) -> Result<Self> {
        let parent = parent(dir);
        let lock = File::open(parent).with_context(|| parent.display().to_string())?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("{}: another process is at it", dir.display()))?;
        let partial = beside(dir, ".partial");
        remove(&partial)?;
        for sub in [BLOBS, SIGNATURES] {
            let sub = partial.join(sub);
            fs::create_dir_all(&sub).with_context(|| sub.display().to_string())?;
        }
        Ok(Self { dir: dir.to_owned(), partial, _lock: lock })
    }

    /// Where scratch files may lie: on the same file system, and gone with the directory.
    pub fn scratch(&self) -> &Path {
        &self.partial
    }

    /// Begins a blob.
    pub fn blob(&self) -> Result<BlobWriter> {
        let file = tempfile::NamedTempFile::new_in(&self.partial)
            .with_context(|| format!("a blob in {}", self.partial.display()))?;
        Ok(Hasher::new(file))
    }

    /// Ends a blob and gives it its name.
    pub fn keep(&self, blob: BlobWriter) -> Result<Blob> {
        let (file, sha256, size) = blob.into_parts();
        let path = self.partial.join(BLOBS).join(sha256.to_string());
        persist(file, &path)?;
        Ok(Blob { sha256, size })
    }

    /// Stores bytes in memory as a blob.
    pub fn put(&self, bytes: &[u8]) -> Result<Blob> {
        let mut blob = self.blob()?;
        blob.write_all(bytes)?;
        self.keep(blob)
    }

    /// Stores a blob of another directory, checked.
    pub fn take(&self, blob: &Blob, from: &Store) -> Result<()> {
        let mut out = self.blob()?;
        io::copy(&mut Reader::new(&*from.blob(blob)?), &mut out)?;
        matches(&format!("blob {}", blob.sha256), &self.keep(out)?, blob)
    }

    /// Opens a blob that was kept.
    pub fn open(&self, blob: &Blob) -> Result<File> {
        let path = self.partial.join(BLOBS).join(blob.sha256.to_string());
        File::open(&path).with_context(|| path.display().to_string())
    }

    /// Stores a file under its name, beside the index; `name` is relative.
    pub fn file(&self, name: impl AsRef<Path>, bytes: &[u8]) -> Result<Blob> {
        let mut file = self.blob()?;
        file.write_all(bytes)?;
        let (file, sha256, size) = file.into_parts();
        persist(file, &self.partial.join(name))?;
        Ok(Blob { sha256, size })
    }

    /// Writes the index, and shows the directory under its name.
    pub fn finish(self, index: &Index) -> Result<()> {
        // What an attempt left that was given up, as when an artifact did not come back unfolded.
        let needed: BTreeSet<String> = index.blobs().iter().map(|b| b.sha256.to_string()).collect();
        for entry in fs::read_dir(self.partial.join(BLOBS))? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| needed.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        let bytes = index.to_json();
        self.file(INDEX, &bytes)?;
        self.file(INDEX_DIGEST, index_digest(&bytes).as_bytes())?;
        for dir in [BLOBS, SIGNATURES, "."] {
            sync_dir(&self.partial.join(dir))?;
        }
        let old = beside(&self.dir, ".old");
        remove(&old)?;
        match fs::rename(&self.dir, &old) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).context(self.dir.display().to_string());
            }
            _ => {}
        }
        fs::rename(&self.partial, &self.dir).with_context(|| self.dir.display().to_string())?;
        sync_dir(parent(&self.dir))?;
        remove(&old)
    }
}

impl Drop for Writer {
    /// Leaves nothing behind when the run fails. After `finish` the partial directory is gone already.
    fn drop(&mut self) {
        let _ = remove(&self.partial);
    }
}

fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let context = || path.display().to_string();
    // Temporary files are private to their owner; these are for everybody.
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).with_context(context)?;
    file.as_file().sync_all().with_context(context)?;
    file.persist(path).with_context(context)?;
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| dir.display().to_string())
}

fn parent(dir: &Path) -> &Path {
    dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = dir.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}
