//! The bytes of tables and manifests are pinned: a change here needs a new format version.

use crate::block::{BlockCursor, Entry};
use crate::manifest::{self, Header};
use crate::parts::{self, ListedPart, PartHeader, Root};
use crate::table::{Table, TableReader, TableShape};
use crate::testing::MemMedium;
use crate::trash::Trash;
use crate::version::Version;
use crate::writer::{Sink, TableWriter};
use crate::{BlockCache, KvConfig};
use bytes::Bytes;
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_wire::BlobId;
use cfs_wire::blobs::MirroredBlobs;
use cfs_wire::golden::Golden;
use std::rc::Rc;

const GROUP: u64 = 0x0102;
const RUN: u64 = 0x0304_0506;
const GOLDEN: fn(&str) -> Golden = |name| Golden::new(env!("CARGO_MANIFEST_DIR"), name);

fn simulated<T: 'static, F: Future<Output = T> + 'static>(story: impl FnOnce(Handle) -> F) -> T {
    let executor = Executor::new(Rc::new(SimClock::new(1)));
    let handle = executor.domain();
    let story = story(handle.clone());
    executor.run_simulated(&handle, story).expect("the story goes on").expect("the story ends")
}

/// More than lie between two restart points, in more than one block; every seventh a deletion.
fn entries() -> Vec<Entry> {
    let entry = |number: usize| Entry {
        key: Bytes::from(format!("key/{:03}/{}", number / 3, "abc".split_at(number % 3).1)),
        value: (!number.is_multiple_of(7)).then(|| Bytes::from(vec![number as u8; number / 2])),
    };
    let mut entries: Vec<Entry> = (1..=40).map(entry).collect();
    entries.sort_by(|one, other| one.key.cmp(&other.key));
    entries
}

#[test]
fn a_table_is_what_it_was() {
    let (bytes, read) = simulated(|handle| async move {
        let blobs = MemMedium::new(1).open(&handle) as Rc<dyn MirroredBlobs>;
        let trash = Trash::new(blobs.clone(), handle.clone());
        let table_bytes_max = KvConfig::default().table_bytes_max;
        let sink = Sink {
            blobs: blobs.clone(),
            handle: handle.clone(),
            trash,
            group: GROUP,
            block_bytes: 400,
            table_bytes_max,
        };
        let mut writer = TableWriter::new(sink, RUN);
        for entry in entries() {
            writer.push(&entry.key, entry.value.as_deref()).await.expect("there is room");
        }
        let (tables, _) = writer.finish().await.expect("there is room");
        let [table] = &tables[..] else { panic!("{} tables", tables.len()) };
        let bytes = blobs.get(table.id, 0, table.shape.length).await.expect("it was put");
        let reader = TableReader { blobs, cache: BlockCache::new(0), handle, group: GROUP };
        let index = reader.index(table).await.expect("it is whole");
        assert!(index.blocks.len() > 1, "one block tells little of the index");
        let mut read = Vec::new();
        for block in &index.blocks {
            let mut cursor = BlockCursor::new(reader.block(table, block).await.expect("it is whole"));
            while let Some(entry) = cursor.next().expect("it is whole") {
                read.push(entry);
            }
        }
        (bytes, read)
    });
    assert_eq!(read, entries());
    let mut golden = GOLDEN("table");
    golden.bytes("table", &bytes);
    golden.check();
}

#[test]
fn a_manifest_is_what_it_was() {
    let blobs = simulated(|handle| async move { (MemMedium::new(1).open(&handle) as Rc<dyn MirroredBlobs>, handle) });
    let trash = Trash::new(blobs.0, blobs.1);
    let table = |number: u32, first: &'static str, last: &'static str| {
        let shape = TableShape {
            run: 0x2021 + u64::from(number),
            length: 0x3031 + number,
            index_offset: 0x2031 + number,
            entries: 0x4041 + number,
            deletions: 0x0151 + number,
            first_key: Bytes::from_static(first.as_bytes()),
            last_key: Bytes::from_static(last.as_bytes()),
        };
        Table::new(BlobId(0xa1a2_a3a4_a5a6_a7a8_0000_0000_0000_0000 + u128::from(number)), shape, false, trash.clone())
    };
    let version = Version {
        recent: vec![vec![table(1, "aab", "abc"), table(2, "abd", "acd")], vec![table(3, "abc", "abc")]],
        // Level 2 is empty.
        levels: vec![vec![table(4, "a", "b")], Vec::new(), vec![table(5, "aa", "ab"), table(6, "b", "bcd")]],
    };
    let applied = Bytes::from_static(b"the applied mark");
    let header = Header { group: GROUP, version: 7 << 32 | 0x0809, sequence: 0x0a0b_0c0d, next_run: 0x0e0f, applied };
    let bytes = manifest::encode(&header, &version);
    let listed = |level, run: &Vec<Rc<Table>>| (level, run.iter().map(|t| (t.id, t.shape.clone())).collect::<Vec<_>>());
    let (recent, levels) = (&version.recent, &version.levels);
    let runs = vec![listed(0, &recent[0]), listed(0, &recent[1]), listed(1, &levels[0]), listed(3, &levels[2])];
    assert_eq!(manifest::decode(&bytes), Ok((header, runs)));
    let mut golden = GOLDEN("manifest");
    golden.bytes("manifest", &bytes);
    golden.check();
}

#[test]
fn the_root_and_the_parts_of_a_manifest_are_what_they_were() {
    let version = 7 << 32 | 0x0809;
    let header = PartHeader { group: GROUP, version, index: 0x0a0b };
    let part = parts::encode_part(&header, b"bytes of a manifest");
    assert_eq!(parts::decode_part(&part), Ok((header, &b"bytes of a manifest"[..])));
    let listed = |number: u32| ListedPart {
        id: BlobId(0xb1b2_b3b4_b5b6_b7b8_0000_0000_0000_0000 + u128::from(number)),
        length: 0x0001_1011 + number,
    };
    let root = Root { group: GROUP, version, parts: vec![listed(1), listed(2), listed(3)] };
    let bytes = parts::encode_root(&root);
    assert_eq!(parts::decode_root(&bytes), Ok(root));
    let mut golden = GOLDEN("manifest_parts");
    golden.bytes("root", &bytes);
    golden.bytes("part", &part);
    golden.check();
}
