//! The releases that are served: which paths there are, what is at each, and how it is opened.
//!
//! ```text
//! /streams/STREAM.json                              the newest release of a stream
//! /prod/streams/STREAM/builds/VERSION/ARCH/FILE     a file as published, or uncompressed under its own name
//! ```
//!
//! Paths are looked up in a table that is made at the start: no path of a request ever becomes one of the file system.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use axum::body::Bytes;
use url::Url;

use super::cache::Cache;
use super::content::Content;
use super::metrics::Metrics;
use crate::catalog::{Catalog, SIGNATURE};
use crate::mirror::release::{relocate, version_of};
use crate::produce::Check;
use crate::progress::Progress;
use crate::recipe::{Artifact, NamedFile, Tier};
use crate::rehydrate::Rehydrator;
use crate::source::Source;
use crate::store::{STREAM, STREAM_SIGNATURE, Store};
use crate::stream::Stream;
use crate::version::{check_name, compare};

/// A file that is offered.
pub struct Entry {
    /// Its name, length and digest.
    pub file: NamedFile,
    kind: Kind,
}

enum Kind {
    /// An artifact of a release, by index.
    Artifact { release: Arc<Release>, artifact: usize, form: Tier },
    /// Bytes in memory: a signature.
    Bytes(Bytes),
}

/// What is sent of an entry.
pub enum Opened {
    /// Bytes in memory.
    Bytes(Bytes),
    /// Anything longer.
    Content(Content),
}

/// A release, open.
pub struct Release {
    /// The stream's name.
    pub stream: String,
    /// The newest version in it.
    pub version: String,
    /// Where each artifact is: its directory below the server's root, by index; none for what is not offered.
    pub dirs: Vec<Option<String>>,
    rehydrator: Rehydrator,
    document: Stream,
    original: Bytes,
    signature: Option<Bytes>,
    /// Where clients get the published files, by the URL that the original names.
    places: HashMap<String, (PathBuf, bool)>,
    views: Mutex<HashMap<usize, Arc<dyn Source>>>,
    /// The bases that were written out, or will not be.
    bases: Mutex<BTreeSet<usize>>,
    /// The plan of a cache of clusters is for one at a time.
    making: Mutex<()>,
}

/// All of them.
pub struct Releases {
    /// The newest of each stream first.
    pub all: Vec<Arc<Release>>,
    paths: HashMap<String, Arc<Entry>>,
}

impl Releases {
    /// Opens `stores`, to use `memory` bytes for all of them.
    pub fn new(stores: Vec<Arc<Store>>, memory: u64) -> Result<Self> {
        let share = memory / stores.len().max(1) as u64;
        let mut all = Vec::new();
        for store in stores {
            let name = store.name();
            all.push(Arc::new(Release::new(store, share).with_context(|| name)?));
        }
        all.sort_by(|a, b| a.stream.cmp(&b.stream).then_with(|| compare(&b.version, &a.version)));
        let mut paths: HashMap<String, Arc<Entry>> = HashMap::new();
        for release in &all {
            for (path, entry) in release.clone().entries()? {
                if let Some(other) = paths.get(&path) {
                    if other.file != entry.file {
                        tracing::warn!(
                            "{path}: another release has another file of that name, which is served"
                        );
                    }
                    continue;
                }
                paths.insert(path, Arc::new(entry));
            }
        }
        Ok(Self { all, paths })
    }

    /// What is at a path, which starts with a slash.
    pub fn get(&self, path: &str) -> Option<&Arc<Entry>> {
        self.paths.get(path)
    }

    /// The newest release of a stream.
    pub fn stream(&self, name: &str) -> Option<&Arc<Release>> {
        self.all.iter().find(|release| release.stream == name)
    }
}

impl Release {
    fn new(store: Arc<Store>, memory: u64) -> Result<Self> {
        let original = store.stream()?;
        let document = Stream::parse(&original)?;
        check_name("stream", &document.stream)?;
        let metadata = store.metadata()?;
        let signature = metadata.get(STREAM_SIGNATURE).map(|bytes| Bytes::copy_from_slice(bytes));
        let index = &store.index;
        let mut dirs = vec![None; index.artifacts.len()];
        let (mut places, mut newest) = (HashMap::new(), None::<String>);
        for item in Catalog::new(&document)?.items {
            let found =
                index.artifacts.iter().position(|a| a.published.name == item.name && a.arch == item.arch);
            let Some(at) = found else { continue };
            let version = match version_of(&document, &item) {
                Ok(version) => version,
                Err(e) => {
                    tracing::warn!("not offered: {e:#}");
                    continue;
                }
            };
            let dir = format!("prod/streams/{}/builds/{version}/{}", document.stream, item.arch);
            let artifact = &index.artifacts[at];
            if artifact.tier == Tier::Published {
                let path = Path::new(&dir).join(&item.name);
                places.insert(item.location, (path, artifact.signature.is_some()));
            }
            dirs[at] = Some(dir);
            if newest.as_ref().is_none_or(|newest| compare(&version, newest).is_gt()) {
                newest = Some(version);
            }
        }
        Ok(Self {
            stream: document.stream.clone(),
            version: newest.with_context(|| format!("{STREAM}: no artifact of it is here"))?,
            dirs,
            // What encoders need is set aside.
            rehydrator: Rehydrator::new_for(store.clone(), memory, Tier::Published)?,
            document,
            original: original.into(),
            signature,
            places,
            views: Mutex::default(),
            bases: Mutex::default(),
            making: Mutex::new(()),
        })
    }

    /// Its artifacts.
    pub fn artifacts(&self) -> &[Artifact] {
        &self.rehydrator.store().index.artifacts
    }

