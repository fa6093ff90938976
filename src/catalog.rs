//! The catalog: every artifact of a stream, in the order of the document, with names that are safe to write to.
//!
//! Between the stream document and all that downloads, dehydrates or lists artifacts.

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};

use crate::digest::Digest;
use crate::stream::{Artifact, Stream};

/// The most artifacts of a stream. Today's have some 70; each is a few requests to a server.
const MAX_ITEMS: usize = 10_000;

/// What is added to the name of an artifact for the files beside it. No artifact may be named like that.
const RESERVED: [&str; 3] = [SIGNATURE, PARTIAL, ETAG];

/// Added to the name of an artifact for its signature.
pub const SIGNATURE: &str = ".sig";

/// Added to the name of an artifact while it is downloaded.
pub const PARTIAL: &str = ".partial";

/// Added to the name of an artifact for what the server calls the version of which [`PARTIAL`] is a part.
pub const ETAG: &str = ".etag";

/// The artifacts of a stream.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// In the order of the document.
    pub items: Vec<Item>,
}

/// An artifact: one file to download.
#[derive(Clone, Debug)]
pub struct Item {
    /// Target architecture, as the stream document names it.
    pub arch: String,
    /// Platform, such as `openstack` or `metal`.
    pub platform: String,
    /// Format, such as `qcow2.xz`, `iso` or `pxe`.
    pub format: String,
    /// Which file of the format: `disk`, or `kernel`, `initramfs`, `rootfs` for `pxe`.
    pub file: String,
    /// The published file's name, the last component of `location`: a single path component, that of no other item.
    pub name: String,
    /// URL.
    pub location: String,
    /// URL of the detached OpenPGP signature.
    pub signature: Option<String>,
    /// Digest of the published file.
    pub sha256: Digest,
    /// Digest of the file without its outer compression.
    pub uncompressed_sha256: Option<Digest>,
}

impl Catalog {
    /// The artifacts of `stream`. An error names the artifact that cannot be: one with a digest that is none, a name
    /// that is none, or a name that another has.
    pub fn new(stream: &Stream) -> Result<Self> {
        let mut items = Vec::new();
        let mut names = HashSet::new();
        for (arch, contents) in &stream.architectures.0 {
            for (platform, formats) in &contents.artifacts.0 {
                for (format, files) in &formats.formats.0 {
                    for (file, artifact) in &files.0 {
                        let item = Item::new(arch, platform, format, file, artifact)
                            .and_then(|item| {
                                let output = item.output_name();
                                let mut own = vec![&item.name[..]];
                                own.extend(Some(output).filter(|&o| o != item.name));
                                for name in own {
                                    check_file_name(name)?;
                                    ensure!(
                                        names.insert(name.to_owned()),
                                        "another artifact is named {name}, too"
                                    );
                                }
                                Ok(item)
                            })
                            .with_context(|| format!("artifact {arch} {}", label(platform, format, file)))?;
                        ensure!(items.len() < MAX_ITEMS, "more than {MAX_ITEMS} artifacts");
                        items.push(item);
                    }
                }
            }
        }
        Ok(Self { items })
    }

    /// Leaves only the artifacts of these architectures; all when there are none. An error names one that the
    /// stream does not have.
    pub fn only(mut self, arch: &[String]) -> Result<Self> {
        for a in arch {
            ensure!(self.items.iter().any(|i| i.arch == *a), "the stream has nothing for architecture {a:?}");
        }
        self.items.retain(|i| arch.is_empty() || arch.contains(&i.arch));
        Ok(self)
    }
}

impl Item {
    fn new(arch: &str, platform: &str, format: &str, file: &str, artifact: &Artifact) -> Result<Self> {
        let location = &artifact.location;
        let name = file_name(location);
        // The second: with what is added to it, the name must still be short enough.
        check_file_name(name)
            .and_then(|()| check_file_name(&format!("{name}{PARTIAL}")))
            .with_context(|| format!("location {location:?}"))?;
        if let Some(suffix) = RESERVED.iter().find(|suffix| name.ends_with(**suffix)) {
            bail!("location {location:?}: the name of an artifact may not end in {suffix}");
        }
        let uncompressed = artifact.uncompressed_sha256.as_deref().map(str::parse).transpose();
        Ok(Self {
            arch: arch.into(),
            platform: platform.into(),
            format: format.into(),
            file: file.into(),
            name: name.into(),
            location: location.clone(),
            signature: artifact.signature.clone(),
            sha256: artifact.sha256.parse().context("sha256")?,
            uncompressed_sha256: uncompressed.context("uncompressed-sha256")?,
        })
    }

    /// A short name for messages: `openstack`, `metal iso`, `metal pxe rootfs`.
    pub fn label(&self) -> String {
        label(&self.platform, &self.format, &self.file)
    }

    /// Whether it is a disk image; the live ISO is none.
    pub fn is_disk(&self) -> bool {
        self.file == "disk" && self.format != "iso"
    }

    /// The name of the file that comes out: without the suffix of the compressor where the stream has a digest of
    /// the uncompressed file, the published name otherwise. A zip loses its suffix here too, though the name of the
    /// file is that of the zip's member.
    pub fn output_name(&self) -> &str {
        let stem = [".xz", ".gz", ".zst", ".zip"].iter().find_map(|suffix| self.name.strip_suffix(suffix));
        match stem {
            Some(stem) if self.uncompressed_sha256.is_some() && !stem.is_empty() => stem,
            _ => &self.name,
        }
    }
}

/// A short name for messages: the platform where that says it all, `metal iso`, `metal pxe rootfs` otherwise.
pub fn label(platform: &str, format: &str, file: &str) -> String {
    match (platform, file) {
        ("metal", "disk") => format!("{platform} {format}"),
        (_, "disk") => platform.to_string(),
        _ => format!("{platform} {format} {file}"),
    }
}

/// The last component of a URL's path. It need not be fit for a file name.
pub fn file_name(location: &str) -> &str {
    let path = location.split(['?', '#']).next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default()
}

/// Refuses a file name that is not a single, harmless path component. Names come from stream documents and indexes
/// and become names of files.
pub fn check_file_name(name: &str) -> Result<()> {
    ensure!(
        !name.is_empty()
            && name.len() <= 255
            && name != "."
            && name != ".."
            && !name.contains(|c: char| c == '/' || c == '\\' || c.is_control()),
        "not a file name: {name:?}"
    );
    Ok(())
}
