//! Turns a sorted stream of entries into the tables of one run.

use crate::block::BlockBuilder;
use crate::error::KvError;
use crate::table::{IndexBuilder, Table, TableShape};
use crate::trash::Trash;
use bytes::Bytes;
use cfs_reactor::{Handle, JoinHandle};
use cfs_wire::blobs::{BlobError, BlobKind, MirroredBlobs, Owner};
use std::collections::VecDeque;
use std::rc::Rc;

/// Puts under way at once: they share the store's group commits, and memory stays at 4 MiB.
const PUTS_MAX: usize = 4;

/// What a writer needs of its store.
#[derive(Clone)]
pub struct Sink {
    pub blobs: Rc<dyn MirroredBlobs>,
    pub handle: Handle,
    pub trash: Rc<Trash>,
    pub group: u64,
    pub block_bytes: usize,
    pub table_bytes_max: usize,
}

/// Tables are durable when `finish` answers, and unnamed: dropping them deletes their blobs.
pub struct TableWriter {
    sink: Sink,
    run: u64,
    bytes: Vec<u8>,
    block: BlockBuilder,
    index: IndexBuilder,
    first_key: Vec<u8>,
    last_key: Vec<u8>,
    deletions: u32,
    puts: VecDeque<JoinHandle<Result<Rc<Table>, BlobError>>>,
    tables: Vec<Rc<Table>>,
    written: u64,
}

impl TableWriter {
    pub fn new(sink: Sink, run: u64) -> TableWriter {
        TableWriter {
            sink,
            run,
            bytes: Vec::new(),
            block: BlockBuilder::default(),
            index: IndexBuilder::new(),
            first_key: Vec::new(),
            last_key: Vec::new(),
            deletions: 0,
            puts: VecDeque::new(),
            tables: Vec::new(),
            written: 0,
        }
    }

    /// Keys must ascend strictly. Gives the core up after every block.
    pub async fn push(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), KvError> {
        // Lengths and a restart point: under 40 bytes beside key and value.
        let entry = key.len() + value.map_or(0, <[u8]>::len) + 40;
        let table = self.bytes.len() + self.block.length() + self.index.length_max(key) + self.block.last_key().len();
        if self.index.keys() > 0 && table + entry > self.sink.table_bytes_max {
            self.cut_table().await?;
            self.sink.handle.yield_now().await;
        }
        if self.index.keys() == 0 {
            self.first_key = key.to_vec();
        }
        self.block.add(key, value);
        self.index.add_key(key);
        self.deletions += u32::from(value.is_none());
        if self.block.length() >= self.sink.block_bytes {
            self.cut_block();
            self.sink.handle.yield_now().await;
        }
        Ok(())
    }

    fn cut_block(&mut self) {
        if self.block.is_empty() {
            return;
        }
        let (offset, length) = (self.bytes.len(), self.block.length());
        self.last_key.clear();
        self.last_key.extend_from_slice(self.block.last_key());
        self.index.add_block(&self.last_key, offset, length);
        self.block.finish(&mut self.bytes);
    }

    async fn cut_table(&mut self) -> Result<(), KvError> {
        self.cut_block();
        if self.index.keys() == 0 {
            return Ok(());
        }
        let (sink, run) = (self.sink.clone(), self.run);
        let mut bytes = std::mem::take(&mut self.bytes);
        let index = std::mem::replace(&mut self.index, IndexBuilder::new());
        let (index_offset, entries) = (bytes.len() as u32, index.keys());
        index.finish(sink.group, run, &mut bytes);
        let shape = TableShape {
            run,
            length: bytes.len() as u32,
            index_offset,
            entries,
            deletions: std::mem::take(&mut self.deletions),
            first_key: std::mem::take(&mut self.first_key).into(),
            last_key: Bytes::copy_from_slice(&self.last_key),
        };
        self.written += bytes.len() as u64;
        while self.puts.len() >= PUTS_MAX {
            self.reap().await?;
        }
        self.puts.push_back(self.sink.handle.spawn(async move {
            let owner = Owner { high: sink.group, low: run };
            let id = sink.blobs.put(BlobKind::Run, owner, bytes.into()).await?;
            Ok(Table::new(id, shape, true, sink.trash))
        }));
        Ok(())
    }

    /// Waits for the oldest put.
    async fn reap(&mut self) -> Result<(), KvError> {
        let Some(put) = self.puts.pop_front() else { return Ok(()) };
        let table = put.await.map_err(|_| KvError::Closed)??;
        self.tables.push(table);
        Ok(())
    }

    /// The run's tables in key order, and their bytes.
    pub async fn finish(mut self) -> Result<(Vec<Rc<Table>>, u64), KvError> {
        self.cut_table().await?;
        while !self.puts.is_empty() {
            self.reap().await?;
        }
        Ok((self.tables, self.written))
    }
}
