//! Which implementation does the arithmetic.

use std::fmt;

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
