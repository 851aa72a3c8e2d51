//! Metadata operations per second on two directories in turn: the mount and its yardstick.
//!
//! `metadata_bench NAME_A DIR_A NAME_B DIR_B [FILES] [ROUNDS]` prints, per operation, both
//! medians and `ratio OPERATION VALUE` (A's rate over B's).
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a benchmark reads the clock")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

const OPERATIONS: [&str; 6] = ["create", "stat", "readdir", "write4k", "read4k", "unlink"];

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name_a, dir_a, name_b, dir_b, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: metadata_bench NAME_A DIR_A NAME_B DIR_B [FILES] [ROUNDS]");
        std::process::exit(2);
    };
    let files: usize = rest.first().map_or(1000, |text| text.parse().expect("FILES is a number"));
    let rounds: usize = rest.get(1).map_or(5, |text| text.parse().expect("ROUNDS is a number"));
    let mut rates: Vec<[Vec<f64>; 2]> = OPERATIONS.iter().map(|_| [Vec::new(), Vec::new()]).collect();
    for round in 0..rounds {
        for (side, dir) in [dir_a, dir_b].into_iter().enumerate() {
            let base = PathBuf::from(dir).join(format!("bench-{round}"));
            for (operation, rate) in run_round(&base, files)?.into_iter().enumerate() {
                rates[operation][side].push(rate);
            }
        }
    }
    println!("{files} files, {rounds} rounds in turn, medians in operations per second");
    let mut ratios = Vec::new();
    for (name, sides) in OPERATIONS.iter().zip(&mut rates) {
        let [a, b] = [median(&mut sides[0]), median(&mut sides[1])];
        println!("{name:8} {name_a} {a:10.0}  {name_b} {b:10.0}");
        ratios.push(format!("ratio {name} {:.3}", a / b));
    }
    ratios.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn run_round(base: &Path, files: usize) -> std::io::Result<Vec<f64>> {
    fs::create_dir(base)?;
    let path = |index: usize| base.join(format!("file-{index:06}"));
    let rate = |count: usize, body: &mut dyn FnMut(usize) -> std::io::Result<()>| -> std::io::Result<f64> {
        let start = Instant::now();
        for index in 0..count {
            body(index)?;
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    };
    let block = [7u8; 4096];
    let rates = vec![
        rate(files, &mut |index| fs::File::create_new(path(index)).map(drop))?,
        rate(files, &mut |index| fs::symlink_metadata(path(index)).map(drop))?,
        rate(10, &mut |_| {
            let count = fs::read_dir(base)?.count();
            assert_eq!(count, files, "readdir shows every file");
            Ok(())
        })? * files as f64,
        rate(files, &mut |index| fs::OpenOptions::new().write(true).open(path(index))?.write_all(&block))?,
        rate(files, &mut |index| {
            let read = fs::read(path(index))?;
            assert_eq!(read.len(), block.len(), "what was written is there");
            Ok(())
        })?,
        rate(files, &mut |index| fs::remove_file(path(index)))?,
    ];
    fs::remove_dir(base)?;
    Ok(rates)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
