//! The files of an EROFS image as one run of bytes, in the order that [`files`](super::files) fixes.
//!
//! Only what leads to file data is parsed: the superblock, the inodes that the directories reach and the maps from a
//! file's bytes to physical clusters. Names, owners, times and extended attributes are passed over. The format is that
//! of `erofs_fs.h` in Linux; EROFS as `mkfs.erofs` up to 1.8 writes it is read whole, except for data on other devices.
//!
//! A compressed file is a row of *logical clusters* of one block, described by an index entry each. An entry is a head,
//! where a new extent starts somewhere in the block, or belongs to the extent before. An extent is what one *physical
//! cluster* decodes to. The end of a file may instead be a part of the *packed inode*, a file without a name that
//! collects such fragments; it is resolved to the packed inode's own clusters.

use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use super::Source;
use super::cluster::{ClusterMap, Origin};
use super::decode::{Algorithm, damaged};
use super::files::{ALIGN, Clusters, MAX_INODES, MAX_VIEW, Placed, Run, bytes};
use crate::bytes::{le16, le32, le64};

/// Where the superblock starts.
const SUPER_AT: u64 = 1024;
/// How much of the superblock we read.
const SUPER_LEN: u64 = 128;
const MAGIC: u32 = 0xe0f5_e1e2;

/// Incompatible features that change nothing about where data lies, or are handled below: zero padding (0x1),
/// compression settings and big clusters (0x2), chunks (0x4), a second algorithm or a device table (0x8), inline tails
/// (0x10), fragments and deduplication (0x20), long prefixes of attribute names (0x40).
const KNOWN_FEATURES: u32 = 0x7f;
const FEATURE_FRAGMENTS: u32 = 0x20;
const FEATURE_48BIT: u32 = 0x80;
const FEATURE_METABOX: u32 = 0x100;
const FEATURE_DEVICE_TABLE: u32 = 0x8;

/// All directories together, in bytes, and what is decoded to read them. Those of a real live rootfs have a few MiB; the
/// limit bounds hostile ones that overlap.
const MAX_DIRECTORIES: u64 = 256 << 20;

/// The indexes and chunk tables of all files together, in bytes. Those of a real live rootfs have some MiB; this is what the
/// longest view takes.
const MAX_TABLES: u64 = 128 << 20;

/// The block address of a hole.
const NULL_BLOCK: u32 = u32::MAX;

// The data layouts of an inode.
const FLAT_PLAIN: u16 = 0;
const COMPRESSED_FULL: u16 = 1;
const FLAT_INLINE: u16 = 2;
const COMPRESSED_COMPACT: u16 = 3;
const CHUNKED: u16 = 4;

// `h_advise` of the map header.
const ADVISE_COMPACT_2B: u16 = 0x1;
const ADVISE_EXTENTS: u16 = 0x1;
const ADVISE_BIG_1: u16 = 0x2;
const ADVISE_BIG_2: u16 = 0x4;
const ADVISE_INLINE: u16 = 0x8;
const ADVISE_INTERLACED: u16 = 0x10;
const ADVISE_FRAGMENT: u16 = 0x20;

// The types of an index entry.
const PLAIN: u16 = 0;
const NONHEAD: u16 = 2;
const HEAD2: u16 = 3;

/// Marks the number of an entry as the count of the cluster's blocks.
const BLOCK_COUNT: u16 = 1 << 11;

/// Describes the regular files of the EROFS image `image`. Hostile or damaged images and features we do not know end in
/// `InvalidData`.
pub fn open(image: Arc<dyn Source>) -> io::Result<ClusterMap> {
    Ok(open_placed(image)?.0)
}

