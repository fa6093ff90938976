//! The release servers of CoreOS Container Linux and Flatcar: `version.txt` of a channel says what is current, the HTML
//! index of a version says which files there are.
//!
//! Files are taken when they have a signature, or when a `DIGESTS` file that has one lists them. Neither says which
//! version they are of: a version is taken only when the signed `version.txt` in its directory names it. Nothing else of
//! what a server says is believed: with the wrong `version.txt` of a channel it can offer an older version, which the
//! mirror refuses if it has had a newer one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use url::Url;

use crate::catalog::SIGNATURE;
use crate::fetch;
use crate::http::Http;
use crate::openpgp::{Keys, MAX_SIGNATURE, SignatureError};
use crate::workdir::read_limited;

use super::config::{Source, Versions};
use super::index::{Index, MAX_INDEX};
use super::plan::{Plan, Proof, Sha512, Version, Wanted, join};
use crate::version::{check_name, compare};

/// What says which version of a channel is current, and which version a directory has.
pub const VERSION_TXT: &str = "version.txt";

/// The longest `version.txt` that is read, in bytes. Real ones have some 200.
pub const MAX_VERSION_TXT: u64 = 64 << 10;

/// The longest list of digests that is read, in bytes. Real ones have some 1 KB.
const MAX_DIGESTS: u64 = 1 << 20;

/// How names of lists of digests end.
const DIGESTS: &str = ".DIGESTS";

/// The architecture whose versions and links lie where oppositus has them; others have directories of their own.
const PLAIN_ARCH: &str = "amd64";

/// Finds out what a channel has. An error is one of the whole channel; others are in the plan.
pub fn plan(source: &Source, channel: &str, arch: &str, dest: &Path, http: &Http) -> Result<Plan> {
    let part = if arch == PLAIN_ARCH { "" } else { arch };
    let mut plan =
        Plan::new(&source.root, join(Path::new(channel), Path::new(part)), part, source.keys.clone());
    let mut base = Url::parse(&source.url(channel, arch)?)?;
    if !base.path().ends_with('/') {
        base.set_path(&format!("{}/", base.path()));
    }
    let mut versions = Vec::new();
    if let Versions { pin: Some(pin), .. } = &source.versions {
        versions.clone_from(pin);
        versions.sort_by(|a, b| compare(b, a));
        plan.current = versions.first().cloned();
    } else {
        let (current, signed) = current(source, &base, http)?;
        if let Some(minimum) = &source.versions.minimum {
            ensure!(
                compare(&current, minimum).is_ge(),
                "the current version is {current}, which is before {minimum}"
            );
            let listed = index(&base, http)?.dirs;
            versions.extend(listed.into_iter().filter(|v| {
                check_name("version", v).is_ok() && compare(v, minimum).is_ge() && *v != current
            }));
            versions.sort_by(|a, b| compare(b, a));
            versions.truncate(source.keep.unwrap_or(usize::MAX) - 1);
        }
        versions.push(current.clone());
        versions.sort_by(|a, b| compare(b, a));
        plan.offers.insert(arch.into(), current.clone());
        plan.signed = signed;
        plan.current = Some(current);
    }
    Plan::check_count(versions.len())?;
    plan.needs.extend(plan.current.clone());
    for version in versions {
        let files = match files(source, &mut plan, &base, &version, dest, http) {
            Ok(files) => files,
            Err(e) => {
                let what = plan.dir(&version).display().to_string();
                plan.problem(Some(&version), what, &e);
                Vec::new()
            }
        };
        plan.versions.push(Version { name: version, files });
    }
    Ok(plan)
}

/// The index of a directory.
fn index(base: &Url, http: &Http) -> Result<Index> {
    Index::parse(&http.get(base.as_str(), MAX_INDEX)?, base).with_context(|| base.to_string())
}

/// The version that `version.txt` names, and whether that is signed. Where it is, it must be signed right.
fn current(source: &Source, base: &Url, http: &Http) -> Result<(String, bool)> {
    let url = base.join("current/")?.join(VERSION_TXT)?;
    let text = http.get(url.as_str(), MAX_VERSION_TXT)?;
    let signature = http.find(&format!("{url}{SIGNATURE}"), MAX_SIGNATURE)?;
    if let Some(signature) = &signature {
        source.keys.verify(signature, &text[..]).with_context(|| url.to_string())?;
    }
    let version = parse_version(&text).with_context(|| url.to_string())?;
    Ok((version, signature.is_some()))
}

/// Refuses the `version.txt` of another version.
pub fn check_version(text: &[u8], version: &str) -> Result<()> {
    let found = parse_version(text)?;
    ensure!(found == version, "expected version {version}, found {found}");
    Ok(())
}

/// Reads `version.txt`, which is a list of variables of a shell.
fn parse_version(text: &[u8]) -> Result<String> {
    let text = String::from_utf8_lossy(text);
    for name in ["FLATCAR_VERSION_ID", "COREOS_VERSION_ID"] {
        let value = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        if let Some(value) = value {
            let quoted = |quote| value.strip_prefix(quote).and_then(|v| v.strip_suffix(quote));
            let version = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
            check_name("version", version)?;
            return Ok(version.into());
        }
    }
    bail!("it names no version");
}

