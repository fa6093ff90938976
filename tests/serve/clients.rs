//! Clients that take nothing, ask for too much, or never end a request: they are cut off, and others are served meanwhile.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use tempfile::TempDir;

use crate::serve::releases;
use crate::tools::hostile::{DATA, GOAWAY, Http2, RST_STREAM, connect, get};
use crate::tools::serve::{Serve, files};

/// A server of the live system, with its probes on a socket of their own; the path of its ISO, and the digest.
struct Site {
    serve: Serve,
    admin: TempDir,
    iso: String,
    digest: Digest,
}

fn site(args: &[&str]) -> Site {
    let admin = tempfile::tempdir().unwrap();
    let listen = format!("--admin-listen=unix:{}", admin.path().join("socket").display());
    let serve = Serve::start(&[&releases().1], &[&[listen.as_str()], args].concat());
    let iso = files(&serve, "stable").into_iter().find(|(path, ..)| path.ends_with(".iso")).unwrap();
    assert_eq!(Digest::of(&serve.get(&iso.0)), iso.1);
    Site { serve, admin, iso: iso.0, digest: iso.1 }
}

impl Site {
    /// What the listener for administration answers.
    fn admin(&self, path: &str) -> String {
        let socket = self.admin.path().join("socket").display().to_string();
        let output = self.serve.curl(&["-f", "--unix-socket", &socket, path]);
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        let (metrics, name) = (self.admin("/metrics"), format!("rehydrator_{name} "));
        metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    }

    /// Waits until there are `n` of it.
    fn until(&self, name: &str, n: u64) {
        let start = Instant::now();
        while self.count(name) != n {
            assert!(start.elapsed() < Duration::from_secs(30), "{name}: {}, not {n}", self.count(name));
            sleep(Duration::from_millis(50));
        }
    }

    /// A download of the ISO that has begun, and takes nothing any more.
    fn stalled(&self, host: u8) -> TcpStream {
        let mut stream = connect(self.serve.address(), host).unwrap();
        write!(stream, "GET {} HTTP/1.1\r\nHost: h\r\n\r\n", self.iso).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        stream
    }

    /// The ISO, as 127.0.0.`host` gets it.
    fn fetch(&self, host: u8) -> bool {
        let answer = get(self.serve.address(), host, &self.iso).unwrap();
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        Digest::of(&answer[end + 4..]) == self.digest
    }
}

/// The first line and the rest of an answer.
fn answered(answer: &[u8]) -> (String, String) {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    (text.lines().next().unwrap_or_default().to_owned(), text)
}

#[test]
fn streams_that_take_a_byte_at_a_time_are_cut_off() {
    let site = site(&["--timeout", "2s"]);
    let mut connections: Vec<_> =
        [0, 1, 1].map(|window| Http2::connect(site.serve.address(), 2, window).unwrap()).into();
    for (i, http2) in connections.iter_mut().enumerate() {
        for k in 0..32 {
            // Answers of one piece, which hyper has given away as a whole, and of many.
            let path = if k % 2 == 0 { &site.iso } else { "/streams/stable.json" };
            // The last is kept alive by one more byte for each stream.
            http2.get(1 + 2 * k, path).unwrap_or_else(|e| panic!("{i}: {e}"));
        }
    }
    let start = Instant::now();
    let mut ended = 0;
    while ended < 3 {
        assert!(start.elapsed() < Duration::from_secs(20), "{ended} of 3 ended");
        for (i, http2) in connections.iter_mut().enumerate() {
            let _ = http2.ping();
            for k in 0..32 {
                let _ = if i == 2 { http2.grant(1 + 2 * k, 1) } else { Ok(()) };
            }
        }
        let ends = |http2: &mut Http2| {
            let (frames, open) = http2.frames(Duration::from_millis(100));
            !open || frames.iter().any(|frame| matches!(frame.0, RST_STREAM | GOAWAY))
        };
        let before = connections.len();
        connections.retain_mut(|http2| !ends(http2));
        ended += before - connections.len();
    }
    assert!(start.elapsed() > Duration::from_secs(1), "they have a while");
    site.until("http_downloads", 0);
    assert!(site.fetch(2));
}

