//! The check: reads all metadata of all shards and all blobs of all targets, and says where
//! they disagree. It looks at a quiet or a busy system alike, and metadata is not read at one
//! instant, so what looks wrong (an entry being created, a copy being put) is looked at again
//! after a pause: only what is wrong every time is called a problem.
//!
//! Inodes, entries and registrations of the whole cluster are held in memory while it runs; extents
//! and back-references, of which there are most, are not ([`references`]).

mod references;

use crate::rebuild::Refills;
use crate::{MoverError, ShardCalls, all_shards, call, least_copies};
use cfs_api::{CheckReport, CheckState};
use cfs_store::segment::SegmentStore;
use cfs_store::{Flaw, Lacks, Structure};
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::data::Registration;
use cfs_wire::meta::{AuditRecord, FileKind, ShardOp, ShardReply, registration_shard};
use cfs_wire::{BlobId, Ino, SegmentId, ShardId};
use references::{Known, References};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

/// How often metadata that looks wrong is read before it is called so.
const LOOKS_MAX: usize = 3;
/// Longer than an operation is under way in an ordinary system.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Blobs or segments looked at between two yields.
const STEPS_PER_YIELD: u64 = 64;
/// Records fetched from a shard at once.
const AUDIT_BATCH: u32 = 1024;
/// Problems listed at most: beyond it they are counted in one last line.
const PROBLEMS_MAX: usize = 1000;

struct InodeFacts {
    kind: FileKind,
    nlink: u32,
    parent: Option<Ino>,
}

/// What the shards say, gathered.
#[derive(Default)]
struct Gathered {
    inodes: BTreeMap<Ino, InodeFacts>,
    entries: Vec<(Ino, Vec<u8>, Ino, FileKind)>,
    orphans: BTreeSet<Ino>,
    registrations: BTreeMap<SegmentId, (Registration, BTreeSet<u16>)>,
    transactions: Vec<String>,
    references: References,
}

/// Hands over every record of a shard, in the order of its tables and of their keys.
async fn audit(calls: &dyn ShardCalls, shard: ShardId, mut each: impl FnMut(AuditRecord)) -> Result<(), MoverError> {
    let mut after = None;
    loop {
        let reply = call(calls, shard, ShardOp::Audit { after, max: AUDIT_BATCH }).await?;
        let ShardReply::Audit { records, next } = reply else {
            return Err(MoverError::Protocol { shard, op: "Audit" });
        };
        records.into_iter().for_each(&mut each);
        after = next;
        if after.is_none() {
            return Ok(());
        }
    }
}

/// One check at a time; its state can be polled while it runs.
pub struct Check {
    calls: Rc<dyn ShardCalls>,
    store: Rc<SegmentStore>,
    refills: Rc<dyn Refills>,
    /// Of everything the log and the ordered stores consist of.
    metadata_copies: usize,
    state: RefCell<CheckState>,
    /// One found something wrong, or less than all redundancy, and none as thorough was clean since;
    /// whether it was deep.
    unclean: Cell<Option<bool>>,
}

/// What is left of that after one more check: one that does not read everything takes nothing back of one
/// that did.
fn unclean_after(before: Option<bool>, clean: bool, deep: bool) -> Option<bool> {
    if clean { before.filter(|before| *before && !deep) } else { Some(deep || before == Some(true)) }
}

impl Check {
    /// `metadata_copies`: m+1, m being the largest any policy of the cluster promises.
    pub fn new(
        calls: Rc<dyn ShardCalls>,
        store: Rc<SegmentStore>,
        refills: Rc<dyn Refills>,
        metadata_copies: usize,
    ) -> Rc<Check> {
        Rc::new(Check { calls, store, refills, metadata_copies, state: RefCell::default(), unclean: Cell::new(None) })
    }

    /// Whether a check since the start was not clean, and none as thorough has been since.
    pub fn was_unclean(&self) -> bool {
        self.unclean.get().is_some()
    }

    pub fn state(&self) -> CheckState {
        self.state.borrow().clone()
    }

    /// Marks a check as running; false when one already is.
    pub fn begin(&self, repair: bool, deep: bool) -> bool {
        let mut state = self.state.borrow_mut();
        if state.running {
            return false;
        }
        // Drawn, not counted: a restarted server would count the same numbers again.
        let id = (self.store.handle().random_u64() as u32).max(1);
        *state = CheckState { id, repair, deep, running: true, phase: "metadata".into(), ..CheckState::default() };
        true
    }

