//! `inspect`: what a file is and what is on it, read through a [`Source`], so that an artifact is looked into without
//! being put together on a disk first.
//!
//! ```text
//! bytes ─► compressed? its beginning ─► archive? its largest file ─► disk image? the guest's view ─► GPT ─► file systems
//! ```
//!
//! Every file is taken for hostile: what is read is bounded, and what cannot be read is named in the report, beside what
//! can.

mod archive;
mod disk;
mod foreign;
mod guest;
mod iso;
mod kernel;
mod packed;
mod qcow2;
mod read;
mod vhd;
mod vhdx;
mod vmdk;

use std::fmt;
use std::io;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;

use crate::source::Source;
use crate::terminal::plain;
pub use guest::GuestDisk;
use packed::Packing;

/// How many bytes of a file are read to tell what it is; the furthest magic number is that of a kernel for s390x.
const START: usize = 68 << 10;

/// How many containers inside each other are opened. `ociarchive` → layer (gzip) → tar → qcow2 are four.
const MAX_DEPTH: u32 = 8;

/// How many files of an archive are listed for people.
const MAX_SHOWN: usize = 16;

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names of formats say what they are")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    /// VHD, by the name that QEMU gives it.
    Vpc,
    Vhdx,
    Vdi,
    Qed,
    Parallels,
    Iso9660,
    Tar,
    Ova,
    Ociarchive,
    Cpio,
    Zip,
    Gzip,
    Xz,
    Zstd,
    Kernel,
    /// A program, or a kernel in the form that POWER boots.
    Elf,
    /// None of the above.
    Unknown,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
            Self::Iso9660 => "iso9660",
            Self::Tar => "tar",
            Self::Ova => "ova",
            Self::Ociarchive => "ociarchive",
            Self::Cpio => "cpio",
            Self::Zip => "zip",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Kernel => "kernel",
            Self::Elf => "elf",
            Self::Unknown => "unknown",
        })
    }
}

/// What was found out about a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// What it is.
    pub format: Format,
    /// The variant of the format, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Length in bytes; `None` when it is compressed and its container does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// How many bytes from the beginning were looked at, when it is compressed and too long to be decoded whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub looked_at: Option<u64>,
    /// Whether the format itself compresses its data (qcow2, VMDK).
    #[serde(skip_serializing_if = "is_false")]
    pub compressed: bool,
    /// Length of the disk or volume in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    /// Bytes of a logical sector: of the partition table, or else as the format records it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sector_size: Option<u32>,
    /// `ignition.platform.id` in the boot partition's loader entries, or an ISO's kernel arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform_id: Option<String>,
    /// The partitions of the GPT.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub partitions: Vec<Partition>,
    /// The file system that takes up all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<Filesystem>,
    /// What only an ISO image has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iso: Option<Iso>,
    /// The files of an archive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<Member>,
    /// What is in a compressed file, the largest file of an archive, or what follows a cpio archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inside: Option<Box<Inside>>,
    /// What could not be read, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<String>,
}

/// What is inside of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inside {
    /// Its name, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is.
    #[serde(flatten)]
    pub report: Report,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its type, as people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub type_name: Option<String>,
    /// Its type, in upper case.
    pub type_id: String,
    /// Its own UUID, in lower case.
    pub uuid: String,
    /// Where it starts, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
    /// What is on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<Filesystem>,
}

/// A file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// Its kind, as `blkid` names it.
    pub kind: String,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Its UUID, as `blkid` writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// All files of an EFI system partition; the loader entries of a boot partition.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Why its files could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
}

/// What only an ISO image has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Iso {
    /// The volume identifier.
    pub volume_id: String,
    /// There is an MBR with a partition, so that it boots from a USB stick.
    pub hybrid_mbr: bool,
    /// There is a GPT too.
    pub hybrid_gpt: bool,
    /// The El Torito boot images.
    pub boot: Vec<BootEntry>,
    /// The files in `images/pxeboot`.
    pub pxeboot: Vec<Member>,
}

/// An El Torito boot image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BootEntry {
    /// For which firmware: `BIOS`, `UEFI`, `PowerPC`, `Mac` or a number.
    pub platform: String,
    /// Whether it is marked bootable.
    pub bootable: bool,
    /// Where it is, in bytes.
    pub offset: u64,
    /// How many 512-byte sectors the firmware loads.
    pub sectors: u16,
}

/// A file of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Finds out what `source` is, and what is on it.
///
/// An error means that not even its beginning can be read; everything else that is damaged is in
/// [`Report::unreadable`].
pub fn inspect(source: Arc<dyn Source>) -> Result<Report> {
    let size = source.len();
    Ok(look(source, Some(size), 0)?)
}

