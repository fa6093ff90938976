//! What a repository offers: made of its tags and manifests, made again when it is asked for and old.
//!
//! Tags are read with all their pages, and each is asked for its digest; a manifest is read once, since a digest is
//! always that of the same bytes. When no tag has moved, the listing and its signature stay the very same.
//!
//! Everything that a registry decides is bounded: tags, manifests, files, bytes of the list, documents in memory at a time,
//! lines in the log. A repository that is beyond a bound has no listing: a list that lacks files would be a wrong one.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;

use super::files::{self, Images, Part};
use crate::digest::Digest;
use crate::http::HttpError;
use crate::openpgp::Signer;
use crate::registry::{Client, Reference, is_index, not_found};

/// Manifests of a repository that are asked for at once.
const PARALLEL: usize = 8;

/// Documents of all repositories together that are in memory at once: each may have 4 MiB, and as much again when parsed.
const MAX_DOCUMENTS: usize = 8;

/// The most tags of a repository; systemd-sysupdate would take minutes to read more files.
const MAX_TAGS: usize = 20_000;

/// The most manifests that are read for a listing, those in indexes included: a few for each of many tags.
const MAX_MANIFESTS: usize = 50_000;

/// The most files of a repository: more than [`MAX_SUMS`] has lines for. Files that get no line, such as those without a good
/// name, count too.
const MAX_FILES: usize = 60_000;

/// The longest `SHA256SUMS`, in bytes: some 40,000 lines.
const MAX_SUMS: usize = 4 << 20;

/// Lines in the log about what is left out of a listing; the rest is counted.
const MAX_NOTICES: usize = 100;

/// Earlier listings of a repository that are kept for clients that have got one half of a pair, or a list and not yet the
/// files: as many as a few pushes a minute make in the time a client needs.
const MAX_HISTORY: usize = 16;

/// Bytes that the listings of a repository take together, but for the newest.
const MAX_HISTORY_BYTES: usize = 32 << 20;

/// About what an entry of a map takes beside its key and value, in bytes.
const ENTRY: usize = 64;

/// The files of a repository at one moment.
pub(super) struct Listing {
    /// `SHA256SUMS`.
    pub(super) sums: Bytes,
    /// `SHA256SUMS.gpg`, if there is a key.
    pub(super) signature: Option<Bytes>,
    /// By name: digest and length.
    pub(super) files: BTreeMap<String, (Digest, u64)>,
}

impl Listing {
    /// About what it takes, in bytes. Each line has the name of its file.
    fn memory(&self) -> usize {
        2 * self.sums.len() + self.files.len() * ENTRY
    }
}

/// What the registry said, and when.
pub(super) struct Asked {
    /// Before the first request.
    pub(super) began: Instant,
    /// After the last answer.
    pub(super) ended: Instant,
    pub(super) found: Result<Arc<Listing>, Refusal>,
}

/// What is known of a repository.
#[derive(Default)]
pub(super) struct State {
    /// What came of the last time the registry was asked.
    pub(super) asked: Option<Asked>,
    /// The listings that clients may still have, the newest last.
    listings: VecDeque<Arc<Listing>>,
    tags: BTreeMap<String, Digest>,
    /// The files of manifests that tags have.
    known: HashMap<Digest, Arc<Vec<Part>>>,
}

/// Why there is no listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The registry has no such repository.
    Unknown,
    /// The registry does not answer.
    Silent,
    /// The registry answers, but not as it should, or with more than the bounds allow.
    Unusable,
    /// It was not this request's turn to ask the registry, or the registry has not answered yet.
    Busy,
}

/// How the list of a repository is signed.
pub(super) struct Signing<'a> {
    pub(super) signer: &'a Signer,
    /// The key signs for this repository only.
    pub(super) is_own: bool,
}

/// What all refreshes share: a registry, and how many documents of it are in memory.
pub(super) struct Upstream {
    pub(super) client: Client,
    documents: Mutex<usize>,
    returned: Condvar,
}

impl Upstream {
    pub(super) fn new(client: Client) -> Self {
        Self { client, documents: Mutex::new(0), returned: Condvar::new() }
    }

    /// Does `work`, with a document in memory, when fewer than [`MAX_DOCUMENTS`] others are.
    fn with_document<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Taken<'a>(&'a Upstream);
        impl Drop for Taken<'_> {
            fn drop(&mut self) {
                *self.0.documents.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                self.0.returned.notify_one();
            }
        }
        let documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        let are_all_taken = |documents: &mut usize| *documents >= MAX_DOCUMENTS;
        *self.returned.wait_while(documents, are_all_taken).unwrap_or_else(PoisonError::into_inner) += 1;
        let _taken = Taken(self);
        work()
    }
}

