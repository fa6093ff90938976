//! Gives artifacts back: picks them, and produces each into the sink that was asked for.
//!
//! Order. A disk does not lie in the order of the live rootfs that its base is made of. On a pipe each cluster is
//! decoded when it is first needed and kept, within the memory, until it is not needed any more (the plan of
//! [`Cache`]). Into a directory memory is not needed: the base is first written to an unnamed file there, cluster by
//! cluster, and artifacts are read from it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::catalog::SIGNATURE;
use crate::produce::{Check, How, Parts, Published, produce, produce_published};
use crate::progress::Progress;
use crate::recipe::{Artifact, Index, NamedFile, SourceSpec, Tier};
use crate::sink::{self, NewFile, Output, Tar};
use crate::source;
use crate::source::cluster::{Cache, limited};
use crate::store::{Sources, Store};

/// Where artifacts go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dest {
    /// Standard output: one artifact as its bytes, several as a tar stream.
    Stdout,
    /// Files in a directory, which is made when it is not there.
    Dir(PathBuf),
    /// Nowhere: only the digests are checked.
    Nowhere,
}

/// Which artifacts; several of these add up.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["disks", "iso", "pxe", "all"]))]
pub struct Which {
    /// The disk image of a platform, metal4k for the metal one with sectors of 4096 bytes; may be repeated
    #[arg(long = "disk", value_name = "PLATFORM")]
    pub disks: Vec<String>,
    /// The live ISO
    #[arg(long)]
    pub iso: bool,
    /// The live PXE set: kernel, initramfs and rootfs
    #[arg(long)]
    pub pxe: bool,
    /// Everything
    #[arg(long)]
    pub all: bool,
    /// Target architecture [default: this machine's, or the only one there is]
    #[arg(long)]
    pub arch: Option<String>,
}

/// How to rehydrate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory that may be used, in bytes.
    pub memory: u64,
    /// Which digests to check.
    pub check: Check,
    /// Whether to replace files that differ.
    pub force: bool,
    /// Which form comes out.
    pub form: Tier,
}

/// The least memory that rehydrating gets along with, in bytes.
pub const MIN_MEMORY: u64 = 256 << 20;

/// Memory that everything but the cache needs: buffers, decoders, tables. Bytes.
const OVERHEAD: u64 = 96 << 20;

/// What may be decoded to open a source, or to look into it: so many bytes, and so many for each byte that is stored of it.
/// Deltas are decoded whole for that, and the metadata of the live rootfs.
const OPENING: u64 = 512 << 20;
const OPENING_PER_BYTE: u64 = 256;

/// A base of at least this length is written out before artifacts are written into a directory.
const LARGE_BASE: u64 = 32 << 20;

/// And of at most so many times the artifact's length: a compressed image of a disk of 10 GiB has some hundred MiB.
const LARGEST_BASE: u64 = 64;

/// A dehydrated directory with its sources open.
pub struct Rehydrator {
    store: Arc<Store>,
    sources: Sources<'static>,
    threads: usize,
    /// Memory that is left for the encoders of published files.
    encoders: u64,
}

impl Rehydrator {
    /// Opens the sources of `store`, to use at most `memory` bytes.
    pub fn new(store: Arc<Store>, memory: u64) -> Result<Self> {
        Self::new_for(store, memory, Tier::Uncompressed)
    }

    /// As [`new`](Self::new), to make artifacts in this form. For published files a quarter of the memory is the
    /// cache's, and what is left the encoders', of which one is used at least, whatever it needs.
    pub fn new_for(store: Arc<Store>, memory: u64, form: Tier) -> Result<Self> {
        let blobs = store.clone();
        let memory = memory.max(MIN_MEMORY) - OVERHEAD;
        let encoders = if form == Tier::Published { memory - memory / 4 } else { 0 };
        let cache = Cache::new(memory - encoders);
        let sources = Sources::new(cache, move |blob| blobs.blob(blob));
        let threads = std::thread::available_parallelism().map_or(1, Into::into);
        Ok(Self { store, sources, threads, encoders })
    }

