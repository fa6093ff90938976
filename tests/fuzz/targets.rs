//! What is done with hostile bytes: one function for each parser, which may refuse them, and must not panic, run
//! without end or take memory that the bytes do not account for.
//!
//! Two programs call them: `tests/hostile` with a few thousand mutations of real files in every run of the tests, and
//! libFuzzer (`ci/fuzz`) for as long as wanted.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use rehydrator::catalog::Catalog;
use rehydrator::digest::Digest;
use rehydrator::fold::{self, Effort, Map};
use rehydrator::inspect::inspect;
use rehydrator::openpgp::Keys;
use rehydrator::produce::Check;
use rehydrator::progress::{Mode, Progress};
use rehydrator::recipe::{Blob, Index, Tier};
use rehydrator::rehydrate::{MIN_MEMORY, Rehydrator};
use rehydrator::sink::Output;
use rehydrator::source::cluster::{Cache, ClusterMap, Clustered};
use rehydrator::source::delta::Delta;
use rehydrator::source::{Reader, Source, Zeros, blob, erofs, rootfs, squashfs};
use rehydrator::store::{self, Files, Store};
use rehydrator::stream::Stream;

/// Memory for decoded clusters, in bytes.
const CACHE: u64 = 16 << 20;
/// Reads are of this many bytes.
const READ: u64 = 256 << 10;
/// What a mutated stream may decompress to, in bytes.
const MAX_PLAIN: u64 = 8 << 20;

/// The end of a segment map.
pub const MAP_END: &[u8] = b"end.";

/// Something that takes hostile bytes.
pub type Target = fn(&[u8]);

/// Every target, under the name that `ci/fuzz` and the directories of seeds know it by.
pub const TARGETS: &[(&str, Target)] = &[
    ("blob", blob_target),
    ("dehydrated", dehydrated),
    ("delta", delta),
    ("erofs", |bytes| map(bytes, erofs::open)),
    ("index", index),
    ("inspect", look_into),
    ("map", segment_map),
    ("peel", peel),
    ("rootfs", initramfs),
    ("signature", signature),
    ("squashfs", |bytes| map(bytes, squashfs::open)),
    ("stream", stream),
    ("unfold", unfold),
];

/// Reads the start, the middle and the end.
fn read(source: &dyn Source) {
    let len = source.len();
    for offset in [0, len / 3, len.saturating_sub(READ)] {
        let mut buf = vec![0; READ.min(len - offset) as usize];
        let _ = source.read_at(offset, &mut buf);
        let _ = source.zeros_at(offset);
    }
}

fn blob_target(bytes: &[u8]) {
    if let Ok(source) = blob::open(Arc::new(bytes.to_vec()), Cache::new(CACHE)) {
        read(&source);
    }
}

/// What deltas are applied to.
pub fn delta_base() -> Vec<u8> {
    (0..64 << 10).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn delta(bytes: &[u8]) {
    if let Ok(source) = Delta::open(Arc::new(bytes.to_vec()), Arc::new(delta_base()), u64::MAX) {
        read(&source);
    }
}

fn map(bytes: &[u8], open: fn(Arc<dyn Source>) -> io::Result<ClusterMap>) {
    let image: Arc<dyn Source> = Arc::new(bytes.to_vec());
    if let Ok(map) = open(image.clone()) {
        read(&Clustered::new(map, image, Cache::new(CACHE)));
    }
}

fn initramfs(bytes: &[u8]) {
    if let Ok((image, map)) = rootfs::open(Arc::new(bytes.to_vec())) {
        read(&Clustered::new(map, image, Cache::new(CACHE)));
    }
}

/// The bytes are what stands before the checksum: mutated bytes with a wrong one would get no further than that.
fn segment_map(content: &[u8]) {
    let bytes = sealed(content);
    if let Ok(map) = Map::from_bytes(&bytes, u64::MAX) {
        assert!(
            Map::from_bytes(&map.to_bytes(), u64::MAX).is_ok_and(|again| again == map),
            "a map that does not come back"
        );
        let _ = fold::fold(&map, &mut Reader::new(&Zeros(MAX_PLAIN)), &mut Bounded(MAX_PLAIN), CACHE);
    }
}

/// Takes so many bytes.
struct Bounded(u64);

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(buf.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Bounded {}

/// A segment map, of what stands before its checksum.
pub fn sealed(content: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(content);
    [content, &crc.sum().to_le_bytes(), MAP_END].concat()
}

/// How a part of a directory becomes a blob: the first byte of it.
pub const AS_IS: u8 = 0;
/// Its bytes are the plain ones of a blob of seekable zstd.
pub const ZSTD: u8 = 1;
/// Its bytes are what stands before the checksum of a segment map.
pub const MAP: u8 = 2;

/// What an index calls the blob that part `n` of a directory becomes.
pub fn part(n: usize) -> Blob {
    Blob { sha256: format!("{n:064x}").parse().unwrap_or_else(|_| Digest::of(b"")), size: 0 }
}

/// The parts of a dehydrated directory in one piece: each has its length in front, in four bytes.
pub fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u32).to_le_bytes()[..], part].concat()).collect()
}

fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let (part, rest) = rest.split_at(rest.len().min(u32::from_le_bytes(*len) as usize));
        parts.push(part);
        bytes = rest;
    }
    parts
}

/// The files of the dehydrated directory that `parts` make. The first part is the index, as compact JSON. Digests are
/// right whatever the parts are: mutated bytes with a wrong one would get no further than that.
pub fn directory<P: AsRef<[u8]>>(parts: &[P]) -> BTreeMap<String, Vec<u8>> {
    let Some((index, parts)) = parts.split_first() else { return BTreeMap::new() };
    let mut index = String::from_utf8_lossy(index.as_ref()).into_owned();
    let mut files = BTreeMap::new();
    let text = |blob: &Blob| format!("\"sha256\":\"{}\",\"size\":{}", blob.sha256, blob.size);
    for (n, of) in parts.iter().enumerate() {
        let Some((kind, bytes)) = of.as_ref().split_first() else { continue };
        let zstd = |bytes: &[u8]| {
            let mut writer = blob::Writer::new(Vec::new(), 1, blob::FRAME);
            writer.write_all(bytes).and_then(|()| writer.finish()).unwrap_or_default()
        };
        let bytes = match *kind {
            ZSTD => zstd(bytes),
            MAP => zstd(&sealed(bytes)),
            _ => bytes.to_vec(),
        };
        let blob = Blob { sha256: Digest::of(&bytes), size: bytes.len() as u64 };
        index = index.replace(&text(&part(n + 1)), &text(&blob));
        files.insert(store::blob_path(&blob, None), bytes);
    }
    files.insert(store::INDEX_DIGEST.to_owned(), store::index_digest(index.as_bytes()).into_bytes());
    files.insert(store::INDEX.to_owned(), index.into_bytes());
    files
}

/// Files in memory.
struct Memory(BTreeMap<String, Vec<u8>>);

impl Files for Memory {
    fn name(&self) -> String {
        "memory".into()
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn Source>> {
        Ok(Arc::new(self.0.get(path).ok_or(io::ErrorKind::NotFound)?.clone()))
    }

    fn has(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }
}

/// Makes every artifact of a dehydrated directory, in both forms, and looks into it.
fn dehydrated(bytes: &[u8]) {
    /// Artifacts that are made.
    const ARTIFACTS: usize = 8;
    let Ok(store) = Store::of(Box::new(Memory(directory(&split(bytes))))) else { return };
    let store = Arc::new(store);
    let progress = Progress::new(Mode::None);
    for artifact in store.index.artifacts.iter().take(ARTIFACTS) {
        for form in [Tier::Uncompressed, Tier::Published] {
            if let Ok(rehydrator) = Rehydrator::new_for(store.clone(), MIN_MEMORY, form) {
                let mut out = Bounded(MAX_PLAIN);
                let _ = rehydrator.write(artifact, form, Check::Quick, &progress, &mut out);
                if let Ok(view) = rehydrator.parts(artifact).and_then(|parts| parts.view()) {
                    rehydrator.bounded(artifact.source, || read(&*view));
                }
            }
        }
    }
}

/// The first byte says which compression it is taken for.
fn peel(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let name = ["x.xz", "x.gz", "x.zip", "x.zst"][usize::from(kind % 4)];
    let Ok(mut file) = tempfile::tempfile() else { return };
    if file.write_all(bytes).is_ok()
        && let Ok(peeled) = fold::peel(file, name, &std::env::temp_dir(), MAX_PLAIN)
    {
        assert!(peeled.form.len() <= MAX_PLAIN.max(bytes.len() as u64), "more than was allowed");
    }
}

fn unfold(bytes: &[u8]) {
    let form: Arc<dyn Source> = Arc::new(bytes.to_vec());
    let Ok(unfolded) = fold::unfold(&form, &std::env::temp_dir(), Effort::Whole) else { return };
    if let Some(map) = unfolded.map {
        let mut folded = Vec::new();
        // What unfolds comes back, or is found out: that is for the proof of `dehydrate`.
        if fold::fold(&map, &mut Reader::new(&*unfolded.plain), &mut folded, CACHE).is_ok() {
            assert!(folded == bytes, "other bytes came back");
        }
    }
}

fn look_into(bytes: &[u8]) {
    if let Ok(report) = inspect(Arc::new(bytes.to_vec())) {
        let _ = report.to_string();
    }
}

fn stream(bytes: &[u8]) {
    if let Ok(stream) = Stream::parse(bytes) {
        let _ = Catalog::new(&stream);
    }
}

fn index(bytes: &[u8]) {
    if let Ok(index) = Index::from_json(bytes) {
        let again = Index::from_json(&index.to_json());
        assert!(again.is_ok_and(|i| i.to_json() == index.to_json()), "an index that does not come back");
    }
}

/// A signature of `data`, and a key ring, with the length of the signature in the first two bytes.
fn signature(bytes: &[u8]) {
    let Some((len, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (signature, keys) = rest.split_at(rest.len().min(u16::from_le_bytes(*len).into()));
    let mut ring = Keys::default();
    if ring.add(keys).is_ok() {
        let _ = ring.verify(signature, &b"data"[..]);
    }
}
