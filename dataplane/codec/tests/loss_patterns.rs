//! Every way to lose shards, and every backend, against the slow oracle.

mod common;

use cfs_codec::{Backend, CodecError, Erasure};
use common::*;

#[test]
fn every_loss_of_up_to_m_shards_of_the_small_geometries_is_made_good() {
    let mut random = Random(0x10551);
    for (k, m) in (1..=6).flat_map(|k| (0..=3).map(move |m| (k, m))) {
        let geometry = geometry(k, m);
        // Unequal lengths, one shard empty in the wider geometries.
        let data: Vec<Vec<u8>> = (0..k).map(|i| random.bytes([150, 65, 97, 128, 0, 7][i])).collect();
        let stripe = stripe(geometry, data);
        let lens = lens(&stripe);
        for coder in coders(geometry) {
            let backend = coder.backend();
            assert_eq!(encode(&coder, &stripe[..k]), stripe[k..], "{geometry} {backend}");
            for lost in (0..=m).flat_map(|count| losses(k + m, count)) {
                let rebuilt = coder.reconstruct(&without(&stripe, &lost), &lens, &lost).unwrap();
                let expected: Vec<&Vec<u8>> = lost.iter().map(|&i| &stripe[i]).collect();
                assert_eq!(rebuilt.iter().collect::<Vec<_>>(), expected, "{geometry} {backend} without {lost:?}");
            }
        }
    }
}

#[test]
fn one_loss_more_than_m_is_refused_with_the_counts() {
    let mut random = Random(0x10552);
    for (k, m) in (1..=6).flat_map(|k| (0..=3).map(move |m| (k, m))) {
        let geometry = geometry(k, m);
        let stripe = stripe(geometry, (0..k).map(|_| random.bytes(40)).collect());
        for coder in coders(geometry) {
            for lost in losses(k + m, m + 1) {
                let error = coder.reconstruct(&without(&stripe, &lost), &lens(&stripe), &lost[..1]).unwrap_err();
                assert_eq!(error, CodecError::TooManyLost { missing: m + 1, parity: m }, "{geometry} {lost:?}");
                assert!(error.is_data_loss());
            }
        }
    }
}

#[test]
fn the_widest_geometry_survives_sampled_losses_of_eight() {
    let seed = 0x328;
    let mut random = Random(seed);
    let geometry = geometry(32, 8);
    let data = (0..32).map(|i| random.bytes(300 - i)).collect();
    let stripe = stripe(geometry, data);
    for coder in coders(geometry) {
        assert_eq!(encode(&coder, &stripe[..32]), stripe[32..], "{}", coder.backend());
        for _ in 0..20 {
            let mut order: Vec<usize> = (0..40).collect();
            for i in 0..9 {
                order.swap(i, i + random.below(40 - i));
            }
            let lost = &order[..8];
            let rebuilt = coder.reconstruct(&without(&stripe, lost), &lens(&stripe), lost).unwrap();
            for (shard, &number) in rebuilt.iter().zip(lost) {
                assert_eq!(shard, &stripe[number], "seed {seed:#x}, {}, lost {lost:?}", coder.backend());
            }
            let error = coder.reconstruct(&without(&stripe, &order[..9]), &lens(&stripe), &[]).unwrap_err();
            assert_eq!(error, CodecError::TooManyLost { missing: 9, parity: 8 });
        }
    }
}

/// An empty data shard is not stored: it is known without being at hand.
#[test]
fn empty_data_shards_never_count_as_lost() {
    let geometry = geometry(4, 2);
    let stripe = stripe(geometry, vec![b"first".to_vec(), Vec::new(), b"third shard".to_vec(), Vec::new()]);
    for coder in coders(geometry) {
        // Shards 1 and 3 were never stored, 0 and 2 are lost: four absent, two of them known.
        let absent = [0, 1, 2, 3];
        let rebuilt = coder.reconstruct(&without(&stripe, &absent), &lens(&stripe), &absent).unwrap();
        assert_eq!(rebuilt, stripe[..4]);
        // The twin: one parity shard less, and the rest does not suffice.
        let absent = [0, 1, 2, 3, 5];
        let error = coder.reconstruct(&without(&stripe, &absent), &lens(&stripe), &[0]).unwrap_err();
        assert_eq!(error, CodecError::TooManyLost { missing: 3, parity: 2 });
    }
}

#[test]
fn a_stripe_of_nothing_but_empty_shards_is_known_whole() {
    let geometry = geometry(3, 2);
    for coder in coders(geometry) {
        assert_eq!(encode(&coder, &vec![Vec::new(); 3]), vec![Vec::<u8>::new(); 2]);
        let rebuilt = coder.reconstruct(&[None; 5], &[0; 5], &[4, 0]).unwrap();
        assert_eq!(rebuilt, vec![Vec::<u8>::new(); 2]);
    }
}

