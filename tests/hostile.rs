//! Hostile bytes: real files of the real tools, mutated at random, for every parser.
//!
//! The same seeds start libFuzzer (`ci/fuzz`), which goes on where this stops.

#[path = "fuzz/targets.rs"]
pub(crate) mod targets;

use std::fs;
use std::io::Write;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::fold;
use rehydrator::recipe::{Artifact, Blob, FORMAT_VERSION, Index, NamedFile, SourceSpec, StreamFile, Tier};
use rehydrator::source::cluster::{Cache, Clustered};
use rehydrator::source::delta::Base;
use rehydrator::source::{Source, blob, rootfs};

/// How long each parser is tried.
const TIME: Duration = Duration::from_secs(2);
/// The longest that one input may take; a hundred times what any should.
const HANG: Duration = Duration::from_secs(20);
/// The most memory that one input may take, beside what the test had before, in bytes. libFuzzer has a like bound.
const MEMORY: u64 = 512 << 20;
/// Tries at least, however slow.
const TRIES: u64 = 100;

/// Runs a shell script in `dir`; `$CI` is the directory of the project's scripts.
fn sh(dir: &Path, script: &str) {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("ci");
    let out = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .env("CI", ci)
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()))
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Files made by a script, which are the ones called `seed*`.
fn made_by(script: &str) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    sh(dir.path(), &format!("{TREE}\n{script}"));
    let mut paths: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("seed"));
    paths.sort();
    assert!(!paths.is_empty(), "{script}: no seed");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// A small tree, and a small disk with a partition.
const TREE: &str = "
    mkdir -p tree/dir && help '*' > tree/text && head -c 20000 /bin/bash > tree/dir/program
    for i in 1 2 3 4 5; do echo file $i > tree/dir/$i; done; ln tree/dir/1 tree/link; ln -s text tree/symlink
    truncate -s 100000 tree/hole
    truncate -s 3M disk; printf 'label: gpt\\nstart=2048, size=1800, type=U, name=EFI-SYSTEM\\n' | sfdisk -q disk
    truncate -s 900K fat; mkfs.vfat fat > log; mcopy -i fat tree/text ::; dd if=fat of=disk bs=512 seek=2048 conv=notrunc status=none";

fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "blob" => {
            let mut writer = blob::Writer::new(Vec::new(), 3, blob::FRAME);
            writer.write_all(&fs::read("/bin/bash").unwrap()[..200_000]).unwrap();
            vec![writer.finish().unwrap()]
        }
        "delta" => {
            let dir = tempfile::tempdir().unwrap();
            let base = targets::delta_base();
            fs::write(dir.path().join("base"), &base).unwrap();
            fs::write(dir.path().join("new"), [&base[5000..40_000], b"something new", &base[..9000]].concat()).unwrap();
            sh(dir.path(), "rdiff signature base sig && rdiff delta sig new delta");
            vec![fs::read(dir.path().join("delta")).unwrap()]
        }
        "erofs" => made_by(
            "n=0; for options in '' -zlzma -zlz4hc '-zlzma -Efragments,dedupe -C65536' '-zdeflate -Eztailpacking'; do
                 n=$((n + 1)); $CI/trixie exec mkfs.erofs --quiet $options seed$n tree
             done",
        ),
        "squashfs" => made_by(
            "for c in zstd xz gzip; do mksquashfs tree seed-$c -comp $c -quiet -no-progress -b 64K; done
             mksquashfs tree seed-none -quiet -no-progress -noI -noD -noF -noX",
        ),
        "rootfs" => made_by(
            "mksquashfs tree root.squashfs -quiet -no-progress; $CI/trixie exec mkfs.erofs --quiet -zlzma root.erofs tree
             for f in root.squashfs root.erofs; do echo $f | cpio --quiet -o -H newc > seed-$f; done",
        ),
        "peel" => made_by(
            "put() { printf \"$1\" > seed$2; cat >> seed$2; }
             xz -c tree/text | put '\\0' 0; gzip -c tree/text | put '\\1' 1
             zip -9jq x.zip tree/text; put '\\2' 2 < x.zip; zstd -qc tree/text | put '\\3' 3",
        ),
        "unfold" => made_by(
            "qemu-img convert -O vmdk -o subformat=streamOptimized disk seed.vmdk; qemu-img convert -c -O qcow2 disk seed.qcow2
             tar -czf seed.tar.gz tree/text; tar -cf seed.ova --format=ustar seed.vmdk",
        ),
        "inspect" => made_by(
            "qemu-img convert -O vmdk -o subformat=streamOptimized disk seed.vmdk; qemu-img convert -c -O qcow2 disk seed.qcow2
             qemu-img convert -O vpc disk seed.vhd; qemu-img convert -O vhdx disk seed.vhdx; cp disk seed.raw
             gzip -c disk > seed.gz; xz -c disk > seed.xz; tar -cf seed.tar tree disk
             mke2fs -q -t ext4 -d tree ext4 1M; cp ext4 seed.ext4; xorriso -as mkisofs -quiet -R -o seed.iso tree 2>/dev/null
             mksquashfs tree seed.squashfs -quiet -no-progress",
        ),
        "map" => seeds("unfold")
            .into_iter()
            .map(|form| {
                let unfolded = fold::unfold(&(Arc::new(form) as Arc<dyn Source>), &std::env::temp_dir(), fold::Effort::Whole).unwrap();
                let mut map = unfolded.map.expect("a map").to_bytes();
                map.truncate(map.len() - 4 - targets::MAP_END.len());
                map
            })
            .collect(),
        "stream" => ["fcos.json", "rhcos.json"]
            .map(|name| {
                fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("stream-metadata/samples").join(name)).unwrap()
            })
            .into(),
        "dehydrated" => vec![targets::join(&small_directory())],
        "index" => vec![some_index().to_json()],
        "signature" => {
            let seed = made_by(
                "export GNUPGHOME=$PWD/gnupg; mkdir -m 700 gnupg
                 gpg --batch --quiet --passphrase '' --quick-generate-key someone@example.invalid ed25519 sign never
                 printf data | gpg --batch --detach-sign > seed1; gpg --export > seed2; gpgconf --kill gpg-agent",
            );
            vec![[&(seed[0].len() as u16).to_le_bytes()[..], &seed[0], &seed[1]].concat()]
        }
        other => panic!("{other} has no seeds"),
    }
}

