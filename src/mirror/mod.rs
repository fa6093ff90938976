//! `mirror`: keeps a tree of CoreOS releases that any web server can serve, in which every file has been checked.
//!
//! ```text
//! config ─► container_linux, release ─► plan ─► run: get, check, rename ─► links ─► gc
//!           (what a server says)              (what the mirror does)
//! ```
//!
//! With [`images`] each stream becomes a container image, too. What oppositus did for CoreOS Container Linux, for all
//! that came after it. `docs/mirror.md` is for those who run it.

pub mod config;
pub mod container_linux;
pub mod filter;
pub mod gc;
pub mod images;
pub mod index;
pub mod layout;
pub mod plan;
pub mod release;
pub mod summary;

pub use crate::version;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use url::Url;

use crate::catalog::SIGNATURE;
use crate::fetch::{self, beside, each};
use crate::http::Http;
use crate::openpgp::{Keys, MAX_SIGNATURE, SignatureError};
use crate::progress::Progress;
use crate::version::{Older, compare};
use crate::workdir::read_limited;

use config::{Config, Kind, Source};
use container_linux::{MAX_VERSION_TXT, VERSION_TXT, check_version, parse_digests, signed_file};
use layout::{ALL, CURRENT, Channel, Dest, State, entries};
use plan::{Plan, Problem, Proof, Skipped, Wanted};
use summary::{ChannelSummary, Summary};

/// The longest list of digests that is looked for the digest of a file, in bytes.
const MAX_DIGESTS: u64 = 1 << 20;

/// How to mirror.
#[derive(Clone, Default)]
pub struct Options {
    /// Where clients find the mirror; documents of streams are rewritten to it.
    pub base_url: Option<Url>,
    /// Check again what is there already.
    pub verify: bool,
    /// Wait for another process that changes the mirror.
    pub wait: bool,
    /// Take an older version, or an unsigned document, where there was a newer or a signed one.
    pub allow_downgrade: bool,
    /// Build an image of each stream.
    pub images: Option<images::Options>,
}

/// Mirrors what `config` says into `dir`. An error is one of the whole run; what failed alone is in the summary.
pub fn run(
    config: &Config,
    dir: &Path,
    options: &Options,
    http: &Http,
    progress: &Progress,
) -> Result<Summary> {
    if let Some(url) = &options.base_url {
        ensure!(["http", "https"].contains(&url.scheme()), "base URL {url}: neither http nor https");
    }
    if options.images.is_some() {
        images::check(config)?;
    }
    let dest = Dest::open(dir, options.wait)?;
    let mut run = Run {
        state: dest.state()?,
        dest: &dest,
        http,
        progress,
        summary: Summary::default(),
        failed: BTreeSet::new(),
        seen: BTreeSet::new(),
        finished: BTreeSet::new(),
    };
    let plans = fetch::pool(config.parallel)?.install(|| run.all(config, options))?;
    if let Some(images) = &options.images {
        // With as many threads as there are cores, unlike what waits for a server.
        run.images(images, &plans);
    }
    run.finish()
}

/// Removes the versions that need not be kept from the mirror in `dir`.
pub fn collect(dir: &Path, dry_run: bool, wait: bool) -> Result<Vec<gc::Removed>> {
    fs::metadata(dir).with_context(|| dir.display().to_string())?;
    let dest = Dest::open(dir, wait)?;
    gc::collect(&dest, &dest.state()?, dry_run)
}

struct Run<'a> {
    dest: &'a Dest,
    http: &'a Http,
    progress: &'a Progress,
    state: State,
    summary: Summary,
    /// Files that failed; a file may be part of several channels.
    failed: BTreeSet<PathBuf>,
    /// Files that have been counted.
    seen: BTreeSet<PathBuf>,
    /// Channels whose `current` is what it is to be.
    finished: BTreeSet<PathBuf>,
}

