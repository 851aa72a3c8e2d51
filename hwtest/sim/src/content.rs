//! A file's bytes: what they are now, and what they may be after a crash.
//!
//! The durability contract allows after a crash of the client, for each inode, any state between
//! the last one known durable and the present one, in the order of the edits.

use bytes::Bytes;
use std::rc::Rc;

/// One change of a file's bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Edit {
    Write {
        offset: u64,
        data: Bytes,
    },
    /// Bytes that become visible from the front on, in several commits.
    Copy {
        offset: u64,
        data: Bytes,
    },
    Truncate {
        size: u64,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    Extend {
        size: u64,
    },
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Edit::Write { offset, data } | Edit::Copy { offset, data } => {
                if data.is_empty() {
                    return;
                }
                let (start, end) = (*offset as usize, *offset as usize + data.len());
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[start..end].copy_from_slice(data);
            }
            Edit::Truncate { size } => bytes.resize(*size as usize, 0),
            Edit::Zero { offset, length } => {
                let end = bytes.len().min(offset.saturating_add(*length) as usize);
                let start = end.min(*offset as usize);
                bytes[start..end].fill(0);
            }
            Edit::Extend { size } => {
                if bytes.len() < *size as usize {
                    bytes.resize(*size as usize, 0);
                }
            }
        }
    }
}

/// The bytes of one file.
#[derive(Clone, Default, Debug)]
pub struct Content {
    now: Rc<Vec<u8>>,
    durable: Rc<Vec<u8>>,
    since: Vec<Edit>,
    /// The client whose edits `since` holds.
    writer: Option<usize>,
}

impl Content {
    pub fn now(&self) -> &[u8] {
        &self.now
    }

    /// Edits that a crash of their client may undo.
    pub fn pending(&self) -> usize {
        self.since.len()
    }

    pub fn is_pending_of(&self, client: usize) -> bool {
        !self.since.is_empty() && self.writer == Some(client)
    }

    /// An edit of `client`, which has seen everything before it.
    pub fn edit(&mut self, client: usize, edit: Edit) {
        self.seen_by(client);
        edit.apply(Rc::make_mut(&mut self.now));
        self.since.push(edit);
        self.writer = Some(client);
    }

    /// Another client than the writer saw the present state: coherence committed it before.
    pub fn seen_by(&mut self, client: usize) {
        if self.writer.is_some_and(|writer| writer != client) {
            self.settle();
        }
    }

    /// What `client` wrote is durable: what another one has written since is its own to sync.
    pub fn synced_by(&mut self, client: usize) {
        if self.is_pending_of(client) {
            self.settle();
        }
    }

    /// The present state is durable.
    pub fn settle(&mut self) {
        self.durable = self.now.clone();
        self.since.clear();
        self.writer = None;
    }

    /// Whether `bytes` is a state that a crash may leave.
    pub fn allows(&self, bytes: &[u8]) -> bool {
        let mut state = (*self.durable).clone();
        if state == bytes {
            return true;
        }
        for edit in &self.since {
            if let Edit::Copy { .. } = edit {
                let before = state.clone();
                edit.apply(&mut state);
                if is_partly(&before, &state, bytes) {
                    return true;
                }
                continue;
            }
            edit.apply(&mut state);
            if state == bytes {
                return true;
            }
        }
        false
    }

    /// After a crash: this is what it left.
    pub fn adopt(&mut self, bytes: &[u8]) {
        self.now = Rc::new(bytes.to_vec());
        self.settle();
    }
}

/// Whether `bytes` is `after` up to some point and `before` from there on.
fn is_partly(before: &[u8], after: &[u8], bytes: &[u8]) -> bool {
    if !(before.len()..=after.len()).contains(&bytes.len()) {
        return false;
    }
    let copied = bytes.iter().zip(after).take_while(|(a, b)| a == b).count();
    if bytes.len() > before.len() {
        return copied == bytes.len();
    }
    let left = bytes.iter().rev().zip(before.iter().rev()).take_while(|(a, b)| a == b).count();
    copied + left >= bytes.len()
}

/// Where two byte strings first differ, for messages.
pub fn difference(expected: &[u8], found: &[u8]) -> String {
    let at = expected.iter().zip(found).position(|(a, b)| a != b);
    let lengths = format!("{} bytes expected, {} found", expected.len(), found.len());
    match at {
        Some(at) => {
            let wrong = expected.iter().zip(found).filter(|(a, b)| a != b).count();
            let zeroes = expected.iter().zip(found).filter(|(a, b)| a != b).all(|(_, b)| *b == 0);
            let what = if zeroes { ", all of them zero" } else { "" };
            format!("{lengths}; first difference at {at}, {wrong} bytes differ{what}")
        }
        None => format!("{lengths}; equal up to the shorter end"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, data: &'static [u8]) -> Edit {
        Edit::Write { offset, data: Bytes::from_static(data) }
    }

    #[test]
    fn a_crash_may_undo_a_suffix_of_the_edits_since_the_last_fsync_and_nothing_else() {
        let mut content = Content::default();
        content.edit(0, write(0, b"aaaa"));
        content.settle();
        content.edit(0, write(2, b"bb"));
        content.edit(0, write(0, b"cc"));
        for legal in [b"aaaa", b"aabb", b"ccbb"] {
            assert!(content.allows(legal), "{legal:?}");
        }
        assert!(!content.allows(b"ccaa"), "the second edit without the first");
        assert!(!content.allows(b""), "less than was durable");
    }

    #[test]
    fn what_another_client_saw_is_never_undone() {
        let mut content = Content::default();
        content.edit(0, write(0, b"old"));
        content.seen_by(0);
        assert!(content.allows(b""), "its own reading commits nothing");
        content.seen_by(1);
        assert!(!content.allows(b"") && content.allows(b"old"));
    }

    #[test]
    fn a_client_syncs_what_it_wrote_itself() {
        let mut content = Content::default();
        content.edit(0, write(0, b"new"));
        content.synced_by(1);
        assert!(content.allows(b""), "the other one wrote nothing");
        content.synced_by(0);
        assert!(!content.allows(b""));
    }

    #[test]
    fn a_copy_may_be_there_in_part_from_its_front() {
        let mut content = Content::default();
        content.edit(0, write(0, b"......"));
        content.settle();
        content.edit(0, Edit::Copy { offset: 1, data: Bytes::from_static(b"12345678") });
        for legal in [&b"......"[..], b".12...", b".12345", b".123456", b".12345678"] {
            assert!(content.allows(legal), "{legal:?}");
        }
        assert!(!content.allows(b"..2..."));
        assert!(!content.allows(b".12..."[..5].into()));
    }
}
