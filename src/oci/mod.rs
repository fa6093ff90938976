//! The container image: a dehydrated directory and this program, as layers that any container tool can carry.
//!
//! ```text
//! dehydrated directory ─► image (layers, manifest) + sign ─► layout (oci:DIR, oci-archive:FILE) or push (docker://REF)
//! store ◄──────────────────────────────────────────── read ◄─────────┴───────────────────────────────┘
//! ```
//!
//! The image is a plain OCI image with nothing below it: one static executable and the data. In the order of the
//! manifest its layers are
//!
//! 1. [`PROGRAM`], compressed with zstd, or with gzip where that is asked for;
//! 2. the metadata below [`DATA`]: `index.json`, `stream.json`, upstream's signatures;
//! 3. the blobs below [`DATA`], in uncompressed tar (they are compressed already): one layer for all the blobs that the
//!    same artifacts need, those that most artifacts need first.
//!
//! Every layer after the first has these annotations in its descriptor in the manifest, so that a reader of a registry
//! can fetch an artifact without fetching the image:
//!
//! | annotation | value |
//! | --- | --- |
//! | [`ANNOTATION_ARTIFACTS`] | names of the artifacts (`output` in `index.json`) that need something in the layer, sorted, comma separated; not on the metadata layer, which all of them need |
//! | [`ANNOTATION_FILES`] | what is in the layer and where, sorted by path, comma separated: `PATH@OFFSET+SIZE`, the path below [`DATA`], offset and size in bytes of the *uncompressed* layer |
//!
//! Tools that compress layers on their way to a registry drop these annotations (skopeo does, without
//! `--preserve-digests`; podman too): the image works all the same, but only as a whole.
//!
//! Data layers depend on neither the program nor its architecture, so images for several architectures share them, and
//! a new release of the program leaves them as they are. The same input makes the same digests, everywhere: entries are
//! sorted, owned by 0:0, of mode 0644 or 0755, and all times are `SOURCE_DATE_EPOCH`, or 0.

pub mod cosign;
pub mod elf;
pub mod image;
mod json;
mod kept;
mod layer;
pub mod layout;
mod push;
pub mod read;
pub mod sign;

/// Where the program is in the image.
pub const PROGRAM: &str = "/usr/bin/rehydrator";

/// Where the dehydrated directory is in the image.
pub const DATA: &str = "/srv/dehydrated";

/// On a data layer: the artifacts that need it.
pub const ANNOTATION_ARTIFACTS: &str = "dev.rehydrator.artifacts";

/// On a metadata or data layer: the files in it.
pub const ANNOTATION_FILES: &str = "dev.rehydrator.files";

/// Label and annotation of the image: the name of the stream, such as `stable`.
pub const ANNOTATION_STREAM: &str = "dev.rehydrator.stream";

/// Label and annotation of the image: the architectures of the artifacts in it, sorted, comma separated, as the stream
/// document names them. The architecture of the program is that of the image.
pub const ANNOTATION_ARCHITECTURES: &str = "dev.rehydrator.architectures";
