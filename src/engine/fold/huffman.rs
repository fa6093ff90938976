//! Deflate blocks as gzip and zlib write them: collects the symbols of a block, chooses its Huffman codes, writes it.
//!
//! RFC 1951 leaves open which lengths the codes have, how those are written down, and which kind of block is taken. What
//! is done here is what both programs do, which comes from one hand: codes are built with a heap ordered by frequency
//! and depth, codes that are too long are shortened in the same way, and the smallest of the three kinds is taken by
//! estimates rounded in the same way. Frozen: maps depend on it.

/// Literals, the end of a block, lengths.
const LITERALS: usize = 286;
const END: usize = 256;
pub(super) const DISTANCES: usize = 30;
/// Codes of code lengths.
const LENGTHS: usize = 19;

/// Extra bits of the 29 length codes, the 30 distance codes and the 19 codes of code lengths.
const LENGTH_EXTRA: [u8; 29] =
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
pub(super) const DISTANCE_EXTRA: [u8; DISTANCES] =
    [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
const REPEAT_EXTRA: [u8; LENGTHS] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 7];
/// The order in which the lengths of the codes of code lengths are written.
const ORDER: [usize; LENGTHS] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
/// The code length symbols that repeat: the length before 3 to 6 times, zero 3 to 10 times, zero 11 to 138 times.
const REPEAT: u8 = 16;
const ZEROS: u8 = 17;
const MANY_ZEROS: u8 = 18;

/// The code of each length, less 3, and the first length of each code.
const LENGTH_CODES: ([u8; 256], [u16; 29]) = {
    let (mut codes, mut bases) = ([0; 256], [0; 29]);
    let (mut code, mut length) = (0, 0);
    while code < 28 {
        bases[code] = length as u16;
        let end = length + (1 << LENGTH_EXTRA[code]);
        while length < end {
            codes[if length < 256 { length } else { 255 }] = code as u8;
            length += 1;
        }
        code += 1;
    }
    // The longest has a code of its own.
    codes[255] = 28;
    bases[28] = 255;
    (codes, bases)
};

/// The code of each distance, less 1, of up to 256, and of each multiple of 128 from there on; and the first of each code.
const DISTANCE_CODES: ([u8; 512], [u16; DISTANCES]) = {
    let (mut codes, mut bases) = ([0; 512], [0; DISTANCES]);
    let (mut code, mut distance) = (0, 0);
    while code < DISTANCES {
        bases[code] = distance as u16;
        let end = distance + (1 << DISTANCE_EXTRA[code]);
        while distance < end {
            if distance < 256 {
                codes[distance] = code as u8;
            } else {
                codes[256 + (distance >> 7)] = code as u8;
            }
            distance += 1;
        }
        code += 1;
    }
    (codes, bases)
};

fn distance_code(distance: usize) -> usize {
    let code = if distance < 256 { distance } else { 256 + ((distance >> 7) & 0xff) };
    usize::from(DISTANCE_CODES.0[code])
}

/// The lengths of the static codes.
const STATIC_LITERALS: [u8; 288] = {
    let mut lengths = [8; 288];
    let mut i = 144;
    while i < 280 {
        lengths[i] = if i < 256 { 9 } else { 7 };
        i += 1;
    }
    lengths
};
const STATIC_DISTANCES: [u8; DISTANCES] = [5; DISTANCES];

/// Appends bits to bytes, the first into the lowest bit.
#[derive(Default)]
pub(super) struct Bits {
    held: u64,
    count: u32,
}

impl Bits {
    /// Appends the lowest `n` bits of `value`, at most 32; those above must be zero.
    fn put(&mut self, value: u32, n: u32, out: &mut Vec<u8>) {
        self.held |= u64::from(value) << self.count;
        self.count += n;
        if self.count >= 32 {
            out.extend_from_slice(&(self.held as u32).to_le_bytes());
            self.held >>= 32;
            self.count -= 32;
        }
    }

    /// Fills the last byte with zeros.
    pub(super) fn align(&mut self, out: &mut Vec<u8>) {
        let bytes = self.count.div_ceil(8) as usize;
        out.extend_from_slice(&self.held.to_le_bytes()[..bytes]);
        *self = Self::default();
    }
}

/// The symbol of a match of 3 to 258 bytes, 1 to 32768 bytes back: the distance above the length less 3. A literal is itself.
pub(super) fn match_symbol(distance: usize, length: usize) -> u32 {
    (distance as u32) << 8 | (length - 3) as u32
}

