//! `inspect` against the tools that make and read disk images: qemu-img, fdisk, blkid, xorriso.
//!
//! A disk laid out as the release tools do it is made once and converted to every format; what is reported is compared
//! with what the tools say, and the guest's view with what `qemu-img convert` writes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

use crate::tools::fixture::fixture;
use rehydrator::inspect::{Format, GuestDisk, Report, inspect};
use rehydrator::source::{self, Source};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Runs a tool in `dir`; fails with its name when it is missing or says no.
fn run(dir: &Path, program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()))
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn sh(dir: &Path, script: &str) -> Vec<u8> {
    run(dir, "bash", &["-euo", "pipefail", "-c", script])
}

fn json(dir: &Path, program: &str, args: &[&str]) -> Value {
    serde_json::from_slice(&run(dir, program, args)).unwrap()
}

fn open(path: &Path) -> Arc<dyn Source> {
    Arc::new(source::File::new(File::open(path).unwrap()).unwrap())
}

fn look(path: &Path) -> Report {
    let report = inspect(open(path)).unwrap();
    // Both forms of the report can always be written.
    assert!(!report.to_string().is_empty());
    serde_json::to_string(&report).unwrap();
    report
}

/// Bytes that do not compress, always the same.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Writes the data of `from` into `to` at `offset`, and leaves its zeros out.
fn place(from: &Path, to: &File, offset: u64) {
    let mut from = File::open(from).unwrap();
    let mut buf = vec![0; MIB as usize];
    let mut pos = 0;
    loop {
        let n = from.read(&mut buf).unwrap();
        if n == 0 {
            return;
        }
        if buf[..n].iter().any(|&b| b != 0) {
            to.write_all_at(&buf[..n], offset + pos).unwrap();
        }
        pos += n as u64;
    }
}

/// A directory with `disk.raw` and `disk4k.raw` in it, and one of every format made of them.
static DISKS: LazyLock<PathBuf> =
    LazyLock::new(|| fixture("inspect", include_str!("inspect.rs"), make_disks));

fn make_disks(dir: &Path) {
    fs::create_dir_all(dir.join("boot/loader.0/entries")).unwrap();
    std::os::unix::fs::symlink("loader.0", dir.join("boot/loader")).unwrap();
    fs::write(
        dir.join("boot/loader.0/entries/ostree-1.conf"),
        "title Fedora CoreOS\nversion 1\noptions rw mitigations=auto,nosmt ignition.platform.id=openstack \
         $ignition_firstboot\nlinux /ostree/vmlinuz\n",
    )
    .unwrap();
    fs::write(dir.join("boot/vmlinuz"), noise(3 << 20)).unwrap();
    fs::write(dir.join("boot/System.map"), "ffffffff81000000 T _text\n".repeat(100_000)).unwrap();
    fs::create_dir_all(dir.join("esp/EFI/BOOT")).unwrap();
    fs::create_dir_all(dir.join("esp/EFI/fedora")).unwrap();
    fs::write(dir.join("esp/EFI/BOOT/BOOTX64.EFI"), noise(100_000)).unwrap();
    fs::write(dir.join("esp/EFI/fedora/a long name.efi"), "shim").unwrap();
    for (name, sector) in [("disk", 512), ("disk4k", 4096)] {
        let raw = format!("{name}.raw");
        let disk = File::create(dir.join(&raw)).unwrap();
        disk.set_len(200 * MIB).unwrap();
        sh(
            dir,
            &format!(
                "rm -f fs.esp fs.boot fs.root
                 truncate -s 48M fs.esp; truncate -s 64M fs.boot; truncate -s 64M fs.root
                 mkfs.vfat -S {sector} -n EFI-SYSTEM fs.esp
                 mcopy -i fs.esp -s esp/EFI ::
                 mke2fs -q -t ext4 -b 4096 -L boot -d boot fs.boot
                 # A root this small is for tests only, and has to be asked for like this.
                 TEST_DIR=1 TEST_DEV=1 QA_CHECK_FS=1 mkfs.xfs -q -s size={sector} -L root fs.root
                 cat >table <<END
label: gpt
1 : start={}, size={}, name=BIOS-BOOT, type=21686148-6449-6E6F-744E-656564454649
2 : start={}, size={}, name=EFI-SYSTEM, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
3 : start={}, size={}, name=boot, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
4 : start={}, size={}, name=root, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
END
                 printf 'I\\ntable\\nw\\n' | fdisk -w always -W always -b {sector} {raw} >/dev/null",
                MIB / sector,
                MIB / sector,
                2 * MIB / sector,
                48 * MIB / sector,
                50 * MIB / sector,
                64 * MIB / sector,
                114 * MIB / sector,
                64 * MIB / sector
            ),
        );
        for (part, start) in [("fs.esp", 2), ("fs.boot", 50), ("fs.root", 114)] {
            place(&dir.join(part), &disk, start * MIB);
        }
    }
}