    /// Runs the check that [`Self::begin`] marked to its end.
    pub async fn run(&self) -> CheckReport {
        let (repair, deep) = {
            let state = self.state.borrow();
            (state.repair, state.deep)
        };
        let mut report = CheckReport::default();
        if let Err(error) = self.run_phases(repair, deep, &mut report).await {
            report.problems.push(format!("the check could not finish: {error}"));
        }
        if report.is_clean() {
            let whole = self.store.pool().writable().iter().map(|target| target.id()).collect();
            self.refills.filled(whole, Lacks::ALL).await;
        }
        self.unclean.set(unclean_after(self.unclean.get(), report.is_clean(), deep));
        let mut state = self.state.borrow_mut();
        state.running = false;
        state.phase = "done".into();
        state.report = report.clone();
        report
    }

    async fn run_phases(&self, repair: bool, deep: bool, report: &mut CheckReport) -> Result<(), MoverError> {
        let mut gathered = self.compare(report).await?;
        for _ in 1..LOOKS_MAX {
            if report.problems.is_empty() {
                break;
            }
            self.store.handle().sleep(LOOK_AGAIN_AFTER).await;
            let mut again = CheckReport::default();
            gathered = self.compare(&mut again).await?;
            let before: BTreeSet<String> = std::mem::take(&mut report.problems).into_iter().collect();
            again.problems.retain(|problem| before.contains(problem));
            *report = again;
        }
        if deep {
            self.phase("targets", 0);
            self.check_targets(repair, report).await;
        }
        self.phase("copies", 0);
        self.check_copies(&gathered, repair, deep, report).await;
        self.phase("segments", gathered.registrations.len() as u64);
        self.check_segments(&gathered, repair, deep, report).await;
        if report.problems.len() > PROBLEMS_MAX {
            let more = report.problems.len() - PROBLEMS_MAX;
            report.problems.truncate(PROBLEMS_MAX);
            report.problems.push(format!("and {more} more"));
        }
        Ok(())
    }

    /// One look at all metadata, and at which hot blobs exist.
    async fn compare(&self, report: &mut CheckReport) -> Result<Gathered, MoverError> {
        self.phase("metadata", 0);
        let mut gathered = self.gather(report).await?;
        self.phase("namespace", 0);
        check_namespace(&gathered, report);
        self.phase("references", self.calls.shards().into());
        let mut references = References::default();
        let is_inode = |ino| gathered.inodes.contains_key(&ino);
        let known = Known { registrations: &gathered.registrations, is_inode: &is_inode };
        for shard in all_shards(&*self.calls) {
            references.read(&*self.calls, shard, &known, report).await?;
            self.step();
        }
        gathered.references = references;
        let targets = self.store.pool().readable();
        let hot = targets.iter().flat_map(|target| target.list(BlobKind::Hot)).map(|info| info.id).collect();
        check_hot(&gathered, &hot, report);
        Ok(gathered)
    }

    fn phase(&self, name: &str, total: u64) {
        let mut state = self.state.borrow_mut();
        state.phase = name.into();
        state.done = 0;
        state.total = total;
    }

    fn step(&self) {
        self.state.borrow_mut().done += 1;
    }

    /// A step of a loop that may not wait anywhere else.
    async fn long_step(&self) {
        self.step();
        if self.state.borrow().done.is_multiple_of(STEPS_PER_YIELD) {
            self.store.handle().yield_now().await;
        }
    }

    async fn gather(&self, report: &mut CheckReport) -> Result<Gathered, MoverError> {
        let mut gathered = Gathered::default();
        for shard in all_shards(&*self.calls) {
            audit(&*self.calls, shard, |record| {
                self.step();
                gathered.add(record, report);
            })
            .await?;
        }
        Ok(gathered)
    }

    /// What locates data on the targets themselves.
    async fn check_targets(&self, repair: bool, report: &mut CheckReport) {
        for target in self.store.pool().writable() {
            let flaws = RefCell::new(Vec::new());
            let found = |flaw: &Flaw| flaws.borrow_mut().push(*flaw);
            target.check_structures(0..u32::MAX, repair, &|| u64::MAX, &found).await;
            self.step();
            for flaw in flaws.take() {
                tracing::warn!(target = %target.id(), ?flaw, "the check found damage in what locates data");
                report.degraded += 1;
                report.repaired += u64::from(flaw.mended);
                if let (Structure::Device, Some(reason)) = (flaw.structure, target.failure()) {
                    report.problems.push(format!("target {}: {reason}", target.id()));
                }
            }
        }
    }

