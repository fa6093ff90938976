//! The files of a squashfs image as one run of bytes, in the order that [`files`](super::files) fixes.
//!
//! The inode table holds every inode once, one after the other, so it is read from its start to its end and no
//! directory is looked at. Squashfs 4.0, as `squashfs_fs.h` in Linux has it: superblock, inode table and fragment table,
//! the tables in *metadata blocks* of up to 8 KiB. A file is a row of data blocks, each compressed on its own, left
//! as it is or a hole; its end may be a part of a *fragment block* that several files share.

use std::io;
use std::sync::Arc;

use super::Source;
use super::cluster::{ClusterMap, Origin};
use super::decode::{Algorithm, damaged, up_to};
use super::files::{ALIGN, Clusters, MAX_INODES, MAX_VIEW, Placed, Run, bytes};
use crate::bytes::{le16, le32, le64};

const SUPER_LEN: u64 = 96;
const MAGIC: &[u8] = b"hsqs";

/// A metadata block decodes to at most this many bytes; all of a table but the last decode to exactly that.
const METADATA: usize = 8192;

/// The longest inode table, decoded, in bytes. That of a real live rootfs has a few MiB.
const MAX_INODE_TABLE: usize = 64 << 20;

/// The longest target of a symbolic link: Linux refuses longer ones.
const MAX_TARGET: usize = 4096;

/// No fragment: the file ends in a data block.
const NO_FRAGMENT: u32 = u32::MAX;

/// In the length of a data or fragment block: stored uncompressed.
const UNCOMPRESSED: u32 = 1 << 24;

/// Describes the regular files of the squashfs image `image`. Hostile or damaged images and compressors we do not know
/// end in `InvalidData`.
pub fn open(image: Arc<dyn Source>) -> io::Result<ClusterMap> {
    Ok(open_placed(image)?.0)
}

/// Like [`open`], and says where in the view each file lies, in order.
pub fn open_placed(image: Arc<dyn Source>) -> io::Result<(ClusterMap, Vec<Placed>)> {
    let block = bytes(&*image, 0, SUPER_LEN)
        .map_err(|e| io::Error::new(e.kind(), format!("read the squashfs superblock: {e}")))?;
    let superblock = Superblock::parse(&block)?;
    if superblock.len > image.len() {
        return Err(damaged(format!(
            "squashfs image: expected {} bytes by its superblock, found {}",
            superblock.len,
            image.len()
        )));
    }
    let table = |name: &'static str| {
        move |e: io::Error| io::Error::new(e.kind(), format!("squashfs {name} table: {e}"))
    };
    let fragments = read_fragments(&*image, &superblock).map_err(table("fragment"))?;
    let files = read_files(&*image, &superblock).map_err(table("inode"))?;

    let mut clusters = Clusters::new(image);
    let mut view = Run::default();
    let mut placed = Vec::new();
    for file in files {
        placed.push(Placed { inode: file.number.into(), start: view.len, len: file.size });
        map(&file, &superblock, &fragments, &mut clusters, &mut view)
            .map_err(|e| io::Error::new(e.kind(), format!("squashfs inode {}: {e}", file.number)))?;
        view.push(view.len.next_multiple_of(ALIGN) - view.len, Origin::Zeros)?;
    }
    Ok((clusters.map(view), placed))
}

/// What we need of the superblock.
struct Superblock {
    inodes: u32,
    block_size: u32,
    fragments: u32,
    algorithm: Algorithm,
    inode_table: u64,
    directory_table: u64,
    fragment_table: u64,
    /// How much of the image is used.
    len: u64,
}

impl Superblock {
    fn parse(b: &[u8]) -> io::Result<Self> {
        if &b[..4] != MAGIC {
            return Err(damaged(format!("not a squashfs image: magic number {:#x}", le32(b, 0))));
        }
        let (major, minor) = (le16(b, 28), le16(b, 30));
        if (major, minor) != (4, 0) {
            return Err(damaged(format!("squashfs {major}.{minor} is not supported, only 4.0")));
        }
        let block_size = le32(b, 12);
        // The limits of the format.
        if !block_size.is_power_of_two() || !(4096..=1 << 20).contains(&block_size) {
            return Err(damaged(format!("squashfs image with blocks of {block_size} bytes")));
        }
        let (inodes, fragments) = (le32(b, 4), le32(b, 16));
        if u64::from(inodes.max(fragments)) > MAX_INODES {
            return Err(damaged(format!(
                "squashfs image with {inodes} inodes and {fragments} fragments, more than {MAX_INODES}"
            )));
        }
        let algorithm = match le16(b, 20) {
            1 => Algorithm::Zlib,
            2 => Algorithm::Lzma,
            3 => return Err(damaged("squashfs compressor lzo is not supported")),
            4 => Algorithm::Xz,
            5 => Algorithm::Lz4,
            6 => Algorithm::Zstd,
            other => return Err(damaged(format!("unknown squashfs compressor {other}"))),
        };
        Ok(Self {
            inodes,
            block_size,
            fragments,
            algorithm,
            inode_table: le64(b, 64),
            directory_table: le64(b, 72),
            fragment_table: le64(b, 80),
            len: le64(b, 40),
        })
    }
}

