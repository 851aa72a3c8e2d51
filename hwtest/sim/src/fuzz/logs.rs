//! Recovery of the Raft log from batches that its own program never wrote.

use super::blobs::Blobs;
use super::corpus;
use super::mutate::{Length, mutate};
use super::{Fed, Target, Trial, seal, simulated};
use bytes::Bytes;
use cfs_consensus::{LogConfig, SharedLog};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::blobs::BlobInfo;

const INPUTS_PER_ROUND: usize = 4;
const HEADER_BYTES: usize = 64;
const RECORD_BYTES: usize = 32;
const SEQUENCE_AT: usize = 8;
const BODY_LENGTH_AT: usize = 44;
const CHECKSUM_AT: usize = 60;

pub struct Logs {
    batches: Vec<(BlobInfo, Bytes)>,
    donors: Vec<Vec<u8>>,
}

impl Logs {
    pub fn new() -> Logs {
        let batches = corpus::recorded().log;
        assert!(batches.len() > 10, "{} batches tell little", batches.len());
        let donors = batches.iter().map(|(_, bytes)| bytes.to_vec()).collect();
        Logs { batches, donors }
    }
}

impl Target for Logs {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for _ in 0..INPUTS_PER_ROUND {
            // The last batches decide where the log ends.
            let last = self.batches.len() - 1;
            let number = if random.one_in(3) { last } else { random.below(last as u64 + 1) as usize };
            let (mut info, bytes) = self.batches[number].clone();
            let mut batch = bytes.to_vec();
            let length = if random.one_in(2) { Length::Free } else { Length::Fixed };
            mutate(random, &mut batch, HEADER_BYTES + RECORD_BYTES, &self.donors, length);
            if !random.one_in(4) && batch.len() >= HEADER_BYTES {
                let length = (batch.len() - HEADER_BYTES) as u32;
                batch[BODY_LENGTH_AT..BODY_LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
                seal(&mut batch, CHECKSUM_AT, &[]);
                if let Some(sequence) = batch[SEQUENCE_AT..].first_chunk() {
                    info.owner.low = u64::from_le_bytes(*sequence);
                }
            }
            info.length = batch.len() as u32;
            trial.feed(&format!("batch {number}"), &batch, |batch| {
                let mut batches = self.batches.clone();
                batches[number] = (info, Bytes::copy_from_slice(batch));
                simulated(|handle| open(handle, batches))
            });
        }
    }
}

/// Opens the log, and once more what that left.
async fn open(handle: Handle, batches: Vec<(BlobInfo, Bytes)>) -> Result<Fed, String> {
    let blobs = Blobs::new(&handle, batches);
    for again in [false, true] {
        let domain = handle.new_domain();
        let log = match SharedLog::open(blobs.clone(), domain.clone(), LogConfig::default()).await {
            Ok((log, _)) => log,
            Err(error) if again && !error.is_corruption() => return Err(format!("opened once, then: {error}")),
            Err(_) => return Ok(Fed::Refused),
        };
        for group in log.groups() {
            let _ = (log.bytes_unpurged_of(group), log.pinning());
        }
        log.flush().await.map_err(|error| format!("nothing can be written: {error}"))?;
        log.close();
        domain.kill();
    }
    Ok(Fed::Taken)
}
