//! Clusters: what must be decoded as a whole to read any byte of it.
//!
//! A frame of a zstd blob, a physical cluster of an EROFS image, a data block or a fragment block of a squashfs image
//! are all the same thing to a reader: an expensive unit that many small ranges come from. A format describes itself
//! as a [`ClusterMap`]; [`Clustered`] makes a source of it whose clusters live in a shared, bounded [`Cache`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use rayon::prelude::*;

use super::{Source, check_range};
use crate::io::Buffers;

/// One use of a cluster by a sequential reader: `len` bytes of it are the bytes at `at` of what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The reader's position, in bytes of the outermost source, when it needs the cluster.
    pub at: u64,
    /// Which cluster.
    pub key: Key,
    /// Offset in the decoded cluster.
    pub offset: u32,
    /// How many bytes of it.
    pub len: u32,
}

/// Names a cluster among all the open sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The number under which the source is registered in its [`Cache`].
    pub source: u32,
    /// The number of the cluster in that source.
    pub cluster: u32,
}

/// The longest cluster that is decoded, in bytes; anything that claims more is refused as hostile. An EROFS cluster decodes
/// to at most 12 MiB, a squashfs block to 1 MiB, and a frame of our own blobs to 16 MiB.
pub const MAX_CLUSTER: u32 = 16 << 20;
/// The longest stored form of a cluster, in bytes: what does not shrink grows a little.
pub const MAX_STORED: u32 = MAX_CLUSTER + (1 << 20);

/// The uses that a reader announces: collected by [`Source::trace`] in the order of reading, within a bound.
///
/// A source that others copy from more than once is visited once for each copy, so a few small deltas over each other can
/// have more uses than any memory holds, and take forever to visit. Collecting ends at the bound; a reader then does
/// without a plan.
pub struct Trace {
    uses: Vec<Use>,
    most: usize,
    steps: u64,
}

/// The most parts of sources that a trace visits: a second or two. That of a disk visits some hundred thousand.
const MAX_STEPS: u64 = 64 << 20;

impl Trace {
    /// An empty trace with room for `most` uses.
    pub fn new(most: usize) -> Self {
        Self { uses: Vec::new(), most, steps: MAX_STEPS }
    }

    /// Counts a visit to a part of a source. `None` when there were too many: stop.
    #[must_use]
    pub fn step(&mut self) -> Option<()> {
        self.steps = self.steps.checked_sub(1)?;
        Some(())
    }

    /// Appends a use. `None` when there are too many: stop.
    #[must_use]
    pub fn push(&mut self, of: Use) -> Option<()> {
        self.step()?;
        (self.uses.len() < self.most).then(|| self.uses.push(of))
    }

    /// The uses of all of `source`; `None` when that has too many.
    pub fn of(source: &dyn Source, most: usize) -> Option<Vec<Use>> {
        let mut trace = Self::new(most);
        source.trace(0, source.len(), 0, &mut trace)?;
        Some(trace.uses)
    }
}

/// Decodes the clusters of one image.
pub trait ClusterCodec: Send + Sync {
    /// How many clusters there are.
    fn count(&self) -> u32;

    /// The decoded length of cluster `id < count()`, in bytes, at most [`MAX_CLUSTER`]; known without decoding.
    fn decoded_len(&self, id: u32) -> u32;

    /// Whether decoding takes so little time that no memory is worth keeping a cluster in until it is used again.
    fn quick(&self) -> bool {
        false
    }

    /// Decodes cluster `id < count()` into exactly `decoded_len(id)` bytes. Pure but for reading the image; called
    /// from several threads at once. `buffer` is empty and may become the result.
    fn decode(&self, id: u32, buffer: Vec<u8>) -> io::Result<Vec<u8>>;
}

/// Where the bytes of an [`Extent`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From `offset` on in the decoded bytes of cluster `id`.
    Cluster {
        /// The cluster.
        id: u32,
        /// Offset in its decoded bytes.
        offset: u32,
    },
    /// From `offset` on in the image itself: stored uncompressed.
    Image {
        /// Offset in the image, in bytes.
        offset: u64,
    },
    /// Zero bytes: holes and padding.
    Zeros,
}

