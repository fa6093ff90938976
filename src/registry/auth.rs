//! Who we are to a registry: the files that podman, skopeo and docker keep credentials in, and credential helpers.
//!
//! The format is that of containers-auth.json(5), of which docker's `config.json` is a variant:
//!
//! ```json
//! { "auths": { "host/namespace": { "auth": "base64 of USER:PASSWORD" } },
//!   "credHelpers": { "host": "NAME" }, "credsStore": "NAME" }
//! ```
//!
//! The entry of the longest prefix of a repository counts. A helper is the program `docker-credential-NAME`, which
//! gets the registry on stdin.

use std::collections::HashMap;
use std::env;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer};

use super::Reference;
use super::reference::DOCKER_HUB;

/// The longest file of credentials that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The name under which files and helpers keep what is for [`DOCKER_HUB`].
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Names of [`DOCKER_HUB`] in files, without scheme and path.
const DOCKER_HUB_NAMES: [&str; 3] = [DOCKER_HUB, "index.docker.io", "registry-1.docker.io"];

/// The user that Google's registries know the owner of a service account key as.
const GOOGLE_KEY_USER: &str = "_json_key";

/// The user under which files and helpers keep what is a token rather than a password.
const TOKEN_USER: &str = "<token>";

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password.
    User {
        /// The name.
        name: String,
        /// The password.
        password: String,
    },
    /// A token that others are made of.
    Refresh(String),
}

/// Without the secret: it must not get into a log.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User { name, .. } => write!(f, "User({name:?})"),
            Self::Refresh(_) => f.write_str("Refresh"),
        }
    }
}

impl Credentials {
    fn new(name: &str, password: &str) -> Self {
        match name {
            TOKEN_USER => Self::Refresh(password.into()),
            _ => Self::User { name: name.into(), password: password.into() },
        }
    }

    /// Reads `USER:PASSWORD`.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, password) = text.split_once(':').filter(|(name, _)| !name.is_empty())?;
        Some(Self::new(name, password))
    }
}

/// Where credentials may be.
#[derive(Clone, Debug)]
pub struct Files {
    /// In this order.
    paths: Vec<PathBuf>,
    /// The user named the file: it must be there.
    named: bool,
}

impl Files {
    /// `named`, or else `$REGISTRY_AUTH_FILE`, or else the files that podman, skopeo and docker keep.
    pub fn new(named: Option<&Path>) -> Self {
        let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = named.map(Into::into).or_else(|| var("REGISTRY_AUTH_FILE")) {
            return Self { paths: vec![path], named: true };
        }
        let home = var("HOME");
        let at_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let runtime = var("XDG_RUNTIME_DIR").map(|dir| dir.join("containers")).unwrap_or_else(|| {
            Path::new("/run/containers").join(rustix::process::getuid().as_raw().to_string())
        });
        let config = var("XDG_CONFIG_HOME").or_else(|| at_home(".config"));
        let docker = var("DOCKER_CONFIG").or_else(|| at_home(".docker"));
        let paths = [
            Some(runtime.join("auth.json")),
            config.map(|dir| dir.join("containers/auth.json")),
            docker.map(|dir| dir.join("config.json")),
        ];
        Self { paths: paths.into_iter().flatten().collect(), named: false }
    }

    /// What there is for the repository of `reference`.
    pub fn find(&self, reference: &Reference) -> Result<Option<Credentials>> {
        self.first(|bytes| lookup(bytes, reference))
    }

    /// Whether there is something for any repository of the registry of `reference`.
    pub fn has_any(&self, reference: &Reference) -> Result<bool> {
        let found = self.first(|bytes| Ok(has_any(bytes, reference)?.then_some(())))?;
        Ok(found.is_some())
    }

    /// What `look` finds in the first file in which it finds something.
    fn first<T>(&self, look: impl Fn(&[u8]) -> Result<Option<T>>) -> Result<Option<T>> {
        for path in &self.paths {
            let at = || format!("credentials in {}", path.display());
            let found = match crate::io::read_limited(path, MAX_FILE) {
                Ok(bytes) => look(&bytes).with_context(at)?,
                Err(e) if self.named || e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(at);
                }
                Err(_) => None,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default, deserialize_with = "or_default")]
    auths: HashMap<String, Option<Entry>>,
    #[serde(default, deserialize_with = "or_default")]
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
    /// What Google's key files say they are.
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    auth: Option<String>,
    identitytoken: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// As Go reads it: `null` is an empty map.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Entry {
    /// The credentials in it. An error for what is none.
    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credentials::Refresh(token)));
        }
        if let Some(mut auth) = set(&self.auth) {
            // Go skips the ends of lines, which `base64` puts there.
            auth.retain(|c| !matches!(c, '\r' | '\n'));
            let plain = BASE64_STANDARD.decode(auth).ok().and_then(|auth| String::from_utf8(auth).ok());
            // Docker pads passwords with zero bytes.
            let found = plain.and_then(|plain| Credentials::parse(plain.trim_end_matches('\0')));
            return found.map(Some).ok_or("not base64 of USER:PASSWORD");
        }
        let both = set(&self.username).zip(self.password.as_ref());
        Ok(both.map(|(name, password)| Credentials::new(&name, password)))
    }
}

