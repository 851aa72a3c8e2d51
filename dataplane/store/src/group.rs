//! Forms one append from what waits on a lane: header, payload parts, and what to do with the
//! index once it is durable.

use crate::commit::{Item, Lane, NewBlob, Placed, Request};
use crate::core::Core;
use crate::error::StoreError;
use crate::layout::append::{
    AppendHeader, BlobRecord, Record, TombstoneRecord, blob_record_bytes, header_bytes, tombstone_record_bytes,
};
use crate::layout::stamp::Stamp;
use crate::layout::{PAGE_BYTES, round_up};
use crate::state::{Entry, Place};
use crate::transfer;
use bytes::Bytes;
use cfs_reactor::sync::OneshotSender;

/// Records in one append: two parts each stay below the kernel's 1024 I/O vectors.
pub(crate) const RECORDS_MAX: usize = 256;
/// Payload of one append, unless a single blob is larger.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 1 << 20;

pub(crate) struct Group {
    pub sequence: u64,
    pub offset: u32,
    pub end: u32,
    pub parts: Vec<Bytes>,
    pub placed: Vec<Placed>,
    pub replies: Vec<OneshotSender<Result<(), StoreError>>>,
}

/// Record and payload bytes of one item, as things stand now.
fn sizes(core: &Core, item: &Item) -> (usize, u32) {
    match item {
        Item::Put(blob) | Item::Move(blob, _) => (blob_record_bytes(blob.info.length), round_up(blob.info.length)),
        Item::Tombstone(id) => (tombstone_record_bytes(core.state.borrow().places_of(*id).len()), 0),
    }
}

/// Bytes of records, and bytes of the whole append, if it held only the first waiting request.
pub(crate) fn first_sizes(core: &Core, lane: &Lane) -> (usize, u32) {
    let queue = lane.queue.borrow();
    let Some(first) = queue.front() else { return (0, 0) };
    let (record, payload) = sizes(core, &first.item);
    (record, header_bytes(record).map_or(u32::MAX, |header| header + payload))
}

/// Takes as many waiting requests as fit in the zone and in one append.
pub(crate) fn form(core: &Core, lane: &Lane, zone: u32) -> Option<Group> {
    let (requests, header) = take(core, lane, zone);
    if requests.is_empty() {
        return None;
    }
    let (offset, generation, sequence) = {
        let mut state = core.state.borrow_mut();
        let sequence = state.sequences.take();
        let zone = state.zones.get(zone);
        (zone.end, zone.generation.unwrap_or_default(), sequence)
    };
    let mut start = header;
    let (mut records, mut placed) = (Vec::new(), Vec::new());
    let (mut parts, mut replies) = (vec![Bytes::new()], Vec::new());
    for Request { item, reply } in requests {
        replies.push(reply);
        let mut place_blob = |blob: NewBlob| {
            let NewBlob { info, checksums, payload } = blob;
            transfer::padded_parts(&payload, &mut parts);
            records.push(Record::Blob(BlobRecord { info, start, checksums: checksums.clone() }));
            let place = Place { zone, generation, offset: offset + start };
            start += round_up(info.length);
            Entry { info, place, checksums }
        };
        match item {
            Item::Put(blob) => placed.push(Placed::Put(place_blob(blob))),
            Item::Move(blob, from) => placed.push(Placed::Move(place_blob(blob), from)),
            Item::Tombstone(id) => {
                let record = TombstoneRecord { id, places: core.state.borrow().places_of(id) };
                records.push(Record::Tombstone(record.clone()));
                placed.push(Placed::Tombstone(record));
            }
        }
    }
    let (stream, tails) = {
        let state = core.state.borrow();
        (state.zones.get(zone).stream, state.zones.tails())
    };
    let stamp = core.stamp(stream, zone, generation, offset, sequence);
    let stamp = Stamp { bytes: header, extent: start, ..stamp };
    let header = AppendHeader { stamp, tails, records };
    let encoded = header.encode();
    let mut state = core.state.borrow_mut();
    let zone = state.zones.get_mut(zone);
    zone.end = offset + start;
    zone.under_way += 1;
    if let Some(summary) = &mut zone.summary {
        summary.add(&header, &encoded);
    }
    drop(state);
    parts[0] = transfer::aligned(&encoded);
    Some(Group { sequence, offset, end: offset + start, parts, placed, replies })
}

/// The requests of the next append and the length of its header.
fn take(core: &Core, lane: &Lane, zone: u32) -> (Vec<Request>, u32) {
    let (mut requests, mut header) = (Vec::new(), PAGE_BYTES);
    let (mut records, mut payload) = (0usize, 0u32);
    while requests.len() < RECORDS_MAX {
        let Some((record_bytes, payload_bytes)) = lane.queue.borrow().front().map(|next| sizes(core, &next.item))
        else {
            break;
        };
        let Some(grown) = header_bytes(records + record_bytes) else { break };
        let room = core.state.borrow().zones.room_now(zone, records + record_bytes);
        let beyond = payload + payload_bytes > PAYLOAD_BYTES_MAX && !requests.is_empty();
        if beyond || grown + payload + payload_bytes > room {
            break;
        }
        (records, payload, header) = (records + record_bytes, payload + payload_bytes, grown);
        requests.extend(lane.pop());
    }
    (requests, header)
}
