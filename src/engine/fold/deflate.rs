//! Finds how a deflate stream in memory was made, and makes it again.
//!
//! zlib with the right parameters gives the very bytes in most cases; the candidates are those that the tools of a
//! release use, most likely first. What zlib does not make is left to [`preflate`].

use std::io;

use super::map::Encoder;
use super::preflate;
use super::region::Region;
use super::zlib::{Deflate, Inflate, Params, Wrap};
use crate::source::Source;

/// Every way to call zlib that is tried. qemu-img uses level 6 with a window of 12 bits and memory level 9 for qcow2, and
/// the defaults (15, 8) for VMDK; most other programs use the defaults or one of the levels.
pub(super) fn candidates(wrap: Wrap) -> Vec<Params> {
    let mut all = Vec::new();
    for (window_bits, mem_level) in [(15, 8), (12, 9), (15, 9)] {
        for level in [6, 9, 1, 5, 4, 3, 2, 7, 8] {
            all.push(Params { wrap, level, window_bits, mem_level });
        }
    }
    all
}

/// How many zlib streams with different parameters a thread keeps: more than there are candidates.
const MAX_STREAMS: usize = 32;

/// Streams that are set up once and used for many regions; one per thread.
pub(super) struct Coder {
    deflate: Vec<(Params, Deflate)>,
    inflate: Vec<(Wrap, Inflate)>,
}

impl Coder {
    pub(super) fn new() -> Self {
        Self { deflate: Vec::new(), inflate: Vec::new() }
    }

    fn inflate(&mut self, wrap: Wrap) -> io::Result<&mut Inflate> {
        let at = match self.inflate.iter().position(|(w, _)| *w == wrap) {
            Some(at) => at,
            None => {
                self.inflate.push((wrap, Inflate::new(wrap)?));
                self.inflate.len() - 1
            }
        };
        Ok(&mut self.inflate[at].1)
    }

    /// Makes the stream of `plain`.
    pub(super) fn encode(&mut self, plain: &[u8], encoder: &Encoder) -> io::Result<Vec<u8>> {
        match encoder {
            Encoder::Zlib(params) => self.deflate(plain, *params),
            Encoder::Preflate { corrections, bits } => preflate::recreate(whole(plain), corrections, *bits),
        }
    }

    fn deflate(&mut self, plain: &[u8], params: Params) -> io::Result<Vec<u8>> {
        let at = match self.deflate.iter().position(|(p, _)| *p == params) {
            Some(at) => at,
            None => {
                // 256 KiB each, and a hostile map can name hundreds.
                self.deflate.truncate(MAX_STREAMS - 1);
                self.deflate.push((params, Deflate::new(params)?));
                self.deflate.len() - 1
            }
        };
        let stream = &mut self.deflate[at].1;
        stream.reset()?;
        let mut out = Vec::new();
        stream.run(plain, true, &mut out)?;
        Ok(out)
    }

    /// Decodes a small region and finds its encoder: the first of `params` that makes it, preflate otherwise. `None`
    /// when it is damaged or does not come back.
    pub(super) fn decode(
        &mut self,
        source: &dyn Source,
        region: &Region,
        params: &[Params],
    ) -> io::Result<Option<Decoded>> {
        let &Region::Small { offset, max_len, max_plain, wrap } = region else { return Ok(None) };
        let mut bytes = vec![0; max_len as usize];
        source.read_at(offset, &mut bytes)?;
        let Some((plain, len)) = self.inflate(wrap)?.whole(&bytes, max_plain as usize)? else {
            return Ok(None);
        };
        bytes.truncate(len);
        for &params in params {
            if self.deflate(&plain, params)? == bytes {
                return Ok(Some(Decoded { offset, len, plain, encoder: Encoder::Zlib(params) }));
            }
        }
        // Only the raw stream is preflate's; the header and the checksum stay as they are.
        let (offset, bytes) = match wrap {
            Wrap::Raw => (offset, &bytes[..]),
            Wrap::Zlib => (offset + 2, &bytes[2..len - 4]),
        };
        let bits = bytes.len() as u32 * 8;
        Ok(preflate::analyse(whole(&plain), bytes, bits).map(|corrections| Decoded {
            offset,
            len: bytes.len(),
            plain,
            encoder: Encoder::Preflate { corrections, bits },
        }))
    }
}

/// A stream of one piece.
fn whole(plain: &[u8]) -> preflate::Piece<'_> {
    preflate::Piece { window: &[], plain, phase: 0, last: true }
}

/// A region that comes back.
pub(super) struct Decoded {
    /// Where the stream starts in the form, and how long it is there.
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) plain: Vec<u8>,
    pub(super) encoder: Encoder,
}

impl Decoded {
    pub(super) fn made_by(&self, params: Params) -> bool {
        self.encoder == Encoder::Zlib(params)
    }
}
