//! `serve`: a release, or many, for every client that speaks HTTP.
//!
//! ```text
//! listen ─► observe ─► router ─► releases ─► content ◄── cache      (files: live out of sources, or made once)
//!   └─ flow (what is under way)  └────► page, netboot, metrics   └─► mapped    (files of it that the kernel sends by itself)
//! ```
//!
//! Against clients that take more than their share: [`clients`] (places, by address), [`flow`] (who takes nothing is
//! cut off), [`content::Buffers`] (memory), [`pool`] (threads).
//!
//! The server keeps no state: several of them behind any balancer give the same answers. `docs/serve.md` is for those who
//! run it.

pub mod cache;
pub mod clients;
pub mod content;
pub mod flow;
pub mod http;
pub mod listen;
pub mod mapped;
pub mod metrics;
pub mod netboot;
pub mod observe;
pub mod page;
pub mod pool;
pub mod releases;
pub mod sysupdate;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use askama::Template;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use axum::routing::any;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str};
use tokio::sync::watch;
use url::Url;

use crate::digest::Digest;
use crate::store::Store;
use cache::Cache;
use content::{Buffers, Reading};
use flow::Flow;
use http::{File, busy, say};
use listen::{Address, Limits, Listeners, Site, TlsFiles};
use metrics::Metrics;
use observe::Observer;
use pool::{Busy, Pool};
use releases::{Entry, Opened, Opening, Release, Releases};

/// The longest path and query of a request, in bytes.
const MAX_PATH: usize = 2048;

/// The most connections at a time to the listeners for administration: those of probes and monitors.
const MAX_ADMIN: usize = 64;

/// Files and sources that are opened at a time: opening fetches from a registry, and decodes metadata.
const OPENERS: usize = 16;

/// Threads for all pools together, beside the readers: sysupdate has most of them, one for each download.
const THREADS: usize = 512;

/// What the listeners for administration answer.
const ADMIN: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// What is answered here; all else belongs to the repositories of a registry.
const OWN: [&str; 8] = [
    "/",
    "/healthz",
    "/readyz",
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
    /// Where else `/healthz`, `/readyz` and `/metrics` are answered, without TLS; `/metrics` only there, if anywhere.
    pub admin_listen: Vec<Address>,
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
    /// The most downloads of one client at a time; 0 is no limit.
    pub downloads_per_client: usize,
    /// How long a request waits for its turn.
    pub queue: Duration,
    /// What [`sysupdate::router`] gives, if it is wanted.
    pub sysupdate: Option<Router>,
}

