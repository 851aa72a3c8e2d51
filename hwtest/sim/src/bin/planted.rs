//! Switches deliberate bugs on, one after the other, and looks for each with the checkers that
//! `torture` has.

use cfs_sim::planted::PlantedOptions;
use clap::Parser;
use std::process::ExitCode;

/// Proves that the checkers of the simulation find deliberate bugs.
#[derive(Parser)]
#[command(name = "planted")]
struct Options {
    #[command(flatten)]
    planted: PlantedOptions,
}

fn main() -> ExitCode {
    Options::parse().planted.run()
}
