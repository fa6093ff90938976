//! `oci:DIR[:TAG]` and `oci-archive:FILE[:TAG]`: OCI image layouts. `oci/layout.rs` writes them.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, ImageIndex};
use serde_json::Value;

use super::files::Files;
use super::{MAX_DOCUMENT, Manifest, Transport, belongs, signature_file};
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
        Ok(Self { files: Arc::new(files), tag: tag.map(Into::into) })
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
}

impl Transport for Layout {
    fn root(&self) -> Result<Manifest> {
        let index = self.index()?;
        // Signatures are not what is meant, unless they are named.
        let mut images = index.manifests().clone();
        images.retain(|image| self.tag.is_some() || !name(image).is_some_and(|tag| belongs(&tag)));
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
        let image = || Box::new(Self { files: Arc::clone(&self.files), tag: Some(tag.into()) }) as _;
        Ok(there.then(image))
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
