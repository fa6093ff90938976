//! How the outer compression of a published file is put on again: the map whose plain stream is what [`peel`] took out
//! and whose folded form is the published file. What no encoder makes, such as headers, checksums and indexes, is in
//! the map itself.
//!
//! [`peel`]: super::peel()

use std::io;
use std::sync::Arc;

use super::map::{MAX_MAP, MAX_SEGMENTS, Map, Segment, StreamEncoder};
use super::peel::{Compression, only_member};
use super::stream::{self, Wanted};
use super::{gzip, xz, zip, zst};
use crate::source::{File, Slice, Source};

/// How hard to look for the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// What makes the beginning is believed to make the rest. It may not: whoever takes the map proves it first.
    Beginning,
    /// All of the file is looked at, and corrections are searched for where no encoder makes it.
    Whole,
}

impl Effort {
    /// An encoder that makes so many plain bytes is believed to make the rest.
    pub(super) fn enough(self) -> u64 {
        match self {
            Self::Beginning => 16 << 20,
            Self::Whole => u64::MAX,
        }
    }
}

/// The most bytes that are kept in the map as they are.
const MAX_LITERALS: usize = MAX_MAP / 4;

/// Finds the map that makes `file`, which is compressed in this way, of `plain`; the reason when there is none. Takes
/// about `memory` bytes, or what a single encoder needs.
pub fn wrap(
    file: &std::fs::File,
    compression: Compression,
    plain: &Arc<dyn Source>,
    effort: Effort,
    memory: u64,
) -> io::Result<Result<Map, String>> {
    let source = File::new(file.try_clone()?)?;
    let len = source.len();
    let mut wrapper =
        Wrapper { file: &source, plain, effort, memory, at: 0, plain_at: 0, literals: 0, segments: vec![] };
    let found = match compression {
        Compression::None => Ok(()),
        Compression::Gzip => wrapper.gzip()?,
        Compression::Xz => wrapper.xz()?,
        Compression::Zip => {
            let (member, data) = only_member(&source)?;
            match member.method {
                zip::STORED => wrapper.stored(data.start, member.len)?,
                zip::DEFLATE => wrapper.deflate(data.start, data.end)?.map(drop),
                method => Err(format!("zip method {method} is not known here")),
            }
        }
        Compression::Zstd => wrapper.zstd()?,
    };
    if let Err(reason) = found {
        return Ok(Err(reason));
    }
    if let Err(reason) = wrapper.literal(len)? {
        return Ok(Err(reason));
    }
    if wrapper.plain_at != plain.len() {
        return Ok(Err("what is inside is not what comes out".into()));
    }
    Map::new(wrapper.segments, len).map(Ok)
}

struct Wrapper<'a> {
    file: &'a dyn Source,
    plain: &'a Arc<dyn Source>,
    effort: Effort,
    memory: u64,
    /// What is before is in `segments`: of the file and of the plain bytes.
    at: u64,
    plain_at: u64,
    /// How many bytes are kept as they are.
    literals: usize,
    segments: Vec<Segment>,
}

/// What was done, or the reason why it cannot be.
type Found<T = ()> = io::Result<Result<T, String>>;

