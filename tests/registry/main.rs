//! Registries: reading from them, pushing to them, signatures; judged by docker-registry and skopeo, and against
//! servers that do what no real one does on demand.

#![allow(missing_docs, unreachable_pub, reason = "nobody uses a test as a library")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

mod client;
mod common;
mod image;
mod many;
#[path = "../tools/release.rs"]
mod release;
mod server;
mod skopeo;
#[path = "../tools/mod.rs"]
mod tools;
mod trust;
