//! `.zst` files: where their frames lie, and how those were made.
//!
//! A file is a row of frames, some of which may be skippable. A frame is made again as a whole, its header and checksum
//! included; skippable frames are kept. The command `zstd` makes a frame in one of two ways: on the calling thread, or by
//! worker threads, whose number makes no difference; it uses the latter unless told otherwise.
//!
//! The format: [RFC 8878](https://www.rfc-editor.org/rfc/rfc8878).

use std::io;

use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective::{self, ZSTD_e_continue, ZSTD_e_end, ZSTD_e_flush};
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use crate::bytes::le32;
use crate::source::Source;

/// Name and version of the library, which is pinned in `Cargo.toml`.
pub(super) const VERSION: &str = "zstd 1.5.7";

/// A frame as zstd makes it at one of its levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Params {
    /// 1 to 22.
    pub(super) level: u8,
    /// Whether by worker threads.
    pub(super) threads: bool,
    /// The window of `--long`, as a power of two; 0 without it.
    pub(super) long: u8,
    /// Whether a checksum stands at the end.
    pub(super) checksum: bool,
    /// Whether the length of the plain bytes was known before.
    pub(super) sized: bool,
}

/// The windows of the levels, as powers of two; the first is no level.
const WINDOWS: [u8; 23] =
    [0, 19, 20, 21, 21, 21, 21, 21, 21, 22, 22, 22, 22, 22, 22, 22, 22, 23, 23, 23, 25, 26, 27];

/// The highest level that is tried with `--long`: those above have a large window without it.
const MAX_LONG_LEVEL: u8 = 19;

/// The largest window, as a power of two: that of level 22, and of `--long`.
const MAX_WINDOW: u8 = 27;

impl Params {
    /// Whether zstd takes these, and with a bounded amount of memory.
    pub(super) fn valid(&self) -> bool {
        (1..=22).contains(&self.level) && (self.long == 0 || (10..=MAX_WINDOW).contains(&self.long))
    }

    /// Every level that may have made a frame with this header, most likely first; of each the variants with and without
    /// worker threads.
    pub(super) fn candidates(header: &Header) -> Vec<[Self; 2]> {
        let Header { checksum, sized, window, .. } = *header;
        let with = |long| {
            let level =
                move |level| [true, false].map(|threads| Self { level, threads, long, checksum, sized });
            let usual = move |level: &u8| match long {
                0 => window.is_none_or(|w| WINDOWS[usize::from(*level)] == w),
                _ => *level <= MAX_LONG_LEVEL,
            };
            [3, 19].into_iter().chain((1..=22).filter(|n| ![3, 19].contains(n))).filter(usual).map(level)
        };
        let all = with(0).chain(with(window.unwrap_or(MAX_WINDOW)));
        all.filter(|[params, _]| params.valid()).collect()
    }
}

fn error(code: usize) -> io::Error {
    io::Error::other(format!("zstd: {}", zstd_safe::get_error_name(code)))
}

/// Encodes one frame.
pub(super) struct Encoder {
    zstd: CCtx<'static>,
    sized: bool,
}

impl Encoder {
    /// A frame of `plain_len` bytes.
    pub(super) fn new(params: &Params, plain_len: u64) -> io::Result<Self> {
        let mut zstd = CCtx::try_create().ok_or_else(|| io::Error::other("zstd: no memory"))?;
        let mut set = |parameter| zstd.set_parameter(parameter).map_err(error);
        set(CParameter::CompressionLevel(params.level.into()))?;
        set(CParameter::ChecksumFlag(params.checksum))?;
        set(CParameter::ContentSizeFlag(params.sized))?;
        set(CParameter::NbWorkers(params.threads.into()))?;
        if params.long > 0 {
            set(CParameter::EnableLongDistanceMatching(true))?;
            set(CParameter::WindowLog(params.long.into()))?;
        }
        if params.sized {
            zstd.set_pledged_src_size(Some(plain_len)).map_err(error)?;
        }
        Ok(Self { zstd, sized: params.sized })
    }

    /// Encodes `input` and appends what comes of it to `out`; with `finish`, the end of the frame too.
    pub(super) fn run(&mut self, input: &[u8], finish: bool, out: &mut Vec<u8>) -> io::Result<()> {
        match (finish, self.sized) {
            (false, _) => self.give(input, ZSTD_e_continue, out),
            // Who knows the length knows which bytes are the last; who reads a pipe learns it afterwards, when there is
            // nothing left to give: the frame gets another block then.
            (true, true) => self.give(input, ZSTD_e_end, out),
            (true, false) => {
                self.give(input, ZSTD_e_continue, out)?;
                self.give(&[], ZSTD_e_end, out)
            }
        }
    }

