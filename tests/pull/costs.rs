//! What hostile images and registries cost: each bound is reached, in little time and memory, and nothing is left behind.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use serde_json::{Value, json};

use crate::pull::layers::{Layer, Tar, gzip, layout, pull, rooted, tree};
use crate::tools::Ended;
use crate::tools::example::{fails, ok, rehydrator, stderr};
use crate::tools::server::{Reply, Request, Server};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The longest that anything here takes; without the bounds it is minutes.
const TIME: Duration = Duration::from_secs(60);

/// The memory that anything here takes at most, in bytes.
const MEMORY: u64 = 200 << 20;

fn temp() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(bytes).oci(), "size": bytes.len() })
}

/// Documents and blobs by digest, and the manifest that has all tags.
#[derive(Clone, Default)]
struct Content {
    root: Vec<u8>,
    root_type: String,
    blobs: HashMap<String, Vec<u8>>,
}

impl Content {
    /// An image of these layers: descriptors, and what they are when decompressed.
    fn image(layers: &[(Value, Digest)]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|(_, diff_id)| diff_id.oci()).collect();
        let config = json!({ "architecture": "amd64", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": diff_ids } });
        let config = config.to_string().into_bytes();
        let layers: Vec<_> = layers.iter().map(|(layer, _)| layer).collect();
        let root = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": layers,
            "config": descriptor(CONFIG, &config) });
        let content =
            Self { root: root.to_string().into_bytes(), root_type: MANIFEST.into(), ..Self::default() };
        content.with(config)
    }

    fn index(manifests: &[Value]) -> Self {
        let root = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
        Self { root: root.to_string().into_bytes(), root_type: INDEX.into(), ..Self::default() }
    }

    fn with(mut self, blob: Vec<u8>) -> Self {
        self.blobs.insert(Digest::of(&blob).oci(), blob);
        self
    }

    /// What a good registry answers.
    fn answer(&self, request: &Request) -> Reply {
        let what = request.path.rsplit('/').next().unwrap();
        if let Some(blob) = self.blobs.get(what) {
            return Reply::range(request, blob).header("Content-Type", MANIFEST);
        }
        let tag =
            request.path.contains("/manifests/") && (what == "1" || Digest::of(&self.root).oci() == what);
        match tag {
            true => Reply::new(200, self.root.clone()).header("Content-Type", self.root_type.clone()),
            false => Reply::new(404, ""),
        }
    }

    fn serve(self) -> Server {
        Server::start(move |request| self.answer(request))
    }
}

/// A layer as it should be.
fn layer(tar: &[u8]) -> (Value, Digest) {
    (descriptor(LAYER, tar), Digest::of(tar))
}

/// `pull` of what `server` has, into a new directory, through a cache.
struct Puller {
    dir: tempfile::TempDir,
    image: String,
}

impl Puller {
    fn new(server: &Server) -> Self {
        Self { dir: temp(), image: format!("{}/x:1", server.address) }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("there/out")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = rehydrator();
        command.args(["pull", "--tls-verify=false", "--authfile=/dev/null", "--cache"]);
        command.arg(self.dir.path().join("cache")).args(more).arg(&self.image).arg(self.out());
        command
    }

    /// Fails with this text, and leaves nothing, not in the cache either.
    #[track_caller]
    fn refused(&self, more: &[&str], text: &str) {
        let ended = Ended::run(&mut self.command(more));
        cheap(&ended, text);
        let left = |dir: &str| fs::read_dir(self.dir.path().join(dir)).map_or(0, Iterator::count);
        assert_eq!((left("there"), left("cache/sha256")), (0, 0), "{text}");
    }
}

/// It failed with this text, in little time and memory.
#[track_caller]
fn cheap(ended: &Ended, text: &str) {
    assert!(!ended.success && ended.said.contains(text), "{text}: {}", ended.said);
    assert!(ended.time < TIME, "{text}: {:?}", ended.time);
    assert!(ended.peak < MEMORY, "{text}: {} MiB", ended.peak >> 20);
    assert!(ended.said.len() < 64 << 10, "{text}: {} bytes are said", ended.said.len());
}