impl Run<'_> {
    fn all<'c>(&mut self, config: &'c Config, options: &Options) -> Result<Vec<(&'c Source, Plan)>> {
        let mut plans = Vec::new();
        for source in &config.sources {
            for mut plan in self.plans(source, options.base_url.as_ref()) {
                if let Err(e) = self.check_not_backwards(&plan, options.allow_downgrade) {
                    self.fail(plan.label().display().to_string(), format!("{e:#}"));
                    continue;
                }
                if plan.is_empty() {
                    let left_out = match plan.skipped.len() {
                        0 => String::new(),
                        n => format!("; {n} files have no signature or are otherwise left out"),
                    };
                    self.fail(
                        plan.label().display().to_string(),
                        format!(
                            "nothing to mirror: the configuration leaves no file of any version{left_out}"
                        ),
                    );
                }
                for Problem { what, error } in std::mem::take(&mut plan.problems) {
                    self.fail(what, error);
                }
                self.summary.skipped.append(&mut plan.skipped);
                plans.push((source, plan));
            }
        }
        // What a channel or a version that could not be looked at has begun, a later run may go on with.
        let all_known = self.summary.failed.is_empty();
        if options.verify {
            self.verify(&plans)?;
        }
        if let Err(e) = self.check_space(&plans) {
            self.fail(self.dest.dir.display().to_string(), format!("{e:#}"));
        } else {
            for (source, plan) in &plans {
                // Before anything is stored: a garbage collection must know of it.
                self.remember(source, plan, false)?;
                if let Err(e) = self.channel(source, plan) {
                    self.fail(plan.label().display().to_string(), format!("{e:#}"));
                }
            }
            if all_known {
                self.tidy(&plans)?;
            }
            match gc::collect(self.dest, &self.state, false) {
                Ok(removed) => {
                    self.summary.removed = removed.iter().map(|r| r.dir.display().to_string()).collect();
                }
                Err(e) => self.fail("garbage collection".into(), format!("{e:#}")),
            }
        }
        Ok(plans)
    }

    /// Builds the images of the streams that are complete.
    fn images(&mut self, options: &images::Options, plans: &[(&Source, Plan)]) {
        let finished = std::mem::take(&mut self.finished);
        for (_, plan) in plans.iter().filter(|(_, plan)| finished.contains(&plan.label())) {
            match images::push(self.dest, plan, options, self.progress) {
                Ok(image) => self.summary.images.extend(image),
                Err(e) => self.fail(format!("image of {}", plan.label().display()), format!("{e:#}")),
            }
        }
    }

    fn finish(mut self) -> Result<Summary> {
        if self.summary.failed.is_empty() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.state.last_success = Some(now.as_secs());
            self.dest.write_state(&self.state)?;
        }
        self.summary.last_success = self.state.last_success;
        Ok(self.summary)
    }

    /// What there is of a source: one plan for each channel that could be looked at.
    fn plans(&mut self, source: &Source, base_url: Option<&Url>) -> Vec<Plan> {
        let mut plans = Vec::new();
        for channel in &source.channels {
            let label = Path::new(&source.root).join(channel).display().to_string();
            match source.kind {
                Kind::ContainerLinux => {
                    for arch in &source.architectures {
                        match container_linux::plan(source, channel, arch, &self.dest.dir, self.http) {
                            Ok(plan) => plans.push(plan),
                            Err(e) => self.fail(format!("{label} {arch}"), format!("{e:#}")),
                        }
                    }
                }
                Kind::Stream => match release::plan(source, channel, base_url, self.http) {
                    Ok(plan) => plans.push(plan),
                    Err(e) => self.fail(label, format!("{e:#}")),
                },
            }
        }
        plans
    }

    /// Refuses a channel that is older than it was, or was signed and is no more.
    fn check_not_backwards(&self, plan: &Plan, allowed: bool) -> Result<()> {
        if plan.offers.is_empty() {
            // The configuration says what is current.
            return Ok(());
        }
        let label = plan.label();
        let had = self.state.channels.get(&*label.to_string_lossy()).cloned().unwrap_or_default();
        if let Some(Older { arch, found, had }) = version::older(&plan.offers, &had.newest) {
            let what = format!(
                "the server offers version {found} for {arch}, older than {had}, which the mirror had"
            );
            version::backwards(&what, allowed)?;
        } else if let (Some(found), Some(had)) = (&plan.current, self.current(&label))
            && compare(found, &had).is_lt()
            && self.dest.dir.join(&label).join(CURRENT).exists()
        {
            let what = format!("the server offers version {found}, older than {had}, which is current");
            version::backwards(&what, allowed)?;
        }
        if had.signed && !plan.signed {
            let what =
                "the server has no signature for what names the current version, which was signed before";
            version::backwards(what, allowed)?;
        }
        Ok(())
    }

    /// What `current` of a channel names.
    fn current(&self, label: &Path) -> Option<String> {
        let target = fs::read_link(self.dest.dir.join(label).join(CURRENT)).ok()?;
        version_of(&target).map(str::to_owned)
    }

    fn fail(&mut self, what: String, error: String) {
        tracing::warn!("{what}: {error}");
        self.summary.failed.push(Problem { what, error });
    }

    /// Whether a file of this final name is there. It is right then, since it has that name.
    fn present(&self, file: &Wanted) -> bool {
        self.dest.dir.join(&file.path).exists()
    }

    /// Checks that what the servers say is still to come has room.
    fn check_space(&self, plans: &[(&Source, Plan)]) -> Result<()> {
        let mut seen = BTreeSet::new();
        let files = plans.iter().flat_map(|(_, plan)| &plan.versions).flat_map(|version| &version.files);
        let missing: Vec<&Wanted> = files.filter(|f| !self.present(f) && seen.insert(&f.path)).collect();
        let sizes = each(missing.clone(), |file| {
            let have = self.dest.partial(&file.path).len();
            self.http.length(&file.url).map_or(0, |length| length.saturating_sub(have))
        });
        let needed = sizes.iter().fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
        fetch::check_space(&self.dest.dir, needed, missing.len(), "files")
    }

    /// Gets what is missing of a channel; when its versions are complete, they become visible as such.
    fn channel(&mut self, source: &Source, plan: &Plan) -> Result<()> {
        let mut complete = BTreeSet::new();
        for version in &plan.versions {
            let mut whole = !plan.broken.contains(&version.name);
            let mut missing = Vec::new();
            for file in &version.files {
                if self.failed.contains(&file.path) {
                    whole = false;
                } else if !self.present(file) {
                    missing.push(file);
                } else if self.seen.insert(file.path.clone()) {
                    self.summary.kept += 1;
                }
            }
            for (file, got) in each(missing, |file| self.get(file, &plan.keys)) {
                self.seen.insert(file.path.clone());
                match got {
                    Ok(bytes) => {
                        self.summary.new += 1;
                        self.summary.bytes += bytes;
                    }
                    Err(e) => {
                        whole = false;
                        self.failed.insert(file.path.clone());
                        self.fail(file.path.display().to_string(), format!("{e:#}"));
                    }
                }
            }
            if whole && !version.files.is_empty() {
                complete.insert(&version.name);
                if !source.classic {
                    self.dest.link(&plan.label().join(&version.name), &plan.target(&version.name))?;
                }
            }
        }
        let finished = plan.needs.iter().all(|version| complete.contains(version));
        if finished {
            if let Some(stale) = plan.stale.as_ref().map(|path| plan.root.join(path))
                && self.dest.dir.join(&stale).exists()
            {
                let what = stale.display().to_string();
                self.summary
                    .skipped
                    .push(Skipped { what, why: "it is not renewed without a base URL".into() });
            }
            if let Some(path) = &plan.removed {
                fetch::remove(&self.dest.dir.join(&plan.root).join(path))?;
            }
            for (path, document) in &plan.documents {
                self.document(&plan.root.join(path), document)?;
            }
            if let Some(current) = &plan.current {
                self.dest.link(&plan.label().join(CURRENT), &plan.target(current))?;
            }
            self.remember(source, plan, true)?;
            self.finished.insert(plan.label());
        }
        self.summary.channels.push(ChannelSummary {
            channel: plan.label().display().to_string(),
            current: self.current(&plan.label()),
            complete: finished && plan.broken.is_empty(),
        });
        Ok(())
    }

    /// Gets a file, and gives its length.
    fn get(&self, file: &Wanted, keys: &Keys) -> Result<u64> {
        // First, because it is small: without it all the rest is for nothing.
        let signature = match &file.proof {
            Proof::Signature { url, .. } => {
                Some(self.http.find(url, MAX_SIGNATURE)?.ok_or(SignatureError::Missing)?)
            }
            Proof::Listed(_) | Proof::Document(_) => None,
        };
        let path = self.dest.dir.join(&file.path);
        let partial = self.dest.partial(&file.path);
        for dir in [path.parent(), partial.file.parent()].into_iter().flatten() {
            fs::create_dir_all(dir).with_context(|| format!("{}: mkdir failed", dir.display()))?;
        }
        let task = self.progress.task(file.path.display().to_string(), None);
        partial.get(self.http, &file.url, &task, |got| file.proof.check(got, signature.as_deref(), keys))?;
        let bytes = partial.len();
        partial.publish(&path, signature.as_deref())?;
        task.finish();
        Ok(bytes)
    }

    /// Writes a document, unless it is there already.
    fn document(&self, path: &Path, document: &[u8]) -> Result<()> {
        if fs::read(self.dest.dir.join(path)).is_ok_and(|old| old == document) {
            return Ok(());
        }
        self.dest.write(path, document)
    }

    /// Writes down what a garbage collection must keep. Until the new versions are complete, that is also what it was.
    fn remember(&mut self, source: &Source, plan: &Plan, finished: bool) -> Result<()> {
        let label = plan.label().display().to_string();
        let old = self.state.channels.get(&label);
        let mut needs: BTreeSet<String> = plan.versions.iter().map(|v| v.name.clone()).collect();
        if !finished {
            needs.extend(old.iter().flat_map(|old| &old.needs).cloned());
        }
        let mut new = Channel { root: source.root.clone(), keep: source.keep, needs, ..Channel::default() };
        if let Some(old) = old {
            (new.newest, new.signed) = (old.newest.clone(), old.signed);
        }
        if finished && !plan.offers.is_empty() {
            new.newest.extend(plan.offers.clone());
            new.signed = plan.signed;
        }
        if old != Some(&new) {
            self.state.channels.insert(label, new);
            self.dest.write_state(&self.state)?;
        }
        Ok(())
    }

    /// Removes parts of files that no later run goes on with.
    fn tidy(&self, plans: &[(&Source, Plan)]) -> Result<()> {
        let files = plans.iter().flat_map(|(_, plan)| &plan.versions).flat_map(|version| &version.files);
        let partials = files.filter(|f| !self.present(f)).map(|f| self.dest.partial(&f.path));
        self.dest.tidy(&partials.flat_map(|p| [p.file, p.etag]).collect())
    }

    /// Checks all files again. One that is wrong is no longer visible, and is got again if it is still wanted.
    fn verify(&mut self, plans: &[(&Source, Plan)]) -> Result<()> {
        let mut known: HashMap<&Path, (&Wanted, &Keys)> = HashMap::new();
        let mut keys: HashMap<&str, Keys> = HashMap::new();
        for (source, plan) in plans {
            let files = plan.versions.iter().flat_map(|version| &version.files);
            known.extend(files.map(|file| (file.path.as_path(), (file, &plan.keys))));
            keys.entry(&source.root).or_default().merge(&plan.keys)?;
        }
        for (root, keys) in &keys {
            let mut files = Vec::new();
            walk(&self.dest.dir, &Path::new(root).join(ALL), &mut files)?;
            let files = self.without_lies(files, keys)?;
            // Signatures are checked with what they are of.
            let names: BTreeSet<&Path> = files.iter().map(PathBuf::as_path).collect();
            let of = |f: &Path| f.to_str().and_then(|f| f.strip_suffix(SIGNATURE)).map(PathBuf::from);
            let files: Vec<&Path> = names
                .iter()
                .copied()
                .filter(|f| known.contains_key(f) || of(f).is_none_or(|of| !names.contains(of.as_path())))
                .collect();
            for (path, checked) in each(files, |path| self.check(path, known.get(path), keys)) {
                let Err(e) = checked else { continue };
                if known.contains_key(path) {
                    tracing::warn!("{}: getting it again: {e:#}", path.display());
                } else {
                    self.fail(path.display().to_string(), format!("{e:#}: removed"));
                }
                self.dest.discard(path)?;
            }
        }
        self.dest.empty_trash()
    }

    /// Takes directories out of the mirror whose signed `version.txt` names another version: their files may be good, but
    /// are not what they are taken for. Gives the files of the others.
    fn without_lies(&mut self, mut files: Vec<PathBuf>, keys: &Keys) -> Result<Vec<PathBuf>> {
        let texts: Vec<PathBuf> = files.iter().filter(|f| f.ends_with(VERSION_TXT)).cloned().collect();
        for path in texts {
            let (Some(version), Some(dir)) = (version_of(&path), path.parent()) else { continue };
            // One that is damaged is only got again.
            let Ok(text) = signed_file(&self.dest.dir.join(&path), MAX_VERSION_TXT, keys) else { continue };
            if let Err(e) = check_version(&text, version) {
                files.retain(|file| !file.starts_with(dir));
                self.fail(path.display().to_string(), format!("{e:#}: {} removed", dir.display()));
                self.dest.discard(dir)?;
            }
        }
        Ok(files)
    }

    /// Checks a file that is there: as a plan says, or by what lies beside it.
    fn check(&self, path: &Path, known: Option<&(&Wanted, &Keys)>, keys: &Keys) -> Result<()> {
        let file = self.dest.dir.join(path);
        let task =
            self.progress.task(format!("check {}", path.display()), file.metadata().ok().map(|m| m.len()));
        let signature = read_limited(&beside(&file, SIGNATURE), MAX_SIGNATURE).ok();
        match known {
            Some((wanted, keys)) => wanted.proof.check(&file, signature.as_deref(), keys)?,
            None if signature.is_some() => {
                let url = String::new();
                Proof::Signature { url, sha256: None }.check(&file, signature.as_deref(), keys)?;
            }
            None => match listed(&file)? {
                Some(proof) => proof.check(&file, None, keys)?,
                // Taken without a signature, on the word of a document that has been replaced since; or the signature
                // of a file that a killed run did not come to.
                None => tracing::info!("{}: there is nothing to check it against", path.display()),
            },
        }
        task.finish();
        Ok(())
    }
}

/// What a list of digests beside `file` says of it.
fn listed(file: &Path) -> Result<Option<Proof>> {
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|n| n.to_str())) else {
        return Ok(None);
    };
    for list in entries(dir)?.iter().filter(|list| list.ends_with(".DIGESTS")) {
        let text = read_limited(&dir.join(list), MAX_DIGESTS).with_context(|| list.clone())?;
        let found = parse_digests(&String::from_utf8_lossy(&text)).into_iter().find(|(of, _)| of == name);
        if let Some((_, digest)) = found {
            return Ok(Some(Proof::Listed(digest)));
        }
    }
    Ok(None)
}

/// All files below `path`, relative to `top`.
fn walk(top: &Path, path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for name in entries(&top.join(path))? {
        let path = path.join(name);
        if top.join(&path).is_dir() {
            walk(top, &path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The version in the path of one of its files, or in the target of a link.
fn version_of(path: &Path) -> Option<&str> {
    path.iter().skip_while(|part| *part != ALL).nth(1)?.to_str()
}
