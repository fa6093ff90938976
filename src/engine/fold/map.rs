//! The segment map: how the folded form is made of the plain stream, and the bytes it is stored as.
//!
//! # Encoding, version 2 (frozen)
//!
//! `varint` is an unsigned LEB128 of at most 64 bits. Everything else is a single byte or a run of bytes.
//!
//! ```text
//! map       version(1 byte: 2)  params-count(varint)  params*  level(0)  crc  "end." (4 bytes); nothing follows
//! crc       CRC-32, as in gzip, of all bytes before it (4 bytes, little-endian)
//! params    wrap(1: 0 raw, 1 zlib)  level(1: 1..9)  window-bits(1: 9..15)  mem-level(1: 1..9)
//! level(d)  folded-len(varint)  segment-count(varint)
//!           kind(1 byte) per segment
//!           len(varint)  per segment of kind 0
//!           len(varint)  per segment of any other kind
//!           side-data    per segment of any kind but 0, in order
//! ```
//!
//! Lengths stand in columns because those of one kind resemble each other; whoever stores a map compresses it. The
//! segments of a level, one after the other, make its folded bytes, `folded-len` in all:
//!
//! | kind | segment | len | side data |
//! | --- | --- | --- | --- |
//! | 0 | *stored*: the next bytes of the plain stream as they are | their number, ≥ 1 | – |
//! | 1 | *preflate*: a raw deflate stream | of its plain bytes, ≤ 4 MiB | length of the deflate stream(varint); corrections: length(varint), bytes |
//! | 2 | *zlib stream*: what zlib makes of the folded bytes of a nested level | of the stream | number of params(varint), level(d+1) |
//! | 3 | *pieced stream*: a raw deflate stream made piece by piece of the folded bytes of a nested level | of the stream | piece-count(varint), pieces, level(d+1) |
//! | 4 | *gzip stream*: what GNU gzip makes of the folded bytes of a nested level (see `gnu_gzip.rs`) | of the stream | gzip's level(1: 1..9), level(d+1) |
//! | 5 | *literal*: bytes that are in the map and not in the plain stream | their number, ≥ 1 | the bytes |
//! | 6 | *LZMA2 stream*: what liblzma makes of the folded bytes of a nested level | of the stream | preset(1: 0..9, 16 more for the extreme variant), dictionary in bytes(varint), level(d+1) |
//! | 7 | *zstd frame*: what libzstd makes of the folded bytes of a nested level | of the frame | level(1: 1..22), window of `--long` as a power of two(1: 0 without it), flags(1: 1 by worker threads, 2 with a checksum, 4 with the length of its plain bytes), level(d+1) |
//! | 16 + n | *zlib*: what zlib with params n makes | of its plain bytes, ≤ 4 MiB | – |
//!
//! ```text
//! piece     plain-len(varint)  bits(varint)  tag(1: 0 verbatim, 1 preflate)  length(varint)  bytes
//! ```
//!
//! A piece is `bits` bits of the stream, which are those of its bytes (tag 0, the first bit being the lowest of the
//! first byte) or those which preflate makes of its plain bytes and its corrections (tag 1; see `preflate.rs`). The
//! pieces follow each other bit by bit; the last byte is filled up with zeros.
//!
//! The checksum finds damage early. Damage made on purpose makes other bytes, which only the digest of those tells.
//!
//! Version 1 differs in one thing: it has no kinds 4 to 7, and the kinds from 4 on are *zlib* with params n. It is still read.
//!
//! Levels nest at most [`MAX_DEPTH`] deep. A map has at most [`MAX_SEGMENTS`] segments, counting pieces, and
//! [`MAX_MAP`] bytes.

use std::collections::BTreeSet;
use std::io;

use super::scan::MAX_DEPTH;
use super::zlib::{Params, Wrap, crc32};
use super::{gnu_gzip, preflate, zlib};
use super::{xz, zst};

/// The longest map that is read or made, in bytes. That of a VMDK of 10 GiB has about 200 KB.
pub const MAX_MAP: usize = 64 << 20;
/// The most segments and pieces in a map: what 64 GiB of 64 KiB grains need, and what is between them.
pub(super) const MAX_SEGMENTS: usize = 1 << 21;
/// The longest plain bytes of a deflate stream that is held in memory: qcow2 clusters have up to 2 MiB.
pub(super) const MAX_SMALL: u64 = 4 << 20;
/// The longest plain bytes, and the longest deflated bytes, of a piece of a long stream.
pub(super) const MAX_PIECE: u64 = 32 << 20;

