//! The command line: clap types only. Help text is documentation; shell completions and man pages come from here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::dehydrate::Profile;
use crate::oci::read::Origin;
use crate::progress::Mode;
use crate::registry::{self, Credentials, Reference};
use crate::rehydrate::Which;

/// A whole CoreOS release as one container image that gives back every disk image bit for bit.
#[derive(Debug, Parser)]
#[command(name = "rehydrator", version, propagate_version = true)]
pub struct Cli {
    /// How progress is shown on stderr
    #[arg(long, global = true, value_enum, default_value_t, value_name = "HOW")]
    pub progress: Mode,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
#[allow(missing_docs, reason = "the help text of each is on its arguments")]
pub enum Command {
    /// Make an image: get a release, dehydrate it, wrap it
    #[command(subcommand)]
    Build(Build),
    /// Give back disk images, bit for bit
    Rehydrate(Rehydrate),
    /// Print the stream metadata, byte for byte as published
    PrintStreamJson(Data),
    /// List every artifact: architecture, platform, format, size, tier
    List(List),
    /// Look into a disk image: format, virtual size, partitions, file systems, platform id
    Inspect(Inspect),
    /// Check every blob and signature of a dehydrated directory, or of an image
    Verify(Verify),
    /// Print the digest of an image in a registry
    Digest(DigestArgs),
    /// Print shell completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory
    ManPages {
        /// The directory, which is made when it is not there
        dir: PathBuf,
    },
}

/// Where the build happens.
#[derive(Clone, Debug, Args)]
pub struct Workdir {
    /// Directory that holds stream.json, artifacts/ and dehydrated/
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub workdir: PathBuf,
}

#[derive(Debug, Subcommand)]
#[allow(missing_docs, reason = "the help text of each is on its arguments")]
pub enum Build {
    /// Fetch the stream metadata of a release
    Init {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        stream: StreamArgs,
    },
    /// Download what the stream metadata names, resumable, verified
    Download {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        download: DownloadArgs,
    },
    /// Reduce the downloaded artifacts to a dehydrated directory
    Dehydrate {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        dehydrate: DehydrateArgs,
    },
    /// Wrap the dehydrated directory and this program as a container image
    Image {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        image: ImageArgs,
    },
    /// Do it all: init, download, dehydrate, image, clean
    Run {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        stream: StreamArgs,
        #[command(flatten)]
        download: DownloadArgs,
        #[command(flatten)]
        dehydrate: DehydrateArgs,
        #[command(flatten)]
        image: ImageArgs,
    },
    /// Remove artifacts/ and dehydrated/
    Clean {
        #[command(flatten)]
        workdir: Workdir,
    },
}

/// Which stream.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct StreamArgs {
    /// A known stream: fcos-stable, fcos-testing, fcos-next, rhcos-4.N
    pub stream_id: Option<String>,
    /// Fetch the stream metadata from here
    #[arg(long, value_name = "URL")]
    pub stream_url: Option<String>,
    /// Read the stream metadata from a file
    #[arg(long, value_name = "FILE")]
    pub stream_file: Option<PathBuf>,
}

/// Options of `build download`.
#[derive(Clone, Debug, Args)]
pub struct DownloadArgs {
    /// OpenPGP keys that may sign artifacts: a file or a directory of files; may be repeated. Without it, the keys
    /// known for the stream
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// Check digests only, not signatures
    #[arg(long)]
    pub skip_signatures: bool,
    /// Only these architectures [default: all of the stream]
    #[arg(long = "arch", value_name = "ARCH")]
    pub arch: Vec<String>,
    /// How many files to download at once
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub parallel: usize,
}

/// Options of `build dehydrate`.
#[derive(Clone, Debug, Args)]
pub struct DehydrateArgs {
    /// Only these architectures [default: all of the stream]
    #[arg(long = "arch", id = "dehydrate_arch", value_name = "ARCH")]
    pub arch: Vec<String>,
    /// Size against speed
    #[arg(long, value_enum, default_value_t)]
    pub profile: Profile,
    /// Leave out artifacts that cannot be handled or are not there, instead of failing
    #[arg(long)]
    pub allow_unhandled: bool,
    /// Memory to use at most, such as 2G [default: half of what the machine or the cgroup has]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
}

/// Options of `build image`.
#[derive(Clone, Debug, Args)]
pub struct ImageArgs {
    /// Where the image goes: oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF
    #[arg(short, long, value_name = "DEST")]
    pub output: String,
    /// The program of the image, statically linked; repeated, one for each architecture of an image for several, which
    /// share the data [default: this program]
    #[arg(long, value_name = "FILE")]
    pub binary: Vec<PathBuf>,
    /// The largest layer, such as 1G; a longer blob is in several
    #[arg(long, value_parser = parse_size, default_value = "4G", value_name = "SIZE")]
    pub max_layer: u64,
    /// Sign the image with this OpenPGP secret key (simple signing)
    #[arg(long, value_name = "FILE")]
    pub sign_key: Option<PathBuf>,
    /// Sign the image with this key as cosign does: PEM, as openssl, cosign or skopeo make it
    #[arg(long, value_name = "FILE")]
    pub cosign_key: Option<PathBuf>,
    /// A file with the passphrase of the keys in its first line [default: $REHYDRATOR_SIGN_PASSPHRASE]
    #[arg(long, value_name = "FILE")]
    pub sign_passphrase_file: Option<PathBuf>,
    /// The name that signatures give the image [default: that of docker://REF, or the tag in a layout if it is one]
    #[arg(long, value_name = "REF")]
    pub sign_identity: Option<Reference>,
    /// Where OpenPGP signatures go: the root of a lookaside tree [default: sigstore in the working directory]
    #[arg(long, value_name = "DIR")]
    pub lookaside: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub registry: RegistryArgs,
}

