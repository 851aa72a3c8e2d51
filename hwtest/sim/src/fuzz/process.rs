//! The process in which a target is fuzzed, with its limits, and the one that waits for it and
//! says what came of it.

use super::{Fault, TARGETS, Trial, build_of};
use cfs_reactor::Clock;
use cfs_reactor::clock::{KernelClock, SplitMix64};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// CPU time after which a round counts as hanging: many times what the slowest takes in a
/// development build.
const ROUND_CPU_SECONDS: u64 = 15;
/// Address space of the process: many times what a clean one takes, so that a length off the
/// wire or the disk that is believed ends it.
const MEMORY_MAX: u64 = 2 << 30;
/// Bytes of an input that are printed.
const SHOWN_MAX: usize = 4096;

/// How to fuzz.
#[derive(clap::Args)]
pub struct FuzzOptions {
    /// Go on for so long, with each target for its part.
    #[arg(long, conflicts_with = "rounds")]
    minutes: Option<f64>,
    /// Rounds for each target; one feeds from one to a hundred inputs, by what an input costs.
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// The first round's seed; every further round has the next.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Fuzz these targets only.
    #[arg(long = "target")]
    targets: Vec<String>,
    /// Fuzz the one target in this process.
    #[arg(long, hide = true, requires = "targets")]
    inside: bool,
    /// Print every input before it is fed.
    #[arg(long, hide = true)]
    show: bool,
    /// CPU time after which a round counts as hanging.
    #[arg(long, hide = true, default_value_t = ROUND_CPU_SECONDS)]
    round_cpu_seconds: u64,
}

/// What a target's process ended with.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Ended {
    Passed(String),
    Failed {
        seed: u64,
        reason: String,
        /// As it was printed, if it was.
        input: Option<String>,
    },
    /// Killed from outside, or never begun.
    Broken(ExitStatus),
}

static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// What panicked since this was asked last.
pub(super) fn take_panic() -> Option<String> {
    PANIC.lock().ok().and_then(|mut panic| panic.take())
}

/// Prints an input.
pub(super) fn show(what: &str, input: &[u8]) {
    let hex = input.iter().take(SHOWN_MAX).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let more = if input.len() > SHOWN_MAX { "…" } else { "" };
    println!("input {what}, {} bytes: {hex}{more}", input.len());
    let _ = std::io::stdout().flush();
}

fn cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

