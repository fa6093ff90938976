//! Checks a dehydrated directory: the stream document, the signatures, every blob, and if asked every artifact.

use std::sync::Arc;

use anyhow::{Result, bail};
use rayon::prelude::*;

use crate::progress::Progress;
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
        let needed_by =
            index.artifacts.iter().filter(|a| index.blobs_of(a).contains(blob)).map(|a| a.label());
        error.map(|e| format!("{e:#}, needed by {}", Vec::from_iter(needed_by).join(", ")))
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
