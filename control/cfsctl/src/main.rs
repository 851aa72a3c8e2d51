//! `cfsctl`: asks a server about itself, in tables for people and JSON for programs. Thin over
//! `cfs-api`; it decides nothing. `device` and `doctor` are about this machine, and ask no server.
#![forbid(unsafe_code)]

mod cli;
mod connection;
mod device;
mod doctor;
mod show;

use anyhow::{Context, Result, bail};
use cfs_api::misuse;
use cfs_api::progress::Progress;
use cfs_api::{AdminCall, AdminReply, CheckReport, CheckState};
use clap::{CommandFactory, Parser};
use cli::{Cli, Command, DeviceAction};
use connection::Server;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How often a running check is asked for its progress.
const CHECK_POLL: Duration = Duration::from_millis(200);
/// The exit code of a command line that is not understood: clap's own.
const MISUSED: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            show::error(&error, cli.json);
            ExitCode::from(1)
        }
    }
}

/// What clap says instead of a command: help as it is, errors like all others.
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    show::error(&anyhow::Error::msg(misuse::in_one_line(error)), cli::asks_for_json(std::env::args_os()));
    ExitCode::from(MISUSED)
}

fn run(cli: &Cli) -> Result<ExitCode> {
    if let Some(misspelt) = misuse::in_environment(&Cli::command()) {
        bail!("{misspelt}");
    }
    let call = match &cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "cfsctl", &mut script);
            show::print(&script)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            clap_mangen::generate_to(Cli::command(), dir)
                .with_context(|| format!("cannot write man pages to {}", dir.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Device { action } => {
            let done = match action {
                DeviceAction::Bind { address } => device::bind(Path::new("/"), address)?,
                DeviceAction::Unbind { address } => device::unbind(Path::new("/"), address)?,
            };
            show::device(&done, cli.json)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Doctor => return doctor(cli),
        Command::Check { repair, deep } => return check(cli, *repair, *deep),
        Command::Status => AdminCall::Status,
        Command::Targets => AdminCall::Targets,
        Command::Shards => AdminCall::Shards,
        Command::Df => AdminCall::Df,
        Command::Stat { path } => AdminCall::Stat { path: cli::path_bytes(path) },
        Command::Policy { action } => action.call(),
        Command::Extents { path } => AdminCall::Extents { path: cli::path_bytes(path) },
    };
    let progress = Progress::on_one_line(waiting(cli));
    let reply = server(cli)?.call(call)?;
    drop(progress);
    show::reply(&reply, cli.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Looks at this machine, without a server. Exit code 3 when ClaudeFS cannot run here.
fn doctor(cli: &Cli) -> Result<ExitCode> {
    let report = doctor::examine(Path::new("/"), doctor::Probed::here());
    show::doctor(&report, cli.json)?;
    Ok(if report.runs { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// Starts a check and follows it to its end. Exit code 3 when something is wrong.
fn check(cli: &Cli, repair: bool, deep: bool) -> Result<ExitCode> {
    let report = checked(cli, repair, deep)?;
    show::check(&report, deep, cli.json)?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn checked(cli: &Cli, repair: bool, deep: bool) -> Result<CheckReport> {
    let server = server(cli)?;
    let progress = Progress::on_one_line(waiting(cli));
    let mut state = expect_check(server.call(AdminCall::CheckStart { repair, deep })?)?;
    let id = state.id;
    loop {
        if let Some(report) = state.result_of(id)? {
            return Ok(report.clone());
        }
        let total = if state.total > 0 { format!("/{}", state.total) } else { String::new() };
        progress.now(format!("checking {}: {}{total}", state.phase, state.done));
        connection::pause(CHECK_POLL);
        state = expect_check(server.call(AdminCall::CheckPoll)?)?;
    }
}

fn server(cli: &Cli) -> Result<Server> {
    Server::new(&cli.address, cli.identity.as_deref())
}

fn waiting(cli: &Cli) -> String {
    format!("waiting for {} to answer", cli.address)
}

fn expect_check(reply: AdminReply) -> Result<CheckState> {
    match reply {
        AdminReply::Check(state) => Ok(state),
        other => bail!("the server answered a check with {other:?}"),
    }
}
