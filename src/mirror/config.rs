//! The configuration of a mirror: JSON, in which what is not known is an error that names the key.
//!
//! `docs/mirror.md` says what each key means, `docs/mirror.schema.json` is the same for programs. One without
//! `sources` is that of *oppositus*, and mirrors what oppositus would, in the same tree.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::bytes::parse_size;
use crate::fetch::MAX_PARALLEL;
use crate::openpgp::Keys;
use crate::stream;
use crate::workdir::read_limited;

use super::filter::{Filter, Filters};
use crate::version::check_name;

/// The longest configuration that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Where oppositus mirrored from.
const COREOS: &str = "https://{channel}.release.core-os.net/{arch}-usr/";

/// Where the descendant of CoreOS Container Linux is released.
const FLATCAR: &str = "https://{channel}.release.flatcar-linux.net/{arch}-usr/";

/// The index of all releases of a Fedora CoreOS stream.
const FCOS_RELEASES: &str = "https://builds.coreos.fedoraproject.org/prod/streams/{stream}/releases.json";

/// Directories of the mirror that no channel and no source may have the name of.
const TAKEN: [&str; 2] = ["all", "streams"];

/// How many files are got at once, unless the configuration says otherwise.
const PARALLEL: usize = 4;

/// The file, as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// As in oppositus, where `null` is nothing, too.
    #[serde(default)]
    channels: Option<Vec<String>>,
    #[serde(default)]
    filters: Option<Filters>,
    #[serde(default, deserialize_with = "given")]
    sources: Option<Vec<Object<SourceFile>>>,
    #[serde(default, deserialize_with = "given")]
    keys: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "given")]
    keep: Option<usize>,
    #[serde(default, deserialize_with = "given")]
    parallel: Option<usize>,
    #[serde(default, deserialize_with = "given")]
    rate: Option<Size>,
}

/// An entry of `sources`, as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceFile {
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(default, deserialize_with = "given")]
    name: Option<String>,
    #[serde(default, deserialize_with = "given")]
    url: Option<String>,
    #[serde(default, deserialize_with = "given")]
    releases: Option<String>,
    #[serde(default, deserialize_with = "given")]
    channels: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    streams: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    architectures: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    filters: Option<Filters>,
    #[serde(default, deserialize_with = "given")]
    keys: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "given")]
    keep: Option<usize>,
    #[serde(default, deserialize_with = "given")]
    versions: Option<Object<Versions>>,
    #[serde(default, deserialize_with = "given")]
    formats: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    unsigned: Option<bool>,
}

/// What a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A release server of CoreOS Container Linux or Flatcar.
    ContainerLinux,
    /// Stream metadata of Fedora CoreOS or RHEL CoreOS.
    Stream,
}

/// Which versions are mirrored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// These and no other, instead of the newest.
    #[serde(default, deserialize_with = "given")]
    pub pin: Option<Vec<String>>,
    /// The newest and all before it down to this one.
    #[serde(default, deserialize_with = "given")]
    pub minimum: Option<String>,
}

/// Bytes: a number, or a text such as `10M`.
#[derive(Debug)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a number of bytes, or a text such as \"10M\"")]
        enum Text {
            Number(u64),
            Text(String),
        }
        match Text::deserialize(d)? {
            Text::Number(n) => Ok(Self(n)),
            Text::Text(text) => parse_size(&text).map(Self).map_err(serde::de::Error::custom),
        }
    }
}

/// What is derived for a struct takes an array, too, with the fields in their order. This takes only an object.
#[derive(Clone, Debug)]
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        d.deserialize_map(Members(PhantomData))
    }
}

/// What is there must be something: `null` is not.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

/// What to mirror: a configuration with everything it leaves open filled in.
#[derive(Debug)]
pub struct Config {
    /// From where.
    pub sources: Vec<Source>,
    /// How many files at once.
    pub parallel: usize,
    /// How many bytes a second, all together.
    pub rate: Option<u64>,
}

/// A server, or several of the same kind, and what to take from it.
#[derive(Debug)]
pub struct Source {
    /// What it is.
    pub kind: Kind,
    /// Whether the tree is to be that of oppositus: no links of versions, and `version.txt` is a file like any other.
    pub classic: bool,
    /// The directory of the mirror that this source has for itself; empty when it shares the top.
    pub root: String,
    /// The names of channels or streams.
    pub channels: Vec<String>,
    /// As the servers name them; for streams, empty for all.
    pub architectures: Vec<String>,
    /// Which files.
    pub filters: Filters,
    /// Who may sign; for streams, empty for the keys known for the stream.
    pub keys: Keys,
    /// How many versions of a channel to keep; all without it.
    pub keep: Option<usize>,
    /// Which versions.
    pub versions: Versions,
    /// Only these formats of a stream; all when empty.
    pub formats: Vec<String>,
    /// Take files on nothing but the digest of the stream document, where it names no signature.
    pub unsigned: bool,
    url: Option<String>,
    releases: Option<String>,
}

/// What the command line adds to a configuration.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// Keys of sources that name none.
    pub keys: Vec<PathBuf>,
    /// The server of a configuration without `sources`.
    pub url: Option<String>,
}