#[test]
fn only_what_is_wanted_comes_back_in_the_order_asked() {
    let geometry = geometry(4, 3);
    let mut random = Random(0x3a17);
    let stripe = stripe(geometry, (0..4).map(|_| random.bytes(100)).collect());
    for coder in coders(geometry) {
        let shards = without(&stripe, &[1, 3, 5]);
        let rebuilt = coder.reconstruct(&shards, &lens(&stripe), &[5, 1]).unwrap();
        assert_eq!(rebuilt, [stripe[5].clone(), stripe[1].clone()]);
        assert!(coder.reconstruct(&shards, &lens(&stripe), &[]).unwrap().is_empty());
    }
}

#[test]
fn a_flipped_byte_of_a_source_changes_what_is_rebuilt() {
    let geometry = geometry(4, 2);
    let mut random = Random(0xf11b);
    let original = stripe(geometry, (0..4).map(|_| random.bytes(100)).collect());
    let mut damaged = original.clone();
    damaged[4][70] ^= 1;
    for coder in coders(geometry) {
        let rebuilt = coder.reconstruct(&without(&damaged, &[2]), &lens(&original), &[2]).unwrap();
        assert_ne!(rebuilt[0][70], original[2][70]);
        assert_eq!(rebuilt[0][..70], original[2][..70]);
        assert_eq!(rebuilt[0][71..], original[2][71..]);
    }
}

#[test]
fn shards_that_do_not_fit_each_other_are_refused() {
    let coder = Erasure::new(geometry(2, 1));
    let (a, b) = (vec![1u8; 10], vec![2u8; 20]);
    let encode = |data: &[&[u8]], len: usize| coder.encode(data, &mut [&mut vec![0; len][..]]);
    assert_eq!(encode(&[&a, &b], 20), Ok(()));
    assert_eq!(encode(&[&a], 10), Err(CodecError::WrongCount { expected: 2, actual: 1 }));
    assert_eq!(encode(&[&a, &b], 19), Err(CodecError::WrongLength { shard: 2, expected: 20, actual: 19 }));
    assert_eq!(encode(&[&a, &b], 21), Err(CodecError::WrongLength { shard: 2, expected: 20, actual: 21 }));
    assert_eq!(coder.encode(&[&a, &b], &mut []), Err(CodecError::WrongCount { expected: 1, actual: 0 }));

    let reconstruct = |shards: &[Option<&[u8]>], lens: &[usize], want| coder.reconstruct(shards, lens, &[want]);
    let at_hand = [Some(&a[..]), Some(&b[..]), None];
    let parity = reconstruct(&at_hand, &[10, 20, 20], 2).unwrap();
    let expected = slow_parity(coder.geometry(), &[a.clone(), b.clone()]);
    assert_eq!(parity, expected);
    let refused = |shards: &[Option<&[u8]>], lens: &[usize], want| reconstruct(shards, lens, want).unwrap_err();
    assert_eq!(refused(&at_hand[..2], &[10, 20, 20], 2), CodecError::WrongCount { expected: 3, actual: 2 });
    assert_eq!(refused(&at_hand, &[10, 20], 2), CodecError::WrongCount { expected: 3, actual: 2 });
    let wrong = CodecError::WrongLength { shard: 0, expected: 11, actual: 10 };
    assert_eq!(refused(&at_hand, &[11, 20, 20], 2), wrong);
    assert!(!wrong.is_data_loss());
    let wrong = CodecError::WrongLength { shard: 2, expected: 20, actual: 10 };
    assert_eq!(refused(&at_hand, &[10, 20, 10], 2), wrong);
    assert_eq!(refused(&at_hand, &[10, 20, 20], 3), CodecError::NoSuchShard { shard: 3, total: 3 });
    assert_eq!(refused(&at_hand, &[10, 20, 20], 1), CodecError::NotMissing { shard: 1 });
}

#[test]
fn a_backend_that_is_not_available_says_so() {
    let geometry = geometry(4, 2);
    assert_eq!(Backend::available()[..2], [Backend::Scalar, Backend::Simd]);
    for backend in [Backend::Scalar, Backend::Simd, Backend::IsaL] {
        match Erasure::with_backend(geometry, backend) {
            Ok(coder) => assert!(backend.is_available() && coder.backend() == backend),
            Err(error) => {
                assert!(!backend.is_available());
                assert_eq!(error, CodecError::BackendUnavailable { backend });
            }
        }
    }
}
