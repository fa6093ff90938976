//! The index of a dehydrated directory: every artifact, and how each comes back out of the blobs.
//!
//! `docs/format.md` is the normative text; this is its shape in Rust. What is read is checked here once, so that the
//! rest of the program can index `sources` and `blobs` without asking again.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::catalog::{check_file_name, label};
use crate::digest::{Blake3, Digest};

/// The format this program writes. It reads this one and all before it.
pub const FORMAT_VERSION: u32 = 2;

/// The longest `index.json` that is read, in bytes. A release of four architectures needs about 200 KB; parsed, an index
/// takes a multiple of its length in memory.
pub const MAX_INDEX: u64 = 8 << 20;

/// The most artifacts. A release of four architectures has about a hundred.
pub const MAX_ARTIFACTS: usize = 4096;

/// The most sources. An artifact has two or three of its own.
pub const MAX_SOURCES: usize = 4096;

/// The most sources that all sources together are made of. A delta is over two to four.
pub const MAX_INPUTS: usize = 16 << 10;

/// How many sources may be made of each other, one above the other: each is a level of recursion when a byte is read. The
/// deepest that this program makes is six: an earlier live rootfs, its files, a live rootfs, its files, a base disk, a disk.
pub const MAX_DEPTH: usize = 16;

/// How many of those may be the files of a live rootfs: to read a byte of each decodes a cluster that lies in the next.
pub const MAX_ROOTFS_DEPTH: usize = 2;

/// The largest number of bytes that an index may name: a PiB. The sum of those in an index fits in 64 bits.
pub const MAX_SIZE: u64 = 1 << 50;

/// `index.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Index {
    /// [`FORMAT_VERSION`]. A reader refuses a number it does not know before it looks at anything else.
    pub format_version: u32,
    /// Who wrote this, for people.
    pub generator: String,
    /// The stream document, `stream.json`.
    pub stream: StreamFile,
    /// Every artifact of the stream that is in here, in the order of the stream document.
    pub artifacts: Vec<Artifact>,
    /// Artifacts of the stream that are not in here, each with the reason; empty unless they were allowed to be.
    #[serde(default)]
    pub unhandled: Vec<Unhandled>,
    /// What the artifacts are made of. A source refers only to sources before it.
    pub sources: Vec<SourceSpec>,
    /// The live rootfs of each architecture that that of this release is a delta over, where that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<Previous>,
}

/// A file of an earlier release that is a source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Previous {
    /// Target architecture.
    pub arch: String,
    /// The file as that release published it.
    #[serde(flatten)]
    pub file: NamedFile,
}

/// The stream document as stored beside the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StreamFile {
    /// The stream's own name, such as `stable`.
    pub name: String,
    /// The document, byte for byte as published.
    #[serde(flatten)]
    pub blob: Blob,
}

/// A file of known length and digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Blob {
    /// Its digest, and its name under `blobs/sha256/`.
    pub sha256: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// A named file of known length and digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// A single path component.
    pub name: String,
    /// What is in it.
    #[serde(flatten)]
    pub blob: Blob,
}

/// The form in which an artifact comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The file as published, so that its signature verifies.
    Published,
    /// The file without its outer compression.
    Uncompressed,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Tier::Published => "published",
            Tier::Uncompressed => "uncompressed",
        })
    }
}

/// One file of the stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Artifact {
    /// Target architecture, as the stream document names it.
    pub arch: String,
    /// Platform, such as `openstack` or `metal`.
    pub platform: String,
    /// Format, such as `qcow2.xz`, `iso` or `pxe`.
    pub format: String,
    /// Which file of the format: `disk`, or `kernel`, `initramfs`, `rootfs` for `pxe`.
    pub file: String,
    /// The file as published.
    pub published: NamedFile,
    /// The file that comes out: what the stream metadata has a digest of, uncompressed where it names that.
    pub output: NamedFile,
    /// The BLAKE3 digest of the output, recorded when its SHA-256 digest was proven; version 1 has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<Blake3>,
    /// Which of the two forms comes back at most.
    pub tier: Tier,
    /// The segment map that makes the published file of the output, where that is another file and can be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_map: Option<Blob>,
    /// What `published_map` needs to make the published file, with versions.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub encoders: BTreeSet<String>,
    /// Why the published file cannot be made, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_published: Option<String>,
    /// The source of the plain bytes: an index into [`Index::sources`].
    pub source: usize,
    /// The segment map that makes the output of the plain bytes; without one, they are the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<Blob>,
    /// Upstream's detached signature of the published file, `signatures/NAME.sig`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Blob>,
    /// Bytes of blobs that were added to the store for this artifact.
    pub stored: u64,
}

impl Artifact {
    /// A short name for messages: `openstack`, `metal iso`, `metal pxe rootfs`.
    pub fn label(&self) -> String {
        label(&self.platform, &self.format, &self.file)
    }

