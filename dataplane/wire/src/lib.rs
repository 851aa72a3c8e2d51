//! What crosses a wire or lands on a device: identifiers, limits, RPC frames and bodies,
//! and the contracts (traits without code) that let crates meet without knowing each other.
//!
//! This crate does no I/O (the tests' golden files aside), spawns nothing and reads no clock.
//! Every decoder here takes bytes it does not trust and answers with an error, never a panic.
//!
//! Start at [`ids`] for the vocabulary, [`frame`] for the 24-byte RPC header, [`meta`] for the
//! metadata operations, [`data`] for what moves file bytes, and [`blobs`] for the contract
//! between the store and everything that keeps its state in it.
#![forbid(unsafe_code)]

pub mod blobs;
pub mod body;
pub mod cluster;
pub mod data;
pub mod errno;
pub mod frame;
#[doc(hidden)]
pub mod golden;
pub mod ids;
pub mod limits;
pub mod meta;
pub mod offers;
pub mod packet;
pub mod planted;
pub mod policy;
pub mod time;

pub use errno::Errno;
pub use ids::*;
pub use policy::{Policy, PolicyError, PolicyUnkept};
pub use time::Timestamp;
