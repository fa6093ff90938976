//! `serve`: a release, or many, for every client that speaks HTTP.
//!
//! ```text
//! listen ─► observe ─► router ─► releases ─► content ◄── cache      (files: live out of sources, or made once)
//!                         └────► page, netboot, metrics        └─► mapped    (files of it that the kernel sends by itself)
//! ```
//!
//! The server keeps no state: several of them behind any balancer give the same answers. `docs/serve.md` is for those who
//! run it.

pub mod cache;
pub mod content;
pub mod http;
pub mod listen;
pub mod mapped;
pub mod metrics;
pub mod netboot;
pub mod observe;
pub mod page;
pub mod releases;
pub mod sysupdate;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use askama::Template;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use axum::routing::any;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str};
use tokio::sync::{Semaphore, watch};
use url::Url;

use crate::digest::Digest;
use crate::store::Store;
use cache::Cache;
use content::Reading;
use http::{File, say};
use listen::{Address, Limits, Listeners, TlsFiles};
use metrics::Metrics;
use observe::Observer;
use releases::{Entry, Opened, Release, Releases};

/// The longest path and query of a request, in bytes.
const MAX_PATH: usize = 2048;

/// What is answered here; all else belongs to the repositories of a registry.
const OWN: [&str; 9] = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/boot.ipxe",
    "/boot/{*path}",
    "/streams/{*path}",
    "/prod/{*path}",
    "/ignition/{*path}",
];

/// What is encoded in a component of a path.
const PATH_SET: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-').remove(b'+').remove(b'~');

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; where there is nothing else, on 127.0.0.1:8080.
    pub listen: Vec<Address>,
    /// The certificate, for TLS.
    pub tls: Option<TlsFiles>,
    /// Where clients find the server, if that is not what they call it.
    pub base_url: Option<Url>,
    /// Memory for rehydrating, in bytes.
    pub memory: u64,
    /// Where files are kept that took work to make.
    pub cache: PathBuf,
    /// How many bytes of them.
    pub cache_size: u64,
    /// How many of them are made at a time.
    pub rehydrations: usize,
    /// A directory of Ignition configs.
    pub ignition: Option<PathBuf>,
    /// Where requests are logged: a file, `-` or `none`.
    pub access_log: PathBuf,
    /// Limits of connections.
    pub limits: Limits,
    /// What [`sysupdate::router`] gives, if it is wanted.
    pub sysupdate: Option<Router>,
}

/// What all requests share.
struct App {
    releases: Releases,
    cache: Arc<Cache>,
    reading: Arc<Reading>,
    metrics: Arc<Metrics>,
    base_url: Option<Url>,
    tls: bool,
    ignition: Option<PathBuf>,
    sysupdate: bool,
    draining: watch::Receiver<bool>,
}

/// Serves `stores` until the process is told to end.
pub fn run(stores: Vec<Arc<Store>>, options: Options) -> Result<()> {
    let metrics = Arc::new(Metrics::default());
    let observer = Arc::new(Observer::new(metrics.clone(), &options.access_log)?);
    let cache = Cache::new(options.cache.clone(), options.cache_size, options.rehydrations, metrics.clone())?;
    let readers = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let (drain, draining) = watch::channel(false);
    let app = Arc::new(App {
        releases: Releases::new(stores, options.memory)?,
        cache,
        reading: Arc::new(Reading { readers: Semaphore::new(readers), metrics: metrics.clone() }),
        metrics: metrics.clone(),
        base_url: options.base_url.clone(),
        tls: options.tls.is_some(),
        ignition: options.ignition.clone(),
        sysupdate: options.sysupdate.is_some(),
        draining,
    });
    let mut router = Router::new();
    for path in OWN {
        router = router.route(path, any(answer));
    }
    let router = router
        .with_state(app)
        .merge(options.sysupdate.unwrap_or_default())
        .layer(axum::middleware::from_fn(one_host))
        .layer(axum::middleware::from_fn_with_state(observer, observe::observe));
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let served = runtime.block_on(async {
        let listeners = Listeners::open(&options.listen, options.tls.as_ref())?;
        for address in listeners.addresses() {
            eprintln!("listening on {address}");
        }
        listeners.serve(router, &options.limits, &metrics, &drain).await
    });
    // What is being made for nobody any more need not be finished.
    runtime.shutdown_background();
    served
}