/// Looks at `source`, which may be only the beginning of `size` bytes, or of an unknown number of them.
fn look(source: Arc<dyn Source>, size: Option<u64>, depth: u32) -> io::Result<Report> {
    let start = read::padded(&*source, 0, START)?;
    let mut report = Report {
        format: Format::Unknown,
        detail: None,
        size,
        looked_at: Some(source.len()).filter(|len| size != Some(*len)),
        compressed: false,
        virtual_size: None,
        sector_size: None,
        platform_id: None,
        partitions: Vec::new(),
        filesystem: None,
        iso: None,
        members: Vec::new(),
        inside: None,
        unreadable: Vec::new(),
    };
    if let Err(e) = report.fill(source, &start, depth) {
        report.unreadable.push(format!("{e:#}"));
    }
    Ok(report)
}

impl Report {
    /// Fills in what `source`, which begins with `start`, is.
    fn fill(&mut self, source: Arc<dyn Source>, start: &[u8], depth: u32) -> Result<()> {
        let partial = self.looked_at.is_some();
        if let Some(format) = guest::detect(&*source)? {
            self.format = format;
            let opened = guest::open(format, &*source)?;
            self.detail = Some(opened.detail);
            self.compressed = opened.compressed;
            self.sector_size = opened.sector_size;
            self.virtual_size = Some(opened.layout.len());
            let disk: Arc<dyn Source> = Arc::new(GuestDisk::new(source, opened.layout));
            disk::look(&disk, partial, self);
            return Ok(());
        }
        if let Some((format, size)) = foreign::detect(start) {
            (self.format, self.virtual_size) = (format, Some(size));
            anyhow::bail!("the disk in a {format} image is not looked into; qemu-img converts it");
        }
        if iso::is_iso(start) {
            self.format = Format::Iso9660;
            return iso::look(&source, partial, self);
        }
        if let Some(packing) = packed::packing(start) {
            self.format = match packing {
                Packing::Gzip | Packing::Deflate => Format::Gzip,
                Packing::Xz => Format::Xz,
                Packing::Zstd => Format::Zstd,
            };
            let size = if partial { None } else { packed::plain_len(&*source, packing) };
            let inner = archive::Inner { name: None, bytes: source, size, packing: Some(packing) };
            return self.look_inside(inner, depth);
        }
        let (format, archive) = if archive::is_cpio(start) {
            (Format::Cpio, archive::cpio(&source, partial))
        } else if start.starts_with(b"PK\x03\x04") {
            (Format::Zip, archive::zip(&source))
        } else if start[257..].starts_with(b"ustar") {
            (Format::Tar, archive::tar(&source, partial))
        } else {
            if let Some(machine) = kernel::elf(start) {
                (self.format, self.detail) = (Format::Elf, Some(machine));
                return Ok(());
            }
            if let Some(detail) = kernel::kernel(start) {
                (self.format, self.detail) = (Format::Kernel, Some(detail));
                return Ok(());
            }
            disk::look(&source, partial, self);
            if !self.partitions.is_empty() || self.filesystem.is_some() || !self.unreadable.is_empty() {
                (self.format, self.virtual_size) = (Format::Raw, self.size);
            }
            return Ok(());
        };
        self.format = format;
        let archive = archive?;
        if format == Format::Tar {
            self.format = archive::tar_format(&archive.members);
        }
        self.members = archive.members;
        archive.inner.map_or(Ok(()), |inner| self.look_inside(inner, depth))
    }

    /// Looks at what is inside, one level down.
    fn look_inside(&mut self, inner: archive::Inner, depth: u32) -> Result<()> {
        if depth == MAX_DEPTH {
            anyhow::bail!("more than {MAX_DEPTH} containers inside each other");
        }
        let (bytes, size) = match inner.packing {
            None => {
                let (len, size) = (inner.bytes.len(), inner.size);
                if let Some(size) = size.filter(|size| *size > len && self.looked_at.is_none()) {
                    self.unreadable.push(format!("largest file: expected {size} bytes, found {len}"));
                }
                (inner.bytes, size)
            }
            Some(packing) => {
                let head = packed::head(&inner.bytes, packing);
                let len = head.bytes.len() as u64;
                // Where only the beginning of a compressed file is there, it ends in the middle of something.
                let cut = self.looked_at.is_some() && head.error.is_some();
                match head.error {
                    Some(error) if !cut => {
                        self.unreadable.push(format!("compressed data after {len} bytes: {error}"))
                    }
                    _ => {}
                }
                self.detail = head.followed_at.map(|at| format!("something else follows at {at}"));
                (Arc::new(head.bytes) as Arc<dyn Source>, if head.whole { Some(len) } else { inner.size })
            }
        };
        let report = look(bytes, size, depth + 1)?;
        // The largest file of an initramfs says nothing about it.
        if self.format == Format::Cpio && inner.name.is_some() && report.filesystem.is_none() {
            return Ok(());
        }
        self.inside = Some(Box::new(Inside { name: inner.name, report }));
        Ok(())
    }

