//! Proves that the checkers can fail: each deliberate bug is switched on, and seeds that were not
//! chosen for it run until one of them fails that is clean without the bug.
//!
//! Seeds are dealt out in rounds, the same to every bug, so that what the easily found bugs leave
//! of the budget goes to the others. Each process of seeds ends with the CPU time a seed may take,
//! so a busy machine finds no more and no less than a quiet one.

use crate::scenario;
use cfs_wire::planted::{Bug, activate, reached};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

/// How often the parent looks at its children.
const LOOK: Duration = Duration::from_millis(20);
/// CPU time after which a seed counts as hanging: many times what the slowest clean one takes in a
/// development build.
const SEED_CPU_SECONDS: u64 = 40;
/// A seed with a bug may eat memory: it ends before the machine does.
const MEMORY_MAX: u64 = 4 << 30;
/// No bug gets more than so many times its part of the budget: the last one would otherwise be
/// looked for by one process alone until all is used.
const SHARES_MAX: f64 = 6.0;
/// Seeds of a bug's first process; every further one gets half of what it has had.
const SEEDS_FIRST: u64 = 4;

/// What unit tests look for in the place of the simulation. A lone replica asks nobody for a vote;
/// a client that waits for each commit of an inode, under a request id that is carried out once,
/// never sends what the order of commits would refuse; hardly ever does a program write again what
/// is just being packed; a disk hardly ever loses all copies of one header; and clients hardly ever fill
/// the last of the space together while each keeps much unwritten.
const ELSEWHERE: [Bug; 5] = [
    Bug::LogForgetVote,
    Bug::MetaIgnoreCommitSequence,
    Bug::MetaSwapBlindly,
    Bug::StoreIgnoreNewerGeneration,
    Bug::ClientOverdrawSpace,
];

/// How to look for planted bugs.
#[derive(clap::Args)]
pub struct PlantedOptions {
    /// CPU seconds for each planted bug on average: what one leaves goes to the others.
    #[arg(long, default_value_t = 20)]
    pub budget: u64,
    /// Processes at once.
    #[arg(long, default_value_t = 2)]
    pub jobs: usize,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Look for these planted bugs only.
    #[arg(long = "bug")]
    pub bugs: Vec<String>,
    /// Let one bug loose on so many seeds in this process and say what came of it.
    #[arg(long, requires = "bugs")]
    pub seeds: Option<u64>,
}

/// What some seeds came to with a bug switched on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hunted {
    /// This seed failed and is clean without the bug.
    Found { seed: u64, violation: String },
    /// All were clean; so often the code came by the bug.
    Missed { reached: u64 },
}

/// Runs seeds with the bug switched on until one fails that does not fail without it.
pub fn hunt(bug: Bug, seeds: Range<u64>, mut before_each: impl FnMut(u64)) -> Hunted {
    let reached_before = reached();
    for seed in seeds {
        before_each(seed);
        activate(Some(bug));
        let outcome = scenario::run(seed);
        activate(None);
        if let Err(failure) = outcome
            && scenario::run(seed).is_ok()
        {
            return Hunted::Found { seed, violation: failure.violation.to_string() };
        }
    }
    Hunted::Missed { reached: reached() - reached_before }
}

impl PlantedOptions {
    pub fn run(&self) -> ExitCode {
        let mut bugs = Vec::new();
        for name in &self.bugs {
            let Some(bug) = Bug::ALL.iter().copied().find(|bug| bug.name() == name) else {
                let known: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
                eprintln!("no planted bug is called {name}; there are {}", known.join(", "));
                return ExitCode::FAILURE;
            };
            bugs.push(bug);
        }
        match (self.seeds, &bugs[..]) {
            (Some(seeds), [bug]) => {
                hunt_here(*bug, self.seed..self.seed + seeds);
                return ExitCode::SUCCESS;
            }
            (Some(_), _) => {
                eprintln!("--seeds goes with one --bug");
                return ExitCode::FAILURE;
            }
            (None, []) => bugs.extend(Bug::ALL.iter().copied().filter(|bug| !ELSEWHERE.contains(bug))),
            (None, _) => {}
        }
        Pack::new(self, &bugs).hunt_all()
    }
}

