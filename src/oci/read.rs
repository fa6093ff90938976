//! Reads an image where it is: in a registry, a layout, an archive of one, or a directory of skopeo.
//!
//! The layers of an image say which files of the dehydrated directory they hold, and where; so an artifact is
//! rehydrated without the layers it does not need. The layer of the metadata is fetched whole and checked by its digest, so
//! that the index is the one that the manifest, and so a signature, covers. A blob is fetched when it is first opened, as
//! a range of its layer, and checked by its name before anything is read of it. What was fetched is kept as long as there
//! is room for it, see `kept.rs`; what is small in memory.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use oci_spec::image::{Descriptor, ImageManifest, MediaType};

use super::ANNOTATION_FILES;
use super::kept::{self, Kept, PIECE};
use super::sign::Policy;
use crate::bounded::shown;
use crate::digest::{Digest, Hasher};
use crate::progress::Progress;
use crate::recipe::Blob;
use crate::registry::{Manifest, Options, Reference, TRANSPORT, is_index, parse_index};
use crate::source::{Slice, Source};
use crate::store::{self, BLOBS, Files, Store};
use crate::transport::{self, Totals, Transport};

/// The most images in an index that are looked at for data.
const MAX_IMAGES: usize = 64;

/// A file of at most this many bytes is kept in memory.
const SMALL: u64 = 256 << 10;

/// The longest layer of metadata that is read, in bytes: several times the longest index.
const MAX_METADATA: u64 = 256 << 20;

/// The most files that the layers of an image hold: our images have some hundred.
const MAX_FILES: usize = 1 << 16;

/// How much is kept of what is on this machine anyway, in bytes.
const LOCAL_CACHE: u64 = 64 * PIECE;

/// The name of an image with its transport: `docker://REF`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `dir:DIR` or
/// `containers-storage:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(String);

impl FromStr for Origin {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(name) = text.strip_prefix(TRANSPORT) {
            name.parse::<Reference>()?;
        } else {
            let (transport, path) = text.split_once(':').unwrap_or_default();
            ensure!(
                matches!(transport, "oci" | "oci-archive" | "dir" | "containers-storage"),
                "{text:?}: not a place of an image: expected docker://REF, oci:DIR[:TAG], \
                 oci-archive:FILE[:TAG], dir:DIR or containers-storage:NAME"
            );
            ensure!(!path.is_empty() && !path.starts_with(':'), "{text:?}: no path");
        }
        Ok(Self(text.into()))
    }
}

/// An image that is read where it is.
pub struct Image {
    name: String,
    transport: Box<dyn Transport>,
    root: Manifest,
    kept: Arc<Kept>,
}

impl Image {
    /// Opens the image at `origin`; `options` are for registries, and `cache` is how many bytes to keep of what is
    /// fetched from there.
    pub fn open(origin: &Origin, options: Options, cache: u64) -> Result<Self> {
        let name = origin.0.clone();
        let transport = transport::open(&name, options)?;
        let root = transport.root().with_context(|| name.clone())?;
        let kept = Kept::new(if transport.local() { LOCAL_CACHE } else { cache });
        Ok(Self { name, transport, root, kept })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks its signatures.
    pub fn check(&self, policy: &Policy) -> Result<()> {
        policy.check(&self.name, &*self.transport, self.root.digest)
    }

    /// A small blob, checked.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        transport::document(&*self.transport, descriptor)
            .with_context(|| format!("{}: blob {}", self.name, descriptor.digest()))
    }

    /// The manifests of the image: its own, or those in its index. Of the annotations of layers those that are ours.
    fn images(&self) -> Result<Vec<ImageManifest>> {
        let mut totals = Totals::default();
        let mut parse = |manifest: &Manifest| {
            let parsed = totals.add(manifest).and_then(|()| transport::parse(&manifest.bytes));
            let mut parsed =
                parsed.with_context(|| format!("{}: manifest {}", self.name, manifest.digest.oci()))?;
            for layer in parsed.layers_mut() {
                let files = layer.annotations().as_ref().and_then(|all| all.get(ANNOTATION_FILES)).cloned();
                layer.set_annotations(files.map(|files| HashMap::from([(ANNOTATION_FILES.into(), files)])));
            }
            Ok(parsed)
        };
        if !is_index(&self.root.media_type) {
            return Ok(vec![parse(&self.root)?]);
        }
        let index = parse_index(&self.root.bytes).with_context(|| self.name.clone())?;
        index
            .manifests()
            .iter()
            .take(MAX_IMAGES)
            .map(|image| parse(&transport::checked(&*self.transport, image)?))
            .collect()
    }

    /// Part of a layer.
    fn part(&self, layer: &Descriptor, offset: u64, len: u64) -> io::Result<impl Read + Send + use<>> {
        Ok(self.transport.part(layer, offset, len).map_err(io::Error::other)?.take(len))
    }

