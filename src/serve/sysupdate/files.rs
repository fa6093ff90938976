//! What files a manifest is, and what they are called. Pure: documents in, names out.

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::Descriptor;
use serde::Deserialize;

use crate::digest::Digest;
use crate::registry::{Platform, parse_index};

/// A layer that stands for none.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// The longest name of a file, in bytes: that of Linux.
const MAX_NAME: usize = 255;

/// The longest manifest or index that is parsed, in bytes: several times what [`MAX_LAYERS`] or [`MAX_IMAGES`] need.
const MAX_DOCUMENT: usize = 1 << 20;

/// The most layers of a manifest. More than container tools make, and of files there are a few.
const MAX_LAYERS: usize = 1000;

/// The most images of an index: each of them is compared with the others.
const MAX_IMAGES: usize = 200;

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
    /// An upper bound of the memory the part takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        size_of::<Self>() + self.title.as_ref().map_or(0, String::len) + self.extension.len()
    }

    /// The name of the file in the repository whose name ends with `last`: `LAST-TAG[-ARCH].EXTENSION`. Of several files
    /// in one manifest each has its title: as it is if the tag is in it, and else behind that. `bound` is for a list whose key
    /// signs for other repositories too: there, a title is only taken as it is if it begins with `last`.
    pub(super) fn name(&self, last: &str, tag: &str, bound: bool) -> String {
        let arch = self.arch.map(|arch| format!("-{arch}")).unwrap_or_default();
        let is_own =
            |title: &str| !bound || title.strip_prefix(last).is_some_and(|rest| rest.starts_with(['-', '_']));
        match &self.title {
            Some(title) if self.arch.is_none() && names_version(title, tag) && is_own(title) => title.clone(),
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

/// A layer, as far as it matters here; the rest of a document is not kept.
#[derive(Deserialize)]
struct Layer {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
struct Annotations {
    #[serde(rename = "org.opencontainers.image.title")]
    title: Option<String>,
}

/// The files of a manifest that is no index.
pub(super) fn of_image(document: &[u8], arch: Option<&'static str>) -> Result<Vec<Part>> {
    #[derive(Deserialize)]
    struct Image {
        #[serde(alias = "blobs")]
        layers: Vec<Layer>,
    }
    ensure_short(document)?;
    let image: Image = serde_json::from_slice(document).context("not a manifest of an image")?;
    let mut layers = image.layers;
    ensure!(layers.len() <= MAX_LAYERS, "{} layers: more than {MAX_LAYERS}", layers.len());
    layers.retain(|layer| layer.media_type != EMPTY);
    if layers.len() > 1 {
        let all = layers.len();
        layers.retain(|layer| title(layer).is_some());
        if layers.is_empty() {
            bail!("{all} layers without titles are not one file");
        }
    }
    let several = layers.len() > 1;
    let part = |layer: &Layer| {
        let title = title(layer);
        ensure!(
            title.as_ref().is_none_or(|title| title.len() <= MAX_NAME),
            "a title of more than {MAX_NAME} bytes"
        );
        Ok(Part {
            arch,
            extension: extension(title.as_deref(), &layer.media_type),
            title: title.filter(|_| several),
            digest: layer
                .digest
                .strip_prefix("sha256:")
                .with_context(|| format!("digest {:.100?}: not sha256", layer.digest))?
                .parse()?,
            size: layer.size,
        })
    };
    layers.iter().map(part).collect()
}

fn ensure_short(document: &[u8]) -> Result<()> {
    let len = document.len();
    ensure!(len <= MAX_DOCUMENT, "a document of {len} bytes: more than {MAX_DOCUMENT}");
    Ok(())
}

/// The title of a layer, made a name: without slashes.
fn title(layer: &Layer) -> Option<String> {
    let title = layer.annotations.as_ref()?.title.as_ref()?;
    let title = title.trim_start_matches("./").trim_matches('/').replace('/', "-");
    (!title.is_empty()).then_some(title)
}

/// The images in an index.
#[derive(Debug)]
pub(super) struct Images {
    /// Those that are offered, with the architecture as systemd names it.
    pub(super) offered: Vec<(Descriptor, Option<&'static str>)>,
    /// Why others are not.
    pub(super) left: Vec<String>,
}

/// Finds of every architecture the image that most machines can run, and those for no platform in particular.
pub(super) fn of_index(document: &[u8]) -> Result<Images> {
    ensure_short(document)?;
    let index = parse_index(document)?;
    let count = index.manifests().len();
    ensure!(count <= MAX_IMAGES, "{count} images in an index: more than {MAX_IMAGES}");
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
            _ => left.push(format!("no name for an image for {os:.100}/{arch:.100}")),
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
        json!({ "mediaType": "application/x", "digest": digest, "size": 5, "annotations": { "org.opencontainers.image.title": title } })
    }

    fn names(layers: &[Value], tag: &str, arch: Option<&'static str>) -> Vec<String> {
        let document = json!({ "schemaVersion": 2, "layers": layers }).to_string();
        let parts = of_image(document.as_bytes(), arch).unwrap();
        parts.iter().map(|part| part.name("os", tag, false)).collect()
    }

    #[test]
    fn names_in_the_list_of_a_shared_key_begin_with_that_of_the_repository() {
        let titles = ["uki_1.efi", "os_1.efi", "os-1.raw", "os1.raw", "os.1.raw", "other-1.raw", "-1"];
        let document = json!({ "layers": titles.map(layer) }).to_string();
        let parts = of_image(document.as_bytes(), None).unwrap();
        let names: Vec<_> = parts.iter().map(|part| part.name("os", "1", true)).collect();
        let expected = [
            "os-1.uki_1.efi",
            "os_1.efi",
            "os-1.raw",
            "os-1.os1.raw",
            "os-1.os.1.raw",
            "os-1.other-1.raw",
            "os-1.-1",
        ];
        assert_eq!(names, expected);
        assert_eq!(parts[0].name("os", "1", false), "uki_1.efi");
    }

    #[test]
    fn documents_have_bounds() {
        let of = |layers: usize| {
            let layers: Vec<_> = (0..layers).map(|n| layer(&format!("f{n}"))).collect();
            of_image(json!({ "layers": layers }).to_string().as_bytes(), None).map(|parts| parts.len())
        };
        assert_eq!(of(MAX_LAYERS).unwrap(), MAX_LAYERS);
        assert_eq!(of(MAX_LAYERS + 1).unwrap_err().to_string(), "1001 layers: more than 1000");
        let images = |count: usize| {
            let image = json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
                "digest": Digest::of(b"x").oci() });
            let index = json!({ "schemaVersion": 2, "manifests": vec![image; count] });
            of_index(index.to_string().as_bytes()).map(|images| images.offered.len())
        };
        assert_eq!(images(MAX_IMAGES).unwrap(), MAX_IMAGES);
        assert_eq!(images(MAX_IMAGES + 1).unwrap_err().to_string(), "201 images in an index: more than 200");
        let title = |len: usize| {
            let layers = [layer(&"x".repeat(len)), layer("y")];
            of_image(json!({ "layers": layers }).to_string().as_bytes(), None)
        };
        assert_eq!(title(MAX_NAME).unwrap().len(), 2);
        assert_eq!(title(MAX_NAME + 1).unwrap_err().to_string(), "a title of more than 255 bytes");
        let long = format!("{{\"layers\":[]}}{}", " ".repeat(MAX_DOCUMENT));
        let expected = "a document of 1048589 bytes: more than 1048576";
        assert_eq!(of_image(long.as_bytes(), None).unwrap_err().to_string(), expected);
        assert_eq!(of_index(long.as_bytes()).unwrap_err().to_string(), expected);
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
