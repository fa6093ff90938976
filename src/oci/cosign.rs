//! Keys as cosign and skopeo use them: ECDSA on P-256 with SHA-256.
//!
//! A private key is PEM, either PKCS #8 or SEC1 as openssl writes them, or encrypted as cosign and `skopeo
//! generate-sigstore-key` write it: JSON that names scrypt and its parameters, and NaCl's secretbox of the PKCS #8. The
//! nonce of a signature is made of what is signed (RFC 6979), so that the same image gets the same signature.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use crypto_secretbox::aead::{Aead, KeyInit};
use crypto_secretbox::{Key as BoxKey, Nonce, XSalsa20Poly1305};
use p256::SecretKey;
use p256::ecdsa::signature::{Signer, Verifier};
use p256::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p256::pkcs8::{DecodePrivateKey, DecodePublicKey};
use serde::Deserialize;

use crate::io::read_limited;

/// The longest file of a key that is read, in bytes.
const MAX_KEY: u64 = 64 << 10;

/// What the PEM of an encrypted key says it is: today's cosign and skopeo, and cosign before version 2.
const ENCRYPTED: [&str; 2] = ["ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY"];

/// The most memory that a key may make scrypt use, in bytes: cosign's take 64 MiB.
const MAX_SCRYPT: u64 = 256 << 20;

/// A key that signs.
#[derive(Clone)]
pub struct PrivateKey(SigningKey);

/// A key that checks signatures.
pub struct PublicKey(VerifyingKey);

#[derive(Deserialize)]
struct Encrypted {
    kdf: Kdf,
    cipher: Cipher,
    ciphertext: String,
}

#[derive(Deserialize)]
struct Kdf {
    name: String,
    params: Params,
    salt: String,
}

#[derive(Deserialize)]
struct Params {
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
}

#[derive(Deserialize)]
struct Cipher {
    name: String,
    nonce: String,
}

impl PrivateKey {
    /// Reads a key from a file; `passphrase` is for one that is encrypted.
    pub fn read(path: &Path, passphrase: Option<&str>) -> Result<Self> {
        let at = || format!("key {}", path.display());
        let bytes = read_limited(path, MAX_KEY).with_context(at)?;
        let text = std::str::from_utf8(&bytes).context("not PEM").with_context(at)?;
        Self::parse(text, passphrase).with_context(at)
    }

    fn parse(text: &str, passphrase: Option<&str>) -> Result<Self> {
        let key = if let Some(body) = ENCRYPTED.iter().find_map(|label| pem(text, label)) {
            let passphrase = passphrase.context("it is encrypted, and no passphrase is given")?;
            let plain = decrypt(&body?, passphrase)?;
            SecretKey::from_pkcs8_der(&plain).ok()
        } else if text.contains("BEGIN EC PRIVATE KEY") {
            // openssl writes the parameters of the curve before the key.
            let start = text.find("-----BEGIN EC PRIVATE KEY").unwrap_or_default();
            SecretKey::from_sec1_pem(&text[start..]).ok()
        } else {
            SecretKey::from_pkcs8_pem(text).ok()
        };
        Ok(Self(key.context("not an ECDSA key on P-256, in PEM")?.into()))
    }

    /// The signature of `payload`, in base64.
    pub fn sign(&self, payload: &[u8]) -> String {
        let signature: DerSignature = self.0.sign(payload);
        BASE64_STANDARD.encode(signature.as_bytes())
    }
}

impl PublicKey {
    /// Reads a key from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let at = || format!("key {}", path.display());
        let bytes = read_limited(path, MAX_KEY).with_context(at)?;
        let text = std::str::from_utf8(&bytes).context("not PEM").with_context(at)?;
        let key = VerifyingKey::from_public_key_pem(text).ok();
        key.map(Self).context("not a public ECDSA key on P-256, in PEM").with_context(at)
    }

    /// Checks that `signature`, in base64, is one of `payload` by this key.
    pub fn verify(&self, payload: &[u8], signature: &str) -> bool {
        let bytes = BASE64_STANDARD.decode(signature.trim()).ok();
        let signature = bytes.and_then(|bytes| DerSignature::from_bytes(&bytes).ok());
        signature.is_some_and(|signature| self.0.verify(payload, &signature).is_ok())
    }
}

/// What is between the lines of PEM of this label, if they are there.
fn pem(text: &str, label: &str) -> Option<Result<Vec<u8>>> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let (_, rest) = text.split_once(&begin)?;
    let body = rest.split_once(&end).map(|(body, _)| body.split_whitespace().collect::<String>());
    Some(body.context("PEM without an end").and_then(|body| Ok(BASE64_STANDARD.decode(body)?)))
}

fn decrypt(json: &[u8], passphrase: &str) -> Result<Vec<u8>> {
    let Encrypted { kdf, cipher, ciphertext } = serde_json::from_slice(json).context("encrypted key")?;
    if kdf.name != "scrypt" || cipher.name != "nacl/secretbox" {
        bail!("encrypted with {} and {}: only scrypt and nacl/secretbox are known", kdf.name, cipher.name);
    }
    let Params { n, r, p } = kdf.params;
    let memory = n.checked_mul(128).and_then(|m| m.checked_mul(r.into()));
    ensure!(
        n.is_power_of_two() && memory.is_some_and(|m| m <= MAX_SCRYPT) && p <= 16,
        "scrypt with N = {n}, r = {r}, p = {p}: more than is reasonable"
    );
    let params = scrypt::Params::new(n.ilog2() as u8, r, p, 32).ok().context("parameters of scrypt")?;
    let mut key = [0; 32];
    scrypt::scrypt(passphrase.as_bytes(), &BASE64_STANDARD.decode(kdf.salt)?, &params, &mut key)
        .ok()
        .context("scrypt")?;
    let nonce = BASE64_STANDARD.decode(cipher.nonce)?;
    ensure!(nonce.len() == 24, "a nonce of {} bytes", nonce.len());
    let cipher = XSalsa20Poly1305::new(BoxKey::from_slice(&key));
    let plain = cipher.decrypt(Nonce::from_slice(&nonce), &*BASE64_STANDARD.decode(ciphertext)?);
    plain.ok().context("the passphrase is wrong, or the key is damaged")
}
