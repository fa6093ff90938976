//! Decoders of xz and zstd for bytes from outside, with a bound on their memory.
//!
//! Either format lets a file of some hundred bytes ask for gigabytes: the dictionary, or window, that a decoder needs is a
//! number in a header. Whatever the program decodes of files, layers or images goes through here.

use std::io::{self, BufRead, Read};

use liblzma::bufread::XzDecoder;
use liblzma::stream::{self, CONCATENATED, Stream};

/// The largest window of zstd, as a power of two, and so the largest dictionary of xz: 128 MiB. `zstd -22` and `--long` make
/// 128 MiB, `xz -9` makes 64 MiB.
pub const MAX_WINDOW_LOG: u32 = 27;

/// The memory that an xz decoder may take, in bytes: that dictionary, and some for itself.
const XZ_MEMORY: u64 = (1 << MAX_WINDOW_LOG) + (2 << 20);

/// Decodes the xz streams in `input`, one after the other.
pub fn xz<R: BufRead>(input: R) -> io::Result<impl Read + use<R>> {
    Ok(Explained(XzDecoder::new_stream(input, xz_stream(CONCATENATED)?)))
}

/// Decodes one xz stream, the first in `input`.
pub fn xz_single<R: BufRead>(input: R) -> io::Result<impl Read + use<R>> {
    Ok(Explained(XzDecoder::new_stream(input, xz_stream(0)?)))
}

/// Decodes the zstd frames in `input`, one after the other.
pub fn zstd<'a, R: BufRead + 'a>(input: R) -> io::Result<impl Read + use<'a, R>> {
    zstd_decoder(input).map(Explained)
}

/// Decodes one zstd frame, the first in `input`.
pub fn zstd_single<'a, R: BufRead + 'a>(input: R) -> io::Result<impl Read + use<'a, R>> {
    Ok(Explained(zstd_decoder(input)?.single_frame()))
}

fn zstd_decoder<'a, R: BufRead>(input: R) -> io::Result<zstd::Decoder<'a, R>> {
    let mut decoder = zstd::Decoder::with_buffer(input)?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    Ok(decoder)
}

/// A decoder of the `.xz` format, to be run by hand.
pub(crate) fn xz_stream(flags: u32) -> io::Result<Stream> {
    Ok(Stream::new_stream_decoder(XZ_MEMORY, flags)?)
}

/// A decoder of the `.lzma` format, to be run by hand.
pub(crate) fn lzma_stream() -> io::Result<Stream> {
    Ok(Stream::new_lzma_decoder(XZ_MEMORY)?)
}

/// A decoder that says what the limit is when that is why it fails.
struct Explained<R>(R);

impl<R: Read> Read for Explained<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf).map_err(explain)
    }
}

/// Names the limit in the error of a decoder that needs more memory than it may take.
pub(crate) fn explain(error: io::Error) -> io::Error {
    let xz = error.get_ref().and_then(|e| e.downcast_ref()) == Some(&stream::Error::MemLimit);
    // The text of ZSTD_error_frameParameter_windowTooLarge: the crate hands on no number.
    if xz || error.to_string().contains("requires too much memory") {
        let most = 1 << (MAX_WINDOW_LOG - 20);
        return io::Error::new(
            io::ErrorKind::InvalidData,
            format!("compressed with a dictionary or window of more than {most} MiB, which is the limit"),
        );
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(decoder: io::Result<impl Read>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decoder?.read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn a_dictionary_beyond_the_limit() {
        for (log, fits) in [(26, true), (27, true), (28, false), (30, false)] {
            let mut options = stream::LzmaOptions::new_preset(0).unwrap();
            options.dict_size(1 << log);
            let mut filters = stream::Filters::new();
            filters.lzma2(&options);
            let encoder = Stream::new_stream_encoder(&filters, stream::Check::Crc32).unwrap();
            let mut packed = liblzma::bufread::XzEncoder::new_stream(&b"plain"[..], encoder);
            let mut bytes = Vec::new();
            packed.read_to_end(&mut bytes).unwrap();
            check(fits, read(xz(&bytes[..])), read(xz_single(&bytes[..])));

            // A frame of one raw block, whose header has a window and no length.
            let window = ((log - 10) << 3) as u8;
            let bytes = [&[0x28, 0xb5, 0x2f, 0xfd, 0, window, 5 << 3 | 1, 0, 0][..], b"plain"].concat();
            check(fits, read(zstd(&bytes[..])), read(zstd_single(&bytes[..])));
        }
    }

    fn check(fits: bool, all: io::Result<Vec<u8>>, single: io::Result<Vec<u8>>) {
        for result in [all, single] {
            match result {
                Ok(plain) => assert!(fits && plain == b"plain"),
                Err(e) => assert!(!fits && e.to_string().contains("128 MiB, which is the limit"), "{e}"),
            }
        }
    }
}
