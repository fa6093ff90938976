//! What a repository offers: made of its tags and manifests, made again when it is asked for and old.
//!
//! Tags are read with all their pages, and each is asked for its digest; a manifest is read once, since a digest is
//! always that of the same bytes. When no tag has moved, the listing and its signature stay the very same.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::files::{self, Part};
use crate::digest::Digest;
use crate::http::HttpError;
use crate::openpgp::Signer;
use crate::registry::{Client, Manifest, Reference, is_index, not_found};

/// Manifests of a repository that are asked for at once.
const PARALLEL: usize = 8;

/// The most tags of a repository; systemd-sysupdate would take minutes to read more files.
const MAX_TAGS: usize = 20_000;

/// The files of a repository at one moment.
pub(super) struct Listing {
    /// `SHA256SUMS`.
    pub(super) sums: Bytes,
    /// `SHA256SUMS.gpg`, if there is a key.
    pub(super) signature: Option<Bytes>,
    /// By name: digest and length.
    pub(super) files: BTreeMap<String, (Digest, u64)>,
}

/// What is known of a repository.
#[derive(Default)]
pub(super) struct State {
    /// When the registry was asked last, and what came of it.
    pub(super) asked: Option<(Instant, Result<Arc<Listing>, Refusal>)>,
    listing: Option<Arc<Listing>>,
    tags: BTreeMap<String, Digest>,
    /// The files of manifests that tags have.
    known: HashMap<Digest, Arc<Vec<Part>>>,
}

/// Why there is no listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The registry has no such repository.
    Unknown,
    /// The registry does not answer, or not as it should.
    Registry,
    /// It was not this request's turn to ask the registry, or the registry has not answered yet.
    Busy,
}

impl State {
    /// Asks the registry for the tags of `repository`.
    pub(super) fn refresh(&mut self, client: &Client, repository: &Reference, signer: Option<&Signer>) {
        let found = self.read(client, repository, signer).map_err(|e| {
            if not_found(&e) {
                return Refusal::Unknown;
            }
            tracing::error!("{e:#}");
            Refusal::Registry
        });
        self.asked = Some((Instant::now(), found));
    }

    fn read(
        &mut self,
        client: &Client,
        repository: &Reference,
        signer: Option<&Signer>,
    ) -> Result<Arc<Listing>> {
        let tags: BTreeSet<_> =
            client.tags(repository)?.into_iter().filter(|tag| !is_attached(tag)).collect();
        ensure!(tags.len() <= MAX_TAGS, "{}: more than {MAX_TAGS} tags", repository.name());
        let found = Mutex::new((BTreeMap::new(), HashMap::new()));
        let (earlier, known) = (&self.tags, &self.known);
        each(tags, |tag| {
            let Some((digest, parts)) = read_tag(client, repository, &tag, earlier, known)? else {
                return Ok(());
            };
            let (tags, known) = &mut *found.lock().unwrap_or_else(PoisonError::into_inner);
            tags.insert(tag, digest);
            known.insert(digest, parts);
            Ok(())
        })?;
        let (tags, known) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let listing = match self.listing.take() {
            Some(listing) if self.tags == tags => listing,
            _ => Arc::new(list(repository, &tags, &known, signer)?),
        };
        (self.tags, self.known) = (tags, known);
        self.listing = Some(listing.clone());
        Ok(listing)
    }
}

/// The tags that stand for what belongs to another image: cosign's signatures and attestations, lists of referrers.
fn is_attached(tag: &str) -> bool {
    tag.strip_prefix("sha256-")
        .and_then(|rest| rest.get(..64))
        .is_some_and(|hex| hex.parse::<Digest>().is_ok())
}

