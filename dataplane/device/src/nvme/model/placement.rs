//! Flexible data placement of the model: what it says of its handles, and which one each block was written by.

use super::super::placement::{DESCRIPTOR_BYTES, STATUS_HEADER_BYTES};
use super::super::spec::{Command, Status, io};
use std::ops::Range;

/// What the model tells wrongly of its handles, or does with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlacementFlaw {
    /// The controller has it, the endurance group does not.
    SwitchedOff,
    NoGroup,
    NoHandles,
    /// 65,535 handles.
    TooMany,
    /// Twice as many as it describes.
    Short,
    Repeated,
    SeveralGroups,
    RefusesStatus,
    /// Never says what handles it has.
    Silent,
    /// Takes no writes with a placement identifier.
    RefusesWrites,
}

/// Of every namespace.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PlacementOptions {
    /// 0: the controller knows nothing of it.
    pub handles: u16,
    pub flaw: Option<PlacementFlaw>,
}

const ENDURANCE_GROUP: u16 = 5;

/// Neither identifiers nor handles are counted from 0, and they are not the same.
fn identifier(handle: u16) -> u16 {
    0x4000 | (3 * handle + 1)
}

fn handle_number(handle: u16) -> u16 {
    0x20 + handle
}

impl PlacementOptions {
    pub(super) fn has_it(&self) -> bool {
        self.handles > 0
    }

    pub(super) fn endurance_group(&self) -> u16 {
        if !self.has_it() || self.flaw == Some(PlacementFlaw::NoGroup) { 0 } else { ENDURANCE_GROUP }
    }

    pub(super) fn is_on(&self) -> bool {
        self.has_it() && self.flaw != Some(PlacementFlaw::SwitchedOff)
    }

    /// Reclaim unit handle status.
    pub(super) fn status(&self) -> Vec<u8> {
        let handles = match self.flaw {
            Some(PlacementFlaw::NoHandles) => 0,
            _ => self.handles,
        };
        let told = match self.flaw {
            Some(PlacementFlaw::TooMany) => u16::MAX,
            Some(PlacementFlaw::Short) => 2 * handles,
            _ => handles,
        };
        let mut bytes = vec![0; STATUS_HEADER_BYTES];
        bytes[14..16].copy_from_slice(&told.to_le_bytes());
        for handle in 0..handles {
            let (identifier, number) = match self.flaw {
                Some(PlacementFlaw::Repeated) => (identifier(handle / 2), handle_number(handle)),
                Some(PlacementFlaw::SeveralGroups) => (identifier(handle), handle_number(handle / 2)),
                _ => (identifier(handle), handle_number(handle)),
            };
            let mut descriptor = [0; DESCRIPTOR_BYTES];
            descriptor[..2].copy_from_slice(&identifier.to_le_bytes());
            descriptor[2..4].copy_from_slice(&number.to_le_bytes());
            bytes.extend(descriptor);
        }
        bytes
    }
}

/// What became of writes.
#[derive(Default)]
pub(super) struct Placed {
    /// The handle that each block was written by last, in the order of descriptors. `None`: the write named
    /// none, so by the default one.
    handles: Vec<Option<u16>>,
    /// Writes in which any field of a directive was set.
    pub directives: u64,
    /// Those with an identifier of no handle.
    pub invalid: u64,
}

impl Placed {
    pub fn handle_of(&self, block: usize) -> Option<u16> {
        self.handles.get(block).copied().flatten()
    }

    /// Notes where a write to these blocks of the disk goes. Where placement is not enabled its directive is
    /// none (Base Specification 2.1, "Directives": invalid field). An identifier that is not valid is no
    /// error of the write: the controller chooses the handle, and logs an event ("Flexible Data Placement",
    /// write commands; QEMU chooses the first).
    pub fn write(&mut self, options: PlacementOptions, command: &Command, blocks: Range<usize>) -> Status {
        let directive = command.dword(12) & io::DIRECTIVE_MASK != 0 || command.dword(13) != 0;
        self.directives += u64::from(directive);
        let takes = options.is_on() && options.flaw != Some(PlacementFlaw::RefusesWrites);
        if directive && !takes {
            return Status::INVALID_FIELD;
        }
        let named = command.placement();
        let handle = named.and_then(|named| (0..options.handles).find(|handle| identifier(*handle) == named));
        self.invalid += u64::from(named.is_some() && handle.is_none());
        let end = self.handles.len().max(blocks.end);
        self.handles.resize(end, None);
        self.handles[blocks].fill(handle.or(named.map(|_| 0)));
        Status::SUCCESS
    }
}
