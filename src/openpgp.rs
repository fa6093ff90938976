//! OpenPGP: checks the detached signatures that upstream makes of what it publishes; makes and checks signed messages,
//! which is what signatures of container images are.
//!
//! A key counts as it was when the signature was made: one that has expired since, or has been retired (revoked as
//! superseded or no longer used), is good for what it signed before. One revoked for any other reason, such as being
//! compromised or none given, is good for nothing, because whoever holds it can sign with any date.
//!
//! Algorithms are judged by today's standard policy of sequoia, whatever date a signature claims: no MD5 and no SHA-1,
//! neither in the signature nor in what binds a key, and no RSA below 2048 bits. All signed streams have used RSA 4096
//! and SHA-256 for many years, so that there is no old signature to make an exception for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::{DeflateDecoder, ZlibDecoder};
use sequoia_openpgp as openpgp;

use openpgp::cert::amalgamation::ValidAmalgamation;
use openpgp::cert::{Cert, CertParser};
use openpgp::crypto::KeyPair;
use openpgp::parse::stream::{
    DetachedVerifierBuilder, MessageLayer, MessageStructure, VerificationError, VerificationHelper,
    VerifierBuilder,
};
use openpgp::parse::{PacketParser, PacketParserResult, Parse};
use openpgp::policy::StandardPolicy;
use openpgp::serialize::stream::{LiteralWriter, Message};
use openpgp::types::{CompressionAlgorithm, PublicKeyAlgorithm, RevocationStatus};
use openpgp::{Fingerprint, KeyHandle, Packet};

/// The longest signature that is read, in bytes. One of RSA 4096 has 566.
pub const MAX_SIGNATURE: u64 = 64 << 10;

/// The longest file of keys that is read, in bytes. A key of Fedora has 1.7 KB; a whole keyring of people can be large.
const MAX_KEYS: u64 = 16 << 20;

/// Where an armored key starts.
const ARMOR: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";

/// Why a signature does not vouch for a file.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// There is no signature at all.
    #[error("there is no signature")]
    Missing,
    /// It was made by a key that is not among the given.
    #[error("signed by an unknown key: {0}")]
    UnknownKey(String),
    /// It is not a signature of these bytes, or the key could not sign when it was made.
    #[error("bad signature: {0}")]
    Bad(String),
    /// It was made by a key that has been revoked.
    #[error("signed by a revoked key: {0}")]
    Revoked(String),
    /// What was signed cannot be read.
    #[error("read failed")]
    Read(#[source] std::io::Error),
}

/// Keys that may sign.
#[derive(Clone, Debug, Default)]
pub struct Keys(BTreeMap<Fingerprint, Cert>);

impl Keys {
    /// Reads keys from a file, or from all files of a directory but hidden ones. A directory may hold text beside keys,
    /// such as a README, which is skipped; a damaged key is an error, as a file without a key is.
    pub fn read(&mut self, path: &Path) -> Result<()> {
        let mut files = vec![path.to_path_buf()];
        let dir = path.is_dir();
        if dir {
            let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            files = entries
                .with_context(|| format!("keys {}", path.display()))?
                .iter()
                .map(|e| e.path())
                .collect();
            files.retain(|f| {
                f.is_file() && !f.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))
            });
            files.sort();
            ensure!(!files.is_empty(), "keys {}: an empty directory", path.display());
        }
        let mut any = false;
        for file in files {
            let at = || format!("keys {}", file.display());
            let bytes = crate::io::read_limited(&file, MAX_KEYS).with_context(at)?;
            if dir && is_other_text(&bytes) {
                tracing::warn!("{}: skipped: no OpenPGP key is in it", at());
                continue;
            }
            self.add(&bytes).with_context(at)?;
            any = true;
        }
        ensure!(any, "keys {}: a directory without an OpenPGP key", path.display());
        Ok(())
    }

    /// Adds the keys in `bytes`: binary, or armored, also several blocks one after the other.
    pub fn add(&mut self, bytes: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(bytes).ok().filter(|text| text.contains(ARMOR));
        let starts = text.map(|text| text.match_indices(ARMOR).map(|(start, _)| start).collect());
        let starts: Vec<_> = starts.unwrap_or_else(|| vec![0]);
        let mut any = false;
        for (i, &start) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(bytes.len());
            for cert in CertParser::from_bytes(&bytes[start..end])? {
                self.insert(cert.context("not an OpenPGP key")?)?;
                any = true;
            }
        }
        ensure!(any, "no OpenPGP key");
        Ok(())
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        other.0.values().cloned().try_for_each(|cert| self.insert(cert))
    }

    fn insert(&mut self, mut cert: Cert) -> Result<()> {
        // Of two copies of a key each may have a revocation, or a subkey, that the other has not.
        if let Some(known) = self.0.remove(&cert.fingerprint()) {
            cert = known.merge_public(cert)?;
        }
        self.0.insert(cert.fingerprint(), cert);
        Ok(())
    }

    /// Whether there is not a single key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The fingerprints of the keys, in upper-case hex, sorted.
    pub fn fingerprints(&self) -> impl Iterator<Item = String> {
        self.0.keys().map(ToString::to_string)
    }

    /// Checks that `signature`, binary or armored, is one of all that `data` gives, made by one of these keys.
    pub fn verify(&self, signature: &[u8], data: impl Read + Send + Sync) -> Result<(), SignatureError> {
        let policy = StandardPolicy::new();
        let verifier = DetachedVerifierBuilder::from_bytes(signature)
            .and_then(|v| v.with_policy(&policy, None, Helper(self)))
            .map_err(|e| SignatureError::Bad(format!("not a signature: {e}")));
        verifier?.verify_reader(data).map_err(|e| match e.downcast::<SignatureError>() {
            Ok(e) => e,
            Err(e) => match e.downcast::<std::io::Error>() {
                Ok(e) => SignatureError::Read(e),
                Err(e) => SignatureError::Bad(e.to_string()),
            },
        })
    }
}

