//! What files a manifest is, and what they are called. Pure: documents in, names out.

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{Descriptor, ImageIndex};
use serde::Deserialize;

use crate::bounded::{AtMost, shown};
use crate::digest::Digest;
use crate::registry::Platform;
use crate::transport::{MAX_LAYERS, MAX_MANIFESTS};

/// A layer that stands for none.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// The longest name of a file, in bytes: that of Linux.
const MAX_NAME: usize = 255;

/// A file in a manifest, whatever tag the manifest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The architecture as systemd names it, of an image for several.
    pub(super) arch: Option<&'static str>,
    /// What it is called, where the manifest has several files.
    title: Option<String>,
    /// What its name ends with, where the manifest has one file.
    extension: String,
    /// The digest of the file as it is served.
    pub(super) digest: Digest,
    /// Its length in bytes.
    pub(super) size: u64,
}

impl Part {
    /// The name of the file in the repository whose name ends with `last`: `LAST-TAG[-ARCH].EXTENSION`. Of several files
    /// in one manifest each has its title: as it is if the tag is in it, and else behind that.
    pub(super) fn name(&self, last: &str, tag: &str) -> String {
        let arch = self.arch.map(|arch| format!("-{arch}")).unwrap_or_default();
        match &self.title {
            Some(title) if self.arch.is_none() && names_version(title, tag) => title.clone(),
            Some(title) => format!("{last}-{tag}{arch}.{title}"),
            None => format!("{last}-{tag}{arch}.{}", self.extension),
        }
    }
}

/// Whether `tag` is in `title`, and not just a part of a longer word.
fn names_version(title: &str, tag: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    title.match_indices(tag).any(|(at, _)| {
        !part(title[..at].chars().next_back()) && !part(title[at + tag.len()..].chars().next())
    })
}

/// Whether systemd-sysupdate takes a file of this name, in a line of `SHA256SUMS` and in a URL.
pub(super) fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-+~,".contains(c);
    !name.starts_with('.')
        && name.len() <= MAX_NAME
        && name.chars().all(good)
        && !name.starts_with(super::SUMS)
        && !name.is_empty()
}

/// The files of a manifest that is no index.
pub(super) fn of_image(document: &[u8], arch: Option<&'static str>) -> Result<Vec<Part>> {
    #[derive(Deserialize)]
    struct Image {
        #[serde(alias = "blobs")]
        layers: AtMost<Layer, MAX_LAYERS>,
    }
    let image: Image = serde_json::from_slice(document).context("not a manifest of an image")?;
    let mut layers = image.layers.0;
    layers.retain(|layer| layer.media_type != EMPTY);
    if layers.len() > 1 {
        let all = layers.len();
        layers.retain(|layer| layer.title().is_some());
        if layers.is_empty() {
            bail!("{all} layers without titles are not one file");
        }
    }
    let several = layers.len() > 1;
    let part = |layer: &Layer| {
        let digest = &layer.digest;
        Ok(Part {
            arch,
            title: layer.title().filter(|_| several),
            extension: extension(layer.title().as_deref(), &layer.media_type),
            digest: digest
                .strip_prefix("sha256:")
                .with_context(|| format!("{}: not sha256", shown(digest.as_bytes())))?
                .parse()?,
            size: layer.size,
        })
    };
    layers.iter().map(part).collect()
}

/// A layer of an image, as far as it is a file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
struct Annotations {
    /// Where those who push files say what they are called.
    #[serde(rename = "org.opencontainers.image.title")]
    title: Option<String>,
}

impl Layer {
    /// The title, made a name: without slashes. One that is longer than a name can be is none.
    fn title(&self) -> Option<String> {
        let title = self.annotations.as_ref()?.title.as_ref().filter(|title| title.len() <= MAX_NAME)?;
        let title = title.trim_start_matches("./").trim_matches('/').replace('/', "-");
        (!title.is_empty()).then_some(title)
    }
}

