//! Reads from registries, and gets the authorization for that.
//!
//! A registry is asked without authorization first, unless there is one from an earlier request; its refusal says which
//! kind it wants. One registry of a [`Client`] has one [`Http`], since certificates are chosen by registry.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_auth::ChallengeParser;
use oci_spec::image::{Descriptor, MediaType};
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, LINK, RANGE, WWW_AUTHENTICATE,
};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use super::{Credentials, Files, Reference};
use crate::bounded::AtMost;
use crate::digest::{Digest, Hasher};
use crate::http::{Answer, Attempts, Body, Failure, Http, HttpError, Retry, STALL_TIMEOUT, Settings, Tls};

/// The longest manifest that is read, in bytes: what registries take at most.
pub const MAX_MANIFEST: u64 = 4 << 20;

/// The longest page of tags or referrers that is read, in bytes.
const MAX_PAGE: u64 = 4 << 20;

/// The most of these pages that are read; a registry that has more repeats itself.
const MAX_PAGES: usize = 10_000;

/// The most tags of a repository: more than any has that an automaton fills.
const MAX_TAGS: usize = 1 << 19;

/// The most bytes of all pages of tags together.
const MAX_TAG_BYTES: u64 = 64 << 20;

/// The most manifests that refer to one, and the most bytes of all pages that name them: those of an index, which is made of
/// them.
const MAX_REFERRERS: usize = 1000;
const MAX_REFERRER_BYTES: u64 = MAX_MANIFEST;

/// The most that an archive of an image takes when decompressed unless told otherwise, in bytes: more than any image of a
/// system has.
pub const MAX_ARCHIVE: u64 = 64 << 30;

/// The longest answer of a token service that is read, in bytes.
const MAX_TOKEN: u64 = 256 << 10;

/// How long a token lasts whose service does not say.
const TOKEN_TIME: Duration = Duration::from_secs(60);

/// A token that lasts less than this is as good as gone: the request that uses it takes time too.
const TOKEN_LEFT: Duration = Duration::from_secs(10);

/// The most authorizations of a registry that are kept: one for each repository. A server whose clients choose the repository
/// would have one for every guess.
const MAX_AUTHORIZATIONS: usize = 256;

/// What a registry calls the digest of what it answers with.
pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// The manifests that are understood.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, */*;q=0.1";

/// Where certificates by registry are, as containers-certs.d(5) has it.
const CERTIFICATES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The longest file of certificates or keys that is read, in bytes.
const MAX_CERTIFICATES: u64 = 4 << 20;

/// How to speak to registries.
#[derive(Clone, Debug)]
pub struct Options {
    /// Credentials for all of them; otherwise those in files.
    pub credentials: Option<Credentials>,
    /// A file of credentials, instead of the usual ones.
    pub authfile: Option<PathBuf>,
    /// Without it, certificates are not checked, and a registry that speaks no TLS is spoken to without.
    pub tls_verify: bool,
    /// A directory with certificates of authorities (`*.crt`) and our own (`*.cert` with `*.key`), instead of those
    /// in `/etc/containers/certs.d/HOST:PORT`.
    pub cert_dir: Option<PathBuf>,
    /// How often to try.
    pub retry: Retry,
    /// How long a registry may be silent.
    pub stall: Duration,
    /// Bytes of a blob that are pushed with one request: what is sent again, at most, when a connection breaks.
    pub chunk: u64,
    /// Let skopeo read images, as the `registries.conf` and the `policy.json` of the machine say.
    pub skopeo: bool,
    /// Fetch layers that the registry does not have from where the manifest says that they are.
    pub foreign_layers: bool,
    /// The most that an archive of an image takes when decompressed, in bytes.
    pub max_archive: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            credentials: None,
            authfile: None,
            tls_verify: true,
            cert_dir: None,
            retry: Retry::default(),
            stall: STALL_TIMEOUT,
            chunk: 16 << 20,
            skopeo: false,
            foreign_layers: false,
            max_archive: MAX_ARCHIVE,
        }
    }
}

impl Options {
    /// Whether a client with these options has credentials, or a certificate of its own, for any repository of the registry
    /// of `reference`.
    pub fn has_credentials(&self, reference: &Reference) -> Result<bool> {
        let own = |dir: &Path| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.into_iter().any(|entry| entry.path().extension().is_some_and(|e| e == "cert"))
        };
        let has_certificate = match &self.cert_dir {
            Some(dir) => own(dir),
            None => CERTIFICATES.iter().any(|dir| own(&Path::new(dir).join(reference.host()))),
        };
        Ok(self.credentials.is_some()
            || has_certificate
            || Files::new(self.authfile.as_deref()).has_any(reference)?)
    }

    /// The same without credentials, whatever files there are.
    pub fn anonymous(self) -> Self {
        Self { credentials: None, authfile: Some("/dev/null".into()), ..self }
    }

    /// For pushing: registries are silent while they check or move what they got.
    pub fn patient(self) -> Self {
        Self { stall: Duration::from_secs(15 * 60), ..self }
    }
}

