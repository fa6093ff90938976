//! Builds the container image from a dehydrated directory and an executable; the layers are described in [`super`].
//!
//! Data is checked before the image gets a name: it never holds a blob whose digest is not its name. Into a layout it is
//! copied on the way; to a registry it is sent from where it lies.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use flate2::GzBuilder;
use oci_spec::image::{
    ANNOTATION_CREATED, ANNOTATION_DESCRIPTION, ANNOTATION_TITLE, ANNOTATION_VERSION, Arch, ConfigBuilder,
    Descriptor, HistoryBuilder, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifest,
    ImageManifestBuilder, MediaType, Os, PlatformBuilder, RootFsBuilder, SCHEMA_VERSION,
};
use serde::Deserialize;

use super::layer::{Tar, TarLayer};
use super::layout::{Destination, Staging, Target};
use super::sign::{Signing, cosign, cosign_tag, simple_sign};
use super::{
    ANNOTATION_ARCHITECTURES, ANNOTATION_ARTIFACTS, ANNOTATION_FILES, ANNOTATION_STREAM, DATA, PROGRAM, elf,
    push,
};
use crate::digest::{Digest, Hasher};
use crate::progress::{Mode, Progress};
use crate::recipe::{Blob, Index, SourceSpec};
use crate::registry::{self, Client, Options, Reference};
use crate::source::{self, Reader, Slice, Source};
use crate::store::{self, Store};
use crate::transport;

/// The largest layer, in bytes: registries that keep blobs in object stores refuse more than 5 GB at once, and 4 GiB
/// leaves room for what they count differently.
pub const MAX_LAYER: u64 = 4 << 30;

/// The smallest cap on layers that is taken, in bytes.
pub const MIN_LAYER: u64 = 64 << 10;

/// What a tar file has beside the content of its one file, at most: directories, its header, padding and the end, of
/// 512 bytes each or two.
const OVERHEAD: u64 = 8 * 512;

/// The most data layers; with those of the program and the metadata, 60. Container engines stack at most 127 or 128
/// layers, and whoever builds on top of the image needs some of them.
pub const MAX_DATA_LAYERS: usize = 58;

/// The latest time that the twelve octal digits of a tar header hold, in seconds of the epoch.
const MAX_TIME: u64 = 0o77_777_777_777;

/// The time to give to everything in an image: `SOURCE_DATE_EPOCH`, as <https://reproducible-builds.org> has it, or 0.
/// In seconds of the epoch.
pub fn source_date_epoch() -> Result<u64> {
    let Some(text) = std::env::var_os("SOURCE_DATE_EPOCH") else { return Ok(0) };
    text.to_str()
        .and_then(|text| text.parse().ok())
        .filter(|&time| time <= MAX_TIME)
        .with_context(|| format!("SOURCE_DATE_EPOCH: {text:?}: expected seconds up to {MAX_TIME}"))
}

/// A static executable, `[ARCH=]FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The architecture that it must be for, as images name it, where that is said.
    pub arch: Option<String>,
    /// The file.
    pub path: PathBuf,
}

impl FromStr for Program {
    type Err = Infallible;

    /// What is before the first `=` is an architecture, unless it cannot be one.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let name =
            |arch: &str| !arch.is_empty() && arch.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        Ok(match text.split_once('=').filter(|(arch, _)| name(arch)) {
            Some((arch, path)) => {
                Self { arch: Some(registry::image_arch(arch).to_owned()), path: path.into() }
            }
            None => Self { arch: None, path: text.into() },
        })
    }
}

/// How the program of an image is compressed. All else is already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// A fifth smaller than gzip
    #[default]
    Zstd,
    /// For tools that know no zstd, such as umoci 0.4 and Docker before 23, and for `skopeo copy --format v2s2`
    Gzip,
}

