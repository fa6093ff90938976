//! zlib, the one library whose output bytes a map relies on: the version is pinned in `Cargo.toml`.
//!
//! The only module of the folds that calls C. It offers two streams: [`Deflate`], which encodes with any parameters
//! zlib has, and [`Inflate`], which decodes and tells where the blocks of a deflate stream begin.

#![expect(unsafe_code, reason = "zlib is a C library; every call is in this file")]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;

use libz_sys as z;

/// Whether a deflate stream has the header and the checksum of RFC 1950 around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrap {
    /// The bare stream of RFC 1951.
    Raw,
    /// The zlib format of RFC 1950.
    Zlib,
}

/// How a stream was deflated: the arguments of `deflateInit2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Params {
    /// Raw or with the zlib header.
    pub(super) wrap: Wrap,
    /// 1 to 9. Level 0 is left out: what it writes depends on how its input is cut.
    pub(super) level: u8,
    /// 9 to 15.
    pub(super) window_bits: u8,
    /// 1 to 9.
    pub(super) mem_level: u8,
}

impl Params {
    /// Whether zlib takes these.
    pub(super) fn valid(&self) -> bool {
        (1..=9).contains(&self.level)
            && (9..=15).contains(&self.window_bits)
            && (1..=9).contains(&self.mem_level)
    }
}

/// A z_stream that has not been set up: no input, no output, zlib's own allocator.
fn blank() -> Box<MaybeUninit<z::z_stream>> {
    // The null function pointers of a zeroed stream, which ask zlib for its own allocator, are no values of the
    // Rust type: it stays a `MaybeUninit`, and only its fields are touched, through the pointer.
    Box::new(MaybeUninit::zeroed())
}

/// Name and version of the library.
pub(super) fn version() -> String {
    // SAFETY: zlib gives a constant string that ends in a zero byte.
    let version = unsafe { std::ffi::CStr::from_ptr(z::zlibVersion()) };
    format!("zlib {}", version.to_string_lossy())
}

fn zlib_error(what: &str, code: c_int) -> io::Error {
    let reason = match code {
        z::Z_DATA_ERROR => "the compressed data is damaged",
        z::Z_NEED_DICT => "the data was compressed with a preset dictionary",
        z::Z_MEM_ERROR => "no memory",
        _ => return io::Error::other(format!("zlib: {what} failed with code {code}")),
    };
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Both streams take their input in pieces of at most this, so that lengths fit zlib's `uInt`.
const MAX_PIECE: usize = 1 << 30;

/// Encodes one stream.
pub(super) struct Deflate(Box<MaybeUninit<z::z_stream>>);

// SAFETY: zlib ties nothing to a thread; a stream is used by one at a time, as every call takes `&mut self`.
unsafe impl Send for Deflate {}

impl Deflate {
    /// A stream with `params`, which must be [valid](Params::valid).
    pub(super) fn new(params: Params) -> io::Result<Self> {
        let mut stream = blank();
        let bits = c_int::from(params.window_bits);
        // SAFETY: the stream is zeroed, as zlib asks, and boxed: it does not move until `deflateEnd`, which `drop`
        // calls only after this has succeeded.
        let code = unsafe {
            z::deflateInit2_(
                stream.as_mut_ptr(),
                params.level.into(),
                z::Z_DEFLATED,
                if params.wrap == Wrap::Raw { -bits } else { bits },
                params.mem_level.into(),
                z::Z_DEFAULT_STRATEGY,
                z::zlibVersion(),
                size_of::<z::z_stream>() as c_int,
            )
        };
        if code == z::Z_OK { Ok(Self(stream)) } else { Err(zlib_error("deflateInit2", code)) }
    }

    /// Makes it ready for another stream with the same parameters.
    pub(super) fn reset(&mut self) -> io::Result<()> {
        // SAFETY: the stream was set up by `new`.
        match unsafe { z::deflateReset(self.0.as_mut_ptr()) } {
            z::Z_OK => Ok(()),
            code => Err(zlib_error("deflateReset", code)),
        }
    }

    /// Encodes `input` and appends what comes of it to `out`; with `finish`, the end of the stream too.
    pub(super) fn run(&mut self, input: &[u8], finish: bool, out: &mut Vec<u8>) -> io::Result<()> {
        let stream = self.0.as_mut_ptr();
        let mut pieces = input.chunks(MAX_PIECE).peekable();
        let mut done = false;
        while !done {
            let piece = pieces.next().unwrap_or_default();
            done = pieces.peek().is_none();
            let flush = if finish && done { z::Z_FINISH } else { z::Z_NO_FLUSH };
            // SAFETY: the stream was set up by `new`. `next_in` and `next_out` point to memory of the lengths given
            // with them, which is borrowed for the call; zlib only reads the input and keeps neither pointer beyond
            // the loop, as every piece is consumed in it.
            unsafe {
                (*stream).next_in = piece.as_ptr().cast_mut();
                (*stream).avail_in = piece.len() as u32;
            }
            loop {
                let start = out.len();
                out.resize(start + (1 << 15), 0);
                // SAFETY: as above.
                let (code, left) = unsafe {
                    (*stream).next_out = out[start..].as_mut_ptr();
                    (*stream).avail_out = 1 << 15;
                    let code = z::deflate(stream, flush);
                    (code, (*stream).avail_out as usize)
                };
                let full = left == 0;
                out.truncate(out.len() - left);
                match code {
                    z::Z_STREAM_END => return Ok(()),
                    // Z_BUF_ERROR: there was nothing left to do.
                    z::Z_OK | z::Z_BUF_ERROR if !full && flush == z::Z_NO_FLUSH => break,
                    z::Z_OK => {}
                    code => return Err(zlib_error("deflate", code)),
                }
            }
        }
        Ok(())
    }
}

impl Drop for Deflate {
    fn drop(&mut self) {
        // SAFETY: the stream was set up by `new` and is not used again.
        unsafe { z::deflateEnd(self.0.as_mut_ptr()) };
    }
}

/// What one call of [`Inflate::run`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) consumed: usize,
    /// Bytes put into the output.
    pub(super) produced: usize,
    /// Why it stopped.
    pub(super) stop: Stop,
}

