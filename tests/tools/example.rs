//! The example release, made once by `ci/make-stream`, and the program under test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use crate::tools::fixture::fixture;

/// The program under test.
pub fn rehydrator() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rehydrator"));
    command.arg("--progress=none").stdin(Stdio::null());
    command
}

/// An outside tool; a test that needs it fails when it is not there.
pub fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()));
    command.stdin(Stdio::null());
    command
}

/// Runs `command`, which must succeed, and gives its stdout.
pub fn ok(command: &mut Command) -> Vec<u8> {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, stderr(&output));
    output.stdout
}

/// Runs `command`, which must fail cleanly, and gives its stderr.
pub fn fails(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {}", stderr(&output));
    let text = stderr(&output);
    assert!(!text.contains("panicked"), "{command:?}: {text}");
    text
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; ci/deps test installs what tests need"))
}

/// What a command said.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A release made by `ci/make-stream` with `options`, kept in `target/` under `name`.
pub fn example(name: &str, options: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("target/example").join(name);
    ok(tool("bash").arg(root.join("ci/make-stream")).args(options).arg(&dir));
    dir
}

/// A release in a working directory, downloaded so to speak.
pub struct Workdir {
    pub example: PathBuf,
    pub dir: Place,
    pub stream: Value,
}

/// Where a working directory is.
pub enum Place {
    /// Of one test, removed with it.
    Own(tempfile::TempDir),
    /// Of all tests, which change nothing in it.
    Shared(PathBuf),
}

impl Place {
    pub fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Shared(dir) => dir,
        }
    }
}

impl Workdir {
    /// Links the files of the release `example` into a new working directory.
    pub fn new(example: &Path) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        link_release(example, dir.path());
        Self::at(example, Place::Own(dir))
    }

    /// The release that `ci/make-stream` makes with `options`, dehydrated in a directory that all tests share.
    pub fn shared(name: &str, options: &[&str]) -> Self {
        let example = example(name, options);
        let dir = fixture(&format!("dehydrated-{name}"), &options.join(" "), |dir| {
            link_release(&example, dir);
            let mut dehydrate = rehydrator();
            ok(dehydrate.args(["build", "dehydrate", "--workdir"]).arg(dir));
        });
        Self::at(&example, Place::Shared(dir))
    }

    fn at(example: &Path, dir: Place) -> Self {
        let stream = serde_json::from_slice(&fs::read(example.join("stream.json")).unwrap()).unwrap();
        Self { example: example.to_owned(), dir, stream }
    }

    /// Runs `build dehydrate` with `options`.
    pub fn dehydrate(&self, options: &[&str]) -> String {
        String::from_utf8(ok(self.dehydrate_command().args(options))).unwrap()
    }

    /// `build dehydrate`, not yet run.
    pub fn dehydrate_command(&self) -> Command {
        let mut command = rehydrator();
        command.args(["build", "dehydrate", "--workdir"]).arg(self.dir.path());
        command
    }

    /// The dehydrated directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("dehydrated")
    }

    /// `rehydrate DEST` on the dehydrated directory.
    pub fn rehydrate(&self, dest: &Path, options: &[&str]) -> Command {
        let mut command = rehydrator();
        command.arg("rehydrate").arg(dest).args(options).arg("--data").arg(self.data());
        command
    }

    /// What the stream metadata says of an architecture: for each artifact its platform, its format, its file, its
    /// published name, and the digest of what must come out.
    pub fn expected(&self, arch: &str) -> Vec<Expected> {
        let mut all = vec![];
        let artifacts = &self.stream["architectures"][arch]["artifacts"];
        for (platform, of_platform) in artifacts.as_object().expect("artifacts") {
            for (format, files) in of_platform["formats"].as_object().expect("formats") {
                for (file, artifact) in files.as_object().expect("files") {
                    let published =
                        artifact["location"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
                    let uncompressed = artifact.get("uncompressed-sha256");
                    let sha256 = uncompressed.unwrap_or(&artifact["sha256"]).as_str().unwrap().to_owned();
                    let (platform, format, file) = (platform.clone(), format.clone(), file.clone());
                    all.push(Expected {
                        platform,
                        format,
                        file,
                        published,
                        uncompressed: uncompressed.is_some(),
                        sha256,
                    });
                }
            }
        }
        all
    }
}

/// Makes `dir` what it is after `build init` and `build download` of the release `example`.
fn link_release(example: &Path, dir: &Path) {
    let mut init = rehydrator();
    ok(init
        .args(["build", "init", "--stream-file"])
        .arg(example.join("stream.json"))
        .arg("--workdir")
        .arg(dir));
    let artifacts = dir.join("artifacts");
    fs::create_dir_all(&artifacts).unwrap();
    for version in fs::read_dir(example.join("builds")).unwrap() {
        for arch in fs::read_dir(version.unwrap().path()).unwrap() {
            for file in fs::read_dir(arch.unwrap().path()).unwrap() {
                let file = file.unwrap();
                fs::hard_link(file.path(), artifacts.join(file.file_name())).unwrap();
            }
        }
    }
}

/// What the stream metadata says of an artifact.
#[derive(Debug)]
pub struct Expected {
    pub platform: String,
    pub format: String,
    pub file: String,
    pub published: String,
    pub uncompressed: bool,
    pub sha256: String,
}

impl Expected {
    /// The name under which it comes out.
    pub fn output(&self) -> String {
        let stem = self.published.rsplit_once('.').unwrap().0;
        if self.uncompressed { stem.into() } else { self.published.clone() }
    }

    /// The option that picks it.
    pub fn option(&self) -> Vec<&str> {
        match (self.format.as_str(), self.platform.as_str()) {
            ("iso", _) => vec!["--iso"],
            ("pxe", _) => vec!["--pxe"],
            ("4k.raw.xz", "metal") => vec!["--disk", "metal4k"],
            (_, platform) => vec!["--disk", platform],
        }
    }
}

/// `sha256sum` of a file.
pub fn sha256sum(path: &Path) -> String {
    String::from_utf8(ok(tool("sha256sum").arg(path))).unwrap()[..64].to_owned()
}

/// The test release: all platforms of x86_64, and those of ppc64le.
pub fn release() -> &'static Workdir {
    static RELEASE: OnceLock<Workdir> = OnceLock::new();
    RELEASE.get_or_init(|| Workdir::shared("release", &["--arch", "x86_64", "--arch", "ppc64le"]))
}

/// A release of the stream `testing`, of a few platforms and `more`, with a live rootfs of this kind.
pub fn with_squashfs(kind: &str, more: &str) -> Workdir {
    let platforms = format!("live,metal,qemu,aws{more}");
    Workdir::shared(kind, &["--rootfs", kind, "--stream", "testing", "--platforms", &platforms])
}

/// One of them, with zstd, and so many disks that there are 64 with those of the other release, published and plain.
pub fn testing() -> &'static Workdir {
    static TESTING: OnceLock<Workdir> = OnceLock::new();
    TESTING
        .get_or_init(|| with_squashfs("squashfs-zstd", ",openstack,aliyun,exoscale,ibmcloud,proxmoxve,azure"))
}