/// Converts `from` in the shared directory to `name` beside it, and gives its path.
fn convert(from: &str, name: &str, options: &[&str]) -> PathBuf {
    let dir = &*DISKS;
    run(dir, "qemu-img", &[&["convert", "-f", "raw"], options, &[from, name]].concat());
    dir.join(name)
}

/// Every format that a release has, and some near them: file name, its format, options of `qemu-img convert`.
const FORMATS: [(&str, Format, &[&str]); 11] = [
    ("v3.qcow2", Format::Qcow2, &["-O", "qcow2", "-o", "compat=1.1"]),
    ("v2.qcow2", Format::Qcow2, &["-O", "qcow2", "-o", "compat=0.10,cluster_size=4096"]),
    ("c.qcow2", Format::Qcow2, &["-c", "-O", "qcow2"]),
    ("c2m.qcow2", Format::Qcow2, &["-c", "-O", "qcow2", "-o", "cluster_size=2M"]),
    ("zstd.qcow2", Format::Qcow2, &["-c", "-O", "qcow2", "-o", "compression_type=zstd"]),
    (
        "stream.vmdk",
        Format::Vmdk,
        &["-c", "-O", "vmdk", "-o", "adapter_type=lsilogic,compat6=on,subformat=streamOptimized"],
    ),
    ("sparse.vmdk", Format::Vmdk, &["-O", "vmdk"]),
    ("force.vhd", Format::Vpc, &["-O", "vpc", "-o", "subformat=fixed,force_size=on"]),
    ("chs.vhd", Format::Vpc, &["-O", "vpc", "-o", "subformat=fixed"]),
    ("dynamic.vhdx", Format::Vhdx, &["-O", "vhdx"]),
    ("fixed.vhdx", Format::Vhdx, &["-O", "vhdx", "-o", "subformat=fixed,block_size=1M"]),
];

/// What fdisk and blkid say about the partitions of a raw disk, in the shape of the report. Unlike sfdisk, fdisk can be
/// told the sector size of a file.
fn expected_partitions(raw: &Path, sector: u64) -> Vec<Value> {
    let name = raw.file_name().unwrap().to_str().unwrap();
    // Under a name of its own: tests run at the same time.
    let dump = format!("{name}.{:?}.dump", std::thread::current().id());
    let dir = raw.parent().unwrap();
    sh(dir, &format!("rm -f '{dump}'; printf 'O\\n{dump}\\nq\\n' | fdisk -b {sector} {name} >/dev/null"));
    let text = fs::read_to_string(dir.join(&dump)).unwrap();
    assert!(text.contains(&format!("sector-size: {sector}\n")), "{text}");
    let mut expected = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix(name)) {
        // 1 : start=        2048, size=        2048, type=…, uuid=…, name="BIOS-BOOT"
        let (number, fields) = line.split_once(':').unwrap();
        let field = |key: &str| {
            let value = fields.split(',').find_map(|field| field.trim().strip_prefix(key)?.strip_prefix('='));
            value.unwrap().trim().trim_matches('"').to_string()
        };
        let bytes = |key| field(key).parse::<u64>().unwrap() * sector;
        expected.push(serde_json::json!({
            "number": number.trim().parse::<u32>().unwrap(),
            "name": field("name"),
            "type-id": field("type"),
            "uuid": field("uuid").to_lowercase(),
            "start": bytes("start"),
            "size": bytes("size"),
            "filesystem": blkid(raw, bytes("start"), bytes("size")),
        }));
    }
    assert_eq!(expected.len(), 4, "{text}");
    expected
}

/// Kind, label and UUID of the file system in a part of a file, as blkid has it.
fn blkid(path: &Path, start: u64, size: u64) -> Value {
    let (start, size) = (start.to_string(), size.to_string());
    let args = ["--probe", "-o", "export", "-O", &start, "-S", &size, path.to_str().unwrap()];
    // blkid fails when there is nothing to be found.
    let output = Command::new("/usr/sbin/blkid").args(args).output().expect("blkid is needed for this test");
    let text = String::from_utf8(output.stdout).unwrap();
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
    match value("TYPE") {
        Some(kind) => serde_json::json!({ "kind": kind, "label": value("LABEL"), "uuid": value("UUID") }),
        None => Value::Null,
    }
}

