//! Writes a layer of the image: a tar file in which nothing depends on the machine that made it.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use anyhow::{Result, ensure};

use crate::digest::Hasher;
use crate::recipe::Blob;

/// A layer that is being written.
pub(super) struct TarLayer<W: Write> {
    tar: tar::Builder<Counter<W>>,
    time: u64,
    dirs: BTreeSet<String>,
}

impl<W: Write> TarLayer<W> {
    /// Writes to `out`. Everything in the layer will have been changed at `time`, in seconds of the epoch.
    pub(super) fn new(out: W, time: u64) -> Self {
        Self { tar: tar::Builder::new(Counter { inner: out, count: 0 }), time, dirs: BTreeSet::new() }
    }

    /// Adds a file, and the directories above it, at `path`, an absolute one. Returns what `content` was found to be,
    /// and the offset in the layer where it begins. It must be of `size` bytes: one of another size is an error, and
    /// the layer is of no use then.
    pub(super) fn file(
        &mut self,
        path: &str,
        mode: u32,
        size: u64,
        content: impl Read,
    ) -> Result<(Blob, u64)> {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            let dir = &path[..end];
            if !self.dirs.contains(dir) {
                let mut header = tar_header(tar::EntryType::Directory, 0o755, 0, self.time);
                self.tar.append_data(&mut header, format!("{dir}/"), io::empty())?;
                self.dirs.insert(dir.to_string());
            }
        }
        let mut content = Tee { inner: content.take(size.saturating_add(1)), copy: Hasher::new(io::sink()) };
        let mut header = tar_header(tar::EntryType::Regular, mode, size, self.time);
        self.tar.append_data(&mut header, path, &mut content)?;
        let (sha256, found) = content.copy.finish();
        ensure!(
            found == size,
            "expected {size} bytes, found {}",
            if found > size { "more" } else { "fewer" }
        );
        Ok((Blob { sha256, size }, self.tar.get_ref().count - size.next_multiple_of(512)))
    }

    /// Ends the layer, and gives back what it was written to.
    pub(super) fn finish(self) -> Result<W> {
        Ok(self.tar.into_inner()?.inner)
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

/// A writer that counts what passes through it.
struct Counter<W> {
    inner: W,
    count: u64,
}

impl<W: Write> Write for Counter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A reader that writes what passes through it to `copy`.
struct Tee<R, W> {
    inner: R,
    copy: W,
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.copy.write_all(&buf[..n])?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn offsets_and_digests() {
        let mut layer = TarLayer::new(Vec::new(), 7);
        let long = format!("/a/b/{}", "x".repeat(200));
        let files: Vec<(&str, &[u8])> = vec![("/a/one", b"1"), ("/a/b/none", b""), (&long, &[5; 513])];
        let found: Vec<_> = files
            .iter()
            .map(|(path, content)| layer.file(path, 0o644, content.len() as u64, *content).unwrap())
            .collect();
        let bytes = layer.finish().unwrap();
        for ((blob, offset), (path, content)) in found.into_iter().zip(files) {
            assert_eq!(blob.sha256, Digest::of(content), "{path}");
            assert_eq!(&bytes[offset as usize..][..blob.size as usize], content, "{path}");
        }
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn another_size() {
        for content in [&b"12"[..], b"1234", &[0; 5000]] {
            let mut layer = TarLayer::new(Vec::new(), 0);
            let e = layer.file("/a", 0o644, 3, content).unwrap_err().to_string();
            let expected = if content.len() < 3 { "fewer" } else { "more" };
            assert_eq!(e, format!("expected 3 bytes, found {expected}"));
        }
    }
}
