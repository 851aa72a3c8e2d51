//! Reading and writing a device's [`Roster`].

use crate::error::StoreError;
use crate::format::probe;
use crate::layout::Invalid;
use crate::layout::roster::{COPIES, Roster, VERSION};
use crate::layout::superblock::{Identity, Superblock};
use crate::transfer;
use cfs_device::{BlockDevice, Placement};
use cfs_wire::limits::PAGE;

/// Whose a formatted device is and what it knows of the others; `None` when both copies of its
/// roster are damaged. Nothing is written.
pub async fn inspect(device: &dyn BlockDevice) -> Result<(Superblock, Option<Roster>), StoreError> {
    let Some(superblock) = probe(device).await? else {
        return Err(StoreError::Blank { device: device.name().to_owned() });
    };
    let mut newest: Option<Roster> = None;
    for copy in COPIES {
        // A page that can't be read is like a damaged one: the other stands in.
        let Ok(page) = device.read(copy, PAGE).await else { continue };
        match Roster::decode(&page, &superblock.identity) {
            Ok(roster) if newest.as_ref().is_none_or(|newest| newest.epoch < roster.epoch) => newest = Some(roster),
            Err(Invalid::Version(version)) if version > VERSION => {
                let device = device.name().to_owned();
                return Err(StoreError::NewerVersion { device, version, supported: VERSION });
            }
            _ => {}
        }
    }
    Ok((superblock, newest))
}

/// Makes `roster` durable on one device, one copy after the other.
pub async fn write_roster(device: &dyn BlockDevice, holder: &Identity, roster: &Roster) -> Result<(), StoreError> {
    let page = transfer::aligned(&roster.encode(holder));
    for copy in COPIES {
        device.write(copy, vec![page.clone()], Placement::Log, false).await?;
        device.flush().await?;
    }
    Ok(())
}