/// What all requests share.
struct App {
    releases: Releases,
    opening: Arc<Opening>,
    configs: Pool,
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
    let buffers = Buffers::part_of(options.memory);
    let readers = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let patient = |threads| Pool::new(threads, Some(options.queue));
    let (drain, draining) = watch::channel(false);
    let app = Arc::new(App {
        releases: Releases::new(stores, options.memory.saturating_sub(buffers))?,
        opening: Arc::new(Opening {
            cache,
            metrics: metrics.clone(),
            sources: patient(OPENERS),
            bases: Pool::new(1, None),
            patience: options.queue,
        }),
        configs: patient(OPENERS),
        reading: Arc::new(Reading {
            sources: Pool::new(readers, None),
            files: Pool::new(readers, None),
            buffers: Buffers::new(buffers, options.downloads_per_client),
            metrics: metrics.clone(),
        }),
        metrics: metrics.clone(),
        base_url: options.base_url.clone(),
        tls: options.tls.is_some(),
        ignition: options.ignition.clone(),
        sysupdate: options.sysupdate.is_some(),
        draining,
    });
    let of = |paths: &[&str]| {
        let router = Router::new();
        paths.iter().fold(router, |router, path| router.route(path, any(answer))).with_state(app.clone())
    };
    let mut public = of(&OWN);
    if options.admin_listen.is_empty() {
        public = public.merge(of(&["/metrics"]));
    }
    let around = |router: Router| {
        router
            .layer(axum::middleware::from_fn(one_host))
            .layer(axum::middleware::from_fn_with_state(observer.clone(), observe::observe))
    };
    let public = around(public.merge(options.sysupdate.unwrap_or_default()));
    let admin = around(of(&ADMIN));
    let runtime = || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.enable_all().max_blocking_threads(THREADS + 2 * readers);
        runtime
    };
    // A thread of its own: probes do not wait behind thousands of connections.
    let beside = runtime().worker_threads(1).build().context("cannot start threads")?;
    let runtime = runtime().build().context("cannot start threads")?;
    let served = runtime.block_on(async {
        let limits = options.limits;
        let of_admin = Limits { connections: MAX_ADMIN, connections_per_client: 0, ..limits.clone() };
        let listeners = Listeners::open(&options.listen, options.tls.as_ref())?;
        for address in listeners.addresses() {
            eprintln!("listening on {address}");
        }
        let administration = {
            let _there = beside.enter();
            Listeners::open_only(&options.admin_listen)?
        };
        for address in administration.addresses() {
            eprintln!("administration on {address}");
        }
        let (here, there) = (runtime.handle().clone(), beside.handle().clone());
        let sites = [
            Site { listeners, router: public, limits: limits.clone(), runtime: here },
            Site { listeners: administration, router: admin, limits: of_admin, runtime: there },
        ];
        listen::serve(sites.into(), limits.drain, &metrics, &drain).await
    });
    // What is being made for nobody any more need not be finished.
    runtime.shutdown_background();
    beside.shutdown_background();
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
    // What the probes ask for must always be answered, and takes nothing.
    let mut response = match Flow::of(&parts.extensions) {
        Some(flow) if !ADMIN.contains(&parts.uri.path()) => match app.reading.buffers.enter(flow) {
            Ok(()) => app.route(&parts).await,
            Err(e) => busy(format!("downloads: {e}")),
        },
        _ => app.route(&parts).await,
    };
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
            "/" => return self.page(parts).await,
            "/healthz" => return say(StatusCode::OK, "ok"),
            "/readyz" => {
                return match *self.draining.borrow() {
                    false => say(StatusCode::OK, "ready"),
                    true => say(StatusCode::SERVICE_UNAVAILABLE, "ending"),
                };
            }
            "/metrics" => {
                let text = self.metrics.print(self.opening.cache.held(), self.opening.cache.making().len());
                return document(parts, None, "text/plain; version=0.0.4", text.into_bytes());
            }
            "/boot.ipxe" => return self.boot(parts, None, None).unwrap_or_else(not_found),
            _ => {}
        }
        if let Some(entry) = self.releases.get(&path) {
            return self.file(parts, entry).await;
        }
        let answer = if let Some(name) = path.strip_prefix("/streams/") {
            self.stream(parts, name).await
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
        let Some(flow) = Flow::of(&parts.extensions) else {
            return say(StatusCode::BAD_REQUEST, "no connection");
        };
        match entry.open(&self.opening).await {
            Ok(Opened::Bytes(bytes)) => file.bytes(&parts.method, &parts.headers, &bytes),
            Ok(Opened::Content(content)) => {
                let name = &entry.file.name;
                let direct = flow.connection.plain && parts.version < Version::HTTP_2;
                let body =
                    |range| content::body(content, name, range, file.size, &self.reading, flow, direct);
                file.respond(&parts.method, &wanted, body)
            }
            Err(e) if e.is::<Busy>() => busy(format!("{e:#}")),
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
    async fn stream(&self, parts: &Parts, name: &str) -> Option<Response<Body>> {
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
        self.hold(parts, release.original().len()).await;
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
        let read = async {
            let Some((file, len)) = self.configs.run(move || netboot::config(&dir, &own)).await?? else {
                return Ok(None);
            };
            self.hold(parts, len as usize).await;
            self.configs.run(move || netboot::read_config(file, len)).await?.map(Some)
        };
        match read.await {
            Ok(bytes) => Some(document(parts, Some(name), "application/vnd.coreos.ignition+json", bytes?)),
            Err(e) if e.is::<Busy>() => Some(busy(format!("{e:#}"))),
            Err(e) => {
                tracing::error!("ignition: {e:#}");
                None
            }
        }
    }

    /// Takes memory for an answer of some `len` bytes, until it has been taken.
    async fn hold(&self, parts: &Parts, len: usize) {
        let memory = self.reading.buffers.whole(len as u64).await;
        if let Some(flow) = Flow::of(&parts.extensions) {
            flow.keep(memory);
        }
    }

    async fn page(&self, parts: &Parts) -> Response<Body> {
        let Some(base) = self.base(parts) else {
            return say(StatusCode::BAD_REQUEST, "no host is asked for");
        };
        let page = page::Page::new(&self.releases.all, &base, self.opening.cache.making(), self.sysupdate);
        match page.render() {
            Ok(html) => {
                self.hold(parts, html.len()).await;
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
