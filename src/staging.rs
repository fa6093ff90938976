//! Files and directories that appear under their names whole or not at all.
//!
//! ```text
//! create: made out of sight, locked ─► written ─► publish: synced, renamed, directory synced
//! killed before that: the lock is gone with the process ─► the next create in that directory removes what is left
//! ```
//!
//! A new file has no name until it is published, where the file system and the system allow that. Everything else has a
//! temporary name, [`PREFIX`] and random letters, in the directory of its final name. Its maker holds an exclusive `flock` on it, from
//! before the name can be seen by a sweep that would remove it. A sweep removes only what it can lock itself: that is what a
//! dead process left. On a file system without locks nothing is removed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{AtFlags, CWD, OFlags};
use tempfile::TempPath;

/// What temporary names begin with.
pub const PREFIX: &str = ".rehydrator-";

/// Random letters of a temporary name: no two of them are ever the same by accident.
const LETTERS: usize = 12;

/// Attempts to make something that no sweep locks before its maker does. A second one is rare.
const ATTEMPTS: usize = 16;

/// The mode of what [`write_file`] writes, less the umask.
const MODE: u32 = 0o666;

/// A file that has its final name only once it is whole and on disk.
pub struct NewFile {
    file: File,
    path: PathBuf,
    /// The temporary name, if the file has one.
    temporary: Option<TempPath>,
}

impl NewFile {
    /// Begins the file `path` in a directory that exists. `mode` is its mode, less the umask.
    pub fn create(path: &Path, mode: u32) -> io::Result<Self> {
        let dir = parent(path);
        sweep(dir);
        let path = path.to_owned();
        if let Some(file) = unnamed(dir, mode) {
            return Ok(Self { file, path, temporary: None });
        }
        let open = |at: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(at);
        let (file, temporary) = locked(dir, open)?;
        Ok(Self { file, path, temporary: Some(temporary) })
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file and gives it its name, in place of a file that has the name.
    pub fn publish(self) -> io::Result<()> {
        self.file.sync_all()?;
        let dir = parent(&self.path);
        let temporary = match self.temporary {
            Some(temporary) => temporary,
            None => {
                let fd = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let link = |to: &Path| -> io::Result<()> {
                    Ok(rustix::fs::linkat(CWD, &fd, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
                };
                match link(&self.path) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    linked => return linked.and_then(|()| sync_dir(dir)),
                }
                // A link cannot take the place of a file; a rename can. The lock comes before the name.
                let _ = self.file.try_lock();
                builder().make_in(dir, link)?.into_temp_path()
            }
        };
        temporary.persist(&self.path)?;
        sync_dir(dir)
    }
}

impl Write for NewFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A directory that has its final name only once it is whole. It is removed with all that is in it unless it is published.
pub struct NewDir {
    path: TempPath,
    /// Keeps the lock.
    _lock: File,
}

impl NewDir {
    /// Makes a directory in `dir`, which exists. `mode` is its mode, less the umask.
    pub fn create_in(dir: &Path, mode: u32) -> io::Result<Self> {
        sweep(dir);
        let make = |at: &Path| {
            DirBuilder::new().mode(mode).create(at)?;
            // A sweep may have removed it already. Then the name is as good as taken, and another one is tried.
            File::open(at).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => io::ErrorKind::AlreadyExists.into(),
                _ => e,
            })
        };
        let (lock, path) = locked(dir, make)?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is until it is published.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames it to `path`, where there is nothing or an empty directory. Of what is in it, names and files must be on disk.
    /// Gives the directory back if something has that name.
    pub fn publish(mut self, path: &Path) -> io::Result<Option<Self>> {
        match fs::rename(&self.path, path) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::AlreadyExists
                        | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(Some(self));
            }
            renamed => renamed?,
        }
        // It is no longer where it would be removed from.
        self.path.disable_cleanup(true);
        sync_dir(parent(path))?;
        Ok(None)
    }
}

impl Drop for NewDir {
    fn drop(&mut self) {
        // After `publish` nothing has the temporary name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes from `dir` what runs that were killed left there. What cannot be removed is named in the log.
pub fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && let Ok(kind) = entry.file_type()
            && (kind.is_dir() || kind.is_file())
            && let Ok(file) = open_for_sweep(&path, kind.is_dir())
            && file.try_lock().is_ok()
            && is_at(&file, &path)
        {
            let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            if let Err(e) = removed {
                tracing::warn!("{}: left by an earlier run: remove failed: {e}", path.display());
            }
        }
    }
}

/// Opens what may be locked: a directory, or a file with the right to write that NFS wants for an exclusive lock.
fn open_for_sweep(path: &Path, dir: bool) -> io::Result<File> {
    // Nothing here waits for the other end of a pipe, nor follows a link, whatever has taken the name since it was listed.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | if dir { OFlags::DIRECTORY } else { OFlags::empty() };
    OpenOptions::new().read(true).write(!dir).custom_flags(flags.bits().cast_signed()).open(path)
}

