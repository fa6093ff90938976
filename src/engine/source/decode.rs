//! Decoders for the clusters of the live rootfs: the first bytes of one compressed run, and no more.
//!
//! A reader of EROFS knows how much of a physical cluster its files need, not how much the cluster holds, so every
//! decoder here stops when it has given what was asked for. Damage behind that point stays unseen; the digests of the
//! artifacts cover it.

use std::io;

use liblzma::stream::{Action, Status, Stream};
use zstd::stream::raw::{DParameter, InBuffer, Operation, OutBuffer};

use crate::decompress::{MAX_WINDOW_LOG, explain, lzma_stream, xz_stream};

/// How a cluster is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Algorithm {
    /// One LZ4 block, which may be followed by zeros.
    Lz4,
    /// MicroLZMA: an LZMA1 stream without header whose first byte is the complement of the properties byte.
    MicroLzma,
    /// The `.lzma` format ("LZMA alone").
    Lzma,
    /// Raw DEFLATE.
    Deflate,
    /// DEFLATE in a zlib wrapper.
    Zlib,
    /// A Zstandard frame.
    Zstd,
    /// The `.xz` format, with any of its filters.
    Xz,
}

/// The first `len` bytes of what `stored` decodes to; fewer only when it ends before.
pub(super) fn up_to(algorithm: Algorithm, stored: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut out = vec![0; len];
    let n = match algorithm {
        Algorithm::Lz4 => lz4(stored, &mut out),
        Algorithm::MicroLzma => micro_lzma(stored, &mut out),
        Algorithm::Lzma => lzma_stream().and_then(|decoder| lzma(decoder, &[stored], &mut out)),
        Algorithm::Deflate => inflate(false, stored, &mut out),
        Algorithm::Zlib => inflate(true, stored, &mut out),
        Algorithm::Zstd => unzstd(stored, &mut out),
        Algorithm::Xz => xz_stream(0).and_then(|decoder| lzma(decoder, &[stored], &mut out)),
    }
    .map_err(|e| damaged(format!("decode {algorithm:?} data of {} bytes: {}", stored.len(), explain(e))))?;
    out.truncate(n);
    Ok(out)
}

/// The first `len` bytes of what `stored` decodes to; an error when there are fewer.
pub(super) fn prefix(algorithm: Algorithm, stored: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let out = up_to(algorithm, stored, len)?;
    if out.len() != len {
        return Err(damaged(format!(
            "decode {algorithm:?} data of {} bytes: expected at least {len} bytes, got {}",
            stored.len(),
            out.len()
        )));
    }
    Ok(out)
}

