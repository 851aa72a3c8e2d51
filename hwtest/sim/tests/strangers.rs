//! Bytes of strangers: every body that comes over the wire or out of the log is decoded from random
//! bytes. An error or a value that means the same when it is written and read again, never a panic.

use cfs_api::{AdminCall, AdminError, AdminReply};
use cfs_consensus::Mark;
use cfs_meta::service::applied::decode_entry;
use cfs_meta::service::{PeerCall, PeerReply};
use cfs_meta::state::LogEntry;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::body::{self, BodyError};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::data::{DataError, FetchCall, StoreCall, StoreReply};
use cfs_wire::meta::{
    EventsCall, EventsReply, MetaCall, MetaError, MetaResult, MountCall, MountResult, ShardOp, ShardReply,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

const ROUNDS: usize = 4000;

/// Mostly small bytes: as numbers of variants, lengths and flags they lead further in.
fn bytes(random: &mut SplitMix64) -> Vec<u8> {
    let length = random.below(120);
    let plain = random.one_in(3);
    (0..length).map(|_| if plain { random.next_u64() as u8 } else { random.below(24) as u8 }).collect()
}

/// How many of the rounds gave a value.
fn decoded<T: Serialize + DeserializeOwned>(seed: u64) -> usize {
    let mut random = SplitMix64::new(seed);
    let mut values = 0;
    for round in 0..ROUNDS {
        let input = bytes(&mut random);
        let value = match body::decode::<T>(&input) {
            Err(BodyError::Trailing { bytes }) => body::decode::<T>(&input[..input.len() - bytes]),
            outcome => outcome,
        };
        let Ok(value) = value else { continue };
        values += 1;
        let written = body::encode(&value).expect("what was decoded can be written");
        let again = body::encode(&body::decode::<T>(&written).expect("what was written can be read")).unwrap();
        let name = std::any::type_name::<T>();
        assert!(again == written, "{name}, seed {seed}, round {round}: {input:02x?} is not what it becomes");
    }
    values
}

#[test]
fn random_bodies_are_errors_or_values_that_stay_the_same() {
    let kinds: [(&str, fn(u64) -> usize); 17] = [
        ("MetaCall", decoded::<MetaCall>),
        ("MetaResult", decoded::<MetaResult>),
        ("MountCall", decoded::<MountCall>),
        ("MountResult", decoded::<MountResult>),
        ("EventsCall", decoded::<EventsCall>),
        ("events", decoded::<Result<EventsReply, MetaError>>),
        ("ShardOp", decoded::<ShardOp>),
        ("ShardReply", decoded::<ShardReply>),
        ("StoreCall", decoded::<StoreCall>),
        ("stored", decoded::<Result<StoreReply, DataError>>),
        ("FetchCall", decoded::<FetchCall>),
        ("fetched", decoded::<Result<(), DataError>>),
        ("PeerCall", decoded::<PeerCall>),
        ("PeerReply", decoded::<PeerReply>),
        ("AdminCall", decoded::<AdminCall>),
        ("AdminReply", decoded::<Result<AdminReply, AdminError>>),
        ("LogEntry", decoded::<LogEntry>),
    ];
    for (seed, (name, decode)) in (1..).zip(kinds) {
        let values = decode(seed);
        assert!(values > 0, "no round of {name} got past its first errors: it proves nothing");
    }
}

#[test]
fn random_records_of_log_and_superblock_are_refused_or_in_range() {
    let mut random = SplitMix64::new(99);
    for _ in 0..20 * ROUNDS {
        let mut input = bytes(&mut random);
        let _ = decode_entry(&input);
        let _ = Mark::decode(&input);
        if let Some(first) = input.first_mut() {
            *first = ClusterParameters::FORMAT;
        }
        if let Ok(parameters) = ClusterParameters::decode(&input) {
            assert!(parameters.shards > 0 && parameters.targets > 0, "{parameters:?}");
        }
    }
}
