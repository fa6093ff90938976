//! The index of a directory on a web server: which files it lists. HTML as Apache, Caddy, Go, lighttpd and nginx write it, JSON as
//! Caddy and nginx do, and the XML of S3.
//!
//! Whoever can change the index can list anything, so a link counts only when it leads to a file of that very directory. Everything
//! else is named, so that it can be reported, and never becomes a file or a request.

use anyhow::{Context, Result, ensure};
use html5gum::{DefaultEmitter, Token, Tokenizer};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use url::Url;

use crate::bounded::AtMost;
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

/// An entry of a listing in JSON: nginx says `type`, Caddy `is_dir`.
#[derive(Deserialize)]
struct Entry {
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    is_dir: bool,
}

impl Index {
    /// Reads the index of the directory at `base`, whose path ends in a slash.
    pub fn parse(document: &[u8], base: &Url) -> Result<Self> {
        let mut index = Self::default();
        let start = document.trim_ascii_start();
        if start.starts_with(b"[") {
            index.json(start)?;
        } else if find(&start[..start.len().min(1024)], b"<ListBucketResult") {
            index.s3(start, base)?;
        } else {
            index.html(document, base)?;
        }
        for names in [&mut index.files, &mut index.dirs] {
            names.sort();
            names.dedup();
        }
        Ok(index)
    }

    fn html(&mut self, html: &[u8], base: &Url) -> Result<()> {
        // As a browser does it: what is in a script or a style is no link.
        let mut emitter = DefaultEmitter::default();
        emitter.naively_switch_states(true);
        let mut links = 0;
        for Ok(token) in Tokenizer::new_with_emitter(html, emitter) {
            let Token::StartTag(tag) = token else { continue };
            if tag.name.as_slice() != b"a" {
                continue;
            }
            let Some(href) = tag.attributes.get(b"href".as_slice()) else { continue };
            links += 1;
            ensure!(links <= MAX_LINKS, "an index of more than {MAX_LINKS} links");
            let link = std::str::from_utf8(href).map_err(|_| "is not UTF-8");
            self.add(&String::from_utf8_lossy(href), link.and_then(|link| Link::parse(link, base)));
        }
        Ok(())
    }

    fn json(&mut self, json: &[u8]) -> Result<()> {
        let entries: AtMost<Entry, MAX_LINKS> =
            serde_json::from_slice(json).context("not an index in JSON")?;
        for Entry { name, kind, is_dir } in entries.0 {
            let plain = name.strip_suffix('/').unwrap_or(&name);
            let dir = is_dir || kind.as_deref() == Some("directory");
            self.add(&name, Link::of_name(plain, dir));
        }
        Ok(())
    }