/// How to make an image.
pub struct Build<'a> {
    /// The dehydrated directory.
    pub dehydrated: &'a Path,
    /// The static executable, for each architecture one. Of several, images are made that share their data, and an
    /// index of these.
    pub programs: Vec<Program>,
    /// Where it goes, as [`Target`] reads it.
    pub output: &'a str,
    /// The other tags that it gets, in a registry.
    pub tags: &'a [&'a str],
    /// What everything in it is stamped with, in seconds of the epoch.
    pub time: u64,
    /// The largest layer, in bytes; a longer blob is in several.
    pub max_layer: u64,
    /// How the program in it is compressed.
    pub compression: Compression,
    /// How to speak to a registry.
    pub registry: Options,
    /// What signs it.
    pub signing: Signing,
    /// Where progress is shown.
    pub progress: &'a Progress,
}

/// An image that was made.
#[derive(Debug)]
pub struct Built {
    /// The digest of its manifest, or of the index of its manifests.
    pub digest: Digest,
    /// Where its signature is, if there is one in a lookaside tree.
    pub signature: Option<PathBuf>,
}

/// Makes an image of the directory `dehydrated` and the static executable `program`, at `output`, as
/// [`Target`] reads it. All times in it are [`source_date_epoch`]. Returns the digest of its manifest.
///
/// Nothing appears at `output` unless all is well.
pub fn build(dehydrated: &Path, program: &Path, output: &str) -> Result<Digest> {
    build_at(dehydrated, program, output, source_date_epoch()?)
}

/// [`build`], with `time` instead of [`source_date_epoch`].
pub fn build_at(dehydrated: &Path, program: &Path, output: &str, time: u64) -> Result<Digest> {
    let programs = vec![Program { arch: None, path: program.to_owned() }];
    let (registry, signing, progress) =
        (Options::default(), Signing::default(), &Progress::new(Mode::default()));
    let (max_layer, compression, tags) = (MAX_LAYER, Compression::default(), &[]);
    let build = Build {
        dehydrated,
        programs,
        output,
        tags,
        time,
        max_layer,
        compression,
        registry,
        signing,
        progress,
    };
    Ok(build.run()?.digest)
}

