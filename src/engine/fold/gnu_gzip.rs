//! Deflate as GNU gzip makes it, byte for byte, at levels 1 to 9.
//!
//! gzip and zlib search for matches in the same way, but zlib cannot make what gzip makes: gzip has longer blocks than
//! zlib with the same hash table, and ends a block early when that seems to pay (`Writer::full`). Info-ZIP's zip makes the same bytes as gzip.
//!
//! What decides about the bytes, besides the levels: the window is 64 KiB of memory, of which the lower half is thrown
//! away when less than [`MIN_AHEAD`] bytes are left to work on at its end, and position 0 of it ends every chain. Input
//! is taken as from a regular file, so that the window is always filled to its end; from a pipe gzip may take less at a
//! time, which matters only when the window was filled to the last byte but one. Frozen: maps depend on it.
//!
//! Nearly all of the time goes into the search for matches, and from level 4 on that can be done in many places of the input
//! at once. Every position is entered into the table there, so that what is found depends on the bytes of the window alone.
//! What else comes from before is where the match ended that was found last, and that is soon forgotten: a parser that
//! starts anywhere does the same as one that comes from the start of the stream, from the first place on where both have
//! ended a match.

use rayon::prelude::*;

use super::huffman::{Bits, Block, DISTANCE_EXTRA, is_match, match_symbol, symbol_len};

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
/// Levels from this on enter every position into the table.
const EVERY: u8 = 4;
/// Parsers start so far apart. Each goes on for a window into what the next one does, to find where they agree.
const SEGMENT: usize = 16 * WINDOW;
/// No more parsers than this are at work, each with the symbols of a segment.
const MAX_PARSERS: usize = 16;

/// Encodes one stream.
pub(super) struct Gzip {
    number: u8,
    input: Input,
    /// How much input is waited for before it is worked on: little at first, as the level may be a guess.
    batch: usize,
    /// The parser whose symbols are right: it comes from the start of the stream, or agreed with one that did.
    parser: Parser,
    writer: Writer,
}

impl Gzip {
    /// A stream of level 1 to 9.
    pub(super) fn new(number: u8) -> Self {
        Self {
            number,
            input: Input::default(),
            batch: SPACE,
            parser: Parser::new(number, 0),
            writer: Writer {
                number,
                block: Block::new(),
                bits: Bits::default(),
                pos: 0,
                block_start: 0,
                base: 0,
            },
        }
    }

    /// Encodes `input` and appends what comes of it to `out`; with `finish`, the end of the stream too.
    pub(super) fn run(&mut self, input: &[u8], finish: bool, out: &mut Vec<u8>) {
        self.input.bytes.extend_from_slice(input);
        let parsers = match rayon::current_num_threads() {
            1 => 1,
            _ if self.number < EVERY => 1,
            threads => (2 * threads).min(MAX_PARSERS),
        };
        while self.input.end() - self.parser.read >= self.batch {
            self.encode(self.parser.read + self.batch, false, out);
            self.batch = (2 * self.batch).min(parsers * SEGMENT);
        }
        if finish {
            self.encode(self.input.end(), true, out);
        }
    }

    /// Encodes what there is before `end`.
    fn encode(&mut self, end: usize, finish: bool, out: &mut Vec<u8>) {
        let (number, input, start) = (self.number, &self.input, self.parser.read);
        let count = if number < EVERY { 1 } else { ((end - start) / SEGMENT).max(1) };
        let mut others: Vec<Parser> =
            (1..count).map(|i| Parser::primed(number, start + i * SEGMENT, input)).collect();
        let mut all: Vec<&mut Parser> = std::iter::once(&mut self.parser).chain(&mut others).collect();
        all.par_iter_mut().enumerate().for_each(|(i, parser)| {
            let last = i + 1 == count;
            let until = if last { end } else { start + (i + 1) * SEGMENT + WINDOW };
            parser.run(input, until, finish && last);
        });
        for mut next in others {
            while self.parser.read < next.read {
                if let Some((ours, theirs)) = self.parser.agrees(&next) {
                    self.parser.symbols.truncate(ours);
                    self.writer.write(&mut self.parser, input, out);
                    next.skip(theirs);
                    self.parser = next;
                    break;
                }
                let until = (self.parser.read + WINDOW).min(end);
                self.parser.run(input, until, finish && until == end);
            }
        }
        self.writer.write(&mut self.parser, input, out);
        if finish {
            self.writer.finish(&self.parser, input, out);
        }
        self.input.forget(self.parser.base);
    }
}

/// The bytes of the stream that are still needed.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    /// Where they start in it.
    start: usize,
}

