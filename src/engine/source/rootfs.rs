//! The live rootfs of a release: finds the file system image in it and opens that.
//!
//! `*-live-rootfs.*.img` is an uncompressed newc cpio archive whose first file is `root.erofs` or `root.squashfs`; other
//! members (osmet files, a stamp) and further archives follow.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::cluster::ClusterMap;
use super::decode::damaged;
use super::files::bytes;
use super::{Slice, Source, erofs, squashfs};

/// The length of a newc header.
const HEADER: u64 = 110;
/// The longest member name we read; ours have a few dozen bytes.
const MAX_NAME: u64 = 4096;
/// How many members are looked at: directories may precede the image, nothing else does.
const MAX_MEMBERS: usize = 64;

/// The file system of a live rootfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// EROFS: Fedora 42 and later.
    Erofs,
    /// Squashfs 4.0: everything older, and RHEL.
    Squashfs,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Erofs => "erofs",
            Kind::Squashfs => "squashfs",
        })
    }
}

/// Describes the files of `live_rootfs`, in the order that [`files`](super::files) fixes, and gives the file system
/// image that they are in.
pub fn open(live_rootfs: Arc<dyn Source>) -> io::Result<(Arc<dyn Source>, ClusterMap)> {
    let (kind, image) = find(live_rootfs)?;
    let map = match kind {
        Kind::Erofs => erofs::open(image.clone()),
        Kind::Squashfs => squashfs::open(image.clone()),
    };
    Ok((image, map.map_err(|e| io::Error::new(e.kind(), format!("live rootfs: {kind}: {e}")))?))
}

/// Finds the file system image in `live_rootfs`.
fn find(live_rootfs: Arc<dyn Source>) -> io::Result<(Kind, Arc<dyn Source>)> {
    let mut at = 0;
    for _ in 0..MAX_MEMBERS {
        let header = bytes(&*live_rootfs, at, HEADER)
            .map_err(|e| io::Error::new(e.kind(), format!("live rootfs: read a cpio header at {at}: {e}")))?;
        let member = Member::parse(&header)
            .ok_or_else(|| damaged(format!("live rootfs: expected a newc cpio header at {at}")))?;
        let name = bytes(&*live_rootfs, at + HEADER, member.name_len)?;
        // The name ends in a zero byte.
        let name = name.strip_suffix(&[0]).unwrap_or(&name);
        let data = (at + HEADER + member.name_len).next_multiple_of(4);
        let kind = match name.rsplit(|&b| b == b'/').next() {
            Some(b"root.erofs") => Kind::Erofs,
            Some(b"root.squashfs") => Kind::Squashfs,
            _ if name == b"TRAILER!!!" => break,
            _ => {
                at = (data + member.len).next_multiple_of(4);
                continue;
            }
        };
        return Ok((kind, Arc::new(Slice::new(live_rootfs, data, member.len)?)));
    }
    Err(damaged(format!(
        "live rootfs: neither root.erofs nor root.squashfs among the first {MAX_MEMBERS} members of the archive"
    )))
}

struct Member {
    len: u64,
    name_len: u64,
}

impl Member {
    /// Parses a newc header: a magic number, then numbers of 8 hex digits each.
    fn parse(header: &[u8]) -> Option<Self> {
        let number = |i: usize| {
            let digits = header.get(6 + 8 * i..14 + 8 * i).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
            u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        // 070702 is the same with checksums.
        let magic = header.starts_with(b"070701") || header.starts_with(b"070702");
        let name_len = number(11).filter(|&n| n <= MAX_NAME)?;
        magic.then_some(Self { len: number(6)?, name_len })
    }
}