/// Like [`open`], and says where in the view each file lies, in order.
pub fn open_placed(image: Arc<dyn Source>) -> io::Result<(ClusterMap, Vec<Placed>)> {
    let block = bytes(&*image, SUPER_AT, SUPER_LEN)
        .map_err(|e| io::Error::new(e.kind(), format!("read the EROFS superblock: {e}")))?;
    let superblock = Superblock::parse(&block)?;
    if superblock.len > image.len() {
        return Err(damaged(format!(
            "EROFS image: expected {} bytes by its superblock, found {}",
            superblock.len,
            image.len()
        )));
    }
    let tables_left = Cell::new(MAX_TABLES);
    let mut reader = Reader { image: image.clone(), superblock, packed: None, tables_left };

    let mut clusters = Clusters::new(image);
    if let Some(nid) = reader.superblock.packed {
        let mut packed = Run::default();
        reader
            .inode(nid)
            .and_then(|inode| reader.map(&inode, &mut clusters, &mut packed))
            .map_err(at(nid))?;
        reader.packed = Some(packed);
    }

    let mut view = Run::default();
    let mut placed = Vec::new();
    for inode in reader.regular_files()? {
        placed.push(Placed { inode: inode.nid, start: view.len, len: inode.size });
        reader.map(&inode, &mut clusters, &mut view).map_err(at(inode.nid))?;
        view.push(view.len.next_multiple_of(ALIGN) - view.len, Origin::Zeros)?;
    }
    Ok((clusters.map(view), placed))
}

/// Says of which inode an error is.
fn at(nid: u64) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("EROFS inode {nid}: {e}"))
}

/// What we need of the superblock.
struct Superblock {
    /// The block size is `1 << block_bits`.
    block_bits: u32,
    root: u64,
    /// Where the inodes start, in bytes; a nid counts from there in slots of 32 bytes.
    meta: u64,
    /// The nid of the packed inode.
    packed: Option<u64>,
    /// The length of the image.
    len: u64,
}

impl Superblock {
    fn parse(b: &[u8]) -> io::Result<Self> {
        if le32(b, 0) != MAGIC {
            return Err(damaged(format!("not an EROFS image: magic number {:#x}", le32(b, 0))));
        }
        let block_bits = u32::from(b[12]);
        // 512 bytes, as far as the format goes down, to 64 KiB, the largest page of any machine.
        if !(9..=16).contains(&block_bits) {
            return Err(damaged(format!("EROFS image with blocks of 2^{block_bits} bytes")));
        }
        let features = le32(b, 80);
        for (bit, name) in [(FEATURE_48BIT, "48bit"), (FEATURE_METABOX, "metabox")] {
            if features & bit != 0 {
                return Err(damaged(format!("EROFS feature {name} ({bit:#x}) is not supported")));
            }
        }
        if features & !KNOWN_FEATURES != 0 {
            return Err(damaged(format!("unknown EROFS features {:#x}", features & !KNOWN_FEATURES)));
        }
        let devices = le16(b, 86);
        if features & FEATURE_DEVICE_TABLE != 0 && devices != 0 {
            return Err(damaged(format!("EROFS image with data on {devices} other devices")));
        }
        if b[90] != 0 {
            return Err(damaged(format!("EROFS image with directory blocks of 2^{} blocks", b[90])));
        }
        let packed = le64(b, 96);
        Ok(Self {
            block_bits,
            root: le16(b, 14).into(),
            meta: u64::from(le32(b, 40)) << block_bits,
            packed: (features & FEATURE_FRAGMENTS != 0 && packed != 0).then_some(packed),
            len: u64::from(le32(b, 36)) << block_bits,
        })
    }
}

/// What we need of an inode.
struct Inode {
    nid: u64,
    mode: u16,
    layout: u16,
    size: u64,
    /// `i_u`: the first block, or the format of the chunks.
    unit: u32,
    /// Where the inode and its attributes end, in bytes of the image.
    end: u64,
}

struct Reader {
    image: Arc<dyn Source>,
    superblock: Superblock,
    /// What the packed inode holds.
    packed: Option<Run>,
    /// How much of indexes and chunk tables may still be read, in bytes.
    tables_left: Cell<u64>,
}

impl Reader {
    fn block_size(&self) -> u64 {
        1 << self.superblock.block_bits
    }

    /// A part of an index or chunk table.
    fn table(&self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        let left = self.tables_left.get().checked_sub(len);
        let left = left.ok_or_else(|| damaged(format!("indexes of more than {MAX_TABLES} bytes")))?;
        self.tables_left.set(left);
        bytes(&*self.image, at, len)
    }

