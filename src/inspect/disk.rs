//! What is on a disk: GPT partitions, their file systems, and the platform id in the boot partition.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use ext4_view::{Ext4, Ext4Error};

use super::read::{Reader, array, padded, part, text, uuid};
use super::{Filesystem, Partition, Report};
use crate::bytes::{le16, le32};
use crate::source::Source;

/// How many bytes the crate that walks a partition table or a file system may read, before it is taken to be in a
/// loop. The boot partition of a release takes less than 1 MiB.
const READ_LIMIT: u64 = 32 << 20;

/// The most partitions a table may have. `sgdisk` and `sfdisk` make room for 128.
const MAX_PARTITIONS: u32 = 1024;

/// The most block groups of an ext4 whose files are looked at: 8 TiB with blocks of 4 KiB.
const MAX_GROUPS: u64 = 1 << 16;

/// The longest loader entry that is read, in bytes.
const MAX_ENTRY: u64 = 64 << 10;

/// The most files that are listed of one file system.
const MAX_FILES: usize = 256;

/// How deep directories of an EFI system partition are walked: `EFI/VENDOR/FILE` and some.
const MAX_DEPTH: usize = 5;

/// Types of partitions that the release tools make, and what people call them.
const TYPES: [(&str, &str); 8] = [
    ("21686148-6449-6E6F-744E-656564454649", "BIOS boot"),
    ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "EFI system"),
    ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", "Linux filesystem"),
    ("9E1A2D38-C612-4316-AA26-8B49521E5A8B", "PowerPC PReP boot"),
    ("4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", "Linux root (x86-64)"),
    ("B921B045-1DF0-41C3-AF44-4C6F280D3FAE", "Linux root (ARM64)"),
    ("8DA63339-0007-60C0-C436-083AC8230908", "Linux reserved"),
    ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "Microsoft basic data"),
];

/// The key of the kernel argument.
const PLATFORM_KEY: &str = "ignition.platform.id=";

/// Looks at `disk` and adds what is found to `report`. With `partial`, `disk` is only the beginning of the disk.
pub(super) fn look(disk: &Arc<dyn Source>, partial: bool, report: &mut Report) {
    let Some(sector) = sector_size(&**disk) else {
        report.filesystem = filesystem(disk, partial, &mut report.platform_id);
        return;
    };
    match partitions(disk, sector) {
        Ok(partitions) => {
            report.sector_size = Some(sector.as_u64() as u32);
            report.partitions = partitions;
        }
        Err(e) => report.unreadable.push(format!("partition table: {e:#}")),
    }
    for partition in &mut report.partitions {
        if let Ok((bytes, whole)) = part(disk, partition.start, partition.size) {
            if !whole && !partial {
                report.unreadable.push(format!("partition {}: reaches past the end", partition.number));
            }
            partition.filesystem = filesystem(&bytes, !whole, &mut report.platform_id);
        }
    }
}

/// The sector size with which there is a GPT, in the second sector or, when that is damaged, the last.
fn sector_size(disk: &dyn Source) -> Option<gpt::disk::LogicalBlockSize> {
    use gpt::disk::LogicalBlockSize::{Lb512, Lb4096};
    let there = |at| array::<8>(disk, at).is_ok_and(|bytes| &bytes == b"EFI PART");
    let first = [Lb512, Lb4096].into_iter().find(|size| there(size.as_u64()));
    first.or_else(|| [Lb512, Lb4096].into_iter().find(|size| there(disk.len().saturating_sub(size.as_u64()))))
}

/// The partitions in the table.
fn partitions(disk: &Arc<dyn Source>, sector: gpt::disk::LogicalBlockSize) -> Result<Vec<Partition>> {
    // The crate asserts the length of an entry, and allocates as much as the number of entries asks for.
    for at in [sector.as_u64(), disk.len().saturating_sub(sector.as_u64())] {
        if let Ok(header) = array::<92>(&**disk, at)
            && header.starts_with(b"EFI PART")
        {
            let (entries, len) = (le32(&header, 80), le32(&header, 84));
            ensure!(
                entries <= MAX_PARTITIONS && len == 128,
                "expected at most {MAX_PARTITIONS} entries of 128 bytes, found {entries} of {len}"
            );
        }
    }
    let reader = Reader::new(disk.clone(), READ_LIMIT);
    let table = guarded(|| Ok(gpt::GptConfig::new().logical_block_size(sector).open_from_device(reader)?))?;
    let mut partitions = Vec::new();
    for (&number, entry) in table.partitions() {
        if !entry.is_used() {
            continue;
        }
        let type_id = entry.part_type_guid.guid.to_string().to_uppercase();
        partitions.push(Partition {
            number,
            name: entry.name.clone(),
            type_name: TYPES.iter().find(|(id, _)| *id == type_id).map(|(_, name)| name.to_string()),
            type_id,
            uuid: entry.part_guid.to_string(),
            start: entry.bytes_start(sector)?,
            size: entry.bytes_len(sector)?,
            filesystem: None,
        });
    }
    Ok(partitions)
}

