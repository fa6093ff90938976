//! Every test that needs more than one module of the program: one test program, so that an edit links once.
//!
//! A directory holds the tests of one area, `tools` what they share. `.config/nextest.toml` says which tests belong to
//! `ci/check`, `ci/test` and `ci/test --full`.

#![allow(missing_docs, unreachable_pub, reason = "a test is not a library")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "that is how a test fails, and says why"
)]

mod download;
mod folds;
mod hostile;
mod image;
mod imports;
mod inspect;
mod killed;
mod mirror;
mod opened;
mod published;
mod pull;
mod registry;
mod release;
mod rootfs;
mod scripts;
mod serve;
mod sources;
mod stream;
mod sysupdate;
mod tools;
