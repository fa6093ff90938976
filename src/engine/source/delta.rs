//! Deltas: a file as copies out of a base and bytes of its own, in librsync's format.
//!
//! `rdiff patch BASE DELTA` applies them; [`Delta`] reads any byte of the result without applying anything, and
//! [`Index::diff`] makes them. Format (librsync's `delta.c`, `prototab.c`; all numbers big-endian): the magic number,
//! then commands (a byte, its arguments, and for a literal its bytes), then the end command.
//!
//! Zeros are most of a disk. A base that takes part in a delta is followed by a long run of them (a
//! [`Zeros`](super::Zeros) that nobody stores), so that one copy covers a hole of any length.

use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use fast_rsync::{IndexedSignature, Signature, SignatureOptions};

use super::cluster::Trace;
use super::{Reader, Source, check_range};
use crate::io::is_zero;

/// Length of the blocks that are looked for in the base, in bytes: that of the file systems on the disks.
pub const BLOCK: u64 = 4096;

/// Bytes of the strong hash in a signature. Two blocks that agree in it and differ are found out by the proof.
const STRONG_HASH: u32 = 8;

/// The most commands that a delta may have, however much memory there is. A disk needs about one for each file.
pub const MAX_OPS: usize = 16 << 20;

/// Bytes of the target that are looked at together. Small, because what a copy goes on with is compared and not
/// searched for; large against [`BLOCK`], because the end of a window is searched twice.
const WINDOW: usize = 256 << 10;

/// The longest literal of one command, in bytes.
const MAX_LITERAL: usize = 1 << 20;

const MAGIC: u32 = 0x7273_0236;
const END: u8 = 0x00;
/// 1 to 64 bytes; then four commands with the length in 1, 2, 4, 8 bytes.
const LITERAL_1: u8 = 0x01;
const LITERAL_N1: u8 = 0x41;
/// Sixteen commands: offset in 1, 2, 4, 8 bytes (outer), length in 1, 2, 4, 8 bytes (inner).
const COPY_N1_N1: u8 = 0x45;
const RESERVED: u8 = 0x55;

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("delta: {what}"))
}

/// One command of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    /// The bytes that follow.
    Literal(u64),
    /// Bytes of the base.
    Copy {
        from: u64,
        len: u64,
    },
    End,
}

impl Command {
    fn read(from: &mut impl Read) -> io::Result<Self> {
        fn number(from: &mut impl Read, class: u8) -> io::Result<u64> {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes[8 - (1 << class)..])?;
            Ok(u64::from_be_bytes(bytes))
        }
        let mut code = [0];
        from.read_exact(&mut code)?;
        Ok(match code[0] {
            END => Self::End,
            c @ LITERAL_1..LITERAL_N1 => Self::Literal(u64::from(c)),
            c @ LITERAL_N1..COPY_N1_N1 => Self::Literal(number(from, c - LITERAL_N1)?),
            c @ COPY_N1_N1..RESERVED => {
                let c = c - COPY_N1_N1;
                Self::Copy { from: number(from, c / 4)?, len: number(from, c % 4)? }
            }
            c => return Err(invalid(format!("unknown command {c:#04x}"))),
        })
    }

    fn write(self, to: &mut impl Write) -> io::Result<()> {
        /// How many bytes a number takes: 0 for 1, 1 for 2, 2 for 4, 3 for 8.
        fn class(n: u64) -> u8 {
            match n {
                0..0x100 => 0,
                0x100..0x1_0000 => 1,
                0x1_0000..0x1_0000_0000 => 2,
                _ => 3,
            }
        }
        fn tail(n: u64) -> ([u8; 8], usize) {
            (n.to_be_bytes(), 8 - (1 << class(n)))
        }
        match self {
            Self::End => to.write_all(&[END]),
            Self::Literal(len @ 1..=64) => to.write_all(&[len as u8]),
            Self::Literal(len) => {
                let (bytes, skip) = tail(len);
                to.write_all(&[LITERAL_N1 + class(len)])?;
                to.write_all(&bytes[skip..])
            }
            Self::Copy { from, len } => {
                to.write_all(&[COPY_N1_N1 + 4 * class(from) + class(len)])?;
                let (bytes, skip) = tail(from);
                to.write_all(&bytes[skip..])?;
                let (bytes, skip) = tail(len);
                to.write_all(&bytes[skip..])
            }
        }
    }
}