fn some_index() -> Index {
    let blob = |n: u8| Blob { sha256: Digest::of(&[n]), size: 1000 + u64::from(n) };
    let artifact = |name: &str, source| Artifact {
        arch: "x86_64".into(),
        platform: "metal".into(),
        format: "raw.xz".into(),
        file: "disk".into(),
        blake3: None,
        tier: Tier::Uncompressed,
        published: NamedFile { name: format!("{name}.xz"), blob: blob(1) },
        output: NamedFile { name: name.into(), blob: blob(2) },
        signature: Some(blob(3)),
        source,
        published_map: None,
        encoders: ["a 1".to_owned()].into(),
        not_published: Some("nobody knows".into()),
        map: None,
        stored: 77,
    };
    Index {
        format_version: FORMAT_VERSION,
        generator: "a test".into(),
        stream: StreamFile { name: "stable".into(), blob: blob(0) },
        artifacts: vec![artifact("a.raw", 1), artifact("b.raw", 3)],
        unhandled: vec![],
        previous: vec![],
        sources: vec![
            SourceSpec::Zeros { size: 1 << 30 },
            SourceSpec::Stored { blob: blob(4) },
            SourceSpec::Rootfs { image: 1, plain_size: 1 << 20 },
            SourceSpec::Delta { blob: blob(5), plain_size: 1 << 20, base: vec![1, 2, 0] },
        ],
    }
}

