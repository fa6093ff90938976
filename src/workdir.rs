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

use crate::catalog::{Catalog, SIGNATURE};
use crate::http::Http;
pub use crate::io::read_limited;
use crate::openpgp::MAX_SIGNATURE;
use crate::staging::write_file;
use crate::stream::{self, MAX_STREAM, Stream};
use crate::version::{self, Older};

/// The working directory of a build.
#[derive(Clone, Debug)]
pub struct Workdir {
    root: PathBuf,
    allow_downgrade: bool,
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
        Self { root: root.into(), allow_downgrade: false }
    }

    /// Whether [`Workdir::init`] may replace the document of a stream by an older or an unsigned one.
    pub fn allow_downgrade(mut self, allow: bool) -> Self {
        self.allow_downgrade = allow;
        self
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
    /// is replaced only by a document that can be used. A server may not replace the document of a stream by an older
    /// or an unsigned one; a file of the user may.
    pub fn init(&self, origin: &Origin, http: &Http) -> Result<Stream> {
        let (document, signature) = match origin {
            Origin::Id(id) => fetch(&stream::find(id)?.url, http)?,
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
        if let Origin::Id(id) = origin
            && let Some(name) = stream::find(id)?.stream
        {
            stream.must_be(&name).with_context(|| id.clone())?;
        }
        Catalog::new(&stream)?;
        if !matches!(origin, Origin::File(_)) {
            self.check_not_backwards(&stream, signature.is_some())?;
        }
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

    /// Refuses a document of the stream that is here already, if that is newer, or signed when this one is not.
    fn check_not_backwards(&self, stream: &Stream, signed: bool) -> Result<()> {
        // One that cannot be read vouches for nothing.
        let Some(had) = self.read_stream().ok().filter(|had| had.stream == stream.stream) else {
            return Ok(());
        };
        let at = self.stream();
        let (found, had) = (stream.releases(), had.releases());
        if let Some(Older { arch, found, had }) = version::older(&found, &had) {
            let what = format!(
                "{}: the server offers release {found} for {arch}, older than {had}, which is here",
                at.display()
            );
            version::backwards(&what, self.allow_downgrade)?;
        }
        if !signed && self.stream_signature().exists() {
            let what =
                format!("{}: the server has no signature for it, the one here is signed", at.display());
            version::backwards(&what, self.allow_downgrade)?;
        }
        Ok(())
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
    Ok((http.get(url, MAX_STREAM)?, http.find(&format!("{url}{SIGNATURE}"), MAX_SIGNATURE)?))
}
