//! Lock calls that wait.

use super::client::{Client, errno, write_lock};
use super::cluster::simulate;
use cfs_wire::meta::{MetaError, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

#[test]
fn waiting_locks_are_granted_in_the_order_they_came() {
    simulate(1, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert_eq!(a.lock(file, write_lock(1, 0, 9), false).await, Ok(MetaReply::Done));
        let refused = a.lock(file, write_lock(2, 5, 15), false).await;
        assert_eq!(refused, Ok(MetaReply::Conflict(Some(write_lock(1, 0, 9)))));
        let order: Rc<RefCell<Vec<u64>>> = Rc::default();
        let mut waiting = Vec::new();
        for owner in [7, 3, 5] {
            let (b, order) = (Client::open(&cluster, owner).await, order.clone());
            waiting.push(cluster.handle.spawn(async move {
                assert_eq!(b.lock(file, write_lock(owner, 0, 9), true).await, Ok(MetaReply::Done));
                order.borrow_mut().push(owner);
                b.cluster.handle.sleep(Duration::from_millis(50)).await;
                b.call(MetaOp::Unlock { ino: file, lock: write_lock(owner, 0, 9) }).await.unwrap();
            }));
            cluster.handle.sleep(Duration::from_millis(50)).await;
        }
        assert!(order.borrow().is_empty());
        a.call(MetaOp::Unlock { ino: file, lock: write_lock(1, 0, 9) }).await.unwrap();
        for task in waiting {
            task.await.unwrap();
        }
        assert_eq!(*order.borrow(), [7, 3, 5]);
    });
}

#[test]
fn a_cancelled_lock_call_answers_eintr_and_leaves_no_lock() {
    simulate(2, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.lock(file, write_lock(1, 0, 9), false).await.unwrap();
        let waiter = b.clone();
        let waiting = cluster.handle.spawn(async move { waiter.lock(file, write_lock(2, 0, 9), true).await });
        cluster.handle.sleep(Duration::from_millis(100)).await;
        assert_eq!(b.call(MetaOp::CancelLock { ino: file, owner: 2 }).await, Ok(MetaReply::Done));
        assert_eq!(waiting.await.unwrap(), Err(errno(Errno::EINTR)));
        a.call(MetaOp::Unlock { ino: file, lock: write_lock(1, 0, 9) }).await.unwrap();
        assert_eq!(a.lock(file, write_lock(1, 0, 9), false).await, Ok(MetaReply::Done));
    });
}

#[test]
fn a_repeated_waiting_call_is_one_call_also_across_a_restart() {
    simulate(3, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.lock(file, write_lock(1, 0, 9), false).await.unwrap();
        let call = b.next_call(MetaOp::Lock { ino: file, lock: write_lock(2, 0, 9), wait: true });
        let (one, two) = (b.clone(), b.clone());
        let (first, second) = (call.clone(), call.clone());
        let one = cluster.handle.spawn(async move { one.send(first).await });
        let two = cluster.handle.spawn(async move { two.send(second).await });
        cluster.handle.sleep(Duration::from_millis(100)).await;
        cluster.restart();
        cluster.handle.sleep(Duration::from_millis(100)).await;
        a.call(MetaOp::Unlock { ino: file, lock: write_lock(1, 0, 9) }).await.unwrap();
        assert_eq!(one.await.unwrap(), Ok(MetaReply::Done));
        assert_eq!(two.await.unwrap(), Ok(MetaReply::Done));
    });
}

#[test]
fn a_client_that_waits_for_long_is_told_now_and_then_and_keeps_its_place() {
    simulate(5, |cluster| async move {
        cluster.start().await;
        let [a, b, c] = [1, 2, 3].map(|number| Client::open(&cluster, number));
        let (a, b, c) = (a.await, b.await, c.await);
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.lock(file, write_lock(1, 0, 9), false).await.unwrap();
        let call = b.next_call(MetaOp::Lock { ino: file, lock: write_lock(2, 0, 9), wait: true });
        for _ in 0..3 {
            let service = cluster.service().unwrap();
            assert!(matches!(service.call(call.clone()).await, Err(MetaError::Busy(_))));
        }
        let later = c.clone();
        let later = cluster.handle.spawn(async move { later.lock(file, write_lock(3, 0, 9), true).await });
        cluster.handle.sleep(Duration::from_millis(100)).await;
        a.call(MetaOp::Unlock { ino: file, lock: write_lock(1, 0, 9) }).await.unwrap();
        cluster.handle.sleep(Duration::from_secs(1)).await;
        assert_eq!(b.send(call).await, Ok(MetaReply::Done), "while nobody asked");
        assert!(!later.is_finished());
        b.call(MetaOp::Unlock { ino: file, lock: write_lock(2, 0, 9) }).await.unwrap();
        assert_eq!(later.await.unwrap(), Ok(MetaReply::Done));
    });
}

#[test]
fn a_dead_holders_lock_passes_on_and_a_dead_waiter_goes_away() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let c = Client::open(&cluster, 3).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.lock(file, write_lock(1, 0, 9), false).await.unwrap();
        let dying = b.clone();
        let dying = cluster.handle.spawn(async move { dying.lock(file, write_lock(2, 0, 9), true).await });
        cluster.handle.sleep(Duration::from_millis(50)).await;
        let waiter = c.clone();
        let waiting = cluster.handle.spawn(async move { waiter.lock(file, write_lock(3, 0, 9), true).await });
        cluster.handle.sleep(Duration::from_millis(50)).await;
        b.vanish();
        assert_eq!(dying.await.unwrap(), Err(MetaError::Fenced));
        assert!(!waiting.is_finished(), "A lives and holds the lock");
        a.vanish();
        assert_eq!(waiting.await.unwrap(), Ok(MetaReply::Done));
    });
}
