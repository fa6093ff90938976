//! One suite for every fold: what real tools compressed must come back bit for bit.
//!
//! Every test here runs the tool that a release is made with; where one is missing, the test fails and names it.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use rehydrator::fold::{Compression, Effort, Map, Unfolded, fold, peel, unfold};
use rehydrator::source::{self, File, Source};

/// Runs a shell command in `dir`; a failure names it.
fn sh(dir: &Path, command: &str) {
    let out =
        Command::new("bash").args(["-euo", "pipefail", "-c", command]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

fn open(path: &Path) -> Arc<dyn Source> {
    Arc::new(File::new(fs::File::open(path).unwrap()).unwrap())
}

/// Compares what is written to it with a file.
struct Compare {
    wanted: io::BufReader<fs::File>,
    buf: Vec<u8>,
    len: u64,
}

impl Write for Compare {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.buf.resize(buf.len(), 0);
        self.wanted.read_exact(&mut self.buf)?;
        assert!(self.buf == buf, "other bytes within {} at {}", buf.len(), self.len);
        self.len += buf.len() as u64;
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Unfolds `path`, folds it back and compares. Gives what came of it, and how long both took.
fn round_trip(path: &Path) -> (Unfolded, f64, f64) {
    let form = open(path);
    let start = Instant::now();
    let unfolded = unfold(&form, path.parent().unwrap(), Effort::Whole).unwrap();
    let unfold_time = start.elapsed().as_secs_f64();
    let start = Instant::now();
    if let Some(map) = &unfolded.map {
        let bytes = map.to_bytes();
        let map = Map::from_bytes(&bytes, u64::MAX).unwrap();
        assert_eq!(map.to_bytes(), bytes, "a map that is read and written again");
        assert_eq!(map.plain_len(), unfolded.plain.len());
        assert_eq!(map.folded_len(), form.len());
        let wanted = io::BufReader::new(fs::File::open(path).unwrap());
        let mut compare = Compare { wanted, buf: Vec::new(), len: 0 };
        fold(&map, &mut source::Reader::new(&*unfolded.plain), &mut compare, 0).unwrap();
        assert_eq!(compare.len, form.len());
    } else {
        assert!(Arc::ptr_eq(&unfolded.plain, &form));
    }
    (unfolded, unfold_time, start.elapsed().as_secs_f64())
}

/// A disk of 24 MiB with an ext4 file system of real files in it, and some things nobody can compress.
fn disk(dir: &Path) {
    sh(
        dir,
        "mkdir files && for i in 1 2 3 4 5 6 7 8; do help '*' | sed \"s/^/$i /\" > files/text$i; done; cp /bin/bash files && head -c 300000 /dev/urandom > files/noise
         truncate -s 24M disk.raw && mke2fs -q -t ext4 -d files disk.raw 16M",
    );
}

/// Makes `file` out of `disk.raw` with `command`, and expects that it is opened up, that it comes back, and that the
/// map is at most `max_map` thousandths of its length.
fn opens(command: &str, file: &str, max_map: u64) -> (tempfile::TempDir, PathBuf, Map, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(dir.path(), command);
    let path = dir.path().join(file);
    let (unfolded, ..) = round_trip(&path);
    let map = unfolded.map.unwrap_or_else(|| panic!("{command}: nothing was found"));
    let (map_len, len) = (map.to_bytes().len() as u64, fs::metadata(&path).unwrap().len());
    assert!(map_len * 1000 <= len * max_map + 1000 * 200, "{command}: a map of {map_len} bytes for {len}");
    assert!(unfolded.plain.len() > len, "{command}: plain {}, folded {len}", unfolded.plain.len());
    // The content of the disk lies open in the plain stream.
    let bash = fs::read("/bin/bash").unwrap();
    let mut plain = Vec::new();
    source::Reader::new(&*unfolded.plain).read_to_end(&mut plain).unwrap();
    let needle = &bash[300_000..304_096];
    assert!(plain.windows(4096).any(|w| w == needle), "{command}: the files are not in the plain stream");
    (dir, path, map, plain)
}

/// As [`opens`], and then with too little and too much of everything.
fn opens_in_part(command: &str, file: &str, max_map: u64) {
    let (dir, path, map, plain) = opens(command, file, max_map);
    // Cut short at odd places, the plain stream gives an error, and bytes too many are left alone.
    for cut in [0, 1, plain.len() / 3, plain.len() - 1] {
        assert!(fold(&map, &mut &plain[..cut], &mut io::sink(), 0).is_err(), "{command}: cut at {cut}");
    }
    // A form cut short opens up what is left.
    let form = fs::read(&path).unwrap();
    for cut in [1, 511, 513, form.len() - 1] {
        fs::write(dir.path().join("cut"), &form[..cut]).unwrap();
        round_trip(&dir.path().join("cut"));
    }
    // What follows the form stays as it is.
    fs::write(dir.path().join("more"), [&form[..], b"trailing"].concat()).unwrap();
    assert!(round_trip(&dir.path().join("more")).0.map.is_some(), "{command}: with trailing data");
}

#[test]
fn stream_optimized_vmdk() {
    opens_in_part(
        "qemu-img convert -f raw -O vmdk -c -o subformat=streamOptimized disk.raw d.vmdk",
        "d.vmdk",
        1,
    );
    opens(
        "qemu-img convert -f raw -O vmdk -c -o adapter_type=lsilogic,compat6,subformat=streamOptimized disk.raw d.vmdk",
        "d.vmdk",
        1,
    );
}

#[test]
fn compressed_qcow2() {
    opens_in_part("qemu-img convert -f raw -O qcow2 -c -o compat=1.1 disk.raw d.qcow2", "d.qcow2", 1);
    opens("qemu-img convert -f raw -O qcow2 -c -o compat=0.10 disk.raw d.qcow2", "d.qcow2", 1);
    opens("qemu-img convert -f raw -O qcow2 -c -o cluster_size=2M disk.raw d.qcow2", "d.qcow2", 1);
}

#[test]
fn ova() {
    let make = "qemu-img convert -f raw -O vmdk -c -o subformat=streamOptimized disk.raw disk.vmdk
                echo '<Envelope/>' > coreos.ovf && tar -ch --format=ustar -f d.ova coreos.ovf disk.vmdk";
    opens_in_part(make, "d.ova", 1);
    opens(&format!("{make} && gzip -6 -n d.ova"), "d.ova.gz", 1);
}

#[test]
fn gcp_tar_gz() {
    opens_in_part("tar -Sch --format=oldgnu disk.raw | gzip --no-name -9 > d.tar.gz", "d.tar.gz", 0);
}

#[test]
fn gzip_levels() {
    for level in 1..=9 {
        let (.., map, _) = opens(&format!("gzip -{level} -k disk.raw"), "disk.raw.gz", 0);
        assert!(map.to_bytes().len() < 40, "gzip -{level} is known, without corrections");
    }
}

#[test]
fn gzip_of_zlib() {
    for level in [1, 6, 9] {
        let python = "import gzip,sys;sys.stdout.buffer.write(gzip.compress(open('disk.raw','rb').read(),";
        opens(&format!("python3 -c \"{python}{level}))\" > d.gz"), "d.gz", 0);
    }
}

#[test]
fn gzip_of_several_members() {
    opens_in_part(
        "(head -c 5000000 disk.raw | gzip -9; tail -c +5000001 disk.raw | gzip -1) > d.gz",
        "d.gz",
        0,
    );
}

#[test]
fn pigz() {
    opens_in_part("pigz -p 3 -6 -k disk.raw", "disk.raw.gz", 20);
}

/// Fedora's qemu-img compresses with zlib-ng since Fedora 40. That of this machine does when it finds such a library first,
/// made here from the source that the crate libz-sys carries.
#[test]
fn zlib_ng() {
    let library = tempfile::tempdir().unwrap();
    sh(
        library.path(),
        &format!(
            "crate=$(cargo metadata --format-version 1 --locked --manifest-path {}/Cargo.toml |
                 jq -r '.packages[] | select(.name == \"libz-sys\") | .manifest_path')
             cmake -S $(dirname $crate)/src/zlib-ng -B build -DZLIB_COMPAT=ON -DBUILD_SHARED_LIBS=OFF -DBUILD_TESTING=OFF \
                 -DCMAKE_POSITION_INDEPENDENT_CODE=ON -DCMAKE_BUILD_TYPE=Release
             cmake --build build
             cc -shared -Wl,--whole-archive build/libz.a -Wl,--no-whole-archive -Wl,-soname,libz.so.1 -o libz.so.1",
            env!("CARGO_MANIFEST_DIR")
        ),
    );
    let qemu_img = format!("LD_LIBRARY_PATH={} qemu-img convert -f raw", library.path().display());
    for (options, file) in
        [("-O qcow2 -c", "d.qcow2"), ("-O vmdk -c -o compat6,subformat=streamOptimized", "d.vmdk")]
    {
        let (_dir, path, map, _) = opens(&format!("{qemu_img} {options} disk.raw {file}"), file, 20);
        let (map, len) = (map.to_bytes().len() as u64, fs::metadata(path).unwrap().len());
        assert!(map * 1000 > len, "{file}: a map of {map} bytes for {len}: this was not zlib-ng");
    }
}

/// Encoders that are nothing like zlib come back through corrections or not at all, but never wrong.
#[test]
fn odd_encoders() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(
        dir.path(),
        "head -c 3000000 disk.raw > part
         libdeflate-gzip -6 -k disk.raw && mv disk.raw.gz 1.gz
         libdeflate-gzip -12 -k part && mv part.gz 2.gz
         zopfli --i1 -c part > 3.gz",
    );
    for name in ["1.gz", "2.gz", "3.gz"] {
        let map = round_trip(&dir.path().join(name)).0.map;
        // libdeflate's middle levels are known to preflate; what searches for the optimum is left alone.
        assert_eq!(map.is_some(), name == "1.gz", "{name}");
    }
}

#[test]
fn ociarchive() {
    opens_in_part(
        "mkdir -p disk oci/blobs/sha256 && qemu-img convert -f raw -O qcow2 disk.raw disk/d.qcow2
         tar -c --owner=0 --group=0 disk | gzip -n > layer
         mv layer oci/blobs/sha256/$(sha256sum layer | cut -c1-64) && echo '{}' > oci/index.json
         tar -c --format=posix --sort=name --numeric-owner -C oci -f d.ociarchive .",
        "d.ociarchive",
        0,
    );
}

/// A stream of zeros is a thousand times longer than what it is deflated to.
#[test]
fn long_runs_of_zeros() {
    let dir = tempfile::tempdir().unwrap();
    sh(
        dir.path(),
        "(head -c 200000 /bin/bash; head -c 600M /dev/zero; head -c 200000 /bin/bash) | gzip -9 > d.gz",
    );
    let (unfolded, ..) = round_trip(&dir.path().join("d.gz"));
    assert_eq!(unfolded.plain.len(), 600 * (1 << 20) + 400_000 + 18);
    let map = unfolded.map.unwrap().to_bytes();
    assert!(map.len() < 40_000, "a map of {}", map.len());
}

#[test]
fn nothing_inside() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(
        dir.path(),
        "qemu-img convert -f raw -O qcow2 disk.raw 1 && qemu-img convert -f raw -O vhdx disk.raw 2
         qemu-img convert -f raw -O vpc -o subformat=fixed,force_size disk.raw 3
         qemu-img convert -f raw -O vmdk disk.raw 4 && tar -cf 5 disk.raw && : > 6
         qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd disk.raw 7",
    );
    for name in ["disk.raw", "1", "2", "3", "4", "5", "6", "7"] {
        assert!(round_trip(&dir.path().join(name)).0.map.is_none(), "{name}");
    }
}

