//! Parses the command line, runs the command, prints what went wrong.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, Parser};
use indicatif::HumanBytes;
use rehydrator::cli::{self, Build, Cli, Command, Mirror};
use rehydrator::copy::{self, Copier};
use rehydrator::dehydrate::{self, dehydrate};
use rehydrator::extract::extract;
use rehydrator::http::{Http, Retry};
use rehydrator::inspect::inspect;
use rehydrator::io::read_limited;
use rehydrator::oci::cosign::{PrivateKey, PublicKey};
use rehydrator::oci::image::Program;
use rehydrator::oci::read::{self, Image};
use rehydrator::oci::sign::{Policy, Signing};
use rehydrator::openpgp::Signer;
use rehydrator::produce::Check;
use rehydrator::progress::Progress;
use rehydrator::pull::cache::{self, Cache};
use rehydrator::pull::{self, Owners, Rules};
use rehydrator::recipe::Tier;
use rehydrator::registry::{self, Client, Platform};
use rehydrator::rehydrate::{self, Dest, MIN_MEMORY, Rehydrator, rehydrate};
use rehydrator::serve::listen::{Limits, TlsFiles};
use rehydrator::source;
use rehydrator::store::Store;
use rehydrator::terminal::{Escaped, escaped};
use rehydrator::transport;
use rehydrator::verify::verify;
use rehydrator::workdir::{Origin, Workdir};
use rehydrator::{download, memory, mirror, oci, report, serve};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

fn main() -> ExitCode {
    memory::return_large_blocks();
    let cli = Cli::parse();
    let progress = Progress::new(cli.progress);
    let filter = EnvFilter::try_from_env("REHYDRATOR_LOG").unwrap_or_else(|_| "rehydrator=warn".into());
    let stderr = Stderr(progress.clone());
    tracing_subscriber::fmt()
        .with_writer(move || stderr.clone())
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter)
        .event_format(Line)
        .init();
    match run(cli.command, &progress) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Whoever reads our pipe had enough: no news to them.
            let broken_pipe = e
                .chain()
                .filter_map(|e| e.downcast_ref::<io::Error>())
                .any(|e| e.kind() == io::ErrorKind::BrokenPipe);
            if !broken_pipe {
                // There may be nobody to tell.
                let _ = writeln!(Escaped(io::stderr()), "rehydrator: {e:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Standard error for messages, which do not break the bars that are there.
#[derive(Clone)]
struct Stderr(Progress);

impl Write for Stderr {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(buf))
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A message on a line, behind its level. What it says may come from outside, so that all of it but the color of the level
/// is escaped.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        let color = match level {
            Level::ERROR => "31",
            Level::WARN => "33",
            Level::INFO => "32",
            _ => "34",
        };
        match out.has_ansi_escapes() {
            true => write!(out, "\x1b[{color}m{level:>5}\x1b[0m ")?,
            false => write!(out, "{level:>5} ")?,
        }
        let mut message = String::new();
        context.format_fields(Writer::new(&mut message), event)?;
        writeln!(out, "{}", escaped(&message))
    }
}