    fn entries(self: Arc<Self>) -> Result<Vec<(String, Entry)>> {
        let mut entries = Vec::new();
        for (i, artifact) in self.artifacts().iter().enumerate() {
            let Some(dir) = &self.dirs[i] else { continue };
            let mut add = |file: &NamedFile, kind| {
                let path = format!("/{dir}/{}", file.name);
                entries.push((path, Entry { file: file.clone(), kind }));
            };
            let kind = |form| Kind::Artifact { release: self.clone(), artifact: i, form };
            if artifact.output != artifact.published {
                add(&artifact.output, kind(Tier::Uncompressed));
            }
            if artifact.tier == Tier::Published {
                add(&artifact.published, kind(Tier::Published));
            }
            if let Some(blob) = &artifact.signature {
                let bytes = self.rehydrator.store().signature(&artifact.published.name, blob)?;
                let name = format!("{}{SIGNATURE}", artifact.published.name);
                add(&NamedFile { name, blob: *blob }, Kind::Bytes(bytes.into()));
            }
        }
        Ok(entries)
    }

    /// The stream document as it was published.
    pub fn original(&self) -> Bytes {
        self.original.clone()
    }

    /// Its signature, where upstream signs it.
    pub fn signature(&self) -> Option<Bytes> {
        self.signature.clone()
    }

    /// The stream document of the files that are here, below `base`.
    pub fn document(&self, base: &Url) -> Result<Vec<u8>> {
        let place = |location: &str| self.places.get(location).map(|(path, signed)| (&**path, *signed));
        relocate(&mut self.document.clone(), base, place)
    }

    /// The kernel, the initramfs and the rootfs of the live system of each architecture.
    pub fn live(&self) -> BTreeMap<&str, [&str; 3]> {
        let mut live = BTreeMap::new();
        for (a, dir) in self.artifacts().iter().zip(&self.dirs) {
            let file = ["kernel", "initramfs", "rootfs"].iter().position(|file| *file == a.file);
            if let (true, Some(file), Some(_)) = (a.is_pxe(), file, dir) {
                let files: &mut [&str; 3] = live.entry(a.arch.as_str()).or_default();
                files[file] = &a.output.name;
            }
        }
        live.retain(|_, files| files.iter().all(|file| !file.is_empty()));
        live
    }

    /// Where the files of the live system of an architecture are, below the server's root.
    pub fn live_dir(&self, arch: &str) -> Option<&str> {
        let live = self
            .artifacts()
            .iter()
            .zip(&self.dirs)
            .find(|(a, dir)| a.is_pxe() && a.arch == arch && dir.is_some());
        live.and_then(|(_, dir)| dir.as_deref())
    }

    /// Writes out, once, what the artifact is made of and lies in another order there, if there is room for it.
    fn write_out_bases(&self, artifact: &Artifact, cache: &Cache) -> Result<()> {
        let mut done = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, size) in self.rehydrator.bases(artifact) {
            if done.contains(&i) {
                continue;
            }
            match cache.reserve(size) {
                Ok(()) => self.rehydrator.write_out(i, cache.dir())?,
                Err(e) => {
                    tracing::warn!("{}: slow from here on: its base is not kept: {e}", artifact.label())
                }
            }
            done.insert(i);
        }
        Ok(())
    }

    /// The output of an artifact, to be read anywhere.
    fn view(&self, i: usize, cache: &Cache) -> Result<Arc<dyn Source>> {
        let views = || self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = views().get(&i) {
            return Ok(view.clone());
        }
        let artifact = &self.artifacts()[i];
        self.write_out_bases(artifact, cache)?;
        let view = self.rehydrator.parts(artifact)?.view();
        anyhow::ensure!(
            view.len() == artifact.output.blob.size,
            "expected {} bytes, got {}",
            artifact.output.blob.size,
            view.len()
        );
        Ok(views().entry(i).or_insert(view).clone())
    }
}

impl Entry {
    /// Opens it. Takes long where sources must be fetched or written out first.
    pub fn open(self: &Arc<Self>, cache: &Arc<Cache>, metrics: &Metrics) -> Result<Opened> {
        let (release, i, form) = match &self.kind {
            Kind::Bytes(bytes) => return Ok(Opened::Bytes(bytes.clone())),
            Kind::Artifact { release, artifact, form } => (release, *artifact, *form),
        };
        let artifact = &release.artifacts()[i];
        let encoded = match form {
            Tier::Published => artifact.published != artifact.output || artifact.map.is_some(),
            Tier::Uncompressed => artifact.map.is_some(),
        };
        let live = || -> Result<Opened> {
            let view = release.view(i, cache).with_context(|| format!("artifact {}", artifact.label()));
            let view = view.inspect_err(|_| metrics.upstream_errors.add(1))?;
            Ok(Opened::Content(Content::Live(view, self.file.blob.sha256)))
        };
        // A whole fleet boots from the live media: they are checked once, and not by everyone.
        if !encoded && artifact.disk().is_some() {
            return live();
        }
        let (own, of_job) = (release.clone(), cache.clone());
        let made = cache.get(self.file.blob.sha256, &self.file.name, self.file.blob.size, move |out| {
            let artifact = &own.artifacts()[i];
            own.write_out_bases(artifact, &of_job)?;
            let _alone = own.making.lock().unwrap_or_else(PoisonError::into_inner);
            own.rehydrator.write(
                artifact,
                form,
                Check::Quick,
                &Progress::new(crate::progress::Mode::None),
                out,
            )
        });
        match made {
            Ok(made) => Ok(Opened::Content(Content::Made(made))),
            Err(_) if !encoded => live(),
            Err(e) => Err(e),
        }
    }
}