/// The parts of a small dehydrated directory ([`targets::directory`]) with every kind of source and map: the files of an
/// EROFS live rootfs, a disk as a delta over them, a qcow2 as a delta over that, and a gzip file that preflate makes.
pub(crate) fn small_directory() -> Vec<Vec<u8>> {
    const HOLE: u64 = 64 << 30;
    let seeds = made_by(
        "$CI/trixie exec mkfs.erofs --quiet -zlzma root.erofs tree; echo root.erofs | cpio --quiet -o -H newc > seed0
         mv disk seed1; qemu-img convert -c -O qcow2 seed1 seed2; head -c 300000 /bin/bash > seed3
         python3 -c 'import zlib; plain = open(\"seed3\", \"rb\").read(); z = zlib.compressobj(6, zlib.DEFLATED, 31)
packed = b\"\".join(z.compress(plain[i:i + 90000]) + z.flush(zlib.Z_SYNC_FLUSH) for i in range(0, len(plain), 90000)) + z.flush()
open(\"seed4\", \"wb\").write(packed)'",
    );
    let [image, disk, qcow2, plain, gzip] = <[Vec<u8>; 5]>::try_from(seeds).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&gzip).unwrap();
    let shared: Arc<dyn Source> = Arc::new(plain.clone());
    let effort = fold::Effort::Whole;
    let unwrapped = fold::wrap(&file, fold::Compression::Gzip, &shared, effort, 1 << 30).unwrap().unwrap();
    assert!(unwrapped.encoders().iter().any(|e| e.starts_with("preflate")), "made without preflate");
    let unfolded =
        fold::unfold(&(Arc::new(qcow2.clone()) as Arc<dyn Source>), &std::env::temp_dir(), effort).unwrap();

    let (files, map) = rootfs::open(Arc::new(image.clone())).unwrap();
    let rootfs_size = map.len;
    let view = Clustered::new(map, files, Cache::new(1 << 20));
    let delta = |base: &dyn Source, target: &dyn Source| {
        let base = Base::scan(base, NonZeroU64::new(HOLE).unwrap()).unwrap();
        [&[targets::ZSTD][..], &base.index().diff(target, Vec::new()).unwrap()].concat()
    };
    let content = |map: &fold::Map| {
        let bytes = map.to_bytes();
        [&[targets::MAP][..], &bytes[..bytes.len() - 4 - targets::MAP_END.len()]].concat()
    };
    let artifact = |platform: &str, source: usize, output: &[u8]| {
        let output = NamedFile {
            name: format!("{platform}.raw"),
            blob: Blob { sha256: Digest::of(output), size: output.len() as u64 },
        };
        Artifact {
            arch: "x86_64".into(),
            platform: platform.into(),
            format: "raw".into(),
            file: "disk".into(),
            blake3: None,
            tier: Tier::Published,
            published: output.clone(),
            output,
            signature: None,
            source,
            published_map: None,
            encoders: [].into(),
            not_published: None,
            map: None,
            stored: 0,
        }
    };
    let part = targets::part;
    let mut folded = artifact("qemu", 4, &qcow2);
    folded.map = Some(part(5));
    let mut wrapped = artifact("aws", 5, &plain);
    wrapped.published = NamedFile {
        name: "aws.raw.gz".into(),
        blob: Blob { sha256: Digest::of(&gzip), size: gzip.len() as u64 },
    };
    wrapped.published_map = Some(part(6));
    let (disk_size, plain_size) = (disk.len() as u64, unfolded.plain.len());
    let index = Index {
        format_version: FORMAT_VERSION,
        generator: "a test".into(),
        stream: StreamFile { name: "stable".into(), blob: Blob { sha256: Digest::of(b""), size: 0 } },
        artifacts: vec![artifact("rootfs", 0, &image), artifact("metal", 3, &disk), folded, wrapped],
        unhandled: vec![],
        previous: vec![],
        sources: vec![
            SourceSpec::Stored { blob: part(1) },
            SourceSpec::Rootfs { image: 0, plain_size: rootfs_size },
            SourceSpec::Zeros { size: HOLE },
            SourceSpec::Delta { blob: part(2), plain_size: disk_size, base: vec![1, 2] },
            SourceSpec::Delta { blob: part(3), plain_size, base: vec![3, 2] },
            SourceSpec::Zstd { blob: part(4), plain_size: plain.len() as u64 },
        ],
    };
    vec![
        serde_json::to_vec(&index).unwrap(),
        [&[targets::AS_IS][..], &image].concat(),
        delta(&view, &disk),
        delta(&disk, &*unfolded.plain),
        [&[targets::ZSTD][..], &plain].concat(),
        content(&unfolded.map.unwrap()),
        content(&unwrapped),
    ]
}

/// A random number generator, good enough to break things.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }

    /// Changes a few places of `bytes`, most of them near the start, where headers are.
    pub(crate) fn mutate(&mut self, bytes: &mut Vec<u8>) {
        const TELLING: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 40];
        for _ in 0..=self.below(4) {
            let range = [64, 2048, bytes.len()][self.below(3)].min(bytes.len());
            let at = self.below(range);
            let width = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
            let telling = TELLING[self.below(TELLING.len())];
            match self.below(6) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at..at + width].copy_from_slice(&telling.to_le_bytes()[..width]),
                2 => bytes[at..at + width].copy_from_slice(&telling.to_be_bytes()[8 - width..]),
                3 => bytes.truncate(at),
                4 => {
                    let from = self.below(bytes.len());
                    let len = self.below(64).min(bytes.len() - from).min(bytes.len() - at);
                    bytes.copy_within(from..from + len, at);
                }
                _ => {
                    let n = self.below(256) as u8;
                    bytes[at..at + width].iter_mut().for_each(|b| *b = b.wrapping_add(n));
                }
            }
        }
    }
}

