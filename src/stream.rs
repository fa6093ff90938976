//! Stream metadata: the document that names every file of a release, and the streams known by name.
//!
//! The first thing of every build; [`crate::catalog`] makes the list of artifacts of it. The format is that of
//! `fedora-coreos-stream-generator` and `plume cosa2stream`, shared by Fedora CoreOS and RHEL CoreOS. What is not
//! needed here is kept as it is and never looked at, so that a platform, a format, an architecture or a field that
//! is new tomorrow is no reason to fail.
//!
//! The crate `coreos-stream-metadata` 0.1.0 reads today's documents too, but into hash maps, which lose the order of
//! the document, and without the fields that it does not know.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use anyhow::{Context, Result, bail, ensure};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::version::compare;

/// The longest stream document that is read, in bytes. Today's are about 60 KB.
pub const MAX_STREAM: u64 = 16 << 20;

/// A stream document. Serialized, it is the document it was read from, but for white space and the order of fields.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Stream {
    /// The stream's own name, such as `stable` or `rhcos-4.21`.
    pub stream: String,
    /// What there is for each architecture, such as `x86_64`.
    pub architectures: Ordered<Arch>,
    /// The rest.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What there is for an architecture.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Arch {
    /// The files to download for each platform, such as `openstack` or `metal`.
    #[serde(default)]
    pub artifacts: Ordered<Platform>,
    /// The rest, among it `images`: what is in the clouds already.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What there is for a platform.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Platform {
    /// The files of each format, such as `qcow2.xz`: one `disk`, or `kernel`, `initramfs` and `rootfs`.
    #[serde(default)]
    pub formats: Ordered<Ordered<Artifact>>,
    /// The rest, among it `release`.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A file to download.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Artifact {
    /// Its URL.
    pub location: String,
    /// URL of a detached OpenPGP signature of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// SHA-256 of the file without its outer compression, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncompressed_sha256: Option<String>,
    /// The rest.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Stream {
    /// Reads a document of at most [`MAX_STREAM`] bytes.
    pub fn parse(json: &[u8]) -> Result<Self> {
        ensure!(
            json.len() as u64 <= MAX_STREAM,
            "stream metadata: {} bytes, more than {MAX_STREAM}",
            json.len()
        );
        serde_json::from_slice(json).context("stream metadata: not a stream document")
    }

    /// Refuses the document of another stream than `name`.
    pub fn must_be(&self, name: &str) -> Result<()> {
        ensure!(self.stream == name, "stream metadata: expected stream {name:?}, found {:?}", self.stream);
        Ok(())
    }

    /// The newest release that each architecture has.
    pub fn releases(&self) -> BTreeMap<String, String> {
        let newest = |arch: &Arch| {
            let platforms = arch.artifacts.0.iter();
            let releases = platforms.filter_map(|(_, platform)| platform.other.get("release")?.as_str());
            releases.max_by(|a, b| compare(a, b)).map(str::to_owned)
        };
        let archs = self.architectures.0.iter();
        archs.filter_map(|(name, arch)| Some((name.clone(), newest(arch)?))).collect()
    }
}

/// A JSON object whose members keep their order. A name that appears twice is refused: programs do not agree on
/// which of the two counts.
#[derive(Clone, Debug)]
pub struct Ordered<T>(pub Vec<(String, T)>);

impl<T> Default for Ordered<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for Ordered<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<T>, A::Error> {
                let mut members = Vec::new();
                let mut names = std::collections::HashSet::new();
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("{name:?} appears twice")));
                    }
                    members.push((name, value));
                }
                Ok(Ordered(members))
            }
        }
        d.deserialize_map(Members(PhantomData))
    }
}

/// The streams known by name, `stream-metadata/streams.json`.
const STREAMS: &str = include_str!("../stream-metadata/streams.json");

/// The keys that `streams.json` names.
const KEYS: &[(&str, &str)] = &[
    ("fedora-44.asc", include_str!("../stream-metadata/keys/fedora-44.asc")),
    ("fedora-45.asc", include_str!("../stream-metadata/keys/fedora-45.asc")),
    ("fedora-46.asc", include_str!("../stream-metadata/keys/fedora-46.asc")),
];

/// An entry of `streams.json`.
#[derive(Deserialize)]
struct Known {
    id: String,
    /// What the document calls itself.
    #[serde(default)]
    stream: Option<String>,
    /// The minor versions of OpenShift this entry is for; they replace the `N` of `id` and `url`.
    #[serde(default)]
    minor: Option<Minor>,
    url: String,
    #[serde(default)]
    keys: Vec<String>,
}

#[derive(Deserialize)]
struct Minor {
    from: u32,
    to: Option<u32>,
}

fn known() -> Result<Vec<Known>> {
    serde_json::from_str(STREAMS).context("streams.json")
}

/// Where to find a stream known by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The URL of its document.
    pub url: String,
    /// What the document calls the stream. None for RHEL CoreOS, whose documents have had several names.
    pub stream: Option<String>,
}

/// Where to find a stream known by name: `fcos-stable`, `rhcos-4.16`.
pub fn find(id: &str) -> Result<Place> {
    let streams = known()?;
    for Known { id: known, stream, minor, url, .. } in &streams {
        let Some(minor) = minor else {
            if known == id {
                return Ok(Place { url: url.clone(), stream: stream.clone() });
            }
            continue;
        };
        if let Some((before, after)) = known.split_once('N')
            && let Some(n) = id.strip_prefix(before).and_then(|rest| rest.strip_suffix(after))
            && let Ok(number) = n.parse::<u32>()
            && n == number.to_string()
            && minor.from <= number
            && minor.to.is_none_or(|to| number <= to)
        {
            let url = url.replace("-4.N/", &format!("-4.{number}/"));
            return Ok(Place { url, stream: stream.clone() });
        }
    }
    let mut ids: Vec<_> = streams.iter().map(|s| s.id.as_str()).collect();
    ids.dedup();
    bail!(
        "no stream is named {id:?}: known are {}; --stream-url and --stream-file take any other",
        ids.join(", ")
    )
}

/// The URL of the document of a stream known by name.
pub fn url_of(id: &str) -> Result<String> {
    Ok(find(id)?.url)
}

/// The OpenPGP keys that sign the stream which calls itself `stream`, armored; none when it is not known, or not
/// signed.
pub fn keys_of(stream: &str) -> Result<Vec<&'static str>> {
    let streams = known()?;
    let Some(entry) = streams.iter().find(|s| s.stream.as_deref() == Some(stream)) else {
        return Ok(Vec::new());
    };
    let key = |name: &String| KEYS.iter().find(|(known, _)| known == name).map(|&(_, key)| key);
    entry.keys.iter().map(|name| key(name).with_context(|| format!("streams.json: no key {name}"))).collect()
}
