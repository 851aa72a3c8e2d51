//! Feeds every decoder of bytes from wire and disk with bytes that are nearly right.

use cfs_sim::fuzz::FuzzOptions;
use clap::Parser;
use std::process::ExitCode;

/// Mutates valid bytes of the wire and of disks, sets their checksums right, and has them decoded.
#[derive(Parser)]
#[command(name = "fuzz")]
struct Options {
    #[command(flatten)]
    fuzz: FuzzOptions,
}

fn main() -> ExitCode {
    Options::parse().fuzz.run()
}
