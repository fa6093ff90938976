//! The views of live root file systems, judged by the tools that unpack them.
//!
//! Images are made with `mkfs.erofs` and `mksquashfs`, unpacked with `fsck.erofs` and `unsquashfs`, and the view is
//! compared with what came out: every file, where it lies and that nothing else is there.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rehydrator::source::cluster::{ClusterMap, MAX_CLUSTER, Origin};
use rehydrator::source::files::{ALIGN, Placed};
use rehydrator::source::{File, Source, erofs, rootfs, squashfs};

/// Runs a tool and gives what it printed; panics with what it said when it is missing or fails.
fn run(command: &mut Command) -> String {
    let name = format!("{command:?}");
    let out =
        command.output().unwrap_or_else(|e| panic!("{name}: {e}: install erofs-utils and squashfs-tools"));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name}: {}\n{stderr}", out.status);
    String::from_utf8(out.stdout).unwrap()
}

/// A tool of the Debian trixie tree that `ci/trixie` makes: it has the erofs-utils with LZMA, DEFLATE and zstd.
fn trixie(tool: &str) -> Command {
    let tree = std::env::var_os("REHYDRATOR_TRIXIE").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache");
        cache.unwrap_or_else(home).join("rehydrator/trixie")
    });
    let arch = std::env::consts::ARCH;
    let loader = match arch {
        "x86_64" => "usr/lib64/ld-linux-x86-64.so.2",
        _ => "usr/lib/ld-linux-aarch64.so.1",
    };
    let path = tree.join("usr/bin").join(tool);
    assert!(path.exists(), "{} is missing: run ci/trixie", path.display());
    let mut command = Command::new(tree.join(loader));
    command.arg("--library-path").arg(tree.join(format!("usr/lib/{arch}-linux-gnu"))).arg(path);
    command
}

/// Bytes that do not compress.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }

    /// Bytes that compress like text or code: words out of a small set.
    fn text(&mut self, len: usize) -> Vec<u8> {
        let words: Vec<Vec<u8>> = (0..200).map(|i| Noise(i + 1).bytes(3 + i as usize % 9)).collect();
        let mut out = Vec::new();
        while out.len() < len {
            out.extend(&words[self.next() as usize % words.len()]);
            out.push(b' ');
        }
        out.truncate(len);
        out
    }
}

/// A tree with all that a root file system has and some that it has not.
fn make_tree(dir: &Path) {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    fs::create_dir(dir).unwrap();
    for d in 0..8 {
        let sub = dir.join(format!("small{d}"));
        fs::create_dir(&sub).unwrap();
        for f in 0..40 {
            let len = noise.next() as usize % [30, 300, 3000, 9000][f % 4];
            fs::write(sub.join(format!("file-{f}")), noise.text(len)).unwrap();
        }
    }
    for len in [1, 4095, 4096, 4097, 8192, 131_072, 131_073, 1_048_576, 1_048_577] {
        fs::write(dir.join(format!("text-{len}")), noise.text(len)).unwrap();
        if len < 1 << 20 {
            fs::write(dir.join(format!("noise-{len}")), noise.bytes(len)).unwrap();
        }
    }
    // Text and noise in turns: compressed and plain clusters that start anywhere in a block.
    let mixed: Vec<u8> = (0..60)
        .flat_map(|i| if i % 3 == 0 { noise.bytes(5000 + i * 77) } else { noise.text(7000 + i * 131) })
        .collect();
    fs::write(dir.join("mixed"), &mixed).unwrap();
    // Deduplication finds what is the same at another offset.
    fs::write(dir.join("mixed-later"), [&noise.text(12_345), &mixed[..300_000]].concat()).unwrap();
    fs::write(dir.join("mixed-again"), &mixed).unwrap();
    fs::write(dir.join("zeros"), vec![0; 3_000_000]).unwrap();
    fs::write(dir.join("empty"), b"").unwrap();
    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    sparse.write_all_at(&noise.text(70_000), 1 << 20).unwrap();
    sparse.write_all_at(&noise.text(5000), 6 << 20).unwrap();
    sparse.set_len((8 << 20) + 17).unwrap();
    let mut deep = dir.join("deep");
    for level in 0..12 {
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("here"), noise.text(level * 100)).unwrap();
        deep.push(format!("level{level}"));
    }
    let many = dir.join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..300 {
        fs::write(many.join(format!("a-rather-long-name-of-a-file-{i:06}")), format!("{i}\n")).unwrap();
    }
    fs::hard_link(dir.join("mixed"), dir.join("small3/mixed-link")).unwrap();
    fs::hard_link(dir.join("text-4097"), dir.join("deep/link")).unwrap();
    std::os::unix::fs::symlink("text-1", dir.join("symlink")).unwrap();
    std::os::unix::fs::symlink("x".repeat(3000), dir.join("long-symlink")).unwrap();
    run(Command::new("mkfifo").arg(dir.join("fifo")));
}