/// Whether it is one of a match.
pub(super) fn is_match(symbol: u32) -> bool {
    symbol >> 8 != 0
}

/// How many bytes a symbol stands for.
pub(super) fn symbol_len(symbol: u32) -> usize {
    if is_match(symbol) { (symbol & 0xff) as usize + 3 } else { 1 }
}

/// The symbols of a block.
pub(super) struct Block {
    symbols: Vec<u32>,
    literals: [u32; LITERALS],
    distances: [u32; DISTANCES],
    /// How many of the symbols are matches.
    matches: usize,
}

impl Block {
    pub(super) fn new() -> Self {
        let mut block = Self {
            symbols: Vec::with_capacity(1 << 15),
            literals: [0; LITERALS],
            distances: [0; DISTANCES],
            matches: 0,
        };
        block.clear();
        block
    }

    fn clear(&mut self) {
        self.symbols.clear();
        self.literals = [0; LITERALS];
        self.distances = [0; DISTANCES];
        self.matches = 0;
        self.literals[END] = 1;
    }

    /// How many symbols there are.
    pub(super) fn len(&self) -> usize {
        self.symbols.len()
    }

    /// How many of them are matches.
    pub(super) fn matches(&self) -> usize {
        self.matches
    }

    /// How often each distance code is needed.
    pub(super) fn distances(&self) -> &[u32; DISTANCES] {
        &self.distances
    }

    /// Adds a symbol: a literal, or what [`match_symbol`] makes.
    pub(super) fn push(&mut self, symbol: u32) {
        self.symbols.push(symbol);
        if is_match(symbol) {
            self.literals[END + 1 + usize::from(LENGTH_CODES.0[usize::from(symbol as u8)])] += 1;
            self.distances[distance_code((symbol >> 8) as usize - 1)] += 1;
            self.matches += 1;
        } else {
            self.literals[symbol as usize] += 1;
        }
    }

    /// Writes the block and empties it. `stored` are the bytes it stands for, when they are at hand.
    pub(super) fn write(&mut self, stored: Option<&[u8]>, last: bool, bits: &mut Bits, out: &mut Vec<u8>) {
        let mut size = Size::default();
        let literals = size.build(&self.literals, &LENGTH_EXTRA, END + 1, 15, &STATIC_LITERALS);
        let distances = size.build(&self.distances, &DISTANCE_EXTRA, 0, 15, &STATIC_DISTANCES);
        let mut lengths = run_lengths(&literals.lengths);
        lengths.extend(run_lengths(&distances.lengths));
        let mut frequencies = [0; LENGTHS];
        for (symbol, _) in &lengths {
            frequencies[usize::from(*symbol)] += 1;
        }
        let repeats = size.build(&frequencies, &REPEAT_EXTRA, 0, 7, &[]);
        let length_of = |i: usize| repeats.lengths.get(i).copied().unwrap_or_default();
        let orders = ORDER.iter().rposition(|&i| length_of(i) != 0).unwrap_or_default().max(3) + 1;
        size.dynamic += 3 * orders as i64 + 5 + 5 + 4;

        let fixed = (size.fixed + 3 + 7) >> 3;
        let best = fixed.min((size.dynamic + 3 + 7) >> 3);
        let kind = |n: u32| n << 1 | u32::from(last);
        match stored {
            Some(stored) if stored.len() as i64 + 4 <= best => {
                bits.put(kind(0), 3, out);
                bits.align(out);
                let len = stored.len() as u16;
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(&(!len).to_le_bytes());
                out.extend_from_slice(stored);
            }
            _ if fixed == best => {
                bits.put(kind(1), 3, out);
                self.put_symbols(&codes(&STATIC_LITERALS), &codes(&STATIC_DISTANCES), bits, out);
            }
            _ => {
                bits.put(kind(2), 3, out);
                bits.put((literals.lengths.len() - 257) as u32, 5, out);
                bits.put((distances.lengths.len() - 1) as u32, 5, out);
                bits.put((orders - 4) as u32, 4, out);
                for &i in &ORDER[..orders] {
                    bits.put(length_of(i).into(), 3, out);
                }
                let of_lengths = codes(&repeats.lengths);
                for (symbol, count) in lengths {
                    let code = of_lengths[usize::from(symbol)];
                    bits.put(code & 0xffff, code >> 16, out);
                    bits.put(count.into(), REPEAT_EXTRA[usize::from(symbol)].into(), out);
                }
                self.put_symbols(&codes(&literals.lengths), &codes(&distances.lengths), bits, out);
            }
        }
        if last {
            bits.align(out);
        }
        self.clear();
    }

