//! Offers what is in a registry to systemd-sysupdate: `/REPOSITORY/SHA256SUMS`, `/REPOSITORY/SHA256SUMS.gpg`, and the files
//! that are listed there. `docs/serve-sysupdate.md` is for those who use it.
//!
//! ```text
//! tags ─► manifests ─► files (names) ─► listing (sums, signature) ─► pairs (which listing a client gets)
//!                                                    blobs ─► blob (whole, checked, or a part) ──► client
//! ```
//!
//! Nothing is kept but what can be asked for again: listings for a short time, manifests by digest.

mod blob;
mod files;
mod listing;
mod pairs;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::Router;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use tokio::sync::{Mutex, Semaphore};

use self::listing::{Listing, Refusal};
use self::pairs::{Half, Pairs};
use crate::http::Retry;
use crate::openpgp::Signer;
use crate::registry::{self, Client, Reference, TRANSPORT};

/// The list of files.
const SUMS: &str = "SHA256SUMS";

/// Its signature.
const SIGNATURE: &str = "SHA256SUMS.gpg";

/// The longest that tags may be taken to be what they were.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a registry is left alone after it did not answer.
const PAUSE: Duration = Duration::from_secs(2);

/// Somebody waits for the answer: a registry has seconds, not minutes.
const RETRY: Retry = Retry { attempts: 3, delay: Duration::from_millis(250) };

/// Repositories that are remembered.
const MAX_REPOSITORIES: usize = 1000;

/// Repositories that are asked for at once.
const MAX_REFRESHES: usize = 8;

/// Files that are sent at once; each takes a thread.
const MAX_DOWNLOADS: usize = 256;

/// A registry, and what stands before all names of repositories in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// `HOST[:PORT][/PREFIX]`.
    prefix: String,
    /// It may be one without TLS.
    plain: bool,
}

impl FromStr for Base {
    type Err = String;

    /// Reads `https://HOST[:PORT][/PREFIX]`, or with `http://`, `docker://` or nothing before it.
    fn from_str(text: &str) -> Result<Self, String> {
        let plain = text.starts_with("http://");
        let schemes = ["http://", "https://", TRANSPORT];
        let rest = schemes.iter().find_map(|scheme| text.strip_prefix(scheme)).unwrap_or(text);
        let base = Self { prefix: rest.trim_end_matches('/').to_owned(), plain };
        // Of a name without dot and port, nobody knows that it is a host.
        let host = base.prefix.split('/').next();
        match base.repository("x") {
            Some(found) if Some(found.registry()) == host => Ok(base),
            _ => Err("expected a registry, such as https://registry.example or localhost:5000".into()),
        }
    }
}

impl Base {
    /// The repository of this name, if it can be one.
    fn repository(&self, name: &str) -> Option<Reference> {
        // Nothing that is a tag, a digest, or another place.
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        let found: Reference = format!("{}/{name}", self.prefix).parse().ok()?;
        (name.chars().all(good) && found.repository().ends_with(name)).then_some(found)
    }
}

/// What is offered, and how.
pub struct Options {
    /// Where it is.
    pub registry: Base,
    /// How to speak to the registry.
    pub client: registry::Options,
    /// Signs `SHA256SUMS`.
    pub signer: Option<Signer>,
    /// Clients get files from the registry itself.
    pub redirect: bool,
    /// How long tags are taken to be what they were.
    pub ttl: Duration,
}

struct Offer {
    registry: Base,
    client: Client,
    signer: Option<Signer>,
    redirect: bool,
    ttl: Duration,
    repositories: StdMutex<HashMap<String, Arc<Repository>>>,
    refreshes: Semaphore,
    downloads: Arc<Semaphore>,
}

struct Repository {
    reference: Reference,
    state: Arc<Mutex<listing::State>>,
    pairs: Pairs<Listing>,
}

/// Answers `/REPOSITORY/SHA256SUMS`, `/REPOSITORY/SHA256SUMS.gpg` and `/REPOSITORY/FILE`. Clients are told apart by
/// `ConnectInfo<SocketAddr>`, where the server gives that.
pub fn router(options: Options) -> Result<Router> {
    let Options { registry, client, signer, redirect, ttl } = options;
    if signer.as_ref().is_some_and(Signer::is_rsa) {
        tracing::warn!(
            "--sign-key: an RSA key: how long a signature takes depends on the key, and clients can measure it \
             (RUSTSEC-2023-0071): an Ed25519 key is safe"
        );
    }
    let tls_verify = client.tls_verify && !registry.plain;
    let offer = Offer {
        registry,
        client: Client::new(registry::Options { tls_verify, retry: RETRY, ..client }),
        signer,
        redirect,
        ttl,
        repositories: StdMutex::default(),
        refreshes: Semaphore::new(MAX_REFRESHES),
        downloads: Arc::new(Semaphore::new(MAX_DOWNLOADS)),
    };
    Ok(Router::new().route("/{*path}", get(answer)).with_state(Arc::new(offer)))
}

