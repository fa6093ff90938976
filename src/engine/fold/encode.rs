//! The way back: from a plain stream and a map to the form.

use std::io::{self, Read, Write};
use std::ops::Range;

use rayon::prelude::*;

use super::deflate::Coder;
use super::map::{Encoder, Map, Segment, StreamEncoder};
use super::stream::StreamWriter;
use super::xz;

/// Plain bytes that are encoded at a time; twice as many are in memory.
const BATCH: usize = 8 << 20;
/// The first batch is small, so that the first bytes come soon.
const FIRST_BATCH: usize = 1 << 20;
/// The most segments of a batch, of which there may be empty ones.
const BATCH_SEGMENTS: usize = 64 << 10;
/// A longer stored run is passed through.
const LONG_STORED: u64 = 64 << 10;

/// Makes the folded form of the plain stream `plain` and writes it to `out`. Memory is bounded whatever the map says;
/// small segments are encoded on all cores, and so are LZMA2 streams as far as `memory` bytes allow: one at a time is
/// made with whatever its dictionary takes. An error when `plain` ends early or the map does not lead to
/// `map.folded_len()` bytes; whether they are the right ones only a digest can tell.
pub fn fold(map: &Map, plain: &mut dyn Read, out: &mut dyn Write, memory: u64) -> io::Result<()> {
    let mut out = Counted { out, left: map.folded_len };
    let mut segments = &map.segments[..];
    let mut buf = Vec::new();
    let mut room = FIRST_BATCH;
    let mut ready = Batch::default();
    while !segments.is_empty() || !ready.items.is_empty() {
        // The next batch is read while this one is encoded. Reading stays on this thread: `plain` is not for others.
        let mut next = Batch::default();
        let mut encoded = Ok(Vec::new());
        let read = rayon::in_place_scope(|scope| {
            scope.spawn(|_| encoded = ready.encode());
            next.read(&mut segments, plain, room)
        });
        for bytes in encoded? {
            out.write_all(&bytes)?;
        }
        read?;
        (ready, room) = (next, BATCH);
        // What does not go into a batch comes after all that does.
        if ready.items.is_empty() {
            match segments.split_first() {
                Some((Segment::Stored(len), rest)) => {
                    copy(plain, &mut out, *len, &mut buf)?;
                    segments = rest;
                }
                Some((Segment::Literal(bytes), rest)) => {
                    out.write_all(bytes)?;
                    segments = rest;
                }
                Some((Segment::Stream { encoder, inner, .. }, rest)) => {
                    let blocks = lzma2_blocks(segments);
                    let at_a_time = blocks.iter().filter_map(xz::Next::job).map(|job| job.at_a_time(memory));
                    match at_a_time.min() {
                        Some(at_a_time @ 2..) if blocks.len() > 1 => {
                            segments = &segments[blocks.len()..];
                            xz::encode_all(blocks, at_a_time, plain, &mut out)?;
                        }
                        _ => {
                            let mut stream = StreamWriter::new(encoder, inner.folded_len, &mut out)?;
                            fold(inner, plain, &mut stream, memory)?;
                            stream.finish()?;
                            segments = rest;
                        }
                    }
                }
                _ => {}
            }
        }
    }
    match out.left {
        0 => Ok(()),
        left => Err(bad(format!("{left} bytes less than the map says"))),
    }
}

/// The LZMA2 streams at the front of `segments`, of which nothing inside is compressed, and the bytes between them.
fn lzma2_blocks(segments: &[Segment]) -> Vec<xz::Next<'_>> {
    fn next(segment: &Segment) -> Option<xz::Next<'_>> {
        match segment {
            Segment::Literal(bytes) => Some(xz::Next::Literal(bytes)),
            Segment::Stream { encoder: StreamEncoder::Lzma2(params), inner, folded_len }
                if matches!(inner.segments[..], [Segment::Stored(_)]) =>
            {
                let (params, plain_len, folded_len) = (*params, inner.plain_len, *folded_len);
                Some(xz::Next::Block(xz::Job { params, plain_len, folded_len }))
            }
            _ => None,
        }
    }
    segments.iter().map_while(next).collect()
}

fn bad(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("fold: {what}"))
}

/// Segments whose plain bytes are in memory.
#[derive(Default)]
struct Batch<'a> {
    plain: Vec<u8>,
    items: Vec<(Range<usize>, Option<&'a Encoder>)>,
}

impl<'a> Batch<'a> {
    /// Takes segments off the front of `segments` until there are `room` bytes, plain or encoded, or one comes that is for
    /// no batch.
    fn read(&mut self, segments: &mut &'a [Segment], plain: &mut dyn Read, room: usize) -> io::Result<()> {
        let (mut end, mut encoded) = (0, 0);
        while let Some((segment, rest)) = segments.split_first()
            && end.max(encoded) < room
            && self.items.len() < BATCH_SEGMENTS
        {
            let (len, encoder) = match segment {
                Segment::Stored(len) if *len <= LONG_STORED => (*len as usize, None),
                Segment::Small { plain_len, encoder } => (*plain_len as usize, Some(encoder)),
                _ => break,
            };
            self.items.push((end..end + len, encoder));
            end += len;
            encoded += segment.made_len() as usize;
            *segments = rest;
        }
        self.plain.resize(end, 0);
        plain.read_exact(&mut self.plain)
    }

    fn encode(&self) -> io::Result<Vec<Vec<u8>>> {
        let encode = |coder: &mut Coder, (range, encoder): &(Range<usize>, Option<&Encoder>)| {
            let plain = &self.plain[range.clone()];
            encoder.map_or_else(|| Ok(plain.to_vec()), |encoder| coder.encode(plain, encoder))
        };
        self.items.par_iter().map_init(Coder::new, encode).collect()
    }
}

/// Copies exactly `len` bytes.
fn copy(from: &mut dyn Read, to: &mut dyn Write, mut len: u64, buf: &mut Vec<u8>) -> io::Result<()> {
    buf.resize(1 << 18, 0);
    while len > 0 {
        let part = &mut buf[..len.min(1 << 18) as usize];
        from.read_exact(part)?;
        to.write_all(part)?;
        len -= part.len() as u64;
    }
    Ok(())
}

/// A writer that takes no more bytes than announced.
struct Counted<'a> {
    out: &'a mut dyn Write,
    left: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.len() as u64 > self.left {
            return Err(bad("more bytes than the map says"));
        }
        let n = self.out.write(buf)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
