//! Bodies: bytes of a file from one position to another, in chunks that are read ahead of the client by one.
//!
//! A file is read where it is made (`Live`), or out of the cache (`Made`). Who asks for all of it gets its last bytes only
//! when its digest was right, and a connection that breaks otherwise: no client takes for whole what is damaged. What is in
//! the cache, whole, and goes out over HTTP/1.1 without TLS is sent by the kernel (`mapped`).
//!
//! Memory for chunks is bounded ([`Buffers`]): each download may always have two short ones, and longer ones while there is
//! room for them. Chunks grow with what the client takes; who takes nothing holds short ones.

use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::cache::Wanted;
use super::clients::{Full, Places};
use super::flow::Flow;
use super::mapped::Mapped;
use super::metrics::Metrics;
use super::pool::Pool;
use crate::digest::{Digest, Hasher};
use crate::source::Source;

/// The longest chunk, in bytes. Above 256 KiB each would be mapped anew (`memory::return_large_blocks`).
const CHUNK: u64 = 192 << 10;

/// The shortest chunk, and the first of each download.
const MIN_CHUNK: u64 = 32 << 10;

/// What a download may always hold: a chunk that is being sent, and one that is read ahead.
const SHARE: u64 = 2 * MIN_CHUNK;

/// What memory is counted in, in bytes: a semaphore counts no higher than 2^29 on small machines.
const UNIT: u64 = 1 << 10;

/// As much as is given to the kernel to send at a time.
const SLICE: usize = 1 << 20;

/// Where bytes come from.
#[derive(Clone)]
pub enum Content {
    /// From sources; all of it has this digest.
    Live(Arc<dyn Source>, Digest),
    /// From the cache, which has checked it.
    Made(Wanted),
}

/// Memory for what is on its way to clients.
pub struct Buffers {
    /// Half of it: `SHARE` for each download.
    downloads: Arc<Places>,
    /// The other half, for what is longer, in `UNIT`s.
    extra: Arc<Semaphore>,
    units: u32,
}

impl Buffers {
    /// Least and most memory for buffers, in bytes.
    const SIZES: (u64, u64) = (16 << 20, 128 << 20);

    /// How much of `memory`, in bytes, is for buffers.
    pub fn part_of(memory: u64) -> u64 {
        (memory / 4).clamp(Self::SIZES.0, Self::SIZES.1)
    }

    /// `size` bytes, for downloads of which a client may have `per_client`; 0 is no limit.
    pub fn new(size: u64, per_client: usize) -> Self {
        let units = (size / 2 / UNIT) as u32;
        let downloads = Places::new((size / 2 / SHARE) as usize, per_client);
        Self { downloads, extra: Arc::new(Semaphore::new(units as usize)), units }
    }

    /// Takes the place of a download, which is kept until its last byte has been taken.
    pub fn enter(&self, flow: &Arc<Flow>) -> Result<(), Full> {
        let place = flow.enter(&self.downloads)?;
        flow.keep(place);
        Ok(())
    }

    fn units(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.units)
    }

    /// Takes memory for an answer of `size` bytes that is in memory as a whole; waits for it, if it must.
    pub async fn whole(&self, size: u64) -> Option<OwnedSemaphorePermit> {
        self.extra.clone().acquire_many_owned(self.units(size.saturating_sub(SHARE))).await.ok()
    }

    /// Takes memory for a chunk of up to `wanted` bytes, and says how long it may be.
    fn chunk(&self, wanted: u64) -> (u64, Option<OwnedSemaphorePermit>) {
        let units = self.units(wanted.saturating_sub(MIN_CHUNK));
        match self.extra.clone().try_acquire_many_owned(units) {
            Ok(permit) => (wanted, Some(permit)),
            Err(_) => (MIN_CHUNK, None),
        }
    }
}