impl Build<'_> {
    /// Makes the image. Nothing appears under its name unless all is well.
    pub fn run(&self) -> Result<Built> {
        let target: Target = self.output.parse()?;
        let identities = self.identities(&target)?;
        let store = Store::open(self.dehydrated)?;
        let groups = group(&store.index, self.max_layer)?;
        let staging = match &target {
            Target::Layout(destination) => Staging::new(destination.clone())?,
            Target::Registry(_) => Staging::passing(),
        };

        let programs =
            self.programs.iter().map(|program| program_layer(&staging, program, self.time, self.compression));
        let programs = programs.collect::<Result<Vec<_>>>()?;
        let mut shared = vec![metadata_layer(&staging, &store, self.time)?];
        for group in groups {
            shared.push(data_layer(&staging, &store, &group, self.time)?);
        }
        let about = about(&store.index, &store.stream()?, self.time)?;
        let (mut images, mut blobs) = (Vec::<Descriptor>::new(), Vec::new());
        for (arch, program) in programs {
            let twice =
                |image: &Descriptor| image.platform().as_ref().is_some_and(|p| *p.architecture() == arch);
            ensure!(!images.iter().any(twice), "two programs for {arch}");
            let layers: Vec<_> = std::iter::once(program).chain(shared.iter().cloned()).collect();
            blobs.extend(layers.iter().map(|layer| layer.descriptor.clone()));
            let (image, config) = image(&staging, arch, layers, &about, self.time)?;
            images.push(image);
            blobs.push(config);
        }
        let root = match &images[..] {
            [image] => image.clone(),
            _ => {
                let index = ImageIndexBuilder::default()
                    .schema_version(SCHEMA_VERSION)
                    .media_type(MediaType::ImageIndex)
                    .manifests(images.clone())
                    .annotations(about)
                    .build()?;
                staging.document(MediaType::ImageIndex, &index)?
            }
        };
        let digest: Digest = root.digest().to_string().parse()?;

        // The one that podman picks of several must be signed too; first the one that all is in.
        let mut signed = vec![digest];
        for image in images.iter().filter(|_| images.len() > 1) {
            signed.push(image.digest().to_string().parse()?);
        }
        let sign = |layout: Option<&Path>| -> Result<Option<PathBuf>> {
            let names = identities.iter().flat_map(|name| signed.iter().map(move |&digest| (name, digest)));
            let paths = names.map(|(name, digest)| simple_sign(&self.signing, name, digest, layout));
            Ok(paths.collect::<Result<Vec<_>>>()?.into_iter().next().flatten())
        };
        let signature = match &target {
            Target::Layout(destination) => {
                let mut signatures = Vec::new();
                for &digest in &signed {
                    let earlier = self.earlier_in(destination, digest)?;
                    let made = self.cosign(&identities, digest, &staging, earlier)?;
                    signatures.extend(made.map(|(image, _)| (cosign_tag(digest), image)));
                }
                staging.publish(root, signatures)?;
                sign((!destination.archive).then_some(&destination.path))?
            }
            Target::Registry(to) => {
                // Whoever sees the image is to find its signature.
                let signature = sign(None)?;
                let client = Client::new(self.registry.clone().patient());
                push::blobs(&staging, &client, to, &blobs, self.progress)?;
                if images.len() > 1 {
                    for image in &images {
                        let to = to.with_digest(image.digest().to_string().parse()?);
                        push::manifest(&staging, &client, &to, image)?;
                    }
                }
                for &digest in &signed {
                    self.push_signature(&client, to, &identities, digest, &staging)?;
                }
                push::manifest(&staging, &client, to, &root)?;
                for tag in self.tags {
                    push::manifest(&staging, &client, &to.with_tag(tag)?, &root)?;
                }
                signature
            }
        };
        Ok(Built { digest, signature })
    }

    /// The names that signatures give the image: one for each of its tags.
    fn identities(&self, target: &Target) -> Result<Vec<Reference>> {
        if let Target::Registry(to) = target {
            ensure!(to.digest().is_none(), "{to}: a new image can have a tag, and no digest");
        }
        if self.signing.is_empty() {
            return Ok(Vec::new());
        }
        let own = match (&self.signing.identity, target) {
            (Some(identity), _) => Some(identity.clone()),
            (None, Target::Registry(to)) => Some(to.clone()),
            // Only a name that says which registry it is of.
            (None, Target::Layout(destination)) => destination
                .tag
                .parse()
                .ok()
                .filter(|name: &Reference| destination.tag.starts_with(&format!("{}/", name.registry()))),
        };
        let own =
            own.context("a signature names the image as it will be pulled: --sign-identity says how")?;
        let others = self.tags.iter().map(|tag| Ok(own.with_tag(tag)?)).collect::<Result<Vec<_>>>()?;
        Ok(std::iter::once(own).chain(others).collect())
    }

    fn cosign(
        &self,
        identities: &[Reference],
        digest: Digest,
        staging: &Staging,
        earlier: Option<ImageManifest>,
    ) -> Result<Option<(Descriptor, Vec<Descriptor>)>> {
        let Some(key) = &self.signing.cosign else { return Ok(None) };
        cosign(key, identities, digest, staging, earlier).map(Some)
    }

    /// The image of cosign signatures that the layout has for the image `digest`.
    fn earlier_in(&self, layout: &Destination, digest: Digest) -> Result<Option<ImageManifest>> {
        if self.signing.cosign.is_none() || layout.archive || !layout.path.join(transport::LAYOUT).exists() {
            return Ok(None);
        }
        let place = transport::open(&format!("oci:{}", layout.path.display()), Options::default())?;
        let manifest = place.tagged(&cosign_tag(digest))?.map(|image| image.root()).transpose()?;
        manifest.map(|manifest| transport::manifest(&manifest)).transpose()
    }

    fn push_signature(
        &self,
        client: &Client,
        to: &Reference,
        identities: &[Reference],
        digest: Digest,
        staging: &Staging,
    ) -> Result<()> {
        if self.signing.cosign.is_none() {
            return Ok(());
        }
        let to = to.with_tag(&cosign_tag(digest))?;
        // What others signed stays.
        let earlier = match client.manifest(&to) {
            Ok(manifest) => Some(transport::manifest(&manifest).with_context(|| to.to_string())?),
            Err(e) if registry::not_found(&e) => None,
            Err(e) => return Err(e),
        };
        if let Some((image, blobs)) = self.cosign(identities, digest, staging, earlier)? {
            push::blobs(staging, client, &to, &blobs, self.progress)?;
            push::manifest(staging, client, &to, &image)?;
        }
        Ok(())
    }
}

