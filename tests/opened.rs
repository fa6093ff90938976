//! Hostile dehydrated directories, opened and rehydrated by the whole program: exit code 0 or 1, in bounded time and memory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::fold::{Map, fold};
use serde_json::{Value, json};

use crate::hostile::targets::{self, AS_IS, MAP, ZSTD};
use crate::hostile::{Random, small_directory};
use crate::tools::example::rehydrator;

/// What `--memory` says, in MiB.
const MEMORY: u64 = 256;
/// The most memory that the program may take: that, and 128 MiB.
const MOST: u64 = (MEMORY + 128) << 20;
/// The longest that it may take.
const LONGEST: Duration = Duration::from_secs(10);

/// What the program did.
struct Done {
    code: Option<i32>,
    error: String,
    peak: u64,
    took: Duration,
}

/// Writes the files of a directory.
fn write(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Runs the program on the directory that `parts` make, and ends it when it takes too long or too much.
fn run(parts: &[Vec<u8>], args: &[&str]) -> Done {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write(dir.path(), &targets::directory(parts));
    let mut command = rehydrator();
    command.args(args).arg("--data").arg(dir.path());
    let start = Instant::now();
    let errors = dir.path().join("stderr");
    let mut child = command.stdout(Stdio::null()).stderr(fs::File::create(&errors).unwrap()).spawn().unwrap();
    let peak = watch(&mut child, start);
    let code = child.wait().unwrap().code();
    let error = String::from_utf8_lossy(&fs::read(&errors).unwrap()).into_owned();
    Done { code, error, peak, took: start.elapsed() }
}

/// The most memory that `child` has had when it ends, or is ended.
fn watch(child: &mut Child, start: Instant) -> u64 {
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let now = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10;
        peak = peak.max(now);
        if peak > MOST || start.elapsed() > LONGEST {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    peak
}

/// Rehydrates a platform.
fn rehydrate<'a>(platform: &'a str, form: &[&'a str]) -> Vec<&'a str> {
    let memory = ["rehydrate", "-", "--memory", "256M", "--disk", platform];
    [&memory[..], form].concat()
}

/// The program fails with an error that has `wanted` in it, within the bounds.
fn refuses(parts: &[Vec<u8>], args: &[&str], wanted: &str) {
    let Done { code, error, peak, took } = run(parts, args);
    let figures = format!("{took:?}, {} MiB", peak >> 20);
    eprintln!("{wanted}: {figures}");
    assert_eq!(code, Some(1), "{figures}: {error}");
    assert!(error.contains(wanted) && !error.contains("panicked"), "expected {wanted:?}: {error}");
    assert!(peak <= MOST && took <= LONGEST, "{figures}: {error}");
}

/// An index of these sources, with the last one as the artifact `metal` of `size` bytes.
fn index(sources: &[Value], size: u64, more: &Value) -> Vec<u8> {
    let zero = Digest::of(b"another");
    let file = json!({ "name": "evil.raw", "sha256": zero, "size": size });
    let mut artifact = json!({
        "arch": "x86_64", "platform": "metal", "format": "raw", "file": "disk", "published": file, "output": file,
        "tier": "published", "source": sources.len() - 1, "stored": 0,
    });
    artifact.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({
        "format-version": 2, "generator": "a test", "artifacts": [artifact], "sources": sources,
        "stream": { "name": "evil", "sha256": zero, "size": 0 },
    })
    .to_string()
    .into_bytes()
}

/// A source of this kind that reads part `n` of the directory, which is the text that `targets::directory` looks for.
fn source(kind: &str, n: usize, more: &Value) -> Value {
    let blob = targets::part(n);
    let mut source = json!({ "kind": kind, "sha256": blob.sha256, "size": blob.size });
    source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    source
}

/// A delta of these copies: where from, and how long, in one byte each.
fn delta(copies: &[(u8, u8)]) -> Vec<u8> {
    let copies = copies.iter().flat_map(|&(from, len)| [0x45, from, len]);
    [&[ZSTD][..], b"rs\x026"].concat().into_iter().chain(copies).chain([0]).collect()
}

#[test]
fn sources_over_sources() {
    let over = |i: usize| source("delta", 1, &json!({ "plain-size": 1, "base": [i] }));
    let chain = |n| {
        let sources: Vec<Value> =
            [json!({ "kind": "zeros", "size": 1 })].into_iter().chain((0..n).map(over)).collect();
        vec![index(&sources, 1, &json!({})), delta(&[(0, 1)])]
    };
    for n in [16, 4000] {
        refuses(
            &chain(n),
            &rehydrate("metal", &[]),
            "source 16: sources over each other: 17, at most 16 are read",
        );
    }
    refuses(&chain(20_000), &rehydrate("metal", &[]), "sources: 20001, at most 4096 are read");
    // What is within the bound is read.
    refuses(&chain(15), &rehydrate("metal", &[]), "sha256 mismatch");
    for command in ["list", "verify"] {
        refuses(&chain(16), &[command], "sources over each other");
    }
}

#[test]
fn live_rootfs_in_live_rootfs() {
    let rootfs = |image: usize| json!({ "kind": "rootfs", "image": image, "plain-size": 1 });
    let sources = [json!({ "kind": "zeros", "size": 1 }), rootfs(0), rootfs(1), rootfs(2)];
    refuses(
        &[index(&sources, 1, &json!({}))],
        &rehydrate("metal", &[]),
        "source 3: live rootfs in each other: 3, at most 2 are read",
    );
}

#[test]
fn a_base_of_many_sources() {
    let base = vec![0; 16_385];
    let sources = [
        json!({ "kind": "zeros", "size": 1 }),
        source("delta", 1, &json!({ "plain-size": 1, "base": base })),
    ];
    let parts = [index(&sources, 1, &json!({})), delta(&[(0, 1)])];
    refuses(
        &parts,
        &rehydrate("metal", &[]),
        "sources that sources are made of: 16385, at most 16384 are read",
    );
}

#[test]
fn sizes_that_overflow() {
    for size in [u64::MAX, (1 << 50) + 1] {
        let sources = [json!({ "kind": "zeros", "size": size })];
        refuses(&[index(&sources, size, &json!({}))], &["list"], "at most 1125899906842624 are read");
    }
}

/// Each level copies the one below twice: what is made doubles, and so would the plan.
#[test]
fn deltas_that_double() {
    let plain = [&[ZSTD][..], &[7; 16]].concat();
    let double = |i: usize| source("delta", 2 + i, &json!({ "plain-size": 32 << i, "base": [i] }));
    let sources: Vec<Value> =
        [source("zstd", 1, &json!({ "plain-size": 16 }))].into_iter().chain((0..15).map(double)).collect();
    let deltas = (0..15).map(|i| {
        let copy = [&[0x45 + 3, 0][..], &(16u64 << i).to_be_bytes()].concat();
        [&[ZSTD][..], b"rs\x026", &copy, &copy, &[0]].concat()
    });
    // A MiB of an artifact that says that it is a byte.
    let parts = |size: u64, more: &Value| {
        [index(&sources, size, more), plain.clone()].into_iter().chain(deltas.clone()).collect::<Vec<_>>()
    };
    refuses(&parts(1, &json!({})), &rehydrate("metal", &[]), "size mismatch");
    refuses(&parts(16 << 15, &json!({})), &rehydrate("metal", &[]), "sha256 mismatch");
}

/// Deltas of so many commands that each is within its limit, but not all together.
#[test]
fn deltas_of_millions_of_commands() {
    const COMMANDS: u64 = 3 << 20;
    let commands = |i: u64| {
        let copies = [0x45, 0, 1].repeat((COMMANDS + i) as usize);
        [&[ZSTD][..], b"rs\x026", &copies, &[0]].concat()
    };
    let each = |i: u64| source("delta", 1 + i as usize, &json!({ "plain-size": COMMANDS + i, "base": [0] }));
    let top = source("delta", 5, &json!({ "plain-size": 1, "base": [1, 2, 3, 4] }));
    let sources: Vec<Value> =
        [json!({ "kind": "zeros", "size": 1 })].into_iter().chain((0..4).map(each)).chain([top]).collect();
    let parts: Vec<_> = [index(&sources, 1, &json!({}))]
        .into_iter()
        .chain((0..4).map(commands))
        .chain([delta(&[(0, 1)])])
        .collect();
    refuses(&parts, &rehydrate("metal", &[]), "bytes of memory have room for");
}

/// What preflate's corrections begin with: the parameters of a stream of zlib, of which the block has so many tokens.
fn corrections(tokens: u16, coded: &[u8]) -> Vec<u8> {
    let [low, high] = tokens.to_le_bytes();
    let parameters = [0, 0, 4, 9, 0, 4, 8, 1, 0x0b, 0, low, high, 1, 4, 0, 0, 4, 2, 4, 0x0b, 3, 2];
    [&parameters[..], &[coded.len() as u8], coded].concat()
}

/// What stands before the checksum of a map that makes 64 bytes of `plain` with these corrections.
fn corrected(plain: &[u8], corrections: &[u8]) -> Vec<u8> {
    let varint = |n: usize| [n as u8 | 0x80, (n >> 7) as u8 | 0x80, (n >> 14) as u8];
    let lens = [&varint(plain.len())[..], &[64], &varint(corrections.len())].concat();
    [&[2, 0, 64, 1, 1][..], &lens, corrections].concat()
}

const WORDS: &[u8] = b"hello hello hello world hello hello hello world hello hello hello world ";

/// Twenty-five bytes of corrections that ask preflate for blocks without end.
#[test]
fn corrections_without_end() {
    for tokens in [1, 65535] {
        let map = [&[MAP][..], &corrected(WORDS, &corrections(tokens, &[7, 0x80]))].concat();
        let sources = [source("stored", 1, &json!({}))];
        let index = index(&sources, 64, &json!({ "map": targets::part(2) }));
        let parts = [index, [&[AS_IS], WORDS].concat(), map];
        refuses(&parts, &rehydrate("metal", &[]), "fold: corrections:");
    }
}

/// Others of that kind: any corrections behind those parameters, and parameters that are changed a little.
#[test]
fn corrections_of_any_kind() {
    let zeros = vec![0; 100_000];
    for seed in 1..3000u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let coded: Vec<u8> = (0..1 + random.below(40)).map(|_| random.below(256) as u8).collect();
        let mut corrections = corrections(random.below(65536) as u16, &coded);
        if seed % 2 == 0 {
            let at = random.below(23);
            corrections[at] = random.below(256) as u8;
        }
        let plain = if seed % 5 == 0 { &zeros[..] } else { WORDS };
        let map = Map::from_bytes(&targets::sealed(&corrected(plain, &corrections)), u64::MAX).unwrap();
        let start = Instant::now();
        // Whether they make something of that length is their affair.
        let _ = fold(&map, &mut &plain[..], &mut io::sink(), 0);
        assert!(start.elapsed() < Duration::from_secs(2), "seed {seed}: {:?}", start.elapsed());
    }
}

/// Mutates a part or two of a directory: bytes of blobs, numbers of the index.
fn mutate(random: &mut Random, parts: &mut [Vec<u8>]) {
    const TELLING: [u64; 9] = [0, 1, 2, 3, 0x7fff_ffff, 1 << 32, 1 << 50, i64::MAX as u64, u64::MAX];
    for _ in 0..=random.below(2) {
        let i = random.below(parts.len());
        if i > 0 {
            random.mutate(&mut parts[i]);
            continue;
        }
        // A number that stands behind a colon, a comma or a bracket.
        let text = String::from_utf8(std::mem::take(&mut parts[0])).unwrap();
        let starts: Vec<usize> = text
            .match_indices([':', ',', '['])
            .map(|(at, _)| at + 1)
            .filter(|&at| text[at..].starts_with(|c: char| c.is_ascii_digit()))
            .collect();
        let at = starts[random.below(starts.len())];
        let end = at + text[at..].find(|c: char| !c.is_ascii_digit()).unwrap();
        let old: u64 = text[at..end].parse().unwrap_or(0);
        let new = match random.below(3) {
            0 => TELLING[random.below(TELLING.len())],
            1 => old.wrapping_add(1),
            _ => old.wrapping_sub(1),
        };
        parts[0] = format!("{}{new}{}", &text[..at], &text[end..]).into_bytes();
    }
}

/// Mutates the small directory `tries` times, and rehydrates an artifact of each.
fn mutations(first: u64, tries: u64) {
    let whole = small_directory();
    let artifacts = [("rootfs", ""), ("metal", ""), ("qemu", ""), ("aws", ""), ("aws", "--published")];
    for (platform, form) in artifacts {
        let done = run(&whole, &rehydrate(platform, Some(form).filter(|f| !f.is_empty()).as_slice()));
        assert_eq!(done.code, Some(0), "{platform}: {}", done.error);
    }
    let next = std::sync::atomic::AtomicU64::new(first);
    let (mut failed, mut most, mut longest) = (0, 0, Duration::ZERO);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let (mut failed, mut most, mut longest) = (0, 0, Duration::ZERO);
                    loop {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if seed >= first + tries {
                            return (failed, most, longest);
                        }
                        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                        let mut parts = whole.clone();
                        mutate(&mut random, &mut parts);
                        let (platform, form) = artifacts[random.below(artifacts.len())];
                        let done = run(
                            &parts,
                            &rehydrate(platform, Some(form).filter(|f| !f.is_empty()).as_slice()),
                        );
                        let figures =
                            format!("seed {seed}, {platform}: {:?}, {} MiB", done.took, done.peak >> 20);
                        assert!(
                            matches!(done.code, Some(0 | 1)),
                            "{figures}: {:?}: {}",
                            done.code,
                            done.error
                        );
                        assert!(done.peak <= MOST && done.took <= LONGEST, "{figures}: {}", done.error);
                        failed += u64::from(done.code == Some(1));
                        most = most.max(done.peak);
                        longest = longest.max(done.took);
                    }
                })
            })
            .collect();
        for thread in threads {
            let (f, m, l) = thread.join().unwrap();
            (failed, most, longest) = (failed + f, most.max(m), longest.max(l));
        }
    });
    eprintln!("{tries} mutations: {failed} refused, at most {} MiB and {longest:?}", most >> 20);
    assert!(failed > tries / 4, "few of the mutations did anything");
}

#[test]
fn some_mutations() {
    mutations(0, 300);
}

#[test]
fn thousands_of_mutations() {
    mutations(1000, 5000);
}