/// The images in an index.
pub(super) struct Images {
    /// Those that are offered, with the architecture as systemd names it.
    pub(super) offered: Vec<(Descriptor, Option<&'static str>)>,
    /// Why others are not.
    pub(super) left: Vec<String>,
}

/// Finds of every architecture the image that most machines can run, and those for no platform in particular.
pub(super) fn of_index(document: &[u8]) -> Result<Images> {
    let index: ImageIndex = serde_json::from_slice(document).context("not an index of images")?;
    let images = index.manifests().len();
    ensure!(images <= MAX_MANIFESTS, "an index of {images} images: more than {MAX_MANIFESTS}");
    let (mut offered, mut left) = (Vec::new(), Vec::new());
    let mut seen = Vec::new();
    for image in index.manifests() {
        let Some(platform) = image.platform() else {
            offered.push((image.clone(), None));
            continue;
        };
        let (os, arch) = (platform.os().to_string(), platform.architecture().to_string());
        // What an image was built with stands beside it as one for an unknown platform.
        if seen.contains(&(os.clone(), arch.clone())) || os == "unknown" {
            continue;
        }
        seen.push((os.clone(), arch.clone()));
        let picked = Platform::new(Some("linux"), Some(&arch)).pick(&index);
        match (os.as_str(), architecture(&arch), picked) {
            ("linux", Some(name), Ok(picked)) => offered.push((picked.clone(), Some(name))),
            _ => left.push(format!("no name for an image for {os}/{arch}")),
        }
    }
    Ok(Images { offered, left })
}

/// What systemd calls an architecture, `%a` in a transfer file.
fn architecture(arch: &str) -> Option<&'static str> {
    Some(match arch {
        "amd64" | "x86_64" => "x86-64",
        "386" | "i386" | "i686" => "x86",
        "arm64" | "aarch64" => "arm64",
        "arm" => "arm",
        "ppc64le" => "ppc64-le",
        "ppc64" => "ppc64",
        "s390x" => "s390x",
        "riscv64" => "riscv64",
        "loong64" => "loongarch64",
        "mips64le" => "mips64-le",
        "mips64" => "mips64",
        "mipsle" => "mips-le",
        "mips" => "mips",
        _ => return None,
    })
}

/// What the name of a file ends with: as its title says, or else its media type; `raw` where neither does.
fn extension(title: Option<&str>, media_type: &str) -> String {
    let title = title.unwrap_or_default().to_ascii_lowercase();
    let (kind, compression) = kind_of_title(&title);
    let words: Vec<_> = media_type.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let kind = kind.unwrap_or(if words.contains(&"tar") { "tar" } else { "raw" });
    // Of a title that says what the file is, the media type adds nothing: oras gives every file that of a tar.
    let compression = compression.or_else(|| {
        let last = *words.last()?;
        let known =
            [("gzip", "gz"), ("gz", "gz"), ("zstd", "zst"), ("xz", "xz"), ("bzip2", "bz2"), ("bz2", "bz2")];
        known
            .iter()
            .find(|(word, _)| kind_of_title(&title).0.is_none() && *word == last)
            .map(|(_, name)| *name)
    });
    compression.map_or_else(|| kind.to_owned(), |compression| format!("{kind}.{compression}"))
}