/// A run of bytes with one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the source that the map describes. Extents are sorted and leave no gap.
    pub start: u64,
    /// How long it is, in bytes; never 0.
    pub len: u64,
    /// Where its bytes come from.
    pub origin: Origin,
}

/// A source described as runs of bytes out of clusters.
pub struct ClusterMap {
    /// The length of the source, in bytes.
    pub len: u64,
    /// What each byte of it is, in order.
    pub extents: Vec<Extent>,
    /// Decodes the clusters.
    pub codec: Arc<dyn ClusterCodec>,
}

impl ClusterMap {
    /// The memory that its tables take, in bytes.
    pub fn memory(&self) -> u64 {
        /// What a codec keeps for a cluster: where it is, and how long.
        const CLUSTER: u64 = 32;
        (self.extents.len() * size_of::<Extent>()) as u64 + u64::from(self.codec.count()) * CLUSTER
    }
}

/// A source whose bytes come out of clusters.
pub struct Clustered {
    len: u64,
    extents: Vec<Extent>,
    image: Arc<dyn Source>,
    cache: Arc<Cache>,
    /// What this source is called in `cache`.
    source: u32,
}

impl Clustered {
    /// The source that `map` describes; `image` is where its [`Origin::Image`] extents lie.
    pub fn new(map: ClusterMap, image: Arc<dyn Source>, cache: Arc<Cache>) -> Self {
        let source = cache.register(map.codec);
        Self { len: map.len, extents: map.extents, image, cache, source }
    }

    /// Calls `visit` with each part of an extent in `offset..offset + len`: its start, its length, where it is from.
    fn each<E>(
        &self,
        offset: u64,
        len: u64,
        visit: &mut dyn FnMut(u64, u64, Origin) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = offset + len;
        let first = self.extents.partition_point(|e| e.start + e.len <= offset);
        for extent in self.extents[first..].iter().take_while(|e| e.start < end) {
            let from = extent.start.max(offset);
            let skip = from - extent.start;
            let n = (extent.start + extent.len).min(end) - from;
            let origin = match extent.origin {
                Origin::Cluster { id, offset } => Origin::Cluster { id, offset: offset + skip as u32 },
                Origin::Image { offset } => Origin::Image { offset: offset + skip },
                Origin::Zeros => Origin::Zeros,
            };
            visit(from, n, origin)?;
        }
        Ok(())
    }
}

impl Source for Clustered {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len, offset, buf.len())?;
        self.each(offset, buf.len() as u64, &mut |from, n, origin| {
            let out = &mut buf[(from - offset) as usize..][..n as usize];
            match origin {
                Origin::Zeros => out.fill(0),
                Origin::Image { offset } => self.image.read_at(offset, out)?,
                Origin::Cluster { id, offset } => {
                    let decoded = self.cache.get(Key { source: self.source, cluster: id })?;
                    let len = decoded.len();
                    if len < offset as usize + out.len() {
                        return Err(short(id, len, offset, out.len()));
                    }
                    decoded.read_at(offset as usize, out)?;
                }
            }
            Ok(())
        })
    }

    fn zeros_at(&self, offset: u64) -> u64 {
        let i = self.extents.partition_point(|e| e.start + e.len <= offset);
        match self.extents.get(i) {
            Some(e) if e.origin == Origin::Zeros => e.start + e.len - offset,
            _ => 0,
        }
    }

    fn trace(&self, offset: u64, len: u64, at: u64, trace: &mut Trace) -> Option<()> {
        let len = len.min(self.len.saturating_sub(offset));
        let visited = self.each(offset, len, &mut |from, n, origin| {
            let done = match origin {
                Origin::Cluster { id, offset: inner } => trace.push(Use {
                    at: at + (from - offset),
                    key: Key { source: self.source, cluster: id },
                    offset: inner,
                    len: n as u32,
                }),
                Origin::Image { .. } | Origin::Zeros => trace.step(),
            };
            done.ok_or(())
        });
        visited.ok()
    }
}

