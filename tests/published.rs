//! The published file itself, made again from what is inside it: the encoders against the tools they stand for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::tools::example::{fails, ok, rehydrator};
use crate::tools::small::{Random, sh, small_stream, some_file};
use rehydrator::digest::Digest;
use rehydrator::fold::{Effort, Map, fold, peel, unfold, wrap};
use rehydrator::source::{self, File, Source};

/// GNU gzip's bytes at every level: inputs of awkward lengths, from a file and from a pipe that gives little at a time.
#[test]
fn gnu_gzip_at_every_level() {
    let dir = tempfile::tempdir().unwrap();
    let code = fs::read("/bin/bash").unwrap();
    let mut random = Random(1);
    let lengths = [0, 1, 3, 10, 263, 32_768, 65_275, 65_537, 98_304];
    for (i, len) in lengths.into_iter().chain([200_000, 600_000]).enumerate() {
        let plain = match i % 3 {
            0 => random.mixture(len, &code),
            1 => random.bytes(len),
            _ => (0..len).map(|i| if i % 5000 < 3 { i as u8 } else { b'x' }).collect(),
        };
        fs::write(dir.path().join("plain"), &plain).unwrap();
        for level in 1..=9 {
            sh(
                dir.path(),
                &format!(
                    "gzip -{level} -c plain > a.gz; dd if=plain bs=7777 status=none | gzip -{level} > b.gz"
                ),
            );
            for name in ["a.gz", "b.gz"] {
                let path = dir.path().join(name);
                let form: Arc<dyn Source> = Arc::new(File::new(fs::File::open(&path).unwrap()).unwrap());
                let unfolded = unfold(&form, dir.path(), Effort::Whole).unwrap();
                let map = unfolded.map.unwrap_or_else(|| panic!("{name}, {len} bytes, level {level}"));
                assert!(
                    map.to_bytes().len() < 40,
                    "{name}, {len} bytes, level {level}: not by the encoder alone"
                );
                let mut made = Vec::new();
                fold(&map, &mut source::Reader::new(&*unfolded.plain), &mut made, 0).unwrap();
                assert!(made == fs::read(&path).unwrap(), "{name}, {len} bytes, level {level}: other bytes");
            }
        }
    }
}

/// Input for several parsers, which agree on what they find soon, late (in runs of one byte), or only behind such a run.
#[test]
fn gnu_gzip_by_several_parsers() {
    let dir = tempfile::tempdir().unwrap();
    let code = fs::read("/bin/bash").unwrap();
    let mut random = Random(2);
    let mut plain = random.mixture(5_000_000, &code);
    plain.extend(vec![0; 3_000_001]);
    plain.extend(random.bytes(2_000_000));
    plain.extend((0..2_000_000).map(|i| if i % 50_000 < 3 { i as u8 } else { b'x' }));
    plain.extend(random.mixture(3_000_000, &code));
    fs::write(dir.path().join("plain"), &plain).unwrap();
    for level in [3, 4, 6, 9] {
        sh(dir.path(), &format!("gzip -{level} -n -c plain > {level}.gz"));
        let map = made_again(dir.path(), &format!("{level}.gz")).unwrap();
        assert!(map.to_bytes().len() < 100, "level {level}: not by the encoder alone");
    }
}

/// Finds how the file `name` of `dir` was compressed, makes it again and compares. Gives the map, or why there is none.
fn made_again(dir: &Path, name: &str) -> Result<Map, String> {
    let path = dir.join(name);
    let file = fs::File::open(&path).unwrap();
    let peeled = peel(file.try_clone().unwrap(), name, dir, 1 << 30).unwrap();
    let mut reason = String::new();
    for effort in [Effort::Beginning, Effort::Whole] {
        match wrap(&file, peeled.compression, &peeled.form, effort, 1 << 30).unwrap() {
            Err(why) => reason = why,
            Ok(map) => {
                let map = Map::from_bytes(&map.to_bytes(), u64::MAX).unwrap();
                // With room for several blocks at a time, and for one.
                let make = |memory| {
                    let mut made = Vec::new();
                    fold(&map, &mut source::Reader::new(&*peeled.form), &mut made, memory).map(|()| made)
                };
                let wanted = fs::read(&path).unwrap();
                match make(1 << 30) {
                    Ok(made) if made == wanted => {
                        assert!(make(0).unwrap() == wanted, "{name}: other bytes with little memory");
                        return Ok(map);
                    }
                    _ => reason = "other bytes".into(),
                }
            }
        }
    }
    Err(reason)
}

