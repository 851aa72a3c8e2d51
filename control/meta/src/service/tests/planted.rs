//! The twins that must fail: each story is told again with the step left out that keeps its rule.
//! Run with `--features planted`.

use super::{coherence, cross_shard, requests};
use cfs_wire::planted::{Bug, activate};

macro_rules! noticed {
    ($($name:ident: $bug:ident by $story:path),* $(,)?) => {
        $(
            #[test]
            #[should_panic]
            fn $name() {
                activate(Some(Bug::$bug));
                $story();
            }
        )*
    };
}

noticed! {
    a_change_that_tells_nobody: MetaSkipInvalidate by coherence::nobody_reads_stale_attributes_after_a_change_was_answered,
    a_leader_that_forgets_readers: MetaForgetReaders by coherence::a_new_leader_takes_every_session_for_a_reader,
    a_decision_without_effects: MetaDecideWithoutEffects by cross_shard::names_and_inodes_agree_whatever_entry_the_node_dies_at,
    a_commit_without_effects: MetaCommitWithoutEffects by cross_shard::names_and_inodes_agree_whatever_entry_the_node_dies_at,
    keys_that_are_not_locked: MetaPrepareWithoutLocks by cross_shard::clients_that_fight_over_names_in_all_shards_leave_a_sound_volume,
    a_leader_that_forgets_readers_again_and_again: MetaForgetReaders by coherence::readers_never_go_back_in_time_while_the_node_dies_again_and_again,
    a_decided_transaction_that_is_aborted: MetaAbortDecided by cross_shard::names_and_inodes_agree_whatever_entry_the_node_dies_at,
    a_decision_that_is_forgotten: MetaForgetDecisionEarly by cross_shard::names_and_inodes_agree_whatever_entry_the_node_dies_at,
    a_read_that_does_not_ask_the_writer: MetaSkipRecall by coherence::a_read_recalls_the_writers_size,
    a_request_that_runs_twice: MetaRerunRequest by requests::a_repeated_request_is_answered_from_the_stored_reply,
    a_reply_that_is_not_kept: MetaForgetReply by requests::a_repeated_request_is_answered_from_the_stored_reply,
}