/// Whatever is done to a form, it is only opened up in part.
#[test]
fn damaged_forms() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(
        dir.path(),
        "head -c 2M disk.raw > part
         qemu-img convert -f raw -O vmdk -c -o subformat=streamOptimized part 1
         qemu-img convert -f raw -O qcow2 -c part 2 && tar -cf 3 1 && gzip -c part > 4",
    );
    for name in ["1", "2", "3", "4"] {
        let form = fs::read(dir.path().join(name)).unwrap();
        // Bytes of headers and tables, and some of what follows.
        for i in (0..600).chain((600..form.len()).step_by(form.len() / 4)) {
            if i % 97 == 0 || i < 90 && i % 9 == 0 {
                let mut damaged = form.clone();
                damaged[i] ^= 0x5a;
                fs::write(dir.path().join("damaged"), damaged).unwrap();
                round_trip(&dir.path().join("damaged"));
            }
        }
    }
}

/// CRC-32 as in gzip.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// The bytes of a map with this content: checksum and end marker are right.
fn sealed(content: &[u8]) -> Vec<u8> {
    [content, &crc32(content).to_le_bytes(), b"end."].concat()
}

/// A map with a flipped byte is refused. Where the checksum fits again it makes other bytes or an error, but never
/// panics or runs away.
#[test]
fn damaged_maps() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(
        dir.path(),
        "head -c 3M disk.raw > part && qemu-img convert -f raw -O vmdk -c -o subformat=streamOptimized part 1
         gzip -9 -c part > 2 && pigz -11 --iterations 1 -n -c 1 > 3
         python3 -c \"import gzip; open('4', 'wb').write(gzip.compress(open('1', 'rb').read()))\"",
    );
    for name in ["1", "2", "3", "4"] {
        let form = open(&dir.path().join(name));
        let unfolded = unfold(&form, dir.path(), Effort::Whole).unwrap();
        let Some(map) = unfolded.map else { continue };
        let map = map.to_bytes();
        let content = &map[..map.len() - 8];
        assert_eq!(sealed(content), map);
        for cut in 0..map.len().min(300) {
            assert!(Map::from_bytes(&map[..cut], u64::MAX).is_err());
            assert!(Map::from_bytes(&sealed(&content[..cut.min(content.len() - 1)]), u64::MAX).is_err());
        }
        assert!(Map::from_bytes(&[&map[..], b"x"].concat(), u64::MAX).is_err());
        assert!(Map::from_bytes(&sealed(&[content, b"x"].concat()), u64::MAX).is_err());
        for i in (0..map.len()).step_by((map.len() / 300).max(1)) {
            let mut damaged = map.clone();
            damaged[i] ^= 1 << (i % 8);
            assert!(Map::from_bytes(&damaged, u64::MAX).is_err(), "{name}: byte {i}");
            // Corrections are what the checksum is for.
            if i < content.len()
                && (name == "1" || name == "4")
                && let Ok(map) = Map::from_bytes(&sealed(&damaged[..content.len()]), u64::MAX)
            {
                let _ = fold(&map, &mut source::Reader::new(&*unfolded.plain), &mut io::sink(), 0);
            }
        }
    }
}

