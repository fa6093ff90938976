//! What a format parser finds, and the number fields they all read.

use super::zlib::Wrap;

/// Something compressed. Where it really ends is found out by decoding it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Region {
    /// A deflate stream that is decoded and encoded in memory.
    Small {
        /// Where it starts.
        offset: u64,
        /// It is at most this long,
        max_len: u32,
        /// and its plain bytes at most this.
        max_plain: u32,
        /// Raw or with the zlib header.
        wrap: Wrap,
    },
    /// A run of gzip members.
    Gzip {
        /// Where the first starts.
        offset: u64,
        /// The last ends here at the latest.
        end: u64,
    },
}

/// The bytes at `at`, which must be there.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(super) fn u16_le(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(super) fn u32_le(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(super) fn u64_le(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(super) fn u32_be(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

pub(super) fn u64_be(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}