impl Config {
    /// Reads the configuration in the file `path`. Keys in it are relative to its directory.
    pub fn read(path: &Path, defaults: &Defaults) -> Result<Self> {
        read_limited(path, MAX_CONFIG)
            .context("read failed")
            .and_then(|json| Self::parse(&json, path.parent().unwrap_or(Path::new("")), defaults))
            .with_context(|| format!("configuration {}", path.display()))
    }

    /// Reads a configuration, and the keys that it names, which are relative to `dir`.
    pub fn parse(json: &[u8], dir: &Path, defaults: &Defaults) -> Result<Self> {
        let mut json = serde_json::Deserializer::from_slice(json);
        let Object(file): Object<File> = serde_path_to_error::deserialize(&mut json)?;
        json.end()?;
        let classic = file.sources.is_none();
        let mut sources = Vec::new();
        if let Some(given) = &file.sources {
            ensure!(file.channels.is_none(), "channels: belongs to an entry of sources");
            ensure!(!given.is_empty(), "sources: there is none");
            for (i, Object(source)) in given.iter().enumerate() {
                let source = Source::new(source, &file, dir, defaults);
                sources.push(source.with_context(|| format!("sources[{i}]"))?);
            }
        } else {
            ensure!(file.keep.is_none(), "keep: needs sources: without, the mirror is that of oppositus");
            sources.push(Source::classic(&file, dir, defaults)?);
        }
        let parallel = file.parallel.unwrap_or(PARALLEL);
        ensure!((1..=MAX_PARALLEL).contains(&parallel), "parallel: must be from 1 to {MAX_PARALLEL}");
        let rate = file.rate.map(|Size(rate)| rate);
        ensure!(rate != Some(0), "rate: must be more than 0");
        let config = Self { sources, parallel, rate };
        config.check_directories(classic)?;
        Ok(config)
    }

    /// Refuses two sources that would write to the same place.
    fn check_directories(&self, classic: bool) -> Result<()> {
        let mut dirs = HashMap::new();
        for (i, source) in self.sources.iter().enumerate() {
            let owner = if classic { "channels".to_owned() } else { format!("sources[{i}]") };
            let own = source.channels.iter().map(|c| Path::new(&source.root).join(c));
            for dir in own {
                if let Some(other) = dirs.insert(dir.clone(), owner.clone()) {
                    bail!(
                        "{owner}: {} is where {other} is mirrored to: give one of them a name",
                        dir.display()
                    );
                }
            }
        }
        for (i, source) in self.sources.iter().enumerate().filter(|(_, s)| !s.root.is_empty()) {
            if let Some(other) = dirs.get(Path::new(&source.root)) {
                bail!("sources[{i}].name: {:?} is a channel of {other}", source.root);
            }
        }
        Ok(())
    }
}

impl Source {
    fn classic(file: &File, dir: &Path, defaults: &Defaults) -> Result<Self> {
        let all = || ["stable", "beta", "alpha"].map(str::to_owned).into();
        let source = Self {
            kind: Kind::ContainerLinux,
            classic: true,
            root: String::new(),
            channels: file.channels.clone().unwrap_or_else(all),
            architectures: vec!["amd64".into()],
            filters: file.filters.clone().unwrap_or_default(),
            keys: read_keys(file.keys.as_ref(), dir, defaults)?,
            keep: None,
            versions: Versions::default(),
            formats: Vec::new(),
            unsigned: false,
            url: Some(defaults.url.clone().unwrap_or_else(|| COREOS.into())),
            releases: None,
        };
        ensure!(!source.keys.is_empty(), "keys: there are none: name those that sign, here or with --key");
        source.check("channels")?;
        Ok(source)
    }

    fn new(given: &SourceFile, file: &File, dir: &Path, defaults: &Defaults) -> Result<Self> {
        let stream = given.kind == Kind::Stream;
        let foreign: &[(&str, bool)] = if stream {
            &[("channels", given.channels.is_some())]
        } else {
            &[
                ("streams", given.streams.is_some()),
                ("releases", given.releases.is_some()),
                ("formats", given.formats.is_some()),
                ("unsigned", given.unsigned.is_some()),
            ]
        };
        if let Some((key, _)) = foreign.iter().find(|(_, given)| *given) {
            bail!("{key}: not for a source of this type");
        }
        let (names, list) = if stream { ("streams", &given.streams) } else { ("channels", &given.channels) };
        let default = if stream { &[][..] } else { &["amd64".to_owned()][..] };
        let mut filters: Vec<Filter> = given.filters.clone().unwrap_or_default().0;
        filters.extend(file.filters.clone().unwrap_or_default().0);
        let keys = given.keys.as_ref().or(file.keys.as_ref());
        let source = Self {
            kind: given.kind,
            classic: false,
            root: given.name.clone().unwrap_or_default(),
            channels: list.clone().unwrap_or_else(|| vec!["stable".into()]),
            architectures: given.architectures.clone().unwrap_or_else(|| default.into()),
            filters: Filters(filters),
            keys: read_keys(keys, dir, defaults).context("keys")?,
            keep: given.keep.or(file.keep),
            versions: given.versions.clone().map_or_else(Versions::default, |Object(versions)| versions),
            formats: given.formats.clone().unwrap_or_default(),
            unsigned: given.unsigned.unwrap_or_default(),
            url: given.url.clone(),
            releases: given.releases.clone(),
        };
        ensure!(given.name.is_none() || !source.root.is_empty(), "name: it is empty");
        ensure!(stream || !source.keys.is_empty(), "keys: there are none: name those that sign");
        ensure!(source.keep != Some(0), "keep: must be at least 1");
        source.check(names)?;
        Ok(source)
    }

