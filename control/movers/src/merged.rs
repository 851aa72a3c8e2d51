//! What all shards list, as one ascending sequence: everything is read once, and only a page of
//! each shard is held.

use crate::{MoverError, ShardCalls, all_shards, call};
use cfs_reactor::Handle;
use cfs_wire::data::Referent;
use cfs_wire::meta::{ShardOp, ShardReply};
use cfs_wire::{SegmentId, ShardId};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// Items fetched from a shard at once: with 256 shards, some megabytes of pages.
const PAGE: u32 = 256;
/// A sequence takes one part in this many of its reader's time: there is no hurry in reading all
/// metadata, and clients' requests go first.
const TIME_SHARE: u32 = 5;

/// What a shard lists in ascending order.
pub(crate) trait Listed: Ord + Clone {
    const OP: &'static str;
    /// Asks for at most `max` that follow one.
    fn op(after: Option<&Self>, max: u32) -> ShardOp;
    /// The items, and whether they are the last; `None`: an answer of another kind.
    fn page(reply: ShardReply) -> Option<(Vec<Self>, bool)>;
}

/// Something that is referenced.
impl Listed for Referent {
    const OP: &'static str = "ListReferenced";

    fn op(after: Option<&Referent>, max: u32) -> ShardOp {
        ShardOp::ListReferenced { after: after.copied(), max }
    }

    fn page(reply: ShardReply) -> Option<(Vec<Referent>, bool)> {
        match reply {
            ShardReply::Referenced { list, end } => Some((list, end)),
            _ => None,
        }
    }
}

/// A registered segment and its slots that are not known to be dead.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct LivingSlots {
    pub segment: SegmentId,
    pub slots: Vec<u16>,
}

impl Listed for LivingSlots {
    const OP: &'static str = "ListRegistrations";

    fn op(after: Option<&LivingSlots>, max: u32) -> ShardOp {
        ShardOp::ListRegistrations { after: after.map(|after| after.segment), max }
    }

    fn page(reply: ShardReply) -> Option<(Vec<LivingSlots>, bool)> {
        let ShardReply::Registrations { list, end } = reply else { return None };
        let living = list.into_iter().map(|(registration, dead)| LivingSlots {
            segment: registration.segment,
            slots: (0..registration.slots.len() as u16).filter(|slot| !dead.contains(slot)).collect(),
        });
        Some((living.collect(), end))
    }
}

/// The rest of the page fetched last from one shard.
struct Page<T> {
    rest: VecDeque<T>,
    last: Option<T>,
    end: bool,
}

pub(crate) struct Merged<'a, T> {
    calls: &'a dyn ShardCalls,
    handle: &'a Handle,
    pages: Vec<Page<T>>,
    /// The first item not yet given of every shard that has one left.
    heads: BinaryHeap<Reverse<(T, ShardId)>>,
}

