//! Reads an image where it is: in a registry, a layout, an archive of one, or a directory of skopeo.
//!
//! The layers of an image say which files of the dehydrated directory they hold, and where; so an artifact is
//! rehydrated without the layers it does not need. The layer of the metadata is fetched whole and checked by its digest, so
//! that the index is the one that the manifest, and so a signature, covers. A blob is fetched when it is first opened, as
//! a range of its layer, and checked by its name before anything is read of it. What was fetched is kept in an unnamed
//! temporary file until the end; what is small in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use serde_json::Value;

use super::layout::{INDEX, blob_path, read_index};
use super::{ANNOTATION_FILES, layout};
use crate::digest::{Digest, Hasher};
use crate::io::{read_limited, scratch_file};
use crate::progress::Progress;
use crate::recipe::Blob;
use crate::registry::{Client, Manifest, Options, Reference, TRANSPORT, is_index};
use crate::source::{self, Slice, Source};
use crate::store::{self, BLOBS, Files, Store};

/// The most images in an index that are looked at for data.
const MAX_IMAGES: usize = 64;

/// A file of at most this many bytes is kept in memory.
const SMALL: u64 = 256 << 10;

/// The longest layer of metadata that is read, in bytes: several times the longest index.
const MAX_METADATA: u64 = 256 << 20;

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In a registry.
    Registry(Reference),
    /// In an OCI layout; the tag may be left out where there is only one image.
    Layout(PathBuf, Option<String>),
    /// In an OCI layout in a tar file.
    Archive(PathBuf, Option<String>),
    /// In a directory as `skopeo copy … dir:` makes it.
    Dir(PathBuf),
}

impl FromStr for Origin {
    type Err = anyhow::Error;

    /// Reads `docker://REF`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or `dir:DIR`. As in skopeo, the path ends at
    /// the first colon.
    fn from_str(text: &str) -> Result<Self> {
        if let Some(name) = text.strip_prefix(TRANSPORT) {
            return Ok(Self::Registry(name.parse()?));
        }
        let (transport, rest) = text.split_once(':').unwrap_or_default();
        let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag.into())));
        ensure!(transport.is_empty() || !path.is_empty(), "{text:?}: no path");
        match transport {
            "oci" => Ok(Self::Layout(path.into(), tag)),
            "oci-archive" => Ok(Self::Archive(path.into(), tag)),
            "dir" => Ok(Self::Dir(rest.into())),
            _ => bail!(
                "{text:?}: not a place of an image: expected docker://REF, oci:DIR[:TAG], \
                 oci-archive:FILE[:TAG] or dir:DIR"
            ),
        }
    }
}

/// What carries images.
enum Carrier {
    Registry {
        client: Client,
        reference: Reference,
    },
    /// A layout; where its files are: in a directory, or in a tar file at an offset, with a length.
    Layout {
        files: Layout,
    },
    Dir(PathBuf),
}

enum Layout {
    Dir(PathBuf),
    Archive { path: PathBuf, members: HashMap<String, (u64, u64)> },
}

/// An image that is read where it is.
pub struct Image {
    name: String,
    carrier: Carrier,
    root: Manifest,
}

