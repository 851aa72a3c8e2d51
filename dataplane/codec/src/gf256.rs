//! Arithmetic in GF(2⁸) with polynomial x⁸ + x⁴ + x³ + x² + 1 (0x11d), the field of ISA-L.
//!
//! Addition is XOR. Products go through logarithms to base 2, which generates the whole field.

const POLYNOMIAL: u16 = 0x11d;

struct Tables {
    /// Powers of 2, twice over, so that a sum of two logarithms needs no reduction.
    exp: [u8; 510],
    /// Logarithm of each non-zero element; entry 0 is never used.
    log: [u8; 256],
}

static TABLES: Tables = tables();

const fn tables() -> Tables {
    let mut tables = Tables { exp: [0; 510], log: [0; 256] };
    let mut power = 1u16;
    let mut exponent = 0;
    while exponent < 255 {
        tables.exp[exponent] = power as u8;
        tables.exp[exponent + 255] = power as u8;
        tables.log[power as usize] = exponent as u8;
        power <<= 1;
        if power & 0x100 != 0 {
            power ^= POLYNOMIAL;
        }
        exponent += 1;
    }
    tables
}

/// The product of `a` and `b`.
pub(crate) fn mul(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    let sum = usize::from(TABLES.log[usize::from(a)]) + usize::from(TABLES.log[usize::from(b)]);
    TABLES.exp[sum]
}

/// The inverse of `a`, which must not be zero.
pub(crate) fn inv(a: u8) -> u8 {
    assert!(a != 0, "zero has no inverse");
    TABLES.exp[255 - usize::from(TABLES.log[usize::from(a)])]
}

/// Twice `a`: one step of the bitwise product, usable in constants.
pub(crate) const fn double(a: u8) -> u8 {
    let wide = (a as u16) << 1;
    (if wide & 0x100 != 0 { wide ^ POLYNOMIAL } else { wide }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long multiplication, bit by bit.
    fn slow_mul(mut a: u8, mut b: u8) -> u8 {
        let mut product = 0;
        while b != 0 {
            if b & 1 != 0 {
                product ^= a;
            }
            let carry = a & 0x80 != 0;
            a <<= 1;
            if carry {
                a ^= 0x1d;
            }
            b >>= 1;
        }
        product
    }

    #[test]
    fn every_product_matches_long_multiplication() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(mul(a, b), slow_mul(a, b), "{a} * {b}");
            }
            assert_eq!(double(a), slow_mul(a, 2));
        }
    }

    #[test]
    fn every_element_times_its_inverse_is_one() {
        for a in 1..=255 {
            assert_eq!(slow_mul(a, inv(a)), 1, "{a}");
        }
    }

    #[test]
    #[should_panic(expected = "zero has no inverse")]
    fn zero_has_no_inverse() {
        inv(0);
    }
}
