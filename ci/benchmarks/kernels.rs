//! The inner loops, one core each, beside what a general tool's library does with the same bytes: `ci/bench --only kernels`.
//!
//! The bytes are those of this very program, which are as varied as those of an operating system; qemu-img, xz, gzip
//! and mksquashfs make of them what the program reads.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark fails by stopping; criterion's macros document nothing"
)]

use std::fs;
use std::hint::black_box;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use flate2::write::ZlibEncoder;
use rehydrator::digest::Digest;
use rehydrator::fold::{Compression, Effort, Map, fold, unfold, wrap};
use rehydrator::source::cluster::{Cache, Clustered};
use rehydrator::source::delta::{Base, Delta};
use rehydrator::source::{Concat, File, Reader, Source, Zeros, blob, squashfs};

/// What each kernel works on.
const BYTES: usize = 16 << 20;
/// And what is read of it at a time.
const PIECE: usize = 1 << 20;
/// Level of a blob in profile fast.
const ZSTD_LEVEL: i32 = 9;
/// What follows the base of a delta, as in a dehydrated directory.
const ZEROS: NonZeroU64 = NonZeroU64::new(64 << 30).expect("not 0");
/// Memory for one encoder at a time.
const MEMORY: u64 = 0;

struct Bytes {
    dir: tempfile::TempDir,
    plain: Vec<u8>,
}

impl Bytes {
    fn new() -> Self {
        let mut plain = fs::read(std::env::current_exe().unwrap()).unwrap();
        let pattern = plain.clone();
        while plain.len() < BYTES {
            // Not the same again, which a window would find.
            plain.extend(pattern.iter().map(|b| b ^ 0x55));
        }
        plain.truncate(BYTES);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk.raw"), &plain).unwrap();
        Self { dir, plain }
    }

    /// The file that a shell command makes.
    fn made(&self, command: &str, file: &str) -> PathBuf {
        let status = Command::new("sh").args(["-ec", command]).current_dir(self.dir.path()).status().unwrap();
        assert!(status.success(), "{command}");
        self.dir.path().join(file)
    }
}

fn source(path: &Path) -> Arc<dyn Source> {
    Arc::new(File::new(fs::File::open(path).unwrap()).unwrap())
}

/// Reads all of a source.
fn read(source: &dyn Source) {
    let (len, mut buf) = (source.len() as usize, vec![0; PIECE]);
    for at in (0..len).step_by(PIECE) {
        source.read_at(at as u64, &mut buf[..PIECE.min(len - at)]).unwrap();
    }
    black_box(buf);
}

fn folded(map: &Map, plain: &dyn Source) {
    fold(map, &mut Reader::new(plain), &mut io::sink(), MEMORY).unwrap();
}

/// The peer of what zlib made.
const ZLIB: &str = "peer: zlib-rs, compress";

fn deflated(plain: &[u8], level: u32) {
    let mut zlib = ZlibEncoder::new(io::sink(), flate2::Compression::new(level));
    zlib.write_all(plain).unwrap();
    zlib.finish().unwrap();
}

fn group<'a>(c: &'a mut Criterion, name: &str, bytes: u64) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes)).sample_size(10);
    group
}

fn digests(c: &mut Criterion) {
    let bytes = Bytes::new();
    let mut group = group(c, "digest", BYTES as u64);
    group.bench_function("SHA-256", |b| b.iter(|| Digest::of(&bytes.plain)));
    group.bench_function("BLAKE3", |b| b.iter(|| blake3::hash(&bytes.plain)));
}

fn blobs(c: &mut Criterion) {
    let bytes = Bytes::new();
    let mut writer = blob::Writer::new(Vec::new(), ZSTD_LEVEL, blob::FRAME);
    writer.write_all(&bytes.plain).unwrap();
    let packed: Arc<dyn Source> = Arc::new(writer.finish().unwrap());
    let whole = zstd::bulk::compress(&bytes.plain, ZSTD_LEVEL).unwrap();
    let mut group = group(c, "blob", BYTES as u64);
    group.bench_function("read", |b| {
        b.iter(|| read(&blob::open(packed.clone(), Cache::new(64 << 20)).unwrap()))
    });
    group.bench_function("peer: zstd, decompress whole", |b| {
        b.iter(|| zstd::bulk::decompress(&whole, BYTES).unwrap())
    });
}

