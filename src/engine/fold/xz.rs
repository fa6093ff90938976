//! `.xz` files: where their LZMA2 data lies, and how that was made.
//!
//! A file is a row of streams, each a header, blocks, an index and a footer. Only what is inside the blocks is made
//! again; headers, checks, index and padding are a few bytes and are kept. So it does not matter which check there is,
//! whether blocks were cut by threads or by `--block-size`, whether their headers have sizes, or how many streams there are.
//!
//! The format: <https://xz.tukaani.org/format/xz-file-format.txt>.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use liblzma_sys as lzma;
use rayon::prelude::*;

use super::wrap::Effort;
use crate::bytes::le32;
use crate::source::Source;

/// Name and version of the library, which is pinned in `Cargo.toml`.
pub(super) const VERSION: &str = "liblzma 5.8.4";

/// LZMA2 as liblzma makes it with one of its presets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Params {
    /// 0 to 9.
    pub(super) preset: u8,
    /// Whether it is the slower variant of the preset, `-e`.
    pub(super) extreme: bool,
    /// The dictionary in bytes, which need not be the preset's.
    pub(super) dict: u32,
}

/// The largest dictionary: twice that of the highest preset.
const MAX_DICT: u32 = 128 << 20;
/// The dictionaries of the presets, as powers of two.
const DICTS: [u32; 10] = [18, 20, 21, 22, 22, 23, 23, 24, 25, 26];

impl Params {
    /// Whether liblzma takes these, and with a bounded amount of memory.
    pub(super) fn valid(&self) -> bool {
        self.preset <= 9 && (4096..=MAX_DICT).contains(&self.dict)
    }

    /// The memory that encoding takes, in bytes: what xz says of its presets, and a little more.
    pub(super) fn memory(&self) -> u64 {
        u64::from(self.dict) * 11 + (8 << 20)
    }

    /// Every preset that may have made data with a dictionary of this size, most likely first.
    fn candidates(dict: u32) -> Vec<Self> {
        let usual = |preset: &u8| 1 << DICTS[usize::from(*preset)] == dict;
        let mut presets: Vec<u8> = [9, 6, 0, 1, 2, 3, 4, 5, 7, 8].into_iter().filter(usual).collect();
        if presets.is_empty() {
            presets = vec![6, 9, 0, 3, 4, 1, 2, 5, 7, 8];
        }
        let both = |extreme| presets.iter().map(move |&preset| Self { preset, extreme, dict });
        both(false).chain(both(true)).filter(Self::valid).collect()
    }
}

/// Encodes LZMA2 data.
///
/// The crate `liblzma` cannot begin anew with the memory of an encoder. Mapping and clearing that for each of hundreds of
/// blocks took up to a third of the time of the fast presets.
#[allow(unsafe_code, reason = "liblzma is a C library")]
mod encoder {
    use super::{MaybeUninit, Params, bad, c_void, io, lzma, ptr};

    /// The size and alignment of a huge page, where there are such.
    const HUGE: usize = 2 << 20;

    struct Allocator(lzma::lzma_allocator);

    // SAFETY: two functions that may be called by any thread, and a null pointer.
    unsafe impl Sync for Allocator {}

    /// The search for matches jumps about in ten times the dictionary, and nearly each step is to a page whose address the
    /// processor does not have at hand. On huge pages it mostly has, which took 6 to 21 % off the time of preset 9. Where
    /// the system has none, the pages are as any other.
    static ALLOCATOR: Allocator = Allocator(lzma::lzma_allocator {
        alloc: Some(allocate),
        free: Some(release),
        opaque: ptr::null_mut(),
    });

    extern "C" fn allocate(_: *mut c_void, count: usize, size: usize) -> *mut c_void {
        let Some(len) = count.checked_mul(size) else { return ptr::null_mut() };
        // SAFETY: the memory advised about is what was just allocated, and the advice leaves what is in it alone.
        unsafe {
            if len < HUGE {
                return libc::malloc(len);
            }
            let mut memory = ptr::null_mut();
            if libc::posix_memalign(&raw mut memory, HUGE, len) != 0 {
                return ptr::null_mut();
            }
            libc::madvise(memory, len, libc::MADV_HUGEPAGE);
            memory
        }
    }