    fn inode(&self, nid: u64) -> io::Result<Inode> {
        let start = nid.checked_mul(32).and_then(|slot| slot.checked_add(self.superblock.meta));
        let start = start.ok_or_else(|| damaged("lies outside the image"))?;
        let compact = bytes(&*self.image, start, 32)?;
        let format = le16(&compact, 0);
        if format & !0x1f != 0 {
            return Err(damaged(format!("unknown format {format:#x}")));
        }
        let (len, size) = match format & 1 {
            0 => (32, le32(&compact, 8).into()),
            _ => (64, le64(&compact, 8)),
        };
        if size > MAX_VIEW {
            return Err(damaged(format!("is {size} bytes long, more than {MAX_VIEW}")));
        }
        // A header of 12 bytes, in which the first of the attributes' 4-byte units is counted.
        let attributes = match le16(&compact, 2) {
            0 => 0,
            n => 8 + 4 * u64::from(n),
        };
        Ok(Inode {
            nid,
            mode: le16(&compact, 4),
            layout: format >> 1 & 7,
            size,
            unit: le32(&compact, 16),
            end: start + len + attributes,
        })
    }

    /// The regular files that are not empty, in ascending order.
    fn regular_files(&self) -> io::Result<Vec<Inode>> {
        let mut files = Vec::new();
        let mut seen = HashSet::from([self.superblock.root]);
        let mut todo = vec![self.superblock.root];
        let (mut directories, mut left) = (0, MAX_DIRECTORIES);
        while let Some(nid) = todo.pop() {
            let inode = self.inode(nid).map_err(at(nid))?;
            match inode.mode & 0o170000 {
                0o100000 if inode.size > 0 => files.push(inode),
                0o040000 => {
                    directories += inode.size;
                    if directories > MAX_DIRECTORIES {
                        return Err(damaged(format!(
                            "EROFS directories of more than {MAX_DIRECTORIES} bytes"
                        )));
                    }
                    // `.` and `..` lead to what has been seen.
                    todo.extend(
                        self.entries(&inode, &mut left)
                            .map_err(at(nid))?
                            .into_iter()
                            .filter(|&n| seen.insert(n)),
                    );
                    if seen.len() as u64 > MAX_INODES {
                        return Err(damaged(format!("EROFS image with more than {MAX_INODES} inodes")));
                    }
                }
                _ => {}
            }
        }
        files.sort_unstable_by_key(|inode| inode.nid);
        Ok(files)
    }

    /// The nids of what is in a directory.
    fn entries(&self, inode: &Inode, left: &mut u64) -> io::Result<Vec<u64>> {
        // The clusters of a directory are no part of the view.
        let mut clusters = Clusters::new(self.image.clone());
        let mut run = Run::default();
        self.map(inode, &mut clusters, &mut run)?;
        let data = clusters.read(&run, left)?;
        let mut nids = Vec::new();
        // Each block starts with its entries of 12 bytes; the names follow, so the first name ends the entries.
        for block in data.chunks(1 << self.superblock.block_bits) {
            let names = if block.len() < 12 { 0 } else { usize::from(le16(block, 8)) };
            if names == 0 || names % 12 != 0 || names > block.len() {
                return Err(damaged(format!(
                    "directory with names at {names} of a block of {}",
                    block.len()
                )));
            }
            nids.extend(block[..names].chunks_exact(12).map(|entry| le64(entry, 0)));
        }
        Ok(nids)
    }

    /// Appends the bytes of `inode` to `run`.
    fn map(&self, inode: &Inode, clusters: &mut Clusters, run: &mut Run) -> io::Result<()> {
        let block_size = self.block_size();
        let start = u64::from(inode.unit) << self.superblock.block_bits;
        match inode.layout {
            FLAT_PLAIN if inode.unit == NULL_BLOCK => run.push(inode.size, Origin::Zeros),
            FLAT_PLAIN => run.push(inode.size, clusters.plain(start, inode.size)?),
            FLAT_INLINE if inode.size == 0 => Ok(()),
            FLAT_INLINE => {
                let head = (inode.size - 1) / block_size * block_size;
                let tail = inode.size - head;
                if inode.end % block_size + tail > block_size {
                    return Err(damaged(format!("an inline tail of {tail} bytes crosses a block")));
                }
                if head > 0 {
                    run.push(head, clusters.plain(start, head)?)?;
                }
                run.push(tail, clusters.plain(inode.end, tail)?)
            }
            CHUNKED => self.map_chunks(inode, clusters, run),
            COMPRESSED_FULL | COMPRESSED_COMPACT => self.map_compressed(inode, clusters, run),
            other => Err(damaged(format!("unknown data layout {other}"))),
        }
    }

