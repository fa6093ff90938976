//! What several areas of tests share: gpg in a home of its own, nginx over a directory, and a server that does what no
//! real server does on demand; and, in files of their own, the program, releases and registries.

pub mod example;
pub mod fixture;
pub mod hostile;
pub mod registry;
pub mod release;
pub mod serve;
pub mod server;
pub mod serving;
pub mod small;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A home of gpg; its agent ends with it.
pub struct Gpg(TempDir);

impl Gpg {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("gpg").tempdir().unwrap())
    }

    /// The directory, as $GNUPGHOME has it.
    pub fn home(&self) -> &Path {
        self.0.path()
    }

    /// Runs gpg as if it were `time`, and gives what it prints.
    pub fn run(&self, time: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
        let mut gpg = Command::new("gpg");
        gpg.args(["--batch", "--yes", "--quiet", "--no-permission-warning", "--pinentry-mode", "loopback"]);
        gpg.args(["--passphrase", "", "--homedir"]).arg(self.0.path());
        if !time.is_empty() {
            gpg.args(["--faked-system-time", &format!("{time}!")]);
        }
        let piped = gpg.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("gpg is needed: install gpg");
        let mut stdin = child.stdin.take().unwrap();
        // It writes before it has read everything.
        let output = std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(input).unwrap());
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success(), "gpg {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Makes a key and gives its fingerprint.
    pub fn key(&self, time: &str, name: &str, expires: &str) -> String {
        self.key_of("ed25519", time, name, expires)
    }

    /// The same, of an algorithm.
    pub fn key_of(&self, algorithm: &str, time: &str, name: &str, expires: &str) -> String {
        self.run(time, &["--quick-generate-key", name, algorithm, "sign", expires], b"");
        let list =
            String::from_utf8(self.run(time, &["--with-colons", "--list-keys", &format!("={name}")], b""));
        let list = list.unwrap();
        list.lines().find_map(|l| l.strip_prefix("fpr:")).unwrap().trim_matches(':').to_owned()
    }

    pub fn sign(&self, time: &str, key: &str, data: &[u8]) -> Vec<u8> {
        self.run(time, &["--local-user", key, "--detach-sign"], data)
    }

    pub fn export(&self, key: &str) -> Vec<u8> {
        self.run("", &["--armor", "--export", key], b"")
    }

    /// Revokes for a reason that gpg numbers: 0 none, 1 compromised, 3 no longer used.
    pub fn revoke(&self, time: &str, key: &str, reason: u8) {
        let mut gpg = Command::new("gpg");
        gpg.args(["--no-permission-warning", "--pinentry-mode", "loopback", "--passphrase", "", "--homedir"]);
        gpg.arg(self.0.path()).args(["--faked-system-time", &format!("{time}!"), "--command-fd", "0"]);
        gpg.args(["--no-tty", "--status-fd", "2", "--gen-revoke", key]);
        let mut child =
            gpg.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(format!("y\n{reason}\n\ny\n").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "gpg --gen-revoke: {}", String::from_utf8_lossy(&output.stderr));
        self.run("", &["--import"], &output.stdout);
    }
}

impl Drop for Gpg {
    fn drop(&mut self) {
        let _ = Command::new("gpgconf")
            .arg("--homedir")
            .arg(self.0.path())
            .args(["--kill", "gpg-agent"])
            .status();
    }
}

pub const THEN: &str = "20200101T000000";
pub const LATER: &str = "20220101T000000";

pub struct Nginx {
    child: Child,
    pub url: String,
    dir: TempDir,
}

impl Nginx {
    pub fn serve(www: &Path) -> Self {
        Self::with(www, "")
    }

