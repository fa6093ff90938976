//! VHDX with a clean log. Source: MS-VHDX, *Virtual Hard Disk v2 File Format*.
//!
//! The CRCs of its tables are not checked: what is inspected was checked as a whole, or is not sound anyway.

use std::io;

use super::guest::{Layout, Opened, Origin, Run};
use super::read::{array, invalid, unsupported};
use crate::bytes::{le16, le32, le64};
use crate::source::Source;

/// Where the two headers are; the one with the larger sequence number counts.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the first of the two copies of the region table is.
const REGIONS: u64 = 192 << 10;
/// The most entries a region or metadata table may have, by the specification.
const MAX_ENTRIES: u16 = 2047;

// GUIDs, as the bytes in the file.
const BAT: [u8; 16] = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const METADATA: [u8; 16] = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const FILE_PARAMETERS: [u8; 16] = *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
const VIRTUAL_SIZE: [u8; 16] = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
const SECTOR_SIZE: [u8; 16] = *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";

/// States of a block that read as zeros: not present, undefined, zero, unmapped.
const ZERO_STATES: std::ops::RangeInclusive<u64> = 0..=3;
/// State of a block that is in the file.
const PRESENT: u64 = 6;

struct Vhdx {
    size: u64,
    block: u64,
    /// After this many blocks, the table has an entry for a sector bitmap.
    chunk: u64,
    bat: u64,
    bat_len: u64,
}

/// Reads headers, region table and metadata.
pub(super) fn open(image: &dyn Source) -> io::Result<Opened> {
    let mut current: Option<[u8; 80]> = None;
    for at in HEADERS {
        let header: [u8; 80] = array(image, at)?;
        if header.starts_with(b"head") && current.is_none_or(|c| le64(&c, 8) < le64(&header, 8)) {
            current = Some(header);
        }
    }
    let header = current.ok_or_else(|| invalid("vhdx: no header"))?;
    if header[48..64] != [0; 16] {
        return Err(unsupported("vhdx with a log that was not replayed"));
    }

    // Region table: 16 bytes, then GUID, offset (8), length (4), required (4).
    let table: [u8; 16] = array(image, REGIONS)?;
    let region = |guid| -> io::Result<(u64, u64)> {
        let count = le32(&table, 8).min(u32::from(MAX_ENTRIES));
        for i in 0..if table.starts_with(b"regi") { count } else { 0 } {
            let entry: [u8; 32] = array(image, REGIONS + 16 + 32 * u64::from(i))?;
            if entry[..16] == guid {
                return Ok((le64(&entry, 16), u64::from(le32(&entry, 24))));
            }
        }
        Err(invalid("vhdx: a region is missing"))
    };
    let (bat, bat_len) = region(BAT)?;
    let (metadata, _) = region(METADATA)?;

    // Metadata table: 32 bytes, then GUID, offset in the region (4), length (4), flags (8).
    let table: [u8; 32] = array(image, metadata)?;
    let item = |guid| -> io::Result<[u8; 8]> {
        let count = le16(&table, 10).min(MAX_ENTRIES);
        for i in 0..if table.starts_with(b"metadata") { count } else { 0 } {
            let entry: [u8; 32] = array(image, metadata.saturating_add(32 + 32 * u64::from(i)))?;
            if entry[..16] == guid {
                return array(image, metadata.saturating_add(u64::from(le32(&entry, 16))));
            }
        }
        Err(invalid("vhdx: a metadata item is missing"))
    };
    let parameters = item(FILE_PARAMETERS)?;
    let (block, flags) = (u64::from(le32(&parameters, 0)), le32(&parameters, 4));
    if flags & 2 != 0 {
        return Err(unsupported("vhdx with a parent"));
    }
    let size = le64(&item(VIRTUAL_SIZE)?, 0);
    let sector = le32(&item(SECTOR_SIZE)?, 0);
    if !block.is_power_of_two()
        || !(1 << 20..=256 << 20).contains(&block)
        || ![512, 4096].contains(&sector)
        || size > 64 << 40
    {
        return Err(invalid(format!("vhdx of {size} bytes, blocks of {block}, sectors of {sector}")));
    }
    let chunk = (1 << 23) * u64::from(sector) / block;
    Ok(Opened {
        layout: Box::new(Vhdx { size, block, chunk, bat, bat_len }),
        detail: format!("{}blocks of {} MiB", if flags & 1 != 0 { "fixed, " } else { "" }, block >> 20),
        compressed: false,
        sector_size: Some(sector),
    })
}

impl Layout for Vhdx {
    fn len(&self) -> u64 {
        self.size
    }

    fn run(&self, image: &dyn Source, at: u64) -> io::Result<Run> {
        let number = at / self.block;
        let index = number + number / self.chunk;
        if 8 * index + 8 > self.bat_len {
            return Err(invalid(format!("vhdx: block {number} is not in the table")));
        }
        let entry = le64(&array::<8>(image, self.bat.saturating_add(8 * index))?, 0);
        let origin = match entry & 7 {
            state if ZERO_STATES.contains(&state) => Origin::Zeros,
            PRESENT => Origin::Image { offset: entry >> 20 << 20 },
            state => return Err(unsupported(format!("vhdx: block {number} in state {state}"))),
        };
        Ok(Run { start: number * self.block, len: self.block, origin })
    }
}