/// A manifest, or an index of them, as the registry has it.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The document.
    pub bytes: Vec<u8>,
    /// What it is.
    pub media_type: MediaType,
    /// Its digest.
    pub digest: Digest,
}

/// A client of registries. Copies share all they have.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    options: Options,
    files: Files,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

/// A registry.
pub(super) struct Host {
    http: Http,
    /// `https://HOST` or `http://HOST`.
    base: Url,
    /// By what they allow.
    authorizations: Mutex<HashMap<String, Authorization>>,
}

struct Authorization {
    header: String,
    until: Option<Instant>,
}

/// Gives the content of a blob from an offset on; called again after a failure.
pub type Open<'a> = dyn Fn(u64) -> io::Result<Box<dyn Read + 'a>> + 'a;

/// What a request carries; it may have to be sent more than once.
pub(super) enum Payload<'a> {
    None,
    Bytes(Bytes),
    Part { open: &'a Open<'a>, offset: u64, len: u64 },
}

/// How much of a list in pages is read.
#[derive(Clone, Copy)]
struct Most {
    entries: usize,
    bytes: u64,
}

/// What is to be done in which repository.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) reference: Reference,
    pub(super) push: bool,
    /// Another repository that blobs are taken from.
    pub(super) from: Option<String>,
}

impl Access {
    fn pull(reference: &Reference) -> Self {
        Self { reference: reference.clone(), push: false, from: None }
    }

    fn scopes(&self) -> Vec<String> {
        let actions = if self.push { "pull,push" } else { "pull" };
        let own = format!("repository:{}:{actions}", self.reference.repository());
        std::iter::once(own).chain(self.from.iter().map(|from| format!("repository:{from}:pull"))).collect()
    }
}

/// Whether `error` is that the registry does not have what was asked for.
pub fn not_found(error: &anyhow::Error) -> bool {
    is_status(error, &[StatusCode::NOT_FOUND])
}

/// How registries answer that do not keep track of referrers.
const NO_REFERRERS: [StatusCode; 5] = [
    StatusCode::BAD_REQUEST,
    StatusCode::NOT_FOUND,
    StatusCode::METHOD_NOT_ALLOWED,
    StatusCode::NOT_ACCEPTABLE,
    StatusCode::NOT_IMPLEMENTED,
];

/// Whether `error` is an answer with one of these statuses.
fn is_status(error: &anyhow::Error, statuses: &[StatusCode]) -> bool {
    let one = |e: &HttpError| matches!(e, HttpError::Status { status, .. } if statuses.contains(status));
    error.chain().filter_map(|e| e.downcast_ref()).any(one)
}

impl Client {
    /// A client with these options.
    pub fn new(options: Options) -> Self {
        let files = Files::new(options.authfile.as_deref());
        Self(Arc::new(Inner { options, files, hosts: Mutex::default() }))
    }

    pub(super) fn options(&self) -> &Options {
        &self.0.options
    }

    /// The manifest that `reference` names, checked against its digest where it has one.
    pub fn manifest(&self, reference: &Reference) -> Result<Manifest> {
        let access = Access::pull(reference);
        let (host, url) = self.manifest_url(&access)?;
        let read = || {
            let accept = [(ACCEPT, MANIFESTS.into())];
            let answer = self.request(&host, &access, &Method::GET, &url, &accept, &Payload::None)?;
            if answer.status() != StatusCode::OK {
                return Err(answer.refused());
            }
            let header = |name| answer.header(name).map(str::to_owned);
            let (kind, claimed) = (header(CONTENT_TYPE), header(CONTENT_DIGEST));
            Ok((answer.document(MAX_MANIFEST)?, kind, claimed))
        };
        let at = || reference.to_string();
        let (bytes, kind, claimed) = host.http.retried(Method::GET, &url, read).with_context(at)?;
        let digest = Digest::of(&bytes);
        // One that names no sha256 digest says nothing that could be checked.
        let claimed = claimed.and_then(|text| text.starts_with("sha256:").then(|| text.parse().ok())?);
        if let Some(expected) = reference.digest().or(claimed) {
            digest.must_be(expected).with_context(|| format!("{}: manifest", at()))?;
        }
        let kind = kind.as_deref().and_then(|kind| kind.split(';').next()).map(str::trim).unwrap_or_default();
        Ok(Manifest { media_type: media_type(kind, &bytes), bytes, digest })
    }

