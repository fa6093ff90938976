//! The guest view: the bytes of the virtual disk inside a disk image, at any position.
//!
//! A format is a [`Layout`]: given a position of the guest, where those bytes are in the image. [`GuestDisk`] makes a
//! source of it. Tables are looked up in the image entry by entry, so a disk of any size costs no memory but a few
//! unpacked clusters.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use super::Format;
use super::read::invalid;
use super::{qcow2, vhd, vhdx, vmdk};
use crate::decompress;
use crate::source::{Source, check_range};

/// The largest cluster or grain that is unpacked, in bytes: the largest of qcow2. VMDK has 64 KiB grains.
pub(super) const MAX_CLUSTER: u64 = 2 << 20;

/// How many unpacked clusters are kept: file systems go back and forth between a few tables and what they point to.
const KEPT: usize = 16;

/// How a cluster is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// Deflate without a header.
    Deflate,
    /// Deflate with zlib's header.
    Zlib,
    /// A zstd frame.
    Zstd,
}

/// Where the bytes of a [`Run`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Zero bytes.
    Zeros,
    /// From `offset` on in the image.
    Image {
        /// Offset in the image.
        offset: u64,
    },
    /// The bytes that the `len` bytes at `offset` of the image unpack to; what follows the end of the compressed data
    /// is ignored.
    Packed {
        /// Offset in the image.
        offset: u64,
        /// Length in the image.
        len: u64,
        /// How it is compressed.
        codec: Codec,
    },
}

/// A run of the guest's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where it starts in the virtual disk.
    pub(super) start: u64,
    /// How long it is; it may reach past the end of the virtual disk. At most [`MAX_CLUSTER`] where it is packed.
    pub(super) len: u64,
    /// Where its bytes come from.
    pub(super) origin: Origin,
}

/// Where a format keeps the bytes of the virtual disk.
pub(super) trait Layout: Send + Sync {
    /// The virtual size in bytes.
    fn len(&self) -> u64;

    /// The run that holds the byte at `at`, which is less than `len()`.
    fn run(&self, image: &dyn Source, at: u64) -> io::Result<Run>;
}

/// What the header of a disk image says, and its layout.
pub(super) struct Opened {
    /// Where the bytes are.
    pub(super) layout: Box<dyn Layout>,
    /// For people: the variant of the format.
    pub(super) detail: String,
    /// Whether clusters are compressed.
    pub(super) compressed: bool,
    /// The size of a logical sector, where the format records it.
    pub(super) sector_size: Option<u32>,
}

/// The virtual disk inside a disk image.
pub struct GuestDisk {
    image: Arc<dyn Source>,
    layout: Box<dyn Layout>,
    /// The clusters unpacked last, each with its start in the virtual disk; the last used comes last.
    unpacked: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

impl GuestDisk {
    /// Opens the virtual disk of a qcow2, streamOptimized or sparse VMDK, fixed VHD or VHDX image; `None` when `image`
    /// is none of them, and so may be a disk as it is.
    pub fn open(image: Arc<dyn Source>) -> io::Result<Option<Self>> {
        match detect(&*image)? {
            Some(format) => {
                let opened = open(format, &*image)?;
                Ok(Some(Self::new(image, opened.layout)))
            }
            None => Ok(None),
        }
    }

    /// The virtual disk that `layout` finds in `image`.
    pub(super) fn new(image: Arc<dyn Source>, layout: Box<dyn Layout>) -> Self {
        Self { image, layout, unpacked: Mutex::default() }
    }

    fn run(&self, at: u64) -> io::Result<Run> {
        let run = self.layout.run(&*self.image, at)?;
        match run.start.checked_add(run.len) {
            Some(end) if run.start <= at && at < end => Ok(run),
            _ => Err(invalid(format!("the image maps offset {at} to a run that does not hold it"))),
        }
    }