/// Does `work` with all of `items`, several at once, until it fails.
fn each<T: Send>(items: impl IntoIterator<Item = T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let items = items.into_iter().collect::<Vec<_>>().into_iter();
    let workers = items.len().min(PARALLEL);
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(item) = next() {
                    if let Err(e) = work(item) {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                        while next().is_some() {}
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The manifest of a tag and the files in it; none if it is not there, or not what it should be.
fn read_tag(
    client: &Client,
    repository: &Reference,
    tag: &str,
    earlier: &BTreeMap<String, Digest>,
    known: &HashMap<Digest, Arc<Vec<Part>>>,
) -> Result<Option<(Digest, Arc<Vec<Part>>)>> {
    let read = || {
        let mut reference = repository.with_tag(tag)?;
        if earlier.contains_key(tag) {
            let digest = client.digest(&reference)?;
            if let Some(parts) = known.get(&digest) {
                return Ok((digest, parts.clone()));
            }
            reference = reference.with_digest(digest);
        }
        let manifest = client.manifest(&reference)?;
        let parts = match known.get(&manifest.digest) {
            Some(parts) => parts.clone(),
            None => Arc::new(read_manifest(client, repository, tag, &manifest)?),
        };
        Ok((manifest.digest, parts))
    };
    match read() {
        Ok(found) => Ok(Some(found)),
        // A list without what is there would be a wrong one.
        Err(e) if is_passing(&e) => Err(e),
        Err(e) => {
            // It may be none that a tag can be.
            tracing::warn!("{}:{}: left out: {e:#}", repository.name(), tag.escape_default());
            Ok(None)
        }
    }
}

/// Whether `error` is that a registry did not answer, rather than that its answer is of no use.
fn is_passing(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref())
        .any(|e| matches!(e, HttpError::GaveUp { .. } | HttpError::Wait { .. } | HttpError::Request { .. }))
}

/// The files in a manifest, or in those of an index. What is not a file is named in the log, once.
fn read_manifest(
    client: &Client,
    repository: &Reference,
    tag: &str,
    manifest: &Manifest,
) -> Result<Vec<Part>> {
    let leave = |why: &dyn std::fmt::Display| tracing::warn!("{}:{tag}: left out: {why}", repository.name());
    let image = |bytes: &[u8], arch| {
        files::of_image(bytes, arch).unwrap_or_else(|e| {
            leave(&format_args!("{e:#}"));
            Vec::new()
        })
    };
    if !is_index(&manifest.media_type) {
        return Ok(image(&manifest.bytes, None));
    }
    let files::Images { offered, left } = files::of_index(&manifest.bytes)?;
    left.iter().for_each(|why| leave(why));
    let mut parts = Vec::new();
    for (descriptor, arch) in offered {
        let digest = descriptor.digest().to_string().parse().context("in the index")?;
        match client.manifest(&repository.with_digest(digest)) {
            Ok(manifest) => parts.extend(image(&manifest.bytes, arch)),
            Err(e) if is_passing(&e) => return Err(e),
            Err(e) => leave(&format_args!("{e:#}")),
        }
    }
    Ok(parts)
}

/// Puts the files together.
fn list(
    repository: &Reference,
    tags: &BTreeMap<String, Digest>,
    known: &HashMap<Digest, Arc<Vec<Part>>>,
    signer: Option<&Signer>,
) -> Result<Listing> {
    let last = repository.repository().rsplit('/').next().unwrap_or_default();
    let mut files = BTreeMap::new();
    for (tag, digest) in tags {
        for part in known.get(digest).into_iter().flat_map(|parts| parts.iter()) {
            let (name, file) = (part.name(last, tag), (part.digest, part.size));
            let leave = |why: &str| tracing::warn!("{}:{tag}: {name:?} left out: {why}", repository.name());
            if !files::is_name(&name) {
                leave("systemd-sysupdate takes no such name");
            } else if files.get(&name).is_some_and(|other| *other != file) {
                leave("another file has that name");
            } else {
                files.insert(name, file);
            }
        }
    }
    let lines: String = files.iter().map(|(name, (digest, _))| format!("{digest}  {name}\n")).collect();
    let sums = Bytes::from(lines);
    let signature = signer.map(|signer| signer.detach(&sums)).transpose().context(super::SIGNATURE)?;
    Ok(Listing { sums, signature: signature.map(Bytes::from), files })
}
