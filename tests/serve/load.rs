//! Many clients, fast ones and slow ones, and the memory that they take together.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use serde_json::Value;

use crate::serve::{live_files, releases, write_live};
use crate::tools::hostile::{Http2, connect, raise_open_files};
use crate::tools::serve::{Serve, files};
use crate::tools::small::Random;

#[test]
fn slow_clients_and_many() {
    let (disks, live) = releases();
    let serve = Serve::start(&[&disks, &live], &["--timeout", "5s", "--memory", "256M"]);
    // Who never finishes a request does not keep others from theirs, and is thrown out.
    let slow: Vec<TcpStream> = (0..500)
        .map(|_| {
            let mut stream = TcpStream::connect(serve.address()).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
            stream
        })
        .collect();
    let wanted = files(&serve, "test");
    scope(|scope| {
        for i in 0..64 {
            let (path, digest, _) = &wanted[i % wanted.len()];
            let serve = &serve;
            scope.spawn(move || assert_eq!(Digest::of(&serve.get(path)), *digest, "{path}"));
        }
    });
    for mut stream in slow {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).map_err(|e| assert_ne!(e.kind(), ErrorKind::WouldBlock));
    }
    // Each published file was made once, whoever asked for it.
    assert_eq!(serve.count("rehydrations_total{result=\"good\"}"), 3);
    assert!(serve.peak() < 512, "{} MiB", serve.peak());
    let log = fs::read_to_string(serve.dir.path().join("log")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().filter(|l| l["path"].as_str().unwrap().starts_with("/prod/")).count() >= 64);
}

#[test]
fn a_thousand_of_the_iso() {
    let serve = Serve::start(&[&releases().1], &["--memory", "256M"]);
    let (path, digest, _) =
        files(&serve, "stable").into_iter().find(|(path, ..)| path.ends_with(".iso")).unwrap();
    let wanted = serve.get(&path);
    assert_eq!(Digest::of(&wanted), digest);
    let left = AtomicUsize::new(1000);
    let one_less = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                while one_less().is_ok() {
                    let mut stream = TcpStream::connect(serve.address()).unwrap();
                    let request = format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
                    stream.write_all(request.as_bytes()).unwrap();
                    let mut answer = Vec::with_capacity(wanted.len() + 1000);
                    stream.read_to_end(&mut answer).unwrap();
                    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
                    assert!(answer[end + 4..] == wanted);
                }
            });
        }
    });
    assert_eq!(serve.count("rehydrations_total{result=\"good\"}"), 1);
    assert!(serve.peak() < 512, "{} MiB", serve.peak());
}

/// Addresses that attack, each for all kinds of attacks; and of those who mean well.
const HOSTILE: std::ops::Range<u8> = 100..110;
const GOOD: u8 = 2;

/// Connections of HTTP/2 with 32 streams that take a byte at a time; requests that never end; readers that hardly read.
const STUCK: usize = 1000;
const HALF_SENT: usize = 4000;
const SLOW: usize = 500;

/// Attacks until `done`: what the server closes is opened again. `step` goes on with one of `n` connections.
fn attack<T>(
    n: usize,
    done: &AtomicBool,
    open: impl Fn(u8) -> std::io::Result<T>,
    step: impl Fn(&mut T) -> std::io::Result<()>,
) {
    let mut all: Vec<Option<T>> = (0..n).map(|_| None).collect();
    while !done.load(Ordering::Relaxed) {
        for (i, connection) in all.iter_mut().enumerate() {
            if done.load(Ordering::Relaxed) {
                return;
            }
            let host = HOSTILE.start + (i % HOSTILE.len()) as u8;
            *connection = match connection.take() {
                None => open(host).ok(),
                Some(mut open) => step(&mut open).is_ok().then_some(open),
            };
            if i % 20 == 0 {
                // So that the attackers leave the server some of the processor they share.
                sleep(Duration::from_millis(5));
            }
        }
    }
}

/// What each client that means well takes, in bytes a second: about what a network of 1 Gbit/s brings. On loopback it would
/// take all there is of two processors, which the attackers of this test need, too.
const PACE: f64 = 100e6;

