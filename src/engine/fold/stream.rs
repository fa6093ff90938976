//! Long compressed streams: what does not fit in memory, such as the one of a gzip file.
//!
//! On the way out the stream is decoded into a file, with a note of where it can be cut. zlib and GNU gzip are tried first:
//! every candidate makes the beginning, then one after the other goes on, the likeliest first, until one makes the right
//! bytes to the end. When none does, the stream is cut into pieces, which [`preflate`] analyses. All encoders work on pieces of fixed length, so that they get their input
//! in the same way each time.

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::deflate::candidates;
use super::gnu_gzip::Gzip;
use super::map::{self, How, MAX_PIECE, Piece, StreamEncoder};
use super::preflate::{self, WINDOW, keep_bits};
use super::zlib::{Deflate, Inflate, Stop, Wrap};
use super::{xz, zst};
use crate::io::{SparseWriter, is_zero, scratch_file};
use crate::source::{File, Source};

/// A piece ends with the first block after this many bytes of the stream, or plain bytes. `preflate-rs` takes about eight bytes
/// of memory for each byte of the stream, and a run of zeros is a thousand times longer than its stream.
const PIECE_FOLDED: u64 = 1 << 20;
const PIECE_PLAIN: u64 = 4 << 20;
/// The plain bytes of the pieces that are worked on at a time.
const BATCH: usize = 16 << 20;
/// Plain bytes are given to zlib in parts of this length.
const FEED: usize = 64 << 10;
/// The longest plain bytes of a stream; a longer one is taken for a decompression bomb and left alone.
const MAX_PLAIN: u64 = 1 << 40;
/// Corrections longer than this part of the stream are not worth it.
const MAX_CORRECTIONS: u64 = 3;

/// A place between two blocks.
#[derive(Clone, Copy, Default)]
struct Cut {
    /// In bits from the start of the stream.
    bit: u64,
    /// In bytes from the start of its plain bytes.
    plain: u64,
}

/// A decoded stream.
pub(super) struct Inflated {
    /// How many plain bytes it has.
    pub(super) plain_len: u64,
    /// How long it was.
    pub(super) folded_len: u64,
    /// Where the pieces end; the last one at the end.
    cuts: Vec<Cut>,
    /// The first blocks that tell encoders apart; there are none in zeros and noise.
    sample: Option<Range<Cut>>,
}

/// The least and the most plain bytes of a sample.
const SAMPLE: Range<u64> = 512 << 10..2 << 20;

/// Whether the `len` bits of the stream for `plain` bytes tell encoders apart. Zeros and noise, which every encoder makes in
/// the same way, do not.
fn telling(len: u64, plain: u64) -> bool {
    SAMPLE.contains(&plain) && (10..90).contains(&(len / 8 * 100 / plain))
}

/// Decodes the raw deflate stream that starts at `start` of `source` and ends before `end` into a file in `scratch`.
/// `None` when it is damaged, not all there, or in blocks too long to cut.
pub(super) fn inflate(
    source: &dyn Source,
    start: u64,
    end: u64,
    scratch: &Path,
) -> io::Result<Option<(Inflated, File)>> {
    let mut out = SparseWriter::new(scratch_file(scratch)?);
    let Some(inflated) = measure(source, start, end, &mut out)? else { return Ok(None) };
    Ok(Some((inflated, File::new(out.finish()?)?)))
}