    extern "C" fn release(_: *mut c_void, memory: *mut c_void) {
        // SAFETY: liblzma gives back what `allocate` gave it, once.
        unsafe { libc::free(memory) }
    }

    /// Encodes the LZMA2 data of one block after the other.
    pub(in crate::fold) struct Encoder(Box<MaybeUninit<lzma::lzma_stream>>);

    // SAFETY: liblzma ties nothing to a thread; an encoder is used by one at a time, as every call takes `&mut self`.
    unsafe impl Send for Encoder {}

    impl Encoder {
        pub(in crate::fold) fn new(params: &Params) -> io::Result<Self> {
            // Zeroed, as `LZMA_STREAM_INIT` is.
            let mut encoder = Self(Box::new(MaybeUninit::zeroed()));
            // SAFETY: the stream is zeroed, which is valid. The allocator lives as long as the program.
            unsafe { (*encoder.0.as_mut_ptr()).allocator = &raw const ALLOCATOR.0 };
            encoder.restart(params)?;
            Ok(encoder)
        }

        /// Begins with another block; what was not finished is forgotten.
        pub(in crate::fold) fn restart(&mut self, params: &Params) -> io::Result<()> {
            let preset =
                u32::from(params.preset) | if params.extreme { lzma::LZMA_PRESET_EXTREME } else { 0 };
            let mut options = MaybeUninit::<lzma::lzma_options_lzma>::zeroed();
            // SAFETY: the stream is zeroed or was set up before, either of which liblzma takes. Zeroed options are valid,
            // as they are numbers and null pointers. Filters and options are copied, and so need to live for the call only.
            let code = unsafe {
                if lzma::lzma_lzma_preset(options.as_mut_ptr(), preset) != 0 {
                    return Err(bad("liblzma does not know a preset"));
                }
                (*options.as_mut_ptr()).dict_size = params.dict;
                let filters = [
                    lzma::lzma_filter {
                        id: lzma::LZMA_FILTER_LZMA2,
                        options: options.as_mut_ptr().cast::<c_void>(),
                    },
                    lzma::lzma_filter { id: lzma::LZMA_VLI_UNKNOWN, options: ptr::null_mut() },
                ];
                lzma::lzma_raw_encoder(self.0.as_mut_ptr(), filters.as_ptr())
            };
            match code {
                lzma::LZMA_OK => Ok(()),
                lzma::LZMA_MEM_ERROR => Err(io::ErrorKind::OutOfMemory.into()),
                code => Err(bad(&format!("liblzma takes no such encoder: code {code}"))),
            }
        }

        /// Encodes `input` and appends what comes of it to `out`; with `finish`, the end of the data too.
        pub(in crate::fold) fn run(
            &mut self,
            input: &[u8],
            finish: bool,
            out: &mut Vec<u8>,
        ) -> io::Result<()> {
            let stream = self.0.as_mut_ptr();
            let action = if finish { lzma::LZMA_FINISH } else { lzma::LZMA_RUN };
            let mut taken = 0;
            while finish || taken < input.len() {
                out.reserve(1 << 16);
                let (rest, room) = (&input[taken..], out.spare_capacity_mut());
                // SAFETY: the stream was set up by `restart`. The pointers are to memory of the lengths given, borrowed for
                // the call; they are not used after it, as the next call sets them again.
                let (code, left, free) = unsafe {
                    (*stream).next_in = rest.as_ptr();
                    (*stream).avail_in = rest.len();
                    (*stream).next_out = room.as_mut_ptr().cast();
                    (*stream).avail_out = room.len();
                    let code = lzma::lzma_code(stream, action);
                    (code, (*stream).avail_in, (*stream).avail_out)
                };
                let made = room.len() - free;
                // SAFETY: liblzma has written so many bytes of the room.
                unsafe { out.set_len(out.len() + made) };
                taken = input.len() - left;
                match code {
                    lzma::LZMA_STREAM_END => return Ok(()),
                    lzma::LZMA_OK => {}
                    lzma::LZMA_BUF_ERROR => return Err(bad("liblzma makes no progress")),
                    code => return Err(bad(&format!("liblzma fails with code {code}"))),
                }
            }
            Ok(())
        }
    }