fn short(cluster: u32, has: usize, offset: u32, wanted: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("cluster {cluster} has {has} bytes: {wanted} at {offset} are wanted"),
    )
}

/// The decoded clusters of all the sources that a reader has open, within a bound.
///
/// A reader that knows what it will read says so with [`Cache::with_plan`]; from then on nothing is kept that will not be
/// used again, what has to go is what is needed last (which no order of eviction beats), and `Cache::decode_ahead` decodes
/// ahead of the reader on other cores. Clusters that are not needed soon are packed once room is short, and read packed.
/// Without a plan it is a least-recently-used cache.
///
/// The budget is for the tables of the open sources too: see [`Cache::reserve`].
pub struct Cache {
    codecs: RwLock<Vec<Arc<dyn ClusterCodec>>>,
    state: Mutex<State>,
    /// Something was loaded, the reader moved on, or the plan ended.
    changed: Condvar,
    /// Bytes that may be held.
    budget: u64,
    /// Bytes of the tables of open sources.
    tables: AtomicU64,
    buffers: Buffers,
}

/// Bytes that tables may take beside the budget: more than a release needs. Beyond that they take up to half of the budget.
const FREE_TABLES: u64 = 64 << 20;

/// Memory for each use of a plan, in bytes: itself, the index of the next, and its cluster in the map of the last ones.
const PLANNED_USE: u64 = 64;

/// What a reader of a whole source may have decoded: so many bytes to begin with, and so many for each byte that it has read.
/// A cache that is much too small decodes some hundred bytes for each; a recipe made to that end, ten million.
const FIRST_WORK: u64 = 256 << 20;
const WORK_PER_BYTE: u64 = 1024;

/// What a reader may have decoded when it has read `len` bytes.
fn work_for(len: u64) -> u64 {
    len.saturating_mul(WORK_PER_BYTE).saturating_add(FIRST_WORK)
}

/// Counts the bytes that are decoded on behalf of one reader, on whatever threads.
struct Meter {
    done: AtomicU64,
    allowed: AtomicU64,
}

thread_local! {
    /// What counts the decoding that this thread does.
    static METER: RefCell<Option<Arc<Meter>>> = const { RefCell::new(None) };
}

/// Runs `f`, in which at most `bytes` are decoded: beyond that, every read of a cluster fails. A few bytes of a recipe can
/// otherwise have the same expensive clusters decoded again and again. An inner limit counts for itself.
pub fn limited<R>(bytes: u64, f: impl FnOnce() -> R) -> R {
    metered(Some(Arc::new(Meter { done: AtomicU64::new(0), allowed: AtomicU64::new(bytes) })), f)
}

/// Runs `f` with decoding counted by `meter`.
fn metered<R>(meter: Option<Arc<Meter>>, f: impl FnOnce() -> R) -> R {
    /// Puts back the meter before, also when `f` panics.
    struct Before(Option<Arc<Meter>>);
    impl Drop for Before {
        fn drop(&mut self) {
            METER.set(self.0.take());
        }
    }
    let _before = Before(METER.replace(meter));
    f()
}

/// The meter of this thread, for another that works for it.
fn meter() -> Option<Arc<Meter>> {
    METER.with_borrow(Option::clone)
}

/// Counts the decoding of `len` bytes.
fn count_work(len: u32) -> io::Result<()> {
    METER.with_borrow(|meter| {
        let Some(meter) = meter else { return Ok(()) };
        let done = meter.done.fetch_add(len.into(), Ordering::Relaxed).saturating_add(len.into());
        let allowed = meter.allowed.load(Ordering::Relaxed);
        if done > allowed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more than {allowed} bytes would have to be decoded for the little that is read"),
            ));
        }
        Ok(())
    })
}

/// One part in so many of the budget may always be held uncompressed, and so far ahead of the reader is decoded when
/// there is no room for more.
const HOT_SHARE: u64 = 4;

/// So far ahead of the reader is decoded at most, in bytes of what it reads: enough for many cores, and no more memory
/// than that where decoding is faster than the reader.
const AHEAD: u64 = 64 << 20;

/// zstd's fastest ordinary level: packs at 400 MB/s, unpacks at 1 GB/s, ten times as fast as LZMA decodes.
const COLD_LEVEL: i32 = 1;