fn run(command: Command, progress: &Progress) -> Result<()> {
    let mut raw = io::stdout().lock();
    let mut out = Escaped(&mut raw);
    match command {
        Command::Build(build) => run_build(build, progress, &mut out),
        Command::Rehydrate(args) => {
            drop(raw);
            let dest = if args.dest == "-" { Dest::Stdout } else { Dest::Dir(args.dest.into()) };
            let (form, memory) = match args.published {
                true => (Tier::Published, memory::available() / 2),
                false => (Tier::Uncompressed, quarter()),
            };
            let options = rehydrate::Options {
                memory: args.memory.unwrap_or(memory),
                check: match (args.skip_validate, args.sha256) {
                    (true, _) => Check::Nothing,
                    (false, true) => Check::Sha256,
                    (false, false) => Check::Quick,
                },
                force: args.force,
                form,
            };
            rehydrate(&open(&args.data)?, &args.which, &dest, &options, progress)
        }
        Command::PrintStreamJson(data) => rehydrate::print_stream(&*open(&data)?, &mut raw),
        Command::List(args) => report::list(&open(&args.data)?.index, args.json, &mut out),
        Command::Inspect(args) => run_inspect(&args, &mut out),
        Command::Verify(args) => {
            let form = Tier::Uncompressed;
            let options = rehydrate::Options { memory: quarter(), check: Check::Sha256, force: false, form };
            let mut data = args.data;
            data.from = data.from.or(args.image);
            let store = match image(&data)? {
                Some(image) => {
                    image.verify(progress)?;
                    Arc::new(image.store()?)
                }
                None => Arc::new(Store::open(&data.data)?),
            };
            match (&data.from, args.rehydrate) {
                // Every blob of it was read.
                (Some(_), false) => Ok(()),
                (_, rehydrate) => verify(&store, rehydrate.then_some(&options), progress),
            }
        }
        Command::Pull(args) => run_pull(&args, progress, &mut out),
        Command::Purge(args) => {
            let cache = cache_of(&args.cache)?.context("there is no cache")?;
            let purged = cache.purge(args.older_than, args.keep_bytes)?;
            Ok(writeln!(
                out,
                "{} of {} blobs removed, {}; {} in use",
                purged.removed,
                purged.removed + purged.kept,
                HumanBytes(purged.bytes),
                purged.in_use
            )?)
        }
        Command::Digest(args) => {
            let client = Client::new(args.registry.options());
            let digest = match (&args.arch, &args.os) {
                (None, None) => client.digest(&args.reference)?,
                (arch, os) => {
                    client.resolve(&args.reference, &Platform::new(os.as_deref(), arch.as_deref()))?
                }
            };
            Ok(writeln!(out, "{}", digest.oci())?)
        }
        Command::Mirror(mirror) => {
            drop(raw);
            run_mirror(mirror, progress)
        }
        Command::Serve(args) => {
            drop(raw);
            run_serve(*args)
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "rehydrator", &mut raw);
            Ok(())
        }
        Command::ManPages { dir } => {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
            clap_mangen::generate_to(Cli::command(), &dir).with_context(|| dir.display().to_string())
        }
    }
}

/// What `signed` demands of an image.
fn policy(signed: &cli::Signed) -> Result<Policy> {
    let mut policy = Policy {
        cosign: signed.cosign_key.as_deref().map(PublicKey::read).transpose()?,
        lookaside: signed.lookaside.clone(),
        identity: signed.identity.clone(),
        ..Policy::default()
    };
    for path in &signed.key {
        policy.keys.read(path)?;
    }
    Ok(policy)
}

/// The image at `from`, once its signatures are checked.
fn image_at(from: &read::Origin, policy: &Policy, images: &cli::Images, cache: u64) -> Result<Arc<Image>> {
    let image = Image::open(from, images.options(), cache)?;
    image.check(policy)?;
    Ok(Arc::new(image))
}

/// The image that `data` names, if any.
fn image(data: &cli::Data) -> Result<Option<Arc<Image>>> {
    let policy = policy(&data.images.signed)?;
    ensure_about_image(data.from.is_some(), &policy)?;
    data.from.as_ref().map(|from| image_at(from, &policy, &data.images, data.from_cache)).transpose()
}

/// Otherwise nothing would be checked where a check was asked for.
fn ensure_about_image(image: bool, policy: &Policy) -> Result<()> {
    ensure!(image || policy.is_empty(), "--key and --cosign-key are about an image: --from names it");
    Ok(())
}

/// The dehydrated directory that `data` names.
fn open(data: &cli::Data) -> Result<Arc<Store>> {
    Ok(Arc::new(match image(data)? {
        Some(image) => image.store()?,
        None => Store::open(&data.data)?,
    }))
}

