//! Images in registries: built into them, signed, read from them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rehydrator::digest::Digest;
use rehydrator::recipe::SourceSpec;
use rehydrator::source::blob;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tools::registry::{PROGRAM, Registry, fails, noise, run, temp};
use crate::tools::release::{artifact, blob_of, stub_for, write};
use crate::tools::server::{Cut, Proxy};

fn zstd(plain: &[u8]) -> Vec<u8> {
    let mut writer = blob::Writer::new(Vec::new(), 3, blob::FRAME);
    writer.write_all(plain).unwrap();
    writer.finish().unwrap()
}

/// A librsync delta: all of a base of `len` bytes, then `more`.
fn delta(len: u32, more: &[u8]) -> Vec<u8> {
    let copy = [&[0x72, 0x73, 0x02, 0x36, 0x4f][..], &[0; 4], &len.to_be_bytes()].concat();
    [&copy[..], &[0x43], &(more.len() as u32).to_be_bytes(), more, &[0]].concat()
}

/// For an image that is run, with the program itself in it. gzip takes a fifth of the time of zstd, which
/// `image::podman_runs_it` has.
pub const RUNS: [&str; 3] = ["--binary", PROGRAM, "--program-compression=gzip"];

/// A release: a live rootfs, a disk that is a delta over it, and one that is its own.
pub struct Release {
    pub tmp: TempDir,
    pub rootfs: Vec<u8>,
    pub openstack: Vec<u8>,
    /// The disk for another architecture, where the release has it.
    pub other: Vec<u8>,
    /// Bytes of the blobs that the disk needs.
    openstack_blobs: u64,
}

impl Release {
    pub fn new() -> Self {
        Self::of(&["x86_64"], 11)
    }