impl State {
    /// Asks the registry for the tags of `repository`.
    pub(super) fn refresh(
        &mut self,
        upstream: &Upstream,
        repository: &Reference,
        signing: Option<&Signing<'_>>,
    ) {
        let began = Instant::now();
        let found = self.read(upstream, repository, signing).map_err(|e| {
            if not_found(&e) {
                return Refusal::Unknown;
            }
            tracing::error!("{e:#}");
            if is_passing(&e) { Refusal::Silent } else { Refusal::Unusable }
        });
        self.asked = Some(Asked { began, ended: Instant::now(), found });
    }

    /// About what all of it takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        let tags: usize = self.tags.keys().map(|tag| tag.len() + size_of::<Digest>() + ENTRY).sum();
        let parts = |parts: &Arc<Vec<Part>>| ENTRY + parts.iter().map(Part::memory).sum::<usize>();
        let known: usize = self.known.values().map(parts).sum();
        tags + known + self.listings.iter().map(|listing| listing.memory()).sum::<usize>()
    }

    fn read(
        &mut self,
        upstream: &Upstream,
        repository: &Reference,
        signing: Option<&Signing<'_>>,
    ) -> Result<Arc<Listing>> {
        let tags = upstream.client.tags(repository)?;
        let tags: BTreeSet<_> = tags.into_iter().filter(|tag| !is_attached(tag)).collect();
        ensure!(tags.len() <= MAX_TAGS, "{}: more than {MAX_TAGS} tags", repository.name());
        let found = Mutex::new((BTreeMap::new(), HashMap::new()));
        let notices = Notices { repository, left: AtomicUsize::new(0) };
        let reading = Reading {
            upstream,
            repository,
            earlier: &self.tags,
            known: &self.known,
            notices: &notices,
            manifests: AtomicUsize::new(0),
            files: AtomicUsize::new(0),
        };
        each(tags, |tag| {
            let Some((digest, parts)) = reading.tag(&tag)? else { return Ok(()) };
            let (tags, known) = &mut *found.lock().unwrap_or_else(PoisonError::into_inner);
            tags.insert(tag, digest);
            known.insert(digest, parts);
            Ok(())
        })?;
        let (tags, known) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let listing = match self.listings.back() {
            Some(listing) if self.tags == tags => listing.clone(),
            _ => {
                let listing = Arc::new(list(repository, &tags, &known, signing, &notices)?);
                self.keep(listing.clone());
                listing
            }
        };
        notices.end();
        (self.tags, self.known) = (tags, known);
        Ok(listing)
    }

    /// Keeps a new listing, and of those before it as many as the bounds allow.
    fn keep(&mut self, listing: Arc<Listing>) {
        let memory = |listings: &VecDeque<Arc<Listing>>| listings.iter().map(|l| l.memory()).sum::<usize>();
        while self.listings.len() >= MAX_HISTORY || memory(&self.listings) > MAX_HISTORY_BYTES {
            self.listings.pop_front();
        }
        self.listings.push_back(listing);
    }
}

/// Says in the log what is left out of a listing, and of much only how much.
struct Notices<'a> {
    repository: &'a Reference,
    left: AtomicUsize,
}

impl Notices<'_> {
    fn leave(&self, tag: &str, why: &dyn Display) {
        if self.left.fetch_add(1, Ordering::Relaxed) < MAX_NOTICES {
            // A tag may be anything that a registry says.
            tracing::warn!("{}:{:.200}: {why}", self.repository.name(), tag.escape_default());
        }
    }

    fn end(&self) {
        let more = self.left.load(Ordering::Relaxed).saturating_sub(MAX_NOTICES);
        if more > 0 {
            tracing::warn!("{}: {more} more left out", self.repository.name());
        }
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

/// What a manifest says.
enum Content {
    Files(Vec<Part>),
    Images(Images),
}

/// Reads the manifests of a repository, within bounds.
struct Reading<'a> {
    upstream: &'a Upstream,
    repository: &'a Reference,
    earlier: &'a BTreeMap<String, Digest>,
    known: &'a HashMap<Digest, Arc<Vec<Part>>>,
    notices: &'a Notices<'a>,
    manifests: AtomicUsize,
    files: AtomicUsize,
}