/// Refuses a request with more than one `Host` header, as RFC 9112 (section 3.2) demands: this server and a proxy before it
/// might believe different ones.
async fn one_host(request: Request<Body>, next: axum::middleware::Next) -> Response<Body> {
    if request.headers().get_all(header::HOST).iter().nth(1).is_some() {
        return say(StatusCode::BAD_REQUEST, "more than one Host header");
    }
    next.run(request).await
}

/// Answers a request.
async fn answer(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    let (parts, _) = request.into_parts();
    if parts.method != Method::GET && parts.method != Method::HEAD {
        let mut response = say(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut response = app.route(&parts).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if parts.method == Method::HEAD {
        *response.body_mut() = Body::empty();
    }
    response
}

impl App {
    async fn route(self: &Arc<Self>, parts: &Parts) -> Response<Body> {
        let not_found = || say(StatusCode::NOT_FOUND, "there is nothing here");
        if parts.uri.path_and_query().is_some_and(|p| p.as_str().len() > MAX_PATH) {
            return say(StatusCode::URI_TOO_LONG, format!("at most {MAX_PATH} bytes"));
        }
        let Ok(path) = percent_decode_str(parts.uri.path()).decode_utf8() else { return not_found() };
        match &*path {
            "/" => return self.page(parts),
            "/healthz" => return say(StatusCode::OK, "ok"),
            "/readyz" => {
                return match *self.draining.borrow() {
                    false => say(StatusCode::OK, "ready"),
                    true => say(StatusCode::SERVICE_UNAVAILABLE, "ending"),
                };
            }
            "/metrics" => {
                let text = self.metrics.print(self.cache.held(), self.cache.making().len());
                return document(parts, None, "text/plain; version=0.0.4", text.into_bytes());
            }
            "/boot.ipxe" => return self.boot(parts, None, None).unwrap_or_else(not_found),
            _ => {}
        }
        if let Some(entry) = self.releases.get(&path) {
            return self.file(parts, entry).await;
        }
        let answer = if let Some(name) = path.strip_prefix("/streams/") {
            self.stream(parts, name)
        } else if let Some(name) = path.strip_prefix("/boot/").and_then(|p| p.strip_suffix(".ipxe")) {
            let (stream, arch) = name.split_once('/').map_or((name, None), |(s, a)| (s, Some(a)));
            self.boot(parts, Some(stream), arch)
        } else if let Some(name) = path.strip_prefix("/ignition/") {
            self.config(parts, name).await
        } else {
            None
        };
        answer.unwrap_or_else(not_found)
    }

    /// Where the client finds this server.
    fn base(&self, parts: &Parts) -> Option<Url> {
        if let Some(base) = &self.base_url {
            return Some(base.clone());
        }
        let host = match parts.uri.authority() {
            Some(authority) => authority.as_str(),
            None => parts.headers.get(header::HOST)?.to_str().ok()?,
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
        let scheme = if self.tls { "https" } else { "http" };
        let fit = !host.is_empty() && host.len() <= 255 && host.bytes().all(plain);
        fit.then(|| Url::parse(&format!("{scheme}://{host}/")).ok()).flatten()
    }

    async fn file(self: &Arc<Self>, parts: &Parts, entry: &Arc<Entry>) -> Response<Body> {
        let file = File {
            name: Some(&entry.file.name),
            media_type: "application/octet-stream",
            size: entry.file.blob.size,
            digest: entry.file.blob.sha256,
        };
        let wanted = file.wanted(&parts.method, &parts.headers);
        // Nothing is opened for who wants no bytes.
        if file.body(&parts.method, &wanted).is_none() {
            return file.respond(&parts.method, &wanted, |_| Body::empty());
        }
        let (app, own) = (self.clone(), entry.clone());
        let opened = tokio::task::spawn_blocking(move || own.open(&app.cache, &app.metrics)).await;
        match opened.map_err(anyhow::Error::from).and_then(|opened| opened) {
            Ok(Opened::Bytes(bytes)) => file.bytes(&parts.method, &parts.headers, &bytes),
            Ok(Opened::Content(content)) => {
                let name = &entry.file.name;
                let connection = parts.extensions.get::<Arc<observe::Connection>>();
                let plain = connection.is_some_and(|connection| connection.plain);
                let body = |range| content::body(content, name, range, file.size, &self.reading, plain);
                file.respond(&parts.method, &wanted, body)
            }
            Err(e) => {
                tracing::error!("{}: {e:#}", entry.file.name);
                let mut response = match e.downcast_ref::<cache::NoRoom>() {
                    Some(e) => say(StatusCode::SERVICE_UNAVAILABLE, e.to_string()),
                    None => say(StatusCode::BAD_GATEWAY, "it cannot be made; the log of the server says why"),
                };
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("60"));
                response
            }
        }
    }

    /// A document of a stream: the one for clients of this server, or the original and its signature.
    fn stream(&self, parts: &Parts, name: &str) -> Option<Response<Body>> {
        const JSON: &str = "application/json";
        let original = parts.uri.query() == Some("original");
        if let Some(name) = name.strip_suffix(".json.sig").filter(|_| original) {
            let signature = self.releases.stream(name)?.signature()?;
            return Some(document(parts, None, "application/octet-stream", signature));
        }
        let release = self.releases.stream(name.strip_suffix(".json")?)?;
        if original {
            return Some(document(parts, None, JSON, release.original()));
        }
        let Some(base) = self.base(parts) else {
            return Some(say(StatusCode::BAD_REQUEST, "no host is asked for"));
        };
        match release.document(&base) {
            Ok(json) => Some(document(parts, None, JSON, json)),
            Err(e) => {
                tracing::error!("{name}: {e:#}");
                None
            }
        }
    }

    /// A script of iPXE, for the newest release of a stream: the first if none is named.
    fn boot(&self, parts: &Parts, stream: Option<&str>, arch: Option<&str>) -> Option<Response<Body>> {
        let query = |name: &str| {
            let pairs = url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
            pairs.into_iter().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        let stream = stream.map(str::to_owned).or_else(|| query("stream"));
        let release: &Arc<Release> = match &stream {
            Some(stream) => self.releases.stream(stream)?,
            None => self.releases.all.first()?,
        };
        let Some(base) = self.base(parts) else {
            return Some(say(StatusCode::BAD_REQUEST, "no host is asked for"));
        };
        let ignition = query("ignition");
        if let Some(Err(e)) = ignition.as_deref().map(netboot::check_ignition_url) {
            return Some(say(StatusCode::BAD_REQUEST, e.to_string()));
        }
        let arch = arch.map(str::to_owned).or_else(|| query("arch"));
        let live = release.live();
        let only = live.keys().next().filter(|_| live.len() == 1).map(|arch| (*arch).to_owned());
        let script = match arch.or(only) {
            Some(arch) => netboot::script(release, &arch, &base, ignition.as_deref())?,
            None if live.is_empty() => return None,
            None => {
                let pass = ignition.map(|url| {
                    url::form_urlencoded::Serializer::new(String::new())
                        .append_pair("ignition", &url)
                        .finish()
                });
                netboot::by_architecture(release, &base, pass.as_deref())?
            }
        };
        Some(document(parts, None, "text/plain; charset=utf-8", script.into_bytes()))
    }

    /// An Ignition config.
    async fn config(&self, parts: &Parts, name: &str) -> Option<Response<Body>> {
        let (dir, own) = (self.ignition.clone()?, name.to_owned());
        let read = tokio::task::spawn_blocking(move || netboot::config(&dir, &own)).await;
        match read.map_err(anyhow::Error::from).and_then(|read| read) {
            Ok(bytes) => Some(document(parts, Some(name), "application/vnd.coreos.ignition+json", bytes?)),
            Err(e) => {
                tracing::error!("ignition: {e:#}");
                None
            }
        }
    }

    fn page(&self, parts: &Parts) -> Response<Body> {
        let Some(base) = self.base(parts) else {
            return say(StatusCode::BAD_REQUEST, "no host is asked for");
        };
        match page::Page::new(&self.releases.all, &base, self.cache.making(), self.sysupdate).render() {
            Ok(html) => {
                let mut response = document(parts, None, "text/html; charset=utf-8", html.into_bytes());
                let policy = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
                response
                    .headers_mut()
                    .insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
                response
            }
            Err(e) => say(StatusCode::BAD_GATEWAY, e.to_string()),
        }
    }
}

/// An answer out of memory.
fn document(
    parts: &Parts,
    name: Option<&str>,
    media_type: &'static str,
    bytes: impl Into<Bytes>,
) -> Response<Body> {
    let bytes = bytes.into();
    let file = File { name, media_type, size: bytes.len() as u64, digest: Digest::of(&bytes) };
    file.bytes(&parts.method, &parts.headers, &bytes)
}
