//! Containers of files: tar (OVA, OCI archives), cpio (initramfs, live rootfs) and zip. Each is listed, and one thing in
//! it is worth looking into: the largest file, which is the disk, the layer or the root file system.

use std::io::BufReader;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::packed::Packing;
use super::read::{Reader, array, padded, part};
use super::{Format, Member};
use crate::bytes::{le16, le32, le64};
use crate::source::{Concat, Source, Zeros};

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
    let mut largest: Option<(u64, tar::Header, u64)> = None;
    let mut archive = tar::Archive::new(Reader::new(source.clone(), READ_LIMIT));
    for entry in archive.entries_with_seek()?.take(MAX_MEMBERS) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(_) if partial => break,
            Err(e) => return Err(e).context(format!("tar: after {} members", found.members.len())),
        };
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind.is_gnu_sparse()) {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let size = entry.size();
        if largest.as_ref().is_none_or(|(most, ..)| size > *most) {
            largest = Some((size, entry.header().clone(), entry.raw_file_position()));
            found.inner = Some(Inner {
                name: Some(name.clone()),
                bytes: source.clone(),
                size: Some(size),
                packing: None,
            });
        }
        found.members.push(Member { name, size });
    }
    if let (Some((size, header, at)), Some(inner)) = (largest, &mut found.inner) {
        inner.bytes = match header.entry_type().is_gnu_sparse() {
            true => sparse(source, &header, size, at)?,
            false => part(source, at, size)?.0,
        };
    }
    Ok(found)
}

/// The bytes of a sparse member in GNU's old format, whose data, or the rest of its map, starts at `at`: holes and data
/// in turn. Ends early where the archive does.
fn sparse(source: &Arc<dyn Source>, header: &tar::Header, size: u64, mut at: u64) -> Result<Arc<dyn Source>> {
    let header = header.as_gnu().context("tar: a sparse member without GNU's header")?;
    // That the map is sorted and adds up was checked when the member was listed.
    let mut map: Vec<(u64, u64)> = Vec::new();
    let mut add = |regions: &[tar::GnuSparseHeader]| -> Result<()> {
        for region in regions.iter().filter(|region| !region.is_empty()) {
            map.push((region.offset()?, region.length()?));
        }
        Ok(())
    };
    add(&header.sparse)?;
    let mut more = header.is_extended();
    while more {
        let mut extension = tar::GnuExtSparseHeader::new();
        *extension.as_mut_bytes() = array(&**source, at)?;
        add(extension.sparse())?;
        more = extension.is_extended();
        at += 512;
    }
    let mut parts: Vec<Arc<dyn Source>> = Vec::new();
    let (mut pos, mut whole) = (0, true);
    for (offset, len) in map {
        parts.push(Arc::new(Zeros(offset.saturating_sub(pos))));
        let (data, all) = part(source, at, len)?;
        parts.push(data);
        whole = all;
        if !whole {
            break;
        }
        (pos, at) = (offset.saturating_add(len), at.saturating_add(len.next_multiple_of(512)));
    }
    if whole {
        parts.push(Arc::new(Zeros(size.saturating_sub(pos))));
    }
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
    // The end record is 22 bytes long, and a comment of up to 64 KiB may follow it.
    let tail_len = source.len().min(22 + 0xffff);
    let tail = padded(&**source, source.len() - tail_len, tail_len as usize)?;
    let end = tail
        .windows(22)
        .rposition(|bytes| bytes.starts_with(b"PK\x05\x06"))
        .context("zip: no end record in the last 64 KiB")?;
    let directory = u64::from(le32(&tail, end + 16));
    let mut found = Archive::default();
    let mut largest: Option<(u64, String, u64, u16)> = None;
    let mut reader = BufReader::new(Reader::new(part(source, directory, READ_LIMIT)?.0, READ_LIMIT));
    for _ in 0..usize::from(le16(&tail, end + 10)).min(MAX_MEMBERS) {
        use std::io::Read;
        let mut record = [0; 46];
        reader.read_exact(&mut record).context("zip: central directory")?;
        ensure!(record.starts_with(b"PK\x01\x02"), "zip: no record in the central directory");
        let mut name = vec![0; le16(&record, 28).into()];
        reader.read_exact(&mut name)?;
        let mut extra = vec![0; le16(&record, 30).into()];
        reader.read_exact(&mut extra)?;
        reader.read_exact(&mut vec![0; le16(&record, 32).into()])?;
        let name = String::from_utf8_lossy(&name).into_owned();
        let size = match le32(&record, 24) {
            // In the extra field of zip64, the first there.
            u32::MAX if extra.len() >= 12 && le16(&extra, 0) == 1 => le64(&extra, 4),
            size => size.into(),
        };
        if largest.as_ref().is_none_or(|(most, ..)| size > *most) {
            largest = Some((size, name.clone(), u64::from(le32(&record, 42)), le16(&record, 10)));
        }
        found.members.push(Member { name, size });
    }
    let Some((size, name, at, method)) = largest else { return Ok(found) };
    let local: [u8; 30] = array(&**source, at)?;
    ensure!(local.starts_with(b"PK\x03\x04"), "zip: no local header for {name}");
    let data = at + 30 + u64::from(le16(&local, 26)) + u64::from(le16(&local, 28));
    let (packing, len) = match method {
        0 => (None, size),
        8 => (Some(Packing::Deflate), source.len().saturating_sub(data)),
        other => bail!("zip: {name}: compression method {other}: expected 0 or 8"),
    };
    let (bytes, _) = part(source, data, len)?;
    found.inner = Some(Inner { name: Some(name), bytes, size: Some(size), packing });
    Ok(found)
}