    /// The directory.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its open sources.
    pub fn sources(&self) -> &Sources<'static> {
        &self.sources
    }

    /// The cache that they share.
    pub fn cache(&self) -> &Cache {
        self.sources.cache()
    }

    /// What `artifact` is made of.
    pub fn parts(&self, artifact: &Artifact) -> Result<Parts> {
        self.bounded(artifact.source, || {
            let source = self.sources.get(&self.store.index.sources, artifact.source)?;
            let map = artifact.map.map(|blob| self.sources.map(&blob)).transpose()?;
            Ok(Parts { source, map })
        })
    }

    /// Runs `f`, which opens source `i` or looks into it here and there, and bounds what that decodes.
    pub fn bounded<R>(&self, i: usize, f: impl FnOnce() -> R) -> R {
        let stored = self.store.index.stored_below(i);
        limited(stored.saturating_mul(OPENING_PER_BYTE).saturating_add(OPENING), f)
    }

    /// Writes `artifact` to `out` in this form, and checks it. What is damaged is named in the error.
    pub fn write(
        &self,
        artifact: &Artifact,
        form: Tier,
        check: Check,
        progress: &Progress,
        out: &mut dyn Output,
    ) -> Result<()> {
        let name = artifact.label();
        let output = &artifact.output.blob;
        let task = progress.task(&name, Some(output.size));
        let how = How { cache: self.sources.cache(), threads: self.threads, check, task: &task };
        let mut write = || -> Result<()> {
            let parts = self.parts(artifact).with_context(|| format!("artifact {name}"))?;
            match artifact.published_map.filter(|_| form == Tier::Published) {
                None => produce(&name, &parts, output, artifact.blake3, &how, out).map(drop),
                Some(map) => {
                    let map = self.sources.map(&map).with_context(|| format!("artifact {name}"))?;
                    let expected = artifact.published.blob;
                    let published = Published { map, expected, memory: self.encoders };
                    produce_published(&name, &parts, output.size, &published, &how, out)
                }
            }
        };
        let result = write();
        let stats = self.sources.cache().stats();
        tracing::debug!(artifact = name, clusters = stats.clusters, decodes = stats.decodes, "produced");
        if result.is_ok() {
            task.finish();
        }
        result.map_err(|e| if is_broken_pipe(&e) { e } else { self.diagnose(artifact, e) })
    }

    /// Adds to `error` which blobs of `artifact` are damaged.
    fn diagnose(&self, artifact: &Artifact, error: anyhow::Error) -> anyhow::Error {
        let bad = self.store.index.blobs_of(artifact).iter().find_map(|blob| self.store.verify(blob).err());
        match bad {
            Some(bad) => error.context(format!("artifact {}: {bad:#}", artifact.label())),
            None => error,
        }
    }

    /// Writes source `i` to an unnamed file in `dir`, each cluster of it decoded once, and reads it from there.
    pub fn write_out(&self, i: usize, dir: &Path) -> Result<()> {
        let source = self.bounded(i, || self.sources.get(&self.store.index.sources, i))?;
        let file = crate::io::scratch_file(dir).with_context(|| dir.display().to_string())?;
        let clusters = self.cache().scatter(&*source, &file)?;
        tracing::debug!(source = i, clusters, decodes = clusters, "written out");
        self.sources.substitute(i, Arc::new(source::File::new(file)?));
        Ok(())
    }

    /// The large bases of `artifact` that lie in another order than the live rootfs they are made of, by index, with
    /// their lengths: worth to be written out.
    pub fn bases(&self, artifact: &Artifact) -> Vec<(usize, u64)> {
        let specs = &self.store.index.sources;
        // A disk is mostly holes, but what is not takes room: no more than it could be the base of.
        let most = artifact.output.blob.size.saturating_mul(LARGEST_BASE);
        let base = |i: usize| {
            let size = specs[i].plain_size();
            // What is mostly made of those files has them in front. The ISO, which has them last, reads a few clusters.
            let over_rootfs = matches!(specs[*specs[i].inputs().first()?], SourceSpec::Rootfs { .. });
            (over_rootfs && (LARGE_BASE..=most).contains(&size)).then_some((i, size))
        };
        self.store.index.sources_of(artifact).into_iter().filter_map(base).collect()
    }

    /// Writes the bases that `artifacts` share to unnamed files in `dir`.
    fn write_out_bases(&self, artifacts: &[&Artifact], dir: &Path) -> Result<()> {
        let mut done = BTreeSet::new();
        for artifact in artifacts {
            for (i, _) in self.bases(artifact) {
                if done.insert(i) {
                    self.write_out(i, dir).map_err(|e| self.diagnose(artifact, e))?;
                }
            }
        }
        Ok(())
    }
}

