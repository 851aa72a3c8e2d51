//! Throughput of each backend, interleaved: `cargo run --release -p cfs-codec --example ec_bench
//! --features isal`.
//!
//! One round runs every contender once for a few milliseconds; the figure of a contender is the
//! median of its rounds, that of a ratio the median of the rounds' ratios, so that a noisy
//! neighbour hits both sides. Throughput counts data bytes (k shards) per second, in GB/s.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a benchmark reads the clock")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use cfs_codec::crc32c::crc32c_pages;
use cfs_codec::{Backend, Erasure, Geometry};

const SHARD_BYTES: usize = 64 * 1024;
const ROUNDS: usize = 41;
const ROUND_TIME: Duration = Duration::from_millis(4);

/// A name and one call of the work.
type Contender<'a> = (String, Box<dyn FnMut() + 'a>);

fn main() {
    let mut four_two = Vec::new();
    for (k, m) in [(4, 2), (8, 3), (16, 4)] {
        let geometry = Geometry::new(k, m).expect("in range");
        let figures = measure_geometry(geometry);
        if (k, m) == (4, 2) {
            four_two = figures;
        }
    }
    measure_crc32c();
    let rounds = |name: &str| four_two.iter().find(|(contender, _)| contender == name).map(|(_, rounds)| rounds);
    for (ratio, above, below) in
        [("portable", "encode simd", "encode isa-l"), ("isal", "encode isa-l", "encode raw isa-l")]
    {
        match (rounds(above), rounds(below)) {
            (Some(above), Some(below)) => {
                println!("ratio {ratio} {:.3}", median_ratio(above, below));
            }
            _ => println!("ratio {ratio} unavailable: built without feature isal or without libisal"),
        }
    }
}

/// Measures encode and decode of all backends; returns each contender's rounds in GB/s.
fn measure_geometry(geometry: Geometry) -> Vec<(String, Vec<f64>)> {
    let (k, m) = (geometry.data(), geometry.parity());
    let data: Vec<Vec<u8>> = (0..k).map(shard).collect();
    let sources: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let mut parity = vec![vec![0; SHARD_BYTES]; m];
    {
        let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
        Erasure::new(geometry).encode(&sources, &mut outputs).expect("shards fit");
    }
    // The worst loss: as many data shards as there is parity.
    let lost: Vec<usize> = (0..m).collect();
    let at_hand: Vec<Option<&[u8]>> = (0..geometry.total())
        .map(|i| (i >= m).then(|| if i < k { sources[i] } else { parity[i - k].as_slice() }))
        .collect();
    let lens = vec![SHARD_BYTES; geometry.total()];
    // One buffer for all contenders: each meets the same cache.
    let scratch = std::cell::RefCell::new(vec![vec![0; SHARD_BYTES]; m]);

    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for backend in Backend::available() {
        let coder = Erasure::with_backend(geometry, backend).expect("available");
        let (encoder, sources, scratch) = (coder.clone(), &sources, &scratch);
        contenders.push((
            format!("encode {backend}"),
            Box::new(move || {
                let mut scratch = scratch.borrow_mut();
                let mut outputs: Vec<&mut [u8]> = scratch.iter_mut().map(Vec::as_mut_slice).collect();
                encoder.encode(black_box(sources), black_box(&mut outputs)).expect("shards fit");
            }),
        ));
        let (at_hand, lens, lost) = (&at_hand, &lens, &lost);
        contenders.push((
            format!("decode {backend}"),
            Box::new(move || {
                black_box(coder.reconstruct(black_box(at_hand), lens, lost).expect("enough shards"));
            }),
        ));
    }
    #[cfg(isal_found)]
    contenders.push(("encode raw isa-l".into(), raw::encode(geometry, &sources, &scratch)));

    let figures = interleave(contenders, k * SHARD_BYTES);
    for (name, rounds) in &figures {
        println!("{geometry:<6} {name:<18} {:7.2} GB/s", median(rounds.clone()));
    }
    figures
}

/// Page checksums of one 1 MiB payload, for scale.
fn measure_crc32c() {
    let payload: Vec<u8> = (0..16).flat_map(shard).collect();
    let mut sums = Vec::new();
    let work = || {
        sums.clear();
        crc32c_pages(black_box(&payload), &mut sums);
    };
    let figures = interleave(vec![("crc32c pages".into(), Box::new(work))], payload.len());
    println!("crc32c 4 KiB pages        {:7.2} GB/s", median(figures[0].1.clone()));
}

/// Runs all contenders once per round; gives each one's GB/s round by round.
fn interleave(mut contenders: Vec<Contender<'_>>, bytes_per_call: usize) -> Vec<(String, Vec<f64>)> {
    let mut figures: Vec<(String, Vec<f64>)> = contenders.iter().map(|(name, _)| (name.clone(), Vec::new())).collect();
    for _ in 0..ROUNDS {
        for ((_, work), (_, rounds)) in contenders.iter_mut().zip(&mut figures) {
            work(); // warms caches and the clock of wide vectors
            let start = Instant::now();
            let mut calls = 0;
            while start.elapsed() < ROUND_TIME {
                for _ in 0..4 {
                    work();
                }
                calls += 4;
            }
            rounds.push((calls * bytes_per_call) as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    figures
}

fn median_ratio(above: &[f64], below: &[f64]) -> f64 {
    median(above.iter().zip(below).map(|(above, below)| above / below).collect())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Bytes without a pattern that a cache or a CPU could gain from.
fn shard(number: usize) -> Vec<u8> {
    let mut state = number as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..SHARD_BYTES).map(|_| next()).collect()
}

/// The library's own call with everything prepared outside: the floor of any wrapper.
#[cfg(isal_found)]
#[allow(unsafe_code, reason = "calls libisal directly")]
mod raw {
    use super::*;
    use std::cell::RefCell;

    pub fn encode<'a>(
        geometry: Geometry,
        sources: &'a [&'a [u8]],
        scratch: &'a RefCell<Vec<Vec<u8>>>,
    ) -> Box<dyn FnMut() + 'a> {
        let (k, m) = (geometry.data(), geometry.parity());
        let mut matrix = vec![0u8; geometry.total() * k];
        let mut tables = vec![0u8; 32 * k * m];
        // SAFETY: the matrix has total × k cells, the parity rows start after k × k, and the tables
        // have 32 bytes per parity cell.
        unsafe {
            isa_l_sys::gf_gen_cauchy1_matrix(matrix.as_mut_ptr(), geometry.total() as i32, k as i32);
            let rows = matrix[k * k..].as_mut_ptr();
            isa_l_sys::ec_init_tables(k as i32, m as i32, rows, tables.as_mut_ptr());
        }
        let mut inputs: Vec<*mut u8> = sources.iter().map(|s| s.as_ptr().cast_mut()).collect();
        let mut outputs: Vec<*mut u8> = scratch.borrow_mut().iter_mut().map(|output| output.as_mut_ptr()).collect();
        Box::new(move || {
            let _exclusive = scratch.borrow_mut();
            // SAFETY: the pointers stay valid for SHARD_BYTES as long as sources and scratch are
            // borrowed; the scratch buffers are not used elsewhere during the call.
            unsafe {
                isa_l_sys::ec_encode_data(
                    SHARD_BYTES as i32,
                    k as i32,
                    m as i32,
                    tables.as_mut_ptr(),
                    black_box(inputs.as_mut_ptr()),
                    black_box(outputs.as_mut_ptr()),
                );
            }
        })
    }
}
