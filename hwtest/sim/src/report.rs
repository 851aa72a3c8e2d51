//! What a seed's run ends with.

use std::fmt;

/// Which check failed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Checker {
    /// An operation answered something else than the model.
    Reply,
    /// A file's bytes are no legal state.
    Contents,
    /// Names, attributes or extended attributes are no legal state.
    Tree,
    /// `check` found problems, or redundancy that repair did not restore.
    Check,
    /// A target broke the contract of its verbs.
    Store,
    /// The node did not start again.
    Restart,
    /// Deleting everything did not give the space back.
    Space,
    /// Two clients held what only one may hold.
    Exclusion,
    /// Records appended by several clients were lost, repeated or torn.
    Append,
    /// Something went on for ever.
    Hang,
    /// The code under test panicked.
    Panic,
}

impl fmt::Display for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Checker::Reply => "reply",
            Checker::Contents => "contents",
            Checker::Tree => "tree",
            Checker::Check => "check",
            Checker::Store => "store",
            Checker::Restart => "restart",
            Checker::Space => "space",
            Checker::Exclusion => "exclusion",
            Checker::Append => "append",
            Checker::Hang => "hang",
            Checker::Panic => "panic",
        };
        f.write_str(name)
    }
}

/// A check that failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("[{checker}] {detail}")]
pub struct Violation {
    pub checker: Checker,
    pub detail: String,
}

impl Violation {
    pub fn new(checker: Checker, detail: impl Into<String>) -> Violation {
        Violation { checker, detail: detail.into() }
    }
}

/// What was inflicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Toll {
    /// Of the node's process.
    pub process_crashes: u64,
    pub power_cuts: u64,
    /// Those of them that came while operations or writes to a disk were under way.
    pub power_cuts_at_work: u64,
    pub client_deaths: u64,
    /// Of disks: lost, torn, misdirected and refused writes, failed and falsified reads, places
    /// where bytes changed, whole losses.
    pub disk_faults: u64,
}

impl Toll {
    pub fn add(&mut self, other: Toll) {
        self.process_crashes += other.process_crashes;
        self.power_cuts += other.power_cuts;
        self.power_cuts_at_work += other.power_cuts_at_work;
        self.client_deaths += other.client_deaths;
        self.disk_faults += other.disk_faults;
    }
}

impl fmt::Display for Toll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Toll { process_crashes, power_cuts, power_cuts_at_work, client_deaths, disk_faults } = self;
        write!(f, "{power_cuts} power cuts ({power_cuts_at_work} of a node at work), ")?;
        write!(f, "{process_crashes} process crashes, ")?;
        write!(f, "{client_deaths} client deaths, {disk_faults} disk faults")
    }
}

/// What a clean run did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    pub operations: u64,
    pub toll: Toll,
    /// Over every scheduling decision and every device and network operation.
    pub trace_hash: u64,
    /// Over every operation's answer.
    pub digest: u64,
}

/// A seed that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub seed: u64,
    pub violation: Violation,
    /// The last operations and events before it, oldest first.
    pub history: Vec<String>,
    /// Operations until then.
    pub operations: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {}", self.seed, self.violation)
    }
}
