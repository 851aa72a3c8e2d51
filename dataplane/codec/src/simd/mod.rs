//! The code by vector instructions, chosen at run time.
//!
//! A kernel makes up to [`ROWS_MAX`] outputs in one pass over the sources: each source byte is
//! loaded once and multiplied for all outputs while the sums stay in registers. `coefficient.rs`
//! has the tables, `x86.rs` the kernels, all from one loop; this file cuts the work into pieces
//! that kernels accept.

mod coefficient;
#[cfg(target_arch = "x86_64")]
mod x86;

use smallvec::SmallVec;

use crate::geometry::{MAX_DATA, MAX_PARITY};
use crate::matrix::Matrix;
use crate::plan::Source;
use coefficient::Coefficient;

/// Most outputs of one pass of any kernel.
const ROWS_MAX: usize = MAX_PARITY;

/// The widest vector of any level, in bytes.
const WIDTH_MAX: usize = 64;

/// A set of instructions with a kernel of its own, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Table look-ups, byte by byte, in safe Rust.
    Plain,
    #[cfg(target_arch = "x86_64")]
    Ssse3,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    GfniAvx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    GfniAvx512,
}

impl Level {
    /// The fastest level this CPU has.
    pub(crate) fn detect() -> Level {
        *Level::supported().last().unwrap_or(&Level::Plain)
    }

    /// The levels this CPU has, slowest first.
    fn supported() -> SmallVec<[Level; 6]> {
        let mut levels = SmallVec::from_slice(&[Level::Plain]);
        #[cfg(target_arch = "x86_64")]
        levels.extend(x86::supported());
        levels
    }

    pub(crate) fn instructions(self) -> Option<&'static str> {
        match self {
            Level::Plain => None,
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 => Some("SSSE3"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Some("AVX2"),
            #[cfg(target_arch = "x86_64")]
            Level::GfniAvx2 => Some("AVX2 and GFNI"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Some("AVX-512"),
            #[cfg(target_arch = "x86_64")]
            Level::GfniAvx512 => Some("AVX-512 and GFNI"),
        }
    }

    /// Bytes that a kernel of this level takes at once; it refuses less.
    fn width(self) -> usize {
        match self {
            Level::Plain => 1,
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 => 16,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::GfniAvx2 => 32,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::GfniAvx512 => 64,
        }
    }

    /// Outputs per pass. With 16 registers, two sums per output leave room for four; AVX-512 has 32.
    fn rows_per_pass(self) -> usize {
        match self {
            Level::Plain => ROWS_MAX,
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 | Level::Avx2 | Level::GfniAvx2 => 4,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::GfniAvx512 => ROWS_MAX,
        }
    }
}

/// One source of a pass: its bytes, and its coefficient for each output of the pass.
#[derive(Clone, Copy)]
struct Term<'a> {
    bytes: &'a [u8],
    factors: &'a [Coefficient],
}

/// A matrix with its tables.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    level: Level,
    rows: usize,
    /// Column by column: a kernel reads all outputs' coefficients of one source together.
    factors: Vec<Coefficient>,
}

impl Plan {
    /// `level` must be supported by this CPU; the kernels assert it.
    pub(crate) fn new(level: Level, matrix: &Matrix) -> Plan {
        let rows = matrix.rows();
        let cells = (0..matrix.columns()).flat_map(|column| (0..rows).map(move |row| matrix.get(row, column)));
        Plan { level, rows, factors: cells.map(Coefficient::of).collect() }
    }

