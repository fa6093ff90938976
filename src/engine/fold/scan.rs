//! Finds what is compressed in a form. Formats are told by their first bytes.

use std::io;

use super::region::Region;
use super::{gzip, qcow2, tar, vmdk};
use crate::source::Source;

/// How deep archives in archives are looked into.
pub(super) const MAX_DEPTH: u32 = 8;

/// Appends everything compressed in `start..end` of `source` to `found`, in order, until there are `max_regions`. A
/// format that is not known has no regions and is not read further.
pub(super) fn regions(
    source: &dyn Source,
    start: u64,
    end: u64,
    depth: u32,
    found: &mut Vec<Region>,
    max_regions: usize,
) -> io::Result<()> {
    let mut block = [0; 512];
    let head = &mut block[..(end - start).min(512) as usize];
    source.read_at(start, head)?;
    if head.starts_with(vmdk::MAGIC) {
        vmdk::regions(source, start, end, found, max_regions)
    } else if head.starts_with(qcow2::MAGIC) {
        qcow2::regions(source, start, end, found, max_regions)
    } else if head.starts_with(gzip::MAGIC) {
        if found.len() < max_regions {
            found.push(Region::Gzip { offset: start, end });
        }
        Ok(())
    } else if tar::is_header(head) && depth < MAX_DEPTH {
        for member in tar::members(source, start, end)? {
            regions(source, member.start, member.end, depth + 1, found, max_regions)?;
        }
        Ok(())
    } else {
        Ok(())
    }
}
