//! The beginning of compressed files: enough to tell what is inside, without decoding all of it.

use std::io::{self, BufReader, Read};
use std::sync::Arc;

use super::read::Reader;
use crate::source::Source;

/// How many bytes are decoded. A VHDX made by QEMU has its tables in the first 8 MiB.
const HEAD: u64 = 16 << 20;

/// How many compressed bytes are read for them; more than [`HEAD`], for what does not shrink.
const READ_LIMIT: u64 = 20 << 20;

/// The memory a decoder may take. `xz -9` has a dictionary of 64 MiB.
const MEMORY: u64 = 128 << 20;
/// The largest window of zstd, as a power of two: [`MEMORY`].
const WINDOW_LOG: u32 = 27;

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
    /// Why there are no more, when they could not be decoded.
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

/// Decodes the beginning of `source`.
pub(super) fn head(source: Arc<dyn Source>, packing: Packing) -> Head {
    let reader = BufReader::new(Reader::new(source, READ_LIMIT));
    let decoder: io::Result<Box<dyn Read>> = match packing {
        Packing::Gzip => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader))),
        Packing::Deflate => Ok(Box::new(flate2::bufread::DeflateDecoder::new(reader))),
        Packing::Xz => liblzma::stream::Stream::new_stream_decoder(MEMORY, liblzma::stream::CONCATENATED)
            .map(|stream| Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream)) as _)
            .map_err(io::Error::other),
        Packing::Zstd => zstd::Decoder::with_buffer(reader).and_then(|mut decoder| {
            decoder.window_log_max(WINDOW_LOG)?;
            Ok(Box::new(decoder) as _)
        }),
    };
    let mut bytes = Vec::new();
    match decoder.and_then(|decoder| decoder.take(HEAD).read_to_end(&mut bytes)) {
        Ok(read) => Head { whole: (read as u64) < HEAD, bytes, error: None },
        Err(error) => Head { bytes, whole: false, error: Some(error) },
    }
}