fn run_serve(args: cli::Serve) -> Result<()> {
    let sysupdate = sysupdate(&args)?;
    let policy = policy(&args.images.signed)?;
    ensure_about_image(!args.from.is_empty(), &policy)?;
    let mut stores = Vec::new();
    for from in &args.from {
        stores.push(Arc::new(image_at(from, &policy, &args.images, args.from_cache)?.store()?));
    }
    let mut data = args.data;
    if data.is_empty() && args.from.is_empty() && sysupdate.is_none() {
        data.push("/srv/dehydrated".into());
    }
    for dir in &data {
        stores.push(Arc::new(Store::open(dir)?));
    }
    let tls = args.tls_cert.zip(args.tls_key).map(|(cert, key)| TlsFiles { cert, key });
    let limits = Limits {
        connections: args.connections,
        connections_per_client: args.connections_per_client,
        timeout: args.timeout,
        drain: args.drain,
    };
    let options = serve::Options {
        listen: args.listen,
        admin_listen: args.admin_listen,
        tls,
        base_url: args.base_url,
        memory: args.memory.unwrap_or_else(quarter),
        cache: args.cache.unwrap_or_else(std::env::temp_dir),
        cache_size: args.cache_size,
        rehydrations: args.rehydrations,
        ignition: args.ignition,
        access_log: args.access_log,
        limits,
        downloads_per_client: args.downloads_per_client,
        queue: args.queue,
        sysupdate,
    };
    serve::run(stores, options)
}

/// The passphrase of keys: the first line of `file`, or else what the environment says.
fn passphrase(file: Option<&Path>) -> Result<Option<String>> {
    let Some(path) = file else { return Ok(std::env::var("REHYDRATOR_SIGN_PASSPHRASE").ok()) };
    let bytes = read_limited(path, 64 << 10).with_context(|| path.display().to_string())?;
    let text = String::from_utf8(bytes).with_context(|| path.display().to_string())?;
    Ok(Some(text.lines().next().unwrap_or_default().to_owned()))
}

/// What `args` want to be offered to systemd-sysupdate.
fn sysupdate(args: &cli::Serve) -> Result<Option<axum::Router>> {
    let cli::SysupdateArgs { registry_url, repository, sign_key, sign_passphrase_file, redirect, ttl } =
        &args.sysupdate;
    let Some(registry) = registry_url else { return Ok(None) };
    let passphrase = passphrase(sign_passphrase_file.as_deref())?;
    let read = |key: &serve::sysupdate::KeyFile| -> Result<_> {
        let signer = Signer::read(&key.path, passphrase.as_deref())?;
        Ok(serve::sysupdate::Key { repositories: key.repositories.clone(), signer })
    };
    let options = serve::sysupdate::Options {
        registry: registry.clone(),
        client: args.images.options(),
        repositories: repository.clone(),
        keys: sign_key.iter().map(read).collect::<Result<_>>()?,
        redirect: *redirect,
        ttl: *ttl,
        downloads_per_client: args.downloads_per_client,
    };
    serve::sysupdate::router(options).map(Some)
}

/// What `args` want the image to be signed with.
fn signing(args: &cli::ImageHow, lookaside: PathBuf) -> Result<Signing> {
    let passphrase = passphrase(args.sign_passphrase_file.as_deref())?;
    let passphrase = passphrase.as_deref();
    Ok(Signing {
        openpgp: args.sign_key.as_deref().map(|path| Signer::read(path, passphrase)).transpose()?,
        cosign: args.cosign_key.as_deref().map(|path| PrivateKey::read(path, passphrase)).transpose()?,
        identity: args.sign_identity.clone(),
        lookaside,
    })
}

