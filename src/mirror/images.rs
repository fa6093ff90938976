//! `mirror releases --dehydrate`: builds the image of each stream that is mirrored, and pushes it; what a site without
//! a network needs, in one command.
//!
//! What is built is what `current` names. The image is tagged with the version, and with the name of the stream, which
//! moves. The registry says what is still to be done: an image that has the artifacts of the mirror is not built again.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::catalog::SIGNATURE;
use crate::dehydrate::{self, dehydrate};
use crate::digest::Digest;
use crate::fetch::beside;
use crate::oci::image::{Build, Compression, Program};
use crate::oci::read::Image;
use crate::oci::sign::Signing;
use crate::progress::Progress;
use crate::registry::{self, Client, Reference, TRANSPORT};
use crate::staging::{NewDir, write_file};
use crate::store::Store;
use crate::workdir::Workdir;

use super::config::{Config, Kind};
use super::layout::Dest;
use super::plan::{Plan, Release};
use super::summary::ImageSummary;

/// Where OpenPGP signatures of images go in a mirror, unless told otherwise: a web server can serve them along.
pub const SIGSTORE: &str = "sigstore";

/// How to make images, and where they go.
#[derive(Clone)]
pub struct Options {
    /// The repository of all of them; its tag means nothing.
    pub repository: Reference,
    /// Where to build; in the mirror without it.
    pub workdir: Option<PathBuf>,
    /// How to dehydrate; the architectures are those that are mirrored.
    pub dehydrate: dehydrate::Options,
    /// The programs of the image.
    pub programs: Vec<Program>,
    /// What everything in it is stamped with, in seconds of the epoch.
    pub time: u64,
    /// The largest layer, in bytes.
    pub max_layer: u64,
    /// How the program in it is compressed.
    pub compression: Compression,
    /// How to speak to the registry.
    pub registry: registry::Options,
    /// What signs it; the tag of a name in there means nothing.
    pub signing: Signing,
}

/// Refuses a configuration of which no images can be made.
pub fn check(config: &Config) -> Result<()> {
    let streams = config.sources.iter().filter(|source| source.kind == Kind::Stream);
    let mut names = BTreeSet::new();
    for name in streams.flat_map(|source| &source.channels) {
        ensure!(names.insert(name), "--dehydrate: two sources have a stream {name}, and it is one tag");
    }
    ensure!(!names.is_empty(), "--dehydrate: no source is of type stream");
    Ok(())
}

/// Builds the image of a channel, unless it is there. None for what is no stream.
pub fn push(
    dest: &Dest,
    plan: &Plan,
    options: &Options,
    progress: &Progress,
) -> Result<Option<ImageSummary>> {
    let (Some(release), Some(version)) = (&plan.release, &plan.current) else { return Ok(None) };
    let stream = plan.channel.to_str().context("not a name")?;
    let image = options.repository.with_tag(version)?;
    let moving = options.repository.with_tag(stream)?;
    let client = Client::new(options.registry.clone().patient());
    let summary = |digest: Digest, new| {
        Some(ImageSummary { image: image.to_string(), stream: stream.into(), digest: digest.oci(), new })
    };
    let there = match client.manifest(&image) {
        Ok(manifest) => Some(manifest),
        Err(e) if registry::not_found(&e) => None,
        Err(e) => return Err(e),
    };
    if let Some(manifest) = there {
        let name = format!("{TRANSPORT}{}", image.with_digest(manifest.digest));
        let store = Arc::new(Image::open(&name.parse()?, options.registry.clone(), 0)?).store()?;
        if has(&store, release).with_context(|| image.to_string())? {
            if client.digest(&moving).ok() != Some(manifest.digest) {
                client.push_manifest(&moving, &manifest)?;
            }
            return Ok(summary(manifest.digest, false));
        }
        tracing::info!("{image}: has other artifacts than the mirror: built again");
    }
    let work = options.workdir.clone().unwrap_or_else(|| dest.work());
    fs::create_dir_all(&work).with_context(|| format!("{}: mkdir failed", work.display()))?;
    let work =
        NewDir::create_in(&work, 0o700).with_context(|| format!("{}: mkdir failed", work.display()))?;
    // Inside, because dehydrating takes the lock of the working directory.
    let workdir = Workdir::new(work.path().join("build"));
    lay_out(dest, release, &workdir)?;
    let mirrored: BTreeSet<&String> = release.artifacts.iter().map(|(item, _)| &item.arch).collect();
    let how = dehydrate::Options {
        arch: mirrored.into_iter().cloned().collect(),
        // What the configuration leaves out is named in the image as what it has not.
        allow_unhandled: true,
        ..options.dehydrate.clone()
    };
    dehydrate(&workdir, &how, None, progress)?;
    let identity = options.signing.identity.as_ref().map(|name| name.with_tag(version)).transpose()?;
    let build = Build {
        dehydrated: &workdir.dehydrated(),
        programs: options.programs.clone(),
        output: &format!("{TRANSPORT}{image}"),
        tags: &[stream],
        time: options.time,
        max_layer: options.max_layer,
        compression: options.compression,
        registry: options.registry.clone(),
        signing: Signing { identity, ..options.signing.clone() },
        progress,
    };
    Ok(summary(build.run()?.digest, true))
}

/// Whether an image has these artifacts, and no other.
fn has(store: &Store, release: &Release) -> Result<bool> {
    let (ours, there) = (&release.stream, &store.index.stream.name);
    ensure!(ours == there, "it is of stream {there}, not of {ours}");
    let there = store.index.artifacts.iter().map(|artifact| artifact.published.blob.sha256);
    let wanted = release.artifacts.iter().map(|(item, _)| item.sha256);
    Ok(there.collect::<BTreeSet<_>>() == wanted.collect())
}

/// Makes the directory as `build download` leaves it, with links to the files of the mirror.
fn lay_out(dest: &Dest, release: &Release, workdir: &Workdir) -> Result<()> {
    let artifacts = workdir.artifacts();
    fs::create_dir_all(&artifacts).with_context(|| format!("{}: mkdir failed", artifacts.display()))?;
    write_file(&workdir.stream(), &release.document)?;
    if let Some(signature) = &release.signature {
        write_file(&workdir.stream_signature(), signature)?;
    }
    let mirror = dest.dir.canonicalize().with_context(|| dest.dir.display().to_string())?;
    for (item, path) in &release.artifacts {
        let (from, to) = (mirror.join(path), artifacts.join(&item.name));
        symlink(&from, &to)
            .and_then(|()| symlink(beside(&from, SIGNATURE), beside(&to, SIGNATURE)))
            .with_context(|| format!("{}: link failed", to.display()))?;
    }
    Ok(())
}