impl FuzzOptions {
    pub fn run(&self) -> ExitCode {
        let listed = || TARGETS.iter().map(|(name, _)| *name);
        if let Some(unknown) = self.targets.iter().find(|name| build_of(name).is_none()) {
            eprintln!("no target is called {unknown}; there are {}", listed().collect::<Vec<_>>().join(", "));
            return ExitCode::FAILURE;
        }
        let chosen: Vec<&str> = match self.targets.is_empty() {
            true => listed().collect(),
            false => self.targets.iter().map(String::as_str).collect(),
        };
        if self.inside {
            return self.fuzz_here(chosen[0]);
        }
        let mut clean = true;
        for name in &chosen {
            let part = self.minutes.map(|minutes| minutes / chosen.len() as f64);
            match self.fuzz_in_child(name, part) {
                Ok(passed) => clean &= passed,
                Err(error) => {
                    eprintln!("no process can be started: {error}");
                    return ExitCode::FAILURE;
                }
            }
        }
        if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Runs rounds in this process and prints what came of them, one line each.
    fn fuzz_here(&self, name: &str) -> ExitCode {
        // Where limits can't be set, targets go without.
        let _ = setrlimit(Resource::As, Rlimit { current: Some(MEMORY_MAX), maximum: Some(MEMORY_MAX) });
        let Some(build) = build_of(name) else { return ExitCode::FAILURE };
        let target = build();
        std::panic::set_hook(Box::new(|panic| {
            if let Ok(mut first) = PANIC.lock() {
                first.get_or_insert_with(|| panic.to_string().replace('\n', " "));
            }
        }));
        let clock = KernelClock::new();
        let deadline = self.minutes.map(|minutes| clock.now() + Duration::from_secs_f64(minutes * 60.0));
        let mut trial = Trial::new(self.show);
        let mut rounds = 0;
        while deadline.map_or(rounds < self.rounds, |deadline| clock.now() < deadline) {
            let seed = self.seed.wrapping_add(rounds);
            rounds += 1;
            let until = cpu_seconds() as u64 + self.round_cpu_seconds;
            let _ = setrlimit(Resource::Cpu, Rlimit { current: Some(until), maximum: None });
            println!("at {seed}");
            let _ = std::io::stdout().flush();
            target.round(&mut SplitMix64::new(seed), &mut trial);
            if let Some(Fault { what, input, reason }) = &trial.fault {
                show(what, input);
                println!("failed {}", reason.replace('\n', " "));
                return ExitCode::FAILURE;
            }
        }
        let Trial { inputs, taken, .. } = trial;
        println!("passed {inputs} inputs in {rounds} rounds, {taken} of them taken, {:.1} CPU s", cpu_seconds());
        ExitCode::SUCCESS
    }

    fn fuzz_in_child(&self, name: &str, minutes: Option<f64>) -> std::io::Result<bool> {
        let extent = match minutes {
            Some(minutes) => ["--minutes".to_owned(), minutes.to_string()],
            None => ["--rounds".to_owned(), self.rounds.to_string()],
        };
        let ended = match self.run_child(name, self.seed, &extent)? {
            // It died of its input: once more, with every input printed before it is fed.
            Ended::Failed { seed, reason, input: None } => {
                match self.run_child(name, seed, &["--show".to_owned(), "--rounds=1".to_owned()])? {
                    Ended::Failed { input, .. } => Ended::Failed { seed, reason, input },
                    _ => Ended::Failed { seed, reason, input: None },
                }
            }
            ended => ended,
        };
        match ended {
            Ended::Passed(told) => println!("{name}: {told}"),
            Ended::Failed { seed, reason, input } => {
                println!("{name}: FAILED: {reason}");
                println!("{name}: input {}", input.as_deref().unwrap_or("unknown: the round fails only after others"));
                println!("replay: scripts/fuzz --target {name} --rounds 1 --seed {seed}");
                return Ok(false);
            }
            Ended::Broken(status) => {
                println!("{name}: the process ended with {status} and without a word");
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn run_child(&self, name: &str, seed: u64, extent: &[String]) -> std::io::Result<Ended> {
        let cpu_seconds = self.round_cpu_seconds;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--inside", "--target", name, "--seed", &seed.to_string()]).args(extent);
        command.args(["--round-cpu-seconds", &cpu_seconds.to_string()]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut said = Said::default();
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).lines() {
                said.hear(&line?);
            }
        }
        let status = child.wait()?;
        Ok(said.end(status, cpu_seconds))
    }
}

/// What a child has printed so far.
#[derive(Default)]
struct Said {
    at: Option<u64>,
    input: Option<String>,
    failed: Option<String>,
    passed: Option<String>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("at", seed)) => (self.at, self.input) = (seed.parse().ok(), None),
            Some(("input", input)) => self.input = Some(input.to_owned()),
            Some(("failed", reason)) => self.failed = Some(reason.to_owned()),
            Some(("passed", told)) => self.passed = Some(told.to_owned()),
            _ => {}
        }
    }

    fn end(self, status: ExitStatus, cpu_seconds: u64) -> Ended {
        let Said { at, input, failed, passed } = self;
        if let Some(told) = passed.filter(|_| status.success()) {
            return Ended::Passed(told);
        }
        let is = |signal: Signal| status.signal() == Some(signal.as_raw());
        let died = match failed {
            Some(reason) => Some(reason),
            None if is(Signal::XCPU) => Some(format!("no end after {cpu_seconds} CPU s")),
            None if is(Signal::ABORT) || is(Signal::SEGV) => Some("took all memory or stack".to_owned()),
            None => None,
        };
        match (at, died) {
            (Some(seed), Some(reason)) => Ended::Failed { seed, reason, input },
            _ => Ended::Broken(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(lines: &[&str], raw: i32) -> Ended {
        let mut said = Said::default();
        lines.iter().for_each(|line| said.hear(line));
        said.end(ExitStatus::from_raw(raw), 15)
    }

    #[test]
    fn what_a_process_says_is_read_as_it_was_meant() {
        let told = "80 inputs in 2 rounds";
        assert_eq!(ended(&["at 3", "at 4", &format!("passed {told}")], 0), Ended::Passed(told.to_owned()));
        let failed = |seed, reason: &str, input: Option<&str>| Ended::Failed {
            seed,
            reason: reason.to_owned(),
            input: input.map(str::to_owned),
        };
        let lines = ["at 3", "at 4", "input frame, 2 bytes: 4346", "failed panicked: x"];
        assert_eq!(ended(&lines, 1 << 8), failed(4, "panicked: x", Some("frame, 2 bytes: 4346")));
        let hang = Signal::XCPU.as_raw();
        assert_eq!(ended(&["at 9"], hang), failed(9, "no end after 15 CPU s", None));
        let shown = ["at 9", "input a, 1 bytes: 00", "input b, 1 bytes: 01"];
        assert_eq!(
            ended(&shown, Signal::ABORT.as_raw()),
            failed(9, "took all memory or stack", Some("b, 1 bytes: 01"))
        );
        let killed = ended(&["at 9"], Signal::KILL.as_raw());
        assert!(matches!(killed, Ended::Broken(_)), "nobody's fault: {killed:?}");
        assert!(matches!(ended(&[], 0), Ended::Broken(_)), "silence is no success");
    }
}