    /// The digest of what `reference` names, without getting it where the registry allows that.
    pub fn digest(&self, reference: &Reference) -> Result<Digest> {
        let access = Access::pull(reference);
        let (host, url) = self.manifest_url(&access)?;
        let ask = || {
            let accept = [(ACCEPT, MANIFESTS.into())];
            let answer = self.request(&host, &access, &Method::HEAD, &url, &accept, &Payload::None)?;
            match answer.status() {
                StatusCode::OK => Ok(answer.header(CONTENT_DIGEST).and_then(|text| text.parse().ok())),
                StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Ok(None),
                _ => Err(answer.refused()),
            }
        };
        let at = || reference.to_string();
        let found = host.http.retried(Method::HEAD, &url, ask).with_context(at)?;
        let found = found.map_or_else(|| Ok(self.manifest(reference)?.digest), anyhow::Ok)?;
        if let Some(expected) = reference.digest() {
            found.must_be(expected).with_context(at)?;
        }
        Ok(found)
    }

    /// A blob of the repository of `reference`, from start to end. That it is what `digest` and `size` say is checked at
    /// its end, where anything else is an error.
    pub fn blob(&self, reference: &Reference, digest: Digest, size: u64) -> Result<BlobReader> {
        let check = Some((Hasher::new(io::sink()), digest));
        self.reader(reference, digest, 0..size, size, check)
    }

    /// The bytes in `range` of a blob of `size` bytes. They cannot be checked by its digest: that is up to the caller.
    pub fn blob_range(
        &self,
        reference: &Reference,
        digest: Digest,
        range: Range<u64>,
        size: u64,
    ) -> Result<BlobReader> {
        self.reader(reference, digest, range, size, None)
    }

    /// A small blob, such as a configuration, checked.
    pub fn document(&self, reference: &Reference, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let (digest, size) = (descriptor.digest().to_string(), descriptor.size());
        let at = || format!("{}: blob {digest}", reference.name());
        ensure!(size <= MAX_MANIFEST, "{}: {size} bytes: at most {MAX_MANIFEST} are read", at());
        let mut bytes = Vec::new();
        self.blob(reference, digest.parse().with_context(at)?, size)?
            .read_to_end(&mut bytes)
            .with_context(at)?;
        Ok(bytes)
    }

    fn reader(
        &self,
        reference: &Reference,
        digest: Digest,
        range: Range<u64>,
        size: u64,
        check: Option<(Hasher<io::Sink>, Digest)>,
    ) -> Result<BlobReader> {
        let access = Access::pull(reference);
        let (host, url) = self.blob_url(&access, digest)?;
        let attempts = host.http.attempts(&Method::GET, &url);
        let (client, chunk) = (self.clone(), Bytes::new());
        Ok(BlobReader {
            client,
            host,
            access,
            url,
            pos: range.start,
            end: range.end,
            whole: range.end == size,
            ranges: true,
            check,
            answer: None,
            began: range.start,
            skip: 0,
            chunk,
            attempts,
        })
    }

    /// Whether the repository of `reference` has a blob.
    pub fn has_blob(&self, reference: &Reference, digest: Digest) -> Result<bool> {
        self.has(&Access::pull(reference), digest)
    }

    pub(super) fn has(&self, access: &Access, digest: Digest) -> Result<bool> {
        let (host, url) = self.blob_url(access, digest)?;
        let ask = || {
            let answer = self.request(&host, access, &Method::HEAD, &url, &[], &Payload::None)?;
            match answer.status() {
                StatusCode::OK => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(answer.refused()),
            }
        };
        host.http.retried(Method::HEAD, &url, ask).with_context(|| access.reference.name())
    }