/// So much of a cluster is unpacked for any byte of it, in bytes. A disk has the files of a cluster here and there.
const PIECE: usize = 64 << 10;

#[derive(Default)]
struct State {
    entries: HashMap<Key, Entry>,
    /// The uses that the reader announced, in the order of reading; empty without a plan.
    plan: Vec<Use>,
    /// For each use the index of the next use of the same cluster; `usize::MAX` for its last.
    next: Vec<usize>,
    /// The first use that the reader has not passed.
    reader: usize,
    /// The first use whose cluster may still have to be decoded ahead.
    ahead: usize,
    /// Where the reader is.
    at: u64,
    /// Bytes held uncompressed, and all bytes held.
    hot: u64,
    held: u64,
    /// Bytes that are being decoded ahead of the reader.
    loading: u64,
    /// Counts reads: the clock of a cache without a plan.
    ticks: usize,
    stats: Stats,
}

/// What a cache did for its last plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// How many different clusters the plan named.
    pub clusters: u64,
    /// How often one of them was decoded.
    pub decodes: u64,
}

struct Entry {
    data: Data,
    /// When it is needed again: an index into the plan, or, without one, the larger the longer ago it was used. The
    /// largest goes first.
    next: usize,
}

#[derive(Clone)]
enum Data {
    /// A thread is decoding or packing it.
    Busy,
    Hot(Arc<Vec<u8>>),
    Cold(Arc<Packed>),
}

impl Data {
    /// The decoded length.
    fn len(&self) -> usize {
        match self {
            Data::Busy => 0,
            Data::Hot(bytes) => bytes.len(),
            Data::Cold(packed) => packed.len,
        }
    }

    /// Bytes held uncompressed, and all bytes held.
    fn held(&self) -> (u64, u64) {
        match self {
            Data::Busy => (0, 0),
            Data::Hot(bytes) => (bytes.len() as u64, bytes.len() as u64),
            Data::Cold(packed) => (0, packed.pieces.iter().map(|piece| piece.len() as u64).sum()),
        }
    }

    /// Reads what is not beyond [`len`](Self::len).
    fn read_at(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        match self {
            Data::Busy => {}
            Data::Hot(bytes) => out.copy_from_slice(&bytes[offset..offset + out.len()]),
            Data::Cold(packed) => packed.read_at(offset, out)?,
        }
        Ok(())
    }
}

/// A cluster that waits for its next use.
struct Packed {
    len: usize,
    /// Frames of zstd, each of [`PIECE`] bytes but the last.
    pieces: Vec<Vec<u8>>,
}

impl Packed {
    fn new(bytes: &[u8]) -> io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(COLD_LEVEL)?;
        let pieces = bytes.chunks(PIECE).map(|piece| zstd.compress(piece)).collect::<io::Result<_>>()?;
        Ok(Self { len: bytes.len(), pieces })
    }

    fn read_at(&self, mut offset: usize, mut out: &mut [u8]) -> io::Result<()> {
        let mut zstd = zstd::bulk::Decompressor::new()?;
        let mut plain = Vec::with_capacity(PIECE);
        while !out.is_empty() {
            plain.clear();
            zstd.decompress_to_buffer(&self.pieces[offset / PIECE], &mut plain)?;
            let part = &plain[offset % PIECE..];
            let (now, later) = out.split_at_mut(part.len().min(out.len()));
            now.copy_from_slice(&part[..now.len()]);
            offset += now.len();
            out = later;
        }
        Ok(())
    }
}

impl Cache {
    /// A cache that holds at most `budget` bytes of decoded clusters, besides those being decoded.
    pub fn new(budget: u64) -> Arc<Self> {
        Arc::new(Self {
            codecs: RwLock::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            budget,
            tables: AtomicU64::new(0),
            buffers: Buffers::default(),
        })
    }

    /// Bytes that the tables of sources may still take.
    pub fn table_room(&self) -> u64 {
        (FREE_TABLES + self.budget / 2).saturating_sub(self.tables.load(Ordering::Relaxed))
    }

