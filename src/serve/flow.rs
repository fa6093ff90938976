//! What is under way: connections, and the bodies on them, counted by the bytes that the client has taken.
//!
//! A body gives hyper one piece at a time, and the next when the client has taken all of that one. So what waits in
//! the buffers of HTTP/2 is one piece for each body, and nothing but bytes taken counts as progress: no ping, no window
//! update. A client has `--timeout` to take a piece, or as long as the piece lasts at [`LOWEST_RATE`]. How long an answer
//! takes to make is not limited: no piece is under way then.

use std::any::Any;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::Extensions;
use bytes::Buf;
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;

use super::clients::{Activity, Client, Full, Place, Places};

/// The lowest rate at which a client may take what it asked for, in bytes a second. Less is no download that ends: a
/// disk image would take weeks.
pub const LOWEST_RATE: u64 = 1 << 10;

/// Whether a client that has taken `taken` bytes in `elapsed` is too slow.
pub fn is_stalled(taken: u64, elapsed: Duration, timeout: Duration) -> bool {
    elapsed >= timeout && (taken as f64) < LOWEST_RATE as f64 * elapsed.as_secs_f64()
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// The address at the other end, for the log.
    pub peer: String,
    /// The client at the other end.
    pub client: Client,
    /// Whether what is sent goes over it as it is, without TLS.
    pub plain: bool,
    /// Requests that are being answered, and bytes that are taken.
    pub activity: Arc<Activity>,
    /// Ends the connection.
    pub close: Notify,
    flows: Mutex<Vec<Weak<Flow>>>,
}

impl Connection {
    /// A connection that has just been made.
    pub fn new(peer: String, client: Client, plain: bool) -> Self {
        let (activity, close, flows) = Default::default();
        Self { peer, client, plain, activity, close, flows }
    }

    /// Resets the streams that are stalled. False if that is no help, and the connection must be closed: on HTTP/1.1, and
    /// for what HTTP/2 still holds after a reset, or has been given the whole of.
    pub fn reset_stalled(&self, timeout: Duration) -> bool {
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.retain(|flow| flow.strong_count() > 0);
        for flow in flows.iter().filter_map(Weak::upgrade).filter(|flow| flow.is_stalled(timeout)) {
            if flow.stream.is_none() || flow.stopped.swap(true, Ordering::Relaxed) {
                return false;
            }
            flow.stop();
        }
        true
    }
}

/// A piece of a body that is under way.
#[derive(Debug)]
struct UnderWay {
    since: Instant,
    taken: u64,
    left: usize,
}

#[derive(Default)]
struct State {
    under_way: Option<UnderWay>,
    waker: Option<Waker>,
    kept: Vec<Box<dyn Any + Send>>,
}

/// A request and its answer, from the head of the one to the last byte of the other.
pub struct Flow {
    /// The connection that it is on.
    pub connection: Arc<Connection>,
    /// When a byte of the answer was taken last.
    pub activity: Arc<Activity>,
    /// Ends the stream of HTTP/2.
    stream: Option<Arc<Notify>>,
    stopped: AtomicBool,
    state: Mutex<State>,
}

impl Flow {
    /// A request on `connection`; `stream` ends its stream, where a connection has several.
    pub fn new(connection: Arc<Connection>, stream: Option<Arc<Notify>>) -> Arc<Self> {
        let activity = Arc::new(Activity::default());
        activity.begin();
        let stopped = AtomicBool::new(false);
        let flow = Arc::new(Self { connection, activity, stream, stopped, state: Mutex::default() });
        let mut flows = flow.connection.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.retain(|flow| flow.strong_count() > 0);
        flows.push(Arc::downgrade(&flow));
        drop(flows);
        flow
    }

    /// The flow of a request, which the connection has put there.
    pub fn of(extensions: &Extensions) -> Option<&Arc<Self>> {
        extensions.get()
    }

    /// Ends it, whatever state it is in.
    pub fn stop(&self) {
        match &self.stream {
            Some(stream) => stream.notify_one(),
            None => self.connection.close.notify_one(),
        }
    }

    /// Takes one of `places`. If another client is to have it, this ends.
    pub fn enter(self: &Arc<Self>, places: &Arc<Places>) -> Result<Place, Full> {
        let flow = Arc::downgrade(self);
        let leave = move || {
            if let Some(flow) = flow.upgrade() {
                flow.stop();
            }
        };
        places.enter(self.connection.client, self.activity.clone(), leave)
    }