/// What kind of file has this title, and how it is compressed.
fn kind_of_title(title: &str) -> (Option<&str>, Option<&'static str>) {
    for (short, compression) in [(".tgz", "gz"), (".txz", "xz"), (".tzst", "zst")] {
        if title.ends_with(short) {
            return (Some("tar"), Some(compression));
        }
    }
    let known = ["gz", "xz", "zst", "bz2"];
    let found = known.into_iter().find(|c| title.strip_suffix(c).is_some_and(|rest| rest.ends_with('.')));
    let stem = found.map_or(title, |c| &title[..title.len() - c.len() - 1]);
    let kind = stem.rsplit_once('.').map(|(_, kind)| kind).filter(|kind| {
        // What stands behind the dot of a version is none.
        (1..=10).contains(&kind.len())
            && kind.chars().all(|c| c.is_ascii_alphanumeric())
            && kind.starts_with(|c: char| c.is_ascii_alphabetic())
    });
    (kind.map(|kind| if kind == "img" { "raw" } else { kind }), found)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const TITLE: &str = "org.opencontainers.image.title";

    #[test]
    fn extensions() {
        for (title, media_type, expected) in [
            ("", "application/vnd.oci.image.layer.v1.tar+gzip", "tar.gz"),
            ("", "application/vnd.oci.image.layer.v1.tar+zstd", "tar.zst"),
            ("", "application/vnd.oci.image.layer.v1.tar", "tar"),
            ("", "application/vnd.docker.image.rootfs.diff.tar.gzip", "tar.gz"),
            ("", "application/vnd.docker.image.rootfs.diff.tar.zstd", "tar.zst"),
            ("", "application/octet-stream", "raw"),
            ("", "application/x-xz", "raw.xz"),
            ("", "application/vnd.example.disk+zstd", "raw.zst"),
            ("", "application/vnd.target", "raw"),
            ("disk.raw", "application/vnd.oci.image.layer.v1.tar", "raw"),
            ("disk.raw", "application/gzip", "raw"),
            ("DISK.IMG.XZ", "application/vnd.oci.image.layer.v1.tar", "raw.xz"),
            ("os-1.0.efi", "x", "efi"),
            ("os-1.0", "application/zstd", "raw.zst"),
            ("os-1.0.zst", "x", "raw.zst"),
            ("a.tgz", "x", "tar.gz"),
            ("tree", "application/vnd.oci.image.layer.v1.tar+gzip", "tar.gz"),
        ] {
            let title = Some(title).filter(|t| !t.is_empty());
            assert_eq!(extension(title, media_type), expected, "{title:?} {media_type}");
        }
    }

    fn layer(title: &str) -> Value {
        let digest = Digest::of(title.as_bytes()).oci();
        json!({ "mediaType": "application/x", "digest": digest, "size": 5, "annotations": { TITLE: title } })
    }

    fn names(layers: &[Value], tag: &str, arch: Option<&'static str>) -> Vec<String> {
        let document = json!({ "schemaVersion": 2, "layers": layers }).to_string();
        let parts = of_image(document.as_bytes(), arch).unwrap();
        parts.iter().map(|part| part.name("os", tag)).collect()
    }

    #[test]
    fn names_of_files() {
        assert_eq!(names(&[layer("disk.raw.xz")], "1.0", None), ["os-1.0.raw.xz"]);
        assert_eq!(names(&[layer("disk.raw")], "1.0", Some("x86-64")), ["os-1.0-x86-64.raw"]);
        let several = [layer("./usr/root.raw"), layer("uki_1.0.efi"), layer("a b")];
        assert_eq!(names(&several, "1.0", None), ["os-1.0.usr-root.raw", "uki_1.0.efi", "os-1.0.a b"]);
        assert_eq!(names(&several, "1", Some("arm64"))[1], "os-1-arm64.uki_1.0.efi");
        assert_eq!(names(&several, "0", None)[1], "uki_1.0.efi");
        assert_eq!(names(&several, "10", None)[1], "os-10.uki_1.0.efi");
        let mut untitled = layer("");
        untitled["annotations"] = json!({});
        assert_eq!(names(&[untitled.clone(), layer("x.raw")], "1", None), ["os-1.raw"]);
        let two = json!({ "layers": [untitled, untitled] }).to_string();
        let e = of_image(two.as_bytes(), None).unwrap_err().to_string();
        assert_eq!(e, "2 layers without titles are not one file");
        for bad in ["{}", "[]", r#"{"layers":[{"mediaType":"x","digest":"sha512:00","size":1}]}"#] {
            assert!(of_image(bad.as_bytes(), None).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_sysupdate_takes() {
        for good in ["os-1.0.raw", "a_1+2~3,4.efi"] {
            assert!(is_name(good), "{good}");
        }
        let long = "x".repeat(256);
        for bad in
            ["", ".", "..", ".x", "a/b", "a b", "a\nb", "a%b", "ä", "SHA256SUMS", "SHA256SUMS.gpg", &long]
        {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn architectures() {
        let image = |os: &str, arch: &str, variant: &str, n: u8| {
            let mut image = json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": n,
                "digest": Digest::of(&[n]).oci() });
            if !os.is_empty() {
                image["platform"] = json!({ "os": os, "architecture": arch, "variant": variant });
            }
            image
        };
        let index = json!({ "schemaVersion": 2, "manifests": [
            image("linux", "amd64", "v3", 1), image("linux", "amd64", "v1", 2), image("linux", "arm64", "v8", 3),
            image("unknown", "unknown", "", 4), image("windows", "amd64", "", 5), image("", "", "", 6),
            image("linux", "vax", "", 7)
        ] });
        let Images { offered, left } = of_index(index.to_string().as_bytes()).unwrap();
        let found: Vec<_> = offered.iter().map(|(image, arch)| (image.size(), *arch)).collect();
        assert_eq!(found, [(2, Some("x86-64")), (3, Some("arm64")), (6, None)]);
        assert_eq!(left, ["no name for an image for windows/amd64", "no name for an image for linux/vax"]);
    }
}