#[test]
fn hostile_maps() {
    let refused = |bytes: &[u8], wanted: &str| {
        let error = Map::from_bytes(bytes, u64::MAX).unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{bytes:?}: {error}");
    };
    refused(b"", "segment map: cut short");
    refused(b"\x03", "segment map: version 3, this program reads versions 1 to 2");
    refused(b"\x01\x00\x05\x01\x00\x05....end!", "segment map: no end marker");
    refused(b"\x01\x00\x05\x01\x00\x05....end.", "segment map: checksum mismatch");
    let cases: [(&[u8], &str); 10] = [
        (b"\x02\x00\x05\x01\x04\x05\x0a", "segment map: no level of gzip: 10"),
        (b"\x02\x00\x05\x01\x0f\x05", "segment map: unknown kind 15"),
        (b"\x02\x00\x05\x01\x10\x01", "segment map: no encoder 0"),
        (b"\x01\xff\xff\x03", "segment map: number of encoders is 65535, at most 240"),
        (b"\x01\x01\x00\x0a\x0f\x08", "segment map: no zlib parameters"),
        (
            b"\x01\x00\x05\xff\xff\xff\xff\x0f",
            "segment map: number of segments is 4294967295, at most 2097152",
        ),
        (b"\x01\x00\x05\x01\x00\x00", "segment map: an empty segment"),
        (b"\x01\x00\x05\x01\x04\x01", "segment map: no encoder 0"),
        (b"\x01\x00\x05\x01\x01\xff\xff\xff\x7f", "segment map: length is 268435455, at most 4194304"),
        (
            b"\x01\x00\x05\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
            "segment map: a number of more than",
        ),
    ];
    for (content, wanted) in cases {
        refused(&sealed(content), wanted);
    }
    // More bytes, or fewer, than the map says.
    refused(
        &sealed(b"\x01\x00\x04\x01\x00\x05"),
        "segment map: the segments make more than the 4 bytes of the whole",
    );
    for (content, wanted) in [
        (&b"\x01\x01\x00\x06\x0f\x08\x01\x01\x04\x05"[..], "fold: more bytes than the map says"),
        (b"\x01\x00\x06\x01\x00\x05", "fold: 1 bytes less than the map says"),
    ] {
        let map = Map::from_bytes(&sealed(content), u64::MAX).unwrap();
        let error = fold(&map, &mut &b"12345"[..], &mut io::sink(), 0).unwrap_err().to_string();
        assert_eq!(error, wanted);
    }
}

