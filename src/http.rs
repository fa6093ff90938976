//! HTTP: gets a small document, or a large file that is continued where an earlier attempt or run stopped; for
//! [`crate::registry`] also single requests of any kind, and the counting of attempts and waits around them.
//!
//! Blocking outside, tokio and reqwest inside; one [`Http`] serves any number of threads. Proxies come from the usual
//! environment variables. Nothing is verified here: that is up to [`crate::download`] and [`crate::registry`].

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_RANGE,
    RANGE, RETRY_AFTER,
};
use reqwest::{Certificate, Client, Identity, Method, Response, StatusCode, redirect};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc;

use crate::progress::Task;

/// Time for a connection to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Time without a single byte after which a transfer counts as broken.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that is waited between two attempts when the server does not say how long.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// The longest that a server may ask to wait, all attempts together. One that asks for more is not going to help soon.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(15 * 60);

/// An attempt that brought this many bytes more than all before it is no failure in a row: the counting of attempts
/// starts again.
const WORTHWHILE: u64 = 1 << 20;

/// The lowest rate of a body, in bytes a second: dnf's `minrate`. A server that sends a byte a minute never stalls, and
/// never ends.
const LOWEST_RATE: u64 = 1000;

/// How long a body may come at less than [`LOWEST_RATE`].
const SLOW_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest file that is downloaded, in bytes. Published files have a few GB; object stores take no more than 5 TB.
pub const MAX_FILE: u64 = 64 << 30;

/// The longest `ETag` that is kept, in bytes.
const MAX_ETAG: usize = 1024;

/// A body that is sent from a reader goes in pieces of this many bytes, of which [`AHEAD`] wait at most.
const PIECE: usize = 256 << 10;

/// Pieces of a body that are read ahead of the connection.
const AHEAD: usize = 2;

/// How much of the body of a refusal is read for the reason in it, in bytes.
const MAX_REASON: u64 = 64 << 10;

/// The longest reason that is shown, in characters.
const MAX_SHOWN: usize = 300;

/// How often to try, and how long to wait in between.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Attempts in a row that may fail.
    pub attempts: u32,
    /// The first wait; each further one is twice as long.
    pub delay: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 6, delay: Duration::from_secs(1) }
    }
}

/// Which servers are trusted, and who we are to them.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Whether the certificate of a server is checked at all.
    pub verify: bool,
    /// Certificates of further authorities, in PEM.
    pub roots: Vec<u8>,
    /// Our own certificate and its key, in PEM.
    pub identity: Option<Vec<u8>>,
}

impl Default for Tls {
    fn default() -> Self {
        Self { verify: true, roots: Vec::new(), identity: None }
    }
}

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How often it tries.
    pub retry: Retry,
    /// Time without a single byte of an answer after which a request counts as failed. Sending the body is part of it.
    pub stall: Duration,
    /// Time at less than 1000 bytes a second after which an answer counts as failed.
    pub slow: Duration,
    /// Whom it trusts.
    pub tls: Tls,
}

impl Default for Settings {
    fn default() -> Self {
        Self { retry: Retry::default(), stall: STALL_TIMEOUT, slow: SLOW_TIMEOUT, tls: Tls::default() }
    }
}

