//! Consensus: many Raft groups in one node, over one log that lives on the node's targets.
//!
//! Owns the shared, group-committed log ([`log`]), the binding of openraft to our executor
//! ([`runtime`]) and the host that runs the groups, their network and their checkpoints
//! ([`host`]). It never opens a file, never reads a clock but through the executor, and never
//! looks into the commands it replicates: what they mean is the state machine's business.
//!
//! Start at [`host::RaftHost`], then [`log::SharedLog`]. The rules kept here are "where it
//! lives" and "log" of section 8 of the design: the log is cut only below the last synced
//! checkpoint, an answer never precedes durability, and a torn tail is told from corruption
//! by the durable mark that every batch carries.
#![forbid(unsafe_code)]

pub mod host;
pub mod log;
pub mod runtime;
pub mod types;

pub use host::{
    AppliedEntry, HostConfig, ProposeError, RaftHost, SnapshotSink, SnapshotSource, StateError, StateMachine,
};
pub use log::{LogConfig, LogError, RecoveryReport, SharedLog};
pub use types::Mark;
