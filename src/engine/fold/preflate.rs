//! Deflate streams that zlib does not make: `preflate-rs` guesses the encoder and notes where its guess is wrong.
//!
//! # Pieces (frozen)
//!
//! A long stream is cut at boundaries of its blocks, and each piece is analysed and made again by itself: on all cores,
//! and in little memory. `preflate-rs` knows only whole streams, so a piece is dressed up as one:
//!
//! ```text
//! stored block      the up to 32 KiB of plain bytes before the piece: what its matches may refer to
//! empty blocks      so many that the piece starts at the same bit of a byte as in its stream
//! the piece
//! empty block       static, marked as the last one; not after the piece that ends its stream
//! ```
//!
//! At the start of a stream there is nothing before the piece. The corrections are those of the whole, and its plain
//! bytes those of the stored block and of the piece.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use preflate_rs::{PreflateConfig, PreflateStreamProcessor, RecreateLimits, RecreateStreamProcessor};

/// Name and version of the crate, which is pinned in `Cargo.toml`.
pub(super) const VERSION: &str = "preflate-rs 0.7.6";

/// How far back a match of a deflate stream reaches.
pub(super) const WINDOW: usize = 32 << 10;

/// Plain bytes of a piece and what `preflate-rs` must know about the stream around them.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    /// The plain bytes before the piece: [`WINDOW`], or less at the start of the stream.
    pub(super) window: &'a [u8],
    /// The plain bytes.
    pub(super) plain: &'a [u8],
    /// At which bit of its first byte the piece starts.
    pub(super) phase: u8,
    /// Whether the stream ends with it.
    pub(super) last: bool,
}

impl Piece<'_> {
    /// What is before the piece. Its last byte has only its lowest `phase` bits set; they belong to it.
    fn lead_in(&self) -> Vec<u8> {
        if self.window.is_empty() {
            return Vec::new();
        }
        let len = self.window.len() as u16;
        let mut out = vec![0];
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend(self.window);
        let mut bits = out.len() * 8;
        // An empty static block has 10 bits and the dynamic one 95: 2 more and 1 less than whole bytes.
        if self.phase % 2 == 1 {
            put_bits(&mut out, &mut bits, EMPTY_DYNAMIC, 95);
        }
        while bits % 8 != usize::from(self.phase) {
            put_bits(&mut out, &mut bits, 0b010, 10);
        }
        out
    }
}

/// An empty dynamic block, 95 bits long: lengths for the literals 0 and 256 and for two distances, all of one bit.
const EMPTY_DYNAMIC: u128 = {
    // Field by field, lowest bit first: dynamic; 257 + 0 literals, 1 + 1 distances, 4 + 15 lengths of lengths.
    let head = 0b100 | 1 << 8 | 15 << 13;
    // In the order 16 17 18 0 … 1 15: the codes of 18 (third) and of 1 (eighteenth) have one bit. 1 is coded as 0.
    let lengths = 1 << (17 + 2 * 3) | 1 << (17 + 17 * 3);
    // 1, then 138 and 117 zeros (18, and the number less 11), 1, 1, 1; and the end of the block, whose code is 1.
    let codes: u128 = (1 | 127 << 1) << 1 | (1 | 106 << 1) << 9 | 1 << 20;
    head | lengths | codes << (17 + 19 * 3)
};

/// Appends the lowest `n` of `value` to the `bits` bits of `out`.
fn put_bits(out: &mut Vec<u8>, bits: &mut usize, value: u128, n: usize) {
    for i in 0..n {
        if bits.is_multiple_of(8) {
            out.push(0);
        }
        let bit = (value >> i) as u8 & 1;
        if let Some(byte) = out.last_mut() {
            *byte |= bit << (*bits % 8);
        }
        *bits += 1;
    }
}

/// Clears all but `bits` bits of `bytes`, the first of which is at `phase`, and drops the bytes with none.
pub(super) fn keep_bits(bytes: &mut Vec<u8>, phase: u8, bits: u32) {
    let end = usize::from(phase) + bits as usize;
    bytes.truncate(end.div_ceil(8));
    if let Some(first) = bytes.first_mut() {
        *first &= 0xff << phase;
    }
    if let Some(last) = bytes.last_mut()
        && !end.is_multiple_of(8)
    {
        *last &= (1 << (end % 8)) - 1;
    }
}