fn rootfs(c: &mut Criterion) {
    let bytes = Bytes::new();
    let image = source(&bytes.made(
        "mksquashfs disk.raw root.squashfs -comp xz -quiet -no-progress -noappend >&2",
        "root.squashfs",
    ));
    let lzma = fs::read(bytes.made("xz -6 -T1 -k disk.raw", "disk.raw.xz")).unwrap();
    let mut group = group(c, "live rootfs, xz", BYTES as u64);
    group.bench_function("read", |b| {
        b.iter(|| {
            let map = squashfs::open(image.clone()).unwrap();
            read(&Clustered::new(map, image.clone(), Cache::new(64 << 20)))
        });
    });
    group.bench_function("peer: liblzma, decompress whole", |b| {
        b.iter(|| io::copy(&mut liblzma::read::XzDecoder::new(&lzma[..]), &mut io::sink()).unwrap());
    });
}

/// A target that has the base's blocks in another order, and bytes of its own between them.
fn delta(c: &mut Criterion) {
    let bytes = Bytes::new();
    let mut target = Vec::with_capacity(BYTES + BYTES / 64);
    for piece in bytes.plain.chunks(64 << 10).rev() {
        target.extend_from_slice(piece);
        target.extend(piece[..512].iter().map(|b| !b));
    }
    let plain: Arc<dyn Source> = Arc::new(bytes.plain);
    let base = Base::scan(&*plain, ZEROS).unwrap();
    let ops: Arc<dyn Source> = Arc::new(base.index().diff(&target, Vec::new()).unwrap());
    let with_zeros: Arc<dyn Source> =
        Arc::new(Concat::new(vec![plain.clone(), Arc::new(Zeros(ZEROS.get()))]).unwrap());
    let index = base.index();
    let mut make = group(c, "delta, make", target.len() as u64);
    make.bench_function("hash the blocks of the base", |b| b.iter(|| Base::scan(&*plain, ZEROS).unwrap()));
    make.bench_function("find them in the target", |b| b.iter(|| index.diff(&target, io::sink()).unwrap()));
    make.finish();
    let mut apply = group(c, "delta, apply", target.len() as u64);
    apply.bench_function("read", |b| {
        b.iter(|| read(&Delta::open(ops.clone(), with_zeros.clone(), u64::MAX).unwrap()))
    });
    apply.bench_function("peer: copy", |b| {
        b.iter_batched(
            || vec![0; target.len()],
            |mut to| to.copy_from_slice(black_box(&target)),
            BatchSize::LargeInput,
        );
    });
}

/// Opens up what qemu-img compressed, and closes it again.
fn disks(c: &mut Criterion) {
    let bytes = Bytes::new();
    for (name, options) in
        [("VMDK", "-O vmdk -o subformat=streamOptimized"), ("qcow2, compressed", "-O qcow2 -c")]
    {
        let image =
            source(&bytes.made(&format!("qemu-img convert -f raw {options} disk.raw image"), "image"));
        let opened = unfold(&image, bytes.dir.path(), Effort::Whole).unwrap();
        let map = opened.map.unwrap();
        let mut group = group(c, name, BYTES as u64);
        group.bench_function("unfold", |b| {
            b.iter(|| unfold(&image, bytes.dir.path(), Effort::Whole).unwrap())
        });
        group.bench_function("fold", |b| b.iter(|| folded(&map, &*opened.plain)));
        group.bench_function(ZLIB, |b| {
            b.iter(|| bytes.plain.chunks(64 << 10).for_each(|grain| deflated(grain, 6)));
        });
    }
}

/// Makes published files again.
fn published(c: &mut Criterion) {
    let bytes = Bytes::new();
    let plain: Arc<dyn Source> = Arc::new(bytes.plain.clone());
    for (tool, options, file, compression, level) in [
        ("xz", "-6 -T1 -kf disk.raw", "disk.raw.xz", Compression::Xz, 6),
        ("gzip", "-6 -kf disk.raw", "disk.raw.gz", Compression::Gzip, 6),
        ("gzip", "-9 -kf disk.raw", "disk.raw.gz", Compression::Gzip, 9),
        ("zip", "-9 -qj disk.zip disk.raw", "disk.zip", Compression::Zip, 9),
    ] {
        let file = fs::File::open(bytes.made(&format!("{tool} {options}"), file)).unwrap();
        let map = wrap(&file, compression, &plain, Effort::Whole, MEMORY).unwrap().unwrap();
        let mut group = group(c, &format!("published, {tool} -{level}"), BYTES as u64);
        group.bench_function("fold", |b| b.iter(|| folded(&map, &*plain)));
        if compression == Compression::Xz {
            group.bench_function("peer: liblzma, compress", |b| {
                b.iter(|| {
                    let mut xz = liblzma::write::XzEncoder::new(io::sink(), level);
                    xz.write_all(&bytes.plain).unwrap();
                    xz.finish().unwrap();
                });
            });
        } else {
            group.bench_function(ZLIB, |b| b.iter(|| deflated(&bytes.plain, level)));
        }
    }
}

criterion_group!(kernels, digests, blobs, rootfs, delta, disks, published);
criterion_main!(kernels);