/// As [`inflate`], into `out`.
pub(super) fn measure(
    source: &dyn Source,
    start: u64,
    end: u64,
    out: &mut dyn Write,
) -> io::Result<Option<Inflated>> {
    let mut decoder = Inflate::new(Wrap::Raw)?;
    let (mut input, mut output) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    let mut held = 0..0;
    let mut read = start;
    let mut now = Cut::default();
    let mut cuts = Vec::new();
    let mut last = Cut::default();
    let mut sample = None;
    let mut sample_start = Cut::default();
    loop {
        if held.is_empty() {
            let n = (end - read).min(input.len() as u64);
            source.read_at(read, &mut input[..n as usize])?;
            read += n;
            held = 0..n as usize;
        }
        let Ok(step) = decoder.run(&input[held.clone()], &mut output, true) else { return Ok(None) };
        out.write_all(&output[..step.produced])?;
        held.start += step.consumed;
        now.plain += step.produced as u64;
        let consumed = read - start - held.len() as u64;
        if step.consumed == 0 && step.produced == 0 && step.stop == Stop::Starved && read == end {
            return Ok(None);
        }
        now.bit = consumed * 8 - if let Stop::Block(unused) = step.stop { u64::from(unused) } else { 0 };
        let (folded, plain) = ((now.bit - last.bit) / 8, now.plain - last.plain);
        if folded > MAX_PIECE || plain > MAX_PIECE || now.plain > MAX_PLAIN {
            return Ok(None);
        }
        match step.stop {
            Stop::Starved => {}
            Stop::Block(_) => {
                let (len, plain_len) = (now.bit - sample_start.bit, now.plain - sample_start.plain);
                if sample.is_none() && plain_len >= SAMPLE.start {
                    sample = telling(len, plain_len).then_some(sample_start..now);
                    sample_start = now;
                }
                if folded >= PIECE_FOLDED || plain >= PIECE_PLAIN {
                    cuts.push(now);
                    last = now;
                }
            }
            Stop::End => {
                // The end comes once more after the last block, which may have been cut off already.
                cuts.pop_if(|cut| cut.bit.next_multiple_of(8) == now.bit && cut.plain == now.plain);
                cuts.push(now);
                return Ok(Some(Inflated { plain_len: now.plain, folded_len: consumed, cuts, sample }));
            }
        }
    }
}

/// Finds what makes the stream at `start` of `source` of the bytes of `plain`, in at most `max_pieces` pieces. An encoder
/// that makes the first `enough` plain bytes as no other does is believed to make the rest.
pub(super) fn find_encoder(
    source: &dyn Source,
    start: u64,
    stream: &Inflated,
    plain: &dyn Source,
    max_pieces: usize,
    enough: u64,
) -> io::Result<Option<StreamEncoder>> {
    if let Some(encoder) = find_whole(source, start, stream, plain, enough)? {
        return Ok(Some(encoder));
    }
    if stream.cuts.len() > max_pieces {
        return Ok(None);
    }
    Ok(find_pieces(source, start, stream, plain)?.map(StreamEncoder::Pieces))
}

/// An encoder that makes a stream in one go.
pub(super) enum Whole {
    Zlib(Deflate),
    Gzip(Box<Gzip>),
    Lzma2(xz::Encoder),
    Zstd(zst::Encoder),
}

impl Whole {
    fn new(encoder: &StreamEncoder, plain_len: u64) -> io::Result<Self> {
        Ok(match encoder {
            StreamEncoder::Zlib(params) => Self::Zlib(Deflate::new(*params)?),
            StreamEncoder::Gzip(level) => Self::Gzip(Box::new(Gzip::new(*level))),
            StreamEncoder::Lzma2(params) => Self::Lzma2(xz::Encoder::new(params)?),
            StreamEncoder::Zstd(params) => Self::Zstd(zst::Encoder::new(params, plain_len)?),
            StreamEncoder::Pieces(_) => return Err(io::Error::other("pieces are not made in one go")),
        })
    }

    fn run(&mut self, input: &[u8], finish: bool, out: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Zlib(deflate) => deflate.run(input, finish, out),
            Self::Gzip(gzip) => {
                gzip.run(input, finish, out);
                Ok(())
            }
            Self::Lzma2(encoder) => encoder.run(input, finish, out),
            Self::Zstd(encoder) => encoder.run(input, finish, out),
        }
    }
}

/// A stream, and the plain bytes that it is made of.
pub(super) struct Wanted<'a> {
    /// Has the stream,
    pub(super) source: &'a dyn Source,
    /// here.
    pub(super) range: Range<u64>,
    pub(super) plain: &'a dyn Source,
    pub(super) plain_len: u64,
}

/// An encoder that has made the right bytes so far.
struct Candidate {
    encoder: StreamEncoder,
    whole: Whole,
    /// How many plain bytes it was given.
    pos: u64,
    /// How much of the stream it has made of them.
    done: u64,
}

impl Candidate {
    fn new(encoder: StreamEncoder, wanted: &Wanted<'_>) -> io::Result<Self> {
        Ok(Self { whole: Whole::new(&encoder, wanted.plain_len)?, encoder, pos: 0, done: 0 })
    }

