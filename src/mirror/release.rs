//! Releases of Fedora CoreOS and RHEL CoreOS: a stream document names every file of the newest, the index of releases
//! leads to the older ones.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use url::Url;

use crate::catalog::{Catalog, Item, SIGNATURE, file_name};
use crate::http::Http;
use crate::openpgp::SignatureError;
use crate::stream::{self, Arch, MAX_STREAM, Ordered, Platform, Stream};
use crate::workdir;

use super::config::{Source, Versions};
use super::layout::STREAMS;
use super::plan::{self, Plan, Proof, Version, Wanted};
use crate::version::{check_name, compare};

/// The index of the releases of a stream, oldest first.
#[derive(Deserialize)]
struct Releases {
    releases: Vec<Pointer>,
}

/// Where to find a release.
#[derive(Deserialize)]
struct Pointer {
    version: String,
    metadata: String,
}

/// `release.json`: what a stream document has, in other words.
#[derive(Deserialize)]
struct Release {
    release: String,
    stream: String,
    architectures: Ordered<ReleaseArch>,
}

#[derive(Deserialize)]
struct ReleaseArch {
    media: Ordered<Option<Media>>,
}

#[derive(Deserialize)]
struct Media {
    #[serde(default)]
    artifacts: Ordered<Ordered<stream::Artifact>>,
}

impl Release {
    fn into_stream(self) -> Stream {
        let platform = |media: Media| {
            let release = Value::from(self.release.as_str());
            Platform { formats: media.artifacts, other: Map::from_iter([("release".to_owned(), release)]) }
        };
        let arch = |arch: ReleaseArch| {
            let media = arch.media.0.into_iter().filter_map(|(name, media)| Some((name, platform(media?))));
            Arch { artifacts: Ordered(media.collect()), other: Map::new() }
        };
        let architectures = self.architectures.0.into_iter().map(|(name, a)| (name, arch(a)));
        let architectures = Ordered(architectures.collect());
        Stream { stream: self.stream.clone(), architectures, other: Map::new() }
    }
}