/// The partitions of a report, without what the tools do not say.
fn found_partitions(report: &Report) -> Vec<Value> {
    let found = report.partitions.iter().map(|partition| {
        serde_json::json!({
            "number": partition.number,
            "name": partition.name,
            "type-id": partition.type_id,
            "uuid": partition.uuid,
            "start": partition.start,
            "size": partition.size,
            "filesystem": partition.filesystem.as_ref().map(|fs| {
                assert_eq!(fs.unreadable, None);
                serde_json::json!({ "kind": fs.kind, "label": fs.label, "uuid": fs.uuid })
            }),
        })
    });
    found.collect()
}

/// Checks the report of any form of `disk.raw` or `disk4k.raw`.
fn check_disk(report: &Report, raw: &str, sector: u32) {
    assert_eq!(report.unreadable, Vec::<String>::new());
    assert_eq!(report.sector_size, Some(sector));
    assert_eq!(found_partitions(report), expected_partitions(&DISKS.join(raw), sector.into()));
    assert_eq!(report.partitions[0].type_name.as_deref(), Some("BIOS boot"));
    let files = |i: usize| &report.partitions[i].filesystem.as_ref().unwrap().files;
    assert_eq!(*files(1), ["EFI/BOOT/BOOTX64.EFI", "EFI/fedora/a long name.efi"]);
    assert_eq!(*files(2), ["loader/entries/ostree-1.conf"]);
    assert_eq!(report.platform_id(), Some("openstack"));
}

/// Checks that the guest's view of `image` is what qemu-img makes of it, read in order and here and there.
fn check_guest(image: &Path, format: &str) {
    let dir = image.parent().unwrap();
    let raw = dir.join(format!("{}.back.raw", image.file_name().unwrap().to_str().unwrap()));
    run(
        dir,
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()],
    );
    let mut expected = File::open(&raw).unwrap();
    let guest = GuestDisk::open(open(image)).unwrap().expect("a disk image");
    assert_eq!(guest.len(), expected.metadata().unwrap().len(), "{}", image.display());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut pos = 0;
    while pos < guest.len() {
        // What is known to be zero without reading it is zero.
        let zeros = (guest.zeros_at(pos).min(b.len() as u64)) as usize;
        let n = if zeros > 0 { zeros } else { (guest.len() - pos).min(a.len() as u64) as usize };
        guest.read_at(pos, &mut a[..n]).unwrap();
        expected.read_exact(&mut b[..n]).unwrap();
        assert!(a[..n] == b[..n], "{} differs in the {n} bytes at {pos}", image.display());
        assert!(zeros == 0 || b[..n].iter().all(|&b| b == 0), "{}: not zero at {pos}", image.display());
        pos += n as u64;
    }
    for step in [9973, 65_521, 1_048_573] {
        let at = (step * 77_777) % (guest.len() - 5000);
        guest.read_at(at, &mut a[..4999]).unwrap();
        expected.seek(SeekFrom::Start(at)).unwrap();
        expected.read_exact(&mut b[..4999]).unwrap();
        assert!(a[..4999] == b[..4999], "{} differs at {at}", image.display());
    }
    assert_eq!(
        guest.read_at(guest.len(), &mut a[..1]).unwrap_err().kind(),
        std::io::ErrorKind::UnexpectedEof
    );
    fs::remove_file(raw).unwrap();
}

#[test]
fn raw_disks_of_both_sector_sizes() {
    for (name, sector) in [("disk.raw", 512), ("disk4k.raw", 4096)] {
        let report = look(&DISKS.join(name));
        assert_eq!((report.format, report.virtual_size), (Format::Raw, Some(200 * MIB)));
        check_disk(&report, name, sector);
    }
}

#[test]
fn every_disk_format() {
    for (name, format, options) in FORMATS {
        let path = convert("disk.raw", name, options);
        let report = look(&path);
        assert_eq!(report.format, format, "{name}");
        check_disk(&report, "disk.raw", 512);
        let info = json(&DISKS, "qemu-img", &["info", "--output=json", name]);
        // Without its name, qemu-img takes a fixed VHD for a raw disk.
        if format != Format::Vpc {
            assert_eq!(info["format"], format.to_string());
            assert_eq!(info["virtual-size"], report.virtual_size.unwrap(), "{name}");
        }
        assert_eq!(report.compressed, options.contains(&"-c"), "{name}");
        check_guest(&path, &format.to_string());
        fs::remove_file(path).unwrap();
    }
    // Detail of the formats whose variants matter.
    let path = convert("disk.raw", "detail.vmdk", FORMATS[5].2);
    assert_eq!(look(&path).detail.unwrap(), "streamOptimized, grains of 64 KiB");
    let path = convert("disk4k.raw", "4k.qcow2", FORMATS[2].2);
    let report = look(&path);
    assert_eq!(report.detail.as_deref(), Some("compat 1.1, clusters of 64 KiB, compressed with deflate"));
    check_disk(&report, "disk4k.raw", 4096);
}