/// Every file has attributes of other names, none of which can be set.
#[test]
fn what_is_told_of_an_image() {
    let dir = temp();
    let tar = (0..4).fold(Tar::default(), |tar, file| {
        let names: Vec<_> = (0..20_000).map(|n| format!("SCHILY.xattr.none{file}.{n}")).collect();
        let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        tar.pax(&records).file(&format!("f{file}"), "")
    });
    let image = layout(&dir.path().join("image"), &[Layer::gzip(&tar.end())]);
    let ended = Ended::run(&mut pull(&image, &dir.path().join("out")));
    assert!(ended.success, "{}", ended.said);
    let told = ended.said.lines().filter(|line| line.contains("f0")).count();
    assert!((100..=110).contains(&told), "{told}");
    assert!(
        ended.said.contains("f0 and 79899 more: other things not done as the image says"),
        "{}",
        ended.said
    );
    assert!(ended.time < TIME && ended.peak < MEMORY, "{:?}, {} MiB", ended.time, ended.peak >> 20);
}

/// Many opaque whiteouts of a directory of many files; of directories in each other; and the same name again and again.
#[test]
fn whiteouts_cost_what_they_remove() {
    const MANY: usize = 1000;
    let dir = temp();
    let deep = |depth: usize| "d/".repeat(depth);
    let bottom = deep(50);
    let lower = (0..MANY).fold(Tar::default(), |tar, n| {
        tar.file(&format!("many/{n}"), "").pax(&[("path", format!("{bottom}{n}").as_bytes())]).file("x", "")
    });
    let lower = lower.file("hidden/a", "");
    let mut upper = Tar::default().file("many/new", "new");
    for n in 0..MANY {
        upper = upper.file("many/.wh..wh..opq", "").file(&format!("many/new-{n}"), "").file(".wh.hidden", "");
    }
    let at = |tar: Tar, path: String| tar.pax(&[("path", path.as_bytes())]).file("x", "");
    for depth in (1..=50).rev() {
        upper = at(upper, format!("{}.wh..wh..opq", deep(depth))).file(".wh.many", "");
        upper = at(upper, format!("{}new", deep(depth)));
    }
    let image = layout(&dir.path().join("image"), &[Layer::gzip(&lower.end()), Layer::gzip(&upper.end())]);
    let ended = Ended::run(&mut pull(&image, &dir.path().join("out")));
    assert!(ended.success, "{}", ended.said);
    assert!(ended.time < TIME && ended.peak < MEMORY, "{:?}, {} MiB", ended.time, ended.peak >> 20);
    let found = tree(&dir.path().join("out"));
    let under = |name: &str| found.keys().filter(|path| path.starts_with(name.as_bytes())).count();
    assert_eq!((under("many/new"), under("many/"), under("hidden")), (MANY + 1, MANY + 1, 0));
    // Fifty directories with one file in each.
    assert_eq!(under("d"), 100);
}

/// Nothing is fetched of an image whose layers are too long, and nothing is kept of one that shows only when unpacked.
#[test]
fn layers_that_are_too_long() {
    let claimed = json!({ "mediaType": LAYER, "digest": Digest::of(b"endless").oci(), "size": 1u64 << 40 });
    let server = Content::image(&[(claimed, Digest::of(b"x"))]).serve();
    let puller = Puller::new(&server);
    puller.refused(&["--max-size=1M"], "the layers have 1099511627776 bytes, more than 1048576");
    puller.refused(&[], "the layers have 1099511627776 bytes, more than 68719476736");
    assert!(!server.lines().iter().any(|line| line.contains(&Digest::of(b"endless").oci())));

    let bomb = gzip(&vec![0; 64 << 20]);
    let small = Tar::default().file("f", "x").end();
    let layers = [layer(&small), (descriptor(LAYER, &bomb), Digest::of(b"bomb"))];
    let server = Content::image(&layers).with(bomb).with(small.clone()).serve();
    Puller::new(&server).refused(&["--max-size=1M"], "the image is larger than 1048576 bytes");

    // What comes is longer than the manifest says, or something else.
    for content in [vec![0; 8 << 20], vec![0; small.len()]] {
        let good = Content::image(&[layer(&small)]);
        let digest = Digest::of(&small).oci();
        let server = Server::start(move |request| match request.path.contains(&digest) {
            true => Reply::new(200, content.clone()),
            false => good.answer(request),
        });
        Puller::new(&server).refused(&[], "sha256 mismatch");
    }
}