    /// One for these architectures, of which only the second has another disk; `seed` says what is in the disk.
    pub fn of(archs: &[&str], seed: u64) -> Self {
        let tmp = temp();
        let rootfs = noise(10, 6_000_000);
        let openstack = [&rootfs[..], &noise(seed, 3000)].concat();
        let (qemu, other) = (noise(12, 5_000_000), noise(13, 700_000));
        let delta = zstd(&delta(rootfs.len() as u32, &openstack[rootfs.len()..]));
        let (stored, stored_other) = (zstd(&qemu), zstd(&other));
        let stream = br#"{"stream":"stable","architectures":{"x86_64":{"artifacts":{
            "metal":{"release":"44.1"},"openstack":{"release":"44.1"},"qemu":{"release":"44.1"}}}}}"#;
        let zstd = |plain: &[u8], blob: &[u8]| SourceSpec::Zstd {
            blob: blob_of(blob),
            plain_size: plain.len() as u64,
        };
        let plain_size = openstack.len() as u64;
        let mut artifacts = vec![
            artifact(archs[0], "metal", "rootfs.pxe", 0, blob_of(&rootfs)),
            artifact(archs[0], "openstack", "disk.qcow2", 1, blob_of(&openstack)),
            artifact(archs[0], "qemu", "disk.qcow2", 2, blob_of(&qemu)),
        ];
        let mut sources = vec![
            SourceSpec::Stored { blob: blob_of(&rootfs) },
            SourceSpec::Delta { blob: blob_of(&delta), plain_size, base: vec![0] },
            zstd(&qemu, &stored),
        ];
        let mut blobs: Vec<&[u8]> = vec![&rootfs, &delta, &stored];
        for arch in &archs[1..] {
            artifacts.push(artifact(arch, "openstack", "disk.qcow2", 3, blob_of(&other)));
            sources.push(zstd(&other, &stored_other));
            blobs.push(&stored_other);
        }
        write(&tmp.path().join("dehydrated"), stream, artifacts, sources, &blobs);
        let openstack_blobs = (rootfs.len() + delta.len()) as u64;
        Self { tmp, rootfs, openstack, other, openstack_blobs }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `build image`; gives the digest.
    pub fn build(&self, output: &str, options: &[&str]) -> String {
        let (dir, stub) = (self.text(""), self.text("stub"));
        let mut command = vec![PROGRAM, "build", "image", "--workdir", &dir, "-o", output];
        if !options.contains(&"--binary") {
            // Nothing is compressed that nobody runs.
            fs::write(&stub, stub_for(62)).unwrap();
            command.extend(["--binary", &stub]);
        }
        // On the way to a registry, nothing is written anywhere but signatures.
        let limit = ["sh", "-c", r#"ulimit -f 0; exec "$@""#, "sh"];
        let passes = output.starts_with("docker://") && !options.contains(&"--sign-key");
        let before = if passes { &limit[..] } else { &[] };
        run(&[before, &command[..], options].concat()).split(' ').next().unwrap().to_owned()
    }

    /// Runs this program with the given stdout; a failure fails the test.
    pub fn stdout(&self, args: &[&str]) -> Vec<u8> {
        let output = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

pub fn refs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[test]
fn straight_into_a_registry_and_out_of_it() {
    let release = Release::new();
    let registry = Registry::secure(release.tmp.path());
    let there = format!("docker://{}/coreos/stable:1", registry.address);
    let flags = registry.flags("");
    let digest = release.build(&there, &refs(&flags));
    assert_eq!(digest, release.build(&format!("oci:{}", release.text("layout")), &[]));
    // The second time everything is there.
    assert_eq!(digest, release.build(&there, &refs(&flags)));
    let skopeo = [&["skopeo", "inspect"][..], &refs(&flags), &[&there]].concat();
    let inspect: Value = serde_json::from_str(&run(&skopeo)).unwrap();
    assert_eq!(inspect["Digest"], digest);

    // Copies of it, as an administrator makes them.
    let from = registry.flags("src-");
    let copies = ["oci:copy:a", "oci-archive:copy.tar:b", "dir:copy-dir"].map(|copy| {
        let (transport, path) = copy.split_once(':').unwrap();
        format!("{transport}:{}", release.text(path))
    });
    for copy in &copies {
        let command = ["skopeo", "copy", "--preserve-digests", &from[0], &from[1], &there, copy];
        run(&command);
    }
    for place in copies.iter().chain([&there]) {
        let args = |command: &[&str]| -> Vec<String> {
            let all = command.iter().map(|s| s.to_string());
            all.chain(["--from".into(), place.clone()]).chain(flags.iter().cloned()).collect()
        };
        let disk = release.stdout(&refs(&args(&["rehydrate", "-", "--disk=openstack"])));
        assert!(disk == release.openstack, "{place}");
        let stream = release.stdout(&refs(&args(&["print-stream-json"])));
        assert_eq!(stream, fs::read(release.path("dehydrated/stream.json")).unwrap());
        let list: Value = serde_json::from_slice(&release.stdout(&refs(&args(&["list", "--json"])))).unwrap();
        assert!(list.to_string().contains("coreos-44-qemu.x86_64-disk.qcow2"), "{list}");
        run(&refs(
            &[&[PROGRAM.to_string(), "verify".into()], &flags[..], std::slice::from_ref(place)].concat(),
        ));
        run(&refs(&[&[PROGRAM.to_string()][..], &args(&["verify", "--rehydrate"])].concat()));
    }
    let tree = release.text("tree");
    run(&[&[PROGRAM, "pull", "--cache=no"][..], &refs(&flags), &[&there, &tree]].concat());
    assert!(Path::new(&tree).join("srv/dehydrated/stream.json").is_file());

    // As podman has it, and runs it.
    let runs = tagged(&there, "runs");
    let digest = release.build(&runs, &[&refs(&flags)[..], &RUNS].concat());
    let podman = Podman::new(&release.path("home"));
    podman.run(&[&["pull", "--quiet"][..], &refs(&flags), &[&runs]].concat());
    let name = runs.strip_prefix("docker://").unwrap();
    let found = podman.run(&["image", "inspect", "--format", "{{.Digest}}", name]);
    assert_eq!(String::from_utf8(found).unwrap().trim(), digest);
    let confined = ["run", "--rm", "--read-only", "--network=none", name, "rehydrate", "-"];
    assert!(podman.run(&[&confined[..], &["--disk=openstack"]].concat()) == release.openstack);
}

#[test]
fn only_what_is_needed_is_fetched() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    release.build(&format!("docker://{}/x:1", registry.address), &["--tls-verify=false"]);
    let needs = [
        ("--disk=openstack", release.openstack_blobs, &release.openstack),
        ("--pxe", release.rootfs.len() as u64, &release.rootfs),
    ];
    for (which, needed, expected) in needs {
        let proxy = Proxy::start(&registry.address, Cut::Never);
        let from = format!("docker://{}/x:1", proxy.address);
        let out = release.stdout(&["rehydrate", "-", which, "--from", &from, "--tls-verify=false"]);
        assert!(out == *expected);
        let fetched = proxy.down() as f64 / needed as f64;
        assert!(fetched <= 1.02, "{which}: {fetched} times the bytes it needs");
    }
    let proxy = Proxy::start(&registry.address, Cut::Never);
    let from = format!("docker://{}/x:1", proxy.address);
    release.stdout(&["list", "--from", &from, "--tls-verify=false"]);
    assert!(proxy.down() < 50_000, "{}", proxy.down());
}

#[test]
fn damage_is_found_wherever_it_is() {
    let release = Release::new();
    let layout = format!("oci:{}", release.text("layout"));
    release.build(&layout, &[]);
    run(&[PROGRAM, "verify", &layout]);
    let manifest: Value = serde_json::from_str(&run(&["skopeo", "inspect", "--raw", &layout])).unwrap();
    for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        let digest = layer["digest"].as_str().unwrap();
        let path = release.path("layout/blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        // In the padding at the end, where only the digest of the layer sees it.
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&path, &bad).unwrap();
        let e = fails(&[PROGRAM, "verify", &layout]);
        let expected = format!("sha256 mismatch: expected {}", &digest[7..]);
        assert!(e.contains(&expected), "layer {number}: {e}");
        fs::write(&path, &good).unwrap();
    }
    // A blob that an artifact needs.
    let rootfs = Digest::of(&release.rootfs);
    let layers = manifest["layers"].as_array().unwrap().iter();
    let layer = layers
        .filter_map(|l| Some((l["digest"].as_str()?, l["annotations"]["dev.rehydrator.files"].as_str()?)))
        .find(|(_, files)| files.contains(&rootfs.to_string()))
        .unwrap();
    let path = release.path("layout/blobs/sha256").join(&layer.0[7..]);
    let mut bad = fs::read(&path).unwrap();
    bad[100_000] ^= 1;
    fs::write(&path, &bad).unwrap();
    let e = fails(&[PROGRAM, "rehydrate", &release.text("out"), "--pxe", "--from", &layout]);
    assert!(e.contains(&format!("sha256 mismatch: expected {rootfs}, got ")), "{e}");
    assert_eq!(fs::read_dir(release.path("out")).unwrap().count(), 0);

    // An image whose layers were compressed on the way has nothing to go by.
    let copy = format!("dir:{}", release.text("copy"));
    release.build(&format!("oci:{}", release.text("again")), &[]);
    run(&["skopeo", "copy", "--dest-compress", &format!("oci:{}", release.text("again")), &copy]);
    let e = fails(&[PROGRAM, "list", "--from", &copy]);
    assert!(e.contains("--preserve-digests"), "{e}");
}

