//! Picks the image for one platform out of an index of several.

use std::fmt;

use anyhow::{Context, Result, ensure};
use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use serde::Deserialize;
use serde_json::Value;

use super::{Client, Manifest, Reference};
use crate::bounded::{names, shown};
use crate::digest::Digest;

/// What an image is to be for. What is not given is that of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// The operating system.
    pub os: Option<String>,
    /// The architecture, as images or as kernels name it.
    pub arch: Option<String>,
    /// The variant of the architecture, such as `v7`.
    pub variant: Option<String>,
}

/// What an image says it is for.
#[derive(Debug, Deserialize)]
struct Found {
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |part: &Option<String>| part.as_ref().map_or("unknown".into(), |p| shown(p.as_bytes()));
        write!(f, "{}/{}", part(&self.os), part(&self.architecture))?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{}", shown(variant.as_bytes())))
    }
}

/// The name that images have for an architecture.
pub fn image_arch(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" | "i386" | "i686" => "386",
        "powerpc64" | "powerpc64le" => "ppc64le",
        "loongarch64" => "loong64",
        arch => arch,
    }
}

impl Platform {
    /// The platform of these names.
    pub fn new(os: Option<&str>, arch: Option<&str>) -> Self {
        Self { os: os.map(Into::into), arch: arch.map(Into::into), variant: None }
    }

    fn os(&self) -> &str {
        self.os.as_deref().unwrap_or("linux")
    }

    fn arch(&self) -> &str {
        image_arch(self.arch.as_deref().unwrap_or(std::env::consts::ARCH))
    }

    /// How well an image fits: the lower the better, none when not at all.
    fn fit(&self, found: &Found) -> Option<usize> {
        if found.os.as_deref() != Some(self.os()) || found.architecture.as_deref() != Some(self.arch()) {
            return None;
        }
        // The first is what an image is for that does not say.
        let known: &[&str] = match self.arch() {
            "arm64" => &["v8"],
            "amd64" => &["v1"],
            // Those that run everywhere first; newer ones only when asked for.
            "arm" => &["v7", "v6", "v5"],
            _ => &[],
        };
        let default = known.first().copied();
        match (&self.variant, found.variant.as_deref()) {
            (Some(wanted), found) => (found.or(default) == Some(wanted)).then_some(0),
            (None, None) => Some(0),
            (None, Some(found)) => known.iter().position(|variant| *variant == found),
        }
    }

    /// The image for this platform in `index`: as skopeo and podman do, one that does not say what it is for is taken when no
    /// other fits. The error names those that there are.
    pub fn pick<'a>(&self, index: &'a ImageIndex) -> Result<&'a Descriptor> {
        let of = |image: &Descriptor| {
            let platform = image.platform().as_ref()?;
            Some(Found {
                os: Some(platform.os().to_string()),
                architecture: Some(platform.architecture().to_string()),
                variant: platform.variant().clone(),
            })
        };
        let fitting = index.manifests().iter().filter_map(|image| Some((self.fit(&of(image)?)?, image)));
        let picked = fitting.min_by_key(|(fit, _)| *fit).map(|(_, image)| image);
        let for_any = || index.manifests().iter().find(|image| image.platform().is_none());
        picked.or_else(for_any).with_context(|| match &index.manifests()[..] {
            [] => format!("no image for {self}: the index is empty"),
            all => format!("no image for {self}; there are: {}", names(all.iter().filter_map(of))),
        })
    }

    /// Checks an image that stands alone by its configuration. Without any wish, one for another platform is fine: it is
    /// said so in what is returned.
    pub fn check(&self, config: &[u8]) -> Result<Option<String>> {
        let found: Found = serde_json::from_slice(config).context("not an image configuration")?;
        if self.fit(&found).is_some() || found.architecture.is_none() {
            return Ok(None);
        }
        ensure!(*self == Self::default(), "no image for {self}; it is one for {found}");
        Ok(Some(format!("the image is for {found}, not for {self}")))
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os(), self.arch())?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// Reads an index of images as Go's types do: an empty `variant` is none. What a `platform` does not say is `unknown`, which is
/// what attestations say they are for.
pub fn parse_index(bytes: &[u8]) -> Result<ImageIndex> {
    let read = || -> serde_json::Result<ImageIndex> {
        let mut index: Value = serde_json::from_slice(bytes)?;
        let images = index.get_mut("manifests").and_then(Value::as_array_mut);
        for platform in
            images.into_iter().flatten().filter_map(|image| image.get_mut("platform")?.as_object_mut())
        {
            for key in ["os", "architecture"] {
                let said = platform.entry(key).or_insert(Value::Null);
                if said.is_null() || said == "" {
                    *said = "unknown".into();
                }
            }
            if platform.get("variant").is_some_and(|variant| variant == "") {
                platform.remove("variant");
            }
        }
        serde_json::from_value(index)
    };
    read().context("not an index of images")
}

