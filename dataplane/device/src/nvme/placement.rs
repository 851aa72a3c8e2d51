//! Which reclaim unit handle the data of a write goes to: Flexible Data Placement (Base Specification 2.1,
//! before that technical proposal 4146).
//!
//! A device erases flash in units far larger than what is overwritten or discarded at once, and moves first
//! what still lives in one: that is its write amplification. It has none where all of a unit dies together.
//! Only the host knows what does; so each handle fills units of its own, and a write names its handle by a
//! placement identifier.
//!
//! It is a hint and never more: a device that has no handles, or tells of them what can't be, is used without.

use super::bus::Bus;
use super::commands::Outcome;
use super::controller::{Controller, Data, PAGE};
use super::error::NvmeError;
use super::spec::{Command, Status, io, u16_at};
use super::{Pages, RETRIES_MAX};
use crate::Placement;
use std::cell::Cell;
use std::rc::Rc;

/// Bytes before the descriptors of the reclaim unit handle status, and of each of them.
pub(super) const STATUS_HEADER_BYTES: usize = 16;
pub(super) const DESCRIPTOR_BYTES: usize = 32;
/// What is asked for: a namespace has 128 handles at most, which with the header are a bit more than a page.
pub(super) const STATUS_BYTES: usize = 2 * PAGE;
const DESCRIPTORS_MAX: usize = (STATUS_BYTES - STATUS_HEADER_BYTES) / DESCRIPTOR_BYTES;

const STREAMS: usize = Placement::ALL.len();

/// Which handle each stream has, where there are so many, one a line. What shares one dies at times as much
/// alike as can be:
/// - log batches, hot blobs and runs within minutes to hours, file data and its parity with the file;
/// - what the collector has moved is what outlived the rest of its zone, and stays longest;
/// - a log is cut off and hot blobs are packed when they are a minute old, so runs outlive both;
/// - data and parity of a segment die together, though never on one device: they are the last to be kept
///   apart. With a handle for each, a unit holds one zone after the other, which are discarded as such,
///   instead of two by turns.
const SHARED: [[usize; STREAMS]; STREAMS] = [
    // Log, hot, metadata, data, parity, relocated.
    [0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1],
    [0, 0, 0, 1, 1, 2],
    [0, 0, 1, 2, 2, 3],
    [0, 1, 2, 3, 3, 4],
    [0, 1, 2, 3, 4, 5],
];

/// Why data is not placed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlacementError {
    #[error("it is in no endurance group")]
    NoGroup,
    #[error("it is switched off in endurance group {group}")]
    Off { group: u16 },
    #[error("it has no reclaim unit handles")]
    NoHandles,
    #[error("it has {count} placement identifiers, and at most {DESCRIPTORS_MAX} can be")]
    TooMany { count: usize },
    #[error("its placement identifier {identifier:#06x} is there twice")]
    Repeated { identifier: u16 },
    /// One identifier says which group, too, and the same one all the time would fill that one only.
    #[error("it lies in several reclaim groups, among which this driver does not choose")]
    SeveralGroups,
    #[error("it does not answer when asked for its reclaim unit handles")]
    Silent,
    #[error("it was reset whenever it was asked")]
    Reset,
    #[error(transparent)]
    Controller(#[from] NvmeError),
}

/// How often it is asked again because it was reset meanwhile: the question may be the reason.
const ATTEMPTS_MAX: u32 = 2;

/// The placement identifiers that are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Handles {
    /// Of each stream.
    identifiers: [u16; STREAMS],
    /// How many the namespace has.
    count: u16,
}

impl Handles {
    /// Reclaim unit handle status: the number of descriptors, then of each its placement identifier and
    /// its handle.
    fn parse(bytes: &[u8; STATUS_BYTES]) -> Result<Handles, PlacementError> {
        let count = usize::from(u16_at(bytes, 14));
        if count > DESCRIPTORS_MAX {
            return Err(PlacementError::TooMany { count });
        }
        let descriptors = bytes[STATUS_HEADER_BYTES..].chunks_exact(DESCRIPTOR_BYTES).take(count);
        let (mut identifiers, mut handles) = (Vec::new(), Vec::new());
        for descriptor in descriptors {
            let (identifier, handle) = (u16_at(descriptor, 0), u16_at(descriptor, 2));
            if identifiers.contains(&identifier) {
                return Err(PlacementError::Repeated { identifier });
            }
            // Each handle fills one unit in every reclaim group.
            if handles.contains(&handle) {
                return Err(PlacementError::SeveralGroups);
            }
            identifiers.push(identifier);
            handles.push(handle);
        }
        let Some(shared) = identifiers.len().min(STREAMS).checked_sub(1) else { return Err(PlacementError::NoHandles) };
        let identifiers = SHARED[shared].map(|handle| identifiers[handle]);
        Ok(Handles { identifiers, count: count as u16 })
    }
}

