//! Reduces a downloaded release to a dehydrated directory.
//!
//! For each architecture:
//! 1. the live rootfs is stored as it is, and its files are decoded once, into an unnamed file;
//! 2. kernel, initramfs and one disk, the base, become deltas over those files (profile `fast`: the base is stored);
//! 3. every other disk becomes a delta over the base, and the ISO one over what is in it.
//!
//! Before a delta goes over an artifact, what is compressed in it is unfolded. Every artifact is produced again from
//! what was stored for it and compared with the digest the stream metadata names, before it gets into the index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Seek};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::catalog::{Catalog, Item, check_file_name};
use crate::digest::{Blake3, Digest};
use crate::fold::{self, Effort, Map, Unfolded};
use crate::io::scratch_file;
use crate::produce::{Check, How, Parts, produce};
use crate::progress::Progress;
use crate::proof::Proofs;
use crate::recipe::{
    Artifact, Blob, FORMAT_VERSION, Index, NamedFile, Previous, SourceSpec, StreamFile, Tier, Unhandled,
};
use crate::source::cluster::{Cache, Clustered};
use crate::source::delta::Base;
use crate::source::{self, Source, blob, rootfs};
use crate::store::{self, Sources, Store, Writer};
use crate::stream::MAX_STREAM;
use crate::workdir::{Workdir, read_limited};

/// How large and how fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// The base disk is made of the files of the live rootfs: the smallest image
    #[default]
    Small,
    /// The base disk is stored too: larger, and disks come out at the speed of zstd
    Fast,
}

/// How to dehydrate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only these architectures; all when empty.
    pub arch: Vec<String>,
    /// Size against speed.
    pub profile: Profile,
    /// Leave out what is not there, instead of failing.
    pub allow_unhandled: bool,
    /// The form in which every artifact must come back.
    pub require: Option<Tier>,
    /// Whether to find out how published files are made again.
    pub published: bool,
    /// Memory that may be used, in bytes.
    pub memory: u64,
    /// The longest form that is taken out of a compressed artifact, in bytes.
    pub max_size: u64,
}

/// The zeros that follow a base where deltas are applied: as long as the disks that are made, and stored nowhere.
/// Longer runs take several copies.
const ZEROS: NonZeroU64 = NonZeroU64::new(64 << 30).expect("not 0");

/// zstd's strongest ordinary level: there are a few MB of literals to a disk.
const DELTA_LEVEL: i32 = 19;

/// For the base of profile `fast`, hundreds of MB: a guess between size and time that no measurement stands behind yet.
const BASE_LEVEL: i32 = 12;

/// A delta over the previous release is used where it is at most so large, in percent of what it makes: an image that is
/// built on another is larger than one that is not.
const WORTH: u64 = 90;

/// Memory set aside for reducing one artifact, in bytes; generous, so that several at once stay within the limit.
const MEMORY_EACH: u64 = 640 << 20;

/// Cache of a proof that reads its base from a file, in bytes.
const PROOF_CACHE: u64 = 64 << 20;

