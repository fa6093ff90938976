//! A dehydrated directory made by hand.

use std::fs;
use std::path::Path;

use rehydrator::digest::Digest;
use rehydrator::recipe::{Artifact, Blob, FORMAT_VERSION, Index, NamedFile, SourceSpec, StreamFile, Tier};
use rehydrator::store::index_digest;

pub fn blob_of(content: &[u8]) -> Blob {
    Blob { sha256: Digest::of(content), size: content.len() as u64 }
}

/// An artifact that is as `source` has it, `FILE` of the format `FORMAT`.
pub fn artifact(arch: &str, platform: &str, file: &str, source: usize, output: Blob) -> Artifact {
    let (part, format) = file.split_once('.').unwrap();
    let name = format!("coreos-44-{platform}.{arch}-{file}");
    Artifact {
        arch: arch.into(),
        platform: platform.into(),
        format: format.into(),
        file: part.into(),
        published: NamedFile { name: format!("{name}.xz"), blob: blob_of(b"published") },
        output: NamedFile { name, blob: output },
        blake3: None,
        tier: Tier::Uncompressed,
        published_map: None,
        encoders: Default::default(),
        not_published: None,
        source,
        map: None,
        signature: None,
        stored: 0,
    }
}

/// Writes the directory of these artifacts, but for their signatures, with `blobs` in it.
pub fn write(
    dir: &Path,
    stream: &[u8],
    artifacts: Vec<Artifact>,
    sources: Vec<SourceSpec>,
    blobs: &[&[u8]],
) -> Index {
    let index = Index {
        format_version: FORMAT_VERSION,
        generator: "a test".into(),
        stream: StreamFile { name: "stable".into(), blob: blob_of(stream) },
        artifacts,
        unhandled: Vec::new(),
        previous: Vec::new(),
        sources,
    };
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("stream.json"), stream).unwrap();
    fs::write(dir.join("index.json"), index.to_json()).unwrap();
    fs::write(dir.join("index.json.sha256"), index_digest(&index.to_json())).unwrap();
    for blob in blobs {
        fs::write(dir.join(format!("blobs/sha256/{}", Digest::of(blob))), blob).unwrap();
    }
    index
}

/// The number that ELF has for the machine of the tests.
pub const MACHINE: u8 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };

/// What passes for a static program for a machine that ELF has this number for: nothing is compressed that nobody runs.
pub fn stub_for(machine: u8) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    (elf[16], elf[18], elf[54]) = (2, machine, 56);
    elf
}
