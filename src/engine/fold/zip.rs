//! The directory of a zip archive: which members there are, and where their data lies.
//!
//! The central directory decides, as in [APPNOTE.TXT](https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT): the local
//! header of a member that was written to a pipe does not know the lengths. Archives beyond 4 GiB (zip64) are read too.

use std::io;
use std::ops::Range;

use crate::bytes::{le16, le32, le64};
use crate::source::Source;

/// A member of a zip archive, as the central directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its path, in UTF-8 or an older encoding.
    pub name: Vec<u8>,
    /// How it is compressed: [`STORED`], [`DEFLATE`], or another number of APPNOTE.TXT.
    pub method: u16,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Its length in bytes, decompressed.
    pub len: u64,
    /// The length of its data in the archive.
    pub packed_len: u64,
    /// CRC-32 of its plain bytes.
    pub crc: u32,
    /// Offset of its local header.
    header_at: u64,
    /// Offset of the central directory, where all data has ended.
    directory_at: u64,
}

/// The method of a member whose data is its plain bytes.
pub const STORED: u16 = 0;
/// The method of a member whose data is a raw deflate stream.
pub const DEFLATE: u16 = 8;

/// Length of the end record without its comment, in bytes.
const END: usize = 22;
/// Lengths of the other records without what varies: the zip64 end record and its locator, the central and the local header.
const END_64: u64 = 56;
const LOCATOR: u64 = 20;
const CENTRAL: u64 = 46;
const LOCAL: u64 = 30;

/// Stands in a field whose value is in a zip64 record.
const IN_ZIP64: u32 = u32::MAX;

/// The central directory of an archive.
#[derive(Debug)]
pub struct Directory {
    /// How many members it says it has.
    pub members: u64,
    at: u64,
}

impl Directory {
    /// Finds the directory at the end of `archive`.
    pub fn find(archive: &dyn Source) -> io::Result<Self> {
        // A comment of up to 64 KiB may follow the end record; its length must lead to the end of the file.
        let tail_at = archive.len().saturating_sub(END as u64 + 0xffff);
        let tail = record(archive, tail_at, archive.len() - tail_at, "end record", b"")?;
        let found = (0..tail.len().saturating_sub(END - 1)).rev().find(|&i| {
            tail[i..].starts_with(b"PK\x05\x06") && i + END + usize::from(le16(&tail, i + 20)) == tail.len()
        });
        let end = found.ok_or_else(|| bad("no end record at the end of the file"))?;
        let (members, at) = (le16(&tail, end + 10), le32(&tail, end + 16));
        if members != u16::MAX && at != IN_ZIP64 {
            return Ok(Self { members: members.into(), at: at.into() });
        }
        let locator_at = (tail_at + end as u64).saturating_sub(LOCATOR);
        let locator = record(archive, locator_at, LOCATOR, "zip64 locator", b"PK\x06\x07")?;
        let end = record(archive, le64(&locator, 8), END_64, "zip64 end record", b"PK\x06\x06")?;
        Ok(Self { members: le64(&end, 32), at: le64(&end, 48) })
    }

    /// The first members, at most `most`.
    pub fn read(&self, archive: &dyn Source, most: usize) -> io::Result<Vec<Member>> {
        let mut members = Vec::new();
        let mut at = self.at;
        while (members.len() as u64) < self.members && members.len() < most {
            let header = record(archive, at, CENTRAL, "central header", b"PK\x01\x02")?;
            let lens = [28, 30, 32].map(|field| u64::from(le16(&header, field)));
            let names = record(archive, at + CENTRAL, lens[0] + lens[1], "name", b"")?;
            let (name, extra) = names.split_at(lens[0] as usize);
            let mut values = [24, 20, 42].map(|field| u64::from(le32(&header, field)));
            widen(&mut values, extra)?;
            let [len, packed_len, header_at] = values;
            members.push(Member {
                name: name.to_vec(),
                method: le16(&header, 10),
                encrypted: le16(&header, 8) & 1 != 0,
                len,
                packed_len,
                crc: le32(&header, 16),
                header_at,
                directory_at: self.at,
            });
            at += CENTRAL + lens.iter().sum::<u64>();
        }
        Ok(members)
    }
}

impl Member {
    /// Where its data lies in `archive`.
    pub fn data(&self, archive: &dyn Source) -> io::Result<Range<u64>> {
        let local = record(archive, self.header_at, LOCAL, "local header", b"PK\x03\x04")?;
        let start = self.header_at + LOCAL + u64::from(le16(&local, 26)) + u64::from(le16(&local, 28));
        let end = start.checked_add(self.packed_len).filter(|&end| end <= self.directory_at);
        Ok(start..end.ok_or_else(|| bad("a member reaches into the central directory"))?)
    }
}

/// Takes the values that do not fit into 32 bits from the zip64 extra field, in which they follow each other in this order.
fn widen(values: &mut [u64; 3], mut extra: &[u8]) -> io::Result<()> {
    while extra.len() >= 4 {
        let len = usize::from(le16(extra, 2));
        let field = extra.get(4..4 + len).ok_or_else(|| bad("an extra field is cut short"))?;
        if le16(extra, 0) == 1 {
            let mut wide = field.chunks_exact(8).map(|value| le64(value, 0));
            for value in values.iter_mut().filter(|value| **value == IN_ZIP64.into()) {
                *value = wide.next().ok_or_else(|| bad("a zip64 value is missing"))?;
            }
        }
        extra = &extra[4 + len..];
    }
    Ok(())
}

/// `len` bytes of `archive` at `at`, which begin with `magic`.
fn record(archive: &dyn Source, at: u64, len: u64, what: &str, magic: &[u8]) -> io::Result<Vec<u8>> {
    if at.checked_add(len).is_none_or(|end| end > archive.len()) {
        return Err(bad(format!("the {what} at {at} is not inside the file")));
    }
    let mut bytes = vec![0; len as usize];
    archive.read_at(at, &mut bytes)?;
    if bytes.starts_with(magic) { Ok(bytes) } else { Err(bad(format!("no {what} at {at}"))) }
}

fn bad(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("zip: {what}"))
}