/// Where a run of the result comes from. It reaches to the start of the next one.
#[derive(Clone, Copy)]
struct Op {
    start: u64,
    /// Offset in the base, or, with [`LITERAL`] set, in the delta.
    from: u64,
}

/// The memory that one takes, in bytes.
const OP: u64 = size_of::<Op>() as u64;

/// Marks an offset in the delta.
const LITERAL: u64 = 1 << 63;

/// What a delta makes of its base.
pub struct Delta {
    ops: Vec<Op>,
    len: u64,
    base: Arc<dyn Source>,
    delta: Arc<dyn Source>,
}

impl Delta {
    /// Reads the commands of `delta`, which is over `base`, and checks that they stay inside both. What is kept of them
    /// takes at most `memory` bytes.
    pub fn open(delta: Arc<dyn Source>, base: Arc<dyn Source>, memory: u64) -> io::Result<Self> {
        let most = usize::try_from(memory / OP).unwrap_or(usize::MAX).min(MAX_OPS);
        let mut ops: Vec<Op> = Vec::new();
        let (mut read, mut len) = (0, 0u64);
        let mut reader = BufReader::with_capacity(1 << 16, Reader::new(&*delta));
        let mut magic = [0; 4];
        reader.read_exact(&mut magic)?;
        if u32::from_be_bytes(magic) != MAGIC {
            return Err(invalid(format!(
                "not a librsync delta: starts with {:#010x}",
                u32::from_be_bytes(magic)
            )));
        }
        loop {
            let (from, n) = match Command::read(&mut reader)? {
                Command::End => break,
                Command::Literal(n) => {
                    let from = reader.stream_position()?;
                    if n > delta.len() - from {
                        return Err(invalid(format!("a literal of {n} bytes at {from} of {}", delta.len())));
                    }
                    reader.seek_relative(n as i64)?;
                    (from | LITERAL, n)
                }
                Command::Copy { from, len: n } => {
                    if from.checked_add(n).is_none_or(|end| end > base.len()) {
                        return Err(invalid(format!(
                            "a copy of {n} bytes at {from} of a base of {}",
                            base.len()
                        )));
                    }
                    (from, n)
                }
            };
            read += 1;
            if read > MAX_OPS || ops.len() == most {
                return Err(invalid(format!(
                    "more than {most} commands, which is what {memory} bytes of memory have room for"
                )));
            }
            if n > 0 {
                ops.push(Op { start: len, from });
                len = len
                    .checked_add(n)
                    .filter(|&len| len < LITERAL)
                    .ok_or_else(|| invalid("the lengths of the commands overflow".into()))?;
            }
        }
        if !reader.fill_buf()?.is_empty() {
            return Err(invalid("bytes after the end command".into()));
        }
        drop(reader);
        ops.shrink_to_fit();
        Ok(Self { ops, len, base, delta })
    }

    /// The memory that its commands take, in bytes.
    pub fn memory(&self) -> u64 {
        self.ops.len() as u64 * OP
    }

    /// The parts of commands that make up `offset..offset + len`: position, length, and where from.
    fn each(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        let end = offset + len;
        let first = self.ops.partition_point(|op| op.start <= offset).saturating_sub(1);
        self.ops[first..].iter().enumerate().map_while(move |(i, op)| {
            let op_end = self.ops.get(first + i + 1).map_or(self.len, |next| next.start);
            let start = op.start.max(offset);
            (start < end).then(|| (start, op_end.min(end) - start, op.from + (start - op.start)))
        })
    }
}

impl Source for Delta {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len, offset, buf.len())?;
        for (start, n, from) in self.each(offset, buf.len() as u64) {
            let out = &mut buf[(start - offset) as usize..][..n as usize];
            match from & LITERAL {
                0 => self.base.read_at(from, out)?,
                _ => self.delta.read_at(from & !LITERAL, out)?,
            }
        }
        Ok(())
    }

    /// Looks at one command only: with all that follow, deltas over deltas would take exponential time.
    fn zeros_at(&self, offset: u64) -> u64 {
        match self.each(offset, self.len.saturating_sub(offset)).next() {
            Some((_, n, from)) if from & LITERAL == 0 => self.base.zeros_at(from).min(n),
            _ => 0,
        }
    }

    fn trace(&self, offset: u64, len: u64, at: u64, trace: &mut Trace) -> Option<()> {
        for (start, n, from) in self.each(offset, len.min(self.len.saturating_sub(offset))) {
            let at = at + (start - offset);
            match from & LITERAL {
                0 => self.base.trace(from, n, at, trace)?,
                _ => self.delta.trace(from & !LITERAL, n, at, trace)?,
            }
        }
        Some(())
    }
}

