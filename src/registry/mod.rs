//! Registries: a client of the [distribution specification](https://github.com/opencontainers/distribution-spec) that
//! OCI and Docker registries speak.
//!
//! ```text
//! reference (which) + auth (who) ─► client: manifests, blobs and parts of them, tags; pushing
//! ```
//!
//! Whatever comes by digest is checked against it; memory does not grow with a blob. Attempts and waits are those of
//! [`crate::http`].

mod auth;
mod client;
mod platform;
mod push;
mod reference;

pub use auth::{Credentials, Files};
pub use client::{BlobReader, Client, MAX_ARCHIVE, MAX_MANIFEST, Manifest, Open, Options, not_found};
pub use platform::{Platform, image_arch, is_index, parse_index};
pub use push::Pushed;
pub use reference::{Reference, TRANSPORT};