#[test]
fn disks_that_end_inside_a_cluster() {
    let raw = DISKS.join("odd.raw");
    fs::write(&raw, [noise(1 << 20), vec![0; 1 << 20], b"text ".repeat(100_000), noise(512 * 3)].concat())
        .unwrap();
    let len = fs::metadata(&raw).unwrap().len().next_multiple_of(512);
    File::options().write(true).open(&raw).unwrap().set_len(len).unwrap();
    for (name, format, options) in FORMATS {
        let path = convert("odd.raw", &format!("odd-{name}"), options);
        check_guest(&path, &format.to_string());
    }
}

/// VMware and VirtualBox write the grain directory last, and a footer that has its offset.
#[test]
fn vmdk_with_its_directory_at_the_end() {
    let path = convert("disk.raw", "footer.vmdk", FORMATS[5].2);
    let mut bytes = fs::read(&path).unwrap();
    let footer = bytes[..512].to_vec();
    bytes[56..64].fill(0xff);
    let mut marker = [0; 512];
    (marker[0], marker[12]) = (1, 3);
    bytes.extend([&marker[..], &footer, &[0; 512]].concat());
    fs::write(&path, bytes).unwrap();
    check_guest(&path, "vmdk");
    check_disk(&look(&path), "disk.raw", 512);
}

#[test]
fn damaged_primary_partition_table() {
    let dir = &*DISKS;
    run(dir, "cp", &["--sparse=always", "disk.raw", "backup.raw"]);
    File::options().write(true).open(dir.join("backup.raw")).unwrap().write_all_at(&[0; 512], 512).unwrap();
    check_disk(&look(&dir.join("backup.raw")), "disk.raw", 512);
}

#[test]
fn archives_are_looked_into() {
    let dir = &*DISKS;
    let vmdk = convert("disk.raw", "disk.vmdk", FORMATS[5].2);
    fs::write(dir.join("coreos.ovf"), "<Envelope/>").unwrap();
    sh(dir, "tar -ch --format=ustar -f vmware.ova coreos.ovf disk.vmdk");
    let report = look(&dir.join("vmware.ova"));
    assert_eq!(report.format, Format::Ova);
    let members: Vec<_> = report.members.iter().map(|m| (m.name.as_str(), m.size)).collect();
    assert_eq!(members, [("coreos.ovf", 11), ("disk.vmdk", fs::metadata(vmdk).unwrap().len())]);
    assert_eq!(report.platform_id(), Some("openstack"));
    let inside = report.inside.unwrap();
    assert_eq!((inside.name.as_deref(), inside.report.format), (Some("disk.vmdk"), Format::Vmdk));
    check_disk(&inside.report, "disk.raw", 512);

    // gcp: a sparse member, read through its map; compressed, and small enough to be decoded whole.
    sh(dir, "tar -Sch --format=oldgnu -f gcp.tar disk.raw; gzip --no-name -9 -c gcp.tar > gcp.tar.gz");
    let tar = look(&dir.join("gcp.tar"));
    assert_eq!((tar.format, tar.members[0].size), (Format::Tar, 200 * MIB));
    check_disk(&tar.inside.as_ref().unwrap().report, "disk.raw", 512);
    let report = look(&dir.join("gcp.tar.gz"));
    assert_eq!(report.format, Format::Gzip);
    assert_eq!(report.inside.unwrap().report, tar);
    // Not small enough.
    sh(dir, "tar -c --format=oldgnu disk.raw | gzip -1 > full.tar.gz");
    let tar = look(&dir.join("full.tar.gz")).inside.unwrap().report;
    assert_eq!((tar.format, tar.size, tar.members[0].size), (Format::Tar, None, 200 * MIB));
    let disk = tar.inside.unwrap().report;
    assert_eq!((disk.format, disk.size, disk.virtual_size), (Format::Raw, Some(200 * MIB), Some(200 * MIB)));
    assert!(disk.looked_at.unwrap() < 16 * MIB);
    assert_eq!(disk.partitions.len(), 4);
    assert_eq!(disk.partitions[1].filesystem.as_ref().unwrap().label.as_deref(), Some("EFI-SYSTEM"));

    // The other notations of sparse members, and zip64, which every zip beyond 4 GiB is.
    sh(
        dir,
        "for version in 0.0 0.1 1.0; do tar -Sch --format=posix --sparse-version=$version -f pax$version.tar disk.raw; done
         zip -q -fz zip64.zip disk.raw",
    );
    for name in ["pax0.0.tar", "pax0.1.tar", "pax1.0.tar", "zip64.zip"] {
        let report = look(&dir.join(name));
        assert_eq!(report.unreadable, Vec::<String>::new(), "{name}");
        assert_eq!(
            (report.members[0].name.as_str(), report.members[0].size),
            ("disk.raw", 200 * MIB),
            "{name}"
        );
        let disk = report.inside.unwrap().report;
        assert_eq!(
            (disk.format, disk.size, disk.partitions.len()),
            (Format::Raw, Some(200 * MIB), 4),
            "{name}"
        );
    }

    // kubevirt: an OCI layout with a layer that has the disk.
    convert("disk.raw", "kubevirt.qcow2", FORMATS[0].2);
    sh(
        dir,
        "mkdir -p oci/blobs/sha256 layer/disk; mv kubevirt.qcow2 layer/disk/kubevirt.qcow2
         tar -c --format=posix --sort=name --numeric-owner -C layer ./disk | gzip -1 > oci/blobs/sha256/$(printf '%064d' 1)
         echo '{\"imageLayoutVersion\":\"1.0.0\"}' > oci/oci-layout; echo '{}' > oci/index.json
         tar -c -C oci -f kubevirt.ociarchive .",
    );
    let report = look(&dir.join("kubevirt.ociarchive"));
    assert_eq!(report.format, Format::Ociarchive);
    let layer = report.inside.unwrap().report;
    assert_eq!(layer.format, Format::Gzip);
    let tar = layer.inside.unwrap().report;
    assert_eq!((tar.format, tar.members[0].name.as_str()), (Format::Tar, "./disk/kubevirt.qcow2"));
    let disk = tar.inside.unwrap().report;
    assert_eq!((disk.format, disk.virtual_size), (Format::Qcow2, Some(200 * MIB)));
    assert_eq!(disk.partitions.len(), 4);

    // hyperv: zip from a pipe, which knows no sizes at the start.
    convert("disk.raw", "hyperv.vhdx", FORMATS[9].2);
    sh(dir, "zip -q -9j - hyperv.vhdx > hyperv.vhdx.zip");
    let report = look(&dir.join("hyperv.vhdx.zip"));
    assert_eq!((report.format, report.members[0].name.as_str()), (Format::Zip, "hyperv.vhdx"));
    let disk = report.inside.unwrap().report;
    assert_eq!((disk.format, disk.virtual_size), (Format::Vhdx, Some(200 * MIB)));
}

