//! The files of a file system image as one run of bytes: what [`erofs`](super::erofs) and
//! [`squashfs`](super::squashfs) have in common.
//!
//! **The order is part of the frozen format**, because deltas are made against it: every regular file that is not
//! empty, each inode once however many names it has, in ascending order of its inode number (EROFS: the nid), each
//! padded with zeros to [`ALIGN`] bytes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::Arc;

use super::cluster::{ClusterCodec, ClusterMap, Extent, MAX_CLUSTER, Origin};
use super::decode::{Algorithm, damaged, prefix};
use super::{Source, check_range};

/// Every file starts at a multiple of this many bytes: the block of the deltas, which is the block of the file systems
/// on the disks. Frozen.
pub const ALIGN: u64 = 4096;

/// The longest view of a live rootfs, in bytes. A real one is a few GiB and has to fit in a machine's memory; the limit
/// bounds what the block lists of a hostile image, which may overlap, make us read.
pub const MAX_VIEW: u64 = 64 << 30;

/// The most inodes that are looked at: some 50 MiB of memory. A real live rootfs has some ten thousand.
pub const MAX_INODES: u64 = 1 << 19;

/// The most extents of one image: 64 MiB of memory, and as much for their clusters. A real live rootfs has some hundred
/// thousand.
const MAX_EXTENTS: usize = 2 << 20;

/// The longest stored form of a cluster, in bytes: `mkfs.erofs` makes them of up to 4000 KiB. Without a limit, few bytes of
/// cluster could cost a read of the whole image each.
const MAX_STORED: u32 = 4 << 20;

/// Where a file lies in the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its inode number, in EROFS the nid.
    pub inode: u64,
    /// Where it starts in the view, in bytes: a multiple of [`ALIGN`].
    pub start: u64,
    /// Its length in bytes without the padding.
    pub len: u64,
}

/// Runs of bytes one after the other.
#[derive(Default)]
pub(super) struct Run {
    pub(super) len: u64,
    pub(super) extents: Vec<Extent>,
}

impl Run {
    /// Appends `len` bytes from `origin`, as part of the last extent where it continues that.
    pub(super) fn push(&mut self, len: u64, origin: Origin) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let start = self.len;
        self.len = start
            .checked_add(len)
            .filter(|&end| end <= MAX_VIEW)
            .ok_or_else(|| damaged(format!("the files are longer than {MAX_VIEW} bytes")))?;
        let full = self.extents.len() == MAX_EXTENTS;
        match self.extents.last_mut() {
            Some(last) if advance(last.origin, last.len) == Some(origin) => last.len += len,
            _ if full => return Err(damaged(format!("the files have more than {MAX_EXTENTS} extents"))),
            _ => self.extents.push(Extent { start, len, origin }),
        }
        Ok(())
    }

    /// Appends `len` bytes of `other` from `start` on.
    pub(super) fn push_part(&mut self, other: &Run, start: u64, len: u64) -> io::Result<()> {
        let end = start
            .checked_add(len)
            .filter(|&end| end <= other.len)
            .ok_or_else(|| damaged(format!("{len} bytes at {start} reach past the end at {}", other.len)))?;
        let first = other.extents.partition_point(|e| e.start + e.len <= start);
        for extent in other.extents[first..].iter().take_while(|e| e.start < end) {
            let from = start.max(extent.start);
            let to = end.min(extent.start + extent.len);
            let origin = advance(extent.origin, from - extent.start)
                .ok_or_else(|| damaged("an extent longer than its cluster"))?;
            self.push(to - from, origin)?;
        }
        Ok(())
    }
}

/// The origin of what comes `by` bytes after the first byte of `origin`.
fn advance(origin: Origin, by: u64) -> Option<Origin> {
    Some(match origin {
        Origin::Cluster { id, offset } => {
            Origin::Cluster { id, offset: u32::try_from(u64::from(offset) + by).ok()? }
        }
        Origin::Image { offset } => Origin::Image { offset: offset.checked_add(by)? },
        Origin::Zeros => Origin::Zeros,
    })
}

/// A compressed piece of an image.
struct Cluster {
    at: u64,
    stored: u32,
    decoded: u32,
    algorithm: Algorithm,
}

/// An image and the clusters found in it so far.
pub(super) struct Clusters {
    image: Arc<dyn Source>,
    list: Vec<Cluster>,
    ids: HashMap<(u64, u32, Algorithm), u32>,
}

impl Clusters {
    pub(super) fn new(image: Arc<dyn Source>) -> Self {
        Self { image, list: Vec::new(), ids: HashMap::new() }
    }