impl Reading<'_> {
    /// The digest of a tag and the files in its manifest; none if the registry does not have it, or it is not what it should be.
    fn tag(&self, tag: &str) -> Result<Option<(Digest, Arc<Vec<Part>>)>> {
        let read = || {
            let mut reference = self.repository.with_tag(tag)?;
            if self.earlier.contains_key(tag) {
                let digest = self.upstream.client.digest(&reference)?;
                if let Some(parts) = self.known.get(&digest) {
                    return Ok((digest, parts.clone()));
                }
                reference = reference.with_digest(digest);
            }
            let (digest, content) = self.manifest(&reference, tag, None)?;
            Ok(match (self.known.get(&digest), content) {
                (Some(parts), _) => (digest, parts.clone()),
                (None, Content::Files(parts)) => (digest, Arc::new(parts)),
                (None, Content::Images(images)) => (digest, Arc::new(self.images(tag, images)?)),
            })
        };
        match read() {
            Ok((digest, parts)) => {
                let before = self.files.fetch_add(parts.len(), Ordering::Relaxed);
                self.ensure(before + parts.len(), MAX_FILES, "files")?;
                Ok(Some((digest, parts)))
            }
            // A list without what the registry has would be a wrong one.
            Err(e) if is_passing(&e) || e.is::<TooMany>() => Err(e),
            Err(e) => {
                // It may be none that a tag can be.
                self.notices.leave(tag, &format_args!("left out: {e:#}"));
                Ok(None)
            }
        }
    }

    /// The digest of a manifest, and what is in it: nothing, and a line in the log, if that is of no use.
    fn manifest(
        &self,
        reference: &Reference,
        tag: &str,
        arch: Option<&'static str>,
    ) -> Result<(Digest, Content)> {
        let before = self.manifests.fetch_add(1, Ordering::Relaxed);
        self.ensure(before + 1, MAX_MANIFESTS, "manifests")?;
        self.upstream.with_document(|| {
            let manifest = self.upstream.client.manifest(reference)?;
            let content = if is_index(&manifest.media_type) {
                files::of_index(&manifest.bytes).map(Content::Images)
            } else {
                files::of_image(&manifest.bytes, arch).map(Content::Files)
            };
            let content = content.unwrap_or_else(|e| {
                self.notices.leave(tag, &format_args!("left out: {e:#}"));
                Content::Files(Vec::new())
            });
            Ok((manifest.digest, content))
        })
    }

    /// The files in the images of an index. What is not a file is named in the log.
    fn images(&self, tag: &str, images: Images) -> Result<Vec<Part>> {
        let leave = |why: &dyn Display| self.notices.leave(tag, &format_args!("left out: {why}"));
        images.left.iter().for_each(|why| leave(why));
        let mut parts = Vec::new();
        for (descriptor, arch) in images.offered {
            let digest = descriptor.digest().to_string().parse().context("in the index")?;
            match self.manifest(&self.repository.with_digest(digest), tag, arch) {
                Ok((_, Content::Files(files))) => parts.extend(files),
                Ok((_, Content::Images(_))) => leave(&"an index in an index"),
                Err(e) if is_passing(&e) || e.is::<TooMany>() => return Err(e),
                Err(e) => leave(&format_args!("{e:#}")),
            }
            self.ensure(parts.len(), MAX_FILES, "files")?;
        }
        Ok(parts)
    }

    fn ensure(&self, count: usize, limit: usize, what: &'static str) -> Result<()> {
        if count > limit {
            bail!(TooMany { repository: self.repository.name(), limit, what });
        }
        Ok(())
    }
}

/// A bound of a listing is reached.
#[derive(Debug, thiserror::Error)]
#[error("{repository}: more than {limit} {what}")]
struct TooMany {
    repository: String,
    limit: usize,
    what: &'static str,
}

/// Whether `error` is that a registry did not answer, rather than that its answer is of no use.
fn is_passing(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref())
        .any(|e| matches!(e, HttpError::GaveUp { .. } | HttpError::Wait { .. } | HttpError::Request { .. }))
}

/// Puts the files together.
fn list(
    repository: &Reference,
    tags: &BTreeMap<String, Digest>,
    known: &HashMap<Digest, Arc<Vec<Part>>>,
    signing: Option<&Signing<'_>>,
    notices: &Notices<'_>,
) -> Result<Listing> {
    let last = repository.repository().rsplit('/').next().unwrap_or_default();
    let bound = signing.is_some_and(|signing| !signing.is_own);
    let mut files = BTreeMap::new();
    let mut lines = 0;
    for (tag, digest) in tags {
        for part in known.get(digest).into_iter().flat_map(|parts| parts.iter()) {
            let (name, file) = (part.name(last, tag, bound), (part.digest, part.size));
            let leave = |why: &str| notices.leave(tag, &format_args!("{name:?} left out: {why}"));
            if !files::is_name(&name) {
                leave("systemd-sysupdate takes no such name");
            } else if files.get(&name).is_some_and(|other| *other != file) {
                leave("another file has that name");
            } else {
                lines += line(part.digest, &name).len();
                ensure!(lines <= MAX_SUMS, "{}: a list of more than {MAX_SUMS} bytes", repository.name());
                files.insert(name, file);
            }
        }
    }
    let lines: String = files.iter().map(|(name, (digest, _))| line(*digest, name)).collect();
    let sums = Bytes::from(lines);
    let signature =
        signing.map(|signing| signing.signer.detach(&sums)).transpose().context(super::SIGNATURE)?;
    Ok(Listing { sums, signature: signature.map(Bytes::from), files })
}

/// A line of `SHA256SUMS`.
fn line(digest: Digest, name: &str) -> String {
    format!("{digest}  {name}\n")
}
