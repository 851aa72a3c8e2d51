//! Multiplication by one constant, in the forms that vector instructions want.

use crate::gf256;

/// A constant factor.
///
/// ```text
/// low[i]  = c · i          PSHUFB: c · x = low[x & 15] ⊕ high[x >> 4]
/// high[i] = c · 16·i
/// affine  = the 8 × 8 bit matrix of x → c · x, as GF2P8AFFINEQB wants it
/// ```
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(super) struct Coefficient {
    pub(super) low: [u8; 16],
    pub(super) high: [u8; 16],
    pub(super) affine: u64,
}

/// Every factor, so that planning a decode is a copy.
static ALL: [Coefficient; 256] = all();

impl Coefficient {
    pub(super) fn of(factor: u8) -> Coefficient {
        ALL[usize::from(factor)]
    }

    /// The product with one byte, as the vector loops form it.
    pub(super) fn product(&self, byte: u8) -> u8 {
        self.low[usize::from(byte & 15)] ^ self.high[usize::from(byte >> 4)]
    }
}

const fn all() -> [Coefficient; 256] {
    let mut all = [Coefficient { low: [0; 16], high: [0; 16], affine: 0 }; 256];
    let mut factor = 0;
    while factor < 256 {
        all[factor] = expand(factor as u8);
        factor += 1;
    }
    all
}

const fn expand(factor: u8) -> Coefficient {
    let mut low = [0; 16];
    let mut high = [0; 16];
    let mut affine = 0;
    let mut power = factor; // factor · 2^bit
    let mut bit = 0;
    while bit < 8 {
        let table = if bit < 4 { &mut low } else { &mut high };
        let mut index = 0;
        while index < 16 {
            if index >> (bit & 3) & 1 != 0 {
                table[index] ^= power;
            }
            index += 1;
        }
        // Bit `out` of the result is the parity of x with matrix byte 7 - out (Intel SDM,
        // GF2P8AFFINEQB); input bit `bit` adds factor · 2^bit.
        let mut out = 0;
        while out < 8 {
            if power >> out & 1 != 0 {
                affine |= 1u64 << (8 * (7 - out) + bit);
            }
            out += 1;
        }
        power = gf256::double(power);
        bit += 1;
    }
    Coefficient { low, high, affine }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_every_product_is_the_product() {
        for factor in 0..=255 {
            let coefficient = Coefficient::of(factor);
            for byte in 0..=255u8 {
                let product = gf256::mul(factor, byte);
                assert_eq!(coefficient.product(byte), product, "{factor} * {byte}");
                let rows = coefficient.affine.to_le_bytes();
                let affine =
                    (0..8).fold(0u8, |sum, out| sum | (((rows[7 - out] & byte).count_ones() & 1) as u8) << out);
                assert_eq!(affine, product, "{factor} * {byte} by the bit matrix");
            }
        }
    }
}