/// A directory for one test.
fn workdir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("rehydrator-rootfs-").tempdir().unwrap()
}

fn source(path: &Path) -> Arc<dyn Source> {
    Arc::new(File::new(fs::File::open(path).unwrap()).unwrap())
}

/// Puts the whole view together, and checks what every map promises.
fn view(image: &dyn Source, map: &ClusterMap) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut decoded: HashMap<u32, Vec<u8>> = HashMap::new();
    for extent in &map.extents {
        assert_eq!(extent.start, out.len() as u64, "extents are sorted and leave no gap");
        assert!(extent.len > 0);
        let len = extent.len as usize;
        match extent.origin {
            Origin::Zeros => out.resize(out.len() + len, 0),
            Origin::Image { offset } => {
                let start = out.len();
                out.resize(start + len, 0);
                image.read_at(offset, &mut out[start..])?;
            }
            Origin::Cluster { id, offset } => {
                assert!(id < map.codec.count());
                let decoded_len = map.codec.decoded_len(id);
                assert!(decoded_len <= MAX_CLUSTER);
                assert!(u64::from(offset) + extent.len <= decoded_len.into());
                let decoded = match decoded.entry(id) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => new.insert(map.codec.decode(id, Vec::new())?),
                };
                assert_eq!(decoded.len(), decoded_len as usize);
                out.extend(&decoded[offset as usize..][..len]);
            }
        }
    }
    assert_eq!(out.len() as u64, map.len);
    Ok(out)
}

/// The regular files below `dir` that are not empty, each inode once: by its number on the disk, its paths.
fn regular_files(dir: &Path) -> BTreeMap<u64, Vec<PathBuf>> {
    let mut found: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            if metadata.is_dir() {
                todo.push(path);
            } else if metadata.is_file() && metadata.len() > 0 {
                found.entry(metadata.ino()).or_default().push(path);
            }
        }
    }
    found
}

/// Checks that the files lie one after the other, padded with zeros, in ascending order of their inodes.
fn check_layout(view: &[u8], placed: &[Placed]) {
    let mut at = 0;
    for file in placed {
        assert_eq!(file.start, at);
        assert!(file.len > 0);
        let end = file.start + file.len;
        at = end.next_multiple_of(ALIGN);
        assert!(view[end as usize..at as usize].iter().all(|&b| b == 0), "padding of {file:?}");
    }
    assert_eq!(at, view.len() as u64);
    assert!(placed.is_sorted_by(|a, b| a.inode < b.inode));
}

/// The nid of every path of an EROFS image, as `dump.erofs` lists them.
fn nids(image: &Path) -> BTreeMap<PathBuf, u64> {
    let mut nids = BTreeMap::new();
    let mut todo = vec![PathBuf::from("/")];
    while let Some(dir) = todo.pop() {
        let listing =
            run(trixie("dump.erofs").arg("--ls").arg(format!("--path={}", dir.display())).arg(image));
        // After the header: nid, type, name.
        let mut lines = listing.lines().skip_while(|line| line.trim() != "NID TYPE  FILENAME");
        assert!(lines.next().is_some(), "{listing}");
        for line in lines {
            let mut words = line.split_whitespace();
            let (nid, kind, name) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            let path = dir.join(name);
            match kind {
                "1" => drop(nids.insert(path, nid.parse().unwrap())),
                "2" if name != "." && name != ".." => todo.push(path),
                _ => {}
            }
        }
    }
    nids
}

