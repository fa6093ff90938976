//! Sinks: where finished bytes go. Standard output, a tar stream, a file in a directory.
//!
//! A file in a directory appears under its name when it is whole and not before: [`staging`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::digest::{Digest, Hasher};
use crate::io::SparseWriter;
use crate::recipe::Blob;
use crate::staging;

/// Takes the bytes of one artifact. Long runs of zeros come as such, so that a file gets a hole and not zeros.
pub trait Output: Write {
    /// Takes `len` zero bytes.
    fn zeros(&mut self, len: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let mut left = len;
        while left > 0 {
            let n = left.min(ZEROS.len() as u64);
            self.write_all(&ZEROS[..n as usize])?;
            left -= n;
        }
        Ok(())
    }
}

impl Output for io::Sink {
    fn zeros(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Output for io::Stdout {}

impl<W: Write> Output for Hasher<W> {}

impl Output for blake3::Hasher {}

/// A GNU tar stream of regular files.
pub struct Tar<W: Write>(W);

impl<W: Write> Tar<W> {
    /// Writes a tar stream to `out`.
    pub fn new(out: W) -> Self {
        Self(out)
    }

    /// Adds a member of `size` bytes, which `write` must give.
    pub fn member(
        &mut self,
        name: &str,
        size: u64,
        write: impl FnOnce(&mut dyn Output) -> Result<()>,
    ) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        if header.set_path(name).is_err() {
            // Too long for the header: GNU tar puts it into a member of its own before.
            let mut long = tar::Header::new_gnu();
            long.set_path("././@LongLink")?;
            long.set_entry_type(tar::EntryType::GNULongName);
            self.begin(&mut long, name.len() as u64 + 1)?;
            self.0.write_all(name.as_bytes())?;
            self.0.write_all(&[0])?;
            self.pad(name.len() as u64 + 1)?;
            header.set_path(&name[..name.floor_char_boundary(100)])?;
        }
        self.begin(&mut header, size)?;
        write(&mut Member(&mut self.0))?;
        Ok(self.pad(size)?)
    }

    fn begin(&mut self, header: &mut tar::Header, size: u64) -> io::Result<()> {
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        self.0.write_all(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        self.0.write_all(&[0; 512][..(size.next_multiple_of(512) - size) as usize])
    }

    /// Ends the stream.
    pub fn finish(mut self) -> io::Result<()> {
        self.0.write_all(&[0; 1024])?;
        self.0.flush()
    }
}

struct Member<'a, W>(&'a mut W);

impl<W: Write> Write for Member<'_, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write> Output for Member<'_, W> {}

/// The mode of a file in a directory, less the umask.
const MODE: u32 = 0o644;

/// A file in a directory, with holes where there are zeros; not there before [`NewFile::commit`].
pub struct NewFile {
    out: SparseWriter,
    path: PathBuf,
    staged: staging::NewFile,
}

impl Write for NewFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.out.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Output for NewFile {
    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.out.skip(len);
        Ok(())
    }
}

impl NewFile {
    /// Begins the file `name` of `dir`.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let create = || -> io::Result<_> {
            let staged = staging::NewFile::create(&path, MODE)?;
            Ok((SparseWriter::new(staged.file().try_clone()?), staged))
        };
        let (out, staged) = create().with_context(|| dir.display().to_string())?;
        Ok(Self { out, path, staged })
    }

    /// Syncs the file and gives it its name, in the place of what has it.
    pub fn commit(self) -> Result<()> {
        let finish = || {
            self.out.finish()?;
            self.staged.publish()
        };
        finish().with_context(|| self.path.display().to_string())
    }
}

/// Whether `dir` holds the file `name` with just these bytes already. Another file of that name is an error, unless
/// `force`d away; so is a link or a directory.
pub fn is_there(dir: &Path, name: &str, expected: &Blob, force: bool) -> Result<bool> {
    let path = dir.join(name);
    let found = match fs::symlink_metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other.with_context(|| path.display().to_string())?,
    };
    if found.is_file() && found.len() == expected.size {
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        if Digest::of_reader(file).with_context(|| path.display().to_string())?.0 == expected.sha256 {
            return Ok(true);
        }
    }
    if !force || found.is_dir() {
        bail!("{}: exists and differs; --force replaces it", path.display());
    }
    Ok(false)
}
