//! `mirror image`, `mirror images`: copies images from one place to another, as they are.
//!
//! ```text
//! transport ─► index, manifests ─► blobs the destination lacks ─► manifests, children first ─► the name, last
//! ```
//!
//! Every document goes over byte for byte, so that digests, and with them signatures, stay what they are. What belongs to
//! an image without being part of it follows under the names that tools look for: cosign's `sha256-HEX.sig`, `.att` and
//! `.sbom`, and referrers as the index `sha256-HEX`, which is made where the source has another way to name them.

pub mod config;
// The globs of release mirrors.
use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{Descriptor, MediaType};
use rayon::prelude::*;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::bounded::{AtMost, shown};
use crate::digest::{Digest, Hasher};
use crate::mirror::filter::{Filter, Filters};
use crate::oci::layout::{Destination, Staging};
use crate::oci::sign::Policy;
use crate::progress::Progress;
use crate::registry::{
    Client, Manifest, Options as RegistryOptions, Platform, Pushed, Reference, is_index, parse_index,
};
use crate::transport::{self, MAX_LAYERS, MAX_MANIFESTS, Totals, Transport, belongs, blob_path};

/// How many blobs of an image are copied at once.
const PARALLEL: usize = 4;

/// The most tags that an error tells of.
const MAX_TOLD: u64 = 100;

/// The most blobs of an image, in all of its manifests together.
const MAX_BLOBS: usize = 1 << 16;

/// What cosign appends to `sha256-HEX` for signatures, attestations and bills of materials.
const COSIGN: [&str; 3] = [".sig", ".att", ".sbom"];

/// What to copy.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Of an image for several platforms, only these; all when empty.
    pub platforms: Vec<Platform>,
    /// All tags of the source that these take, instead of one.
    pub tags: Vec<String>,
    /// Take what refers to an image along.
    pub referrers: bool,
    /// Only find out what would be done.
    pub dry_run: bool,
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Images that have got their names.
    pub images: u64,
    /// Blobs that were sent, or would be.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs that were there already, or were mounted from another repository.
    pub present: u64,
}

/// Where images go.
#[derive(Clone)]
enum Place {
    Registry(Client, Reference),
    Layout(Destination),
}

impl Place {
    fn parse(text: &str, options: RegistryOptions) -> Result<Self> {
        if text.starts_with("oci:") || text.starts_with("oci-archive:") {
            return Ok(Self::Layout(text.parse()?));
        }
        Ok(Self::Registry(Client::new(options.patient()), text.parse()?))
    }

    fn with_tag(&self, tag: &str) -> Result<Self> {
        Ok(match self {
            Self::Registry(client, reference) => Self::Registry(client.clone(), reference.with_tag(tag)?),
            Self::Layout(dest) => {
                ensure!(!dest.archive, "an archive holds one image: copy into oci:DIR");
                Self::Layout(Destination { tag: tag.into(), ..dest.clone() })
            }
        })
    }

    /// Where a blob is already, if it is.
    fn blob(&self, digest: Digest) -> Option<PathBuf> {
        match self {
            Self::Layout(dest) if !dest.archive => {
                Some(dest.path.join(blob_path(digest))).filter(|path| path.is_file())
            }
            _ => None,
        }
    }

    fn holds_several(&self) -> bool {
        !matches!(self, Self::Layout(dest) if dest.archive)
    }
}

/// The documents and blobs of an image.
#[derive(Default)]
struct Parts {
    /// Children before those that name them.
    manifests: Vec<Manifest>,
    /// Those in `manifests`, and those that are about to be.
    seen: HashSet<Digest>,
    blobs: HashMap<Digest, Descriptor>,
}

/// A document of any kind, as far as copying it goes: not as strict as a pull, since artifacts are copied too. What it says
/// besides is not kept in memory.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u64,
    #[serde(default)]
    manifests: AtMost<Part, MAX_MANIFESTS>,
    config: Option<Part>,
    #[serde(default)]
    layers: AtMost<Part, MAX_LAYERS>,
}

/// What a document names.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    media_type: MediaType,
    digest: oci_spec::image::Digest,
    size: u64,
    urls: Option<Vec<IgnoredAny>>,
}