/// Makes an EROFS image of `tree`, checks every file of the view against what `fsck.erofs` extracts, and gives the map.
fn check_erofs(
    mkfs: &mut Command,
    options: &[&str],
    tree: &Path,
    work: &Path,
) -> (Arc<dyn Source>, ClusterMap) {
    let path = work.join("image.erofs");
    let out = work.join("extracted");
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir_all(&out);
    run(mkfs.args(["-T0", "--quiet"]).args(options).arg(&path).arg(tree));
    run(trixie("fsck.erofs").arg(format!("--extract={}", out.display())).arg(&path));

    let image = source(&path);
    let (map, placed) = erofs::open_placed(image.clone()).unwrap_or_else(|e| panic!("{options:?}: {e}"));
    let view = view(&*image, &map).unwrap_or_else(|e| panic!("{options:?}: {e}"));
    check_layout(&view, &placed);
    let by_nid: BTreeMap<u64, &Placed> = placed.iter().map(|file| (file.inode, file)).collect();
    let mut met = 0;
    for (path, nid) in nids(&path) {
        let content = fs::read(out.join(path.strip_prefix("/").unwrap())).unwrap();
        assert_eq!(content, fs::read(tree.join(path.strip_prefix("/").unwrap())).unwrap());
        match by_nid.get(&nid) {
            None => assert!(content.is_empty(), "{options:?}: {} is missing", path.display()),
            Some(file) => {
                let found = &view[file.start as usize..][..file.len as usize];
                assert!(found == content, "{options:?}: {} differs, {file:?}", path.display());
                met += 1;
            }
        }
    }
    let files = regular_files(tree);
    assert_eq!(placed.len(), files.len(), "{options:?}");
    assert_eq!(met, files.values().map(Vec::len).sum::<usize>(), "{options:?}");
    (image, map)
}

#[test]
fn erofs_of_the_host() {
    let work = workdir();
    let tree = work.path().join("tree");
    make_tree(&tree);
    for options in [
        &[][..],
        &["-Eforce-inode-extended,noinline_data"],
        &["--chunksize=4096"],
        &["--chunksize=65536", "-Eforce-chunk-indexes"],
        &["-zlz4hc"],
        &["-zlz4", "-Elegacy-compress"],
        &["-zlz4hc", "-Eztailpacking"],
        &["-zlz4", "-Eztailpacking,legacy-compress"],
        &["-zlz4hc", "-Efragments"],
        &["-zlz4", "-Efragments,legacy-compress"],
        &["-zlz4", "-Eall-fragments"],
        &["-zlz4hc", "-Ededupe"],
        &["-zlz4", "-Efragments,dedupe,ztailpacking"],
        &["-zlz4", "-C65536"],
        &["-zlz4", "-C1048576", "-Efragments"],
        &["-zlz4", "-C65536", "-Eztailpacking"],
        &["-zlz4", "-C16384", "-Ededupe"],
        &["-zlz4", "-C65536", "-Elegacy-compress"],
        &["-zlz4", "-C8192", "--max-extent-bytes=20000"],
    ] {
        check_erofs(&mut Command::new("mkfs.erofs"), options, &tree, work.path());
    }
}

#[test]
fn erofs_of_trixie() {
    let work = workdir();
    let tree = work.path().join("tree");
    make_tree(&tree);
    for options in [
        // As the release tools call it.
        &["-zlzma,level=6", "-Efragments", "-C1048576"][..],
        &["-zlzma,level=1", "-C4096"],
        &["-zlzma,level=1", "-C65536", "-Eztailpacking"],
        &["-zlzma,level=1", "-C32768", "-Ededupe,legacy-compress"],
        &["-zdeflate", "-C65536", "-Efragments"],
        &["-zzstd,level=1", "-C65536", "-Efragments"],
        &["-zzstd,level=1", "-C65536", "-Ededupe,ztailpacking,legacy-compress"],
        &["-zlz4", "-C32768", "-Efragments,dedupe"],
        &["-b2048", "-zlz4", "-Efragments"],
    ] {
        check_erofs(&mut trixie("mkfs.erofs"), options, &tree, work.path());
    }
}

