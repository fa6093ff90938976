//! Positioned reads of a folded form, for who looks into it here and there. Whoever wants all of it calls
//! [`fold`](super::fold).

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::deflate::Coder;
use super::map::{Encoder, Map, Segment};
use super::stream::StreamWriter;
use crate::source::{Source, check_range};

/// How far into a long deflate stream can be read: as far as `inspect` looks into a compressed file, and the piece
/// that this ends in. To get further, everything before must be made.
const STREAM_WINDOW: u64 = 24 << 20;

/// Segments whose folded length is found out at a time.
const STEP: usize = 256;

/// A folded form as a source.
///
/// Where a segment starts depends on the folded lengths of those before it, which only encoding tells. They are found
/// out as far as reads need them; the end, up to the last segment that must be encoded, is known from the start.
pub struct Folded {
    map: Map,
    plain: Arc<dyn Source>,
    /// Where segments start, in the folded form and in the plain stream: of those known from the front.
    front: Mutex<Vec<(u64, u64)>>,
    /// The same, of those known from the back; the first is segment `back_from`.
    back: Vec<(u64, u64)>,
    back_from: usize,
    /// The segment that was made last, and its bytes.
    last: Mutex<(usize, Vec<u8>)>,
}

impl Folded {
    /// What `map` makes of `plain`; an error when that is not as long as the map says.
    pub fn new(map: Map, plain: Arc<dyn Source>) -> io::Result<Self> {
        if plain.len() != map.plain_len() {
            return Err(bad(&format!("expected {} plain bytes, found {}", map.plain_len(), plain.len())));
        }
        let (mut at, mut back) = ((map.folded_len(), map.plain_len()), Vec::new());
        for segment in map.segments.iter().rev() {
            let Some((folded, plain)) = lengths(segment) else { break };
            at = (at.0 - folded, at.1 - plain);
            back.push(at);
        }
        back.reverse();
        let back_from = map.segments.len() - back.len();
        Ok(Self {
            map,
            plain,
            front: Mutex::new(vec![(0, 0)]),
            back,
            back_from,
            last: Mutex::new((usize::MAX, vec![])),
        })
    }

    /// The segment that holds `offset`, which is inside, and where it starts.
    fn find(&self, offset: u64) -> io::Result<(usize, (u64, u64))> {
        if let Some(i) = self.back.partition_point(|b| b.0 <= offset).checked_sub(1) {
            return Ok((self.back_from + i, self.back[i]));
        }
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        while front.last().is_some_and(|f| f.0 <= offset) && front.len() <= self.back_from {
            let first = front.len() - 1;
            let (mut folded, mut plain) = front[first];
            let batch = &self.map.segments[first..self.back_from.min(first + STEP)];
            let mut plain_at = plain;
            let jobs: Vec<(u64, &Segment)> = batch
                .iter()
                .map(|segment| {
                    let at = plain_at;
                    plain_at += plain_len(segment);
                    (at, segment)
                })
                .collect();
            let lens: Vec<io::Result<u64>> = jobs
                .par_iter()
                .map(|(at, segment)| match segment {
                    Segment::Small { plain_len, encoder } => {
                        Ok(self.small(*at, *plain_len, encoder)?.len() as u64)
                    }
                    other => Ok(lengths(other).map_or(0, |l| l.0)),
                })
                .collect();
            for ((_, segment), len) in jobs.iter().zip(lens) {
                folded += len?;
                plain += plain_len(segment);
                front.push((folded, plain));
            }
        }
        let i = front.partition_point(|f| f.0 <= offset) - 1;
        match i < self.back_from {
            true => Ok((i, front[i])),
            false => Err(bad("the segments are shorter than the map says")),
        }
    }

    fn small(&self, at: u64, plain_len: u32, encoder: &Encoder) -> io::Result<Vec<u8>> {
        let mut plain = vec![0; plain_len as usize];
        self.plain.read_at(at, &mut plain)?;
        Coder::new().encode(&plain, encoder)
    }

    /// At least the first `needed` bytes of a segment that must be made.
    fn made(&self, plain_at: u64, segment: &Segment, needed: u64) -> io::Result<Vec<u8>> {
        match segment {
            Segment::Small { plain_len, encoder } => self.small(plain_at, *plain_len, encoder),
            Segment::Literal(bytes) => Ok(bytes.clone()),
            Segment::Stream { encoder, inner, .. } if needed <= STREAM_WINDOW => {
                let mut out = Window { bytes: vec![], most: STREAM_WINDOW as usize };
                let mut plain = From { source: &*self.plain, pos: plain_at };
                let mut stream = StreamWriter::new(encoder, inner.folded_len, &mut out)?;
                let done = super::fold(inner, &mut plain, &mut stream, 0).and_then(|()| stream.finish());
                match done {
                    Err(e) if out.bytes.len() < out.most => Err(e),
                    _ => Ok(out.bytes),
                }
            }
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("only the first {STREAM_WINDOW} bytes of a compressed stream can be looked at"),
            )),
        }
    }
}

impl Source for Folded {
    fn len(&self) -> u64 {
        self.map.folded_len()
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len(), offset, buf.len())?;
        while !buf.is_empty() {
            let (i, (start, plain)) = self.find(offset)?;
            let inside = offset - start;
            let n = if let Segment::Stored(len) = self.map.segments[i] {
                let n = (len - inside).min(buf.len() as u64) as usize;
                self.plain.read_at(plain + inside, &mut buf[..n])?;
                n
            } else {
                let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.0 != i {
                    *last = (i, self.made(plain, &self.map.segments[i], inside + 1)?);
                }
                let bytes = last.1.get(inside as usize..).filter(|b| !b.is_empty());
                let bytes =
                    bytes.ok_or_else(|| bad("a compressed stream ends early, or is too long to look at"))?;
                let n = bytes.len().min(buf.len());
                buf[..n].copy_from_slice(&bytes[..n]);
                n
            };
            buf = &mut buf[n..];
            offset += n as u64;
        }
        Ok(())
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("fold: {what}"))
}

/// The folded and the plain length of a segment, where the folded one is known.
fn lengths(segment: &Segment) -> Option<(u64, u64)> {
    match segment {
        Segment::Stored(len) => Some((*len, *len)),
        Segment::Literal(bytes) => Some((bytes.len() as u64, 0)),
        Segment::Stream { folded_len, inner, .. } => Some((*folded_len, inner.plain_len())),
        Segment::Small { .. } => None,
    }
}

fn plain_len(segment: &Segment) -> u64 {
    match segment {
        Segment::Stored(len) => *len,
        Segment::Literal(_) => 0,
        Segment::Small { plain_len, .. } => u64::from(*plain_len),
        Segment::Stream { inner, .. } => inner.plain_len(),
    }
}

/// Reads a source from a position on.
struct From<'a> {
    source: &'a dyn Source,
    pos: u64,
}

impl Read for From<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (self.source.len() - self.pos).min(buf.len() as u64) as usize;
        self.source.read_at(self.pos, &mut buf[..n])?;
        self.pos += n as u64;
        Ok(n)
    }
}

/// Takes so many bytes and then ends what writes them.
struct Window {
    bytes: Vec<u8>,
    most: usize,
}

impl Write for Window {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = buf.len().min(self.most - self.bytes.len());
        self.bytes.extend_from_slice(&buf[..n]);
        if n == 0 && !buf.is_empty() {
            return Err(io::Error::other("enough"));
        }
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
