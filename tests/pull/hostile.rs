//! Layers that want to write where they must not, or more than there is room for. Nothing comes to be outside the
//! directory, and no half directory either.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use rehydrator::digest::Digest;

use crate::pull::layers::{Layer, Tar, assert_same, gzip, layout, pull, tree};
use crate::tools::example::{fails, ok, tool};

/// Where a hostile image is unpacked, with something beside it that is worth attacking.
struct Arena {
    dir: tempfile::TempDir,
}

impl Arena {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir_all(outside.join("dir")).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        fs::write(outside.join("dir/file"), "file").unwrap();
        fs::create_dir(dir.path().join("there")).unwrap();
        Self { dir }
    }

    fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("there/out")
    }

    /// Pulls `layers`; whatever comes of it, what is outside is as it was. Without an error, `check` looks at the tree.
    fn pull(&self, name: &str, layers: Vec<Layer>, expected: &Expected) {
        let before = tree(&self.outside());
        let image = layout(&self.dir.path().join("image"), &layers);
        let mut command = pull(&image, &self.out());
        command.arg("--max-size=8M").env("TMPDIR", self.dir.path());
        match expected {
            Expected::Error(text) => {
                let said = fails(&mut command);
                assert!(said.contains(text), "{name}: {said}");
                assert!(!self.out().exists(), "{name}");
            }
            Expected::Inside(paths) => {
                ok(&mut command);
                for (path, content) in *paths {
                    let path = path.replace("OUTSIDE", self.outside().to_str().unwrap());
                    let path = self.out().join(path.trim_start_matches('/'));
                    let found = fs::read_to_string(&path);
                    assert_eq!(found.ok().as_deref(), *content, "{name}: {path:?}");
                }
                fs::remove_dir_all(self.out()).unwrap();
            }
        }
        assert_same(&tree(&self.outside()), &before);
        let left: Vec<_> = fs::read_dir(self.dir.path().join("there")).unwrap().collect();
        assert!(left.is_empty(), "{name}: {left:?}");
        let mut all: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        all.sort();
        assert_eq!(all, ["image", "outside", "there"], "{name}");
        fs::remove_dir_all(self.dir.path().join("image")).unwrap();
    }
}

