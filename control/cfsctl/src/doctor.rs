//! What this machine has, what ClaudeFS uses of it, and the command that would improve it.
//!
//! [`Machine`] is read from /proc, /sys and /dev below any directory, and what no file tells is
//! [`Probed`]; `findings` makes sentences of both and looks at nothing itself. Nothing is changed, and no
//! device but /dev/fuse is opened. What can't be read or understood is `unknown`, never an error.

mod files;
mod findings;
mod machine;
mod nvme;
mod probed;
#[cfg(test)]
mod tests;

pub use probed::Probed;

use machine::Machine;
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
pub struct Report {
    /// Whether ClaudeFS can run here.
    pub runs: bool,
    /// Why not.
    pub reasons: Vec<String>,
    pub findings: Vec<Finding>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub subject: String,
    pub state: State,
    /// What is there.
    pub found: String,
    /// What this version makes of it.
    pub used: String,
    /// What to type, or to give the kernel.
    pub improve: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// It works, and could work better.
    Improvable,
    /// Nothing of this version uses it.
    Unused,
    /// It could not be read.
    Unknown,
    /// ClaudeFS cannot run.
    Prevents,
}

/// `root`: where /proc, /sys and /dev are.
pub fn examine(root: &Path, probed: Probed) -> Report {
    report(&Machine::read(root), &probed)
}

fn report(machine: &Machine, probed: &Probed) -> Report {
    let findings = findings::of(machine, probed);
    let preventing = findings.iter().filter(|finding| finding.state == State::Prevents);
    let reasons: Vec<String> = preventing.map(|finding| format!("{}: {}", finding.subject, finding.found)).collect();
    Report { runs: reasons.is_empty(), reasons, findings }
}