/// skopeo of Debian 13.
pub fn skopeo() -> Vec<String> {
    vec![concat!(env!("CARGO_MANIFEST_DIR"), "/ci/trixie").into(), "exec".into(), "skopeo".into()]
}

/// podman with a home and a store of its own.
pub struct Podman {
    home: PathBuf,
    /// Its names of directories must be short.
    storage: TempDir,
}

impl Podman {
    pub fn new(home: &Path) -> Self {
        fs::create_dir_all(home).unwrap();
        Self { home: home.to_owned(), storage: tempfile::tempdir().unwrap() }
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/ci/podman"));
        command.env("HOME", &self.home).stdin(Stdio::null());
        command.args(["--storage-driver=vfs", "--root"]).arg(self.storage.path().join("root"));
        command.arg("--runroot").arg(self.storage.path().join("run"));
        command
    }

    pub fn output(&self, words: &[&str]) -> Output {
        self.command().args(words).output().unwrap()
    }

    /// What skopeo calls an image that it has.
    pub fn stored(&self, name: &str) -> String {
        let at = |dir: &str| self.storage.path().join(dir).display().to_string();
        format!("containers-storage:[vfs@{}+{}]{name}", at("root"), at("run"))
    }

    pub fn run(&self, words: &[&str]) -> Vec<u8> {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

pub struct SigningKeys {
    gpg: TempDir,
    fingerprint: String,
}

impl SigningKeys {
    /// An OpenPGP key in `secret.asc` and `public.asc`, a key of skopeo's in `cosign.private` and `cosign.pub`, the
    /// passphrase of both in `passphrase`.
    pub fn make(dir: &Path) -> Self {
        let gpg = tempfile::Builder::new().prefix("gpg").tempdir().unwrap();
        let home = gpg.path().to_str().unwrap();
        fs::write(dir.join("passphrase"), "correct horse\n").unwrap();
        let common = ["gpg", "--batch", "--quiet", "--no-permission-warning", "--homedir", home];
        let secret = ["--pinentry-mode", "loopback", "--passphrase", "correct horse"];
        let common = [&common[..], &secret].concat();
        run(&[&common[..], &["--quick-generate-key", "signer", "ed25519", "sign", "never"]].concat());
        let list = run(&[&common[..], &["--with-colons", "--list-keys"]].concat());
        let fingerprint = list.lines().find_map(|l| l.strip_prefix("fpr:")).unwrap().trim_matches(':');
        fs::write(dir.join("public.asc"), run(&[&common[..], &["--armor", "--export"]].concat())).unwrap();
        let exported = run(&[&common[..], &["--armor", "--export-secret-keys"]].concat());
        fs::write(dir.join("secret.asc"), exported).unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let (prefix, file) = (at("cosign"), at("passphrase"));
        let generate = ["generate-sigstore-key", "--output-prefix", &prefix, "--passphrase-file", &file];
        run(&[&refs(&skopeo())[..], &generate].concat());
        Self { fingerprint: fingerprint.to_owned(), gpg }
    }
}

impl Drop for SigningKeys {
    fn drop(&mut self) {
        let home = self.gpg.path();
        let _ = Command::new("gpgconf").arg("--homedir").arg(home).args(["--kill", "gpg-agent"]).status();
    }
}

#[test]
fn signed_and_believed_by_skopeo() {
    let release = Release::new();
    let keys = SigningKeys::make(release.tmp.path());
    let registry = Registry::plain(release.tmp.path());
    let name = format!("{}/coreos/stable:44", registry.address);
    let there = format!("docker://{name}");
    let (secret, cosign) = (release.text("secret.asc"), release.text("cosign.private"));
    let sign = ["--sign-key", &secret, "--cosign-key", &cosign, "--tls-verify=false"];
    let passphrase = release.text("passphrase");
    let file = ["--sign-passphrase-file", passphrase.as_str()];
    let digest = release.build(&there, &[&sign[..], &file].concat());
    let hex = digest.strip_prefix("sha256:").unwrap();
    let signature = release.text(&format!("sigstore/coreos/stable@sha256={hex}/signature-1"));

    // The signature itself, by the host's skopeo.
    let manifest = release.text("manifest.json");
    let raw = run(&["skopeo", "inspect", "--raw", "--tls-verify=false", &there]);
    fs::write(&manifest, &raw).unwrap();
    let standalone = |manifest: &str, reference: &str| {
        let mut command = Command::new("skopeo");
        command.env("GNUPGHOME", keys.gpg.path()).arg("standalone-verify");
        command.args([manifest, reference, &keys.fingerprint, &signature]).output().unwrap()
    };
    let good = standalone(&manifest, &name);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    assert!(!standalone(&manifest, &tagged(&name, "45")).status.success());
    let changed = release.text("changed.json");
    fs::write(&changed, raw.replacen("stable", "stablE", 1)).unwrap();
    assert!(!standalone(&changed, &name).status.success());

    // A policy that demands both, by the skopeo of Debian 13.
    let policy = |key: &str, cosign: &str| {
        let demands = json!([
            { "type": "signedBy", "keyType": "GPGKeys", "keyPath": release.text(key) },
            { "type": "sigstoreSigned", "keyPath": release.text(cosign) },
        ]);
        let policy = json!({ "default": [{ "type": "reject" }],
            "transports": { "docker": { registry.address.clone(): demands } } });
        fs::write(release.path("policy.json"), policy.to_string()).unwrap();
    };
    fs::create_dir(release.path("registries.d")).unwrap();
    let lookaside = format!(
        "docker:\n  {}:\n    lookaside: file://{}\n    use-sigstore-attachments: true\n",
        registry.address,
        release.text("sigstore")
    );
    fs::write(release.path("registries.d/test.yaml"), lookaside).unwrap();
    let (policy_file, registries) = (release.text("policy.json"), release.text("registries.d"));
    let copy = |from: &str, to: &str| -> Vec<String> {
        let to = format!("dir:{}", release.text(to));
        let options =
            ["--policy", &policy_file, "--registries.d", &registries, "copy", "--src-tls-verify=false"];
        let all = options.into_iter().chain([from, to.as_str()]).map(str::to_owned);
        skopeo().into_iter().chain(all).collect()
    };
    policy("public.asc", "cosign.pub");
    run(&refs(&copy(&there, "trusted")));

    // Ourselves.
    let (public, cosign_pub) = (release.text("public.asc"), release.text("cosign.pub"));
    let sigstore = release.text("sigstore");
    let verify = |place: &str| {
        let words =
            [PROGRAM, "verify", place, "--tls-verify=false", "--key", &public, "--cosign-key", &cosign_pub];
        words.into_iter().chain(["--lookaside", &sigstore]).map(str::to_owned).collect::<Vec<_>>()
    };
    run(&refs(&verify(&there)));

    // The same image signed again has the same cosign signature, and one more of OpenPGP.
    assert_eq!(release.build(&there, &[&sign[..], &file].concat()), digest);
    let tag = tagged(&there, &format!("sha256-{hex}.sig"));
    let signatures: Value =
        serde_json::from_str(&run(&["skopeo", "inspect", "--raw", "--tls-verify=false", &tag])).unwrap();
    assert_eq!(signatures["layers"].as_array().unwrap().len(), 1);
    assert!(Path::new(&signature.replace("signature-1", "signature-2")).exists());

    // Another name, and an image that nobody signed.
    let other = tagged(&there, "45");
    let retag = ["skopeo", "copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"];
    run(&[&retag[..], &[&there, &other]].concat());
    let e = fails(&refs(&verify(&other)));
    assert!(e.contains("it is of ") && e.contains("stable:44"), "{e}");
    fails(&refs(&copy(&other, "other")));
    let unsigned = format!("docker://{}/coreos/unsigned:44", registry.address);
    release.build(&unsigned, &["--tls-verify=false"]);
    let e = fails(&refs(&verify(&unsigned)));
    assert!(e.contains("no signature in "), "{e}");
    fails(&refs(&copy(&unsigned, "unsigned")));
    let rehydrate = [PROGRAM, "rehydrate", "-", "--pxe", "--tls-verify=false", "--cosign-key", &cosign_pub];
    let e = fails(&[&rehydrate[..], &["--from", &unsigned]].concat());
    assert!(e.contains("no signature: there is no sha256-"), "{e}");

    // Other keys.
    fs::create_dir(release.path("others")).unwrap();
    let others = SigningKeys::make(&release.path("others"));
    for (key, cosign) in [("others/public.asc", "cosign.pub"), ("public.asc", "others/cosign.pub")] {
        policy(key, cosign);
        fails(&refs(&copy(&there, "wrong")));
        let (key, cosign) = (release.text(key), release.text(cosign));
        let command = [PROGRAM, "verify", &there, "--tls-verify=false", "--lookaside", &sigstore];
        let e = fails(&[&command[..], &["--key", &key, "--cosign-key", &cosign]].concat());
        assert!(e.contains("signed by an unknown key") || e.contains("not made with this key"), "{e}");
    }
    drop(others);

    // A layout takes the cosign signature along, and the OpenPGP one stays beside.
    let tagged = format!("oci:{}:{name}", release.text("layout"));
    assert_eq!(release.build(&tagged, &[&sign[..], &file].concat()), digest);
    let identity = ["--identity", name.as_str()];
    run(&[&refs(&verify(&tagged))[..], &identity].concat());
    // The name of a layout is of no meaning.
    run(&refs(&verify(&tagged)));
    let nameless = format!("oci:{}", release.text("nameless"));
    let build = [PROGRAM, "build", "image", "--workdir", &release.text(""), "-o", &nameless];
    let e = fails(&[&build[..], &RUNS, &sign, &file].concat());
    assert!(e.contains("--sign-identity says how"), "{e}");

    // The passphrase.
    fs::write(&passphrase, "wrong\n").unwrap();
    for (key, message) in [(&sign[..2], "the passphrase is wrong"), (&sign[2..4], "the passphrase is wrong")]
    {
        let e = fails(&[&build[..], key, &file].concat());
        assert!(e.contains(message), "{e}");
        let e = fails(&[&build[..], key].concat());
        assert!(e.contains("it is encrypted, and no passphrase is given"), "{e}");
    }
}

#[test]
fn keys_of_openssl() {
    let release = Release::new();
    let (sec1, pkcs8, public) = (release.text("sec1"), release.text("pkcs8"), release.text("public"));
    run(&["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-out", &sec1]);
    run(&["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", &sec1, "-out", &pkcs8]);
    run(&["openssl", "ec", "-in", &sec1, "-pubout", "-out", &public]);
    for key in [&sec1, &pkcs8] {
        let layout = format!("oci:{}-layout:quay.io/x/y:z", key);
        release.build(&layout, &["--cosign-key", key]);
        let verify = [PROGRAM, "verify", &layout, "--cosign-key", &public];
        run(&verify);
        run(&[&verify[..], &["--identity", "quay.io/x/y:z"]].concat());
        let e = fails(&[&verify[..], &["--identity", "quay.io/x/other:z"]].concat());
        assert!(e.contains("not of quay.io/x/other:z"), "{e}");
    }
}

#[test]
fn small_layers_and_several_architectures() {
    let release = Release::new();
    let registry = Registry::plain(release.tmp.path());
    // Programs, as far as their headers go.
    let (stub, other) = (release.text("stub"), release.text("other"));
    let mut digests = Vec::new();
    fs::write(&stub, stub_for(62)).unwrap();
    fs::write(&other, stub_for(183)).unwrap();
    let there = format!("docker://{}/many:1", registry.address);
    let cap = 1 << 20;
    let options = ["--binary", &stub, "--binary", &other, "--max-layer=1M", "--tls-verify=false"];
    let digest = release.build(&there, &options);
    let raw = |image: &str| -> Value {
        serde_json::from_str(&run(&["skopeo", "inspect", "--raw", "--tls-verify=false", image])).unwrap()
    };
    let index = raw(&there);
    assert_eq!(index["mediaType"], "application/vnd.oci.image.index.v1+json");
    let mut shared = Vec::new();
    for image in index["manifests"].as_array().unwrap() {
        let digest = image["digest"].as_str().unwrap();
        let manifest = raw(&format!("docker://{}/many@{digest}", registry.address));
        let layers = manifest["layers"].as_array().unwrap().clone();
        assert!(layers[1..].iter().all(|l| l["size"].as_u64().unwrap() <= cap), "{layers:?}");
        assert!(layers.len() > 12, "{layers:?}");
        shared.push(layers[1..].to_vec());
        let arch = image["platform"]["architecture"].as_str().unwrap();
        let own = [PROGRAM, "digest", &there, "--arch", arch, "--tls-verify=false"];
        assert_eq!(run(&own).trim(), digest);
        digests.push(digest.to_owned());
    }
    assert_eq!(shared[0], shared[1]);
    assert_ne!(digests[0], digests[1]);
    let e = fails(&[PROGRAM, "digest", &there, "--arch=s390x", "--tls-verify=false"]);
    assert!(e.contains("no image for linux/s390x; there are: linux/"), "{e}");

    // What spans layers comes back: from there, and from a copy of all.
    let layout = format!("oci:{}", release.text("all"));
    let copy = ["skopeo", "copy", "--all", "--preserve-digests", "--src-tls-verify=false", &there, &layout];
    run(&copy);
    assert_eq!(digest, release.build(&format!("oci:{}", release.text("direct")), &options));
    for place in [&there, &layout] {
        let command = ["rehydrate", "-", "--disk=openstack", "--tls-verify=false", "--from", place];
        assert!(release.stdout(&command) == release.openstack);
        run(&[PROGRAM, "verify", "--rehydrate", "--tls-verify=false", place]);
    }
    // A blob in parts in a directory, as in a container.
    let bundle = release.text("bundle");
    let image = format!("{}:x", release.text("one"));
    release.build(&format!("oci:{image}"), &["--max-layer=1M", "--program-compression=gzip"]);
    run(&["umoci", "unpack", "--rootless", "--image", &image, &bundle]);
    let data = format!("{bundle}/rootfs/srv/dehydrated");
    assert!(release.stdout(&["rehydrate", "-", "--disk=openstack", "--data", &data]) == release.openstack);
    run(&[PROGRAM, "verify", "--data", &data]);
}

/// Changes a byte in the middle of a file.
pub fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// The name of an image with another tag. (A port of the registry may hold the digits of a tag.)
pub fn tagged(image: &str, tag: &str) -> String {
    format!("{}:{tag}", image.rsplit_once(':').unwrap().0)
}

/// As an administrator brings an image to where no network is: from a registry into a directory or a layout, from there
/// into another registry, the signatures along with it; and people there demand them.
#[test]
fn mirrored_offline() {
    let release = Release::new();
    let keys = SigningKeys::make(release.tmp.path());
    let (far, near) = (Registry::plain(release.tmp.path()), Registry::plain(release.tmp.path()));
    let source = format!("docker://{}/coreos/stable:44", far.address);
    let (secret, cosign, file) =
        (release.text("secret.asc"), release.text("cosign.private"), release.text("passphrase"));
    let sign = ["--sign-key", &secret, "--cosign-key", &cosign, "--sign-passphrase-file", &file];
    let digest = release.build(&source, &[&sign[..], &["--tls-verify=false"], &RUNS].concat());
    let signature = |image: &str| tagged(image, &format!("{}.sig", digest.replace(':', "-")));
    let tls = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let copy = |from: &str, to: &str| {
        run(&[&["skopeo", "--insecure-policy", "copy", "--preserve-digests"][..], &tls, &[from, to]].concat())
    };
    let places = [("dir", release.text("usb"), release.text("usb-sig")), {
        let layout = release.text("layout");
        ("oci", format!("{layout}:image"), format!("{layout}:sig"))
    }];
    for (number, (transport, image, signatures)) in places.iter().enumerate() {
        let there = format!("docker://{}/mirror{number}/coreos/stable:44", near.address);
        let (image, signatures) = (format!("{transport}:{image}"), format!("{transport}:{signatures}"));
        copy(&source, &image);
        copy(&signature(&source), &signatures);
        copy(&image, &there);
        copy(&signatures, &signature(&there));
        // The lookaside tree is files, under the name of the repository.
        let lookaside = release.path(&format!("lookaside{number}/mirror{number}"));
        fs::create_dir_all(&lookaside).unwrap();
        run(&["cp", "-r", &release.text("sigstore/coreos"), lookaside.to_str().unwrap()]);
        let config = release.path("home/.config/containers/registries.d");
        fs::create_dir_all(&config).unwrap();
        let root = release.text(&format!("lookaside{number}"));
        let yaml = format!(
            "docker:\n  {}:\n    lookaside: file://{root}\n    use-sigstore-attachments: true\n",
            near.address
        );
        fs::write(config.join("mirror.yaml"), yaml).unwrap();
        let identity = json!({ "type": "remapIdentity",
            "prefix": format!("{}/mirror{number}", near.address), "signedPrefix": far.address });
        let policy = json!({ "default": [{ "type": "reject" }], "transports": { "docker": {
            near.address.clone(): [
                { "type": "signedBy", "keyType": "GPGKeys", "keyPath": release.text("public.asc"),
                  "signedIdentity": identity },
                { "type": "sigstoreSigned", "keyPath": release.text("cosign.pub"),
                  "signedIdentity": identity },
            ] } } });
        fs::write(release.path("policy.json"), policy.to_string()).unwrap();
        let (policy, registries) = (release.text("policy.json"), config.display().to_string());
        let new = skopeo();
        let demand = ["--policy", &policy, "--registries.d", &registries, "copy", "--src-tls-verify=false"];
        let out = format!("dir:{}", release.text(&format!("out{number}")));
        run(&[&refs(&new)[..], &demand, &[&there, &out]].concat());
        let identity = format!("{}/coreos/stable:44", far.address);
        let verify = [PROGRAM, "verify", &there, "--tls-verify=false", "--key", &release.text("public.asc")];
        let rest = ["--cosign-key", &release.text("cosign.pub"), "--identity", &identity];
        run(&[&verify[..], &rest, &["--lookaside", &release.text("sigstore")]].concat());

        // What was not signed does not get in.
        let other = there.replace("stable:44", "unsigned:44");
        release.build(&other, &["--tls-verify=false"]);
        fails(&[&refs(&new)[..], &demand, &[&other, &out]].concat());

        // podman of Debian 12 has "sigstore disabled": it gets the other demand alone.
        let mut openpgp: Value = serde_json::from_slice(&fs::read(&policy).unwrap()).unwrap();
        openpgp["transports"]["docker"][&near.address].as_array_mut().unwrap().truncate(1);
        fs::write(&policy, openpgp.to_string()).unwrap();
        let podman = Podman::new(&release.path("home"));
        let pull = ["pull", "--quiet", "--tls-verify=false", "--signature-policy", &policy];
        let refused = podman.output(&[&pull[..], &[&other]].concat());
        assert!(!refused.status.success());
        podman.run(&[&pull[..], &[&there]].concat());
        let confined = ["run", "--rm", "--read-only", "--network=none", "--cap-drop=all", "--user=1000"];
        let name = there.strip_prefix("docker://").unwrap();
        let ran = podman.run(&[&confined[..], &[name, "rehydrate", "-", "--disk=openstack"]].concat());
        assert!(ran == release.openstack);

        // A layer that was changed on its way is taken neither into a registry nor by us.
        let manifest: Value = serde_json::from_str(&run(&["skopeo", "inspect", "--raw", &image])).unwrap();
        let layer = &manifest["layers"][2]["digest"].as_str().unwrap()["sha256:".len()..];
        let blobs = release.path(if *transport == "dir" { "usb" } else { "layout/blobs/sha256" });
        flip(&blobs.join(layer));
        // The registry has this layer already, and would not be sent it.
        let damaged = format!("oci:{}", release.text("damaged"));
        fails(&["skopeo", "--insecure-policy", "copy", "--preserve-digests", &image, &damaged]);
        let damaged = format!("{damaged}-{number}-ours");
        let e = fails(&[PROGRAM, "mirror", "image", &image, &damaged]);
        assert!(e.contains(&format!("sha256 mismatch: expected {layer}, got ")), "{e}");
        let e = fails(&[PROGRAM, "verify", &image]);
        assert!(e.contains(&format!("layer sha256:{layer}: ")) && e.contains("sha256 mismatch"), "{e}");
    }
    drop(keys);
}