    /// Redundancy of everything kept in whole copies. Hot blobs that no extent names are garbage
    /// for the orphan search, or not committed yet.
    async fn check_copies(&self, gathered: &Gathered, repair: bool, deep: bool, report: &mut CheckReport) {
        let named: BTreeSet<BlobId> = gathered.references.hot.values().copied().collect();
        let mut short = Vec::new();
        for kind in [BlobKind::Log, BlobKind::Manifest, BlobKind::Run, BlobKind::Hot] {
            let mut blobs: BTreeMap<BlobId, BlobInfo> = BTreeMap::new();
            for target in self.store.pool().readable() {
                blobs.extend(target.list(kind).into_iter().map(|info| (info.id, info)));
            }
            for info in blobs.into_values() {
                report.blobs += 1;
                self.long_step().await;
                let counts = kind != BlobKind::Hot || named.contains(&info.id);
                let least = least_copies(kind, self.metadata_copies);
                if counts && self.store.missing_copies(&info, least, deep).await > 0 {
                    short.push(info);
                }
            }
        }
        if short.is_empty() {
            return;
        }
        // Copies being put or deleted come and go within this time.
        self.store.handle().sleep(LOOK_AGAIN_AFTER).await;
        for info in short {
            let least = least_copies(info.kind, self.metadata_copies);
            let missing = self.store.missing_copies(&info, least, deep).await;
            let gone = || !self.store.pool().readable().iter().any(|target| target.stat(info.id).is_some());
            if missing == 0 || gone() {
                continue;
            }
            report.degraded += 1;
            if repair {
                match self.store.repair_copies(&info, least, deep).await {
                    Some(_) => report.repaired += 1,
                    None if gone() => report.degraded -= 1,
                    None => {
                        report.problems.push(format!("{:?} blob {}: copies cannot be restored", info.kind, info.id))
                    }
                }
            }
        }
    }

    async fn check_segments(&self, gathered: &Gathered, repair: bool, deep: bool, report: &mut CheckReport) {
        for (registration, dead) in gathered.registrations.values() {
            self.long_step().await;
            report.segments += 1;
            // A crash between registration and the last put leaves a segment without all its
            // shards and without references: garbage for the orphan search, not damage.
            if dead.len() == registration.slots.len() || !gathered.references.segments.contains(&registration.segment) {
                continue;
            }
            if self.store.missing_shards(registration, deep).await.is_empty() {
                continue;
            }
            // It may have been repaired, compacted or collected since it was read.
            let Some(registration) = self.registration(registration.segment, report).await else { continue };
            let registration = &registration;
            let missing = self.store.missing_shards(registration, deep).await;
            if missing.is_empty() {
                continue;
            }
            if missing.len() > usize::from(registration.parity) {
                report.problems.push(format!(
                    "segment {}: {} shards are lost, parity repairs {}",
                    registration.segment,
                    missing.len(),
                    registration.parity
                ));
                continue;
            }
            report.degraded += 1;
            if repair {
                match self.store.repair_segment(registration, deep).await {
                    Ok(_) => report.repaired += 1,
                    Err(error) => {
                        report.problems.push(format!("segment {}: repair failed: {error}", registration.segment));
                    }
                }
            }
        }
    }
}

impl Check {
    /// A segment's registration as it is now.
    async fn registration(&self, segment: SegmentId, report: &mut CheckReport) -> Option<Registration> {
        let shard = registration_shard(segment, self.calls.shards());
        match call(&*self.calls, shard, ShardOp::GetRegistration(segment)).await {
            Ok(ShardReply::Registration(found)) => found,
            Ok(_) => None,
            Err(error) => {
                report.problems.push(format!("segment {segment}: its registration cannot be read: {error}"));
                None
            }
        }
    }
}

