//! Bindings to libfabric (OpenFabrics Interfaces, BSD licence), which is loaded when it is first asked for.
//!
//! This crate binds and loads, nothing else: no safe wrapper, no policy. The one caller is `cfs-fabric`'s
//! `ofi` module, which owns the safety argument. Nothing is linked, so that one binary runs with and without
//! the library; see [`functions`].
//!
//! `src/bindings.rs` is generated and committed; `cargo check -p libfabric-sys --features bindgen` writes it
//! anew from the installed headers. Most of libfabric is static inline functions over tables of operations,
//! which a library does not export: they are in [`inline`].

#[allow(unsafe_code, reason = "foreign function declarations")]
#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals, reason = "C names, generated")]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, reason = "generated")]
#[rustfmt::skip]
mod bindings;
#[allow(unsafe_code, reason = "calls through the library's tables of operations")]
#[allow(clippy::too_many_arguments, reason = "as libfabric has it")]
pub mod inline;

pub use bindings::*;
pub use inline::*;

use std::sync::OnceLock;

/// By its name of the interface that the bindings are of; the system's loader finds it.
pub const LIBRARY: &str = "libfabric.so.1";

/// What the bindings speak: the version of the headers they were made from.
pub const API_VERSION: u32 = FI_MAJOR_VERSION << 16 | FI_MINOR_VERSION;

/// Why there is no libfabric to be had.
#[derive(Debug)]
pub enum LoadError {
    /// The library or one of its functions was not found.
    Absent(libloading::Error),
    /// It is older than the bindings.
    Old { found: u32 },
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LoadError::Absent(error) => write!(f, "libfabric is not installed (apt-get install libfabric1): {error}"),
            LoadError::Old { found } => write!(
                f,
                "libfabric {}.{} is too old: {FI_MAJOR_VERSION}.{FI_MINOR_VERSION} is needed",
                found >> 16,
                found & 0xffff
            ),
        }
    }
}

impl std::error::Error for LoadError {}

/// The functions that libfabric exports. It is loaded by the first call and stays.
pub fn functions() -> Result<&'static Functions, &'static LoadError> {
    static FUNCTIONS: OnceLock<Result<Functions, LoadError>> = OnceLock::new();
    FUNCTIONS.get_or_init(load).as_ref()
}

#[allow(unsafe_code, reason = "loads the library")]
fn load() -> Result<Functions, LoadError> {
    // SAFETY: libfabric's constructor reads its configuration and may be run at any time; the functions have
    // the types of the headers for every release of this interface name.
    let functions = unsafe { Functions::new(LIBRARY) }.map_err(LoadError::Absent)?;
    // SAFETY: it takes nothing and touches nothing.
    let found = unsafe { functions.fi_version() };
    if found < API_VERSION { Err(LoadError::Old { found }) } else { Ok(functions) }
}
