//! Applies layers to a directory, as the [specification](https://github.com/opencontainers/image-spec/blob/v1.1.0/layer.md)
//! says.
//!
//! ```text
//! blob ─► decompress ─► hash (diff ID) ─► tar members ─► tree
//! ```
//!
//! Each arrow but the last is a queue of a few buffers between two threads, so that a layer is decompressed, hashed and
//! written at the same time, in little memory however long it is.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;
use rustix::fs::FileType;

use super::tree::{Attributes, Finished, Rules, Tree, clean};
use crate::bounded::shown;
use crate::decompress;
use crate::digest::{Digest, Hasher};
use crate::io::SparseWriter;
use crate::untar::{Archive, Input, Kind, Member};

/// The size of the buffers between the threads, in bytes: large enough that handing them over costs nothing.
const BUFFER: usize = 256 << 10;

/// How many buffers wait for each thread.
const QUEUE: usize = 4;

/// What a member counts at least, in bytes: it takes an inode and a name.
const MEMBER: u64 = 4096;

/// What a layer may have in addition, in bytes: the end of its archive.
const END: u64 = 64 << 10;

/// The most members and directories of an image; each is remembered in some 40 bytes. Images of whole systems have a few
/// hundred thousand.
const MAX_MEMBERS: u64 = 4 << 20;

/// What the names of whiteouts begin with.
const WHITEOUT: &[u8] = b".wh.";

/// The whiteout that hides all that the lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What names begin with that aufs keeps for itself.
const AUFS: &[u8] = b".wh..wh.";

/// A directory into which layers are unpacked.
pub struct Unpacker {
    tree: Tree,
    /// How many bytes of files may still come.
    left: u64,
    /// How many bytes of archives may still come, whatever is in them.
    stream: u64,
    /// How many members there have been.
    members: u64,
    max: u64,
}

/// The image takes more than it may.
#[derive(Debug, thiserror::Error)]
#[error("the image is larger than {max} bytes; --max-size allows more")]
pub struct TooLarge {
    /// What it may take, in bytes.
    pub max: u64,
}

impl Unpacker {
    /// Unpacks into `root`, an empty directory, at most `max` bytes of files. A name takes some, too.
    pub fn new(root: OwnedFd, rules: Rules, max: u64) -> Result<Self> {
        Ok(Self { tree: Tree::new(root, rules)?, left: max, stream: max, members: 0, max })
    }

    /// Applies a layer, compressed or not, over those before. What it is when decompressed must have the digest
    /// `diff_id`, where that is known.
    pub fn layer(&mut self, layer: impl Read + Send, diff_id: Option<Digest>) -> Result<()> {
        self.tree.next_layer();
        // More will not do in any case, however little of it is files.
        self.stream = self.stream.saturating_add(END);
        let (stream, max) = (self.stream, self.max);
        let (to_hash, hashing) = sync_channel(QUEUE);
        let (to_tar, unpacking) = sync_channel(QUEUE);
        let (free, freed) = channel();
        std::thread::scope(|scope| {
            let decompress = scope.spawn(move || decompress(layer, stream, max, &to_hash, &freed));
            let hash = scope.spawn(move || hash(&hashing, &to_tar));
            let mut archive = Archive::new(Buffers { queue: unpacking, free, current: Cursor::default() });
            let applied = self.apply(&mut archive);
            let mut rest = archive.into_inner();
            // What follows the end of the archive belongs to its digest.
            let drained = applied.is_ok().then(|| io::copy(&mut rest, &mut io::sink()));
            drop(rest);
            // An error while decompressing is why the archive ended.
            match decompress.join() {
                Ok(decompressed) => self.stream -= decompressed?,
                Err(_) => bail!("the thread that decompresses ended"),
            }
            let Ok(found) = hash.join() else { bail!("the thread that hashes ended") };
            applied?;
            drained.transpose()?;
            if let Some(diff_id) = diff_id {
                ensure!(
                    found == diff_id,
                    "diff ID mismatch: expected {}, got {}",
                    diff_id.oci(),
                    found.oci()
                );
            }
            Ok(())
        })
    }