    fn put_symbols(&self, literals: &[u32], distances: &[u32], bits: &mut Bits, out: &mut Vec<u8>) {
        for &symbol in &self.symbols {
            let (distance, low) = ((symbol >> 8) as usize, (symbol & 0xff) as usize);
            if distance == 0 {
                let code = literals[low];
                bits.put(code & 0xffff, code >> 16, out);
                continue;
            }
            let length_code = usize::from(LENGTH_CODES.0[low]);
            let code = literals[END + 1 + length_code];
            let extra = low as u32 - u32::from(LENGTH_CODES.1[length_code]);
            let n = code >> 16;
            bits.put(code & 0xffff | extra << n, n + u32::from(LENGTH_EXTRA[length_code]), out);
            let distance_code = distance_code(distance - 1);
            let code = distances[distance_code];
            let extra = distance as u32 - 1 - u32::from(DISTANCE_CODES.1[distance_code]);
            let n = code >> 16;
            bits.put(code & 0xffff | extra << n, n + u32::from(DISTANCE_EXTRA[distance_code]), out);
        }
        let code = literals[END];
        bits.put(code & 0xffff, code >> 16, out);
    }
}

/// The code lengths of a tree, up to the last symbol that has a code.
struct Tree {
    lengths: Vec<u8>,
}

/// The estimated length of a block in bits, with dynamic and with static codes.
#[derive(Default)]
struct Size {
    dynamic: i64,
    fixed: i64,
}

impl Size {
    /// Chooses code lengths of at most `most` bits for symbols of these frequencies, and adds what they cost. Symbols
    /// from `base` on have `extra` bits. `fixed` are the lengths of the static codes, where there are any.
    fn build(&mut self, frequencies: &[u32], extra: &[u8], base: usize, most: usize, fixed: &[u8]) -> Tree {
        /// Leaves, and the nodes above them.
        const NODES: usize = 2 * LITERALS + 1;
        let n = frequencies.len();
        let mut weight = [0u32; NODES];
        let mut depth = [0u8; NODES];
        let mut parent = [0u16; NODES];
        let mut length = [0u8; NODES];
        weight[..n].copy_from_slice(frequencies);
        // A heap from 1 on; at its end the nodes in the order in which they were taken off it.
        let mut heap = Heap { nodes: [0; NODES], len: 0 };
        let mut last = None;
        for (i, _) in frequencies.iter().enumerate().filter(|(_, f)| **f != 0) {
            heap.len += 1;
            heap.nodes[heap.len] = i as u16;
            last = Some(i);
        }
        // Every tree gets two codes at least. Those that are added for it cost nothing.
        while heap.len < 2 {
            let node = match last {
                None => 0,
                Some(l) if l < 2 => l + 1,
                Some(_) => 0,
            };
            if last.is_none_or(|l| l < 2) {
                last = Some(node);
            }
            heap.len += 1;
            heap.nodes[heap.len] = node as u16;
            weight[node] = 1;
            self.dynamic -= 1;
            self.fixed -= fixed.get(node).map_or(0, |&bits| bits.into());
        }
        let last = last.unwrap_or_default();
        for i in (1..=heap.len / 2).rev() {
            heap.sift(i, &weight, &depth);
        }
        let mut taken = NODES;
        let mut node = n;
        loop {
            let first = heap.nodes[1];
            heap.nodes[1] = heap.nodes[heap.len];
            heap.len -= 1;
            heap.sift(1, &weight, &depth);
            let second = heap.nodes[1];
            heap.nodes[taken - 1] = first;
            heap.nodes[taken - 2] = second;
            taken -= 2;
            let (a, b) = (usize::from(first), usize::from(second));
            weight[node] = weight[a] + weight[b];
            depth[node] = depth[a].max(depth[b]) + 1;
            parent[a] = node as u16;
            parent[b] = node as u16;
            heap.nodes[1] = node as u16;
            node += 1;
            heap.sift(1, &weight, &depth);
            if heap.len < 2 {
                break;
            }
        }
        taken -= 1;
        heap.nodes[taken] = heap.nodes[1];

        // Lengths from the root downwards; those that are too long are cut first and put right after.
        let order = &heap.nodes[taken..];
        let mut counts = [0i32; 16];
        let mut overflow = 0;
        for &i in &order[1..] {
            let i = usize::from(i);
            let mut bits = usize::from(length[usize::from(parent[i])]) + 1;
            if bits > most {
                bits = most;
                overflow += 1;
            }
            length[i] = bits as u8;
            if i > last {
                continue;
            }
            counts[bits] += 1;
            let more = if i >= base { i64::from(extra[i - base]) } else { 0 };
            let weight = i64::from(weight[i]);
            self.dynamic += weight * (bits as i64 + more);
            self.fixed += weight * fixed.get(i).map_or(0, |&bits| i64::from(bits) + more);
        }
        if overflow > 0 {
            while overflow > 0 {
                let mut bits = most - 1;
                while counts[bits] == 0 {
                    bits -= 1;
                }
                // A leaf moves one down, and one that is too long becomes its brother.
                counts[bits] -= 1;
                counts[bits + 1] += 2;
                counts[most] -= 1;
                overflow -= 2;
            }
            let mut leaves = order.iter().rev().map(|&i| usize::from(i)).filter(|&i| i <= last);
            for bits in (1..=most).rev() {
                for i in leaves.by_ref().take(counts[bits] as usize) {
                    if usize::from(length[i]) != bits {
                        self.dynamic += (bits as i64 - i64::from(length[i])) * i64::from(weight[i]);
                        length[i] = bits as u8;
                    }
                }
            }
        }
        Tree { lengths: length[..=last].to_vec() }
    }
}

