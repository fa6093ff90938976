//! Deflate as GNU gzip makes it, byte for byte, at levels 1 to 9.
//!
//! gzip and zlib search for matches in the same way, but zlib cannot make what gzip makes: gzip has longer blocks than
//! zlib with the same hash table, and ends a block early when that seems to pay ([`Gzip::full`]). Info-ZIP's zip makes the same bytes as gzip.
//!
//! What decides about the bytes, besides the levels: the window is 64 KiB of memory, of which the lower half is thrown
//! away when less than [`MIN_AHEAD`] bytes are left to work on at its end, and position 0 of it ends every chain. Input
//! is taken as from a regular file, so that the window is always filled to its end; from a pipe gzip may take less at a
//! time, which matters only when the window was filled to the last byte but one. Frozen: maps depend on it.

use super::huffman::{Bits, Block, DISTANCE_EXTRA};

/// Name and version of this encoder; to be raised when it makes other bytes than before.
pub(super) const VERSION: &str = "gnu-gzip 1";

/// How far back the window reaches: half of its memory.
const WINDOW: usize = 32 << 10;
const SPACE: usize = 2 * WINDOW;
const MIN_MATCH: usize = 3;
const MAX_MATCH: usize = 258;
/// The window is filled up when less is left to work on.
const MIN_AHEAD: usize = MAX_MATCH + MIN_MATCH + 1;
/// How far back a match may be.
const MAX_DISTANCE: usize = WINDOW - MIN_AHEAD;
/// The shortest matches are not worth their distance from here on.
const TOO_FAR: usize = 4096;
const HASHES: usize = 1 << 15;
/// A block has at most so many symbols.
const MAX_SYMBOLS: usize = (1 << 15) - 1;
/// The bytes after the window that a match is compared with, eight at a time.
const SLACK: usize = 8;

/// What a level means.
struct Level {
    /// When the match before is at least so long, the search for a better one is cut to a quarter.
    good: usize,
    /// When it is at least so long, none is searched for. In the fast levels: longer matches are not entered into the table.
    lazy: usize,
    /// A match of this length is good enough.
    nice: usize,
    /// How many candidates are looked at.
    chain: usize,
}

const fn level(good: usize, lazy: usize, nice: usize, chain: usize) -> Level {
    Level { good, lazy, nice, chain }
}

const LEVELS: [Level; 9] = [
    level(4, 4, 8, 4),
    level(4, 5, 16, 8),
    level(4, 6, 32, 32),
    level(4, 4, 16, 16),
    level(8, 16, 32, 32),
    level(8, 16, 128, 128),
    level(8, 32, 128, 256),
    level(32, 128, 258, 1024),
    level(32, 258, 258, 4096),
];
/// Levels up to this take the first match they find.
const FAST: u8 = 3;
/// Levels from this on end a block early.
const EARLY: u8 = 3;

/// Encodes one stream.
pub(super) struct Gzip {
    number: u8,
    level: &'static Level,
    window: Box<[u8; SPACE + SLACK]>,
    /// For each hash the last position that had it, and for each position the one before with the same hash; 0: none.
    head: Box<[u16; HASHES]>,
    before: Box<[u16; WINDOW]>,
    /// What is worked on now, and how many bytes there are from here on.
    pos: usize,
    ahead: usize,
    /// Where the block started; below 0 when that has left the window.
    block_start: isize,
    /// The match found at the last position, and whether that position waits to be written as a literal.
    length: usize,
    at: usize,
    waiting: bool,
    /// Input that has no room in the window yet.
    pending: Vec<u8>,
    taken: usize,
    end: bool,
    block: Block,
    bits: Bits,
}

/// An array of zeros that never lies on the stack.
fn zeros<T: Copy + Default, const N: usize>() -> Box<[T; N]> {
    match vec![T::default(); N].into_boxed_slice().try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the length is N"),
    }
}