/// Whether nobody reads what is written: not worth looking for damage.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Rehydrates what `which` says out of `store` into `dest`.
pub fn rehydrate(
    store: &Arc<Store>,
    which: &Which,
    dest: &Dest,
    options: &Options,
    progress: &Progress,
) -> Result<()> {
    if *dest == Dest::Stdout && io::stdout().is_terminal() {
        bail!("refusing to write disk images to a terminal; redirect stdout or name a directory");
    }
    let form = options.form;
    let rehydrator = Rehydrator::new_for(store.clone(), options.memory, form)?;
    let artifacts = select(&rehydrator.store.index, which)?;
    if form == Tier::Published {
        ensure_published(&artifacts)?;
    }
    let write = |artifact: &Artifact, out: &mut dyn Output| {
        rehydrator.write(artifact, form, options.check, progress, out)
    };
    // The signature goes with the file that it is of.
    let signature = |artifact: &Artifact| {
        let signature = artifact.signature.filter(|_| form == Tier::Published)?;
        let name = format!("{}{SIGNATURE}", artifact.published.name);
        let bytes = rehydrator.store.signature(&artifact.published.name, &signature);
        Some(bytes.map(|bytes| (NamedFile { name, blob: signature }, bytes)))
    };
    match dest {
        Dest::Stdout => match artifacts[..] {
            [artifact] => write(artifact, &mut io::stdout()),
            _ => {
                let mut tar = Tar::new(io::stdout());
                for artifact in artifacts {
                    let file = artifact.file_of(form);
                    tar.member(&file.name, file.blob.size, |out| write(artifact, out))?;
                    if let Some((file, bytes)) = signature(artifact).transpose()? {
                        tar.member(&file.name, file.blob.size, |out| Ok(out.write_all(&bytes)?))?;
                    }
                }
                Ok(tar.finish()?)
            }
        },
        Dest::Nowhere => artifacts.into_iter().try_for_each(|a| write(a, &mut io::sink())),
        Dest::Dir(dir) => {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
            let mut missing = Vec::new();
            for artifact in &artifacts {
                let file = artifact.file_of(form);
                if sink::is_there(dir, &file.name, &file.blob, options.force)? {
                    tracing::info!("{} is there already", file.name);
                } else {
                    missing.push(*artifact);
                }
            }
            // Signatures last: one that is there has a file beside it.
            let mut signatures = Vec::new();
            for artifact in artifacts {
                if let Some((file, bytes)) = signature(artifact).transpose()?
                    && !sink::is_there(dir, &file.name, &file.blob, options.force)?
                {
                    signatures.push((file.name, bytes));
                }
            }
            rehydrator.write_out_bases(&missing, dir)?;
            for artifact in missing {
                let mut file = NewFile::create(dir, &artifact.file_of(form).name)?;
                write(artifact, &mut file)?;
                file.commit()?;
            }
            for (name, bytes) in signatures {
                let mut file = NewFile::create(dir, &name)?;
                file.write_all(&bytes).with_context(|| name.clone())?;
                file.commit()?;
            }
            Ok(())
        }
    }
}

/// Checks that the published file of each can be made; the error says of each why it cannot.
fn ensure_published(artifacts: &[&Artifact]) -> Result<()> {
    let cannot: Vec<String> = artifacts
        .iter()
        .filter(|a| a.tier != Tier::Published)
        .map(|a| {
            format!("{}: {}", a.published.name, a.not_published.as_deref().unwrap_or("reason not recorded"))
        })
        .collect();
    ensure!(
        cannot.is_empty(),
        "without --published these come out uncompressed, but not as published: {}",
        cannot.join("; ")
    );
    Ok(())
}

/// The artifacts of `index` that `which` says; at least one.
pub fn select<'a>(index: &'a Index, which: &Which) -> Result<Vec<&'a Artifact>> {
    let Which { disks, iso, pxe, all, .. } = which;
    let arch = pick_arch(index, which.arch.as_deref())?;
    let here: Vec<&Artifact> = index.artifacts.iter().filter(|a| a.arch == arch).collect();
    let wanted = |a: &Artifact| {
        *all || *iso && a.is_iso() || *pxe && a.is_pxe() || a.disk().is_some_and(|d| disks.contains(&d))
    };
    let missing = |what: &str| format!("{arch}: no {what} in this release");
    for disk in disks {
        let has: BTreeSet<String> = here.iter().filter_map(|a| a.disk()).collect();
        ensure!(
            has.contains(disk),
            "{}; it has {}",
            missing(&format!("disk image for {disk}")),
            Vec::from_iter(has).join(", ")
        );
    }
    ensure!(!iso || here.iter().any(|a| a.is_iso()), missing("live ISO"));
    ensure!(!pxe || here.iter().any(|a| a.is_pxe()), missing("live PXE set"));
    Ok(here.into_iter().filter(|a| wanted(a)).collect())
}

/// The architecture asked for, or this machine's, or the only one there is.
pub fn pick_arch<'a>(index: &'a Index, asked: Option<&str>) -> Result<&'a str> {
    let has = index.architectures();
    let list = || Vec::from_iter(has.iter().copied()).join(", ");
    let host = match std::env::consts::ARCH {
        "powerpc64" => "ppc64le",
        arch => arch,
    };
    match asked {
        Some(arch) => has
            .get(arch)
            .copied()
            .with_context(|| format!("no artifacts for architecture {arch}; this release has {}", list())),
        None => match has.len() {
            1 => Ok(has.first().copied().unwrap_or_default()),
            _ => has.get(host).copied().with_context(|| {
                format!(
                    "no artifacts for this machine's architecture, {host}; --arch picks one of {}",
                    list()
                )
            }),
        },
    }
}

/// The artifact that `what` names: its output or published name, or what `--disk` calls it.
pub fn find<'a>(index: &'a Index, what: &str, arch: Option<&str>) -> Result<&'a Artifact> {
    if let Some(artifact) = index.artifacts.iter().find(|a| a.output.name == what || a.published.name == what)
    {
        return Ok(artifact);
    }
    let arch = pick_arch(index, arch)?;
    let named = |a: &&Artifact| a.arch == arch && a.disk().is_some_and(|disk| disk == what);
    index
        .artifacts
        .iter()
        .find(named)
        .with_context(|| format!("{arch}: no artifact and no platform {what:?}"))
}

/// Prints the stream document to `out`, byte for byte.
pub fn print_stream(store: &Store, out: &mut dyn Write) -> Result<()> {
    Ok(out.write_all(&store.stream()?)?)
}
