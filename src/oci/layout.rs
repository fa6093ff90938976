//! The place a new image goes to: an OCI image layout, as a directory or as one tar file; or a registry, for which nothing
//! is written.
//!
//! For a layout, everything is written into a staging directory beside the destination, under no name that anyone looks for, and
//! gets its final name when it is complete and on disk. A layout that is there already keeps its other tags.
//! The format is the [image layout](https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md) of the
//! OCI image specification; the names of destinations are those of skopeo and podman.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, MediaType};
use serde::Serialize;
use serde_json::{Value, json};

use super::layer::{Tar, tar_header};
use crate::digest::{Digest, Hasher};
use crate::registry::{Reference, TRANSPORT};
use crate::source::Source;
use crate::staging::{self, NewDir, NewFile, parent, sync_dir};
use crate::transport::{
    BLOBS, DEFAULT_TAG, INDEX, LAYOUT, MAX_DOCUMENT, blob_path, check_version, oci_digest,
};

/// The longest tag, in bytes; a full reference fits in it.
const MAX_TAG: usize = 512;

/// The modes of new files and directories, less the umask, as usual.
const FILE_MODE: u32 = 0o666;
const DIR_MODE: u32 = 0o777;

/// Buffer between a layer and its file, in bytes: large enough that writing costs few system calls.
const BUFFER: usize = 1 << 18;

/// Where an image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The directory or file.
    pub path: PathBuf,
    /// One file instead of a directory.
    pub archive: bool,
    /// The name of the image in the layout.
    pub tag: String,
}

/// Where a new image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Into a layout.
    Layout(Destination),
    /// Into a registry.
    Registry(Reference),
}

impl FromStr for Target {
    type Err = anyhow::Error;

    /// Reads `docker://REF`, or what [`Destination`] reads.
    fn from_str(text: &str) -> Result<Self> {
        match text.strip_prefix(TRANSPORT) {
            Some(name) => Ok(Self::Registry(name.parse()?)),
            None => Ok(Self::Layout(text.parse()?)),
        }
    }
}

impl FromStr for Destination {
    type Err = anyhow::Error;

    /// Reads `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`. As in skopeo, the path ends at the first colon.
    fn from_str(text: &str) -> Result<Self> {
        let (archive, rest) = match text.split_once(':') {
            Some(("oci", rest)) => (false, rest),
            Some(("oci-archive", rest)) => (true, rest),
            _ => {
                bail!(
                    "{text:?}: not a place for an image: expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF"
                )
            }
        };
        let (path, tag) = rest.split_once(':').unwrap_or((rest, DEFAULT_TAG));
        ensure!(!path.is_empty(), "{text:?}: no path");
        // The grammar of org.opencontainers.image.ref.name, but for what may stand beside what.
        let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        ensure!(
            alphanumeric(tag.chars().next())
                && alphanumeric(tag.chars().next_back())
                && tag.chars().all(|c| c.is_ascii_alphanumeric() || "-._:@/+".contains(c))
                && tag.len() <= MAX_TAG,
            "{text:?}: {tag:?} is not a tag"
        );
        Ok(Self { path: path.into(), archive, tag: tag.to_string() })
    }
}

/// An image that is being put together.
pub struct Staging(Place);

enum Place {
    Files(Files),
    /// Nothing is written anywhere: documents and what is compressed are in memory, layers of data where they lie.
    Passing(Mutex<HashMap<Digest, Arc<dyn Source>>>),
}

/// Files on their way into a layout.
struct Files {
    dest: Destination,
    /// The destination is a directory that is there already; new files are staged inside, since it may be a mount.
    in_place: bool,
    dir: NewDir,
}

impl Staging {
    /// Starts an image that will be at `dest`; what is there stays as it is until [`Staging::publish`].
    pub fn new(dest: Destination) -> Result<Self> {
        let at = || format!("image {}", dest.path.display());
        ensure!(dest.path.file_name().is_some(), "{}: not a name of a file or directory", at());
        let in_place = !dest.archive && dest.path.exists();
        if in_place {
            let mut entries = fs::read_dir(&dest.path).with_context(at)?;
            ensure!(
                dest.path.join(LAYOUT).exists() || entries.next().is_none(),
                "{}: neither empty nor an OCI image layout",
                at()
            );
            read_index(&dest.path).with_context(at)?;
        }
        ensure!(!dest.archive || !dest.path.is_dir(), "{}: a directory: expected a file, or oci:DIR", at());
        let beside = if in_place { &dest.path } else { parent(&dest.path) };
        fs::create_dir_all(beside).with_context(at)?;
        // Where a run that found no layout was killed before it had made one.
        staging::sweep(parent(&dest.path));
        let dir = NewDir::create_in(beside, DIR_MODE).with_context(at)?;
        fs::create_dir_all(dir.path().join(BLOBS)).with_context(at)?;
        Ok(Self(Place::Files(Files { dest, in_place, dir })))
    }