/// An error that says that what was read is not what the format allows.
pub(super) fn damaged(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Puts the header of a `.lzma` file before a MicroLZMA stream, whose first byte stands for the properties byte of
/// that header and for the zero byte that every LZMA1 stream starts with.
fn micro_lzma(stored: &[u8], out: &mut [u8]) -> io::Result<usize> {
    let Some((first, rest)) = stored.split_first() else {
        return Ok(0);
    };
    let mut header = [0; 14];
    header[0] = !first;
    // No distance reaches back further than the output is long.
    header[1..5].copy_from_slice(&u32::try_from(out.len()).unwrap_or(u32::MAX).to_le_bytes());
    // Unknown length: the decoder stops where the output does.
    header[5..13].fill(0xff);
    lzma(lzma_stream()?, &[&header, rest], out)
}

/// Runs a liblzma decoder over `parts`, one after the other, until `out` is full or the stream ends.
fn lzma(mut decoder: Stream, parts: &[&[u8]], out: &mut [u8]) -> io::Result<usize> {
    for part in parts {
        let start = decoder.total_in();
        loop {
            let (read, written) = (decoder.total_in(), decoder.total_out());
            let input = &part[(read - start) as usize..];
            let output = &mut out[written as usize..];
            if input.is_empty() || output.is_empty() {
                break;
            }
            if decoder.process(input, output, Action::Run)? == Status::StreamEnd {
                return Ok(decoder.total_out() as usize);
            }
            if (read, written) == (decoder.total_in(), decoder.total_out()) {
                break;
            }
        }
    }
    Ok(decoder.total_out() as usize)
}

fn inflate(zlib: bool, stored: &[u8], out: &mut [u8]) -> io::Result<usize> {
    let mut decoder = flate2::Decompress::new(zlib);
    // Not `Finish`, which takes an output that is too short for an error.
    decoder.decompress(stored, out, flate2::FlushDecompress::Sync)?;
    Ok(decoder.total_out() as usize)
}

fn unzstd(stored: &[u8], out: &mut [u8]) -> io::Result<usize> {
    let mut decoder = zstd::stream::raw::Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
    let mut input = InBuffer::around(stored);
    let mut output = OutBuffer::around(out);
    loop {
        let before = (input.pos(), output.pos());
        // 0 at the end of a frame.
        let hint = decoder.run(&mut input, &mut output)?;
        if hint == 0 || output.pos() == output.capacity() || (input.pos(), output.pos()) == before {
            return Ok(output.pos());
        }
    }
}

/// Decodes an LZ4 block. A decoder of our own, because that of `lz4_flex` gives nothing when the block holds more than
/// was asked for or is followed by padding; the format is a page long (`lz4_Block_format.md`).
fn lz4(stored: &[u8], out: &mut [u8]) -> io::Result<usize> {
    let mut input = stored;
    let mut pos = 0;
    while let Some((&token, rest)) = input.split_first() {
        input = rest;
        let literals = lz4_length(token >> 4, &mut input)?;
        let copied = literals.min(out.len() - pos);
        let (now, rest) = input
            .split_at_checked(copied)
            .ok_or_else(|| damaged(format!("{literals} literals reach past the end")))?;
        out[pos..pos + copied].copy_from_slice(now);
        pos += copied;
        input = rest;
        // The last sequence has no match.
        if pos == out.len() || input.is_empty() {
            break;
        }
        let Some((&[low, high], rest)) = input.split_first_chunk() else {
            return Err(damaged("ends inside a match"));
        };
        input = rest;
        let distance = usize::from(u16::from_le_bytes([low, high]));
        // Matches are at least 4 bytes long.
        let end = (lz4_length(token & 15, &mut input)? + 4).min(out.len() - pos) + pos;
        if distance == 0 || distance > pos {
            return Err(damaged(format!("a match {distance} bytes back at byte {pos}")));
        }
        // A match may overlap what it makes: what is there already doubles with every copy.
        let start = pos - distance;
        while pos < end {
            let n = (pos - start).min(end - pos);
            out.copy_within(start..start + n, pos);
            pos += n;
        }
    }
    Ok(pos)
}

/// A length of LZ4: four bits of the token, and when all are set, bytes to add up to the first that is not 255.
fn lz4_length(nibble: u8, input: &mut &[u8]) -> io::Result<usize> {
    let mut length = usize::from(nibble);
    if nibble == 15 {
        loop {
            let Some((&byte, rest)) = input.split_first() else {
                return Err(damaged("ends inside a length"));
            };
            *input = rest;
            // At most 255 times the length of the input: no overflow.
            length += usize::from(byte);
            if byte != 255 {
                break;
            }
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each decoder gives for every length up to the whole, and that it says when there is no more.
    fn check(algorithm: Algorithm, stored: &[u8], plain: &[u8]) {
        for len in [0, 1, 2, 100, plain.len() / 2, plain.len() - 1, plain.len()] {
            assert_eq!(prefix(algorithm, stored, len).unwrap(), &plain[..len], "{algorithm:?} {len}");
        }
        if algorithm != Algorithm::MicroLzma {
            let error = prefix(algorithm, stored, plain.len() + 1).unwrap_err().to_string();
            assert!(error.contains("expected at least"), "{error}");
        }
        for len in (0..stored.len()).step_by(41) {
            if let Ok(out) = prefix(algorithm, &stored[..len], plain.len()) {
                assert_eq!(out, plain, "{algorithm:?} cut to {len}");
            }
        }
    }

    fn plain() -> Vec<u8> {
        (0..3000u32).flat_map(|i| (i / 7 * i).to_le_bytes()).chain([7; 1000]).collect()
    }

    #[test]
    fn gives_any_prefix() {
        use std::io::Write;
        let plain = plain();

        check(Algorithm::Lz4, &lz4_flex::block::compress(&plain), &plain);
        check(Algorithm::Zstd, &zstd::encode_all(&plain[..], 3).unwrap(), &plain);

        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
        xz.write_all(&plain).unwrap();
        check(Algorithm::Xz, &xz.finish().unwrap(), &plain);

        let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
        let stream = Stream::new_lzma_encoder(&options).unwrap();
        let mut alone = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        alone.write_all(&plain).unwrap();
        let alone = alone.finish().unwrap();
        check(Algorithm::Lzma, &alone, &plain);
        let micro: Vec<u8> = [&[!alone[0]], &alone[14..]].concat();
        check(Algorithm::MicroLzma, &micro, &plain);

        let level = flate2::Compression::new(6);
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), level);
        zlib.write_all(&plain).unwrap();
        check(Algorithm::Zlib, &zlib.finish().unwrap(), &plain);
        let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), level);
        deflate.write_all(&plain).unwrap();
        check(Algorithm::Deflate, &deflate.finish().unwrap(), &plain);
    }

    #[test]
    fn lz4_refuses_matches_before_the_start() {
        let error = prefix(Algorithm::Lz4, &[0x10, b'a', 2, 0], 10).unwrap_err().to_string();
        assert!(error.contains("a match 2 bytes back at byte 1"), "{error}");
        assert!(prefix(Algorithm::Lz4, &[0x10, b'a', 0, 0], 10).is_err());
        assert!(prefix(Algorithm::Lz4, &[0xf0, 255, 255], 10).is_err());
    }
}