    /// The file that comes out.
    pub fn file_of(&self, tier: Tier) -> &NamedFile {
        match tier {
            Tier::Published => &self.published,
            Tier::Uncompressed => &self.output,
        }
    }

    /// Whether it is the live ISO.
    pub fn is_iso(&self) -> bool {
        self.format == "iso"
    }

    /// Whether it belongs to the live PXE set.
    pub fn is_pxe(&self) -> bool {
        self.format == "pxe"
    }

    /// What `--disk` calls it: its platform, with `4k` behind it for the disk with sectors of 4096 bytes. The live ISO
    /// and the PXE set are no disks.
    pub fn disk(&self) -> Option<String> {
        let sectors = if self.format.starts_with("4k.") { "4k" } else { "" };
        (!self.is_iso() && !self.is_pxe()).then(|| format!("{}{sectors}", self.platform))
    }
}

/// An artifact that was left out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unhandled {
    /// Target architecture.
    pub arch: String,
    /// The published file's name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// A source, by how it is made.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum SourceSpec {
    /// Zero bytes.
    Zeros {
        /// How many.
        size: u64,
    },
    /// A blob as it is.
    Stored {
        /// The blob.
        #[serde(flatten)]
        blob: Blob,
    },
    /// A blob of seekable zstd.
    Zstd {
        /// The blob.
        #[serde(flatten)]
        blob: Blob,
        /// Length when decoded.
        plain_size: u64,
    },
    /// A librsync delta, itself seekable zstd, over the concatenation of `base`.
    Delta {
        /// The blob.
        #[serde(flatten)]
        blob: Blob,
        /// Length of what the delta makes.
        plain_size: u64,
        /// The sources it copies from, by index.
        base: Vec<usize>,
    },
    /// The files of the live root file system in a live rootfs (a newc cpio), each padded to 4096 bytes.
    Rootfs {
        /// The source that holds the live rootfs.
        image: usize,
        /// Length of all the padded files.
        plain_size: u64,
    },
}

impl SourceSpec {
    /// The blob that the source itself reads.
    pub fn blob(&self) -> Option<Blob> {
        match self {
            Self::Stored { blob } | Self::Zstd { blob, .. } | Self::Delta { blob, .. } => Some(*blob),
            Self::Zeros { .. } | Self::Rootfs { .. } => None,
        }
    }

    /// Its length in bytes.
    pub fn plain_size(&self) -> u64 {
        match self {
            Self::Stored { blob } => blob.size,
            Self::Zeros { size: plain_size }
            | Self::Zstd { plain_size, .. }
            | Self::Delta { plain_size, .. }
            | Self::Rootfs { plain_size, .. } => *plain_size,
        }
    }

    /// The sources it is made of.
    pub fn inputs(&self) -> &[usize] {
        match self {
            Self::Delta { base, .. } => base,
            Self::Rootfs { image, .. } => std::slice::from_ref(image),
            Self::Zeros { .. } | Self::Stored { .. } | Self::Zstd { .. } => &[],
        }
    }
}