    /// Chunks: an array of block addresses after the inode.
    fn map_chunks(&self, inode: &Inode, clusters: &mut Clusters, run: &mut Run) -> io::Result<()> {
        // Chunk size, whether entries are indexes of 8 bytes rather than addresses of 4.
        let format = inode.unit & 0xffff;
        if format & !0x3f != 0 {
            return Err(damaged(format!("unknown chunk format {format:#x}")));
        }
        let chunk_bits = self.superblock.block_bits + (format & 0x1f);
        let entry_len = if format & 0x20 != 0 { 8 } else { 4 };
        let count = inode.size.div_ceil(1 << chunk_bits);
        let table = self.table(inode.end.next_multiple_of(entry_len), count * entry_len)?;
        let mut left = inode.size;
        for entry in table.chunks_exact(entry_len as usize) {
            let len = left.min(1 << chunk_bits);
            left -= len;
            // An index: 16 bits of the address that only 48-bit images use, a device, then the address. Without a
            // device table the device means nothing.
            let block = le32(entry, entry.len() - 4);
            let origin = match block {
                NULL_BLOCK => Origin::Zeros,
                _ => clusters.plain(u64::from(block) << self.superblock.block_bits, len)?,
            };
            run.push(len, origin)?;
        }
        Ok(())
    }

    fn map_compressed(&self, inode: &Inode, clusters: &mut Clusters, run: &mut Run) -> io::Result<()> {
        if inode.size == 0 {
            return Ok(());
        }
        let header_at = inode.end.next_multiple_of(8);
        let header = bytes(&*self.image, header_at, 8)?;
        if header[7] & 0x80 != 0 {
            // The rest of the header says where in the packed inode the whole file is.
            return self.push_fragment(le64(&header, 0) ^ 1 << 63, inode.size, run);
        }
        let advise = le16(&header, 4);
        let full = inode.layout == COMPRESSED_FULL;
        if full && advise & ADVISE_EXTENTS != 0 {
            return Err(damaged("extent metadata is not supported"));
        }
        if header[7] & 0xf != 0 {
            return Err(damaged("logical clusters larger than a block are not supported"));
        }
        if !full && (advise & ADVISE_BIG_1 == 0) != (advise & ADVISE_BIG_2 == 0) {
            return Err(damaged("only one algorithm of a compact index has big clusters"));
        }
        let mut file = File {
            reader: self,
            size: inode.size,
            advise,
            algorithms: [header[6] & 0xf, header[6] >> 4],
            fragment: le32(&header, 0).into(),
            inline: match advise & (ADVISE_INLINE | ADVISE_FRAGMENT) {
                ADVISE_INLINE => le16(&header, 2).into(),
                _ => 0,
            },
            full,
            index_end: 0,
        };
        let index = Index::new(inode, header_at + 8, self.superblock.block_bits, advise);
        file.index_end = index.end();
        let entries = self.table(index.at, index.end() - index.at)?;

        let mut head: Option<Head> = None;
        let mut failure = Ok(());
        index.walk(&entries, |lcn, entry| {
            failure = file.step(&mut head, lcn, entry, clusters, run);
            failure.is_ok()
        })?;
        failure?;
        let head = head.ok_or_else(|| damaged("a compressed file without a cluster"))?;
        file.finish(&head, inode.size, clusters, run)
    }

    fn push_fragment(&self, start: u64, len: u64, run: &mut Run) -> io::Result<()> {
        let packed = self.packed.as_ref().ok_or_else(|| damaged("a fragment, but no packed inode for it"))?;
        run.push_part(packed, start, len).map_err(|e| damaged(format!("fragment of the packed inode: {e}")))
    }
}

/// An entry of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IndexEntry {
    /// An extent starts `offset` bytes into the block.
    Head { kind: u16, offset: u64, block: u32 },
    /// In the extent before, whose physical cluster has this many blocks.
    Count(u16),
    /// In the extent before.
    Inside,
}

