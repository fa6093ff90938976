//! Garbage collection: removes versions of which a channel has more than it is to keep.
//!
//! Never what `current` names, nor what the state of the mirror says is needed. A version leaves the tree by being
//! renamed, before the links to it are removed and before its space comes back; a run that is killed in between leaves
//! links to nothing, which the next one removes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::layout::{ALL, CURRENT, Channel, Dest, OWN, STREAMS, State, entries};
use crate::version::compare;

/// A version that is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its directory, relative to the mirror.
    pub dir: PathBuf,
    /// What its files take, in bytes.
    pub bytes: u64,
}

/// Removes what need not be kept, or says what would be removed.
pub fn collect(dest: &Dest, state: &State, dry_run: bool) -> Result<Vec<Removed>> {
    let mut removed = Vec::new();
    let roots: BTreeSet<&str> = state.channels.values().map(|c| c.root.as_str()).collect();
    for root in roots {
        let tree = Tree::read(dest, root, state)?;
        for version in tree.garbage() {
            let dir = Path::new(root).join(ALL).join(version);
            let bytes = size(&dest.dir.join(&dir))?;
            if !dry_run {
                dest.discard(&dir)?;
            }
            removed.push(Removed { dir, bytes });
        }
        if !dry_run {
            tree.remove_dangling(dest)?;
        }
    }
    dest.empty_trash()?;
    Ok(removed)
}

/// The versions and the channels below a root.
struct Tree<'a> {
    versions: Vec<String>,
    /// Directory of a channel, relative to the mirror, and what its links are to: `current`, and versions.
    channels: BTreeMap<PathBuf, Links>,
    /// What the state says of the channels of this root.
    known: BTreeMap<&'a Path, &'a Channel>,
}

#[derive(Default)]
struct Links {
    current: Option<String>,
    versions: Vec<String>,
}

impl<'a> Tree<'a> {
    fn read(dest: &Dest, root: &str, state: &'a State) -> Result<Self> {
        let top = dest.dir.join(root);
        let mut channels = BTreeMap::new();
        for name in entries(&top)? {
            // What has versions of its own is a source of its own.
            let channel = ![ALL, STREAMS, OWN].contains(&&*name) && !top.join(&name).join(ALL).is_dir();
            // What cannot be read, such as lost+found, is none of ours.
            if channel && fs::read_dir(top.join(&name)).is_ok() {
                read_links(&dest.dir, &Path::new(root).join(name), 2, &mut channels)?;
            }
        }
        let known = state.channels.iter().filter(|(_, c)| c.root == root);
        Ok(Self {
            versions: entries(&top.join(ALL))?,
            channels,
            known: known.map(|(dir, channel)| (Path::new(dir), channel)).collect(),
        })
    }

    /// Versions that no channel keeps. One without any link is garbage only where every channel has a limit: it was
    /// begun and given up, or belongs to a mirror of oppositus, which has no links of versions.
    fn garbage(&self) -> Vec<&str> {
        let mut kept: BTreeSet<&str> = BTreeSet::new();
        let mut linked: BTreeSet<&str> = BTreeSet::new();
        let mut limited = !self.known.is_empty();
        for (dir, links) in &self.channels {
            let known = self.known.get(dir.as_path());
            let mut versions: Vec<&str> = links.versions.iter().map(String::as_str).collect();
            versions.sort_by(|a, b| compare(b, a));
            let keep = known.and_then(|c| c.keep);
            limited &= keep.is_some();
            linked.extend(&versions);
            kept.extend(versions.iter().take(keep.unwrap_or(usize::MAX)));
            kept.extend(links.current.as_deref());
        }
        kept.extend(self.known.values().flat_map(|c| c.needs.iter()).map(String::as_str));
        let garbage = |v: &&str| !kept.contains(v) && (linked.contains(v) || limited);
        self.versions.iter().map(String::as_str).filter(garbage).collect()
    }

    /// Removes links to versions that are not there.
    fn remove_dangling(&self, dest: &Dest) -> Result<()> {
        for (dir, links) in &self.channels {
            let current = links.current.iter().map(|_| CURRENT);
            for version in links.versions.iter().map(String::as_str).chain(current) {
                let link = dest.dir.join(dir).join(version);
                // `exists` looks at what the link points to.
                if !link.exists() {
                    fs::remove_file(&link).with_context(|| format!("{}: remove failed", link.display()))?;
                }
            }
        }
        Ok(())
    }
}

/// Reads the links of a channel in the directory `dir` of `top`, and of those below it.
fn read_links(top: &Path, dir: &Path, depth: u32, channels: &mut BTreeMap<PathBuf, Links>) -> Result<()> {
    let mut links = Links::default();
    let mut any = false;
    for name in entries(&top.join(dir))? {
        let path = dir.join(&name);
        if let Ok(target) = fs::read_link(top.join(&path)) {
            // `../all/VERSION`, or `../../all/VERSION/ARCH`.
            let mut parts = target.iter().skip_while(|part| *part != ALL).skip(1);
            let Some(version) = parts.next().and_then(|v| v.to_str()) else { continue };
            any = true;
            if name == CURRENT {
                links.current = Some(version.into());
            } else if name == version {
                links.versions.push(name);
            }
        } else if depth > 1 && top.join(&path).is_dir() {
            read_links(top, &path, depth - 1, channels)?;
        }
    }
    if any {
        channels.insert(dir.to_path_buf(), links);
    }
    Ok(())
}

/// The lengths of all files below `dir`.
fn size(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for name in entries(dir)? {
        let path = dir.join(name);
        let meta = path.symlink_metadata().with_context(|| format!("{}: stat failed", path.display()))?;
        sum += if meta.is_dir() { size(&path)? } else { meta.len() };
    }
    Ok(sum)
}
