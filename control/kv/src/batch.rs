//! An atomic set of changes.

use crate::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use bytes::Bytes;

/// What one applied log entry changes. Later changes of a key win over earlier ones.
///
/// The store keeps the buffers it is given: pass ones of their own, not slices of a large
/// message, or the memtable's bound does not hold.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    pub(crate) changes: Vec<(Bytes, Option<Bytes>)>,
}

impl Batch {
    pub fn new() -> Batch {
        Batch::default()
    }

    /// # Panics
    /// When key or value exceed [`KEY_BYTES_MAX`] or [`VALUE_BYTES_MAX`]: the layer above bounds
    /// what users send far below.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        let (key, value) = (key.into(), value.into());
        assert!(key.len() <= KEY_BYTES_MAX, "a key of {} bytes", key.len());
        assert!(value.len() <= VALUE_BYTES_MAX, "a value of {} bytes", value.len());
        self.changes.push((key, Some(value)));
    }

    /// # Panics
    /// When the key exceeds [`KEY_BYTES_MAX`].
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        let key = key.into();
        assert!(key.len() <= KEY_BYTES_MAX, "a key of {} bytes", key.len());
        self.changes.push((key, None));
    }

    pub fn len(&self) -> usize {
        self.changes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}