    impl Drop for Encoder {
        fn drop(&mut self) {
            // SAFETY: a zeroed stream, or one that was set up; it is not used again.
            unsafe { lzma::lzma_end(self.0.as_mut_ptr()) };
        }
    }
}

pub(super) use encoder::Encoder;

/// LZMA2 data in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Data {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) plain_len: u64,
    pub(super) dict: u32,
}

const HEADER: u64 = 12;
const HEADER_MAGIC: &[u8] = b"\xfd7zXZ\0";
const FOOTER_MAGIC: &[u8] = b"YZ";
/// The longest index that is read: two million blocks.
const MAX_INDEX: u64 = 16 << 20;
/// The length of a check by its number.
const CHECKS: [u64; 16] = [0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64];
/// The number of the LZMA2 filter.
const LZMA2: u64 = 0x21;

/// The LZMA2 data of all blocks of `file`, in order; the reason when there is anything else. The file was decoded before,
/// so its checksums are right.
pub(super) fn blocks(file: &dyn Source) -> io::Result<Result<Vec<Data>, String>> {
    let mut streams = Vec::new();
    let mut end = file.len();
    let get = |at: Option<u64>, n: u64| -> io::Result<Option<Vec<u8>>> {
        let Some(at) = at.filter(|at| at.checked_add(n).is_some_and(|end| end <= file.len())) else {
            return Ok(None);
        };
        let mut bytes = vec![0; n as usize];
        file.read_at(at, &mut bytes)?;
        Ok(Some(bytes))
    };
    // From the end to the start, as only footers say where indexes are.
    while end > 0 {
        let Some(footer) = get(end.checked_sub(HEADER), HEADER)? else {
            return Ok(Err("a stream is cut short".into()));
        };
        if footer[8..] == [0; 4] {
            end -= 4;
            continue;
        }
        let index_len = (u64::from(le32(&footer, 4)) + 1) * 4;
        if footer[10..] != *FOOTER_MAGIC || index_len > MAX_INDEX {
            return Ok(Err("no footer where one should be".into()));
        }
        let index_at = (end - HEADER).checked_sub(index_len);
        let Some(index) = get(index_at, index_len)? else {
            return Ok(Err("an index reaches beyond the file".into()));
        };
        let Some(sizes) = index_sizes(&index) else { return Ok(Err("a damaged index".into())) };
        let total =
            sizes.iter().try_fold(0u64, |sum, (len, _)| sum.checked_add(len.checked_next_multiple_of(4)?));
        let start = total
            .zip(index_at)
            .and_then(|(total, index_at)| index_at.checked_sub(total)?.checked_sub(HEADER));
        let Some(header) = get(start, HEADER)?.filter(|h| h.starts_with(HEADER_MAGIC)) else {
            return Ok(Err("no header where one should be".into()));
        };
        let check = CHECKS[usize::from(header[7] & 15)];
        let mut blocks = Vec::new();
        let mut at = start.unwrap_or_default() + HEADER;
        for (len, plain_len) in sizes {
            let Some(first) = get(Some(at), 1)? else { return Ok(Err("a block is cut short".into())) };
            let header_len = (u64::from(first[0]) + 1) * 4;
            let Some(header) = get(Some(at), header_len)? else {
                return Ok(Err("a block is cut short".into()));
            };
            let dict = match dict_of(&header) {
                Ok(dict) => dict,
                Err(reason) => return Ok(Err(reason.into())),
            };
            let Some(data_len) = len.checked_sub(header_len + check) else {
                return Ok(Err("a block is cut short".into()));
            };
            blocks.push(Data { offset: at + header_len, len: data_len, plain_len, dict });
            at += len.next_multiple_of(4);
        }
        streams.push(blocks);
        end = start.unwrap_or_default();
    }
    Ok(Ok(streams.into_iter().rev().flatten().collect()))
}