/// A piece has at least so many bytes of the stream, or four times as many plain ones, but for one of them: each is made on
/// its own, with tables that are set up for it however short it is. Those that are written have sixteen times as many.
const MIN_PIECE: u64 = 64 << 10;

const VERSION: u8 = 2;
const END: &[u8] = b"end.";
/// Kinds from here on are numbers of params: in this version, and in version 1.
const ZLIB: u8 = 16;
const ZLIB_1: u8 = 4;
/// Added to the preset of LZMA2 for its extreme variant.
const EXTREME: u8 = 16;
const MAX_PARAMS: usize = 240;

/// How a form is folded; see the module's text for what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    pub(super) segments: Vec<Segment>,
    pub(super) plain_len: u64,
    pub(super) folded_len: u64,
}

/// A run of the folded form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    /// Bytes of the plain stream as they are.
    Stored(u64),
    /// These bytes, which are not in the plain stream.
    Literal(Vec<u8>),
    /// A deflate stream made in memory.
    Small { plain_len: u32, encoder: Encoder },
    /// A long compressed stream made of a nested map's folded bytes.
    Stream { folded_len: u64, encoder: StreamEncoder, inner: Box<Map> },
}

/// The memory that a segment or a piece takes, in bytes, besides its side data.
const SEGMENT: u64 = size_of::<Segment>() as u64;

impl Segment {
    /// How many bytes it makes, as far as that is known without making them.
    pub(super) fn made_len(&self) -> u64 {
        match self {
            Self::Stored(len) => *len,
            Self::Literal(bytes) => bytes.len() as u64,
            Self::Stream { folded_len, .. } => *folded_len,
            Self::Small { encoder: Encoder::Preflate { bits, .. }, .. } => u64::from(*bits) / 8,
            Self::Small { encoder: Encoder::Zlib(_), .. } => 0,
        }
    }

    fn memory(&self) -> u64 {
        SEGMENT
            + match self {
                Self::Stored(_) | Self::Small { encoder: Encoder::Zlib(_), .. } => 0,
                Self::Literal(bytes) => bytes.len() as u64,
                Self::Small { encoder: Encoder::Preflate { corrections, .. }, .. } => {
                    corrections.len() as u64
                }
                Self::Stream { encoder, inner, .. } => {
                    let pieces = match encoder {
                        StreamEncoder::Pieces(pieces) => pieces.iter().map(Piece::memory).sum(),
                        _ => 0,
                    };
                    pieces + inner.memory()
                }
            }
    }
}

impl Piece {
    fn memory(&self) -> u64 {
        let (How::Verbatim(side) | How::Preflate(side)) = &self.how;
        SEGMENT + side.len() as u64
    }
}

/// Makes a deflate stream of bytes in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Encoder {
    Zlib(Params),
    /// A raw stream of so many bits, with these corrections.
    Preflate {
        corrections: Vec<u8>,
        bits: u32,
    },
}

/// Makes a compressed stream of a stream of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StreamEncoder {
    Zlib(Params),
    /// GNU gzip with this level.
    Gzip(u8),
    /// LZMA2 by liblzma.
    Lzma2(xz::Params),
    /// A frame by libzstd.
    Zstd(zst::Params),
    Pieces(Vec<Piece>),
}

/// A run of whole blocks of a long deflate stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Piece {
    pub(super) plain_len: u32,
    /// How many bits of the stream it is.
    pub(super) bits: u32,
    pub(super) how: How,
}

/// Where the bits of a [`Piece`] come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum How {
    /// These are the bits.
    Verbatim(Vec<u8>),
    /// Preflate makes them, with these corrections.
    Preflate(Vec<u8>),
}

fn bad(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("segment map: {what}"))
}

impl Map {
    /// The length of the plain stream, in bytes.
    pub fn plain_len(&self) -> u64 {
        self.plain_len
    }

    /// The length of the folded form, in bytes.
    pub fn folded_len(&self) -> u64 {
        self.folded_len
    }

    /// The memory that it takes, in bytes, within a little.
    pub fn memory(&self) -> u64 {
        self.segments.iter().map(Segment::memory).sum()
    }