    /// Takes `bytes` for the tables of a source that stays open, out of what clusters may take: for `what`, as the error
    /// calls it.
    pub fn reserve(&self, bytes: u64, what: &str) -> io::Result<()> {
        let most = FREE_TABLES + self.budget / 2;
        let before = self.tables.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > most {
            self.tables.fetch_sub(bytes, Ordering::Relaxed);
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!(
                    "{what} take {bytes} bytes of memory beside {before} that are taken: at most {most} are allowed, and more \
                     with a larger --memory"
                ),
            ));
        }
        Ok(())
    }

    /// Bytes of clusters that may be held.
    fn room(&self) -> u64 {
        self.budget.saturating_sub(self.tables.load(Ordering::Relaxed).saturating_sub(FREE_TABLES))
    }

    /// The plan for reading all of `source`; none, an empty one, when that has too many uses.
    pub fn plan(&self, source: &dyn Source) -> Vec<Use> {
        let most = usize::try_from(self.table_room() / PLANNED_USE).unwrap_or(usize::MAX);
        Trace::of(source, most).unwrap_or_default()
    }

    fn register(&self, codec: Arc<dyn ClusterCodec>) -> u32 {
        let mut codecs = self.codecs.write().unwrap_or_else(PoisonError::into_inner);
        codecs.push(codec);
        codecs.len() as u32 - 1
    }

    fn codec(&self, source: u32) -> Arc<dyn ClusterCodec> {
        self.codecs.read().unwrap_or_else(PoisonError::into_inner)[source as usize].clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decodes a cluster past the cache: for who needs each just once.
    pub fn decode(&self, key: Key) -> io::Result<Vec<u8>> {
        let codec = self.codec(key.source);
        count_work(codec.decoded_len(key.cluster))?;
        let bytes = codec.decode(key.cluster, self.buffers.take())?;
        if bytes.len() != codec.decoded_len(key.cluster) as usize {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "cluster {}: decoded to {} bytes instead of {}",
                    key.cluster,
                    bytes.len(),
                    codec.decoded_len(key.cluster)
                ),
            ));
        }
        Ok(bytes)
    }

    /// Writes all of `source` to `file`, which is empty, on all cores. Goes through the clusters in their own order and
    /// decodes each once, whatever the order in which `source` has them; memory is that of a cluster for each core. Gives
    /// the number of clusters.
    ///
    /// A source with too many uses to plan is written in its own order.
    pub fn scatter(&self, source: &dyn Source, file: &File) -> io::Result<usize> {
        limited(work_for(source.len()), || self.scatter_limited(source, file))
    }

    fn scatter_limited(&self, source: &dyn Source, file: &File) -> io::Result<usize> {
        let mut uses = self.plan(source);
        file.set_len(source.len())?;
        // What is in no cluster, in order.
        let mut buf = vec![0; 1 << 20];
        let mut pos = 0;
        let ends = uses.iter().map(|u| (u.at, u.at + u64::from(u.len)));
        for (start, end) in ends.chain([(source.len(), source.len())]) {
            while pos < start {
                let zeros = source.zeros_at(pos);
                let n = if zeros > 0 { zeros.min(start - pos) } else { (start - pos).min(buf.len() as u64) };
                if zeros == 0 {
                    source.read_at(pos, &mut buf[..n as usize])?;
                    file.write_all_at(&buf[..n as usize], pos)?;
                }
                pos += n;
            }
            pos = end;
        }
        uses.sort_unstable_by_key(|u| (u.key, u.at));
        let clusters: Vec<&[Use]> = uses.chunk_by(|a, b| a.key == b.key).collect();
        let meter = meter();
        clusters.par_iter().try_for_each(|uses| {
            let bytes = metered(meter.clone(), || self.decode(uses[0].key))?;
            for u in *uses {
                let part = bytes.get(u.offset as usize..u.offset as usize + u.len as usize);
                let part = part.ok_or_else(|| short(u.key.cluster, bytes.len(), u.offset, u.len as usize))?;
                file.write_all_at(part, u.at)?;
            }
            self.buffers.give(bytes);
            io::Result::Ok(())
        })?;
        Ok(clusters.len())
    }

    /// A cluster, decoded; never `Busy`.
    fn get(&self, key: Key) -> io::Result<Data> {
        let mut state = self.state();
        loop {
            state.ticks += 1;
            let now = usize::MAX - state.ticks;
            let unplanned = state.plan.is_empty();
            let Some(entry) = state.entries.get_mut(&key) else { break };
            if unplanned {
                entry.next = now;
            }
            match &entry.data {
                Data::Busy => state = self.wait(state),
                data => return Ok(data.clone()),
            }
        }
        // When evicted, or not in the plan, it is being used now, so its next use is the reader's.
        let next = if state.plan.is_empty() { usize::MAX - state.ticks } else { state.reader };
        state.entries.insert(key, Entry { data: Data::Busy, next });
        drop(state);
        self.load(key)
    }

    /// Decodes a cluster whose entry is `Busy`, and keeps it.
    fn load(&self, key: Key) -> io::Result<Data> {
        let decoded = self.decode(key);
        let mut state = self.state();
        match decoded {
            Ok(bytes) => {
                let data = Data::Hot(Arc::new(bytes));
                state.stats.decodes += 1;
                state.put(key, data.clone());
                self.shrink(state);
                self.changed.notify_all();
                Ok(data)
            }
            Err(e) => {
                state.entries.remove(&key);
                self.changed.notify_all();
                Err(e)
            }
        }
    }

    /// Takes back the buffer of a cluster that nobody reads any more.
    fn reuse(&self, bytes: Arc<Vec<u8>>) {
        if let Some(bytes) = Arc::into_inner(bytes) {
            self.buffers.give(bytes);
        }
    }

    /// Packs and evicts until what is held is within the budget.
    fn shrink<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        let room = self.room();
        while state.held > room {
            let pack = !state.plan.is_empty() && state.hot > room / HOT_SHARE;
            let Some(victim) = state.farthest(|e| !pack || matches!(e.data, Data::Hot(_))) else { return };
            match state.take(victim) {
                Some(Data::Hot(bytes)) if pack => {
                    drop(state);
                    let packed = Packed::new(&bytes);
                    self.reuse(bytes);
                    state = self.state();
                    match packed {
                        Ok(packed) => state.put(victim, Data::Cold(Arc::new(packed))),
                        Err(_) => drop(state.entries.remove(&victim)),
                    }
                    self.changed.notify_all();
                }
                _ => {
                    if let Some(entry) = state.entries.remove(&victim)
                        && entry.next < state.ahead
                    {
                        state.ahead = entry.next;
                    }
                }
            }
        }
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `read`, which reads what `uses` says and reports its position through [`Cache::advance`], with `threads`
    /// threads decoding ahead of it.
    pub fn with_plan<R>(&self, uses: Vec<Use>, threads: usize, read: impl FnOnce() -> R) -> R {
        /// Ends the plan also when `read` panics, so that the threads end.
        struct End<'a>(&'a Cache);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state();
                let stats = state.stats;
                *state = State { stats, ..State::default() };
                self.0.changed.notify_all();
            }
        }
        if uses.is_empty() {
            return limited(FIRST_WORK, read);
        }
        *self.state() = State::planned(uses);
        limited(FIRST_WORK, || {
            std::thread::scope(|scope| {
                let _end = End(self);
                for _ in 0..threads {
                    let meter = meter();
                    scope.spawn(|| metered(meter, || self.decode_ahead()));
                }
                read()
            })
        })
    }

    /// The reader has come to `at`: what is not used from there on is dropped.
    pub fn advance(&self, at: u64) {
        if let Some(meter) = meter() {
            meter.allowed.fetch_max(work_for(at), Ordering::Relaxed);
        }
        let mut state = self.state();
        let before = state.reader;
        state.at = at;
        while let Some(u) = state.plan.get(state.reader).filter(|u| u.at + u64::from(u.len) <= at) {
            let (key, next) = (u.key, state.next[state.reader]);
            state.reader += 1;
            let far = state.plan.get(next).is_some_and(|u| u.at > at.saturating_add(AHEAD));
            let keep = next != usize::MAX && !(far && self.codec(key.source).quick());
            if !keep {
                state.ahead = state.ahead.min(next);
            }
            match state.entries.get_mut(&key) {
                Some(entry) if keep => entry.next = next,
                // Whoever is at it puts it back; it goes first then.
                Some(entry @ Entry { data: Data::Busy, .. }) => entry.next = usize::MAX,
                None => {}
                Some(_) => {
                    if let Some(Data::Hot(bytes)) = state.take(key) {
                        self.reuse(bytes);
                    }
                    state.entries.remove(&key);
                }
            }
        }
        if state.reader != before {
            self.changed.notify_all();
        }
    }

    /// What was done for the last plan.
    pub fn stats(&self) -> Stats {
        self.state().stats
    }

    /// Decodes what the plan names, in its order, not too far ahead and while there is room, until the plan ends.
    fn decode_ahead(&self) {
        let mut state = self.state();
        while !state.plan.is_empty() {
            let Some(i) = state.next_missing() else {
                state = self.wait(state);
                continue;
            };
            let key = state.plan[i].key;
            let len = u64::from(self.codec(key.source).decoded_len(key.cluster));
            // In the place of what is needed later, only what the reader is nearer to: the later something has to go, the
            // better is known what is not needed.
            let within = |bytes| state.plan[i].at <= state.at.saturating_add(bytes);
            let bytes = self.room();
            let room = within(AHEAD) && state.held + state.loading + len <= bytes
                || within(AHEAD.min(bytes / HOT_SHARE))
                    && state.loading + len <= bytes / HOT_SHARE
                    && state.farthest(|_| true).is_some_and(|k| state.entries[&k].next > i);
            if !room {
                state = self.wait(state);
                continue;
            }
            state.entries.insert(key, Entry { data: Data::Busy, next: i });
            state.loading += len;
            drop(state);
            let failed = self.load(key).is_err();
            state = self.state();
            state.loading = state.loading.saturating_sub(len);
            if failed {
                // The reader will come to it, try again, and report it.
                state.ahead = state.ahead.max(i + 1);
            }
        }
    }
}