impl<'a, T: Listed> Merged<'a, T> {
    pub async fn start(calls: &'a dyn ShardCalls, handle: &'a Handle) -> Result<Merged<'a, T>, MoverError> {
        let empty = || Page { rest: VecDeque::new(), last: None, end: false };
        let pages = all_shards(calls).map(|_| empty()).collect();
        let mut merged = Merged { calls, handle, pages, heads: BinaryHeap::new() };
        for shard in all_shards(calls) {
            merged.advance(shard).await?;
        }
        Ok(merged)
    }

    /// The next item in ascending order, of each shard that lists it.
    pub async fn next(&mut self) -> Result<Option<T>, MoverError> {
        let Some(Reverse((item, shard))) = self.heads.pop() else { return Ok(None) };
        self.advance(shard).await?;
        Ok(Some(item))
    }

    /// Goes on to `wanted`, and says whether a shard lists it. Ask in ascending order.
    pub async fn contains(&mut self, wanted: &T) -> Result<bool, MoverError> {
        while self.heads.peek().is_some_and(|Reverse((head, _))| head < wanted) {
            self.next().await?;
        }
        Ok(self.heads.peek().is_some_and(|Reverse((head, _))| head == wanted))
    }

    /// Puts the shard's next item among the heads.
    async fn advance(&mut self, shard: ShardId) -> Result<(), MoverError> {
        let page = &self.pages[usize::from(shard.0)];
        if page.rest.is_empty() && !page.end {
            self.fetch(shard).await?;
        }
        if let Some(item) = self.pages[usize::from(shard.0)].rest.pop_front() {
            self.heads.push(Reverse((item, shard)));
        }
        Ok(())
    }

    async fn fetch(&mut self, shard: ShardId) -> Result<(), MoverError> {
        let began = self.handle.now();
        let page = &mut self.pages[usize::from(shard.0)];
        let reply = call(self.calls, shard, T::op(page.last.as_ref(), PAGE)).await?;
        let protocol = MoverError::Protocol { shard, op: T::OP };
        let Some((list, end)) = T::page(reply) else { return Err(protocol) };
        // A page without items that is not the last would be fetched for ever.
        if list.is_empty() && !end {
            return Err(protocol);
        }
        page.last = list.last().cloned();
        page.rest = list.into();
        page.end = end;
        self.handle.sleep((self.handle.now() - began) * (TIME_SHARE - 1)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::Executor;
    use cfs_reactor::clock::SimClock;
    use cfs_wire::BlobId;
    use cfs_wire::meta::MetaError;
    use futures_util::future::LocalBoxFuture;
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::rc::Rc;

    /// Shards that reference something, and how often they were asked.
    #[derive(Default)]
    struct Shards {
        referenced: Vec<BTreeSet<Referent>>,
        calls: Cell<usize>,
    }

    impl ShardCalls for Shards {
        fn shards(&self) -> u16 {
            self.referenced.len() as u16
        }

        fn shard_call(&self, shard: ShardId, op: ShardOp) -> LocalBoxFuture<'_, Result<ShardReply, MetaError>> {
            self.calls.set(self.calls.get() + 1);
            let ShardOp::ListReferenced { after, max } = op else { panic!("{op:?}") };
            let follows = self.referenced[usize::from(shard.0)].iter().filter(|item| Some(**item) > after);
            let list: Vec<Referent> = follows.take(max as usize).copied().collect();
            let end = list.len() < max as usize;
            Box::pin(async move { Ok(ShardReply::Referenced { list, end }) })
        }
    }

    fn simulate<F: Future<Output = ()> + 'static>(story: impl FnOnce(Handle) -> F) {
        let executor = Executor::new(Rc::new(SimClock::new(1)));
        let handle = executor.domain();
        let future = story(handle.clone());
        executor.run_simulated(&handle, future).unwrap().unwrap();
    }

    /// Every `step`th of the referents up to `count`, half of them hot.
    fn every(step: u128, count: u128) -> BTreeSet<Referent> {
        let hot = (0..count).step_by(step as usize).map(|number| Referent::Hot(BlobId(number)));
        hot.chain((0..count).step_by(step as usize).map(|number| Referent::Slot(SegmentId(number), 3))).collect()
    }

    #[test]
    fn everything_is_read_once_and_found_wherever_it_is() {
        let shards = Shards { referenced: vec![every(2, 3000), every(3, 3000), BTreeSet::new()], calls: Cell::new(0) };
        let items: usize = shards.referenced.iter().map(BTreeSet::len).sum();
        simulate(|handle| async move {
            let mut merged = Merged::<Referent>::start(&shards, &handle).await.unwrap();
            for wanted in every(1, 3000) {
                let expected = shards.referenced.iter().any(|list| list.contains(&wanted));
                assert_eq!(merged.contains(&wanted).await.unwrap(), expected, "{wanted:?}");
            }
            assert!(shards.calls.get() <= items / PAGE as usize + shards.referenced.len(), "{}", shards.calls.get());
        });
    }

    #[test]
    fn what_two_shards_list_is_given_for_each() {
        let shards = Shards { referenced: vec![every(1, 2), every(1, 2)], calls: Cell::new(0) };
        simulate(|handle| async move {
            let mut merged = Merged::<Referent>::start(&shards, &handle).await.unwrap();
            let mut all = Vec::new();
            while let Some(item) = merged.next().await.unwrap() {
                all.push(item);
            }
            let expected: Vec<Referent> = every(1, 2).into_iter().flat_map(|item| [item, item]).collect();
            assert_eq!(all, expected);
        });
    }
}