/// Whether `path` still names the open `file`: it may have been renamed or removed before it was locked.
fn is_at(file: &File, path: &Path) -> bool {
    let place = |found: fs::Metadata| (found.dev(), found.ino());
    let (here, there) = (file.metadata().map(place), fs::symlink_metadata(path).map(place));
    here.is_ok() && here.ok() == there.ok()
}

/// A file without a name in `dir`; none where the file system cannot have it, or where nothing could give it a name later.
fn unnamed(dir: &Path, mode: u32) -> Option<File> {
    if !Path::new("/proc/self/fd").is_dir() {
        return None;
    }
    let flags = OFlags::TMPFILE.bits().cast_signed();
    OpenOptions::new().read(true).write(true).mode(mode).custom_flags(flags).open(dir).ok()
}

/// Makes something with a temporary name in `dir` and locks it.
fn locked(dir: &Path, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<(File, TempPath)> {
    for _ in 0..ATTEMPTS {
        let (file, path) = builder().make_in(dir, &make)?.into_parts();
        // A sweep that comes between making and locking has the lock, or has removed the name. A file system without locks
        // gives another error: there, no sweep removes anything.
        let is_swept = matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock));
        if !is_swept && is_at(&file, &path) {
            return Ok((file, path));
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "temporary names are removed as fast as they are made"))
}

fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).rand_bytes(LETTERS);
    builder
}

/// Writes a file that has its earlier content or all of `bytes`, at any moment.
pub fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || {
        let mut file = NewFile::create(path, MODE)?;
        file.write_all(bytes)?;
        file.publish()
    };
    write().with_context(|| format!("{}: write failed", path.display()))
}

/// The directory that holds `path`.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes new names in `dir` last.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_whole_or_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for content in ["one", "two"] {
            let mut new = NewFile::create(&path, 0o644).unwrap();
            new.write_all(content.as_bytes()).unwrap();
            assert_ne!(fs::read_to_string(&path).unwrap_or_default(), content);
            new.publish().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(names(dir.path()), ["file"]);
        }
        drop(NewFile::create(&path, 0o644).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert!(NewFile::create(&dir.path().join("none/file"), 0o644).is_err());
    }

    /// As on a file system that has no files without names.
    fn named(path: &Path) -> NewFile {
        let open = |at: &Path| File::options().write(true).create_new(true).open(at);
        let (file, temporary) = locked(parent(path), open).unwrap();
        NewFile { file, path: path.into(), temporary: Some(temporary) }
    }

    #[test]
    fn a_sweep_takes_what_the_dead_left_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let living =
            [NewDir::create_in(dir.path(), 0o700).unwrap(), NewDir::create_in(dir.path(), 0o777).unwrap()];
        let mut file = named(&at("file"));
        file.write_all(b"x").unwrap();
        fs::create_dir_all(at(".rehydrator-dead/sub")).unwrap();
        fs::write(at(".rehydrator-dead/sub/file"), "x").unwrap();
        fs::write(at(".rehydrator-file"), "x").unwrap();
        // What has only a part of the name, or is neither file nor directory.
        fs::create_dir(at(".rehydrator")).unwrap();
        fs::create_dir(at("kept")).unwrap();
        std::os::unix::fs::symlink("kept", at(".rehydrator-link")).unwrap();
        assert_eq!(names(dir.path()).len(), 8);
        sweep(dir.path());
        let living_names = living.each_ref().map(|dir| dir.path().to_owned());
        assert!(living_names.iter().all(|path| path.is_dir()));
        assert_eq!(names(dir.path()).len(), 6);

        file.publish().unwrap();
        let [first, second] = living;
        fs::write(first.path().join("x"), "x").unwrap();
        assert!(first.publish(&at("made")).unwrap().is_none());
        let again = second.publish(&at("made")).unwrap().expect("the name is taken");
        drop(again);
        sweep(dir.path());
        assert_eq!(names(dir.path()), [".rehydrator", ".rehydrator-link", "file", "kept", "made"]);
        assert_eq!(names(&at("made")), ["x"]);
    }

    #[test]
    fn makers_and_sweeps_at_the_same_time() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let dir = dir.path();
                scope.spawn(move || {
                    for n in 0..100 {
                        let mut file = named(&dir.join(format!("file-{thread}")));
                        write!(file, "{n}").unwrap();
                        let made = NewDir::create_in(dir, 0o700).unwrap();
                        fs::write(made.path().join("x"), "x").unwrap();
                        sweep(dir);
                        file.publish().unwrap();
                        assert!(made.publish(&dir.join(format!("dir-{thread}-{n}"))).unwrap().is_none());
                    }
                });
            }
        });
        assert_eq!(names(dir.path()).len(), 4 + 400);
        for thread in 0..4 {
            assert_eq!(fs::read_to_string(dir.path().join(format!("file-{thread}"))).unwrap(), "99");
        }
    }
}
