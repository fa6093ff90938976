//! Parses the command line, runs the command, prints what went wrong.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use indicatif::HumanBytes;
use rehydrator::cli::{self, Build, Cli, Command, Mirror};
use rehydrator::copy::{self, Copier};
use rehydrator::dehydrate::{self, dehydrate};
use rehydrator::extract::extract;
use rehydrator::http::{Http, Retry};
use rehydrator::inspect::inspect;
use rehydrator::progress::Progress;
use rehydrator::pull::cache::{self, Cache};
use rehydrator::pull::{self, Owners};
use rehydrator::registry::{Client, Platform};
use rehydrator::rehydrate::{self, Dest, MIN_MEMORY, Rehydrator, rehydrate};
use rehydrator::source::{self, Source};
use rehydrator::store::Store;
use rehydrator::transport;
use rehydrator::verify::verify;
use rehydrator::workdir::{Origin, Workdir};
use rehydrator::{download, memory, oci, report};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let progress = Progress::new(cli.progress);
    let filter = EnvFilter::try_from_env("REHYDRATOR_LOG").unwrap_or_else(|_| "rehydrator=warn".into());
    let stderr = Stderr(progress.clone());
    tracing_subscriber::fmt()
        .with_writer(move || stderr.clone())
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter)
        .without_time()
        .with_target(false)
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
                eprintln!("rehydrator: {e:#}");
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

fn run(command: Command, progress: &Progress) -> Result<()> {
    let mut out = io::stdout().lock();
    match command {
        Command::Build(build) => run_build(build, progress, &mut out),
        Command::Rehydrate(args) => {
            drop(out);
            let dest = if args.dest == "-" { Dest::Stdout } else { Dest::Dir(args.dest.into()) };
            let options = rehydrate::Options {
                memory: args.memory.unwrap_or_else(quarter),
                validate: !args.skip_validate,
                force: args.force,
            };
            rehydrate(&args.data.data, &args.which, &dest, &options, progress)
        }
        Command::PrintStreamJson(data) => rehydrate::print_stream(&data.data, &mut out),
        Command::List(args) => report::list(&Store::open(&args.data.data)?.index, args.json, &mut out),
        Command::Inspect(args) => run_inspect(&args, &mut out),
        Command::Verify(args) => {
            let options = rehydrate::Options { memory: quarter(), validate: true, force: false };
            verify(&args.data.data, args.rehydrate.then_some(&options), progress)
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
        Command::Mirror(Mirror::Image(args)) => {
            let options = copy::Options {
                platforms: args.platform,
                tags: args.tags,
                referrers: args.referrers,
                dry_run: args.dry_run,
            };
            let copier = Copier::new(args.registry.options(), progress);
            let copied = copier.copy(&args.source, &args.destination, &options)?;
            Ok(writeln!(out, "{}", copied_line(&args.source, &args.destination, &copied))?)
        }
        Command::Mirror(Mirror::Images(args)) => {
            drop(out);
            let config = copy::config::Config::read(&args.config)?;
            let copier = Copier::new(args.registry.options(), progress);
            copy::images(&config, &copier, args.dry_run, |image, copied| {
                // Whoever stopped reading it, still wants the images.
                let line = copied_line(&image.source, &image.destination, copied);
                let _ = writeln!(io::stdout(), "{line}");
            })
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "rehydrator", &mut out);
            Ok(())
        }
        Command::ManPages { dir } => {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
            clap_mangen::generate_to(Cli::command(), &dir).with_context(|| dir.display().to_string())
        }
    }
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
        download::run(workdir, &options, &Http::new(Retry::default())?, progress).map(drop)
    };
    let dehydrate = |workdir: &Workdir, args: cli::DehydrateArgs, out: &mut dyn Write| -> Result<()> {
        let options = dehydrate::Options {
            arch: args.arch,
            profile: args.profile,
            allow_unhandled: args.allow_unhandled,
            memory: args.memory.unwrap_or_else(|| memory::available() / 2),
        };
        let index = dehydrate(workdir, &options, progress)?;
        report::dehydrated(&index, out)
    };
    let image = |workdir: &Workdir, args: cli::ImageArgs, out: &mut dyn Write| -> Result<()> {
        let binary = std::env::current_exe().context("this program's own file")?;
        let digest = oci::image::build(&workdir.dehydrated(), &binary, &args.output)?;
        Ok(writeln!(out, "{} {}", digest.oci(), args.output)?)
    };
    let dir = |workdir: cli::Workdir| Workdir::new(workdir.workdir);
    match build {
        Build::Init { workdir, stream } => init(&dir(workdir), stream),
        Build::Download { workdir, download: args } => download(&dir(workdir), args),
        Build::Dehydrate { workdir, dehydrate: args } => dehydrate(&dir(workdir), args, out),
        Build::Image { workdir, image: args } => image(&dir(workdir), args, out),
        Build::Clean { workdir } => dir(workdir).clean(),
        Build::Run { workdir, stream, download: d, dehydrate: mut h, image: i } => {
            let workdir = dir(workdir);
            if h.arch.is_empty() {
                h.arch.clone_from(&d.arch);
            }
            init(&workdir, stream)?;
            download(&workdir, d)?;
            dehydrate(&workdir, h, out)?;
            image(&workdir, i, out)?;
            workdir.clean()
        }
    }
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
        owners: match (args.rootless, root) {
            (true, _) => Owners::Recorded,
            (false, true) => Owners::Set,
            (false, false) => Owners::Dropped,
        },
        max_size: args.max_size.unwrap_or(pull::MAX_SIZE),
    };
    let transport = transport::open(&args.reference, args.registry.options())?;
    let pulled = pull::pull(&*transport, &args.dir, &options, progress)
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
    let path = std::path::Path::new(&args.what);
    let source: Arc<dyn Source> = if path.is_file() {
        Arc::new(source::File::new(std::fs::File::open(path).with_context(|| args.what.clone())?)?)
    } else {
        let rehydrator = Rehydrator::open(&args.data.data, quarter())?;
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
        rehydrator.parts(artifact)?.view()
    };
    let report = inspect(source).with_context(|| args.what.clone())?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        return Ok(writeln!(out)?);
    }
    Ok(write!(out, "{report}")?)
}