    fn give(&mut self, input: &[u8], end: ZSTD_EndDirective, out: &mut Vec<u8>) -> io::Result<()> {
        let mut input = InBuffer::around(input);
        loop {
            out.reserve(1 << 16);
            let at = out.len();
            let mut output = OutBuffer::around_pos(out, at);
            let left = self.zstd.compress_stream2(&mut output, &mut input, end).map_err(error)?;
            let done = match end {
                ZSTD_e_continue => input.pos() == input.src.len(),
                ZSTD_e_flush | ZSTD_e_end => left == 0,
            };
            if done {
                return Ok(());
            }
        }
    }
}

/// What the header of a frame says.
pub(super) struct Header {
    checksum: bool,
    sized: bool,
    /// As a power of two; unless it is the length of the plain bytes.
    window: Option<u8>,
}

const MAGIC: u32 = 0xfd2f_b528;
const SKIPPABLE: u32 = 0x184d_2a50;
/// The longest header of a frame, with its magic number.
const MAX_HEADER: u64 = 18;

/// A frame in a file.
pub(super) struct Frame {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) plain_len: u64,
    pub(super) header: Header,
}

/// The frames of `file` but for the skippable ones, in order; the reason when there is anything else.
pub(super) fn frames(file: &dyn Source) -> io::Result<Result<Vec<Frame>, String>> {
    let mut frames = Vec::new();
    let mut at = 0;
    while at < file.len() {
        let mut head = vec![0; (file.len() - at).min(MAX_HEADER) as usize];
        file.read_at(at, &mut head)?;
        if head.len() < 9 {
            return Ok(Err("something follows the frames".into()));
        }
        if le32(&head, 0) & !0xf == SKIPPABLE {
            at += 8 + u64::from(le32(&head, 4));
            continue;
        }
        if le32(&head, 0) != MAGIC {
            return Ok(Err("something follows the frames".into()));
        }
        let descriptor = head[4];
        let single = descriptor & 0x20 != 0;
        if descriptor & 3 != 0 {
            return Ok(Err("it was made with a dictionary".into()));
        }
        let size_len = match descriptor >> 6 {
            0 => u64::from(single),
            n => 1 << n,
        };
        let header = Header {
            checksum: descriptor & 4 != 0,
            sized: size_len > 0,
            window: (!single).then(|| (head[5] >> 3) + 10),
        };
        let (len, plain_len) = measure(file, at)?;
        frames.push(Frame { offset: at, len, plain_len, header });
        at += len;
    }
    Ok(Ok(frames))
}

/// The length of the frame at `start` of `file`, and of its plain bytes.
fn measure(file: &dyn Source, start: u64) -> io::Result<(u64, u64)> {
    let mut zstd = DCtx::try_create().ok_or_else(|| io::Error::other("zstd: no memory"))?;
    zstd.set_parameter(DParameter::WindowLogMax(31)).map_err(error)?;
    let (mut input, mut output) = (vec![0; 1 << 17], vec![0; 1 << 17]);
    let (mut pos, mut plain_len) = (start, 0);
    loop {
        let part = &mut input[..(file.len() - pos).min(1 << 17) as usize];
        file.read_at(pos, part)?;
        let mut from = InBuffer::around(part);
        let mut to = OutBuffer::around(&mut output[..]);
        let hint = zstd.decompress_stream(&mut to, &mut from).map_err(error)?;
        pos += from.pos() as u64;
        plain_len += to.pos() as u64;
        if hint == 0 {
            return Ok((pos - start, plain_len));
        }
        if from.pos() == 0 && to.pos() == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "zstd: a frame is cut short"));
        }
    }
}

/// So many plain bytes tell levels apart, mostly.
const TRY: u64 = 512 << 10;

/// Whether `params` make the beginning of `frame` of its plain bytes.
pub(super) fn makes_beginning(
    params: &Params,
    file: &dyn Source,
    frame: &Frame,
    plain: &dyn Source,
) -> io::Result<bool> {
    let mut beginning = vec![0; frame.plain_len.min(TRY) as usize];
    plain.read_at(0, &mut beginning)?;
    let whole = beginning.len() as u64 == frame.plain_len;
    let mut made = Vec::new();
    let mut encoder = Encoder::new(params, frame.plain_len)?;
    if whole {
        encoder.run(&beginning, true, &mut made)?;
        return Ok(made.len() as u64 == frame.len && made == read(file, frame.offset, made.len())?);
    }
    encoder.give(&beginning, ZSTD_e_flush, &mut made)?;
    // The last block is another one than in the frame, as it was flushed.
    made.truncate(made.len() / 2);
    Ok(made == read(file, frame.offset, made.len())?)
}

fn read(file: &dyn Source, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len.min(file.len().saturating_sub(at) as usize)];
    file.read_at(at, &mut bytes)?;
    Ok(bytes)
}