    /// All tags of the repository of `reference`, in the order of the registry.
    pub fn tags(&self, reference: &Reference) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<AtMost<String, MAX_TAGS>>,
        }
        let most = Most { entries: MAX_TAGS, bytes: MAX_TAG_BYTES };
        let entries = |page: &[u8]| Ok(serde_json::from_slice::<Page>(page)?.tags.unwrap_or_default().0);
        self.pages(reference, "tags", "/list?n=1000", most, entries)
    }

    /// Descriptors of the manifests that refer to the manifest `digest` of the repository of `reference`, as the registry
    /// has them. Nothing where it does not keep track of that.
    pub fn referrers(&self, reference: &Reference, digest: Digest) -> Result<Option<Vec<Descriptor>>> {
        #[derive(Deserialize)]
        struct Page {
            manifests: Option<AtMost<Descriptor, MAX_REFERRERS>>,
        }
        let most = Most { entries: MAX_REFERRERS, bytes: MAX_REFERRER_BYTES };
        // A registry that does not know of referrers may answer with a page for people, or `null`.
        let entries = |page: &[u8]| match page.trim_ascii_start() {
            [b'{', ..] => Ok(serde_json::from_slice::<Page>(page)?.manifests.unwrap_or_default().0),
            _ => Ok(Vec::new()),
        };
        match self.pages(reference, "referrers", &format!("/{}", digest.oci()), most, entries) {
            Ok(entries) => Ok(Some(entries)),
            Err(e) if is_status(&e, &NO_REFERRERS) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The entries of all pages of `what` there is of the repository of `reference`.
    fn pages<T>(
        &self,
        reference: &Reference,
        what: &str,
        rest: &str,
        most: Most,
        entries: impl Fn(&[u8]) -> serde_json::Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let access = Access::pull(reference);
        let host = self.host(reference)?;
        let at = || format!("{}: {what}", reference.name());
        let mut url = host.url(&format!("{}/{what}{rest}", reference.repository()))?;
        let (mut all, mut left) = (Vec::new(), most.bytes);
        for _ in 0..MAX_PAGES {
            let read = || {
                let answer = self.request(&host, &access, &Method::GET, &url, &[], &Payload::None)?;
                if answer.status() != StatusCode::OK {
                    return Err(answer.refused());
                }
                // There may be several of these headers.
                let mut links = answer.headers().get_all(LINK).iter().filter_map(|link| link.to_str().ok());
                let next = links.find_map(next_page).map(str::to_owned);
                Ok((answer.document(MAX_PAGE)?, next))
            };
            let (page, next) = host.http.retried(Method::GET, &url, read).with_context(at)?;
            let rest = left.checked_sub(page.len() as u64);
            left = rest.with_context(|| format!("{}: more than {} bytes", at(), most.bytes))?;
            all.extend(entries(&page).with_context(at)?);
            ensure!(all.len() <= most.entries, "{}: more than {}", at(), most.entries);
            let Some(next) = next else { return Ok(all) };
            let next = Url::parse(&url)?.join(&next).with_context(at)?.into();
            // A page that is its own next one, as some registries have it, is the last.
            if next == url {
                return Ok(all);
            }
            url = next;
        }
        anyhow::bail!("{}: more than {MAX_PAGES} pages", at())
    }

    fn manifest_url(&self, access: &Access) -> Result<(Arc<Host>, String)> {
        let reference = &access.reference;
        let host = self.host(reference)?;
        let url = host.url(&format!("{}/manifests/{}", reference.repository(), reference.version()))?;
        Ok((host, url))
    }

    /// Where the registry has a blob of the repository of `reference`.
    pub fn blob_location(&self, reference: &Reference, digest: Digest) -> Result<String> {
        self.blob_url(&Access::pull(reference), digest).map(|(_, url)| url)
    }

    fn blob_url(&self, access: &Access, digest: Digest) -> Result<(Arc<Host>, String)> {
        let host = self.host(&access.reference)?;
        let url = host.url(&format!("{}/blobs/{}", access.reference.repository(), digest.oci()))?;
        Ok((host, url))
    }

    /// The registry of `reference`.
    pub(super) fn host(&self, reference: &Reference) -> Result<Arc<Host>> {
        let name = reference.host();
        // Held while it is found out how it is spoken to, so that that happens once.
        let mut hosts = self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = hosts.get(name) {
            return Ok(host.clone());
        }
        let host = self.connect(name).with_context(|| format!("registry {}", reference.registry()))?;
        let host = Arc::new(host);
        hosts.insert(name.to_owned(), host.clone());
        Ok(host)
    }

    fn connect(&self, name: &str) -> Result<Host> {
        let options = &self.0.options;
        let mut tls = Tls { verify: options.tls_verify, ..Tls::default() };
        match &options.cert_dir {
            Some(dir) => add_certificates(&mut tls, dir)?,
            None => {
                for dir in CERTIFICATES.map(|dir| Path::new(dir).join(name)) {
                    if dir.is_dir() {
                        add_certificates(&mut tls, &dir)?;
                    }
                }
            }
        }
        let http =
            Http::with(&Settings { retry: options.retry, stall: options.stall, tls, ..Settings::default() })?;
        let mut base = Url::parse(&format!("https://{name}"))?;
        if !options.tls_verify {
            // As in skopeo: without TLS where there is none.
            let url = base.join("v2/")?;
            let plain = http.retried(Method::GET, url.as_str(), || {
                let ask = |url: &str| http.send(Method::GET, url, &[], Body::None).map(drop);
                let Err(error) = ask(url.as_str()) else { return Ok(false) };
                match ask(&url.as_str().replacen("https", "http", 1)) {
                    Ok(()) => Ok(true),
                    Err(_) => Err(error),
                }
            })?;
            if plain {
                base = Url::parse(&format!("http://{name}"))?;
            }
        }
        Ok(Host { http, base, authorizations: Mutex::default() })
    }

    /// Sends a request with the authorization it needs.
    pub(super) fn request(
        &self,
        host: &Host,
        access: &Access,
        method: &Method,
        url: &str,
        headers: &[(HeaderName, String)],
        payload: &Payload<'_>,
    ) -> Result<Answer, Failure> {
        let invalid =
            |why: String| Failure::Final(HttpError::Request { request: format!("{method} {url}"), why });
        let own = Url::parse(url).map_err(|e| invalid(e.to_string()))?.origin() == host.base.origin();
        if !own && !url.starts_with("https:") && host.base.scheme() == "https" {
            return Err(invalid("the registry sends us from https to http".into()));
        }
        let mut fresh = None;
        loop {
            let mut headers = headers.to_vec();
            // Another host gets no authorization of this one.
            if own && let Some(header) = fresh.clone().or_else(|| host.authorization(access)) {
                headers.push((AUTHORIZATION, header));
            }
            let send = |body: Body<'_>| host.http.send(method.clone(), url, &headers, body);
            let answer = match payload {
                Payload::None => send(Body::None)?,
                Payload::Bytes(bytes) => send(Body::Bytes(bytes.clone()))?,
                Payload::Part { open, offset, len } => {
                    let mut reader = open(*offset).map_err(|e| invalid(e.to_string()))?;
                    send(Body::Reader(&mut *reader, *len))?
                }
            };
            // One that another host refuses, to which this one redirected, is not for our credentials either.
            let asks =
                answer.status() == StatusCode::UNAUTHORIZED && answer.url().origin() == host.base.origin();
            if !asks || !own || fresh.is_some() {
                return Ok(answer);
            }
            // However short it lasts, it is for this request.
            fresh = Some(self.authorize(host, access, answer)?);
        }
    }

    /// Gets the authorization that `refusal` asks for.
    fn authorize(&self, host: &Host, access: &Access, refusal: Answer) -> Result<String, Failure> {
        let credentials = match &self.0.options.credentials {
            Some(credentials) => Some(credentials.clone()),
            None => self.0.files.find(&access.reference).map_err(|e| {
                let request = access.reference.name();
                Failure::Final(HttpError::Request { request, why: format!("{e:#}") })
            })?,
        };
        let challenges = Challenge::all(&refusal);
        let bearer = challenges.iter().find(|c| c.scheme == "bearer" && c.realm.is_some());
        let authorization = if let Some(challenge) = bearer {
            token(host, access, challenge, credentials.as_ref())?
        } else if let Some(Credentials::User { name, password }) = &credentials
            && challenges.iter().any(|c| c.scheme == "basic")
        {
            Authorization { header: basic(name, password), until: None }
        } else {
            return Err(refusal.refused());
        };
        let header = authorization.header.clone();
        let mut all = host.authorizations.lock().unwrap_or_else(PoisonError::into_inner);
        remember(&mut all, access.scopes().join(" "), authorization);
        Ok(header)
    }
}

impl Host {
    pub(super) fn http(&self) -> &Http {
        &self.http
    }

    pub(super) fn url(&self, path: &str) -> Result<String> {
        Ok(self.base.join("v2/")?.join(path)?.into())
    }

    fn authorization(&self, access: &Access) -> Option<String> {
        let all = self.authorizations.lock().unwrap_or_else(PoisonError::into_inner);
        let found = all.get(&access.scopes().join(" "))?;
        found.until.is_none_or(|until| Instant::now() < until).then(|| found.header.clone())
    }
}

/// Keeps an authorization, in place of the one that ends first where there are too many.
fn remember(all: &mut HashMap<String, Authorization>, scopes: String, authorization: Authorization) {
    if all.len() >= MAX_AUTHORIZATIONS && !all.contains_key(&scopes) {
        let first = all.iter().min_by_key(|(_, known)| known.until).map(|(scopes, _)| scopes.clone());
        first.and_then(|scopes| all.remove(&scopes));
    }
    all.insert(scopes, authorization);
}

fn basic(name: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{name}:{password}")))
}

/// One way in which a registry wants to know who we are.
#[derive(Debug)]
struct Challenge {
    /// In lower case.
    scheme: String,
    realm: Option<String>,
    service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    fn all(refusal: &Answer) -> Vec<Self> {
        let headers = refusal.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok());
        headers.flat_map(Self::parse).collect()
    }

    fn parse(header: &str) -> Vec<Self> {
        let known = ChallengeParser::new(header).filter_map(Result::ok).map(|challenge| {
            let param = |name: &str| {
                let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let scheme = challenge.scheme.to_ascii_lowercase();
            Self { scheme, realm: param("realm"), service: param("service"), scope: param("scope") }
        });
        known.collect()
    }
}

/// Gets a token from the service that `challenge` names.
fn token(
    host: &Host,
    access: &Access,
    challenge: &Challenge,
    credentials: Option<&Credentials>,
) -> Result<Authorization, Failure> {
    #[derive(Deserialize)]
    struct Token {
        token: Option<String>,
        access_token: Option<String>,
        /// In seconds. Some say a negative number, and mean nothing by it.
        expires_in: Option<i64>,
    }
    let realm = challenge.realm.as_deref().unwrap_or_default();
    let invalid = |why: &str| {
        let request = format!("token service {realm:?} of {}", access.reference.registry());
        Failure::Final(HttpError::Request { request, why: why.into() })
    };
    let mut url = Url::parse(realm).map_err(|e| invalid(&e.to_string()))?;
    if url.scheme() != "https" && host.base.scheme() == "https" {
        return Err(invalid("not https"));
    }
    let mut scopes = access.scopes();
    // What else the registry wants, such as the repository under the name it has there.
    scopes.extend(challenge.scope.clone().filter(|scope| !scopes.contains(scope)));
    let service = challenge.service.iter().map(|service| ("service", service.as_str()));
    let answer = if let Some(Credentials::Refresh(refresh)) = credentials {
        let scopes = scopes.join(" ");
        let grant = [("grant_type", "refresh_token"), ("client_id", "rehydrator"), ("scope", &scopes)];
        let form = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(grant)
            .extend_pairs(service)
            .append_pair("refresh_token", refresh)
            .finish();
        let headers = [(CONTENT_TYPE, "application/x-www-form-urlencoded".into())];
        // From a reader, so that it is sent once: a redirect does not get it.
        let form = Body::Reader(&mut form.as_bytes(), form.len() as u64);
        host.http.send(Method::POST, url.as_str(), &headers, form)?
    } else {
        url.query_pairs_mut().extend_pairs(service).extend_pairs(scopes.iter().map(|s| ("scope", s)));
        let headers = match credentials {
            Some(Credentials::User { name, password }) => vec![(AUTHORIZATION, basic(name, password))],
            _ => Vec::new(),
        };
        host.http.send(Method::GET, url.as_str(), &headers, Body::None)?
    };
    if answer.status() != StatusCode::OK {
        return Err(answer.refused());
    }
    let token: Token = serde_json::from_slice(&answer.document(MAX_TOKEN)?)
        // Not the error itself, which may show a token.
        .map_err(|_| invalid("its answer is not a token"))?;
    let lasts = token.expires_in.and_then(|s| u64::try_from(s).ok()).map_or(TOKEN_TIME, Duration::from_secs);
    let lasts = lasts.saturating_sub(TOKEN_LEFT);
    let token = token.token.or(token.access_token).filter(|t| !t.is_empty());
    let token = token.ok_or_else(|| invalid("its answer has no token"))?;
    Ok(Authorization { header: format!("Bearer {token}"), until: Instant::now().checked_add(lasts) })
}

/// What a manifest is: as the registry says, or else as it says itself.
fn media_type(header: &str, bytes: &[u8]) -> MediaType {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<MediaType>,
    }
    let itself = || serde_json::from_slice::<Typed>(bytes).ok()?.media_type;
    match header {
        "" | "application/json" | "application/octet-stream" | "text/plain" => {
            itself().unwrap_or(MediaType::ImageManifest)
        }
        header => header.into(),
    }
}

