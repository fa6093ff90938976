//! The command line: clap types only. Help text is documentation; shell completions and man pages come from here.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts say FILE[:TAG], which is no link")]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::bytes::parse_size;
use crate::dehydrate::Profile;
use crate::oci::image::{Compression, Program};
use crate::oci::read::Origin;
use crate::progress::Mode;
use crate::recipe::Tier;
use crate::registry::{self, Credentials, Platform, Reference};
use crate::rehydrate::Which;
use crate::serve::listen::Address;
use crate::serve::sysupdate::{Base, KeyFile, MAX_TTL, RepositoryGlob};

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
    /// Unpack an image into a directory
    Pull(Pull),
    /// Remove layers from the cache of `pull` that nobody uses
    Purge(Purge),
    /// Print the digest of an image in a registry
    Digest(DigestArgs),
    /// Keep mirrors
    #[command(subcommand)]
    Mirror(Mirror),
    /// Serve over HTTP
    Serve(Box<Serve>),
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
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
pub enum Build {
    /// Fetch the stream metadata of a release
    Init {
        #[command(flatten)]
        workdir: Workdir,
        #[command(flatten)]
        stream: StreamArgs,
        #[command(flatten)]
        downgrade: Downgrade,
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
        #[command(flatten)]
        registry: RegistryArgs,
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
        downgrade: Downgrade,
        #[command(flatten)]
        download: DownloadArgs,
        #[command(flatten)]
        dehydrate: DehydrateArgs,
        #[command(flatten)]
        image: ImageArgs,
    },
    /// Remove artifacts/, dehydrated/ and proofs/
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

/// Whether what is here may be replaced by less.
#[derive(Clone, Copy, Debug, Args)]
pub struct Downgrade {
    /// Take an older release, or an unsigned document, from a server where a newer or a signed one is here already
    #[arg(long)]
    pub allow_downgrade: bool,
}

/// How much may be downloaded.
#[derive(Clone, Copy, Debug, Args)]
pub struct MaxDownload {
    /// The most bytes to download in one run, all files together, attempts that fail included
    #[arg(long, value_parser = parse_size, default_value = "1T", value_name = "SIZE")]
    pub max_download: u64,
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
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub limit: MaxDownload,
}

/// Options of `build dehydrate`.
#[derive(Clone, Debug, Args)]
pub struct DehydrateArgs {
    /// Only these architectures [default: all of the stream]
    #[arg(long = "arch", id = "dehydrate_arch", value_name = "ARCH")]
    pub arch: Vec<String>,
    /// Leave out artifacts that cannot be handled or are not there, instead of failing
    #[arg(long)]
    pub allow_unhandled: bool,
    /// Build on the previous release, a dehydrated directory or an image that --from takes: its live rootfs is kept, and
    /// this one is a delta over it, without what has stayed the same byte for byte. The image gets larger by that delta.
    /// It pays only where little was compressed anew
    #[arg(long, value_name = "DIR|IMAGE")]
    pub previous: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub how: DehydrateHow,
}

/// How to dehydrate.
#[derive(Clone, Debug, Args)]
pub struct DehydrateHow {
    /// Size against speed
    #[arg(long, value_enum, default_value_t)]
    pub profile: Profile,
    /// Fail when an artifact does not come back in this form
    #[arg(long, value_enum, value_name = "TIER")]
    pub require: Option<Tier>,
    /// Do not find out how to make the published files again: faster, but they come back uncompressed only
    #[arg(long, conflicts_with = "require")]
    pub skip_published: bool,
    /// Memory to use at most, such as 2G [default: half of what the machine or the cgroup has]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// The largest disk image to expect in a compressed artifact; what is longer is taken for a decompression bomb
    #[arg(long, value_parser = parse_size, default_value = "256G", value_name = "SIZE")]
    pub max_size: u64,
}

/// Options of `build image`.
#[derive(Clone, Debug, Args)]
pub struct ImageArgs {
    /// Where the image goes: oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF
    #[arg(short, long, value_name = "DEST")]
    pub output: String,
    /// Where OpenPGP signatures go: the root of a lookaside tree [default: sigstore in the working directory]
    #[arg(long, value_name = "DIR")]
    pub lookaside: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub how: ImageHow,
}

/// How to make an image.
#[derive(Clone, Debug, Args)]
pub struct ImageHow {
    /// The program of the image, statically linked; repeated, one for each architecture of an image for several, which
    /// share the data. With ARCH it is an error if it is for another [default: this program]
    #[arg(long, value_name = "[ARCH=]FILE")]
    pub binary: Vec<Program>,
    /// The largest layer, such as 1G; a longer blob is in several. A registry that gives up uploads when a connection breaks,
    /// as docker-registry does, gets the layers again that were on their way
    #[arg(long, value_parser = parse_size, default_value = "4G", value_name = "SIZE")]
    pub max_layer: u64,
    /// How the program in the image is compressed
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub program_compression: Compression,
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
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub registry: RegistryArgs,
}

/// How to speak to registries.
#[derive(Clone, Debug, Args)]
pub struct RegistryArgs {
    /// Credentials: a file as podman and docker keep it, or the key of a Google service account [default:
    /// $REGISTRY_AUTH_FILE, then the files of podman, skopeo and docker]
    #[arg(long, visible_alias = "auth", value_name = "FILE")]
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
    /// oci:DIR[:TAG], oci-archive:FILE[:TAG], dir:DIR, or with the help of skopeo containers-storage:NAME
    #[arg(long, value_name = "IMAGE")]
    pub from: Option<Origin>,
    /// How much to keep of what is fetched from a registry, in a file without a name in $TMPDIR; what is more is fetched
    /// again when it is needed again
    #[arg(long, value_parser = parse_size, default_value = "2G", value_name = "SIZE")]
    pub from_cache: u64,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub images: Images,
}

/// How images are read: from what registries, and with what signatures.
#[derive(Clone, Debug, Args)]
pub struct Images {
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub signed: Signed,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub registry: RegistryArgs,
    /// Let skopeo read the image, wherever it is: under the policy.json of this machine, and with the mirrors of its
    /// registries.conf. It takes version 1.11. containers-storage: is always read by skopeo
    #[arg(long, conflicts_with = "creds")]
    pub skopeo: bool,
}

impl Images {
    /// As options of a client.
    pub fn options(&self) -> registry::Options {
        registry::Options { skopeo: self.skopeo, ..self.registry.options() }
    }
}

/// What an image must be signed with.
#[derive(Clone, Debug, Args)]
pub struct Signed {
    /// The image must be signed with one of these OpenPGP keys: a file or a directory of files; may be repeated
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// The image must be signed with this key as cosign does: a public key in PEM
    #[arg(long, value_name = "FILE")]
    pub cosign_key: Option<PathBuf>,
    /// Where OpenPGP signatures of images are that have none beside them: the root of a lookaside tree, a directory or a
    /// URL
    #[arg(long, default_value = "sigstore", value_name = "DIR")]
    pub lookaside: String,
    /// The name that signatures must give the image [default: that in the registry]
    #[arg(long, value_name = "REF")]
    pub identity: Option<Reference>,
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
    /// The files as published, compressed as upstream did, with their signatures beside them (in a directory or a tar
    /// stream)
    #[arg(long)]
    pub published: bool,
    /// Do not check digests while writing
    #[arg(long)]
    pub skip_validate: bool,
    /// Check the SHA-256 digests that the stream metadata has, and not only the BLAKE3 digests that were recorded when
    /// those were proven: slower where the processor has no instructions for SHA-256
    #[arg(long, conflicts_with = "skip_validate")]
    pub sha256: bool,
    /// Replace files in the directory that differ
    #[arg(long)]
    pub force: bool,
    /// Memory to use at most, such as 512M [default: a quarter of what the machine or the cgroup has, at least 256M; with
    /// --published half of it]. Compressing again takes what one encoder needs, whatever is said here
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

/// Where layers are kept.
#[derive(Clone, Debug, Args)]
pub struct CacheArgs {
    /// Directory that keeps layers for the next time, or `no` for none [default: /var/cache/rehydrator for root,
    /// $XDG_CACHE_HOME/rehydrator for others]
    #[arg(long, env = crate::pull::cache::VARIABLE, value_name = "DIR|no")]
    pub cache: Option<PathBuf>,
}

/// Options of `pull`.
#[derive(Clone, Debug, Args)]
pub struct Pull {
    /// The image: a name in a registry, or oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], dir:DIR,
    /// containers-storage:NAME (with the help of skopeo)
    #[arg(value_name = "REF")]
    pub reference: String,
    /// The directory to make: it is there when all of the image is in it, and not before. An image with setuid files,
    /// capabilities or devices is a risk where other users reach it: then only the owner of the directory can enter it
    /// (mode 0700), unless a directory above it is closed to others, as /var/lib/machines is
    pub dir: PathBuf,
    /// Replace the directory if it is there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub cache: CacheArgs,
    /// Of an image for several platforms, the one for this architecture [default: this machine's]
    #[arg(long)]
    pub arch: Option<String>,
    /// Of an image for several platforms, the one for this operating system [default: linux]
    #[arg(long)]
    pub os: Option<String>,
    /// The variant of the architecture, such as v7
    #[arg(long)]
    pub variant: Option<String>,
    /// Do not set owners, which takes root, but record them in the attribute user.rootlesscontainers
    #[arg(long)]
    pub rootless: bool,
    /// Fail when the files of the image, its layers, or the archive that it is in take more than this together
    /// [default: 64G]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub max_size: Option<u64>,
    /// Leave out what lets a file do more than the user who starts it: setuid and setgid bits, capabilities
    #[arg(long)]
    pub no_setuid: bool,
    /// Leave out devices
    #[arg(long)]
    pub no_devices: bool,
    /// Fetch layers that the registry does not have from the URLs in the manifest, which may name any server
    #[arg(long)]
    pub foreign_layers: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub images: Images,
}

/// Options of `purge`.
#[derive(Clone, Debug, Args)]
pub struct Purge {
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub cache: CacheArgs,
    /// Only layers that were last used longer ago than this, such as 12h, 7d, 4w
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub older_than: Option<Duration>,
    /// Only so many of those used least lately that the rest takes no more than this, such as 20G
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub keep_bytes: Option<u64>,
}

/// Options of `mirror image`.
#[derive(Clone, Debug, Args)]
pub struct MirrorImage {
    /// The image: a name in a registry, or oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], dir:DIR
    pub source: String,
    /// Where it goes: a name in a registry, or oci:DIR[:TAG], oci-archive:FILE[:TAG]
    pub destination: String,
    /// All platforms of the image, which is the default: its digest stays what it is
    #[arg(long, conflicts_with = "platform")]
    pub all_platforms: bool,
    /// Only this platform, OS/ARCH or OS/ARCH/VARIANT; may be repeated. The index that names them is a new one
    #[arg(long, value_name = "PLATFORM", value_parser = parse_platform)]
    pub platform: Vec<Platform>,
    /// All tags that this takes: GLOB, or `+ GLOB` and `- GLOB`, of which the first that matches decides; may be repeated
    #[arg(long, value_name = "GLOB", allow_hyphen_values = true)]
    pub tags: Vec<String>,
    /// Take what refers to the image along
    #[arg(long)]
    pub referrers: bool,
    /// Only say what would be copied
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub images: Images,
}

/// Options of `mirror images`.
#[derive(Clone, Debug, Args)]
pub struct MirrorImages {
    /// What to copy: JSON, `{"images": [{"source", "destination", "tags", "platforms", "referrers"}], "parallel"}`
    pub config: PathBuf,
    /// Only say what would be copied
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub images: Images,
}

/// Parses the name of a repository.
fn parse_repository(text: &str) -> Result<Reference, String> {
    let name = text.parse::<Reference>().map_err(|e| e.to_string())?;
    // Without one of its own it is that which stands for none.
    let bare = name.digest().is_none() && !text.ends_with(":latest") && name.tag() == Some("latest");
    if bare { Ok(name) } else { Err("expected a repository: tags are those of the versions".into()) }
}

/// Parses `OS/ARCH` or `OS/ARCH/VARIANT`.
fn parse_platform(text: &str) -> Result<Platform, String> {
    crate::copy::config::platform(text).map_err(|e| e.to_string())
}

/// Parses `90s`, `30m`, `12h`, `7d`, `4w`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        "w" => 7 * 86400,
        _ => return Err(format!("not a time: {text:?}")),
    };
    let seconds = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    seconds.map(Duration::from_secs).ok_or_else(|| format!("not a time: {text:?}"))
}

