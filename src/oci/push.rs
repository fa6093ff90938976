//! Sends an image that was put together to a registry: blobs first, several at once, then what refers to them, and the tag
//! last, so that whoever sees it can have all of the image.

use std::collections::HashSet;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::Result;
use oci_spec::image::Descriptor;

use super::layout::Staging;
use crate::digest::Digest;
use crate::progress::Progress;
use crate::registry::{Client, Manifest, Pushed, Reference};
use crate::source::Reader;

/// How many blobs are sent at once.
const PARALLEL: usize = 3;

/// Sends those of `blobs` that the repository of `to` does not have.
pub(super) fn blobs(
    staging: &Staging,
    client: &Client,
    to: &Reference,
    blobs: &[Descriptor],
    progress: &Progress,
) -> Result<()> {
    let mut seen = HashSet::new();
    let mut left: Vec<_> = blobs.iter().filter(|blob| seen.insert(blob.digest().to_string())).collect();
    // The last is taken first: the largest.
    left.sort_by_key(|blob| blob.size());
    let task = progress.task(format!("push {}", to.name()), Some(left.iter().map(|b| b.size()).sum()));
    let (left, failed) = (Mutex::new(left), Mutex::new(None));
    let work = || {
        while let Some(blob) = left.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            let digest: Digest = blob.digest().to_string().parse()?;
            let content = staging.content(digest)?;
            let open = |offset: u64| -> std::io::Result<Box<dyn Read + '_>> {
                let mut reader = Reader::new(&*content);
                reader.seek(SeekFrom::Start(offset))?;
                Ok(Box::new(reader))
            };
            let sent = |n| task.advance(n);
            if client.push_blob(to, digest, blob.size(), &[], &open, &sent)? != Pushed::Sent {
                task.advance(blob.size());
                tracing::info!("blob {} is there already", digest.oci());
            }
        }
        anyhow::Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                if let Err(e) = work() {
                    // The others stop after what they are at.
                    left.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(e) => Err(e),
        None => {
            task.finish();
            Ok(())
        }
    }
}

/// Sends a manifest of an image, under the tag or digest of `to`.
pub(super) fn manifest(
    staging: &Staging,
    client: &Client,
    to: &Reference,
    manifest: &Descriptor,
) -> Result<()> {
    let digest: Digest = manifest.digest().to_string().parse()?;
    let mut bytes = Vec::new();
    Reader::new(&*staging.content(digest)?).read_to_end(&mut bytes)?;
    client.push_manifest(to, &Manifest { bytes, media_type: manifest.media_type().clone(), digest })
}
