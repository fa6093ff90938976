//! The suite that every source must pass, and what is particular to blobs, deltas and the cluster cache.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rehydrator::source::cluster::{
    Cache, ClusterCodec, ClusterMap, Clustered, Extent, Origin, Trace, limited,
};
use rehydrator::source::delta::{Base, Delta};
use rehydrator::source::{Concat, File, Reader, Slice, Source, Zeros, blob};

/// Bytes that look like nothing in particular, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// What every source must do: the right bytes at odd offsets, byte by byte, whole, and an error past the end.
fn conform(source: &dyn Source, expected: &[u8]) {
    assert_eq!(source.len(), expected.len() as u64);
    let mut whole = vec![0xAA; expected.len()];
    source.read_at(0, &mut whole).unwrap();
    assert!(whole == expected, "the whole differs");
    for (offset, len) in
        [(0, 1), (1, 4096), (4095, 2), (4097, 8191), (65_535, 65_537), (expected.len() / 2, 1000)]
    {
        let offset = offset.min(expected.len());
        let len = len.min(expected.len() - offset);
        let mut buf = vec![0xAA; len];
        source.read_at(offset as u64, &mut buf).unwrap();
        assert!(buf == expected[offset..offset + len], "{len} bytes at {offset} differ");
    }
    for offset in (0..expected.len()).step_by(expected.len() / 257 + 1) {
        let mut byte = [0xAA];
        source.read_at(offset as u64, &mut byte).unwrap();
        assert_eq!(byte[0], expected[offset], "the byte at {offset} differs");
        let zeros = source.zeros_at(offset as u64) as usize;
        assert!(expected[offset..offset + zeros].iter().all(|&b| b == 0), "no zeros at {offset}");
    }
    assert_eq!(source.zeros_at(source.len()), 0);
    source.read_at(source.len(), &mut []).unwrap();
    for (offset, len) in [(source.len(), 1), (source.len() - 1, 2), (u64::MAX, 1), (source.len() + 1, 0)] {
        let error = source.read_at(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{len} bytes at {offset}");
    }
    let uses = Trace::of(source, usize::MAX).unwrap();
    assert!(uses.windows(2).all(|w| w[0].at + u64::from(w[0].len) <= w[1].at), "uses overlap or go back");
}

#[test]
fn simple_sources() {
    conform(&Zeros(100_000), &[0; 100_000]);
    let bytes = noise(1, 300_000);
    conform(&bytes, &bytes);
    let inner: Arc<dyn Source> = Arc::new(bytes.clone());
    conform(&Slice::new(inner.clone(), 777, 200_001).unwrap(), &bytes[777..200_778]);
    assert!(Slice::new(inner.clone(), 1, 300_000).is_err());
    let concat = Concat::new(vec![inner.clone(), Arc::new(Zeros(5)), Arc::new(Zeros(0)), inner]).unwrap();
    conform(&concat, &[&bytes[..], &[0; 5], &bytes].concat());
    assert!(Concat::new(vec![Arc::new(Zeros(u64::MAX)), Arc::new(Zeros(1))]).is_err());
}

#[test]
fn file_with_holes() {
    let mut file = rehydrator::io::SparseWriter::new(tempfile::tempfile().unwrap());
    let expected = [&noise(2, 10_000)[..], &[0; 1 << 20], &noise(3, 5000), &[0; 50_000]].concat();
    for piece in expected.chunks(33_333) {
        file.write_all(piece).unwrap();
    }
    let file = File::new(file.finish().unwrap()).unwrap();
    conform(&file, &expected);
    assert!(file.zeros_at(16_384) > 900_000, "the hole is not a hole");
}

fn seekable(plain: &[u8]) -> Vec<u8> {
    let mut writer = blob::Writer::new(Vec::new(), 3, blob::FRAME);
    writer.write_all(plain).unwrap();
    writer.finish().unwrap()
}

#[test]
fn blobs_of_seekable_zstd() {
    let plain = [noise(4, 3_000_000), vec![0; 6_000_000], noise(5, 1_234_567)].concat();
    let packed = seekable(&plain);
    conform(&blob::open(Arc::new(packed.clone()), Cache::new(1 << 24)).unwrap(), &plain);
    conform(&blob::open(Arc::new(packed.clone()), Cache::new(0)).unwrap(), &plain);
    assert!(zstd::decode_all(&packed[..]).unwrap() == plain, "zstd reads it too");

    // Damaged: an error, or never bytes that are not there.
    for at in (0..packed.len()).step_by(packed.len() / 97) {
        let mut bad = packed.clone();
        bad[at] ^= 0x40;
        if let Ok(source) = blob::open(Arc::new(bad), Cache::new(1 << 24)) {
            let mut whole = vec![0; source.len().min(1 << 24) as usize];
            if source.read_at(0, &mut whole).is_ok() {
                assert!(whole == plain, "a flipped byte at {at} went unnoticed");
            }
        }
    }
    for len in (0..packed.len()).step_by(packed.len() / 97) {
        assert!(blob::open(Arc::new(packed[..len].to_vec()), Cache::new(0)).is_err(), "cut at {len}");
    }
    let hostile = [&[0; 16][..], &0x07ff_ffffu32.to_le_bytes(), &[0], &0x8f92_eab1u32.to_le_bytes()].concat();
    let error = blob::open(Arc::new(hostile), Cache::new(0)).err().unwrap().to_string();
    assert!(error.contains("134217727 frames"), "{error}");
}

/// Applies a delta with `rdiff patch`.
fn rdiff_patch(base: &dyn Source, delta: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let [base_path, delta_path, out] = ["base", "delta", "out"].map(|name| dir.path().join(name));
    let mut file = rehydrator::io::SparseWriter::new(std::fs::File::create(&base_path).unwrap());
    io::copy(&mut Reader::new(base), &mut file).unwrap();
    file.finish().unwrap();
    std::fs::write(&delta_path, delta).unwrap();
    let status = std::process::Command::new("rdiff")
        .args([&"patch".into(), &base_path, &delta_path, &out])
        .status()
        .expect("rdiff must be installed: ci/deps test");
    assert!(status.success());
    std::fs::read(out).unwrap()
}

#[test]
fn deltas() {
    const ZEROS: NonZeroU64 = NonZeroU64::new(3 << 20).unwrap();
    let base = [noise(6, 5_000_000), vec![0; 2_000_000], noise(7, 1_000_003)].concat();
    let with_zeros: Arc<dyn Source> =
        Arc::new(Concat::new(vec![Arc::new(base.clone()), Arc::new(Zeros(ZEROS.get()))]).unwrap());
    let scanned = Base::scan(&base, ZEROS).unwrap();
    let index = scanned.index();

    let moved = [&noise(8, 12)[..], &base[8192..1_000_000], &noise(9, 100), &base[3..2_000_000]].concat();
    let holes =
        [&vec![0; 9_000_000][..], &base[4096..8192], &vec![0; 4096], &base[8192..80_000], &[0; 77]].concat();
    let ends_in_base = [&base[7_500_000..], &vec![0; 5_000_000][..]].concat();
    for (name, target, literals) in [
        ("empty", vec![], 0),
        ("the base", base.clone(), 16_000),
        ("unrelated", noise(10, 700_000), 700_000),
        ("moved", moved, 40_000),
        ("holes", holes, 12_000),
        ("the end of the base, then zeros", ends_in_base, 20_000),
        ("short", noise(11, 10), 10),
    ] {
        let delta = index.diff(&target, Vec::new()).unwrap();
        assert!(delta.len() < literals + 500, "{name}: a delta of {} bytes", delta.len());
        let source = Delta::open(Arc::new(delta.clone()), with_zeros.clone(), u64::MAX).unwrap();
        if target.is_empty() {
            assert!(source.is_empty());
        } else {
            conform(&source, &target);
        }
        assert!(rdiff_patch(&*with_zeros, &delta) == target, "{name}: rdiff patch differs");
        for len in 0..delta.len().min(300) {
            assert!(
                Delta::open(Arc::new(delta[..len].to_vec()), with_zeros.clone(), u64::MAX).is_err(),
                "{name}: cut at {len}"
            );
        }
        let long = [&delta[..], &[0]].concat();
        assert!(
            Delta::open(Arc::new(long), with_zeros.clone(), u64::MAX).is_err(),
            "{name}: a byte after the end"
        );
    }
    // A delta from rdiff itself is read as well.
    let outside = [0x72, 0x73, 0x02, 0x36, 0x45, 0xff, 0xff, 0x00];
    let small: Arc<dyn Source> = Arc::new(noise(12, 300));
    let error = Delta::open(Arc::new(outside.to_vec()), small, u64::MAX).err().unwrap().to_string();
    assert!(error.contains("a copy of 255 bytes at 255 of a base of 300"), "{error}");
}

/// Clusters of 160 KiB, read 40 KiB at a time, in an order that visits each four times: what is packed is in pieces of 64 KiB.
struct Counting {
    plain: Vec<u8>,
    decodes: AtomicU64,
}

const CLUSTER: usize = 160 << 10;

impl ClusterCodec for Counting {
    fn count(&self) -> u32 {
        (self.plain.len() / CLUSTER) as u32
    }
    fn decoded_len(&self, _: u32) -> u32 {
        CLUSTER as u32
    }
    fn decode(&self, id: u32, _: Vec<u8>) -> io::Result<Vec<u8>> {
        self.decodes.fetch_add(1, Ordering::Relaxed);
        Ok(self.plain[id as usize * CLUSTER..][..CLUSTER].to_vec())
    }
}

#[test]
fn a_planned_cache_decodes_what_its_budget_allows() {
    const CLUSTERS: usize = 100;
    // Half noise, half zeros, so that packing gains half.
    let plain: Vec<u8> = (0..CLUSTERS as u64)
        .flat_map(|i| [noise(i + 1, CLUSTER / 2), vec![0; CLUSTER / 2]].concat())
        .collect();
    let quarter = CLUSTER / 4;
    let mut extents = vec![];
    for round in 0..4 {
        for id in 0..CLUSTERS {
            let origin =
                Origin::Cluster { id: (id * 37 % CLUSTERS) as u32, offset: (round * quarter) as u32 };
            extents.push(Extent { start: (extents.len() * quarter) as u64, len: quarter as u64, origin });
        }
    }
    let expected: Vec<u8> = extents
        .iter()
        .flat_map(|e| match e.origin {
            Origin::Cluster { id, offset } => {
                plain[id as usize * CLUSTER + offset as usize..][..quarter].to_vec()
            }
            _ => unreachable!("all are clusters"),
        })
        .collect();
    for (budget, most) in [
        (CLUSTERS * CLUSTER, 100),
        (CLUSTERS * CLUSTER * 2 / 3, 100),
        (CLUSTERS * CLUSTER / 3, 300),
        (0, 540),
    ] {
        let codec = Arc::new(Counting { plain: plain.clone(), decodes: AtomicU64::new(0) });
        let cache = Cache::new(budget as u64);
        let map = ClusterMap { len: plain.len() as u64, extents: extents.clone(), codec: codec.clone() };
        let source = Clustered::new(map, Arc::new(Zeros(0)), cache.clone());
        let uses = cache.plan(&source);
        let mut out = vec![0; plain.len()];
        cache.with_plan(uses, 2, || {
            for (i, piece) in out.chunks_mut(125_000).enumerate() {
                cache.advance(i as u64 * 125_000);
                source.read_at(i as u64 * 125_000, piece).unwrap();
            }
        });
        assert!(out == expected, "budget {budget}: wrong bytes");
        let decodes = codec.decodes.load(Ordering::Relaxed);
        assert_eq!(cache.stats().clusters, CLUSTERS as u64);
        assert_eq!(cache.stats().decodes, decodes);
        assert!(decodes <= most, "budget {budget}: {decodes} decodes");
        conform(&source, &expected);
    }
}

/// The same clusters again and again, in a cache that has no room for them: decoding ends at the limit.
#[test]
fn decoding_is_limited() {
    let codec = Arc::new(Counting { plain: vec![1; 2 * CLUSTER], decodes: AtomicU64::new(0) });
    let extents = (0..100u32).map(|i| Extent {
        start: i.into(),
        len: 1,
        origin: Origin::Cluster { id: i % 2, offset: i },
    });
    let map = ClusterMap { len: 100, extents: extents.collect(), codec: codec.clone() };
    let source = Clustered::new(map, Arc::new(Zeros(0)), Cache::new(0));
    let error = limited(10 * CLUSTER as u64, || source.read_at(0, &mut [0; 100])).unwrap_err().to_string();
    assert!(error.contains("more than 1638400 bytes would have to be decoded"), "{error}");
    assert_eq!(codec.decodes.load(Ordering::Relaxed), 10);
    // Without a limit it is only slow, and a plan allows for what is read.
    source.read_at(0, &mut [0; 100]).unwrap();
}

/// Deltas that copy what is below them twice have more uses than any memory holds.
#[test]
fn a_trace_ends_at_its_bound() {
    let plain = seekable(&[7; 16]);
    let cache = Cache::new(0);
    let mut source: Arc<dyn Source> = Arc::new(blob::open(Arc::new(plain), cache.clone()).unwrap());
    for level in 0..40 {
        let copy = [&[0x45 + 3, 0][..], &(16u64 << level).to_be_bytes()].concat();
        let delta = [b"rs\x026", &copy[..], &copy, &[0]].concat();
        source = Arc::new(Delta::open(Arc::new(delta), source, u64::MAX).unwrap());
    }
    assert!(Trace::of(&*source, 1000).is_none() && cache.plan(&*source).is_empty());
    assert_eq!(Trace::of(&*Slice::new(source, 0, 160).map(Arc::new).unwrap(), 10).unwrap().len(), 10);
    // Parts without a cluster count too: a step each.
    let mut zeros: Arc<dyn Source> = Arc::new(Zeros(16));
    for _ in 0..40 {
        zeros = Arc::new(Concat::new(vec![zeros.clone(), zeros]).unwrap());
    }
    assert!(Trace::of(&*zeros, usize::MAX).is_none());
}

/// Tables of open sources take their share of the memory, and no more.
#[test]
fn tables_are_limited() {
    let cache = Cache::new(100 << 20);
    let room = cache.table_room();
    assert_eq!(room, (64 + 50) << 20);
    cache.reserve(room - 15, "the commands of a delta").unwrap();
    let error = cache.reserve(16, "a segment map").unwrap_err().to_string();
    assert!(error.contains("a segment map take 16 bytes") && error.contains("--memory"), "{error}");
    assert_eq!(cache.table_room(), 15);
    let delta = [0x72, 0x73, 0x02, 0x36, 0x45, 0, 1, 0];
    let base: Arc<dyn Source> = Arc::new(Zeros(1));
    let error = Delta::open(Arc::new(delta.to_vec()), base, cache.table_room()).err().unwrap().to_string();
    assert!(error.contains("more than 0 commands"), "{error}");
}