impl Index {
    /// Reads and checks an index.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        /// Only the version, so that a later format is refused by its number and not by its shape.
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Version {
            format_version: u32,
        }
        let Version { format_version } = serde_json::from_slice(bytes).context("index.json: not an index")?;
        ensure!(
            (1..=FORMAT_VERSION).contains(&format_version),
            "index.json: format version {format_version}: this program reads versions 1 to {FORMAT_VERSION}"
        );
        let index: Self = serde_json::from_slice(bytes).context("index.json: not an index")?;
        index.check().context("index.json")?;
        Ok(index)
    }

    /// The bytes of `index.json`.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("an index is plain data");
        bytes.push(b'\n');
        bytes
    }

    fn check(&self) -> Result<()> {
        at_most("artifacts", self.artifacts.len(), MAX_ARTIFACTS)?;
        self.check_sources()?;
        let named = self.previous.iter().map(|previous| (&previous.file.name, previous.file.blob.size));
        for (name, size) in named.chain([(&self.stream.name, self.stream.blob.size)]) {
            at_most(&format!("bytes of {name}"), size, MAX_SIZE)?;
        }
        let mut names = BTreeSet::new();
        for artifact in &self.artifacts {
            ensure!(
                artifact.source < self.sources.len(),
                "artifact {}: no source {}",
                artifact.published.name,
                artifact.source
            );
            for name in [&artifact.published.name, &artifact.output.name] {
                check_file_name(name)?;
            }
            let blobs = [artifact.map, artifact.published_map, artifact.signature].into_iter().flatten();
            let sizes = blobs.chain([artifact.published.blob, artifact.output.blob]).map(|blob| blob.size);
            for size in sizes.chain([artifact.stored]) {
                at_most(&format!("artifact {}: bytes", artifact.published.name), size, MAX_SIZE)?;
            }
            ensure!(names.insert(&artifact.output.name), "two artifacts are named {}", artifact.output.name);
            ensure!(
                artifact.published.name == artifact.output.name || names.insert(&artifact.published.name),
                "two artifacts are named {}",
                artifact.published.name
            );
            let published = artifact.published == artifact.output || artifact.published_map.is_some();
            ensure!(
                published == (artifact.tier == Tier::Published),
                "artifact {}: it cannot be of tier {}",
                artifact.published.name,
                artifact.tier
            );
        }
        Ok(())
    }

    /// Checks what opening and reading the sources costs, whoever wrote the index.
    fn check_sources(&self) -> Result<()> {
        at_most("sources", self.sources.len(), MAX_SOURCES)?;
        let inputs = self.sources.iter().map(|source| source.inputs().len());
        at_most("sources that sources are made of", inputs.sum(), MAX_INPUTS)?;
        // Of each source how many are above each other down to it, and how many of those are files of a live rootfs.
        let mut depths: Vec<(usize, usize)> = Vec::with_capacity(self.sources.len());
        for (i, source) in self.sources.iter().enumerate() {
            let mut depth = (0, 0);
            for &input in source.inputs() {
                let Some(below) = depths.get(input) else {
                    bail!("source {i} is made of source {input}, which is not before it");
                };
                depth = (depth.0.max(below.0), depth.1.max(below.1));
            }
            depth.0 += 1;
            depth.1 += usize::from(matches!(source, SourceSpec::Rootfs { .. }));
            at_most(&format!("source {i}: sources over each other"), depth.0, MAX_DEPTH)?;
            at_most(&format!("source {i}: live rootfs in each other"), depth.1, MAX_ROOTFS_DEPTH)?;
            at_most(&format!("source {i}: bytes"), source.plain_size(), MAX_SIZE)?;
            let stored = source.blob().map_or(0, |blob| blob.size);
            at_most(&format!("source {i}: bytes of its blob"), stored, MAX_SIZE)?;
            depths.push(depth);
        }
        Ok(())
    }

    /// The sources that `artifact` is made of, by index.
    pub fn sources_of(&self, artifact: &Artifact) -> BTreeSet<usize> {
        self.sources_below([artifact.source])
    }

    /// Bytes that are stored of source `i` and of what it is made of.
    pub fn stored_below(&self, i: usize) -> u64 {
        self.sources_below([i]).into_iter().filter_map(|i| self.sources[i].blob()).map(|blob| blob.size).sum()
    }

    /// These sources and what they are made of, by index.
    fn sources_below(&self, tops: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let mut todo = Vec::from_iter(tops);
        while let Some(i) = todo.pop() {
            if found.insert(i) {
                todo.extend(self.sources[i].inputs());
            }
        }
        found
    }

    /// The blobs that `artifact` is made of, each once: those of its sources and its maps.
    pub fn blobs_of(&self, artifact: &Artifact) -> BTreeSet<Blob> {
        let sources = self.sources_of(artifact);
        let maps = artifact.map.into_iter().chain(artifact.published_map);
        maps.chain(sources.into_iter().filter_map(|i| self.sources[i].blob())).collect()
    }

    /// Every blob under `blobs/sha256/`, each once.
    pub fn blobs(&self) -> BTreeSet<Blob> {
        // The sources that artifacts share are looked at once.
        let sources = self.sources_below(self.artifacts.iter().map(|a| a.source));
        let maps = self.artifacts.iter().flat_map(|a| a.map.into_iter().chain(a.published_map));
        maps.chain(sources.into_iter().filter_map(|i| self.sources[i].blob())).collect()
    }

    /// The live rootfs that is stored for an architecture, this release's or the earlier one that it is made of.
    pub fn stored_rootfs(&self, arch: &str) -> Option<Previous> {
        let artifact = self.artifacts.iter().find(|a| a.arch == arch && a.file == "rootfs")?;
        match &self.sources[artifact.source] {
            SourceSpec::Stored { blob } if *blob == artifact.output.blob => {
                Some(Previous { arch: arch.into(), file: artifact.output.clone() })
            }
            _ => self.previous.iter().find(|previous| previous.arch == arch).cloned(),
        }
    }

    /// The architectures in here, sorted.
    pub fn architectures(&self) -> BTreeSet<&str> {
        self.artifacts.iter().map(|a| a.arch.as_str()).collect()
    }
}

/// Checks a number of the index against its limit.
fn at_most<N: PartialOrd + std::fmt::Display>(what: &str, found: N, most: N) -> Result<()> {
    ensure!(found <= most, "{what}: {found}, at most {most} are read");
    Ok(())
}