    /// What makes the folded form, with versions: on these the bytes depend. Sorted.
    pub fn encoders(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for segment in &self.segments {
            found.insert(match segment {
                Segment::Stored(_) | Segment::Literal(_) => continue,
                Segment::Small { encoder: Encoder::Preflate { .. }, .. }
                | Segment::Stream { encoder: StreamEncoder::Pieces(_), .. } => preflate::VERSION.to_string(),
                Segment::Small { encoder: Encoder::Zlib(_), .. }
                | Segment::Stream { encoder: StreamEncoder::Zlib(_), .. } => zlib::version(),
                Segment::Stream { encoder: StreamEncoder::Gzip(_), .. } => gnu_gzip::VERSION.to_string(),
                Segment::Stream { encoder: StreamEncoder::Lzma2(_), .. } => xz::VERSION.to_string(),
                Segment::Stream { encoder: StreamEncoder::Zstd(_), .. } => zst::VERSION.to_string(),
            });
            if let Segment::Stream { inner, .. } = segment {
                found.extend(inner.encoders());
            }
        }
        found
    }

    /// The bytes of the map.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut params = Vec::new();
        self.collect_params(&mut params);
        let mut out = vec![VERSION];
        put(&mut out, params.len() as u64);
        for p in &params {
            out.extend([u8::from(p.wrap == Wrap::Zlib), p.level, p.window_bits, p.mem_level]);
        }
        self.put_level(&params, &mut out);
        let crc = crc32(0, &out);
        out.extend(crc.to_le_bytes());
        out.extend(END);
        out
    }

    fn collect_params(&self, params: &mut Vec<Params>) {
        for segment in &self.segments {
            if let Segment::Small { encoder: Encoder::Zlib(p), .. }
            | Segment::Stream { encoder: StreamEncoder::Zlib(p), .. } = segment
                && !params.contains(p)
            {
                params.push(*p);
            }
            if let Segment::Stream { inner, .. } = segment {
                inner.collect_params(params);
            }
        }
    }

    fn put_level(&self, params: &[Params], out: &mut Vec<u8>) {
        let number = |p| params.iter().position(|q| q == p).unwrap_or_default();
        put(out, self.folded_len);
        put(out, self.segments.len() as u64);
        out.extend(self.segments.iter().map(|segment| match segment {
            Segment::Stored(_) => 0,
            Segment::Small { encoder: Encoder::Preflate { .. }, .. } => 1,
            Segment::Stream { encoder: StreamEncoder::Zlib(_), .. } => 2,
            Segment::Stream { encoder: StreamEncoder::Pieces(_), .. } => 3,
            Segment::Stream { encoder: StreamEncoder::Gzip(_), .. } => 4,
            Segment::Literal(_) => 5,
            Segment::Stream { encoder: StreamEncoder::Lzma2(_), .. } => 6,
            Segment::Stream { encoder: StreamEncoder::Zstd(_), .. } => 7,
            Segment::Small { encoder: Encoder::Zlib(p), .. } => ZLIB + number(p) as u8,
        }));
        for segment in &self.segments {
            if let Segment::Stored(len) = segment {
                put(out, *len);
            }
        }
        for segment in &self.segments {
            match segment {
                Segment::Stored(_) => {}
                Segment::Literal(bytes) => put(out, bytes.len() as u64),
                Segment::Small { plain_len, .. } => put(out, u64::from(*plain_len)),
                Segment::Stream { folded_len, .. } => put(out, *folded_len),
            }
        }
        for segment in &self.segments {
            match segment {
                Segment::Small { encoder: Encoder::Preflate { corrections, bits }, .. } => {
                    put(out, u64::from(*bits) / 8);
                    put_bytes(out, corrections);
                }
                Segment::Literal(bytes) => out.extend(bytes),
                Segment::Stream { encoder, inner, .. } => {
                    match encoder {
                        StreamEncoder::Zlib(p) => put(out, number(p) as u64),
                        StreamEncoder::Gzip(level) => out.push(*level),
                        StreamEncoder::Lzma2(p) => {
                            out.push(p.preset | if p.extreme { EXTREME } else { 0 });
                            put(out, p.dict.into());
                        }
                        StreamEncoder::Zstd(p) => {
                            let flags = [p.threads, p.checksum, p.sized];
                            let flags = (0..3).map(|i| u8::from(flags[i]) << i).sum();
                            out.extend([p.level, p.long, flags]);
                        }
                        StreamEncoder::Pieces(pieces) => {
                            put(out, pieces.len() as u64);
                            for piece in pieces {
                                put(out, piece.plain_len.into());
                                put(out, piece.bits.into());
                                let (tag, bytes) = match &piece.how {
                                    How::Verbatim(bytes) => (0, bytes),
                                    How::Preflate(bytes) => (1, bytes),
                                };
                                out.push(tag);
                                put_bytes(out, bytes);
                            }
                        }
                    }
                    inner.put_level(params, out);
                }
                _ => {}
            }
        }
    }

    /// Reads a map and checks it: every length is bounded, every encoder is one that zlib takes, and the lengths add
    /// up without overflow, and the map takes at most `memory` bytes. Whether it makes the right bytes only a digest can tell.
    pub fn from_bytes(bytes: &[u8], memory: u64) -> io::Result<Self> {
        if bytes.len() > MAX_MAP {
            return Err(bad(format!("{} bytes, at most {MAX_MAP} are read", bytes.len())));
        }
        let zlib = match bytes.first() {
            Some(&VERSION) => ZLIB,
            Some(1) => ZLIB_1,
            Some(other) => {
                return Err(bad(format!("version {other}, this program reads versions 1 to {VERSION}")));
            }
            None => return Err(bad("cut short")),
        };
        let content = bytes.strip_suffix(END).ok_or_else(|| bad("no end marker"))?;
        let (content, crc) = content.split_last_chunk::<4>().ok_or_else(|| bad("cut short"))?;
        if crc32(0, content) != u32::from_le_bytes(*crc) {
            return Err(bad("checksum mismatch"));
        }
        // The version is checked already.
        let room = memory.saturating_sub(bytes.len() as u64) / SEGMENT;
        let segments_left = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_SEGMENTS);
        let mut input = Input { bytes: &content[1..], segments_left, zlib, params: Vec::new() };
        for _ in 0..input.bounded("number of encoders", MAX_PARAMS as u64)? {
            let params = Params {
                wrap: match input.byte()? {
                    0 => Wrap::Raw,
                    1 => Wrap::Zlib,
                    other => return Err(bad(format!("unknown wrap {other}"))),
                },
                level: input.byte()?,
                window_bits: input.byte()?,
                mem_level: input.byte()?,
            };
            if !params.valid() {
                return Err(bad(format!("no zlib parameters: {params:?}")));
            }
            input.params.push(params);
        }
        let map = input.level(0)?;
        if !input.bytes.is_empty() {
            return Err(bad("bytes that belong to nothing"));
        }
        Ok(map)
    }
}

