//! Checks a dehydrated directory: the stream document, the signatures, every blob, and if asked every artifact.

use std::sync::Arc;

use anyhow::{Result, bail};
use rayon::prelude::*;

use crate::progress::Progress;
use crate::recipe::{Artifact, Blob, Index};
use crate::rehydrate::{Dest, Options, Which, rehydrate};
use crate::store::Store;

/// Checks `store`; an error names everything that is damaged, and which artifacts that concerns.
pub fn verify(store: &Arc<Store>, artifacts_too: Option<&Options>, progress: &Progress) -> Result<()> {
    let index = &store.index;
    let mut bad = Vec::new();
    bad.extend(store.stream().err().map(|e| format!("{e:#}")));
    for artifact in &index.artifacts {
        if let Some(signature) = &artifact.signature {
            bad.extend(store.signature(&artifact.published.name, signature).err().map(|e| format!("{e:#}")));
        }
    }
    let blobs = index.blobs();
    let task = progress.task("blobs", Some(blobs.iter().map(|b| b.size).sum()));
    bad.par_extend(blobs.par_iter().filter_map(|blob| {
        let error = store.verify(blob).err();
        task.advance(blob.size);
        error.map(|e| format!("{e:#}, needed by {}", needed_by(index, blob)))
    }));
    task.finish();
    if !bad.is_empty() {
        bail!("{}: {} damaged: {}", store.name(), bad.len(), bad.join("; "));
    }
    if let Some(options) = artifacts_too {
        for arch in index.architectures() {
            let which = Which { all: true, arch: Some(arch.into()), ..Which::default() };
            rehydrate(store, &which, &Dest::Nowhere, options, progress)?;
        }
    }
    Ok(())
}

/// The artifacts that a blob is part of, for people.
fn needed_by(index: &Index, blob: &Blob) -> String {
    /// So many are named: to look through all of those of an index for all of its blobs is not worth the time.
    const NAMED: usize = 32;
    let found = index.artifacts.iter().filter(|a| index.blobs_of(a).contains(blob)).map(Artifact::label);
    let mut named = Vec::from_iter(found.take(NAMED + 1));
    if named.len() > NAMED {
        named[NAMED] = "more".into();
    }
    named.join(", ")
}
