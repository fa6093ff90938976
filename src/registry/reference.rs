//! The name of an image in a registry, in the short forms that docker and podman take too.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use oci_spec::distribution;

use crate::digest::Digest;

/// The registry of names that have none.
pub(super) const DOCKER_HUB: &str = "docker.io";

/// Where [`DOCKER_HUB`] really is.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// How skopeo and podman mark a reference among other places for images.
pub const TRANSPORT: &str = "docker://";

/// `REGISTRY/REPOSITORY[:TAG][@DIGEST]`; a digest, where there is one, is what counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that is no reference.
#[derive(Debug, thiserror::Error)]
#[error("{text:?}: not the name of an image: {why}")]
pub struct NotAReference {
    text: String,
    why: String,
}

impl Reference {
    /// The registry as it is named, such as `docker.io` or `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The host, and port where there is one, that answers for the registry.
    pub fn host(&self) -> &str {
        if self.registry == DOCKER_HUB { DOCKER_HUB_HOST } else { &self.registry }
    }

    /// The repository, such as `library/ubuntu`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if any.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if any.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What a registry is asked for: the digest, or else the tag.
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.oci(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => String::new(),
        }
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The image of this digest in the same repository.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The image of this tag in the same repository; an error when it cannot be one.
    pub fn with_tag(&self, tag: &str) -> Result<Self, NotAReference> {
        format!("{}:{tag}", self.name()).parse()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match self.digest {
            Some(digest) => write!(f, "@{}", digest.oci()),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = NotAReference;

    /// Reads a reference, with or without `docker://` before it. The tag is `latest` where there is neither tag nor
    /// digest.
    fn from_str(text: &str) -> Result<Self, NotAReference> {
        let no = |why: &str| NotAReference { text: text.chars().take(300).collect(), why: why.into() };
        let name = text.strip_prefix(TRANSPORT).unwrap_or(text);
        // The pattern of the crate takes letters of any alphabet in a tag.
        if !name.is_ascii() {
            return Err(no("only ASCII is allowed"));
        }
        // The crate does not know addresses of IPv6: another host stands in for one.
        let ipv6 = name.starts_with('[').then(|| ipv6_host(name)).transpose().map_err(no)?;
        let (named, name) = match ipv6 {
            Some((host, rest)) => (Some(host), format!("{IPV6}{rest}")),
            None => (None, name.to_owned()),
        };
        let parsed = distribution::Reference::try_from(name).map_err(|e| no(&e.to_string()))?;
        let digest = parsed.digest().map(|digest| match digest.strip_prefix("sha256:") {
            Some(_) => digest.parse().map_err(|_| no("not a sha256 digest")),
            None => Err(no("only sha256 digests are supported")),
        });
        Ok(Self {
            registry: named.map_or_else(|| parsed.registry().into(), Into::into),
            repository: parsed.repository().into(),
            tag: parsed.tag().map(Into::into),
            digest: digest.transpose()?,
        })
    }
}

/// Stands in for an address of IPv6 while the rest of a reference is read.
const IPV6: &str = "ipv6.invalid";

/// Cuts off the host of `[ADDRESS]:PORT/REPOSITORY`, the port where there is one. The rest begins with the slash.
fn ipv6_host(name: &str) -> Result<(&str, &str), &'static str> {
    let (host, rest) = name.split_at(name.find('/').ok_or("no repository")?);
    let (address, port) = host.strip_prefix('[').and_then(|h| h.split_once(']')).ok_or("no IPv6 address")?;
    address.parse::<Ipv6Addr>().map_err(|_| "no IPv6 address")?;
    match port.strip_prefix(':') {
        Some(port) => port.parse::<u16>().map(drop).map_err(|_| "no port")?,
        None if port.is_empty() => {}
        None => return Err("no port"),
    }
    Ok((host, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms() {
        let hex = "a".repeat(64);
        for (text, full) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            ("ubuntu:18.04", "docker.io/library/ubuntu:18.04"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker://gcr.io/x/y:z", "gcr.io/x/y:z"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/a/b/c:v1", "localhost:5000/a/b/c:v1"),
            ("host:80/x", "host:80/x:latest"),
            ("[::1]:5000/a/b", "[::1]:5000/a/b:latest"),
            ("docker://[fd00::1:2]/x:v1", "[fd00::1:2]/x:v1"),
            (&format!("ubuntu@sha256:{hex}"), &format!("docker.io/library/ubuntu@sha256:{hex}")),
            (&format!("h.io/x:1@sha256:{hex}"), &format!("h.io/x:1@sha256:{hex}")),
        ] {
            let parsed: Reference = text.parse().unwrap();
            assert_eq!(parsed.to_string(), full, "{text}");
            assert_eq!(parsed.to_string().parse::<Reference>().unwrap(), parsed);
        }
        assert_eq!("ubuntu".parse::<Reference>().unwrap().host(), "registry-1.docker.io");
        assert_eq!("h:1/x".parse::<Reference>().unwrap().host(), "h:1");
        let tagged: Reference = format!("h.io/x:1@sha256:{hex}").parse().unwrap();
        assert_eq!(tagged.version(), format!("sha256:{hex}"));
        assert_eq!(tagged.with_tag("v2").unwrap().to_string(), "h.io/x:v2");
    }

    #[test]
    fn refused() {
        for text in [
            "",
            "docker://",
            "UPPER",
            "a/../b",
            "a b",
            "x:",
            "x@sha256:12",
            "x:ü",
            "x/?y",
            "x#y",
            "[::1]",
            "[::1]:5000",
            "[::1/x",
            "[::g]/x",
            "[::1]:p/x",
            "[::1]x/y",
            "[::1]/X",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        let e = format!("x@sha512:{}", "a".repeat(128)).parse::<Reference>().unwrap_err().to_string();
        assert!(e.ends_with("only sha256 digests are supported"), "{e}");
    }
}