/// Runs a crate over bytes that may be hostile: a panic in it is an error like any other.
fn guarded<T>(crate_call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(crate_call))
        .unwrap_or_else(|_| Err(anyhow!("damaged in a way that nothing expects")))
}

/// Finds out which file system this is; with `partial`, only the beginning of it is there and no files are listed.
/// The first platform id that is found goes into `platform_id`.
pub(super) fn filesystem(
    bytes: &Arc<dyn Source>,
    partial: bool,
    platform_id: &mut Option<String>,
) -> Option<Filesystem> {
    let start = padded(&**bytes, 0, SUPERBLOCKS).ok()?;
    let mut filesystem = probe(&start)?;
    if partial {
        return Some(filesystem);
    }
    let listed = match filesystem.kind.as_str() {
        "vfat" => guarded(|| fat(bytes, &mut filesystem)),
        "ext2" | "ext3" | "ext4" => guarded(|| ext4(bytes, &start, &mut filesystem)).map(|id| {
            if platform_id.is_none() {
                *platform_id = id;
            }
        }),
        _ => Ok(()),
    };
    filesystem.unreadable = listed.err().map(|e| format!("{e:#}"));
    Some(filesystem)
}

/// File systems, and what else takes up a partition, that are only named: offset of the magic number, the magic number, the
/// name that blkid has. Label and UUID are not read.
const BY_MAGIC: [(usize, &[u8], &str); 10] = [
    (3, b"-FVE-FS-", "BitLocker"),
    // BitLocker To Go, which looks like FAT32 otherwise: the GUID of its metadata.
    (424, b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01", "BitLocker"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (0, b"LUKS\xba\xbe", "crypto_LUKS"),
    (0, b"verity\0\0", "DM_verity_hash"),
    (512 + 24, b"LVM2 001", "LVM2_member"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (4096 - 10, b"SWAPSPACE2", "swap"),
    ((64 << 10) + 64, b"_BHRfS_M", "btrfs"),
];

/// The superblocks of all that [`probe`] knows lie in so many bytes.
const SUPERBLOCKS: usize = 68 << 10;

/// The incompatible feature of ext2 that makes it the journal of another file system.
const JOURNAL_DEVICE: u32 = 8;

/// Which file system starts with these bytes, by its superblock.
fn probe(start: &[u8]) -> Option<Filesystem> {
    let found = |kind: &str, label: Option<String>, id: Option<[u8; 16]>| {
        Some(Filesystem {
            kind: kind.to_string(),
            label,
            uuid: id.filter(|id| *id != [0; 16]).map(uuid),
            files: Vec::new(),
            unreadable: None,
        })
    };
    let id = |at: usize| start[at..at + 16].try_into().ok();
    if let Some((.., kind)) = BY_MAGIC.iter().find(|(at, magic, _)| start[*at..].starts_with(magic)) {
        return found(kind, None, None);
    }
    if start.starts_with(b"XFSB") {
        return found("xfs", text(&start[108..120]), id(32));
    }
    // Big-endian images ended with version 3.
    let squashfs = match &start[..4] {
        b"hsqs" => Some(le16(start, 28)),
        b"sqsh" => Some(le16(start, 28).swap_bytes()),
        _ => None,
    };
    if let Some(major) = squashfs {
        return found(if major < 4 { "squashfs3" } else { "squashfs" }, None, None);
    }
    if le32(start, 1024) == 0xe0f5_e1e2 {
        return found("erofs", text(&start[1024 + 64..1024 + 80]), id(1024 + 48));
    }
    if le16(start, 1024 + 56) == 0xef53 {
        // What ext3 does not know of makes it ext4.
        let (compat, incompat, ro_compat) =
            (le32(start, 1024 + 92), le32(start, 1024 + 96), le32(start, 1024 + 100));
        if incompat & JOURNAL_DEVICE != 0 {
            return found("jbd", text(&start[1024 + 120..1024 + 136]), id(1024 + 104));
        }
        let kind = match (incompat & !0x16 != 0 || ro_compat & !0x7 != 0, compat & 4 != 0) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        };
        return found(kind, text(&start[1024 + 120..1024 + 136]), id(1024 + 104));
    }
    if start[510..512] == [0x55, 0xaa] && (start[54..57] == *b"FAT" || start[82..87] == *b"FAT32") {
        // FAT32 has longer fields before these.
        let at = if start[82..87] == *b"FAT32" { 67 } else { 39 };
        let mut fat = found("vfat", text(&start[at + 4..at + 15]).filter(|l| l != "NO NAME"), None)?;
        let id = le32(start, at);
        fat.uuid = Some(format!("{:04X}-{:04X}", id >> 16, id & 0xffff));
        return Some(fat);
    }
    None
}

/// Reads label and files of an EFI system partition.
fn fat(bytes: &Arc<dyn Source>, filesystem: &mut Filesystem) -> Result<()> {
    let fs = fatfs::FileSystem::new(Reader::new(bytes.clone(), READ_LIMIT), fatfs::FsOptions::new())?;
    if let Some(label) = fs.read_volume_label_from_root_dir()? {
        filesystem.label = Some(label);
    }
    // Breadth first; each with its depth.
    let mut todo = std::collections::VecDeque::from([(fs.root_dir(), String::new(), 0)]);
    while let Some((dir, prefix, depth)) = todo.pop_front() {
        for entry in dir.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == "." || name == ".." {
                continue;
            }
            let path = format!("{prefix}{name}");
            if entry.is_dir() && depth < MAX_DEPTH && todo.len() < MAX_FILES {
                todo.push_back((entry.to_dir(), format!("{path}/"), depth + 1));
            } else if entry.is_file() {
                filesystem.files.push(path);
            }
            if filesystem.files.len() == MAX_FILES {
                return Ok(());
            }
        }
    }
    filesystem.files.sort();
    Ok(())
}