/// Parses a time of a day at most.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    let ttl = parse_duration(text)?;
    if ttl > MAX_TTL { Err("more than a day".into()) } else { Ok(ttl) }
}

/// Parses `USER:PASSWORD`.
fn parse_credentials(text: &str) -> Result<Credentials, String> {
    // The text is not shown: it may be a password.
    Credentials::parse(text).ok_or_else(|| "expected USER:PASSWORD".into())
}

/// What to mirror.
#[derive(Debug, Subcommand)]
pub enum Mirror {
    /// Copy an image as it is, with its signatures
    Image(MirrorImage),
    /// Copy all images of a configuration; one that fails does not end the rest
    Images(MirrorImages),
    /// Mirror releases of CoreOS, Fedora CoreOS and Flatcar: only files whose signatures are good
    Releases(Box<MirrorReleases>),
    /// Remove versions beyond those that the configuration keeps
    Gc {
        /// The mirror
        dest: PathBuf,
        /// Only say what would be removed
        #[arg(short = 'n', long)]
        dry_run: bool,
        /// Wait for another process that changes the mirror
        #[arg(long)]
        wait: bool,
    },
}

/// Options of `mirror releases`.
#[derive(Clone, Debug, Args)]
pub struct MirrorReleases {
    /// What to mirror: JSON, as docs/mirror.md has it
    pub config: PathBuf,
    /// The directory of the mirror, which is made when it is not there
    #[arg(required_unless_present = "check")]
    pub dest: Option<PathBuf>,
    /// Only check the configuration, and the keys it names
    #[arg(long, conflicts_with = "dest")]
    pub check: bool,
    /// OpenPGP keys for sources that name none: a file or a directory of files; may be repeated
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// The server for a configuration without sources; {channel} and {arch} in it are filled in
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// Where clients find the mirror; the stream documents that are served point there
    #[arg(long, value_name = "URL")]
    pub base_url: Option<url::Url>,
    /// Check again what is there already
    #[arg(long)]
    pub verify: bool,
    /// Wait for another process that changes the mirror
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub downgrade: Downgrade,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub limit: MaxDownload,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
    /// Write metrics to this file, for the textfile collector of Prometheus' node exporter
    #[arg(long, value_name = "FILE")]
    pub prometheus: Option<PathBuf>,
    /// Build an image of each stream that is complete, with what is mirrored of its newest version, and push it into this
    /// repository, tagged with the version and with the name of the stream. One that is there is not built again
    #[arg(long, value_name = "REPO", value_parser = parse_repository)]
    pub dehydrate: Option<Reference>,
    #[command(flatten, next_help_heading = "Options of --dehydrate")]
    #[allow(missing_docs, reason = "flattened")]
    pub images: MirrorDehydrate,
}

