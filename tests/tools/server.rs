//! A server that answers what a test tells it to, and a proxy that cuts connections.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// An answer.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close after so many bytes of the body.
    pub cut: Option<usize>,
    /// Wait between pieces of the body.
    pub slow: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// `body`, or the part of it that is asked for.
    pub fn range(request: &Request, body: &[u8]) -> Self {
        let range = request.header("range").and_then(|range| {
            let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()? + 1))
        });
        match range {
            Some((start, end)) => Self::new(206, &body[start..end])
                .header("Content-Range", format!("bytes {start}-{}/{}", end - 1, body.len())),
            None => Self::new(200, body),
        }
    }
}

/// A server; its thread ends with the process.
pub struct Server {
    pub address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (log, answer) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::new(answer));
        let requests = log.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (requests, answer) = (requests.clone(), answer.clone());
                // A client that goes away early is no failure of the server.
                std::thread::spawn(move || serve(stream.unwrap(), &requests, &*answer));
            }
        });
        Self { address, log }
    }

    pub fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// The requests but the one that asks whether there is TLS.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.log().into_iter().map(|r| format!("{} {}", r.method, r.path));
        lines.filter(|line| line != "GET /v2/").collect()
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Reply) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut request = Request { method, path, headers, body: Vec::new() };
    let length: u64 = request.header("content-length").map_or(0, |l| l.parse().unwrap());
    // What came before the connection broke is part of the story.
    let _ = reader.take(length).read_to_end(&mut request.body);
    let reply = if request.path == "/v2/" { Reply::new(200, "") } else { answer(&request) };
    log.lock().unwrap().push(request.clone());
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status).ok()?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n").ok()?;
    }
    if !reply.headers.iter().any(|(name, _)| name == "Content-Length") {
        write!(stream, "Content-Length: {}\r\n", reply.body.len()).ok()?;
    }
    stream.write_all(b"\r\n").ok()?;
    if request.method != "HEAD" {
        let body = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
        for piece in body.chunks(16 << 10) {
            stream.write_all(piece).ok()?;
            if let Some(wait) = reply.slow {
                std::thread::sleep(wait);
            }
        }
    }
    stream.shutdown(Shutdown::Both).ok()
}

/// When a proxy cuts a connection, once.
#[derive(Clone, Copy)]
pub enum Cut {
    Never,
    /// With this byte on its way to the target.
    Byte(u64),
    /// All of them, with this byte on its way to the target.
    All(u64),
    /// With the first PATCH after this byte, of which nothing arrives.
    Patch(u64),
}

/// Passes connections on to a target, counts bytes, and cuts a connection.
pub struct Proxy {
    pub address: String,
    up: Arc<AtomicU64>,
    down: Arc<AtomicU64>,
}

impl Proxy {
    pub fn start(target: &str, cut: Cut) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (up, down) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (target, counts) = (target.to_owned(), (up.clone(), down.clone()));
        let done = Arc::new(Mutex::new((cut, Vec::new())));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let Ok(server) = TcpStream::connect(&target) else { continue };
                done.lock().unwrap().1.push(client.try_clone().unwrap());
                for (from, to, count, cut) in [
                    (&client, &server, counts.0.clone(), Some(done.clone())),
                    (&server, &client, counts.1.clone(), None),
                ] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || pass(from, to, &count, cut.as_deref()));
                }
            }
        });
        Self { address, up, down }
    }

    /// Bytes that went to the target.
    pub fn up(&self) -> u64 {
        self.up.load(Ordering::Relaxed)
    }

    /// Bytes that came from it.
    pub fn down(&self) -> u64 {
        self.down.load(Ordering::Relaxed)
    }
}

/// When to cut, and all connections there were.
type Connections = Mutex<(Cut, Vec<TcpStream>)>;

fn pass(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64, cut: Option<&Connections>) {
    let mut buf = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        let before = count.fetch_add(n as u64, Ordering::Relaxed);
        if let Some(cut) = cut {
            let mut cut = cut.lock().unwrap();
            let now = match cut.0 {
                Cut::Never => false,
                Cut::Byte(at) | Cut::All(at) => before + n as u64 > at,
                Cut::Patch(at) => before > at && buf.starts_with(b"PATCH "),
            };
            if now {
                let all = matches!(cut.0, Cut::All(_));
                for connection in cut.1.iter().filter(|_| all).chain([&from]) {
                    let _ = connection.shutdown(Shutdown::Both);
                }
                cut.0 = Cut::Never;
                break;
            }
        }
        if to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