/// How many bytes a second eight clients get of a file in `time`, and the longest that `/readyz` took meanwhile.
fn rate(serve: &Serve, path: &str, size: usize, admin: &str, time: Duration) -> (f64, Duration) {
    let (start, bytes) = (Instant::now(), AtomicU64::new(0));
    let mut longest = Duration::ZERO;
    scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while start.elapsed() < time {
                    let mut stream = connect(serve.address(), GOOD).unwrap();
                    write!(stream, "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").unwrap();
                    let (mut buffer, mut got, begun) = (vec![0; 256 << 10], 0, Instant::now());
                    loop {
                        match stream.read(&mut buffer).unwrap() {
                            0 => break,
                            n => got += n,
                        }
                        let due = Duration::from_secs_f64(got as f64 / PACE);
                        sleep(due.saturating_sub(begun.elapsed()));
                    }
                    assert!(got > size, "{got} bytes of {size}");
                    bytes.fetch_add(size as u64, Ordering::Relaxed);
                }
            });
        }
        while start.elapsed() < time {
            let asked = Instant::now();
            let output = serve.curl(&["-f", "--unix-socket", admin, "/readyz"]);
            assert_eq!(output.stdout, b"ready\n", "{}", String::from_utf8_lossy(&output.stderr));
            longest = longest.max(asked.elapsed());
            sleep(Duration::from_millis(100));
        }
    });
    (bytes.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64(), longest)
}

/// All attacks at once, from ten addresses, for as long as two timeouts.
#[test]
fn hostile_clients_do_not_disturb_the_others() {
    raise_open_files();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [kernel, initramfs, rootfs, _] = live_files();
    let size = 64 << 20;
    write_live(&dir.path().join("live"), &[kernel, initramfs, rootfs, Random(5).bytes(size)]);
    let admin = dir.path().join("admin").display().to_string();
    let listen = format!("--admin-listen=unix:{admin}");
    let args = ["--memory", "256M", "--timeout", "10s", "--drain", "30s", &listen];
    let mut serve = Serve::start(&[&dir.path().join("live")], &args);
    let (iso, digest, _) =
        files(&serve, "stable").into_iter().find(|(path, ..)| path.ends_with(".iso")).unwrap();
    assert_eq!(Digest::of(&serve.get(&iso)), digest);

    let undisturbed = rate(&serve, &iso, size, &admin, Duration::from_secs(5)).0;
    let before = serve.memory();
    let done = AtomicBool::new(false);
    let (attacked, longest) = scope(|scope| {
        let (address, iso, done) = (serve.address(), &iso, &done);
        scope.spawn(move || {
            let open = |host| {
                let mut http2 = Http2::connect(address, host, 1)?;
                (0..32).try_for_each(|k| http2.get(1 + 2 * k, iso))?;
                Ok(http2)
            };
            attack(STUCK, done, open, |http2| {
                http2.ping()?;
                http2.frames(Duration::from_micros(1)).1.then_some(()).ok_or(ErrorKind::BrokenPipe.into())
            })
        });
        scope.spawn(move || {
            let open = |host| {
                let mut stream = connect(address, host)?;
                stream.write_all(b"GET / HTTP/1.1\r\nX: ")?;
                Ok(stream)
            };
            attack(HALF_SENT, done, open, |stream| stream.write_all(b"x"))
        });
        scope.spawn(move || {
            let open = |host| {
                let mut stream = connect(address, host)?;
                write!(stream, "GET {iso} HTTP/1.1\r\nHost: h\r\n\r\n")?;
                Ok(stream)
            };
            attack(SLOW, done, open, |stream| match stream.read(&mut [0; 16])? {
                0 => Err(ErrorKind::UnexpectedEof.into()),
                _ => Ok(()),
            })
        });
        // Until all of them are there.
        sleep(Duration::from_secs(10));
        let measured = rate(&serve, iso, size, &admin, Duration::from_secs(15));
        done.store(true, Ordering::Relaxed);
        measured
    });
    let (during, start) = (serve.peak(), Instant::now());
    // Their memory comes back, and all connections end.
    while serve.memory() > before + 64 {
        assert!(start.elapsed() < Duration::from_secs(30), "{} MiB, {before} before", serve.memory());
        sleep(Duration::from_millis(200));
    }
    println!(
        "{:.0} MB/s undisturbed, {:.0} MB/s attacked, /readyz {longest:?}, {during} MiB at most, {before} before, {} after",
        undisturbed / 1e6,
        attacked / 1e6,
        serve.memory()
    );
    assert!(during < 512, "{during} MiB");
    assert!(longest < Duration::from_secs(1), "/readyz took {longest:?}");
    assert!(attacked > undisturbed / 2.0, "{attacked} of {undisturbed} bytes a second");

    let mut stuck = Http2::connect(serve.address(), HOSTILE.start, 1).unwrap();
    (0..32).for_each(|k| stuck.get(1 + 2 * k, &iso).unwrap());
    serve.signal("TERM");
    let start = Instant::now();
    while serve.serving.child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(40), "it does not end");
        sleep(Duration::from_millis(100));
    }
}
