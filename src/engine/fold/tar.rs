//! Members of tar archives: ustar, pax, and GNU's old format with its sparse files.
//!
//! A member is a header of 512 bytes and its data, padded to 512. Nothing in a tar archive is compressed itself, so
//! all this does is to say where the members lie; what they are is found out by looking at them.

use std::io;
use std::ops::Range;

use crate::source::Source;

const BLOCK: u64 = 512;
/// The longest pax extended header that is read for a `size` record.
const MAX_PAX: u64 = 1 << 20;
/// The most members that are looked at; an OVA has three, an OCI archive a dozen.
const MAX_MEMBERS: usize = 1 << 16;

/// Whether `block` is a tar header: its checksum is right.
pub(super) fn is_header(block: &[u8]) -> bool {
    block.len() >= BLOCK as usize
        && block[257..262] == *b"ustar"
        && number(&block[148..156]).is_some_and(|sum| {
            let bytes = block[..BLOCK as usize].iter().enumerate();
            // The checksum itself counts as blanks.
            sum == bytes.map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u64::from(b) }).sum::<u64>()
        })
}

/// A number field: octal digits, or big-endian after a byte 0x80.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] == 0x80 {
        return field[1..].iter().try_fold(0u64, |n, &b| n.checked_mul(256)?.checked_add(b.into()));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    u64::from_str_radix(text, 8).ok()
}

/// The `size` record of a pax extended header.
fn pax_size(mut records: &[u8]) -> Option<u64> {
    let mut size = None;
    while let Some(blank) = records.iter().position(|&b| b == b' ') {
        let len: usize = std::str::from_utf8(&records[..blank]).ok()?.parse().ok()?;
        let record = records.get(blank + 1..len)?;
        if let Some(value) = record.strip_prefix(b"size=") {
            size = std::str::from_utf8(value).ok()?.trim_end().parse().ok();
        }
        records = &records[len..];
    }
    size
}

/// Where the data of the regular files in the archive at `start..end` of `source` lies, in order. Ends at the first
/// block that is no header.
pub(super) fn members(source: &dyn Source, start: u64, end: u64) -> io::Result<Vec<Range<u64>>> {
    let mut members = Vec::new();
    let mut block = [0; BLOCK as usize];
    let mut pos = start;
    let mut size_of_next = None;
    while members.len() < MAX_MEMBERS && end.saturating_sub(pos) >= BLOCK {
        source.read_at(pos, &mut block)?;
        let Some(mut size) = number(&block[124..136]).filter(|_| is_header(&block)) else { break };
        let kind = block[156];
        pos += BLOCK;
        match kind {
            b'x' => {
                let mut records = vec![0; size.min(MAX_PAX).min(end - pos) as usize];
                source.read_at(pos, &mut records)?;
                size_of_next = pax_size(&records);
            }
            b'g' | b'L' | b'K' => {}
            _ => {
                size = size_of_next.take().unwrap_or(size);
                // GNU's sparse map goes on in blocks of its own.
                let mut more = kind == b'S' && block[482] != 0;
                while more && end.saturating_sub(pos) >= BLOCK {
                    source.read_at(pos, &mut block)?;
                    more = block[504] != 0;
                    pos += BLOCK;
                }
                if matches!(kind, b'0' | 0 | b'7' | b'S') && size <= end.saturating_sub(pos) {
                    members.push(pos..pos + size);
                }
            }
        }
        pos = match size.checked_next_multiple_of(BLOCK).and_then(|n| pos.checked_add(n)) {
            Some(next) => next,
            None => break,
        };
    }
    Ok(members)
}
