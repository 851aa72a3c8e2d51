//! openraft's own storage suite over the shared log and the state machine's adapter.

mod common;

use cfs_consensus::host::Applier;
use cfs_consensus::log::GroupLog;
use cfs_consensus::types::Raft;
use cfs_consensus::{LogConfig, SharedLog};
use cfs_reactor::Handle;
use cfs_wire::ShardId;
use common::blobs::Medium;
use common::machine::{Disk, List};
use openraft::testing::log::{StoreBuilder, Suite};
use std::rc::Rc;

/// Every store is new, and both parts of it live in the running task's domain.
struct Builder;

impl StoreBuilder<Raft, GroupLog, Applier> for Builder {
    async fn build(&self) -> Result<((), GroupLog, Applier), openraft::StorageError<Raft>> {
        let handle = Handle::current();
        let blobs = Medium::new().open(&handle);
        let (log, _) = SharedLog::open(blobs, handle.clone(), LogConfig::default()).await.expect("a new log opens");
        let machine = List::open(&Rc::new(Disk::default()), &handle);
        let applier = Applier::new(ShardId(3), machine, log.clone());
        Ok(((), log.group(ShardId(3)), applier))
    }
}

#[test]
fn openrafts_storage_suite_passes() {
    let (outcome, _) = common::simulate(1, |_| Suite::test_all(Builder));
    assert_eq!(outcome, Ok(()));
}