/// The image of these layers, and its configuration.
fn image(
    staging: &Staging,
    arch: Arch,
    layers: Vec<Layer>,
    about: &HashMap<String, String>,
    time: u64,
) -> Result<(Descriptor, Descriptor)> {
    let platform = PlatformBuilder::default().architecture(arch).os(Os::Linux).build()?;
    let config = ImageConfigurationBuilder::default()
        .created(rfc3339(time))
        .architecture(platform.architecture().clone())
        .os(platform.os().clone())
        .config(
            ConfigBuilder::default()
                .entrypoint([PROGRAM.to_string()])
                .env(["PATH=/usr/bin".to_string(), format!("REHYDRATOR_DATA={DATA}")])
                .labels(about.clone())
                .build()?,
        )
        .rootfs(
            RootFsBuilder::default()
                .typ("layers")
                .diff_ids(layers.iter().map(|layer| layer.plain.oci()).collect::<Vec<_>>())
                .build()?,
        )
        .history(
            layers
                .iter()
                .map(|layer| HistoryBuilder::default().created(rfc3339(time)).created_by(&layer.what).build())
                .collect::<Result<Vec<_>, _>>()?,
        )
        .build()?;
    let config = staging.document(MediaType::ImageConfig, &config)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(config.clone())
        .layers(layers.into_iter().map(|layer| layer.descriptor).collect::<Vec<_>>())
        .annotations(about.clone())
        .build()?;
    let mut image = staging.document(MediaType::ImageManifest, &manifest)?;
    // An index of images for several architectures is made of such descriptors.
    image.set_platform(Some(platform));
    Ok((image, config))
}

/// What the image says of itself, in labels and annotations.
fn about(index: &Index, stream_json: &[u8], time: u64) -> Result<HashMap<String, String>> {
    let join = |set: BTreeSet<&str>| Vec::from_iter(set).join(",");
    let releases = Releases::parse(stream_json)?;
    let mut about = HashMap::from([
        (ANNOTATION_CREATED, rfc3339(time)),
        (ANNOTATION_TITLE, format!("CoreOS disk images, {}", index.stream.name)),
        (ANNOTATION_DESCRIPTION, env!("CARGO_PKG_DESCRIPTION").to_string()),
        (ANNOTATION_STREAM, index.stream.name.clone()),
        (ANNOTATION_ARCHITECTURES, join(index.architectures())),
    ]);
    let releases = releases.of(&index.architectures());
    if !releases.is_empty() {
        about.insert(ANNOTATION_VERSION, join(releases));
    }
    Ok(about.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

/// The releases in a stream document: usually one, but each platform of each architecture has its own.
#[derive(Deserialize)]
struct Releases {
    architectures: BTreeMap<String, Architecture>,
}

#[derive(Deserialize)]
struct Architecture {
    #[serde(default)]
    artifacts: BTreeMap<String, Platform>,
}

#[derive(Deserialize)]
struct Platform {
    release: Option<String>,
}

impl Releases {
    fn parse(stream_json: &[u8]) -> Result<Self> {
        serde_json::from_slice(stream_json).context("stream.json: not a stream document")
    }

    fn of(&self, architectures: &BTreeSet<&str>) -> BTreeSet<&str> {
        let here = self.architectures.iter().filter(|(name, _)| architectures.contains(name.as_str()));
        here.flat_map(|(_, arch)| arch.artifacts.values()).filter_map(|p| p.release.as_deref()).collect()
    }
}

/// A blob, or a part of one that is longer than a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    blob: Blob,
    /// Which part, of one that is in parts.
    part: Option<u32>,
    offset: u64,
    size: u64,
}

impl Piece {
    /// All pieces of `blob`, none of which makes a layer of more than `max` bytes.
    fn of(blob: Blob, max: u64) -> Vec<Self> {
        let most = max - OVERHEAD;
        if blob.size <= most {
            return vec![Self { blob, part: None, offset: 0, size: blob.size }];
        }
        let piece = |part: u64| Self {
            blob,
            part: Some(part as u32),
            offset: part * most,
            size: most.min(blob.size - part * most),
        };
        (0..blob.size.div_ceil(most)).map(piece).collect()
    }

    /// Its path in the dehydrated directory.
    fn path(&self) -> String {
        store::blob_path(&self.blob, self.part)
    }

    /// What a layer of this piece alone is at most, so that no sum of these is too small.
    fn cost(&self) -> u64 {
        self.size + OVERHEAD
    }
}

/// Pieces that share a layer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Group {
    /// The artifacts that need any of them, by their place in the index.
    artifacts: BTreeSet<usize>,
    blobs: BTreeSet<Piece>,
    /// Bytes in the layer.
    size: u64,
}