/// Where the index of a compressed file lies and how it is written.
struct Index {
    at: u64,
    count: u64,
    layout: IndexLayout,
    block_bits: u32,
}

#[derive(Clone, Copy)]
enum IndexLayout {
    /// Entries of 8 bytes.
    Full,
    /// `first` entries in packs of two in 8 bytes, then `dense` in packs of 16 in 32 bytes, then packs of two again.
    Compact { first: u64, dense: u64, big: bool },
}

impl Index {
    /// The index of `inode`, whose map header ends at `header_end`.
    fn new(inode: &Inode, header_end: u64, block_bits: u32, advise: u16) -> Self {
        let count = inode.size.div_ceil(1 << block_bits);
        let (at, layout) = if inode.layout == COMPRESSED_FULL {
            // 8 bytes are left free after the header.
            (header_end + 8, IndexLayout::Full)
        } else {
            // Packs of 32 bytes are aligned to that.
            let first = (32 - header_end % 32) % 32 / 4;
            let dense = match advise & ADVISE_COMPACT_2B {
                0 => 0,
                _ => count.saturating_sub(first) / 16 * 16,
            };
            (header_end, IndexLayout::Compact { first, dense, big: advise & ADVISE_BIG_1 != 0 })
        };
        Self { at, count, layout, block_bits }
    }

    /// Where the index ends, in bytes of the image.
    fn end(&self) -> u64 {
        self.at
            + match self.layout {
                IndexLayout::Full => 8 * self.count,
                IndexLayout::Compact { dense, .. } => {
                    2 * dense + (self.count - dense).next_multiple_of(2) * 4
                }
            }
    }

    /// Calls `each` with the number and the content of every entry of `bytes`, until it returns false.
    fn walk(&self, bytes: &[u8], mut each: impl FnMut(u64, IndexEntry) -> bool) -> io::Result<()> {
        let IndexLayout::Compact { first, dense, big } = self.layout else {
            for (lcn, entry) in bytes.chunks_exact(8).enumerate() {
                let entry = match le16(entry, 0) & 3 {
                    NONHEAD if le16(entry, 4) & BLOCK_COUNT != 0 => {
                        IndexEntry::Count(le16(entry, 4) & !BLOCK_COUNT)
                    }
                    NONHEAD => IndexEntry::Inside,
                    kind => IndexEntry::Head { kind, offset: le16(entry, 2).into(), block: le32(entry, 4) },
                };
                if !each(lcn as u64, entry) {
                    break;
                }
            }
            return Ok(());
        };
        if self.block_bits > if dense > 0 { 12 } else { 14 } {
            return Err(damaged("a compact index with blocks too large for it"));
        }
        let mut rest = bytes;
        let mut lcn = 0;
        while lcn < self.count {
            // The address of a pack is in its last four bytes; its entries share the bits before evenly.
            let (entries, len, bits) =
                if lcn >= first && lcn < first + dense { (16, 32, 14) } else { (2, 8, 16) };
            let (pack, next) = rest.split_at_checked(len).ok_or_else(|| damaged("an index cut short"))?;
            rest = next;
            // The address is that of the first cluster that starts or, by its block count, is known in the pack;
            // where clusters are all of one block, that of the one before.
            let mut block = le32(pack, len - 4).wrapping_add(u32::from(!big));
            for i in 0..entries.min((self.count - lcn) as usize) {
                let entry = compact_entry(pack, i * bits, self.block_bits, block);
                match entry {
                    IndexEntry::Head { .. } => block = block.wrapping_add(1),
                    // The head before has been counted as one block, if it is in this pack.
                    IndexEntry::Count(blocks) => {
                        block = block.wrapping_add(blocks.into()).wrapping_sub(u32::from(i > 0));
                    }
                    IndexEntry::Inside => {}
                }
                if !each(lcn, entry) {
                    return Ok(());
                }
                lcn += 1;
            }
        }
        Ok(())
    }
}