/// What all bodies share.
pub struct Reading {
    /// Threads that read out of sources: each may take the memory that decoding a cluster takes, and wait for a registry.
    pub sources: Pool,
    /// Threads that read out of the cache, which wait for nothing but its disk.
    pub files: Pool,
    /// Memory for what is read.
    pub buffers: Buffers,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Counts a body as long as it is there.
struct Sending(Arc<Reading>);

impl Sending {
    fn new(shared: &Arc<Reading>) -> Self {
        shared.metrics.streams.add(1);
        Self(shared.clone())
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.metrics.streams.less();
    }
}

/// Reads the rest of a file.
struct Rest {
    content: Content,
    name: String,
    pos: u64,
    end: u64,
    /// Whether this is all of the file.
    whole: bool,
    /// The hash of what was read of all of a file that nobody has checked yet.
    hash: Option<Hasher<io::Sink>>,
    ahead: Option<JoinHandle<Chunk>>,
    /// The length of the next chunk, and memory for it.
    next: (u64, Option<OwnedSemaphorePermit>),
    shared: Arc<Reading>,
    _sending: Sending,
}

type Chunk = io::Result<(Bytes, Option<Hasher<io::Sink>>)>;

/// Bytes, and the memory that was taken for them.
struct Held(
    Vec<u8>,
    #[allow(dead_code, reason = "given back when it is dropped")] Option<OwnedSemaphorePermit>,
);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The bytes `range` of a file of `size` bytes that is called `name`. `direct` if nothing encrypts or copies them on their
/// way to the socket, so that the kernel may send them.
pub fn body(
    content: Content,
    name: &str,
    range: Range<u64>,
    size: u64,
    shared: &Arc<Reading>,
    flow: &Flow,
    direct: bool,
) -> Body {
    let sending = Sending::new(shared);
    if direct
        && let Content::Made(made) = &content
        && let Some(mapped) = made.mapped()
    {
        // It takes no memory.
        flow.give_back();
        return slices(made.clone(), mapped.clone(), range.start as usize..range.end as usize, sending);
    }
    let whole = range == (0..size);
    let hash = matches!(content, Content::Live(..)) && whole;
    let rest = Rest {
        content,
        name: name.to_owned(),
        pos: range.start,
        end: range.end,
        whole,
        hash: hash.then(|| Hasher::new(io::sink())),
        ahead: None,
        next: (MIN_CHUNK, None),
        shared: shared.clone(),
        _sending: sending,
    };
    Body::from_stream(futures_util::stream::try_unfold(rest, Rest::next))
}

/// Bytes that are there. What is being sent stays in the cache: its space would not become free.
fn slices(made: Wanted, mapped: Arc<Mapped>, range: Range<usize>, sending: Sending) -> Body {
    let starts = range.clone().step_by(SLICE);
    Body::from_stream(futures_util::stream::iter(starts.map(move |start| {
        let _while_sending = (&made, &sending);
        Ok::<_, io::Error>(mapped.slice(start..range.end.min(start + SLICE)))
    })))
}

impl Rest {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.pos == self.end {
            return Ok(None);
        }
        let ahead = match self.ahead.take() {
            Some(ahead) => ahead,
            None => {
                self.wait().await?;
                self.start()
            }
        };
        let chunk = ahead.await.map_err(io::Error::other).and_then(|chunk| chunk);
        let (bytes, hash) = chunk.inspect_err(|e| {
            tracing::error!("{}: {e}", self.name);
            let metrics = &self.shared.metrics;
            let mismatch = self.whole && e.kind() == io::ErrorKind::InvalidData;
            if mismatch { &metrics.mismatches } else { &metrics.upstream_errors }.add(1);
        })?;
        self.hash = hash;
        self.pos += bytes.len() as u64;
        self.next = self.shared.buffers.chunk(CHUNK.min(2 * bytes.len() as u64).max(MIN_CHUNK));
        if self.pos < self.end && self.is_ready() == Some(true) {
            self.ahead = Some(self.start());
        }
        Ok(Some((bytes, self)))
    }

    /// The end of the next chunk.
    fn until(&self) -> u64 {
        self.end.min(self.pos + self.next.0)
    }

    /// Whether the next chunk can be read now, or never.
    fn is_ready(&self) -> Option<bool> {
        let Content::Made(made) = &self.content else { return Some(true) };
        let stage = *made.stage().borrow();
        match stage.end {
            // Not the last bytes, nor a part that nothing would be missing from.
            None => (self.whole && stage.written >= self.until() && self.until() < self.end).then_some(true),
            end => end,
        }
    }

    /// Waits until the next chunk can be read.
    async fn wait(&self) -> io::Result<()> {
        let Content::Made(made) = &self.content else { return Ok(()) };
        let mut stage = made.stage();
        loop {
            stage.borrow_and_update();
            match self.is_ready() {
                Some(true) => return Ok(()),
                Some(false) => return Err(io::Error::other(format!("{}: it could not be made", self.name))),
                None => stage.changed().await.map_err(io::Error::other)?,
            }
        }
    }

    /// Begins to read the next chunk.
    fn start(&mut self) -> JoinHandle<Chunk> {
        let (content, pos, until) = (self.content.clone(), self.pos, self.until());
        let (hash, last) = (self.hash.take(), until == self.end);
        let (shared, memory) = (self.shared.clone(), self.next.1.take());
        tokio::spawn(async move {
            let threads = match content {
                Content::Live(..) => &shared.sources,
                Content::Made(_) => &shared.files,
            };
            let read = move || read(&content, pos..until, memory, hash, last);
            threads.run(read).await.map_err(io::Error::other)?
        })
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if let Some(ahead) = &self.ahead {
            ahead.abort();
        }
    }
}

fn read(
    content: &Content,
    range: Range<u64>,
    memory: Option<OwnedSemaphorePermit>,
    hash: Option<Hasher<io::Sink>>,
    last: bool,
) -> Chunk {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    match content {
        Content::Live(source, _) => source.read_at(range.start, &mut bytes)?,
        Content::Made(made) => made.file.read_exact_at(&mut bytes, range.start)?,
    }
    let bytes = Held(bytes, memory);
    let Some(mut hash) = hash else { return Ok((Bytes::from_owner(bytes), None)) };
    hash.write_all(bytes.as_ref())?;
    if !last {
        return Ok((Bytes::from_owner(bytes), Some(hash)));
    }
    let (found, _) = hash.finish();
    if let Content::Live(_, expected) = content {
        found.must_be(*expected)?;
    }
    Ok((Bytes::from_owner(bytes), None))
}

#[cfg(test)]
mod tests {
    use super::super::clients::Client;
    use super::super::flow::Connection;
    use super::*;

    #[test]
    fn memory_for_downloads_is_bounded() {
        let buffers = Buffers::new(Buffers::part_of(0), 0);
        let connection = Arc::new(Connection::new("x".into(), Client::Local, true));
        let flow = || Flow::new(connection.clone(), None);
        let flows: Vec<_> = (0..(8 << 20) / SHARE).map(|_| flow()).collect();
        flows.iter().for_each(|flow| buffers.enter(flow).unwrap());
        assert!(buffers.enter(&flow()).is_err());
        flows[0].give_back();
        buffers.enter(&flow()).unwrap();
        // Long chunks while there is room, and short ones then.
        let mut chunks = Vec::new();
        while let (CHUNK, permit) = buffers.chunk(CHUNK) {
            chunks.push(permit);
        }
        assert_eq!(chunks.len() as u64, (8 << 20) / (CHUNK - MIN_CHUNK));
        chunks.clear();
        assert_eq!(buffers.chunk(CHUNK).0, CHUNK);
    }
}
