//! Containers of files: tar (OVA, OCI archives), cpio (initramfs, live rootfs) and zip. Each is listed, and one thing in
//! it is worth looking into: the largest file, which is the disk, the layer or the root file system.

use std::io::BufReader;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::packed::Packing;
use super::read::{Reader, array, padded, part};
use super::{Format, Member};
use crate::fold::zip;
use crate::source::{Concat, Source, Zeros};
use crate::untar;

/// The most members that are listed; an OCI archive has a dozen, a live rootfs three.
const MAX_MEMBERS: usize = 1000;

/// How many bytes of headers are read. Ten thousand data regions of a sparse disk take 250 KB.
const READ_LIMIT: u64 = 32 << 20;

/// The longest name in a cpio archive, in bytes: Linux's `PATH_MAX`.
const MAX_NAME: u64 = 4096;

/// The most zero bytes between two cpio archives, or one and what follows.
const MAX_PADDING: u64 = 64 << 10;

/// A container.
#[derive(Default)]
pub(super) struct Archive {
    /// What is in it.
    pub(super) members: Vec<Member>,
    /// What to look into.
    pub(super) inner: Option<Inner>,
}

/// Something in a container.
pub(super) struct Inner {
    /// Its name; `None` for what follows the archive.
    pub(super) name: Option<String>,
    /// Its bytes, or the beginning of them.
    pub(super) bytes: Arc<dyn Source>,
    /// How many bytes there are in all, when that is known.
    pub(super) size: Option<u64>,
    /// How it is compressed by the container itself.
    pub(super) packing: Option<Packing>,
}

/// Which kind of tar it is, by its members.
pub(super) fn tar_format(members: &[Member]) -> Format {
    let named =
        |wanted: &dyn Fn(&str) -> bool| members.iter().any(|m| wanted(m.name.trim_start_matches("./")));
    if named(&|name| name == "oci-layout") {
        Format::Ociarchive
    } else if named(&|name| name.ends_with(".ovf")) {
        Format::Ova
    } else {
        Format::Tar
    }
}

/// Lists a tar archive; with `partial`, the beginning of one.
pub(super) fn tar(source: &Arc<dyn Source>, partial: bool) -> Result<Archive> {
    let mut found = Archive::default();
    let mut largest: Option<(untar::Member, u64)> = None;
    let mut archive = untar::Archive::new(BufReader::new(Reader::new(source.clone(), READ_LIMIT)));
    while found.members.len() < MAX_MEMBERS {
        let member = match archive.next_member() {
            Ok(Some(member)) => member,
            Ok(None) => break,
            Err(_) if partial => break,
            Err(e) => return Err(e.context(format!("tar: after {} members", found.members.len()))),
        };
        if member.kind != untar::Kind::File {
            continue;
        }
        found.members.push(Member { name: name(&member), size: member.size });
        if largest.as_ref().is_none_or(|(most, _)| member.size > most.size) {
            largest = Some((member, archive.position()));
        }
    }
    if let Some((member, at)) = largest {
        let bytes = match &member.pieces {
            Some(pieces) => sparse(source, pieces, member.size, at)?,
            None => part(source, at, member.size)?.0,
        };
        found.inner =
            Some(Inner { name: Some(name(&member)), bytes, size: Some(member.size), packing: None });
    }
    Ok(found)
}

fn name(member: &untar::Member) -> String {
    String::from_utf8_lossy(&member.path).into_owned()
}

/// The bytes of a sparse file of `size` bytes, whose `pieces` follow each other in `source` from `at` on: holes and data in
/// turn. Ends early where the archive does.
fn sparse(
    source: &Arc<dyn Source>,
    pieces: &[(u64, u64)],
    size: u64,
    mut at: u64,
) -> Result<Arc<dyn Source>> {
    let mut parts: Vec<Arc<dyn Source>> = Vec::new();
    let mut pos = 0;
    // The reader of the archive has checked that pieces are in order and inside of the file.
    for &(offset, len) in pieces {
        parts.push(Arc::new(Zeros(offset - pos)));
        let (data, whole) = part(source, at, len)?;
        parts.push(data);
        if !whole {
            return Ok(Arc::new(Concat::new(parts)?));
        }
        (pos, at) = (offset + len, at + len);
    }
    parts.push(Arc::new(Zeros(size - pos)));
    Ok(Arc::new(Concat::new(parts)?))
}