    /// Sets each output to its sum over the sources; all slices must be equally long.
    pub(crate) fn apply(&self, sources: &[Source<'_>], outputs: &mut [&mut [u8]]) {
        assert_eq!(outputs.len(), self.rows, "one output per row");
        let mut first_row = 0;
        for pass in outputs.chunks_mut(self.level.rows_per_pass()) {
            let terms: SmallVec<[Term<'_>; MAX_DATA]> = sources
                .iter()
                .map(|source| Term {
                    bytes: source.bytes,
                    factors: &self.factors[source.column * self.rows + first_row..][..pass.len()],
                })
                .collect();
            first_row += pass.len();
            if pass[0].len() < self.level.width() {
                self.apply_short(&terms, pass);
            } else {
                run(self.level, &terms, pass);
            }
        }
    }

    /// Slices too short for the kernel go through buffers of its width.
    fn apply_short(&self, terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
        let (len, width) = (outputs[0].len(), self.level.width());
        let padded: SmallVec<[[u8; WIDTH_MAX]; MAX_DATA]> = terms
            .iter()
            .map(|term| {
                let mut buffer = [0; WIDTH_MAX];
                buffer[..len].copy_from_slice(term.bytes);
                buffer
            })
            .collect();
        let padded_terms: SmallVec<[Term<'_>; MAX_DATA]> = terms
            .iter()
            .zip(&padded)
            .map(|(term, buffer)| Term { bytes: &buffer[..width], factors: term.factors })
            .collect();
        let mut sums = [[0; WIDTH_MAX]; ROWS_MAX];
        let mut windows = sums.each_mut().map(|sum| &mut sum[..width]);
        run(self.level, &padded_terms, &mut windows[..outputs.len()]);
        for (output, sum) in outputs.iter_mut().zip(&sums) {
            output.copy_from_slice(&sum[..len]);
        }
    }
}

/// One pass of the level's kernel.
fn run(level: Level, terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
    match level {
        Level::Plain => plain(terms, outputs),
        #[cfg(target_arch = "x86_64")]
        _ => x86::run(level, terms, outputs),
    }
}

fn plain(terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
    for (row, output) in outputs.iter_mut().enumerate() {
        output.fill(0);
        for term in terms {
            for (sum, &byte) in output.iter_mut().zip(term.bytes) {
                *sum ^= term.factors[row].product(byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::matrix::parity_matrix;
    use crate::scalar;

    const LENGTHS: [usize; 17] = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 200, 391];

    fn bytes(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| (((i * 131 + seed * 17 + 7) * 2_654_435_761_usize) >> 11) as u8).collect()
    }

    /// Every level this CPU has, every number of outputs, lengths around every vector width.
    #[test]
    fn every_level_gives_the_bytes_of_the_scalar_loop() {
        for level in Level::supported() {
            for (k, m) in [(1, 1), (4, 2), (3, 3), (5, 4), (6, 5), (7, 6), (9, 7), (32, 8)] {
                let matrix = parity_matrix(Geometry::new(k, m).unwrap());
                let plan = Plan::new(level, &matrix);
                for len in LENGTHS {
                    let shards: Vec<Vec<u8>> = (0..usize::from(k)).map(|i| bytes(len, i)).collect();
                    let sources: Vec<Source<'_>> =
                        shards.iter().enumerate().map(|(column, bytes)| Source { column, bytes }).collect();
                    // A byte of padding on either side shows a store outside of the output.
                    let mut actual = vec![vec![0xee; len + 2]; usize::from(m)];
                    let mut windows: Vec<&mut [u8]> = actual.iter_mut().map(|row| &mut row[1..=len]).collect();
                    plan.apply(&sources, &mut windows);
                    let mut expected = vec![vec![0xee; len + 2]; usize::from(m)];
                    let mut windows: Vec<&mut [u8]> = expected.iter_mut().map(|row| &mut row[1..=len]).collect();
                    scalar::apply(&matrix, &sources, &mut windows);
                    assert_eq!(actual, expected, "{level:?}, {k}+{m}, {len} bytes");
                }
            }
        }
    }

    #[test]
    fn a_stretch_without_a_column_skips_its_coefficients() {
        let matrix = parity_matrix(Geometry::new(4, 2).unwrap());
        let (second, fourth) = (bytes(100, 1), bytes(100, 3));
        let sources = [Source { column: 1, bytes: &second }, Source { column: 3, bytes: &fourth }];
        for level in Level::supported() {
            let (mut actual, mut expected) = ([[0; 100]; 2], [[0; 100]; 2]);
            Plan::new(level, &matrix).apply(&sources, &mut actual.each_mut().map(|row| &mut row[..]));
            scalar::apply(&matrix, &sources, &mut expected.each_mut().map(|row| &mut row[..]));
            assert_eq!(actual, expected, "{level:?}");
        }
    }
}