/// The least frequent node first, of those the least deep.
struct Heap {
    nodes: [u16; 2 * LITERALS + 1],
    len: usize,
}

impl Heap {
    fn sift(&mut self, mut at: usize, weight: &[u32], depth: &[u8]) {
        let smaller = |a: u16, b: u16| {
            let (a, b) = (usize::from(a), usize::from(b));
            weight[a] < weight[b] || weight[a] == weight[b] && depth[a] <= depth[b]
        };
        let node = self.nodes[at];
        let mut child = at * 2;
        while child <= self.len {
            if child < self.len && smaller(self.nodes[child + 1], self.nodes[child]) {
                child += 1;
            }
            if smaller(node, self.nodes[child]) {
                break;
            }
            self.nodes[at] = self.nodes[child];
            at = child;
            child *= 2;
        }
        self.nodes[at] = node;
    }
}

/// Code lengths as they are written: symbols, with what stands in the extra bits of those that repeat.
fn run_lengths(lengths: &[u8]) -> Vec<(u8, u8)> {
    let mut out = Vec::with_capacity(lengths.len());
    let mut before = None;
    let mut at = 0;
    while at < lengths.len() {
        let length = lengths[at];
        // The first of a run of another length than the one before cannot be a repeat of it.
        let most = match (length, before == Some(length)) {
            (0, _) => 138,
            (_, true) => 6,
            (_, false) => 7,
        };
        let run = lengths[at..].iter().take(most).take_while(|&&l| l == length).count();
        let least = if length == 0 || before == Some(length) { 3 } else { 4 };
        if run < least {
            out.extend(std::iter::repeat_n((length, 0), run));
        } else if length != 0 {
            let mut repeats = run;
            if before != Some(length) {
                out.push((length, 0));
                repeats -= 1;
            }
            out.push((REPEAT, repeats as u8 - 3));
        } else if run <= 10 {
            out.push((ZEROS, run as u8 - 3));
        } else {
            out.push((MANY_ZEROS, run as u8 - 11));
        }
        before = Some(length);
        at += run;
    }
    out
}

/// The codes of these lengths: the bits in the lower half, the first lowest, their number in the upper half.
fn codes(lengths: &[u8]) -> Vec<u32> {
    let mut counts = [0u32; 16];
    for &length in lengths {
        counts[usize::from(length)] += 1;
    }
    counts[0] = 0;
    let mut next = [0u32; 16];
    for bits in 1..16 {
        next[bits] = (next[bits - 1] + counts[bits - 1]) << 1;
    }
    let code = |&length: &u8| {
        if length == 0 {
            return 0;
        }
        let code = next[usize::from(length)];
        next[usize::from(length)] += 1;
        (code.reverse_bits() >> (32 - u32::from(length))) | u32::from(length) << 16
    };
    lengths.iter().map(code).collect()
}
