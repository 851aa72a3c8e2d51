//! The program `cfs`: server, mount, one-process cluster, format.
#![forbid(unsafe_code)]

mod cli;
mod config;
mod created;
mod dev;
mod devices;
mod mount;
mod server;
mod signals;

use anyhow::{Context, Result, bail};
use cfs_api::misuse;
use cfs_fabric::identity::{Identity, authority};
use cfs_wire::TargetId;
use clap::{CommandFactory, Parser};
use cli::{AuthorityAction, Cli, Command, FormatArgs, ReplaceArgs, Role, ServerArgs};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// The exit code of a command line that is not understood: clap's own.
const MISUSED: u8 = 2;

fn main() -> ExitCode {
    end_at_panic();
    let arguments = mount::helper_arguments(std::env::args_os().collect());
    let (failed, code) = match Cli::try_parse_from(arguments) {
        Ok(cli) => match run(cli) {
            Ok(()) => return ExitCode::SUCCESS,
            // One line, whatever the chain: what failed, then why.
            Err(error) => (format!("{error:#}").replace('\n', " "), 1),
        },
        Err(error) if error.use_stderr() => (misuse::in_one_line(&error), MISUSED),
        Err(help) => help.exit(),
    };
    let _ = writeln!(std::io::stderr(), "cfs: {failed}");
    ExitCode::from(code)
}

/// A panic on any thread ends the process: what is left of a server would be taken for one that is well.
fn end_at_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

fn run(cli: Cli) -> Result<()> {
    if let Some(misspelt) = misuse::in_environment(&Cli::command()) {
        bail!("{misspelt}");
    }
    let log = cli.log;
    match cli.command {
        Command::Format(args) => {
            start_log(log)?;
            format(args)
        }
        Command::Replace(args) => {
            start_log(log)?;
            replace(args)
        }
        Command::Server(args) => serve(args, log),
        Command::Mount(args) => {
            start_log(log)?;
            mount::run(args)
        }
        Command::Dev(args) => {
            start_log(log)?;
            dev::run(args)
        }
        Command::Authority { action } => authority(action),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cfs", &mut script);
            match std::io::stdout().write_all(&script) {
                Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write the script"),
                _ => Ok(()),
            }
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            clap_mangen::generate_to(Cli::command(), &dir)
                .with_context(|| format!("cannot write man pages to {}", dir.display()))
        }
    }
}

fn start_log(filter: Option<String>) -> Result<()> {
    let filter = filter.unwrap_or_else(|| "warn".into());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter)
        .with_context(|| format!("log filter '{filter}' is not understood; try info or cfs_store=debug"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Nobody may be there to read it any more: its terminal is closed, its disk is full.
    log.with_ansi(std::io::stderr().is_terminal()).log_internal_errors(false).init();
    Ok(())
}

/// A line on stdout. That it can't be written stops nothing: the reader may have seen enough.
pub(crate) fn say(line: &str) {
    if let Err(error) = writeln!(std::io::stdout(), "{line}")
        && error.kind() != ErrorKind::BrokenPipe
    {
        tracing::warn!(%error, line, "stdout can't be written to");
    }
}

fn format(args: FormatArgs) -> Result<()> {
    let spec = cfs::format::FormatSpec {
        policy: args.ec,
        tolerate: args.tolerate,
        shards: args.shards,
        zone_bytes: None,
        force: args.force,
    };
    let cluster = server::format_files(&args.targets, args.size, spec)?;
    say(&format!("cluster {cluster}: {} targets, policy {}, {} shards", args.targets.len(), args.ec, args.shards));
    Ok(())
}

fn replace(args: ReplaceArgs) -> Result<()> {
    server::replace_target(args.path, args.targets, TargetId(args.id), args.force)?;
    say(&format!(
        "target {} is empty now; start the server with it: it is refilled in the background (cfsctl status)",
        args.id
    ));
    Ok(())
}

/// An identity, if there is one.
pub(crate) fn load_identity(directory: Option<&Path>) -> Result<Option<Arc<Identity>>> {
    Ok(directory.map(Identity::load).transpose()?.map(Arc::new))
}

fn authority(action: AuthorityAction) -> Result<()> {
    match action {
        AuthorityAction::Create { authority: directory } => {
            authority::create(&directory)?;
            say(&format!(
                "{0} is an authority: keep {0}/ca.key where nobody else reads it, and make identities with: \
                 cfs authority issue {0} --role server --name NAME DIRECTORY",
                directory.display()
            ));
        }
        AuthorityAction::Issue { authority: directory, role, name, identity } => {
            let role = match role {
                Role::Server => authority::Role::Server,
                Role::Client => authority::Role::Client,
            };
            authority::issue(&directory, role, &name, &identity)?;
            say(&format!(
                "{} is the identity of {name}: copy it to its machine, and give it there with --identity",
                identity.display()
            ));
        }
    }
    Ok(())
}

/// Flags and environment over the file over defaults.
fn serve(args: ServerArgs, log: Option<String>) -> Result<()> {
    let file = match &args.config {
        Some(path) => config::FileConfig::read(Path::new(path))?,
        None => config::FileConfig::default(),
    };
    start_log(log.or(file.log))?;
    let targets = if args.targets.is_empty() { file.targets.unwrap_or_default() } else { args.targets };
    let settings = server::Settings {
        listen: args.listen.or(file.listen).unwrap_or_else(|| config::DEFAULT_LISTEN.into()),
        targets,
        spin_us: args.tuning.spin_us.or(file.spin_us),
        session_lease_ms: args.tuning.session_lease_ms.or(file.session_lease_ms),
        read_lease_ms: args.tuning.read_lease_ms.or(file.read_lease_ms),
        repair_mib_s: args.tuning.repair_mib_s.or(file.repair_mib_s),
        identity: load_identity(args.tuning.identity.or(file.identity).as_deref())?,
        codec: args.tuning.codec.or(file.codec),
        fabric: args.tuning.fabric.or(file.fabric),
        dead_client: None,
    };
    let signals = signals::Signals::catch()?;
    let server = server::Server::start(settings)?;
    signals.end_in_order();
    say(&format!("serving on {}", server.address()));
    signals.wait()?;
    server.stop()
}