/// Lists the loader entries of a boot partition, and finds the platform id in them.
fn ext4(bytes: &Arc<dyn Source>, start: &[u8], filesystem: &mut Filesystem) -> Result<Option<String>> {
    // The crate makes room for all block groups before it reads the first.
    let blocks = u64::from(le32(start, 1024 + 4)) | u64::from(le32(start, 1024 + 336)) << 32;
    let groups = blocks / u64::from(le32(start, 1024 + 32).max(1));
    ensure!(groups <= MAX_GROUPS, "{groups} block groups: expected at most {MAX_GROUPS}");
    let fs = Ext4::load(Box::new(Reader::new(bytes.clone(), READ_LIMIT)))?;
    let entries = match fs.read_dir("/loader/entries") {
        Ok(entries) => entries,
        Err(Ext4Error::NotFound) => return Ok(None),
        Err(e) => return Err(e).context("loader/entries"),
    };
    let mut platform_id = None;
    for entry in entries.take(MAX_FILES) {
        let path = entry?.path();
        let name = path.display().to_string();
        if !name.ends_with(".conf") {
            continue;
        }
        let len = fs.metadata(&path).with_context(|| name.clone())?.len();
        ensure!(len <= MAX_ENTRY, "{name}: expected at most {MAX_ENTRY} bytes, found {len}");
        let text = fs.read(&path).with_context(|| name.clone())?;
        if platform_id.is_none() {
            platform_id = entry_platform_id(&String::from_utf8_lossy(&text));
        }
        filesystem.files.push(name.trim_start_matches('/').to_string());
    }
    filesystem.files.sort();
    Ok(platform_id)
}

/// The platform id in the `options` of a boot loader entry.
fn entry_platform_id(entry: &str) -> Option<String> {
    entry.lines().filter_map(|line| line.trim_start().strip_prefix("options")).find_map(argument_platform_id)
}

/// The platform id in kernel arguments.
pub(super) fn argument_platform_id(arguments: &str) -> Option<String> {
    let found = arguments.split_whitespace().find_map(|word| word.strip_prefix(PLATFORM_KEY))?;
    Some(found.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platform_id_is_a_whole_word_of_the_options() {
        let entry = "title x\noptions root=UUID=1 ignition.platform.id=qemu $ignition_firstboot\n";
        assert_eq!(entry_platform_id(entry).as_deref(), Some("qemu"));
        assert_eq!(
            entry_platform_id("title ignition.platform.id=aws\noptions xignition.platform.id=a\n"),
            None
        );
    }
}