/// Whether a manifest is an index of others.
pub fn is_index(media_type: &MediaType) -> bool {
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    *media_type == MediaType::ImageIndex || media_type.to_string() == docker
}

impl Client {
    /// The digest of the image for `platform` that `reference` names: itself, or one in an index.
    pub fn resolve(&self, reference: &Reference, platform: &Platform) -> Result<Digest> {
        let manifest = self.manifest(reference)?;
        let at = || reference.to_string();
        if !is_index(&manifest.media_type) {
            self.check_platform(reference, &manifest, platform).with_context(at)?;
            return Ok(manifest.digest);
        }
        let index = parse_index(&manifest.bytes).with_context(at)?;
        platform.pick(&index).and_then(|image| Ok(image.digest().to_string().parse()?)).with_context(at)
    }

    /// Checks that an image that stands alone is for `platform`.
    fn check_platform(&self, reference: &Reference, manifest: &Manifest, platform: &Platform) -> Result<()> {
        #[derive(Deserialize)]
        struct Image {
            config: Descriptor,
        }
        let image: Image = serde_json::from_slice(&manifest.bytes).context("not an image manifest")?;
        platform.check(&self.document(reference, &image.config)?).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[(&str, &str, &str)]) -> ImageIndex {
        let manifests: Vec<_> = platforms
            .iter()
            .map(|(os, arch, variant)| {
                let mut platform = serde_json::json!({ "os": os, "architecture": arch });
                if !variant.is_empty() {
                    platform["variant"] = (*variant).into();
                }
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
                    "digest": format!("sha256:{}", "0".repeat(64)), "platform": platform
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({ "schemaVersion": 2, "manifests": manifests })).unwrap()
    }

    fn wanted(arch: &str, variant: Option<&str>) -> Platform {
        Platform { os: None, arch: Some(arch.into()), variant: variant.map(Into::into) }
    }

    #[test]
    fn variants() {
        let index = index(&[
            ("windows", "amd64", ""),
            ("linux", "arm", "v5"),
            ("linux", "arm", "v7"),
            ("linux", "arm64", "v8"),
            ("linux", "amd64", "v3"),
            ("linux", "amd64", ""),
            ("unknown", "unknown", ""),
        ]);
        let at = |arch: &str, variant| {
            let picked = wanted(arch, variant).pick(&index).ok()?;
            index.manifests().iter().position(|image| image == picked)
        };
        assert_eq!(at("arm", None), Some(2));
        assert_eq!(at("arm", Some("v5")), Some(1));
        assert_eq!(at("arm", Some("v6")), None);
        assert_eq!(at("aarch64", None), Some(3));
        assert_eq!(at("arm64", Some("v8")), Some(3));
        assert_eq!(at("x86_64", None), Some(5));
        assert_eq!(at("amd64", Some("v3")), Some(4));
        assert_eq!(at("amd64", Some("v1")), Some(5));
        let e = wanted("s390x", None).pick(&index).unwrap_err().to_string();
        assert!(e.starts_with("no image for linux/s390x; there are: windows/amd64, linux/arm/v5, "), "{e}");
    }

    #[test]
    fn platforms_that_say_little() {
        let pick = |platforms: &[&str]| {
            let image = |platform: &&str| {
                let digest = "0".repeat(64);
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"sha256:{digest}"{platform}}}"#
                )
            };
            let images: Vec<_> = platforms.iter().map(image).collect();
            let json = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, images.join(","));
            let index = parse_index(json.as_bytes()).unwrap();
            let at = |image| index.manifests().iter().position(|other| std::ptr::eq(other, image));
            wanted("amd64", None).pick(&index).map(|image| at(image).unwrap()).map_err(|e| e.to_string())
        };
        let amd64 = r#","platform":{"os":"linux","architecture":"amd64"}"#;
        let no_variant = r#","platform":{"os":"linux","architecture":"amd64","variant":""}"#;
        let no_os = r#","platform":{"architecture":"amd64"}"#;
        assert_eq!(pick(&[no_os, no_variant]), Ok(1));
        assert_eq!(pick(&[r#","platform":{}"#, r#","platform":null"#, amd64]), Ok(2));
        assert_eq!(pick(&[no_os, ""]), Ok(1));
        assert_eq!(pick(&[""]), Ok(0));
        let e = "no image for linux/amd64; there are: unknown/amd64, unknown/unknown";
        assert_eq!(pick(&[no_os, r#","platform":{"os":""}"#]), Err(e.into()));
        assert_eq!(pick(&[]), Err("no image for linux/amd64: the index is empty".into()));
    }

    #[test]
    fn an_image_that_stands_alone() {
        let config = br#"{"os":"linux","architecture":"s390x"}"#;
        assert!(Platform::default().check(config).unwrap().is_some());
        assert!(wanted("s390x", None).check(config).unwrap().is_none());
        let e = wanted("amd64", None).check(config).unwrap_err().to_string();
        assert_eq!(e, "no image for linux/amd64; it is one for linux/s390x");
    }
}