/// Reads a run of metadata blocks.
struct Metadata<'a> {
    image: &'a dyn Source,
    algorithm: Algorithm,
    /// The next block, and where the blocks end.
    at: u64,
    end: u64,
    /// What is decoded and not yet taken starts at `taken`.
    decoded: Vec<u8>,
    taken: usize,
    /// How much may still be decoded.
    budget: usize,
}

impl<'a> Metadata<'a> {
    fn new(image: &'a dyn Source, algorithm: Algorithm, at: u64, end: u64, budget: usize) -> Self {
        Self { image, algorithm, at, end, decoded: Vec::new(), taken: 0, budget }
    }

    /// The next `len` bytes.
    fn take(&mut self, len: usize) -> io::Result<&[u8]> {
        if self.decoded.len() - self.taken < len {
            self.decoded.drain(..self.taken);
            self.taken = 0;
            while self.decoded.len() < len {
                self.next_block()?;
            }
        }
        let start = self.taken;
        self.taken += len;
        Ok(&self.decoded[start..self.taken])
    }

    fn next_block(&mut self) -> io::Result<()> {
        if self.at >= self.end {
            return Err(damaged("ends too early"));
        }
        // The length, and a bit for what is stored uncompressed.
        let header = le16(&bytes(self.image, self.at, 2)?, 0);
        let len = usize::from(header & 0x7fff);
        if len == 0 || len > METADATA {
            return Err(damaged(format!("metadata block of {len} bytes at {}", self.at)));
        }
        let stored = bytes(self.image, self.at + 2, len as u64)?;
        let block = match header & 0x8000 {
            0 => up_to(self.algorithm, &stored, METADATA)?,
            _ => stored,
        };
        // An empty block would let the loop above go on without progress, one after the other.
        if block.is_empty() || block.len() > self.budget {
            return Err(damaged(format!("metadata block at {} of {} bytes", self.at, block.len())));
        }
        self.budget -= block.len();
        self.at += 2 + len as u64;
        self.decoded.extend(block);
        Ok(())
    }
}

/// A block, compressed or not.
#[derive(Clone, Copy)]
struct Block {
    at: u64,
    /// The stored length and [`UNCOMPRESSED`].
    len: u32,
}

impl Block {
    /// The stored length in bytes.
    fn stored(self) -> u64 {
        u64::from(self.len & (UNCOMPRESSED - 1))
    }

    /// `len` bytes from `offset` on of what the block decodes to.
    fn part(self, s: &Superblock, clusters: &mut Clusters, offset: u32, len: u32) -> io::Result<Origin> {
        let end = u64::from(offset) + u64::from(len);
        if end > s.block_size.into() {
            return Err(damaged(format!("{len} bytes at {offset} of a block of {}", s.block_size)));
        }
        if self.len & UNCOMPRESSED == 0 {
            return clusters.cluster(self.at, self.stored(), s.algorithm, offset, end);
        }
        if end > self.stored() {
            return Err(damaged(format!("{len} bytes at {offset} of {} uncompressed ones", self.stored())));
        }
        clusters.plain(self.at.saturating_add(offset.into()), len.into())
    }
}

/// The fragment blocks. The table is in metadata blocks, of which a list of addresses tells where they are.
fn read_fragments(image: &dyn Source, s: &Superblock) -> io::Result<Vec<Block>> {
    let entries = METADATA / 16;
    let mut fragments = Vec::new();
    if s.fragments == 0 {
        return Ok(fragments);
    }
    let list = bytes(image, s.fragment_table, 8 * u64::from(s.fragments).div_ceil(entries as u64))?;
    for address in list.chunks_exact(8) {
        let mut block = Metadata::new(image, s.algorithm, le64(address, 0), s.len, METADATA);
        let count = entries.min(s.fragments as usize - fragments.len());
        let table = block.take(16 * count)?;
        fragments.extend(table.chunks_exact(16).map(|e| Block { at: le64(e, 0), len: le32(e, 8) }));
    }
    Ok(fragments)
}

