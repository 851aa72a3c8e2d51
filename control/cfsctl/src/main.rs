//! `cfsctl`: asks a server about itself, in tables for people and JSON for programs. Thin over
//! `cfs-api`; it decides nothing.
#![forbid(unsafe_code)]

mod cli;
mod connection;
mod show;

use anyhow::{Context, Result, bail};
use cfs_api::{AdminCall, AdminReply, CheckState};
use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
use connection::Server;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How often a running check is asked for its progress.
const CHECK_POLL: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            show::error(&error, cli.json);
            ExitCode::from(1)
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let call = match &cli.command {
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "cfsctl", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            clap_mangen::generate_to(Cli::command(), dir)
                .with_context(|| format!("cannot write man pages to {}", dir.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Check { repair, deep } => return check(cli, *repair, *deep),
        Command::Status => AdminCall::Status,
        Command::Targets => AdminCall::Targets,
        Command::Shards => AdminCall::Shards,
        Command::Df => AdminCall::Df,
        Command::Stat { path } => AdminCall::Stat { path: cli::path_bytes(path) },
        Command::Policy { action } => action.call(),
        Command::Extents { path } => AdminCall::Extents { path: cli::path_bytes(path) },
    };
    let reply = Server::new(&cli.address).call(call)?;
    show::reply(&reply, cli.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Starts a check and follows it to its end. Exit code 3 when something is wrong.
fn check(cli: &Cli, repair: bool, deep: bool) -> Result<ExitCode> {
    let server = Server::new(&cli.address);
    let mut state = expect_check(server.call(AdminCall::CheckStart { repair, deep })?)?;
    let progress = std::io::stderr().is_terminal() && !cli.json;
    let id = state.id;
    let report = loop {
        if let Some(report) = state.result_of(id)? {
            break report;
        }
        connection::pause(CHECK_POLL);
        state = expect_check(server.call(AdminCall::CheckPoll)?)?;
        if progress {
            let total = if state.total > 0 { format!("/{}", state.total) } else { String::new() };
            eprint!("\r\x1b[Kchecking {}: {}{total}", state.phase, state.done);
            std::io::stderr().flush()?;
        }
    };
    if progress {
        eprint!("\r\x1b[K");
    }
    show::check(report, cli.json)?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn expect_check(reply: AdminReply) -> Result<CheckState> {
    match reply {
        AdminReply::Check(state) => Ok(state),
        other => bail!("the server answered a check with {other:?}"),
    }
}
