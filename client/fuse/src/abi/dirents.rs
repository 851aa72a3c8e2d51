//! Directory entries as READDIR gives them: one after the other, each padded to 8 bytes, as many as
//! the caller has room for.

use super::DirEntryHead;

const ALIGNMENT: usize = 8;

/// The answer to one READDIR.
pub(crate) struct Dirents {
    bytes: Vec<u8>,
    room: usize,
}

impl Dirents {
    /// For a caller with room for so many bytes.
    pub fn new(room: usize) -> Dirents {
        Dirents { bytes: Vec::with_capacity(room.min(1 << 16)), room }
    }

    /// Appends an entry. False, with nothing appended, when there is no room for it.
    pub fn push(&mut self, ino: u64, cookie: u64, kind: u32, name: &[u8]) -> bool {
        let head = DirEntryHead { ino, off: cookie, namelen: name.len() as u32, kind };
        let length = (size_of::<DirEntryHead>() + name.len()).next_multiple_of(ALIGNMENT);
        if self.bytes.len() + length > self.room {
            return false;
        }
        let end = self.bytes.len() + length;
        self.bytes.extend_from_slice(bytemuck::bytes_of(&head));
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_the_first_without_room_is_left_out() {
        let mut plain = Dirents::new(32 + 32 + 31);
        assert!(plain.push(7, 100, 8, b"abc"));
        assert!(plain.push(8, 200, 4, b"12345678"));
        assert!(!plain.push(9, 300, 8, b"x"), "31 bytes are left and 32 wanted");
        let bytes = plain.into_bytes();
        let mut expected = Vec::new();
        for (ino, off, namelen, kind, name) in
            [(7u64, 100u64, 3u32, 8u32, b"abc\0\0\0\0\0"), (8, 200, 8, 4, b"12345678")]
        {
            expected.extend_from_slice(&ino.to_ne_bytes());
            expected.extend_from_slice(&off.to_ne_bytes());
            expected.extend_from_slice(&namelen.to_ne_bytes());
            expected.extend_from_slice(&kind.to_ne_bytes());
            expected.extend_from_slice(name);
        }
        assert_eq!(bytes, expected);
    }
}
