//! The dehydrated directory: `stream.json`, `index.json` with its digest beside it, `signatures/`, `blobs/sha256/`.
//!
//! [`Store`] reads one; [`Writer`] makes one and shows it under its name only when it is whole. [`Sources`] makes the
//! sources of an index out of blobs. `docs/format.md` is the normative text.

mod sources;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

pub use sources::Sources;
pub use writer::{BlobWriter, Writer};

use crate::digest::Digest;
use crate::recipe::{Blob, Index, MAX_INDEX};

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

/// A dehydrated directory, open for reading.
pub struct Store {
    dir: PathBuf,
    index_json: Vec<u8>,
    /// Its index, checked.
    pub index: Index,
}

impl Store {
    /// Opens the dehydrated directory `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str, most: u64| -> Result<Vec<u8>> {
            let path = dir.join(name);
            let file =
                File::open(&path).with_context(|| format!("no dehydrated directory: {}", path.display()))?;
            let mut bytes = Vec::new();
            file.take(most + 1).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
            ensure!(bytes.len() as u64 <= most, "{}: longer than {most} bytes", path.display());
            Ok(bytes)
        };
        let bytes = read(INDEX, MAX_INDEX)?;
        let index = Index::from_json(&bytes).with_context(|| dir.display().to_string())?;
        let line = index_digest(&bytes);
        let expected = read(INDEX_DIGEST, line.len() as u64)?;
        ensure!(
            expected == line.as_bytes(),
            "{}: sha256 mismatch: expected {}, got {}",
            dir.join(INDEX).display(),
            String::from_utf8_lossy(&expected).split(' ').next().unwrap_or_default(),
            Digest::of(&bytes)
        );
        Ok(Self { dir: dir.to_owned(), index_json: bytes, index })
    }

    /// Opens a blob, and checks its length.
    pub fn blob(&self, blob: &Blob) -> Result<File> {
        let path = self.dir.join(BLOBS).join(blob.sha256.to_string());
        let file = File::open(&path).with_context(|| format!("blob {} is missing", blob.sha256))?;
        let size = file.metadata()?.len();
        ensure!(size == blob.size, "blob {}: expected {} bytes, got {size}", blob.sha256, blob.size);
        Ok(file)
    }

    /// Reads all of a blob and checks its digest.
    pub fn verify(&self, blob: &Blob) -> Result<()> {
        check(&format!("blob {}", blob.sha256), self.blob(blob)?, blob)
    }

    /// The stream document, checked.
    pub fn stream(&self) -> Result<Vec<u8>> {
        self.read(Path::new(STREAM), &self.index.stream.blob)
    }

    /// Upstream's detached signature of an artifact's published file, checked.
    pub fn signature(&self, name: &str, blob: &Blob) -> Result<Vec<u8>> {
        self.read(&Path::new(SIGNATURES).join(format!("{name}.sig")), blob)
    }

    /// Every file of the directory but the blobs, by its path in it, checked. The signature of the stream document is
    /// of no known digest; it is taken as it is.
    pub fn metadata(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut files = BTreeMap::from([
            (INDEX.to_string(), self.index_json.clone()),
            (INDEX_DIGEST.to_string(), index_digest(&self.index_json).into_bytes()),
            (STREAM.to_string(), self.stream()?),
        ]);
        let signature = self.dir.join(STREAM_SIGNATURE);
        if signature.exists() {
            let mut bytes = Vec::new();
            let file = File::open(&signature).with_context(|| signature.display().to_string())?;
            file.take(MAX_INDEX).read_to_end(&mut bytes).with_context(|| signature.display().to_string())?;
            files.insert(STREAM_SIGNATURE.to_string(), bytes);
        }
        for artifact in &self.index.artifacts {
            if let Some(signature) = &artifact.signature {
                let name = &artifact.published.name;
                files.insert(format!("{SIGNATURES}/{name}.sig"), self.signature(name, signature)?);
            }
        }
        Ok(files)
    }

    fn read(&self, name: &Path, blob: &Blob) -> Result<Vec<u8>> {
        let path = self.dir.join(name);
        ensure!(blob.size <= MAX_INDEX, "{}: longer than {MAX_INDEX} bytes", name.display());
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(blob.size + 1).read_to_end(&mut bytes))
            .with_context(|| path.display().to_string())?;
        check(&name.display().to_string(), &bytes[..], blob)?;
        Ok(bytes)
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
    ensure!(
        found.sha256 == expected.sha256,
        "{what}: sha256 mismatch: expected {}, got {}",
        expected.sha256,
        found.sha256
    );
    Ok(())
}