#[test]
fn compressed_disks_by_their_beginning() {
    let dir = &*DISKS;
    let report_of = |script: &str, name: &str| {
        sh(dir, script);
        look(&dir.join(name))
    };
    for (script, name, format, size) in [
        ("xz -1 -T2 --block-size=8MiB -c disk.raw > d.raw.xz", "d.raw.xz", Format::Xz, Some(200 * MIB)),
        // Two streams: no index has the length of all.
        ("xz -1 -c boot/vmlinuz > two.xz; xz -1 -c disk.raw >> two.xz", "two.xz", Format::Xz, None),
        ("gzip -1 -c disk.raw > d.raw.gz", "d.raw.gz", Format::Gzip, None),
        ("zstd -q -1 -c disk.raw > d.raw.zst", "d.raw.zst", Format::Zstd, None),
    ] {
        let report = report_of(script, name);
        assert_eq!((report.format, &report.unreadable[..]), (format, &[][..]));
        let disk = report.inside.unwrap().report;
        assert_eq!((disk.size, disk.virtual_size.is_some()), (size, size.is_some()));
        assert_eq!(disk.looked_at, Some(16 * MIB));
        if name != "two.xz" {
            assert_eq!((disk.format, disk.partitions.len()), (Format::Raw, 4));
        }
    }
    // Small enough to be looked at whole, in one part and in several.
    for (script, name, size) in [
        ("gzip -c boot/System.map > map.gz", "map.gz", 2_500_000),
        ("cat map.gz map.gz > maps.gz", "maps.gz", 5_000_000),
        // A skippable frame before each of the others.
        ("pzstd -q -p 2 -c boot/System.map > pzstd.zst", "pzstd.zst", 2_500_000),
        ("(zstd -qc boot/System.map; zstd -qc boot/System.map) > maps.zst", "maps.zst", 5_000_000),
        (
            "(xz -c boot/System.map; head -c 8 /dev/zero; xz -c boot/System.map) > maps.xz",
            "maps.xz",
            5_000_000,
        ),
    ] {
        let report = report_of(script, name);
        assert_eq!((&report.detail, &report.unreadable[..]), (&None, &[][..]), "{name}");
        let inside = report.inside.unwrap().report;
        assert_eq!(
            (inside.format, inside.size, inside.looked_at),
            (Format::Unknown, Some(size), None),
            "{name}"
        );
    }
    // A live initramfs: one compressed archive after the other, each compressed differently.
    let report = report_of(
        "(cd boot; echo vmlinuz | cpio --quiet -o -H newc | zstd -q; head -c 508 /dev/zero
          echo System.map | cpio --quiet -o -H newc | gzip -9) > initramfs",
        "initramfs",
    );
    assert_eq!((report.format, &report.unreadable[..]), (Format::Zstd, &[][..]));
    let at: usize =
        report.detail.unwrap().strip_prefix("something else follows at ").unwrap().parse().unwrap();
    assert_eq!(fs::read(dir.join("initramfs")).unwrap()[at..at + 2], [0x1f, 0x8b]);
    assert_eq!(report.inside.unwrap().report.members[0].name, "vmlinuz");
}

