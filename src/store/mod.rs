//! The dehydrated directory: `stream.json`, `index.json` with its digest beside it, `signatures/`, `blobs/sha256/`.
//!
//! [`Store`] reads one, wherever its [`Files`] are: in a directory, or in the layers of an image. [`Writer`] makes one and
//! shows it under its name only when it is whole. [`Sources`] makes the sources of an index out of blobs.
//! `docs/format.md` is the normative text.

mod sources;
mod writer;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

pub use sources::Sources;
pub use writer::{BlobWriter, Writer};

use crate::digest::Digest;
use crate::recipe::{Blob, Index, MAX_INDEX};
use crate::source::{self, Concat, Reader, Source};

/// Name of the stream document.
pub const STREAM: &str = "stream.json";
/// Name of upstream's detached signature of the stream document, where there is one.
pub const STREAM_SIGNATURE: &str = "stream.json.sig";
/// Name of the index.
pub const INDEX: &str = "index.json";
/// Name of the file with the digest of the index, as `sha256sum` writes it: `sha256sum -c` checks it.
pub const INDEX_DIGEST: &str = "index.json.sha256";
/// Name of the directory of upstream's detached signatures.
pub const SIGNATURES: &str = "signatures";
/// Name of the directory of blobs.
pub const BLOBS: &str = "blobs/sha256";

/// The longest signature that is read, in bytes. An OpenPGP signature has some hundred.
const MAX_SIGNATURE: u64 = 1 << 20;

/// The most parts of a blob that are looked for: as many as an image may have layers.
const MAX_PARTS: u32 = 128;

/// Where the files of a dehydrated directory are.
pub trait Files: Send + Sync {
    /// What they are called in messages.
    fn name(&self) -> String;

    /// Opens a file by its path in the directory; `NotFound` where there is none.
    fn open(&self, path: &str) -> io::Result<Arc<dyn Source>>;

    /// Whether there is a file.
    fn has(&self, path: &str) -> bool;
}

/// A directory.
struct Directory(PathBuf);

impl Files for Directory {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn Source>> {
        Ok(Arc::new(source::File::new(std::fs::File::open(self.0.join(path))?)?))
    }

    fn has(&self, path: &str) -> bool {
        self.0.join(path).exists()
    }
}

/// A dehydrated directory, open for reading.
pub struct Store {
    files: Box<dyn Files>,
    index_json: Vec<u8>,
    /// Its index, checked.
    pub index: Index,
}