/// Makes a squashfs image of `tree` and checks the view against what `unsquashfs` extracts. The tools do not tell inode
/// numbers, so what is compared is which files there are; that they ascend is checked in the layout.
fn check_squashfs(options: &[&str], tree: &Path, work: &Path) -> (Arc<dyn Source>, ClusterMap) {
    let path = work.join("image.squashfs");
    let out = work.join("extracted");
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir_all(&out);
    run(Command::new("mksquashfs").arg(tree).arg(&path).args(["-quiet", "-no-progress"]).args(options));
    run(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).arg(&out).arg(&path));

    let image = source(&path);
    let (map, placed) = squashfs::open_placed(image.clone()).unwrap_or_else(|e| panic!("{options:?}: {e}"));
    let view = view(&*image, &map).unwrap_or_else(|e| panic!("{options:?}: {e}"));
    check_layout(&view, &placed);
    let mut found: Vec<&[u8]> =
        placed.iter().map(|file| &view[file.start as usize..][..file.len as usize]).collect();
    let mut expected: Vec<Vec<u8>> =
        regular_files(&out).values().map(|paths| fs::read(&paths[0]).unwrap()).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert!(found == expected, "{options:?}: the files differ");
    assert_eq!(expected.len(), regular_files(tree).len());
    (image, map)
}

#[test]
fn squashfs_of_every_kind() {
    let work = workdir();
    let tree = work.path().join("tree");
    make_tree(&tree);
    for options in [
        &["-comp", "zstd", "-Xcompression-level", "3"][..],
        &["-comp", "zstd", "-Xcompression-level", "3", "-b", "1M"],
        &["-comp", "zstd", "-Xcompression-level", "3", "-no-fragments"],
        &["-comp", "xz"],
        &["-comp", "xz", "-Xbcj", "x86", "-b", "1M", "-Xdict-size", "100%"],
        &["-comp", "gzip", "-always-use-fragments"],
        &["-comp", "gzip", "-noI", "-noD", "-noF", "-no-sparse", "-no-duplicates"],
        &["-comp", "lz4", "-b", "4096"],
        &["-comp", "lz4", "-Xhc", "-no-fragments", "-b", "1M"],
        &["-comp", "lzma"],
    ] {
        check_squashfs(options, &tree, work.path());
    }
    let path = work.path().join("lzo.squashfs");
    run(Command::new("mksquashfs").arg(&tree).arg(&path).args(["-quiet", "-no-progress", "-comp", "lzo"]));
    let error = squashfs::open(source(&path)).err().unwrap().to_string();
    assert!(error.contains("compressor lzo is not supported"), "{error}");
}

/// One cluster is decoded once however many files share it, and one piece of the image is one cluster.
#[test]
fn clusters_are_shared() {
    let work = workdir();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let mut noise = Noise(7);
    for i in 0..200 {
        fs::write(tree.join(format!("file-{i}")), noise.text(700)).unwrap();
    }
    let lzma = &["-zlzma,level=1", "-Efragments", "-C1048576"];
    let (_, map) = check_erofs(&mut trixie("mkfs.erofs"), lzma, &tree, work.path());
    assert_eq!(map.codec.count(), 1);
    assert_eq!(map.codec.decoded_len(0), 140_000);
    let (_, map) = check_squashfs(&["-comp", "zstd"], &tree, work.path());
    assert_eq!(map.codec.count(), 2);

    for i in 0..200 {
        fs::write(tree.join(format!("file-{i}")), Noise(i).text(20_000)).unwrap();
        fs::write(tree.join(format!("same-{i}")), Noise(i).text(20_000)).unwrap();
    }
    let (_, map) = check_squashfs(&["-comp", "zstd", "-no-fragments"], &tree, work.path());
    assert_eq!(map.codec.count(), 200);
}

