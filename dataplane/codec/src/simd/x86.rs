//! Kernels for x86-64, from SSSE3 to AVX-512 with GFNI.
//!
//! Each instruction set is a module of the same small operations, and one macro writes the loop
//! over them. Products are two PSHUFB look-ups by nibble, or one GF2P8AFFINEQB where there is GFNI
//! (that instruction takes any linear map of bits, so the field's polynomial does not matter; its
//! sibling GF2P8MULB is fixed to another polynomial).

use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;

use super::{Level, Term};

/// The levels this CPU has, slowest first.
pub(super) fn supported() -> impl Iterator<Item = Level> {
    let avx512 = has!("avx512f") && has!("avx512bw");
    [
        (has!("ssse3"), Level::Ssse3),
        (has!("avx2"), Level::Avx2),
        (has!("avx2") && has!("gfni"), Level::GfniAvx2),
        (avx512, Level::Avx512),
        (avx512 && has!("gfni"), Level::GfniAvx512),
    ]
    .into_iter()
    .filter_map(|(present, level)| present.then_some(level))
}

/// One pass. Slices must be equally long and at least as long as the level's vector; there is at
/// least one output and at most as many as the level takes.
pub(super) fn run(level: Level, terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
    assert!(supported().any(|supported| supported == level), "{level:?} on a CPU without it");
    // SAFETY: the CPU has the level's instructions, asserted above; the kernels check the lengths.
    unsafe {
        match level {
            Level::Plain => unreachable!("plain has no kernel here"),
            Level::Ssse3 => ssse3::run(terms, outputs),
            Level::Avx2 => avx2::run(terms, outputs),
            Level::GfniAvx2 => gfni_avx2::run(terms, outputs),
            Level::Avx512 => avx512::run(terms, outputs),
            Level::GfniAvx512 => gfni_avx512::run(terms, outputs),
        }
    }
}

