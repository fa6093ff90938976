//! `dir:DIR`: one image as plain files, as skopeo writes it: `manifest.json`, and blobs under their digests.

use std::io::Read;
use std::path::Path;

use anyhow::Result;
use oci_spec::image::Descriptor;

use super::files::Files;
use super::{MAX_DOCUMENT, Manifest, Transport, media_type_of, signature_file};
use crate::digest::Digest;
use crate::openpgp::MAX_SIGNATURE;

/// An image in a directory of its own.
pub(super) struct Dir(Files);

impl Dir {
    pub(super) fn new(path: &Path) -> Self {
        Self(Files::Dir(path.into()))
    }
}

impl Transport for Dir {
    fn root(&self) -> Result<Manifest> {
        let bytes = self.0.read("manifest.json", MAX_DOCUMENT)?;
        Ok(Manifest { media_type: media_type_of(&bytes)?, digest: Digest::of(&bytes), bytes })
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        let digest: Digest = descriptor.digest().to_string().parse()?;
        let bytes = self.0.read(&format!("{digest}.manifest.json"), MAX_DOCUMENT)?;
        Ok(Manifest { media_type: descriptor.media_type().clone(), bytes, digest })
    }

    fn signature(&self, digest: Digest, number: usize) -> Result<Option<Vec<u8>>> {
        // That of the image that the directory is of has no digest in its name.
        let names = [format!("signature-{number}"), signature_file(digest, number)];
        let own = self.root()?.digest == digest;
        let name = names.iter().skip(usize::from(!own)).find(|name| self.0.has(name));
        name.map(|name| self.0.read(name, MAX_SIGNATURE)).transpose()
    }

    fn part(&self, blob: &Descriptor, offset: u64, _len: u64) -> Result<Box<dyn Read + Send>> {
        let digest: Digest = blob.digest().to_string().parse()?;
        Ok(Box::new(self.0.open(&digest.to_string(), offset)?))
    }
}