    /// Starts an image that will be sent elsewhere.
    pub fn passing() -> Self {
        Self(Place::Passing(Mutex::default()))
    }

    /// The content of a blob that was added, to be sent.
    pub(super) fn content(&self, digest: Digest) -> Result<Arc<dyn Source>> {
        let content = match &self.0 {
            Place::Passing(blobs) => {
                blobs.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned()
            }
            Place::Files(_) => None,
        };
        content.with_context(|| format!("{}: not a part of what is sent", digest.oci()))
    }

    /// Adds the blob that `write` writes, and returns its descriptor along with what `write` returned.
    pub fn blob<T>(
        &self,
        media_type: MediaType,
        write: impl FnOnce(&mut dyn Write) -> Result<T>,
    ) -> Result<(Descriptor, T)> {
        let (digest, size, value) = match &self.0 {
            Place::Files(files) => files.blob(write)?,
            Place::Passing(blobs) => {
                let mut out = Hasher::new(Vec::new());
                let value = write(&mut out)?;
                let (bytes, digest, size) = out.into_parts();
                pass(blobs, digest, Arc::new(bytes));
                (digest, size, value)
            }
        };
        Ok((Descriptor::new(media_type, size, oci_digest(digest)?), value))
    }

    /// Adds a layer as it is, uncompressed, after it has been checked.
    pub(super) fn layer(&self, tar: Tar) -> Result<Descriptor> {
        let (digest, size) = match &self.0 {
            Place::Files(files) => {
                let (digest, size, ()) = files.blob(|out| tar.write(out))?;
                (digest, size)
            }
            Place::Passing(blobs) => {
                let mut out = Hasher::new(io::sink());
                tar.write(&mut out)?;
                let (digest, size) = out.finish();
                pass(blobs, digest, Arc::new(tar.into_source()?));
                (digest, size)
            }
        };
        Ok(Descriptor::new(MediaType::ImageLayer, size, oci_digest(digest)?))
    }

    /// Adds a JSON document. Its digest is that of its content alone: `oci_spec` keeps annotations in hash maps, so
    /// keys are sorted here.
    pub fn document(&self, media_type: MediaType, document: &impl Serialize) -> Result<Descriptor> {
        let bytes = to_json(document)?;
        ensure!(
            bytes.len() as u64 <= MAX_DOCUMENT,
            "{media_type} of {} bytes: registries take at most {MAX_DOCUMENT}",
            bytes.len()
        );
        Ok(self.blob(media_type, |out| Ok(out.write_all(&bytes)?))?.0)
    }

    /// Gives the image that `root` describes its name: a manifest, or an index of several. In a directory, an image
    /// that had the name loses it, and its blobs stay, as with skopeo; a file is replaced. `others` are further
    /// images, with their tags.
    pub fn publish(self, root: Descriptor, others: Vec<(String, Descriptor)>) -> Result<()> {
        match self.0 {
            Place::Files(files) => {
                let at = format!("image {}", files.dest.path.display());
                files.publish(root, others).context(at)
            }
            Place::Passing(_) => Ok(()),
        }
    }
}

/// Keeps a blob for the time that it is sent.
fn pass(blobs: &Mutex<HashMap<Digest, Arc<dyn Source>>>, digest: Digest, content: Arc<dyn Source>) {
    blobs.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, content);
}

impl Files {
    /// Adds the blob that `write` writes: digest and size, and what `write` returned.
    fn blob<T>(&self, write: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<(Digest, u64, T)> {
        // Goes with the staging directory if it gets no name.
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(FILE_MODE))
            .tempfile_in(self.dir.path().join(BLOBS))?;
        let mut out = BufWriter::with_capacity(BUFFER, Hasher::new(file.as_file_mut()));
        let value = write(&mut out)?;
        let (digest, size) = out.into_inner().map_err(io::IntoInnerError::into_error)?.finish();
        file.as_file().sync_all()?;
        file.persist(self.dir.path().join(blob_path(digest)))?;
        Ok((digest, size, value))
    }

