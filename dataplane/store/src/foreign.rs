//! What other programs' devices are told by, so that none is erased or taken for a lost target.

use crate::error::StoreError;
use crate::layout::{AREA_BYTES, superblock};
use crate::transfer;
use cfs_device::{BlockDevice, Placement};
use cfs_wire::limits::PAGE;
use std::collections::BTreeSet;

/// What it is, where its magic is and the magic, as each format's own documentation has it. All of
/// them lie in the area that a target keeps for its superblocks. The last ones are short, and found
/// in formats above them too.
const SIGNATURES: [(&str, usize, &[u8]); 23] = [
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 0x1_0040, b"_BHRfS_M"),
    ("an F2FS file system", 0x400, &[0x10, 0x20, 0xF5, 0xF2]),
    ("a SquashFS file system", 0, b"hsqs"),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
    ("a LUKS volume", 0, b"LUKS\xBA\xBE"),
    ("an LVM physical volume", 0x200, b"LABELONE"),
    ("a software RAID member", 0, &[0xFC, 0x4E, 0x2B, 0xA9]),
    ("a software RAID member", 0x1000, &[0xFC, 0x4E, 0x2B, 0xA9]),
    ("a bcachefs file system", 0x1018, &[0xC6, 0x85, 0x73, 0xF6, 0x66, 0xCE, 0x90, 0xA9]),
    ("a bcache device", 0x1018, &[0xC6, 0x85, 0x73, 0xF6, 0x4E, 0x1A, 0x45, 0xCA]),
    ("a JFS file system", 0x8000, b"JFS1"),
    ("a ReiserFS file system", 0x1_0034, b"ReIsEr"),
    ("a UFS file system", 0x1_055C, &[0x19, 0x01, 0x54, 0x19]),
    ("a UDF file system", 0x8001, b"BEA01"),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a ZFS pool member", 0x2_0000, &[0x0C, 0xB1, 0xBA, 0]),
    ("a swap area", 0xFF6, b"SWAPSPACE2"),
    ("a qcow2 image", 0, b"QFI\xFB"),
    ("a GPT partition table", 0x200, b"EFI PART"),
    ("a GPT partition table", 0x1000, b"EFI PART"),
    ("an ext2, ext3 or ext4 file system", 0x438, &[0x53, 0xEF]),
    ("a partition table or a FAT or NTFS file system", 0x1FE, &[0x55, 0xAA]),
];

/// What is recognised on a device that has no superblock of ours, the first first, and the page that
/// says so. A page that can't be read says nothing.
async fn signatures(device: &dyn BlockDevice) -> Vec<(&'static str, u64)> {
    let page_of = |at: usize| (at - at % PAGE) as u64;
    let mut found = Vec::new();
    for page in SIGNATURES.iter().map(|(_, at, _)| page_of(*at)).collect::<BTreeSet<_>>() {
        if page + PAGE as u64 > device.geometry().size {
            continue;
        }
        let Ok(bytes) = device.read(page, PAGE).await else { continue };
        for (rank, (name, at, magic)) in SIGNATURES.iter().enumerate() {
            if page_of(*at) == page && bytes[at % PAGE..].starts_with(magic) {
                found.push((rank, (*name, page)));
            }
        }
    }
    found.sort_unstable();
    found.into_iter().map(|(_, signature)| signature).collect()
}

/// The format of a device that has no superblock of ours, if it is a known one.
pub(crate) async fn recognised(device: &dyn BlockDevice) -> Option<&'static str> {
    signatures(device).await.first().map(|(name, _)| *name)
}

/// Whether nothing at all is where a target keeps its superblocks: a format that is not known has
/// something there.
pub(crate) async fn is_blank(device: &dyn BlockDevice) -> Result<bool, StoreError> {
    let bytes = transfer::read(device, 0, AREA_BYTES as usize).await?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

/// Erases what is left of other formats where a new target's superblocks don't lie: others would
/// take the target for one of theirs.
pub(crate) async fn wipe(device: &dyn BlockDevice) -> Result<(), StoreError> {
    let mut pages: BTreeSet<u64> = signatures(device).await.into_iter().map(|(_, page)| page).collect();
    pages.retain(|page| !superblock::COPIES.contains(page));
    let zeroes = transfer::aligned(&[0; PAGE]);
    for page in &pages {
        device.write(*page, vec![zeroes.clone()], Placement::Log, false).await?;
    }
    if !pages.is_empty() {
        device.flush().await?;
    }
    Ok(())
}