    /// Checks all names, and that every URL can be made.
    fn check(&self, names: &str) -> Result<()> {
        if !self.root.is_empty() {
            check_name("directory", &self.root).context("name")?;
            ensure!(!TAKEN.contains(&&*self.root), "name: {:?} is taken", self.root);
        }
        ensure!(!self.channels.is_empty(), "{names}: there is none");
        for (i, name) in self.channels.iter().enumerate() {
            check_name("channel", name).with_context(|| format!("{names}[{i}]"))?;
            ensure!(!TAKEN.contains(&&**name), "{names}[{i}]: {name:?} is taken");
            ensure!(!self.channels[..i].contains(name), "{names}[{i}]: {name:?} appears twice");
        }
        ensure!(self.kind == Kind::Stream || !self.architectures.is_empty(), "architectures: there is none");
        for (i, name) in self.architectures.iter().enumerate() {
            check_name("architecture", name).with_context(|| format!("architectures[{i}]"))?;
            ensure!(!self.architectures[..i].contains(name), "architectures[{i}]: {name:?} appears twice");
        }
        let Versions { pin, minimum } = &self.versions;
        ensure!(pin.is_none() || minimum.is_none(), "versions: either pin or minimum");
        ensure!(pin.as_ref().is_none_or(|pin| !pin.is_empty()), "versions.pin: there is none");
        for version in pin.iter().flatten().chain(minimum) {
            check_name("version", version).context("versions")?;
        }
        for channel in &self.channels {
            for arch in self.architectures.iter().map(String::as_str).chain(["x86_64"]) {
                self.url(channel, arch).context("url")?;
            }
            self.releases(channel).context("releases")?;
        }
        let place = if self.kind == Kind::Stream { "{stream}" } else { "{channel}" };
        for (key, url) in [("url", &self.url), ("releases", &self.releases)] {
            ensure!(
                url.as_ref().is_none_or(|url| self.channels.len() < 2 || url.contains(place)),
                "{key}: needs {place}, because there are several"
            );
        }
        ensure!(
            self.kind == Kind::Stream
                || self.architectures.len() < 2
                || self.url.as_ref().is_none_or(|url| url.contains("{arch}")),
            "url: needs {{arch}}, because there are several"
        );
        Ok(())
    }

    /// Where to find a channel, for an architecture; the document of a stream is one for all of them.
    pub fn url(&self, channel: &str, arch: &str) -> Result<String> {
        match (&self.url, self.kind) {
            (Some(url), _) => self.fill(url, channel, Some(arch)),
            (None, Kind::ContainerLinux) => self.fill(FLATCAR, channel, Some(arch)),
            (None, Kind::Stream) => {
                stream::url_of(&format!("fcos-{channel}")).or_else(|_| stream::url_of(channel))
            }
        }
    }

    /// Where to find the index of the releases of a stream, if there is one.
    pub fn releases(&self, stream: &str) -> Result<Option<String>> {
        let fcos = self.kind == Kind::Stream && self.url.is_none();
        let known = fcos && stream::url_of(&format!("fcos-{stream}")).is_ok();
        let template = self.releases.as_deref().or(known.then_some(FCOS_RELEASES));
        template.map(|template| self.fill(template, stream, None)).transpose()
    }

    /// Fills in what a template leaves open.
    fn fill(&self, template: &str, channel: &str, arch: Option<&str>) -> Result<String> {
        let place = if self.kind == Kind::Stream { "{stream}" } else { "{channel}" };
        let mut url = template.replace(place, channel);
        if let Some(arch) = arch.filter(|_| self.kind == Kind::ContainerLinux) {
            url = url.replace("{arch}", arch);
        }
        ensure!(!url.contains(['{', '}']), "{template:?}: only {place} and {{arch}} can be filled in");
        let parsed = url::Url::parse(&url).with_context(|| format!("{template:?}: not a URL"))?;
        ensure!(["http", "https"].contains(&parsed.scheme()), "{template:?}: neither http nor https");
        ensure!(
            parsed.query().is_none() && parsed.fragment().is_none(),
            "{template:?}: has a query or a fragment"
        );
        Ok(url)
    }
}

fn read_keys(paths: Option<&Vec<PathBuf>>, dir: &Path, defaults: &Defaults) -> Result<Keys> {
    let mut keys = Keys::default();
    for path in paths.into_iter().flatten() {
        keys.read(&dir.join(path))?;
    }
    if paths.is_none() {
        for path in &defaults.keys {
            keys.read(path)?;
        }
    }
    Ok(keys)
}
