//! `oci:DIR[:TAG]` and `oci-archive:FILE[:TAG]`: OCI image layouts. `oci/layout.rs` writes them.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, ImageIndex, MediaType};
use serde::Deserialize;
use serde_json::Value;

use super::files::Files;
use super::{MAX_DOCUMENT, Manifest, Totals, Transport, belongs, signature_file};
use crate::bounded::names;
use crate::digest::Digest;
use crate::openpgp::MAX_SIGNATURE;
use crate::registry::parse_index;

/// The file that marks a layout and says its version.
pub const LAYOUT: &str = "oci-layout";

/// The file that names the images of a layout.
pub const INDEX: &str = "index.json";

/// Where the blobs of a layout are.
pub const BLOBS: &str = "blobs/sha256";

/// The tag where none is given.
pub const DEFAULT_TAG: &str = "latest";

/// Where a blob is in a layout.
pub fn blob_path(digest: Digest) -> String {
    format!("{BLOBS}/{digest}")
}

/// Checks the content of [`LAYOUT`].
pub fn check_version(layout: &Value) -> Result<()> {
    let version = &layout["imageLayoutVersion"];
    ensure!(version == "1.0.0", "OCI image layout version {version}: expected \"1.0.0\"");
    Ok(())
}

/// An image in a layout.
pub(super) struct Layout {
    files: Arc<Files>,
    /// Which one, where several are.
    tag: Option<String>,
    /// By the digest of an image: the manifests of the index that refer to it. Read when they are needed.
    referrers: Arc<OnceLock<HashMap<Digest, Vec<Descriptor>>>>,
}

/// A manifest, as far as it refers to another.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referrer {
    subject: Option<Descriptor>,
    artifact_type: Option<MediaType>,
    config: Option<Descriptor>,
    annotations: Option<HashMap<String, String>>,
}

impl Layout {
    pub(super) fn dir(reference: &str) -> Result<Self> {
        let (path, tag) = split(reference);
        Self::new(Files::Dir(path.into()), tag)
    }

    pub(super) fn archive(reference: &str, max: u64) -> Result<Self> {
        let (path, tag) = split(reference);
        Self::new(Files::archive(Path::new(path), max)?, tag)
    }

    fn new(files: Files, tag: Option<&str>) -> Result<Self> {
        let version =
            serde_json::from_slice(&files.read(LAYOUT, MAX_DOCUMENT).context("not an OCI image layout")?);
        check_version(&version.context(LAYOUT)?)?;
        Ok(Self { files: Arc::new(files), tag: tag.map(Into::into), referrers: Arc::default() })
    }
}

/// The name of an image in a layout.
fn name(image: &Descriptor) -> Option<String> {
    image.annotations().as_ref()?.get(ANNOTATION_REF_NAME).cloned()
}

/// Path and tag. As in skopeo, the path ends at the first colon.
pub(super) fn split(reference: &str) -> (&str, Option<&str>) {
    reference.split_once(':').map_or((reference, None), |(path, tag)| (path, Some(tag)))
}

impl Layout {
    fn index(&self) -> Result<ImageIndex> {
        parse_index(&self.files.read(INDEX, MAX_DOCUMENT)?).context(INDEX)
    }

    /// The manifests without a tag that have a `subject`, as oras and zot write them.
    fn all_referrers(&self) -> Result<&HashMap<Digest, Vec<Descriptor>>> {
        if let Some(known) = self.referrers.get() {
            return Ok(known);
        }
        let mut found: HashMap<_, Vec<_>> = HashMap::new();
        let mut totals = Totals::default();
        let index = self.index()?;
        for entry in index.manifests().iter().filter(|entry| name(entry).is_none()) {
            let document = super::checked(self, entry)?;
            totals.add(&document)?;
            // What is something else refers to nothing.
            let Ok(referrer) = serde_json::from_slice::<Referrer>(&document.bytes) else { continue };
            let Some(subject) = referrer.subject else { continue };
            let mut entry = entry.clone();
            let kind = referrer.artifact_type.or_else(|| Some(referrer.config?.media_type().clone()));
            entry.set_artifact_type(kind);
            entry.set_annotations(referrer.annotations);
            found.entry(subject.digest().to_string().parse()?).or_default().push(entry);
        }
        Ok(self.referrers.get_or_init(|| found))
    }
}

impl Transport for Layout {
    fn root(&self) -> Result<Manifest> {
        let index = self.index()?;
        // Signatures are not what is meant, unless they are named.
        let mut images = index.manifests().clone();
        images.retain(|image| self.tag.is_some() || !name(image).is_some_and(|tag| belongs(&tag)));
        // Nor is what refers to an image.
        if self.tag.is_none()
            && images.len() > 1
            && let Ok(referrers) = self.all_referrers()
        {
            let refers =
                |image: &Descriptor| referrers.values().flatten().any(|r| r.digest() == image.digest());
            images.retain(|image| !refers(image));
        }
        let named = |tag: &str| images.iter().find(|image| name(image).as_deref() == Some(tag));
        let found = match &self.tag {
            Some(tag) => named(tag).with_context(|| format!("no image {tag:?}")),
            None if images.len() == 1 => Ok(&images[0]),
            None => named(DEFAULT_TAG).context("several images: one must be named"),
        };
        let found = found.with_context(|| format!("there are: {}", names(images.iter().filter_map(name))))?;
        super::checked(self, found)
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        let digest: Digest = descriptor.digest().to_string().parse()?;
        let bytes = self.files.read(&blob_path(digest), MAX_DOCUMENT)?;
        Ok(Manifest { media_type: descriptor.media_type().clone(), bytes, digest })
    }

    fn tags(&self) -> Result<Vec<String>> {
        Ok(self.index()?.manifests().iter().filter_map(name).collect())
    }

    fn tagged(&self, tag: &str) -> Result<Option<Box<dyn Transport>>> {
        let there = self.index()?.manifests().iter().any(|image| name(image).as_deref() == Some(tag));
        let (files, referrers) = (Arc::clone(&self.files), Arc::clone(&self.referrers));
        Ok(there.then(|| Box::new(Self { files, tag: Some(tag.into()), referrers }) as _))
    }

    fn referrers(&self, digest: Digest) -> Result<Option<Manifest>> {
        super::referrers_index(self.all_referrers()?.get(&digest).map_or(&[][..], Vec::as_slice))
    }

    fn signature(&self, digest: Digest, number: usize) -> Result<Option<Vec<u8>>> {
        let name = signature_file(digest, number);
        self.files.has(&name).then(|| self.files.read(&name, MAX_SIGNATURE)).transpose()
    }

    fn part(&self, blob: &Descriptor, offset: u64, _len: u64) -> Result<Box<dyn Read + Send>> {
        let Ok(digest) = blob.digest().to_string().parse() else {
            bail!("{}: not a sha256 digest", blob.digest());
        };
        Ok(Box::new(self.files.open(&blob_path(digest), offset)?))
    }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn path_and_tag() {
        assert_eq!(split("a/b"), ("a/b", None));
        assert_eq!(split("a:t"), ("a", Some("t")));
        assert_eq!(split("a:h:80/x:t"), ("a", Some("h:80/x:t")));
    }
}