/// Why [`Inflate::run`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It needs more input or room for more output.
    Starved,
    /// A block ended, and this many bits of the last byte that was consumed belong to the next one. Only if asked for.
    Block(u8),
    /// The stream ended, its checksum included.
    End,
}

/// Decodes one stream.
pub(super) struct Inflate(Box<MaybeUninit<z::z_stream>>);

impl Inflate {
    /// A stream with the largest window.
    pub(super) fn new(wrap: Wrap) -> io::Result<Self> {
        Self::with_bits(if wrap == Wrap::Raw { -15 } else { 15 })
    }

    /// A stream that takes a gzip member, header and checksum included.
    pub(super) fn gzip() -> io::Result<Self> {
        // 16 more than the window asks for gzip.
        Self::with_bits(16 + 15)
    }

    fn with_bits(bits: c_int) -> io::Result<Self> {
        let mut stream = blank();
        // SAFETY: as for `deflateInit2_`.
        let code = unsafe {
            z::inflateInit2_(stream.as_mut_ptr(), bits, z::zlibVersion(), size_of::<z::z_stream>() as c_int)
        };
        if code == z::Z_OK { Ok(Self(stream)) } else { Err(zlib_error("inflateInit2", code)) }
    }

    /// Makes it ready for another stream.
    pub(super) fn reset(&mut self) -> io::Result<()> {
        // SAFETY: the stream was set up by `new`.
        match unsafe { z::inflateReset(self.0.as_mut_ptr()) } {
            z::Z_OK => Ok(()),
            code => Err(zlib_error("inflateReset", code)),
        }
    }

    /// Decodes from `input` into `output`, with `blocks` only up to the end of a block. Damaged data is `InvalidData`.
    pub(super) fn run(&mut self, input: &[u8], output: &mut [u8], blocks: bool) -> io::Result<Step> {
        let stream = self.0.as_mut_ptr();
        let (in_len, out_len) = (input.len().min(MAX_PIECE), output.len().min(MAX_PIECE));
        // SAFETY: the stream was set up by `new`. The pointers are to memory of the lengths given, borrowed for the
        // call; they are not used after it, as the next call sets them again.
        let (code, avail_in, avail_out, state) = unsafe {
            (*stream).next_in = input.as_ptr().cast_mut();
            (*stream).avail_in = in_len as u32;
            (*stream).next_out = output.as_mut_ptr();
            (*stream).avail_out = out_len as u32;
            let code = z::inflate(stream, if blocks { z::Z_BLOCK } else { z::Z_NO_FLUSH });
            (code, (*stream).avail_in as usize, (*stream).avail_out as usize, (*stream).data_type)
        };
        let stop = match code {
            z::Z_STREAM_END => Stop::End,
            // 128: after the end of a block; the low bits count what is unused of the last byte.
            z::Z_OK if blocks && state & 128 != 0 => Stop::Block((state & 7) as u8),
            z::Z_OK | z::Z_BUF_ERROR => Stop::Starved,
            code => return Err(zlib_error("inflate", code)),
        };
        Ok(Step { consumed: in_len - avail_in, produced: out_len - avail_out, stop })
    }

    /// Decodes the stream that starts at `input[0]` and is expected to be at most `limit` bytes long. `None` when it
    /// is damaged, longer or not all there; else the plain bytes and the length of the stream.
    pub(super) fn whole(&mut self, input: &[u8], limit: usize) -> io::Result<Option<(Vec<u8>, usize)>> {
        self.reset()?;
        // One byte more, to see whether there is more.
        let mut plain = vec![0; limit + 1];
        match self.run(input, &mut plain, false) {
            Ok(step) if step.stop == Stop::End && step.produced <= limit => {
                plain.truncate(step.produced);
                Ok(Some((plain, step.consumed)))
            }
            _ => Ok(None),
        }
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was set up by `new` and is not used again.
        unsafe { z::inflateEnd(self.0.as_mut_ptr()) };
    }
}

/// The CRC-32 of `bytes` after others whose CRC is `crc`, 0 at first.
pub(super) fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(MAX_PIECE).fold(crc, |crc, piece| {
        // SAFETY: zlib reads `piece.len()` bytes from the pointer, which are borrowed for the call.
        unsafe { z::crc32(crc.into(), piece.as_ptr(), piece.len() as u32) as u32 }
    })
}