/// What each tool compressed comes out as it was; anything after it, or missing from it, is an error.
#[test]
fn peeling() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path());
    sh(
        dir.path(),
        "xz -c0 -T2 disk.raw > a.xz && (head -c 5000000 disk.raw | xz -0; tail -c +5000001 disk.raw | xz -0) > b.xz
         gzip -c disk.raw > a.gz && (head -c 5000000 disk.raw | gzip; tail -c +5000001 disk.raw | gzip) > b.gz
         pigz -c disk.raw > c.gz && zstd -q -10 -T2 -c disk.raw > a.zst
         zip -q -9j a.zip disk.raw && zip -q -9j - disk.raw | cat > b.zip && cat disk.raw | zip -q -9j - - > c.zip
         zip -q -0 d.zip disk.raw",
    );
    let raw = fs::read(dir.path().join("disk.raw")).unwrap();
    let peel_bytes = |name: &str, max: u64| {
        let peeled = peel(fs::File::open(dir.path().join(name)).unwrap(), name, dir.path(), max)?;
        let mut bytes = Vec::new();
        source::Reader::new(&*peeled.form).read_to_end(&mut bytes)?;
        io::Result::Ok((bytes, peeled))
    };
    for name in
        ["a.xz", "b.xz", "a.gz", "b.gz", "c.gz", "a.zst", "a.zip", "b.zip", "c.zip", "d.zip", "disk.raw"]
    {
        let (bytes, peeled) = peel_bytes(name, raw.len() as u64).unwrap();
        assert!(bytes == raw, "{name}: other bytes");
        let member = match name {
            "c.zip" => Some("-"),
            _ if name.ends_with("zip") => Some("disk.raw"),
            _ => None,
        };
        assert_eq!(peeled.member.as_deref(), member, "{name}");
        if name == "disk.raw" {
            assert_eq!(peeled.compression, Compression::None);
            continue;
        }
        let error = |name: &str, max| peel_bytes(name, max).err().unwrap().to_string();
        let limit = raw.len() as u64 - 1;
        let wanted = format!("uncompress {name}: more than {limit} bytes inside, which is the limit");
        assert!(error(name, limit).starts_with(wanted.split_once(": ").unwrap().0), "{name}");
        assert!(
            error(name, limit).contains(&format!("more than {limit} bytes inside")),
            "{}",
            error(name, limit)
        );
        let whole = fs::read(dir.path().join(name)).unwrap();
        let suffix = name.split_once('.').unwrap().1;
        let bad = format!("bad.{suffix}");
        for bytes in [
            [&whole[..], b"trailing data"].concat(),
            whole[..whole.len() - 1].to_vec(),
            whole[..whole.len() / 2].to_vec(),
            b"something else".to_vec(),
            Vec::new(),
        ] {
            fs::write(dir.path().join(&bad), &bytes).unwrap();
            assert!(peel_bytes(&bad, 1 << 30).is_err(), "{name}: {} bytes of {}", bytes.len(), whole.len());
        }
    }
    sh(dir.path(), "zip -q -1 two.zip disk.raw files/noise");
    let error = peel_bytes("two.zip", 1 << 30).err().unwrap().to_string();
    assert_eq!(error, "uncompress two.zip: zip: expected one member, found 2");
}

/// Figures for the files named in `FOLD_FILES`: `cargo test --test tests folds::measure -- --ignored --nocapture`.
#[test]
#[ignore = "needs FOLD_FILES"]
fn measure() {
    for path in std::env::var("FOLD_FILES").unwrap().split_whitespace().map(PathBuf::from) {
        let (unfolded, out, back) = round_trip(&path);
        let map = unfolded.map.map(|map| map.to_bytes()).unwrap_or_default();
        let len = fs::metadata(&path).unwrap().len();
        let peak = fs::read_to_string("/proc/self/status").unwrap();
        let peak = peak.lines().find(|l| l.starts_with("VmHWM")).unwrap().to_string();
        eprintln!(
            "{}: {len} bytes, plain {}, unfold {out:.1} s, fold {back:.1} s, map {} ({} zstd, {:.3} %), {peak}",
            path.display(),
            unfolded.plain.len(),
            map.len(),
            zstd::encode_all(&map[..], 19).unwrap().len(),
            100.0 * map.len() as f64 / len as f64,
        );
    }
}