impl Part {
    fn descriptor(self) -> Descriptor {
        Descriptor::new(self.media_type, self.size, self.digest)
    }
}

/// Copies images.
pub struct Copier<'a> {
    registry: RegistryOptions,
    policy: Policy,
    progress: &'a Progress,
    /// Taken while a layout gets a new name: its index is one file.
    naming: Mutex<()>,
}

impl<'a> Copier<'a> {
    /// Speaks to registries as `registry` says, and copies only images that are signed as `policy` demands.
    pub fn new(registry: RegistryOptions, policy: Policy, progress: &'a Progress) -> Self {
        Self { registry, policy, progress, naming: Mutex::new(()) }
    }

    /// Copies the image, or the images, at `source` to `dest`.
    pub fn copy(&self, source: &str, dest: &str, options: &Options) -> Result<Copied> {
        let from = transport::open(source, self.registry.clone())?;
        let to = Place::parse(dest, self.registry.clone())?;
        let mut copied = Copied::default();
        if options.tags.is_empty() {
            self.image(&*from, source, &to, options, &mut copied)
                .with_context(|| format!("image {source}"))?;
            return Ok(copied);
        }
        let filters = filters(&options.tags)?;
        let tags = from.tags().with_context(|| format!("image {source}"))?;
        let (mut failed, mut failures) = (Vec::new(), 0u64);
        // What belongs to images comes along with them.
        for tag in tags.iter().filter(|tag| !belongs(tag) && filters.take(tag)) {
            let result = from.tagged(tag).and_then(|image| {
                let image = image.context("not there any more")?;
                self.image(&*image, source, &to.with_tag(tag)?, options, &mut copied)
            });
            if let Err(e) = result {
                failures += 1;
                failed.extend(
                    (failures <= MAX_TOLD).then(|| format!("\ntag {}: {e:#}", shown(tag.as_bytes()))),
                );
            }
        }
        ensure!(failures == 0, "image {source}: {failures} tags failed:{}", failed.concat());
        Ok(copied)
    }

    fn image(
        &self,
        from: &dyn Transport,
        source: &str,
        to: &Place,
        options: &Options,
        copied: &mut Copied,
    ) -> Result<()> {
        let mut root = from.root()?;
        self.policy.check("signature", from, root.digest)?;
        if !options.platforms.is_empty() && is_index(&root.media_type) {
            root = self.only(&root, &options.platforms)?;
        }
        let mut totals = Totals::default();
        let mut images = self.one(from, source, root, to, options, &mut totals, copied)?;
        if !to.holds_several() {
            return Ok(());
        }
        let mut seen = HashSet::new();
        while let Some(digest) = images.pop() {
            if !seen.insert(digest) {
                continue;
            }
            let name = format!("sha256-{digest}");
            for tag in COSIGN.map(|suffix| format!("{name}{suffix}")) {
                let Some(more) = from.tagged(&tag)? else { continue };
                self.one(&*more, source, more.root()?, &to.with_tag(&tag)?, options, &mut totals, copied)?;
            }
            if !options.referrers {
                continue;
            }
            let index = match from.referrers(digest)? {
                Some(index) => Some(index),
                None => from.tagged(&name)?.map(|more| more.root()).transpose()?,
            };
            if let Some(index) = index {
                // What refers to these comes along, too.
                let to = to.with_tag(&name)?;
                images.extend(self.one(from, source, index, &to, options, &mut totals, copied)?);
            }
        }
        Ok(())
    }

    /// The index with these platforms alone, or the image if it is only one.
    fn only(&self, root: &Manifest, platforms: &[Platform]) -> Result<Manifest> {
        let index = parse_index(&root.bytes)?;
        let mut picked: Vec<Descriptor> = Vec::new();
        for platform in platforms {
            let image = platform.pick(&index)?;
            if !picked.contains(image) {
                picked.push(image.clone());
            }
        }
        let mut index: serde_json::Value = serde_json::from_slice(&root.bytes)?;
        index["manifests"] = serde_json::to_value(&picked)?;
        let bytes = serde_json::to_vec(&index)?;
        Ok(Manifest { digest: Digest::of(&bytes), media_type: root.media_type.clone(), bytes })
    }