    /// Completes the directory, whose place is `closed` where nobody but its owner can reach it.
    pub fn finish(self, closed: bool) -> Result<Finished> {
        self.tree.finish(closed)
    }

    /// Counts what takes `bytes`.
    fn charge(&mut self, bytes: u64) -> Result<(), TooLarge> {
        self.left = self.left.checked_sub(bytes).ok_or(TooLarge { max: self.max })?;
        Ok(())
    }

    fn apply<R: Input>(&mut self, archive: &mut Archive<R>) -> Result<()> {
        while let Some(member) = archive.next_member()? {
            let implied = self.tree.implied;
            self.member(&member, archive).with_context(|| format!("member {:?}", shown(&member.path)))?;
            let implied = self.tree.implied - implied;
            self.charge(implied.saturating_mul(MEMBER))?;
            self.members += 1 + implied;
            ensure!(self.members <= MAX_MEMBERS, "the image has more than {MAX_MEMBERS} members");
        }
        Ok(())
    }

    fn member<R: Input>(&mut self, member: &Member, content: &mut Archive<R>) -> Result<()> {
        let attributes = member.xattrs.iter().map(|(name, value)| (name.len() + value.len()) as u64);
        self.charge(attributes.fold(MEMBER.saturating_add(member.size), u64::saturating_add))?;
        let path = clean(&member.path)?;
        let attributes = Attributes {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime: member.mtime,
            xattrs: &member.xattrs,
        };
        let slash = path.iter().rposition(|&b| b == b'/');
        let (dir, name) = slash.map_or((&[][..], &path[..]), |slash| (&path[..slash], &path[slash + 1..]));
        if name == OPAQUE {
            return self.tree.opaque(dir);
        }
        if path.split(|&b| b == b'/').any(|part| part.starts_with(AUFS)) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            ensure!(!matches!(hidden, b"" | b"." | b".."), "a whiteout of nothing, or of what is not in it");
            let path = [dir, if dir.is_empty() { b"" } else { b"/" }, hidden].concat();
            return match self.tree.existing(&path)? {
                Some(place) => self.tree.whiteout(&place),
                None => Ok(()),
            };
        }
        let Some(place) = self.tree.place(&path)? else {
            ensure!(member.kind == Kind::Directory, "the root is not a directory");
            return self.tree.dir(None, &attributes);
        };
        match member.kind {
            Kind::Directory => self.tree.dir(Some(&place), &attributes),
            Kind::File => {
                let file = File::from(self.tree.file(&place)?);
                let file = OwnedFd::from(write(member, content, file)?);
                self.tree.finish_file(&place, &file, &attributes)
            }
            Kind::Symlink => self.tree.symlink(&place, &member.link, &attributes),
            Kind::HardLink => {
                let target = clean(&member.link).context("hard link")?;
                let missing = || format!("hard link to {:?}, which is not there", shown(&target));
                ensure!(!target.is_empty(), missing());
                let target = self.tree.existing(&target)?.with_context(missing)?;
                self.tree.hard_link(&place, &target)
            }
            Kind::CharDevice => self.tree.node(&place, FileType::CharacterDevice, member.device, &attributes),
            Kind::BlockDevice => self.tree.node(&place, FileType::BlockDevice, member.device, &attributes),
            Kind::Fifo => self.tree.node(&place, FileType::Fifo, (0, 0), &attributes),
        }
    }
}

/// Writes the content of a file, and leaves holes where the archive has them.
fn write<R: Input>(member: &Member, content: &mut Archive<R>, mut file: File) -> io::Result<File> {
    let Some(pieces) = &member.pieces else {
        content.copy(member.size, &mut file)?;
        return Ok(file);
    };
    let mut sparse = SparseWriter::new(file);
    let mut pos = 0;
    for &(offset, len) in pieces {
        sparse.skip(offset - pos);
        content.copy(len, &mut sparse)?;
        pos = offset + len;
    }
    sparse.skip(member.size - pos);
    sparse.finish()
}