#[test]
fn a_stalled_stream_does_not_end_its_neighbours() {
    let site = site(&["--timeout", "2s"]);
    let mut http2 = Http2::connect(site.serve.address(), 2, 1).unwrap();
    http2.get(1, &site.iso).unwrap();
    http2.get(3, &site.iso).unwrap();
    http2.grant(0, 1 << 24).unwrap();
    let (mut reset, mut received, start) = (false, 0, Instant::now());
    while received < 3_000_000 {
        assert!(start.elapsed() < Duration::from_secs(30), "{received} bytes");
        // Slower than it could be, so that the other one is reset meanwhile.
        http2.grant(3, 50_000).unwrap();
        let (frames, open) = http2.frames(Duration::from_millis(100));
        assert!(open, "the connection was closed");
        for (kind, _, stream, payload) in frames {
            match (kind, stream) {
                (RST_STREAM, 1) => reset = true,
                (DATA, 3) => received += payload.len(),
                (DATA, 1) => assert!(payload.len() <= 1),
                (RST_STREAM | GOAWAY, _) => panic!("{kind} for {stream}"),
                _ => {}
            }
        }
    }
    assert!(reset && received == 3_000_000, "{reset} {received}");
}

#[test]
fn slow_readers_and_senders_are_cut_off() {
    let site = site(&["--timeout", "2s"]);
    let mut slow: Vec<TcpStream> = (0..4).map(|_| site.stalled(2)).collect();
    let mut half = connect(site.serve.address(), 2).unwrap();
    half.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
    let start = Instant::now();
    while site.count("http_downloads") > 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", site.count("http_downloads"));
        // A byte now and then is no progress.
        for stream in &mut slow {
            let _ = stream.read(&mut [0]);
        }
        let _ = half.write(b"x");
        sleep(Duration::from_millis(200));
    }
    assert!(start.elapsed() > Duration::from_secs(1), "they have a while");
    // Nothing is said of a request that never came, or that it took too long.
    let _ = half.read_to_end(&mut Vec::new());
    // A client that takes 1 MB/s has all of it in the end.
    let output = site.serve.curl(&["--limit-rate", "1M", &site.iso]);
    assert!(output.status.success() && Digest::of(&output.stdout) == site.digest);
}

#[test]
fn one_client_does_not_take_the_connections_of_others() {
    let site = site(&["--connections", "8", "--connections-per-client", "6"]);
    let busy: Vec<_> = (0..6).map(|_| site.stalled(2)).collect();
    let (line, text) = answered(&get(site.serve.address(), 2, "/healthz").unwrap());
    assert!(line.contains(" 503 ") && text.contains("retry-after: ") && text.contains("6 already"), "{text}");
    assert!(site.fetch(3));
    // All are taken: the client that has most loses one to each that has fewer.
    let more: Vec<_> = (3..5).map(|host| site.stalled(host)).collect();
    for host in 5..8 {
        assert!(site.fetch(host));
    }
    assert!(site.count("http_connections_refused_total") >= 1);
    assert!(site.count("http_connections_closed_total") >= 1);
    assert_eq!(site.admin("/readyz"), "ready\n");
    drop((busy, more));
}