/// What deltas are made against: a base, the hashes of its blocks, and the zeros that follow it.
pub struct Base<'a> {
    source: &'a dyn Source,
    zeros: Range<u64>,
    signature: Signature,
    /// The signature leaves out the blocks of the base that are zero, and begins with one that is. Where each run of
    /// its blocks starts, counted in bytes of blocks of the signature, and in the base.
    runs: Vec<(u64, u64)>,
}

impl<'a> Base<'a> {
    /// Hashes the blocks of `source`, which `zeros` zero bytes follow where the delta is applied.
    pub fn scan(source: &'a dyn Source, zeros: NonZeroU64) -> io::Result<Self> {
        let options = SignatureOptions { block_size: BLOCK as u32, crypto_hash_size: STRONG_HASH };
        let zero_block = Signature::calculate(&[0; BLOCK as usize], options).into_serialized();
        let header = Signature::calculate(&[], options).into_serialized().len();
        let mut serialized = zero_block;
        let len = source.len();
        let (mut pos, mut signed) = (0, BLOCK);
        let mut runs = vec![(0, len), (signed, 0)];
        let (mut buf, mut dense) = (vec![0; WINDOW], Vec::with_capacity(WINDOW));
        while pos + BLOCK <= len {
            let hole = source.zeros_at(pos) / BLOCK * BLOCK;
            if hole > 0 {
                pos += hole;
                continue;
            }
            let n = (len - pos).min(WINDOW as u64) / BLOCK * BLOCK;
            source.read_at(pos, &mut buf[..n as usize])?;
            dense.clear();
            for block in buf[..n as usize].chunks(BLOCK as usize) {
                if !is_zero(block) {
                    if let Some(&(at, from)) = runs.last()
                        && from + (signed - at) != pos
                    {
                        runs.push((signed, pos));
                    }
                    dense.extend_from_slice(block);
                    signed += BLOCK;
                }
                pos += BLOCK;
            }
            // All at once: several blocks are hashed in the lanes of one vector.
            serialized.extend_from_slice(&Signature::calculate(&dense, options).serialized()[header..]);
        }
        let signature = Signature::deserialize(serialized)
            .map_err(|e| io::Error::other(format!("signature of the base: {e}")))?;
        Ok(Self { source, zeros: len..len + zeros.get(), signature, runs })
    }

    /// Looks up blocks in the base; may be used by several threads at once.
    pub fn index(&self) -> Index<'_> {
        Index { base: self, blocks: self.signature.index() }
    }
}

/// A base, ready to be searched.
pub struct Index<'a> {
    base: &'a Base<'a>,
    blocks: IndexedSignature<'a>,
}

