//! Pulling from a registry through the cache: by several at once, after damage, after a kill, beside a purge.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;

use crate::pull::layers::{Layer, Tar, assert_same, layout, pull, tree};
use crate::tools::example::{fails, ok, rehydrator, stderr, tool};
use crate::tools::registry::{Registry, noise};

/// A registry with images `one` and `two`, which share layers.
struct Fixture {
    dir: tempfile::TempDir,
    registry: Registry,
    /// The layers of `one`.
    layers: Vec<Digest>,
}

impl Fixture {
    fn new(size: usize) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let registry = Registry::plain(dir.path());
        let layer = |n: u64| {
            let tar = Tar::default().file("same", &n.to_string());
            Layer::gzip(&tar.add(b'0', &format!("noise-{n}"), "", &noise(n, size)).end())
        };
        let mut digests = vec![];
        for (name, numbers) in [("one", [1, 2, 3, 4]), ("two", [1, 2, 5, 3])] {
            let layers: Vec<_> = numbers.into_iter().map(layer).collect();
            if name == "one" {
                digests = layers.iter().map(|layer| Digest::of(&layer.blob)).collect();
            }
            let image = layout(&dir.path().join(name), &layers);
            let to = format!("docker://{}/test/{name}", registry.address);
            ok(tool("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", &image, &to]));
            ok(&mut pull(&image, &dir.path().join(format!("expected-{name}"))));
        }
        Self { dir, registry, layers: digests }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cached(&self, digest: Digest) -> PathBuf {
        self.path("cache/sha256").join(digest.to_string())
    }

    fn pull(&self, image: &str, out: &str) -> Command {
        let mut command = rehydrator();
        command.args(["pull", "--tls-verify=false", "--cache"]).arg(self.path("cache"));
        command.arg(format!("{}/test/{image}", self.registry.address)).arg(self.path(out));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn purge(&self, options: &[&str]) -> String {
        let command = &mut rehydrator();
        String::from_utf8(ok(command.args(["purge", "--cache"]).arg(self.path("cache")).args(options)))
            .unwrap()
    }

    #[track_caller]
    fn check(&self, image: &str, out: &str) {
        assert_same(&tree(&self.path(out)), &tree(&self.path(&format!("expected-{image}"))));
    }

    /// All that is in the cache is what its name says; gives how many there are.
    fn check_cache(&self) -> usize {
        let entries = fs::read_dir(self.path("cache/sha256")).unwrap().map(|e| e.unwrap().path());
        let wrong = |path: &&PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            Digest::of(&fs::read(path).unwrap()).to_string() != name
        };
        let all: Vec<_> = entries.collect();
        assert_eq!(all.iter().find(wrong), None);
        all.len()
    }
}

/// Waits until there is such a file in the cache.
fn wait_for(cache: &Path, child: &mut Child, what: impl Fn(&str) -> bool) {
    let start = Instant::now();
    while !fs::read_dir(cache.join("sha256"))
        .is_ok_and(|mut entries| entries.any(|e| what(e.unwrap().file_name().to_str().unwrap())))
    {
        assert!(child.try_wait().unwrap().is_none(), "it has ended already");
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, signal: &str) {
    ok(tool("kill").arg(signal).arg(child.id().to_string()));
}

#[test]
fn eight_at_once_and_one_is_killed() {
    let f = Fixture::new(8 << 20);
    let mut first = f.pull("one", "killed").spawn().unwrap();
    wait_for(&f.path("cache"), &mut first, |name| name.ends_with(".partial"));
    let others: Vec<_> = (0..7)
        .map(|i| {
            let (image, out) = (["one", "two"][i % 2], format!("out-{i}"));
            (image, f.pull(image, &out).spawn().unwrap(), out)
        })
        .collect();
    signal(&first, "-KILL");
    first.wait().unwrap();
    assert!(!f.path("killed").exists());
    for (image, child, out) in others {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        f.check(image, &out);
    }
    assert_eq!(f.check_cache(), 5);

    // Nothing of a layer is transferred any more: the registry does not even have them.
    for digest in &f.layers {
        let hex = digest.to_string();
        let blob = format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]);
        let found = ok(tool("find").arg(f.dir.path()).arg("-path").arg(format!("*/{blob}")));
        fs::remove_file(String::from_utf8(found).unwrap().trim()).unwrap();
    }
    ok(&mut f.pull("one", "again"));
    f.check("one", "again");
    let image = format!("{}/test/one", f.registry.address);
    let said = fails(pull(&image, &f.path("none")).arg("--tls-verify=false"));
    assert!(said.contains("layer sha256:"), "{said}");
    assert!(f.purge(&[]).starts_with("5 of 5 blobs removed"));
    // What the killed one has left beside its directory is removed by the next one after a while.
    let left = || fs::read_dir(f.dir.path()).unwrap().map(|e| e.unwrap().path()).find(|p| hidden(p));
    let abandoned = left().unwrap();
    ok(tool("touch").args(["-d", "1 hour ago"]).arg(&abandoned));
    fails(&mut f.pull("one", "killed"));
    assert_eq!(left(), None);
}

