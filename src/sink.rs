//! Sinks: where finished bytes go. Standard output, a tar stream, a file in a directory.
//!
//! A file in a directory appears under its name when it is whole and not before: it is written without a name where
//! the file system can do that (so that nothing is left of a run that was killed), and under a temporary one otherwise.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::digest::{Digest, Hasher};
use crate::io::SparseWriter;
use crate::recipe::Blob;

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

/// A file in a directory, not there before [`NewFile::commit`].
pub struct NewFile {
    out: SparseWriter,
    path: PathBuf,
    /// The temporary name, where the file needs one.
    temporary: Option<tempfile::TempPath>,
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
        let context = || dir.display().to_string();
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let (file, temporary) = match rustix::fs::open(dir, flags, Mode::from_raw_mode(0o644)) {
            Ok(file) => (File::from(file), None),
            Err(_) => {
                let prefix = format!(".{name}.");
                let (file, path) = tempfile::Builder::new()
                    .prefix(&prefix)
                    .tempfile_in(dir)
                    .with_context(context)?
                    .into_parts();
                use std::os::unix::fs::PermissionsExt;
                file.set_permissions(fs::Permissions::from_mode(0o644)).with_context(context)?;
                (file, Some(path))
            }
        };
        Ok(Self { out: SparseWriter::new(file), path: dir.join(name), temporary })
    }

    /// Syncs the file and gives it its name, in the place of what has it.
    pub fn commit(self) -> Result<()> {
        let context = || self.path.display().to_string();
        let file = self.out.finish().with_context(context)?;
        file.sync_all().with_context(context)?;
        let temporary = match self.temporary {
            Some(path) => path,
            None => {
                use std::os::fd::AsRawFd;
                let fd = format!("/proc/self/fd/{}", file.as_raw_fd());
                let link = |to: &Path| {
                    rustix::fs::linkat(rustix::fs::CWD, &fd, rustix::fs::CWD, to, AtFlags::SYMLINK_FOLLOW)
                };
                match link(&self.path) {
                    Ok(()) => return sync_parent(&self.path).with_context(context),
                    Err(rustix::io::Errno::EXIST) => {}
                    Err(e) => return Err(e).with_context(context),
                }
                // A link cannot take the place of a file; a rename can.
                let mut name = std::ffi::OsString::from(".");
                name.push(self.path.file_name().unwrap_or_default());
                name.push(format!(".{}", std::process::id()));
                let path = self.path.with_file_name(name);
                link(&path).with_context(context)?;
                tempfile::TempPath::try_from_path(path).with_context(context)?
            }
        };
        temporary.persist(&self.path).with_context(context)?;
        sync_parent(&self.path).with_context(context)
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
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