    /// Opens the dehydrated directory in the image.
    pub fn store(self: &Arc<Self>) -> Result<Store> {
        let files = self.files()?;
        let fetched = Mutex::default();
        Store::of(Box::new(ImageFiles { image: self.clone(), files, fetched }))
    }

    /// The files of the dehydrated directory, and where they are.
    fn files(&self) -> Result<BTreeMap<String, Place>> {
        let images = self.images()?;
        // Images for several architectures share their data.
        let mut found = images.iter().map(|image| places(image.layers())).find(|files| match files {
            Ok(files) => !files.is_empty(),
            Err(_) => true,
        });
        let found = found.take().transpose().with_context(|| self.name.clone())?;
        found.with_context(|| {
            format!(
                "{}: its layers do not say what is in them: not an image of this program, or one that was \
                 compressed on the way here (skopeo copy --preserve-digests keeps it as it is)",
                self.name
            )
        })
    }

    /// Reads every configuration and layer of the image, and checks them and all that is in them by digest.
    pub fn verify(self: &Arc<Self>, progress: &Progress) -> Result<()> {
        let (files, store) = (self.files()?, self.store()?);
        let metadata = store.metadata()?;
        let mut missing: BTreeMap<String, Blob> =
            store.index.blobs().into_iter().map(|blob| (format!("{BLOBS}/{}", blob.sha256), blob)).collect();
        let mut layers = BTreeMap::new();
        for image in self.images()? {
            self.document(image.config())?;
            for layer in image.layers() {
                layers.entry(layer.digest().to_string()).or_insert_with(|| layer.clone());
            }
        }
        let task = progress.task("layers", Some(layers.values().map(Descriptor::size).sum()));
        for layer in layers.values() {
            let (digest, size) = blob_of(layer)?;
            let what = format!("{}: layer {}", self.name, digest.oci());
            let reader = self.part(layer, 0, size).with_context(|| what.clone())?;
            let mut reader = Tee { inner: reader, copy: Hasher::new(io::sink()), told: |n| task.advance(n) };
            let mut inside: Vec<_> = places(std::slice::from_ref(layer))?.into_iter().collect();
            inside.sort_by_key(|(_, place)| place.offset);
            let mut at = 0;
            for (path, place) in inside {
                ensure!(place.offset >= at, "{what}: {path} begins before {at}");
                let mut skip = (&mut reader).take(place.offset - at);
                io::copy(&mut skip, &mut io::sink()).with_context(|| what.clone())?;
                at = place.offset + place.size;
                let expected = missing.remove(&path).or_else(|| {
                    let bytes = metadata.get(&path)?;
                    Some(Blob { sha256: Digest::of(bytes), size: bytes.len() as u64 })
                });
                let found = (&mut reader).take(place.size);
                match expected {
                    Some(expected) => store::check(&format!("{what}: {path}"), found, &expected)?,
                    None => drop(Digest::of_reader(found).with_context(|| what.clone())?),
                }
            }
            io::copy(&mut reader, &mut io::sink()).with_context(|| what.clone())?;
            let (found, len) = reader.copy.finish();
            store::matches(&what, &Blob { sha256: found, size: len }, &Blob { sha256: digest, size })?;
        }
        task.finish();
        // What is in parts is checked as a whole.
        for path in missing.keys().cloned().collect::<Vec<_>>() {
            if let Some(blob) = missing.get(&path)
                && files.contains_key(&format!("{path}.0"))
            {
                store.verify(blob).with_context(|| self.name.clone())?;
                missing.remove(&path);
            }
        }
        ensure!(
            missing.is_empty(),
            "{}: {} blobs are in no layer, the first is {}",
            self.name,
            missing.len(),
            missing.keys().next().map_or("", String::as_str)
        );
        Ok(())
    }
}

fn blob_of(descriptor: &Descriptor) -> Result<(Digest, u64)> {
    Ok((descriptor.digest().to_string().parse()?, descriptor.size()))
}

/// Where a file is.
#[derive(Clone, Debug)]
struct Place {
    layer: Arc<Descriptor>,
    offset: u64,
    size: u64,
}

/// The files that layers say they hold. Layers that are compressed have no such places.
fn places(layers: &[Descriptor]) -> Result<BTreeMap<String, Place>> {
    let mut places = BTreeMap::new();
    for layer in layers {
        let Some(files) = layer.annotations().as_ref().and_then(|a| a.get(ANNOTATION_FILES)) else {
            continue;
        };
        let (digest, size) = blob_of(layer)?;
        let shared = Arc::new(layer.clone());
        let what = || format!("layer {}: {ANNOTATION_FILES}", digest.oci());
        ensure!(*layer.media_type() == MediaType::ImageLayer, "{}: on a {}", what(), layer.media_type());
        for file in files.split(',').filter(|file| !file.is_empty()) {
            let place = || {
                let (path, range) = file.rsplit_once('@')?;
                let (offset, len) = range.split_once('+')?;
                let (offset, len) = (offset.parse::<u64>().ok()?, len.parse::<u64>().ok()?);
                let inside = offset.checked_add(len).is_some_and(|end| end <= size);
                let place = Place { layer: shared.clone(), offset, size: len };
                inside.then(|| (path.to_owned(), place))
            };
            let (path, place) =
                place().with_context(|| format!("{}: {:?}", what(), shown(file.as_bytes())))?;
            places.insert(path, place);
            ensure!(places.len() <= MAX_FILES, "{}: more than {MAX_FILES} files", what());
        }
    }
    Ok(places)
}