/// Debian 13's tools, where they are other than the host's.
fn trixie(tool: &str) -> String {
    format!("{}/ci/trixie exec {tool}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn xz_of_many_settings_and_two_versions() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    some_file(dir);
    let of_debian_13 = trixie("xz");
    for (i, command) in [
        "xz -c0 -T2 plain",
        "xz -c1 -T1 plain",
        "xz -c2 -T2 --block-size=512KiB plain",
        "xz -c3 -T1 --block-size=256KiB -C sha256 plain",
        "xz -c4 -T2 -C crc32 plain",
        "xz -c5e plain",
        "xz -c6 -T2 plain",
        "xz -c7 -C none plain",
        "xz -c9 -T2 plain",
        "xz -c9e -T2 --block-size=512KiB plain",
        "xz -c --lzma2=preset=6,dict=3MiB plain",
        "xz -c0 plain; head -c 64 /dev/zero; xz -c6 -T2 plain",
        "head -c 0 plain | xz -c",
        "head -c 300000 /dev/urandom | xz -c -T2",
        "TRIXIE -c1 -T2 plain",
        "TRIXIE -c6 plain",
        "TRIXIE -c9 -T2 plain",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}.xz");
        sh(dir, &format!("({}) > {name}", command.replace("TRIXIE", &of_debian_13)));
        let map = made_again(dir, &name).unwrap_or_else(|why| panic!("{command}: {why}"));
        assert!(map.to_bytes().len() < 1000, "{command}: a map of {}", map.to_bytes().len());
    }
    for (command, wanted) in [
        ("xz -c --x86 --lzma2=preset=6 plain", "it has filters before LZMA2, which are not known here"),
        (
            "xz -c --lzma2=preset=6,nice=33 plain",
            "no preset of liblzma 5.8.4 with a dictionary of 8388608 makes it",
        ),
    ] {
        sh(dir, &format!("{command} > odd.xz"));
        assert_eq!(made_again(dir, "odd.xz").unwrap_err(), wanted, "{command}");
    }
}

#[test]
fn zstd_of_many_settings() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    some_file(dir);
    // Several jobs of a worker.
    sh(dir, "for i in 1 2 3 4 5 6; do cat plain; head -c 200000 /dev/urandom; done > large");
    for (i, command) in [
        "TRIXIE -c plain",
        "TRIXIE -c -T2 large",
        "TRIXIE -c -T1 large",
        "TRIXIE -c --single-thread large",
        "TRIXIE -1 -c < large",
        "TRIXIE -6 -c --no-check large",
        "cat large | TRIXIE -9 -c --single-thread",
        "TRIXIE -12 -c plain",
        "TRIXIE -15 -c plain",
        "TRIXIE -19 -c large",
        "TRIXIE --ultra -22 -c plain",
        "TRIXIE -3 --long -c large",
        "TRIXIE -c plain; TRIXIE -5 -c < large",
        "head -c 1000 plain | TRIXIE -c",
        "head -c 50000 plain > short; TRIXIE -c -19 short",
        "head -c 0 plain | TRIXIE -c",
        "head -c 3000000 /dev/urandom | TRIXIE -c",
        "head -c 3000000 /dev/zero | TRIXIE -c -7",
        // Zeros that tell levels apart only when they end.
        "(head -c 3000000 /dev/zero; cat plain) | TRIXIE -c -7",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}.zst");
        sh(dir, &format!("({}) > {name}", command.replace("TRIXIE", &trixie("zstd"))));
        let map = made_again(dir, &name).unwrap_or_else(|why| panic!("{command}: {why}"));
        assert!(map.to_bytes().len() < 100, "{command}: a map of {}", map.to_bytes().len());
    }
    // What another version or other settings make.
    sh(
        dir,
        "head -c 100000 plain | TRIXIE -c --zstd=strategy=1 > odd.zst"
            .replace("TRIXIE", &trixie("zstd"))
            .as_str(),
    );
    assert_eq!(made_again(dir, "odd.zst").unwrap_err(), "no level of zstd 1.5.7 makes it");
}