/// Dehydrates what is in `workdir` and returns the index of what was made.
///
/// The live rootfs becomes a delta over that of `previous`, which is stored in its place: a registry that has the image of
/// the earlier release has most of it already.
pub fn dehydrate(
    workdir: &Workdir,
    options: &Options,
    previous: Option<&Store>,
    progress: &Progress,
) -> Result<Index> {
    let stream = workdir.read_stream()?;
    let document = read_limited(&workdir.stream(), MAX_STREAM)?;
    let catalog = Catalog::new(&stream)?.only(&options.arch)?;
    let writer = Writer::create(&workdir.dehydrated())?;
    let blob = writer.file(store::STREAM, &document)?;
    if let Some(signature) = read_if_there(&workdir.stream_signature())? {
        writer.file(store::STREAM_SIGNATURE, &signature)?;
    }

    let artifacts_dir = workdir.artifacts();
    let (present, missing): (Vec<&Item>, Vec<&Item>) =
        catalog.items.iter().partition(|item| artifacts_dir.join(&item.name).is_file());
    let unhandled = missing.iter().map(|item| Unhandled {
        arch: item.arch.clone(),
        name: item.name.clone(),
        reason: "not downloaded".into(),
    });
    let unhandled: Vec<Unhandled> = unhandled.collect();
    if let Some(first) = unhandled.first()
        && !options.allow_unhandled
    {
        bail!(
            "{} of {} artifacts are not in {}, the first is {}; --allow-unhandled leaves them out",
            unhandled.len(),
            catalog.items.len(),
            artifacts_dir.display(),
            first.name
        );
    }
    ensure!(!present.is_empty(), "no artifacts in {}", artifacts_dir.display());

    let mut by_arch: BTreeMap<&str, Vec<&Item>> = BTreeMap::new();
    for &item in &present {
        by_arch.entry(&item.arch).or_default().push(item);
    }
    let proofs = Proofs::new(workdir.proofs(), options.memory / 2, progress);
    let job = Job { dir: artifacts_dir, writer: &writer, options, previous, proofs, progress };
    let mut sources = Vec::new();
    let mut reduced = BTreeMap::new();
    let mut built_on = Vec::new();
    for items in by_arch.values() {
        built_on.extend(job.architecture(items, &mut sources, &mut reduced)?);
    }
    let artifacts = present.iter().map(|item| reduced.remove(item.name.as_str()));
    let index = Index {
        format_version: FORMAT_VERSION,
        generator: concat!("rehydrator ", env!("CARGO_PKG_VERSION")).into(),
        stream: StreamFile { name: stream.stream.clone(), blob },
        artifacts: artifacts.collect::<Option<_>>().context("an artifact was dropped")?,
        unhandled,
        sources,
        previous: built_on,
    };
    writer.finish(&index)?;
    Ok(index)
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// What all artifacts are reduced with.
struct Job<'a> {
    dir: PathBuf,
    writer: &'a Writer,
    options: &'a Options,
    previous: Option<&'a Store>,
    proofs: Proofs<'a>,
    progress: &'a Progress,
}

/// A source that others are made of, with its bytes at hand.
#[derive(Clone)]
struct Made {
    spec: usize,
    plain: Arc<dyn Source>,
}

/// The live rootfs.
struct Live {
    blob: Blob,
    blake3: Blake3,
    /// Its bytes.
    rootfs: Arc<dyn Source>,
    /// Its files, where they can be decoded.
    files: Option<Arc<dyn Source>>,
}

/// An artifact without its outer compression.
struct Form {
    /// What comes out.
    output: NamedFile,
    bytes: Arc<dyn Source>,
    published: Wrapped,
}

/// How the published file is made of the output.
enum Wrapped {
    /// It is the output.
    Same,
    /// By this map.
    By(Map),
    /// Not at all, and why.
    Not(String),
}

/// An artifact, unfolded.
struct Plain {
    form: Form,
    unfolded: Unfolded,
}

