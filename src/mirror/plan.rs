//! What a channel has to become: the files of its versions, and what vouches for each. Made by
//! [`super::container_linux`] and [`super::release`] of what the server says, carried out by [`super::run`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ring::digest::{Context as Hash, SHA512};
use serde::Serialize;

use crate::catalog::Item;
use crate::digest::Digest;
use crate::openpgp::{Keys, SignatureError};

use super::layout::ALL;

/// The most versions of a channel. Fedora CoreOS has published some 200 for a stream.
pub const MAX_VERSIONS: usize = 1000;

/// A channel, or a channel of one architecture: a directory with links to versions.
#[derive(Debug)]
pub struct Plan {
    /// The directory of the mirror that has `all/`; empty for the top.
    pub root: PathBuf,
    /// The directory of the links, below `root`: `CHANNEL`, or `CHANNEL/ARCH`.
    pub channel: PathBuf,
    /// What the links point to below the directory of a version: nothing, or the architecture.
    pub part: PathBuf,
    /// Newest first.
    pub versions: Vec<Version>,
    /// What `current` is to name. Without one it stays as it is.
    pub current: Option<String>,
    /// What the server says is current, by architecture; empty where the configuration says what is.
    pub offers: BTreeMap<String, String>,
    /// Whether what says so is signed.
    pub signed: bool,
    /// Versions that must be complete before `current` and the documents are replaced.
    pub needs: BTreeSet<String>,
    /// Documents to write then, by their path below `root`.
    pub documents: Vec<(PathBuf, Vec<u8>)>,
    /// The signature of a document that has none now, by its path below `root`.
    pub removed: Option<PathBuf>,
    /// What an image of `current` is made of, for a stream.
    pub release: Option<Release>,
    /// A document that an earlier run may have written, and this one cannot renew.
    pub stale: Option<PathBuf>,
    /// Who may sign.
    pub keys: Keys,
    /// What went wrong already.
    pub problems: Vec<Problem>,
    /// The versions that are not complete because of it.
    pub broken: BTreeSet<String>,
    /// What the server has, and the mirror does not take.
    pub skipped: Vec<Skipped>,
}

/// A release of a stream, as it is dehydrated.
#[derive(Debug)]
pub struct Release {
    /// What the document calls the stream.
    pub stream: String,
    /// The stream document: as published, or made of `release.json`.
    pub document: Vec<u8>,
    /// The signature of the document, if it has one.
    pub signature: Option<Vec<u8>>,
    /// Those of its artifacts that are mirrored: each with its path below the mirror.
    pub artifacts: Vec<(Item, PathBuf)>,
}

/// A version of a channel.
#[derive(Debug)]
pub struct Version {
    /// Its name.
    pub name: String,
    /// Its files.
    pub files: Vec<Wanted>,
}

/// A file to mirror.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where, below the mirror.
    pub path: PathBuf,
    /// From where.
    pub url: String,
    /// What vouches for it.
    pub proof: Proof,
}

/// What vouches for a file.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A signature of its own, and where the stream document has one, a digest.
    Signature {
        /// Where the signature is.
        url: String,
        /// What the document says.
        sha256: Option<Digest>,
    },
    /// A signed list of digests beside it, which is mirrored, too.
    Listed(Sha512),
    /// The stream document alone. Only where the configuration says so.
    Document(Digest),
}

/// Something that failed.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// The file, version or channel.
    pub what: String,
    /// Why.
    pub error: String,
}

/// Something that is not mirrored.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// A URL, or a link as it is.
    pub what: String,
    /// Why not.
    pub why: String,
}

impl Plan {
    /// A plan without any version yet.
    pub fn new(root: &str, channel: impl Into<PathBuf>, part: &str, keys: Keys) -> Self {
        Self {
            root: root.into(),
            channel: channel.into(),
            part: part.into(),
            versions: Vec::new(),
            current: None,
            offers: BTreeMap::new(),
            signed: false,
            needs: BTreeSet::new(),
            documents: Vec::new(),
            removed: None,
            release: None,
            stale: None,
            keys,
            problems: Vec::new(),
            broken: BTreeSet::new(),
            skipped: Vec::new(),
        }
    }

    /// The directory of the links, below the mirror; what the channel is called in messages.
    pub fn label(&self) -> PathBuf {
        join(&self.root, &self.channel)
    }

    /// The directory of a version, below the mirror.
    pub fn dir(&self, version: &str) -> PathBuf {
        join(&self.root.join(ALL).join(version), &self.part)
    }

    /// Where a link of this channel to a version points.
    pub fn target(&self, version: &str) -> PathBuf {
        let up: PathBuf = self.channel.iter().map(|_| "..").collect();
        join(&up.join(ALL).join(version), &self.part)
    }

    /// Whether there are versions, and no file of any, though nothing failed: what a mistake in the configuration makes.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
            && !self.versions.is_empty()
            && self.versions.iter().all(|version| version.files.is_empty())
    }

    /// Refuses more versions than a channel has; a server that lists more would never be done with.
    pub fn check_count(versions: usize) -> Result<()> {
        ensure!(
            versions <= MAX_VERSIONS,
            "{versions} versions to mirror, more than {MAX_VERSIONS}: keep, or a later minimum, takes fewer"
        );
        Ok(())
    }

    /// Notes that something failed, and of which version it is, if of one.
    pub fn problem(&mut self, version: Option<&str>, what: impl Into<String>, error: &anyhow::Error) {
        self.broken.extend(version.map(Into::into));
        self.problems.push(Problem { what: what.into(), error: format!("{error:#}") });
    }

    /// Notes that something is not mirrored.
    pub fn skip(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.skipped.push(Skipped { what: what.into(), why: why.into() });
    }
}

/// Without a slash at the end where `b` is nothing, unlike [`Path::join`].
pub fn join(a: &Path, b: &Path) -> PathBuf {
    a.iter().chain(b).collect()
}

impl Proof {
    /// Checks the file at `path`.
    pub fn check(&self, path: &Path, signature: Option<&[u8]>, keys: &Keys) -> Result<()> {
        match self {
            Self::Signature { sha256, .. } => {
                if let Some(expected) = sha256 {
                    check_sha256(path, *expected)?;
                }
                let file = File::open(path).map_err(SignatureError::Read)?;
                Ok(keys.verify(signature.ok_or(SignatureError::Missing)?, file)?)
            }
            Self::Listed(expected) => {
                let found = Sha512::of_file(path)?;
                ensure!(found == *expected, "sha512 mismatch: expected {}, got {}", expected.0, found.0);
                Ok(())
            }
            Self::Document(expected) => check_sha256(path, *expected),
        }
    }
}

fn check_sha256(path: &Path, expected: Digest) -> Result<()> {
    let (found, _) = File::open(path).and_then(Digest::of_reader).context("read failed")?;
    Ok(found.must_be(expected)?)
}

/// A SHA-512 digest, in lower-case hex: what `DIGESTS` files have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sha512(pub String);

impl Sha512 {
    fn of_file(path: &Path) -> Result<Self> {
        let mut file = File::open(path).context("read failed")?;
        let mut hash = Hash::new(&SHA512);
        let mut buf = vec![0; 1 << 18];
        loop {
            let n = file.read(&mut buf).context("read failed")?;
            if n == 0 {
                return Ok(Self(hex::encode(hash.finish())));
            }
            hash.update(&buf[..n]);
        }
    }
}
