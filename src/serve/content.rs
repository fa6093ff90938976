//! Bodies: bytes of a file from one position to another, in chunks that are read ahead of the client by one.
//!
//! A file is read where it is made (`Live`), or out of the cache (`Made`). Who asks for all of it gets its last bytes only
//! when its digest was right, and a connection that breaks otherwise: no client takes for whole what is damaged. What is in
//! the cache, whole, and goes out without TLS is sent by the kernel (`mapped`).

use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::cache::Made;
use super::mapped::Mapped;
use super::metrics::Metrics;
use crate::digest::{Digest, Hasher};
use crate::source::Source;

/// The longest chunk, in bytes. Above 256 KiB each would be mapped anew (`memory::return_large_blocks`).
const CHUNK: u64 = 192 << 10;

/// Bytes that chunks may take together, two for each download.
const BUFFERS: u64 = 128 << 20;

/// Chunks are not made shorter than this, however many downloads there are.
const MIN_CHUNK: u64 = 32 << 10;

/// As much as is given to the kernel to send at a time.
const SLICE: usize = 1 << 20;

/// Where bytes come from.
#[derive(Clone)]
pub enum Content {
    /// From sources; all of it has this digest.
    Live(Arc<dyn Source>, Digest),
    /// From the cache, which has checked it.
    Made(Arc<Made>),
}

/// What all bodies share.
pub struct Reading {
    /// How many chunks are made at a time: each may take the memory that decoding a cluster takes.
    pub readers: Semaphore,
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
    shared: Arc<Reading>,
    _sending: Sending,
}

type Chunk = io::Result<(Bytes, Option<Hasher<io::Sink>>)>;

/// The bytes `range` of a file of `size` bytes that is called `name`; `plain` if nothing encrypts them on their way.
pub fn body(
    content: Content,
    name: &str,
    range: Range<u64>,
    size: u64,
    shared: &Arc<Reading>,
    plain: bool,
) -> Body {
    let sending = Sending::new(shared);
    if plain
        && let Content::Made(made) = &content
        && let Some(mapped) = made.mapped()
    {
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
        shared: shared.clone(),
        _sending: sending,
    };
    Body::from_stream(futures_util::stream::try_unfold(rest, Rest::next))
}

/// Bytes that are there. What is being sent stays in the cache: its space would not become free.
fn slices(made: Arc<Made>, mapped: Arc<Mapped>, range: Range<usize>, sending: Sending) -> Body {
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
        if self.pos < self.end && self.is_ready() == Some(true) {
            self.ahead = Some(self.start());
        }
        Ok(Some((bytes, self)))
    }

    /// The end of the next chunk.
    fn until(&self) -> u64 {
        let share = BUFFERS / 2 / self.shared.metrics.streams.get().max(1);
        self.end.min(self.pos + share.clamp(MIN_CHUNK, CHUNK))
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
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let permit = shared.readers.acquire().await.map_err(io::Error::other)?;
            let read = tokio::task::spawn_blocking(move || read(&content, pos, until, hash, last)).await;
            drop(permit);
            read.map_err(io::Error::other)?
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

fn read(content: &Content, pos: u64, until: u64, hash: Option<Hasher<io::Sink>>, last: bool) -> Chunk {
    let mut bytes = vec![0; (until - pos) as usize];
    match content {
        Content::Live(source, _) => source.read_at(pos, &mut bytes)?,
        Content::Made(made) => made.file.read_exact_at(&mut bytes, pos)?,
    }
    let Some(mut hash) = hash else { return Ok((bytes.into(), None)) };
    hash.write_all(&bytes)?;
    if !last {
        return Ok((bytes.into(), Some(hash)));
    }
    let (found, _) = hash.finish();
    if let Content::Live(_, expected) = content {
        found.must_be(*expected)?;
    }
    Ok((bytes.into(), None))
}
