//! Digests. SHA-256 is the hash of the stream metadata, of the store and of container images.
//!
//! BLAKE3 stands beside it for what comes out: an artifact is proven by its SHA-256 digest when it is dehydrated, and both
//! are recorded. Whoever has the record checks the bytes with BLAKE3 as well as with SHA-256, and on a processor without
//! instructions for SHA-256 it is ten times as fast, while everything else in making a disk is faster than SHA-256.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A SHA-256 digest. Prints as 64 lower-case hex digits, the form of the stream metadata; [`Digest::oci`] gives the
/// `sha256:…` form of container images.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hash = Context::new(&SHA256);
        hash.update(bytes);
        Self::from_hash(hash)
    }

    fn from_hash(hash: Context) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hash.finish().as_ref());
        Self(bytes)
    }

    /// The digest of all that `reader` gives, and how many bytes that was.
    pub fn of_reader(mut reader: impl Read) -> io::Result<(Self, u64)> {
        let mut hasher = Hasher::new(io::sink());
        let mut buf = vec![0; 1 << 18];
        loop {
            match reader.read(&mut buf) {
                Ok(0) => return Ok(hasher.finish()),
                Ok(n) => hasher.write_all(&buf[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// An error unless this digest, which was found, is the one that was expected.
    pub fn must_be(self, expected: Self) -> Result<(), Mismatch> {
        if self == expected { Ok(()) } else { Err(Mismatch { expected, found: self }) }
    }

    /// `sha256:…`, as container images write it.
    pub fn oci(&self) -> String {
        format!("sha256:{self}")
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes that are not the ones they should be.
#[derive(Debug, thiserror::Error)]
#[error("sha256 mismatch: expected {expected}, got {found}")]
pub struct Mismatch {
    expected: Digest,
    found: Digest,
}

impl From<Mismatch> for io::Error {
    fn from(mismatch: Mismatch) -> Self {
        Self::new(io::ErrorKind::InvalidData, mismatch)
    }
}

/// A text that is not 64 hex digits, with or without `sha256:` before them.
#[derive(Debug, thiserror::Error)]
#[error("not a sha256 digest: {0:?}")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;
    fn from_str(s: &str) -> Result<Self, NotADigest> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(s.strip_prefix("sha256:").unwrap_or(s), &mut bytes)
            .map_err(|_| NotADigest(s.chars().take(100).collect()))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A BLAKE3 digest. Prints as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Blake3(Digest);

impl Blake3 {
    /// The digest of what `hasher` was given.
    pub fn from_hasher(hasher: &blake3::Hasher) -> Self {
        Self(Digest(hasher.finalize().into()))
    }
}

impl fmt::Display for Blake3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A writer that hashes and counts what passes through it.
pub struct Hasher<W> {
    inner: W,
    hash: Context,
    len: u64,
}

impl<W: Write> Hasher<W> {
    /// Hashes what is written on the way to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hash: Context::new(&SHA256), len: 0 }
    }

    /// The digest and the length of all that was written.
    pub fn finish(self) -> (Digest, u64) {
        let (_, digest, len) = self.into_parts();
        (digest, len)
    }

    /// The writer beneath, and the digest and the length of all that was written.
    pub fn into_parts(self) -> (W, Digest, u64) {
        (self.inner, Digest::from_hash(self.hash), self.len)
    }
}

impl<W: Write> Write for Hasher<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hash.update(&buf[..n]);
        self.len += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
