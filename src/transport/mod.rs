//! Transports: the places that an image may be read from, all behind one small trait.
//!
//! ```text
//! docker://NAME   oci:DIR[:TAG]   oci-archive:FILE[:TAG]   docker-archive:FILE[:NAME]   dir:DIR
//! containers-storage:NAME   docker-daemon:NAME            (through skopeo, as all are with --skopeo)
//! ```
//!
//! The names are those of skopeo and podman. A place gives manifests and blobs; what they mean, which platform is
//! wanted and whether digests are right is up to those who read them.

mod dir;
mod docker;
mod docker_archive;
mod files;
mod layout;
mod skopeo;

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{Descriptor, ImageManifest, MediaType};
use serde_json::json;

use crate::bounded::shown;
use crate::digest::Digest;
use crate::registry::{Manifest, Options, Platform, Reference, is_index, parse_index};

pub use layout::{BLOBS, DEFAULT_TAG, INDEX, LAYOUT, blob_path, check_version};

/// The longest manifest, index or configuration that is read, in bytes: what registries take at most.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// How deep indexes may be nested in each other.
pub const MAX_NESTED: usize = 4;

/// The most layers of an image: ten times what those have that are cut into many on purpose.
pub const MAX_LAYERS: usize = 4096;

/// The most manifests of an image, with those in all of its indexes and those of what belongs to it: an index has some
/// twenty, and one that is signed and attested in all its parts some hundred.
pub const MAX_MANIFESTS: usize = 1000;

/// The most bytes of all these manifests together: all of them are in memory while an image is copied.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// A place that an image is read from.
pub trait Transport: Send + Sync {
    /// What the reference names.
    fn root(&self) -> Result<Manifest>;

    /// A manifest that an index names. Its digest has been checked.
    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest>;

    /// `len` bytes of a blob from `offset` on; there may come more, or less. They need not be right: that is checked by
    /// those who read them.
    fn part(&self, blob: &Descriptor, offset: u64, len: u64) -> Result<Box<dyn Read + Send>>;

    /// The name of the image in a registry, where it is in one.
    fn reference(&self) -> Option<&Reference> {
        None
    }

    /// The names of all images beside this one.
    fn tags(&self) -> Result<Vec<String>> {
        bail!("one image has no tags: expected a registry, or an OCI layout")
    }

    /// The image beside this one that has this name, if there is one.
    fn tagged(&self, _tag: &str) -> Result<Option<Box<dyn Transport>>> {
        Ok(None)
    }

    /// An index of what refers to the image `digest`, where the place keeps track of that itself.
    fn referrers(&self, _digest: Digest) -> Result<Option<Manifest>> {
        Ok(None)
    }