async fn answer(State(offer): State<Arc<Offer>>, Path(path): Path<String>, request: Request) -> Response {
    let Some((repository, file)) = path.rsplit_once('/') else { return refused(Refusal::Unknown) };
    let Some(repository) = offer.repository(repository) else { return refused(Refusal::Unknown) };
    let (request, _) = request.into_parts();
    let client = client_of(&request);
    let half = match file {
        SUMS if offer.signer.is_none() => Half::Alone,
        SUMS => Half::Sums,
        SIGNATURE if offer.signer.is_none() => return refused(Refusal::Unknown),
        SIGNATURE => Half::Signature,
        _ => return offer.file(&repository, file, &client, &request).await,
    };
    let listing = match offer.listing(&repository).await {
        Ok(listing) => listing,
        Err(refusal) => return refused(refusal),
    };
    let listing = match request.method.as_str() {
        "HEAD" => listing,
        _ => repository.pairs.choose(&client, listing, half).await,
    };
    let (kind, bytes) = match half {
        Half::Sums | Half::Alone => ("text/plain; charset=utf-8", Some(listing.sums.clone())),
        Half::Signature => ("application/pgp-signature", listing.signature.clone()),
    };
    // What a cache gives out of one pair need not fit what it gives out of the other.
    let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store")];
    bytes.map_or_else(|| refused(Refusal::Unknown), |bytes: Bytes| (headers, bytes).into_response())
}

impl Offer {
    /// The repository of this name, if it can be one.
    fn repository(&self, name: &str) -> Option<Arc<Repository>> {
        let mut all = self.repositories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(name) {
            return Some(known.clone());
        }
        let reference = self.registry.repository(name)?;
        if all.len() >= MAX_REPOSITORIES {
            // Those that there are, before those that were only asked for.
            all.retain(|_, known| known.pairs.is_used());
            if all.len() >= MAX_REPOSITORIES {
                all.clear();
            }
        }
        let new = Arc::new(Repository { reference, state: Arc::default(), pairs: Pairs::default() });
        all.insert(name.to_owned(), new.clone());
        Some(new)
    }

    /// The listing of a repository as it is, or was not long ago.
    async fn listing(self: &Arc<Self>, repository: &Repository) -> Result<Arc<Listing>, Refusal> {
        let mut state = repository.state.clone().lock_owned().await;
        let fresh = |(at, found): &(Instant, Result<_, Refusal>)| {
            at.elapsed() < if found.is_ok() { self.ttl } else { self.ttl.min(PAUSE) }
        };
        if let Some((_, found)) = state.asked.as_ref().filter(|asked| fresh(asked)) {
            return found.clone();
        }
        let _permit = self.refreshes.acquire().await.map_err(|_| Refusal::Registry)?;
        let (offer, reference) = (self.clone(), repository.reference.clone());
        let refreshed = tokio::task::spawn_blocking(move || {
            state.refresh(&offer.client, &reference, offer.signer.as_ref());
            state.asked.as_ref().map(|(_, found)| found.clone())
        });
        refreshed.await.ok().flatten().unwrap_or(Err(Refusal::Registry))
    }

    /// A file, as it is in the listing that the client has, or else as it is now.
    async fn file(
        self: &Arc<Self>,
        repository: &Repository,
        name: &str,
        client: &str,
        request: &Parts,
    ) -> Response {
        let had = repository.pairs.of(client).and_then(|listing| listing.files.get(name).copied());
        let file = match had {
            Some(file) => file,
            None => match self.listing(repository).await.map(|listing| listing.files.get(name).copied()) {
                Ok(Some(file)) => file,
                Ok(None) => return refused(Refusal::Unknown),
                Err(refusal) => return refused(refusal),
            },
        };
        if self.redirect {
            let (client, reference) = (self.client.clone(), repository.reference.clone());
            let location = move || client.blob_location(&reference, file.0);
            return match tokio::task::spawn_blocking(location).await {
                Ok(Ok(url)) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, url)]).into_response(),
                _ => refused(Refusal::Registry),
            };
        }
        let Ok(permit) = self.downloads.clone().try_acquire_owned() else {
            return (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "5")]).into_response();
        };
        let asked = (&request.method, &request.headers);
        blob::answer(&self.client, &repository.reference, file, asked, permit).await
    }
}

/// Who asks, as far as it can be told: an address, and what proxies on the way say. Nothing but the choice between two
/// listings depends on it.
fn client_of(request: &Parts) -> String {
    let address =
        request.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip());
    let said = |headers: &HeaderMap, name| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().chars().take(200).collect::<String>()
    };
    let headers = &request.headers;
    format!("{address:?} {} {}", said(headers, "x-forwarded-for"), said(headers, "forwarded"))
}

fn refused(refusal: Refusal) -> Response {
    match refusal {
        Refusal::Unknown => (StatusCode::NOT_FOUND, "not found\n").into_response(),
        Refusal::Registry => {
            (StatusCode::BAD_GATEWAY, "the registry does not answer as it should\n").into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries() {
        for (text, prefix, plain) in [
            ("https://registry.example/", "registry.example", false),
            ("http://localhost:5000", "localhost:5000", true),
            ("docker://quay.io/org/team", "quay.io/org/team", false),
            ("127.0.0.1:80", "127.0.0.1:80", false),
            ("docker.io", "docker.io", false),
        ] {
            assert_eq!(text.parse(), Ok(Base { prefix: prefix.into(), plain }), "{text}");
        }
        for text in ["", "https://", "name", "x y", "https://h.io/UP", "https://h.io/a?b"] {
            assert!(text.parse::<Base>().is_err(), "{text}");
        }
        let base: Base = "h.io/org".parse().unwrap();
        assert_eq!(base.repository("a/b").unwrap().name(), "h.io/org/a/b");
        for name in ["", "a/../b", "a:b", "a@sha256:00", "A", "a//b", "/a", "a b"] {
            assert!(base.repository(name).is_none(), "{name}");
        }
    }
}