impl Keys {
    /// Gives the content of a signed message of at most [`MAX_SIGNATURE`] bytes that was made by one of these keys. The
    /// message may be compressed, as GnuPG makes it. Nothing of it is believed before its end has been read.
    pub fn open(&self, message: &[u8]) -> Result<Vec<u8>, SignatureError> {
        let bad = |e: anyhow::Error| match e.downcast::<SignatureError>() {
            Ok(e) => e,
            Err(e) => SignatureError::Bad(format!("not a signed message: {e:#}")),
        };
        let message = decompressed(message).map_err(bad)?;
        let policy = StandardPolicy::new();
        let mut verifier = VerifierBuilder::from_bytes(&message[..])
            // The whole message is held until its signature is checked.
            .map(|v| v.buffer_size(MAX_SIGNATURE as usize))
            .and_then(|v| v.with_policy(&policy, None, Helper(self)))
            .map_err(bad)?;
        let mut content = Vec::new();
        verifier
            .read_to_end(&mut content)
            // What the helper says is inside.
            .map_err(|e| e.downcast::<SignatureError>().unwrap_or_else(|e| bad(e.into())))?;
        if !verifier.message_processed() {
            return Err(SignatureError::Bad("not a signed message: it does not end".into()));
        }
        Ok(content)
    }
}

/// Whether a file beside keys is no key: text without one.
fn is_other_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| !text.contains(ARMOR))
}

/// A message of at most [`MAX_SIGNATURE`] bytes, taken out of the compressed packet that it may be in.
///
/// Sequoia is built without compression, so that it decompresses nothing itself: a packet that is compressed any deeper
/// is refused, and no message becomes longer than this allows.
fn decompressed(message: &[u8]) -> Result<Cow<'_, [u8]>> {
    let limit = || format!("more than {MAX_SIGNATURE} bytes");
    ensure!(message.len() as u64 <= MAX_SIGNATURE, limit());
    let PacketParserResult::Some(mut packet) = PacketParser::from_bytes(message)? else {
        bail!("it is empty");
    };
    let Packet::CompressedData(compressed) = &packet.packet else { return Ok(message.into()) };
    let algorithm = compressed.algo();
    let mut body = Vec::new();
    packet.read_to_end(&mut body)?;
    let (_, after) = packet.next()?;
    ensure!(after.is_eof(), "there is something behind the compressed packet");
    let mut plain = Vec::new();
    let rest = match algorithm {
        CompressionAlgorithm::Zip => inflate(DeflateDecoder::new(&body[..]), &mut plain)?.into_inner(),
        CompressionAlgorithm::Zlib => inflate(ZlibDecoder::new(&body[..]), &mut plain)?.into_inner(),
        other => bail!("compressed with {other}: expected ZIP or ZLIB, which gpg uses by default"),
    };
    ensure!(plain.len() as u64 <= MAX_SIGNATURE, limit());
    ensure!(rest.is_empty(), "there is something behind the compressed data");
    Ok(plain.into())
}

/// Reads what `from` gives, and one byte more than a message may have at most. Gives `from` back.
fn inflate<R: Read>(from: R, into: &mut Vec<u8>) -> Result<R> {
    let mut from = from.take(MAX_SIGNATURE + 1);
    from.read_to_end(into).context("decompress failed")?;
    Ok(from.into_inner())
}

/// A key that signs.
#[derive(Clone)]
pub struct Signer(KeyPair);

