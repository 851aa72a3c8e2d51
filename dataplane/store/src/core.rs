//! What the parts of an open target share.

use crate::collect::Collector;
use crate::commit::Lane;
use crate::error::StoreError;
use crate::flush::Flusher;
use crate::layout::roster::Roster;
use crate::layout::stamp::{Role, Stamp};
use crate::layout::superblock::Superblock;
use crate::layout::{PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES};
use crate::state::State;
use crate::transfer;
use crate::zones::{Stream, Tier};
use cfs_device::{BlockDevice, DeviceError, DeviceResult, Placement};
use cfs_reactor::Handle;
use cfs_reactor::sync::Notify;
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Generation, ZoneNo};
use futures_util::future::try_join;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

pub(crate) struct Core {
    pub device: Rc<dyn BlockDevice>,
    pub handle: Handle,
    pub superblock: Superblock,
    pub state: RefCell<State>,
    /// In the order of `Stream::ALL`.
    pub lanes: Vec<Lane>,
    pub flusher: Flusher,
    pub collector: Collector,
    /// Whether a task writes headers of free zones.
    pub preparing: Cell<bool>,
    /// The zone whose header is being written again.
    pub mending: Cell<Option<u32>>,
    /// The newest that is known to be on the device.
    pub roster: RefCell<Option<Roster>>,
    /// Something changed that a task may wait for: a put ended, a zone was sealed or freed.
    pub changed: Rc<Notify>,
    pub failed: RefCell<Option<String>>,
    pub closed: Cell<bool>,
}

impl Core {
    pub fn lane(&self, stream: Stream) -> &Lane {
        &self.lanes[stream as usize]
    }

    /// Refuses writes on a device of which it isn't known what is durable.
    pub fn check_writable(&self) -> Result<(), StoreError> {
        if self.closed.get() {
            return Err(StoreError::Closed);
        }
        match &*self.failed.borrow() {
            Some(reason) => Err(StoreError::Fenced { device: self.device.name().to_owned(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// After a failed write or flush nothing is known of what the device keeps.
    pub fn fence(&self, error: &DeviceError) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none() {
            tracing::error!(device = self.device.name(), %error, "target takes no more writes");
            *failed = Some(error.to_string());
        }
        drop(failed);
        self.changed.notify_all();
    }

    /// Bytes of live footprint a tier can fill.
    ///
    /// A zone's last append may leave almost a blob's length unused, and a 16th more is kept
    /// so that collecting always finds garbage before space runs out.
    pub fn capacity(&self, tier: Tier) -> u64 {
        let (zones, stranded) = {
            let zones = &self.state.borrow().zones;
            (u64::from(zones.reserve.fillable(tier)), zones.stranded)
        };
        // The last page of the summary is filled in part only, and so is that of a header.
        let fixed = ZONE_HEADER_BYTES + ZONE_FOOTER_BYTES + 2 * PAGE_BYTES;
        let usable = self.superblock.zone_bytes.saturating_sub(fixed + self.superblock.payload_max());
        zones * u64::from(usable) / 16 * 15 + stranded
    }

    pub fn stamp(&self, stream: Stream, zone: u32, generation: Generation, offset: u32, sequence: u64) -> Stamp {
        Stamp {
            stream: stream as u8,
            device: self.superblock.identity.device,
            incarnation: self.superblock.incarnation,
            generation,
            zone: ZoneNo(zone),
            offset,
            sequence,
            durable: self.state.borrow().sequences.mark(),
            bytes: PAGE_BYTES,
            extent: 0,
            records: 0,
            tails: 0,
        }
    }

    /// Writes a zone's header in a new generation and waits until it is durable. The caller
    /// made sure that nothing in the zone is needed any more.
    pub async fn write_generation(self: &Rc<Self>, zone: u32) -> Result<Generation, StoreError> {
        self.mended(zone).await;
        let sequence = self.state.borrow_mut().sequences.take();
        // The sequence of its header: larger than any generation ever given on this target,
        // even if the zone's own history can't be read.
        let generation = Generation(sequence);
        let alone = planted::is(Bug::StoreResetBeforeCopiesDurable);
        let written = self.write_header(zone, generation, true, alone).await;
        let result = match written {
            Ok(()) if alone || planted::is(Bug::StoreReuseBeforeGeneration) => Ok(()),
            Ok(()) => self.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.fence(&error);
            return Err(error.into());
        }
        self.state.borrow_mut().sequences.settle(sequence);
        Ok(generation)
    }

    /// Waits until nobody writes the zone's present header any more.
    pub async fn mended(&self, zone: u32) {
        while self.mending.get() == Some(zone) {
            self.changed.notified().await;
        }
    }

    /// Writes the copies of a zone's header; `last` says whether that in the footer's place too. In
    /// whatever order they land, the zone has the new generation from the first on.
    pub async fn write_header(&self, zone: u32, generation: Generation, last: bool, fua: bool) -> DeviceResult<()> {
        // Each copy says its own place.
        let page = |offset| {
            let stamp = self.stamp(Stream::Log, zone, generation, offset, generation.0);
            transfer::aligned(&stamp.encode_page(Role::ZoneHeader))
        };
        let write = |offset, pages| {
            let place = self.superblock.zone_offset(zone) + u64::from(offset);
            self.device.write(place, pages, Placement::Relocated, fua)
        };
        let first = write(0, vec![page(0), page(PAGE_BYTES)]);
        if !last {
            return first.await;
        }
        let footer_offset = self.superblock.zone_bytes - ZONE_FOOTER_BYTES;
        try_join(first, write(footer_offset, vec![page(footer_offset)])).await.map(|_| ())
    }
}