#[test]
fn live_images() {
    let dir = &*DISKS;
    sh(
        dir,
        "mkdir -p live iso/images/pxeboot iso/coreos iso/EFI
         mkfs.erofs --quiet live/root.erofs boot
         mksquashfs boot live/root.squashfs -quiet -no-progress -comp zstd
         echo osmet > live/metal.osmet
         (cd live; for fs in erofs squashfs; do
            printf '%s\\n' root.$fs metal.osmet | cpio --quiet -o -H newc > ../rootfs.$fs.img; done)
         echo microcode > early; echo early | cpio --quiet -o -H newc > early.cpio
         echo init > init; echo init | cpio --quiet -o -H newc | zstd -q > main.cpio.zst
         (cat early.cpio; head -c 512 /dev/zero; cat main.cpio.zst) > iso/images/pxeboot/initrd.img
         cp boot/vmlinuz iso/images/pxeboot/vmlinuz; cp rootfs.erofs.img iso/images/pxeboot/rootfs.img
         echo '{\"default\":\"ignition.firstboot ignition.platform.id=metal\"}' > iso/coreos/kargs.json
         head -c 8192 boot/vmlinuz > iso/boot.img; cp fs.esp iso/EFI/efi.img; head -c 432 boot/vmlinuz > mbr.bin
         xorriso -as mkisofs -quiet -V fedora-coreos-live -R -J -b boot.img -no-emul-boot -boot-load-size 4 \
           -eltorito-alt-boot -e EFI/efi.img -no-emul-boot -isohybrid-mbr mbr.bin -isohybrid-gpt-basdat -o live.iso iso
         genisoimage -quiet -V PLAIN -b boot.img -no-emul-boot -o plain.iso iso",
    );
    for fs in ["erofs", "squashfs"] {
        let report = look(&dir.join(format!("rootfs.{fs}.img")));
        assert_eq!(report.format, Format::Cpio);
        assert_eq!(report.members.len(), 2);
        let inside = report.inside.unwrap();
        assert_eq!(inside.name, Some(format!("root.{fs}")));
        let found = inside.report.filesystem.unwrap();
        let file = dir.join("live").join(inside.name.unwrap());
        let expected = blkid(&file, 0, fs::metadata(&file).unwrap().len());
        assert_eq!(
            serde_json::json!({ "kind": found.kind, "label": found.label, "uuid": found.uuid }),
            expected
        );
    }
    let report = look(&dir.join("iso/images/pxeboot/initrd.img"));
    assert_eq!((report.format, report.members[0].name.as_str()), (Format::Cpio, "early"));
    let rest = report.inside.unwrap();
    assert_eq!((rest.name, rest.report.format), (None, Format::Zstd));
    assert_eq!(rest.report.inside.unwrap().report.members[0].name, "init");

    let report = look(&dir.join("live.iso"));
    assert_eq!((report.format, &report.unreadable[..]), (Format::Iso9660, &[][..]));
    assert_eq!(report.platform_id(), Some("metal"));
    let iso = report.iso.unwrap();
    assert_eq!(iso.volume_id, "fedora-coreos-live");
    assert!(iso.hybrid_mbr && iso.hybrid_gpt);
    let said =
        sh(dir, "xorriso -indev live.iso -report_el_torito plain -report_system_area plain 2>/dev/null");
    let said = String::from_utf8(said).unwrap();
    let boot: Vec<String> =
        iso.boot.iter().map(|b| format!("{} {} {}", b.platform, b.sectors, b.offset / 2048)).collect();
    // El Torito boot img :   1  BIOS  y   none  0x0000  0x00      4          36
    let expected: Vec<String> = said
        .lines()
        .filter_map(|l| l.strip_prefix("El Torito boot img :"))
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .map(|w| format!("{} {} {}", w[1], w[6], w[7]))
        .collect();
    assert_eq!(boot, expected);
    assert_eq!(expected.len(), 2);
    assert_eq!(said.lines().filter(|l| l.starts_with("GPT start and size")).count(), report.partitions.len());
    let found: Vec<_> = iso.pxeboot.iter().map(|m| (m.name.as_str(), m.size)).collect();
    let size = |name: &str| fs::metadata(dir.join("iso/images/pxeboot").join(name)).unwrap().len();
    assert_eq!(
        found,
        [
            ("images/pxeboot/initrd.img", size("initrd.img")),
            ("images/pxeboot/rootfs.img", size("rootfs.img")),
            ("images/pxeboot/vmlinuz", size("vmlinuz")),
        ]
    );

    // Without Rock Ridge and not a hybrid.
    let report = look(&dir.join("plain.iso"));
    let iso = report.iso.unwrap();
    assert_eq!((iso.volume_id.as_str(), iso.hybrid_mbr, iso.hybrid_gpt), ("PLAIN", false, false));
    assert_eq!(iso.pxeboot.len(), 3);
    assert_eq!(iso.pxeboot[2].name, "images/pxeboot/vmlinuz");
    let said = String::from_utf8(run(dir, "isoinfo", &["-d", "-i", "plain.iso"])).unwrap();
    let blocks = said.lines().find_map(|l| l.strip_prefix("Volume size is: ")).unwrap();
    assert_eq!(report.virtual_size, Some(2048 * blocks.parse::<u64>().unwrap()));
}

