//! Offers what is in a registry to systemd-sysupdate: `/REPOSITORY/SHA256SUMS`, `/REPOSITORY/SHA256SUMS.gpg`, and the files
//! that are listed there. `docs/serve-sysupdate.md` is for those who use it.
//!
//! ```text
//! tags ─► manifests ─► files (names) ─► listing (sums, signature) ─► pairs (which listing a client gets)
//!                                                    blobs ─► blob (whole, checked, or a part) ──► client
//! ```
//!
//! Before that: scope (is the repository offered, whose key signs) and lookups (a client's turn to have the registry asked).
//!
//! Nothing is kept but what can be asked for again: listings for a short time, manifests by digest. What a client or the
//! registry could make endless is bounded: in scope, lookups, repositories and listing, each for what it has.

mod blob;
mod files;
mod listing;
mod lookups;
mod pairs;
mod repositories;
mod scope;

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use axum::Router;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use tokio::time::timeout;

use self::listing::{Asked, Listing, Refusal, Signing, Upstream};
use self::lookups::Lookups;
use self::pairs::Half;
use self::repositories::{Repositories, Repository};
use self::scope::Scope;
pub use self::scope::{Key, KeyFile, RepositoryGlob};
use super::clients::Places;
use super::flow::Flow;
use super::http::busy;
use super::pool::{Busy, Pool};
use crate::http::Retry;
use crate::registry::{self, Client, Reference, TRANSPORT};

/// The list of files.
const SUMS: &str = "SHA256SUMS";

/// Its signature.
const SIGNATURE: &str = "SHA256SUMS.gpg";

/// The longest that tags may be taken to be what they were.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a registry is left alone after it did not answer.
const PAUSE: Duration = Duration::from_secs(2);

/// How long a request waits for its turn to ask the registry, and for the answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Somebody waits for the answer: a registry has seconds, not minutes.
const RETRY: Retry = Retry { attempts: 3, delay: Duration::from_millis(250) };

/// Repositories that exist whose tags are asked for at once.
const MAX_REFRESHES: usize = 8;

/// Files that are sent at once; each takes a thread, and some 100 KiB.
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
    /// Which repositories are offered. None: all, without keys and without credentials for the registry.
    pub repositories: Vec<RepositoryGlob>,
    /// The keys that sign `SHA256SUMS`.
    pub keys: Vec<Key>,
    /// Clients get files from the registry itself.
    pub redirect: bool,
    /// How long tags are taken to be what they were.
    pub ttl: Duration,
    /// The most downloads of one client at a time; 0 is no limit.
    pub downloads_per_client: usize,
}

struct Offer {
    registry: Base,
    scope: Scope,
    upstream: Upstream,
    redirect: bool,
    ttl: Duration,
    repositories: Repositories,
    refreshes: Pool,
    lookups: Lookups,
    downloads: Arc<Places>,
}

/// Answers `/REPOSITORY/SHA256SUMS`, `/REPOSITORY/SHA256SUMS.gpg` and `/REPOSITORY/FILE`. Clients are told apart by
/// `ConnectInfo<SocketAddr>`, where the server gives that.
pub fn router(options: Options) -> Result<Router> {
    let Options { registry, client, repositories, keys, redirect, ttl, downloads_per_client } = options;
    if keys.iter().any(|key| key.signer.is_rsa()) {
        tracing::warn!(
            "--sign-key: an RSA key: how long a signature takes depends on the key, and clients can measure it \
             (RUSTSEC-2023-0071): an Ed25519 key is safe"
        );
    }
    let scope = Scope::new(repositories, keys)?;
    let tls_verify = client.tls_verify && !registry.plain;
    let mut client = registry::Options { tls_verify, retry: RETRY, ..client };
    if scope.is_open() {
        let has_credentials = registry.repository("x").map(|any| client.has_credentials(&any)).transpose()?;
        ensure!(
            has_credentials != Some(true),
            "credentials for {}: clients need none, and would read all that they open: \
             --repository GLOB must say which repositories (\"**\": all of them)",
            registry.prefix
        );
        // Nor those that somebody adds later.
        client = client.anonymous();
    }
    let offer = Offer {
        registry,
        scope,
        upstream: Upstream::new(Client::new(client)),
        redirect,
        ttl,
        repositories: Repositories::default(),
        refreshes: Pool::new(MAX_REFRESHES, Some(PATIENCE)),
        lookups: Lookups::default(),
        downloads: Places::new(MAX_DOWNLOADS, downloads_per_client),
    };
    Ok(Router::new().route("/{*path}", get(answer)).with_state(Arc::new(offer)))
}