#[test]
fn gzip_and_zip() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    some_file(dir);
    let of_debian_13 = trixie("gzip");
    for (i, (command, suffix, most)) in [
        ("gzip -6 -c plain", "gz", 100),
        ("gzip -9 -n < plain", "gz", 100),
        ("TRIXIE -1 -c plain", "gz", 100),
        ("TRIXIE -9 -c plain", "gz", 100),
        ("gzip -c plain; gzip -9 -c plain", "gz", 200),
        ("python3 -c 'import gzip,sys; sys.stdout.buffer.write(gzip.compress(open(\"plain\",\"rb\").read(), 9))'", "gz", 100),
        ("pigz -p2 -c plain", "gz", 200_000),
        ("zip -q -9j - plain | cat", "zip", 500),
        ("rm -f z.zip; zip -q -6j z.zip plain; cat z.zip", "zip", 500),
        ("cat plain | zip -q -9j - -", "zip", 500),
        ("zip -q -0j - plain", "zip", 500),
        // What every level makes in the same way, for long or to the end.
        ("head -c 3000000 /dev/zero | gzip -4", "gz", 100),
        ("(head -c 3000000 /dev/zero; cat plain) | gzip -7", "gz", 100),
        ("head -c 3000000 /dev/urandom | gzip -8", "gz", 100),
        ("head -c 3000000 /dev/zero | zip -q -4 - -", "zip", 500),
        // Padding, which gzip ignores.
        ("gzip -c plain; head -c 1000 /dev/zero", "gz", 2000),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}.{suffix}");
        sh(dir, &format!("({}) > {name}", command.replace("TRIXIE", &of_debian_13)));
        let map = made_again(dir, &name).unwrap_or_else(|why| panic!("{command}: {why}"));
        assert!(map.to_bytes().len() < most, "{command}: a map of {}", map.to_bytes().len());
    }
}

/// A number in the map's encoding.
fn varint(mut n: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out
}

/// CRC-32 as in gzip.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// What each encoder makes of the same input is written down here. When an update of a dependency makes this fail,
/// images that were made before do not come back with it: the update is not to be taken.
#[test]
fn golden_bytes() {
    let plain = Random(42).mixture(3_000_000, &Random(43).bytes(100_000));
    let gzip = |level| (vec![2, 0], 4, vec![level]);
    let zlib = |level| (vec![2, 1, 0, level, 15, 8], 2, vec![0]);
    let zstd = |level, flags| (vec![2, 0], 7, vec![level, 0, flags]);
    let lzma2 = |preset, dict| (vec![2, 0], 6, [vec![preset], varint(dict)].concat());
    let mut found = Vec::new();
    for (name, (head, kind, side)) in [
        ("gzip 1", gzip(1)),
        ("gzip 6", gzip(6)),
        ("gzip 9", gzip(9)),
        ("zlib 1", zlib(1)),
        ("zlib 6", zlib(6)),
        ("zlib 9", zlib(9)),
        ("lzma2 0", lzma2(0, 1 << 18)),
        ("lzma2 1", lzma2(1, 1 << 20)),
        ("lzma2 6", lzma2(6, 8 << 20)),
        ("lzma2 6e", lzma2(22, 8 << 20)),
        ("lzma2 9", lzma2(9, 64 << 20)),
        ("zstd 3", zstd(3, 2)),
        ("zstd 3, threads", zstd(3, 3)),
        ("zstd 19, threads", zstd(19, 3)),
    ] {
        let len = varint(plain.len() as u64);
        // A length that is never reached: what comes out is looked at, not the error at the end.
        let most = varint(plain.len() as u64 * 2);
        let outer = [&head[..], &most, &[1, kind], &most, &side].concat();
        let content = [&outer[..], &len, &[1, 0], &len].concat();
        let bytes = [&content[..], &crc32(&content).to_le_bytes(), b"end."].concat();
        let map = Map::from_bytes(&bytes, u64::MAX).unwrap();
        let mut made = Vec::new();
        fold(&map, &mut &plain[..], &mut made, 0).unwrap_err();
        found.push(format!("{name} {} {}", made.len(), &Digest::of(&made).to_string()[..16]));
    }
    let wanted =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-encoders.txt")).unwrap();
    assert_eq!(found.join("\n"), wanted.trim_end());
}