impl Gzip {
    /// A stream of level 1 to 9.
    pub(super) fn new(number: u8) -> Self {
        Self {
            number,
            level: &LEVELS[usize::from(number.clamp(1, 9)) - 1],
            window: zeros(),
            head: zeros(),
            before: zeros(),
            pos: 0,
            ahead: 0,
            block_start: 0,
            length: MIN_MATCH - 1,
            at: 0,
            waiting: false,
            pending: Vec::new(),
            taken: 0,
            end: false,
            block: Block::new(),
            bits: Bits::default(),
        }
    }

    /// Encodes `input` and appends what comes of it to `out`; with `finish`, the end of the stream too.
    pub(super) fn run(&mut self, input: &[u8], finish: bool, out: &mut Vec<u8>) {
        self.pending.drain(..self.taken);
        self.taken = 0;
        self.pending.extend_from_slice(input);
        loop {
            while self.ahead < MIN_AHEAD && !self.end {
                if !self.fill(finish) {
                    return;
                }
            }
            if self.ahead == 0 {
                break;
            }
            if self.number <= FAST { self.fast(out) } else { self.lazy(out) }
        }
        if self.waiting {
            self.block.literal(self.window[(self.pos - 1) % SPACE]);
        }
        self.flush(true, out);
    }

    /// Fills the window. False when there is not enough input for that, and more will come.
    fn fill(&mut self, finish: bool) -> bool {
        let slide = self.pos >= WINDOW + MAX_DISTANCE;
        let used = self.pos + self.ahead - if slide { WINDOW } else { 0 };
        let rest = &self.pending[self.taken..];
        let n = rest.len().min(SPACE - used);
        if n < SPACE - used && !finish {
            return false;
        }
        if slide {
            self.window.copy_within(WINDOW..SPACE, 0);
            self.pos -= WINDOW;
            self.at = self.at.wrapping_sub(WINDOW);
            self.block_start -= WINDOW as isize;
            for entry in self.head.iter_mut().chain(self.before.iter_mut()) {
                *entry = entry.saturating_sub(WINDOW as u16);
            }
        }
        self.window[used..used + n].copy_from_slice(&rest[..n]);
        self.taken += n;
        self.ahead += n;
        if n == 0 {
            self.end = true;
            let end = (used + MIN_MATCH - 1).min(SPACE);
            self.window[used..end].fill(0);
        }
        true
    }

    /// Enters the string at `pos` into the table. Gives the last position with the same hash.
    #[inline(always)]
    fn insert(&mut self, pos: usize) -> usize {
        let pos = pos % SPACE;
        let [a, b, c] = [0, 1, 2].map(|i| usize::from(self.window[pos + i]));
        let hash = (a << 10 ^ b << 5 ^ c) % HASHES;
        let before = self.head[hash];
        self.before[pos % WINDOW] = before;
        self.head[hash] = pos as u16;
        before.into()
    }

    /// Whether there is a position to search from.
    #[inline(always)]
    fn worth(&self, first: usize) -> bool {
        first != 0 && self.pos - first <= MAX_DISTANCE && self.pos <= SPACE - MIN_AHEAD
    }

    /// The longest match that is longer than `best`, from `first` on backwards. Its length, `best` if there is none, goes
    /// beyond the end of the input at times, as gzip's does.
    #[inline(always)]
    fn longest(&mut self, first: usize, mut best: usize) -> usize {
        let pos = self.pos % SPACE;
        let limit = pos.saturating_sub(MAX_DISTANCE);
        let mut left = self.level.chain;
        if best >= self.level.good {
            left >>= 2;
        }
        let nice = self.level.nice;
        let window = &*self.window;
        let two = |at: usize| u16::from_le_bytes([window[at], window[at + 1]]);
        let start = two(pos);
        let mut end = two((pos + best - 1) % SPACE);
        let mut candidate = first;
        loop {
            if two((candidate + best - 1) % SPACE) == end && two(candidate % SPACE) == start {
                let length = common(window, pos, candidate);
                if length > best {
                    self.at = candidate;
                    best = length;
                    if length >= nice {
                        break;
                    }
                    end = two((pos + best - 1) % SPACE);
                }
            }
            candidate = usize::from(self.before[candidate % WINDOW]);
            left -= 1;
            if candidate <= limit || left == 0 {
                break;
            }
        }
        best
    }

