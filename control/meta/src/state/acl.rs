//! POSIX access control lists as extended attributes: the format of Linux's
//! `system.posix_acl_access` and `_default` (version 2), and how they and mode bits follow one
//! another (POSIX.1e draft 17, sections 23.1.2 and 23.1.5; acl(5)).

use cfs_wire::Errno;

pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
/// What the kernel calls an undefined id: no user or group may have it.
const UNDEFINED_ID: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Tag {
    UserObj = 0x01,
    User = 0x02,
    GroupObj = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

impl Tag {
    fn of(raw: u16) -> Option<Tag> {
        use Tag::*;
        [UserObj, User, GroupObj, Group, Mask, Other].into_iter().find(|tag| *tag as u16 == raw)
    }

    fn is_named(self) -> bool {
        matches!(self, Tag::User | Tag::Group)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct AclEntry {
    tag: Tag,
    permissions: u16,
    id: u32,
}

/// A valid list: in tag order, with the three base entries, and a mask where it needs one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Acl {
    entries: Vec<AclEntry>,
}

impl Acl {
    /// `None`: a list without entries, which stands for no ACL.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Acl>, Errno> {
        let (header, mut rest) = bytes.split_at_checked(HEADER_BYTES).ok_or(Errno::EINVAL)?;
        if header != VERSION.to_le_bytes() {
            return Err(Errno::EOPNOTSUPP);
        }
        if rest.len() % ENTRY_BYTES != 0 {
            return Err(Errno::EINVAL);
        }
        let mut entries = Vec::new();
        while let Some(([t0, t1, p0, p1, i0, i1, i2, i3], behind)) = rest.split_first_chunk() {
            let tag = Tag::of(u16::from_le_bytes([*t0, *t1])).ok_or(Errno::EINVAL)?;
            let permissions = u16::from_le_bytes([*p0, *p1]);
            let id = u32::from_le_bytes([*i0, *i1, *i2, *i3]);
            entries.push(AclEntry { tag, permissions, id });
            rest = behind;
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let acl = Acl { entries };
        acl.validate()?;
        Ok(Some(acl))
    }

    fn validate(&self) -> Result<(), Errno> {
        let ordered = self.entries.is_sorted_by_key(|entry| entry.tag);
        let count = |tag| self.entries.iter().filter(|entry| entry.tag == tag).count();
        let bases = [Tag::UserObj, Tag::GroupObj, Tag::Other].into_iter().all(|tag| count(tag) == 1);
        let masks = count(Tag::Mask);
        let named = self.entries.iter().any(|entry| entry.tag.is_named());
        let mask = masks == 1 || (masks == 0 && !named);
        let fields = self
            .entries
            .iter()
            .all(|entry| entry.permissions <= 7 && !(entry.tag.is_named() && entry.id == UNDEFINED_ID));
        if ordered && bases && mask && fields { Ok(()) } else { Err(Errno::EINVAL) }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            bytes.extend_from_slice(&(entry.tag as u16).to_le_bytes());
            bytes.extend_from_slice(&entry.permissions.to_le_bytes());
            let id = if entry.tag.is_named() { entry.id } else { UNDEFINED_ID };
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    /// Whether it says more than mode bits can.
    pub(crate) fn is_extended(&self) -> bool {
        self.entries.iter().any(|entry| entry.tag.is_named() || entry.tag == Tag::Mask)
    }

    fn permissions(&self, tag: Tag) -> Option<u32> {
        self.entries.iter().find(|entry| entry.tag == tag).map(|entry| u32::from(entry.permissions))
    }

    /// The entry that the mode's group bits show: the mask, or the group where there is none.
    fn group_class(&self) -> Tag {
        if self.permissions(Tag::Mask).is_some() { Tag::Mask } else { Tag::GroupObj }
    }

    /// `mode` with the permission bits this list stands for.
    pub(crate) fn mode(&self, mode: u32) -> u32 {
        let bits = |tag| self.permissions(tag).unwrap_or(0);
        (mode & !0o777) | bits(Tag::UserObj) << 6 | bits(self.group_class()) << 3 | bits(Tag::Other)
    }

    /// The list after `chmod`.
    pub(crate) fn with_mode(mut self, mode: u32) -> Acl {
        let group = self.group_class();
        for entry in &mut self.entries {
            let shift = match entry.tag {
                Tag::UserObj => 6,
                tag if tag == group => 3,
                Tag::Other => 0,
                _ => continue,
            };
            entry.permissions = (mode >> shift & 7) as u16;
        }
        self
    }

    /// As a default ACL: the access ACL and the mode of what is created with `mode` under it.
    pub(crate) fn inherited(&self, mode: u32) -> (Acl, u32) {
        let narrowed = self.clone().with_mode(self.mode(mode) & mode);
        let mode = narrowed.mode(mode);
        (narrowed, mode)
    }
}
