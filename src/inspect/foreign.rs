//! Disk images in formats that no release has: recognized and measured, but not looked into. Sources: the block drivers of
//! QEMU, `block/vdi.c`, `docs/interop/qed_spec.txt` and `docs/interop/parallels.txt`.

use super::Format;
use crate::bytes::{le32, le64};

/// The format of the disk image that starts with these bytes, and its virtual size in bytes.
pub(super) fn detect(start: &[u8]) -> Option<(Format, u64)> {
    if le32(start, 64) == 0xbeda_107f {
        return Some((Format::Vdi, le64(start, 368)));
    }
    if start.starts_with(b"QED\0") {
        return Some((Format::Qed, le64(start, 48)));
    }
    if start.starts_with(b"WithoutFreeSpace") || start.starts_with(b"WithouFreSpacExt") {
        return Some((Format::Parallels, le64(start, 36).saturating_mul(512)));
    }
    None
}