    /// Goes on up to `end` of the plain bytes. Whether it makes the right bytes so far.
    fn run(&mut self, wanted: &Wanted<'_>, end: u64) -> io::Result<bool> {
        let mut part = vec![0; FEED];
        let (mut made, mut right) = (Vec::new(), Vec::new());
        let folded_len = wanted.range.end - wanted.range.start;
        let end = end.min(wanted.plain_len);
        loop {
            let part = &mut part[..(end - self.pos).min(FEED as u64) as usize];
            wanted.plain.read_at(self.pos, part)?;
            self.pos += part.len() as u64;
            let finish = self.pos == wanted.plain_len;
            made.clear();
            self.whole.run(part, finish, &mut made)?;
            let begin = self.done;
            self.done += made.len() as u64;
            if self.done > folded_len || finish && self.done != folded_len {
                return Ok(false);
            }
            right.resize(made.len(), 0);
            wanted.source.read_at(wanted.range.start + begin, &mut right)?;
            if made != right {
                return Ok(false);
            }
            if self.pos == end {
                return Ok(true);
            }
        }
    }
}

/// All candidates make so many plain bytes: the first blocks of most streams, by which all are known that are wrong.
const TOGETHER: u64 = 256 << 10;

/// The encoder that makes the whole stream.
fn find_whole(
    source: &dyn Source,
    start: u64,
    stream: &Inflated,
    plain: &dyn Source,
    enough: u64,
) -> io::Result<Option<StreamEncoder>> {
    let range = start..start + stream.folded_len;
    let wanted = Wanted { source, range, plain, plain_len: stream.plain_len };
    let all = candidates(Wrap::Raw).into_iter().map(StreamEncoder::Zlib);
    let all: Vec<_> = all.chain((1..=9).map(StreamEncoder::Gzip)).collect();
    let begin = |encoder| {
        let mut candidate = Candidate::new(encoder, &wanted)?;
        Ok(candidate.run(&wanted, TOGETHER)?.then_some(candidate))
    };
    let alive = all.into_par_iter().map(begin).collect::<io::Result<Vec<_>>>()?;
    let mut alive: Vec<_> = alive.into_iter().flatten().collect();
    if let (Some(sample), true) = (&stream.sample, alive.len() > 1 && wanted.plain_len > TOGETHER) {
        alive = likeliest_first(alive, plain, sample)?;
    }
    // What agrees in zeros or noise is not believed for that.
    let enough = stream.sample.as_ref().map_or(enough, |sample| sample.end.plain.max(enough));
    first_right(alive, &wanted, enough)
}

/// Sorts candidates by how near the length of `sample` as each makes it is to the length in the stream. The sample is made on
/// its own, which changes its length by a few bytes, about the same number for every candidate.
fn likeliest_first(
    candidates: Vec<Candidate>,
    plain: &dyn Source,
    sample: &Range<Cut>,
) -> io::Result<Vec<Candidate>> {
    let window = sample.start.plain.min(WINDOW as u64);
    let mut bytes = vec![0; (sample.end.plain - sample.start.plain + window) as usize];
    plain.read_at(sample.start.plain - window, &mut bytes)?;
    let len = ((sample.end.bit - sample.start.bit) / 8) as usize;
    let made = |encoder: &StreamEncoder, bytes: &[u8]| -> io::Result<usize> {
        let mut made = Vec::new();
        Whole::new(encoder, bytes.len() as u64)?.run(bytes, true, &mut made)?;
        Ok(made.len())
    };
    let off = |candidate: Candidate| -> io::Result<_> {
        let before = made(&candidate.encoder, &bytes[..window as usize])?;
        Ok(((made(&candidate.encoder, &bytes)? - before).abs_diff(len), candidate))
    };
    let mut all = candidates.into_par_iter().map(off).collect::<io::Result<Vec<_>>>()?;
    all.sort_by_key(|(off, _)| *off);
    Ok(all.into_iter().map(|(_, candidate)| candidate).collect())
}

/// The first of `candidates` that makes the stream; it is believed when it has made `enough` plain bytes of it.
fn first_right(
    candidates: Vec<Candidate>,
    wanted: &Wanted<'_>,
    enough: u64,
) -> io::Result<Option<StreamEncoder>> {
    for mut candidate in candidates {
        if candidate.pos == wanted.plain_len || candidate.run(wanted, enough)? {
            return Ok(Some(candidate.encoder));
        }
    }
    Ok(None)
}

/// Whether `encoder` makes the stream; it is believed when it has made `enough` plain bytes of it.
pub(super) fn makes(encoder: &StreamEncoder, wanted: &Wanted<'_>, enough: u64) -> io::Result<bool> {
    Candidate::new(encoder.clone(), wanted)?.run(wanted, enough)
}

