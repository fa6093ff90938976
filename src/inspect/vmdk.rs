//! VMDK in one file: streamOptimized (compressed grains) and monolithicSparse. Source: VMware's *Virtual Disk Format
//! 5.0*.

use std::io;

use super::guest::{Codec, Layout, MAX_CLUSTER, Opened, Origin, Run};
use super::read::{array, invalid, padded, unsupported};
use crate::bytes::{le16, le32, le64};
use crate::source::Source;

/// Every offset and length in the headers counts sectors of this many bytes.
const SECTOR: u64 = 512;
/// Instead of the offset of the grain directory: a footer at the end of the file has it.
const AT_END: u64 = u64::MAX;
/// Flag: grains are compressed, each behind a marker.
const COMPRESSED: u32 = 1 << 16;
/// The longest descriptor that is read, in sectors. QEMU reserves 20, VMware writes 1 or 2.
const MAX_DESCRIPTOR: u64 = 128;

struct Vmdk {
    /// Virtual size, in bytes.
    size: u64,
    /// Bytes of a grain.
    grain: u64,
    /// Entries of a grain table.
    entries: u64,
    /// Offset of the grain directory, in bytes.
    directory: u64,
    compressed: bool,
}

/// Reads the header, and the footer where there is one.
pub(super) fn open(image: &dyn Source) -> io::Result<Opened> {
    let mut header: [u8; 512] = array(image, 0)?;
    let descriptor = descriptor(image, &header)?;
    if le64(&header, 56) == AT_END {
        // Footer marker, footer, end-of-stream marker: a sector each.
        header = array(image, image.len().saturating_sub(2 * SECTOR))?;
        if &header[..4] != b"KDMV" {
            return Err(invalid("vmdk: no footer, which should have the grain directory"));
        }
    }
    let version = le32(&header, 4);
    if !(1..=3).contains(&version) {
        return Err(unsupported(format!("vmdk version {version}: expected 1 to 3")));
    }
    let compressed = le32(&header, 8) & COMPRESSED != 0;
    if compressed && le16(&header, 77) != 1 {
        return Err(unsupported(format!("vmdk compression {}: expected 1, deflate", le16(&header, 77))));
    }
    if descriptor.contains("parentCID=") && !descriptor.contains("parentCID=ffffffff") {
        return Err(unsupported("vmdk with a parent"));
    }
    let bytes = |at| {
        le64(&header, at)
            .checked_mul(SECTOR)
            .ok_or_else(|| invalid(format!("vmdk: {} sectors", le64(&header, at))))
    };
    let (size, grain, directory) = (bytes(12)?, bytes(20)?, bytes(56)?);
    let entries = u64::from(le32(&header, 44));
    if !(1..=MAX_CLUSTER).contains(&grain) || !(1..=65536).contains(&entries) {
        return Err(invalid(format!("vmdk: grains of {grain} bytes, {entries} to a table")));
    }
    let kind = descriptor
        .lines()
        .find_map(|line| line.strip_prefix("createType=\"")?.strip_suffix('"'))
        .unwrap_or(if compressed { "compressed" } else { "sparse" });
    Ok(Opened {
        detail: format!("{kind}, grains of {} KiB", grain as f64 / 1024.0),
        layout: Box::new(Vmdk { size, grain, entries, directory, compressed }),
        compressed,
        sector_size: None,
    })
}

/// The text that describes the disk; empty when it is not in this file.
fn descriptor(image: &dyn Source, header: &[u8; 512]) -> io::Result<String> {
    let (offset, sectors) = (le64(header, 28), le64(header, 36));
    let bytes =
        padded(image, offset.saturating_mul(SECTOR), (sectors.min(MAX_DESCRIPTOR) * SECTOR) as usize)?;
    Ok(super::read::text(&bytes).unwrap_or_default())
}

impl Layout for Vmdk {
    fn len(&self) -> u64 {
        self.size
    }

    fn run(&self, image: &dyn Source, at: u64) -> io::Result<Run> {
        let entry = |offset: u64| Ok::<_, io::Error>(u64::from(le32(&array::<4>(image, offset)?, 0)));
        let number = at / self.grain;
        let index = number / self.entries;
        let table = entry(self.directory.saturating_add(4 * index))? * SECTOR;
        let covered = self.entries * self.grain;
        if table == 0 {
            return Ok(Run { start: index * covered, len: covered, origin: Origin::Zeros });
        }
        let start = number * self.grain;
        // An entry of 1 is a grain of zeros.
        let origin = match entry(table + 4 * (number % self.entries))? * SECTOR {
            0 | SECTOR => Origin::Zeros,
            offset if self.compressed => {
                let marker: [u8; 12] = array(image, offset)?;
                let (sector, len) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
                if sector != start / SECTOR {
                    return Err(invalid(format!(
                        "vmdk grain at {offset} of the image: expected sector {}, found {sector}",
                        start / SECTOR
                    )));
                }
                Origin::Packed { offset: offset + 12, len, codec: Codec::Zlib }
            }
            offset => Origin::Image { offset },
        };
        Ok(Run { start, len: self.grain, origin })
    }
}
