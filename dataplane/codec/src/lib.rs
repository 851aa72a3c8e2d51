//! Erasure coding and checksums.
//!
//! This crate owns the arithmetic that turns k data shards into m parity shards and back, and the
//! CRC32C of payload pages. It works on byte slices: it does no I/O, keeps no state between calls,
//! knows nothing of segments or placement, and verifies nothing it is not asked to verify.
//!
//! Every backend gives the same bytes as ISA-L's `gf_gen_cauchy1_matrix` code over GF(2⁸) with
//! polynomial 0x11d, so shards written on one machine decode on any other. The tests hold each
//! backend against a slow oracle, byte for byte.
//!
//! Start at [`Erasure`]; the code matrix is in `matrix.rs`, the unequal lengths of shards are dealt
//! with once, in `plan.rs`, and the vector loops are in `simd/`. `unsafe` is confined to `simd/` and
//! `isal.rs`.

mod backend;
pub mod crc32c;
mod erasure;
mod geometry;
mod gf256;
#[cfg(isal_found)]
#[allow(unsafe_code, reason = "calls into libisal; the safety argument is at each call")]
mod isal;
mod matrix;
mod plan;
mod scalar;
#[allow(unsafe_code, reason = "vector loads and stores; bounds are asserted in each kernel")]
mod simd;

pub use backend::Backend;
pub use erasure::{CodecError, Erasure};
pub use geometry::{Geometry, GeometryError, MAX_DATA, MAX_PARITY};