#[test]
fn half_sent_requests_make_room() {
    let site = site(&["--connections", "20", "--connections-per-client", "0"]);
    let mut half: Vec<_> = (0..60)
        .map(|_| {
            let mut stream = connect(site.serve.address(), 2).unwrap();
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nX: ");
            stream
        })
        .collect();
    // Of the same address, as behind a proxy, and of another.
    let start = Instant::now();
    assert!(site.fetch(2) && site.fetch(3));
    assert_eq!(site.admin("/healthz"), "ok\n");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // The oldest were closed.
    assert_eq!(half[0].read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn downloads_of_one_client_are_limited() {
    let site = site(&["--downloads-per-client", "2"]);
    // What the kernel sends out of the cache takes no memory, and is no download in this sense.
    let _unlimited: Vec<_> = (0..4).map(|_| site.stalled(2)).collect();
    let mut http2 = Http2::connect(site.serve.address(), 2, 1).unwrap();
    http2.get(1, &site.iso).unwrap();
    http2.get(3, &site.iso).unwrap();
    http2.frames(Duration::from_millis(300));
    let (line, text) = answered(&get(site.serve.address(), 2, "/").unwrap());
    assert!(line.contains(" 503 ") && text.contains("retry-after: "), "{text}");
    assert!(text.contains("downloads: this client has 2 already"), "{text}");
    let (line, _) = answered(&get(site.serve.address(), 3, "/").unwrap());
    assert!(line.contains(" 200 "), "{line}");
    // Probes are always answered.
    let (line, _) = answered(&get(site.serve.address(), 2, "/readyz").unwrap());
    assert!(line.contains(" 200 "), "{line}");
}

#[test]
fn the_listener_for_administration() {
    let site = site(&[]);
    assert_eq!((&*site.admin("/healthz"), &*site.admin("/readyz")), ("ok\n", "ready\n"));
    assert!(site.admin("/metrics").contains("# TYPE rehydrator_http_requests_total counter\n"));
    let socket = site.admin.path().join("socket").display().to_string();
    for path in ["/", "/streams/stable.json", &site.iso] {
        assert_eq!(site.serve.head(&["--unix-socket", &socket, path]).0, 404, "{path}");
    }
    // Whoever keeps more connections than there are for probes does not keep a probe out.
    let _idle: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert_eq!(site.admin("/readyz"), "ready\n");
    assert_eq!(site.serve.text("/readyz"), "ready\n");
    assert_eq!(site.serve.head(&["/metrics"]).0, 404);
    // Without such a listener they are where they were.
    let serve = Serve::start(&[&releases().1], &[]);
    assert!(serve.text("/metrics").contains("rehydrator_http_requests_total"));
    assert_eq!(serve.text("/healthz"), "ok\n");
}

/// Frames that cost the client little and nobody ever reads the answers to.
#[test]
fn floods_of_frames_take_no_memory() {
    type Flood = fn(&mut Http2, u32, &str) -> std::io::Result<()>;
    let floods: [Flood; 3] = [
        |http2, _, _| http2.ping(),
        |http2, _, _| http2.settings(),
        |http2, i, path| http2.get(2 * i + 1, path).and_then(|()| http2.reset(2 * i + 1)),
    ];
    let site = site(&["--timeout", "2s"]);
    for flood in floods {
        let mut http2 = Http2::connect(site.serve.address(), 2, 1).unwrap();
        http2.stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let start = Instant::now();
        // Until the server reads no more, or closes the connection.
        let mut streams = (0..200_000).take_while(|_| start.elapsed() < Duration::from_secs(5));
        let _ = streams.try_for_each(|i| flood(&mut http2, i, &site.iso));
        assert!(site.serve.peak() < 128, "{} MiB", site.serve.peak());
        assert_eq!(site.admin("/readyz"), "ready\n");
    }
    assert!(site.fetch(2));
}

#[test]
fn a_server_ends_although_clients_take_nothing() {
    let mut site = site(&["--timeout", "2s", "--drain", "60s"]);
    let mut http2 = Http2::connect(site.serve.address(), 2, 1).unwrap();
    (0..32).for_each(|k| http2.get(1 + 2 * k, &site.iso).unwrap());
    let _slow: Vec<_> = (0..4).map(|_| site.stalled(3)).collect();
    let mut half = connect(site.serve.address(), 4).unwrap();
    half.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
    http2.frames(Duration::from_millis(300));
    site.serve.signal("TERM");
    let start = Instant::now();
    while site.serve.serving.child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not end");
        let _ = http2.ping();
        http2.frames(Duration::from_millis(200));
    }
}

#[test]
fn a_cache_that_cannot_be_read_fails_the_request_alone() {
    let site = site(&[]);
    // What somebody with the same rights can do to a file without a name.
    let fds = format!("/proc/{}/fd", site.serve.serving.child.id());
    let mut shortened = 0;
    for fd in fs::read_dir(fds).unwrap() {
        let fd = fd.unwrap().path();
        let own = fs::read_link(&fd).is_ok_and(|to| to.starts_with(site.serve.dir.path()));
        if own && fs::metadata(&fd).unwrap().len() == 3_000_000 {
            fs::OpenOptions::new().write(true).open(&fd).unwrap().set_len(100_000).unwrap();
            shortened += 1;
        }
    }
    assert!(shortened > 0);
    for protocol in ["--http1.1", "--http2-prior-knowledge"] {
        for range in ["0-", "150000-150009", "2900000-"] {
            let output = site.serve.curl(&[protocol, "-f", "-r", range, &site.iso]);
            assert!(!output.status.success(), "{protocol} {range}");
        }
        let output = site.serve.curl(&[protocol, "-f", "-r", "0-99", &site.iso]);
        assert_eq!(output.stdout.len(), 100, "{protocol}");
    }
    // Each byte by itself, which HTTP/2 copies.
    let mut http2 = Http2::connect(site.serve.address(), 2, 1).unwrap();
    http2.get(1, &site.iso).unwrap();
    (0..200).for_each(|_| http2.grant(1, 1).unwrap());
    http2.frames(Duration::from_millis(300));
    assert_eq!(site.admin("/healthz"), "ok\n");
}
