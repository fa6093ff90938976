//! Connections: where they come from, TLS, HTTP/1.1 and HTTP/2 on them, how long they may take, how they end.
//!
//! A client has so many seconds for the headers of a request (`--timeout`), may ask for nothing as long, and must take
//! what it asked for at [`LOWEST_RATE`](super::flow::LOWEST_RATE) on average over that time. How long an answer takes to make is not limited.
//!
//! Accepting never waits: when there are too many connections, an idle one is closed, or one of the client that has most
//! (`clients`), or else the new one is refused with 503.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::clients::{Client, Place, Places};
use super::flow::{Connection, Flow, Paced, is_stalled};
use super::http::RETRY;
use super::mapped;
use super::metrics::Metrics;
use crate::memory;

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 32 << 10;

/// The most headers of a request.
const MAX_HEADERS: usize = 100;

/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 32;

/// Bytes that a stream of HTTP/2 may send before they are read: there are no bodies of requests that are read.
const STREAM_WINDOW: u32 = 16 << 10;

/// The same for a connection: the least that the protocol allows.
const CONNECTION_WINDOW: u32 = (64 << 10) - 1;

/// Bytes of each stream of HTTP/2 that wait to be sent: a piece of a body is given as a whole, whatever this is.
const SEND_BUFFER: usize = 64 << 10;

/// Streams of a connection that a client may reset before they are answered, and errors it may make, before the
/// connection is closed.
const MAX_RESETS: usize = 20;

/// The longest that a TLS handshake may take.
const MAX_HANDSHAKE: Duration = Duration::from_secs(10);

/// How often the number of connections is looked at, and from how many on: when half of them have ended, memory that they
/// had is given back to the system.
const TRIM: (Duration, u64) = (Duration::from_secs(5), 64);

/// How often each connection is looked at.
const TICK: Duration = Duration::from_secs(1);

/// Bytes that wait in the kernel to be sent over a connection. Without a limit it takes megabytes for each slow client,
/// which count as memory of the process where that is limited, and tells of progress as seldom.
const UNSENT: libc::c_int = 128 << 10;

/// Connections that are being told at a time that they are refused; more are closed without a word.
const MAX_REFUSALS: usize = 64;

/// How long a refused client has to read why, and how many bytes of its request are read meanwhile.
const REFUSAL: (Duration, u64) = (Duration::from_secs(1), 16 << 10);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket of the file system.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| format!("expected ADDRESS:PORT or unix:PATH: {text:?}")),
        }
    }
}

/// Limits of connections.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The most connections at a time.
    pub connections: usize,
    /// The most of one client; 0 is no limit.
    pub connections_per_client: usize,
    /// How long a client may take for its part.
    pub timeout: Duration,
    /// How long downloads may go on after the server was told to end.
    pub drain: Duration,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate, followed by those of its authorities, in PEM.
    pub cert: PathBuf,
    /// The key, in PEM.
    pub key: PathBuf,
}

impl TlsFiles {
    fn load(&self) -> Result<Arc<ServerConfig>> {
        let at = || self.cert.display().to_string();
        let certificates: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(&self.cert).with_context(at)?.collect();
        let certificates = certificates.with_context(at)?;
        ensure!(!certificates.is_empty(), "{}: no certificate", at());
        let key = PrivateKeyDer::from_pem_file(&self.key).with_context(|| self.key.display().to_string())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let mut config = config.with_no_client_auth().with_single_cert(certificates, key).with_context(at)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// TLS as it is to be for the next connection.
struct Tls {
    files: TlsFiles,
    now: RwLock<Arc<ServerConfig>>,
}

/// A socket that listens.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Removes the socket from the file system in the end.
struct RemoveSocket(PathBuf);

impl Drop for RemoveSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Sockets that listen.
pub struct Listeners {
    sockets: Vec<Listener>,
    /// Those of `sockets` that are to be removed in the end.
    files: Vec<RemoveSocket>,
    tls: Option<Arc<Tls>>,
}

impl Listeners {
    /// Takes the sockets that systemd hands over, and listens on `addresses`.
    pub fn open(addresses: &[Address], tls: Option<&TlsFiles>) -> Result<Self> {
        let sockets = inherited().context("sockets of systemd")?;
        match addresses {
            [] if sockets.is_empty() => {
                Self::with(sockets, &[Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))], tls)
            }
            given => Self::with(sockets, given, tls),
        }
    }