impl Image {
    /// Opens the image at `origin`; `options` are for registries.
    pub fn open(origin: &Origin, options: Options) -> Result<Self> {
        let (name, carrier, tag) = match origin {
            Origin::Registry(reference) => {
                let carrier =
                    Carrier::Registry { client: Client::new(options), reference: reference.clone() };
                (format!("{TRANSPORT}{reference}"), carrier, None)
            }
            Origin::Layout(path, tag) => {
                let carrier = Carrier::Layout { files: Layout::Dir(path.clone()) };
                (format!("oci:{}", path.display()), carrier, tag.as_deref())
            }
            Origin::Archive(path, tag) => {
                let carrier = Carrier::Layout { files: Layout::archive(path)? };
                (format!("oci-archive:{}", path.display()), carrier, tag.as_deref())
            }
            Origin::Dir(path) => (format!("dir:{}", path.display()), Carrier::Dir(path.clone()), None),
        };
        let root = match &carrier {
            Carrier::Registry { client, reference } => client.manifest(reference)?,
            Carrier::Layout { files } => files.image(tag).with_context(|| name.clone())?,
            Carrier::Dir(dir) => {
                let bytes = read_limited(&dir.join("manifest.json"), layout::MAX_DOCUMENT)
                    .with_context(|| name.clone())?;
                manifest(bytes)
            }
        };
        Ok(Self { name, carrier, root })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name in a registry, where it is in one.
    pub fn reference(&self) -> Option<&Reference> {
        match &self.carrier {
            Carrier::Registry { reference, .. } => Some(reference),
            _ => None,
        }
    }

    /// The digest of its manifest, or of the index of its manifests.
    pub fn digest(&self) -> Digest {
        self.root.digest
    }

    /// The image that has this tag beside it, if any.
    pub fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        match &self.carrier {
            Carrier::Registry { client, reference } => match client.manifest(&reference.with_tag(tag)?) {
                Err(e) if crate::registry::not_found(&e) => Ok(None),
                other => other.map(Some),
            },
            Carrier::Layout { files } => files.tagged(tag),
            Carrier::Dir(_) => Ok(None),
        }
    }

