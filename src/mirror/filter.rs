//! Filters: which files of a release are mirrored. Those of *oppositus*: `+ GLOB` takes a file, `- GLOB` leaves it, the
//! first that matches decides, and a file that none matches is taken.
//!
//! A glob is one of Go's `path.Match`, which is what oppositus had: `*` any characters, `?` one, `[abc]`, `[a-z]` and
//! `[^a-z]` one of a class, `\` takes the special meaning from what follows. `*` and `?` do not match a slash. The crates of
//! globs differ from it in what they negate with and in `{a,b}`. Only here, `**` matches any characters, slashes included: names
//! of files have none, names of repositories do.

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

/// A pattern for names, with or without slashes.
#[derive(Clone, Debug)]
pub struct Glob(Vec<Term>);

#[derive(Clone, Debug, PartialEq)]
enum Term {
    /// `**`
    All,
    /// `*`
    Any,
    One,
    Char(char),
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

impl Glob {
    /// Reads a glob.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let mut chars = text.chars().peekable();
        let mut terms = Vec::new();
        while let Some(c) = chars.next() {
            terms.push(match c {
                '*' if chars.peek() == Some(&'*') => {
                    while chars.next_if_eq(&'*').is_some() {}
                    Term::All
                }
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

    /// Whether the glob matches all of `name`. The time is that of one step for each term and character.
    pub fn matches(&self, name: &str) -> bool {
        let terms = &self.0;
        // Whether the terms before this one match what has been read; a star also matches nothing.
        let skip_stars = |reached: &mut [bool]| {
            for (at, term) in terms.iter().enumerate() {
                reached[at + 1] |= reached[at] && term.is_star();
            }
        };
        let mut reached = vec![false; terms.len() + 1];
        reached[0] = true;
        skip_stars(&mut reached);
        for c in name.chars() {
            let mut next = vec![false; terms.len() + 1];
            for (at, term) in terms.iter().enumerate().filter(|(at, _)| reached[*at]) {
                if term.takes(c) {
                    next[if term.is_star() { at } else { at + 1 }] = true;
                }
            }
            skip_stars(&mut next);
            reached = next;
        }
        reached[terms.len()]
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
    /// Whether the term matches any number of characters.
    fn is_star(&self) -> bool {
        matches!(self, Self::All | Self::Any)
    }

    /// Whether the term matches this character.
    fn takes(&self, c: char) -> bool {
        match self {
            Self::All => true,
            Self::Any | Self::One => c != '/',
            Self::Char(own) => c == *own,
            Self::Class { negated, ranges } => {
                ranges.iter().any(|&(low, high)| low <= c && c <= high) != *negated
            }
        }
    }
}
