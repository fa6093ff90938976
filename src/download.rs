//! `build download`: every artifact of the stream into `artifacts/`, verified.
//!
//! A file has its final name only once its digest and its signature have been found right. Until then it is
//! `NAME.partial`, which a later run goes on with. Files are independent: one that fails does not stop the others.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::catalog::{Catalog, Item, SIGNATURE};
use crate::digest::Digest;
use crate::fetch::{self, Partial, each};
use crate::http::Http;
use crate::openpgp::{Keys, MAX_SIGNATURE, SignatureError};
use crate::progress::Progress;
use crate::stream::{self, Stream};
use crate::workdir::{Workdir, read_limited};

/// What to download, and whom to believe.
#[derive(Clone, Debug)]
pub struct Options {
    /// Files and directories of keys that may sign; when empty, those known for the stream.
    pub keys: Vec<PathBuf>,
    /// Check digests only, not signatures.
    pub skip_signatures: bool,
    /// Only these architectures; when empty, all of the stream.
    pub arch: Vec<String>,
    /// How many files at once.
    pub parallel: usize,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Files that were there already, and are right.
    pub present: usize,
    /// Files that were downloaded.
    pub downloaded: usize,
}

/// Downloads what the stream document of `workdir` names. An error at the end names every artifact that failed.
pub fn run(workdir: &Workdir, options: &Options, http: &Http, progress: &Progress) -> Result<Summary> {
    let stream = workdir.read_stream()?;
    let catalog = Catalog::new(&stream)?.only(&options.arch)?;
    let keys = if options.skip_signatures { None } else { Some(keys(&stream, &options.keys)?) };
    if let Some(keys) = &keys {
        check_stream(workdir, keys)?;
    }
    let dir = workdir.artifacts();
    std::fs::create_dir_all(&dir).with_context(|| format!("{}: mkdir failed", dir.display()))?;
    let lock = File::open(&dir).with_context(|| format!("{}: open failed", dir.display()))?;
    lock.try_lock().with_context(|| format!("{}: another download is under way", dir.display()))?;
    let pool = fetch::pool(options.parallel)?;
    let job = Job { dir: &dir, keys: keys.as_ref(), http, progress };
    let result = pool.install(|| job.run(&catalog.items));
    // Not left to the closing of the file: a process that is being started right now may still hold a copy of it.
    lock.unlock().with_context(|| format!("{}: unlock failed", dir.display()))?;
    result
}

/// The keys that may sign artifacts of `stream`.
fn keys(stream: &Stream, given: &[PathBuf]) -> Result<Keys> {
    let mut keys = Keys::default();
    for path in given {
        keys.read(path)?;
    }
    if given.is_empty() {
        for key in stream::keys_of(&stream.stream)? {
            keys.add(key.as_bytes())?;
        }
    }
    ensure!(
        !keys.is_empty(),
        "stream {:?}: no signing keys are known for it: name some with --key, or check digests only with \
         --skip-signatures",
        stream.stream
    );
    Ok(keys)
}

/// Checks the signature of the stream document, where upstream makes one.
fn check_stream(workdir: &Workdir, keys: &Keys) -> Result<()> {
    let path = workdir.stream_signature();
    let signature = match read_limited(&path, MAX_SIGNATURE) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        signature => signature.with_context(|| format!("{}: read failed", path.display()))?,
    };
    let path = workdir.stream();
    File::open(&path)
        .map_err(SignatureError::Read)
        .and_then(|file| keys.verify(&signature, file))
        .with_context(|| path.display().to_string())
}

/// What all downloads of a run share.
struct Job<'a> {
    dir: &'a Path,
    /// None when signatures are not checked.
    keys: Option<&'a Keys>,
    http: &'a Http,
    progress: &'a Progress,
}

