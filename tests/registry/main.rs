//! Registries: reading from them, pushing to them, signatures; judged by docker-registry and skopeo, and against
//! servers that do what no real one does on demand.

#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

mod client;
mod common;
mod server;