impl Index<'_> {
    /// Writes the delta that makes `target` out of the base followed by its zeros.
    pub fn diff<W: Write>(&self, target: &dyn Source, out: W) -> io::Result<W> {
        let mut ops = OpWriter::new(out, self.base.zeros.clone())?;
        let len = target.len();
        let (mut window, mut base) = (vec![0; WINDOW], vec![0; WINDOW]);
        let mut found = Vec::new();
        let mut pos = 0;
        while pos < len {
            let hole = target.zeros_at(pos);
            if hole >= BLOCK {
                ops.zeros(hole)?;
                pos += hole;
                continue;
            }
            let n = (len - pos).min(WINDOW as u64) as usize;
            let window = &mut window[..n];
            target.read_at(pos, window)?;

            let zeros = common_prefix(window, &ZEROS[..n]);
            if zeros == n || zeros as u64 >= BLOCK {
                ops.zeros(zeros as u64)?;
                pos += zeros as u64;
                continue;
            }
            if let Some(from) = ops.copied_to().filter(|&from| from < self.base.source.len()) {
                let m = (self.base.source.len() - from).min(n as u64) as usize;
                self.base.source.read_at(from, &mut base[..m])?;
                let same = common_prefix(&window[..m], &base[..m]);
                if same == n || same as u64 >= BLOCK {
                    ops.copy(from, same as u64)?;
                    pos += same as u64;
                    continue;
                }
            }

            found.clear();
            fast_rsync::diff(&self.blocks, window, &mut found).map_err(io::Error::other)?;
            let last = pos + n as u64 == len;
            pos += self.take(&found, last, &mut ops)?;
        }
        ops.finish()
    }

    /// Takes over the commands that were found for a window, and says how far they reach. A block that begins in the
    /// window and ends after it was not found: unless the window is the last, its last bytes are left for the next.
    fn take<W: Write>(&self, mut found: &[u8], last: bool, ops: &mut OpWriter<W>) -> io::Result<u64> {
        found = &found[4..];
        let mut done = 0;
        loop {
            match Command::read(&mut found)? {
                Command::End => return Ok(done),
                Command::Literal(n) => {
                    let (bytes, rest) = found.split_at(n as usize);
                    let ends = matches!(rest, [END]) && !last && done + n > BLOCK;
                    let keep = if ends { n.saturating_sub(BLOCK - 1) } else { n };
                    ops.literal(&bytes[..keep as usize])?;
                    found = rest;
                    done += keep;
                }
                Command::Copy { mut from, mut len } => {
                    done += len;
                    while len > 0 {
                        let i = self.base.runs.partition_point(|&(at, _)| at <= from) - 1;
                        let (at, offset) = self.base.runs[i];
                        let run_end = self.base.runs.get(i + 1).map_or(u64::MAX, |&(at, _)| at);
                        let n = len.min(run_end - from);
                        ops.copy(offset + (from - at), n)?;
                        (from, len) = (from + n, len - n);
                    }
                }
            }
        }
    }
}

static ZEROS: [u8; WINDOW] = [0; WINDOW];

/// How many bytes `a` and `b`, of the same length, have in common at the start.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    const STEP: usize = 512;
    let whole = a.chunks_exact(STEP).zip(b.chunks_exact(STEP)).take_while(|(a, b)| a == b).count() * STEP;
    whole + a[whole..].iter().zip(&b[whole..]).take_while(|(a, b)| a == b).count()
}

/// Writes commands, joining those that go on where the one before ended.
struct OpWriter<W: Write> {
    out: W,
    zeros: Range<u64>,
    /// A copy that may go on. A run of zeros has its start at that of `zeros`, and any length.
    copy: Option<(u64, u64)>,
    literal: Vec<u8>,
}

impl<W: Write> OpWriter<W> {
    fn new(mut out: W, zeros: Range<u64>) -> io::Result<Self> {
        out.write_all(&MAGIC.to_be_bytes())?;
        Ok(Self { out, zeros, copy: None, literal: Vec::new() })
    }

    /// The offset in the base at which the last command ended, if it was a copy.
    fn copied_to(&self) -> Option<u64> {
        self.copy.map(|(from, len)| from + len)
    }

    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.copy(self.zeros.start, len)
    }

    fn copy(&mut self, from: u64, len: u64) -> io::Result<()> {
        self.flush_literal()?;
        match &mut self.copy {
            Some((start, n)) if *start == self.zeros.start && from == *start => *n += len,
            Some((start, n)) if *start + *n == from && from != self.zeros.start => *n += len,
            _ => {
                self.flush_copy()?;
                self.copy = Some((from, len));
            }
        }
        Ok(())
    }

    fn literal(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.flush_copy()?;
        self.literal.extend_from_slice(bytes);
        if self.literal.len() >= MAX_LITERAL { self.flush_literal() } else { Ok(()) }
    }

    fn flush_copy(&mut self) -> io::Result<()> {
        let Some((from, mut len)) = self.copy.take() else { return Ok(()) };
        let most = if from == self.zeros.start { self.zeros.end - self.zeros.start } else { u64::MAX };
        while len > 0 {
            let n = len.min(most);
            Command::Copy { from, len: n }.write(&mut self.out)?;
            len -= n;
        }
        Ok(())
    }

    fn flush_literal(&mut self) -> io::Result<()> {
        for bytes in self.literal.chunks(MAX_LITERAL) {
            Command::Literal(bytes.len() as u64).write(&mut self.out)?;
            self.out.write_all(bytes)?;
        }
        self.literal.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<W> {
        self.flush_literal()?;
        self.flush_copy()?;
        Command::End.write(&mut self.out)?;
        Ok(self.out)
    }
}
