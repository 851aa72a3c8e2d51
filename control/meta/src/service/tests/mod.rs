//! Stories about the service: one node, clients, crashes, on virtual time.

mod client;
mod cluster;
mod coherence;
mod cross_shard;
mod golden;
mod locks;
mod on_raft;
#[cfg(feature = "planted")]
mod planted;
mod replicas;
mod requests;