/// What comes of an image.
enum Expected {
    /// A message with this in it, and no directory.
    Error(&'static str),
    /// Files below the directory with this content, or none. `OUTSIDE` stands for the path of what is outside.
    Inside(&'static [(&'static str, Option<&'static str>)]),
}
use Expected::{Error, Inside};

const NOTHING: Expected = Inside(&[]);

fn one(tar: Tar) -> Vec<Layer> {
    vec![Layer::gzip(&tar.end())]
}

fn two(first: Tar, second: Tar) -> Vec<Layer> {
    vec![Layer::gzip(&first.end()), Layer::gzip(&second.end())]
}

#[test]
fn names_do_not_lead_outside() {
    let arena = Arena::new();
    let out = arena.outside();
    let out = out.to_str().unwrap();
    let tar = Tar::default;
    let link = || tar().symlink("s", out);
    let cases: Vec<(&str, Vec<Layer>, Expected)> = vec![
        ("dots", one(tar().file("../evil", "x")), Error("a path with \"..\"")),
        ("dots in the middle", one(tar().dir("a").file("a/../../evil", "x")), Error("a path with \"..\"")),
        ("dots after a slash", one(tar().file("/../evil", "x")), Error("a path with \"..\"")),
        ("dots at the end", one(tar().dir("a").dir("a/..")), Error("a path with \"..\"")),
        ("absolute", one(tar().file("/evil", "x")), Inside(&[("evil", Some("x"))])),
        (
            "absolute, of something outside",
            one(tar().pax(&[("path", format!("{out}/secret").as_bytes())]).file("x", "x")),
            Inside(&[("OUTSIDE/secret", Some("x"))]),
        ),
        ("pax", one(tar().pax(&[("path", b"../evil")]).file("x", "x")), Error("a path with \"..\"")),
        ("GNU", one(tar().add(b'L', "././@LongLink", "", b"../evil\0").file("x", "x")), Error("a path with")),
        ("GNU sparse name", one(sparse_named("../evil")), Error("a path with \"..\"")),
        ("ustar prefix", one(ustar_prefix("..", "evil")), Error("a path with \"..\"")),
        ("zero byte", one(tar().pax(&[("path", b"a\0b")]).file("x", "x")), Error("a name with a zero byte")),
        ("symlink", one(link().file("s/evil", "x")), Inside(&[("OUTSIDE/evil", Some("x"))])),
        (
            "symlink, relative",
            one(tar().symlink("s", "../../outside").file("s/evil", "x")),
            Inside(&[("outside/evil", Some("x"))]),
        ),
        (
            "symlink to the top",
            one(tar().symlink("s", "/..").file("s/evil", "x")),
            Inside(&[("evil", Some("x"))]),
        ),
        (
            "symlink in a lower layer",
            two(link(), tar().file("s/evil", "x")),
            Inside(&[("OUTSIDE/evil", Some("x"))]),
        ),
        (
            "symlinks in a row",
            one(tar()
                .symlink("a", "b/..")
                .symlink("b", "c")
                .symlink("c", "/../../..")
                .file("a/outside/evil", "x")),
            Inside(&[("outside/evil", Some("x"))]),
        ),
        (
            "symlink to /proc",
            one(tar().symlink("s", "/proc/self/cwd").file("s/evil", "x")),
            Inside(&[("proc/self/cwd/evil", Some("x"))]),
        ),
        (
            "symlink loop",
            one(tar().symlink("s", "s").file("s/evil", "x")),
            Error("Too many levels of symbolic links"),
        ),
        (
            "directory swapped for a symlink",
            one(tar().dir("d").file("d/a", "a").symlink("d", out).file("d/evil", "x")),
            Inside(&[("d/evil", None), ("OUTSIDE/evil", Some("x"))]),
        ),
        (
            "symlink swapped back and forth",
            one(tar().dir("d").file("d/a", "a").symlink("d", out).dir("d").file("d/secret", "x")),
            Inside(&[("d/secret", Some("x"))]),
        ),
        (
            "parent of a parent swapped",
            one(tar().dir("a").dir("a/b").file("a/b/c", "c").symlink("a", out).file("a/b/dir", "x")),
            Inside(&[("OUTSIDE/b/dir", Some("x"))]),
        ),
        ("case", one(tar().symlink("S", out).file("s/evil", "x")), Inside(&[("s/evil", Some("x"))])),
        ("file over a symlink", one(link().file("s", "x")), Inside(&[("s", Some("x"))])),
        (
            "file over a dangling symlink",
            one(tar().symlink("s", &format!("{out}/new")).file("s", "x")),
            Inside(&[("s", Some("x"))]),
        ),
        (
            "directory over a symlink",
            two(link(), tar().dir("s").file("s/secret", "x")),
            Inside(&[("s/secret", Some("x"))]),
        ),
        ("symlink over the root", one(tar().symlink("./", out)), Error("the root is not a directory")),
        ("file over the root", one(tar().file(".", "x")), Error("the root is not a directory")),
        ("hard link out", one(tar().hard_link("h", "../../outside/secret")), Error("a path with \"..\"")),
        (
            "hard link out, pax",
            one(tar().pax(&[("linkpath", b"../../outside/secret")]).hard_link("h", "x")),
            Error("a path with"),
        ),
        (
            "hard link out, absolute",
            one(tar()
                .add(b'K', "././@LongLink", "", format!("{out}/secret\0").as_bytes())
                .hard_link("h", "x")),
            Error("which is not there"),
        ),
        ("hard link through a symlink", one(link().hard_link("h", "s/secret")), Error("which is not there")),
        (
            "hard link to a symlink, then a file",
            one(tar().symlink("s", &format!("{out}/secret")).hard_link("h", "s").file("h", "x")),
            Inside(&[("h", Some("x"))]),
        ),
        ("hard link to the root", one(tar().hard_link("h", "/")), Error("which is not there")),
        ("hard link to a directory", one(tar().dir("d").hard_link("h", "d")), Error("hard link to \"d\"")),
        ("hard link to itself", one(tar().file("f", "x").hard_link("f", "./f")), Inside(&[("f", Some("x"))])),
        ("hard link to nothing", one(tar().hard_link("h", "none")), Error("hard link to \"none\"")),
        ("whiteout of ..", one(tar().dir("d").file("d/.wh...", "")), Error("a whiteout of nothing")),
        ("whiteout of .", one(tar().dir("d").file("d/.wh..", "")), Error("a whiteout of nothing")),
        ("whiteout of nothing", one(tar().file(".wh.", "")), Error("a whiteout of nothing")),
        ("whiteout with dots", one(tar().file("../outside/.wh.secret", "")), Error("a path with")),
        ("whiteout through a symlink", two(link(), tar().file("s/.wh.secret", "")), NOTHING),
        ("opaque through a symlink", two(link(), tar().file("s/.wh..wh..opq", "")), NOTHING),
        ("whiteout of a symlink", two(link(), tar().file(".wh.s", "")), Inside(&[("s", None)])),
        (
            "aufs",
            one(tar().dir(".wh..wh.plnk").file(".wh..wh.plnk/x", "x")),
            Inside(&[(".wh..wh.plnk/x", None)]),
        ),
        ("long name", one(tar().pax(&[("path", &[b'n'; 300])]).file("x", "x")), Error("File name too long")),
        (
            "deep",
            one(tar().pax(&[("path", "d/".repeat(1000).as_bytes())]).dir("x")),
            Error("nested more than"),
        ),
    ];
    assert!(cases.len() >= 25);
    for (name, layers, expected) in cases {
        arena.pull(name, layers, &expected);
    }
}

/// A member of pax sparse version 1.0 that has its name in a record of its own.
fn sparse_named(name: &str) -> Tar {
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"1"),
        ("GNU.sparse.name", name.as_bytes()),
    ];
    let mut map = b"1\n0\n1\n".to_vec();
    map.resize(512, 0);
    map.push(b'x');
    Tar::default().pax(&records).add(b'0', "x", "", &map)
}