/// The URL of the next page in a `Link` header, `<URL>; rel="next"`: any form of RFC 8288, and the URL without brackets that
/// some registries write.
fn next_page(link: &str) -> Option<&str> {
    let mut rest = link.trim_start();
    while !rest.is_empty() {
        let (url, after) = match rest.strip_prefix('<') {
            Some(inside) => inside.split_once('>')?,
            None => rest.split_at(rest.find([';', ',']).unwrap_or(rest.len())),
        };
        // A comma ends the parameters, unless it is quoted.
        let mut quoted = false;
        let end = after.find(|c| {
            quoted ^= c == '"';
            c == ',' && !quoted
        });
        let (parameters, next) = after.split_at(end.unwrap_or(after.len()));
        let is_next = |parameter: &str| {
            let (name, value) = parameter.split_once('=').unwrap_or_default();
            // One link may have several relations.
            let mut relations = value.trim().trim_matches('"').split_ascii_whitespace();
            name.trim().eq_ignore_ascii_case("rel") && relations.any(|r| r.eq_ignore_ascii_case("next"))
        };
        if parameters.split(';').any(is_next) {
            return Some(url.trim());
        }
        rest = next.trim_start_matches(',').trim_start();
    }
    None
}

/// Adds the certificates in `dir`.
fn add_certificates(tls: &mut Tls, dir: &Path) -> Result<()> {
    let at = || format!("certificates in {}", dir.display());
    let read = |path: &Path| {
        crate::io::read_limited(path, MAX_CERTIFICATES).with_context(|| path.display().to_string())
    };
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).with_context(at)?;
    let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => {
                tls.roots.extend(read(&path)?);
                tls.roots.push(b'\n');
            }
            Some("cert") => {
                let mut identity = read(&path)?;
                identity.push(b'\n');
                identity.extend(read(&path.with_extension("key"))?);
                tls.identity = Some(identity);
            }
            _ => {}
        }
    }
    Ok(())
}

