//! `mirror`: run as users run it, against nginx over trees like those of the release servers, signed by the real gpg.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "that is how a test fails, and says why"
)]

#[path = "../tools/mod.rs"]
mod tools;

mod config;
mod contrib;
mod crash;
mod hostile;
mod site;
mod streams;
mod trees;
