//! Files that lie in a directory, or in one tar archive, which may be compressed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::bounded::shown;
use crate::decompress;
use crate::io::scratch_file;
use crate::untar::{Archive, Kind};

/// The most files that an archive may hold; an image has a hundred.
const MAX_FILES: usize = 1 << 16;

/// The most bytes of the names of these files together, all of which are in memory.
const MAX_NAMES: usize = 8 << 20;

/// What a compressed archive of an image may have beside the image, in bytes: headers, documents, padding.
const REST: u64 = 16 << 20;

/// Files by name.
pub(super) enum Files {
    Dir(PathBuf),
    Archive { file: Arc<File>, members: HashMap<Vec<u8>, Member> },
}

/// A file in an archive.
pub(super) enum Member {
    Content {
        start: u64,
        len: u64,
    },
    /// Another name, from the top.
    Link(Vec<u8>),
}

/// A part of a file, read from its start to its end.
pub(super) struct Part {
    file: Arc<File>,
    pos: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.end - self.pos).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..len], self.pos)?;
        self.pos += n as u64;
        Ok(n)
    }
}

impl Files {
    /// The files in a tar archive. One that is compressed is decompressed to where temporary files are, of which it takes
    /// `max` bytes at most.
    pub(super) fn archive(path: &Path, max: u64) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut head = [0; 6];
        let n = file.read_at(&mut head, 0)?;
        let gzip = head[..n].starts_with(&[0x1F, 0x8B]);
        let xz = head[..n].starts_with(b"\xFD7zXZ\0");
        if gzip || xz || head[..n].starts_with(&[0x28, 0xB5, 0x2F, 0xFD]) {
            let mut plain = scratch_file(&std::env::temp_dir())?;
            let packed = BufReader::new(file);
            let content: Box<dyn Read> = match (gzip, xz) {
                (true, _) => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
                (_, true) => Box::new(decompress::xz(packed)?),
                _ => Box::new(decompress::zstd(packed)?),
            };
            let limit = max.saturating_add(REST);
            let found = io::copy(&mut content.take(limit.saturating_add(1)), &mut plain);
            ensure!(
                found.context("decompressing")? <= limit,
                "the archive takes more than {max} bytes when decompressed; one that is not compressed takes none"
            );
            file = plain;
        }
        file.seek(SeekFrom::Start(0))?;
        let (mut members, mut names) = (HashMap::new(), 0);
        let mut archive = Archive::new(BufReader::new(file.try_clone()?));
        while let Some(member) = archive.next_member()? {
            let name = clean(&member.path);
            let found = match member.kind {
                Kind::File => {
                    ensure!(
                        member.pieces.is_none(),
                        "member {:?}: sparse, which images never are in an archive",
                        shown(&name)
                    );
                    Member::Content { start: archive.position(), len: member.size }
                }
                Kind::HardLink => Member::Link(clean(&member.link)),
                // Docker does this with layers that several images share.
                Kind::Symlink => {
                    let dir = name.iter().rposition(|&b| b == b'/').map_or(&[][..], |slash| &name[..slash]);
                    Member::Link(clean(&[dir, b"/", &member.link].concat()))
                }
                _ => continue,
            };
            names += member.path.len() + member.link.len();
            ensure!(names <= MAX_NAMES, "names of more than {MAX_NAMES} bytes");
            members.insert(name, found);
            ensure!(members.len() <= MAX_FILES, "more than {MAX_FILES} files");
        }
        Ok(Self::Archive { file: Arc::new(file), members })
    }

    /// The file `name`, from `offset` on.
    pub(super) fn open(&self, name: &str, offset: u64) -> Result<Part> {
        let (file, start, len) = match self {
            Self::Dir(dir) => {
                let path = dir.join(name);
                let found = path.metadata().with_context(|| name.to_string())?;
                // Not one that never ends, nor one that nobody writes to.
                ensure!(found.is_file(), "{name}: not a file");
                let file = File::open(path).with_context(|| name.to_string())?;
                let len = found.len();
                (Arc::new(file), 0, len)
            }
            Self::Archive { file, members } => {
                let mut found = members.get(&clean(name.as_bytes()));
                if let Some(Member::Link(target)) = found {
                    found = members.get(target);
                }
                let Some(Member::Content { start, len }) = found else { anyhow::bail!("{name}: not there") };
                (Arc::clone(file), *start, *len)
            }
        };
        ensure!(offset <= len, "{name}: {len} bytes, not more than {offset}");
        Ok(Part { file, pos: start + offset, end: start + len })
    }

    /// Where in the archive a file is; the same for all of its names.
    pub(super) fn place(&self, name: &str) -> Result<(u64, u64)> {
        let part = self.open(name, 0)?;
        Ok((part.pos, part.end))
    }

    /// Whether there is a file `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Archive { members, .. } => members.contains_key(&clean(name.as_bytes())),
        }
    }

    /// All of the file `name`, of at most `limit` bytes.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(name, 0)?.take(limit + 1).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 <= limit, "{name}: more than {limit} bytes");
        Ok(bytes)
    }
}

/// A name without `.` and `..`. It is only looked up, never opened.
fn clean(name: &[u8]) -> Vec<u8> {
    let mut parts = Vec::new();
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}