/// Says what an input did, and keeps it.
fn complaint(name: &str, what: &str, did: &str, bytes: &[u8]) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{name}"));
    fs::write(&path, bytes).unwrap();
    format!("{name}: {what}: {did}; the input is in {}", path.display())
}

/// Memory of this process that is in use, in bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Looks, while a target works on an input, at how long it takes and how much memory, and ends the process when it is more
/// than it may be: a target that never returns, or that the kernel kills, would name no input.
struct Watch(Arc<Mutex<Option<Trial>>>);

/// An input that a target works on.
struct Trial {
    start: Instant,
    what: String,
    bytes: Arc<Vec<u8>>,
}

impl Watch {
    fn new(name: &str, hang: Duration) -> Self {
        let trial = Arc::new(Mutex::new(None::<Trial>));
        let (name, before, watched) = (name.to_owned(), resident(), Arc::downgrade(&trial));
        std::thread::spawn(move || {
            while let Some(trial) = watched.upgrade() {
                if let Some(Trial { start, what, bytes }) = &*trial.lock().unwrap() {
                    let taken = resident().saturating_sub(before);
                    if start.elapsed() > hang || taken > MEMORY {
                        let did = format!("took {:?} and {} MiB so far", start.elapsed(), taken >> 20);
                        eprintln!("{}", complaint(&name, what, &did, bytes));
                        std::process::exit(1);
                    }
                }
                drop(trial);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self(trial)
    }

    fn begin(&self, what: &str, bytes: &Arc<Vec<u8>>) {
        let trial = Trial { start: Instant::now(), what: what.to_owned(), bytes: bytes.clone() };
        *self.0.lock().unwrap() = Some(trial);
    }

    fn end(&self) {
        *self.0.lock().unwrap() = None;
    }
}

/// That a target without end, and one that takes too much, are found while they run.
#[test]
fn the_watch_ends_what_goes_too_far() {
    let watched = std::env::var("REHYDRATOR_WATCHED");
    if let Ok(kind) = &watched {
        let watch = Watch::new("watch", Duration::from_secs(1));
        watch.begin(kind, &Arc::new(b"the input".to_vec()));
        let taken = vec![1u8; if kind == "memory" { MEMORY as usize + (64 << 20) } else { 0 }];
        std::thread::sleep(HANG);
        panic!("{} bytes, and nobody saw", taken.len());
    }
    for kind in ["memory", "time"] {
        let start = Instant::now();
        let own = std::env::current_exe().unwrap();
        let output = Command::new(own)
            .args(["--exact", "hostile::the_watch_ends_what_goes_too_far", "--nocapture"])
            .env("REHYDRATOR_WATCHED", kind)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("watch: {kind}: took ")), "{said}");
        assert!(start.elapsed() < HANG, "{said}");
    }
}

/// Tries mutations of the seeds; a failure leaves its input in a file.
fn attack(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|(n, _)| *n == name).unwrap();
    let seeds = seeds(name);
    if let Some(dir) = std::env::var_os("REHYDRATOR_SEEDS") {
        let dir = Path::new(&dir).join(name);
        fs::create_dir_all(&dir).unwrap();
        for (i, seed) in seeds.iter().enumerate() {
            fs::write(dir.join(i.to_string()), seed).unwrap();
        }
    }
    let watch = Watch::new(name, HANG);
    let try_one = |what: &str, bytes: Vec<u8>| {
        let bytes = Arc::new(bytes);
        watch.begin(what, &bytes);
        let done = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        watch.end();
        if done.is_err() {
            panic!("{}", complaint(name, what, "panicked", &bytes));
        }
    };
    for (i, seed) in seeds.iter().enumerate() {
        try_one(&format!("seed {i}"), seed.clone());
    }
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let start = Instant::now();
    let mut n = 0;
    while n < TRIES || start.elapsed() < TIME {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        random.mutate(&mut bytes);
        try_one(&format!("mutation {n}"), bytes);
        n += 1;
    }
    eprintln!("{name}: {n} mutations");
}

macro_rules! attacks {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            attack(stringify!($name));
        })*

        #[test]
        fn every_target_is_attacked() {
            let attacked = [$(stringify!($name)),*];
            let targets: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(targets, attacked);
        }
    };
}

attacks!(blob dehydrated delta erofs index inspect map peel rootfs signature squashfs stream unfold);
