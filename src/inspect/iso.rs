//! ISO 9660: volume, boot images, and the files a live system boots from. Sources: ECMA-119, *El Torito 1.0*, and
//! IEEE P1282 (Rock Ridge) for the names.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::read::{array, invalid, padded, text};
use super::{BootEntry, Iso, Member, Report, disk};
use crate::bytes::{le16, le32};
use crate::source::Source;

/// Everything is addressed in blocks of this many bytes.
const BLOCK: u64 = 2048;
/// The first volume descriptor, in blocks.
const DESCRIPTORS: u64 = 16;
/// The most volume descriptors that are read. There are three or four.
const MAX_DESCRIPTORS: u64 = 32;
/// The longest directory that is read, in bytes.
const MAX_DIRECTORY: u32 = 1 << 20;
/// The longest file that is read, in bytes.
const MAX_FILE: u32 = 64 << 10;

/// The directory of the live kernel, initramfs and rootfs.
const PXEBOOT: &str = "images/pxeboot";
/// The default kernel arguments of the live system, written by `coreos-assembler`.
const KARGS: &str = "coreos/kargs.json";

/// A file or directory.
struct Entry {
    name: String,
    /// Where it starts, in blocks.
    block: u32,
    /// Its length in bytes.
    len: u32,
    directory: bool,
}

/// Whether the bytes of an image start an ISO 9660 volume; `start` has at least the first 33 KiB.
pub(super) fn is_iso(start: &[u8]) -> bool {
    start[(DESCRIPTORS * BLOCK) as usize..].starts_with(b"\x01CD001")
}

/// Looks at an ISO image.
pub(super) fn look(image: &Arc<dyn Source>, partial: bool, report: &mut Report) -> Result<()> {
    let iso = &**image;
    let mut found = Iso::default();
    let volume: [u8; BLOCK as usize] = array(iso, DESCRIPTORS * BLOCK)?;
    found.volume_id = text(&volume[40..72]).unwrap_or_default();
    report.virtual_size = Some(u64::from(le32(&volume, 80)) * BLOCK);

    let mbr: [u8; 520] = array(iso, 0)?;
    // A boot sector alone does not make a hybrid; a partition does.
    found.hybrid_mbr = mbr[510..512] == [0x55, 0xaa] && mbr[446..510].iter().any(|&b| b != 0);
    found.hybrid_gpt = &mbr[512..] == b"EFI PART";
    if found.hybrid_gpt {
        // Its partitions lie over the boot images and the volume itself.
        disk::look(image, partial, report);
    }

    for at in DESCRIPTORS + 1..DESCRIPTORS + MAX_DESCRIPTORS {
        let descriptor: [u8; 128] = array(iso, at * BLOCK)?;
        match descriptor[0] {
            255 => break,
            0 if descriptor[7..].starts_with(b"EL TORITO SPECIFICATION") => {
                let catalog = array(iso, u64::from(le32(&descriptor, 71)) * BLOCK).context("boot catalog")?;
                found.boot = boot_catalog(&catalog);
            }
            _ => {}
        }
    }

    let root =
        Entry { name: String::new(), block: le32(&volume, 158), len: le32(&volume, 166), directory: true };
    if let Some(directory) = find(iso, &root, PXEBOOT).context(PXEBOOT)? {
        for entry in list(iso, &directory).context(PXEBOOT)?.into_iter().filter(|e| !e.directory) {
            let member = Member { name: format!("{PXEBOOT}/{}", entry.name), size: entry.len.into() };
            found.pxeboot.push(member);
        }
    }
    report.iso = Some(found);
    if let Some(file) = find(iso, &root, KARGS).context(KARGS)? {
        let bytes = padded(iso, u64::from(file.block) * BLOCK, file.len.min(MAX_FILE) as usize)?;
        let kargs: serde_json::Value = serde_json::from_slice(&bytes).context(KARGS)?;
        report.platform_id = kargs["default"].as_str().and_then(disk::argument_platform_id);
    }
    Ok(())
}

