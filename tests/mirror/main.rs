//! `mirror`: run as users run it, against nginx over trees like those of the release servers, signed by the real gpg.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, not in what they call")]

#[path = "../tools/mod.rs"]
mod tools;

mod config;
mod contrib;
mod crash;
mod hostile;
mod site;
mod streams;
mod trees;