impl Group {
    fn add(&mut self, piece: Piece) {
        self.size += piece.cost();
        self.blobs.insert(piece);
    }

    fn merge(&mut self, other: Self) {
        self.artifacts.extend(other.artifacts);
        self.blobs.extend(other.blobs);
        self.size += other.size;
    }
}

/// Divides the blobs into layers: those that the same artifacts need together, as long as they fit, and the smallest
/// groups merged while there are too many; those that most artifacts need first. A live rootfs has a layer of its own, the
/// same in the image of the next release that is built on it.
fn group(index: &Index, max: u64) -> Result<Vec<Group>> {
    ensure!(max >= MIN_LAYER, "layers of {max} bytes: at least {MIN_LAYER} are needed");
    let mut needed_by = BTreeMap::<Blob, BTreeSet<usize>>::new();
    for (i, artifact) in index.artifacts.iter().enumerate() {
        for blob in index.blobs_of(artifact) {
            needed_by.entry(blob).or_default().insert(i);
        }
    }
    let stored = index.sources.iter().filter_map(|source| match source {
        SourceSpec::Stored { blob } => Some(*blob),
        _ => None,
    });
    let stored: BTreeSet<Blob> = stored.collect();
    let mut together = BTreeMap::<(BTreeSet<usize>, Option<Blob>), Vec<Blob>>::new();
    for (blob, artifacts) in needed_by {
        together.entry((artifacts, stored.get(&blob).copied())).or_default().push(blob);
    }

    let mut groups = Vec::new();
    for ((artifacts, _), blobs) in together {
        let mut group = Group { artifacts: artifacts.clone(), ..Group::default() };
        let pieces = blobs.into_iter().map(|blob| {
            // More parts than there may be layers: not worth counting them.
            ensure!(blob.size / max <= MAX_DATA_LAYERS as u64, no_room(max));
            Ok(Piece::of(blob, max))
        });
        for piece in pieces.collect::<Result<Vec<_>>>()?.into_iter().flatten() {
            if group.size > 0 && group.size + piece.cost() > max {
                groups.push(std::mem::replace(
                    &mut group,
                    Group { artifacts: artifacts.clone(), ..Group::default() },
                ));
            }
            group.add(piece);
        }
        groups.push(group);
    }

    // The two smallest become one; largest first, so that both are at the end.
    groups.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.blobs.cmp(&b.blobs)));
    while groups.len() > MAX_DATA_LAYERS {
        let (Some(last), Some(mut merged)) = (groups.pop(), groups.pop()) else { break };
        merged.merge(last);
        ensure!(merged.size <= max, no_room(max));
        let at = groups.partition_point(|g| g.size > merged.size);
        groups.insert(at, merged);
    }
    // Blobs are apart, so that the order is total.
    groups.sort_by(|a, b| b.artifacts.len().cmp(&a.artifacts.len()).then_with(|| a.blobs.cmp(&b.blobs)));
    Ok(groups)
}