/// A number of up to nine bytes, seven bits in each, the lowest first.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for i in 0..9 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        n |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}

/// For each block its length without padding, and that of its plain bytes.
fn index_sizes(index: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut rest = index.strip_prefix(b"\0")?;
    let count = number(&mut rest)?;
    // Two bytes at least for each.
    if count > index.len() as u64 / 2 {
        return None;
    }
    (0..count).map(|_| Some((number(&mut rest)?, number(&mut rest)?))).collect()
}

/// The size of the dictionary in the header of a block.
fn dict_of(header: &[u8]) -> Result<u32, &'static str> {
    const DAMAGED: &str = "a damaged header of a block";
    let flags = *header.get(1).ok_or(DAMAGED)?;
    let mut rest = header.get(2..).ok_or(DAMAGED)?;
    if flags & 3 != 0 {
        return Err("it has filters before LZMA2, which are not known here");
    }
    for size in [0x40, 0x80] {
        if flags & size != 0 {
            number(&mut rest).ok_or(DAMAGED)?;
        }
    }
    let (filter, len) = (number(&mut rest).ok_or(DAMAGED)?, number(&mut rest).ok_or(DAMAGED)?);
    if filter != LZMA2 || len != 1 {
        return Err("its filter is not LZMA2");
    }
    match rest.first() {
        Some(&bits) if bits < 40 => Ok((2 | u32::from(bits & 1)) << (bits / 2 + 11)),
        _ => Err("its dictionary is too large"),
    }
}

/// So many plain bytes are encoded by every candidate.
const TRY: u64 = 4 << 20;
/// A candidate that makes so many bytes of the data is believed, until all is proven.
const ENOUGH: u64 = 128 << 10;

/// Finds what makes `data` of `file` of plain bytes that start at `start` of `plain`: the first candidate that makes its
/// beginning, the likeliest tried first. Takes `memory` bytes, or as many as one encoder needs.
pub(super) fn find(
    file: &dyn Source,
    data: &Data,
    plain: &dyn Source,
    start: u64,
    effort: Effort,
    memory: u64,
) -> io::Result<Option<Params>> {
    let all = Params::candidates(data.dict);
    let Some(first) = all.first() else { return Ok(None) };
    let at_a_time = (memory / (first.memory() + (8 << 20))).max(1) as usize;
    let makes = |params: &Params, most| makes(params, file, data, plain, start, most);
    let mut alive = Vec::new();
    for some in all.chunks(at_a_time) {
        let made = some.par_iter().map(|params| makes(params, TRY)).collect::<io::Result<Vec<_>>>()?;
        alive.extend(some.iter().zip(made).filter_map(|(params, made)| Some((*params, made?))));
    }
    // What shrinks to nearly nothing, such as zeros, tells them apart late or never: then one after the other goes on.
    for (params, made) in alive {
        if made >= ENOUGH || data.plain_len <= TRY || makes(&params, effort.enough())?.is_some() {
            return Ok(Some(params));
        }
    }
    Ok(None)
}

/// Whether the first `most` plain bytes become the first bytes of the data, or fewer if they become [`ENOUGH`] bytes. Gives how
/// many bytes of the data were compared.
fn makes(
    params: &Params,
    file: &dyn Source,
    data: &Data,
    plain: &dyn Source,
    start: u64,
    most: u64,
) -> io::Result<Option<u64>> {
    let mut encoder = Encoder::new(params)?;
    let (mut buf, mut made, mut wanted) = (vec![0; 1 << 18], Vec::new(), Vec::new());
    let (mut pos, mut done) = (0, 0u64);
    let most = most.min(data.plain_len);
    loop {
        let part = &mut buf[..(most - pos).min(1 << 18) as usize];
        plain.read_at(start + pos, part)?;
        pos += part.len() as u64;
        made.clear();
        encoder.run(part, pos == data.plain_len, &mut made)?;
        let end = done + made.len() as u64;
        if end > data.len || pos == data.plain_len && end != data.len {
            return Ok(None);
        }
        wanted.resize(made.len(), 0);
        file.read_at(data.offset + done, &mut wanted)?;
        if made != wanted {
            return Ok(None);
        }
        done = end;
        if pos == most || done >= ENOUGH {
            return Ok(Some(done));
        }
    }
}