/// Why something could not be had. `request` is the method and the URL, such as `GET https://example.com/`.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server says no, and will again.
    #[error("{request}: {status}{reason}")]
    Status {
        /// What was asked for.
        request: String,
        /// The answer.
        status: StatusCode,
        /// What else the server says, after `: `, where it says anything that is known how to read.
        reason: String,
    },
    /// It did not work out this often.
    #[error("{request}: gave up after {attempts} attempts: {last}")]
    GaveUp {
        /// What was asked for.
        request: String,
        /// How often.
        attempts: u32,
        /// What happened last.
        last: String,
    },
    /// The server asks to wait for too long.
    #[error("{request}: the server asks to wait for {} s", .wait.as_secs())]
    Wait {
        /// What was asked for.
        request: String,
        /// How long.
        wait: Duration,
    },
    /// It is longer than it may be.
    #[error("{request}: more than {limit} bytes")]
    TooLong {
        /// What was asked for.
        request: String,
        /// In bytes.
        limit: u64,
    },
    /// All files together are longer than they may be.
    #[error("{request}: more than {limit} bytes in all: --max-download allows more")]
    TooMuch {
        /// What was asked for.
        request: String,
        /// In bytes.
        limit: u64,
    },
    /// Not a URL, or too many redirects, or one from https to http.
    #[error("{request}: {why}")]
    Request {
        /// What was asked for.
        request: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file cannot be written.
    #[error("{path}: write failed")]
    Write {
        /// The file.
        path: String,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// How an attempt failed.
#[derive(Debug)]
pub enum Failure {
    /// Another one would too.
    Final(HttpError),
    /// Another one may not.
    Again {
        /// What happened.
        why: String,
        /// How long the server asks to wait.
        after: Option<Duration>,
        /// Bytes that this attempt brought all the same, and none before it.
        got: u64,
    },
}

impl Failure {
    /// One that may go away, of an attempt that brought nothing.
    pub fn again(why: impl Into<String>) -> Self {
        Self::Again { why: why.into(), after: None, got: 0 }
    }
}

/// What a request carries.
pub enum Body<'a> {
    /// Nothing.
    None,
    /// Bytes in memory.
    Bytes(Bytes),
    /// The next bytes of a reader, so many of them.
    Reader(&'a mut dyn Read, u64),
}

/// Counts the attempts at one thing, and waits between them.
pub struct Attempts {
    retry: Retry,
    request: String,
    failed: u32,
    /// How long the server has asked to wait since it last sent something.
    asked: Duration,
}

impl Attempts {
    /// An attempt failed: waits until it is time for the next one, or says why there is none.
    pub fn failed(&mut self, failure: Failure) -> Result<(), HttpError> {
        std::thread::sleep(self.wait_after(failure)?);
        Ok(())
    }

    /// How long to wait after an attempt that failed.
    fn wait_after(&mut self, failure: Failure) -> Result<Duration, HttpError> {
        let (why, after, got) = match failure {
            Failure::Final(e) => return Err(e),
            Failure::Again { why, after, got } => (why, after, got),
        };
        self.failed += 1;
        if got >= WORTHWHILE {
            (self.failed, self.asked) = (1, Duration::ZERO);
        }
        let request = || self.request.clone();
        if self.failed >= self.retry.attempts {
            return Err(HttpError::GaveUp { request: request(), attempts: self.failed, last: why });
        }
        let backoff = self.retry.delay.saturating_mul(1 << (self.failed - 1).min(16)).min(MAX_DELAY);
        let wait = after.unwrap_or(backoff);
        self.asked = self.asked.saturating_add(after.unwrap_or_default());
        if self.asked > MAX_RETRY_AFTER {
            return Err(HttpError::Wait { request: request(), wait: self.asked });
        }
        tracing::info!("{}: {why}; trying again in {:.1} s", self.request, wait.as_secs_f64());
        Ok(wait)
    }
}

/// The answer to a request; its body is read by and by.
pub struct Answer {
    request: String,
    runtime: Handle,
    response: Response,
    got: u64,
    /// Bytes at the beginning of the body that an earlier attempt has brought already.
    repeated: u64,
    pace: Pace,
}

/// Whether a body comes fast enough. Only the time counts that is spent waiting for it.
struct Pace {
    window: Duration,
    waited: Duration,
    got: u64,
}

impl Pace {
    /// Whether it is still fast enough, `got` bytes and this much waiting later.
    fn keeps(&mut self, waited: Duration, got: usize) -> bool {
        self.waited += waited;
        self.got += got as u64;
        if self.waited < self.window {
            return true;
        }
        let enough = self.got as f64 >= LOWEST_RATE as f64 * self.waited.as_secs_f64();
        (self.waited, self.got) = (Duration::ZERO, 0);
        enough
    }
}

impl Answer {
    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// Where it came from, after all redirects.
    pub fn url(&self) -> &reqwest::Url {
        self.response.url()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The value of a header that is there, and text.
    pub fn header(&self, name: impl reqwest::header::AsHeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// Where the part of a file that this is starts, and how long the file is.
    pub fn range(&self) -> Option<ContentRange> {
        ContentRange::parse(self.header(CONTENT_RANGE)?)
    }

    /// Says that an earlier attempt has brought the first `bytes` of the body already: to get them again is no progress.
    pub fn repeats(&mut self, bytes: u64) {
        self.repeated = bytes;
    }

    /// Bytes that no earlier attempt has brought.
    fn progress(&self) -> u64 {
        self.got.saturating_sub(self.repeated)
    }

    /// The next bytes of the body; `None` at its end.
    pub fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        let started = Instant::now();
        let chunk = self.runtime.block_on(async { self.response.chunk().await });
        let Some(chunk) = chunk.map_err(|e| failure(&self.request, &e, self.progress()))? else {
            return Ok(None);
        };
        self.got += chunk.len() as u64;
        if !self.pace.keeps(started.elapsed(), chunk.len()) {
            let why = format!("less than {LOWEST_RATE} bytes a second for {} s", self.pace.window.as_secs());
            return Err(Failure::Again { why, after: None, got: self.progress() });
        }
        Ok(Some(chunk))
    }

    /// All of the body, which may have at most `limit` bytes.
    pub fn document(mut self, limit: u64) -> Result<Vec<u8>, Failure> {
        // What a broken attempt brought of it is not kept.
        self.repeats(u64::MAX);
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk()? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(Failure::Final(HttpError::TooLong { request: self.request, limit }));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Whether the server may answer otherwise later.
    pub fn is_temporary(&self) -> bool {
        let status = self.status();
        let temporary = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        temporary.contains(&status) || status.is_server_error()
    }

    /// What an answer that is no success means.
    pub fn refused(self) -> Failure {
        let (request, status) = (self.request.clone(), self.status());
        if !self.is_temporary() {
            let reason = self.document(MAX_REASON).map(|body| reason(&body)).unwrap_or_default();
            return Failure::Final(HttpError::Status { request, status, reason });
        }
        let after = self.header(RETRY_AFTER).and_then(retry_after);
        Failure::Again { why: status.to_string(), after, got: 0 }
    }
}

/// The reason in the body of a refusal: what registries send, `{"errors":[{"code":…,"message":…}]}`. After `: `.
fn reason(body: &[u8]) -> String {
    let Ok(body) = serde_json::from_slice::<serde_json::Value>(body) else { return String::new() };
    let error = &body["errors"][0];
    let text = [&error["message"], &error["code"]].into_iter().find_map(|v| v.as_str()).unwrap_or_default();
    let text: String = text.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect();
    if text.is_empty() { text } else { format!(": {text}") }
}

/// An HTTP client.
pub struct Http {
    runtime: Handle,
    threads: Option<Runtime>,
    client: Client,
    retry: Retry,
    slow: Duration,
    rate: Option<Rate>,
    budget: Option<Budget>,
}

/// How many bytes all files together may have.
struct Budget {
    limit: u64,
    left: AtomicU64,
}

impl Budget {
    /// Takes `bytes` from what is left, if there are as many.
    fn spend(&self, bytes: u64, request: &str) -> Result<(), Failure> {
        let less = |left: u64| left.checked_sub(bytes);
        let spent = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        spent.map(drop).map_err(|_| self.exceeded(request))
    }

    fn exceeded(&self, request: &str) -> Failure {
        Failure::Final(HttpError::TooMuch { request: request.into(), limit: self.limit })
    }
}

/// Holds all transfers of a client together to so many bytes a second.
struct Rate {
    per_second: u64,
    /// When what has been received so far would have arrived at that rate.
    due: Mutex<Instant>,
}

impl Rate {
    /// Waits until `bytes` more may have arrived.
    fn spend(&self, bytes: u64) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
        let due = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            *due = (*due).max(Instant::now()) + cost;
            *due
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        // Not waited for: that is not allowed where the one who drops it is async, as a server is.
        if let Some(threads) = self.threads.take() {
            threads.shutdown_background();
        }
    }
}

impl Http {
    /// A client that tries as often as `retry` says.
    pub fn new(retry: Retry) -> Result<Self> {
        Self::with(&Settings { retry, ..Settings::default() })
    }

    /// A client with these settings.
    pub fn with(settings: &Settings) -> Result<Self> {
        // An error only says that there is a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Two threads move the bytes; hashing and writing is done by those who call.
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let mut headers = HeaderMap::new();
        // The bytes of the file, not a compressed form of them: digests and ranges are of the file.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut client = Client::builder()
            .user_agent(concat!("rehydrator/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(settings.stall)
            // Bytes on their way to a server that is gone are noticed sooner than the lack of an answer.
            .tcp_user_timeout(STALL_TIMEOUT)
            .redirect(redirect::Policy::custom(|attempt| {
                let secure = attempt.previous().iter().any(|url| url.scheme() == "https");
                if secure && attempt.url().scheme() != "https" {
                    attempt.error("redirected from https to http")
                } else {
                    redirect::Policy::default().redirect(attempt)
                }
            }))
            // Retries are ours alone, so that they are counted once.
            .retry(reqwest::retry::never());
        let tls = &settings.tls;
        if !tls.verify {
            client = client.tls_danger_accept_invalid_certs(true);
        } else if !tls.roots.is_empty() {
            client =
                client.tls_certs_merge(Certificate::from_pem_bundle(&tls.roots).context("certificates")?);
        }
        if let Some(identity) = &tls.identity {
            client = client.identity(Identity::from_pem(identity).context("client certificate")?);
        }
        let runtime = runtime.context("cannot start the HTTP client")?;
        Ok(Self {
            runtime: runtime.handle().clone(),
            threads: Some(runtime),
            client: client.build().context("cannot start the HTTP client")?,
            retry: settings.retry,
            slow: settings.slow,
            rate: None,
            budget: None,
        })
    }

    /// Gets files at no more than this many bytes a second, all together.
    pub fn with_rate(mut self, bytes_per_second: Option<u64>) -> Self {
        let due = Mutex::new(Instant::now());
        self.rate = bytes_per_second.map(|rate| Rate { per_second: rate.max(1), due });
        self
    }

    /// Gets files of no more than this many bytes, all together. What is got in vain counts.
    pub fn with_max_download(mut self, bytes: u64) -> Self {
        self.budget = Some(Budget { limit: bytes, left: bytes.into() });
        self
    }

    /// Gets a document of at most `limit` bytes.
    pub fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, HttpError> {
        self.retried(Method::GET, url, || {
            let answer = self.send(Method::GET, url, &[], Body::None)?;
            if answer.status() != StatusCode::OK {
                return Err(answer.refused());
            }
            answer.document(limit)
        })
    }

    /// Gets a document of at most `limit` bytes that need not exist.
    pub fn find(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>, HttpError> {
        match self.get(url, limit) {
            Ok(document) => Ok(Some(document)),
            // An object store that does not let one list answers 403 for what is not there.
            Err(HttpError::Status {
                status: StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE,
                ..
            }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The length of the file at `url`, if the server tells. Asks once.
    pub fn length(&self, url: &str) -> Option<u64> {
        let answer = self.send(Method::HEAD, url, &[], Body::None).ok()?;
        // Not `content_length()`, which is that of the empty answer.
        let length = answer.header(CONTENT_LENGTH)?.parse().ok();
        length.filter(|_| answer.status().is_success())
    }

    /// Gets the file at `url` into `partial`, going on behind the bytes that are there already. `etag` is a file
    /// beside it, kept as long as `partial` is, which remembers the version of the file that they are of. What comes need
    /// not have reached the disk yet.
    ///
    /// True when some of the bytes in `partial` were there before.
    pub fn get_file(&self, url: &str, partial: &Path, etag: &Path, task: &Task) -> Result<bool, HttpError> {
        let mut resumed = true;
        // The most that was there at any time: a server that begins again and again makes no progress.
        let mut most = partial.metadata().map_or(0, |m| m.len());
        self.retried(Method::GET, url, || self.attempt(url, partial, etag, task, &mut resumed, &mut most))?;
        Ok(resumed)
    }

    fn attempt(
        &self,
        url: &str,
        partial: &Path,
        etag: &Path,
        task: &Task,
        resumed: &mut bool,
        most: &mut u64,
    ) -> Result<(), Failure> {
        let write_failed =
            |error| Failure::Final(HttpError::Write { path: partial.display().to_string(), error });
        let mut file = OpenOptions::new().create(true).append(true).open(partial).map_err(write_failed)?;
        let mut have = file.seek(SeekFrom::End(0)).map_err(write_failed)?;
        let mut headers = Vec::new();
        if have == 0 {
            *resumed = false;
        } else {
            headers.push((RANGE, format!("bytes={have}-")));
            // If the file is another by now, this makes the answer all of it.
            headers.extend(std::fs::read_to_string(etag).ok().map(|tag| (IF_RANGE, tag)));
        }
        let mut answer = self.send(Method::GET, url, &headers, Body::None)?;
        let total = match (answer.status(), answer.range()) {
            (StatusCode::PARTIAL_CONTENT, Some(range))
                if have > 0 && range.start == Some(have) && range.total.is_none_or(|total| total > have) =>
            {
                range.total
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(range)) if have > 0 && range.total == Some(have) => {
                return Ok(());
            }
            (StatusCode::OK, _) => {
                have = 0;
                *resumed = false;
                start_over(&file, etag, answer.headers()).map_err(write_failed)?;
                answer.response.content_length()
            }
            (StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE, _) if have > 0 => {
                start_over(&file, etag, &HeaderMap::new()).map_err(write_failed)?;
                return Err(Failure::again(format!("{}: not the range that was asked for", answer.status())));
            }
            _ => return Err(answer.refused()),
        };
        if let Some(total) = total {
            task.set_total(total);
            self.check_announced(&answer, total, have)?;
        }
        task.restart(have);
        answer.repeats(most.saturating_sub(have));
        let limit = total.unwrap_or(MAX_FILE);
        while let Some(chunk) = answer.chunk()? {
            let len = chunk.len() as u64;
            if len > limit.saturating_sub(have) {
                let request = answer.request;
                return Err(match total {
                    Some(total) => Failure::again(format!("more than the {total} bytes that it announced")),
                    None => Failure::Final(HttpError::TooLong { request, limit }),
                });
            }
            if let Some(budget) = &self.budget {
                budget.spend(len, &answer.request)?;
            }
            file.write_all(&chunk).map_err(write_failed)?;
            have += len;
            *most = have.max(*most);
            task.advance(len);
            if let Some(rate) = &self.rate {
                rate.spend(len);
            }
        }
        if let Some(total) = total.filter(|&total| total != have) {
            let why = format!("the answer ended at {have} of {total} bytes");
            return Err(Failure::Again { why, after: None, got: answer.progress() });
        }
        Ok(())
    }

    /// Refuses a file of `total` bytes, of which `have` are here, if that is too long.
    fn check_announced(&self, answer: &Answer, total: u64, have: u64) -> Result<(), Failure> {
        if total > MAX_FILE {
            let request = answer.request.clone();
            return Err(Failure::Final(HttpError::TooLong { request, limit: MAX_FILE }));
        }
        match &self.budget {
            Some(budget) if total - have > budget.left.load(Ordering::Relaxed) => {
                Err(budget.exceeded(&answer.request))
            }
            _ => Ok(()),
        }
    }

    /// Sends one request, once. Any answer is one, whatever its status.
    pub fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(HeaderName, String)],
        body: Body<'_>,
    ) -> Result<Answer, Failure> {
        let name = format!("{method} {url}");
        let mut request = self.client.request(method, url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        // Timers begin where requests are made, which must be inside.
        let response = match body {
            Body::None => self.runtime.block_on(async { request.send().await }),
            Body::Bytes(bytes) => self.runtime.block_on(async { request.body(bytes).send().await }),
            Body::Reader(reader, len) => {
                let (to, mut from) = mpsc::channel::<io::Result<Bytes>>(AHEAD);
                let body = reqwest::Body::wrap_stream(stream::poll_fn(move |cx| from.poll_recv(cx)));
                let request = request.header(CONTENT_LENGTH, len).body(body);
                let sending = self.runtime.spawn(async { request.send().await });
                let read = feed(reader, len, &to);
                drop(to);
                let response = self.runtime.block_on(sending);
                if let Err(e) = read {
                    return Err(Failure::Final(HttpError::Request { request: name, why: e.to_string() }));
                }
                response.map_err(|e| Failure::again(e.to_string()))?
            }
        };
        let response = response.map_err(|e| failure(&name, &e, 0))?;
        let pace = Pace { window: self.slow, waited: Duration::ZERO, got: 0 };
        Ok(Answer { request: name, runtime: self.runtime.clone(), response, got: 0, repeated: 0, pace })
    }

    /// Begins to count attempts at what `method` asks of `url`.
    pub fn attempts(&self, method: &Method, url: &str) -> Attempts {
        Attempts { retry: self.retry, request: format!("{method} {url}"), failed: 0, asked: Duration::ZERO }
    }

    /// Attempts something until it works, or does not any more.
    pub fn retried<T>(
        &self,
        method: Method,
        url: &str,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, HttpError> {
        let mut attempts = self.attempts(&method, url);
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => attempts.failed(failure)?,
            }
        }
    }
}

/// Reads `len` bytes and passes them on, as long as anybody takes them. An error is one of the reader.
fn feed(reader: &mut dyn Read, len: u64, to: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    let mut left = len;
    while left > 0 {
        let mut piece = vec![0; left.min(PIECE as u64) as usize];
        if let Err(e) = reader.read_exact(&mut piece) {
            // The request must not look as if it had ended.
            let _ = to.blocking_send(Err(io::ErrorKind::BrokenPipe.into()));
            return Err(e);
        }
        left -= piece.len() as u64;
        if to.blocking_send(Ok(piece.into())).is_err() {
            break;
        }
    }
    Ok(())
}

/// Empties the file, and keeps the version that is about to be written to it.
fn start_over(file: &File, etag: &Path, headers: &HeaderMap) -> io::Result<()> {
    // The old version first: a kill in between leaves bytes without a version, which the digest catches, and never
    // bytes of one version with the name of another.
    match std::fs::remove_file(etag) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => file.set_len(0)?,
    }
    // A weak one names what means the same, not the same bytes, and is not allowed in If-Range.
    match headers.get(ETAG).and_then(|tag| tag.to_str().ok()) {
        Some(tag) if tag.starts_with('"') && tag.len() <= MAX_ETAG => std::fs::write(etag, tag),
        _ => Ok(()),
    }
}

/// `Content-Range`: where the part starts, and how long the file is.
#[derive(Clone, Copy, Debug)]
pub struct ContentRange {
    /// The first byte.
    pub start: Option<u64>,
    /// The length of the whole.
    pub total: Option<u64>,
}

impl ContentRange {
    /// `bytes 100-199/1000`, `bytes 100-199/*` or `bytes */1000`.
    fn parse(text: &str) -> Option<Self> {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let start = range.split_once('-').and_then(|(start, _)| start.parse().ok());
        Some(Self { start, total: total.parse().ok() })
    }
}

/// `Retry-After`: seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(text.trim()).ok()?;
    Some(until.duration_since(SystemTime::now()).unwrap_or_default())
}

/// What an error on the way means: those that will not go away are final.
fn failure(request: &str, error: &reqwest::Error, got: u64) -> Failure {
    // The error itself says no more than "error sending request"; its causes say what happened.
    let mut why = String::new();
    let mut lasting = error.is_builder() || error.is_redirect();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(e) = cause {
        why = if why.is_empty() { e.to_string() } else { format!("{why}: {e}") };
        lasting |= untrusted(e);
        cause = e.source();
    }
    if why.is_empty() {
        why = error.to_string();
    }
    if lasting {
        return Failure::Final(HttpError::Request { request: request.into(), why });
    }
    Failure::Again { why, after: None, got }
}

/// Whether a certificate was refused, or the server does not speak TLS at all.
fn untrusted(e: &(dyn std::error::Error + 'static)) -> bool {
    let inner = e.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let tls = e.downcast_ref::<rustls::Error>().or_else(|| inner?.downcast_ref());
    matches!(tls, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::InvalidMessage(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_may_not_ask_to_wait_again_and_again() {
        let retry = Retry { attempts: 100, delay: Duration::ZERO };
        let mut attempts = Attempts { retry, request: "GET x".into(), failed: 0, asked: Duration::ZERO };
        let busy = |got| Failure::Again { why: "503".into(), after: Some(Duration::from_secs(400)), got };
        for _ in 0..2 {
            assert_eq!(attempts.wait_after(busy(0)).unwrap().as_secs(), 400);
        }
        // One that sends something in between may.
        assert_eq!(attempts.wait_after(busy(WORTHWHILE)).unwrap().as_secs(), 400);
        attempts.wait_after(busy(0)).unwrap();
        let error = attempts.wait_after(busy(0)).unwrap_err();
        assert_eq!(error.to_string(), "GET x: the server asks to wait for 1200 s");
    }
}
