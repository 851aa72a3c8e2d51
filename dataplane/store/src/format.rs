//! Formatting a device and finding out what is on it.

use crate::error::StoreError;
use crate::foreign;
use crate::layout::Invalid;
use crate::layout::superblock::{COPIES, Identity, Superblock, VERSION, ZONE_BYTES_MAX, ZONE_BYTES_MIN, ZONES_MIN};
use crate::layout::{AREA_BYTES, PAGE_BYTES};
use crate::transfer;
use bytes::Bytes;
use cfs_device::{BlockDevice, Placement};
use cfs_reactor::Handle;
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::limits::{LANES, PAGE};

/// A reclaim unit of today's NVMe devices is of this order; larger zones waste more when
/// half full, smaller ones cost more resets.
const ZONE_BYTES_DEFAULT: u32 = 64 << 20;
/// Below this a zone would hold too few of the largest blobs.
const ZONE_BYTES_DEFAULT_MIN: u32 = 4 << 20;
/// The smallest device that a target can be made of.
pub const DEVICE_BYTES_MIN: u64 = AREA_BYTES + ZONES_MIN as u64 * ZONE_BYTES_DEFAULT_MIN as u64;
/// Zones are made smaller until there are so many: the reserve is counted in zones.
const ZONES_WANTED: u64 = 64;

#[derive(Clone, Debug)]
pub struct FormatOptions {
    pub identity: Identity,
    pub parameters: ClusterParameters,
    /// A power of two; by default 64 MiB, less on small devices.
    pub zone_bytes: Option<u32>,
    /// Erase whatever the device holds.
    pub force: bool,
}

/// Writes a superblock. Blobs of an earlier format become unreachable; nothing else is written, but for
/// what would make others take the device for one of theirs.
///
/// Must be called from a task of an executor (it draws a random number).
pub async fn format(device: &dyn BlockDevice, options: &FormatOptions) -> Result<Superblock, StoreError> {
    if !options.force {
        match probe(device).await {
            Ok(None) => {}
            Ok(Some(found)) => {
                let device = device.name().to_owned();
                return Err(StoreError::AlreadyFormatted { device, owner: found.identity });
            }
            Err(error) => return Err(error),
        }
    }
    let handle = Handle::current();
    let superblock = plan(device, options, &handle)?;
    let page = transfer::aligned(&superblock.encode());
    // Copy 1 first: until copy 0 is replaced the device is what it was.
    for copy in COPIES.into_iter().rev() {
        device.write(copy, vec![page.clone()], Placement::Log, false).await?;
        device.flush().await?;
    }
    // Without force nothing was there.
    if options.force {
        foreign::wipe(device).await?;
    }
    Ok(superblock)
}

fn plan(device: &dyn BlockDevice, options: &FormatOptions, handle: &Handle) -> Result<Superblock, StoreError> {
    let geometry = device.geometry();
    let room = geometry.size.saturating_sub(AREA_BYTES);
    let zone_bytes = match options.zone_bytes {
        Some(given) if !given.is_power_of_two() || !(ZONE_BYTES_MIN..=ZONE_BYTES_MAX).contains(&given) => {
            return Err(StoreError::ZoneSize { zone_bytes: given, min: ZONE_BYTES_MIN, max: ZONE_BYTES_MAX });
        }
        Some(given) => given,
        None => {
            let mut zone_bytes = ZONE_BYTES_DEFAULT;
            while zone_bytes > ZONE_BYTES_DEFAULT_MIN && room / u64::from(zone_bytes) < ZONES_WANTED {
                zone_bytes /= 2;
            }
            zone_bytes
        }
    };
    let zones = u32::try_from(room / u64::from(zone_bytes)).unwrap_or(u32::MAX);
    if zones < ZONES_MIN || geometry.block > PAGE_BYTES {
        let needed = AREA_BYTES + u64::from(ZONES_MIN) * u64::from(zone_bytes);
        return Err(StoreError::TooSmall { device: device.name().to_owned(), size: geometry.size, needed });
    }
    Ok(Superblock {
        identity: options.identity,
        incarnation: handle.random_u64(),
        device_bytes: geometry.size,
        zone_bytes,
        zones,
        lanes: LANES,
        created: handle.wall(),
        parameters: options.parameters,
    })
}

/// What the device holds: `None` if it is blank, an error that says what to do if it holds
/// something else than a target this program can open.
pub async fn probe(device: &dyn BlockDevice) -> Result<Option<Superblock>, StoreError> {
    if device.geometry().size < AREA_BYTES {
        let (device, size) = (device.name().to_owned(), device.geometry().size);
        return Err(StoreError::TooSmall { device, size, needed: AREA_BYTES });
    }
    Ok(read_copies(device).await?.map(|(superblock, _)| superblock))
}

/// The superblock, and the offsets of copies that should be written anew.
pub(crate) async fn read_copies(device: &dyn BlockDevice) -> Result<Option<(Superblock, Vec<u64>)>, StoreError> {
    let mut pages = Vec::new();
    for copy in COPIES {
        pages.push(device.read(copy, PAGE).await);
    }
    if let (Err(error), Err(_)) = (&pages[0], &pages[1]) {
        return Err(error.clone().into());
    }
    let pages: Vec<Bytes> = pages.into_iter().map(|page| page.map(|page| page.freeze()).unwrap_or_default()).collect();
    let decoded: Vec<_> = pages.iter().map(|page| Superblock::decode(page)).collect();
    if let Some(superblock) = decoded.iter().find_map(|copy| copy.as_ref().ok()) {
        check_size(device, superblock)?;
        let stale = COPIES.into_iter().zip(&decoded).filter(|(_, copy)| copy.as_ref() != Ok(superblock));
        return Ok(Some((*superblock, stale.map(|(offset, _)| offset).collect())));
    }
    if let Some(refusal) = refusal(device, &pages, &decoded) {
        return Err(refusal);
    }
    // Blank superblocks do not make a blank device: other formats begin further behind.
    let found = foreign::recognised(device).await;
    match found.is_none() && foreign::is_blank(device).await? {
        true => Ok(None),
        false => Err(StoreError::Foreign { device: device.name().to_owned(), found }),
    }
}

fn check_size(device: &dyn BlockDevice, superblock: &Superblock) -> Result<(), StoreError> {
    let size = device.geometry().size;
    if size < superblock.end() {
        return Err(StoreError::TooSmall { device: device.name().to_owned(), size, needed: superblock.end() });
    }
    Ok(())
}

/// Why neither copy can be used, if one of them is a superblock of ours.
fn refusal(device: &dyn BlockDevice, pages: &[Bytes], decoded: &[Result<Superblock, Invalid>]) -> Option<StoreError> {
    let name = device.name().to_owned();
    let invalid =
        || decoded.iter().zip(pages).filter_map(|(copy, page)| copy.as_ref().err().map(|error| (error, page)));
    for (error, page) in invalid() {
        match error {
            Invalid::Version(version) if *version > VERSION => {
                return Some(StoreError::NewerVersion { device: name, version: *version, supported: VERSION });
            }
            Invalid::Field("features") => {
                return Some(StoreError::UnknownFeatures { device: name, features: Superblock::peek_features(page) });
            }
            _ => {}
        }
    }
    if let Some((error, _)) = invalid().find(|(error, _)| **error != Invalid::NoMagic) {
        return Some(StoreError::SuperblockCorrupt { device: name, detail: format!("{error:?}") });
    }
    None
}
