//! The way out: from a form to its plain stream and its map.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::deflate::{Coder, Decoded, candidates};
use super::map::{MAX_SEGMENTS, Map, Segment};
use super::region::Region;
use super::scan::{MAX_DEPTH, regions};
use super::wrap::Effort;
use super::zlib::{Params, Wrap};
use super::{gzip, stream};
use crate::io::{SparseWriter, scratch_file};
use crate::source::{File, Source};

/// What [`unfold`] makes.
pub struct Unfolded {
    /// How the form is made of the plain stream. `None`: there is nothing compressed inside, and `plain` is the form.
    pub map: Option<Map>,
    /// The plain stream.
    pub plain: Arc<dyn Source>,
}

/// The plain bytes of the small regions that are decoded at a time.
const BATCH: u64 = 16 << 20;
/// How many regions every candidate is tried on. Those that make one of them are the ones tried on the rest.
const SAMPLES: usize = 16;
/// Bytes are copied in pieces of this many.
const COPY: usize = 1 << 20;

/// Opens up everything compressed in `form`. The plain stream is written to an unnamed file in `scratch`, with holes
/// for zeros; what is inside a gzip stream is also written to a file of its own on the way. Fails only when reading
/// or writing fails: an odd or damaged form merely has fewer regions. With [`Effort::Beginning`], the map is to be proven.
pub fn unfold(form: &Arc<dyn Source>, scratch: &Path, effort: Effort) -> io::Result<Unfolded> {
    let mut found = Vec::new();
    regions(&**form, 0, form.len(), 0, &mut found, MAX_SEGMENTS / 4)?;
    if !found.is_empty() {
        let out = SparseWriter::new(scratch_file(scratch)?);
        let mut unfolder = Unfolder { scratch, effort, out, segments: 0 };
        let map = unfolder.level(&**form, found, 0)?;
        if map.segments.iter().any(|segment| !matches!(segment, Segment::Stored(_))) {
            let plain = Arc::new(File::new(unfolder.out.finish()?)?);
            return Ok(Unfolded { map: Some(map), plain });
        }
    }
    Ok(Unfolded { map: None, plain: Arc::clone(form) })
}

struct Unfolder<'a> {
    scratch: &'a Path,
    effort: Effort,
    /// The plain stream.
    out: SparseWriter,
    /// Segments and pieces so far, in all levels.
    segments: usize,
}

/// The segments of a level as they are put together.
struct Level<'a> {
    source: &'a dyn Source,
    /// Everything before is in `segments`.
    pos: u64,
    segments: Vec<Segment>,
}

impl Unfolder<'_> {
    /// Opens up `found` in `source`, of which everything is written to the plain stream.
    fn level(&mut self, source: &dyn Source, found: Vec<Region>, depth: u32) -> io::Result<Map> {
        let mut level = Level { source, pos: 0, segments: Vec::new() };
        let mut rest = &found[..];
        while let Some(&region) = rest.first() {
            match region {
                Region::Gzip { offset, end } => {
                    self.gzip(&mut level, offset, end, depth)?;
                    rest = &rest[1..];
                }
                Region::Small { wrap, .. } => {
                    let alike = |r: &Region| matches!(r, Region::Small { wrap: w, .. } if *w == wrap);
                    let n = rest.iter().position(|r| !alike(r)).unwrap_or(rest.len());
                    self.small(&mut level, &rest[..n], wrap)?;
                    rest = &rest[n..];
                }
            }
        }
        self.stored(&mut level, source.len())?;
        self.segments += level.segments.len();
        Map::new(level.segments, source.len())
    }

    /// Keeps what is up to `end` as it is.
    fn stored(&mut self, level: &mut Level<'_>, end: u64) -> io::Result<()> {
        if end > level.pos {
            level.segments.push(Segment::Stored(end - level.pos));
            copy(level.source, level.pos, end, &mut self.out)?;
            level.pos = end;
        }
        Ok(())
    }

    /// Small regions that are wrapped alike.
    fn small(&mut self, level: &mut Level<'_>, mut rest: &[Region], wrap: Wrap) -> io::Result<()> {
        let source = level.source;
        let decode = |regions: &[Region], params: &[Params]| -> io::Result<Vec<Option<Decoded>>> {
            let decode = |coder: &mut Coder, region| coder.decode(source, region, params);
            regions.par_iter().map_init(Coder::new, decode).collect()
        };
        let mut params = candidates(wrap);
        let mut samples = true;
        while !rest.is_empty() {
            let mut room = BATCH;
            let mut fits = |region: &Region| {
                let Region::Small { max_plain, .. } = region else { return false };
                room = room.saturating_sub(u64::from(*max_plain));
                room > 0
            };
            let mut n = rest.iter().position(|r| !fits(r)).unwrap_or(rest.len()).max(1);
            if samples {
                n = n.min(SAMPLES);
            }
            let (now, later) = rest.split_at(n);
            rest = later;
            let decoded = decode(now, &params)?;
            if samples {
                let made = |p: &Params| decoded.iter().flatten().filter(|d| d.made_by(*p)).count();
                params.retain(|p| made(p) > 0);
                params.sort_by_key(|p| std::cmp::Reverse(made(p)));
                samples = false;
            }
            for found in decoded.into_iter().flatten() {
                // Regions of a damaged image may overlap.
                if found.offset >= level.pos {
                    self.stored(level, found.offset)?;
                    self.out.write_all(&found.plain)?;
                    level.pos += found.len as u64;
                    let plain_len = found.plain.len() as u32;
                    level.segments.push(Segment::Small { plain_len, encoder: found.encoder });
                }
            }
        }
        Ok(())
    }

    /// A run of gzip members; ends at the first thing that is none.
    fn gzip(&mut self, level: &mut Level<'_>, mut offset: u64, end: u64, depth: u32) -> io::Result<()> {
        let source = level.source;
        while depth < MAX_DEPTH && offset < end {
            let mut header = vec![0; (end - offset).min(gzip::MAX_HEADER as u64) as usize];
            source.read_at(offset, &mut header)?;
            let Some(len) = gzip::header_len(&header) else { break };
            let start = offset + len as u64;
            let Some((inflated, plain)) = stream::inflate(source, start, end, self.scratch)? else { break };
            offset = start + inflated.folded_len + gzip::TRAILER;
            let room = MAX_SEGMENTS.saturating_sub(self.segments + level.segments.len()) / 2;
            if let Some(encoder) =
                stream::find_encoder(source, start, &inflated, &plain, room, self.effort.enough())?
            {
                self.stored(level, start)?;
                let mut found = Vec::new();
                regions(&plain, 0, plain.len(), depth + 1, &mut found, room / 4)?;
                let inner = Box::new(self.level(&plain, found, depth + 1)?);
                level.segments.push(Segment::Stream { folded_len: inflated.folded_len, encoder, inner });
                level.pos += inflated.folded_len;
            }
        }
        Ok(())
    }
}

/// Copies `start..end` of `source`, skipping what is known to be zero.
fn copy(source: &dyn Source, start: u64, end: u64, out: &mut SparseWriter) -> io::Result<()> {
    let mut buf = vec![0; COPY.min((end - start) as usize)];
    let mut pos = start;
    while pos < end {
        let zeros = source.zeros_at(pos).min(end - pos);
        if zeros > 0 {
            out.skip(zeros);
            pos += zeros;
        } else {
            let part = &mut buf[..(COPY as u64).min(end - pos) as usize];
            source.read_at(pos, part)?;
            out.write_all(part)?;
            pos += part.len() as u64;
        }
    }
    Ok(())
}