    /// Listens on `addresses` and nowhere else, without TLS.
    pub fn open_only(addresses: &[Address]) -> Result<Self> {
        Self::with(Vec::new(), addresses, None)
    }

    fn with(mut sockets: Vec<Listener>, addresses: &[Address], tls: Option<&TlsFiles>) -> Result<Self> {
        let tls = tls.map(|files| -> Result<_> {
            let now = RwLock::new(files.load()?);
            Ok(Arc::new(Tls { files: files.clone(), now }))
        });
        let mut files = Vec::new();
        for address in addresses {
            sockets.push(match address {
                Address::Tcp(address) => {
                    let at = || format!("cannot listen on {address}");
                    let listener = std::net::TcpListener::bind(address).with_context(at)?;
                    tcp(listener).with_context(at)?
                }
                Address::Unix(path) => {
                    let at = || format!("cannot listen on {}", path.display());
                    remove_stale(path);
                    let listener = UnixListener::bind(path).with_context(at)?;
                    files.push(RemoveSocket(path.clone()));
                    Listener::Unix(listener)
                }
            });
        }
        Ok(Self { sockets, files, tls: tls.transpose()? })
    }

    /// The addresses that it listens on.
    pub fn addresses(&self) -> Vec<String> {
        let address = |listener: &Listener| match listener {
            Listener::Tcp(tcp) => tcp.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
            Listener::Unix(unix) => unix.local_addr().map_or_else(|e| e.to_string(), |a| format!("{a:?}")),
        };
        self.sockets.iter().map(address).collect()
    }
}

/// Listeners, and what is answered there.
pub struct Site {
    /// Where it is.
    pub listeners: Listeners,
    /// What is answered.
    pub router: Router,
    /// Limits of its connections, which no other site takes.
    pub limits: Limits,
    /// Where its connections are answered.
    pub runtime: Handle,
}

/// Serves until the process is told to end, and the downloads that are going on then have ended, too, or `drain` is over.
/// `draining` becomes true in between.
pub async fn serve(
    sites: Vec<Site>,
    drain: Duration,
    metrics: &Arc<Metrics>,
    draining: &watch::Sender<bool>,
) -> Result<()> {
    raise_open_files();
    let (mut end, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let graceful = Arc::new(GracefulShutdown::new());
    let (mut tasks, mut certificates, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for Site { listeners, router, limits, runtime } in sites {
        let connections = Places::new(limits.connections, limits.connections_per_client);
        let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
        certificates.extend(listeners.tls.clone());
        files.extend(listeners.files);
        for socket in listeners.sockets {
            let accepting = Accepting {
                socket,
                tls: listeners.tls.clone(),
                router: router.clone(),
                limits: limits.clone(),
                metrics: metrics.clone(),
                connections: connections.clone(),
                refusals: refusals.clone(),
                draining: draining.subscribe(),
            };
            tasks.push(runtime.spawn(accepting.run(graceful.clone())));
        }
    }
    let (mut trim, mut most) = (tokio::time::interval(TRIM.0), 0);
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = interrupt.recv() => break,
            _ = trim.tick() => {
                let now = metrics.connections.get();
                most = most.max(now);
                if most >= TRIM.1 && now < most / 2 {
                    most = now;
                    tokio::task::spawn_blocking(memory::return_free_pages);
                }
            }
            _ = hangup.recv() => for tls in &certificates {
                match tls.files.load() {
                    Ok(config) => {
                        *tls.now.write().unwrap_or_else(PoisonError::into_inner) = config;
                        tracing::info!("certificate read again");
                    }
                    Err(e) => tracing::error!("the certificate stays what it was: {e:#}"),
                }
            },
        }
    }
    draining.send_replace(true);
    for task in tasks {
        task.abort();
        // Its socket is closed when this returns.
        let _ = task.await;
    }
    tracing::info!("ending when {} connections have", graceful.count());
    // Those who accepted are gone, and what is left of this is ours.
    let ended = async {
        if let Some(graceful) = Arc::into_inner(graceful) {
            graceful.shutdown().await;
        }
    };
    tokio::select! {
        () = ended => {}
        () = sleep(drain) => tracing::warn!("downloads were cut off"),
        _ = end.recv() => tracing::warn!("downloads were cut off"),
        _ = interrupt.recv() => tracing::warn!("downloads were cut off"),
    }
    drop(files);
    Ok(())
}

