//! The program as it serves, images in a registry, and a system that is kept up to date.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::write::GzEncoder;
use rehydrator::digest::Digest;
use rehydrator::registry::{Client, Manifest, Reference};
use serde_json::{Value, json};

use crate::tools::Gpg;
use crate::tools::registry::run;
use crate::tools::serving::Serving;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const TITLE: &str = "org.opencontainers.image.title";

/// `rehydrator serve`, as curl sees it.
pub struct Serve {
    serving: Serving,
    pub url: String,
}

impl Serve {
    pub fn start(args: &[&str]) -> Self {
        let serving = Serving::start(args);
        Self { url: format!("http://{}", serving.address), serving }
    }

    /// The number of the process.
    pub fn id(&self) -> u32 {
        self.serving.child.id()
    }

    /// The most memory that it has had in use, in MiB.
    pub fn peak(&self) -> u64 {
        self.serving.peak()
    }

    /// Ends it, and gives what it said.
    pub fn log(self) -> String {
        self.serving.log()
    }

    /// What curl gets, with its status code; the connection must end well.
    pub fn get(&self, path: &str, args: &[&str]) -> (u16, Vec<u8>) {
        let (exit, status, body) = self.curl(path, args);
        assert_eq!(exit, 0, "{path}");
        (status, body)
    }

    /// Exit code of curl, status code, body.
    pub fn curl(&self, path: &str, args: &[&str]) -> (i32, u16, Vec<u8>) {
        let url = format!("{}/{path}", self.url);
        let status = "%{stderr}%{http_code}";
        let mut curl = Command::new("curl");
        curl.args(["-s", "--path-as-is", "-w", status]).args(args).arg(&url);
        let output = curl.output().expect("curl is needed: install curl");
        let status = String::from_utf8(output.stderr).unwrap().parse().unwrap();
        (output.status.code().unwrap(), status, output.stdout)
    }

    pub fn text(&self, path: &str) -> String {
        let (status, body) = self.get(path, &[]);
        let body = String::from_utf8(body).unwrap();
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// The names in `SHA256SUMS`.
    pub fn names(&self, repository: &str) -> Vec<String> {
        let sums = self.text(&format!("{repository}/SHA256SUMS"));
        sums.lines().map(|line| line.split_once("  ").unwrap().1.to_owned()).collect()
    }
}

/// A layer: media type, title or nothing, content.
pub type Layer<'a> = (&'a str, &'a str, &'a [u8]);

/// Pushes blobs and gives the manifest of them.
pub fn manifest(client: &Client, to: &Reference, layers: &[Layer<'_>]) -> Manifest {
    let push = |media_type: &str, bytes: &[u8]| -> Value {
        let open = |offset: u64| -> std::io::Result<Box<dyn Read + '_>> {
            Ok(Box::new(Cursor::new(&bytes[offset as usize..])))
        };
        let digest = Digest::of(bytes);
        client.push_blob(to, digest, bytes.len() as u64, &[], &open, &|_| {}).unwrap();
        json!({ "mediaType": media_type, "digest": digest.oci(), "size": bytes.len() })
    };
    let config = push("application/vnd.oci.empty.v1+json", b"{}");
    let layer = |(media_type, title, bytes): &Layer<'_>| {
        let mut layer = push(media_type, bytes);
        if !title.is_empty() {
            layer["annotations"] = json!({ TITLE: title });
        }
        layer
    };
    let layers: Vec<_> = layers.iter().map(layer).collect();
    document(
        MANIFEST,
        &json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers }),
    )
}

pub fn document(media_type: &str, document: &Value) -> Manifest {
    let bytes = document.to_string().into_bytes();
    Manifest { digest: Digest::of(&bytes), bytes, media_type: media_type.into() }
}

