//! Rehydrator: a whole CoreOS release as one container image that gives back every disk image bit for bit.
//!
//! ```text
//! stream.json ─► catalog ─► unfold ─► delta ─► store            (build: dehydrate)
//!                                                │
//! sink ◄──── fold ◄──────── source ◄─────────────┘               (run: rehydrate)
//! ```
//!
//! Around it: [`oci`] makes, signs and reads the image that carries a store, [`registry`] speaks with registries,
//! [`mirror`] keeps releases and [`copy`] keeps images elsewhere, [`pull`] unpacks an image into a directory.
//!
//! Modules follow that flow and import only from those before them; `tests/imports.rs` holds them to it.

pub use engine::{bytes, decompress, fold, io, source};

pub mod bounded;
pub mod catalog;
pub mod cli;
pub mod copy;
pub mod dehydrate;
pub mod digest;
pub mod download;
pub mod extract;
pub mod fetch;
pub mod http;
pub mod inspect;
pub mod memory;
pub mod mirror;
pub mod oci;
pub mod openpgp;
pub mod produce;
pub mod progress;
pub mod proof;
pub mod pull;
pub mod recipe;
pub mod registry;
pub mod rehydrate;
pub mod report;
pub mod serve;
pub mod sink;
pub mod staging;
pub mod store;
pub mod stream;
pub mod terminal;
pub mod transport;
pub mod untar;
pub mod verify;
pub mod version;
pub mod workdir;