impl Gathered {
    fn add(&mut self, record: AuditRecord, report: &mut CheckReport) {
        match record {
            AuditRecord::Inode { ino, kind, nlink, parent, .. } => {
                report.inodes += 1;
                self.inodes.insert(ino, InodeFacts { kind, nlink, parent });
            }
            AuditRecord::Entry { dir, name, ino, kind } => {
                report.entries += 1;
                self.entries.push((dir, name.to_vec(), ino, kind));
            }
            // Read on their own.
            AuditRecord::Extent { .. } | AuditRecord::BackReference { .. } => {}
            AuditRecord::Orphan { ino } => {
                report.orphans += 1;
                self.orphans.insert(ino);
            }
            AuditRecord::Registration { registration, dead } => {
                let dead = dead.into_iter().collect();
                self.registrations.insert(registration.segment, (registration, dead));
            }
            AuditRecord::Transaction { detail } => self.transactions.push(detail),
        }
    }
}

/// Entries against inodes: every entry names one, every inode has as many as it counts.
fn check_namespace(gathered: &Gathered, report: &mut CheckReport) {
    let mut links: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut subdirectories: BTreeMap<Ino, u32> = BTreeMap::new();
    for (dir, name, ino, kind) in &gathered.entries {
        let shown = String::from_utf8_lossy(name);
        if gathered.inodes.get(dir).is_none_or(|facts| facts.kind != FileKind::Directory) {
            report.problems.push(format!("entry '{shown}' is in {dir}, which is no directory"));
        }
        let Some(facts) = gathered.inodes.get(ino) else {
            report.problems.push(format!("entry '{shown}' of {dir} names inode {ino}, which does not exist"));
            continue;
        };
        if facts.kind != *kind {
            report.problems.push(format!("entry '{shown}' of {dir} says {kind:?}, inode {ino} is {:?}", facts.kind));
        }
        *links.entry(*ino).or_default() += 1;
        if *kind == FileKind::Directory {
            *subdirectories.entry(*dir).or_default() += 1;
            if facts.parent != Some(*dir) {
                report.problems.push(format!("directory {ino} is in {dir} but records parent {:?}", facts.parent));
            }
        }
    }
    for (ino, facts) in &gathered.inodes {
        let named = links.get(ino).copied().unwrap_or(0);
        if facts.kind == FileKind::Directory {
            let expected_links = u32::from(*ino != Ino::ROOT && !gathered.orphans.contains(ino));
            if named != expected_links {
                report.problems.push(format!("directory {ino} has {named} names, {expected_links} expected"));
            }
            let expected = 2 + subdirectories.get(ino).copied().unwrap_or(0);
            if facts.nlink != expected && !gathered.orphans.contains(ino) {
                report.problems.push(format!("directory {ino} counts {} links, {expected} expected", facts.nlink));
            }
        } else if facts.nlink != named {
            report.problems.push(format!("inode {ino} counts {} links and has {named} names", facts.nlink));
        }
        if facts.kind != FileKind::Directory && facts.nlink == 0 && !gathered.orphans.contains(ino) {
            report.problems.push(format!("inode {ino} has no links and is not on the orphan list"));
        }
    }
    for ino in &gathered.orphans {
        if !gathered.inodes.contains_key(ino) {
            report.problems.push(format!("the orphan list names inode {ino}, which does not exist"));
        }
    }
    for detail in &gathered.transactions {
        report.problems.push(format!("unfinished transaction: {detail}"));
    }
}

fn check_hot(gathered: &Gathered, present: &BTreeSet<BlobId>, report: &mut CheckReport) {
    for ((ino, offset), blob) in &gathered.references.hot {
        if !present.contains(blob) {
            report.problems.push(format!("inode {ino}: offset {offset} is in hot blob {blob}, which is on no target"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_check_as_thorough_takes_back_what_one_found() {
        let after = |checks: &[(bool, bool)]| {
            checks.iter().fold(None, |unclean, (clean, deep)| unclean_after(unclean, *clean, *deep))
        };
        let (clean, unclean, shallow, deep) = (true, false, false, true);
        assert_eq!(after(&[(clean, deep)]), None);
        assert_eq!(after(&[(unclean, shallow), (clean, shallow)]), None);
        assert_eq!(after(&[(unclean, shallow), (clean, deep)]), None);
        assert_eq!(after(&[(unclean, deep), (clean, shallow)]), Some(true));
        assert_eq!(after(&[(unclean, deep), (unclean, shallow), (clean, shallow)]), Some(true));
        assert_eq!(after(&[(unclean, deep), (unclean, shallow), (clean, deep)]), None);
    }
}