/// Finds out what a stream has. An error is one of the whole stream; others are in the plan.
pub fn plan(source: &Source, name: &str, base_url: Option<&Url>, http: &Http) -> Result<Plan> {
    let mut keys = source.keys.clone();
    if keys.is_empty() {
        for key in stream::keys_of(name)? {
            keys.add(key.as_bytes())?;
        }
    }
    ensure!(
        source.unsigned || !keys.is_empty(),
        "no signing keys are known for it: name some, or take what is not signed with \"unsigned\": true"
    );
    let mut plan = Plan::new(&source.root, name, "", keys);
    let url = source.url(name, "")?;
    let (published, signature) = workdir::fetch(&url, http)?;
    if let Some(signature) = signature.as_deref().filter(|_| !plan.keys.is_empty()) {
        plan.keys.verify(signature, &published[..]).with_context(|| url.clone())?;
    }
    let newest = Stream::parse(&published).with_context(|| url.clone())?;
    // What documents of RHEL CoreOS call themselves is not known.
    let own_name = stream::find(name).map_or(Some(name.to_owned()), |place| place.stream);
    if let Some(own_name) = &own_name {
        newest.must_be(own_name).with_context(|| url.clone())?;
    }
    for arch in &source.architectures {
        if !newest.architectures.0.iter().any(|(name, _)| name == arch) {
            let e = anyhow::anyhow!("there is nothing for architecture {arch}");
            let what = plan.label().display().to_string();
            plan.problem(None, what, &e);
        }
    }
    let mut versions = BTreeMap::new();
    let newest = select(source, newest);
    let in_newest = wanted(&mut plan, source, &newest, &mut versions)?;
    let (document, upstream) = match &source.versions {
        Versions { pin: Some(pin), .. } => {
            versions.retain(|version, _| pin.contains(version));
            let older: Vec<_> = pin.iter().filter(|version| !in_newest.contains(version)).collect();
            let mut documents = Vec::new();
            if !older.is_empty() {
                documents = releases(&mut plan, source, name, own_name.as_deref(), http, |version| {
                    older.contains(&version)
                })?;
            }
            for version in older {
                if !documents.iter().any(|(found, _)| found == version) {
                    plan.problem(
                        Some(version),
                        version.as_str(),
                        &anyhow::anyhow!("there is no such release"),
                    );
                }
            }
            for (_, release) in &documents {
                wanted(&mut plan, source, release, &mut versions)?;
            }
            let current = pin.iter().max_by(|a, b| compare(a, b));
            plan.current = current.cloned();
            plan.needs.extend(plan.current.clone());
            if in_newest.iter().any(|version| Some(version) == current) {
                (Some(newest), Some((published, signature)))
            } else {
                let at = documents.iter().position(|(version, _)| Some(version) == current);
                (at.map(|at| documents.swap_remove(at).1), None)
            }
        }
        Versions { minimum, .. } => {
            if let Some(minimum) = minimum
                && let Some(version) = in_newest.iter().find(|version| compare(version, minimum).is_lt())
            {
                bail!("the current version is {version}, which is before {minimum}");
            }
            plan.offers = newest.releases();
            plan.signed = signature.is_some();
            plan.current = in_newest.iter().max_by(|a, b| compare(a, b)).cloned();
            plan.needs.extend(in_newest.iter().cloned());
            let mut left = source.keep.unwrap_or(usize::MAX).saturating_sub(in_newest.len());
            if let Some(minimum) = minimum.as_ref().filter(|_| left > 0) {
                let older = releases(&mut plan, source, name, own_name.as_deref(), http, |version| {
                    let take = left > 0
                        && compare(version, minimum).is_ge()
                        && !in_newest.iter().any(|v| v == version);
                    left -= usize::from(take);
                    take
                })?;
                for (_, release) in &older {
                    wanted(&mut plan, source, release, &mut versions)?;
                }
            }
            (Some(newest), Some((published, signature)))
        }
    };
    let mut versions: Vec<_> = versions.into_iter().map(|(name, files)| Version { name, files }).collect();
    versions.sort_by(|a, b| compare(&b.name, &a.name));
    if versions.is_empty() {
        bail!("no file of it is to be mirrored");
    }
    if base_url.is_none() {
        plan.stale = Some(Path::new(STREAMS).join(format!("{name}.json")));
    }
    if let Some(document) = document {
        let at: BTreeMap<&str, &Wanted> =
            versions.iter().flat_map(|v| &v.files).map(|file| (file.url.as_str(), file)).collect();
        let items = Catalog::new(&document)?.items.into_iter();
        let artifacts = items.filter_map(|item| {
            let path = at.get(item.location.as_str())?.path.clone();
            Some((item, path))
        });
        let (json, signed) = match &upstream {
            Some((published, signature)) => (published.clone(), signature.clone()),
            None => (serde_json::to_vec(&document)?, None),
        };
        plan.release = Some(plan::Release {
            stream: document.stream.clone(),
            document: json,
            signature: signed,
            artifacts: artifacts.collect(),
        });
        let path = |suffix: &str| Path::new(STREAMS).join(format!("{name}{suffix}"));
        let rewritten = match base_url {
            Some(base) => Some(rewrite(document, base, &plan, &at)?),
            None => None,
        };
        if let Some((published, signature)) = upstream {
            let of_signature = path(&format!(".upstream.json{SIGNATURE}"));
            match signature {
                Some(signature) => plan.documents.push((of_signature, signature)),
                None => plan.removed = Some(of_signature),
            }
            plan.documents.push((path(".upstream.json"), published));
        }
        plan.documents.extend(rewritten.map(|document| (path(".json"), document)));
    }
    plan.versions = versions;
    Ok(plan)
}

/// Leaves only what the source takes of a document: its architectures, formats and names.
fn select(source: &Source, mut stream: Stream) -> Stream {
    stream
        .architectures
        .0
        .retain(|(arch, _)| source.architectures.is_empty() || source.architectures.contains(arch));
    for (_, arch) in &mut stream.architectures.0 {
        for (_, platform) in &mut arch.artifacts.0 {
            platform
                .formats
                .0
                .retain(|(format, _)| source.formats.is_empty() || source.formats.contains(format));
            for (_, files) in &mut platform.formats.0 {
                files.0.retain(|(_, file)| source.filters.take(file_name(&file.location)));
            }
            platform.formats.0.retain(|(_, files)| !files.0.is_empty());
        }
        arch.artifacts.0.retain(|(_, platform)| !platform.formats.0.is_empty());
    }
    stream
}

/// Adds the files of a document to `versions`, and gives the versions that it has.
fn wanted(
    plan: &mut Plan,
    source: &Source,
    stream: &Stream,
    versions: &mut BTreeMap<String, Vec<Wanted>>,
) -> Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    for item in Catalog::new(stream)?.items {
        let version = version_of(stream, &item)?;
        if !found.contains(&version) {
            found.push(version.clone());
        }
        let files = versions.entry(version.clone()).or_default();
        let path = plan.dir(&version).join(&item.arch).join(&item.name);
        let proof = match item.signature.filter(|url| !url.is_empty()) {
            Some(url) => Proof::Signature { url, sha256: Some(item.sha256) },
            None if source.unsigned => Proof::Document(item.sha256),
            None => {
                let e = SignatureError::Missing.into();
                plan.problem(Some(&version), path.display().to_string(), &e);
                continue;
            }
        };
        files.push(Wanted { path, url: item.location, proof });
    }
    Ok(found)
}