/// A file that was fetched, or is to be; locked while it is.
type Slot = Arc<Mutex<Option<Arc<dyn Source>>>>;

/// The files of a dehydrated directory in an image.
struct ImageFiles {
    image: Arc<Image>,
    files: BTreeMap<String, Place>,
    fetched: Mutex<HashMap<String, Slot>>,
}

impl Files for ImageFiles {
    fn name(&self) -> String {
        self.image.name.clone()
    }

    fn has(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn Source>> {
        let place = self.files.get(path).ok_or(io::ErrorKind::NotFound)?;
        self.once(path, || self.fetch(path, place))
    }
}

impl ImageFiles {
    /// What `get` gets, once.
    fn once(
        &self,
        key: &str,
        get: impl FnOnce() -> io::Result<Arc<dyn Source>>,
    ) -> io::Result<Arc<dyn Source>> {
        let slot = {
            let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.entry(key.to_owned()).or_default().clone()
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*slot {
            return Ok(file.clone());
        }
        let file = get()?;
        *slot = Some(file.clone());
        Ok(file)
    }

    fn fetch(&self, path: &str, place: &Place) -> io::Result<Arc<dyn Source>> {
        let Some(name) = path.strip_prefix(BLOBS).and_then(|path| path.strip_prefix('/')) else {
            // The index is to be what the manifest, and so a signature, says: by the digest of the whole layer.
            let (layer, size) = blob_of(&place.layer).map_err(io::Error::other)?;
            if size > MAX_METADATA {
                let what = format!("layer {}: {size} bytes of metadata", layer.oci());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            let whole = Place { layer: place.layer.clone(), offset: 0, size };
            let layer = self.once(&layer.oci(), || self.get(&whole, Some(layer)))?;
            return Ok(Arc::new(Slice::new(layer, place.offset, place.size)?));
        };
        // A part of a blob cannot be checked alone.
        let expected = match name.contains('.') {
            true => None,
            false => Some(name.parse().map_err(io::Error::other)?),
        };
        self.get(place, expected)
    }

    /// Gets what is at `place`, and checks it.
    fn get(&self, place: &Place, expected: Option<Digest>) -> io::Result<Arc<dyn Source>> {
        if place.size > SMALL {
            let (image, at) = (self.image.clone(), place.clone());
            let part = move |offset, len| -> io::Result<Box<dyn Read + Send>> {
                Ok(Box::new(image.part(&at.layer, at.offset + offset, len)?))
            };
            return self.image.kept.fetch(place.size, expected, Box::new(part));
        }
        let mut bytes = vec![0; place.size as usize];
        self.image.part(&place.layer, place.offset, place.size)?.read_exact(&mut bytes)?;
        kept::matches(Digest::of(&bytes), expected)?;
        Ok(Arc::new(bytes))
    }
}

/// A reader that hashes what passes through it, and tells how much that is.
struct Tee<R, T> {
    inner: R,
    copy: Hasher<io::Sink>,
    told: T,
}

impl<R: Read, T: FnMut(u64)> Read for Tee<R, T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.copy.write_all(&buf[..n])?;
        (self.told)(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let parse = |text: &str| text.parse::<Origin>();
        for text in [
            "docker://h/x:1",
            "containers-storage:[vfs@/a+/b]h/x:1",
            "oci:a/b",
            "oci:a:h:80/x:t",
            "oci-archive:a:t",
            "dir:a:b",
        ] {
            assert_eq!(parse(text).unwrap(), Origin(text.into()));
        }
        for text in ["h/x", "", "oci:", "dir:", "docker://", "docker-daemon:x"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn places_outside_a_layer() {
        let digest = Digest::of(b"").oci();
        let layer = |files: &str| -> Descriptor {
            serde_json::from_value(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": 1000,
                "annotations": { ANNOTATION_FILES: files } }))
            .unwrap()
        };
        assert_eq!(places(&[layer("a@b@0+1000,c@999+1")]).unwrap().len(), 2);
        for bad in ["a", "a@1", "a@1+", "a@0+1001", "a@1000+1", "a@18446744073709551615+2", "a@-1+1"] {
            let e = places(&[layer(bad)]).unwrap_err().to_string();
            assert_eq!(e, format!("layer {digest}: dev.rehydrator.files: {bad:?}"));
        }
    }
}