#[test]
fn foreign_disk_images_are_named() {
    for (name, format) in [("vdi", Format::Vdi), ("qed", Format::Qed), ("parallels", Format::Parallels)] {
        let report = look(&convert("disk.raw", &format!("foreign.{name}"), &["-O", name]));
        assert_eq!((report.format, report.virtual_size), (format, Some(200 * MIB)));
        assert_eq!(report.format.to_string(), name);
        let reason = format!("the disk in a {name} image is not looked into; qemu-img converts it");
        assert_eq!(report.unreadable, [reason]);
    }
}

/// File systems are named as blkid names them.
#[test]
fn file_systems_that_are_only_named() {
    let dir = &*DISKS;
    sh(
        dir,
        "mke2fs -q -O journal_dev -L journal external-journal 4M; truncate -s 1M swap; mkswap -q swap
         mksquashfs boot squashfs3 -quiet -no-progress -comp gzip
         # Versions 3.1, little-endian and big-endian.
         printf '\\x03\\0\\x01\\0' | dd of=squashfs3 bs=1 seek=28 conv=notrunc status=none
         cp squashfs3 squashfs3be; printf sqsh | dd of=squashfs3be bs=1 conv=notrunc status=none
         printf '\\0\\x03\\0\\x01' | dd of=squashfs3be bs=1 seek=28 conv=notrunc status=none",
    );
    // BitLocker of Windows 7: the boot sector leads to a block of metadata.
    let mut bitlocker = vec![0; 1 << 20];
    bitlocker[..11].copy_from_slice(b"\xeb\x58\x90-FVE-FS-");
    bitlocker[510..512].copy_from_slice(&[0x55, 0xaa]);
    let guid = b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01";
    bitlocker[160..176].copy_from_slice(guid);
    bitlocker[176..184].copy_from_slice(&(64u64 << 10).to_le_bytes());
    bitlocker[64 << 10..][..8].copy_from_slice(b"-FVE-FS-");
    bitlocker[(64 << 10) + 10] = 2;
    fs::write(dir.join("bitlocker"), bitlocker).unwrap();
    let names = [
        ("external-journal", "jbd"),
        ("swap", "swap"),
        ("squashfs3", "squashfs3"),
        ("squashfs3be", "squashfs3"),
    ];
    for (name, kind) in names.into_iter().chain([("bitlocker", "BitLocker")]) {
        let path = dir.join(name);
        let expected = blkid(&path, 0, fs::metadata(&path).unwrap().len());
        assert_eq!(expected["kind"], kind, "{name}");
        let found = look(&path).filesystem.unwrap_or_else(|| panic!("{name}: no file system"));
        assert_eq!(found.kind, kind, "{name}");
        if name == "external-journal" {
            assert_eq!(
                serde_json::json!([found.label, found.uuid]),
                serde_json::json!([expected["label"], expected["uuid"]])
            );
        }
    }
}

/// A source with bytes changed, or cut short; it notes what is read.
struct Damaged {
    inner: Arc<dyn Source>,
    len: u64,
    bytes: Vec<(u64, u8)>,
    reads: Mutex<Vec<(u64, usize)>>,
}

impl Damaged {
    fn new(inner: &Arc<dyn Source>, len: u64, bytes: Vec<(u64, u8)>) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), len, bytes, reads: Mutex::default() })
    }
}

impl Source for Damaged {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        source::check_range(self.len, offset, buf.len())?;
        self.reads.lock().unwrap().push((offset, buf.len()));
        self.inner.read_at(offset, buf)?;
        for &(at, value) in &self.bytes {
            if let Some(byte) = at.checked_sub(offset).and_then(|i| buf.get_mut(i as usize)) {
                *byte = value;
            }
        }
        Ok(())
    }
}

