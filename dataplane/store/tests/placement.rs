//! What a device is told of which data dies together.

mod common;

use bytes::Bytes;
use cfs_device::{BlockDevice, DeviceGeometry, DeviceResult, Placement};
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_store::TargetStore;
use cfs_wire::blobs::BlobKind;
use common::*;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::rc::Rc;

/// A disk that notes where each write begins, and its hint.
struct Noting {
    device: Rc<dyn BlockDevice>,
    noted: RefCell<Vec<(u64, Placement)>>,
}

impl BlockDevice for Noting {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn geometry(&self) -> DeviceGeometry {
        self.device.geometry()
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        self.device.read(offset, length)
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.noted.borrow_mut().push((offset, placement));
        self.device.write(offset, parts, placement, fua)
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.discard(offset, length)
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.settle(offset, length)
    }
}

async fn noting(handle: &Handle, zones: u32) -> (Rc<Noting>, Rc<TargetStore>) {
    let device = formatted(handle, zones, 1).await.open(handle);
    let device = Rc::new(Noting { device, noted: RefCell::default() });
    let store = TargetStore::open(device.clone(), handle, Some(identity())).await.unwrap();
    (device, store)
}

impl Noting {
    /// The hints of appends since the last call, each of them once.
    fn hints(&self) -> Vec<Placement> {
        let is_append = |offset: u64| {
            let in_zone = offset.checked_sub(AREA).map(|offset| offset % u64::from(ZONE));
            in_zone.is_some_and(|at| (u64::from(FIRST)..u64::from(ZONE - PAGE)).contains(&at))
        };
        let noted = self.noted.take();
        let mut hints: Vec<_> =
            noted.into_iter().filter(|(offset, _)| is_append(*offset)).map(|(_, hint)| hint).collect();
        hints.sort();
        hints.dedup();
        hints
    }
}

#[test]
fn every_stream_of_appends_has_a_hint_of_its_own() {
    run(1, |handle| async move {
        let (device, store) = noting(&handle, 40).await;
        let kinds = [
            (BlobKind::Log, Placement::Log),
            (BlobKind::Run, Placement::Metadata),
            (BlobKind::Manifest, Placement::Metadata),
            (BlobKind::Hot, Placement::Hot),
            (BlobKind::Data, Placement::Data),
            (BlobKind::Parity, Placement::Parity),
        ];
        for (id, (kind, expected)) in (1..).zip(kinds) {
            put(&store, id, kind, 10_000).await.unwrap();
            assert_eq!(device.hints(), [expected], "{kind:?}");
        }
        delete(&store, &[1]).await.unwrap();
        assert_eq!(device.hints(), [Placement::Log], "a deletion is forgotten soon");
    });
}

#[test]
fn what_the_collector_moves_is_kept_apart_from_what_is_new() {
    run(2, |handle| async move {
        let (device, store) = noting(&handle, 16).await;
        // Of four blobs, which fill a zone, one stays.
        let fill = async |first: u128| {
            for id in first..first + 4 {
                put(&store, id, BlobKind::Data, 50_000).await.unwrap();
            }
            delete(&store, &[first, first + 1, first + 2]).await.unwrap();
        };
        fill(10).await;
        assert_eq!(device.hints(), [Placement::Log, Placement::Data], "nothing was moved yet");
        let mut first = 20;
        while store.zones_collected() == 0 {
            fill(first).await;
            first += 4;
        }
        assert_eq!(device.hints(), [Placement::Log, Placement::Data, Placement::Relocated]);
    });
}