    /// A small blob, checked.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let (digest, size) = blob_of(descriptor)?;
        ensure!(size <= layout::MAX_DOCUMENT, "{}: {size} bytes", digest.oci());
        let mut bytes = Vec::new();
        let read = self.part(digest, size, 0, size).and_then(|mut part| part.read_to_end(&mut bytes));
        read.with_context(|| format!("{}: blob {}", self.name, digest.oci()))?;
        store::check(&format!("blob {}", digest.oci()), &*bytes, &Blob { sha256: digest, size })?;
        Ok(bytes)
    }

    /// The manifests of the image: its own, or those in its index.
    fn images(&self) -> Result<Vec<ImageManifest>> {
        let parse = |manifest: &Manifest| {
            let what = || format!("{}: manifest {}", self.name, manifest.digest.oci());
            serde_json::from_slice::<ImageManifest>(&manifest.bytes).with_context(what)
        };
        if !is_index(&self.root.media_type) {
            return Ok(vec![parse(&self.root)?]);
        }
        let index: ImageIndex =
            serde_json::from_slice(&self.root.bytes).with_context(|| self.name.clone())?;
        index.manifests().iter().take(MAX_IMAGES).map(|image| parse(&self.child(image)?)).collect()
    }

    /// A manifest that the index refers to.
    fn child(&self, descriptor: &Descriptor) -> Result<Manifest> {
        let (digest, size) = blob_of(descriptor)?;
        let bytes = match &self.carrier {
            Carrier::Registry { client, reference } => {
                return client.manifest(&reference.with_digest(digest));
            }
            Carrier::Layout { .. } => return Ok(manifest(self.document(descriptor)?)),
            Carrier::Dir(dir) => {
                let path = dir.join(format!("{digest}.manifest.json"));
                read_limited(&path, layout::MAX_DOCUMENT).with_context(|| path.display().to_string())?
            }
        };
        store::check(&format!("manifest {}", digest.oci()), &*bytes, &Blob { sha256: digest, size })?;
        Ok(manifest(bytes))
    }

    /// Part of a blob.
    fn part(&self, digest: Digest, size: u64, offset: u64, len: u64) -> io::Result<Box<dyn Read>> {
        let file = |path: &Path, start: u64, found: u64| -> io::Result<Box<dyn Read>> {
            if found != size {
                let what = format!("blob {}: expected {size} bytes, got {found}", digest.oci());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            let mut file = File::open(path)?;
            io::Seek::seek(&mut file, io::SeekFrom::Start(start + offset))?;
            Ok(Box::new(file.take(len)))
        };
        let whole = |path: PathBuf| file(&path, 0, fs::metadata(&path)?.len());
        match &self.carrier {
            Carrier::Registry { client, reference } => {
                let reader = match offset == 0 && len == size {
                    true => client.blob(reference, digest, size),
                    false => client.blob_range(reference, digest, offset, len),
                };
                Ok(Box::new(reader.map_err(io::Error::other)?))
            }
            Carrier::Dir(dir) => whole(dir.join(digest.to_string())),
            Carrier::Layout { files: Layout::Dir(dir) } => whole(dir.join(blob_path(digest))),
            Carrier::Layout { files: Layout::Archive { path, members } } => {
                let (start, found) = members.get(&blob_path(digest)).ok_or(io::ErrorKind::NotFound)?;
                file(path, *start, *found)
            }
        }
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
            let reader = self.part(digest, size, 0, size).with_context(|| what.clone())?;
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

/// A document of which nothing more is known.
fn manifest(bytes: Vec<u8>) -> Manifest {
    let kind = serde_json::from_slice::<Value>(&bytes).ok();
    let kind = kind.as_ref().and_then(|kind| kind["mediaType"].as_str()).map(MediaType::from);
    Manifest { media_type: kind.unwrap_or(MediaType::ImageManifest), digest: Digest::of(&bytes), bytes }
}

fn blob_of(descriptor: &Descriptor) -> Result<(Digest, u64)> {
    Ok((descriptor.digest().to_string().parse()?, descriptor.size()))
}

impl Layout {
    /// Finds the members of an archive.
    fn archive(path: &Path) -> Result<Self> {
        let at = || path.display().to_string();
        let mut tar = tar::Archive::new(File::open(path).with_context(at)?);
        let mut members = HashMap::new();
        for entry in tar.entries_with_seek().with_context(at)? {
            let entry = entry.with_context(at)?;
            if entry.header().entry_type().is_file() {
                let name = entry.path().with_context(at)?.display().to_string();
                let name = name.trim_start_matches("./").to_string();
                members.insert(name, (entry.raw_file_position(), entry.size()));
            }
        }
        Ok(Self::Archive { path: path.to_owned(), members })
    }

    fn index(&self) -> Result<Value> {
        match self {
            Self::Dir(dir) => {
                ensure!(dir.join(INDEX).exists(), "{}: not an OCI image layout", dir.display());
                read_index(dir)
            }
            Self::Archive { path, members } => {
                let (start, len) = members.get(INDEX).context("not an archive of an OCI image layout")?;
                ensure!(*len <= layout::MAX_DOCUMENT, "{INDEX}: longer than {} bytes", layout::MAX_DOCUMENT);
                let mut bytes = vec![0; *len as usize];
                source::File::part(File::open(path)?, *start, *len).read_at(0, &mut bytes)?;
                Ok(serde_json::from_slice(&bytes).context(INDEX)?)
            }
        }
    }

    /// The images in it, with their tags.
    fn images(&self) -> Result<Vec<(String, Descriptor)>> {
        let index = self.index()?;
        let images = index["manifests"].as_array().context("index.json: no manifests")?.iter();
        let images = images.map(|image| {
            let tag = image["annotations"][oci_spec::image::ANNOTATION_REF_NAME].as_str().unwrap_or_default();
            let descriptor = serde_json::from_value(image.clone()).context("index.json")?;
            Ok((tag.to_owned(), descriptor))
        });
        images.collect()
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest> {
        let (digest, size) = blob_of(descriptor)?;
        let most = layout::MAX_DOCUMENT;
        ensure!(size <= most, "manifest {}: longer than {most} bytes", digest.oci());
        let name = blob_path(digest);
        let bytes = match self {
            Self::Dir(dir) => read_limited(&dir.join(&name), most).with_context(|| name)?,
            Self::Archive { path, members } => {
                let (start, len) = *members.get(&name).with_context(|| format!("{name} is missing"))?;
                let mut bytes = vec![0; len.min(most) as usize];
                source::File::part(File::open(path)?, start, len).read_at(0, &mut bytes)?;
                bytes
            }
        };
        store::check(&format!("manifest {}", digest.oci()), &*bytes, &Blob { sha256: digest, size })?;
        Ok(manifest(bytes))
    }

    fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        let images = self.images()?;
        let image = images.iter().find(|(t, _)| t == tag);
        image.map(|(_, image)| self.manifest(image)).transpose()
    }

    /// The image with `tag`, or the only one there is; signatures do not count.
    fn image(&self, tag: Option<&str>) -> Result<Manifest> {
        let mut images = self.images()?;
        images.retain(|(t, _)| tag.is_none_or(|tag| tag == t) && (tag.is_some() || !t.ends_with(".sig")));
        match &images[..] {
            [(_, image)] => self.manifest(image),
            [] => bail!("no image{}", tag.map(|tag| format!(" tagged {tag}")).unwrap_or_default()),
            _ => {
                let tags = images.iter().map(|(tag, _)| tag.as_str());
                bail!("several images, name one: {}", Vec::from_iter(tags).join(", "))
            }
        }
    }
}

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    layer: Digest,
    layer_size: u64,
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
        let what = || format!("layer {}: {ANNOTATION_FILES}", digest.oci());
        ensure!(*layer.media_type() == MediaType::ImageLayer, "{}: on a {}", what(), layer.media_type());
        for file in files.split(',').filter(|file| !file.is_empty()) {
            let place = || {
                let (path, range) = file.rsplit_once('@')?;
                let (offset, len) = range.split_once('+')?;
                let (offset, len) = (offset.parse::<u64>().ok()?, len.parse::<u64>().ok()?);
                let inside = offset.checked_add(len).is_some_and(|end| end <= size);
                let place = Place { layer: digest, layer_size: size, offset, size: len };
                inside.then(|| (path.to_owned(), place))
            };
            let (path, place) = place().with_context(|| format!("{}: {file:?}", what()))?;
            places.insert(path, place);
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
            let (layer, size) = (place.layer, place.layer_size);
            if size > MAX_METADATA {
                let what = format!("layer {}: {size} bytes of metadata", layer.oci());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            let whole = Place { offset: 0, size, ..*place };
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
        let part = self.image.part(place.layer, place.layer_size, place.offset, place.size)?;
        let mut part = Tee { inner: part, copy: Hasher::new(io::sink()), told: |_| {} };
        let file: Arc<dyn Source> = if place.size <= SMALL {
            let mut bytes = vec![0; place.size as usize];
            part.read_exact(&mut bytes)?;
            Arc::new(bytes)
        } else {
            let dir = std::env::temp_dir();
            let told =
                |e: io::Error| io::Error::new(e.kind(), format!("temporary file in {}: {e}", dir.display()));
            let mut file = scratch_file(&dir).map_err(told)?;
            let copied = io::copy(&mut part, &mut file)?;
            if copied != place.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Arc::new(source::File::new(file)?)
        };
        let (found, _) = part.copy.finish();
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let what = format!("sha256 mismatch: expected {expected}, got {found}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(file)
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
        assert_eq!(parse("docker://h/x:1").unwrap(), Origin::Registry("h/x:1".parse().unwrap()));
        assert_eq!(parse("oci:a/b").unwrap(), Origin::Layout("a/b".into(), None));
        assert_eq!(parse("oci:a:h:80/x:t").unwrap(), Origin::Layout("a".into(), Some("h:80/x:t".into())));
        assert_eq!(parse("oci-archive:a:t").unwrap(), Origin::Archive("a".into(), Some("t".into())));
        assert_eq!(parse("dir:a:b").unwrap(), Origin::Dir("a:b".into()));
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