#[test]
fn damage_is_reported_and_never_a_panic() {
    let dir = &*DISKS;
    let mut files = vec![dir.join("disk.raw"), dir.join("disk4k.raw")];
    for i in [1, 2, 5, 7, 9] {
        files.push(convert("disk.raw", &format!("damage-{}", FORMATS[i].0), FORMATS[i].2));
    }
    sh(
        dir,
        "mkdir -p dmg/images/pxeboot; head -c 4096 boot/vmlinuz > dmg/b; cp boot/System.map dmg/images/pxeboot/
         xorriso -as mkisofs -quiet -V D -R -b b -no-emul-boot -o damage.iso dmg
         tar -Sc --format=oldgnu -f damage.tar disk.raw; find boot | cpio --quiet -o -H newc > damage.cpio
         gzip -c damage.cpio > damage.gz; xz -1c damage.cpio > damage.xz; zip -q -r damage.zip boot/System.map esp",
    );
    for name in ["damage.iso", "damage.tar", "damage.cpio", "damage.gz", "damage.xz", "damage.zip"] {
        files.push(dir.join(name));
    }
    let mut state = 88_172_645_463_325_252u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for path in files {
        let inner = open(&path);
        let len = inner.len();
        let sound = Damaged::new(&inner, len, Vec::new());
        inspect(sound.clone()).unwrap();
        let reads = sound.reads.lock().unwrap().clone();
        // Looking at a disk or archive takes little; a compressed file is decoded from its beginning.
        let total: usize = reads.iter().map(|(_, len)| len).sum();
        let packed = ["gz", "xz"].contains(&path.extension().unwrap().to_str().unwrap());
        assert!(packed || total < 1 << 20, "{}: {total} bytes read", path.display());
        for _ in 0..if packed { 20 } else { 200 } {
            // Where it is read, and near the start of a read, where fields are.
            let damage = (0..1 + random() % 3).map(|_| {
                let (offset, len) = reads[(random() % reads.len() as u64) as usize];
                (
                    offset + random() % (len as u64).clamp(1, 4096),
                    [0, 0xff, random() as u8][(random() % 3) as usize],
                )
            });
            let report = inspect(Damaged::new(&inner, len, damage.collect())).unwrap();
            assert!(!report.to_string().is_empty());
        }
        for cut in
            [0, 1, 2, 100, 511, 512, 513, 1024, 4096, 32_768, 65_536, len / 3, len / 2, len - 512, len - 1]
        {
            inspect(Damaged::new(&inner, cut.min(len), Vec::new())).unwrap();
        }
    }
}

#[test]
fn hostile_headers_are_refused_with_a_reason() {
    let path = convert("disk.raw", "hostile.qcow2", FORMATS[0].2);
    let refused = |at: usize, value: &[u8]| {
        let mut bytes = fs::read(&path).unwrap();
        bytes[at..at + value.len()].copy_from_slice(value);
        let report = inspect(Arc::new(bytes)).unwrap();
        assert_eq!(report.format, Format::Qcow2);
        report.unreadable.join("; ")
    };
    assert_eq!(refused(4, &[0, 0, 0, 9]), "qcow2 version 9: expected 2 or 3");
    assert_eq!(refused(20, &[0, 0, 0, 63]), "qcow2 cluster bits 63: expected 9 to 21");
    assert!(refused(24, &[0xff; 8]).contains("level 1 entries"));
    assert_eq!(refused(8, &[0, 0, 0, 0, 0, 0, 0, 200]), "qcow2 with a backing file");
    // A partition table of four billion entries.
    let mut bytes = vec![0; 1 << 20];
    bytes[512..520].copy_from_slice(b"EFI PART");
    bytes[512 + 80..512 + 88].copy_from_slice(&[0xff; 8]);
    let report = inspect(Arc::new(bytes)).unwrap();
    assert_eq!(
        report.unreadable,
        ["partition table: expected at most 1024 entries of 128 bytes, found 4294967295 of 4294967295"]
    );
}

#[test]
fn names_do_not_drive_the_terminal() {
    let dir = &*DISKS;
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_cksum();
    let mut tar = tar::Builder::new(File::create(dir.join("names.tar")).unwrap());
    tar.append_data(&mut header, "evil\u{1b}[2J", std::io::empty()).unwrap();
    tar.into_inner().unwrap().flush().unwrap();
    let report = look(&dir.join("names.tar"));
    assert_eq!(report.members[0].name, "evil\u{1b}[2J");
    assert!(report.to_string().chars().all(|c| c == '\n' || !c.is_control()));
}