/// The sockets that systemd hands over.
fn inherited() -> io::Result<Vec<Listener>> {
    let mut fds = listenfd::ListenFd::from_env();
    let mut sockets = Vec::new();
    for i in 0..fds.len() {
        match fds.take_tcp_listener(i) {
            Ok(Some(listener)) => sockets.push(tcp(listener)?),
            Ok(None) => {}
            Err(_) => {
                if let Some(listener) = fds.take_unix_listener(i)? {
                    listener.set_nonblocking(true)?;
                    sockets.push(Listener::Unix(UnixListener::from_std(listener)?));
                }
            }
        }
    }
    Ok(sockets)
}

fn tcp(listener: std::net::TcpListener) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    Ok(Listener::Tcp(TcpListener::from_std(listener)?))
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) {
    let socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}

/// As many files as the system lets us have: each connection is one.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("open files: {e}");
    }
}

/// Takes the connections of one socket.
struct Accepting {
    socket: Listener,
    tls: Option<Arc<Tls>>,
    router: Router,
    limits: Limits,
    metrics: Arc<Metrics>,
    connections: Arc<Places>,
    refusals: Arc<Semaphore>,
    draining: watch::Receiver<bool>,
}

impl Accepting {
    async fn run(self, graceful: Arc<GracefulShutdown>) {
        loop {
            let accepted = match &self.socket {
                Listener::Tcp(tcp) => tcp.accept().await.map(|(stream, peer)| {
                    let _ = stream.set_nodelay(true);
                    limit_unsent(&stream);
                    (Box::new(stream) as Box<dyn Io>, Some(peer))
                }),
                Listener::Unix(unix) => {
                    unix.accept().await.map(|(stream, _)| (Box::new(stream) as Box<dyn Io>, None))
                }
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Such as no more open files: others may end soon.
                    tracing::warn!("cannot take a connection: {e}");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let name = peer.map_or_else(|| "unix".to_owned(), |peer| peer.to_string());
            let connection = Arc::new(Connection::new(name, Client::of(peer), self.tls.is_none()));
            let close = connection.clone();
            let leave = move || close.close.notify_one();
            match self.connections.enter(connection.client, connection.activity.clone(), leave) {
                Ok(place) => self.take(stream, peer, connection, place, graceful.watcher()),
                Err(full) => {
                    self.metrics.refused.add(1);
                    self.refuse(stream, format!("connections: {full}"));
                }
            }
        }
    }

    /// Answers the requests of one connection, on a task of its own.
    fn take(
        &self,
        stream: Box<dyn Io>,
        peer: Option<SocketAddr>,
        connection: Arc<Connection>,
        place: Place,
        watcher: Watcher,
    ) {
        let config =
            self.tls.as_ref().map(|tls| tls.now.read().unwrap_or_else(PoisonError::into_inner).clone());
        let conversation = Conversation {
            router: self.router.clone(),
            limits: self.limits.clone(),
            connection: connection.clone(),
            peer,
            draining: self.draining.clone(),
        };
        let (limit, metrics) = (self.limits.timeout, self.metrics.clone());
        tokio::spawn(async move {
            metrics.connections.add(1);
            let stream = Timed { inner: stream, limit, waiting: None };
            let whole = match config {
                None => conversation.hold(stream, watcher).await,
                Some(config) => {
                    let hello = timeout(limit.min(MAX_HANDSHAKE), TlsAcceptor::from(config).accept(stream));
                    tokio::select! {
                        hello = hello => match hello {
                            Ok(Ok(stream)) => conversation.hold(stream, watcher).await,
                            Ok(Err(_)) => true,
                            Err(_) => false,
                        },
                        () = connection.close.notified() => false,
                    }
                }
            };
            metrics.closed.add(u64::from(!whole));
            metrics.connections.less();
            drop(place);
        });
    }

    /// Says in HTTP/1.1 that there are too many connections, if that takes no time.
    fn refuse(&self, mut stream: Box<dyn Io>, why: String) {
        let Ok(permit) = self.refusals.clone().try_acquire_owned() else { return };
        if self.tls.is_some() {
            return;
        }
        let (time, len) = REFUSAL;
        tokio::spawn(timeout(time, async move {
            let _permit = permit;
            let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n\
                        Cache-Control: no-store\r\nConnection: close\r\n";
            let text =
                format!("{head}Retry-After: {RETRY}\r\nContent-Length: {}\r\n\r\n{why}\n", why.len() + 1);
            if stream.write_all(text.as_bytes()).await.is_ok() && stream.shutdown().await.is_ok() {
                // Were the request left unread, the client would see a connection that breaks.
                let _ = tokio::io::copy(&mut stream.take(len), &mut tokio::io::sink()).await;
            }
        }));
    }
}

/// Bounds what the kernel keeps of what is sent.
fn limit_unsent(stream: &TcpStream) {
    // SAFETY: sets an option of an open socket, whose value is a number.
    #[allow(unsafe_code, reason = "no library that is here knows this option")]
    let done = unsafe {
        let (value, len) = (UNSENT, size_of_val(&UNSENT) as libc::socklen_t);
        let option = (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT);
        libc::setsockopt(stream.as_raw_fd(), option.0, option.1, (&raw const value).cast(), len)
    };
    if done != 0 {
        tracing::debug!("TCP_NOTSENT_LOWAT: {}", io::Error::last_os_error());
    }
}

tokio::task_local! {
    /// Ends the stream of HTTP/2 that a task answers.
    static STREAM: Arc<Notify>;
}

/// Runs the streams of HTTP/2, each of which can be ended.
#[derive(Clone)]
struct Streams;

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let end = Arc::new(Notify::new());
        tokio::spawn(STREAM.scope(end.clone(), async move {
            tokio::select! {
                _ = stream => {}
                // What it has sent is thrown away with it, and the client gets a RST_STREAM.
                () = end.notified() => {}
            }
        }));
    }
}