/// The version of a file. Names that are fit for files of a download need not be for those of a web server.
pub fn version_of(stream: &Stream, item: &Item) -> Result<String> {
    let release = || {
        let (_, arch) = stream.architectures.0.iter().find(|(arch, _)| *arch == item.arch)?;
        let (_, platform) = arch.artifacts.0.iter().find(|(platform, _)| *platform == item.platform)?;
        platform.other.get("release")?.as_str()
    };
    let check = || {
        check_name("architecture", &item.arch)?;
        ensure!(
            !item.name.starts_with('.') && !item.name.contains(['%', '?', '#']),
            "not the name of a file of a mirror: {:?}",
            item.name
        );
        let version = release().context("no release")?;
        check_name("version", version)?;
        Ok(version.to_owned())
    };
    check().with_context(|| format!("artifact {} {}", item.arch, item.label()))
}

/// The older releases that `take` takes, newest first. It is asked in that order.
fn releases(
    plan: &mut Plan,
    source: &Source,
    name: &str,
    own_name: Option<&str>,
    http: &Http,
    mut take: impl FnMut(&String) -> bool,
) -> Result<Vec<(String, Stream)>> {
    let Some(url) = source.releases(name)? else {
        bail!("older versions: it is not known where they are: name the index with releases");
    };
    let index: Releases =
        serde_json::from_slice(&http.get(&url, MAX_STREAM)?).with_context(|| url.to_string())?;
    let url = Url::parse(&url)?;
    let mut pointers = index.releases;
    pointers.retain(|pointer| check_name("version", &pointer.version).is_ok());
    pointers.sort_by(|a, b| compare(&b.version, &a.version));
    pointers.retain(|pointer| take(&pointer.version));
    Plan::check_count(pointers.len())?;
    let mut found = Vec::new();
    for Pointer { version, metadata } in pointers {
        let get = || -> Result<Stream> {
            let url = url.join(&metadata)?;
            let release: Release = serde_json::from_slice(&http.get(url.as_str(), MAX_STREAM)?)?;
            ensure!(release.release == version, "it is of version {:?}", release.release);
            let stream = select(source, release.into_stream());
            if let Some(own_name) = own_name {
                stream.must_be(own_name)?;
            }
            Catalog::new(&stream)?;
            Ok(stream)
        };
        match get() {
            Ok(stream) => found.push((version, stream)),
            Err(e) => {
                let e = e.context(metadata);
                plan.problem(Some(&version), version.as_str(), &e);
            }
        }
    }
    Ok(found)
}

/// The document as it is served by the mirror: what is mirrored, and from here.
fn rewrite(mut stream: Stream, base: &Url, plan: &Plan, at: &BTreeMap<&str, &Wanted>) -> Result<Vec<u8>> {
    relocate(&mut stream, base, |location| {
        let wanted = at.get(location)?;
        Some((&*wanted.path, matches!(wanted.proof, Proof::Signature { .. })))
    })
    .with_context(|| format!("the document of {}", plan.label().display()))
}

/// Makes `stream` one of files below `base`, of which `place` says where the one that is at a URL now is, and whether its
/// signature is beside it. What has no place is left out. Gives the document.
pub fn relocate<'a>(
    stream: &mut Stream,
    base: &Url,
    place: impl Fn(&str) -> Option<(&'a Path, bool)>,
) -> Result<Vec<u8>> {
    for (_, arch) in &mut stream.architectures.0 {
        for (_, platform) in &mut arch.artifacts.0 {
            for (_, files) in &mut platform.formats.0 {
                files.0.retain_mut(|(_, file)| {
                    let Some((path, signed)) = place(&file.location) else { return false };
                    file.location = url_of(base, path);
                    file.signature = signed.then(|| format!("{}{SIGNATURE}", file.location));
                    true
                });
            }
            platform.formats.0.retain(|(_, files)| !files.0.is_empty());
        }
        arch.artifacts.0.retain(|(_, platform)| !platform.formats.0.is_empty());
    }
    let mut json = serde_json::to_vec_pretty(stream)?;
    json.push(b'\n');
    Ok(json)
}

/// The URL of a file of the mirror.
fn url_of(base: &Url, path: &Path) -> String {
    let mut url = base.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path.iter().filter_map(|part| part.to_str()));
    }
    url.to_string()
}
