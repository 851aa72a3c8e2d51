//! Random verbs against a sorted map, with power cuts and restarts in between.

mod common;

use cfs_store::{StoreError, TargetStore};
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobInfo, BlobKind};
use common::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug)]
enum Verb {
    Put {
        id: u128,
        kind: usize,
        length: usize,
    },
    Delete(Vec<u128>),
    Get {
        id: u128,
        from: u32,
        length: u32,
    },
    /// Power is cut and the target opened again.
    PowerCut,
}

fn verb() -> impl Strategy<Value = Verb> {
    let length = prop_oneof![1usize..5000, 1usize..40_000, Just(4096), Just(131_072)];
    prop_oneof![
        6 => (1u128..120, 0usize..6, length).prop_map(|(id, kind, length)| Verb::Put { id, kind, length }),
        3 => prop::collection::vec(1u128..120, 1..4).prop_map(Verb::Delete),
        4 => (1u128..120, 0u32..50_000, 0u32..50_000).prop_map(|(id, from, length)| Verb::Get { id, from, length }),
        1 => Just(Verb::PowerCut),
    ]
}

#[derive(Default)]
struct Model {
    blobs: BTreeMap<u128, BlobInfo>,
    /// Deleted ids, which nobody ever puts again.
    dead: BTreeSet<u128>,
}

async fn step(store: &TargetStore, model: &mut Model, verb: &Verb) {
    match verb {
        Verb::Put { id, .. } if model.dead.contains(id) => {}
        Verb::Put { id, kind, length } => {
            let wanted = info(*id, BlobKind::ALL[*kind], *length);
            let result = put(store, *id, wanted.kind, *length).await;
            match (model.blobs.get(id), &result) {
                (Some(existing), _) if *existing == wanted => assert_eq!(result, Ok(())),
                (Some(_), _) => assert_eq!(result, Err(StoreError::Conflict(BlobId(*id)))),
                (None, Err(StoreError::NoSpace { .. })) => {}
                (None, _) => {
                    assert_eq!(result, Ok(()));
                    model.blobs.insert(*id, wanted);
                }
            }
        }
        Verb::Delete(ids) => {
            delete(store, ids).await.unwrap();
            model.dead.extend(ids.iter().filter(|id| model.blobs.remove(id).is_some()));
        }
        Verb::Get { id, from, length } => {
            let result = store.get(BlobId(*id), *from, *length).await;
            let (id, offset, length) = (BlobId(*id), *from, *length);
            match model.blobs.get(&id.0).map(|blob| blob.length) {
                None => assert_eq!(result, Err(StoreError::NotFound(id))),
                Some(size) if from + length > size => {
                    assert_eq!(result, Err(StoreError::OutOfRange { id, offset, length, size }));
                }
                Some(size) => {
                    let expected = payload(id.0, size as usize).slice(offset as usize..(offset + length) as usize);
                    assert_eq!(result.unwrap(), expected);
                }
            }
        }
        Verb::PowerCut => unreachable!("handled by the caller"),
    }
}

async fn compare(store: &TargetStore, model: &Model) {
    for kind in BlobKind::ALL {
        let mut expected: Vec<BlobInfo> = model.blobs.values().filter(|blob| blob.kind == kind).copied().collect();
        expected.sort_by_key(|blob| (blob.owner, blob.id));
        assert_eq!(store.list(kind), expected);
    }
    for (id, blob) in &model.blobs {
        expect_blob(store, *id, blob.length as usize, "oracle").await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_does_what_a_map_does(seed in any::<u64>(), verbs in prop::collection::vec(verb(), 1..120)) {
        run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let mut node = handle.new_domain();
            let mut store = open(&disk, &node).await;
            let mut model = Model::default();
            for verb in &verbs {
                if matches!(verb, Verb::PowerCut) {
                    node.kill();
                    disk.power_cut();
                    node = handle.new_domain();
                    store = open(&disk, &node).await;
                    assert_eq!(store.recovery().corrupt, vec![]);
                    compare(&store, &model).await;
                } else {
                    step(&store, &mut model, verb).await;
                }
            }
            compare(&store, &model).await;
        });
    }
}
