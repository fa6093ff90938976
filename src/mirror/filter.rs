//! Filters: which files of a release are mirrored. Those of *oppositus*: `+ GLOB` takes a file, `- GLOB` leaves it, the
//! first that matches decides, and a file that none matches is taken.
//!
//! A glob is one of Go's `path.Match`, which is what oppositus had: `*` any characters, `?` one, `[abc]`, `[a-z]` and
//! `[^a-z]` one of a class, `\` takes the special meaning from what follows. The crates of globs differ from it in what
//! they negate with, in `{a,b}` and in `**`.

use std::iter::Peekable;
use std::str::Chars;

use serde::{Deserialize, Deserializer};

/// Filters in the order in which they are asked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Filters(pub Vec<Filter>);

/// `+ GLOB` or `- GLOB`.
#[derive(Clone, Debug)]
pub struct Filter {
    include: bool,
    glob: Glob,
}

impl Filters {
    /// Whether a file of this name is to be mirrored.
    pub fn take(&self, name: &str) -> bool {
        self.0.iter().find(|f| f.glob.matches(name)).is_none_or(|f| f.include)
    }
}

impl Filter {
    /// Reads `+ GLOB` or `- GLOB`.
    pub fn parse(text: &str) -> Result<Self, NotAFilter> {
        let (kind, glob) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let include = match kind {
            "+" => true,
            "-" => false,
            _ => return Err(NotAFilter(format!("{text:?} does not start with \"+ \" or \"- \""))),
        };
        let glob = Glob::parse(glob.trim_start());
        Ok(Self { include, glob: glob.map_err(|why| NotAFilter(format!("{text:?}: {why}")))? })
    }
}

/// A text that is no filter, and why.
#[derive(Debug, thiserror::Error)]
#[error("not a filter: {0}")]
pub struct NotAFilter(String);

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// A pattern for names of files, which have no slashes.
#[derive(Clone, Debug)]
struct Glob(Vec<Term>);

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Any,
    One,
    Char(char),
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Glob {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let mut chars = text.chars().peekable();
        let mut terms = Vec::new();
        while let Some(c) = chars.next() {
            terms.push(match c {
                // Several in a row are one; this keeps the time of matching low.
                '*' if terms.last() == Some(&Term::Any) => continue,
                '*' => Term::Any,
                '?' => Term::One,
                '\\' => Term::Char(chars.next().ok_or("nothing after \\")?),
                '[' => {
                    let negated = chars.next_if_eq(&'^').is_some();
                    let mut ranges = Vec::new();
                    while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
                        let low = bound(&mut chars)?;
                        let to = chars.next_if_eq(&'-').is_some();
                        ranges.push((low, if to { bound(&mut chars)? } else { low }));
                    }
                    Term::Class { negated, ranges }
                }
                c => Term::Char(c),
            });
        }
        Ok(Self(terms))
    }

    fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        let (mut term, mut at) = (0, 0);
        // Where to go on when it does not fit: behind the last `*`, which then takes one character more.
        let mut retry = None;
        while term < self.0.len() || at < name.len() {
            match self.0.get(term) {
                Some(Term::Any) => {
                    retry = Some((term, at + 1));
                    term += 1;
                    continue;
                }
                Some(one) if name.get(at).is_some_and(|&c| one.takes(c)) => {
                    term += 1;
                    at += 1;
                    continue;
                }
                _ => {}
            }
            match retry {
                // No name has a slash; `*` would not take one.
                Some((star, next)) if next <= name.len() && name[next - 1] != '/' => {
                    (term, at) = (star, next)
                }
                _ => return false,
            }
        }
        true
    }
}

/// A character in a class.
fn bound(chars: &mut Peekable<Chars<'_>>) -> Result<char, &'static str> {
    match chars.next() {
        Some('-' | ']') => Err("- or ] where a class must have a character"),
        Some('\\') => chars.next().ok_or("nothing after \\"),
        Some(c) => Ok(c),
        None => Err("[ without ]"),
    }
}

impl Term {
    /// Whether this one character fits.
    fn takes(&self, c: char) -> bool {
        match self {
            Self::Any => false,
            Self::One => c != '/',
            Self::Char(own) => c == *own,
            Self::Class { negated, ranges } => {
                ranges.iter().any(|&(low, high)| low <= c && c <= high) != *negated
            }
        }
    }
}
