//! Pulling images: the trees that come out are those of the tools that people trust with it, hostile layers do no harm,
//! and a cache serves many at once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "that is how a test fails")]

#[path = "../release/common.rs"]
mod common;
mod hostile;
mod layers;
mod trees;