/// A piece as it is worked on, with its bytes in memory.
struct Loaded {
    /// The plain bytes, with those of the window before them.
    plain: Vec<u8>,
    window: usize,
    deflated: Vec<u8>,
    bits: u32,
    phase: u8,
    last: bool,
}

impl Loaded {
    fn piece(&self) -> preflate::Piece<'_> {
        let (window, plain) = self.plain.split_at(self.window);
        preflate::Piece { window, plain, phase: self.phase, last: self.last }
    }
}

/// The pieces of the stream, each with its corrections. `None` when those are too long.
fn find_pieces(
    source: &dyn Source,
    start: u64,
    stream: &Inflated,
    from_plain: &dyn Source,
) -> io::Result<Option<Vec<Piece>>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut side = 0;
    let mut from = Cut::default();
    // A long run of zeros is the same few pieces over and over.
    let mut zeros: HashMap<(u8, Vec<u8>), How> = HashMap::new();
    let mut cuts = &stream.cuts[..];
    while !cuts.is_empty() {
        let mut batch = Vec::new();
        let mut room = BATCH as u64;
        while let Some((&to, rest)) = cuts.split_first() {
            if !batch.is_empty() && room < to.plain - from.plain {
                break;
            }
            room = room.saturating_sub(to.plain - from.plain);
            let window = from.plain.min(WINDOW as u64);
            let mut plain = vec![0; (to.plain - from.plain + window) as usize];
            from_plain.read_at(from.plain - window, &mut plain)?;
            let mut deflated = vec![0; (to.bit.div_ceil(8) - from.bit / 8) as usize];
            source.read_at(start + from.bit / 8, &mut deflated)?;
            let bits = (to.bit - from.bit) as u32;
            let phase = (from.bit % 8) as u8;
            keep_bits(&mut deflated, phase, bits);
            let last = rest.is_empty();
            batch.push(Loaded { plain, window: window as usize, deflated, bits, phase, last });
            cuts = rest;
            from = to;
        }
        let made: Vec<_> = batch
            .into_par_iter()
            .map(|loaded| {
                let zero = is_zero(&loaded.plain) && !loaded.last && loaded.window == WINDOW;
                let key = zero.then(|| (loaded.phase, loaded.deflated.clone()));
                let how = key.as_ref().and_then(|key| zeros.get(key)).cloned().unwrap_or_else(|| {
                    match preflate::analyse(loaded.piece(), &loaded.deflated, loaded.bits) {
                        Some(corrections) => How::Preflate(corrections),
                        None => How::Verbatim(loaded.deflated.clone()),
                    }
                });
                let plain_len = (loaded.plain.len() - loaded.window) as u32;
                (Piece { plain_len, bits: loaded.bits, how }, key)
            })
            .collect();
        for (piece, key) in made {
            side += match &piece.how {
                How::Verbatim(bytes) | How::Preflate(bytes) => bytes.len() as u64,
            };
            if let Some(key) = key {
                zeros.insert(key, piece.how.clone());
            }
            pieces.push(piece);
        }
        if side > (from.bit / 8 / MAX_CORRECTIONS).max(1 << 16) || side > map::MAX_MAP as u64 / 4 {
            return Ok(None);
        }
    }
    Ok(Some(pieces))
}

/// Makes the stream of the plain bytes written to it.
pub(super) enum StreamWriter<'a> {
    Whole { whole: Whole, feed: Vec<u8>, out: &'a mut dyn Write },
    Pieces(PieceWriter<'a>),
}

impl<'a> StreamWriter<'a> {
    /// A stream of `plain_len` bytes.
    pub(super) fn new(
        encoder: &'a StreamEncoder,
        plain_len: u64,
        out: &'a mut dyn Write,
    ) -> io::Result<Self> {
        Ok(match encoder {
            StreamEncoder::Pieces(pieces) => Self::Pieces(PieceWriter {
                pieces,
                held: Vec::new(),
                window: 0,
                phase: 0,
                carry: 0,
                zeros: HashMap::new(),
                out,
            }),
            whole => Self::Whole { whole: Whole::new(whole, plain_len)?, feed: Vec::new(), out },
        })
    }

    /// Ends the stream.
    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Self::Whole { mut whole, feed, out } => {
                let mut made = Vec::new();
                whole.run(&feed, true, &mut made)?;
                out.write_all(&made)
            }
            Self::Pieces(mut writer) => {
                while !writer.pieces.is_empty() {
                    writer.encode()?;
                }
                if writer.phase != 0 { writer.out.write_all(&[writer.carry]) } else { Ok(()) }
            }
        }
    }
}

