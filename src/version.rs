//! Names of versions: `899.17.0`, `44.20260707.3.1`. They become names of directories, and are ordered by number. What
//! has been had once is not replaced by something older, unless the user says so.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

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

/// A version that is older than one there was before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Older<'a> {
    /// The architecture.
    pub arch: &'a str,
    /// The version there is now.
    pub found: &'a str,
    /// The version there was.
    pub had: &'a str,
}

/// The first architecture whose version in `found` is older than that in `had`.
pub fn older<'a>(
    found: &'a BTreeMap<String, String>,
    had: &'a BTreeMap<String, String>,
) -> Option<Older<'a>> {
    found.iter().find_map(|(arch, found)| {
        let had = had.get(arch).filter(|had| compare(found, had).is_lt())?;
        Some(Older { arch, found, had })
    })
}

/// What to do about something that goes backwards: an error that names the option which allows it, or a warning.
pub fn backwards(what: &str, allowed: bool) -> Result<()> {
    if !allowed {
        bail!("{what}: --allow-downgrade takes it");
    }
    tracing::warn!("{what}: taken because of --allow-downgrade");
    Ok(())
}