impl Input {
    fn end(&self) -> usize {
        self.start + self.bytes.len()
    }

    fn get(&self, from: usize, to: usize) -> &[u8] {
        &self.bytes[from - self.start..to - self.start]
    }

    fn forget(&mut self, before: usize) {
        self.bytes.drain(..before - self.start);
        self.start = before;
    }
}

/// Makes literals and matches of the input.
struct Parser {
    number: u8,
    level: &'static Level,
    window: Box<[u8; SPACE + SLACK]>,
    /// For each hash the last position that had it, and for each position the one before with the same hash; 0: none.
    head: Box<[u16; HASHES]>,
    before: Box<[u16; WINDOW]>,
    /// Where the window starts in the input, and how far that was read.
    base: usize,
    read: usize,
    /// What is worked on now, in the window, and how many bytes there are from here on.
    pos: usize,
    ahead: usize,
    end: bool,
    /// The match found at the last position, and whether that position waits to be a literal.
    length: usize,
    at: usize,
    waiting: bool,
    /// What was found and not written yet, as [`Block`] has it, and where that starts in the input.
    symbols: Vec<u32>,
    first: usize,
    /// From which of the symbols on the window starts where.
    bases: Vec<(usize, usize)>,
}

/// An array of zeros that never lies on the stack.
fn zeros<T: Copy + Default, const N: usize>() -> Box<[T; N]> {
    match vec![T::default(); N].into_boxed_slice().try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the length is N"),
    }
}

impl Parser {
    /// A parser of the input from `start` on, as if nothing were before.
    fn new(number: u8, start: usize) -> Self {
        Self {
            number,
            level: &LEVELS[usize::from(number.clamp(1, 9)) - 1],
            window: zeros(),
            head: zeros(),
            before: zeros(),
            base: start,
            read: start,
            pos: 0,
            ahead: 0,
            end: false,
            length: MIN_MATCH - 1,
            at: 0,
            waiting: false,
            symbols: Vec::new(),
            first: start,
            bases: vec![(0, start)],
        }
    }

    /// A parser of the input from `start` on, which is a whole number of windows and not 0, as if a match had ended there.
    fn primed(number: u8, start: usize, input: &Input) -> Self {
        let mut parser = Self::new(number, start - WINDOW);
        parser.fill(input, start + WINDOW, false);
        for pos in 0..WINDOW {
            parser.insert(pos);
        }
        (parser.pos, parser.ahead, parser.first) = (WINDOW, WINDOW, start);
        parser
    }

    /// Works on the input before `until`; with `finish`, that is its end. Else `until` is a whole number of windows.
    fn run(&mut self, input: &Input, until: usize, finish: bool) {
        loop {
            while self.ahead < MIN_AHEAD && !self.end {
                if !self.fill(input, until, finish) {
                    return;
                }
            }
            if self.ahead == 0 {
                return;
            }
            if self.number <= FAST { self.fast() } else { self.lazy() }
        }
    }

    /// Fills the window. False when there is not enough input for that, and more will come.
    fn fill(&mut self, input: &Input, until: usize, finish: bool) -> bool {
        let slide = self.pos >= WINDOW + MAX_DISTANCE;
        let used = self.pos + self.ahead - if slide { WINDOW } else { 0 };
        let n = (until - self.read).min(SPACE - used);
        if n < SPACE - used && !finish {
            return false;
        }
        if slide {
            self.window.copy_within(WINDOW..SPACE, 0);
            self.base += WINDOW;
            self.bases.push((self.symbols.len(), self.base));
            self.pos -= WINDOW;
            self.at = self.at.wrapping_sub(WINDOW);
            for entry in self.head.iter_mut().chain(self.before.iter_mut()) {
                *entry = entry.saturating_sub(WINDOW as u16);
            }
        }
        self.window[used..used + n].copy_from_slice(input.get(self.read, self.read + n));
        self.read += n;
        self.ahead += n;
        if n == 0 {
            self.end = true;
            let end = (used + MIN_MATCH - 1).min(SPACE);
            self.window[used..end].fill(0);
        }
        true
    }

    fn literal(&mut self, pos: usize) {
        self.symbols.push(self.window[pos % SPACE].into());
    }

    fn matched(&mut self, distance: usize, length: usize) {
        self.symbols.push(match_symbol(distance, length));
    }