/// The requests of one connection.
struct Conversation {
    router: Router,
    limits: Limits,
    connection: Arc<Connection>,
    peer: Option<SocketAddr>,
    draining: watch::Receiver<bool>,
}

impl Conversation {
    /// Answers them. False if the connection was closed because nothing moves, or to make room.
    async fn hold(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        watcher: Watcher,
    ) -> bool {
        let (limits, connection) = (&self.limits, &self.connection);
        let mut builder = Builder::new(Streams);
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.timeout)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(MAX_HEAD as u32)
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .keep_alive_interval(limits.timeout)
            .keep_alive_timeout(limits.timeout);
        let (router, peer) = (TowerToHyperService::new(self.router), self.peer);
        let of = connection.clone();
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            let (router, connection) = (router.clone(), of.clone());
            async move {
                let flow = Flow::new(connection, STREAM.try_with(Clone::clone).ok());
                request.extensions_mut().insert(flow.clone());
                if let Some(peer) = peer {
                    request.extensions_mut().insert(ConnectInfo(peer));
                }
                let response: Response<_> = router.call(request).await?;
                Ok::<_, std::convert::Infallible>(response.map(|body| Paced::new(body, flow)))
            }
        });
        let answered = watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned());
        tokio::pin!(answered);
        loop {
            tokio::select! {
                done = &mut answered => {
                    if let Err(e) = done {
                        tracing::debug!(peer = connection.peer, "{e}");
                    }
                    return true;
                }
                () = connection.close.notified() => return false,
                () = sleep(TICK.min(limits.timeout / 2)) => {
                    let activity = &connection.activity;
                    // Who has asked for nothing when the server ends has a moment to do so.
                    let patience = if *self.draining.borrow() { TICK } else { limits.timeout };
                    if activity.is_idle() && activity.quiet() > patience {
                        return false;
                    }
                    if !connection.reset_stalled(limits.timeout) {
                        tracing::debug!(peer = connection.peer, "takes nothing");
                        return false;
                    }
                }
            }
        }
    }
}

