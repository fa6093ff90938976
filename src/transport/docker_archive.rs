//! `docker-archive:FILE[:NAME]`: what `docker save` and `podman save` write.
//!
//! `manifest.json` names a configuration and files with layers for each image. There is no manifest as registries have
//! it, so one is made of that, with the digests that are found.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType, SCHEMA_VERSION};
use serde::Deserialize;

use super::files::Files;
use super::layout::split;
use super::{MAX_DOCUMENT, MAX_LAYERS, Manifest, Transport, oci_digest};
use crate::bounded;
use crate::digest::Digest;

/// An image in an archive.
pub(super) struct DockerArchive {
    files: Files,
    manifest: Manifest,
    /// Where blobs are.
    names: HashMap<Digest, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerArchive {
    pub(super) fn open(reference: &str, max: u64) -> Result<Self> {
        let (path, name) = split(reference);
        let files = Files::archive(Path::new(path), max)?;
        let saved = files.read("manifest.json", MAX_DOCUMENT).context("not an archive of docker save")?;
        let saved: Vec<Saved> = serde_json::from_slice(&saved).context("manifest.json")?;
        let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
        let found = match name {
            Some(name) => saved.iter().find(|image| tags(image).iter().any(|tag| same(tag, name))),
            None => Some(&saved).filter(|saved| saved.len() == 1).and_then(|saved| saved.first()),
        };
        let image = found.with_context(|| {
            let what = name.map_or("several images: one must be named".into(), |n| format!("no image {n:?}"));
            format!("{what}; there are: {}", bounded::names(saved.iter().flat_map(tags)))
        })?;

        let layers = image.layers.len();
        ensure!(layers <= MAX_LAYERS, "an image of {layers} layers: more than {MAX_LAYERS}");
        let (mut names, mut hashed) = (HashMap::new(), HashMap::new());
        let mut blob = |name: &str, media_type| -> Result<Descriptor> {
            // A layer may be there many times, under many names.
            let (digest, size) = match hashed.entry(files.place(name)?) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    *new.insert(Digest::of_reader(files.open(name, 0)?).with_context(|| name.to_string())?)
                }
            };
            names.insert(digest, name.to_string());
            Ok(Descriptor::new(media_type, size, oci_digest(digest)?))
        };
        let config = blob(&image.config, MediaType::ImageConfig)?;
        let mut layers = Vec::new();
        for name in &image.layers {
            let mut head = [0; 2];
            let gzip = files.open(name, 0)?.read_exact(&mut head).is_ok() && head == [0x1F, 0x8B];
            layers.push(blob(name, if gzip { MediaType::ImageLayerGzip } else { MediaType::ImageLayer })?);
        }
        ensure!(!layers.is_empty(), "an image without layers");
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(layers)
            .build()?;
        let bytes = serde_json::to_vec(&manifest)?;
        let manifest = Manifest { media_type: MediaType::ImageManifest, digest: Digest::of(&bytes), bytes };
        Ok(Self { files, manifest, names })
    }
}

/// Whether a tag in an archive is the one that is meant: without a registry it is docker's, without a version `latest`.
fn same(tag: &str, name: &str) -> bool {
    let full = |name: &str| {
        let (path, last) = name.rsplit_once('/').map_or(("", name), |(path, last)| (path, last));
        let version = if last.contains([':', '@']) { "" } else { ":latest" };
        let path = path.strip_prefix("docker.io/").unwrap_or(path);
        let path = if path == "library" || path == "docker.io" { "" } else { path };
        format!("{path}/{last}{version}")
    };
    full(tag) == full(name)
}

impl Transport for DockerArchive {
    fn root(&self) -> Result<Manifest> {
        Ok(self.manifest.clone())
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        anyhow::bail!("{}: not there: the archive holds single images", descriptor.digest())
    }

    fn part(&self, blob: &Descriptor, offset: u64, _len: u64) -> Result<Box<dyn Read + Send>> {
        let digest: Digest = blob.digest().to_string().parse()?;
        let name = self.names.get(&digest).with_context(|| format!("{}: not there", blob.digest()))?;
        Ok(Box::new(self.files.open(name, offset)?))
    }
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn names() {
        assert!(same("alpine:latest", "alpine"));
        assert!(same("alpine:3", "docker.io/library/alpine:3"));
        assert!(same("localhost/a/b:1", "localhost/a/b:1"));
        assert!(!same("localhost/a/b:1", "localhost/a/b:2"));
        assert!(!same("localhost/a/b:1", "other/a/b:1"));
    }
}