    /// The first place where both this parser and `next`, which started later, have ended a match: so many symbols from
    /// the start of each.
    fn agrees(&self, next: &Self) -> Option<(usize, usize)> {
        let (mut ours, mut theirs) = (self.symbols.iter(), next.symbols.iter());
        let (mut pos, mut next_pos) = (self.first, next.first);
        let (mut ended, mut next_ended) = (false, true);
        loop {
            if pos == next_pos && ended && next_ended {
                return Some((self.symbols.len() - ours.len(), next.symbols.len() - theirs.len()));
            }
            let (symbols, pos, ended) = if pos <= next_pos {
                (&mut ours, &mut pos, &mut ended)
            } else {
                (&mut theirs, &mut next_pos, &mut next_ended)
            };
            let symbol = *symbols.next()?;
            *pos += symbol_len(symbol);
            *ended = is_match(symbol);
        }
    }

    /// Forgets the first symbols.
    fn skip(&mut self, count: usize) {
        self.first += self.symbols.drain(..count).map(symbol_len).sum::<usize>();
        for (symbol, _) in &mut self.bases {
            *symbol = symbol.saturating_sub(count);
        }
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

    /// Works on what is there, taking every match that is found.
    fn fast(&mut self) {
        let least = if self.end { 1 } else { MIN_AHEAD };
        while self.ahead >= least {
            let first = self.insert(self.pos);
            let mut length = 0;
            if self.worth(first) {
                length = self.longest(first, MIN_MATCH - 1).min(self.ahead);
            }
            if length >= MIN_MATCH {
                self.matched(self.pos - self.at, length);
                self.ahead -= length;
                if length <= self.level.lazy {
                    for pos in self.pos + 1..self.pos + length {
                        self.insert(pos);
                    }
                }
                self.pos += length;
            } else {
                self.literal(self.pos);
                self.ahead -= 1;
                self.pos += 1;
            }
        }
    }

    /// Works on what is there, taking a match only when there is none better at the next byte.
    fn lazy(&mut self) {
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
                self.matched((self.pos - 1).wrapping_sub(at_before), length_before);
                self.ahead -= length_before - 1;
                for pos in self.pos + 1..self.pos + length_before - 1 {
                    self.insert(pos);
                }
                self.pos += length_before - 1;
                self.waiting = false;
                self.length = MIN_MATCH - 1;
            } else {
                if self.waiting {
                    self.literal(self.pos - 1);
                }
                self.waiting = true;
                self.pos += 1;
                self.ahead -= 1;
            }
        }
    }
}

/// Makes blocks of symbols.
struct Writer {
    number: u8,
    block: Block,
    bits: Bits,
    /// Where the last symbol ended in the input, where the block started, and the window of the parser at that time.
    pos: usize,
    block_start: usize,
    base: usize,
}

impl Writer {
    /// Takes the symbols of a parser.
    fn write(&mut self, parser: &mut Parser, input: &Input, out: &mut Vec<u8>) {
        let mut bases = parser.bases.iter().peekable();
        for (i, &symbol) in parser.symbols.iter().enumerate() {
            while let Some((_, base)) = bases.next_if(|(from, _)| *from <= i) {
                self.base = *base;
            }
            self.block.push(symbol);
            // Where the parser is when it finds this; the lazy levels find what starts a byte before.
            let here = self.pos + usize::from(self.number > FAST);
            self.pos += symbol_len(symbol);
            if self.full(here) {
                self.flush(false, input, out);
            }
        }
        parser.symbols.clear();
        parser.first = self.pos;
        self.base = parser.base;
        parser.bases = vec![(0, parser.base)];
    }

    /// The end of the stream.
    fn finish(&mut self, parser: &Parser, input: &Input, out: &mut Vec<u8>) {
        if parser.waiting {
            self.block.push(input.get(self.pos, self.pos + 1)[0].into());
            self.pos += 1;
        }
        self.flush(true, input, out);
    }

    /// Whether to end the block: it is full, or what is in it compresses well and what follows may not.
    #[inline(always)]
    fn full(&self, pos: usize) -> bool {
        let len = self.block.len();
        if len.is_multiple_of(0x1000) && self.number >= EARLY {
            let mut bits = len as u64 * 8;
            for (count, extra) in self.block.distances().iter().zip(DISTANCE_EXTRA) {
                bits += u64::from(*count) * (5 + u64::from(extra));
            }
            let input = (pos - self.block_start) as u64;
            if self.block.matches() < len / 2 && bits / 8 < input / 2 {
                return true;
            }
        }
        len == MAX_SYMBOLS
    }

    fn flush(&mut self, last: bool, input: &Input, out: &mut Vec<u8>) {
        // Only what is in the window can be stored as it is.
        let stored = (self.block_start >= self.base).then(|| input.get(self.block_start, self.pos));
        self.block.write(stored, last, &mut self.bits, out);
        self.block_start = self.pos;
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
