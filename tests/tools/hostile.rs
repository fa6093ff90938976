//! Clients that mean no good: HTTP/2 by hand, from addresses of their choice.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tokio::net::TcpSocket;
use tokio::runtime::Runtime;

/// Types of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

/// Connects to a server from 127.0.0.`host`, as client after client does.
pub fn connect(to: &str, host: u8) -> std::io::Result<TcpStream> {
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let to: SocketAddr = to.parse().unwrap();
    let stream = RUNTIME.block_on(async {
        let socket = TcpSocket::new_v4()?;
        socket.bind((IpAddr::from([127, 0, 0, host]), 0).into())?;
        tokio::time::timeout(Duration::from_secs(10), socket.connect(to)).await?
    })?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

/// The answer to a GET from 127.0.0.`host`, head and body.
pub fn get(to: &str, host: u8, path: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = connect(to, host)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// A frame: type, flags, stream, payload.
pub type Frame = (u8, u8, u32, Vec<u8>);

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A connection of HTTP/2 without TLS.
pub struct Http2 {
    pub stream: TcpStream,
    read: Vec<u8>,
}

impl Http2 {
    /// With windows of `window` bytes for each stream.
    pub fn connect(to: &str, host: u8, window: u32) -> std::io::Result<Self> {
        let mut stream = connect(to, host)?;
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(SETTINGS, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat()));
        stream.write_all(&hello)?;
        Ok(Self { stream, read: Vec::new() })
    }

    /// Asks for `path` on this stream, whose number is odd.
    pub fn get(&mut self, stream: u32, path: &str) -> std::io::Result<()> {
        let mut block = Vec::new();
        for (name, value) in [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "h")] {
            block.push(0);
            for text in [name, value] {
                // Lengths from 127 on take more bytes, the lowest seven bits first.
                match text.len() {
                    len @ ..127 => block.push(len as u8),
                    len => block.extend([127, (len - 127) as u8 & 127 | 128, ((len - 127) >> 7) as u8]),
                }
                block.extend(text.bytes());
            }
        }
        self.stream.write_all(&frame(HEADERS, 5, stream, &block))
    }

    pub fn ping(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&frame(PING, 0, 0, b"stay up!"))
    }

    /// Resets a stream.
    pub fn reset(&mut self, stream: u32) -> std::io::Result<()> {
        self.stream.write_all(&frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()))
    }

    /// Says once more what its settings are.
    pub fn settings(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1]))
    }

    /// Grants `n` more bytes, of a stream or for 0 of the connection.
    pub fn grant(&mut self, stream: u32, n: u32) -> std::io::Result<()> {
        self.stream.write_all(&frame(WINDOW_UPDATE, 0, stream, &n.to_be_bytes()))
    }

    /// The frames that come within `time`, none of settings and pings, which are answered. False when the connection ended.
    pub fn frames(&mut self, time: Duration) -> (Vec<Frame>, bool) {
        let (mut frames, start) = (Vec::new(), Instant::now());
        loop {
            while self.read.len() >= 9 {
                let len = u32::from_be_bytes([0, self.read[0], self.read[1], self.read[2]]) as usize;
                if self.read.len() < 9 + len {
                    break;
                }
                let payload = self.read[9..9 + len].to_vec();
                let (kind, flags) = (self.read[3], self.read[4]);
                let stream = u32::from_be_bytes(self.read[5..9].try_into().unwrap());
                self.read.drain(..9 + len);
                match (kind, flags & 1) {
                    (SETTINGS, 0) => drop(self.stream.write_all(&frame(SETTINGS, 1, 0, &[]))),
                    (PING, 0) => drop(self.stream.write_all(&frame(PING, 1, 0, &payload))),
                    (SETTINGS | PING, _) => {}
                    _ => frames.push((kind, flags, stream, payload)),
                }
            }
            let left = time.saturating_sub(start.elapsed());
            if left.is_zero() {
                return (frames, true);
            }
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut bytes = [0; 32 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) => return (frames, false),
                Ok(n) => self.read.extend(&bytes[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return (frames, false),
            }
        }
    }
}

/// As many open files as the system allows: each connection is one.
pub fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}