/// The file of credentials in `bytes`; nothing in an empty one, such as /dev/null: the way to say that there are none.
fn parse(bytes: &[u8]) -> Result<Option<File>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    // Nothing of the content goes into an error.
    let file = serde_json::from_slice(bytes).map(Some);
    file.map_err(|e| anyhow!("line {}: not a file of credentials", e.line()))
}

/// Whether there are credentials for any repository of the registry of `reference`.
fn has_any(bytes: &[u8], reference: &Reference) -> Result<bool> {
    let Some(file) = parse(bytes)? else { return Ok(false) };
    let here = |key: &String| normal(key).split('/').next() == Some(reference.registry());
    let is_set = |entry: &Option<Entry>| entry.as_ref().is_some_and(|e| !matches!(e.credentials(), Ok(None)));
    if file.auths.iter().any(|(key, entry)| here(key) && is_set(entry)) || file.cred_helpers.keys().any(here)
    {
        return Ok(true);
    }
    // A key of Google's, or a store of credentials, which answers for the registry.
    Ok(lookup(bytes, reference)?.is_some())
}

fn lookup(bytes: &[u8], reference: &Reference) -> Result<Option<Credentials>> {
    let Some(file) = parse(bytes)? else { return Ok(None) };
    let registry = reference.registry();
    if file.kind.as_deref() == Some("service_account") {
        let key = std::str::from_utf8(bytes).context("not UTF-8")?;
        return Ok(google(registry).then(|| Credentials::new(GOOGLE_KEY_USER, key)));
    }

    let keys = keys(reference);
    if let Some(helper) = keys.iter().find_map(|key| file.cred_helpers.get(key)) {
        return ask(helper, registry);
    }
    let entries: HashMap<String, &Option<Entry>> = file.auths.iter().map(|(k, e)| (normal(k), e)).collect();
    for key in keys.iter().map(|key| normal(key)) {
        // A key that is there as it is counts before one that was normalized to it.
        let Some(Some(entry)) = file.auths.get(&key).or_else(|| entries.get(&key).copied()) else { continue };
        if let Some(found) = entry.credentials().map_err(|why| anyhow!("{key}: {why}"))? {
            return Ok(Some(found));
        }
    }
    match file.creds_store.filter(|store| !store.is_empty()) {
        Some(store) => ask(&store, registry),
        None => Ok(None),
    }
}

/// Whether a registry is one of Google's, the only ones that may see a key of Google's; or here, where a proxy of one
/// may be.
fn google(registry: &str) -> bool {
    let host = registry.split(':').next().unwrap_or_default();
    let under = |domain: &str| host.strip_suffix(domain).is_some_and(|h| h.is_empty() || h.ends_with('.'));
    under("gcr.io") || under("pkg.dev") || ["localhost", "127.0.0.1"].contains(&host)
}

/// The keys under which there may be an entry, the longest first.
fn keys(reference: &Reference) -> Vec<String> {
    let mut key = reference.name();
    let mut keys = vec![key.clone()];
    while let Some(slash) = key.rfind('/') {
        key.truncate(slash);
        keys.push(key.clone());
    }
    if reference.registry() == DOCKER_HUB {
        keys.push(DOCKER_HUB_KEY.into());
    }
    keys
}

/// A key without what docker writes before and behind the host.
fn normal(key: &str) -> String {
    let plain = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    // With a scheme it is docker's, and only the host counts.
    let plain = plain.map_or(key, |rest| rest.split('/').next().unwrap_or_default());
    let (host, rest) = plain.split_once('/').map_or((plain, None), |(host, rest)| (host, Some(rest)));
    let host = if DOCKER_HUB_NAMES.contains(&host) { DOCKER_HUB } else { host };
    rest.map_or(host.into(), |rest| format!("{host}/{rest}"))
}

