#![forbid(unsafe_code)]
pub mod runtime;
pub mod types;
pub mod log;