fn ustar_prefix(prefix: &str, name: &str) -> Tar {
    Tar::default().dir(name).with(|header| {
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[345..345 + prefix.len()].copy_from_slice(prefix.as_bytes());
    })
}

#[test]
fn sizes_and_damage_end_in_errors() {
    let arena = Arena::new();
    let tar = Tar::default;
    let good = tar().dir("d").file("d/f", &"content".repeat(1000)).end();
    let zeros = vec![0; 64 << 20];
    let raw = |blob: Vec<u8>, tar: &[u8]| vec![Layer { blob, diff_id: Digest::of(tar) }];
    let cut = |bytes: &[u8], by: usize| bytes[..bytes.len() - by].to_vec();
    let size =
        |text: &'static [u8]| tar().file("f", "").with(|h| h[124..124 + text.len()].copy_from_slice(text));
    let zstd = zstd::encode_all(&good[..], 1).unwrap();
    let mut broken = gzip(&good);
    let middle = broken.len() / 2;
    broken[middle] ^= 0x55;
    let mut crc = gzip(&good);
    let at = crc.len() - 6;
    crc[at] ^= 1;
    let mut checksum = good.clone();
    checksum[0] = b'e';
    let cases: Vec<(&str, Vec<Layer>, Expected)> = vec![
        ("as it should be", raw(gzip(&good), &good), NOTHING),
        ("truncated gzip", raw(cut(&gzip(&good), 20), &good), Error("decompressing")),
        ("truncated zstd", raw(cut(&zstd, 8), &good), Error("decompressing")),
        ("broken gzip", raw(broken, &good), Error("layer sha256:")),
        ("wrong checksum of gzip", raw(crc, &good), Error("decompressing")),
        (
            "garbage behind gzip",
            raw([gzip(&good), b"garbage".to_vec()].concat(), &good),
            Error("decompressing"),
        ),
        ("garbage", raw(vec![0xA5; 4000], &[0xA5; 4000]), Error("not a tar header")),
        ("wrong checksum", vec![Layer::plain(checksum)], Error("not a tar header: wrong checksum")),
        ("nothing but a piece of a header", vec![Layer::plain(good[..300].to_vec())], Error("truncated")),
        ("truncated tar", vec![Layer::plain(good[..3000].to_vec())], Error("truncated")),
        (
            "something behind the end",
            vec![Layer::plain([&[0; 512], &good[..]].concat())],
            Error("something follows the end"),
        ),
        ("ends with an extension", one(tar().pax(&[("path", b"x")])), Error("ends between an extension")),
        ("another diff ID", raw(gzip(&good), b"other"), Error("diff ID mismatch")),
        ("data behind the end is hashed", raw([&good[..], &[1]].concat(), &good), Error("diff ID mismatch")),
        ("largest size", one(size(b"77777777777\0")), Error("--max-size")),
        (
            "binary size",
            one(size(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")),
            Error("larger than 8388608 bytes"),
        ),
        (
            "size that wraps",
            one(size(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")),
            Error("size: too large"),
        ),
        ("no size", one(size(b"xxxxxxxxxxx\0")), Error("size")),
        (
            "pax size",
            one(tar().pax(&[("size", b"18446744073709551615")]).file("f", "")),
            Error("size: too large"),
        ),
        ("pax size, negative", one(tar().pax(&[("size", b"-1")]).file("f", "")), Error("not a number")),
        ("gzip bomb", raw(gzip(&zeros), b""), Error("larger than")),
        ("gzip bomb in a file", one(tar().add(b'0', "f", "", &zeros)), Error("--max-size")),
        ("zstd bomb", raw(zstd::encode_all(&zeros[..], 1).unwrap(), b""), Error("larger than")),
        (
            "many small files",
            one((0..2100).fold(tar(), |t, i| t.file(&format!("f{i}"), "x"))),
            Error("--max-size"),
        ),
        (
            "directories that no member describes",
            one((0..8).fold(tar(), |t, i| {
                let path = format!("{i}/{}f", "d/".repeat(300));
                t.pax(&[("path", path.as_bytes())]).file("x", "")
            })),
            Error("--max-size"),
        ),
        (
            "attributes",
            one((0..10).fold(tar(), |t, i| {
                t.pax(&[("SCHILY.xattr.none.x", &[b'x'; 1_000_000])]).file(&format!("f{i}"), "")
            })),
            Error("--max-size"),
        ),
        (
            "layers of nothing, each smaller than an image may be",
            (0..2).map(|_| Layer::gzip(&[tar().end(), vec![0; 5 << 20]].concat())).collect(),
            Error("the image is larger than 8388608 bytes; --max-size allows more"),
        ),
        (
            "layers that are longer than an image may be",
            vec![Layer::plain(zeros[..5 << 20].to_vec()), Layer::plain(zeros[..5 << 20].to_vec())],
            Error("the layers have 10485760 bytes, more than 8388608; --max-size allows more"),
        ),
        (
            "a name longer than a message",
            one(tar().pax(&[("path", format!("{}/..", "x".repeat(500_000)).as_bytes())]).file("x", "")),
            Error("… (500003 bytes)\": a path with"),
        ),
        (
            "sparse bomb",
            one(sparse(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"1000000000000000")])),
            Error("--max-size"),
        ),
        (
            "sparse, overlapping",
            one(sparse(&[("GNU.sparse.map", b"5,1,0,1"), ("GNU.sparse.size", b"9")])),
            Error("pieces overlap"),
        ),
        (
            "sparse, beyond the end",
            one(sparse(&[("GNU.sparse.map", b"9,1"), ("GNU.sparse.size", b"9")])),
            Error("beyond the end"),
        ),
        (
            "sparse, another size",
            one(sparse(&[("GNU.sparse.map", b"0,7"), ("GNU.sparse.size", b"9")])),
            Error("are stored"),
        ),
        (
            "long pax header",
            one(tar().add(b'x', "pax", "", &vec![b'1'; 2 << 20]).file("f", "")),
            Error("an extension of 2097152 bytes"),
        ),
        (
            "bad pax record",
            one(tar().add(b'x', "pax", "", b"99 path=x\n").file("f", "")),
            Error("pax: not a record"),
        ),
        ("unknown type", one(tar().add(b'Q', "q", "", b"")), Error("unknown type")),
        (
            "owner of all bits",
            one(tar().pax(&[("uid", b"4294967295")]).file("f", "")),
            Error("uid 4294967295: too large"),
        ),
        (
            "device, then a file",
            one(tar().add(b'3', "n", "", b"").file("n", "x")),
            Inside(&[("n", Some("x"))]),
        ),
        ("fifo, then a file", one(tar().add(b'6', "n", "", b"").file("n", "x")), Inside(&[("n", Some("x"))])),
        ("twice", one(tar().file("f", "1").file("f", "2")), Inside(&[("f", Some("2"))])),
        (
            "twice, another kind",
            one(tar().dir("f").file("f/x", "1").file("f", "2")),
            Inside(&[("f", Some("2"))]),
        ),
        (
            "twice, hard linked",
            one(tar().file("f", "1").hard_link("h", "f").file("f", "2")),
            Inside(&[("f", Some("2")), ("h", Some("1"))]),
        ),
        ("below a file", one(tar().file("f", "1").file("f/x", "2")), Error("Not a directory")),
    ];
    for (name, layers, expected) in cases {
        arena.pull(name, layers, &expected);
    }
}

/// What was a file in a lower layer is a directory where a layer has something below it, as on overlayfs.
#[test]
fn a_file_below_what_was_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let below = |tar: Tar| tar.file("a/b/c", "new");
    let name = layout(
        &dir.path().join("two"),
        &two(Tar::default().file("a", "file").file("kept", "k"), below(Tar::default())),
    );
    let out = dir.path().join("out");
    ok(&mut pull(&name, &out));
    assert_eq!(fs::read_to_string(out.join("a/b/c")).unwrap(), "new");
    assert_eq!(fs::read_to_string(out.join("kept")).unwrap(), "k");
    // In one layer it is a mistake.
    let name = layout(&dir.path().join("one"), &one(below(Tar::default().file("a", "file"))));
    let said = fails(&mut pull(&name, &dir.path().join("no")));
    assert!(said.contains("Not a directory"), "{said}");
}

/// Go before 1.8 used the prefix of ustar in headers of GNU's format; umoci, which is written in Go, judges.
#[test]
fn headers_of_old_go() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = "p".repeat(93);
    let old = Tar::default().file("foo", "").with(|header| {
        header[108..116].copy_from_slice(b"\x80\0\0\0\0\x20\0\0");
        header[345..345 + 93].copy_from_slice(prefix.as_bytes());
    });
    // Times of access and change, as GNU tar writes them, are no prefix.
    let new =
        old.file("bar", "").with(|header| header[345..369].copy_from_slice(b"14000000000\x0014000000000\0"));
    let name = layout(&dir.path().join("img"), &one(new));
    let out = dir.path().join("out");
    ok(&mut pull(&name, &out));
    let bundle = dir.path().join("bundle");
    ok(tool("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:latest", dir.path().join("img").display()))
        .arg(&bundle));
    for root in [out, bundle.join("rootfs")] {
        assert!(root.join(&prefix).join("foo").is_file(), "{}", root.display());
        assert!(root.join("bar").is_file(), "{}", root.display());
    }
}