    /// `len` bytes that lie uncompressed at `at` in the image.
    pub(super) fn plain(&self, at: u64, len: u64) -> io::Result<Origin> {
        self.inside(at, len)?;
        Ok(Origin::Image { offset: at })
    }

    /// The first `needed` bytes of what the `stored` bytes at `at` of the image decode to, from `offset` on. The same
    /// place is the same cluster however often it is used, decoded as far as the use that needs most.
    pub(super) fn cluster(
        &mut self,
        at: u64,
        stored: u64,
        algorithm: Algorithm,
        offset: u32,
        needed: u64,
    ) -> io::Result<Origin> {
        let decoded = u32::try_from(needed).ok().filter(|&n| n <= MAX_CLUSTER).ok_or_else(|| {
            damaged(format!("cluster at {at} decodes to {needed} bytes, more than {MAX_CLUSTER}"))
        })?;
        let stored = u32::try_from(stored).ok().filter(|&n| n <= MAX_STORED).ok_or_else(|| {
            damaged(format!("cluster at {at} is {stored} bytes long, more than {MAX_STORED}"))
        })?;
        self.inside(at, stored.into())?;
        let next = u32::try_from(self.list.len()).map_err(|_| damaged("too many clusters"))?;
        let id = match self.ids.entry((at, stored, algorithm)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                self.list.push(Cluster { at, stored, decoded, algorithm });
                *new.insert(next)
            }
        };
        let cluster = &mut self.list[id as usize];
        cluster.decoded = cluster.decoded.max(decoded);
        Ok(Origin::Cluster { id, offset })
    }

    fn inside(&self, at: u64, len: u64) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.image.len() => Ok(()),
            _ => Err(damaged(format!(
                "data of {len} bytes at {at} reaches past the end of the image at {}",
                self.image.len()
            ))),
        }
    }

    /// All the bytes of `run`, decoding what they lie in, and no more than `left` bytes of that. For directories, whose
    /// clusters are decoded again for each use.
    pub(super) fn read(&self, run: &Run, left: &mut u64) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for extent in &run.extents {
            let len = extent.len as usize;
            match extent.origin {
                Origin::Zeros => out.resize(out.len() + len, 0),
                Origin::Image { offset } => out.extend(bytes(&*self.image, offset, extent.len)?),
                Origin::Cluster { id, offset } => {
                    let cluster = &self.list[id as usize];
                    *left = left
                        .checked_sub(cluster.decoded.into())
                        .ok_or_else(|| damaged("too much must be decoded to read the directories"))?;
                    let decoded = cluster.decode(&*self.image)?;
                    let part = decoded.get(offset as usize..).and_then(|d| d.get(..len));
                    out.extend(part.ok_or_else(|| damaged("an extent longer than its cluster"))?);
                }
            }
        }
        Ok(out)
    }

    /// The view that `run` describes.
    pub(super) fn map(self, mut run: Run) -> ClusterMap {
        run.extents.shrink_to_fit();
        ClusterMap {
            len: run.len,
            extents: run.extents,
            codec: Arc::new(Codec { image: self.image, list: self.list }),
        }
    }
}

impl Cluster {
    fn decode(&self, image: &dyn Source) -> io::Result<Vec<u8>> {
        let stored = bytes(image, self.at, self.stored.into())?;
        let skip = match self.algorithm {
            // EROFS fills a cluster from its end; none of these formats starts with a zero byte.
            Algorithm::Lz4 | Algorithm::MicroLzma | Algorithm::Deflate | Algorithm::Zstd => {
                stored.iter().take_while(|&&b| b == 0).count()
            }
            Algorithm::Lzma | Algorithm::Zlib | Algorithm::Xz => 0,
        };
        prefix(self.algorithm, &stored[skip..], self.decoded as usize)
            .map_err(|e| damaged(format!("cluster of {} bytes at {}: {e}", self.stored, self.at)))
    }
}

struct Codec {
    image: Arc<dyn Source>,
    list: Vec<Cluster>,
}

impl ClusterCodec for Codec {
    fn count(&self) -> u32 {
        // The list never grows past what a `u32` counts.
        self.list.len() as u32
    }

    fn decoded_len(&self, id: u32) -> u32 {
        self.list[id as usize].decoded
    }

    fn decode(&self, id: u32, _: Vec<u8>) -> io::Result<Vec<u8>> {
        self.list[id as usize].decode(&*self.image)
    }
}

/// `len` bytes of `image` at `at`; nothing is allocated before it is known that they are there.
pub(super) fn bytes(image: &dyn Source, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let len = usize::try_from(len).map_err(|_| damaged(format!("a read of {len} bytes")))?;
    check_range(image.len(), at, len)?;
    let mut out = vec![0; len];
    image.read_at(at, &mut out)?;
    Ok(out)
}
