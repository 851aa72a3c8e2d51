//! Runs seed after seed until the time is over, the power has been cut often enough, or one fails.

use cfs_reactor::Clock;
use cfs_reactor::clock::KernelClock;
use cfs_sim::report::{Failure, Toll};
use cfs_sim::scenario;
use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;

/// A line says how far it has come at least this often.
const TOLD_EVERY: Duration = Duration::from_secs(20);

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
    /// Go on until the power was cut so often under a node at work, not counting the cut that ends each
    /// seed; everything is compared after each.
    #[arg(long, conflicts_with_all = ["seeds", "minutes"])]
    power_cuts: Option<u64>,
    /// Compare everything after every crash, as `--power-cuts` does.
    #[arg(long)]
    thorough: bool,
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
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    failed: u64,
    operations: u64,
    toll: Toll,
}

impl Totals {
    fn line(&self) -> String {
        let Totals { seeds, failed, operations, toll } = self;
        let verdict = if *failed == 0 { "all clean".to_owned() } else { format!("{failed} seeds failed") };
        format!("{seeds} seeds, {operations} operations, {toll}, {verdict}")
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(filter) = &options.log {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    let thorough = options.thorough || options.power_cuts.is_some();
    let clock = KernelClock::new();
    let deadline = options.minutes.map(|minutes| clock.now() + Duration::from_secs_f64(minutes * 60.0));
    let mut totals = Totals::default();
    let mut told = clock.now();
    let goes_on = |totals: &Totals| match (deadline, options.power_cuts) {
        (Some(deadline), _) => clock.now() < deadline,
        (None, Some(cuts)) => totals.toll.power_cuts_at_work < cuts,
        (None, None) => totals.seeds < options.seeds.unwrap_or(1),
    };
    while goes_on(&totals) {
        let seed = options.seed + totals.seeds;
        totals.seeds += 1;
        match if thorough { scenario::run_thoroughly(seed) } else { scenario::run(seed) } {
            Ok(summary) => {
                totals.operations += summary.operations;
                totals.toll.add(summary.toll);
                if options.trace {
                    println!("seed {seed} trace {:016x} digest {:016x}", summary.trace_hash, summary.digest);
                }
            }
            Err(failure) => {
                report(&failure, options.history, thorough);
                totals.failed += 1;
                if !options.keep_going {
                    return ExitCode::FAILURE;
                }
            }
        }
        if !options.trace && clock.now() - told >= TOLD_EVERY {
            told = clock.now();
            println!("{}", totals.line());
        }
    }
    println!("from seed {}: {}", options.seed, totals.line());
    if totals.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn report(failure: &Failure, shown: usize, thorough: bool) {
    for line in failure.history.iter().skip(failure.history.len().saturating_sub(shown)) {
        println!("    {line}");
    }
    println!("{failure}");
    let thoroughly = if thorough { " --thorough" } else { "" };
    println!("replay: scripts/torture --seeds 1 --seed {}{thoroughly}", failure.seed);
}