/// What a credential helper prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// Asks a credential helper.
fn ask(helper: &str, registry: &str) -> Result<Option<Credentials>> {
    let program = format!("docker-credential-{helper}");
    ensure!(!helper.contains('/'), "{program}: not the name of a credential helper");
    let server = if registry == DOCKER_HUB { DOCKER_HUB_KEY } else { registry };
    let spawned = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let mut child = match spawned {
        // Such as in a file of another machine. The image may be public.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            tracing::warn!("{registry}: no credentials: {program} is not installed");
            return Ok(None);
        }
        spawned => spawned.with_context(|| program.clone())?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it does not need it.
        let _ = stdin.write_all(server.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| program.clone())?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        if text.contains("credentials not found") {
            return Ok(None);
        }
        bail!("{program}: {}: {}", output.status, text.trim());
    }
    let helped: Helped = serde_json::from_str(&text)
        .map_err(|_| anyhow!("{program}: its answer has no Username and Secret"))?;
    Ok(Some(Credentials::new(&helped.username, &helped.secret)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, reference: &str) -> Option<String> {
        match lookup(file.as_bytes(), &reference.parse().unwrap()).unwrap()? {
            Credentials::User { name, password } => Some(format!("{name}:{password}")),
            Credentials::Refresh(token) => Some(token),
        }
    }

    #[test]
    fn the_longest_prefix_counts() {
        let auth = |text: &str| BASE64_STANDARD.encode(text);
        let file = format!(
            r#"{{"auths":{{"h.io":{{"auth":"{}"}},"h.io/team":{{"auth":"{}"}},"h.io/team/app":{{"auth":"{}"}},
                "https://old.io/v1/":{{"auth":"{}"}},"token.io":{{"identitytoken":"refresh"}},
                "https://index.docker.io/v1/":{{"auth":"{}"}}}}}}"#,
            auth("a:1"),
            auth("b:2"),
            auth("c:3:4"),
            auth("d:5\0\0"),
            auth("e:6")
        );
        for (reference, expected) in [
            ("h.io/x", Some("a:1")),
            ("h.io/team/x/y", Some("b:2")),
            ("h.io/team/app:v1", Some("c:3:4")),
            ("h.io/teams/app", Some("a:1")),
            ("old.io/x", Some("d:5")),
            ("token.io/x", Some("refresh")),
            ("ubuntu", Some("e:6")),
            ("h.io:443/x", None),
        ] {
            assert_eq!(found(&file, reference).as_deref(), expected, "{reference}");
        }
    }

    #[test]
    fn files_as_go_reads_them() {
        for (file, expected) in [
            (r#"{"auths":null,"credHelpers":null}"#, None),
            (r#"{"auths":{"h.io":null}}"#, None),
            (r#"{"auths":{"h.io":{"auth":"YTox\n"}},"credHelpers":null}"#, Some("a:1")),
            (r#"{"auths":{"h.io":{"auth":"YT\r\nox"}}}"#, Some("a:1")),
            (r#"{"auths":{"h.io":{"username":"u","password":"p:w"}}}"#, Some("u:p:w")),
            (r#"{"auths":{"h.io":{"auth":"YTox","username":"u","password":"p"}}}"#, Some("a:1")),
            (r#"{"auths":{"h.io":{"username":"u"}}}"#, None),
            (r#"{"credsStore":"no-such-helper"}"#, None),
            (r#"{"credHelpers":{"h.io":"no-such-helper"}}"#, None),
        ] {
            assert_eq!(found(file, "h.io/x").as_deref(), expected, "{file}");
        }
    }

    #[test]
    fn credentials_for_any_repository_of_a_registry() {
        let reference = "h.io/x".parse().unwrap();
        for (file, expected) in [
            ("", false),
            ("{}", false),
            (r#"{"auths":{"h.io":{"auth":"YTox"}}}"#, true),
            (r#"{"auths":{"https://h.io/v1/":{"identitytoken":"t"}}}"#, true),
            (r#"{"auths":{"h.io/other/team":{"auth":"YTox"}}}"#, true),
            (
                r#"{"auths":{"h.io":{"auth":""},"h.io:5000":{"auth":"YTox"},"other.io":{"auth":"YTox"}}}"#,
                false,
            ),
            (r#"{"credHelpers":{"h.io":"x"}}"#, true),
            (r#"{"type":"service_account"}"#, false),
        ] {
            assert_eq!(has_any(file.as_bytes(), &reference).unwrap(), expected, "{file}");
        }
        assert!(!has_any(br#"{"credsStore":"no-such-helper"}"#, &reference).unwrap());
    }

    #[test]
    fn a_key_of_google_goes_only_there() {
        let key = r#"{"type":"service_account","private_key":"secret"}"#;
        assert_eq!(found(key, "eu.gcr.io/x/y").unwrap(), format!("_json_key:{key}"));
        assert!(found(key, "europe-docker.pkg.dev/x/y").is_some());
        assert_eq!(found(key, "notgcr.io/x/y"), None);
        assert_eq!(found(key, "ubuntu"), None);
    }

    #[test]
    fn what_is_wrong_is_not_shown() {
        let reference = "h.io/x".parse().unwrap();
        let e = lookup(br#"{"auths":{"h.io":{"auth":"c2VjcmV0"}}}"#, &reference).unwrap_err();
        assert_eq!(format!("{e:#}"), "h.io: not base64 of USER:PASSWORD");
        let e = lookup(b"\nsecret", &reference).unwrap_err();
        assert_eq!(format!("{e:#}"), "line 2: not a file of credentials");
        let e = lookup(br#"{"credHelpers":{"h.io":"../x"}}"#, &reference).unwrap_err();
        assert_eq!(format!("{e:#}"), "docker-credential-../x: not the name of a credential helper");
        let shown = format!("{:?}", Credentials::parse("me:secret").unwrap());
        assert_eq!(shown, "User(\"me\")");
    }
}
