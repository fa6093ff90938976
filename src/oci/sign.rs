//! Signatures of images: what is signed, and where it is kept.
//!
//! What is signed is a small JSON document that names the image and the digest of its manifest, or of the index of its
//! manifests; that names all layers by digest, and so everything in the image. It is kept
//!
//! * as an OpenPGP message, in a *lookaside* tree, `REPOSITORY@sha256=HEX/signature-1`
//!   ([simple signing](https://github.com/containers/image/blob/main/docs/containers-signature.5.md)), which podman and
//!   skopeo find through `registries.d`, and which any web server can serve; and beside an image in a layout, as
//!   `HEX.signature-1`;
//! * with a signature of a plain key beside it, as an image of its own that is tagged `sha256-HEX.sig` in the same
//!   repository or layout, as [cosign](https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md) does.
//!
//! Of an image for several architectures the index is signed, and each image in it: podman and skopeo look for a
//! signature of the one that they pick.
//!
//! The same image, name and key make the same cosign signature; an OpenPGP signature says when it was made.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use oci_spec::image::{Descriptor, ImageManifest, ImageManifestBuilder, MediaType, SCHEMA_VERSION};
use serde::Deserialize;
use serde_json::json;

use super::cosign::{PrivateKey, PublicKey};
use super::json;
use super::layout::{Staging, to_json};
use crate::digest::Digest;
use crate::http::{Http, Retry};
use crate::io::read_limited;
use crate::openpgp::{Keys, MAX_SIGNATURE, Signer};
use crate::registry::Reference;
use crate::transport::{self, Transport, signature_file};

/// The media type of what cosign signs.
const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// The annotation that holds cosign's signature.
const ANNOTATION_SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// What the document says it is, in an OpenPGP message and with cosign.
const TYPES: [&str; 2] = ["atomic container signature", "cosign container image signature"];

/// What a cosign signature begins with that skopeo keeps in a file of its own, as in a `dir:`. An OpenPGP message never
/// begins with a zero.
const ATTACHED: &[u8] = b"\0sigstore-json\n";

/// The most signatures of one image that are looked at.
const MAX_SIGNATURES: usize = 128;

/// The longest document of a signature, in bytes.
const MAX_PAYLOAD: u64 = 64 << 10;

/// What signs an image.
#[derive(Clone, Default)]
pub struct Signing {
    /// Makes a simple-signing signature.
    pub openpgp: Option<Signer>,
    /// Makes a cosign signature.
    pub cosign: Option<PrivateKey>,
    /// The name that the signature gives the image, where that is not the one it is pushed to.
    pub identity: Option<Reference>,
    /// The root of the lookaside tree.
    pub lookaside: PathBuf,
}

/// What an image must be signed with.
#[derive(Default)]
pub struct Policy {
    /// One of these OpenPGP keys, where there are any.
    pub keys: Keys,
    /// This key, where there is one.
    pub cosign: Option<PublicKey>,
    /// The root of the lookaside tree: a directory, or a URL.
    pub lookaside: String,
    /// The name that the signature gives the image, where that is not the one it is read by.
    pub identity: Option<Reference>,
}

impl Signing {
    /// Whether there is nothing to sign with.
    pub fn is_empty(&self) -> bool {
        self.openpgp.is_none() && self.cosign.is_none()
    }
}

/// The document that names an image and its digest.
fn payload(kind: &str, identity: &Reference, digest: Digest) -> Result<Vec<u8>> {
    to_json(&json!({
        "critical": {
            "identity": { "docker-reference": identity.to_string() },
            "image": { "docker-manifest-digest": digest.oci() },
            "type": kind,
        },
        "optional": { "creator": concat!("rehydrator ", env!("CARGO_PKG_VERSION")) },
    }))
}

/// Checks that a document, whose signature is good, is about this image: the same digest, and the same name. Where the
/// image is read by digest, the repository must be the same.
fn check(payload: &[u8], kind: &str, identity: Option<&Reference>, digest: Digest) -> Result<()> {
    let payload = json::unique(payload).context("not JSON")?;
    let critical = &payload["critical"];
    ensure!(critical["type"] == kind, "type {}: expected {kind:?}", critical["type"]);
    let signed = &critical["image"]["docker-manifest-digest"];
    ensure!(*signed == digest.oci(), "it is of {signed}, not of {}", digest.oci());
    if let Some(identity) = identity {
        let signed = critical["identity"]["docker-reference"].as_str().unwrap_or_default();
        let same = signed.parse::<Reference>().is_ok_and(|signed| {
            signed.name() == identity.name() && (identity.tag().is_none() || signed.tag() == identity.tag())
        });
        ensure!(same, "it is of {signed:?}, not of {identity}");
    }
    Ok(())
}

