//! A coefficient matrix made ready for one backend, and the walk over sources of unequal length.

use smallvec::SmallVec;

use crate::backend::Backend;
use crate::erasure::CodecError;
use crate::geometry::{MAX_DATA, MAX_PARITY};
#[cfg(isal_found)]
use crate::isal;
use crate::matrix::Matrix;
use crate::{scalar, simd};

/// One source over one stretch: `bytes` is as long as each output of that stretch.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    /// The column of the matrix that holds this source's coefficients.
    pub(crate) column: usize,
    pub(crate) bytes: &'a [u8],
}

/// `output[row] = Σ matrix[row][column] · source[column]`, made ready for one backend.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    Scalar(Matrix),
    Simd(simd::Plan),
    #[cfg(isal_found)]
    IsaL(isal::Plan),
}

impl Plan {
    pub(crate) fn new(backend: Backend, matrix: Matrix) -> Result<Plan, CodecError> {
        match backend {
            Backend::Scalar => Ok(Plan::Scalar(matrix)),
            Backend::Simd => Ok(Plan::Simd(simd::Plan::new(simd::Level::detect(), &matrix))),
            #[cfg(isal_found)]
            Backend::IsaL => Ok(Plan::IsaL(isal::Plan::new(matrix))),
            #[cfg(not(isal_found))]
            Backend::IsaL => Err(CodecError::BackendUnavailable { backend }),
        }
    }

    /// Fills the outputs, which must be equally long. A source shorter than that reads as padded
    /// with zeros; what it has beyond is ignored.
    ///
    /// A padded source adds nothing past its end, so the outputs are cut into stretches over which
    /// the set of sources that have not ended is constant: nothing is copied and no zero is coded.
    pub(crate) fn apply(&self, sources: &[&[u8]], outputs: &mut [&mut [u8]]) {
        let Some(len) = outputs.first().map(|output| output.len()) else { return };
        assert!(outputs.iter().all(|output| output.len() == len), "outputs differ in length");
        let mut start = 0;
        while start < len {
            let running = || sources.iter().enumerate().filter(|(_, source)| source.len() > start);
            let Some(end) = running().map(|(_, source)| source.len().min(len)).min() else {
                for output in outputs {
                    output[start..].fill(0);
                }
                return;
            };
            let stretch: SmallVec<[Source<'_>; MAX_DATA]> =
                running().map(|(column, source)| Source { column, bytes: &source[start..end] }).collect();
            let mut windows: SmallVec<[&mut [u8]; MAX_PARITY]> =
                outputs.iter_mut().map(|output| &mut output[start..end]).collect();
            match self {
                Plan::Scalar(matrix) => scalar::apply(matrix, &stretch, &mut windows),
                Plan::Simd(plan) => plan.apply(&stretch, &mut windows),
                #[cfg(isal_found)]
                Plan::IsaL(plan) => plan.apply(&stretch, &mut windows),
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::matrix::parity_matrix;

    /// Sources that all end before the outputs leave zeros behind them, not what was there before.
    #[test]
    fn outputs_beyond_every_source_are_zero_and_bytes_beyond_the_outputs_are_ignored() {
        let matrix = parity_matrix(Geometry::new(3, 1).unwrap());
        let sources: [&[u8]; 3] = [&[1; 5], &[2; 70], &[]];
        for backend in Backend::available() {
            let plan = Plan::new(backend, matrix.clone()).unwrap();
            let mut long = [0xa5; 100];
            plan.apply(&sources, &mut [&mut long[..]]);
            assert_ne!(long[..70], [0; 70], "{backend}");
            assert_eq!(long[70..], [0; 30], "{backend}");
            let mut short = [0xa5; 7];
            plan.apply(&sources, &mut [&mut short[..]]);
            assert_eq!(short, long[..7], "{backend}");
        }
    }
}
