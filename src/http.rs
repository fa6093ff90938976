//! HTTP: gets a small document, or a large file that is continued where an earlier attempt or run stopped.
//!
//! Blocking outside, tokio and reqwest inside; one [`Http`] serves any number of threads. Proxies come from the usual
//! environment variables. Nothing is verified here: that is up to [`crate::download`].

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_RANGE,
    RANGE, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, StatusCode, redirect};
use tokio::runtime::{Builder, Runtime};

use crate::progress::Task;

/// Time for a connection to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Time without a single byte after which a transfer counts as broken.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that is waited between two attempts when the server does not say how long.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// The longest that a server may ask to wait. One that asks for more is not going to help soon.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(15 * 60);

/// An attempt that brought this many bytes is no failure in a row: the counting of attempts starts again.
const WORTHWHILE: u64 = 1 << 20;

/// The longest `ETag` that is kept, in bytes.
const MAX_ETAG: usize = 1024;

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

/// Why something could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server says no, and will again.
    #[error("GET {url}: {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// It did not work out this often.
    #[error("GET {url}: gave up after {attempts} attempts: {last}")]
    GaveUp {
        /// What was asked for.
        url: String,
        /// How often.
        attempts: u32,
        /// What happened last.
        last: String,
    },
    /// The server asks to wait for too long.
    #[error("GET {url}: the server asks to wait for {} s", .wait.as_secs())]
    Wait {
        /// What was asked for.
        url: String,
        /// How long.
        wait: Duration,
    },
    /// It is longer than it may be.
    #[error("GET {url}: more than {limit} bytes")]
    TooLong {
        /// What was asked for.
        url: String,
        /// In bytes.
        limit: u64,
    },
    /// Not a URL, or too many redirects, or one from https to http.
    #[error("GET {url}: {why}")]
    Request {
        /// What was asked for.
        url: String,
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
enum Failure {
    Final(HttpError),
    Again {
        why: String,
        /// How long the server asks to wait.
        after: Option<Duration>,
        /// Bytes that this attempt brought all the same.
        got: u64,
    },
}

/// An HTTP client.
pub struct Http {
    runtime: Runtime,
    client: Client,
    retry: Retry,
    rate: Option<Rate>,
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

impl Http {
    /// A client that tries as often as `retry` says.
    pub fn new(retry: Retry) -> Result<Self> {
        // An error only says that there is a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Two threads move the bytes; hashing and writing is done by those who call.
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let mut headers = HeaderMap::new();
        // The bytes of the file, not a compressed form of them: digests and ranges are of the file.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let client = Client::builder()
            .user_agent(concat!("rehydrator/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
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
        Ok(Self {
            runtime: runtime.context("cannot start the HTTP client")?,
            client: client.build().context("cannot start the HTTP client")?,
            retry,
            rate: None,
        })
    }

    /// Gets files at no more than this many bytes a second, all together.
    pub fn with_rate(mut self, bytes_per_second: Option<u64>) -> Self {
        let due = Mutex::new(Instant::now());
        self.rate = bytes_per_second.map(|rate| Rate { per_second: rate.max(1), due });
        self
    }

    /// Gets a document of at most `limit` bytes.
    pub fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, HttpError> {
        self.retried(url, || {
            let mut response = self.send(Method::GET, url, &[])?;
            if response.status() != StatusCode::OK {
                return Err(refused(url, &response));
            }
            let mut bytes = Vec::new();
            while let Some(chunk) = self.chunk(url, &mut response, bytes.len() as u64)? {
                if (bytes.len() + chunk.len()) as u64 > limit {
                    return Err(Failure::Final(HttpError::TooLong { url: url.into(), limit }));
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(bytes)
        })
    }

    /// The length of the file at `url`, if the server tells. Asks once.
    pub fn length(&self, url: &str) -> Option<u64> {
        let response = self.send(Method::HEAD, url, &[]).ok()?;
        // Not `content_length()`, which is that of the empty answer.
        let length = response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok();
        length.filter(|_| response.status().is_success())
    }

    /// Gets the file at `url` into `partial`, going on behind the bytes that are there already. `etag` is a file
    /// beside it, kept as long as `partial` is, which remembers the version of the file that they are of.
    ///
    /// True when some of the bytes in `partial` were there before.
    pub fn get_file(&self, url: &str, partial: &Path, etag: &Path, task: &Task) -> Result<bool, HttpError> {
        let mut resumed = true;
        self.retried(url, || self.attempt(url, partial, etag, task, &mut resumed))?;
        Ok(resumed)
    }

    fn attempt(
        &self,
        url: &str,
        partial: &Path,
        etag: &Path,
        task: &Task,
        resumed: &mut bool,
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
        let mut response = self.send(Method::GET, url, &headers)?;
        let range = response.headers().get(CONTENT_RANGE).and_then(|v| ContentRange::parse(v.to_str().ok()?));
        match (response.status(), range) {
            (StatusCode::PARTIAL_CONTENT, Some(range)) if have > 0 && range.start == Some(have) => {
                if let Some(total) = range.total {
                    task.set_total(total);
                }
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(range)) if have > 0 && range.total == Some(have) => {
                return Ok(());
            }
            (StatusCode::OK, _) => {
                have = 0;
                *resumed = false;
                start_over(&file, etag, response.headers()).map_err(write_failed)?;
                if let Some(total) = response.content_length() {
                    task.set_total(total);
                }
            }
            (StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE, _) if have > 0 => {
                start_over(&file, etag, &HeaderMap::new()).map_err(write_failed)?;
                let why = format!("{}: not the range that was asked for", response.status());
                return Err(Failure::Again { why, after: None, got: 0 });
            }
            _ => return Err(refused(url, &response)),
        }
        task.restart(have);
        let mut got = 0;
        while let Some(chunk) = self.chunk(url, &mut response, got)? {
            file.write_all(&chunk).map_err(write_failed)?;
            got += chunk.len() as u64;
            task.advance(chunk.len() as u64);
            if let Some(rate) = &self.rate {
                rate.spend(chunk.len() as u64);
            }
        }
        file.sync_all().map_err(write_failed)
    }

    fn send(&self, method: Method, url: &str, headers: &[(HeaderName, String)]) -> Result<Response, Failure> {
        let mut request = self.client.request(method, url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        self.runtime.block_on(async { request.send().await }).map_err(|e| failure(url, &e, 0))
    }

    fn chunk(
        &self,
        url: &str,
        response: &mut Response,
        got: u64,
    ) -> Result<Option<impl AsRef<[u8]> + std::ops::Deref<Target = [u8]>>, Failure> {
        self.runtime.block_on(async { response.chunk().await }).map_err(|e| failure(url, &e, got))
    }

    fn retried<T>(&self, url: &str, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, HttpError> {
        let mut failed = 0;
        loop {
            let (why, after, got) = match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(e)) => return Err(e),
                Err(Failure::Again { why, after, got }) => (why, after, got),
            };
            failed = if got >= WORTHWHILE { 1 } else { failed + 1 };
            if failed >= self.retry.attempts {
                return Err(HttpError::GaveUp { url: url.into(), attempts: failed, last: why });
            }
            let backoff = self.retry.delay.saturating_mul(1 << (failed - 1).min(16)).min(MAX_DELAY);
            let wait = after.unwrap_or(backoff);
            if wait > MAX_RETRY_AFTER {
                return Err(HttpError::Wait { url: url.into(), wait });
            }
            tracing::info!("GET {url}: {why}; trying again in {:.1} s", wait.as_secs_f64());
            std::thread::sleep(wait);
        }
    }
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
struct ContentRange {
    start: Option<u64>,
    total: Option<u64>,
}

impl ContentRange {
    /// `bytes 100-199/1000`, `bytes 100-199/*` or `bytes */1000`.
    fn parse(text: &str) -> Option<Self> {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let start = range.split_once('-').and_then(|(start, _)| start.parse().ok());
        Some(Self { start, total: total.parse().ok() })
    }
}

/// What an answer that is no success means.
fn refused(url: &str, response: &Response) -> Failure {
    let status = response.status();
    let temporary = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    if !temporary && !status.is_server_error() {
        return Failure::Final(HttpError::Status { url: url.into(), status });
    }
    let after = response.headers().get(RETRY_AFTER).and_then(|v| retry_after(v.to_str().ok()?));
    Failure::Again { why: status.to_string(), after, got: 0 }
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
fn failure(url: &str, error: &reqwest::Error, got: u64) -> Failure {
    // The error itself says no more than "error sending request"; its causes say what happened.
    let mut why = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(e) = cause {
        why = if why.is_empty() { e.to_string() } else { format!("{why}: {e}") };
        cause = e.source();
    }
    if why.is_empty() {
        why = error.to_string();
    }
    if error.is_builder() || error.is_redirect() {
        return Failure::Final(HttpError::Request { url: url.into(), why });
    }
    Failure::Again { why, after: None, got }
}
