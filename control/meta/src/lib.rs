//! ClaudeFS metadata: the namespace, inodes, extents, leases and locks of one shard, and the
//! service that puts them behind a Raft group.
//!
//! [`state`] is a pure function: an ordered key-value store and a log entry in, a batch of
//! writes and a reply out. It never reads a clock, draws no randomness, and knows neither Raft
//! nor the network. The service around it resolves all that into log entries, keeps read leases
//! in memory and drives what spans shards.
//!
//! Start at [`state::apply`].
#![forbid(unsafe_code)]

pub mod service;
pub mod state;
