//! All backends give the oracle's bytes on any data, with any lengths.

mod common;

use common::*;
use proptest::prelude::*;

/// Lengths around the vector widths, and any other.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![prop::sample::select(vec![0usize, 1, 63, 64, 65, 127, 128, 129]), 0usize..700]
}

fn shapes() -> impl Strategy<Value = (usize, Vec<usize>, u64)> {
    let unequal = prop::collection::vec(length(), 1..=32);
    let equal = (1usize..=32, length()).prop_map(|(k, len)| vec![len; k]);
    (0usize..=8, prop_oneof![unequal, equal], any::<u64>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_backend_encodes_and_rebuilds_as_the_oracle((m, data_lens, seed) in shapes()) {
        let mut random = Random(seed);
        let geometry = geometry(data_lens.len(), m);
        let data = data_lens.iter().map(|&len| random.bytes(len)).collect();
        let stripe = stripe(geometry, data);
        let mut order: Vec<usize> = (0..geometry.total()).collect();
        for i in 0..m {
            order.swap(i, i + random.below(geometry.total() - i));
        }
        let lost = &order[..m];
        for coder in coders(geometry) {
            let (data, parity) = stripe.split_at(geometry.data());
            prop_assert_eq!(&encode(&coder, data)[..], parity, "{} by {}", geometry, coder.backend());
            let rebuilt = coder.reconstruct(&without(&stripe, lost), &lens(&stripe), lost).unwrap();
            for (shard, &number) in rebuilt.iter().zip(lost) {
                prop_assert_eq!(shard, &stripe[number], "{} by {}", geometry, coder.backend());
            }
        }
    }
}
