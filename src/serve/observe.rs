//! Looks at every request and its answer: counts both, and writes the access log, one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::Stream;
use serde_json::{Value, json};

use super::flow::{Connection, Flow};
use super::metrics::Metrics;
use crate::terminal::Escaped;

/// The longest text of a request that goes into the log, in characters.
const MAX_TEXT: usize = 512;

/// Where requests are counted and logged.
pub struct Observer {
    /// The counters.
    pub metrics: Arc<Metrics>,
    log: Option<Mutex<Box<dyn Write + Send>>>,
}

impl Observer {
    /// Logs to a file, which is appended to, to stdout for `-`, or nowhere for `none`.
    pub fn new(metrics: Arc<Metrics>, log: &Path) -> anyhow::Result<Self> {
        let log: Option<Box<dyn Write + Send>> = match log.to_str() {
            Some("none") => None,
            Some("-") => Some(Box::new(Escaped(io::stdout()))),
            _ => {
                let file: io::Result<File> = OpenOptions::new().create(true).append(true).open(log);
                Some(Box::new(Escaped(file.with_context(|| log.display().to_string())?)))
            }
        };
        Ok(Self { metrics, log: log.map(Mutex::new) })
    }

    fn write(&self, line: &Value) {
        if let Some(log) = &self.log {
            let line = format!("{line}\n");
            // A log that nobody reads any more is no reason not to serve.
            let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
        }
    }
}

/// A method by one of the names that are counted: there are not more than these.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        _ => "other",
    }
}

/// What the log says of a request.
fn describe(request: &Request, connection: Option<&Connection>) -> Value {
    let text = |value: &str| Value::from(value.chars().take(MAX_TEXT).collect::<String>());
    let header = |name| {
        let value = request.headers().get(name).map(|v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()));
        value.map_or(Value::Null, |v| text(&v))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "time": now.as_millis() as f64 / 1e3,
        "peer": connection.map_or("", |c| &c.peer),
        "method": text(request.method().as_str()),
        "path": text(request.uri().path()),
        "query": request.uri().query().map(text),
        "protocol": format!("{:?}", request.version()),
        "range": header(header::RANGE),
        "user-agent": header(header::USER_AGENT),
    })
}

/// Counts and logs a request. Goes around all others.
pub async fn observe(State(observer): State<Arc<Observer>>, request: Request, next: Next) -> Response {
    let connection = Flow::of(request.extensions()).map(|flow| flow.connection.clone());
    let line = describe(&request, connection.as_deref());
    if let Some(connection) = &connection {
        connection.activity.begin();
    }
    let counted = method(request.method());
    let mut watch = Watch { observer, connection, line, started: Instant::now(), sent: 0, expected: None };
    let response = next.run(request).await;
    let (mut parts, body) = response.into_parts();
    watch.observer.metrics.request(counted, parts.status.as_u16());
    watch.line["status"] = parts.status.as_u16().into();
    if let Some(size) = body.size_hint().exact() {
        // The body is a stream from here on, whose length is not known any more.
        if size > 0 || parts.status != StatusCode::NOT_MODIFIED && counted == "GET" {
            parts.headers.entry(header::CONTENT_LENGTH).or_insert(size.into());
        }
        watch.expected = Some(size);
        if size == 0 {
            return Response::from_parts(parts, Body::empty());
        }
    } else {
        let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
        watch.expected = length.and_then(|length| length.parse().ok());
    }
    let stream = Watched { body: body.into_data_stream(), watch };
    Response::from_parts(parts, Body::from_stream(stream))
}

/// What is known of a request until it is done, which is when this is dropped.
struct Watch {
    observer: Arc<Observer>,
    connection: Option<Arc<Connection>>,
    line: Value,
    started: Instant,
    sent: u64,
    expected: Option<u64>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let complete = self.expected == Some(self.sent);
        let metrics = &self.observer.metrics;
        metrics.aborted.add(u64::from(!complete));
        self.line["bytes"] = self.sent.into();
        self.line["complete"] = complete.into();
        self.line["seconds"] = (self.started.elapsed().as_millis() as f64 / 1e3).into();
        self.observer.write(&self.line);
        if let Some(connection) = &self.connection {
            connection.activity.end();
        }
    }
}

/// A body that is counted as it goes.
struct Watched {
    body: BodyDataStream,
    watch: Watch,
}

impl Stream for Watched {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.body).poll_next(cx);
        if let Poll::Ready(Some(Ok(bytes))) = &next {
            let n = bytes.len() as u64;
            self.watch.sent += n;
            self.watch.observer.metrics.bytes.add(n);
        }
        next
    }
}