fn hidden(path: &Path) -> bool {
    path.file_name().unwrap().to_str().unwrap().starts_with(".killed.rehydrator-")
}

#[test]
fn damage_and_parts() {
    let f = Fixture::new(1 << 20);
    ok(&mut f.pull("one", "out"));
    f.check("one", "out");
    let path = f.cached(f.layers[1]);
    let good = fs::read(&path).unwrap();
    let damages: [fn(&mut Vec<u8>); 3] = [|b| b[70_000] ^= 1, |b| b.truncate(9), |b| b.push(0)];
    for damage in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        fs::write(&path, bad).unwrap();
        let output = f.pull("one", "out").arg("--force").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains("damaged in the cache: fetching it again"), "{}", stderr(&output));
        f.check("one", "out");
        assert_eq!(f.check_cache(), 4);
    }
    // A part is gone on with, if it is right.
    let partial = path.with_file_name(format!("{}.partial", f.layers[1]));
    let parts = [good[..good.len() / 2].to_vec(), good.clone(), noise(9, 5000), noise(9, good.len() + 5)];
    for (i, part) in parts.into_iter().enumerate() {
        fs::remove_file(&path).unwrap();
        fs::write(&partial, part).unwrap();
        let output = f.pull("one", "out").arg("--force").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("starting over"), i == 2, "{i}: {}", stderr(&output));
        f.check("one", "out");
        assert_eq!(f.check_cache(), 4);
    }
}

#[test]
fn purge_beside_a_pull() {
    let f = Fixture::new(8 << 20);
    ok(&mut f.pull("two", "warm"));
    ok(tool("touch").args(["-d", "3 days ago"]).arg(f.cached(f.layers[0])));
    // Stopped somewhere in the middle, with all that it will need.
    let mut child = f.pull("one", "out").spawn().unwrap();
    wait_for(&f.path("cache"), &mut child, |name| name.starts_with(&f.layers[3].to_string()));
    signal(&child, "-STOP");
    let said = f.purge(&[]);
    assert!(said.starts_with("1 of "), "{said}");
    for digest in &f.layers[..3] {
        assert!(f.cached(*digest).exists());
    }
    signal(&child, "-CONT");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    f.check("one", "out");

    ok(tool("touch").args(["-d", "3 days ago"]).arg(f.cached(f.layers[2])));
    assert!(f.purge(&["--older-than", "4d"]).starts_with("0 of 4"));
    assert!(f.purge(&["--older-than", "2d"]).starts_with("1 of 4"));
    assert!(!f.cached(f.layers[2]).exists());
    assert!(f.purge(&["--keep-bytes", "18M"]).starts_with("1 of 3"));
    assert_eq!(f.check_cache(), 2);
}

/// An answer of a registry that is not what the manifest says.
#[test]
fn a_registry_that_lies() {
    let f = Fixture::new(100_000);
    let hex = f.layers[2].to_string();
    let found = ok(tool("find").arg(f.dir.path()).arg("-path").arg(format!("*/{hex}/data")));
    let found = String::from_utf8(found).unwrap();
    let mut bytes = Vec::new();
    fs::File::open(found.trim()).unwrap().read_to_end(&mut bytes).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(found.trim(), bytes).unwrap();
    let said = fails(&mut f.pull("one", "out"));
    assert!(said.contains(&format!("layer sha256:{hex}: ")), "{said}");
    assert!(said.contains("mismatch: expected"), "{said}");
    assert!(!f.path("out").exists());
    assert!(!f.cached(f.layers[2]).exists());
}
