//! Runs seed after seed until the time is over or one fails.

use cfs_reactor::Clock;
use cfs_reactor::clock::KernelClock;
use cfs_sim::report::Failure;
use cfs_sim::scenario;
use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;

/// Random operations, faults and crashes on a simulated cluster, compared with a model.
#[derive(Parser)]
#[command(name = "torture")]
struct Options {
    /// Go on for so long.
    #[arg(long, conflicts_with = "seeds")]
    minutes: Option<f64>,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run so many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// Print each seed's trace hash and digest.
    #[arg(long)]
    trace: bool,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Operations and events to show before a failure.
    #[arg(long, default_value_t = 40)]
    history: usize,
    /// Show the log of the code under test at this filter, such as cfs_meta=debug.
    #[arg(long)]
    log: Option<String>,
    #[cfg(feature = "planted")]
    #[command(flatten)]
    planted: cfs_sim::planted::PlantedOptions,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(filter) = &options.log {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    #[cfg(feature = "planted")]
    if let Some(code) = options.planted.run(options.seed) {
        return code;
    }
    let clock = KernelClock::new();
    let deadline = options.minutes.map(|minutes| clock.now() + Duration::from_secs_f64(minutes * 60.0));
    let (mut seed, mut seeds, mut operations, mut crashes, mut failed) = (options.seed, 0u64, 0, 0, 0u64);
    let count = if deadline.is_some() { u64::MAX } else { options.seeds.unwrap_or(1) };
    while seeds < count && deadline.is_none_or(|deadline| clock.now() < deadline) {
        match scenario::run(seed) {
            Ok(summary) => {
                operations += summary.operations;
                crashes += summary.crashes;
                if options.trace {
                    println!("seed {seed} trace {:016x} digest {:016x}", summary.trace_hash, summary.digest);
                }
            }
            Err(failure) => {
                report(&failure, options.history);
                failed += 1;
                if !options.keep_going {
                    return ExitCode::FAILURE;
                }
            }
        }
        seed += 1;
        seeds += 1;
    }
    if failed > 0 {
        println!("{seeds} seeds, {failed} failed");
        return ExitCode::FAILURE;
    }
    println!("{seeds} seeds, {operations} operations, {crashes} crashes, all clean");
    ExitCode::SUCCESS
}

fn report(failure: &Failure, shown: usize) {
    for line in failure.history.iter().skip(failure.history.len().saturating_sub(shown)) {
        println!("    {line}");
    }
    println!("{failure}");
    println!("replay: scripts/torture --seeds 1 --seed {}", failure.seed);
}