impl Wrapper<'_> {
    /// Keeps what is up to `end` of the file as it is.
    fn literal(&mut self, end: u64) -> Found {
        let len = end.saturating_sub(self.at);
        if len > 0 {
            let room = MAX_LITERALS - self.literals;
            if len > room as u64 || self.segments.len() >= MAX_SEGMENTS / 2 {
                return Ok(Err("too much of it belongs to no encoder".into()));
            }
            let mut bytes = vec![0; len as usize];
            self.file.read_at(self.at, &mut bytes)?;
            self.literals += bytes.len();
            self.segments.push(Segment::Literal(bytes));
            self.at = end;
        }
        Ok(Ok(()))
    }

    /// A stream at `start` of the file.
    fn stream(&mut self, start: u64, folded_len: u64, plain_len: u64, encoder: StreamEncoder) -> Found {
        if let Err(reason) = self.literal(start)? {
            return Ok(Err(reason));
        }
        let inner = if plain_len > 0 { vec![Segment::Stored(plain_len)] } else { vec![] };
        let inner = Box::new(Map::new(inner, plain_len)?);
        self.segments.push(Segment::Stream { folded_len, encoder, inner });
        self.at = start + folded_len;
        self.plain_at += plain_len;
        Ok(Ok(()))
    }

    /// Plain bytes at `start` of the file.
    fn stored(&mut self, start: u64, len: u64) -> Found {
        let result = self.literal(start)?;
        if len > 0 {
            self.segments.push(Segment::Stored(len));
        }
        self.at = start + len;
        self.plain_at += len;
        Ok(result)
    }

    /// A deflate stream between `start` and `end` of the file. Gives where it ends.
    fn deflate(&mut self, start: u64, end: u64) -> Found<u64> {
        let Some(inflated) = stream::measure(self.file, start, end, &mut io::sink())? else {
            return Ok(Err("its deflate stream cannot be cut into pieces".into()));
        };
        let plain = Slice::new(self.plain.clone(), self.plain_at, inflated.plain_len)?;
        let pieces = if self.effort == Effort::Beginning { 0 } else { MAX_SEGMENTS / 2 };
        match stream::find_encoder(self.file, start, &inflated, &plain, pieces, self.effort.enough())? {
            Some(encoder) => Ok(self
                .stream(start, inflated.folded_len, inflated.plain_len, encoder)?
                .map(|()| start + inflated.folded_len)),
            None => Ok(Err("no deflate encoder that is known here makes it".into())),
        }
    }

    fn gzip(&mut self) -> Found {
        let len = self.file.len();
        let mut at = 0;
        while at < len {
            let mut header = vec![0; (len - at).min(gzip::MAX_HEADER as u64) as usize];
            self.file.read_at(at, &mut header)?;
            let Some(header_len) = gzip::header_len(&header) else { break };
            at = match self.deflate(at + header_len as u64, len)? {
                Ok(end) => end + gzip::TRAILER,
                Err(reason) => return Ok(Err(reason)),
            };
        }
        Ok(Ok(()))
    }

    fn zstd(&mut self) -> Found {
        let frames = match zst::frames(self.file)? {
            Ok(frames) => frames,
            Err(reason) => return Ok(Err(reason)),
        };
        let enough = self.effort.enough();
        for frame in frames {
            let plain = Slice::new(self.plain.clone(), self.plain_at, frame.plain_len)?;
            let range = frame.offset..frame.offset + frame.len;
            let wanted = Wanted { source: self.file, range, plain: &plain, plain_len: frame.plain_len };
            let mut found = None;
            // One at a time: the higher levels take hundreds of MB.
            for variants in zst::Params::candidates(&frame.header) {
                // What worker threads make begins in the same way.
                if !zst::makes_beginning(&variants[0], self.file, &frame, &plain)? {
                    continue;
                }
                for params in variants {
                    let encoder = StreamEncoder::Zstd(params);
                    if stream::makes(&encoder, &wanted, enough)? {
                        found = Some(encoder);
                        break;
                    }
                }
                if found.is_some() {
                    break;
                }
            }
            let Some(encoder) = found else {
                return Ok(Err(format!("no level of {} makes it", zst::VERSION)));
            };
            if let Err(reason) = self.stream(frame.offset, frame.len, frame.plain_len, encoder)? {
                return Ok(Err(reason));
            }
        }
        Ok(Ok(()))
    }

    fn xz(&mut self) -> Found {
        let blocks = match xz::blocks(self.file)? {
            Ok(blocks) => blocks,
            Err(reason) => return Ok(Err(reason)),
        };
        let mut known: Vec<xz::Params> = Vec::new();
        for data in blocks {
            let same =
                known.iter().find(|p| p.dict == data.dict && self.effort == Effort::Beginning).copied();
            let params = match same {
                Some(params) => params,
                None => {
                    match xz::find(self.file, &data, &**self.plain, self.plain_at, self.effort, self.memory)?
                    {
                        Some(params) => params,
                        None => {
                            return Ok(Err(format!(
                                "no preset of {} with a dictionary of {} makes it",
                                xz::VERSION,
                                data.dict
                            )));
                        }
                    }
                }
            };
            known.push(params);
            let encoder = StreamEncoder::Lzma2(params);
            if let Err(reason) = self.stream(data.offset, data.len, data.plain_len, encoder)? {
                return Ok(Err(reason));
            }
        }
        Ok(Ok(()))
    }
}