async fn answer(State(offer): State<Arc<Offer>>, Path(path): Path<String>, request: Request) -> Response {
    let Some((repository, file)) = path.rsplit_once('/') else { return refused(Refusal::Unknown) };
    let Some(repository) = offer.repository(repository) else { return refused(Refusal::Unknown) };
    let (request, _) = request.into_parts();
    let client = client_of(&request);
    let half = match file {
        SUMS if repository.key.is_none() => Half::Alone,
        SUMS => Half::Sums,
        SIGNATURE if repository.key.is_none() => return refused(Refusal::Unknown),
        SIGNATURE => Half::Signature,
        _ => return offer.file(&repository, file, &client, &request).await,
    };
    let listing = match offer.listing(&repository, &request).await {
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
    /// The repository of this name, if it is offered and can be one.
    fn repository(&self, name: &str) -> Option<Arc<Repository>> {
        if !self.scope.offers(name) {
            return None;
        }
        let make = || Some(Repository::new(self.registry.repository(name)?, self.scope.key_of(name)));
        self.repositories.get(name, make)
    }

    /// The listing of a repository as it is, or was not long ago. Requests that wait while the registry is asked get what it
    /// says to the next one.
    async fn listing(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        request: &Parts,
    ) -> Result<Arc<Listing>, Refusal> {
        timeout(PATIENCE, self.listed(repository, request)).await.unwrap_or(Err(Refusal::Busy))
    }

    async fn listed(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        request: &Parts,
    ) -> Result<Arc<Listing>, Refusal> {
        let arrived = Instant::now();
        let mut state = repository.state.clone().lock_owned().await;
        let is_fresh = |asked: &&Asked| {
            let lifetime = match asked.found {
                // What does not exist, or is of no use, is remembered as long as what does.
                Ok(_) | Err(Refusal::Unknown | Refusal::Unusable) => self.ttl,
                Err(Refusal::Silent | Refusal::Busy) => self.ttl.min(PAUSE),
            };
            asked.began >= arrived || asked.ended.elapsed() < lifetime
        };
        if let Some(asked) = state.asked.as_ref().filter(is_fresh) {
            return asked.found.clone();
        }
        let turn = match repository.exists() {
            true => None,
            false => Some(self.lookups.turn(address_of(request)).await.ok_or(Refusal::Busy)?),
        };
        let (offer, repository) = (self.clone(), repository.clone());
        let mut refresh = move || {
            let signing = repository
                .key
                .map(|key| Signing { signer: offer.scope.signer(key), is_own: offer.scope.is_own(key) });
            let existed = repository.exists();
            state.refresh(&offer.upstream, &repository.reference, signing.as_ref());
            let found = state.asked.as_ref().map(|asked| asked.found.clone());
            let exists = match found {
                Some(Ok(_)) => true,
                Some(Err(Refusal::Unknown)) => false,
                _ => existed,
            };
            offer.repositories.note(&repository, exists, state.memory() + repository.pairs.memory());
            if exists && !existed && signing.is_some() {
                offer.warn_of_confusable(&repository);
            }
            found
        };
        // Each goes on until the registry has answered, even if the client has gone.
        let refreshed = match turn {
            None => self.refreshes.run(refresh).await,
            Some(turn) => {
                let lookup = tokio::task::spawn_blocking(move || {
                    let _turn = turn;
                    refresh()
                });
                lookup.await.map_err(Into::into)
            }
        };
        match refreshed {
            Err(e) if e.is::<Busy>() => Err(Refusal::Busy),
            refreshed => refreshed.ok().flatten().unwrap_or(Err(Refusal::Silent)),
        }
    }

    /// Says in the log when a signed list could be given out as that of another repository.
    fn warn_of_confusable(&self, repository: &Repository) {
        if let Some(other) = self.repositories.confusable(repository) {
            tracing::warn!(
                "{} and {}: one key signs for both, and files of one can have the names of the other: \
                 --sign-key GLOB=FILE gives each a key of its own",
                repository.reference.name(),
                other.reference.name()
            );
        }
    }

    /// A file, as it is in the listing that the client has, or else as it is now.
    async fn file(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        name: &str,
        client: &str,
        request: &Parts,
    ) -> Response {
        let had = repository.pairs.of(client).and_then(|listing| listing.files.get(name).copied());
        let file = match had {
            Some(file) => file,
            None => match self.listing(repository, request).await {
                Ok(listing) => match listing.files.get(name) {
                    Some(file) => *file,
                    None => return refused(Refusal::Unknown),
                },
                Err(refusal) => return refused(refusal),
            },
        };
        if self.redirect {
            let (client, reference) = (self.upstream.client.clone(), repository.reference.clone());
            let location = move || client.blob_location(&reference, file.0);
            return match self.refreshes.run(location).await {
                Ok(Ok(url)) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, url)]).into_response(),
                Err(e) if e.is::<Busy>() => refused(Refusal::Busy),
                _ => refused(Refusal::Silent),
            };
        }
        let Some(flow) = Flow::of(&request.extensions) else { return refused(Refusal::Unknown) };
        let place = match flow.enter(&self.downloads) {
            Ok(place) => place,
            Err(e) => return busy(format!("downloads: {e}")),
        };
        let asked = (&request.method, &request.headers);
        blob::answer(&self.upstream.client, &repository.reference, file, asked, place).await
    }
}

/// Who asks, as far as it can be told: an address, and what proxies on the way say. Nothing but the choice between two
/// listings depends on it.
fn client_of(request: &Parts) -> String {
    let address = address_of(request);
    let said = |headers: &HeaderMap, name| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().chars().take(200).collect::<String>()
    };
    let headers = &request.headers;
    format!("{address:?} {} {}", said(headers, "x-forwarded-for"), said(headers, "forwarded"))
}

/// The address that a request comes from.
fn address_of(request: &Parts) -> Option<IpAddr> {
    request.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip())
}

fn refused(refusal: Refusal) -> Response {
    match refusal {
        Refusal::Busy => busy("the registry takes long to answer; retry later"),
        Refusal::Unknown => (StatusCode::NOT_FOUND, "not found\n").into_response(),
        Refusal::Silent | Refusal::Unusable => {
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
