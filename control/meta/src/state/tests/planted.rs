//! Each deliberate bug of this crate is found by a test that knows nothing of it.

use super::{content, liveness, locks, random, sessions, transactions};
use cfs_wire::planted::{Bug, activate};
use std::panic::catch_unwind;

#[test]
fn every_planted_bug_is_found() {
    let found_by: [(Bug, fn()); 13] = [
        (Bug::MetaRerunRequest, random::replies_and_trees_equal_the_models),
        (Bug::MetaForgetReply, random::replies_and_trees_equal_the_models),
        (Bug::MetaForgetReference, random::replies_and_trees_equal_the_models),
        (Bug::MetaAcceptFrozen, liveness::a_frozen_referent_takes_no_new_reference_until_thawed),
        (Bug::MetaSkipFencing, sessions::fencing_takes_leases_locks_and_holds_and_reaps_what_only_they_kept),
        (Bug::MetaDropOrphan, random::replies_and_trees_equal_the_models),
        (Bug::MetaDecideWithoutEffects, transactions::operations_across_shards_equal_the_models),
        (Bug::MetaCommitWithoutEffects, transactions::operations_across_shards_equal_the_models),
        (Bug::MetaPrepareWithoutLocks, transactions::interleaved_transactions_leave_every_record_consistent),
        (Bug::MetaIgnoreLocks, locks::readers_share_writers_do_not_and_flock_is_another_space),
        (Bug::MetaIgnoreCommitSequence, content::commits_of_a_session_apply_in_order_and_once),
        (Bug::MetaSwapBlindly, liveness::a_swap_replaces_only_what_still_stands),
        (Bug::MetaShareWriteLease, content::a_write_lease_keeps_other_sessions_commits_and_truncations_out),
    ];
    for (bug, test) in found_by {
        activate(Some(bug));
        let found = catch_unwind(test).is_err();
        activate(None);
        assert!(found, "{} was not found", bug.name());
    }
    random::replies_and_trees_equal_the_models();
}
