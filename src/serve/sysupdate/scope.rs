//! Which repositories are offered, and whose key signs the list of each. Pure: names in, decisions out.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use crate::mirror::filter::Glob;
use crate::openpgp::Signer;

/// The longest glob, in bytes: that of the name of a repository.
const MAX_GLOB: usize = 255;

/// Names of repositories, as they stand in the path of a request. `*` and `?` do not match a slash, `**` does; the glob matches
/// all of the name or nothing.
#[derive(Clone, Debug)]
pub struct RepositoryGlob {
    text: String,
    glob: Glob,
}

impl RepositoryGlob {
    /// Whether the glob matches this name.
    pub fn matches(&self, name: &str) -> bool {
        self.glob.matches(name)
    }

    /// The name, if the glob is that of one repository.
    fn name(&self) -> Option<&str> {
        (!self.text.contains(['*', '?'])).then_some(&self.text)
    }
}

impl FromStr for RepositoryGlob {
    type Err = String;

    /// Reads a glob. One that matches no name of a repository is an error.
    fn from_str(text: &str) -> Result<Self, String> {
        let no = |why: &str| format!("{text:?}: {why}");
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "*?".contains(c);
        if let Some(bad) = text.chars().find(|c| !is_word(*c) && !"._-/".contains(*c)) {
            return Err(no(&format!(
                "{bad:?} is in no name of a repository: expected a-z, 0-9, . _ - / and *, **, ?"
            )));
        }
        if text.len() > MAX_GLOB {
            return Err(no(&format!("more than {MAX_GLOB} bytes")));
        }
        if !text.split('/').all(|part| part.starts_with(is_word) && part.ends_with(is_word)) {
            return Err(no("each part between slashes must begin and end with a letter, a digit or *"));
        }
        let glob = Glob::parse(text).map_err(no)?;
        Ok(Self { text: text.into(), glob })
    }
}

/// A key, and for which repositories it is: `FILE`, or `GLOB=FILE`.
#[derive(Clone, Debug)]
pub struct KeyFile {
    /// None: for all that no other key is for.
    pub repositories: Option<RepositoryGlob>,
    /// The file of the secret key.
    pub path: PathBuf,
}

impl FromStr for KeyFile {
    type Err = String;

    /// What stands before the first `=` is a glob if it can be one; `./` before the path of a file says that it is none.
    fn from_str(text: &str) -> Result<Self, String> {
        let glob = text.split_once('=').and_then(|(glob, path)| Some((glob.parse().ok()?, path)));
        let (repositories, path) = glob.map_or((None, text), |(glob, path)| (Some(glob), path));
        if path.is_empty() {
            return Err(format!("{text:?}: no file: expected FILE or GLOB=FILE"));
        }
        Ok(Self { repositories, path: path.into() })
    }
}

/// A key that signs lists.
pub struct Key {
    /// For which repositories; none: for all that no other key is for.
    pub repositories: Option<RepositoryGlob>,
    /// The secret key.
    pub signer: Signer,
}

/// What is offered.
pub(super) struct Scope {
    /// No globs: all repositories.
    offered: Vec<RepositoryGlob>,
    keys: Vec<Key>,
}

impl Scope {
    /// Checks that globs and keys fit each other.
    pub(super) fn new(offered: Vec<RepositoryGlob>, keys: Vec<Key>) -> Result<Self> {
        ensure!(
            keys.is_empty() || !offered.is_empty(),
            "--sign-key: the signature vouches for what anyone has pushed: \
             --repository GLOB must say to which repositories (\"**\": all of them)"
        );
        if keys.iter().filter(|key| key.repositories.is_none()).count() > 1 {
            bail!("--sign-key: more than one key for all repositories: expected GLOB=FILE for the others");
        }
        for name in keys.iter().filter_map(|key| key.repositories.as_ref()?.name()) {
            ensure!(
                offered.iter().any(|glob| glob.matches(name)),
                "--sign-key {name}=…: no --repository matches {name}"
            );
        }
        Ok(Self { offered, keys })
    }

    /// Whether nothing says which repositories are offered.
    pub(super) fn is_open(&self) -> bool {
        self.offered.is_empty()
    }

    /// Whether the repository of this name is offered.
    pub(super) fn offers(&self, name: &str) -> bool {
        self.offered.is_empty() || self.offered.iter().any(|glob| glob.matches(name))
    }

