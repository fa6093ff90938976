//! The HTML index of a directory on a web server: which files it lists.
//!
//! Whoever can change the index can list anything, so a link counts only when it is the plain name of a file in that
//! directory. Everything else is named, so that it can be reported, and never becomes a file or a request.

use anyhow::{Result, ensure};
use html5gum::{DefaultEmitter, Token, Tokenizer};
use percent_encoding::percent_decode_str;

use crate::catalog::check_file_name;

/// The longest index that is read, in bytes. That of a Flatcar release has some 100 KB.
pub const MAX_INDEX: u64 = 4 << 20;

/// The most links of an index, whatever they are. A Flatcar release has some 600.
const MAX_LINKS: usize = 20_000;

/// What an index lists.
#[derive(Debug, Default)]
pub struct Index {
    /// Names of files, sorted, each once.
    pub files: Vec<String>,
    /// Names of directories, sorted, each once.
    pub dirs: Vec<String>,
    /// Links that are neither, as they are, and why not.
    pub refused: Vec<(String, &'static str)>,
}

impl Index {
    /// Reads the links of a document that lies at a URL of the path `path`.
    pub fn parse(html: &[u8], path: &str) -> Result<Self> {
        let mut index = Self::default();
        let mut links = 0;
        // As a browser does it: what is in a script or a style is no link.
        let mut emitter = DefaultEmitter::default();
        emitter.naively_switch_states(true);
        for Ok(token) in Tokenizer::new_with_emitter(html, emitter) {
            let Token::StartTag(tag) = token else { continue };
            if tag.name.as_slice() != b"a" {
                continue;
            }
            let Some(href) = tag.attributes.get(b"href".as_slice()) else { continue };
            links += 1;
            ensure!(links <= MAX_LINKS, "an index of more than {MAX_LINKS} links");
            match std::str::from_utf8(href).map_err(|_| "not UTF-8").and_then(|link| Link::parse(link, path))
            {
                Ok(Link::File(name)) => index.files.push(name),
                Ok(Link::Dir(name)) => index.dirs.push(name),
                Ok(Link::Navigation) => {}
                Err(why) => {
                    index.refused.push((String::from_utf8_lossy(href).chars().take(200).collect(), why))
                }
            }
        }
        for names in [&mut index.files, &mut index.dirs] {
            names.sort();
            names.dedup();
        }
        Ok(index)
    }
}

enum Link {
    File(String),
    Dir(String),
    /// What every web server puts into an index: the parent directory, other ways to sort.
    Navigation,
}

impl Link {
    fn parse(link: &str, path: &str) -> std::result::Result<Self, &'static str> {
        let parent = link.ends_with('/') && path.starts_with(link);
        if link.is_empty() || link == "../" || link == "./" || parent || is_sorting(link) {
            return Ok(Self::Navigation);
        }
        if link.contains(['?', '#']) {
            return Err("has a query or a fragment");
        }
        if link.starts_with('/') || link.contains(':') {
            return Err("is not relative");
        }
        let (name, dir) = link.strip_suffix('/').map_or((link, false), |name| (name, true));
        if name.contains(['/', '\\']) {
            return Err("is in another directory");
        }
        let name = percent_decode_str(name).decode_utf8().map_err(|_| "is not UTF-8")?;
        if name.starts_with('.') {
            return Err("is hidden");
        }
        // A percent sign that is left was encoded twice, or badly.
        if check_file_name(&name).is_err() || name.contains(['%', '?', '#', ':']) {
            return Err("is no name of a file");
        }
        Ok(if dir { Self::Dir(name.into()) } else { Self::File(name.into()) })
    }
}

/// Whether a link only sorts the index another way, such as `?C=M;O=A`.
fn is_sorting(link: &str) -> bool {
    link.strip_prefix("?C=").is_some_and(|rest| {
        rest.len() <= 6 && rest.chars().all(|c| c.is_ascii_alphabetic() || ";&=".contains(c))
    })
}