    /// Copies one image; gives the digests of its manifests.
    #[allow(clippy::too_many_arguments, reason = "all of them different")]
    fn one(
        &self,
        from: &dyn Transport,
        source: &str,
        root: Manifest,
        to: &Place,
        options: &Options,
        totals: &mut Totals,
        copied: &mut Copied,
    ) -> Result<Vec<Digest>> {
        let mut parts = Parts::default();
        parts.seen.insert(root.digest);
        collect(from, root, &mut parts, totals, 0)?;
        let digests = parts.manifests.iter().map(|manifest| manifest.digest).collect();
        match to {
            Place::Registry(client, reference) => {
                self.to_registry(from, source, &parts, client, reference, options, copied)?;
            }
            Place::Layout(dest) => self.to_layout(from, &parts, to, dest, options, copied)?,
        }
        copied.images += 1;
        Ok(digests)
    }

    #[allow(clippy::too_many_arguments, reason = "all of them different")]
    fn to_registry(
        &self,
        from: &dyn Transport,
        source: &str,
        parts: &Parts,
        client: &Client,
        reference: &Reference,
        options: &Options,
        copied: &mut Copied,
    ) -> Result<()> {
        // A registry takes blobs over from another of its repositories.
        let near = source.parse::<Reference>().ok().filter(|near| near.registry() == reference.registry());
        let near = near.as_ref().map(Reference::repository);
        let push = |(digest, blob): (&Digest, &Descriptor)| -> Result<Pushed> {
            if options.dry_run {
                return Ok(if client.has_blob(reference, *digest)? { Pushed::Present } else { Pushed::Sent });
            }
            let task = self.progress.task(format!("blob {:.12}", digest.to_string()), Some(blob.size()));
            let open = |offset| -> io::Result<Box<dyn Read + '_>> {
                let content: Box<dyn Read + '_> =
                    from.part(blob, offset, blob.size().saturating_sub(offset)).map_err(io::Error::other)?;
                Ok(content)
            };
            let sent = |bytes| task.advance(bytes);
            let pushed = client.push_blob(reference, *digest, blob.size(), near.as_slice(), &open, &sent)?;
            task.finish();
            Ok(pushed)
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(PARALLEL).build()?;
        let blobs: Vec<_> = parts.blobs.iter().collect();
        let push = |blob: (&Digest, &Descriptor)| (blob.1.size(), push(blob));
        let pushed: Vec<_> = pool.install(|| blobs.into_par_iter().with_max_len(1).map(push).collect());
        for (size, pushed) in pushed {
            count(copied, pushed? == Pushed::Sent, size);
        }
        if options.dry_run {
            return Ok(());
        }
        let (root, children) = parts.manifests.split_last().context("no manifest")?;
        for child in children {
            client.push_manifest(&reference.with_digest(child.digest), child)?;
        }
        client.push_manifest(reference, root)
    }

    fn to_layout(
        &self,
        from: &dyn Transport,
        parts: &Parts,
        to: &Place,
        dest: &Destination,
        options: &Options,
        copied: &mut Copied,
    ) -> Result<()> {
        let staging = if options.dry_run { None } else { Some(Staging::new(dest.clone())?) };
        for (digest, blob) in &parts.blobs {
            let there = to.blob(*digest).is_some();
            count(copied, !there, blob.size());
            if let Some(staging) = staging.as_ref().filter(|_| !there) {
                let task = self.progress.task(format!("blob {:.12}", digest.to_string()), Some(blob.size()));
                let content = from.part(blob, 0, blob.size())?.take(blob.size().saturating_add(1));
                let (found, ()) = staging.blob(blob.media_type().clone(), |mut out| {
                    let mut hasher = Hasher::new(&mut out);
                    io::copy(&mut task.reader(content), &mut hasher)?;
                    let (found, _) = hasher.finish();
                    found.must_be(*digest).context("blob")
                })?;
                ensure!(found.size() == blob.size(), "blob {digest}: expected {} bytes", blob.size());
                task.finish();
            }
        }
        let Some(staging) = staging else { return Ok(()) };
        let mut root = None;
        for manifest in &parts.manifests {
            let written =
                staging.blob(manifest.media_type.clone(), |out| Ok(out.write_all(&manifest.bytes)?))?;
            root = Some(written.0);
        }
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        staging.publish(root.context("no manifest")?, Vec::new())
    }
}