impl Write for StreamWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Whole { whole, feed, out } => {
                // One part is always kept back: the last one is given with the end of the stream.
                let mut made = Vec::new();
                feed.extend(buf);
                let mut used = 0;
                while feed.len() - used > FEED {
                    whole.run(&feed[used..used + FEED], false, &mut made)?;
                    used += FEED;
                }
                feed.drain(..used);
                out.write_all(&made)?;
            }
            Self::Pieces(writer) => {
                writer.held.extend(buf);
                while writer.held.len() - writer.window >= BATCH && writer.encode()? {}
            }
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct PieceWriter<'a> {
    /// The pieces still to be made.
    pieces: &'a [Piece],
    /// The window and the plain bytes after it that were not used yet.
    held: Vec<u8>,
    window: usize,
    /// How many bits of the byte after the last one written are known, and which they are.
    phase: u8,
    carry: u8,
    /// Pieces of zeros, as in [`find_pieces`].
    zeros: HashMap<(u8, &'a Piece), Vec<u8>>,
    out: &'a mut dyn Write,
}

/// How many different pieces of zeros are remembered: one for each phase, and some.
const MAX_ZEROS: usize = 16;

impl PieceWriter<'_> {
    /// Makes the pieces whose plain bytes are all there, at most a batch. Whether there were any.
    fn encode(&mut self) -> io::Result<bool> {
        let mut jobs = Vec::new();
        let (mut pos, mut phase, mut made) = (self.window, self.phase, 0);
        for (i, piece) in self.pieces.iter().enumerate() {
            let end = pos + piece.plain_len as usize;
            if end > self.held.len() || pos - self.window > BATCH || made > BATCH {
                break;
            }
            let window = &self.held[pos.saturating_sub(WINDOW)..pos];
            let last = i + 1 == self.pieces.len();
            jobs.push((piece, preflate::Piece { window, plain: &self.held[pos..end], phase, last }));
            pos = end;
            made += piece.bits as usize / 8;
            phase = ((u32::from(phase) + piece.bits % 8) % 8) as u8;
        }
        let made: Vec<(bool, io::Result<Vec<u8>>)> = jobs
            .par_iter()
            .map(|(piece, plain)| {
                let zero = !plain.last
                    && plain.window.len() == WINDOW
                    && is_zero(plain.window)
                    && is_zero(plain.plain);
                if zero && let Some(known) = self.zeros.get(&(plain.phase, *piece)) {
                    return (zero, Ok(known.clone()));
                }
                (zero, make(piece, *plain))
            })
            .collect();
        let count = jobs.len();
        for ((zero, bytes), (piece, plain)) in made.into_iter().zip(jobs) {
            let mut bytes = bytes?;
            if zero && self.zeros.len() < MAX_ZEROS {
                self.zeros.entry((plain.phase, piece)).or_insert_with(|| bytes.clone());
            }
            if let Some(first) = bytes.first_mut() {
                *first |= self.carry;
                self.phase = ((u32::from(self.phase) + piece.bits % 8) % 8) as u8;
                self.carry = if self.phase != 0 { bytes.pop().unwrap_or_default() } else { 0 };
            }
            self.out.write_all(&bytes)?;
        }
        self.pieces = &self.pieces[count..];
        self.held.drain(..pos.saturating_sub(WINDOW));
        self.window = pos.min(WINDOW);
        Ok(count > 0)
    }
}

/// The bits of a piece.
fn make(piece: &Piece, plain: preflate::Piece<'_>) -> io::Result<Vec<u8>> {
    match &piece.how {
        How::Preflate(corrections) => preflate::recreate(plain, corrections, piece.bits),
        How::Verbatim(bytes) => {
            let mut bytes = bytes.clone();
            let before = bytes.len();
            keep_bits(&mut bytes, plain.phase, piece.bits);
            if bytes.len() == before
                && (u64::from(plain.phase) + u64::from(piece.bits)).div_ceil(8) == before as u64
            {
                Ok(bytes)
            } else {
                Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "fold: a verbatim piece of another length than its bits",
                ))
            }
        }
    }
}
