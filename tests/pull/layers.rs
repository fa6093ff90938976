//! Layers and images made by hand, for what the tools would not make, and trees in a form that can be compared.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rehydrator::digest::Digest;
use serde_json::{Value, json};

use crate::tools::example::{ok, rehydrator};

/// A tar stream that takes anything for a name.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    /// Adds a member.
    pub(crate) fn add(mut self, kind: u8, path: &str, link: &str, content: &[u8]) -> Self {
        let size = content.len() as u64;
        self.0.extend_from_slice(header(kind, path, link, size).as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, path: &str, content: &str) -> Self {
        self.add(b'0', path, "", content.as_bytes())
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.add(b'5', path, "", b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.add(b'2', path, target, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.add(b'1', path, target, b"")
    }

    /// Pax records for the next member.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let plain = key.len() + value.len() + 3;
            let mut len = plain + 1;
            while len != plain + len.to_string().len() {
                len = plain + len.to_string().len();
            }
            write!(bytes, "{len} {key}=").unwrap();
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        self.add(b'x', "pax", "", &bytes)
    }

    /// Changes the last header that was added, and corrects its checksum.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut [u8])) -> Self {
        let at = self.0.len() - 512;
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(&self.0[at..]);
        change(header.as_mut_bytes());
        header.set_cksum();
        self.0[at..].copy_from_slice(header.as_bytes());
        self
    }

    /// The stream, ended.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

fn header(kind: u8, path: &str, link: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    let bytes = header.as_mut_bytes();
    bytes[156] = kind;
    bytes[..path.len().min(100)].copy_from_slice(&path.as_bytes()[..path.len().min(100)]);
    bytes[157..157 + link.len().min(100)].copy_from_slice(&link.as_bytes()[..link.len().min(100)]);
    if matches!(kind, b'3' | b'4') {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
    }
    header.set_cksum();
    header
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut out).unwrap();
    out
}

/// A layer: the blob, and the diff ID that the configuration gives it.
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: Digest,
}

impl Layer {
    pub(crate) fn plain(tar: Vec<u8>) -> Self {
        Self { diff_id: Digest::of(&tar), blob: tar }
    }

    /// One compressed with gzip.
    pub(crate) fn gzip(tar: &[u8]) -> Self {
        Self { diff_id: Digest::of(tar), blob: gzip(tar) }
    }
}

/// Writes an OCI layout with one image, and gives its reference.
pub(crate) fn layout(dir: &Path, layers: &[Layer]) -> String {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8], media_type: &str| -> Value {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.to_string()), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.oci(), "size": bytes.len() })
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.oci()).collect();
    let config = json!({ "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = blob(&serde_json::to_vec(&config).unwrap(), "application/vnd.oci.image.config.v1+json");
    let media_type = |layer: &Layer| match layer.blob.starts_with(&[0x1F, 0x8B]) {
        true => "application/vnd.oci.image.layer.v1.tar+gzip",
        false => "application/vnd.oci.image.layer.v1.tar",
    };
    let layers: Vec<_> = layers.iter().map(|layer| blob(&layer.blob, media_type(layer))).collect();
    let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers });
    let mut manifest =
        blob(&serde_json::to_vec(&manifest).unwrap(), "application/vnd.oci.image.manifest.v1+json");
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}", dir.display())
}

/// `pull REFERENCE DIR`, without a cache.
pub(crate) fn pull(reference: &str, dir: &Path) -> Command {
    let mut command = rehydrator();
    command.args(["pull", "--cache=no", reference]).arg(dir);
    command
}

/// All that there is to say of each file of a tree, by path.
pub(crate) fn tree(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    walk(root, root, &mut found, &mut HashMap::new());
    found
}

fn walk(root: &Path, path: &Path, found: &mut BTreeMap<Vec<u8>, String>, links: &mut HashMap<u64, Vec<u8>>) {
    let meta = fs::symlink_metadata(path).unwrap();
    let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
    let kind = meta.file_type();
    let mut text =
        format!("{:o} {}:{} {}.{:09}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
    if kind.is_symlink() {
        text += &format!(" -> {:?}", fs::read_link(path).unwrap());
    } else if kind.is_file() {
        text += &format!(" {} {}", meta.len(), Digest::of(&fs::read(path).unwrap()));
    } else if kind.is_char_device() || kind.is_block_device() {
        text += &format!(" device {:x}", meta.rdev());
    }
    if !kind.is_dir() && meta.nlink() > 1 {
        let first = links.entry(meta.ino()).or_insert_with(|| name.clone());
        text += &format!(" same as {:?}", String::from_utf8_lossy(first));
    }
    for (attribute, value) in xattrs(path) {
        text += &format!(" {attribute}={value}");
    }
    found.insert(name, text);
    if kind.is_dir() {
        let mut entries: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for entry in entries {
            walk(root, &entry, found, links);
        }
    }
}

/// Extended attributes, in hex.
pub(crate) fn xattrs(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; 4096];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..len].split(|&b| b == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 4096];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (String::from_utf8(name.to_vec()).unwrap(), hex::encode(&value[..len]))
        })
        .filter(|(name, _)| name != "security.selinux")
        .collect()
}

/// Fails with what differs, and only that.
#[track_caller]
pub(crate) fn assert_same(left: &BTreeMap<Vec<u8>, String>, right: &BTreeMap<Vec<u8>, String>) {
    let mut differ = String::new();
    for name in left.keys().chain(right.keys().filter(|name| !left.contains_key(*name))) {
        let (l, r) = (left.get(name), right.get(name));
        if l != r {
            differ += &format!("{:?}\n  {l:?}\n  {r:?}\n", String::from_utf8_lossy(name));
        }
    }
    assert!(differ.is_empty(), "{differ}");
}

/// Runs this very test as root: when it is not, in a name space where it is. True where it is to go on.
pub(crate) fn rooted(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let own = std::env::current_exe().unwrap();
    let said = ok(Command::new("podman").arg("unshare").arg(own).args([test, "--exact", "--nocapture"]));
    assert!(String::from_utf8_lossy(&said).contains("1 passed"), "there is no test {test}");
    false
}

/// Whether devices can be made here: not even root can in a name space of users.
pub(crate) fn may_mknod(dir: &Path) -> bool {
    let path = dir.join("probe");
    let mode = rustix::fs::Mode::RUSR;
    let kind = rustix::fs::FileType::CharacterDevice;
    let made = rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, rustix::fs::makedev(1, 3));
    made.is_ok() && fs::remove_file(path).is_ok()
}