    /// An OpenPGP signature of the image `digest` that lies beside it, counted from 1, if there is one.
    fn signature(&self, _digest: Digest, _number: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Whether blobs are on this machine already, so that nothing is gained by keeping copies of them.
    fn local(&self) -> bool {
        true
    }
}

/// Opens the place that `reference` names. Without a transport it is a name in a registry, which is spoken to as
/// `options` say.
pub fn open(reference: &str, options: Options) -> Result<Box<dyn Transport>> {
    let named = || format!("image {reference}");
    let (transport, rest) = reference.split_once(':').unwrap_or(("", reference));
    let through_skopeo = options.skopeo || matches!(transport, "containers-storage" | "docker-daemon");
    let opened: Result<Box<dyn Transport>> = match transport {
        _ if through_skopeo => skopeo::Skopeo::open(reference, &options).map(|image| Box::new(image) as _),
        "oci" => layout::Layout::dir(rest).map(|layout| Box::new(layout) as _),
        "oci-archive" => layout::Layout::archive(rest, options.max_archive).map(|l| Box::new(l) as _),
        "docker-archive" => docker_archive::DockerArchive::open(rest, options.max_archive)
            .map(|archive| Box::new(archive) as _),
        "dir" => Ok(Box::new(dir::Dir::new(Path::new(rest)))),
        // Skopeo knows more; such a name must not be taken for that of a repository.
        "ostree" | "sif" | "tarball" => {
            Err(anyhow::anyhow!("cannot be read; skopeo copy takes it to oci:DIR"))
        }
        // What is no transport may be a registry with a port, or a name with a tag.
        _ => reference
            .parse::<Reference>()
            .map_err(Into::into)
            .map(|reference| Box::new(docker::Docker::new(options, reference)) as _),
    };
    opened.with_context(named)
}

/// An image for one platform.
#[derive(Debug)]
pub struct Image {
    /// The digest of its manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// What the image was picked from: its own manifest, or the index that names it.
    pub root: Manifest,
}

/// Finds the image for `wanted` at `transport`.
///
/// An image that stands alone is taken whatever it is for, unless `wanted` asks for something: what it is for shows in its
/// configuration, see [`Platform::check`].
pub fn image(transport: &dyn Transport, wanted: &Platform) -> Result<Image> {
    let root = transport.root()?;
    let mut document = root.clone();
    for _ in 0..MAX_NESTED {
        if !is_index(&document.media_type) {
            let manifest = manifest(&document)?;
            return Ok(Image { digest: document.digest, manifest, root });
        }
        let index = parse_index(&document.bytes)?;
        document = checked(transport, wanted.pick(&index)?)?;
    }
    bail!("indexes nested more than {MAX_NESTED} deep")
}

/// The index of what refers to an image, as registries answer; none of nothing.
fn referrers_index(manifests: &[Descriptor]) -> Result<Option<Manifest>> {
    if manifests.is_empty() {
        return Ok(None);
    }
    let media_type = MediaType::ImageIndex;
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    let bytes = serde_json::to_vec(&index)?;
    Ok(Some(Manifest { digest: Digest::of(&bytes), media_type, bytes }))
}

/// Reads a manifest that `descriptor` names, and checks that it is that one.
pub fn checked(transport: &dyn Transport, descriptor: &Descriptor) -> Result<Manifest> {
    let expected: Digest = descriptor.digest().to_string().parse()?;
    let document = transport.manifest(descriptor)?;
    Digest::of(&document.bytes).must_be(expected).context("manifest")?;
    // The index is what was asked for and checked; what a server says besides is not.
    Ok(Manifest { media_type: descriptor.media_type().clone(), ..document })
}

/// Reads the manifest of an image.
pub fn manifest(document: &Manifest) -> Result<ImageManifest> {
    let media_type = document.media_type.to_string();
    ensure!(
        document.media_type == MediaType::ImageManifest || media_type == DOCKER_MANIFEST,
        "a manifest of media type {}: expected {} or {DOCKER_MANIFEST}",
        shown(media_type.as_bytes()),
        MediaType::ImageManifest
    );
    parse(&document.bytes)
}

/// Reads the manifest of an image, whatever its media type is.
pub fn parse(bytes: &[u8]) -> Result<ImageManifest> {
    let manifest: ImageManifest = serde_json::from_slice(bytes).context("not an image manifest")?;
    let layers = manifest.layers().len();
    ensure!(layers <= MAX_LAYERS, "a manifest of {layers} layers: more than {MAX_LAYERS}");
    Ok(manifest)
}

/// Counts the manifests of an image.
#[derive(Debug, Default)]
pub struct Totals {
    manifests: usize,
    bytes: u64,
}

impl Totals {
    /// Counts one more. An error where that is too much.
    pub fn add(&mut self, document: &Manifest) -> Result<()> {
        self.manifests += 1;
        self.bytes += document.bytes.len() as u64;
        ensure!(self.manifests <= MAX_MANIFESTS, "more than {MAX_MANIFESTS} manifests belong to the image");
        ensure!(
            self.bytes <= MAX_MANIFEST_BYTES,
            "the manifests of the image have more than {MAX_MANIFEST_BYTES} bytes together"
        );
        Ok(())
    }
}

/// Docker's name of a manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A small blob, whole and checked.
pub fn document(transport: &dyn Transport, blob: &Descriptor) -> Result<Vec<u8>> {
    ensure!(blob.size() <= MAX_DOCUMENT, "{} bytes: more than {MAX_DOCUMENT}", blob.size());
    let mut bytes = Vec::new();
    transport.part(blob, 0, blob.size())?.take(blob.size() + 1).read_to_end(&mut bytes)?;
    let expected: Digest = blob.digest().to_string().parse()?;
    Digest::of(&bytes).must_be(expected)?;
    Ok(bytes)
}

/// The file of an OpenPGP signature beside an image, as skopeo names it in a `dir:` for one image of several.
pub fn signature_file(digest: Digest, number: usize) -> String {
    format!("{digest}.signature-{number}")
}

/// Whether a tag is one of those under which something is found that belongs to an image, such as its signatures.
pub fn belongs(tag: &str) -> bool {
    tag.strip_prefix("sha256-")
        .is_some_and(|rest| rest.get(..64).is_some_and(|hex| hex.parse::<Digest>().is_ok()))
}

/// A digest as `oci_spec` has it.
pub fn oci_digest(digest: Digest) -> Result<oci_spec::image::Digest> {
    Ok(digest.oci().parse()?)
}

/// What a manifest says it is, or what its content shows that it is.
fn media_type_of(bytes: &[u8]) -> Result<MediaType> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Any {
        media_type: Option<MediaType>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let any: Any = serde_json::from_slice(bytes).context("not a manifest")?;
    Ok(match (any.media_type, any.manifests) {
        (Some(media_type), _) => media_type,
        (None, Some(_)) => MediaType::ImageIndex,
        (None, None) => MediaType::ImageManifest,
    })
}