    /// Keeps a place, or memory that was taken, until the last byte has been taken.
    pub fn keep(&self, what: impl Any + Send) {
        self.state().kept.push(Box::new(what));
    }

    /// Gives back all that was kept.
    pub fn give_back(&self) {
        let kept = std::mem::take(&mut self.state().kept);
        drop(kept);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stalled(&self, timeout: Duration) -> bool {
        let state = self.state();
        state.under_way.as_ref().is_some_and(|piece| is_stalled(piece.taken, piece.since.elapsed(), timeout))
    }

    /// `n` bytes less are under way.
    fn less(&self, n: usize, taken: bool) {
        let mut state = self.state();
        let mut waker = None;
        if let Some(piece) = &mut state.under_way {
            piece.left = piece.left.saturating_sub(n);
            if taken {
                piece.taken += n as u64;
            }
            if piece.left == 0 {
                state.under_way = None;
                waker = state.waker.take();
            }
        }
        drop(state);
        if taken {
            self.activity.touch();
            self.connection.activity.touch();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Bytes on their way to a client.
pub struct Piece {
    bytes: Bytes,
    flow: Arc<Flow>,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, n: usize) {
        self.bytes.advance(n);
        self.flow.less(n, true);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.flow.less(self.bytes.len(), false);
        }
    }
}

/// A body that gives one piece at a time.
pub struct Paced {
    body: Body,
    flow: Arc<Flow>,
}

impl Paced {
    /// The body of the answer in `flow`.
    pub fn new(body: Body, flow: Arc<Flow>) -> Self {
        Self { body, flow }
    }
}

impl hyper::body::Body for Paced {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        {
            let mut state = self.flow.state();
            if state.under_way.is_some() {
                state.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        let next = Pin::new(&mut self.body).poll_frame(cx);
        next.map_ok(|frame| {
            frame.map_data(|bytes| {
                if !bytes.is_empty() {
                    let piece = UnderWay { since: Instant::now(), taken: 0, left: bytes.len() };
                    self.flow.state().under_way = Some(piece);
                }
                Piece { bytes, flow: self.flow.clone() }
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use hyper::body::Body as _;

    use super::*;

    fn flow(stream: Option<Arc<Notify>>) -> Arc<Flow> {
        Flow::new(Arc::new(Connection::new("x".into(), Client::Local, true)), stream)
    }

    async fn next(body: &mut Paced) -> Piece {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        frame.unwrap().unwrap().into_data().unwrap_or_else(|_| panic!("no data"))
    }

    #[tokio::test]
    async fn the_next_piece_comes_when_the_last_is_taken() {
        let flow = flow(None);
        let pieces = [&b"0123"[..], b"4567"].map(|b| Ok::<_, std::io::Error>(Bytes::from_static(b)));
        let mut body = Paced::new(Body::from_stream(futures_util::stream::iter(pieces)), flow.clone());
        let mut first = next(&mut body).await;
        first.advance(3);
        let waits = tokio::time::timeout(Duration::from_millis(20), next(&mut body)).await;
        assert!(waits.is_err());
        assert!(flow.is_stalled(Duration::ZERO));
        first.advance(1);
        assert!(!flow.is_stalled(Duration::ZERO), "the server is the one to go on");
        // What is thrown away is not under way any more.
        drop(next(&mut body).await);
        assert!(!flow.is_stalled(Duration::ZERO));
    }

    #[test]
    fn the_lowest_rate() {
        let second = Duration::from_secs(1);
        assert!(!is_stalled(0, 29 * second, 30 * second));
        assert!(is_stalled(29 * LOWEST_RATE, 30 * second, 30 * second));
        assert!(!is_stalled(30 * LOWEST_RATE, 30 * second, 30 * second));
        // One byte at a time, just before the time is over, is no progress.
        assert!(is_stalled(100, 300 * second, 30 * second));
    }

    #[tokio::test]
    async fn a_stream_is_reset_before_its_connection_is_closed() {
        let stop = Arc::new(Notify::new());
        let flow = flow(Some(stop.clone()));
        let connection = flow.connection.clone();
        let mut body = Paced::new(Body::from("0123"), flow);
        let piece = next(&mut body).await;
        assert!(connection.reset_stalled(Duration::from_secs(9)));
        assert!(connection.reset_stalled(Duration::ZERO));
        stop.notified().await;
        assert!(!connection.reset_stalled(Duration::ZERO), "it is still there");
        drop((piece, body));
        assert!(connection.reset_stalled(Duration::ZERO));
    }
}
