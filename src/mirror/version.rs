//! Names of versions: `899.17.0`, `44.20260707.3.1`. They become names of directories, and are ordered by number.

use std::cmp::Ordering;

use anyhow::{Result, ensure};

/// The longest name of a version, in bytes.
const MAX_VERSION: usize = 100;

/// Refuses what is not a plain name: letters, digits and `._+-`, of which it starts with one of the first two.
///
/// Names of versions, channels, streams and architectures become directories and parts of URLs.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    ensure!(
        name.len() <= MAX_VERSION
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(plain)
            && name != "current",
        "not the name of a {what}: {name:?}"
    );
    Ok(())
}

/// Which of two versions is the newer: the first number or word in which they differ says so.
pub fn compare(a: &str, b: &str) -> Ordering {
    let parts = |version: &'_ str| -> Vec<(u64, String)> {
        // A word counts less than any number: 4.0-rc1 comes before 4.0.1.
        let part = |part: &str| match part.parse::<u64>() {
            Ok(n) => (n.saturating_add(1), String::new()),
            Err(_) => (0, part.to_owned()),
        };
        version.split(|c: char| !c.is_ascii_alphanumeric()).map(part).collect()
    };
    parts(a).cmp(&parts(b)).then_with(|| a.cmp(b))
}