/// The entry at bit `at` of a compact pack: a number, of which the low 12 bits are used or as many as an offset in a
/// block takes, and two bits of type.
fn compact_entry(pack: &[u8], at: usize, block_bits: u32, block: u32) -> IndexEntry {
    let bits = u32::from(pack[at / 8]) | u32::from(pack[at / 8 + 1]) << 8 | u32::from(pack[at / 8 + 2]) << 16;
    let value = bits >> (at % 8);
    let number_bits = block_bits.max(12);
    let number = (value & ((1 << number_bits) - 1)) as u16;
    match (value >> number_bits & 3) as u16 {
        NONHEAD if number & BLOCK_COUNT != 0 => IndexEntry::Count(number & !BLOCK_COUNT),
        NONHEAD => IndexEntry::Inside,
        kind => IndexEntry::Head { kind, offset: number.into(), block },
    }
}

/// A head whose extent has not ended yet.
struct Head {
    lcn: u64,
    /// Where in the file the extent starts.
    start: u64,
    kind: u16,
    block: u32,
    /// The blocks of its physical cluster; `None` when the entry that should say is another.
    blocks: Option<u16>,
}

/// A compressed file on the way through its index.
struct File<'a> {
    reader: &'a Reader,
    size: u64,
    advise: u16,
    /// Numbers of the algorithms of heads of the first and of the second kind.
    algorithms: [u8; 2],
    /// Where in the packed inode the end of the file is, if it is there.
    fragment: u64,
    /// The length of the inline tail, 0 without one.
    inline: u64,
    full: bool,
    /// Where the index ends: an inline tail is there.
    index_end: u64,
}