/// What we need of a regular file's inode.
struct File {
    number: u32,
    size: u64,
    /// Where the first data block is; the others follow it.
    start: u64,
    /// The lengths of the data blocks, with [`UNCOMPRESSED`].
    blocks: Vec<u32>,
    fragment: u32,
    /// Where in the fragment block the file's end is.
    offset: u32,
}

/// The regular files that are not empty, in ascending order of their numbers.
fn read_files(image: &dyn Source, s: &Superblock) -> io::Result<Vec<File>> {
    let mut table =
        Metadata::new(image, s.algorithm, s.inode_table, s.directory_table.min(s.len), MAX_INODE_TABLE);
    let mut files = Vec::new();
    let mut total = 0;
    for _ in 0..s.inodes {
        let Some(file) = read_inode(&mut table, s)? else { continue };
        total += file.size;
        if total > MAX_VIEW {
            return Err(damaged(format!("the files are longer than {MAX_VIEW} bytes")));
        }
        if file.size > 0 {
            files.push(file);
        }
    }
    // Stable, so that the order is the same also where a number is used twice.
    files.sort_by_key(|file| file.number);
    Ok(files)
}

/// Takes one inode: the regular file it is, if it is one.
fn read_inode(table: &mut Metadata<'_>, s: &Superblock) -> io::Result<Option<File>> {
    let header = table.take(16)?;
    let (kind, number) = (le16(header, 0), le32(header, 12));
    // The types, and from 8 on the same again in their extended form.
    let skip = match kind {
        1 => 16,
        2 => {
            let b = table.take(16)?;
            let (start, size) = (le32(b, 0).into(), le32(b, 12).into());
            let (fragment, offset) = (le32(b, 4), le32(b, 8));
            return read_blocks(table, s, File { number, size, start, blocks: Vec::new(), fragment, offset });
        }
        3 | 10 => {
            let len = le32(table.take(8)?, 4) as usize;
            if len > MAX_TARGET {
                return Err(damaged(format!("inode {number}: symbolic link of {len} bytes")));
            }
            len + if kind == 10 { 4 } else { 0 }
        }
        4 | 5 => 8,
        6 | 7 => 4,
        8 => {
            // An index of the directory's blocks follows, each with a name, whose length is stored less one.
            let count = le16(table.take(24)?, 16);
            for _ in 0..count {
                let len = le32(table.take(12)?, 8) as usize + 1;
                if len > 256 {
                    return Err(damaged(format!("inode {number}: name of {len} bytes")));
                }
                table.take(len)?;
            }
            0
        }
        9 => {
            let b = table.take(40)?;
            let (start, size) = (le64(b, 0), le64(b, 8));
            let (fragment, offset) = (le32(b, 28), le32(b, 32));
            return read_blocks(table, s, File { number, size, start, blocks: Vec::new(), fragment, offset });
        }
        11 | 12 => 12,
        13 | 14 => 8,
        other => return Err(damaged(format!("inode {number}: unknown type {other}"))),
    };
    table.take(skip)?;
    Ok(None)
}

/// Takes the list of data blocks that follows the inode of `file`.
fn read_blocks(table: &mut Metadata<'_>, s: &Superblock, mut file: File) -> io::Result<Option<File>> {
    if file.size > MAX_VIEW {
        return Err(damaged(format!("inode {}: {} bytes, more than {MAX_VIEW}", file.number, file.size)));
    }
    let block_size = u64::from(s.block_size);
    let count = match file.fragment {
        NO_FRAGMENT => file.size.div_ceil(block_size),
        _ => file.size / block_size,
    };
    file.blocks = table.take(4 * count as usize)?.chunks_exact(4).map(|e| le32(e, 0)).collect();
    Ok(Some(file))
}

/// Appends the bytes of `file` to `run`.
fn map(
    file: &File,
    s: &Superblock,
    fragments: &[Block],
    clusters: &mut Clusters,
    run: &mut Run,
) -> io::Result<()> {
    let mut at = file.start;
    let mut left = file.size;
    for &len in &file.blocks {
        let block = Block { at, len };
        // Less than a block only at the end: it fits.
        let part = left.min(s.block_size.into()) as u32;
        let origin = match block.stored() {
            0 => Origin::Zeros,
            _ => block.part(s, clusters, 0, part)?,
        };
        run.push(part.into(), origin)?;
        at = at.saturating_add(block.stored());
        left -= u64::from(part);
    }
    if left > 0 {
        let block = fragments
            .get(file.fragment as usize)
            .ok_or_else(|| damaged(format!("fragment {} of {}", file.fragment, fragments.len())))?;
        // Less than a block: the rest of the division by its size.
        let left = left as u32;
        run.push(left.into(), block.part(s, clusters, file.offset, left)?)?;
    }
    Ok(())
}