    /// Which key signs for the repository of this name: the first whose glob matches, or else the key for all.
    pub(super) fn key_of(&self, name: &str) -> Option<usize> {
        let takes = |key: &Key| key.repositories.as_ref().is_some_and(|glob| glob.matches(name));
        self.keys
            .iter()
            .position(takes)
            .or_else(|| self.keys.iter().position(|key| key.repositories.is_none()))
    }

    /// The key of this number.
    pub(super) fn signer(&self, key: usize) -> &Signer {
        &self.keys[key].signer
    }

    /// Whether the key of this number signs for no more than one repository.
    pub(super) fn is_own(&self, key: usize) -> bool {
        let fingerprint = self.keys[key].signer.fingerprint();
        let same = self.keys.iter().filter(|other| other.signer.fingerprint() == fingerprint);
        same.count() == 1 && self.keys[key].repositories.as_ref().is_some_and(|glob| glob.name().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (glob, names, others) in [
            ("os", &["os"][..], &["os/x", "x/os", "oss", "o", ""][..]),
            ("os/*", &["os/a", "os/a-b"], &["os", "os/a/b", "x/os/a"]),
            ("os/**", &["os/a", "os/a/b/c"], &["os", "oss/a"]),
            ("*", &["a", "a.b"], &["a/b"]),
            ("**", &["a", "a/b/c"], &[]),
            ("***", &["a", "a/b/c"], &[]),
            ("*/os", &["a/os"], &["os", "a/b/os"]),
            ("**/os", &["a/os", "a/b/os"], &["os", "a/b/oss"]),
            ("a/**/b-*", &["a/x/b-1", "a/x/y/b-", "a/b-/b-2"], &["a/b-1", "a/x/b-1/c"]),
            ("a?/*-x*", &["ab/1-x-x", "a1/-x"], &["a/1-x", "a//1-x", "ab/1/-x"]),
        ] {
            let parsed: RepositoryGlob = glob.parse().unwrap();
            names.iter().for_each(|name| assert!(parsed.matches(name), "{glob} {name}"));
            others.iter().for_each(|name| assert!(!parsed.matches(name), "{glob} {name}"));
        }
        // The time does not grow with the number of ways in which a glob could match.
        let hard: RepositoryGlob = format!("{}b", "a*".repeat(127)).parse().unwrap();
        assert!(!hard.matches(&"a".repeat(255)));
    }

    #[test]
    fn globs_that_match_nothing_are_errors() {
        let no_name = "is in no name of a repository: expected a-z, 0-9, . _ - / and *, **, ?";
        let parts = "each part between slashes must begin and end with a letter, a digit or *";
        for (glob, why) in [
            ("", parts.to_owned()),
            ("/os", parts.to_owned()),
            ("os/", parts.to_owned()),
            ("os//x", parts.to_owned()),
            ("../x", parts.to_owned()),
            ("os-", parts.to_owned()),
            ("OS/*", format!("'O' {no_name}")),
            ("os:1", format!("':' {no_name}")),
            ("{a,b}", format!("'{{' {no_name}")),
            ("[ab]", format!("'[' {no_name}")),
        ] {
            assert_eq!(glob.parse::<RepositoryGlob>().unwrap_err(), format!("{glob:?}: {why}"));
        }
        let long = "a".repeat(MAX_GLOB + 1).parse::<RepositoryGlob>().unwrap_err();
        assert!(long.ends_with(": more than 255 bytes"), "{long}");
        assert!("a".repeat(MAX_GLOB).parse::<RepositoryGlob>().is_ok());
    }

    #[test]
    fn keys_with_and_without_a_glob() {
        for (text, glob, path) in [
            ("updates.key", None, "updates.key"),
            ("os/*=os.key", Some("os/*"), "os.key"),
            ("**=a=b.key", Some("**"), "a=b.key"),
            ("/etc/keys/a=b.key", None, "/etc/keys/a=b.key"),
            ("./a=b.key", None, "./a=b.key"),
            ("Keys=b.key", None, "Keys=b.key"),
        ] {
            let key: KeyFile = text.parse().unwrap();
            assert_eq!(key.repositories.map(|glob| glob.text).as_deref(), glob, "{text}");
            assert_eq!(key.path, PathBuf::from(path), "{text}");
        }
        assert!("".parse::<KeyFile>().is_err());
        assert_eq!("os=".parse::<KeyFile>().unwrap_err(), "\"os=\": no file: expected FILE or GLOB=FILE");
    }
}