#[test]
fn published_from_end_to_end() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    small_stream(dir);
    let dehydrate = |options: &[&str]| {
        let mut command = rehydrator();
        command.args(["build", "dehydrate", "--workdir"]).arg(dir).args(options);
        command
    };
    let error = fails(&mut dehydrate(&["--require", "published"]));
    let why = "it does not come back as published: it has filters before LZMA2, which are not known here";
    assert!(error.contains(why), "{error}");
    let table = String::from_utf8(ok(&mut dehydrate(&[]))).unwrap();
    assert_eq!(table.lines().filter(|l| l.ends_with("  published")).count(), 3, "{table}");
    assert!(table.contains("uncompressed: it has filters before LZMA2"), "{table}");

    let out = dir.join("out");
    let rehydrate = |options: &[&str]| {
        let mut command = rehydrator();
        command.arg("rehydrate").arg(&out).args(options).arg("--data").arg(dir.join("dehydrated"));
        command
    };
    let error = fails(&mut rehydrate(&["--all", "--published"]));
    let wanted = "but not as published: d.raw.xz: it has filters before LZMA2, which are not known here";
    assert!(error.contains(wanted), "{error}");
    ok(&mut rehydrate(&["--disk", "a", "--disk", "b", "--disk", "c", "--published"]));
    sh(
        dir,
        "for f in a.raw.xz b.raw.gz c.raw.zip; do cmp out/$f artifacts/$f; GNUPGHOME=$PWD/gnupg gpg --verify out/$f.sig out/$f; done",
    );
    // With the least memory, blocks are made one after the other.
    ok(&mut rehydrate(&["--disk", "a", "--published", "--force", "--memory", "1M"]));
    ok(&mut rehydrate(&["--all"]));
    sh(dir, "for f in a b c d; do cmp out/$f.raw $f.raw; done");

    // The proofs are used again, but not those of another version.
    let index = fs::read(dir.join("dehydrated/index.json")).unwrap();
    let proofs = || -> Vec<_> {
        let mut all: Vec<_> = fs::read_dir(dir.join("proofs")).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    };
    assert_eq!(proofs().len(), 3);
    let again = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rehydrator"));
        command.args(["--progress=plain", "build", "dehydrate", "--workdir"]).arg(dir);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", crate::tools::example::stderr(&output));
        crate::tools::example::stderr(&output)
    };
    let said = again();
    assert!(!said.contains("prove as published"), "{said}");
    assert!(fs::read(dir.join("dehydrated/index.json")).unwrap() == index);
    for proof in proofs() {
        let mut bytes = fs::read(&proof).unwrap();
        let end = bytes.iter().position(|&b| b == b'\n').unwrap();
        bytes[end - 1] ^= 1;
        fs::write(&proof, bytes).unwrap();
    }
    let said = again();
    assert_eq!(said.matches("prove as published: done").count(), 3, "{said}");
}

/// An encoder that makes the first 16 MiB of a stream is believed to make the rest, until the proof says otherwise. That disk is the base
/// here, so that another is made of what was found in it the second time.
#[test]
fn a_beginning_that_deceives() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let code = fs::read("/bin/bash").unwrap();
    fs::write(dir.join("b.raw"), Random(9).mixture(37_000_000, &code)).unwrap();
    sh(
        dir,
        r#"mkdir artifacts; ln b.raw artifacts
           python3 - <<'PYTHON'
import gzip, struct, zlib
plain = open("b.raw", "rb").read()
form = b""
for level, part in (9, plain[:34_000_000]), (1, plain[34_000_000:]):
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    form += deflate.compress(part) + deflate.flush(zlib.Z_FULL_FLUSH if level == 9 else zlib.Z_FINISH)
form = gzip.compress(b"")[:10] + form + struct.pack("<II", zlib.crc32(plain), len(plain))
assert gzip.decompress(form) == plain
open("artifacts/a.gz", "wb").write(form)
PYTHON
           artifact() {
               printf '"%s":{"release":"1","formats":{"%s":{"disk":{"location":"https://example.invalid/%s","sha256":"%s"}}}}' \
                   $1 $2 $1.$2 $(sha256sum artifacts/$1.$2 | cut -c1-64)
           }
           printf '{"stream":"test","metadata":{},"architectures":{"x86_64":{"artifacts":{%s,%s},"images":{}}}}' \
               "$(artifact a gz)" "$(artifact b raw)" > stream.json"#,
    );
    let output = Command::new(env!("CARGO_BIN_EXE_rehydrator"))
        .args(["--progress=none", "build", "dehydrate", "--workdir"])
        .arg(dir)
        .output()
        .unwrap();
    let said = crate::tools::example::stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("a: ") && said.contains("unfolded again, with more effort"), "{said}");
    assert!(!said.contains("stored without unfolding"), "{said}");
    let mut command = rehydrator();
    command.arg("rehydrate").arg(dir.join("out")).arg("--all").arg("--data").arg(dir.join("dehydrated"));
    ok(&mut command);
    sh(
        dir,
        "for f in a.gz b.raw; do cmp out/$f artifacts/$f; done
         [ $(du -cb dehydrated/blobs | tail -1 | cut -f 1) -lt $(stat -c %s artifacts/a.gz) ]",
    );
}
