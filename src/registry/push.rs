//! Writes to registries: blobs in chunks, of which only the last is sent again when a connection breaks; manifests.
//!
//! An upload is begun with POST, goes on with a PATCH for each chunk, and ends with PUT, which names the digest; the
//! registry checks it. After a failure it is asked how far it got. One that knows no chunks gets the blob as one.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE};
use reqwest::{Method, StatusCode};
use url::Url;

use super::client::{Access, CONTENT_DIGEST, Client, Host, MAX_MANIFEST, Open, Payload};
use super::{Manifest, Reference};
use crate::digest::Digest;
use crate::http::{Answer, Failure};

/// The smallest chunk that a registry wants.
const CHUNK_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");

const OCTETS: &str = "application/octet-stream";

/// How a blob got to where it was to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Present,
    /// The registry took it from another repository.
    Mounted,
    /// It was sent.
    Sent,
}

/// An upload that has begun.
struct Upload {
    /// Where it goes on.
    url: Url,
    /// Bytes that the registry has.
    have: u64,
    /// Bytes of a chunk.
    chunk: u64,
}

/// What is pushed, and where.
struct Push<'a> {
    client: &'a Client,
    host: Arc<Host>,
    access: Access,
    digest: Digest,
    size: u64,
    open: &'a Open<'a>,
    /// Told of bytes that the registry has got.
    sent: &'a (dyn Fn(u64) + 'a),
    /// The registry does not know chunks.
    whole: bool,
}

impl Client {
    /// Sends a manifest to where `reference` says: its tag, or its digest, which must be that of the manifest. What it
    /// refers to must be there already.
    pub fn push_manifest(&self, reference: &Reference, manifest: &Manifest) -> Result<()> {
        let at = || format!("{reference}: manifest {}", manifest.digest.oci());
        ensure!(manifest.bytes.len() as u64 <= MAX_MANIFEST, "{}: more than {MAX_MANIFEST} bytes", at());
        // The tag where there is one: whoever gives both wants a name for it.
        let version = reference.tag().map_or_else(|| manifest.digest.oci(), str::to_owned);
        ensure!(
            reference.digest().is_none_or(|expected| expected == manifest.digest),
            "{}: not the digest it is to have",
            at()
        );
        let access = Access { reference: reference.clone(), push: true, from: None };
        let host = self.host(reference)?;
        let url = host.url(&format!("{}/manifests/{version}", reference.repository()))?;
        let body = Payload::Bytes(Bytes::from(manifest.bytes.clone()));
        let send = || {
            let headers = [(CONTENT_TYPE, manifest.media_type.to_string())];
            let answer = self.request(&host, &access, &Method::PUT, &url, &headers, &body)?;
            if !answer.status().is_success() {
                return Err(answer.refused());
            }
            Ok(answer.header(CONTENT_DIGEST).map(str::to_owned))
        };
        let stored = host.http().retried(Method::PUT, &url, send).with_context(at)?;
        let stored = stored.filter(|stored| stored.starts_with("sha256:"));
        ensure!(
            stored.as_ref().is_none_or(|stored| *stored == manifest.digest.oci()),
            "{}: the registry stored it as {}",
            at(),
            stored.unwrap_or_default()
        );
        Ok(())
    }

    /// Sends a blob to the repository of `reference`, unless it is there. `open` gives its content; `from` names
    /// repositories of the same registry that may have it. `sent` is told how many bytes more the registry has got.
    pub fn push_blob<'a>(
        &'a self,
        reference: &Reference,
        digest: Digest,
        size: u64,
        from: &[&str],
        open: &'a Open<'a>,
        sent: &'a (dyn Fn(u64) + 'a),
    ) -> Result<Pushed> {
        let mut access = Access { reference: reference.clone(), push: true, from: None };
        if self.has(&access, digest)? {
            return Ok(Pushed::Present);
        }
        let host = self.host(reference)?;
        let at = || format!("{}: blob {}", reference.name(), digest.oci());
        for from in from.iter().filter(|from| **from != reference.repository()) {
            access.from = Some((*from).to_owned());
            if self.mount(&host, &access, digest).with_context(at)? {
                return Ok(Pushed::Mounted);
            }
        }
        access.from = None;
        let mut push = Push { client: self, host, access, digest, size, open, sent, whole: false };
        push.run().with_context(at)?;
        Ok(Pushed::Sent)
    }

    /// Asks for a blob of another repository. False where the registry does not have it there, or does not give it.
    fn mount(&self, host: &Host, access: &Access, digest: Digest) -> Result<bool> {
        let from = access.from.as_deref().unwrap_or_default();
        let url = host.url(&format!("{}/blobs/uploads/", access.reference.repository()))?;
        let mut url = Url::parse(&url)?;
        url.query_pairs_mut().append_pair("mount", &digest.oci()).append_pair("from", from);
        let ask = || {
            let answer = self.request(host, access, &Method::POST, url.as_str(), &[], &Payload::None)?;
            match answer.status() {
                StatusCode::CREATED => Ok(true),
                // It began an upload instead. That is not used: its authorization names another repository too.
                _ if answer.is_temporary() => Err(answer.refused()),
                status => {
                    if let (StatusCode::ACCEPTED, Ok(upload)) = (status, location(&answer, &url)) {
                        let _ =
                            self.request(host, access, &Method::DELETE, upload.as_str(), &[], &Payload::None);
                    }
                    Ok(false)
                }
            }
        };
        Ok(host.http().retried(Method::POST, url.as_str(), ask)?)
    }
}

