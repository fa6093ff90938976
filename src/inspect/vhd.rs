//! VHD, which QEMU calls vpc, of fixed size: the disk as it is, and a footer. Source: Microsoft's *Virtual Hard Disk
//! Image Format Specification*.

use std::io;

use super::guest::{Layout, Opened, Origin, Run};
use super::read::{array, invalid, unsupported};
use crate::bytes::{be32, be64};
use crate::source::Source;

/// The length of the footer in bytes.
const FOOTER: u64 = 512;
/// The type of a disk of fixed size.
const FIXED: u32 = 2;

struct Fixed(u64);

/// The footer, when there is one.
pub(super) fn footer(image: &dyn Source) -> io::Result<Option<[u8; FOOTER as usize]>> {
    let Some(at) = image.len().checked_sub(FOOTER) else { return Ok(None) };
    let footer = array(image, at)?;
    Ok(footer.starts_with(b"conectix").then_some(footer))
}

/// Reads the footer.
pub(super) fn open(image: &dyn Source) -> io::Result<Opened> {
    let footer = footer(image)?.ok_or_else(|| invalid("vhd: no footer"))?;
    let kind = be32(&footer, 60);
    if kind != FIXED {
        return Err(unsupported(format!("vhd of type {kind}: expected {FIXED}, fixed")));
    }
    let size = be64(&footer, 48);
    if size > image.len() - FOOTER {
        return Err(invalid(format!("vhd of {size} bytes: found {}", image.len() - FOOTER)));
    }
    Ok(Opened {
        layout: Box::new(Fixed(size)),
        detail: "fixed".to_string(),
        compressed: false,
        sector_size: None,
    })
}

impl Layout for Fixed {
    fn len(&self) -> u64 {
        self.0
    }

    fn run(&self, _: &dyn Source, _: u64) -> io::Result<Run> {
        Ok(Run { start: 0, len: self.0, origin: Origin::Image { offset: 0 } })
    }
}
