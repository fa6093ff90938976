//! The working directory of a build: where its steps leave what the next one needs.
//!
//! ```text
//! stream.json        byte for byte as published           build init
//! stream.json.sig    its signature, if upstream signs it
//! artifacts/         NAME and NAME.sig, verified          build download
//! dehydrated/        what goes into the image             build dehydrate
//! proofs/            how published files are made again   build dehydrate, for the next time
//! ```

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use reqwest::StatusCode;

use crate::catalog::{Catalog, SIGNATURE};
use crate::http::{Http, HttpError};
pub use crate::io::read_limited;
use crate::openpgp::MAX_SIGNATURE;
use crate::staging::write_file;
use crate::stream::{self, MAX_STREAM, Stream};

/// The working directory of a build.
#[derive(Clone, Debug)]
pub struct Workdir {
    root: PathBuf,
}

/// Where a stream document comes from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A stream known by name, such as `fcos-stable`.
    Id(String),
    /// A URL.
    Url(String),
    /// A file.
    File(PathBuf),
}

impl Workdir {
    /// The working directory `root`, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// `stream.json`.
    pub fn stream(&self) -> PathBuf {
        self.root.join("stream.json")
    }

    /// `stream.json.sig`.
    pub fn stream_signature(&self) -> PathBuf {
        self.root.join("stream.json.sig")
    }

    /// `artifacts/`.
    pub fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    /// Where signatures of images go: the root of a lookaside tree.
    pub fn sigstore(&self) -> PathBuf {
        self.root.join("sigstore")
    }

    /// `dehydrated/`.
    pub fn dehydrated(&self) -> PathBuf {
        self.root.join("dehydrated")
    }

    /// `proofs/`.
    pub fn proofs(&self) -> PathBuf {
        self.root.join("proofs")
    }

    /// Reads `stream.json`.
    pub fn read_stream(&self) -> Result<Stream> {
        let path = self.stream();
        let bytes = match read_limited(&path, MAX_STREAM) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                bail!("{}: no such file; `rehydrator build init` makes it", path.display())
            }
            bytes => bytes.with_context(|| format!("{}: read failed", path.display()))?,
        };
        Stream::parse(&bytes).with_context(|| path.display().to_string())
    }

    /// Gets a stream document, and its signature if there is one, and stores both as they are. What is there already
    /// is replaced only by a document that can be used.
    pub fn init(&self, origin: &Origin, http: &Http) -> Result<Stream> {
        let (document, signature) = match origin {
            Origin::Id(id) => fetch(&stream::url_of(id)?, http)?,
            Origin::Url(url) => fetch(url, http)?,
            Origin::File(file) => {
                let mut beside = file.clone().into_os_string();
                beside.push(SIGNATURE);
                let signature = match read_limited(Path::new(&beside), MAX_SIGNATURE) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                    signature => {
                        Some(signature.with_context(|| format!("{}: read failed", beside.display()))?)
                    }
                };
                let document = read_limited(file, MAX_STREAM);
                (document.with_context(|| format!("{}: read failed", file.display()))?, signature)
            }
        };
        let stream = Stream::parse(&document)?;
        Catalog::new(&stream)?;
        std::fs::create_dir_all(&self.root)
            .with_context(|| format!("{}: mkdir failed", self.root.display()))?;
        // The old signature goes first, so that there is never a document with the signature of another.
        match std::fs::remove_file(self.stream_signature()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e)
                    .with_context(|| format!("{}: remove failed", self.stream_signature().display()));
            }
            _ => write_file(&self.stream(), &document)?,
        }
        if let Some(signature) = signature {
            write_file(&self.stream_signature(), &signature)?;
        }
        Ok(stream)
    }

    /// Removes `artifacts/`, `dehydrated/` and `proofs/`.
    pub fn clean(&self) -> Result<()> {
        for dir in [self.artifacts(), self.dehydrated(), self.proofs()] {
            match std::fs::remove_dir_all(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("{}: remove failed", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The stream document at `url`, and its signature if there is one.
pub fn fetch(url: &str, http: &Http) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
    let document = http.get(url, MAX_STREAM)?;
    let signature = match http.get(&format!("{url}{SIGNATURE}"), MAX_SIGNATURE) {
        Ok(signature) => Some(signature),
        // An object store that does not let one list answers 403 for what is not there.
        Err(HttpError::Status {
            status: StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE,
            ..
        }) => None,
        Err(e) => return Err(e.into()),
    };
    Ok((document, signature))
}
