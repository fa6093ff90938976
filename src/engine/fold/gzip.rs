//! The header of a gzip member, as in RFC 1952.

/// The first bytes of every member: the magic number and deflate as the method.
pub(super) const MAGIC: &[u8] = &[0x1f, 0x8b, 8];

/// The longest header that is looked for: an extra field has up to 64 KiB, a name or a comment what is left.
pub(super) const MAX_HEADER: usize = 80 << 10;

/// The bytes after the deflate stream: its CRC-32 and its length modulo 2³².
pub(super) const TRAILER: u64 = 8;

/// The length of the header at the start of `bytes`; `None` when it is none or goes on beyond them.
pub(super) fn header_len(bytes: &[u8]) -> Option<usize> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    if !bytes.starts_with(MAGIC) {
        return None;
    }
    let flags = *bytes.get(3)?;
    if flags & 0xe0 != 0 {
        return None; // reserved
    }
    let mut pos = 10;
    if flags & EXTRA != 0 {
        pos += 2 + usize::from(u16::from_le_bytes([*bytes.get(pos)?, *bytes.get(pos + 1)?]));
    }
    for flag in [NAME, COMMENT] {
        if flags & flag != 0 {
            pos += bytes.get(pos..)?.iter().position(|&b| b == 0)? + 1;
        }
    }
    if flags & CRC != 0 {
        pos += 2;
    }
    (pos <= bytes.len()).then_some(pos)
}