impl File<'_> {
    /// Takes the next entry: each new head ends the extent of the one before.
    fn step(
        &self,
        head: &mut Option<Head>,
        lcn: u64,
        entry: IndexEntry,
        clusters: &mut Clusters,
        run: &mut Run,
    ) -> io::Result<()> {
        match entry {
            IndexEntry::Head { kind, offset, block } => {
                if offset >= self.reader.block_size() {
                    return Err(damaged(format!("an extent {offset} bytes into a block")));
                }
                let start = (lcn << self.reader.superblock.block_bits) + offset;
                match head {
                    Some(head) => self.finish(head, start, clusters, run)?,
                    None if start > 0 => {
                        return Err(damaged(format!("no extent for the first {start} bytes")));
                    }
                    None => {}
                }
                *head = Some(Head { lcn, start, kind, block, blocks: Some(1) });
            }
            IndexEntry::Count(_) | IndexEntry::Inside => {
                let head = head.as_mut().ok_or_else(|| damaged("no extent for the first block"))?;
                let big = if head.kind == PLAIN || head.kind == HEAD2 { ADVISE_BIG_2 } else { ADVISE_BIG_1 };
                if lcn == head.lcn + 1 && self.advise & big != 0 {
                    head.blocks = match entry {
                        IndexEntry::Count(blocks) => Some(blocks),
                        _ => None,
                    };
                }
            }
        }
        Ok(())
    }

    /// Appends the extent from `head` to `end`, or to the end of the file if that comes first.
    fn finish(&self, head: &Head, end: u64, clusters: &mut Clusters, run: &mut Run) -> io::Result<()> {
        let end = end.min(self.size);
        // The last block may have a head at or after the end of the file.
        let Some(len) = end.checked_sub(head.start).filter(|&len| len > 0) else {
            return Ok(());
        };
        let tail = end == self.size;
        if tail && self.advise & ADVISE_FRAGMENT != 0 {
            // A full index has room for the high half of the address where the block would be.
            let high = if self.full { u64::from(head.block) << 32 } else { 0 };
            return self.reader.push_fragment(self.fragment | high, len, run);
        }
        let block_size = self.reader.block_size();
        let inline = tail && self.inline > 0;
        let (at, stored) = if inline {
            (self.index_end, self.inline)
        } else {
            let blocks = head.blocks.ok_or_else(|| damaged("a big cluster without a count of blocks"))?;
            (u64::from(head.block) * block_size, u64::from(blocks) * block_size)
        };
        if inline && at % block_size + stored > block_size {
            return Err(damaged(format!("an inline cluster of {stored} bytes crosses a block")));
        }
        if head.kind != PLAIN {
            let algorithm = match self.algorithms[usize::from(head.kind == HEAD2)] {
                0 => Algorithm::Lz4,
                1 => Algorithm::MicroLzma,
                2 => Algorithm::Deflate,
                3 => Algorithm::Zstd,
                other => return Err(damaged(format!("unknown compression algorithm {other}"))),
            };
            return run.push(len, clusters.cluster(at, stored, algorithm, 0, len)?);
        }
        if len > stored {
            return Err(damaged(format!("{len} uncompressed bytes in a cluster of {stored}")));
        }
        // Interlaced: the bytes lie in their block as they lie in the file's, so what crosses a block of the file is
        // at the start.
        let shift = match self.advise & ADVISE_INTERLACED {
            0 => 0,
            _ if stored != block_size => {
                return Err(damaged(format!("an interlaced cluster of {stored} bytes")));
            }
            _ => head.start % block_size,
        };
        let right = len.min(stored - shift);
        run.push(right, clusters.plain(at + shift, right)?)?;
        run.push(len - right, clusters.plain(at, len - right)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A compact pack of `count` entries of `(type, number)`, ending in the address `block`.
    fn pack(count: usize, entries: &[(u16, u16)], block: u32) -> Vec<u8> {
        let bits = if count == 16 { 14 } else { 16 };
        let mut packed = vec![0u8; count * bits / 8 + 4];
        for (i, &(kind, number)) in entries.iter().enumerate() {
            let value = u32::from(kind) << 12 | u32::from(number);
            for bit in (0..14).filter(|bit| value >> bit & 1 != 0) {
                packed[(i * bits + bit) / 8] |= 1 << ((i * bits + bit) % 8);
            }
        }
        let at = packed.len() - 4;
        packed[at..].copy_from_slice(&block.to_le_bytes());
        packed
    }

    fn walk(count: u64, dense: u64, big: bool, bytes: &[u8]) -> Vec<IndexEntry> {
        let layout = IndexLayout::Compact { first: 0, dense, big };
        let index = Index { at: 0, count, layout, block_bits: 12 };
        let mut out = Vec::new();
        index
            .walk(bytes, |_, entry| {
                out.push(entry);
                true
            })
            .unwrap();
        out
    }

    #[test]
    fn compact_clusters_of_one_block_count_up_from_the_address_before() {
        let head = |offset, block| IndexEntry::Head { kind: 1, offset, block };
        let bytes = pack(2, &[(1, 0), (1, 100)], 6);
        assert_eq!(walk(2, 0, false, &bytes), [head(0, 7), head(100, 8)]);
        let entries = [(2, 1), (1, 5), (2, 1), (2, 1), (1, 9)];
        let bytes = pack(16, &[entries.as_slice(), &[(2, 1); 11]].concat(), 40);
        let out = walk(16, 16, false, &bytes);
        assert_eq!(
            out[..5],
            [IndexEntry::Inside, head(5, 41), IndexEntry::Inside, IndexEntry::Inside, head(9, 42)]
        );
    }

    #[test]
    fn compact_big_clusters_count_up_by_their_blocks() {
        let head = |offset, block| IndexEntry::Head { kind: 1, offset, block };
        let count = |n| (2, BLOCK_COUNT | n);
        // The count of a cluster that starts in the pack before, a cluster of one block, one of four.
        let entries = [count(10), (1, 7), (1, 8), count(4), (2, 2), (1, 9)];
        let bytes = pack(16, &[entries.as_slice(), &[(2, 1); 10]].concat(), 100);
        let out = walk(16, 16, true, &bytes);
        assert_eq!(out[..3], [IndexEntry::Count(10), head(7, 110), head(8, 111)]);
        assert_eq!(out[3..6], [IndexEntry::Count(4), IndexEntry::Inside, head(9, 115)]);
    }

    #[test]
    fn refuses_features_by_name_or_number() {
        let mut block = [0; SUPER_LEN as usize];
        let error = |block: &[u8]| Superblock::parse(block).err().unwrap().to_string();
        assert!(error(&block).contains("not an EROFS image"));
        block[..4].copy_from_slice(&MAGIC.to_le_bytes());
        block[12] = 12;
        assert_eq!(Superblock::parse(&block).unwrap().block_bits, 12);
        block[80] = 0x80;
        assert!(error(&block).contains("48bit"), "{}", error(&block));
        block[80] = 0;
        block[83] = 0x40;
        assert!(error(&block).contains("0x40000000"), "{}", error(&block));
    }
}