    fn unpack(&self, run: Run, offset: u64, len: u64, codec: Codec) -> io::Result<Arc<Vec<u8>>> {
        let mut kept = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = kept.iter().position(|(start, _)| *start == run.start) {
            kept.rotate_left(i + 1);
            return Ok(kept[kept.len() - 1].1.clone());
        }
        // Clusters that do not shrink are stored as they are: a longer one is not sound.
        if run.len > MAX_CLUSTER || len > 2 * MAX_CLUSTER {
            return Err(invalid(format!("a compressed cluster of {} bytes in {len}", run.len)));
        }
        let mut packed = vec![0; len as usize];
        self.image.read_at(offset, &mut packed)?;
        // The last cluster may be cut off where the disk ends.
        let want = run.len.min(self.len() - run.start) as usize;
        let plain = Arc::new(
            inflate(&packed, codec, want)
                .map_err(|e| invalid(format!("compressed cluster at {offset} of the image: {e}")))?,
        );
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((run.start, plain.clone()));
        Ok(plain)
    }
}

impl Source for GuestDisk {
    fn len(&self) -> u64 {
        self.layout.len()
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len(), offset, buf.len())?;
        while !buf.is_empty() {
            let run = self.run(offset)?;
            let inside = offset - run.start;
            let n = (run.len - inside).min(buf.len() as u64) as usize;
            let (now, rest) = buf.split_at_mut(n);
            match run.origin {
                Origin::Zeros => now.fill(0),
                Origin::Image { offset } => {
                    let at = offset.checked_add(inside).ok_or_else(|| invalid("offset overflows"))?;
                    self.image.read_at(at, now)?;
                }
                Origin::Packed { offset, len, codec } => {
                    let plain = self.unpack(run, offset, len, codec)?;
                    now.copy_from_slice(&plain[inside as usize..][..n]);
                }
            }
            (buf, offset) = (rest, offset + n as u64);
        }
        Ok(())
    }

    fn zeros_at(&self, offset: u64) -> u64 {
        if offset >= self.len() {
            return 0;
        }
        match self.run(offset) {
            Ok(Run { start, len, origin: Origin::Zeros }) => (start + len).min(self.len()) - offset,
            Ok(Run { start, len, origin: Origin::Image { offset: host } }) => {
                let zeros = self.image.zeros_at(host.saturating_add(offset - start));
                zeros.min((start + len).min(self.len()) - offset)
            }
            _ => 0,
        }
    }
}

/// Unpacks the first `want` bytes of a compressed cluster.
fn inflate(packed: &[u8], codec: Codec, want: usize) -> io::Result<Vec<u8>> {
    let mut plain = vec![0; want];
    match codec {
        Codec::Deflate => flate2::bufread::DeflateDecoder::new(packed).read_exact(&mut plain)?,
        Codec::Zlib => flate2::bufread::ZlibDecoder::new(packed).read_exact(&mut plain)?,
        Codec::Zstd => decompress::zstd_single(packed)?.read_exact(&mut plain)?,
    }
    Ok(plain)
}

/// Which disk image format this is, by its magic number; `None` when it is none of those with a layout of their own.
pub(super) fn detect(image: &dyn Source) -> io::Result<Option<Format>> {
    let start = super::read::padded(image, 0, 8)?;
    Ok(match &*start {
        [b'Q', b'F', b'I', 0xfb, ..] => Some(Format::Qcow2),
        [b'K', b'D', b'M', b'V', ..] => Some(Format::Vmdk),
        b"vhdxfile" => Some(Format::Vhdx),
        _ => vhd::footer(image)?.map(|_| Format::Vpc),
    })
}

/// Reads the header of a disk image of `format`, which is one that [`detect`] found.
pub(super) fn open(format: Format, image: &dyn Source) -> io::Result<Opened> {
    match format {
        Format::Qcow2 => qcow2::open(image),
        Format::Vmdk => vmdk::open(image),
        Format::Vhdx => vhdx::open(image),
        _ => vhd::open(image),
    }
}
