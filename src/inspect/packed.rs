//! The beginning of compressed files: enough to tell what is inside, without decoding all of it.

use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;

use super::read::{Reader, array, padded};
use crate::bytes::le32;
use crate::decompress;
use crate::source::Source;

/// How many bytes are decoded. A VHDX made by QEMU has its tables in the first 8 MiB.
const HEAD: u64 = 16 << 20;

/// How many compressed bytes are read for them; more than [`HEAD`], for what does not shrink.
const READ_LIMIT: u64 = 20 << 20;

/// The most zero bytes between two parts, in bytes.
const MAX_PADDING: usize = 64 << 10;

/// The longest index of an xz file that is read, in bytes; one of 10 GiB in blocks of 192 MiB takes 500.
const MAX_INDEX: u64 = 1 << 20;

/// How something is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// gzip, RFC 1952.
    Gzip,
    /// xz.
    Xz,
    /// zstd, RFC 8878.
    Zstd,
    /// Deflate without a header, as in zip.
    Deflate,
}

/// The beginning of what is compressed.
pub(super) struct Head {
    /// The first bytes, at most [`HEAD`].
    pub(super) bytes: Vec<u8>,
    /// Whether that is all.
    pub(super) whole: bool,
    /// Where in the compressed file something else starts, such as the next part of an initramfs.
    pub(super) followed_at: Option<u64>,
    /// Why there are no more bytes, when they could not be decoded.
    pub(super) error: Option<io::Error>,
}

/// How a file that starts with these bytes is compressed.
pub(super) fn packing(start: &[u8]) -> Option<Packing> {
    match start {
        [0x1f, 0x8b, 8, ..] => Some(Packing::Gzip),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Packing::Xz),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Packing::Zstd),
        // A skippable frame, as seekable variants put first.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Packing::Zstd),
        _ => None,
    }
}

/// Decodes the beginning of `source`: all the frames, streams or members of its kind that follow each other.
pub(super) fn head(source: &Arc<dyn Source>, packing: Packing) -> Head {
    let mut head = Head { bytes: Vec::new(), whole: true, followed_at: None, error: None };
    let mut reader = BufReader::new(Reader::new(source.clone(), READ_LIMIT));
    loop {
        let left = HEAD - head.bytes.len() as u64;
        let read =
            decoder(&mut reader, packing).and_then(|decoder| decoder.take(left).read_to_end(&mut head.bytes));
        if let Err(error) = read {
            return Head { whole: false, error: Some(error), ..head };
        }
        if head.bytes.len() as u64 == HEAD {
            return Head { whole: false, ..head };
        }
        match next(&**source, &mut reader) {
            Ok(Some((start, _))) if packing != Packing::Deflate && self::packing(&start) == Some(packing) => {
            }
            Ok(Some((_, at))) if packing != Packing::Deflate => {
                return Head { followed_at: Some(at), ..head };
            }
            Ok(_) => return head,
            Err(error) => return Head { whole: false, error: Some(error), ..head },
        }
    }
}

/// Decodes one frame, stream or member.
fn decoder<'a>(reader: &'a mut BufReader<Reader>, packing: Packing) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match packing {
        Packing::Gzip => Box::new(flate2::bufread::GzDecoder::new(reader)),
        Packing::Deflate => Box::new(flate2::bufread::DeflateDecoder::new(reader)),
        Packing::Xz => Box::new(decompress::xz_single(reader)?),
        Packing::Zstd => Box::new(decompress::zstd_single(reader)?),
    })
}

/// Moves `reader` past the zeros in front of it, which may pad what comes next; gives the first bytes of that and where
/// they are.
fn next(source: &dyn Source, reader: &mut BufReader<Reader>) -> io::Result<Option<(Vec<u8>, u64)>> {
    let at = reader.stream_position()?;
    let bytes = padded(source, at, MAX_PADDING)?;
    let Some(zeros) = bytes.iter().position(|&b| b != 0) else { return Ok(None) };
    let at = reader.seek(SeekFrom::Start(at + zeros as u64))?;
    Ok(Some((bytes[zeros..].to_vec(), at)))
}

/// How long what is compressed is, where that is known without decoding all of it: in the index of an xz stream, when
/// there is no other stream. Source: *The .xz File Format*, sections 2.1.2 and 4.
pub(super) fn plain_len(source: &dyn Source, packing: Packing) -> Option<u64> {
    if packing != Packing::Xz {
        return None;
    }
    // Footer: CRC, length of the index in units of 4 less 1, flags, magic. In front of it the index.
    let footer_at = source.len().checked_sub(12)?;
    let footer: [u8; 12] = array(source, footer_at).ok()?;
    let index_len = (u64::from(le32(&footer, 4)) + 1) * 4;
    if &footer[10..] != b"YZ" || index_len > MAX_INDEX {
        return None;
    }
    let index = padded(source, footer_at.checked_sub(index_len)?, index_len as usize).ok()?;
    let mut rest = index.strip_prefix(&[0])?;
    let (mut plain, mut packed) = (0u64, 0u64);
    for _ in 0..varint(&mut rest)? {
        packed = packed.checked_add(varint(&mut rest)?.checked_next_multiple_of(4)?)?;
        plain = plain.checked_add(varint(&mut rest)?)?;
    }
    // Header, blocks, index, footer: all of the file.
    (packed.checked_add(12 + index_len + 12)? == source.len()).then_some(plain)
}

/// A number in groups of 7 bits, the lowest first.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
