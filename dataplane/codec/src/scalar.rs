//! The slow path: one product at a time. Short enough to be read as the definition of the code.

use crate::gf256;
use crate::matrix::Matrix;
use crate::plan::Source;

/// Sets `outputs[row]` to the sum of `matrix[row][source.column]` times each source.
pub(crate) fn apply(matrix: &Matrix, sources: &[Source<'_>], outputs: &mut [&mut [u8]]) {
    for (row, output) in outputs.iter_mut().enumerate() {
        output.fill(0);
        for source in sources {
            let coefficient = matrix.get(row, source.column);
            for (sum, &byte) in output.iter_mut().zip(source.bytes) {
                *sum ^= gf256::mul(coefficient, byte);
            }
        }
    }
}