fn no_room(max: u64) -> String {
    format!("the blobs do not fit into {MAX_DATA_LAYERS} layers of {max} bytes")
}

/// A layer that has been added.
#[derive(Clone)]
struct Layer {
    descriptor: Descriptor,
    /// Digest of the uncompressed tar file.
    plain: Digest,
    /// What `podman history` shows.
    what: String,
}

/// A file of a layer of data or metadata.
struct Entry {
    /// Its path below [`DATA`].
    name: String,
    content: Arc<dyn Source>,
    /// What must be in it, where that is not known to be so.
    expected: Option<Digest>,
}

/// It takes some seconds and 60 MiB for the program. Level 19 takes half as much again of both, and gains 0.3 %.
const ZSTD_LEVEL: i32 = 18;

/// The program, and the architecture it is for.
fn program_layer(
    staging: &Staging,
    program: &Program,
    time: u64,
    compression: Compression,
) -> Result<(Arch, Layer)> {
    let at = || format!("program {}", program.path.display());
    let file = File::open(&program.path).and_then(source::File::new).with_context(at)?;
    let mut head = Vec::new();
    Reader::new(&file).take(elf::HEAD).read_to_end(&mut head).with_context(at)?;
    let arch = elf::static_executable(&head).with_context(at)?;
    if let Some(expected) = program.arch.as_ref().filter(|expected| **expected != arch.to_string()) {
        bail!("{}: it is for {arch}, not for {expected}", at());
    }

    let mut tar = TarLayer::new(time);
    tar.file(PROGRAM, 0o755, Arc::new(file), None).with_context(at)?;
    let tar = tar.finish()?;
    let (descriptor, plain) = match compression {
        Compression::Zstd => staging.blob(MediaType::ImageLayerZstd, |out| {
            let mut zstd = zstd::Encoder::new(out, ZSTD_LEVEL)?;
            // It takes less memory for what is smaller than its window.
            zstd.set_pledged_src_size(Some(tar.len()))?;
            let (zstd, plain) = hashed(&tar, zstd).with_context(at)?;
            zstd.finish()?;
            Ok(plain)
        }),
        Compression::Gzip => staging.blob(MediaType::ImageLayerGzip, |out| {
            // No name and no time in the header, so that only the content decides.
            let gzip = GzBuilder::new().write(out, flate2::Compression::best());
            let (gzip, plain) = hashed(&tar, gzip).with_context(at)?;
            gzip.finish()?;
            Ok(plain)
        }),
    }?;
    Ok((arch, Layer { descriptor, plain, what: format!("rehydrator {}", env!("CARGO_PKG_VERSION")) }))
}

/// Writes a layer, and gives the writer back with the digest of what went into it.
fn hashed<W: Write>(tar: &Tar, writer: W) -> Result<(W, Digest)> {
    let mut out = Hasher::new(writer);
    tar.write(&mut out)?;
    let (writer, plain, _) = out.into_parts();
    Ok((writer, plain))
}

/// The metadata: everything of the dehydrated directory but the blobs.
fn metadata_layer(staging: &Staging, store: &Store, time: u64) -> Result<Layer> {
    let files = store.metadata()?.into_iter().map(|(name, content)| Entry {
        name,
        content: Arc::new(content),
        expected: None,
    });
    data_or_metadata(staging, "metadata".into(), None, time, files.collect())
}

/// The blobs of a group.
fn data_layer(staging: &Staging, store: &Store, group: &Group, time: u64) -> Result<Layer> {
    let index = &store.index;
    let artifacts: BTreeSet<_> =
        group.artifacts.iter().map(|&i| index.artifacts[i].output.name.as_str()).collect();
    let artifacts = list(artifacts)?;
    let files = group.blobs.iter().map(|piece| {
        let blob = piece.blob;
        // What is in parts is checked once more than it is written.
        if piece.part == Some(0) {
            store.verify(&blob)?;
        }
        let at = || format!("blob {}", blob.sha256);
        let content = Slice::new(store.blob(&blob)?, piece.offset, piece.size).with_context(at)?;
        let expected = piece.part.is_none().then_some(blob.sha256);
        Ok(Entry { name: piece.path(), content: Arc::new(content), expected })
    });
    let files = files.collect::<Result<_>>()?;
    data_or_metadata(staging, format!("data of {artifacts}"), Some(artifacts), time, files)
}

