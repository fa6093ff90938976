//! Picks the image for one platform out of an index of several.

use std::fmt;

use anyhow::{Context, Result, bail};
use oci_spec::image::{Arch, Descriptor, ImageIndex, MediaType, Os};
use serde::Deserialize;

use super::{Client, Manifest, Reference};
use crate::digest::Digest;

/// What an image is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system.
    pub os: Os,
    /// The architecture.
    pub arch: Arch,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.arch)
    }
}

impl Platform {
    /// The platform of these names; the architecture as images or as kernels name it. What is not given is that of this
    /// machine, but always linux.
    pub fn new(os: Option<&str>, arch: Option<&str>) -> Self {
        let arch = match arch.unwrap_or(std::env::consts::ARCH) {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            arch => arch,
        };
        Self { os: os.unwrap_or("linux").into(), arch: arch.into() }
    }

    /// The image for this platform in `index`. The error names those that there are.
    pub fn pick<'a>(&self, index: &'a ImageIndex) -> Result<&'a Descriptor> {
        let of = |image: &Descriptor| {
            let platform = image.platform().as_ref()?;
            Some(Self { os: platform.os().clone(), arch: platform.architecture().clone() })
        };
        let found = index.manifests().iter().find(|image| of(image).as_ref() == Some(self));
        found.with_context(|| {
            let has = index.manifests().iter().filter_map(of).map(|platform| platform.to_string());
            format!("no image for {self}; there is one for {}", Vec::from_iter(has).join(", "))
        })
    }
}

/// Whether a manifest is an index of others.
pub fn is_index(media_type: &MediaType) -> bool {
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    *media_type == MediaType::ImageIndex || media_type.to_string() == docker
}

impl Client {
    /// The digest of the image for `platform` that `reference` names: itself, or one in an index.
    pub fn resolve(&self, reference: &Reference, platform: &Platform) -> Result<Digest> {
        let manifest = self.manifest(reference)?;
        let at = || reference.to_string();
        if !is_index(&manifest.media_type) {
            self.check_platform(reference, &manifest, platform).with_context(at)?;
            return Ok(manifest.digest);
        }
        let index: ImageIndex = serde_json::from_slice(&manifest.bytes).with_context(at)?;
        platform.pick(&index).and_then(|image| Ok(image.digest().to_string().parse()?)).with_context(at)
    }

    /// Checks that an image that stands alone is for `platform`.
    fn check_platform(&self, reference: &Reference, manifest: &Manifest, platform: &Platform) -> Result<()> {
        #[derive(Deserialize)]
        struct Image {
            config: Descriptor,
        }
        #[derive(Deserialize)]
        struct Config {
            os: Option<Os>,
            architecture: Option<Arch>,
        }
        let image: Image = serde_json::from_slice(&manifest.bytes).context("not an image manifest")?;
        let config = self.document(reference, &image.config)?;
        let config: Config = serde_json::from_slice(&config).context("configuration")?;
        if let (Some(os), Some(arch)) = (config.os, config.architecture) {
            let found = Platform { os, arch };
            if found != *platform {
                bail!("no image for {platform}; it is one for {found}");
            }
        }
        Ok(())
    }
}