pub fn push(client: &Client, to: &Reference, layers: &[Layer<'_>]) -> Manifest {
    let manifest = manifest(client, to, layers);
    client.push_manifest(to, &manifest).unwrap();
    manifest
}

/// An image for several architectures, each of one layer.
pub fn push_index(client: &Client, to: &Reference, images: &[(&str, Layer<'_>)]) {
    let image = |(arch, layer): &(&str, Layer<'_>)| {
        let manifest = manifest(client, to, &[*layer]);
        client.push_manifest(&to.with_digest(manifest.digest), &manifest).unwrap();
        json!({ "mediaType": MANIFEST, "digest": manifest.digest.oci(), "size": manifest.bytes.len(),
            "platform": { "os": "linux", "architecture": arch } })
    };
    let images: Vec<_> = images.iter().map(image).collect();
    let index = document(INDEX, &json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": images }));
    client.push_manifest(to, &index).unwrap();
}

/// A compressed archive of one file.
pub fn tar_gz(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content).unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

/// A key that signs: the file with the secret key and gpg with the public one.
pub fn key(dir: &Path) -> (PathBuf, Gpg, String) {
    let gpg = Gpg::new();
    let fingerprint = gpg.key("", "Updates <updates@example.com>", "never");
    let path = dir.join("secret.key");
    fs::write(&path, gpg.run("", &["--armor", "--export-secret-keys", &fingerprint], b"")).unwrap();
    (path, gpg, fingerprint)
}

/// The Debian 13 of ci/trixie with changes of its own, in which a root without rights runs systemd-sysupdate.
pub struct System {
    tree: String,
    dir: PathBuf,
}

impl System {
    /// One that trusts `keys`, a keyring.
    pub fn new(dir: &Path, keys: &[u8]) -> Self {
        let trixie = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/trixie");
        let tree = run(&[trixie, "--where"]).trim().to_owned();
        let program = Path::new(&tree).join("usr/lib/systemd/systemd-sysupdate");
        assert!(program.exists(), "systemd-sysupdate is needed: ci/trixie systemd-container");
        let system = Self { tree, dir: dir.to_owned() };
        for name in ["tree", "work"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        system.write("etc/systemd/import-pubring.gpg", keys);
        system
    }

    /// Where a file is that is not as in Debian.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("changes").join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Sets up a component that is updated from `url`: `target` in `/srv/COMPONENT` becomes what `source` is.
    pub fn transfer(&self, component: &str, url: &str, source: [&str; 2], target: [&str; 2]) {
        let text = format!(
            "[Transfer]\nVerify=yes\n\n[Source]\nType={}\nPath={url}\nMatchPattern={}\n\n[Target]\nType={}\n\
             Path=/srv/{component}\nMatchPattern={}\nCurrentSymlink=/srv/{component}/current\nInstancesMax=2\n",
            source[0], source[1], target[0], target[1]
        );
        self.write(&format!("etc/sysupdate.{component}.d/50-all.transfer"), text.as_bytes());
        fs::create_dir_all(self.path(&format!("srv/{component}"))).unwrap();
    }

    /// Runs systemd-sysupdate; gives whether it succeeded, its stdout and its stderr.
    pub fn try_sysupdate(&self, component: &str, verb: &str) -> (bool, String, String) {
        let script = "set -e; mount -t overlay overlay -o \
             lowerdir=\"$1\",upperdir=\"$2/changes\",workdir=\"$2/work\",userxattr \"$2/tree\"; \
             mount --rbind /dev \"$2/tree/dev\"; mount --rbind /proc \"$2/tree/proc\"; \
             chroot \"$2/tree\" /usr/lib/systemd/systemd-sysupdate --no-pager -C \"$3\" \"$4\" || code=$?; \
             chmod 700 \"$2/work/work\"; exit ${code:-0}";
        let output = Command::new("unshare")
            .args(["-rm", "sh", "-c", script, "sh", &self.tree])
            .arg(&self.dir)
            .args([component, verb])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .output()
            .expect("unshare is needed: install util-linux");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }

    /// Runs systemd-sysupdate, and gives the words it printed on stdout.
    pub fn sysupdate(&self, component: &str, verb: &str) -> Vec<String> {
        let (good, stdout, stderr) = self.try_sysupdate(component, verb);
        assert!(good, "systemd-sysupdate -C {component} {verb}: {stdout}{stderr}");
        stdout.split_whitespace().map(Into::into).collect()
    }
}
