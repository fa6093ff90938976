//! `docker://NAME`, or just a name: an image in a registry.

use std::io::{self, Read};

use anyhow::{Context, Result, ensure};
use bytes::{Buf, Bytes};
use oci_spec::image::Descriptor;
use reqwest::{Method, StatusCode};

use super::Transport;
use crate::bounded::names;
use crate::digest::Digest;
use crate::http::{Answer, Body, Failure, Http, Retry};
use crate::registry::{Client, Manifest, Options, Reference, not_found};

/// The most places that a foreign layer is looked for at.
const MAX_URLS: usize = 4;

/// An image in a registry.
pub(super) struct Docker {
    client: Client,
    reference: Reference,
    foreign_layers: bool,
}

impl Docker {
    pub(super) fn new(options: Options, reference: Reference) -> Self {
        let foreign_layers = options.foreign_layers;
        Self { client: Client::new(options), reference, foreign_layers }
    }
}

impl Transport for Docker {
    fn root(&self) -> Result<Manifest> {
        self.client.manifest(&self.reference)
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        self.client.manifest(&self.reference.with_digest(descriptor.digest().to_string().parse()?))
    }

    fn part(&self, blob: &Descriptor, offset: u64, len: u64) -> Result<Box<dyn Read + Send>> {
        let digest: Digest = blob.digest().to_string().parse()?;
        let urls = blob.urls().as_deref().unwrap_or_default();
        if !urls.is_empty() && !self.client.has_blob(&self.reference, digest)? {
            // An image must not make this machine ask any server there is.
            ensure!(
                self.foreign_layers,
                "foreign layer {}: not in the registry, and not fetched from {} without --foreign-layers",
                blob.digest(),
                names(urls)
            );
            return foreign(urls, offset).with_context(|| format!("foreign layer {}", blob.digest()));
        }
        // Not the blob as a whole, which would be hashed here and once more by those who read it.
        let range = offset..offset.saturating_add(len);
        Ok(Box::new(self.client.blob_range(&self.reference, digest, range, blob.size())?))
    }

    fn tags(&self) -> Result<Vec<String>> {
        self.client.tags(&self.reference)
    }

    fn tagged(&self, tag: &str) -> Result<Option<Box<dyn Transport>>> {
        let reference = self.reference.with_tag(tag)?;
        match self.client.digest(&reference) {
            Ok(_) => Ok(Some(Box::new(Self { client: self.client.clone(), reference, ..*self }))),
            Err(e) if not_found(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn referrers(&self, digest: Digest) -> Result<Option<Manifest>> {
        super::referrers_index(&self.client.referrers(&self.reference, digest)?.unwrap_or_default())
    }

    fn reference(&self) -> Option<&Reference> {
        Some(&self.reference)
    }

    fn local(&self) -> bool {
        false
    }
}

/// Gets a blob that registries may not hand out from where its manifest says that it is.
fn foreign(urls: &[String], offset: u64) -> Result<Box<dyn Read + Send>> {
    let http = Http::new(Retry::default())?;
    let mut last = None;
    let known = |url: &&String| url.starts_with("https://") || url.starts_with("http://");
    for url in urls.iter().filter(known).take(MAX_URLS) {
        let ask = || {
            let answer = http.send(Method::GET, url, &[], Body::None)?;
            if answer.status() == StatusCode::OK { Ok(answer) } else { Err(answer.refused()) }
        };
        match http.retried(Method::GET, url, ask) {
            Ok(answer) => {
                let mut content = Foreign { _http: http, answer, chunk: Bytes::new() };
                io::copy(&mut (&mut content).take(offset), &mut io::sink())?;
                return Ok(Box::new(content));
            }
            Err(e) => last = Some(e),
        }
    }
    Err(last.map_or_else(|| anyhow::anyhow!("no URL to get it from"), Into::into))
}

/// The content of an answer.
struct Foreign {
    /// What moves the bytes.
    _http: Http,
    answer: Answer,
    chunk: Bytes,
}

impl Read for Foreign {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.answer.chunk() {
                Ok(Some(chunk)) => self.chunk = chunk,
                Ok(None) => return Ok(0),
                Err(Failure::Final(e)) => return Err(io::Error::other(e)),
                Err(Failure::Again { why, .. }) => return Err(io::Error::other(why)),
            }
        }
        let n = buf.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}