fn cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

/// What a process of seeds prints, one line each.
fn hunt_here(bug: Bug, seeds: Range<u64>) {
    // Where limits can't be set, seeds go without.
    let _ = setrlimit(Resource::As, Rlimit { current: Some(MEMORY_MAX), maximum: Some(MEMORY_MAX) });
    let hunted = hunt(bug, seeds, |seed| {
        let until = cpu_seconds() as u64 + SEED_CPU_SECONDS;
        let _ = setrlimit(Resource::Cpu, Rlimit { current: Some(until), maximum: None });
        println!("at {seed} {:.2}", cpu_seconds());
        let _ = std::io::stdout().flush();
    });
    match hunted {
        Hunted::Found { seed, violation } => println!("found {seed} {violation}"),
        Hunted::Missed { reached } => println!("missed {reached}"),
    }
    println!("cpu {:.2}", cpu_seconds());
}

/// One bug and how far it was looked for.
struct Quarry {
    bug: Bug,
    next_seed: u64,
    seeds: u64,
    reached: u64,
    cpu_seconds: f64,
}

struct Hunt {
    quarry: Quarry,
    child: Child,
}

/// What a process ended with.
enum Ended {
    Found(String),
    Missed {
        reached: u64,
    },
    /// The seed neither failed nor ended well: if it does without the bug, that is a find.
    Died {
        seed: u64,
        how: &'static str,
    },
    /// Killed from outside, or never begun.
    Broken(ExitStatus),
}

/// The hunts under way and those to come.
struct Pack<'a> {
    options: &'a PlantedOptions,
    waiting: VecDeque<Quarry>,
    running: Vec<Hunt>,
    missed: Vec<Quarry>,
    bugs: usize,
    found: usize,
    broken: usize,
    cpu_seconds: f64,
}

impl Pack<'_> {
    fn new<'a>(options: &'a PlantedOptions, bugs: &[Bug]) -> Pack<'a> {
        let quarry = |bug: &Bug| Quarry { bug: *bug, next_seed: options.seed, seeds: 0, reached: 0, cpu_seconds: 0.0 };
        Pack {
            options,
            waiting: bugs.iter().map(quarry).collect(),
            running: Vec::new(),
            missed: Vec::new(),
            bugs: bugs.len(),
            found: 0,
            broken: 0,
            cpu_seconds: 0.0,
        }
    }

    fn hunt_all(mut self) -> ExitCode {
        loop {
            if let Err(error) = self.fill() {
                eprintln!("no process can be started: {error}");
                return ExitCode::FAILURE;
            }
            if self.running.is_empty() {
                break;
            }
            match self.running.iter_mut().position(|hunt| matches!(hunt.child.try_wait(), Ok(Some(_)))) {
                Some(index) => self.one_ended(index),
                None => {
                    let pause = rustix::thread::Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as _ };
                    let _ = rustix::thread::nanosleep(&pause);
                }
            }
            if self.broken > self.bugs {
                eprintln!("too many processes were killed from outside");
                return ExitCode::FAILURE;
            }
        }
        for Quarry { bug, seeds, reached, .. } in &self.missed {
            println!("planted {} NOT FOUND in {seeds} seeds that came by it {reached} times", bug.name());
        }
        println!("{:.0} CPU seconds", self.cpu_seconds);
        println!("planted {} of {} found", self.found, self.bugs);
        // At least 95 of 100.
        if self.found * 100 >= self.bugs * 95 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Starts processes while the budget lasts.
    fn fill(&mut self) -> std::io::Result<()> {
        let share = self.options.budget as f64;
        let budget = share * self.bugs as f64;
        while self.running.len() < self.options.jobs.max(1) {
            let Some(mut quarry) = self.waiting.pop_front() else { break };
            let enough = self.cpu_seconds >= budget || quarry.cpu_seconds >= share * SHARES_MAX;
            if quarry.seeds > 0 && enough {
                self.missed.push(quarry);
                continue;
            }
            let seeds = SEEDS_FIRST.max(quarry.seeds / 2);
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--bug", quarry.bug.name(), "--seed", &quarry.next_seed.to_string()]);
            command.args(["--seeds", &seeds.to_string()]);
            let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            quarry.next_seed += seeds;
            self.running.push(Hunt { quarry, child });
        }
        Ok(())
    }

    fn one_ended(&mut self, index: usize) {
        let Hunt { mut quarry, mut child } = self.running.remove(index);
        let mut text = String::new();
        if let Some(mut output) = child.stdout.take() {
            // What can't be read counts as not said.
            let _ = output.read_to_string(&mut text);
        }
        let Ok(status) = child.wait() else { return };
        let (tried, ended) = read_end(&text, status);
        let name = quarry.bug.name();
        self.cpu_seconds += spent(&text);
        quarry.cpu_seconds += spent(&text);
        quarry.seeds += tried;
        match ended {
            Ended::Found(how) => {
                self.found += 1;
                println!("planted {name} found, seeds {}: {how}", quarry.seeds);
            }
            Ended::Died { seed, how } if scenario::run(seed).is_ok() => {
                self.found += 1;
                println!("planted {name} found, seeds {}: seed {seed} {how}", quarry.seeds);
            }
            Ended::Died { .. } => self.waiting.push_back(quarry),
            Ended::Missed { reached } => {
                quarry.reached += reached;
                self.waiting.push_back(quarry);
            }
            Ended::Broken(status) => {
                println!("planted {name}: a process ended with {status}; its seeds are tried again");
                self.broken += 1;
                quarry.next_seed = self.options.seed + quarry.seeds;
                self.waiting.push_back(quarry);
            }
        }
    }
}