/// How to speak to registries.
#[derive(Clone, Debug, Args)]
pub struct RegistryArgs {
    /// Credentials: a file as podman and docker keep it, or the key of a Google service account [default:
    /// $REGISTRY_AUTH_FILE, then the files of podman, skopeo and docker]
    #[arg(long, value_name = "FILE")]
    pub authfile: Option<PathBuf>,
    /// Credentials, instead of those in files
    #[arg(long, value_name = "USER:PASSWORD", value_parser = parse_credentials)]
    pub creds: Option<Credentials>,
    /// Whether registries must prove who they are; if not, those that have no TLS will do too
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true,
        num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub tls_verify: bool,
    /// Certificates of authorities (*.crt) and our own (*.cert, *.key) [default: those for the registry in
    /// /etc/containers/certs.d]
    #[arg(long, value_name = "DIR")]
    pub cert_dir: Option<PathBuf>,
}

impl RegistryArgs {
    /// As options of a client.
    pub fn options(&self) -> registry::Options {
        registry::Options {
            credentials: self.creds.clone(),
            authfile: self.authfile.clone(),
            tls_verify: self.tls_verify,
            cert_dir: self.cert_dir.clone(),
            ..registry::Options::default()
        }
    }
}

/// Options of `digest`.
#[derive(Clone, Debug, Args)]
pub struct DigestArgs {
    /// The image: NAME, HOST/NAME:TAG, NAME@sha256:HEX
    pub reference: Reference,
    /// Of an image for several platforms, the one for this architecture [default: the index of all]
    #[arg(long)]
    pub arch: Option<String>,
    /// Of an image for several platforms, the one for this operating system [default: linux, if --arch is given]
    #[arg(long)]
    pub os: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub registry: RegistryArgs,
}

/// Where a dehydrated directory is.
#[derive(Clone, Debug, Args)]
pub struct Data {
    /// The dehydrated directory
    #[arg(long, env = "REHYDRATOR_DATA", default_value = "/srv/dehydrated", value_name = "DIR")]
    pub data: PathBuf,
    /// The image that the dehydrated directory is in, of which only what is needed is fetched: docker://REF,
    /// oci:DIR[:TAG], oci-archive:FILE[:TAG] or dir:DIR
    #[arg(long, value_name = "IMAGE")]
    pub from: Option<Origin>,
    /// The image must be signed with one of these OpenPGP keys: a file or a directory of files; may be repeated
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// The image must be signed with this key as cosign does: a public key in PEM
    #[arg(long, value_name = "FILE")]
    pub cosign_key: Option<PathBuf>,
    /// Where OpenPGP signatures of images are: the root of a lookaside tree, a directory or a URL
    #[arg(long, default_value = "sigstore", value_name = "DIR")]
    pub lookaside: String,
    /// The name that signatures must give the image [default: the one after docker://]
    #[arg(long, value_name = "REF")]
    pub identity: Option<Reference>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub registry: RegistryArgs,
}

/// Options of `rehydrate`.
#[derive(Clone, Debug, Args)]
pub struct Rehydrate {
    /// Directory to write into, or - for stdout: one artifact as its bytes, several as a tar stream
    pub dest: String,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub data: Data,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub which: Which,
    /// Do not check digests while writing
    #[arg(long)]
    pub skip_validate: bool,
    /// Replace files in the directory that differ
    #[arg(long)]
    pub force: bool,
    /// Memory to use at most, such as 512M [default: a quarter of what the machine or the cgroup has, at least 256M]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
}

/// Options of `list`.
#[derive(Clone, Debug, Args)]
pub struct List {
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub data: Data,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `inspect`.
#[derive(Clone, Debug, Args)]
pub struct Inspect {
    /// A platform, the name of an artifact, or a file
    pub what: String,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub data: Data,
    /// Target architecture, for a platform [default: this machine's, or the only one there is]
    #[arg(long)]
    pub arch: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Write the librsync delta of the artifact and its base into this directory, for `rdiff patch base delta`
    #[arg(long, value_name = "DIR")]
    pub extract: Option<PathBuf>,
}

/// Options of `verify`.
#[derive(Clone, Debug, Args)]
pub struct Verify {
    /// The image, instead of a dehydrated directory, as after --from
    #[arg(value_name = "IMAGE", conflicts_with = "from")]
    pub image: Option<Origin>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub data: Data,
    /// Rehydrate every artifact too, and check what comes out
    #[arg(long)]
    pub rehydrate: bool,
}

/// Parses `USER:PASSWORD`.
fn parse_credentials(text: &str) -> Result<Credentials, String> {
    // The text is not shown: it may be a password.
    Credentials::parse(text).ok_or_else(|| "expected USER:PASSWORD".into())
}

/// Parses `512M`, `2G`, `1048576`: binary multiples.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("not a size: {text:?}")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_shl(shift).filter(|m| m >> shift == n))
        .ok_or_else(|| format!("not a size: {text:?}"))
}