/// Where the data of a namespace goes.
pub(super) struct Placing<B: Bus> {
    /// The namespace, in messages.
    device: String,
    controller: Rc<Controller<B>>,
    namespace: u32,
    /// `None`: the device chooses.
    handles: Cell<Option<Handles>>,
    /// Resets of the controller before it was asked: after another one nothing of it is sure.
    resets: Cell<u64>,
    /// It is being asked, or must not be.
    asking: Cell<bool>,
}

impl<B: Bus> Placing<B> {
    /// Asks the controller.
    pub async fn of(device: String, controller: Rc<Controller<B>>, namespace: u32) -> Rc<Placing<B>> {
        let (handles, resets, asking) = (Cell::new(None), Cell::new(0), Cell::new(true));
        let placing = Rc::new(Placing { device, controller, namespace, handles, resets, asking });
        placing.ask().await;
        placing
    }

    /// The placement identifier for a write, if it is to have one. The first write after a reset has the
    /// controller asked again, and none waits for that.
    #[inline]
    pub fn identifier(self: &Rc<Self>, placement: Placement) -> Option<u16> {
        if self.resets.get() != self.controller.resets() {
            if !self.asking.replace(true) {
                let placing = self.clone();
                self.controller.handle.spawn(async move { placing.ask().await });
            }
            return None;
        }
        self.handles.get().map(|handles| handles.identifiers[placement as usize])
    }

    /// How many handles the namespace has; 0 if they are not used.
    pub fn handles(&self) -> u16 {
        let is_sure = self.resets.get() == self.controller.resets();
        self.handles.get().filter(|_| is_sure).map_or(0, |handles| handles.count)
    }

    /// A write was refused that had an identifier: until the controller is reset, none has one any more.
    pub fn refused(&self, status: Status) {
        if self.handles.take().is_some() {
            let device = &self.device;
            tracing::warn!(device, %status, "the device refuses writes that it is to place: it is used without");
        }
    }

    async fn ask(&self) {
        let mut found = Err(PlacementError::Reset);
        for _ in 0..ATTEMPTS_MAX {
            let resets = self.controller.resets();
            let answer = self.find().await;
            if self.controller.resets() == resets || answer == Err(PlacementError::Silent) {
                found = answer;
                break;
            }
        }
        // One that does not bear the question is not asked again, ever.
        self.asking.set(matches!(found, Err(PlacementError::Silent | PlacementError::Reset)));
        self.resets.set(self.controller.resets());
        self.handles.set(self.told(found));
    }

    fn told(&self, found: Result<Option<Handles>, PlacementError>) -> Option<Handles> {
        let device = &self.device;
        match found {
            Ok(Some(handles)) => {
                tracing::info!(device, handles = handles.count, "what dies together is placed together");
                Some(handles)
            }
            Ok(None) => None,
            Err(why @ (PlacementError::NoGroup | PlacementError::Off { .. })) => {
                tracing::info!(device, %why, "flexible data placement is not used");
                None
            }
            Err(why) => {
                tracing::warn!(device, %why, "flexible data placement is not used");
                None
            }
        }
    }

    /// `None`: the controller does not have that.
    async fn find(&self) -> Result<Option<Handles>, PlacementError> {
        if !self.controller.has_flexible_data_placement().await {
            return Ok(None);
        }
        let group = self.controller.namespace(self.namespace).await?.endurance_group;
        if group == 0 {
            return Err(PlacementError::NoGroup);
        }
        if !self.controller.places_data(group).await? {
            return Err(PlacementError::Off { group });
        }
        Handles::parse(&self.status().await?).map(Some)
    }

