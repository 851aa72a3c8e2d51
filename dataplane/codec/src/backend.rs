//! Which implementation does the arithmetic.

use std::fmt;

use crate::simd;

/// An implementation of the code. All give the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Byte by byte through logarithm tables: the oracle of the tests.
    Scalar,
    /// The widest vector instructions this CPU has; plain loops where it has none we know.
    Simd,
    /// Intel's ISA-L; needs feature `isal` and libisal when building.
    IsaL,
}

impl Backend {
    /// The backends that work in this process, slowest first. Never empty.
    pub fn available() -> Vec<Backend> {
        let mut backends = vec![Backend::Scalar, Backend::Simd];
        if Backend::IsaL.is_available() {
            backends.push(Backend::IsaL);
        }
        backends
    }

    /// The fastest on this machine: our vector code, which `examples/ec_bench.rs` shows ahead of
    /// ISA-L 2.30 from AVX2 up (1.1 times by AVX2, 1.5 by AVX-512, 1.9 with GFNI, which that
    /// release does not use; 4+2 of 64 KiB). ISA-L has vectors on CPUs where we have none.
    pub fn fastest() -> Backend {
        if simd::Level::detect() == simd::Level::Plain && Backend::IsaL.is_available() {
            Backend::IsaL
        } else {
            Backend::Simd
        }
    }

    /// The instructions that [`Backend::Simd`] uses on this CPU; `None` where it has plain loops only.
    pub fn vector_instructions() -> Option<&'static str> {
        simd::Level::detect().instructions()
    }

    pub fn is_available(self) -> bool {
        match self {
            Backend::Scalar | Backend::Simd => true,
            Backend::IsaL => cfg!(isal_found),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Scalar => "scalar",
            Backend::Simd => "simd",
            Backend::IsaL => "isa-l",
        })
    }
}

#[cfg(all(test, feature = "isal"))]
mod tests {
    use super::*;

    /// The tests go over what is available: without the library they would pass and say nothing.
    #[test]
    fn a_build_with_the_feature_has_isa_l() {
        assert!(Backend::IsaL.is_available(), "built with feature isal, but pkg-config found no libisal");
    }
}