    /// A list of the objects in a bucket: with the keys below the directory, or with all keys.
    fn s3(&mut self, xml: &[u8], base: &Url) -> Result<()> {
        let path = percent_decode_str(base.path()).decode_utf8().context("not UTF-8")?;
        let (mut element, mut prefix, mut links) = (Vec::new(), None, 0);
        for Ok(token) in Tokenizer::new(xml) {
            let text = match token {
                Token::StartTag(tag) => {
                    element = tag.name.to_vec();
                    continue;
                }
                Token::EndTag(_) => {
                    element.clear();
                    continue;
                }
                Token::String(text) => String::from_utf8(text.to_vec()).context("not UTF-8")?,
                _ => continue,
            };
            match element.as_slice() {
                b"istruncated" => ensure!(text != "true", "a list of objects that is cut short"),
                // The first is that of the list; others are directories in it.
                b"prefix" if prefix.is_none() && path.ends_with(&text) => prefix = Some(text),
                name @ (b"key" | b"prefix") => {
                    links += 1;
                    ensure!(links <= MAX_LINKS, "a list of more than {MAX_LINKS} objects");
                    let below = prefix.as_deref().unwrap_or(path.trim_start_matches('/'));
                    // Keys of other directories are listed, too, where the list has all keys.
                    let Some(rest) = text.strip_prefix(below).filter(|rest| !rest.is_empty()) else {
                        continue;
                    };
                    let (plain, dir) =
                        rest.strip_suffix('/').map_or((rest, name == b"prefix"), |rest| (rest, true));
                    if !plain.contains('/') {
                        self.add(&text, Link::of_name(plain, dir));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn add(&mut self, link: &str, what: std::result::Result<Link, &'static str>) {
        match what {
            Ok(Link::File(name)) => self.files.push(name),
            Ok(Link::Dir(name)) => self.dirs.push(name),
            Ok(Link::Navigation) => {}
            Err(why) => self.refused.push((link.chars().take(200).collect(), why)),
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

enum Link {
    File(String),
    Dir(String),
    /// What web servers put into an index: directories above, the index itself sorted another way.
    Navigation,
}

impl Link {
    /// A link in the index at `base`, relative or absolute.
    fn parse(link: &str, base: &Url) -> std::result::Result<Self, &'static str> {
        // The parser of URLs leaves them out.
        if link.contains(char::is_control) {
            return Err("is no name of a file");
        }
        let url = base.join(link).map_err(|_| "is no link")?;
        if url.origin() != base.origin() {
            return Err("leads to another server");
        }
        let (path, dir) = url.path().strip_suffix('/').map_or((url.path(), false), |path| (path, true));
        // The directory itself, whatever is asked of it, or one above.
        if dir && base.path().starts_with(url.path()) || base.path().strip_suffix('/') == Some(path) {
            return Ok(Self::Navigation);
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("has a query or a fragment");
        }
        let name = path.strip_prefix(base.path()).filter(|name| !name.contains('/'));
        let name = name.ok_or("is in another directory")?;
        Self::of_name(&percent_decode_str(name).decode_utf8().map_err(|_| "is not UTF-8")?, dir)
    }

    /// A file or a directory of this name.
    fn of_name(name: &str, dir: bool) -> std::result::Result<Self, &'static str> {
        if name.starts_with('.') {
            return Err("is hidden");
        }
        // A percent sign that is left was encoded twice, or badly.
        if check_file_name(name).is_err() || name.contains(['%', '?', '#', ':', '\\']) {
            return Err("is no name of a file");
        }
        Ok(if dir { Self::Dir(name.into()) } else { Self::File(name.into()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files and directories, and what is refused, of an index in a directory of this path.
    fn read(path: &str, index: &str) -> (Vec<String>, Vec<String>, Vec<String>) {
        let base = Url::parse(&format!("https://mirror.example{path}")).unwrap();
        let index = Index::parse(index.as_bytes(), &base).unwrap();
        (index.files, index.dirs, index.refused.into_iter().map(|(link, _)| link).collect())
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn links_in_every_form_of_the_same_directory() {
        let same = [
            "a.bin",
            "./a.bin",
            "/stable/1.0/a.bin",
            "https://mirror.example/stable/1.0/a.bin",
            "https://mirror.example:443/stable/1.0/a.bin",
            "//mirror.example/stable/1.0/a.bin",
            "../1.0/a.bin",
            "%61.bin",
        ];
        for link in same {
            let html = format!(
                r#"<a href="{link}">x</a> <a href="{}">y</a>"#,
                link.replace("a.bin", "dir/").replace("%61.bin", "dir/")
            );
            assert_eq!(
                read("/stable/1.0/", &html),
                (names(&["a.bin"]), names(&["dir"]), names(&[])),
                "{link}"
            );
        }
        let sorting = [
            "?C=M;O=A",
            "./?sort=name&order=desc",
            "../",
            "..",
            "/",
            "/stable/",
            "./",
            "?",
            "#top",
            "/stable/1.0",
        ];
        for link in sorting {
            let html = format!(r#"<a href="{link}">x</a>"#);
            assert_eq!(read("/stable/1.0/", &html), (names(&[]), names(&[]), names(&[])), "{link}");
        }
        for link in [
            "http://mirror.example/stable/1.0/a",
            "https://other.example/stable/1.0/a",
            "//other.example/stable/1.0/a",
            "../2.0/a",
            "dir/a",
            "a?b",
            "a#b",
            "%2e%2e%2fa",
            "a%252e",
            ".a",
            "javascript:x",
            "data:,x",
            "\u{1b}a",
            "a\nb",
        ] {
            let html = format!(r#"<a href="{link}">x</a>"#);
            assert_eq!(read("/stable/1.0/", &html), (names(&[]), names(&[]), names(&[link])), "{link}");
        }
    }

    #[test]
    fn listings_in_json() {
        let nginx = r#"[{"name":"1.0","type":"directory","mtime":"x"},{"name":"a.bin","type":"file","mtime":"x","size":5}]"#;
        assert_eq!(read("/x/", nginx), (names(&["a.bin"]), names(&["1.0"]), names(&[])));
        let caddy = r#"[{"name":"1.0/","size":4096,"url":"./1.0/","is_dir":true},{"name":"a.bin","size":5,"url":"./a.bin","is_dir":false}]"#;
        assert_eq!(read("/x/", caddy), (names(&["a.bin"]), names(&["1.0"]), names(&[])));
        assert_eq!(read("/x/", r#"[{"name":"../a"},{"name":""}]"#).2, names(&["../a", ""]));
        let long = format!("[{}]", vec![r#"{"name":"a"}"#; MAX_LINKS + 1].join(","));
        let e = Index::parse(long.as_bytes(), &Url::parse("https://m.example/").unwrap()).unwrap_err();
        assert!(format!("{e:#}").contains("a list of more than 20000 entries"), "{e:#}");
    }

    #[test]
    fn lists_of_objects() {
        let list = |prefix: &str, rest: &str| {
            format!(
                r#"<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>{prefix}<IsTruncated>false</IsTruncated>{rest}</ListBucketResult>"#
            )
        };
        let keys = "<Contents><Key>x/1.0/</Key></Contents><Contents><Key>x/1.0/a &amp; b</Key><Size>5</Size></Contents>\
                    <Contents><Key>x/1.0/dir/c</Key></Contents><Contents><Key>y/d</Key></Contents>\
                    <CommonPrefixes><Prefix>x/1.0/e/</Prefix></CommonPrefixes>";
        for (path, prefix) in
            [("/x/1.0/", "<Prefix></Prefix>"), ("/bucket/x/1.0/", "<Prefix>x/1.0/</Prefix>"), ("/x/1.0/", "")]
        {
            let found = read(path, &list(prefix, keys));
            assert_eq!(found, (names(&["a & b"]), names(&["e"]), names(&[])), "{path} {prefix}");
        }
        let base = Url::parse("https://b.example/x/").unwrap();
        let cut = list("", "").replace("false", "true");
        assert!(Index::parse(cut.as_bytes(), &base).is_err());
    }
}
