//! `mirror`: run as users run it, against nginx over trees like those of the release servers, signed by the real gpg.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "that is how a test fails, and says why"
)]

mod config;
mod contrib;
mod crash;
mod hostile;
mod images;
mod installers;
#[allow(dead_code, unreachable_pub, reason = "other tests use the rest")]
#[path = "../registry/common.rs"]
mod registry;
#[path = "../tools/serving.rs"]
mod serving;
mod site;
#[path = "../tools/small.rs"]
mod small;
mod streams;
#[path = "../tools/mod.rs"]
mod tools;
mod trees;