/// The tag of the image that holds the cosign signatures of an image.
pub fn cosign_tag(digest: Digest) -> String {
    format!("sha256-{digest}.sig")
}

/// Where the simple-signing signatures of an image are, from the root of a lookaside tree.
fn lookaside_path(name: &Reference, digest: Digest, number: usize) -> String {
    format!("{}@sha256={digest}/signature-{number}", name.repository())
}

/// Signs the image `digest`, and writes the signature into the lookaside tree, and beside the image in the layout
/// `layout`, where it is in one. Returns where it is.
pub fn simple_sign(
    signing: &Signing,
    identity: &Reference,
    digest: Digest,
    layout: Option<&Path>,
) -> Result<Option<PathBuf>> {
    let Some(signer) = &signing.openpgp else { return Ok(None) };
    let signature = signer.sign(&payload(TYPES[0], identity, digest)?)?;
    if let Some(layout) = layout {
        add(&signature, |number| layout.join(signature_file(digest, number)))?;
    }
    add(&signature, |number| signing.lookaside.join(lookaside_path(identity, digest, number))).map(Some)
}

/// Writes a signature to the first path that is free: those of others, and earlier ones, stay.
fn add(signature: &[u8], path: impl Fn(usize) -> PathBuf) -> Result<PathBuf> {
    let free = (1..=MAX_SIGNATURES).map(&path).find(|path| !path.exists());
    let path = free.with_context(|| format!("{}: no more signatures", path(MAX_SIGNATURES).display()))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).with_context(|| path.display().to_string())?;
    crate::staging::write_file(&path, signature)?;
    Ok(path)
}

/// Signs the image `digest` with a plain key under each of its names, and adds the image that holds the signatures to
/// `staging`, as well as its configuration and layers. `earlier` is such an image that has the tag now.
pub fn cosign(
    key: &PrivateKey,
    identities: &[Reference],
    digest: Digest,
    staging: &Staging,
    earlier: Option<ImageManifest>,
) -> Result<(Descriptor, Vec<Descriptor>)> {
    let (mut layers, mut blobs) =
        (earlier.map(|image| image.layers().clone()).unwrap_or_default(), Vec::new());
    for identity in identities {
        let payload = payload(TYPES[1], identity, digest)?;
        let signature = key.sign(&payload);
        let (mut layer, ()) =
            staging.blob(MediaType::Other(PAYLOAD.into()), |out| Ok(out.write_all(&payload)?))?;
        layer.set_annotations(Some(HashMap::from([(ANNOTATION_SIGNATURE.to_string(), signature)])));
        layers.retain(|other| other != &layer);
        layers.push(layer.clone());
        blobs.push(layer);
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest().to_string()).collect();
    // As cosign writes it: an image of nothing.
    let never = "0001-01-01T00:00:00Z";
    let config = staging.document(
        MediaType::ImageConfig,
        &json!({ "architecture": "", "config": {}, "created": never, "history": [{ "created": never }],
            "os": "", "rootfs": { "type": "layers", "diff_ids": diff_ids } }),
    )?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(config.clone())
        .layers(layers)
        .build()?;
    let manifest = staging.document(MediaType::ImageManifest, &manifest)?;
    blobs.push(config);
    Ok((manifest, blobs))
}

impl Policy {
    /// Whether nothing is demanded.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.cosign.is_none()
    }

    /// Checks the signatures of the image `digest` at `transport`, which is called `name` in messages.
    pub fn check(&self, name: &str, transport: &dyn Transport, digest: Digest) -> Result<()> {
        let at = || format!("{name}: {}", digest.oci());
        let identity = self.identity.as_ref().or(transport.reference());
        if !self.keys.is_empty() {
            self.simple(transport, identity, digest).with_context(at)?;
        }
        if let Some(key) = &self.cosign {
            cosigned(transport, key, identity, digest).with_context(at)?;
        }
        Ok(())
    }

    /// Looks for a good signature beside the image, and in the lookaside tree.
    fn simple(&self, transport: &dyn Transport, identity: Option<&Reference>, digest: Digest) -> Result<()> {
        let mut last = None;
        let mut good = |number: usize, signature: &[u8]| {
            let payload = self.keys.open(signature).map_err(anyhow::Error::from);
            let good = payload.and_then(|payload| check(&payload, TYPES[0], identity, digest));
            good.map_err(|e| last = Some(e.context(format!("signature {number}")))).is_ok()
        };
        for number in 1..=MAX_SIGNATURES {
            let Some(signature) = transport.signature(digest, number)? else { break };
            if !signature.starts_with(ATTACHED) && good(number, &signature) {
                return Ok(());
            }
        }
        for number in 1..=MAX_SIGNATURES {
            let Some(name) = identity else { break };
            let Some(signature) = self.fetch(&lookaside_path(name, digest, number))? else { break };
            if good(number, &signature) {
                return Ok(());
            }
        }
        Err(last.unwrap_or_else(|| match identity {
            Some(name) => {
                anyhow::anyhow!("no signature in {}/{}", self.lookaside, lookaside_path(name, digest, 1))
            }
            None => anyhow::anyhow!(
                "no signature beside it, and no name to look for one elsewhere: --identity gives one"
            ),
        }))
    }

    fn fetch(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let root = self.lookaside.trim_end_matches('/');
        if root.starts_with("http://") || root.starts_with("https://") {
            let url = format!("{root}/{}", path.replace('@', "%40").replace('=', "%3D"));
            return Ok(Http::new(Retry::default())?.find(&url, MAX_SIGNATURE)?);
        }
        let path = Path::new(root.strip_prefix("file://").unwrap_or(root)).join(path);
        match read_limited(&path, MAX_SIGNATURE) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| path.display().to_string()),
        }
    }
}

