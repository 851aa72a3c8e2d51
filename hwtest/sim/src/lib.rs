//! The whole cluster in one thread under one seed: a node on disks in memory, clients on a
//! network in memory, random POSIX operations, and every fault the seams can inject.
//!
//! It owns the [`model`] (what a file system answers), the [`workload`] (what programs do), the
//! [`world`] (disks, network, node, clients, and how they die), the [`scenario`] (which faults
//! when) and the [`checker`]s. It never knows which bug it is looking for: every check holds for
//! a correct cluster under any seed, and a failing seed replays exactly.
//!
//! Start at [`scenario::run`]; the program `torture` runs it for many seeds. Beside it, [`fuzz`] feeds
//! decoders with bytes that are nearly right.
#![forbid(unsafe_code)]

pub mod access;
pub mod checker;
pub mod content;
pub mod draw;
pub mod fuzz;
mod games;
pub mod history;
pub mod ledger;
pub mod model;
pub mod observe;
pub mod op;
mod perform;
pub mod plan;
#[cfg(feature = "planted")]
pub mod planted;
pub mod report;
pub mod ruin;
pub mod scenario;
mod setup;
pub mod sideline;
pub mod tuning;
pub mod workload;
pub mod world;
