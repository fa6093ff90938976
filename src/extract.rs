//! The way out that needs none of our code: the librsync delta of an artifact and its base as plain files, for
//! `rdiff patch`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::recipe::{Artifact, SourceSpec};
use crate::rehydrate::Rehydrator;

/// What was extracted.
pub struct Extracted {
    /// The base; sparse, it ends in a long hole.
    pub base: PathBuf,
    /// The delta over it.
    pub delta: PathBuf,
    /// Whether the delta makes the artifact itself. It does not where the artifact has compressed parts: then it makes
    /// the artifact with those parts decompressed.
    pub whole: bool,
}

/// Writes the delta of `artifact` and its base into `dir`.
pub fn extract(rehydrator: &Rehydrator, artifact: &Artifact, dir: &Path) -> Result<Extracted> {
    let name = &artifact.output.name;
    let specs = &rehydrator.store().index.sources;
    let SourceSpec::Delta { blob, base, .. } = &specs[artifact.source] else {
        bail!("artifact {}: stored as it is, not as a delta", artifact.label());
    };
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let path = |suffix: &str| dir.join(format!("{name}.{suffix}"));
    let (base_path, delta_path) = (path("base"), path("delta"));
    let write = |source: &dyn crate::source::Source, path: &Path| {
        let file = File::create(path)?;
        rehydrator.cache().scatter(source, &file).map(drop)
    };
    let sources = rehydrator.sources();
    write(&sources.zstd(blob)?, &delta_path).with_context(|| delta_path.display().to_string())?;
    write(&sources.concat(specs, base)?, &base_path).with_context(|| base_path.display().to_string())?;
    Ok(Extracted { base: base_path, delta: delta_path, whole: artifact.map.is_none() })
}