/// A cosign signature in a file of its own, as containers/image writes it behind [`ATTACHED`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attached {
    mime_type: String,
    /// In base64.
    payload: String,
    annotations: HashMap<String, String>,
}

impl Attached {
    /// What was signed, and the signature.
    fn parse(json: &[u8]) -> Result<(Vec<u8>, String)> {
        let json = json::unique(json).context("not a cosign signature")?;
        let mut attached: Self = serde_json::from_value(json).context("not a cosign signature")?;
        let kind = attached.mime_type;
        ensure!(kind == PAYLOAD, "a payload of media type {kind:?}: expected {PAYLOAD:?}");
        let signature = attached.annotations.remove(ANNOTATION_SIGNATURE);
        let payload = BASE64_STANDARD.decode(attached.payload).context("payload")?;
        Ok((payload, signature.with_context(|| format!("no {ANNOTATION_SIGNATURE}"))?))
    }
}

/// Looks for a good signature beside the image `digest`, and in the image of its signatures.
fn cosigned(
    transport: &dyn Transport,
    key: &PublicKey,
    identity: Option<&Reference>,
    digest: Digest,
) -> Result<()> {
    let mut last = None;
    let mut good = |number: usize, signed: Result<(Vec<u8>, String)>| {
        let good = signed.and_then(|(payload, signature)| {
            ensure!(key.verify(&payload, &signature), "not made with this key");
            check(&payload, TYPES[1], identity, digest)
        });
        good.map_err(|e| last = Some(e.context(format!("signature {number}")))).is_ok()
    };
    for number in 1..=MAX_SIGNATURES {
        let Some(signature) = transport.signature(digest, number)? else { break };
        if let Some(json) = signature.strip_prefix(ATTACHED)
            && good(number, Attached::parse(json))
        {
            return Ok(());
        }
    }
    let tag = cosign_tag(digest);
    let mut none = format!("no signature: there is no {tag}");
    if let Some(image) = transport.tagged(&tag)? {
        none = format!("no signature in {tag}");
        let signatures = image.root()?;
        let manifest: ImageManifest = transport::parse(&signatures.bytes).with_context(|| tag.clone())?;
        for (number, layer) in manifest.layers().iter().enumerate().take(MAX_SIGNATURES) {
            let signature = layer.annotations().as_ref().and_then(|a| a.get(ANNOTATION_SIGNATURE));
            let Some(signature) = signature else { continue };
            let payload = || {
                ensure!(layer.size() <= MAX_PAYLOAD, "longer than {MAX_PAYLOAD} bytes");
                transport::document(&*image, layer)
            };
            if good(number + 1, payload().map(|payload| (payload, signature.clone()))) {
                return Ok(());
            }
        }
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!(none)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_says_two_things() {
        let (digest, name) = (Digest::of(b"image"), "h.io/app:1".parse().unwrap());
        for kind in TYPES {
            let good = String::from_utf8(payload(kind, &name, digest).unwrap()).unwrap();
            check(good.as_bytes(), kind, Some(&name), digest).unwrap();
            for key in ["docker-manifest-digest", "docker-reference", "type", "critical"] {
                let twice = good.replacen(&format!("\"{key}\":"), &format!("\"{key}\": 1, \"{key}\":"), 1);
                assert_ne!(twice, good);
                let e = check(twice.as_bytes(), kind, Some(&name), digest).unwrap_err();
                assert!(format!("{e:#}").starts_with(&format!("not JSON: the key \"{key}\" twice")), "{e:#}");
            }
        }
    }
}
