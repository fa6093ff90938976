//! `rehydrator serve` as curl sees it, and what each of its files must stand.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Output};

use rehydrator::digest::Digest;
use serde_json::Value;
use tempfile::TempDir;

use crate::tools::serving::Serving;
use crate::tools::small::{Random, sh};

/// The program as it serves.
pub struct Serve {
    pub serving: Serving,
    pub url: String,
    /// With the access log, `log`.
    pub dir: TempDir,
}

impl Serve {
    /// With these dehydrated directories, and more arguments.
    pub fn start(data: &[&Path], args: &[&str]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut all: Vec<OsString> = args.iter().map(Into::into).collect();
        all.extend(["--access-log".into(), dir.path().join("log").into()]);
        all.extend(["--cache".into(), dir.path().into()]);
        all.extend(data.iter().flat_map(|data| ["--data".into(), data.into()]));
        let serving = Serving::start(all);
        let scheme = if args.contains(&"--tls-cert") { "https" } else { "http" };
        Self { url: format!("{scheme}://{}", serving.address), serving, dir }
    }

    pub fn address(&self) -> &str {
        &self.serving.address
    }

    pub fn port(&self) -> &str {
        self.address().rsplit_once(':').unwrap().1
    }

    /// What curl says and gets with these arguments, the last of which is a path.
    pub fn curl(&self, args: &[&str]) -> Output {
        let (path, args) = args.split_last().unwrap();
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--max-time", "60", "--path-as-is", "--globoff"])
            .args(args)
            .arg(format!("{}{path}", self.url));
        command.output().expect("curl is needed: install curl")
    }

    pub fn get(&self, path: &str) -> Vec<u8> {
        let output = self.curl(&["-f", path]);
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    pub fn text(&self, path: &str) -> String {
        String::from_utf8(self.get(path)).unwrap()
    }

    /// The status code and the headers, in small letters.
    pub fn head(&self, args: &[&str]) -> (u16, String) {
        let output = self.curl(&[&["-D", "-", "-o", "/dev/null"], args].concat());
        let text = String::from_utf8(output.stdout).unwrap().to_ascii_lowercase();
        let code = text.split(' ').nth(1).unwrap_or_else(|| panic!("{args:?}: {text}")).parse().unwrap();
        (code, text)
    }

    pub fn signal(&self, name: &str) {
        sh(Path::new("/"), &format!("kill -{name} {}", self.serving.child.id()));
    }

    /// A number of `/metrics`, by its name with its labels.
    pub fn count(&self, name: &str) -> u64 {
        let metrics = self.text("/metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("rehydrator_{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {metrics}")).parse().unwrap()
    }

    /// The most memory that it has had in use, in MiB.
    pub fn peak(&self) -> u64 {
        self.serving.peak()
    }

    /// The memory that it has in use now, in MiB.
    pub fn memory(&self) -> u64 {
        self.serving.memory()
    }
}

/// The files that the document of a stream names: the path of each, its digest, and whether it is signed; and the
/// uncompressed ones beside them.
pub fn files(serve: &Serve, stream: &str) -> Vec<(String, Digest, bool)> {
    let document: Value = serde_json::from_slice(&serve.get(&format!("/streams/{stream}.json"))).unwrap();
    let mut files = Vec::new();
    let mut todo = vec![&document];
    while let Some(value) = todo.pop() {
        let digest = |name: &str| Some(value.get(name)?.as_str().unwrap().parse::<Digest>().unwrap());
        if let Some(location) = value["location"].as_str() {
            let path = location.strip_prefix(&serve.url).unwrap_or_else(|| panic!("{location}"));
            files.push((path.to_owned(), digest("sha256").unwrap(), value.get("signature").is_some()));
            if let Some(plain) = digest("uncompressed-sha256") {
                files.push((path.rsplit_once('.').unwrap().0.to_owned(), plain, false));
            }
        }
        todo.extend(value.as_object().into_iter().flat_map(|o| o.values()));
    }
    files
}

/// Conditions and ranges, against what was got in one piece.
pub fn ranges(serve: &Serve, path: &str, bytes: &[u8], random: &mut Random) {
    let (code, headers) = serve.head(&["-I", path]);
    let name = path.rsplit_once('/').unwrap().1.to_ascii_lowercase();
    assert_eq!(code, 200, "{path}");
    assert!(headers.contains(&format!("content-length: {}\r\n", bytes.len())), "{path}: {headers}");
    assert!(headers.contains("accept-ranges: bytes\r\n"), "{path}: {headers}");
    assert!(headers.contains(&format!("filename=\"{name}\"")), "{path}: {headers}");
    let etag = format!("\"{}\"", Digest::of(bytes));
    assert!(headers.contains(&format!("etag: {etag}\r\n")), "{path}: {headers}");
    let with = |name: &str, value: &str| serve.head(&["-H", &format!("{name}: {value}"), path]).0;
    assert_eq!(with("If-None-Match", &format!("\"x\", W/{etag}")), 304, "{path}");
    assert_eq!(with("If-Match", "\"x\""), 412, "{path}");
    assert_eq!(with("Range", &format!("bytes={}-", bytes.len())), 416, "{path}");
    let range = |range: &str, more: &[&str]| serve.curl(&[&["-r", range], more, &[path]].concat()).stdout;
    for _ in 0..6 {
        let start = random.below(bytes.len());
        let end = start + random.below(bytes.len() - start);
        assert!(range(&format!("{start}-{end}"), &[]) == bytes[start..=end], "{path}: {start}-{end}");
    }
    let tail = bytes.len() - 1000.min(bytes.len());
    assert!(range("-1000", &[]) == bytes[tail..], "{path}");
    assert!(range(&format!("{tail}-"), &["-H", &format!("If-Range: {etag}")]) == bytes[tail..], "{path}");
    assert!(range("0-9", &["-H", "If-Range: \"x\""]) == bytes, "{path}");
}