#[test]
fn finds_the_image_in_the_live_rootfs() {
    let work = workdir();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), b"content").unwrap();
    let pack = |root: &str, name: &str| {
        let image = work.path().join("live-rootfs.img");
        let list =
            format!("cd {root} && find . -mindepth 1 | sort | cpio -o -H newc --quiet > {}", image.display());
        run(Command::new("sh").arg("-c").arg(list));
        let (file_system, map) = rootfs::open(source(&image))?;
        assert_eq!(file_system.len(), fs::metadata(format!("{root}/{name}")).expect("the image").len());
        io::Result::Ok(map.len)
    };

    let root = work.path().join("one");
    fs::create_dir(&root).unwrap();
    run(Command::new("mkfs.erofs").arg("--quiet").arg(root.join("root.erofs")).arg(&tree));
    fs::write(root.join("s390x-osmet"), b"later").unwrap();
    assert_eq!(pack(root.to_str().unwrap(), "root.erofs").unwrap(), ALIGN);

    let root = work.path().join("two");
    fs::create_dir_all(root.join("dir")).unwrap();
    let path = root.join("dir/root.squashfs");
    run(Command::new("mksquashfs").arg(&tree).arg(path).args(["-quiet", "-no-progress"]));
    assert_eq!(pack(root.to_str().unwrap(), "dir/root.squashfs").unwrap(), ALIGN);

    let error = pack(tree.to_str().unwrap(), "").unwrap_err().to_string();
    assert!(error.contains("neither root.erofs nor root.squashfs"), "{error}");
    let error = rootfs::open(Arc::new(vec![b'0'; 5000])).err().unwrap().to_string();
    assert!(error.contains("newc"), "{error}");
}

/// Whatever is wrong with an image, it ends in an error or in data of the promised length.
#[test]
fn damaged_images_do_no_harm() {
    let work = workdir();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let mut noise = Noise(99);
    for i in 0..40 {
        fs::write(tree.join(format!("file-{i}")), noise.text(i * 50)).unwrap();
    }
    fs::write(tree.join("text"), noise.text(150_000)).unwrap();
    fs::write(tree.join("noise"), noise.bytes(20_000)).unwrap();
    fs::write(tree.join("again"), [&fs::read(tree.join("text")).unwrap()[..90_000], b"and more"].concat())
        .unwrap();
    let work = work.path();
    let mkfs = || trixie("mkfs.erofs");
    harm(&check_erofs(&mut mkfs(), &["-zlzma,level=1", "-C65536", "-Efragments"], &tree, work), erofs::open);
    harm(&check_erofs(&mut mkfs(), &["-zlz4", "-Ededupe,legacy-compress"], &tree, work), erofs::open);
    harm(&check_erofs(&mut mkfs(), &["-zzstd", "-C16384", "-Eztailpacking"], &tree, work), erofs::open);
    harm(&check_erofs(&mut mkfs(), &["--chunksize=4096"], &tree, work), erofs::open);
    harm(&check_squashfs(&["-comp", "zstd"], &tree, work), squashfs::open);
    harm(&check_squashfs(&["-comp", "xz", "-noI", "-b", "4096"], &tree, work), squashfs::open);
}

/// Cuts an image short and changes single bytes of it.
fn harm((image, map): &(Arc<dyn Source>, ClusterMap), open: fn(Arc<dyn Source>) -> io::Result<ClusterMap>) {
    let mut bytes = vec![0; image.len() as usize];
    image.read_at(0, &mut bytes).unwrap();
    let try_it = |bytes: Vec<u8>| {
        let Ok(map) = open(Arc::new(bytes)) else { return false };
        for id in 0..map.codec.count() {
            let len = map.codec.decoded_len(id);
            assert!(len <= MAX_CLUSTER);
            if let Ok(decoded) = map.codec.decode(id, Vec::new()) {
                assert_eq!(decoded.len(), len as usize);
            }
        }
        let end = map.extents.iter().fold(0, |at, extent| {
            assert_eq!(extent.start, at);
            at + extent.len
        });
        assert_eq!(end, map.len);
        true
    };
    assert!(map.codec.count() > 0 || map.extents.iter().any(|e| matches!(e.origin, Origin::Image { .. })));
    assert!(try_it(bytes.clone()));
    let mut noise = Noise(5);
    // Squashfs pads its image, EROFS its last block.
    for len in (0..bytes.len() - 4096).step_by(bytes.len() / 40) {
        assert!(!try_it(bytes[..len].to_vec()), "cut to {len} of {}", bytes.len());
    }
    for round in 0..400 {
        // The metadata of EROFS is at the start, that of squashfs at the end.
        let near = noise.next() as usize % 6000.min(bytes.len());
        let at = match round % 3 {
            0 => near,
            1 => bytes.len() - 1 - near,
            _ => noise.next() as usize % bytes.len(),
        };
        let before = bytes[at];
        bytes[at] ^= (noise.next() as u8).max(1);
        try_it(bytes.clone());
        bytes[at] = before;
    }
}
