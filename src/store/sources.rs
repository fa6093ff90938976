//! Makes the sources of an index: each once, out of blobs and of the sources before it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::fold::{MAX_MAP, Map};
use crate::recipe::{Blob, SourceSpec};
use crate::source::cluster::{Cache, Clustered};
use crate::source::delta::Delta;
use crate::source::{Concat, Reader, Source, Zeros, blob, rootfs};
use crate::store::check;

/// Opens blobs.
type OpenBlob<'a> = dyn Fn(&Blob) -> Result<Arc<dyn Source>> + Send + Sync + 'a;

/// The open sources of an index.
pub struct Sources<'a> {
    open: Box<OpenBlob<'a>>,
    cache: Arc<Cache>,
    made: Mutex<HashMap<usize, Arc<dyn Source>>>,
}

impl<'a> Sources<'a> {
    /// Sources whose blobs `open` opens and whose clusters are in `cache`.
    pub fn new(
        cache: Arc<Cache>,
        open: impl Fn(&Blob) -> Result<Arc<dyn Source>> + Send + Sync + 'a,
    ) -> Self {
        Self { open: Box::new(open), cache, made: Mutex::default() }
    }

    /// The cache that the sources share.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Puts other bytes in the place of source `i`: the same ones, where they are cheaper to read.
    pub fn substitute(&self, i: usize, source: Arc<dyn Source>) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(i, source);
    }

    /// Source `i` of `specs`, which are checked (each made only of those before it).
    pub fn get(&self, specs: &[SourceSpec], i: usize) -> Result<Arc<dyn Source>> {
        if let Some(source) = self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&i) {
            return Ok(source.clone());
        }
        let source = self.make(specs, &specs[i])?;
        self.substitute(i, source.clone());
        Ok(source)
    }

    /// The segment map that `blob` holds.
    pub fn map(&self, blob: &Blob) -> Result<Map> {
        let name = || format!("segment map {}", blob.sha256);
        // A map that is damaged is named here; later, only the bytes that come out would differ.
        check(&name(), Reader::new(&*(self.open)(blob)?), blob)?;
        let bytes = self.zstd(blob)?;
        ensure!(
            bytes.len() <= MAX_MAP as u64,
            "{}: {} bytes: at most {MAX_MAP} are read",
            name(),
            bytes.len()
        );
        let mut plain = vec![0; bytes.len() as usize];
        bytes.read_at(0, &mut plain).with_context(name)?;
        let map = Map::from_bytes(&plain, self.cache.table_room()).with_context(name)?;
        self.cache.reserve(map.memory(), &name())?;
        Ok(map)
    }

    /// Several sources of `specs` one after the other.
    pub fn concat(&self, specs: &[SourceSpec], parts: &[usize]) -> Result<Concat> {
        let parts = parts.iter().map(|&i| self.get(specs, i)).collect::<Result<_>>()?;
        Ok(Concat::new(parts)?)
    }

    /// The plain bytes of a blob of seekable zstd.
    pub fn zstd(&self, blob: &Blob) -> Result<Clustered> {
        blob::open((self.open)(blob)?, self.cache.clone()).with_context(|| format!("blob {}", blob.sha256))
    }

    /// Makes a source that need not be one of `specs`, only be made of them.
    pub fn make(&self, specs: &[SourceSpec], spec: &SourceSpec) -> Result<Arc<dyn Source>> {
        let (made, size): (Arc<dyn Source>, u64) = match spec {
            SourceSpec::Zeros { size } => (Arc::new(Zeros(*size)), *size),
            SourceSpec::Stored { blob } => ((self.open)(blob)?, blob.size),
            SourceSpec::Zstd { blob, plain_size } => (Arc::new(self.zstd(blob)?), *plain_size),
            SourceSpec::Delta { blob, plain_size, base } => {
                let name = || format!("blob {}", blob.sha256);
                let (delta, base) = (self.zstd(blob)?, self.concat(specs, base)?);
                let delta = Delta::open(Arc::new(delta), Arc::new(base), self.cache.table_room());
                let delta = delta.with_context(name)?;
                self.cache.reserve(delta.memory(), "the commands of a delta").with_context(name)?;
                (Arc::new(delta), *plain_size)
            }
            SourceSpec::Rootfs { image, plain_size } => {
                let image = self.get(specs, *image)?;
                let (file_system, map) = rootfs::open(image).context("live rootfs")?;
                self.cache.reserve(map.memory(), "the files of a live rootfs")?;
                (Arc::new(Clustered::new(map, file_system, self.cache.clone())), *plain_size)
            }
        };
        ensure!(made.len() == size, "a source of the index: expected {size} bytes, got {}", made.len());
        Ok(made)
    }
}