    /// With more of the configuration of a server.
    pub fn with(www: &Path, more: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path().display();
        let conf = format!(
            "daemon off; master_process off; pid {d}/pid; error_log {d}/error.log;\n\
             events {{ }}\n\
             http {{\n\
               log_format short '$request_method $uri $status $body_bytes_sent';\n\
               access_log {d}/access.log short;\n\
               client_body_temp_path {d}/a; proxy_temp_path {d}/b; fastcgi_temp_path {d}/c;\n\
               uwsgi_temp_path {d}/d; scgi_temp_path {d}/e;\n\
               server {{ listen 127.0.0.1:{port}; root {}; {more} }}\n\
             }}\n",
            www.display()
        );
        fs::write(dir.path().join("conf"), conf).unwrap();
        let child = Command::new("nginx")
            .arg("-c")
            .arg(dir.path().join("conf"))
            .args(["-e", "stderr"])
            .stdin(Stdio::null())
            .spawn()
            .expect("nginx is needed: install nginx");
        let nginx = Self { child, url: format!("http://127.0.0.1:{port}"), dir };
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "nginx does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        nginx
    }

    /// `GET /disk0.raw 200 1000000`, sorted.
    pub fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        let mut lines: Vec<_> = log.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that a process has had in use, as the kernel counted.
pub fn peak(child: Child) -> u64 {
    let ended = Ended::watch(child);
    assert!(ended.success, "{}", ended.said);
    ended.peak
}

/// A process that has ended.
pub struct Ended {
    pub success: bool,
    /// On stderr, where that was a pipe.
    pub said: String,
    /// The most memory that it has had in use, in bytes.
    pub peak: u64,
    pub time: Duration,
}

impl Ended {
    /// Runs a command to its end.
    pub fn run(command: &mut Command) -> Self {
        Self::watch(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn watch(mut child: Child) -> Self {
        let start = Instant::now();
        let stderr = child.stderr.take();
        let said = std::thread::spawn(move || {
            let mut said = Vec::new();
            stderr.map(|mut stderr| stderr.read_to_end(&mut said));
            String::from_utf8_lossy(&said).into_owned()
        });
        let mut peak = 0;
        let status = loop {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            if let Some(kib) = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()) {
                peak = peak.max(kib << 10);
            }
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Self { success: status.success(), said: said.join().unwrap(), peak, time: start.elapsed() }
    }
}

/// Bytes without a pattern, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(len);
    bytes
}

/// A request: method, name, where its range starts.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub method: String,
    pub name: String,
    pub from: Option<usize>,
}

/// What to do with the n-th request of a method for a name, before the connection is closed.
pub type Answer = dyn Fn(&Request, usize, &mut TcpStream) + Send + Sync;

pub struct Server {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves until the test ends: the n-th request of a method for a name gets the bytes that `answer` gives. HEAD is
    /// answered with 405, unless `answer` sees to it.
    pub fn new(answer: impl Fn(&Request, usize) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::streaming(move |request, n, to| {
            // Who asked may have gone.
            let _ = to.write_all(&answer(request, n));
        })
    }

    /// The same, with an answer that takes its time.
    pub fn streaming(answer: impl Fn(&Request, usize, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (answer, log): (Arc<Answer>, _) = (Arc::new(answer), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log) = (answer.clone(), log.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &*answer, &log));
            }
        });
        Self { url, requests }
    }

    /// Where the ranges of the GETs for `name` started.
    pub fn gets(&self, name: &str) -> Vec<Option<usize>> {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|r| r.method == "GET" && r.name == name).map(|r| r.from).collect()
    }
}

fn serve(mut stream: TcpStream, answer: &Answer, log: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let mut from = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = Some(range.trim_end_matches('-').parse().unwrap());
        }
    }
    let mut words = first.split(' ');
    let request = Request {
        method: words.next().unwrap().into(),
        name: words.next().unwrap().trim_start_matches('/').into(),
        from,
    };
    let n = {
        let mut log = log.lock().unwrap();
        log.push(request.clone());
        log.iter().filter(|r| r.method == request.method && r.name == request.name).count() - 1
    };
    answer(&request, n, &mut stream);
}

pub fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// What a good server answers.
pub fn whole(files: &HashMap<String, Vec<u8>>, request: &Request) -> Vec<u8> {
    if request.method != "GET" {
        return answer("405 Method Not Allowed", "", b"");
    }
    let Some(bytes) = files.get(&request.name) else { return answer("404 Not Found", "", b"") };
    match request.from {
        None => answer("200 OK", "", bytes),
        Some(from) => {
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            answer("206 Partial Content", &range, &bytes[from..])
        }
    }
}