/// How `how` wants to dehydrate, everything that is there.
fn dehydrating(how: &cli::DehydrateHow) -> dehydrate::Options {
    dehydrate::Options {
        arch: Vec::new(),
        profile: how.profile,
        allow_unhandled: false,
        require: how.require,
        published: !how.skip_published,
        memory: how.memory.unwrap_or_else(|| memory::available() / 2),
        max_size: how.max_size,
    }
}

/// How much of the previous release is kept in a file without a name, in bytes: a live rootfs of any size, which is read
/// once to check it and once to use it.
const PREVIOUS_CACHE: u64 = 8 << 30;

/// The previous release: in a directory, or in an image.
fn previous(place: &Path, registry: &cli::RegistryArgs) -> Result<Store> {
    if place.is_dir() {
        return Store::open(place);
    }
    let origin: read::Origin = place.to_string_lossy().parse()?;
    Arc::new(Image::open(&origin, registry.options(), PREVIOUS_CACHE)?).store()
}

/// The programs of an image, of which `given` are named: this one without.
fn programs(given: &[Program]) -> Result<Vec<Program>> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    let path = std::env::current_exe().context("this program's own file")?;
    Ok(vec![Program { arch: None, path }])
}

/// The memory that rehydrating uses unless told otherwise.
fn quarter() -> u64 {
    (memory::available() / 4).max(MIN_MEMORY)
}

fn run_build(build: Build, progress: &Progress, out: &mut dyn Write) -> Result<()> {
    let init = |workdir: &Workdir, stream: cli::StreamArgs| -> Result<()> {
        let origin = match (stream.stream_id, stream.stream_url, stream.stream_file) {
            (Some(id), ..) => Origin::Id(id),
            (_, Some(url), _) => Origin::Url(url),
            (_, _, Some(file)) => Origin::File(file),
            // clap asks for one of them.
            (None, None, None) => anyhow::bail!("no stream"),
        };
        workdir.init(&origin, &Http::new(Retry::default())?).map(drop)
    };
    let download = |workdir: &Workdir, args: cli::DownloadArgs| -> Result<()> {
        let options = download::Options {
            keys: args.key,
            skip_signatures: args.skip_signatures,
            arch: args.arch,
            parallel: args.parallel,
        };
        let http = Http::new(Retry::default())?.with_max_download(args.limit.max_download);
        download::run(workdir, &options, &http, progress).map(drop)
    };
    let dehydrate = |workdir: &Workdir,
                     args: cli::DehydrateArgs,
                     registry: &cli::RegistryArgs,
                     out: &mut dyn Write|
     -> Result<()> {
        let previous = args.previous.map(|place| previous(&place, registry)).transpose()?;
        let options = dehydrate::Options {
            arch: args.arch,
            allow_unhandled: args.allow_unhandled,
            ..dehydrating(&args.how)
        };
        let index = dehydrate(workdir, &options, previous.as_ref(), progress)?;
        report::dehydrated(&index, out)
    };
    let image = |workdir: &Workdir, args: cli::ImageArgs, out: &mut dyn Write| -> Result<()> {
        let build = oci::image::Build {
            dehydrated: &workdir.dehydrated(),
            programs: programs(&args.how.binary)?,
            output: &args.output,
            tags: &[],
            time: oci::image::source_date_epoch()?,
            max_layer: args.how.max_layer,
            compression: args.how.program_compression,
            registry: args.how.registry.options(),
            signing: signing(&args.how, args.lookaside.unwrap_or_else(|| workdir.sigstore()))?,
            progress,
        };
        let built = build.run()?;
        writeln!(out, "{} {}", built.digest.oci(), args.output)?;
        if let Some(path) = built.signature {
            writeln!(out, "signature {}", path.display())?;
        }
        Ok(())
    };
    let dir = |workdir: cli::Workdir| Workdir::new(workdir.workdir);
    match build {
        Build::Init { workdir, stream, downgrade } => {
            init(&dir(workdir).allow_downgrade(downgrade.allow_downgrade), stream)
        }
        Build::Download { workdir, download: args } => download(&dir(workdir), args),
        Build::Dehydrate { workdir, dehydrate: args, registry } => {
            dehydrate(&dir(workdir), args, &registry, out)
        }
        Build::Image { workdir, image: args } => image(&dir(workdir), args, out),
        Build::Clean { workdir } => dir(workdir).clean(),
        Build::Run { workdir, stream, downgrade, download: d, dehydrate: mut h, image: i } => {
            let workdir = dir(workdir).allow_downgrade(downgrade.allow_downgrade);
            if h.arch.is_empty() {
                h.arch.clone_from(&d.arch);
            }
            init(&workdir, stream)?;
            download(&workdir, d)?;
            dehydrate(&workdir, h, &i.how.registry, out)?;
            image(&workdir, i, out)?;
            workdir.clean()
        }
    }
}