/// An uncompressed layer of `files`.
fn data_or_metadata(
    staging: &Staging,
    what: String,
    artifacts: Option<String>,
    time: u64,
    files: Vec<Entry>,
) -> Result<Layer> {
    let mut tar = TarLayer::new(time);
    let places = files.into_iter().map(|Entry { name, content, expected }| {
        let size = content.len();
        let offset = tar.file(&format!("{DATA}/{name}"), 0o644, content, expected)?;
        Ok(format!("{name}@{offset}+{size}"))
    });
    let places = places.collect::<Result<Vec<_>>>()?;
    let places = list(places.iter().map(String::as_str))?;
    let mut descriptor = staging.layer(tar.finish()?)?;
    let annotations = HashMap::from_iter(
        [(ANNOTATION_FILES.to_string(), places)]
            .into_iter()
            .chain(artifacts.map(|names| (ANNOTATION_ARTIFACTS.to_string(), names))),
    );
    let plain = descriptor.digest().to_string().parse()?;
    descriptor.set_annotations(Some(annotations));
    Ok(Layer { descriptor, plain, what })
}

/// A comma separated list of names, none of which may have a comma in it.
fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let names = Vec::from_iter(names);
    match names.iter().find(|name| name.contains(',')) {
        Some(name) => bail!("{name:?}: a comma in a name: an image cannot list it"),
        None => Ok(names.join(",")),
    }
}