    fn publish(self, root: Descriptor, others: Vec<(String, Descriptor)>) -> Result<()> {
        let images: Vec<_> = std::iter::once((self.dest.tag, root)).chain(others).collect();
        let (mut stage, dest) = (self.dir, self.dest.path.as_path());
        if !self.in_place {
            write_layout(stage.path(), &images)?;
            if self.dest.archive {
                let mut file = NewFile::create(dest, FILE_MODE)?;
                archive(stage.path(), BufWriter::with_capacity(BUFFER, &mut file))?;
                return Ok(file.publish()?);
            }
            sync_dir(&stage.path().join(BLOBS))?;
            match stage.publish(dest)? {
                None => return Ok(()),
                // Another run has made the layout meanwhile.
                Some(unpublished) => stage = unpublished,
            }
        }
        let _lock = lock(dest)?;
        fs::create_dir_all(dest.join(BLOBS))?;
        for name in blob_names(stage.path())? {
            fs::rename(stage.path().join(&name), dest.join(&name))?;
        }
        sync_dir(&dest.join(BLOBS))?;
        write_layout(dest, &images)
    }
}

/// Takes the lock of the layout in `dir`, until the file is closed: its index is one file, and each writer changes what the
/// writer before it has left. On a file system that cannot lock a directory, such as NFS, there is no lock.
fn lock(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    while file.lock().is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {}
    Ok(file)
}