fn run_mirror(command: Mirror, progress: &Progress) -> Result<()> {
    // Not locked: images are told of by the threads that copied them.
    let out = &mut Escaped(io::stdout());
    match command {
        Mirror::Releases(args) => mirror_releases(*args, progress, out),
        Mirror::Gc { dest, dry_run, wait } => {
            let removed = mirror::collect(&dest, dry_run, wait)?;
            let done = if dry_run { "would remove" } else { "removed" };
            for version in removed {
                writeln!(out, "{done} {}, {}", version.dir.display(), HumanBytes(version.bytes))?;
            }
            Ok(())
        }
        Mirror::Image(args) => {
            let options = copy::Options {
                platforms: args.platform,
                tags: args.tags,
                referrers: args.referrers,
                dry_run: args.dry_run,
            };
            let copier = copier(&args.images, progress)?;
            let copied = copier.copy(&args.source, &args.destination, &options)?;
            Ok(writeln!(out, "{}", copied_line(&args.source, &args.destination, &copied))?)
        }
        Mirror::Images(args) => {
            let config = copy::config::Config::read(&args.config)?;
            let copier = copier(&args.images, progress)?;
            copy::images(&config, &copier, args.dry_run, |image, copied| {
                // Whoever stopped reading it, still wants the images.
                let line = copied_line(&image.source, &image.destination, copied);
                let _ = writeln!(Escaped(io::stdout()), "{line}");
            })
        }
    }
}

fn copier<'a>(images: &cli::Images, progress: &'a Progress) -> Result<Copier<'a>> {
    ensure!(
        !images.skopeo,
        "--skopeo: its proxy gives one image of several: mirror copies images as they are"
    );
    Ok(Copier::new(images.options(), policy(&images.signed)?, progress))
}

fn mirror_releases(args: cli::MirrorReleases, progress: &Progress, out: &mut dyn Write) -> Result<()> {
    let defaults = mirror::config::Defaults { keys: args.key, url: args.url };
    let config = mirror::config::Config::read(&args.config, &defaults)?;
    let Some(dest) = args.dest else {
        return Ok(writeln!(out, "{}: good", args.config.display())?);
    };
    let http = Http::new(Retry::default())?.with_rate(config.rate).with_max_download(args.limit.max_download);
    let cli::MirrorDehydrate { workdir, lookaside, dehydrate_how, image_how } = args.images;
    let images = |repository| -> Result<_> {
        Ok(mirror::images::Options {
            repository,
            workdir,
            dehydrate: dehydrating(&dehydrate_how),
            programs: programs(&image_how.binary)?,
            time: oci::image::source_date_epoch()?,
            max_layer: image_how.max_layer,
            compression: image_how.program_compression,
            registry: image_how.registry.options(),
            signing: signing(&image_how, lookaside.unwrap_or_else(|| dest.join(mirror::images::SIGSTORE)))?,
        })
    };
    let images = args.dehydrate.map(images).transpose()?;
    let options = mirror::Options {
        base_url: args.base_url,
        verify: args.verify,
        wait: args.wait,
        allow_downgrade: args.downgrade.allow_downgrade,
        images,
    };
    let summary = mirror::run(&config, &dest, &options, &http, progress)?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &summary)?;
        writeln!(out)?;
    } else {
        summary.print(out)?;
    }
    if let Some(path) = args.prometheus {
        summary.write_prometheus(&path)?;
    }
    ensure!(summary.failed.is_empty(), "mirror {}: {} failed", dest.display(), summary.failed.len());
    Ok(())
}

