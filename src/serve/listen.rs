//! Connections: where they come from, TLS, HTTP/1.1 and HTTP/2 on them, how long they may take, how they end.
//!
//! A client has so many seconds for the headers of a request (`--timeout`), may ask for nothing as long, and must take some
//! bytes of what it asked for in that time. How long an answer takes to make is not limited.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::extract::ConnectInfo;
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::mapped;
use super::metrics::Metrics;
use super::observe::Connection;

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 32 << 10;

/// The most headers of a request.
const MAX_HEADERS: usize = 100;

/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 32;

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
    _files: Vec<RemoveSocket>,
    tls: Option<Arc<Tls>>,
}

impl Listeners {
    /// Takes the sockets that systemd hands over, and listens on `addresses`.
    pub fn open(addresses: &[Address], tls: Option<&TlsFiles>) -> Result<Self> {
        let tls = tls.map(|files| -> Result<_> {
            let now = RwLock::new(files.load()?);
            Ok(Arc::new(Tls { files: files.clone(), now }))
        });
        let mut sockets = inherited().context("sockets of systemd")?;
        let mut files = Vec::new();
        let addresses = match addresses {
            [] if sockets.is_empty() => &[Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))],
            given => given,
        };
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
        Ok(Self { sockets, _files: files, tls: tls.transpose()? })
    }

    /// The addresses that it listens on.
    pub fn addresses(&self) -> Vec<String> {
        let address = |listener: &Listener| match listener {
            Listener::Tcp(tcp) => tcp.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
            Listener::Unix(unix) => unix.local_addr().map_or_else(|e| e.to_string(), |a| format!("{a:?}")),
        };
        self.sockets.iter().map(address).collect()
    }

    /// Serves until the process is told to end, and the downloads that are going on then have ended, too. `draining`
    /// becomes true in between.
    pub async fn serve(
        self,
        router: Router,
        limits: &Limits,
        metrics: &Arc<Metrics>,
        draining: &watch::Sender<bool>,
    ) -> Result<()> {
        raise_open_files();
        let (mut end, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut hangup = signal(SignalKind::hangup())?;
        let graceful = Arc::new(GracefulShutdown::new());
        let connections = Arc::new(Semaphore::new(limits.connections));
        let mut tasks = Vec::new();
        for socket in self.sockets {
            let accepting = Accepting {
                socket,
                tls: self.tls.clone(),
                router: router.clone(),
                limits: limits.clone(),
                metrics: metrics.clone(),
                connections: connections.clone(),
            };
            tasks.push(tokio::spawn(accepting.run(graceful.clone())));
        }
        loop {
            tokio::select! {
                _ = end.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => match &self.tls {
                    None => {}
                    Some(tls) => match tls.files.load() {
                        Ok(config) => {
                            *tls.now.write().unwrap_or_else(PoisonError::into_inner) = config;
                            tracing::info!("certificate read again");
                        }
                        Err(e) => tracing::error!("the certificate stays what it was: {e:#}"),
                    },
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
            () = sleep(limits.drain) => tracing::warn!("downloads were cut off"),
            _ = end.recv() => tracing::warn!("downloads were cut off"),
            _ = interrupt.recv() => tracing::warn!("downloads were cut off"),
        }
        Ok(())
    }
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
    connections: Arc<Semaphore>,
}

impl Accepting {
    async fn run(self, graceful: Arc<GracefulShutdown>) {
        loop {
            // Who is too many waits in the queue of the system.
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let accepted = match &self.socket {
                Listener::Tcp(tcp) => tcp.accept().await.map(|(stream, peer)| {
                    let _ = stream.set_nodelay(true);
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
            let config =
                self.tls.as_ref().map(|tls| tls.now.read().unwrap_or_else(PoisonError::into_inner).clone());
            let router = match peer {
                Some(peer) => self.router.clone().layer(Extension(ConnectInfo(peer))),
                None => self.router.clone(),
            };
            let (limits, watcher) = (self.limits.clone(), graceful.watcher());
            let metrics = self.metrics.clone();
            tokio::spawn(async move {
                metrics.connections.add(1);
                let stream = Timed { inner: stream, limit: limits.timeout, waiting: None };
                let peer = peer.map_or_else(|| "unix".to_owned(), |peer| peer.to_string());
                let connection = Arc::new(Connection::new(peer, config.is_none()));
                match config {
                    None => converse(stream, router, &limits, connection, watcher).await,
                    Some(config) => {
                        let hello = TlsAcceptor::from(config).accept(stream);
                        if let Ok(Ok(stream)) = timeout(limits.timeout, hello).await {
                            converse(stream, router, &limits, connection, watcher).await;
                        }
                    }
                }
                metrics.connections.less();
                drop(permit);
            });
        }
    }
}

/// Answers the requests of one connection.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    limits: &Limits,
    connection: Arc<Connection>,
    watcher: Watcher,
) {
    let mut builder = Builder::new(TokioExecutor::new());
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
        .initial_stream_window_size(64 << 10)
        .keep_alive_interval(limits.timeout)
        .keep_alive_timeout(limits.timeout);
    let service = TowerToHyperService::new(router.layer(Extension(connection.clone())));
    let answered = watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned());
    tokio::pin!(answered);
    let patience = limits.timeout.as_millis() as u64;
    loop {
        tokio::select! {
            done = &mut answered => {
                if let Err(e) = done {
                    tracing::debug!(peer = connection.peer, "{e}");
                }
                return;
            }
            () = sleep(limits.timeout / 2) => {
                if connection.idle() > patience {
                    return;
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

/// A stream that fails when the other end takes nothing of what is sent for too long.
struct Timed {
    inner: Box<dyn Io>,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    fn check<T>(&mut self, cx: &mut Context<'_>, sent: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if sent.is_ready() {
            self.waiting = None;
            return sent;
        }
        let limit = self.limit;
        let waiting =
            self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        match waiting.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
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
        self.check(cx, sent)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut *self.inner).poll_shutdown(cx);
        self.check(cx, sent)
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
