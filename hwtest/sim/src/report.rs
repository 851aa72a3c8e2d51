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
    /// Two runs of one seed differed.
    Trace,
}

impl fmt::Display for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Checker::Reply => "reply",
            Checker::Contents => "contents",
            Checker::Tree => "tree",
            Checker::Check => "check",
            Checker::Restart => "restart",
            Checker::Space => "space",
            Checker::Exclusion => "exclusion",
            Checker::Append => "append",
            Checker::Hang => "hang",
            Checker::Panic => "panic",
            Checker::Trace => "trace",
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

/// What a clean run did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    pub operations: u64,
    pub crashes: u64,
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
