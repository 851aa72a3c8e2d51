//! POSIX access control lists as the model has them (acl(5)): what they make of mode bits, what
//! mode bits make of them, and what is inherited. Written from the manual, not from the code
//! under test.

use cfs_reactor::clock::SplitMix64;
use std::collections::BTreeMap;

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

/// The id that stands in entries without one.
const NO_ID: u32 = u32::MAX;

/// A list with its three base entries; with named ones there is a mask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acl {
    owner: u32,
    users: BTreeMap<u32, u32>,
    group: u32,
    groups: BTreeMap<u32, u32>,
    mask: Option<u32>,
    other: u32,
}

impl Acl {
    pub fn draw(random: &mut SplitMix64) -> Acl {
        let mut few = |most: u64| -> BTreeMap<u32, u32> {
            (0..random.below(most)).map(|_| (random.below(4) as u32, random.below(8) as u32)).collect()
        };
        let (users, groups) = (few(3), few(2));
        let masked = !users.is_empty() || !groups.is_empty() || random.one_in(2);
        let mut permissions = || random.below(8) as u32;
        let (owner, group, other) = (permissions(), permissions(), permissions());
        let mask = masked.then(permissions);
        Acl { owner, users, group, groups, mask, other }
    }

    /// As Linux has it in the attribute's value.
    pub fn bytes(&self) -> Vec<u8> {
        let mut entries = vec![(0x01, self.owner, NO_ID)];
        entries.extend(self.users.iter().map(|(id, permissions)| (0x02, *permissions, *id)));
        entries.push((0x04, self.group, NO_ID));
        entries.extend(self.groups.iter().map(|(id, permissions)| (0x08, *permissions, *id)));
        entries.extend(self.mask.map(|mask| (0x10, mask, NO_ID)));
        entries.push((0x20, self.other, NO_ID));
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend_from_slice(&(tag as u16).to_le_bytes());
            bytes.extend_from_slice(&(permissions as u16).to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    /// Whether mode bits alone can't say it.
    pub fn is_more_than_mode(&self) -> bool {
        self.mask.is_some()
    }

    /// `mode` with this list's permissions: the group bits show the mask where there is one.
    pub fn mode(&self, mode: u32) -> u32 {
        (mode & !0o777) | self.owner << 6 | self.mask.unwrap_or(self.group) << 3 | self.other
    }

    /// chmod.
    pub fn change_mode(&mut self, mode: u32) {
        self.owner = mode >> 6 & 7;
        *self.mask.as_mut().unwrap_or(&mut self.group) = mode >> 3 & 7;
        self.other = mode & 7;
    }

    /// What is made with `mode` beneath a directory with this default list: its access list and
    /// its mode. The umask has no say.
    pub fn inherited(&self, mode: u32) -> (Acl, u32) {
        let mut access = self.clone();
        access.change_mode(self.mode(mode) & mode);
        let mode = access.mode(mode);
        (access, mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_made_under_a_default_list_gets_it_narrowed_by_its_mode() {
        let default = Acl {
            owner: 7,
            users: BTreeMap::from([(1, 6)]),
            group: 5,
            groups: BTreeMap::new(),
            mask: Some(7),
            other: 4,
        };
        let (access, mode) = default.inherited(0o640);
        assert_eq!(mode, 0o640);
        assert_eq!(access.mask, Some(4), "the mode's group bits narrow the mask, not the group");
        assert_eq!((access.group, access.users[&1]), (5, 6));
        assert_eq!(access.bytes().len(), 4 + 5 * 8);
    }
}