impl Signer {
    /// Reads a secret key from a file, binary or armored; `passphrase` is for one that is encrypted. Of a key with
    /// several that may sign, the newest is taken, as in gpg.
    pub fn read(path: &Path, passphrase: Option<&str>) -> Result<Self> {
        let at = || format!("key {}", path.display());
        let bytes = crate::io::read_limited(path, MAX_KEYS).with_context(at)?;
        let cert = Cert::from_bytes(&bytes).with_context(at)?;
        Self::pick(&cert, passphrase).with_context(at)
    }

    /// Whether it is an RSA key. Sequoia's backend computes with those in a time that depends on the key.
    pub fn is_rsa(&self) -> bool {
        #[allow(deprecated, reason = "keys for signing alone are still around")]
        let rsa = [PublicKeyAlgorithm::RSAEncryptSign, PublicKeyAlgorithm::RSASign];
        rsa.contains(&self.0.public().pk_algo())
    }

    fn pick(cert: &Cert, passphrase: Option<&str>) -> Result<Self> {
        let policy = StandardPolicy::new();
        let keys = cert.keys().with_policy(&policy, None).supported().alive().revoked(false).for_signing();
        let key = keys.secret().max_by_key(|key| key.key().creation_time());
        let mut key = key.context("no secret key in it that may sign now")?.key().clone();
        if key.secret().is_encrypted() {
            let passphrase = passphrase.context("it is encrypted, and no passphrase is given")?;
            key = key.decrypt_secret(&passphrase.into()).ok().context("the passphrase is wrong")?;
        }
        Ok(Self(key.into_keypair()?))
    }

    /// The fingerprint of the key that signs.
    pub fn fingerprint(&self) -> String {
        self.0.public().fingerprint().to_hex()
    }

    /// A signed message with this content.
    pub fn sign(&self, content: &[u8]) -> Result<Vec<u8>> {
        let mut signed = Vec::new();
        let message = openpgp::serialize::stream::Signer::new(Message::new(&mut signed), self.0.clone())?;
        let mut message = LiteralWriter::new(message.build()?).build()?;
        message.write_all(content)?;
        message.finalize()?;
        Ok(signed)
    }

    /// A detached signature of `content`, binary.
    pub fn detach(&self, content: &[u8]) -> Result<Vec<u8>> {
        let mut signature = Vec::new();
        let message = openpgp::serialize::stream::Signer::new(Message::new(&mut signature), self.0.clone())?;
        let mut message = message.detached().build()?;
        message.write_all(content)?;
        message.finalize()?;
        Ok(signature)
    }
}

struct Helper<'a>(&'a Keys);

impl VerificationHelper for Helper<'_> {
    fn get_certs(&mut self, _ids: &[KeyHandle]) -> openpgp::Result<Vec<Cert>> {
        Ok(self.0.0.values().cloned().collect())
    }

    /// One good signature is enough. Without, the error is that of the most telling: a key of ours that is revoked
    /// says more than a signature that does not fit, and that more than a stranger's.
    fn check(&mut self, structure: MessageStructure<'_>) -> openpgp::Result<()> {
        let (mut revoked, mut bad, mut unknown) = (None, None, Vec::new());
        for layer in structure {
            let MessageLayer::SignatureGroup { results } = layer else {
                bail!("a layer that is no signature")
            };
            for result in results {
                match result {
                    Ok(_) => return Ok(()),
                    Err(VerificationError::MissingKey { sig }) => {
                        unknown.extend(sig.get_issuers().first().map(ToString::to_string));
                    }
                    Err(VerificationError::BadKey { ka, error, .. }) => {
                        let key = ka.cert().fingerprint();
                        let states = [ka.valid_cert().revocation_status(), ka.revocation_status()];
                        if states.iter().any(|s| matches!(s, RevocationStatus::Revoked(_))) {
                            revoked = Some(key.to_string());
                        } else {
                            bad = Some(format!("key {key} could not sign when it was made: {error:#}"));
                        }
                    }
                    Err(VerificationError::UnboundKey { cert, error, .. }) => {
                        bad = Some(format!(
                            "key {} could not sign when it was made: {error:#}",
                            cert.fingerprint()
                        ));
                    }
                    Err(
                        VerificationError::BadSignature { error, .. }
                        | VerificationError::MalformedSignature { error, .. },
                    ) => bad = Some(format!("{error:#}")),
                    Err(e) => bad = Some(e.to_string()),
                }
            }
        }
        Err(match (revoked, bad) {
            (Some(key), _) => SignatureError::Revoked(key),
            (None, Some(why)) => SignatureError::Bad(why),
            (None, None) if unknown.is_empty() => SignatureError::Bad("not a signature".into()),
            (None, None) => SignatureError::UnknownKey(unknown.join(", ")),
        }
        .into())
    }
}
