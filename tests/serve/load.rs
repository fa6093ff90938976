//! Many clients, fast ones and slow ones, and the memory that they take together.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::scope;
use std::time::Duration;

use rehydrator::digest::Digest;
use serde_json::Value;

use crate::serve::releases;
use crate::tools::serve::{Serve, files};

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
