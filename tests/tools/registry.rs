//! A registry with and without TLS and passwords, a dehydrated directory, and tools.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rehydrator::digest::Digest;
use rehydrator::http::Retry;
use rehydrator::registry::{Client, Options, Reference};
use tempfile::TempDir;

/// The program: static when the tests are built as ci/build builds.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_rehydrator");

/// The key of a service account of Google's, short enough for bcrypt.
pub const GOOGLE_KEY: &str = r#"{"type": "service_account", "private_key": "secret"}"#;

/// What `htpasswd -nbB` prints for the user `user` with the password `secret`, and for `_json_key` with [`GOOGLE_KEY`], as
/// Google's registries take it.
const PASSWORDS: &str = "user:$2b$04$1AgMYv4sCvj3QV3QrMMSFeS.ac/JsTUVDjZe3XqotO9xLjfQIUpbW\n\
                         _json_key:$2y$04$7nnQpcxfTxhDrNa/XQzYG.EQoGMb83zZ2yUGFTfztNWzHJUP0POxi\n";

pub fn output(command: &[&str]) -> Output {
    Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}: ci/deps installs what the tests need", command[0]))
}

/// Runs a tool and gives its stdout; a tool that is missing or fails, fails the test.
pub fn run(command: &[&str]) -> String {
    let output = output(command);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// Runs a tool that must fail, and gives its stderr.
pub fn fails(command: &[&str]) -> String {
    let output = output(command);
    assert!(!output.status.success(), "{command:?} should have failed");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn temp() -> TempDir {
    tempfile::Builder::new().prefix("registry").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// docker-registry on a port of its own, stopped when dropped.
pub struct Registry {
    child: Child,
    pub address: String,
    dir: PathBuf,
    secure: bool,
}

impl Registry {
    /// Without TLS, for everybody.
    pub fn plain(dir: &Path) -> Self {
        Self::start(dir, false)
    }

    /// With TLS, by an authority whose certificate is `certs/ca.crt`, and with `user:secret`.
    pub fn secure(dir: &Path) -> Self {
        Self::start(dir, true)
    }

    fn start(dir: &Path, secure: bool) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let dir = dir.join(format!("registry-{}", address.rsplit(':').next().unwrap()));
        fs::create_dir(&dir).unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let (mut tls, mut auth) = (String::new(), String::new());
        if secure {
            certificates(&dir);
            fs::write(dir.join("htpasswd"), PASSWORDS).unwrap();
            tls = format!(", tls: {{ certificate: '{}', key: '{}' }}", at("server.crt"), at("server.key"));
            auth = format!("auth: {{ htpasswd: {{ realm: test, path: '{}' }} }}\n", at("htpasswd"));
        }
        let text = format!(
            "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
             http: {{ addr: '{address}'{tls} }}\n{auth}\
             storage: {{ filesystem: {{ rootdirectory: '{}' }}, delete: {{ enabled: true }} }}\n",
            at("data")
        );
        fs::write(dir.join("registry.yml"), text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.join("registry.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("docker-registry: {e}: ci/deps installs what the tests need"));
        let registry = Self { child, address, dir, secure };
        let start = Instant::now();
        while TcpStream::connect(&registry.address).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// The directory with the certificate of its authority.
    pub fn certs(&self) -> PathBuf {
        self.dir.join("certs")
    }

    /// A file of credentials for it.
    pub fn authfile(&self) -> PathBuf {
        let path = self.dir.join("auth.json");
        // base64 of user:secret.
        let text = format!(r#"{{"auths":{{"{}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#, self.address);
        fs::write(&path, text).unwrap();
        path
    }

    /// Makes it forget a blob of a repository.
    pub fn forget(&self, name: &Reference, digest: Digest) {
        let url = format!("http://{}/v2/{}/blobs/{}", self.address, name.repository(), digest.oci());
        run(&["curl", "-sSf", "-X", "DELETE", &url]);
    }

    /// Where it keeps a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        self.dir.join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    pub fn reference(&self, rest: &str) -> Reference {
        format!("{}/{rest}", self.address).parse().unwrap()
    }

    pub fn options(&self) -> Options {
        match self.secure {
            true => Options {
                authfile: Some(self.authfile()),
                cert_dir: Some(self.certs()),
                retry: FAST,
                ..Options::default()
            },
            false => insecure(),
        }
    }

    pub fn client(&self) -> Client {
        Client::new(self.options())
    }

    /// The options of skopeo (with `prefix` `src-` or `dest-` or none), podman and this program.
    pub fn flags(&self, prefix: &str) -> Vec<String> {
        match self.secure {
            true => vec![
                format!("--{prefix}authfile={}", self.authfile().display()),
                format!("--{prefix}cert-dir={}", self.certs().display()),
            ],
            false => vec![format!("--{prefix}tls-verify=false")],
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Tries that do not take long.
pub const FAST: Retry = Retry { attempts: 4, delay: Duration::from_millis(20) };

/// For a server without TLS and passwords.
pub fn insecure() -> Options {
    Options { tls_verify: false, authfile: Some("/dev/null".into()), retry: FAST, ..Options::default() }
}

/// Makes an authority in `certs/ca.crt`, and a server of it for 127.0.0.1.
fn certificates(dir: &Path) {
    let at = |name: &str| dir.join(name).display().to_string();
    fs::create_dir(dir.join("certs")).unwrap();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout"];
    let (ca, ca_key) = (at("certs/ca.crt"), at("ca.key"));
    let request = ["openssl", "req", "-x509", "-days", "2", "-subj", "/CN=test authority"];
    run(&[&request[..], &key, &[&ca_key, "-out", &ca]].concat());
    let (csr, server_key, crt, ext) = (at("server.csr"), at("server.key"), at("server.crt"), at("ext"));
    run(&[&["openssl", "req", "-subj", "/CN=127.0.0.1"][..], &key, &[&server_key, "-out", &csr]].concat());
    fs::write(&ext, "subjectAltName=IP:127.0.0.1\n").unwrap();
    let sign = ["openssl", "x509", "-req", "-in", &csr, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
    run(&[&sign[..], &["-days", "2", "-extfile", &ext, "-out", &crt]].concat());
}