fn sparse(records: &[(&str, &[u8])]) -> Tar {
    Tar::default().pax(records).file("f", "x")
}

/// Blobs that are not what the manifest says, and manifests that are not what they should be.
#[test]
fn images_that_do_not_fit_together() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, out) = (dir.path().join("image"), dir.path().join("out"));
    let good = || Layer::gzip(&Tar::default().file("f", "x").end());
    let refused = |text: &str| {
        let said = fails(&mut pull(&format!("oci:{}", image.display()), &out));
        assert!(said.contains(text), "{text}: {said}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{text}");
        fs::remove_dir_all(&image).unwrap();
    };
    let replace = |path: &Path, from: &str, to: &str| {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    };

    layout(&image, &[good()]);
    let blob = image.join(format!("blobs/sha256/{}", Digest::of(&good().blob)));
    // Compressed again it is another blob with the same content.
    let mut other = Vec::new();
    let tar = Tar::default().file("f", "x").end();
    flate2::read::GzEncoder::new(&tar[..], flate2::Compression::none()).read_to_end(&mut other).unwrap();
    fs::write(blob, other).unwrap();
    refused("sha256 mismatch: expected");

    layout(&image, &[good()]);
    fs::remove_file(image.join(format!("blobs/sha256/{}", Digest::of(&good().blob)))).unwrap();
    refused("No such file");

    layout(&image, &[good()]);
    let digest = format!("sha256:{}", "../".repeat(21) + "a");
    let index = fs::read_to_string(image.join("index.json")).unwrap();
    let start = index.find("sha256:").unwrap();
    replace(&image.join("index.json"), &index[start..start + 71], &digest);
    refused("index.json");

    layout(&image, &[good()]);
    let manifest = image.join("blobs/sha256").join(&index[start + 7..start + 71]);
    replace(&manifest, "schemaVersion", "schemaversion");
    refused("manifest: sha256 mismatch");

    fs::create_dir(&image).unwrap();
    refused("not an OCI image layout");
}

#[test]
fn a_directory_is_replaced_only_by_force() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let out = dir.path().join("out");
    let image = layout(&dir.path().join("image"), &[Layer::gzip(&Tar::default().file("new", "x").end())]);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("old"), "old").unwrap();
    let said = fails(&mut pull(&image, &out));
    assert!(said.contains("exists; --force replaces it"), "{said}");
    // A failure leaves the old one.
    let bad = layout(&dir.path().join("bad"), &[Layer::gzip(b"bad")]);
    fails(pull(&bad, &out).arg("--force"));
    assert_eq!(fs::read_to_string(out.join("old")).unwrap(), "old");
    ok(pull(&image, &out).arg("--force"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(out.join("new")).unwrap(), "x");
    let said = fails(pull(&image, &out.join("new")).arg("--force"));
    assert!(said.contains("exists, and is not a directory"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}