impl Job<'_> {
    fn run(&self, items: &[Item]) -> Result<Summary> {
        let mut failed = Vec::new();
        let mut missing = Vec::new();
        for (item, present) in each(items.iter().collect(), |item| self.present(item)) {
            match present {
                Ok(true) => {}
                Ok(false) => missing.push(item),
                Err(e) => failed.push((item, e)),
            }
        }
        self.check_space(&missing)?;
        let present = items.len() - missing.len() - failed.len();
        let mut downloaded = 0;
        for (item, result) in each(missing, |item| self.download(item)) {
            match result {
                Ok(()) => downloaded += 1,
                Err(e) => failed.push((item, e)),
            }
        }
        if failed.is_empty() {
            return Ok(Summary { present, downloaded });
        }
        let errors: Vec<_> =
            failed.iter().map(|(item, e)| format!("\nartifact {}: {e:#}", item.name)).collect();
        bail!("{} of {} artifacts failed:{}", failed.len(), items.len(), errors.concat())
    }

    fn path(&self, item: &Item, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}{suffix}", item.name))
    }

    fn partial(&self, item: &Item) -> Partial {
        Partial::of(&self.path(item, ""))
    }

    /// Whether the file is there already. One that is, but is not right, becomes what a download starts from.
    fn present(&self, item: &Item) -> Result<bool> {
        let path = self.path(item, "");
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file.context("open failed")?,
        };
        let task = self.progress.task(format!("check {}", item.name), Some(file.metadata()?.len()));
        let (found, _) = Digest::of_reader(task.reader(file)).context("read failed")?;
        let checked = self.check_digest(item, found).and_then(|()| {
            let signature = match read_limited(&self.path(item, SIGNATURE), MAX_SIGNATURE) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                signature => Some(signature.context("signature: read failed")?),
            };
            Ok(self.check_signature(&path, signature.as_deref())?)
        });
        if let Err(e) = checked {
            tracing::warn!("artifact {}: getting it again: {e:#}", item.name);
            std::fs::rename(&path, self.partial(item).file).context("rename failed")?;
            return Ok(false);
        }
        task.finish();
        Ok(true)
    }

    /// Checks that what the server says is still to come has room.
    fn check_space(&self, missing: &[&Item]) -> Result<()> {
        let sizes = each(missing.to_vec(), |item| {
            // Without a length there is nothing to check.
            self.http
                .length(&item.location)
                .map_or(0, |length| length.saturating_sub(self.partial(item).len()))
        });
        let needed = sizes.iter().fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
        fetch::check_space(self.dir, needed, missing.len(), "artifacts")
    }

    fn download(&self, item: &Item) -> Result<()> {
        // First, because it is small: without it all the rest is for nothing.
        let signature = self.signature(item)?;
        let task = self.progress.task(&item.name, None);
        let partial = self.partial(item);
        partial.get(self.http, &item.location, &task, |file| {
            let (found, _) = File::open(file).and_then(Digest::of_reader).context("read failed")?;
            self.check_digest(item, found)
        })?;
        self.check_signature(&partial.file, signature.as_deref())?;
        partial.publish(&self.path(item, ""), signature.as_deref())?;
        task.finish();
        Ok(())
    }

    /// The signature of the published file; none only where none is needed. It is kept with the file also when it
    /// is not checked here: those who get the file back may want to.
    fn signature(&self, item: &Item) -> Result<Option<Vec<u8>>> {
        let signature = match &item.signature {
            None => None,
            Some(url) => match self.http.find(url, MAX_SIGNATURE) {
                Ok(signature) => signature,
                Err(e) if self.keys.is_none() => {
                    tracing::warn!("artifact {}: goes without its signature: {e}", item.name);
                    None
                }
                Err(e) => return Err(e.into()),
            },
        };
        if self.keys.is_some() && signature.is_none() {
            return Err(SignatureError::Missing.into());
        }
        Ok(signature)
    }

    fn check_digest(&self, item: &Item, found: Digest) -> Result<()> {
        ensure!(found == item.sha256, "sha256 mismatch: expected {}, got {found}", item.sha256);
        Ok(())
    }

    fn check_signature(&self, path: &Path, signature: Option<&[u8]>) -> Result<(), SignatureError> {
        let Some(keys) = self.keys else { return Ok(()) };
        let file = File::open(path).map_err(SignatureError::Read)?;
        keys.verify(signature.ok_or(SignatureError::Missing)?, file)
    }
}