/// Seeds tried, and what came of them.
fn read_end(text: &str, status: ExitStatus) -> (u64, Ended) {
    let at: Vec<u64> =
        text.lines().filter_map(|line| line.strip_prefix("at ")?.split(' ').next()?.parse().ok()).collect();
    for line in text.lines() {
        if let Some(found) = line.strip_prefix("found ") {
            return (at.len() as u64, Ended::Found(format!("seed {found}")));
        }
        if let Some(reached) = line.strip_prefix("missed ").and_then(|reached| reached.parse().ok()) {
            return (at.len() as u64, Ended::Missed { reached });
        }
    }
    let is = |signal: Signal| status.signal() == Some(signal.as_raw());
    match at.last() {
        Some(seed) if is(Signal::XCPU) => (at.len() as u64, Ended::Died { seed: *seed, how: "[hang] does not end" }),
        Some(seed) if is(Signal::ABORT) || is(Signal::SEGV) => {
            (at.len() as u64, Ended::Died { seed: *seed, how: "[panic] took all memory or stack" })
        }
        _ => (0, Ended::Broken(status)),
    }
}

/// CPU seconds that a process told of.
fn spent(text: &str) -> f64 {
    let told = text.lines().filter_map(|line| match line.split_once(' ')? {
        ("cpu", seconds) => seconds.parse().ok(),
        ("at", rest) => rest.split(' ').nth(1)?.parse().ok(),
        _ => None,
    });
    told.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(text: &str, raw: i32) -> (u64, Ended) {
        read_end(text, ExitStatus::from_raw(raw))
    }

    #[test]
    fn what_processes_say_is_read_as_it_was_meant() {
        let (tried, found) = ended("at 3 0.10\nat 4 0.20\nfound 4 [contents] x\ncpu 0.50\n", 0);
        assert!(tried == 2 && matches!(found, Ended::Found(how) if how == "seed 4 [contents] x"));
        assert!(matches!(ended("at 3 0.1\nmissed 17\ncpu 0.2\n", 0), (1, Ended::Missed { reached: 17 })));
        let hang = Signal::XCPU.as_raw();
        assert!(matches!(ended("at 3 0.1\nat 9 0.2\n", hang), (2, Ended::Died { seed: 9, .. })));
        assert!(matches!(ended("at 3 0.1\n", Signal::KILL.as_raw()), (0, Ended::Broken(_))), "nobody's fault");
        assert_eq!(spent("at 3 0.10\nat 4 7.20\n"), 7.2);
    }
}