/// Any stream.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {
    /// Has the kernel send `len` bytes of a file.
    fn poll_send(
        &self,
        cx: &mut Context<'_>,
        file: &File,
        offset: u64,
        len: usize,
    ) -> Poll<io::Result<usize>>;
}

macro_rules! io_of {
    ($stream:ty) => {
        impl Io for $stream {
            fn poll_send(
                &self,
                cx: &mut Context<'_>,
                file: &File,
                mut offset: u64,
                len: usize,
            ) -> Poll<io::Result<usize>> {
                loop {
                    ready!(self.poll_write_ready(cx))?;
                    let mut send = || rustix::fs::sendfile(self, file, Some(&mut offset), len);
                    let send = || -> io::Result<usize> { Ok(rustix::io::retry_on_intr(&mut send)?) };
                    match self.try_io(Interest::WRITABLE, send) {
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                        sent => return Poll::Ready(sent),
                    }
                }
            }
        }
    };
}

io_of!(TcpStream);
io_of!(UnixStream);

/// A stream that fails when the other end takes what is sent at less than [`LOWEST_RATE`](super::flow::LOWEST_RATE).
struct Timed {
    inner: Box<dyn Io>,
    limit: Duration,
    waiting: Option<Waiting>,
}

/// From when on a stream could have taken more, and what it has taken since then.
struct Waiting {
    since: Instant,
    taken: u64,
    until: Pin<Box<Sleep>>,
}

impl Timed {
    fn check(&mut self, cx: &mut Context<'_>, sent: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &sent {
            Poll::Ready(Ok(n)) => {
                if let Some(waiting) = &mut self.waiting {
                    waiting.taken += *n as u64;
                }
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending => return self.wait(cx),
        }
        sent
    }

    fn wait<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Waiting {
            since: Instant::now(),
            taken: 0,
            until: Box::pin(sleep(limit)),
        });
        while waiting.until.as_mut().poll(cx).is_ready() {
            if is_stalled(waiting.taken, waiting.since.elapsed(), limit) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            (waiting.since, waiting.taken) = (Instant::now(), 0);
            waiting.until.as_mut().reset(waiting.since + limit);
        }
        Poll::Pending
    }

    /// All that there is has been sent, or the end has.
    fn ended(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
        if done.is_pending() {
            return self.wait(cx);
        }
        self.waiting = None;
        done
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut *self.inner).poll_write(cx, buf);
        self.check(cx, sent)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A head is no file, and goes before one.
        let found = bufs.iter().enumerate().find_map(|(i, buf)| Some((i, buf.len(), mapped::find(buf)?)));
        let sent = match found {
            Some((i, ..)) if bufs[..i].iter().any(|buf| !buf.is_empty()) => {
                Pin::new(&mut *self.inner).poll_write_vectored(cx, &bufs[..i])
            }
            Some((_, len, (mapped, offset))) => self.inner.poll_send(cx, &mapped.file, offset, len),
            None => Pin::new(&mut *self.inner).poll_write_vectored(cx, bufs),
        };
        self.check(cx, sent)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut *self.inner).poll_flush(cx);
        self.ended(cx, sent)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut *self.inner).poll_shutdown(cx);
        self.ended(cx, sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("[::]:80".parse(), Ok(Address::Tcp("[::]:80".parse().unwrap())));
        assert_eq!("unix:/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        for bad in ["unix:", "80", "localhost:80", ""] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