/// Appends a varint.
fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend(bytes);
}

/// What is left to read of a map.
struct Input<'a> {
    bytes: &'a [u8],
    segments_left: usize,
    /// The first kind that is a number of params.
    zlib: u8,
    params: Vec<Params>,
}

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(n).ok_or_else(|| bad("cut short"))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn varint(&mut self) -> io::Result<u64> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                break;
            }
            n |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(bad("a number of more than 64 bits"))
    }

    fn bounded(&mut self, what: &str, max: u64) -> io::Result<u64> {
        match self.varint()? {
            n if n <= max => Ok(n),
            n => Err(bad(format!("{what} is {n}, at most {max}"))),
        }
    }

    fn counted(&mut self, what: &str) -> io::Result<usize> {
        let n = self.bounded(what, self.segments_left as u64)? as usize;
        self.segments_left -= n;
        Ok(n)
    }

    fn run(&mut self) -> io::Result<Vec<u8>> {
        let len = self.bounded("length of side data", self.bytes.len() as u64)?;
        Ok(self.take(len as usize)?.to_vec())
    }

    fn level(&mut self, depth: u32) -> io::Result<Map> {
        if depth > MAX_DEPTH {
            return Err(bad(format!("nested more than {MAX_DEPTH} deep")));
        }
        let folded_len = self.varint()?;
        let count = self.counted("number of segments")?;
        let kinds = self.take(count)?;
        let mut segments = Vec::with_capacity(count);
        let mut stored = Vec::new();
        for _ in kinds.iter().filter(|&&kind| kind == 0) {
            stored.push(match self.varint()? {
                0 => return Err(bad("an empty segment")),
                n => n,
            });
        }
        let mut lens = Vec::new();
        for &kind in kinds.iter().filter(|&&kind| kind != 0) {
            let small = kind == 1 || kind >= self.zlib;
            lens.push(self.bounded("length", if small { MAX_SMALL } else { u64::MAX })?);
        }
        let (mut stored, mut lens) = (stored.into_iter(), lens.into_iter());
        for &kind in kinds {
            let len = if kind == 0 { stored.next() } else { lens.next() }.unwrap_or_default();
            segments.push(match kind {
                n if n >= self.zlib => Segment::Small {
                    plain_len: len as u32,
                    encoder: Encoder::Zlib(self.param(u64::from(n - self.zlib))?),
                },
                0 => Segment::Stored(len),
                1 => {
                    let bits = self.bounded("length of a deflate stream", 2 * MAX_SMALL)? as u32 * 8;
                    let encoder = Encoder::Preflate { corrections: self.run()?, bits };
                    Segment::Small { plain_len: len as u32, encoder }
                }
                5 if len == 0 => return Err(bad("an empty segment")),
                5 => Segment::Literal(self.take(usize::try_from(len).unwrap_or(usize::MAX))?.to_vec()),
                2..=4 | 6 | 7 => {
                    let encoder = match kind {
                        2 => {
                            let n = self.varint()?;
                            StreamEncoder::Zlib(self.param(n)?)
                        }
                        3 => StreamEncoder::Pieces(self.pieces()?),
                        6 => StreamEncoder::Lzma2(self.lzma2()?),
                        7 => StreamEncoder::Zstd(self.zstd()?),
                        _ => StreamEncoder::Gzip(match self.byte()? {
                            level @ 1..=9 => level,
                            other => return Err(bad(format!("no level of gzip: {other}"))),
                        }),
                    };
                    let inner = Box::new(self.level(depth + 1)?);
                    if let StreamEncoder::Pieces(pieces) = &encoder {
                        let plain = pieces.iter().map(|p| u64::from(p.plain_len)).sum::<u64>();
                        let bits = pieces.iter().map(|p| u64::from(p.bits)).sum::<u64>();
                        if plain != inner.folded_len || bits.div_ceil(8) != len {
                            return Err(bad("the pieces of a stream do not add up to it"));
                        }
                        if pieces.len() as u64 > 1 + (len + plain / 4) / MIN_PIECE {
                            return Err(bad(format!("{} pieces of a stream of {len} bytes", pieces.len())));
                        }
                    }
                    Segment::Stream { folded_len: len, encoder, inner }
                }
                other => return Err(bad(format!("unknown kind {other} of segment"))),
            });
        }
        Map::new(segments, folded_len)
    }

    fn param(&self, n: u64) -> io::Result<Params> {
        let params = usize::try_from(n).ok().and_then(|n| self.params.get(n));
        params.copied().ok_or_else(|| bad(format!("no encoder {n}")))
    }

    fn lzma2(&mut self) -> io::Result<xz::Params> {
        let preset = self.byte()?;
        let dict = self.bounded("dictionary", u32::MAX.into())? as u32;
        let params = xz::Params { preset: preset & !EXTREME, extreme: preset & EXTREME != 0, dict };
        if params.valid() { Ok(params) } else { Err(bad(format!("no LZMA2 parameters: {params:?}"))) }
    }

    fn zstd(&mut self) -> io::Result<zst::Params> {
        let (level, long, flags) = (self.byte()?, self.byte()?, self.byte()?);
        let flag = |i: u8| flags >> i & 1 == 1;
        let params = zst::Params { level, long, threads: flag(0), checksum: flag(1), sized: flag(2) };
        if flags < 8 && params.valid() {
            Ok(params)
        } else {
            Err(bad(format!("no zstd parameters: {params:?}")))
        }
    }

    fn pieces(&mut self) -> io::Result<Vec<Piece>> {
        let count = self.counted("number of pieces")?;
        let mut pieces = Vec::new();
        for _ in 0..count {
            let plain_len = self.bounded("length of a piece", MAX_PIECE)? as u32;
            let bits = self.bounded("bits of a piece", MAX_PIECE * 8)? as u32;
            let how = match self.byte()? {
                0 => How::Verbatim(self.run()?),
                1 => How::Preflate(self.run()?),
                tag => return Err(bad(format!("unknown tag {tag} of a piece"))),
            };
            pieces.push(Piece { plain_len, bits, how });
        }
        Ok(pieces)
    }
}

impl Map {
    /// A level of these segments; an error when their plain lengths overflow, or they make more than `folded_len` bytes.
    pub(super) fn new(segments: Vec<Segment>, folded_len: u64) -> io::Result<Self> {
        let plain_len = segments.iter().try_fold(0u64, |sum, segment| {
            sum.checked_add(match segment {
                Segment::Stored(len) => *len,
                Segment::Literal(_) => 0,
                Segment::Small { plain_len, .. } => u64::from(*plain_len),
                Segment::Stream { inner, .. } => inner.plain_len,
            })
        });
        let made = segments.iter().try_fold(0u64, |sum, segment| sum.checked_add(segment.made_len()));
        if made.is_none_or(|made| made > folded_len) {
            return Err(bad(format!("the segments make more than the {folded_len} bytes of the whole")));
        }
        Ok(Self { segments, folded_len, plain_len: plain_len.ok_or_else(|| bad("the lengths overflow"))? })
    }
}
