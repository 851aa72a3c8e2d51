//! Stories about the service: one node, clients, crashes, on virtual time.

mod client;
mod cluster;
mod coherence;
mod cross_shard;
mod locks;
mod requests;