impl Push<'_> {
    fn run(&mut self) -> Result<()> {
        let url = self.host.url(&format!("{}/blobs/uploads/", self.access.reference.repository()))?;
        let start = Url::parse(&url)?;
        let mut attempts = self.host.http().attempts(&Method::POST, start.as_str());
        let mut upload: Option<Upload> = None;
        // What the registry had at the last failure, and what the caller was told of.
        let (mut high, mut told) = (0, 0);
        loop {
            let failure = match self.step(&start, &mut upload) {
                Ok(()) => {
                    (self.sent)(self.size - told);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            let have = upload.as_ref().map_or(0, |upload| upload.have);
            if have > told {
                (self.sent)(have - told);
                told = have;
            }
            match failure {
                None => {}
                Some(Failure::Again { why, after, .. }) => {
                    attempts.failed(Failure::Again { why, after, got: have.saturating_sub(high) })?;
                    high = high.max(have);
                    // It may have been only the answer that was lost.
                    if have == self.size && self.client.has(&self.access, self.digest)? {
                        return Ok(());
                    }
                    self.ask(&mut upload);
                }
                Some(last) => attempts.failed(last)?,
            }
        }
    }

    /// Sends a request, with a part of the blob where `part` says: offset and length.
    fn send(
        &self,
        method: Method,
        url: &Url,
        headers: &[(HeaderName, String)],
        part: Option<(u64, u64)>,
    ) -> Result<Answer, Failure> {
        let payload = match part {
            Some((offset, len)) => Payload::Part { open: self.open, offset, len },
            None => Payload::None,
        };
        self.client.request(&self.host, &self.access, &method, url.as_str(), headers, &payload)
    }

    /// Does what is next. The error is `None` where there is more to do.
    fn step(&mut self, start: &Url, upload: &mut Option<Upload>) -> Result<(), Option<Failure>> {
        let Some(at) = upload else {
            *upload = Some(self.begin(start)?);
            return Err(None);
        };
        if self.whole || at.have == self.size {
            return Ok(self.end(at)?);
        }
        let len = at.chunk.min(self.size - at.have);
        let range = format!("{}-{}", at.have, at.have + len - 1);
        let headers = [(CONTENT_TYPE, OCTETS.into()), (CONTENT_RANGE, range)];
        let answer = self.send(Method::PATCH, &at.url, &headers, Some((at.have, len)))?;
        match answer.status() {
            StatusCode::ACCEPTED | StatusCode::NO_CONTENT | StatusCode::CREATED => {
                at.url = location(&answer, &at.url)?;
                at.have = match received(&answer) {
                    Some(have) if have > at.have && have <= at.have + len => have,
                    Some(have) => {
                        let why = format!("the registry has {have} bytes after {}", at.have + len);
                        *upload = None;
                        return Err(Some(Failure::again(why)));
                    }
                    None => at.have + len,
                };
                Err(None)
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(Some(Failure::again(answer.status().to_string()))),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED if at.have == 0 => {
                self.whole = true;
                *upload = None;
                Err(None)
            }
            // The upload is gone: from the start.
            StatusCode::NOT_FOUND if at.have > 0 => {
                *upload = None;
                Err(Some(Failure::again("the registry does not know the upload any more")))
            }
            _ => Err(Some(answer.refused())),
        }
    }

    fn begin(&self, start: &Url) -> Result<Upload, Failure> {
        let answer = self.send(Method::POST, start, &[], None)?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(answer.refused());
        }
        let least = answer.header(CHUNK_MIN).and_then(|text| text.parse().ok()).unwrap_or(0);
        let chunk = self.client.options().chunk.max(least);
        Ok(Upload { url: location(&answer, start)?, have: 0, chunk })
    }

    fn end(&self, upload: &Upload) -> Result<(), Failure> {
        let mut url = upload.url.clone();
        url.query_pairs_mut().append_pair("digest", &self.digest.oci());
        let headers = [(CONTENT_TYPE, OCTETS.into())];
        let part = self.whole.then_some((0, self.size));
        let answer = self.send(Method::PUT, &url, &headers, part)?;
        match answer.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::ACCEPTED => Ok(()),
            _ => Err(answer.refused()),
        }
    }

    /// After a failure: asks how far the upload got. One of which that cannot be told begins again.
    fn ask(&self, upload: &mut Option<Upload>) {
        let Some(at) = upload else { return };
        let answer = match self.send(Method::GET, &at.url, &[], None) {
            Ok(answer) if !self.whole => answer,
            // Not the time to ask: the next chunk will show.
            Err(Failure::Again { .. }) if !self.whole => return,
            _ => return *upload = None,
        };
        if answer.is_temporary() {
            return;
        }
        // A registry says "0-0" of nothing and of one byte.
        let have = received(&answer).filter(|have| (2..=self.size).contains(have));
        match have {
            Some(have) if answer.status().is_success() => {
                at.url = location(&answer, &at.url).unwrap_or_else(|_| at.url.clone());
                at.have = have;
            }
            _ => *upload = None,
        }
    }
}

/// Where an upload goes on.
fn location(answer: &Answer, base: &Url) -> Result<Url, Failure> {
    let location = answer.header(LOCATION).and_then(|location| base.join(location).ok());
    location.ok_or_else(|| Failure::again(format!("{}: no Location", answer.status())))
}

/// How many bytes of an upload the registry has: `0-99`, or `bytes=0-99`.
fn received(answer: &Answer) -> Option<u64> {
    let range = answer.header(RANGE)?;
    let (start, last) = range.strip_prefix("bytes=").unwrap_or(range).split_once('-')?;
    let last: u64 = last.parse().ok().filter(|_| start == "0")?;
    last.checked_add(1)
}