    async fn status(&self) -> Result<[u8; STATUS_BYTES], PlacementError> {
        let command = Command::new(io::MANAGEMENT_RECEIVE, self.namespace)
            .with(10, io::RECLAIM_UNIT_HANDLE_STATUS)
            .with(11, STATUS_BYTES as u32 / 4 - 1);
        let mut turn = self.controller.bouncing.acquire(1).await;
        let mut bytes = [0; STATUS_BYTES];
        // What was there before is not to be taken for an answer.
        self.controller.bounce.copy_in(0, &bytes);
        let pages: Pages =
            (0..STATUS_BYTES).step_by(PAGE).map(|at| self.controller.bounce.device_address(at)).collect();
        for tries in 0.. {
            let outcome;
            (outcome, turn) = self.controller.execute(command, Data::Pages(&pages), turn).await;
            match outcome {
                Outcome::Completed(status) if status.is_success() => break,
                // It had its time.
                Outcome::Completed(Status::ABORTED_BY_REQUEST) | Outcome::TimedOut => {
                    return Err(PlacementError::Silent);
                }
                Outcome::Completed(status) if status.may_be_retried() && tries < RETRIES_MAX => {}
                Outcome::Completed(status) => {
                    let what = "tell of its reclaim unit handles";
                    return Err(NvmeError::Refused { device: self.device.clone(), what, status }.into());
                }
                Outcome::Gone => return Err(NvmeError::Gone { device: self.device.clone() }.into()),
            }
        }
        self.controller.bounce.copy_out(0, &mut bytes);
        drop(turn);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(count: u16, descriptors: &[(u16, u16)]) -> [u8; STATUS_BYTES] {
        let mut bytes = [0; STATUS_BYTES];
        bytes[14..16].copy_from_slice(&count.to_le_bytes());
        for (index, (identifier, handle)) in descriptors.iter().enumerate() {
            let at = STATUS_HEADER_BYTES + index * DESCRIPTOR_BYTES;
            bytes[at..at + 2].copy_from_slice(&identifier.to_le_bytes());
            bytes[at + 2..at + 4].copy_from_slice(&handle.to_le_bytes());
        }
        bytes
    }

    fn of_handles(count: u16) -> Handles {
        let descriptors: Vec<_> = (0..count).map(|handle| (0x100 + handle, handle)).collect();
        Handles::parse(&status(count, &descriptors)).unwrap()
    }

    #[test]
    fn streams_share_handles_where_there_are_fewer_and_use_no_more_than_they_need() {
        for count in 1..=128 {
            let handles = of_handles(count);
            assert_eq!(handles.count, count);
            let mut used = handles.identifiers.to_vec();
            assert!(used.is_sorted(), "what dies sooner does not come behind what dies later");
            used.dedup();
            let expected: Vec<u16> = (0x100..0x100 + count.min(6)).collect();
            assert_eq!(used, expected);
        }
        let of = |count: u16, placement: Placement| of_handles(count).identifiers[placement as usize];
        for count in 2..=128 {
            assert_ne!(
                of(count, Placement::Log),
                of(count, Placement::Data),
                "{count}: dead in minutes, or with a file"
            );
        }
        for count in 3..=128 {
            assert_ne!(of(count, Placement::Data), of(count, Placement::Relocated), "{count}: new, or proven to stay");
        }
        for count in 1..=5 {
            assert_eq!(of(count, Placement::Data), of(count, Placement::Parity), "{count}: of a segment, and its end");
        }
    }

    #[test]
    fn a_status_that_cannot_be_is_refused() {
        let refusals = [
            (status(0, &[(1, 1)]), PlacementError::NoHandles),
            (status(u16::MAX, &[(1, 1), (2, 2)]), PlacementError::TooMany { count: 65_535 }),
            (status(256, &[]), PlacementError::TooMany { count: 256 }),
            // More are told of than are there: the rest is zeroes.
            (status(4, &[(1, 1), (2, 2)]), PlacementError::Repeated { identifier: 0 }),
            (status(2, &[(0, 0)]), PlacementError::Repeated { identifier: 0 }),
            (status(3, &[(7, 1), (8, 2), (7, 3)]), PlacementError::Repeated { identifier: 7 }),
            (status(4, &[(0, 0), (1, 1), (0x8000, 0), (0x8001, 1)]), PlacementError::SeveralGroups),
        ];
        for (bytes, expected) in refusals {
            assert_eq!(Handles::parse(&bytes), Err(expected));
        }
        assert_eq!(Handles::parse(&status(1, &[(9, 3)])).unwrap().identifiers, [9; 6]);
    }
}
