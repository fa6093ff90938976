//! `serve --registry`: what is in a registry, for systemd-sysupdate. Judged by the systemd-sysupdate of Debian 13 over
//! docker-registry, by gpg and curl, and against registries that lie.

#![allow(missing_docs, unreachable_pub, reason = "nobody uses a test as a library")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

mod common;
mod http;
mod lies;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../registry/common.rs"]
mod registry;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../registry/server.rs"]
mod server;
#[path = "../tools/serving.rs"]
mod serving;
#[path = "../tools/mod.rs"]
mod tools;
mod updates;
