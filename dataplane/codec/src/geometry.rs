//! How many shards a segment has.

use std::fmt;

/// Most data shards of one geometry. Wider stripes save little space (32+4 stores 1.125 times the
/// data) and make each rebuild read more shards.
pub const MAX_DATA: usize = 32;

/// Most parity shards of one geometry: what one pass of the widest vector kernel keeps in registers.
pub const MAX_PARITY: usize = 8;

/// `k` data shards and `m` parity shards; any `m` of the `k + m` may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Geometry {
    k: u8,
    m: u8,
}

/// A geometry outside of 1 to [`MAX_DATA`] data and 0 to [`MAX_PARITY`] parity shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    #[error("{0} data shards; 1 to {MAX_DATA} are possible")]
    Data(u8),
    #[error("{0} parity shards; 0 to {MAX_PARITY} are possible")]
    Parity(u8),
}

impl Geometry {
    pub const fn new(k: u8, m: u8) -> Result<Geometry, GeometryError> {
        if k == 0 || k as usize > MAX_DATA {
            return Err(GeometryError::Data(k));
        }
        if m as usize > MAX_PARITY {
            return Err(GeometryError::Parity(m));
        }
        Ok(Geometry { k, m })
    }

    /// Number of data shards, k.
    pub const fn data(self) -> usize {
        self.k as usize
    }

    /// Number of parity shards, m.
    pub const fn parity(self) -> usize {
        self.m as usize
    }

    /// Number of all shards, k + m.
    pub const fn total(self) -> usize {
        self.data() + self.parity()
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.k, self.m)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_the_range_are_accepted_and_one_beyond_is_not() {
        let widest = Geometry::new(32, 8).unwrap();
        assert_eq!((widest.data(), widest.parity(), widest.total()), (32, 8, 40));
        assert_eq!(Geometry::new(1, 0).unwrap().total(), 1);
        assert_eq!(Geometry::new(0, 2), Err(GeometryError::Data(0)));
        assert_eq!(Geometry::new(33, 2), Err(GeometryError::Data(33)));
        assert_eq!(Geometry::new(4, 9), Err(GeometryError::Parity(9)));
        assert_eq!(Geometry::new(4, 2).unwrap().to_string(), "4+2");
    }
}