/// Lists cpio archives in the newc format, one after the other, with `partial` the beginning of them; what follows them
/// is looked into where there is something, such as the compressed part of an initramfs behind its microcode.
pub(super) fn cpio(source: &Arc<dyn Source>, partial: bool) -> Result<Archive> {
    let mut found = Archive::default();
    let mut largest = 0;
    let mut at = 0;
    while found.members.len() < MAX_MEMBERS {
        let Ok(header) = array::<110>(&**source, at) else {
            ensure!(partial, "cpio: ends after {} members, without a trailer", found.members.len());
            break;
        };
        let number = |i: usize| -> Result<u64> {
            let digits = std::str::from_utf8(&header[6 + 8 * i..14 + 8 * i])?;
            u64::from_str_radix(digits, 16).with_context(|| format!("cpio: not a number: {digits:?}"))
        };
        let (mode, size, name_len) = (number(1)?, number(6)?, number(11)?);
        ensure!(is_cpio(&header), "cpio: no header at {at}");
        ensure!((1..=MAX_NAME).contains(&name_len), "cpio: a name of {name_len} bytes at {at}");
        let name = super::read::text(&padded(&**source, at + 110, name_len as usize)?).unwrap_or_default();
        // Header with name, and data, are each padded to 4 bytes.
        let data = (at + 110 + name_len).next_multiple_of(4);
        at = data + size.next_multiple_of(4);
        if name != "TRAILER!!!" {
            if mode & 0o170000 == 0o100000 {
                if size > largest {
                    largest = size;
                    let (bytes, _) = part(source, data, size)?;
                    found.inner =
                        Some(Inner { name: Some(name.clone()), bytes, size: Some(size), packing: None });
                }
                found.members.push(Member { name, size });
            }
            continue;
        }
        // Zeros up to the next archive, to something else, or to the end.
        let after = padded(&**source, at, MAX_PADDING as usize)?;
        let Some(zeros) = after.iter().position(|&b| b != 0) else { break };
        at += zeros as u64;
        if !is_cpio(&after[zeros..]) {
            let len = source.len() - at;
            let (bytes, _) = part(source, at, len)?;
            let size = (!partial).then_some(len);
            found.inner = Some(Inner { name: None, bytes, size, packing: None });
            break;
        }
    }
    Ok(found)
}

/// Whether these bytes start a cpio archive in the newc format, with or without checksums.
pub(super) fn is_cpio(start: &[u8]) -> bool {
    start.starts_with(b"070701") || start.starts_with(b"070702")
}

/// Lists a zip archive.
pub(super) fn zip(source: &Arc<dyn Source>) -> Result<Archive> {
    let directory = zip::Directory::find(&**source)?;
    let members = directory.read(&**source, MAX_MEMBERS)?;
    let name = |member: &zip::Member| String::from_utf8_lossy(&member.name).into_owned();
    let mut found = Archive {
        members: members.iter().map(|m| Member { name: name(m), size: m.len }).collect(),
        inner: None,
    };
    // The first of the largest.
    let Some(largest) = members.iter().rev().max_by_key(|m| m.len) else { return Ok(found) };
    ensure!(!largest.encrypted, "zip: {}: the member is encrypted", name(largest));
    let packing = match largest.method {
        zip::STORED => None,
        zip::DEFLATE => Some(Packing::Deflate),
        other => bail!("zip: {}: compression method {other}: expected 0 or 8", name(largest)),
    };
    let data = largest.data(&**source)?;
    let (bytes, _) = part(source, data.start, data.end - data.start)?;
    found.inner = Some(Inner { name: Some(name(largest)), bytes, size: Some(largest.len), packing });
    Ok(found)
}