/// Writes the documents of the layout in `dir`; its index then has these images, and those it had under other tags.
fn write_layout(dir: &Path, images: &[(String, Descriptor)]) -> Result<()> {
    let mut index = read_index(dir)?;
    for (tag, image) in images {
        index = with_tag(index, tag, image.clone())?;
    }
    replace(dir, LAYOUT, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(replace(dir, INDEX, &to_json(&index)?)?)
}

/// The tar file of a layout, sorted, with nothing in it that depends on time or place.
fn archive(layout: &Path, out: impl Write) -> Result<()> {
    let mut tar = tar::Builder::new(out);
    for dir in ["blobs/", "blobs/sha256/"] {
        let mut header = tar_header(tar::EntryType::Directory, 0o755, 0, 0);
        tar.append_data(&mut header, dir, io::empty())?;
    }
    for name in blob_names(layout)?.into_iter().chain([INDEX.into(), LAYOUT.into()]) {
        let file = File::open(layout.join(&name))?;
        let mut header = tar_header(tar::EntryType::Regular, 0o644, file.metadata()?.len(), 0);
        tar.append_data(&mut header, &name, file)?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

/// Reads the index of the layout in `dir`, an empty one if there is no layout. Refuses a version that is not known.
fn read_index(dir: &Path) -> Result<Value> {
    if !dir.join(LAYOUT).exists() {
        return Ok(json!({ "schemaVersion": 2, "mediaType": MediaType::ImageIndex, "manifests": [] }));
    }
    check_version(&read_json(&dir.join(LAYOUT))?)?;
    read_json(&dir.join(INDEX))
}

/// The index with `tag` naming `root` and nothing else; all that is not about `tag` stays.
fn with_tag(mut index: Value, tag: &str, root: Descriptor) -> Result<Value> {
    let mut root = serde_json::to_value(root)?;
    root["annotations"][ANNOTATION_REF_NAME] = tag.into();
    let manifests = index["manifests"].as_array_mut().context("index.json: no manifests")?;
    manifests.retain(|m| m["annotations"][ANNOTATION_REF_NAME] != tag);
    manifests.push(root);
    Ok(index)
}

pub(super) fn to_json(document: &impl Serialize) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(document)?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

fn read_json(path: &Path) -> Result<Value> {
    let mut bytes = Vec::new();
    let at = || path.display().to_string();
    File::open(path).with_context(at)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).with_context(at)?;
    ensure!(bytes.len() as u64 <= MAX_DOCUMENT, "{}: longer than {MAX_DOCUMENT} bytes", at());
    serde_json::from_slice(&bytes).with_context(at)
}

/// The blobs of the layout in `dir`, sorted, as paths from there.
fn blob_names(dir: &Path) -> io::Result<BTreeSet<PathBuf>> {
    fs::read_dir(dir.join(BLOBS))?.map(|entry| Ok(Path::new(BLOBS).join(entry?.file_name()))).collect()
}

/// Puts a small file in place, whole or not at all.
fn replace(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(&dir.join(name), FILE_MODE)?;
    file.write_all(content)?;
    file.publish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let parse = |text: &str| text.parse::<Destination>();
        let dest =
            |path: &str, archive, tag: &str| Destination { path: path.into(), archive, tag: tag.into() };
        assert_eq!(parse("oci:out").unwrap(), dest("out", false, "latest"));
        assert_eq!(parse("oci:/a/b:v1").unwrap(), dest("/a/b", false, "v1"));
        assert_eq!(parse("oci-archive:a.tar").unwrap(), dest("a.tar", true, "latest"));
        assert_eq!(
            parse("oci-archive:a.tar:example.com:5000/x/y:1+2").unwrap(),
            dest("a.tar", true, "example.com:5000/x/y:1+2")
        );
        for (text, error) in [
            (
                "out",
                "not a place for an image: expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF",
            ),
            (
                "dir:out",
                "not a place for an image: expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF",
            ),
            ("oci:", "no path"),
            ("oci::v1", "no path"),
            ("oci:a:", "\"\" is not a tag"),
            ("oci:a:-x", "\"-x\" is not a tag"),
            ("oci:a:x y", "\"x y\" is not a tag"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), format!("{text:?}: {error}"));
        }
    }

    /// Publishes a document as if it were a manifest.
    fn publish(dest: &str, content: &str) -> Result<Descriptor> {
        let staging = Staging::new(dest.parse()?)?;
        let root = staging.document(MediaType::ImageManifest, &content)?;
        staging.publish(root.clone(), Vec::new())?;
        Ok(root)
    }

    #[test]
    fn tags_of_an_existing_layout_stay() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("new/layout");
        let at = format!("oci:{}", dir.display());
        publish(&at, "first").unwrap();
        // What another tool wrote stays, down to keys that are unknown here.
        let mut index = read_json(&dir.join("index.json")).unwrap();
        index["x-other"] = json!({ "a": 1 });
        fs::write(dir.join("index.json"), index.to_string()).unwrap();
        let second = publish(&format!("{at}:second"), "second").unwrap();
        let third = publish(&at, "third").unwrap();

        let index = read_json(&dir.join("index.json")).unwrap();
        assert_eq!(index["x-other"], json!({ "a": 1 }));
        let tags = index["manifests"].as_array().unwrap().iter();
        let tags: Vec<_> = tags.map(|m| (&m["annotations"][ANNOTATION_REF_NAME], &m["digest"])).collect();
        let digests = [second.digest().to_string().into(), third.digest().to_string().into()];
        assert_eq!(tags, [(&json!("second"), &digests[0]), (&json!("latest"), &digests[1])]);
        assert_eq!(blob_names(&dir).unwrap().len(), 3, "an image that lost its name keeps its blobs");
        let left: Vec<_> = fs::read_dir(dir.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn what_is_not_a_layout_is_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let dest = format!("oci:{}", tmp.path().display());
        fs::write(tmp.path().join("mine"), "mine").unwrap();
        let e = format!("{:#}", publish(&dest, "x").unwrap_err());
        assert!(e.ends_with(": neither empty nor an OCI image layout"), "{e}");
        fs::write(tmp.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
        let e = format!("{:#}", publish(&dest, "x").unwrap_err());
        assert!(e.ends_with(r#": OCI image layout version "2.0.0": expected "1.0.0""#), "{e}");
        assert_eq!(fs::read(tmp.path().join("mine")).unwrap(), b"mine");
    }

    #[test]
    fn a_failed_blob_leaves_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let staging =
            Staging::new(format!("oci:{}", tmp.path().join("image").display()).parse().unwrap()).unwrap();
        let failed = staging.blob(MediaType::ImageLayer, |out| -> Result<()> {
            out.write_all(&[7; 1 << 20])?;
            bail!("broken")
        });
        assert_eq!(failed.unwrap_err().to_string(), "broken");
        let Staging(Place::Files(files)) = &staging else { panic!() };
        assert_eq!(blob_names(files.dir.path()).unwrap().len(), 0);
        drop(staging);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }
}