impl Job<'_> {
    /// Reduces the artifacts of one architecture. Gives the earlier live rootfs that this one is made of, if any.
    fn architecture<'i>(
        &self,
        items: &[&'i Item],
        specs: &mut Vec<SourceSpec>,
        done: &mut BTreeMap<&'i str, Artifact>,
    ) -> Result<Option<Previous>> {
        let find = |is: &dyn Fn(&Item) -> bool| items.iter().copied().find(|item| is(item));
        let zeros = push(specs, SourceSpec::Zeros { size: ZEROS.get() });
        let base_item = find(&|i| i.platform == "qemu" && i.file == "disk")
            .or_else(|| find(&|i| i.platform == "metal" && i.is_disk() && !i.format.starts_with("4k.")))
            .or_else(|| find(&|i| i.is_disk()));

        // The live rootfs is decoded while the base disk is decompressed.
        let rootfs_item = find(&|i| i.file == "rootfs");
        let (live, base_disk) = rayon::join(
            || rootfs_item.map(|item| self.live_rootfs(item)).transpose(),
            || base_item.map(|item| self.open(item)).transpose(),
        );
        let (live, base_disk) = (live?, base_disk?);

        let mut parts_of_iso = Vec::new();
        let mut files = None;
        let mut built_on = None;
        if let (Some(item), Some(live)) = (rootfs_item, live) {
            let output = (NamedFile { name: item.name.clone(), blob: live.blob }, Wrapped::Same);
            let artifact = match self.over_previous(item, &live, zeros, specs)? {
                Some((previous, reduced)) => {
                    built_on = Some(previous);
                    self.keep(item, output, reduced, specs)?
                }
                None => {
                    let spec = push(specs, SourceSpec::Stored { blob: live.blob });
                    self.artifact(item, output, spec, None, live.blob.size, live.blake3)?
                }
            };
            let image = artifact.source;
            parts_of_iso.push(Made { spec: image, plain: live.rootfs });
            done.insert(&item.name, artifact);
            if let Some(plain) = live.files {
                let spec = push(specs, SourceSpec::Rootfs { image, plain_size: plain.len() });
                files = Some(Made { spec, plain });
            }
        }
        let scanned = files.as_ref().map(|made| Base::scan(&*made.plain, ZEROS)).transpose()?;
        let index = scanned.as_ref().map(Base::index);
        let over_files = files.iter().zip(&index).next().map(|(made, index)| Over {
            parts: vec![made.clone()],
            index,
            zeros,
        });

        for item in items.iter().filter(|i| i.file == "kernel" || i.file == "initramfs") {
            let plain = self.open(item)?;
            let made = self.reduce(item, &plain, over_files.as_ref(), specs, &[])?;
            let bytes = made.plain.clone();
            let artifact = self.keep(item, (plain.form.output, plain.form.published), made, specs)?;
            parts_of_iso.push(Made { spec: artifact.source, plain: bytes });
            done.insert(&item.name, artifact);
        }

        let mut base = None;
        if let (Some(item), Some(plain)) = (base_item, base_disk) {
            let over = over_files.as_ref().filter(|_| self.options.profile == Profile::Small);
            let made = self.reduce(item, &plain, over, specs, &[])?;
            let bytes = made.plain.clone();
            let artifact = self.keep(item, (plain.form.output, plain.form.published), made, specs)?;
            base = Some(Made { spec: artifact.source, plain: bytes });
            done.insert(&item.name, artifact);
        }
        drop(over_files);
        drop(index);
        drop(scanned);

        let rest: Vec<&Item> =
            items.iter().copied().filter(|i| !done.contains_key(i.name.as_str())).collect();
        let (isos, disks): (Vec<&Item>, Vec<&Item>) = rest.into_iter().partition(|i| i.format == "iso");
        self.all_over(&disks, base.into_iter().collect(), zeros, specs, done)?;
        parts_of_iso.extend(files);
        self.all_over(&isos, parts_of_iso, zeros, specs, done)?;
        Ok(built_on)
    }

    /// The live rootfs as a delta over that of the previous release, and which that is; nothing where there is none, or
    /// where it saves next to nothing.
    fn over_previous(
        &self,
        item: &Item,
        live: &Live,
        zeros: usize,
        specs: &mut Vec<SourceSpec>,
    ) -> Result<Option<(Previous, Reduced)>> {
        let Some(store) = self.previous else { return Ok(None) };
        let context = || format!("previous release: {}", item.arch);
        let Some(previous) = store.index.stored_rootfs(&item.arch) else {
            tracing::warn!("{}: no live rootfs: nothing to build on", context());
            return Ok(None);
        };
        let blob = previous.file.blob;
        if blob == live.blob {
            return Ok(None);
        }
        self.writer.take(&blob, store).with_context(context)?;
        let plain = Arc::new(source::File::new(self.writer.open(&blob)?)?) as Arc<dyn Source>;
        let base = Base::scan(&*plain, ZEROS)?;
        let parts = vec![Made { spec: push(specs, SourceSpec::Stored { blob }), plain: plain.clone() }];
        let over = Over { parts, index: &base.index(), zeros };
        let output = NamedFile { name: item.name.clone(), blob: live.blob };
        let bytes = live.rootfs.clone();
        let form = Form { output, bytes: bytes.clone(), published: Wrapped::Same };
        let unfolded = Unfolded { map: None, plain: bytes };
        let reduced = self.reduce(item, &Plain { form, unfolded }, Some(&over), specs, &[])?;
        let size = reduced.spec.blob().map_or(0, |blob| blob.size);
        if size > live.blob.size / 100 * WORTH {
            tracing::warn!("{}: {} has too little in common with it: not used", context(), item.name);
            specs.pop();
            return Ok(None);
        }
        Ok(Some((previous, reduced)))
    }

    /// Reduces artifacts over the same base, several at once.
    fn all_over<'i>(
        &self,
        items: &[&'i Item],
        parts: Vec<Made>,
        zeros: usize,
        specs: &mut Vec<SourceSpec>,
        done: &mut BTreeMap<&'i str, Artifact>,
    ) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let concat = source::Concat::new(parts.iter().map(|made| made.plain.clone()).collect())?;
        let scanned = (!parts.is_empty()).then(|| Base::scan(&concat, ZEROS)).transpose()?;
        let index = scanned.as_ref().map(Base::index);
        let over = index.as_ref().map(|index| Over { parts: parts.clone(), index, zeros });

        // What must be deflated again takes longest: first, so that nobody waits for it at the end.
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&i| items[i].uncompressed_sha256.is_some());
        let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // The other half is that of the encoders of published files.
        let memory = if self.options.published { self.options.memory / 2 } else { self.options.memory };
        let workers = cores.min((memory / MEMORY_EACH).max(1) as usize);
        let before: &[SourceSpec] = specs;
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = self.open(items[i]).and_then(|plain| {
                            let made = self.reduce(items[i], &plain, over.as_ref(), before, &parts)?;
                            Ok(((plain.form.output, plain.form.published), made))
                        });
                        if result.is_err() {
                            next.store(items.len(), Ordering::Relaxed);
                        }
                        results.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
                    }
                });
            }
        });
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        // In the order of the stream, so that the same input gives the same index.
        results.sort_by_key(|(i, _)| *i);
        for (i, result) in results {
            let (output, made) = result?;
            done.insert(&items[i].name, self.keep(items[i], output, made, specs)?);
        }
        Ok(())
    }

    /// Stores the live rootfs, and decodes its files into an unnamed file where they can be decoded.
    fn live_rootfs(&self, item: &Item) -> Result<Live> {
        let label = item.label();
        let context = || format!("artifact {label}");
        let mut file = File::open(self.dir.join(&item.name)).with_context(context)?;
        let mut out = self.writer.blob()?;
        let task = self.progress.task(format!("{label}: store"), Some(file.metadata()?.len()));
        io::copy(&mut task.reader(&mut file), &mut out).with_context(context)?;
        let mut blake3 = blake3::Hasher::new();
        file.rewind()?;
        blake3.update_reader(&file).with_context(context)?;
        let blake3 = Blake3::from_hasher(&blake3);
        let blob = self.writer.keep(out)?;
        ensure_published(item, &blob)?;
        task.finish();
        let rootfs: Arc<dyn Source> = Arc::new(source::File::new(self.writer.open(&blob)?)?);
        let view = rootfs::open(rootfs.clone()).and_then(|(image, map)| {
            let cache = Cache::new(0);
            let view = Clustered::new(map, image, cache.clone());
            let file = scratch_file(self.writer.scratch())?;
            cache.scatter(&view, &file)?;
            Ok(Arc::new(source::File::new(file)?) as Arc<dyn Source>)
        });
        match view {
            Ok(files) => Ok(Live { blob, blake3, rootfs, files: Some(files) }),
            Err(e) => {
                tracing::warn!("artifact {label}: {e}; the base disk is stored instead (profile fast)");
                Ok(Live { blob, blake3, rootfs, files: None })
            }
        }
    }

    /// Checks a published file, takes off its outer compression where the stream metadata has a digest of what is
    /// beneath, and unfolds it.
    fn open(&self, item: &Item) -> Result<Plain> {
        self.open_inner(item).with_context(|| format!("artifact {}", item.label()))
    }

    fn open_inner(&self, item: &Item) -> Result<Plain> {
        let path = self.dir.join(&item.name);
        let mut file = File::open(&path).with_context(|| path.display().to_string())?;
        let task = self.progress.task(format!("{}: read", item.label()), Some(file.metadata()?.len()));
        let (sha256, size) = Digest::of_reader(task.reader(&file))?;
        ensure_published(item, &Blob { sha256, size })?;
        task.finish();
        file.rewind()?;
        let form = match item.uncompressed_sha256 {
            None => Form {
                output: NamedFile { name: item.name.clone(), blob: Blob { sha256, size } },
                bytes: Arc::new(source::File::new(file)?),
                published: Wrapped::Same,
            },
            Some(sha256) => {
                let peeled =
                    fold::peel(file.try_clone()?, &item.name, self.writer.scratch(), self.options.max_size)?;
                ensure!(
                    peeled.compression != fold::Compression::None || sha256 == item.sha256,
                    "{}: unknown compression: expected a name in .xz, .gz, .zip or .zst, since the stream has another digest \
                     for the uncompressed file",
                    item.name
                );
                let published = self.published(item, &file, &peeled)?;
                // The name inside a zip, unless it is that of a pipe.
                let member = peeled.member.filter(|name| name != "-" && check_file_name(name).is_ok());
                let name = member.unwrap_or_else(|| item.output_name().to_string());
                let blob = Blob { sha256, size: peeled.form.len() };
                Form { output: NamedFile { name, blob }, bytes: peeled.form, published }
            }
        };
        let unfolded = fold::unfold(&form.bytes, self.writer.scratch(), Effort::Beginning)?;
        Ok(Plain { form, unfolded })
    }

    /// Finds out how the published file is made of what was peeled out of it.
    fn published(&self, item: &Item, file: &File, peeled: &fold::Peeled) -> Result<Wrapped> {
        if peeled.compression == fold::Compression::None {
            return Ok(Wrapped::Same);
        }
        if !self.options.published {
            return Ok(Wrapped::Not("not tried, as was asked for".into()));
        }
        match self.proofs.find(item, file, peeled)? {
            Ok(map) => Ok(Wrapped::By(map)),
            Err(reason) => {
                ensure!(
                    self.options.require != Some(Tier::Published),
                    "it does not come back as published: {reason}"
                );
                tracing::warn!(
                    "artifact {}: comes back uncompressed, but not as published: {reason}",
                    item.label()
                );
                Ok(Wrapped::Not(reason))
            }
        }
    }

    /// Stores what makes `plain`, and proves that it does. `specs` are the sources so far, `known` those of them whose
    /// bytes are proven and need not be made again.
    fn reduce(
        &self,
        item: &Item,
        plain: &Plain,
        over: Option<&Over>,
        specs: &[SourceSpec],
        known: &[Made],
    ) -> Result<Reduced> {
        let label = item.label();
        let form = &plain.form;
        let attempt = |unfolded: &Unfolded| -> Result<Result<Reduced>> {
            let (spec, map) = self.store(&unfolded.plain, unfolded.map.as_ref(), over)?;
            let proven = self.prove(&label, &form.output.blob, (&spec, map), specs, known);
            Ok(proven.map(|blake3| Reduced { spec, plain: unfolded.plain.clone(), map, blake3 }))
        };
        let failed = match attempt(&plain.unfolded)? {
            Ok(reduced) => return Ok(reduced),
            Err(failed) => failed,
        };
        // The form itself may not be what the stream metadata says: then nothing can be right.
        let bytes = source::Reader::new(&*form.bytes);
        store::check(&format!("artifact {label}"), bytes, &form.output.blob)?;
        if plain.unfolded.map.is_none() {
            return Err(failed.context("proof failed"));
        }
        tracing::warn!("{failed:#}: unfolded again, with more effort");
        let again = fold::unfold(&form.bytes, self.writer.scratch(), Effort::Whole)?;
        let failed = match attempt(&again)? {
            Ok(reduced) => return Ok(reduced),
            Err(failed) => failed,
        };
        tracing::warn!("{failed:#}: stored without unfolding");
        attempt(&Unfolded { map: None, plain: form.bytes.clone() })?.context("proof failed")
    }

    /// Stores what makes `plain`: the source, and the map.
    fn store(
        &self,
        plain: &Arc<dyn Source>,
        map: Option<&Map>,
        over: Option<&Over>,
    ) -> Result<(SourceSpec, Option<Blob>)> {
        let plain_size = plain.len();
        let spec = match over {
            Some(over) => {
                let out = blob::Writer::new(self.writer.blob()?, DELTA_LEVEL, blob::LONG_FRAME);
                let blob = self.writer.keep(over.index.diff(&**plain, out)?.finish()?)?;
                let base = over.parts.iter().map(|made| made.spec).chain([over.zeros]).collect();
                SourceSpec::Delta { blob, plain_size, base }
            }
            None => {
                let mut out = blob::Writer::new(self.writer.blob()?, BASE_LEVEL, blob::FRAME);
                io::copy(&mut source::Reader::new(&**plain), &mut out)?;
                SourceSpec::Zstd { blob: self.writer.keep(out.finish()?)?, plain_size }
            }
        };
        Ok((spec, map.map(|map| self.store_map(map)).transpose()?))
    }

    fn store_map(&self, map: &Map) -> Result<Blob> {
        let mut out = blob::Writer::new(self.writer.blob()?, DELTA_LEVEL, blob::LONG_FRAME);
        io::Write::write_all(&mut out, &map.to_bytes())?;
        self.writer.keep(out.finish()?)
    }

    /// Produces an artifact from what was stored for it.
    fn prove(
        &self,
        label: &str,
        expected: &Blob,
        (spec, map): (&SourceSpec, Option<Blob>),
        specs: &[SourceSpec],
        known: &[Made],
    ) -> Result<Blake3> {
        let budget = if known.is_empty() { (self.options.memory / 2).max(PROOF_CACHE) } else { PROOF_CACHE };
        let sources = Sources::new(Cache::new(budget), |blob| {
            Ok(Arc::new(source::File::new(self.writer.open(blob)?)?))
        });
        for made in known {
            sources.substitute(made.spec, made.plain.clone());
        }
        let task = self.progress.task(format!("{label}: prove"), Some(expected.size));
        let threads = if known.is_empty() { rayon::current_num_threads() } else { 1 };
        let how = How { cache: sources.cache(), threads, check: Check::Sha256, task: &task };
        let parts = Parts {
            source: sources.make(specs, spec)?,
            map: map.map(|blob| sources.map(&blob)).transpose()?,
        };
        let found = produce(label, &parts, expected, None, &how, &mut io::sink())?;
        task.finish();
        found.blake3.context("no BLAKE3 digest was made")
    }

    /// Puts a reduced artifact's source into the index, and describes it.
    fn keep(
        &self,
        item: &Item,
        output: (NamedFile, Wrapped),
        reduced: Reduced,
        specs: &mut Vec<SourceSpec>,
    ) -> Result<Artifact> {
        let stored = reduced.spec.blob().map_or(0, |b| b.size) + reduced.map.map_or(0, |b| b.size);
        let source = push(specs, reduced.spec);
        self.artifact(item, output, source, reduced.map, stored, reduced.blake3)
    }

    fn artifact(
        &self,
        item: &Item,
        (output, published): (NamedFile, Wrapped),
        source: usize,
        map: Option<Blob>,
        stored: u64,
        blake3: Blake3,
    ) -> Result<Artifact> {
        let path = self.dir.join(&item.name);
        let size = path.metadata().with_context(|| path.display().to_string())?.len();
        let signature = read_if_there(&self.dir.join(format!("{}.sig", item.name)))?;
        let signature = signature.map(|bytes| {
            self.writer.file(Path::new(store::SIGNATURES).join(format!("{}.sig", item.name)), &bytes)
        });
        let (mut published_map, mut encoders, mut not_published) = (None, BTreeSet::new(), None);
        match published {
            Wrapped::Same => {}
            Wrapped::By(map) => {
                published_map = Some(self.store_map(&map)?);
                encoders = map.encoders();
            }
            Wrapped::Not(reason) => not_published = Some(reason),
        }
        Ok(Artifact {
            arch: item.arch.clone(),
            platform: item.platform.clone(),
            format: item.format.clone(),
            file: item.file.clone(),
            tier: if not_published.is_none() { Tier::Published } else { Tier::Uncompressed },
            published_map,
            encoders,
            not_published,
            published: NamedFile { name: item.name.clone(), blob: Blob { sha256: item.sha256, size } },
            output,
            blake3: Some(blake3),
            source,
            map,
            signature: signature.transpose()?,
            stored: stored + published_map.map_or(0, |b| b.size),
        })
    }
}

/// What a delta goes over.
struct Over<'a> {
    parts: Vec<Made>,
    index: &'a source::delta::Index<'a>,
    zeros: usize,
}

/// What was stored for an artifact.
struct Reduced {
    spec: SourceSpec,
    /// The bytes of the source.
    plain: Arc<dyn Source>,
    map: Option<Blob>,
    blake3: Blake3,
}

fn push(specs: &mut Vec<SourceSpec>, spec: SourceSpec) -> usize {
    specs.push(spec);
    specs.len() - 1
}

/// Checks a published file against the stream metadata.
fn ensure_published(item: &Item, found: &Blob) -> Result<()> {
    found.sha256.must_be(item.sha256).with_context(|| format!("artifact {}: {}", item.label(), item.name))
}