impl Store {
    /// Opens the dehydrated directory `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::of(Box::new(Directory(dir.to_owned())))
    }

    /// Opens a dehydrated directory whose files are anywhere.
    pub fn of(files: Box<dyn Files>) -> Result<Self> {
        let read = |name: &str, most: u64| -> Result<Vec<u8>> {
            let path = || format!("{}/{name}", files.name());
            let file = files.open(name).with_context(|| format!("no dehydrated directory: {}", path()))?;
            ensure!(file.len() <= most, "{}: longer than {most} bytes", path());
            read_all(&*file).with_context(path)
        };
        let bytes = read(INDEX, MAX_INDEX)?;
        let index = Index::from_json(&bytes).with_context(|| files.name())?;
        let line = index_digest(&bytes);
        let expected = read(INDEX_DIGEST, line.len() as u64)?;
        ensure!(
            expected == line.as_bytes(),
            "{}/{INDEX}: sha256 mismatch: expected {}, got {}",
            files.name(),
            String::from_utf8_lossy(&expected).split(' ').next().unwrap_or_default(),
            Digest::of(&bytes)
        );
        Ok(Self { files, index_json: bytes, index })
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        self.files.name()
    }

    /// Opens a blob, and checks its length.
    pub fn blob(&self, blob: &Blob) -> Result<Arc<dyn Source>> {
        let file = match self.files.open(&blob_path(blob, None)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.parts(blob).and_then(|parts| parts.ok_or(e))
            }
            file => file,
        };
        let file = file.with_context(|| format!("blob {} is missing", blob.sha256))?;
        let size = file.len();
        ensure!(size == blob.size, "blob {}: expected {} bytes, got {size}", blob.sha256, blob.size);
        Ok(file)
    }

    /// The parts of a blob that is stored in parts.
    fn parts(&self, blob: &Blob) -> io::Result<Option<Arc<dyn Source>>> {
        let mut parts = Vec::new();
        for part in 0..MAX_PARTS {
            match self.files.open(&blob_path(blob, Some(part))) {
                Ok(file) => parts.push(file),
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) => return Err(e),
            }
        }
        if parts.is_empty() {
            return Ok(None);
        }
        Ok(Some(Arc::new(Concat::new(parts)?)))
    }

    /// Reads all of a blob and checks its digest.
    pub fn verify(&self, blob: &Blob) -> Result<()> {
        check(&format!("blob {}", blob.sha256), Reader::new(&*self.blob(blob)?), blob)
    }

    /// The stream document, checked.
    pub fn stream(&self) -> Result<Vec<u8>> {
        self.read(STREAM, &self.index.stream.blob, MAX_INDEX)
    }

    /// Upstream's detached signature of an artifact's published file, checked.
    pub fn signature(&self, name: &str, blob: &Blob) -> Result<Vec<u8>> {
        self.read(&format!("{SIGNATURES}/{name}.sig"), blob, MAX_SIGNATURE)
    }

    /// Every file of the directory but the blobs, by its path in it, checked. The signature of the stream document is
    /// of no known digest; it is taken as it is.
    pub fn metadata(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut files = BTreeMap::from([
            (INDEX.to_string(), self.index_json.clone()),
            (INDEX_DIGEST.to_string(), index_digest(&self.index_json).into_bytes()),
            (STREAM.to_string(), self.stream()?),
        ]);
        if self.files.has(STREAM_SIGNATURE) {
            let at = || format!("{}/{STREAM_SIGNATURE}", self.name());
            let file = self.files.open(STREAM_SIGNATURE).with_context(at)?;
            ensure!(file.len() <= MAX_SIGNATURE, "{}: longer than {MAX_SIGNATURE} bytes", at());
            files.insert(STREAM_SIGNATURE.to_string(), read_all(&*file).with_context(at)?);
        }
        for artifact in &self.index.artifacts {
            if let Some(signature) = &artifact.signature {
                let name = &artifact.published.name;
                files.insert(format!("{SIGNATURES}/{name}.sig"), self.signature(name, signature)?);
            }
        }
        Ok(files)
    }

    fn read(&self, name: &str, blob: &Blob, most: u64) -> Result<Vec<u8>> {
        let at = || format!("{}/{name}", self.name());
        ensure!(blob.size <= most, "{name}: longer than {most} bytes");
        let file = self.files.open(name).with_context(at)?;
        // What is longer is seen to be so, and not read.
        let mut bytes = vec![0; file.len().min(blob.size + 1) as usize];
        file.read_at(0, &mut bytes).with_context(at)?;
        check(name, &bytes[..], blob)?;
        Ok(bytes)
    }
}

/// All of a file, whose length the caller has checked.
fn read_all(file: &dyn Source) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// The path of a blob in the directory, or of a part of one that is stored in parts, counted from 0.
pub fn blob_path(blob: &Blob, part: Option<u32>) -> String {
    match part {
        None => format!("{BLOBS}/{}", blob.sha256),
        Some(part) => format!("{BLOBS}/{}.{part}", blob.sha256),
    }
}

/// What is in [`INDEX_DIGEST`] beside an index of these bytes.
pub fn index_digest(index: &[u8]) -> String {
    format!("{}  {INDEX}\n", Digest::of(index))
}

/// Reads all of `reader` and checks that it is `expected`; `what` names it in the error.
pub fn check(what: &str, reader: impl Read, expected: &Blob) -> Result<()> {
    let (sha256, size) = Digest::of_reader(reader).with_context(|| what.to_string())?;
    matches(what, &Blob { sha256, size }, expected)
}

/// Checks that `found` is `expected`; `what` names it in the error.
pub fn matches(what: &str, found: &Blob, expected: &Blob) -> Result<()> {
    ensure!(
        found.size == expected.size,
        "{what}: size mismatch: expected {}, got {}",
        expected.size,
        found.size
    );
    found.sha256.must_be(expected.sha256).with_context(|| what.to_string())
}