/// A block to be made: its parameters and the lengths of its plain bytes and of its data.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) params: Params,
    pub(super) plain_len: u64,
    pub(super) folded_len: u64,
}

impl Job {
    /// How many such blocks may be made at a time with `memory` bytes: each needs an encoder, its plain bytes and its
    /// data, and so does one that was made before, its data.
    pub(super) fn at_a_time(&self, memory: u64) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let data = self.folded_len.saturating_mul(2);
        let each = self.params.memory().saturating_add(self.plain_len).saturating_add(data);
        cores.min((memory / each) as usize)
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("fold: {what}"))
}

/// What comes next of a file that is made.
pub(super) enum Next<'a> {
    /// These bytes.
    Literal(&'a [u8]),
    /// A block.
    Block(Job),
}

impl Next<'_> {
    pub(super) fn job(&self) -> Option<&Job> {
        match self {
            Self::Literal(_) => None,
            Self::Block(job) => Some(job),
        }
    }
}

/// What is to be written, in order: at hand, or the number of the block that is on its way.
enum Ready<'a> {
    Literal(&'a [u8]),
    Block(usize),
}

/// What a worker is told: to begin with a block of this number, in this buffer, and what is in it.
enum Task {
    Begin(usize, Job, Vec<u8>),
    Piece(Vec<u8>),
}

/// What a worker has made: the block of this number.
struct Made {
    worker: usize,
    block: usize,
    data: io::Result<Vec<u8>>,
}

/// Plain bytes are handed to workers in pieces of this length.
const PIECE: usize = 1 << 20;
/// Blocks that were begun and not written yet, for each worker: who is faster need not wait for the one before.
const AHEAD: usize = 2;

/// Makes blocks of `plain`, `at_a_time` of them at once, and writes them and what is between them to `out`. A block is
/// encoded while its plain bytes are read.
pub(super) fn encode_all<'a>(
    parts: impl IntoIterator<Item = Next<'a>>,
    at_a_time: usize,
    plain: &mut dyn Read,
    out: &mut dyn Write,
) -> io::Result<()> {
    let (made_tx, made) = channel();
    let (empty_tx, empty) = channel();
    // Set when what is made is not wanted any more.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers = (0..at_a_time)
            .map(|worker| {
                let (task_tx, tasks) = channel();
                let (made, empty, stop) = (made_tx.clone(), empty_tx.clone(), &stop);
                scope.spawn(move || work(worker, &tasks, &made, &empty, stop));
                task_tx
            })
            .collect();
        let mut pool = Pool {
            workers,
            idle: (0..at_a_time).collect(),
            made,
            empty,
            data: BTreeMap::new(),
            spare: vec![],
        };
        let result = pool.run(parts, plain, out);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

struct Pool {
    workers: Vec<Sender<Task>>,
    idle: Vec<usize>,
    made: Receiver<Made>,
    /// Pieces that were encoded, to be filled again.
    empty: Receiver<Vec<u8>>,
    /// Blocks that are made and not written yet, by their numbers.
    data: BTreeMap<usize, Vec<u8>>,
    /// Buffers of blocks that were written.
    spare: Vec<Vec<u8>>,
}

impl Pool {
    fn run<'a>(
        &mut self,
        parts: impl IntoIterator<Item = Next<'a>>,
        plain: &mut dyn Read,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let mut queue = VecDeque::new();
        let (mut begun, mut written) = (0, 0);
        for part in parts {
            match part {
                Next::Literal(bytes) => queue.push_back(Ready::Literal(bytes)),
                Next::Block(job) => {
                    let worker = loop {
                        written += self.write(&mut queue, out)?;
                        match self.idle.pop() {
                            Some(worker) if begun - written < AHEAD * self.workers.len() => break worker,
                            Some(worker) => self.idle.push(worker),
                            None => {}
                        }
                        self.wait()?;
                    };
                    let buffer = self.spare.pop().unwrap_or_default();
                    self.tell(worker, Task::Begin(begun, job, buffer))?;
                    self.feed(worker, job.plain_len, plain)?;
                    queue.push_back(Ready::Block(begun));
                    begun += 1;
                }
            }
        }
        while {
            self.write(&mut queue, out)?;
            !queue.is_empty()
        } {
            self.wait()?;
        }
        Ok(())
    }

    /// Reads the plain bytes of a block, which the worker encodes meanwhile.
    fn feed(&self, worker: usize, plain_len: u64, plain: &mut dyn Read) -> io::Result<()> {
        let mut left = plain_len;
        while left > 0 {
            let mut piece = self.empty.try_recv().unwrap_or_default();
            piece.resize(left.min(PIECE as u64) as usize, 0);
            plain.read_exact(&mut piece)?;
            left -= piece.len() as u64;
            self.tell(worker, Task::Piece(piece))?;
        }
        Ok(())
    }

    fn tell(&self, worker: usize, task: Task) -> io::Result<()> {
        // It ends when it fails, and says why before.
        let why = |_| self.made.try_iter().find_map(|made| made.data.err());
        self.workers[worker]
            .send(task)
            .map_err(why)
            .map_err(|e| e.unwrap_or_else(|| io::Error::other("an encoder has ended")))
    }

    /// Waits until another block is made.
    fn wait(&mut self) -> io::Result<()> {
        let Made { worker, block, data } =
            self.made.recv().map_err(|_| io::Error::other("no encoder is left"))?;
        self.data.insert(block, data?);
        self.idle.push(worker);
        Ok(())
    }

    /// Writes what is first in the queue and at hand. How many blocks those were.
    fn write(&mut self, queue: &mut VecDeque<Ready<'_>>, out: &mut dyn Write) -> io::Result<usize> {
        let mut blocks = 0;
        while let Some(first) = queue.front() {
            match first {
                Ready::Literal(bytes) => out.write_all(bytes)?,
                Ready::Block(block) => {
                    let Some(data) = self.data.remove(block) else { break };
                    out.write_all(&data)?;
                    self.spare.push(data);
                    blocks += 1;
                }
            }
            queue.pop_front();
        }
        Ok(blocks)
    }
}

