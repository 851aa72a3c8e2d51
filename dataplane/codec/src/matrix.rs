//! The code matrix, and the rows that give lost shards back.

use crate::geometry::Geometry;
use crate::gf256;

/// A matrix of coefficients, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    cells: Vec<u8>,
}

impl Matrix {
    pub(crate) fn zero(rows: usize, columns: usize) -> Matrix {
        Matrix { rows, columns, cells: vec![0; rows * columns] }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn row(&self, row: usize) -> &[u8] {
        &self.cells[row * self.columns..][..self.columns]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [u8] {
        &mut self.cells[row * self.columns..][..self.columns]
    }

    pub(crate) fn get(&self, row: usize, column: usize) -> u8 {
        self.row(row)[column]
    }

    /// The cells row by row.
    #[cfg(isal_found)]
    pub(crate) fn cells(&self) -> &[u8] {
        &self.cells
    }

    /// The columns named, in that order.
    #[cfg(isal_found)]
    pub(crate) fn select_columns(&self, columns: impl Iterator<Item = usize> + Clone) -> Matrix {
        let mut cells = Vec::with_capacity(self.cells.len());
        for row in 0..self.rows {
            cells.extend(columns.clone().map(|column| self.get(row, column)));
        }
        Matrix { rows: self.rows, columns: columns.count(), cells }
    }

    /// The inverse by Gauss-Jordan elimination, or `None` for a singular matrix.
    pub(crate) fn inverse(mut self) -> Option<Matrix> {
        assert_eq!(self.rows, self.columns, "only a square matrix has an inverse");
        let n = self.rows;
        let mut inverse = Matrix::zero(n, n);
        for i in 0..n {
            inverse.row_mut(i)[i] = 1;
        }
        for column in 0..n {
            let pivot = (column..n).find(|&row| self.get(row, column) != 0)?;
            self.swap_rows(pivot, column);
            inverse.swap_rows(pivot, column);
            let scale = gf256::inv(self.get(column, column));
            self.scale_row(column, scale);
            inverse.scale_row(column, scale);
            for row in (0..n).filter(|&row| row != column) {
                let factor = self.get(row, column);
                self.add_scaled_row(row, column, factor);
                inverse.add_scaled_row(row, column, factor);
            }
        }
        Some(inverse)
    }

    fn swap_rows(&mut self, a: usize, b: usize) {
        for column in 0..self.columns {
            self.cells.swap(a * self.columns + column, b * self.columns + column);
        }
    }

    fn scale_row(&mut self, row: usize, factor: u8) {
        for cell in self.row_mut(row) {
            *cell = gf256::mul(*cell, factor);
        }
    }

    /// Adds `factor` times row `from` to row `to`.
    fn add_scaled_row(&mut self, to: usize, from: usize, factor: u8) {
        for column in 0..self.columns {
            let term = gf256::mul(factor, self.get(from, column));
            self.row_mut(to)[column] ^= term;
        }
    }
}

/// The coefficient of data shard `data` in parity shard `parity`: 1 / ((k + parity) ⊕ data).
///
/// These are the rows below the identity of ISA-L's `gf_gen_cauchy1_matrix`. Any square part of a
/// Cauchy matrix is regular, so any k of the k + m shards determine the rest.
pub(crate) fn parity_coefficient(geometry: Geometry, parity: usize, data: usize) -> u8 {
    // At most 31 + 9: no truncation, and never zero since data < k.
    gf256::inv(((geometry.data() + parity) ^ data) as u8)
}

/// The m × k matrix that gives parity from data.
pub(crate) fn parity_matrix(geometry: Geometry) -> Matrix {
    let mut matrix = Matrix::zero(geometry.parity(), geometry.data());
    for parity in 0..geometry.parity() {
        for (data, cell) in matrix.row_mut(parity).iter_mut().enumerate() {
            *cell = parity_coefficient(geometry, parity, data);
        }
    }
    matrix
}

/// The matrix that gives the shards `want` from `sources`, one column per source.
///
/// `lost` are the data shards that are not known; `sources` are known data shards, then as many
/// parity shards as data shards are lost. A data shard that is in neither reads as zero.
pub(crate) fn decode_matrix(geometry: Geometry, lost: &[usize], sources: &[usize], want: &[usize]) -> Matrix {
    let k = geometry.data();
    let lost_rows = lost_data_rows(geometry, lost, sources);
    let mut matrix = Matrix::zero(want.len(), sources.len());
    for (row, &shard) in want.iter().enumerate() {
        if let Some(position) = lost.iter().position(|&data| data == shard) {
            matrix.row_mut(row).copy_from_slice(lost_rows.row(position));
            continue;
        }
        if shard < k {
            // Neither lost nor a source: known to be zero.
            continue;
        }
        // A lost parity shard: its terms in known data, and in lost data as rebuilt.
        let parity = shard - k;
        for (column, &source) in sources.iter().enumerate() {
            let mut cell = if source < k { parity_coefficient(geometry, parity, source) } else { 0 };
            for (position, &data) in lost.iter().enumerate() {
                cell ^= gf256::mul(parity_coefficient(geometry, parity, data), lost_rows.get(position, column));
            }
            matrix.row_mut(row)[column] = cell;
        }
    }
    matrix
}

/// Each lost data shard as a sum over `sources`.
///
/// The parity shards among the sources, less their terms in known data, are a square part of the
/// Cauchy matrix times the lost data; its inverse gives the lost data.
fn lost_data_rows(geometry: Geometry, lost: &[usize], sources: &[usize]) -> Matrix {
    let k = geometry.data();
    let first_parity = sources.iter().position(|&source| source >= k).unwrap_or(sources.len());
    let (known, parities) = sources.split_at(first_parity);
    let mut square = Matrix::zero(parities.len(), lost.len());
    for (row, &parity) in parities.iter().enumerate() {
        for (column, &data) in lost.iter().enumerate() {
            square.row_mut(row)[column] = parity_coefficient(geometry, parity - k, data);
        }
    }
    let inverse = square.inverse().expect("a square part of a Cauchy matrix is regular");
    let mut rows = Matrix::zero(lost.len(), sources.len());
    for row in 0..lost.len() {
        for (column, &data) in known.iter().enumerate() {
            let cell = parities.iter().enumerate().fold(0, |cell, (i, &parity)| {
                cell ^ gf256::mul(inverse.get(row, i), parity_coefficient(geometry, parity - k, data))
            });
            rows.row_mut(row)[column] = cell;
        }
        rows.row_mut(row)[known.len()..].copy_from_slice(inverse.row(row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(k: u8, m: u8) -> Geometry {
        Geometry::new(k, m).unwrap()
    }

    #[test]
    fn known_rows_of_four_and_two() {
        let matrix = parity_matrix(geometry(4, 2));
        assert_eq!(matrix.row(0), [0x47, 0xa7, 0x7a, 0xba]);
        assert_eq!(matrix.row(1), [0xa7, 0x47, 0xba, 0x7a]);
    }

    #[test]
    fn a_matrix_times_its_inverse_is_the_identity_and_a_singular_one_has_none() {
        let square = parity_matrix(geometry(8, 8));
        let inverse = square.clone().inverse().unwrap();
        for row in 0..8 {
            for column in 0..8 {
                let cell = (0..8).fold(0, |sum, i| sum ^ gf256::mul(square.get(row, i), inverse.get(i, column)));
                assert_eq!(cell, u8::from(row == column), "{row}, {column}");
            }
        }
        let mut twice = square;
        let first = twice.row(0).to_vec();
        twice.row_mut(5).copy_from_slice(&first);
        assert_eq!(twice.inverse(), None);
    }

    /// Maximum distance separable: every square part of the parity matrix is regular.
    #[test]
    fn sampled_minors_of_every_geometry_are_regular() {
        let seed = 0x6d64_735f_6d69_6e6f_u64;
        let mut state = seed;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        for (k, m) in (1..=32u8).flat_map(|k| (1..=8u8).map(move |m| (k, m))) {
            let geometry = geometry(k, m);
            for _ in 0..8 {
                let size = 1 + below(usize::from(k.min(m)));
                let mut pick = |bound: usize| {
                    let mut all: Vec<usize> = (0..bound).collect();
                    for i in 0..size {
                        all.swap(i, i + below(bound - i));
                    }
                    all.truncate(size);
                    all
                };
                let (rows, columns) = (pick(usize::from(m)), pick(usize::from(k)));
                let mut minor = Matrix::zero(size, size);
                for (i, &row) in rows.iter().enumerate() {
                    for (j, &column) in columns.iter().enumerate() {
                        minor.row_mut(i)[j] = parity_coefficient(geometry, row, column);
                    }
                }
                assert!(minor.inverse().is_some(), "seed {seed:#x}: {geometry}, rows {rows:?}, columns {columns:?}");
            }
        }
    }
}
