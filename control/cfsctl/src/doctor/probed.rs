//! What no file tells: what the kernel answers this process, and what the CPU has.

use cfs_codec::Backend;
use cfs_codec::crc32c::crc32c_method;
use cfs_reactor::uring::{Ring, RingError};

/// Instructions by name, and whether this CPU has them.
pub type Instructions = Vec<(&'static str, bool)>;

pub struct Probed {
    /// Whether this process gets an io_uring.
    pub ring: Result<(), NoRing>,
    pub cpu: Cpu,
    /// Tells whether libfabric can be loaded, which takes a while and is asked where it matters only.
    pub has_libfabric: fn() -> bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoRing {
    /// By the sysctl, or by who confines this process.
    NotAllowed,
    Failed(String),
}

pub struct Cpu {
    /// Those that could code segments, on a CPU of this kind.
    pub coding: Instructions,
    pub checksums: Instructions,
    pub encryption: Instructions,
    /// What `codec = "auto"` chooses.
    pub codec: String,
    /// What it uses of `coding`; `None` if it goes byte by byte.
    pub vectors: Option<&'static str>,
    /// How crc-fast computes CRC32C.
    pub crc32c: String,
}

impl Probed {
    pub fn here() -> Probed {
        let ring = match Ring::new(1) {
            Ok(_) => Ok(()),
            Err(RingError::NotAllowed(_)) => Err(NoRing::NotAllowed),
            Err(other) => Err(NoRing::Failed(other.to_string())),
        };
        Probed { ring, cpu: Cpu::here(), has_libfabric: || cfs_fabric::ofi::library().is_ok() }
    }
}

impl Cpu {
    fn here() -> Cpu {
        let codec = Backend::fastest();
        // Not of ISA-L, which chooses by itself.
        let vectors = if codec == Backend::Simd { Backend::vector_instructions() } else { None };
        Cpu {
            coding: coding(),
            checksums: checksums(),
            encryption: encryption(),
            codec: codec.to_string(),
            vectors,
            crc32c: crc32c_method(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod instructions {
    use super::Instructions;
    use std::arch::is_x86_feature_detected as has;

    pub fn coding() -> Instructions {
        let avx512 = has!("avx512f") && has!("avx512bw");
        vec![("GFNI", has!("gfni")), ("AVX-512", avx512), ("AVX2", has!("avx2")), ("SSSE3", has!("ssse3"))]
    }

    pub fn checksums() -> Instructions {
        vec![
            ("VPCLMULQDQ", has!("vpclmulqdq")),
            ("AVX-512VL", has!("avx512vl")),
            ("PCLMULQDQ", has!("pclmulqdq")),
            ("SSE4.2", has!("sse4.2")),
        ]
    }

    pub fn encryption() -> Instructions {
        vec![("VAES", has!("vaes")), ("AES-NI", has!("aes"))]
    }
}

#[cfg(target_arch = "aarch64")]
mod instructions {
    use super::Instructions;
    use std::arch::is_aarch64_feature_detected as has;

    pub fn coding() -> Instructions {
        vec![("SVE", has!("sve")), ("NEON", has!("neon"))]
    }

    pub fn checksums() -> Instructions {
        vec![("SHA3", has!("sha3")), ("PMULL", has!("pmull")), ("CRC32", has!("crc"))]
    }

    pub fn encryption() -> Instructions {
        vec![("AES", has!("aes"))]
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod instructions {
    use super::Instructions;

    pub fn coding() -> Instructions {
        Vec::new()
    }

    pub fn checksums() -> Instructions {
        Vec::new()
    }

    pub fn encryption() -> Instructions {
        Vec::new()
    }
}

use instructions::{checksums, coding, encryption};