/// The boot images of an El Torito catalog.
fn boot_catalog(catalog: &[u8; BLOCK as usize]) -> Vec<BootEntry> {
    let mut entries = Vec::new();
    let mut platform = catalog[1];
    for (i, entry) in catalog.chunks_exact(32).enumerate().skip(1) {
        match entry[0] {
            // Section headers, the last one of them 0x91: the platform of the entries that follow.
            0x90 | 0x91 => platform = entry[1],
            indicator @ (0x88 | 0x00) if i == 1 || indicator == 0x88 => entries.push(BootEntry {
                platform: match platform {
                    0 => "BIOS".to_string(),
                    1 => "PowerPC".to_string(),
                    2 => "Mac".to_string(),
                    0xef => "UEFI".to_string(),
                    other => format!("{other:#x}"),
                },
                bootable: indicator == 0x88,
                offset: u64::from(le32(entry, 8)) * BLOCK,
                sectors: le16(entry, 6),
            }),
            _ => break,
        }
    }
    entries
}

/// Walks `path` from `root`; `None` when there is no such file or directory.
fn find(iso: &dyn Source, root: &Entry, path: &str) -> io::Result<Option<Entry>> {
    let mut at = Entry { name: String::new(), ..*root };
    for name in path.split('/') {
        if !at.directory {
            return Ok(None);
        }
        match list(iso, &at)?.into_iter().find(|entry| entry.name == name) {
            Some(entry) => at = entry,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

/// The entries of a directory, but for itself and its parent.
fn list(iso: &dyn Source, directory: &Entry) -> io::Result<Vec<Entry>> {
    if directory.len > MAX_DIRECTORY {
        return Err(invalid(format!("directory of {} bytes", directory.len)));
    }
    let mut bytes = vec![0; directory.len as usize];
    iso.read_at(u64::from(directory.block) * BLOCK, &mut bytes)?;
    let mut entries = Vec::new();
    // Records do not cross blocks; a length of 0 ends those of a block.
    for block in bytes.chunks(BLOCK as usize) {
        let mut rest = block;
        while let Some((&len, _)) = rest.split_first().filter(|(len, _)| **len != 0) {
            let (record, next) = rest
                .split_at_checked(len.into())
                .filter(|(record, _)| record.len() >= 34 && record.len() >= 33 + usize::from(record[32]))
                .ok_or_else(|| invalid(format!("directory record of {len} bytes")))?;
            rest = next;
            let plain = &record[33..33 + usize::from(record[32])];
            if plain == [0] || plain == [1] {
                continue;
            }
            // The name is padded to an even length; then come the fields of Rock Ridge.
            let fields = record.get((33 + plain.len()).next_multiple_of(2)..).unwrap_or_default();
            entries.push(Entry {
                name: rock_ridge_name(fields).unwrap_or_else(|| plain_name(plain)),
                block: le32(record, 2),
                len: le32(record, 10),
                directory: record[25] & 2 != 0,
            });
        }
    }
    Ok(entries)
}

/// The name in `NM` fields.
fn rock_ridge_name(mut fields: &[u8]) -> Option<String> {
    let mut name = Vec::new();
    while let [a, b, len, _, ..] = *fields {
        let (field, next) = fields.split_at_checked(len.into()).filter(|(field, _)| field.len() >= 4)?;
        if [a, b] == *b"NM" {
            name.extend_from_slice(field.get(5..)?);
        }
        fields = next;
    }
    (!name.is_empty()).then(|| String::from_utf8_lossy(&name).into_owned())
}

/// A name without Rock Ridge, as Linux shows it: lower case, without the version.
fn plain_name(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name).to_lowercase();
    let name = name.split(';').next().unwrap_or_default();
    name.trim_end_matches('.').to_string()
}