    /// The platform id, here or in what is inside.
    pub fn platform_id(&self) -> Option<&str> {
        self.platform_id.as_deref().or_else(|| self.inside.as_ref()?.report.platform_id())
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, indent: &str) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            writeln!(f, "{indent}{:14}{}", format!("{name}:"), plain(value))
        };
        match &self.detail {
            Some(detail) => line(f, "format", &format_args!("{} ({detail})", self.format))?,
            None => line(f, "format", &self.format)?,
        }
        if let Some(size) = self.size {
            line(f, "size", &Size(size))?;
        }
        if let Some(len) = self.looked_at {
            line(f, "looked at", &format_args!("the first {}", Size(len)))?;
        }
        if let Some(size) = self.virtual_size {
            line(f, "virtual size", &Size(size))?;
        }
        if let Some(size) = self.sector_size {
            line(f, "sector size", &size)?;
        }
        if let Some(id) = &self.platform_id {
            line(f, "platform id", id)?;
        }
        if let Some(filesystem) = &self.filesystem {
            line(f, "file system", filesystem)?;
            filesystem.write_files(f, indent)?;
        }
        if let Some(iso) = &self.iso {
            line(f, "volume id", &iso.volume_id)?;
            let hybrid = match (iso.hybrid_mbr, iso.hybrid_gpt) {
                (true, true) => "MBR and GPT",
                (true, false) => "MBR",
                (false, true) => "GPT",
                (false, false) => "no",
            };
            line(f, "hybrid", &hybrid)?;
            for boot in &iso.boot {
                let not = if boot.bootable { "" } else { ", not bootable" };
                line(
                    f,
                    "boot image",
                    &format_args!("{} at {}, {} sectors{not}", boot.platform, boot.offset, boot.sectors),
                )?;
            }
            for file in &iso.pxeboot {
                line(f, "file", file)?;
            }
        }
        for partition in &self.partitions {
            let kind = partition.type_name.as_ref().unwrap_or(&partition.type_id);
            write!(f, "{indent}partition {}: {:?}, {kind}, ", partition.number, partition.name)?;
            write!(f, "{} at {}", Size(partition.size), partition.start)?;
            match &partition.filesystem {
                Some(filesystem) => {
                    writeln!(f, ", {filesystem}")?;
                    filesystem.write_files(f, indent)?;
                }
                None => writeln!(f)?,
            }
        }
        for member in self.members.iter().take(MAX_SHOWN) {
            line(f, "file", member)?;
        }
        if let more @ 1.. = self.members.len().saturating_sub(MAX_SHOWN) {
            line(f, "files", &format_args!("{more} more"))?;
        }
        for text in &self.unreadable {
            line(f, "unreadable", text)?;
        }
        if let Some(inside) = &self.inside {
            let what = match (&inside.name, self.format) {
                (Some(name), _) => plain(format_args!("in {name}")),
                (None, Format::Cpio) => "after the archive".to_string(),
                (None, _) => "inside".to_string(),
            };
            writeln!(f, "{indent}{what}:")?;
            inside.report.write(f, &format!("{indent}  "))?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, "")
    }
}

impl Filesystem {
    fn write_files(&self, f: &mut fmt::Formatter<'_>, indent: &str) -> fmt::Result {
        for file in &self.files {
            writeln!(f, "{indent}  {}", plain(file))?;
        }
        match &self.unreadable {
            Some(text) => writeln!(f, "{indent}  unreadable: {}", plain(text)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(label) = &self.label {
            write!(f, " {label:?}")?;
        }
        match &self.uuid {
            Some(uuid) => write!(f, " {uuid}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.name, Size(self.size))
    }
}

/// A number of bytes, with a unit beside it from 1 KiB on.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match indicatif::BinaryBytes(self.0) {
            _ if self.0 < 1024 => write!(f, "{} bytes", self.0),
            size => write!(f, "{size} ({} bytes)", self.0),
        }
    }
}