fn count(copied: &mut Copied, sent: bool, size: u64) {
    if sent {
        copied.blobs += 1;
        copied.bytes += size;
    } else {
        copied.present += 1;
    }
}

/// Finds all that an image is made of.
fn collect(
    from: &dyn Transport,
    document: Manifest,
    parts: &mut Parts,
    totals: &mut Totals,
    depth: usize,
) -> Result<()> {
    ensure!(depth <= transport::MAX_NESTED, "indexes nested more than {} deep", transport::MAX_NESTED);
    totals.add(&document)?;
    let index = is_index(&document.media_type);
    let what = if index { "not an image index" } else { "not a manifest" };
    let found: Document = serde_json::from_slice(&document.bytes).context(what)?;
    ensure!(found.schema_version == 2, "a manifest of schema {}: expected 2", found.schema_version);
    if index {
        for child in found.manifests.0 {
            if parts.seen.insert(child.digest.to_string().parse()?) {
                collect(from, transport::checked(from, &child.descriptor())?, parts, totals, depth + 1)?;
            }
        }
    } else {
        for blob in found.config.into_iter().chain(found.layers.0) {
            let digest = blob.digest.to_string().parse()?;
            // Those may not be handed out; who needs them gets them from where their maker has them.
            if blob.urls.as_ref().is_none_or(Vec::is_empty) {
                parts.blobs.insert(digest, blob.descriptor());
                ensure!(parts.blobs.len() <= MAX_BLOBS, "more than {MAX_BLOBS} blobs belong to the image");
            }
        }
    }
    parts.manifests.push(document);
    Ok(())
}

/// `+ GLOB`, `- GLOB`; a glob alone takes what it matches, and then nothing else is taken.
fn filters(globs: &[String]) -> Result<Filters> {
    let marked = |glob: &String| glob.starts_with("+ ") || glob.starts_with("- ");
    let mut filters: Vec<Filter> = Vec::new();
    for glob in globs {
        let text = if marked(glob) { glob.clone() } else { format!("+ {glob}") };
        filters.push(Filter::parse(&text)?);
    }
    if !globs.iter().all(marked) {
        filters.push(Filter::parse("- *")?);
    }
    Ok(Filters(filters))
}

/// Copies all images of a configuration. One that fails does not end the rest; the error at the end names them.
pub fn images(
    config: &config::Config,
    copier: &Copier<'_>,
    dry_run: bool,
    done: impl Fn(&config::Image, &Copied) + Sync,
) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(config.parallel).build()?;
    let failed: Vec<String> = pool.install(|| {
        let each = config.images.par_iter().with_max_len(1).filter_map(|image| {
            let options = image.options(dry_run);
            match options.and_then(|options| copier.copy(&image.source, &image.destination, &options)) {
                Ok(copied) => {
                    done(image, &copied);
                    None
                }
                Err(e) => Some(format!("\n{} -> {}: {e:#}", image.source, image.destination)),
            }
        });
        each.collect()
    });
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} of {} images failed:{}", failed.len(), config.images.len(), failed.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_of_tags() {
        let take = |globs: &[&str], tag: &str| {
            let globs: Vec<_> = globs.iter().map(|glob| (*glob).to_owned()).collect();
            filters(&globs).unwrap().take(tag)
        };
        assert!(take(&["v*"], "v1"));
        assert!(!take(&["v*"], "latest"));
        assert!(!take(&["- v1", "+ v*", "- *"], "v1"));
        assert!(take(&["- v1", "+ v*", "- *"], "v2"));
        assert!(take(&["- v1"], "latest"));
        assert!(belongs(&format!("sha256-{}.sig", "a".repeat(64))));
        assert!(!belongs("sha256-abc"));
    }
}
