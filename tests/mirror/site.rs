//! A release server with its keys, and a mirror of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::tools::Gpg;

/// `www/` is served, `dest/` is the mirror.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    pub(crate) gpg: Gpg,
}

impl Site {
    /// With one key, `signer`, in `keys/`.
    pub(crate) fn new() -> Self {
        let site = Self { dir: tempfile::tempdir().unwrap(), gpg: Gpg::new() };
        for dir in ["www", "keys"] {
            fs::create_dir(site.dir.path().join(dir)).unwrap();
        }
        site.gpg.key("", "signer", "never");
        fs::write(site.dir.path().join("keys/signer.asc"), site.gpg.export("=signer")).unwrap();
        site
    }

    pub(crate) fn www(&self, path: &str) -> PathBuf {
        self.dir.path().join("www").join(path)
    }

    pub(crate) fn dest(&self, path: &str) -> PathBuf {
        self.dir.path().join("dest").join(path)
    }

    /// Serves a file.
    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.www(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Serves a file and its signature.
    pub(crate) fn put_signed(&self, path: &str, bytes: &[u8]) {
        self.put(path, bytes);
        self.put(&format!("{path}.sig"), &self.gpg.sign("", "=signer", bytes));
    }

    /// Serves a version of Container Linux, and makes it the current one of a channel.
    pub(crate) fn release(&self, channel: &str, version: &str, files: &[(&str, &[u8])]) {
        self.release_for("amd64", channel, version, files);
    }

    pub(crate) fn release_for(&self, arch: &str, channel: &str, version: &str, files: &[(&str, &[u8])]) {
        let dir = format!("{channel}/{arch}-usr");
        for (name, bytes) in files {
            self.put_signed(&format!("{dir}/{version}/{name}"), bytes);
        }
        let text = format!(
            "FLATCAR_BUILD=1\nCOREOS_VERSION=\"{version}\"\nCOREOS_VERSION_ID=\"{version}\"\nFLATCAR_VERSION={version}\n"
        );
        self.put_signed(&format!("{dir}/{version}/version.txt"), text.as_bytes());
        let current = self.www(&format!("{dir}/current"));
        let _ = fs::remove_file(&current);
        symlink(version, current).unwrap();
    }

    /// Writes the configuration.
    pub(crate) fn config(&self, config: &Value) -> PathBuf {
        let path = self.dir.path().join("config.json");
        fs::write(&path, serde_json::to_vec_pretty(config).unwrap()).unwrap();
        path
    }

    /// Mirrors what the configuration says into `dest/`.
    pub(crate) fn command(&self) -> Command {
        let mut command = rehydrator();
        command.args(["mirror", "releases"]).arg(self.dir.path().join("config.json")).arg(self.dest(""));
        command
    }

    /// Mirrors, and gives the summary.
    pub(crate) fn mirror(&self, more: &[&str]) -> Summary {
        let output = self.command().arg("--json").args(more).output().unwrap();
        let error = text(&output.stderr);
        assert!(!error.contains("panicked"), "{error}");
        let summary = serde_json::from_slice(&output.stdout);
        let json: Value = summary.unwrap_or_else(|e| panic!("{e}: {error}\n{}", text(&output.stdout)));
        let failed = !json["failed"].as_array().unwrap().is_empty();
        assert_eq!(output.status.code(), Some(i32::from(failed)), "{error}");
        Summary(json)
    }

    /// The tree of the mirror, without what is its own.
    pub(crate) fn tree(&self) -> BTreeMap<String, Entry> {
        tree(&self.dest(""))
    }
}

pub(crate) struct Summary(pub(crate) Value);

impl Summary {
    /// New, kept.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.0["new"].as_u64().unwrap(), self.0["kept"].as_u64().unwrap())
    }

    /// `WHAT: ERROR`, sorted.
    pub(crate) fn failed(&self) -> Vec<String> {
        self.list("failed", "error")
    }

    /// `WHAT: WHY`, sorted.
    pub(crate) fn skipped(&self) -> Vec<String> {
        self.list("skipped", "why")
    }

    fn list(&self, key: &str, why: &str) -> Vec<String> {
        let entries = self.0[key].as_array().unwrap().iter();
        let line = |e: &Value| format!("{}: {}", e["what"].as_str().unwrap(), e[why].as_str().unwrap());
        let mut lines: Vec<_> = entries.map(line).collect();
        lines.sort();
        lines
    }

    /// Nothing failed.
    #[track_caller]
    pub(crate) fn good(self) -> Self {
        assert_eq!(self.failed(), [""; 0]);
        self
    }
}

/// What a path of a tree is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Dir,
    File(Vec<u8>),
    Link(PathBuf),
}

pub(crate) fn tree(top: &Path) -> BTreeMap<String, Entry> {
    fn walk(top: &Path, dir: &Path, entries: &mut BTreeMap<String, Entry>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
            if name == ".rehydrator" {
                continue;
            }
            if let Ok(target) = fs::read_link(&path) {
                entries.insert(name, Entry::Link(target));
            } else if path.is_dir() {
                entries.insert(name, Entry::Dir);
                walk(top, &path, entries);
            } else {
                entries.insert(name, Entry::File(fs::read(&path).unwrap()));
            }
        }
    }
    let mut entries = BTreeMap::new();
    walk(top, top, &mut entries);
    entries
}

/// Paths of a tree, links with their targets.
pub(crate) fn names(tree: &BTreeMap<String, Entry>) -> Vec<String> {
    let name = |(path, entry): (&String, &Entry)| match entry {
        Entry::Dir => format!("{path}/"),
        Entry::File(_) => path.clone(),
        Entry::Link(target) => format!("{path} -> {}", target.display()),
    };
    tree.iter().map(name).collect()
}

/// The program under test.
pub(crate) fn rehydrator() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rehydrator"));
    command.arg("--progress=none").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command that must succeed, and gives what it prints.
#[track_caller]
pub(crate) fn ok(command: &mut Command) -> String {
    let output =
        command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; ci/deps installs what tests need"));
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Runs a command that must fail, and gives what it says.
#[track_caller]
pub(crate) fn fails(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert_eq!(status.code(), Some(1), "{}", text(&stderr));
    text(&stderr)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
