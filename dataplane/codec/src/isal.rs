//! The code by ISA-L, the safe side of `isa-l-sys`.

use std::borrow::Cow;
use std::ffi::c_int;

use smallvec::SmallVec;

use crate::geometry::{MAX_DATA, MAX_PARITY};
use crate::matrix::Matrix;
use crate::plan::Source;

/// Bytes of expanded table per coefficient, as `ec_init_tables` documents.
const TABLE_BYTES: usize = 32;

/// Most bytes of one call, whose length is a C `int`; a multiple of every vector width.
const CALL_BYTES_MAX: usize = 1 << 30;

/// Tables for two coefficients, on a cache line of their own: the library reads them all through
/// its loop, and no read should straddle two lines.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct TableLine([u8; 2 * TABLE_BYTES]);

/// A matrix with its tables.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    matrix: Matrix,
    tables: Vec<TableLine>,
}

impl Plan {
    pub(crate) fn new(matrix: Matrix) -> Plan {
        let tables = expand(&matrix);
        Plan { matrix, tables }
    }

    /// Sets each output to its sum over the sources; all slices must be equally long.
    pub(crate) fn apply(&self, sources: &[Source<'_>], outputs: &mut [&mut [u8]]) {
        let len = outputs.first().map_or(0, |output| output.len());
        assert!(outputs.iter().all(|output| output.len() == len), "outputs differ in length");
        assert!(sources.iter().all(|source| source.bytes.len() == len), "sources differ in length");
        assert_eq!(outputs.len(), self.matrix.rows(), "one output per row");
        let tables = self.tables_of(sources);
        assert!(size_of_val(&tables[..]) >= TABLE_BYTES * sources.len() * outputs.len());
        for start in (0..len).step_by(CALL_BYTES_MAX) {
            let end = len.min(start + CALL_BYTES_MAX);
            // The C interface lacks const: sources and tables are only read.
            let mut inputs: SmallVec<[*mut u8; MAX_DATA]> =
                sources.iter().map(|source| source.bytes[start..end].as_ptr().cast_mut()).collect();
            let mut coded: SmallVec<[*mut u8; MAX_PARITY]> =
                outputs.iter_mut().map(|output| output[start..end].as_mut_ptr()).collect();
            // SAFETY: both pointer arrays have as many entries as the counts say, each entry is
            // valid for `end - start` bytes by the slicing above, the outputs are borrowed
            // exclusively and so overlap nothing, and the tables have the size asserted above.
            unsafe {
                isa_l_sys::ec_encode_data(
                    (end - start) as c_int,
                    inputs.len() as c_int,
                    coded.len() as c_int,
                    tables.as_ptr().cast_mut().cast(),
                    inputs.as_mut_ptr(),
                    coded.as_mut_ptr(),
                );
            }
        }
        clear_upper_halves();
    }

    /// The tables of the columns that are among the sources. The tables' inner layout is the
    /// library's own affair, so a part is expanded anew instead of being cut out.
    fn tables_of(&self, sources: &[Source<'_>]) -> Cow<'_, [TableLine]> {
        if sources.iter().map(|source| source.column).eq(0..self.matrix.columns()) {
            return Cow::Borrowed(&self.tables);
        }
        Cow::Owned(expand(&self.matrix.select_columns(sources.iter().map(|source| source.column))))
    }
}

/// Clears the upper halves of the vector registers. ISA-L (2.30) returns with them in use, which
/// slows every SSE instruction that the caller runs afterwards, up to the next such clearing.
fn clear_upper_halves() {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        #[target_feature(enable = "avx")]
        fn clear() {
            std::arch::x86_64::_mm256_zeroupper();
        }
        // SAFETY: the CPU has AVX. The registers hold nothing across a call by the C ABI.
        unsafe { clear() }
    }
}

fn expand(matrix: &Matrix) -> Vec<TableLine> {
    let lines = (matrix.rows() * matrix.columns()).div_ceil(2);
    let mut tables = vec![TableLine([0; 2 * TABLE_BYTES]); lines];
    // SAFETY: the matrix has rows × columns cells and the tables at least 32 bytes for each, as
    // `ec_init_tables` asks; the cells are only read.
    unsafe {
        isa_l_sys::ec_init_tables(
            matrix.columns() as c_int,
            matrix.rows() as c_int,
            matrix.cells().as_ptr().cast_mut(),
            tables.as_mut_ptr().cast(),
        );
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::gf256;
    use crate::matrix::parity_matrix;

    #[test]
    fn products_and_inverses_are_those_of_the_library() {
        for a in 0..=255 {
            for b in 0..=255 {
                // SAFETY: a pure function of two bytes.
                assert_eq!(gf256::mul(a, b), unsafe { isa_l_sys::gf_mul(a, b) }, "{a} * {b}");
            }
            if a != 0 {
                // SAFETY: a pure function of a byte.
                assert_eq!(gf256::inv(a), unsafe { isa_l_sys::gf_inv(a) }, "1 / {a}");
            }
        }
    }

    #[test]
    fn the_code_matrix_is_that_of_the_library_for_every_geometry() {
        for (k, m) in (1..=32u8).flat_map(|k| (0..=8u8).map(move |m| (k, m))) {
            let geometry = Geometry::new(k, m).unwrap();
            let mut theirs = vec![0; geometry.total() * geometry.data()];
            // SAFETY: the buffer has total × data cells.
            unsafe {
                isa_l_sys::gf_gen_cauchy1_matrix(
                    theirs.as_mut_ptr(),
                    geometry.total() as c_int,
                    geometry.data() as c_int,
                );
            }
            let (identity, parity) = theirs.split_at(geometry.data() * geometry.data());
            for (i, &cell) in identity.iter().enumerate() {
                assert_eq!(cell, u8::from(i / geometry.data() == i % geometry.data()));
            }
            assert_eq!(parity_matrix(geometry).cells(), parity, "{geometry}");
        }
    }

    #[test]
    fn the_inverse_is_that_of_the_library() {
        let square = parity_matrix(Geometry::new(8, 8).unwrap());
        let (mut input, mut theirs) = (square.cells().to_vec(), vec![0; 64]);
        // SAFETY: both buffers have 8 × 8 cells.
        let singular = unsafe { isa_l_sys::gf_invert_matrix(input.as_mut_ptr(), theirs.as_mut_ptr(), 8) };
        assert_eq!(singular, 0);
        assert_eq!(square.inverse().unwrap().cells(), theirs);
    }
}
