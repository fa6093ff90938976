//! Pulling images: the trees that come out are those of the tools that people trust with it, hostile layers do no harm,
//! and a cache serves many at once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

mod cached;
#[path = "../release/common.rs"]
mod common;
mod hostile;
mod layers;
mod mirrored;
#[allow(dead_code, unreachable_pub, reason = "each test program uses a part, and includes it as a module")]
#[path = "../registry/common.rs"]
mod registry;
#[allow(dead_code, unreachable_pub, reason = "each test program uses a part, and includes it as a module")]
#[path = "../registry/server.rs"]
mod server;
mod trees;