/// The files of a version.
fn files(
    source: &Source,
    plan: &mut Plan,
    base: &Url,
    version: &str,
    dest: &Path,
    http: &Http,
) -> Result<Vec<Wanted>> {
    let dir = plan.dir(version);
    let base = base.join(&format!("{version}/"))?;
    let index = index(&base, http)?;
    ensure!(!index.files.is_empty(), "{base}: the index names no file");
    let text = base.join(VERSION_TXT)?;
    signed_document(&plan.keys, text.as_str(), &dest.join(&dir).join(VERSION_TXT), MAX_VERSION_TXT, http)
        .and_then(|text| check_version(&text, version))
        .context(VERSION_TXT)?;
    for (link, why) in index.refused {
        plan.skip(format!("{base}: {link}"), format!("the link {why}"));
    }
    for name in index.dirs {
        plan.skip(format!("{base}{name}/"), "it is a directory");
    }
    let url = |name: &str| {
        let mut url = base.clone();
        // This encodes what must be.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push(name);
        }
        url.to_string()
    };
    let signed = |name: &str| {
        let proof = Proof::Signature { url: url(&format!("{name}{SIGNATURE}")), sha256: None };
        Wanted { path: dir.join(name), url: url(name), proof }
    };
    // The installers of machines need it, whatever else is wanted.
    let take = |name: &str| source.filters.take(name) || (!source.classic && name == VERSION_TXT);
    let mut wanted = BTreeMap::new();
    let mut bare = Vec::new();
    for name in &index.files {
        if let Some(of) = name.strip_suffix(SIGNATURE) {
            if take(of) {
                wanted.insert(of.to_owned(), signed(of));
            }
        } else if take(name) && index.files.binary_search(&format!("{name}{SIGNATURE}")).is_err() {
            bare.push(name.as_str());
        }
    }
    let lists: Vec<&str> = index
        .files
        .iter()
        .filter_map(|n| n.strip_suffix(SIGNATURE))
        .filter(|n| n.ends_with(DIGESTS))
        .collect();
    let mut lists = Lists { names: lists, read: None };
    for name in bare {
        // Those that sign themselves inside do not vouch for what lies beside them in a way that is checked here.
        if source.classic || lists.names.is_empty() || name.ends_with(".asc") || name.ends_with(DIGESTS) {
            plan.skip(url(name), SignatureError::Missing.to_string());
            continue;
        }
        let read = lists.read(|list| {
            let (url, path) = (url(list), dest.join(&dir).join(list));
            signed_document(&plan.keys, &url, &path, MAX_DIGESTS, http).with_context(|| url.clone())
        });
        for e in read.problems.drain(..) {
            plan.problem(Some(version), format!("{}", dir.display()), &e);
        }
        match read.digests.get(name) {
            Some((list, digest)) => {
                let proof = Proof::Listed(digest.clone());
                wanted.insert(name.into(), Wanted { path: dir.join(name), url: url(name), proof });
                wanted.entry(list.clone()).or_insert_with(|| signed(list));
            }
            None => plan.skip(url(name), "there is no signature, and no signed list of digests has it"),
        }
    }
    Ok(wanted.into_values().collect())
}

/// The signed lists of digests of a version, read when they are needed.
struct Lists<'a> {
    names: Vec<&'a str>,
    read: Option<Read>,
}

#[derive(Default)]
struct Read {
    /// By the name of a file: the list that has it, and its digest there.
    digests: BTreeMap<String, (String, Sha512)>,
    problems: Vec<anyhow::Error>,
}

impl Lists<'_> {
    fn read(&mut self, read: impl Fn(&str) -> Result<Vec<u8>>) -> &mut Read {
        let names = &self.names;
        self.read.get_or_insert_with(|| {
            let mut all = Read::default();
            for &list in names {
                match read(list) {
                    Ok(text) => {
                        for (name, digest) in parse_digests(&String::from_utf8_lossy(&text)) {
                            all.digests.entry(name).or_insert_with(|| (list.to_owned(), digest));
                        }
                    }
                    Err(e) => all.problems.push(e),
                }
            }
            all
        })
    }
}

/// A document with a signature beside it: the one that is mirrored, or that of the server, if its signature is good.
fn signed_document(keys: &Keys, url: &str, path: &Path, limit: u64, http: &Http) -> Result<Vec<u8>> {
    if let Ok(text) = signed_file(path, limit, keys) {
        return Ok(text);
    }
    let (text, signature) = (http.get(url, limit)?, http.find(&format!("{url}{SIGNATURE}"), MAX_SIGNATURE)?);
    keys.verify(&signature.ok_or(SignatureError::Missing)?, &text[..])?;
    Ok(text)
}

/// A file of the mirror, if the signature beside it is good.
pub fn signed_file(path: &Path, limit: u64, keys: &Keys) -> Result<Vec<u8>> {
    let text = read_limited(path, limit)?;
    keys.verify(&read_limited(&fetch::beside(path, SIGNATURE), MAX_SIGNATURE)?, &text[..])?;
    Ok(text)
}

/// Reads the SHA-512 digests of a `DIGESTS` file; the others in it are MD5 and SHA-1, which vouch for nothing.
pub fn parse_digests(text: &str) -> Vec<(String, Sha512)> {
    let entry = |line: &str| {
        let (digest, name) = line.split_once(char::is_whitespace)?;
        let hex = digest.len() == 128 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        let name = name.trim().trim_start_matches('*');
        hex.then(|| (name.to_owned(), Sha512(digest.to_ascii_lowercase())))
    };
    text.lines().filter_map(entry).collect()
}
