//! Bindings to the erasure-code functions of Intel's ISA-L (`libisal`, BSD licence).
//!
//! This crate binds and links, nothing else: no safe wrapper, no policy. The one caller is
//! `cfs-codec`'s `isal` module, which owns the safety argument.
//!
//! `build.rs` looks for the library by pkg-config. Where it is absent the crate is empty apart from
//! [`FOUND`], the build goes on with a warning, and callers see `DEP_ISAL_FOUND` unset.
//!
//! `src/bindings.rs` is generated and committed; `cargo check -p isa-l-sys --features bindgen`
//! writes it anew from the installed header.

#[cfg(isal_found)]
#[allow(unsafe_code, reason = "foreign function declarations")]
#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals, reason = "C names, generated")]
#[rustfmt::skip]
mod bindings;

#[cfg(isal_found)]
pub use bindings::*;

/// Whether the library was there when this crate was built.
pub const FOUND: bool = cfg!(isal_found);
