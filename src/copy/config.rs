//! The configuration of `mirror images`: JSON, in which what is not known is an error.
//!
//! ```json
//! { "parallel": 2,
//!   "images": [ { "source": "quay.io/team/app", "destination": "registry.local/team/app",
//!                 "tags": ["- *-debug", "+ v*", "- *"], "platforms": ["linux/amd64"], "referrers": true } ] }
//! ```

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Options, filters};
use crate::io::read_limited;
use crate::registry::Platform;

/// The longest configuration that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// The most images that are copied at once.
const MAX_PARALLEL: usize = 32;

/// What to mirror.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The images.
    pub images: Vec<Image>,
    /// How many at once.
    #[serde(default = "two")]
    pub parallel: usize,
}

/// An image, or several tags of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// From where.
    pub source: String,
    /// Where to.
    pub destination: String,
    /// All tags that these globs take.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Only these platforms, `OS/ARCH` or `OS/ARCH/VARIANT`.
    #[serde(default)]
    pub platforms: Vec<String>,
    /// Take what refers to it along.
    #[serde(default)]
    pub referrers: bool,
}

fn two() -> usize {
    2
}

impl Config {
    /// Reads and checks a configuration.
    pub fn read(path: &Path) -> Result<Self> {
        let at = || path.display().to_string();
        let bytes = read_limited(path, MAX_CONFIG).with_context(at)?;
        let config: Self = serde_json::from_slice(&bytes).with_context(at)?;
        ensure!((1..=MAX_PARALLEL).contains(&config.parallel), "{}: parallel: 1 to {MAX_PARALLEL}", at());
        for image in &config.images {
            image.options(false).with_context(|| format!("{}: image {}", at(), image.source))?;
        }
        Ok(config)
    }
}

impl Image {
    /// What to copy of it.
    pub fn options(&self, dry_run: bool) -> Result<Options> {
        filters(&self.tags)?;
        Ok(Options {
            platforms: self.platforms.iter().map(|text| platform(text)).collect::<Result<_>>()?,
            tags: self.tags.clone(),
            referrers: self.referrers,
            dry_run,
        })
    }
}

/// Reads `OS/ARCH` or `OS/ARCH/VARIANT`.
pub fn platform(text: &str) -> Result<Platform> {
    let mut parts = text.split('/').map(str::to_owned);
    let platform = Platform { os: parts.next(), arch: parts.next(), variant: parts.next() };
    let filled = text.split('/').all(|part| !part.is_empty());
    ensure!(
        filled && platform.arch.is_some() && parts.next().is_none(),
        "{text:?}: not a platform: expected OS/ARCH or OS/ARCH/VARIANT"
    );
    Ok(platform)
}