impl State {
    fn planned(plan: Vec<Use>) -> Self {
        let mut next = vec![usize::MAX; plan.len()];
        let mut later = HashMap::new();
        for (i, u) in plan.iter().enumerate().rev() {
            if let Some(j) = later.insert(u.key, i) {
                next[i] = j;
            }
        }
        let stats = Stats { clusters: later.len() as u64, decodes: 0 };
        Self { plan, next, stats, ..Self::default() }
    }

    /// The first use from `ahead` on whose cluster nobody has.
    fn next_missing(&mut self) -> Option<usize> {
        self.ahead = self.ahead.max(self.reader);
        while self.ahead < self.plan.len() && self.entries.contains_key(&self.plan[self.ahead].key) {
            self.ahead += 1;
        }
        (self.ahead < self.plan.len()).then_some(self.ahead)
    }

    /// Of the entries that `of` says and nobody is at, the one that is needed last.
    fn farthest(&self, of: impl Fn(&Entry) -> bool) -> Option<Key> {
        self.entries
            .iter()
            .filter(|(_, e)| !matches!(e.data, Data::Busy) && of(e))
            .max_by_key(|(key, e)| (e.next, **key))
            .map(|(key, _)| *key)
    }

    /// Takes the bytes out of an entry, which is `Busy` then.
    fn take(&mut self, key: Key) -> Option<Data> {
        let entry = self.entries.get_mut(&key)?;
        let data = std::mem::replace(&mut entry.data, Data::Busy);
        let (hot, held) = data.held();
        self.hot -= hot;
        self.held -= held;
        Some(data)
    }

    /// Puts bytes into a `Busy` entry; nothing when it is gone, as after the end of a plan, or another thread was faster.
    fn put(&mut self, key: Key, data: Data) {
        let Some(entry) = self.entries.get_mut(&key).filter(|e| matches!(e.data, Data::Busy)) else { return };
        let (hot, held) = data.held();
        entry.data = data;
        self.hot += hot;
        self.held += held;
    }
}