/// Archives that are long only when they are decompressed: no file of that length comes about.
#[test]
fn archives_that_are_too_long() {
    let dir = temp();
    let zeros = vec![0; 256 << 20];
    let zstd = zstd::encode_all(&zeros[..], 1).unwrap();
    for (name, bytes) in [("a.tar.gz", gzip(&zeros)), ("a.tar.zst", zstd)] {
        let archive = dir.path().join(name);
        fs::write(&archive, bytes).unwrap();
        for transport in ["oci-archive", "docker-archive"] {
            let mut bounded = Command::new("bash");
            // In units of 1024 bytes: the bound, and what an archive may have beside the image.
            bounded
                .args(["-c", r#"ulimit -f 20000; exec "$@""#, "bash"])
                .arg(env!("CARGO_BIN_EXE_rehydrator"));
            bounded.args(["--progress=none", "pull", "--cache=no", "--max-size=1M"]);
            bounded.arg(format!("{transport}:{}", archive.display())).arg(dir.path().join("out"));
            cheap(&Ended::run(&mut bounded), "the archive takes more than 1048576 bytes when decompressed");
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Names of megabytes in an archive, all of which are in memory.
#[test]
fn names_in_an_archive() {
    let dir = temp();
    let archive = dir.path().join("a.tar");
    let names = (0..20).map(|n| format!("{n}/{}", "x".repeat(500_000)));
    let tar = names.fold(Tar::default(), |tar, name| tar.pax(&[("path", name.as_bytes())]).file("x", ""));
    fs::write(&archive, tar.end()).unwrap();
    let image = format!("oci-archive:{}", archive.display());
    cheap(&Ended::run(&mut pull(&image, &dir.path().join("out"))), "names of more than 8388608 bytes");
}

/// An archive of docker names its layers itself.
#[test]
fn archives_of_docker() {
    let dir = temp();
    let archive = dir.path().join("a.tar");
    let save = |layers: &[&str], tar: Tar| {
        let manifest = json!([{ "Config": "config", "RepoTags": [], "Layers": layers }]).to_string();
        fs::write(&archive, tar.file("manifest.json", &manifest).file("config", "{}").end()).unwrap();
    };
    let run =
        || Ended::run(&mut pull(&format!("docker-archive:{}", archive.display()), &dir.path().join("out")));
    save(&["l"; 5000], Tar::default().file("l", "x"));
    cheap(&run(), "an image of 5000 layers: more than 4096");
    // Four thousand names of one long layer: it is read once. That it is none is found later.
    let long = Tar::default().add(b'0', "l", "", &vec![0; 16 << 20]);
    let links = (0..4000).fold(long, |tar, n| tar.symlink(&format!("l{n}"), "l"));
    let names: Vec<_> = (0..4000).map(|n| format!("l{n}")).collect();
    save(&names.iter().map(String::as_str).collect::<Vec<_>>(), links);
    cheap(&run(), "configuration");
    let sparse: [(&str, &[u8]); 2] = [("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"1000000000000")];
    save(&["l"], Tar::default().pax(&sparse).file("l", "x"));
    cheap(&run(), "member \"l\": sparse");
}

fn mirror(server: &Server, dir: &Path, more: &[&str]) -> Ended {
    let mut command = rehydrator();
    command.args(["mirror", "image", "--tls-verify=false", "--authfile=/dev/null"]).args(more);
    command.arg(format!("{}/x:1", server.address)).arg(format!("oci:{}", dir.join("layout").display()));
    Ended::run(&mut command)
}

/// A manifest of nothing, of so many bytes.
fn padded(n: usize, bytes: usize) -> Vec<u8> {
    let annotations = json!({ "n": n.to_string(), "padding": "x".repeat(bytes) });
    json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": [], "annotations": annotations })
        .to_string()
        .into_bytes()
}

#[test]
fn manifests_of_an_image() {
    let dir = temp();
    // In bytes: twenty of 4 MB.
    let large: Vec<_> = (0..20).map(|n| padded(n, 4_000_000)).collect();
    let index = Content::index(&large.iter().map(|m| descriptor(MANIFEST, m)).collect::<Vec<_>>());
    let server = large.into_iter().fold(index, Content::with).serve();
    let text = "the manifests of the image have more than 67108864 bytes together";
    cheap(&mirror(&server, dir.path(), &[]), text);
    // In numbers.
    let entries: Vec<_> = (0..1001).map(|n| descriptor(MANIFEST, &padded(n, 0))).collect();
    let server = Content::index(&entries).serve();
    cheap(&mirror(&server, dir.path(), &[]), "a list of more than 1000 entries");
    // The same one many times is read once.
    let one = padded(1, 0);
    let server = Content::index(&vec![descriptor(MANIFEST, &one); 900]).with(one.clone()).serve();
    let ended = mirror(&server, dir.path(), &["--dry-run"]);
    assert!(ended.success, "{}", ended.said);
    let asked = format!("GET /v2/x/manifests/{}", Digest::of(&one).oci());
    assert_eq!(server.lines().iter().filter(|line| **line == asked).count(), 1);
    // Layers.
    let layers = vec![layer(b"x"); 4097];
    let server = Content::image(&layers).serve();
    cheap(&mirror(&server, dir.path(), &[]), "a list of more than 4096 entries");
    Puller::new(&server).refused(&[], "a manifest of 4097 layers: more than 4096");
    // Indexes in indexes.
    let mut nested = Content::index(&[descriptor(MANIFEST, &one)]);
    for _ in 0..5 {
        let inner = descriptor(INDEX, &nested.root);
        nested =
            Content { blobs: nested.clone().with(nested.root.clone()).blobs, ..Content::index(&[inner]) };
    }
    cheap(&mirror(&nested.serve(), dir.path(), &[]), "indexes nested more than 4 deep");
    // Thousands of platforms, none of which is wanted, are not all named.
    let platforms = (0..15_000).map(|n| {
        json!({ "mediaType": MANIFEST, "digest": Digest::of(b"x").oci(), "size": 1,
            "platform": { "os": "plan9", "architecture": format!("a{n}") } })
    });
    let server = Content::index(&platforms.collect::<Vec<_>>()).serve();
    Puller::new(&server).refused(&[], "a19 and 14980 more");
}

/// Everything is referred to by another manifest, without an end.
#[test]
fn referrers_of_referrers() {
    let dir = temp();
    let made = Arc::new(AtomicUsize::new(0));
    let root = Content { root: padded(0, 0), root_type: MANIFEST.into(), ..Content::default() };
    let (count, of) = (made.clone(), |n| padded(n, 2_000_000));
    let server = Server::start(move |request| {
        let known = (1..=count.load(Ordering::Relaxed)).rev().take(2).map(of);
        let what = request.path.rsplit('/').next().unwrap();
        if request.path.contains("/referrers/") {
            let next = descriptor(MANIFEST, &of(count.fetch_add(1, Ordering::Relaxed) + 1));
            return Reply::new(200, json!({ "schemaVersion": 2, "manifests": [next] }).to_string());
        }
        match known.into_iter().find(|bytes| Digest::of(bytes).oci() == what) {
            Some(bytes) => Reply::new(200, bytes).header("Content-Type", MANIFEST),
            None => root.answer(request),
        }
    });
    let ended = mirror(&server, dir.path(), &["--referrers", "--dry-run"]);
    cheap(&ended, "the manifests of the image have more than 67108864 bytes together");
    assert!(made.load(Ordering::Relaxed) < 40);

    // One page that names too many.
    let root = Content { root: padded(0, 0), root_type: MANIFEST.into(), ..Content::default() };
    let many = json!({ "manifests": vec![descriptor(MANIFEST, b"x"); 1001] }).to_string();
    let server = Server::start(move |request| match request.path.contains("/referrers/") {
        true => Reply::new(200, many.clone()),
        false => root.answer(request),
    });
    cheap(&mirror(&server, dir.path(), &["--referrers"]), "referrers: a list of more than 1000 entries");
}

/// Pages of tags that never end.
#[test]
fn tags_without_end() {
    let dir = temp();
    let pages = |page: String| {
        let number = AtomicUsize::new(0);
        Server::start(move |_| {
            let n = number.fetch_add(1, Ordering::Relaxed);
            Reply::new(200, page.clone()).header("Link", format!("</v2/x/tags/list?last={n}>; rel=\"next\""))
        })
    };
    let tags = |server: &Server| mirror(server, dir.path(), &["--tags=v*"]);
    let short = pages(json!({ "tags": vec!["a"; 200_000] }).to_string());
    cheap(&tags(&short), "tags: more than 524288");
    assert_eq!(short.lines().len(), 3);
    let long = pages(json!({ "tags": vec!["a".repeat(100_000); 40] }).to_string());
    cheap(&tags(&long), "tags: more than 67108864 bytes");
    assert_eq!(long.lines().len(), 17);
    let one = pages(json!({ "tags": vec!["a"; 600_000] }).to_string());
    cheap(&tags(&one), "tags: a list of more than 524288 entries");
}

/// A registry sends us to another server, which wants to know who we are.
#[test]
fn a_password_is_for_the_registry_alone() {
    let tar = Tar::default().file("f", "x").end();
    let evil = Server::start(|request| match request.path.starts_with("/token") {
        true => Reply::new(200, r#"{"token":"t"}"#),
        false => Reply::new(401, "").header(
            "WWW-Authenticate",
            format!("Bearer realm=\"http://{}/token\"", request.header("host").unwrap()),
        ),
    });
    let (content, address) = (Content::image(&[layer(&tar)]), evil.address.clone());
    let server = Server::start(move |request| {
        if request.header("authorization").is_none() {
            return Reply::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\"");
        }
        match request.path.ends_with(&Digest::of(&tar).oci()) {
            true => Reply::new(307, "").header("Location", format!("http://{address}/blob")),
            false => content.answer(request),
        }
    });
    Puller::new(&server).refused(&["--creds=user:secret"], "401 Unauthorized");
    let asked = evil.log();
    assert!(!asked.is_empty());
    for request in asked {
        assert_eq!((request.path.as_str(), request.header("authorization")), ("/blob", None));
    }
}

/// A refresh token is sent to the token service, not on to where that sends us.
#[test]
fn a_refresh_token_is_not_redirected() {
    let evil = Server::start(|_| Reply::new(200, r#"{"token":"t"}"#));
    let address = evil.address.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        "/token" => Reply::new(307, "").header("Location", format!("http://{address}/token")),
        _ => Reply::new(401, "").header(
            "WWW-Authenticate",
            format!("Bearer realm=\"http://{}/token\"", request.header("host").unwrap()),
        ),
    });
    let puller = Puller::new(&server);
    let authfile = puller.dir.path().join("auth.json");
    let entry = json!({ "auths": { &server.address: { "identitytoken": "secret" } } });
    fs::write(&authfile, entry.to_string()).unwrap();
    let mut command = rehydrator();
    command.args(["pull", "--tls-verify=false", "--cache=no", "--authfile"]).arg(authfile);
    let said = fails(command.arg(&puller.image).arg(puller.out()));
    assert!(said.contains("/token: 307 Temporary Redirect"), "{said}");
    let sent = server.log().into_iter().find(|request| request.path == "/token").unwrap();
    assert!(String::from_utf8(sent.body).unwrap().contains("refresh_token=secret"));
    assert!(evil.log().is_empty());
}

/// A layer that is elsewhere is fetched from there only where the user says so.
#[test]
fn foreign_layers() {
    let tar = Tar::default().file("f", "x").end();
    let body = tar.clone();
    let elsewhere = Server::start(move |_| Reply::new(200, body.clone()));
    let mut descriptor = layer(&tar);
    let url = format!("http://{}/layer", elsewhere.address);
    descriptor.0["urls"] = json!([url]);
    descriptor.0["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
    let server = Content::image(&[descriptor.clone()]).serve();
    let puller = Puller::new(&server);
    let text = format!("not in the registry, and not fetched from {url} without --foreign-layers");
    puller.refused(&[], &text);
    assert!(elsewhere.log().is_empty());
    ok(&mut puller.command(&["--foreign-layers"]));
    assert_eq!(fs::read_to_string(puller.out().join("f")).unwrap(), "x");
    // What comes from there is held to the manifest, too.
    let long = Server::start(|_| Reply::new(200, vec![0; 1 << 20]));
    descriptor.0["urls"] = json!([format!("http://{}/layer", long.address)]);
    let server = Content::image(&[descriptor.clone()]).serve();
    Puller::new(&server)
        .refused(&["--foreign-layers"], "more than 2048 bytes, which the manifest says it has");
    // The registry has it: nobody else is asked.
    let server = Content::image(&[descriptor]).with(tar).serve();
    ok(&mut Puller::new(&server).command(&[]));
    assert_eq!(long.log().len(), 1);
}

/// A tree with a setuid file is not open to others, while it is made and after, and is all of the image.
#[test]
fn setuid_files_and_devices_are_not_for_others() {
    if !rooted("pull::costs::setuid_files_and_devices_are_not_for_others") {
        return;
    }
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
    // Who has the root of the image has an account here.
    let setuid = Tar::default().dir("./").with(|header| header[108..116].copy_from_slice(b"0001750\0"));
    let setuid = setuid.file("plain", "").dir("d").file("d/su", "");
    let setuid = setuid.with(|header| header[100..108].copy_from_slice(b"0004755\0")).end();
    // Not below the project, which may be in a home that is closed.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let image = layout(&dir.path().join("image"), &[Layer::gzip(&setuid)]);
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let output = pull(&image, &out).args(more).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        (mode(&out), fs::metadata(&out).unwrap().uid(), mode(&out.join("d/su")), stderr(&output))
    };
    let (root, owner, su, said) = run("open", &[]);
    assert_eq!((root, owner, su), (0o700, 0, 0o4755));
    assert!(said.contains("open: only its owner can enter it"), "{said}");
    let (root, owner, su, said) = run("without", &["--no-setuid"]);
    assert_eq!((root, owner, su), (0o755, 1000, 0o755));
    assert!(!said.contains("only its owner"), "{said}");
    fs::create_dir(dir.path().join("closed")).unwrap();
    fs::set_permissions(dir.path().join("closed"), PermissionsExt::from_mode(0o700)).unwrap();
    let (root, owner, su, said) = run("closed/deep/out", &[]);
    assert_eq!((root, owner, su), (0o755, 1000, 0o4755));
    assert!(!said.contains("only its owner"), "{said}");

    let device =
        layout(&dir.path().join("device"), &[Layer::plain(Tar::default().add(b'3', "null", "", b"").end())]);
    let out = dir.path().join("no-device");
    ok(pull(&device, &out).arg("--no-devices"));
    assert_eq!((mode(&out), fs::read_dir(&out).unwrap().count()), (0o755, 0));

    // While it is made, all of it is in a directory that nobody else can enter.
    let content = Content::image(&[layer(&setuid), layer(b"later")]).with(setuid);
    let server = Server::start(move |request| match request.path.ends_with(&Digest::of(b"later").oci()) {
        true => {
            std::thread::sleep(Duration::from_secs(2));
            Reply::new(404, "")
        }
        false => content.answer(request),
    });
    let puller = Puller::new(&server);
    let mut child = puller.command(&[]).stderr(Stdio::null()).spawn().unwrap();
    let there = puller.out().parent().unwrap().to_owned();
    let start = Instant::now();
    let seen = loop {
        assert!(start.elapsed() < TIME && child.try_wait().unwrap().is_none());
        let inside = fs::read_dir(&there).into_iter().flatten().map(|entry| entry.unwrap().path());
        if let Some(staging) = inside.into_iter().find(|path| path.join("root/d/su").exists()) {
            break mode(&staging);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(seen, 0o700);
    assert!(!child.wait().unwrap().success());
    assert_eq!(fs::read_dir(there).unwrap().count(), 0);
}

/// A root that not even its owner may write to, over another one.
#[test]
fn a_read_only_root_replaces_another() {
    let dir = temp();
    let tar = Tar::default().dir("./").with(|header| header[100..108].copy_from_slice(b"0000555\0"));
    let image = layout(&dir.path().join("image"), &[Layer::gzip(&tar.file("f", "x").end())]);
    let out = dir.path().join("out");
    for _ in 0..2 {
        ok(pull(&image, &out).arg("--force"));
        assert_eq!(fs::metadata(&out).unwrap().mode() & 0o7777, 0o555);
        let mut content = String::new();
        fs::File::open(out.join("f")).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "x");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