/// How `mirror releases --dehydrate` makes images.
#[derive(Clone, Debug, Args)]
pub struct MirrorDehydrate {
    /// Where images are built; it takes some gigabytes while that lasts [default: inside the mirror]
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Where OpenPGP signatures of images go: the root of a lookaside tree [default: sigstore in the mirror]
    #[arg(long, value_name = "DIR")]
    pub lookaside: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub dehydrate_how: DehydrateHow,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub image_how: ImageHow,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen: ADDRESS:PORT or unix:PATH; may be repeated [default: the sockets that systemd hands over, else
    /// 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<Address>,
    /// Where to answer /healthz, /readyz and /metrics for probes and monitors, without TLS and whatever other clients do;
    /// may be repeated. /metrics is only there then [default: with everything else]
    #[arg(long, value_name = "ADDR")]
    pub admin_listen: Vec<Address>,
    /// A dehydrated directory to serve; may be repeated [default: /srv/dehydrated, unless --from or --registry names
    /// something to serve]
    #[arg(long, env = "REHYDRATOR_DATA", value_name = "DIR")]
    pub data: Vec<PathBuf>,
    /// An image to serve, as after --from of rehydrate; may be repeated
    #[arg(long, value_name = "IMAGE")]
    pub from: Vec<Origin>,
    /// How much to keep of what is fetched of each image, as with --from-cache of rehydrate
    #[arg(long, value_parser = parse_size, default_value = "2G", value_name = "SIZE")]
    pub from_cache: u64,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub images: Images,
    /// Certificate of the server and of its authorities, in PEM; read again on SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Key of the certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where clients find the server, as behind a proxy [default: the host they ask for]
    #[arg(long, value_name = "URL")]
    pub base_url: Option<url::Url>,
    /// Memory for rehydrating, such as 512M [default: a quarter of what the machine or the cgroup has, at least 256M]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// Directory for files that took work to make; they have no names, and are gone with the process [default: $TMPDIR]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// How many bytes of them are kept at most
    #[arg(long, value_parser = parse_size, default_value = "16G", value_name = "SIZE")]
    pub cache_size: u64,
    /// How many of them are made at a time
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub rehydrations: usize,
    /// Serve the Ignition configs in this directory below /ignition/, to everyone
    #[arg(long, value_name = "DIR")]
    pub ignition: Option<PathBuf>,
    /// Where requests are logged, one JSON object a line: a file, - for stdout, or `none`
    #[arg(long, default_value = "-", value_name = "FILE")]
    pub access_log: PathBuf,
    /// Maximum concurrent connections. Then an idle one is closed for a new one, or one of the client that has most; if
    /// there is none, the new one gets 503
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub connections: usize,
    /// Maximum concurrent connections of one client: an IPv4 address or an IPv6 network (/64). 0 is no limit, as behind a
    /// proxy, where all clients have one address; unix sockets have none
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub connections_per_client: usize,
    /// Maximum concurrent downloads of one client; more get 503. 0 is no limit
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub downloads_per_client: usize,
    /// How long a request waits for its turn, as while other files are made, before it gets 503
    #[arg(long, value_parser = parse_duration, default_value = "10m", value_name = "TIME")]
    pub queue: Duration,
    /// How long a client may take for a request and for the next one. It must take an answer at 1 KiB/s on average over
    /// this time
    #[arg(long, value_parser = parse_duration, default_value = "30s", value_name = "TIME")]
    pub timeout: Duration,
    /// How long downloads may go on after SIGTERM; a second one ends them
    #[arg(long, value_parser = parse_duration, default_value = "10m", value_name = "TIME")]
    pub drain: Duration,
    #[command(flatten)]
    #[allow(missing_docs, reason = "flattened")]
    pub sysupdate: SysupdateArgs,
}

/// How disk images of a registry are offered to systemd-sysupdate.
#[derive(Clone, Debug, Args)]
pub struct SysupdateArgs {
    /// Offer the disk images in this registry to systemd-sysupdate: /REPOSITORY/SHA256SUMS and the files in it. A path
    /// behind the host stands before all names of repositories; http:// allows a registry without TLS
    #[arg(long = "registry", value_name = "URL")]
    pub registry_url: Option<Base>,
    /// Offer only the repositories whose whole name in the URL matches; may be repeated. * matches any characters but a
    /// slash, ** any, ? one. Required with --sign-key, and with credentials for the registry; ** is all [default: all]
    #[arg(long = "repository", value_name = "GLOB", requires = "registry_url")]
    pub repository: Vec<RepositoryGlob>,
    /// Sign SHA256SUMS with this OpenPGP secret key, for Verify=yes. With GLOB= only for the repositories that it matches,
    /// as in --repository; may be repeated, the first that matches signs, and one without GLOB signs for the rest
    #[arg(long, value_name = "[GLOB=]FILE", requires = "registry_url")]
    pub sign_key: Vec<KeyFile>,
    /// A file with the passphrase of the keys in its first line [default: $REHYDRATOR_SIGN_PASSPHRASE]
    #[arg(long, value_name = "FILE", requires = "sign_key")]
    pub sign_passphrase_file: Option<PathBuf>,
    /// Send clients to the registry for the files themselves; it must let them read without credentials
    #[arg(long, requires = "registry_url")]
    pub redirect: bool,
    /// How long to remember what the registry said of a repository, also that it does not exist, such as 30s; a day at
    /// most, and 0s asks every time
    #[arg(long, value_name = "TIME", value_parser = parse_ttl, default_value = "30s")]
    pub ttl: Duration,
}
