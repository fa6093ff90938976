//! The releases that are served: which paths there are, what is at each, and how it is opened.
//!
//! ```text
//! /streams/STREAM.json                              the newest release of a stream
//! /prod/streams/STREAM/builds/VERSION/ARCH/FILE     a file as published, or uncompressed under its own name
//! ```
//!
//! Paths are looked up in a table that is made at the start: no path of a request ever becomes one of the file system.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::Bytes;
use tokio::sync::OnceCell;
use url::Url;

use super::cache::{Cache, Room};
use super::content::Content;
use super::metrics::Metrics;
use super::pool::Pool;
use crate::catalog::{Catalog, SIGNATURE};
use crate::mirror::release::{relocate, version_of};
use crate::produce::Check;
use crate::progress::Progress;
use crate::recipe::{Artifact, NamedFile, Tier};
use crate::rehydrate::Rehydrator;
use crate::sink::Output;
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
    /// The bases that were written out, with what they take of the cache; without, if there was no room for them.
    bases: Mutex<HashMap<usize, Arc<OnceCell<Option<Room>>>>>,
    /// The plan of a cache of clusters is for one at a time.
    making: Mutex<()>,
}

/// What opening files needs.
pub struct Opening {
    /// Where files are kept that took work to make.
    pub cache: Arc<Cache>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Threads that open sources.
    pub sources: Pool,
    /// Threads that write out bases.
    pub bases: Pool,
    /// How long a request waits for its turn.
    pub patience: Duration,
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

    /// Writes out, once, what the artifact is made of and lies in another order there, if there is room for it. What was
    /// begun is ended, also when nobody waits for it any more: the next one will.
    async fn write_out_bases(self: &Arc<Self>, i: usize, opening: &Arc<Opening>) -> Result<()> {
        for (base, size) in self.rehydrator.bases(&self.artifacts()[i]) {
            let cell =
                self.bases.lock().unwrap_or_else(PoisonError::into_inner).entry(base).or_default().clone();
            let (own, opening) = (self.clone(), opening.clone());
            let written = async move {
                cell.get_or_try_init(|| own.write_out_base(base, size, &opening)).await.map(|_| ())
            };
            tokio::spawn(written).await??;
        }
        Ok(())
    }

    /// What the base takes of the cache, in which it is from now on.
    async fn write_out_base(
        self: &Arc<Self>,
        base: usize,
        size: u64,
        opening: &Opening,
    ) -> Result<Option<Room>> {
        let room = match opening.cache.reserve(size) {
            Ok(room) => room,
            Err(e) => {
                tracing::warn!(
                    "{} {}: slow from here on: a base is not kept: {e}",
                    self.stream,
                    self.version
                );
                return Ok(None);
            }
        };
        let (own, dir) = (self.clone(), opening.cache.dir().to_owned());
        opening.bases.run(move || own.rehydrator.write_out(base, &dir)).await??;
        Ok(Some(room))
    }

    /// The output of an artifact, to be read anywhere.
    async fn view(self: &Arc<Self>, i: usize, opening: &Arc<Opening>) -> Result<Arc<dyn Source>> {
        if let Some(view) = self.views.lock().unwrap_or_else(PoisonError::into_inner).get(&i) {
            return Ok(view.clone());
        }
        self.write_out_bases(i, opening).await?;
        let own = self.clone();
        let open = move || {
            let artifact = &own.artifacts()[i];
            let view = own.rehydrator.parts(artifact)?.view()?;
            let (expected, found) = (artifact.output.blob.size, view.len());
            anyhow::ensure!(found == expected, "expected {expected} bytes, got {found}");
            Ok(own.views.lock().unwrap_or_else(PoisonError::into_inner).entry(i).or_insert(view).clone())
        };
        opening.sources.run(open).await?
    }
}

impl Entry {
    /// Opens it. Takes long where sources must be fetched or written out first, or others are made before it.
    pub async fn open(self: &Arc<Self>, opening: &Arc<Opening>) -> Result<Opened> {
        let (release, i, form) = match &self.kind {
            Kind::Bytes(bytes) => return Ok(Opened::Bytes(bytes.clone())),
            Kind::Artifact { release, artifact, form } => (release, *artifact, *form),
        };
        let artifact = &release.artifacts()[i];
        let encoded = match form {
            Tier::Published => artifact.published != artifact.output || artifact.map.is_some(),
            Tier::Uncompressed => artifact.map.is_some(),
        };
        let live = async || -> Result<Opened> {
            let view = release.view(i, opening).await;
            let view = view.with_context(|| format!("artifact {}", artifact.label()));
            let view = view.inspect_err(|_| opening.metrics.upstream_errors.add(1))?;
            Ok(Opened::Content(Content::Live(view, self.file.blob.sha256)))
        };
        // A whole fleet boots from the live media: they are checked once, and not by everyone.
        if !encoded && artifact.disk().is_some() {
            return live().await;
        }
        let (own, shared) = (release.clone(), opening.clone());
        let prepare = async move { own.write_out_bases(i, &shared).await };
        let own = release.clone();
        let make = move |out: &mut dyn Output| {
            let _alone = own.making.lock().unwrap_or_else(PoisonError::into_inner);
            let progress = Progress::new(crate::progress::Mode::None);
            own.rehydrator.write(&own.artifacts()[i], form, Check::Quick, &progress, out)
        };
        let NamedFile { name, blob } = &self.file;
        match opening.cache.get(blob.sha256, name, blob.size, prepare, make) {
            Ok(made) => {
                made.begun(opening.patience).await?;
                Ok(Opened::Content(Content::Made(made)))
            }
            Err(_) if !encoded => live().await,
            Err(e) => Err(e),
        }
    }
}