/// Makes blocks as it is told, until nobody is left to tell it.
fn work(
    worker: usize,
    tasks: &Receiver<Task>,
    made: &Sender<Made>,
    empty: &Sender<Vec<u8>>,
    stop: &AtomicBool,
) {
    let mut encoder = None;
    while let Ok(task) = tasks.recv() {
        let Task::Begin(block, job, buffer) = task else { continue };
        let encode = || encode(&mut encoder, &job, buffer, tasks, empty, stop);
        let data = catch_unwind(AssertUnwindSafe(encode))
            .unwrap_or_else(|_| Err(io::Error::other("an encoder panicked")));
        let failed = data.is_err();
        if made.send(Made { worker, block, data }).is_err() || failed {
            break;
        }
    }
}

/// Makes one block in `data`, of the pieces that come.
fn encode(
    encoder: &mut Option<Encoder>,
    job: &Job,
    mut data: Vec<u8>,
    tasks: &Receiver<Task>,
    empty: &Sender<Vec<u8>>,
    stop: &AtomicBool,
) -> io::Result<Vec<u8>> {
    let encoder = match encoder {
        Some(encoder) => {
            encoder.restart(&job.params)?;
            encoder
        }
        None => encoder.insert(Encoder::new(&job.params)?),
    };
    data.clear();
    let mut left = job.plain_len;
    while left > 0 {
        let Ok(Task::Piece(piece)) = tasks.recv() else { return Err(bad("a block without its plain bytes")) };
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        left -= piece.len() as u64;
        encoder.run(&piece, left == 0, &mut data)?;
        if data.len() as u64 > job.folded_len {
            break;
        }
        // Nobody fills it again when all is read.
        let _ = empty.send(piece);
    }
    if job.plain_len == 0 {
        encoder.run(&[], true, &mut data)?;
    }
    if data.len() as u64 != job.folded_len {
        return Err(bad("a block of another length than the map says"));
    }
    Ok(data)
}
