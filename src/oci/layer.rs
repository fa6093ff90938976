//! A layer of the image: a tar file in which nothing depends on the machine that made it.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Write};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::digest::{Digest, Hasher};
use crate::source::{Concat, Reader, Source};

/// The most that is read at once, in bytes.
const BUFFER: u64 = 256 << 10;

/// A layer that is being put together. Nothing is copied: it is of headers, and of contents where they lie.
pub(super) struct TarLayer {
    /// Headers go through its buffer.
    headers: tar::Builder<Vec<u8>>,
    parts: Vec<Part>,
    /// Bytes so far.
    len: u64,
    time: u64,
    dirs: BTreeSet<String>,
}

/// A part of a layer.
struct Part {
    source: Arc<dyn Source>,
    /// The digest that it must have, if it is a blob.
    blob: Option<Digest>,
}

impl TarLayer {
    /// Everything in the layer will have been changed at `time`, in seconds of the epoch.
    pub(super) fn new(time: u64) -> Self {
        let headers = tar::Builder::new(Vec::new());
        Self { headers, parts: Vec::new(), len: 0, time, dirs: BTreeSet::new() }
    }

    /// Adds a file, and the directories above it, at `path`, an absolute one. Returns the offset in the layer where its
    /// content begins. That it is `blob`, where it is one, is found out when the layer is written.
    pub(super) fn file(
        &mut self,
        path: &str,
        mode: u32,
        content: Arc<dyn Source>,
        blob: Option<Digest>,
    ) -> io::Result<u64> {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            let dir = &path[..end];
            if !self.dirs.contains(dir) {
                let mut header = tar_header(tar::EntryType::Directory, 0o755, 0, self.time);
                self.headers.append_data(&mut header, format!("{dir}/"), io::empty())?;
                self.dirs.insert(dir.to_string());
            }
        }
        let size = content.len();
        let mut header = tar_header(tar::EntryType::Regular, mode, size, self.time);
        self.headers.append_data(&mut header, path, io::empty())?;
        let header = std::mem::take(self.headers.get_mut());
        self.push(Arc::new(header), None);
        let offset = self.len;
        self.push(content, blob);
        let padding = size.next_multiple_of(512) - size;
        self.push(Arc::new(vec![0; padding as usize]), None);
        Ok(offset)
    }

    fn push(&mut self, source: Arc<dyn Source>, blob: Option<Digest>) {
        self.len += source.len();
        self.parts.push(Part { source, blob });
    }

    /// Ends the layer.
    pub(super) fn finish(mut self) -> io::Result<Tar> {
        let end = self.headers.into_inner()?;
        self.parts.push(Part { source: Arc::new(end), blob: None });
        Ok(Tar(self.parts))
    }
}

/// A layer that is complete.
pub(super) struct Tar(Vec<Part>);

impl Tar {
    /// Its length, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|part| part.source.len()).sum()
    }

    /// Writes it. An error where a blob is not what its digest says; what was written is of no use then.
    pub(super) fn write(&self, mut out: impl Write) -> Result<()> {
        for Part { source, blob } in &self.0 {
            let buffer = source.len().min(BUFFER) as usize;
            let mut content = BufReader::with_capacity(buffer, Reader::new(&**source));
            let Some(expected) = *blob else {
                io::copy(&mut content, &mut out)?;
                continue;
            };
            let mut hasher = Hasher::new(&mut out);
            let at = || format!("blob {expected}");
            io::copy(&mut content, &mut hasher).with_context(at)?;
            hasher.finish().0.must_be(expected).with_context(at)?;
        }
        Ok(())
    }

    /// All of it.
    pub(super) fn into_source(self) -> io::Result<Concat> {
        Concat::new(self.0.into_iter().map(|part| part.source).collect())
    }
}

/// A header with nothing in it that depends on the machine: owned by 0:0, changed at `time`, in seconds of the epoch.
pub(super) fn tar_header(kind: tar::EntryType, mode: u32, size: u64, time: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(time);
    header.set_uid(0);
    header.set_gid(0);
    header
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn offsets_and_digests() {
        let mut layer = TarLayer::new(7);
        let long = format!("/a/b/{}", "x".repeat(200));
        let files: Vec<(&str, &[u8])> = vec![("/a/one", b"1"), ("/a/b/none", b""), (&long, &[5; 513])];
        let mut add = |(path, content): &(&str, &[u8])| {
            layer.file(path, 0o644, Arc::new(content.to_vec()), Some(Digest::of(content))).unwrap()
        };
        let offsets: Vec<_> = files.iter().map(&mut add).collect();
        let (tar, mut bytes, mut all) = (layer.finish().unwrap(), Vec::new(), Vec::new());
        tar.write(&mut bytes).unwrap();
        Reader::new(&tar.into_source().unwrap()).read_to_end(&mut all).unwrap();
        assert!(bytes == all);
        for (offset, (path, content)) in offsets.into_iter().zip(&files) {
            assert_eq!(&bytes[offset as usize..][..content.len()], *content, "{path}");
        }
        let mut archive = tar::Archive::new(&bytes[..]);
        let entries = archive.entries().unwrap().map(|entry| entry.unwrap());
        let names: Vec<_> = entries.map(|entry| format!("/{}", entry.path().unwrap().display())).collect();
        assert_eq!(names, ["/a/", "/a/one", "/a/b/", "/a/b/none", &long]);
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn content_that_is_not_what_it_should_be() {
        let mut layer = TarLayer::new(0);
        layer.file("/a", 0o644, Arc::new(vec![1]), Some(Digest::of(&[2]))).unwrap();
        let e = format!("{:#}", layer.finish().unwrap().write(io::sink()).unwrap_err());
        assert!(e.starts_with(&format!("blob {0}: sha256 mismatch: expected {0}", Digest::of(&[2]))), "{e}");
    }
}