/// A time, in seconds of the epoch, as RFC 3339 writes it, in UTC.
fn rfc3339(time: u64) -> String {
    // Years begin in March here, so that a leap day is the last of its year, and 400 of them are 146097 days.
    let days = time / 86400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, january) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (time / 3600 % 24, time / 60 % 60, time % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", era * 400 + year + january)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Artifact, FORMAT_VERSION, NamedFile, StreamFile, Tier};

    fn blob(n: u64, size: u64) -> Blob {
        Blob { sha256: Digest::of(&n.to_le_bytes()), size }
    }

    /// An index with an artifact for each list of sources it is a delta over, by number; source n is blob n.
    fn index(sizes: &[u64], artifacts: &[&[usize]]) -> Index {
        let zstd = |(n, &size)| SourceSpec::Zstd { blob: blob(n, size), plain_size: 1 };
        let mut sources: Vec<_> = (0..).zip(sizes).map(zstd).collect();
        let artifacts = artifacts.iter().enumerate().map(|(i, base)| {
            let delta = blob(1000 + i as u64, 10);
            sources.push(SourceSpec::Delta { blob: delta, plain_size: 1, base: base.to_vec() });
            Artifact {
                arch: "x86_64".into(),
                platform: format!("p{i}"),
                format: "raw".into(),
                file: "disk".into(),
                published: NamedFile { name: format!("{i}.xz"), blob: blob(0, 1) },
                output: NamedFile { name: format!("{i}"), blob: blob(0, 1) },
                blake3: None,
                tier: Tier::Published,
                published_map: None,
                encoders: Default::default(),
                not_published: None,
                source: sources.len() - 1,
                map: None,
                signature: None,
                stored: 0,
            }
        });
        let artifacts = artifacts.collect();
        Index {
            format_version: FORMAT_VERSION,
            generator: "test".into(),
            stream: StreamFile { name: "stable".into(), blob: blob(0, 1) },
            artifacts,
            unhandled: Vec::new(),
            sources,
            previous: Vec::new(),
        }
    }

    fn blobs(group: &Group) -> BTreeSet<Blob> {
        group.blobs.iter().map(|piece| piece.blob).collect()
    }

    #[test]
    fn blobs_that_the_same_artifacts_need_share_a_layer() {
        let index = index(&[100, 200, 300, 1], &[&[0, 1, 2], &[0, 2], &[0, 2]]);
        let groups = group(&index, MAX_LAYER).unwrap();
        let found: Vec<_> = groups.iter().map(|g| (Vec::from_iter(g.artifacts.clone()), blobs(g))).collect();
        let mut expected = vec![
            (vec![0, 1, 2], BTreeSet::from([blob(0, 100), blob(2, 300)])),
            (vec![0], BTreeSet::from([blob(1, 200), blob(1000, 10)])),
            (vec![1], BTreeSet::from([blob(1001, 10)])),
            (vec![2], BTreeSet::from([blob(1002, 10)])),
        ];
        expected[1..].sort_by(|a, b| a.1.cmp(&b.1));
        assert_eq!(found, expected);
    }

    #[test]
    fn no_more_layers_than_allowed_and_the_smallest_are_merged() {
        let sizes: Vec<_> = (0..200).map(|i| 1000 * (i + 1)).collect();
        let bases: Vec<_> = (0..200).map(|i| [i]).collect();
        let bases: Vec<&[usize]> = bases.iter().map(|b| &b[..]).collect();
        let groups = group(&index(&sizes, &bases), MAX_LAYER).unwrap();
        assert_eq!(groups.len(), MAX_DATA_LAYERS);
        assert_eq!(groups.iter().map(|g| g.blobs.len()).sum::<usize>(), 400);
        assert_eq!(groups.iter().flat_map(|g| &g.artifacts).count(), 200);
        let (min, max) = (groups.iter().map(|g| g.size).min(), groups.iter().map(|g| g.size).max());
        assert!(max.unwrap() < 3 * min.unwrap(), "{min:?} {max:?}");
    }

    #[test]
    fn no_layer_is_too_large() {
        let groups = group(&index(&[3 << 30, 3 << 30], &[&[0, 1], &[0, 1]]), MAX_LAYER).unwrap();
        assert_eq!(groups.iter().filter(|g| g.artifacts.len() == 2).count(), 2);
        assert!(groups.iter().all(|g| g.size <= MAX_LAYER));
        // Longer than a layer: in parts.
        let size = 9 << 30;
        let groups = group(&index(&[size], &[&[0]]), MAX_LAYER).unwrap();
        assert!(groups.iter().all(|g| g.size <= MAX_LAYER));
        let mut pieces: Vec<_> =
            groups.iter().flat_map(|g| &g.blobs).filter(|p| p.blob == blob(0, size)).collect();
        pieces.sort();
        let parts: Vec<_> = pieces.iter().map(|p| p.part.unwrap()).collect();
        assert_eq!(parts, [0, 1, 2]);
        assert!(pieces.windows(2).all(|two| two[0].offset + two[0].size == two[1].offset));
        assert_eq!(pieces.iter().map(|p| p.size).sum::<u64>(), size);
        let no_room = "the blobs do not fit into 58 layers of 4294967296 bytes";
        for sizes in [vec![u64::MAX], vec![3 << 30; MAX_DATA_LAYERS + 1]] {
            let e = group(&index(&sizes, &[&Vec::from_iter(0..sizes.len())]), MAX_LAYER).unwrap_err();
            assert_eq!(e.to_string(), no_room);
        }
        assert!(group(&index(&[1], &[&[0]]), 1000).is_err());
    }

    #[test]
    fn times() {
        for (time, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_783_382_400, "2026-07-07T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (MAX_TIME, "2242-03-16T12:56:31Z"),
        ] {
            assert_eq!(rfc3339(time), text);
        }
    }

    #[test]
    fn releases_of_the_architectures_that_are_here() {
        let document = br#"{"architectures":{
            "x86_64":{"artifacts":{"aws":{"release":"2"},"qemu":{"release":"1"},"odd":{}}},
            "s390x":{"artifacts":{"qemu":{"release":"3"}},"images":{}},"none":{}}}"#;
        let releases = Releases::parse(document).unwrap();
        assert_eq!(releases.of(&BTreeSet::from(["x86_64", "none"])), BTreeSet::from(["1", "2"]));
        assert!(Releases::parse(b"[]").is_err());
    }
}