/// How registries answer that have no use for `Range`.
const REFUSES_RANGES: [StatusCode; 3] =
    [StatusCode::BAD_REQUEST, StatusCode::RANGE_NOT_SATISFIABLE, StatusCode::NOT_IMPLEMENTED];

/// Reads a blob, or a part of one, and goes on where a connection broke.
pub struct BlobReader {
    client: Client,
    host: Arc<Host>,
    access: Access,
    url: String,
    pos: u64,
    end: u64,
    /// Whether `end` is the end of the blob.
    whole: bool,
    /// Whether parts may be asked for. Not when the registry has refused that.
    ranges: bool,
    /// The digest so far, and the one that is expected.
    check: Option<(Hasher<io::Sink>, Digest)>,
    answer: Option<Answer>,
    /// Where this answer began to bring something new.
    began: u64,
    /// Bytes before `pos` that this answer brings all the same.
    skip: u64,
    chunk: Bytes,
    attempts: Attempts,
}

impl BlobReader {
    /// Asks for what is left.
    fn open(&mut self) -> Result<Answer, Failure> {
        // A whole blob is asked for as one, which registries may answer with a cached or redirected one.
        let mut is_part = self.ranges && !(self.pos == 0 && self.whole);
        let mut answer = self.ask(is_part)?;
        if is_part && REFUSES_RANGES.contains(&answer.status()) {
            (self.ranges, is_part) = (false, false);
            answer = self.ask(is_part)?;
        }
        match (answer.status(), answer.range().and_then(|r| r.start)) {
            (StatusCode::PARTIAL_CONTENT, Some(start)) if start == self.pos => self.skip = 0,
            (StatusCode::OK, _) => {
                let length = answer.header(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
                if let Some(length) = length
                    && self.check.is_some()
                    && length != self.end
                {
                    return Err(self.wrong(format!("expected {} bytes, the registry has {length}", self.end)));
                }
                self.skip = self.pos;
                answer.repeats(self.skip);
            }
            (StatusCode::PARTIAL_CONTENT, _) => {
                return Err(Failure::again("206 Partial Content: not the range that was asked for"));
            }
            _ => return Err(answer.refused()),
        }
        Ok(answer)
    }

    /// Asks for what is left, or for the whole blob.
    fn ask(&self, is_part: bool) -> Result<Answer, Failure> {
        let range = is_part.then(|| (RANGE, format!("bytes={}-{}", self.pos, self.end.saturating_sub(1))));
        let (host, access, url) = (&self.host, &self.access, &self.url);
        self.client.request(host, access, &Method::GET, url, &Vec::from_iter(range), &Payload::None)
    }

    fn wrong(&self, why: String) -> Failure {
        Failure::Final(HttpError::Request { request: format!("GET {}", self.url), why })
    }

    /// Gets some bytes.
    fn fill(&mut self) -> Result<(), Failure> {
        let mut answer = match self.answer.take() {
            Some(answer) => answer,
            None => {
                self.began = self.pos;
                self.open()?
            }
        };
        let Some(mut chunk) = answer.chunk()? else {
            let why = format!("the answer ended at {} of {} bytes", self.pos, self.end);
            return Err(Failure::again(why));
        };
        let skipped = self.skip.min(chunk.len() as u64);
        self.skip -= skipped;
        let _ = chunk.split_to(skipped as usize);
        let left = self.end - self.pos;
        if chunk.len() as u64 > left {
            if self.check.is_some() {
                return Err(self.wrong(format!("more than the {} bytes it is to have", self.end)));
            }
            chunk.truncate(left as usize);
        }
        (self.chunk, self.answer) = (chunk, Some(answer));
        Ok(())
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            if self.pos == self.end {
                self.answer = None;
                if let Some((hasher, expected)) = self.check.take() {
                    let (found, _) = hasher.finish();
                    if let Err(mismatch) = found.must_be(expected) {
                        // Whoever reads on gets an error again, and no end.
                        self.check = Some((Hasher::new(io::sink()), expected));
                        let what = format!("{}: blob {}", self.access.reference.name(), expected.oci());
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            format!("{what}: {mismatch}"),
                        ));
                    }
                }
                return Ok(0);
            }
            if let Err(mut failure) = self.fill() {
                self.answer = None;
                if let Failure::Again { got, .. } = &mut failure {
                    // What came once more is no progress.
                    *got = self.pos - self.began;
                }
                self.attempts.failed(failure).map_err(io::Error::other)?;
            }
        }
        let n = buf.len().min(self.chunk.len());
        let now = self.chunk.split_to(n);
        buf[..n].copy_from_slice(&now);
        self.pos += n as u64;
        if let Some((hasher, _)) = &mut self.check {
            hasher.write_all(&now)?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorizations_do_not_pile_up() {
        let mut all = HashMap::new();
        let until = |seconds| Some(Instant::now() + Duration::from_secs(seconds));
        let new = |until| Authorization { header: String::new(), until };
        remember(&mut all, "first to end".into(), new(until(1)));
        for n in 1..=MAX_AUTHORIZATIONS {
            remember(&mut all, format!("scope {n}"), new(until(60 + n as u64)));
        }
        assert_eq!(all.len(), MAX_AUTHORIZATIONS);
        assert!(!all.contains_key("first to end"));
        remember(&mut all, "scope 1".into(), new(until(99)));
        assert_eq!(all.len(), MAX_AUTHORIZATIONS);
    }

    #[test]
    fn challenges() {
        let header =
            r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push""#;
        let found = &Challenge::parse(header)[0];
        assert_eq!(
            (found.scheme.as_str(), found.realm.as_deref()),
            ("bearer", Some("https://auth.example/token"))
        );
        assert_eq!(found.scope.as_deref(), Some("repository:a/b:pull,push"));
        let both = Challenge::parse(r#"Basic realm="x", BEARER realm="y""#);
        assert_eq!(both.iter().map(|c| c.scheme.as_str()).collect::<Vec<_>>(), ["basic", "bearer"]);
        assert!(Challenge::parse("Bearer realm=\"").is_empty());
    }

    #[test]
    fn pages() {
        assert_eq!(
            next_page(r#"</v2/x/tags/list?last=b&n=2>; rel="next""#),
            Some("/v2/x/tags/list?last=b&n=2")
        );
        assert_eq!(next_page(r#"<a>; rel="prev", <b>; rel=next"#), Some("b"));
        for link in [
            r#"</a?x=1,2&n=3>; rel="next""#,
            r#"</a?x=1,2&n=3>;Rel=next"#,
            r#"</a?x=1,2&n=3> ; title="a, b"; REL = "prev NEXT""#,
            r#"</b>; rel="last"; title="x, y", </a?x=1,2&n=3>; rel="next""#,
        ] {
            assert_eq!(next_page(link), Some("/a?x=1,2&n=3"), "{link}");
        }
        assert_eq!(next_page(r#"/a?n=3; rel="next""#), Some("/a?n=3"));
        for link in ["nonsense", "", "<a", "<a>", "<a>; rel=prev", r#"<a>; title="rel=next""#, ",,;;="] {
            assert_eq!(next_page(link), None, "{link}");
        }
    }

    #[test]
    fn kinds_of_manifests() {
        let index = br#"{"mediaType":"application/vnd.oci.image.index.v1+json"}"#;
        assert_eq!(media_type("application/json", index), MediaType::ImageIndex);
        assert_eq!(media_type("", b"not json"), MediaType::ImageManifest);
        assert_eq!(media_type("application/x", index), MediaType::Other("application/x".into()));
    }
}