/// Writes the module of one instruction set: `run`, over its vector type and operations.
macro_rules! kernel {
    (
        $module:ident, $features:literal, $vector:ty, rows: [$($rows:literal),*],
        operand: $operand:ty, factor: $factor_type:ty,
        zero: $zero:expr, load: $load:expr, store: $store:expr,
        factor: |$coefficient:ident| $factor:expr,
        operand: |$value:ident| $prepare:expr,
        accumulate: |$sum:ident, $by:ident, $of:ident| $accumulate:expr,
    ) => {
        mod $module {
            use super::*;
            use crate::simd::coefficient::Coefficient;

            const WIDTH: usize = size_of::<$vector>();

            #[inline]
            #[target_feature(enable = $features)]
            fn factor($coefficient: &Coefficient) -> $factor_type {
                $factor
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn operand($value: $vector) -> $operand {
                $prepare
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn accumulate($sum: $vector, $by: $factor_type, $of: $operand) -> $vector {
                $accumulate
            }

            #[target_feature(enable = $features)]
            pub(super) fn run(terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
                match outputs.len() {
                    $($rows => rows::<$rows>(terms, outputs),)*
                    count => unreachable!("{count} outputs in one pass"),
                }
            }

            #[target_feature(enable = $features)]
            fn rows<const ROWS: usize>(terms: &[Term<'_>], outputs: &mut [&mut [u8]]) {
                let outputs: &mut [&mut [u8]; ROWS] = outputs.try_into().expect("one output per row");
                let len = outputs[0].len();
                assert!(len >= WIDTH);
                assert!(outputs.iter().all(|output| output.len() == len));
                assert!(terms.iter().all(|term| term.bytes.len() == len && term.factors.len() == ROWS));
                let outputs: [*mut u8; ROWS] = outputs.each_mut().map(|output| output.as_mut_ptr());
                let mut at = 0;
                while at + 2 * WIDTH <= len {
                    // SAFETY: every slice has `len` bytes, asserted above, and the block ends within.
                    unsafe { block::<ROWS, 2>(terms, &outputs, at) };
                    at += 2 * WIDTH;
                }
                if at + WIDTH <= len {
                    // SAFETY: as above.
                    unsafe { block::<ROWS, 1>(terms, &outputs, at) };
                    at += WIDTH;
                }
                if at < len {
                    // The rest is less than a vector: the last full vector once more, the part
                    // already done coming out the same since sources and outputs never overlap.
                    // SAFETY: `len` is at least a vector, asserted above.
                    unsafe { block::<ROWS, 1>(terms, &outputs, len - WIDTH) };
                }
            }

            /// `VECTORS` adjacent vectors of every output, from `at`.
            ///
            /// # Safety
            /// All slices reach `at + VECTORS * WIDTH`; each term has `ROWS` factors.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn block<const ROWS: usize, const VECTORS: usize>(
                terms: &[Term<'_>],
                outputs: &[*mut u8; ROWS],
                at: usize,
            ) {
                let mut sums: [[$vector; VECTORS]; ROWS] = [[$zero; VECTORS]; ROWS];
                for term in terms {
                    let mut operands: [$operand; VECTORS] = [operand($zero); VECTORS];
                    for v in 0..VECTORS {
                        // SAFETY: within the slice by the caller's promise; the load is unaligned.
                        operands[v] = operand(unsafe { $load(term.bytes.as_ptr().add(at + v * WIDTH).cast()) });
                    }
                    for row in 0..ROWS {
                        // SAFETY: the term has ROWS factors by the caller's promise.
                        let by = factor(unsafe { term.factors.get_unchecked(row) });
                        for v in 0..VECTORS {
                            sums[row][v] = accumulate(sums[row][v], by, operands[v]);
                        }
                    }
                }
                for row in 0..ROWS {
                    for v in 0..VECTORS {
                        // SAFETY: within the slice by the caller's promise; the store is unaligned.
                        unsafe { $store(outputs[row].add(at + v * WIDTH).cast(), sums[row][v]) };
                    }
                }
            }
        }
    };
}

kernel! {
    ssse3, "ssse3", __m128i, rows: [1, 2, 3, 4],
    operand: (__m128i, __m128i), factor: (__m128i, __m128i),
    zero: _mm_setzero_si128(), load: _mm_loadu_si128, store: _mm_storeu_si128,
    factor: |coefficient| (broadcast128(&coefficient.low), broadcast128(&coefficient.high)),
    operand: |value| {
        let mask = _mm_set1_epi8(15);
        (_mm_and_si128(value, mask), _mm_and_si128(_mm_srli_epi16::<4>(value), mask))
    },
    accumulate: |sum, by, of| {
        let product = _mm_xor_si128(_mm_shuffle_epi8(by.0, of.0), _mm_shuffle_epi8(by.1, of.1));
        _mm_xor_si128(sum, product)
    },
}

kernel! {
    avx2, "avx2", __m256i, rows: [1, 2, 3, 4],
    operand: (__m256i, __m256i), factor: (__m256i, __m256i),
    zero: _mm256_setzero_si256(), load: _mm256_loadu_si256, store: _mm256_storeu_si256,
    factor: |coefficient| (
        _mm256_broadcastsi128_si256(broadcast128(&coefficient.low)),
        _mm256_broadcastsi128_si256(broadcast128(&coefficient.high)),
    ),
    operand: |value| {
        let mask = _mm256_set1_epi8(15);
        (_mm256_and_si256(value, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(value), mask))
    },
    accumulate: |sum, by, of| {
        let product = _mm256_xor_si256(_mm256_shuffle_epi8(by.0, of.0), _mm256_shuffle_epi8(by.1, of.1));
        _mm256_xor_si256(sum, product)
    },
}

kernel! {
    gfni_avx2, "avx2,gfni", __m256i, rows: [1, 2, 3, 4],
    operand: __m256i, factor: __m256i,
    zero: _mm256_setzero_si256(), load: _mm256_loadu_si256, store: _mm256_storeu_si256,
    factor: |coefficient| _mm256_set1_epi64x(coefficient.affine as i64),
    operand: |value| value,
    accumulate: |sum, by, of| _mm256_xor_si256(sum, _mm256_gf2p8affine_epi64_epi8::<0>(of, by)),
}

kernel! {
    avx512, "avx512f,avx512bw", __m512i, rows: [1, 2, 3, 4, 5, 6, 7, 8],
    operand: (__m512i, __m512i), factor: (__m512i, __m512i),
    zero: _mm512_setzero_si512(), load: _mm512_loadu_si512, store: _mm512_storeu_si512,
    factor: |coefficient| (
        _mm512_broadcast_i32x4(broadcast128(&coefficient.low)),
        _mm512_broadcast_i32x4(broadcast128(&coefficient.high)),
    ),
    operand: |value| {
        let mask = _mm512_set1_epi8(15);
        (_mm512_and_si512(value, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(value), mask))
    },
    // 0x96 is the truth table of a three-way XOR.
    accumulate: |sum, by, of| _mm512_ternarylogic_epi64::<0x96>(
        sum,
        _mm512_shuffle_epi8(by.0, of.0),
        _mm512_shuffle_epi8(by.1, of.1),
    ),
}

kernel! {
    gfni_avx512, "avx512f,avx512bw,gfni", __m512i, rows: [1, 2, 3, 4, 5, 6, 7, 8],
    operand: __m512i, factor: __m512i,
    zero: _mm512_setzero_si512(), load: _mm512_loadu_si512, store: _mm512_storeu_si512,
    factor: |coefficient| _mm512_set1_epi64(coefficient.affine as i64),
    operand: |value| value,
    accumulate: |sum, by, of| _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8::<0>(of, by)),
}

/// A table of 16 bytes as a vector.
#[inline]
#[target_feature(enable = "sse2")]
fn broadcast128(table: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the load is unaligned.
    unsafe { _mm_loadu_si128(table.as_ptr().cast()) }
}