    /// Whether to end the block: it is full, or what is in it compresses well and what follows may not.
    #[inline(always)]
    fn full(&self) -> bool {
        let len = self.block.len();
        if len.is_multiple_of(0x1000) && self.number >= EARLY {
            let mut bits = len as u64 * 8;
            for (count, extra) in self.block.distances().iter().zip(DISTANCE_EXTRA) {
                bits += u64::from(*count) * (5 + u64::from(extra));
            }
            let input = (self.pos as isize - self.block_start) as u64;
            if self.block.matches() < len / 2 && bits / 8 < input / 2 {
                return true;
            }
        }
        len == MAX_SYMBOLS
    }

    fn flush(&mut self, last: bool, out: &mut Vec<u8>) {
        let stored = usize::try_from(self.block_start).ok().map(|start| &self.window[start..self.pos]);
        self.block.write(stored, last, &mut self.bits, out);
        self.block_start = self.pos as isize;
    }

    /// Works on what is there, taking every match that is found.
    fn fast(&mut self, out: &mut Vec<u8>) {
        let least = if self.end { 1 } else { MIN_AHEAD };
        while self.ahead >= least {
            let first = self.insert(self.pos);
            let mut length = 0;
            if self.worth(first) {
                length = self.longest(first, MIN_MATCH - 1).min(self.ahead);
            }
            if length >= MIN_MATCH {
                self.block.matched(self.pos - self.at, length);
                let full = self.full();
                self.ahead -= length;
                if length <= self.level.lazy {
                    for pos in self.pos + 1..self.pos + length {
                        self.insert(pos);
                    }
                }
                self.pos += length;
                if full {
                    self.flush(false, out);
                }
            } else {
                self.block.literal(self.window[self.pos % SPACE]);
                let full = self.full();
                self.ahead -= 1;
                self.pos += 1;
                if full {
                    self.flush(false, out);
                }
            }
        }
    }

    /// Works on what is there, taking a match only when there is none better at the next byte.
    fn lazy(&mut self, out: &mut Vec<u8>) {
        let least = if self.end { 1 } else { MIN_AHEAD };
        while self.ahead >= least {
            let first = self.insert(self.pos);
            let (length_before, at_before) = (self.length, self.at);
            self.length = MIN_MATCH - 1;
            if length_before < self.level.lazy && self.worth(first) {
                self.length = self.longest(first, length_before).min(self.ahead);
                if self.length == MIN_MATCH && self.pos.wrapping_sub(self.at) > TOO_FAR {
                    self.length = MIN_MATCH - 1;
                }
            }
            if length_before >= MIN_MATCH && self.length <= length_before {
                self.block.matched((self.pos - 1).wrapping_sub(at_before), length_before);
                let full = self.full();
                self.ahead -= length_before - 1;
                for pos in self.pos + 1..self.pos + length_before - 1 {
                    self.insert(pos);
                }
                self.pos += length_before - 1;
                self.waiting = false;
                self.length = MIN_MATCH - 1;
                if full {
                    self.flush(false, out);
                }
            } else {
                if self.waiting {
                    self.block.literal(self.window[(self.pos - 1) % SPACE]);
                    if self.full() {
                        self.flush(false, out);
                    }
                }
                self.waiting = true;
                self.pos += 1;
                self.ahead -= 1;
            }
        }
    }
}

/// How many bytes at `a` are those at `b`, [`MAX_MATCH`] at most.
#[inline(always)]
fn common(window: &[u8; SPACE + SLACK], a: usize, b: usize) -> usize {
    let (Some(a), Some(b)) = (window.get(a..a + MAX_MATCH), window.get(b..b + MAX_MATCH)) else { return 0 };
    let (a_words, a_rest) = a.as_chunks::<8>();
    let (b_words, b_rest) = b.as_chunks::<8>();
    let mut length = 0;
    for (a, b) in a_words.iter().zip(b_words) {
        let differ = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if differ != 0 {
            return length + differ.trailing_zeros() as usize / 8;
        }
        length += 8;
    }
    length + a_rest.iter().zip(b_rest).take_while(|(a, b)| a == b).count()
}