/// Decompresses `layer`, whatever it is compressed with: what its media type says is not always true. Ends early, and
/// well, when nobody wants more. Gives how long it is; no longer than `limit`.
fn decompress(
    layer: impl Read,
    limit: u64,
    max: u64,
    out: &SyncSender<Vec<u8>>,
    freed: &Receiver<Vec<u8>>,
) -> Result<u64> {
    let mut plain = plain(layer)?.take(limit.saturating_add(1));
    let mut total = 0;
    loop {
        let mut buffer = freed.try_recv().unwrap_or_else(|_| vec![0; BUFFER]);
        buffer.resize(BUFFER, 0);
        let mut have = 0;
        while have < BUFFER {
            match plain.read(&mut buffer[have..]) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("decompressing"),
            }
        }
        buffer.truncate(have);
        total += have as u64;
        ensure!(total <= limit, TooLarge { max });
        if have == 0 || out.send(buffer).is_err() {
            return Ok(total);
        }
    }
}

/// What is in `layer`: gzip, zstd, xz and plain tar are told apart by how they begin.
fn plain<'a>(layer: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut layer = BufReader::with_capacity(BUFFER, layer);
    let mut head = [0; 6];
    let mut have = 0;
    // A pipe may give less than is asked for.
    while have < head.len() {
        match layer.read(&mut head[have..])? {
            0 => break,
            n => have += n,
        }
    }
    let head = head[..have].to_vec();
    let (gzip, xz) = (head.starts_with(&[0x1F, 0x8B]), head.starts_with(b"\xFD7zXZ\0"));
    let zstd = head.starts_with(&[0x28, 0xB5, 0x2F, 0xFD])
        // A skippable frame, as tools put them before.
        || (head.len() >= 4 && head[0] & 0xF0 == 0x50 && head[1..4] == [0x2A, 0x4D, 0x18]);
    let all: Box<dyn BufRead + 'a> = Box::new(Cursor::new(head).chain(layer));
    Ok(match (gzip, zstd, xz) {
        // Several members, as eStargz and pigz make them.
        (true, ..) => Box::new(MultiGzDecoder::new(all)),
        // All frames, skipping what zstd:chunked adds.
        (_, true, _) => Box::new(decompress::zstd(all)?),
        (.., true) => Box::new(decompress::xz(all)?),
        _ => all,
    })
}

/// The digest of all that passes.
fn hash(buffers: &Receiver<Vec<u8>>, out: &SyncSender<Vec<u8>>) -> Digest {
    let mut hasher = Hasher::new(io::sink());
    for buffer in buffers {
        // Into a sink; nothing can fail.
        let _ = hasher.write_all(&buffer);
        if out.send(buffer).is_err() {
            break;
        }
    }
    hasher.finish().0
}

/// Reads what comes through a queue, and gives the buffers back.
struct Buffers {
    queue: Receiver<Vec<u8>>,
    free: Sender<Vec<u8>>,
    current: Cursor<Vec<u8>>,
}

impl Input for Buffers {}

impl BufRead for Buffers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.fill_buf()?.is_empty() {
            let Ok(next) = self.queue.recv() else { break };
            let used = std::mem::replace(&mut self.current, Cursor::new(next)).into_inner();
            if used.capacity() >= BUFFER {
                // Nobody may be there any more who could use it.
                let _ = self.free.send(used);
            }
        }
        self.current.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.current.consume(n);
    }
}

impl Read for Buffers {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let n = bytes.len().min(buf.len());
        buf[..n].copy_from_slice(&bytes[..n]);
        self.consume(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tree::Owners;
    use super::*;

    #[test]
    fn members_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let rules = Rules { owners: Owners::Dropped, setuid: true, devices: true };
        let root = OwnedFd::from(File::open(dir.path()).unwrap());
        let mut unpacker = Unpacker::new(root, rules, u64::MAX).unwrap();
        unpacker.members = MAX_MEMBERS - 2;
        let mut layer = tar::Builder::new(Vec::new());
        for name in ["a", "new/b"] {
            layer.append_data(&mut tar::Header::new_gnu(), name, io::empty()).unwrap();
        }
        let e = unpacker.layer(&layer.into_inner().unwrap()[..], None).unwrap_err();
        assert_eq!(e.to_string(), "the image has more than 4194304 members");
        assert!(fs::exists(dir.path().join("new/b")).unwrap());
    }
}
