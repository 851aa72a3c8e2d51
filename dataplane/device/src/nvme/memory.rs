//! The accesses to memory that a device shares, and the fences that order them. With the feature `loom`
//! they are those of a model in which every order is tried ([`super::queue`], `protocol_tests`).

#[cfg(feature = "loom")]
mod modelled;
#[cfg(not(feature = "loom"))]
mod plain;

#[cfg(feature = "loom")]
pub(super) use modelled::*;
#[cfg(not(feature = "loom"))]
pub(super) use plain::*;
