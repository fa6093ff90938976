//! The views of live root file systems, judged by the tools that unpack them.
//!
//! Images are made with `mkfs.erofs` and `mksquashfs`, unpacked with `fsck.erofs` and `unsquashfs`, and the view is
//! compared with what came out: every file, where it lies and that nothing else is there.

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
        for f in 0..60 {
            let len = noise.next() as usize % [30, 300, 3000, 9000][f % 4];
            fs::write(sub.join(format!("file-{f}")), noise.text(len)).unwrap();
        }
    }
    for len in [1, 4095, 4096, 4097, 8192, 131_072, 131_073, 1_048_576, 1_048_577] {
        fs::write(dir.join(format!("text-{len}")), noise.text(len)).unwrap();
        fs::write(dir.join(format!("noise-{len}")), noise.bytes(len)).unwrap();
    }
    // Text and noise in turns: compressed and plain clusters that start anywhere in a block.
    let mixed: Vec<u8> = (0..120)
        .flat_map(|i| if i % 3 == 0 { noise.bytes(5000 + i * 77) } else { noise.text(7000 + i * 131) })
        .collect();
    fs::write(dir.join("mixed"), &mixed).unwrap();
    // Deduplication finds what is the same at another offset.
    fs::write(dir.join("mixed-later"), [&noise.text(12_345), &mixed[..500_000]].concat()).unwrap();
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
    for i in 0..700 {
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
                    Entry::Vacant(new) => new.insert(map.codec.decode(id)?),
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
    run(mkfs.args(["-T0", "-d0"]).args(options).arg(&path).arg(tree));
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
        &["-Eforce-inode-compact"],
        &["-Eforce-inode-extended"],
        &["-Enoinline_data"],
        &["--chunksize=4096"],
        &["--chunksize=65536", "-Eforce-chunk-indexes"],
        &["-zlz4hc"],
        &["-zlz4"],
        &["-zlz4hc", "-Elegacy-compress"],
        &["-zlz4hc", "-Eztailpacking"],
        &["-zlz4hc", "-Eztailpacking,legacy-compress"],
        &["-zlz4hc", "-Efragments"],
        &["-zlz4hc", "-Efragments,legacy-compress"],
        &["-zlz4hc", "-Eall-fragments"],
        &["-zlz4hc", "-Ededupe"],
        &["-zlz4hc", "-Efragments,dedupe,ztailpacking"],
        &["-zlz4hc", "-C65536"],
        &["-zlz4hc", "-C1048576", "-Efragments"],
        &["-zlz4hc", "-C65536", "-Eztailpacking"],
        &["-zlz4hc", "-C16384", "-Ededupe"],
        &["-zlz4hc", "-C65536", "-Elegacy-compress"],
        &["-zlz4hc", "-C8192", "--max-extent-bytes=20000"],
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
        &["-zlzma,level=3", "-C4096"],
        &["-zlzma,level=3", "-C65536", "-Eztailpacking"],
        &["-zlzma,level=3", "-C65536", "-Ededupe,all-fragments"],
        &["-zlzma,level=3:lz4hc", "-C65536", "-Efragments"],
        &["-zdeflate", "-C65536", "-Efragments"],
        &["-zdeflate", "-C16384", "-Ededupe,ztailpacking"],
        &["-zzstd", "-C65536", "-Efragments"],
        &["-zzstd", "-C16384", "-Ededupe,ztailpacking,legacy-compress"],
        &["-zlz4hc", "-C32768", "-Efragments,dedupe,ztailpacking"],
        &["-b1024", "-zlzma", "-C16384"],
    ] {
        check_erofs(&mut trixie("mkfs.erofs"), options, &tree, work.path());
    }
}