/// The most steps along hash chains that a piece may take on average for each of its plain bytes. Chosen, not measured:
/// every stream of `tests/published.rs` stays below it, and a piece that does not is kept verbatim when it is dehydrated.
const HOPS_PER_BYTE: u64 = 256;

/// What may follow a piece in the stream that is made for it, in bytes: the rest of its last byte, and the last block.
const MAX_END: usize = 4;

/// Steps that any piece may take, however short it is.
const MIN_HOPS: u64 = 1 << 16;

/// Finds the corrections with which [`recreate`] makes the `bits` bits of `deflated`, of which the first is at
/// `piece.phase`; `None` when that does not work out.
pub(super) fn analyse(piece: Piece<'_>, deflated: &[u8], bits: u32) -> Option<Vec<u8>> {
    let mut wanted = deflated.to_vec();
    keep_bits(&mut wanted, piece.phase, bits);
    let mut stream = piece.lead_in();
    let whole_bytes = stream.len() - usize::from(piece.phase != 0 && !stream.is_empty());
    if piece.phase != 0 {
        let shared = stream.pop()?;
        stream.push(shared | wanted.first()?);
        stream.extend(&wanted[1..]);
    } else {
        stream.extend(&wanted);
    }
    if !piece.last {
        let mut end = whole_bytes * 8 + usize::from(piece.phase) + bits as usize;
        put_bits(&mut stream, &mut end, 0b011, 10);
    }
    // The crate checks itself with assertions; one that fails is only a piece it cannot do.
    let corrections = catch_unwind(AssertUnwindSafe(|| {
        let config = PreflateConfig { verify_compression: false, ..PreflateConfig::default() };
        let mut processor = PreflateStreamProcessor::new(&config);
        let result = processor.decompress(&stream).ok()?;
        let whole = processor.is_done() && result.compressed_size == stream.len();
        whole.then_some(result.corrections)
    }))
    .ok()??;
    let made = recreate(piece, &corrections, bits).ok()?;
    (made == wanted).then_some(corrections)
}

/// Makes the `bits` bits of a piece again. The first is at `piece.phase` of the first byte; the others of that byte,
/// and those after the last, are zero.
pub(super) fn recreate(piece: Piece<'_>, corrections: &[u8], bits: u32) -> io::Result<Vec<u8>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("fold: corrections: {what}"));
    let lead_in = piece.lead_in();
    let limits = RecreateLimits {
        output: lead_in.len() + (bits as usize).div_ceil(8) + MAX_END,
        hops: MIN_HOPS + HOPS_PER_BYTE * piece.plain.len() as u64,
    };
    let mut plain = io::Read::chain(piece.window, piece.plain);
    let made = catch_unwind(AssertUnwindSafe(|| {
        RecreateStreamProcessor::new().recompress(&mut plain, corrections, limits)
    }))
    .map_err(|_| bad("damaged"))?
    .map_err(|e| bad(&e.to_string()))?;
    let start = lead_in.len() - usize::from(piece.phase != 0 && !lead_in.is_empty());
    let mut made = made.get(start..).unwrap_or_default().to_vec();
    if ((made.len() * 8) as u64) < u64::from(piece.phase) + u64::from(bits) {
        return Err(bad("fewer bits than expected"));
    }
    keep_bits(&mut made, piece.phase, bits);
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fold::zlib::{Inflate, Stop, Wrap};

    /// What stands before a piece is a valid stream, of the right length, that makes nothing but the window.
    #[test]
    fn lead_in_is_deflate() {
        for phase in 0..8 {
            let piece = Piece { window: b"window", plain: b"", phase, last: false };
            let mut stream = piece.lead_in();
            let mut bits = (stream.len() - usize::from(phase != 0)) * 8 + usize::from(phase);
            put_bits(&mut stream, &mut bits, 0b011, 10);
            let mut out = [0; 100];
            let step = Inflate::new(Wrap::Raw).unwrap().run(&stream, &mut out, false).unwrap();
            assert_eq!((step.stop, &out[..step.produced]), (Stop::End, &b"window"[..]), "phase {phase}");
        }
    }
}
