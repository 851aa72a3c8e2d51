//! Bodies off the wire, and what else is decoded field by field: an error, or a value that means
//! the same when it is written and read again.

use super::corpus;
use super::mutate::{Length, mutate, noise, pick};
use super::{Fed, Target, Trial};
use cfs_api::{AdminCall, AdminError, AdminReply};
use cfs_consensus::Mark;
use cfs_consensus::host::rpc;
use cfs_meta::service::applied::{decode_entry, encode_entry};
use cfs_meta::service::{PeerCall, PeerReply};
use cfs_meta::state::LogEntry;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::body::{self, BodyError};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::data::{DataError, FetchCall, ReserveCall, ReserveReply, StoreCall, StoreReply};
use cfs_wire::meta::{
    EventsCall, EventsReply, MetaCall, MetaError, MetaResult, MountCall, MountResult, ShardOp, ShardReply,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Of each kind.
const INPUTS_PER_ROUND: usize = 4;
/// Values found in noise: all kinds start from some, also those that the recorded cluster never
/// sent.
const NOISE_TRIES: usize = 4000;
const FROM_NOISE_MAX: usize = 60;
const KNOWN_MAX: usize = 400;

/// The bytes of the value that an input stands for, as this program writes it.
type Rewrite = fn(&[u8]) -> Result<Option<Vec<u8>>, String>;

struct Kind {
    name: &'static str,
    rewrite: Rewrite,
    corpus: Vec<Vec<u8>>,
}

pub struct Bodies {
    kinds: Vec<Kind>,
}

const KINDS: [(&str, Rewrite); 32] = [
    ("MetaCall", body_again::<MetaCall>),
    ("MetaResult", body_again::<MetaResult>),
    ("MountCall", body_again::<MountCall>),
    ("MountResult", body_again::<MountResult>),
    ("EventsCall", body_again::<EventsCall>),
    ("events", body_again::<Result<EventsReply, MetaError>>),
    ("ShardOp", body_again::<ShardOp>),
    ("ShardReply", body_again::<ShardReply>),
    ("StoreCall", body_again::<StoreCall>),
    ("stored", body_again::<Result<StoreReply, DataError>>),
    ("FetchCall", body_again::<FetchCall>),
    ("fetched", body_again::<Result<(), DataError>>),
    ("ReserveCall", body_again::<ReserveCall>),
    ("reserved", body_again::<Result<ReserveReply, DataError>>),
    ("PeerCall", body_again::<PeerCall>),
    ("PeerReply", body_again::<PeerReply>),
    ("AdminCall", body_again::<AdminCall>),
    ("AdminReply", body_again::<Result<AdminReply, AdminError>>),
    ("Raft append", body_again::<(u16, rpc::AppendCall)>),
    ("Raft appended", body_again::<rpc::AppendReply>),
    ("Raft vote", body_again::<(u16, rpc::VoteCall)>),
    ("Raft voted", body_again::<rpc::VoteReply>),
    ("Raft transfer of leadership", body_again::<(u16, rpc::TransferLeaderCall)>),
    ("Raft transferred", body_again::<rpc::TransferLeaderReply>),
    ("Raft snapshot", body_again::<(u16, rpc::SnapshotBegin)>),
    ("Raft snapshot's id", body_again::<u64>),
    ("Raft snapshot's part", body_again::<(u16, rpc::Transfer)>),
    ("Raft snapshot taken", body_again::<rpc::SnapshotReply>),
    ("LogEntry", body_again::<LogEntry>),
    ("log entry", entry_again),
    ("mark", mark_again),
    ("cluster parameters", parameters_again),
];

fn body_again<T: Serialize + DeserializeOwned>(input: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let value = match body::decode::<T>(input) {
        Err(BodyError::Trailing { bytes }) => body::decode::<T>(&input[..input.len() - bytes]),
        outcome => outcome,
    };
    let Ok(value) = value else { return Ok(None) };
    body::encode(&value).map(|bytes| Some(bytes.to_vec())).map_err(|error| error.to_string())
}

fn entry_again(input: &[u8]) -> Result<Option<Vec<u8>>, String> {
    Ok(decode_entry(input).ok().map(|(nonce, entry)| encode_entry(nonce, &entry).to_vec()))
}

fn mark_again(input: &[u8]) -> Result<Option<Vec<u8>>, String> {
    Ok(Mark::decode(input).ok().map(|mark| mark.encode().to_vec()))
}

fn parameters_again(input: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let Ok(parameters) = ClusterParameters::decode(input) else { return Ok(None) };
    if parameters.shards == 0 || parameters.targets == 0 {
        return Err(format!("a cluster of nothing: {parameters:?}"));
    }
    Ok(Some(parameters.encode()))
}

impl Bodies {
    pub fn new() -> Bodies {
        let (recorded, golden) = (corpus::recorded(), corpus::golden());
        let mark = Mark::default().encode();
        let messages = recorded.calls.iter().flat_map(|(request, reply)| [&request.body, &reply.body]);
        let entries = recorded.entries.iter().map(|(_, entry)| entry);
        let recorded = messages.chain(entries).chain([&recorded.parameters, &mark]).map(|bytes| &bytes[..]);
        let known: Vec<&[u8]> = golden.iter().map(|bytes| &bytes[..]).chain(recorded).collect();
        let kinds = KINDS.into_iter().zip(1..).map(|((name, rewrite), seed)| {
            // A body counts for every kind whose own writing of it is the same: of which kind it
            // was is not recorded.
            let is_kind = |bytes: &&&[u8]| matches!(rewrite(bytes), Ok(Some(written)) if written == **bytes);
            let mut corpus: Vec<Vec<u8>> =
                known.iter().filter(is_kind).take(KNOWN_MAX).map(|bytes| bytes.to_vec()).collect();
            let mut random = SplitMix64::new(seed);
            let found = (0..NOISE_TRIES).filter_map(|_| {
                let mut input = noise(&mut random);
                if let Some(format) = input.first_mut()
                    && !matches!(name, "LogEntry")
                    && random.one_in(2)
                {
                    // What has a format byte begins with it.
                    *format = 1;
                }
                rewrite(&input).ok().flatten()
            });
            corpus.extend(found.take(FROM_NOISE_MAX));
            assert!(!corpus.is_empty(), "nothing is known of {name}: fuzzing it would prove nothing");
            Kind { name, rewrite, corpus }
        });
        Bodies { kinds: kinds.collect() }
    }
}

impl Target for Bodies {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for kind in &self.kinds {
            for _ in 0..INPUTS_PER_ROUND {
                let input = if random.one_in(8) {
                    noise(random)
                } else {
                    let mut input = pick(random, &kind.corpus).clone();
                    mutate(random, &mut input, 0, &kind.corpus, Length::Free);
                    input
                };
                trial.feed(kind.name, &input, |input| stays_the_same(kind.rewrite, input));
            }
        }
    }
}

fn stays_the_same(rewrite: Rewrite, input: &[u8]) -> Result<Fed, String> {
    let Some(written) = rewrite(input)? else { return Ok(Fed::Refused) };
    match rewrite(&written)? {
        Some(again) if again == written => Ok(Fed::Taken),
        Some(again) => Err(format!("it is written as {written:02x?}, and that as {again:02x?}")),
        None => Err(format!("it is written as {written:02x?}, which can't be read")),
    }
}