/// What was copied.
fn copied_line(source: &str, destination: &str, copied: &copy::Copied) -> String {
    format!(
        "{source} -> {destination}: images: {}, blobs: {} ({}), already there: {}",
        copied.images,
        copied.blobs,
        HumanBytes(copied.bytes),
        copied.present
    )
}

/// Unpacks an image.
fn run_pull(args: &cli::Pull, progress: &Progress, out: &mut dyn Write) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let options = pull::Options {
        platform: Platform { os: args.os.clone(), arch: args.arch.clone(), variant: args.variant.clone() },
        force: args.force,
        cache: cache_of(&args.cache)?,
        rules: Rules {
            owners: match (args.rootless, root) {
                (true, _) => Owners::Recorded,
                (false, true) => Owners::Set,
                (false, false) => Owners::Dropped,
            },
            setuid: !args.no_setuid,
            devices: !args.no_devices,
        },
        max_size: args.max_size.unwrap_or(pull::MAX_SIZE),
    };
    let from = registry::Options {
        foreign_layers: args.foreign_layers,
        max_archive: options.max_size,
        ..args.images.options()
    };
    let transport = transport::open(&args.reference, from)?;
    let pulled = pull::pull(&*transport, &args.dir, &options, &policy(&args.images.signed)?, progress)
        .with_context(|| format!("image {}", args.reference))?;
    tracing::info!("{} layers, {} fetched", pulled.layers, pulled.fetched);
    Ok(writeln!(out, "{}", pulled.digest.oci())?)
}

/// The cache of layers, if there is to be one.
fn cache_of(args: &cli::CacheArgs) -> Result<Option<Cache>> {
    match &args.cache {
        Some(dir) if dir.as_os_str() == cache::NONE => Ok(None),
        Some(dir) => Cache::open(dir).map(Some),
        // Where nobody asked for one, there need not be one.
        None => Ok(cache::default_dir().and_then(|dir| {
            Cache::open(&dir).inspect_err(|e| tracing::warn!("layers are not kept: {e:#}")).ok()
        })),
    }
}

/// Looks into an artifact of a dehydrated directory, or into any file.
fn run_inspect(args: &cli::Inspect, out: &mut dyn Write) -> Result<()> {
    let path = Path::new(&args.what);
    let report = if path.is_file() {
        let file = std::fs::File::open(path).with_context(|| args.what.clone())?;
        inspect(Arc::new(source::File::new(file)?))
    } else {
        let rehydrator = Rehydrator::new(open(&args.data)?, quarter())?;
        let artifact = rehydrate::find(&rehydrator.store().index, &args.what, args.arch.as_deref())?;
        if let Some(dir) = &args.extract {
            let extracted = extract(&rehydrator, artifact, dir)?;
            let made = if extracted.whole {
                artifact.output.name.clone()
            } else {
                format!("{}, its compressed parts decompressed", artifact.output.name)
            };
            return Ok(writeln!(
                out,
                "rdiff patch {} {} OUT\nmakes {made}",
                extracted.base.display(),
                extracted.delta.display()
            )?);
        }
        let view = rehydrator.parts(artifact)?.view()?;
        rehydrator.bounded(artifact.source, || inspect(view))
    };
    let report = report.with_context(|| args.what.clone())?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        return Ok(writeln!(out)?);
    }
    Ok(write!(out, "{report}")?)
}
