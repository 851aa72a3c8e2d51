//! One storage node, assembled: the only place where the data plane and the control plane
//! meet. The program `cfs` runs a [`node::Node`] on real seams, the simulation on simulated
//! ones; nothing in [`node`] knows the difference.
//!
//! Start at [`node::Node::start`]; [`format`] creates a cluster, [`membership`] knows
//! its devices, [`service`] sorts requests,
//! [`background`] says when the movers run, [`admin`] answers `cfsctl`.
#![forbid(unsafe_code)]

pub mod admin;
pub mod background;
pub mod format;
pub mod membership;
pub mod node;
pub mod registrar;
pub mod replicas;
pub mod service;
mod targets;
