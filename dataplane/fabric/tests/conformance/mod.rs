//! What every fabric must do, as stories. Each back end brings an [`Env`] and runs them all.

use bytes::Bytes;
use cfs_fabric::{Address, Connection, Fabric, FabricError, Message, Peer, Service};
use cfs_reactor::Handle;
use cfs_reactor::buffer::is_page_aligned;
use cfs_reactor::sync::Notify;
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Two nodes, each in a domain of its own.
pub struct Env {
    pub server: Rc<dyn Fabric>,
    pub server_handle: Handle,
    pub client: Rc<dyn Fabric>,
    pub client_handle: Handle,
    /// Where the server may listen.
    pub address: Address,
}

pub const ECHO: u16 = 1;
/// Answers once as many milliseconds have passed as the body's first byte says.
pub const SLEEP: u16 = 2;
pub const NEVER: u16 = 3;
pub const TOO_LARGE: u16 = 4;
/// Answers when the gate opens.
pub const GATED: u16 = 5;

/// Remembers what it was asked, in order, and how many calls ran at once.
pub struct Recorder {
    handle: Handle,
    pub asked: RefCell<Vec<u16>>,
    pub running: Cell<usize>,
    pub running_max: Cell<usize>,
    pub finished: Cell<usize>,
    pub open: Cell<bool>,
    pub gate: Rc<Notify>,
    pub unaligned: Cell<usize>,
}

impl Recorder {
    pub fn new(handle: &Handle) -> Rc<Recorder> {
        Rc::new(Recorder {
            handle: handle.clone(),
            asked: RefCell::default(),
            running: Cell::new(0),
            running_max: Cell::new(0),
            finished: Cell::new(0),
            open: Cell::new(false),
            gate: Notify::new(),
            unaligned: Cell::new(0),
        })
    }

    async fn answer(&self, request: Message) -> Message {
        let Message { opcode, body, bulk } = request;
        match opcode {
            SLEEP => self.handle.sleep(Duration::from_millis(body[0].into())).await,
            NEVER => std::future::pending().await,
            TOO_LARGE => return Message { opcode, body, bulk: Bytes::from(vec![0; RPC_BULK_BYTES_MAX + 1]) },
            GATED => loop {
                let opened = self.gate.notified();
                if self.open.get() {
                    break;
                }
                opened.await;
            },
            _ => {}
        }
        Message { opcode: opcode + 100, body, bulk }
    }
}

impl Service for Recorder {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        async move {
            self.asked.borrow_mut().push(request.opcode);
            self.running.set(self.running.get() + 1);
            self.running_max.set(self.running_max.get().max(self.running.get()));
            if !request.bulk.is_empty() && !is_page_aligned(&request.bulk) {
                self.unaligned.set(self.unaligned.get() + 1);
            }
            let reply = self.answer(request).await;
            self.running.set(self.running.get() - 1);
            self.finished.set(self.finished.get() + 1);
            reply
        }
        .boxed_local()
    }
}

pub fn message(opcode: u16, body: &[u8], bulk: &[u8]) -> Message {
    Message { opcode, body: Bytes::copy_from_slice(body), bulk: Bytes::copy_from_slice(bulk) }
}

/// A served recorder and a connection to it.
pub struct Pair {
    pub recorder: Rc<Recorder>,
    pub listener: Box<dyn cfs_fabric::Listener>,
    pub connection: Rc<dyn Connection>,
}

pub async fn pair(env: &Env) -> Pair {
    let recorder = Recorder::new(&env.server_handle);
    let listener = env.server.listen(&env.address, recorder.clone()).unwrap();
    let connection = env.client.connect(&listener.address()).await.unwrap();
    assert_eq!(connection.peer_address(), listener.address());
    Pair { recorder, listener, connection }
}

/// Waits (at most ten seconds) until `condition` holds.
pub async fn eventually(handle: &Handle, what: &str, condition: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        handle.sleep(Duration::from_millis(1)).await;
    }
    panic!("waited in vain: {what}");
}

pub fn is_lost<T: std::fmt::Debug>(outcome: &Result<T, FabricError>) -> bool {
    matches!(outcome, Err(error @ FabricError::Lost { .. }) if error.is_retryable())
}

pub async fn echo(env: Env) {
    let Pair { connection, recorder, listener: _listening } = pair(&env).await;
    for (body, bulk) in [(&b""[..], &b""[..]), (b"body", b""), (b"", b"bulk"), (b"both", b"of them")] {
        let reply = connection.call(message(ECHO, body, bulk)).await;
        assert_eq!(reply, Ok(message(ECHO + 100, body, bulk)));
    }
    assert_eq!(*recorder.asked.borrow(), [ECHO; 4]);
    assert!(!connection.is_closed());
}

pub async fn answers_overtake(env: Env) {
    let Pair { connection, listener: _listening, .. } = pair(&env).await;
    let order = RefCell::new(Vec::new());
    let calls = [90u8, 60, 30, 1].map(|delay| {
        let (connection, order) = (&connection, &order);
        async move {
            let reply = connection.call(message(SLEEP, &[delay], &[])).await;
            assert_eq!(reply, Ok(message(SLEEP + 100, &[delay], &[])));
            order.borrow_mut().push(delay);
        }
    });
    join_all(calls).await;
    assert_eq!(*order.borrow(), [1, 30, 60, 90]);
}

pub async fn large_bulk(env: Env) {
    let Pair { connection, recorder, listener: _listening } = pair(&env).await;
    let pattern = |length: usize, salt: usize| (0..length).map(|i| ((i * 31 + salt) >> 3) as u8).collect::<Vec<u8>>();
    // Around the sizes at which buffers are switched, and the largest of all.
    let sizes = [1, 4095, 4097, 16 << 10, (16 << 10) + 1, 65 << 10, 1 << 20, 4 << 20, RPC_BULK_BYTES_MAX];
    let calls = sizes.iter().enumerate().map(|(salt, size)| {
        let request = message(ECHO, &pattern(*size / 3, salt), &pattern(*size, salt));
        let connection = &connection;
        async move {
            let reply = connection.call(request.clone()).await.unwrap();
            assert!(reply.body == request.body, "body beside {size} bulk bytes");
            assert!(reply.bulk == request.bulk, "{size} bulk bytes");
            assert!(is_page_aligned(&reply.bulk), "{size} bulk bytes");
        }
    });
    join_all(calls).await;
    assert_eq!(recorder.unaligned.get(), 0);
}

pub async fn server_death_loses_the_call(env: Env) {
    let Pair { connection, recorder, listener } = pair(&env).await;
    let address = listener.address();
    let handle = env.server_handle.clone();
    env.client_handle.spawn(async move {
        eventually(&Handle::current(), "the call runs", || recorder.running.get() == 1).await;
        handle.kill();
        drop(listener);
    });
    let outcome = connection.call(message(NEVER, b"", b"")).await;
    assert!(is_lost(&outcome), "{outcome:?}");
    eventually(&env.client_handle, "the connection notices", || connection.is_closed()).await;
    assert!(is_lost(&connection.call(message(ECHO, b"", b"")).await));
    let refused = env.client.connect(&address).await.map(|_| ()).unwrap_err();
    assert!(matches!(refused, FabricError::Connect { .. }), "{refused:?}");
    assert!(refused.is_retryable());
}

pub async fn dropped_listener_closes(env: Env) {
    let Pair { connection, listener, recorder } = pair(&env).await;
    let address = listener.address();
    assert!(connection.call(message(ECHO, b"", b"")).await.is_ok());
    drop(listener);
    let outcome = connection.call(message(ECHO, b"", b"")).await;
    assert!(is_lost(&outcome), "{outcome:?}");
    assert_eq!(recorder.asked.borrow().len(), 1);
    assert!(env.client.connect(&address).await.is_err());
    // The place is free again.
    let again = env.server.listen(&address, recorder.clone()).unwrap();
    let connection = env.client.connect(&again.address()).await.unwrap();
    assert_eq!(connection.call(message(ECHO, b"x", b"")).await, Ok(message(ECHO + 100, b"x", b"")));
}

pub async fn abandoned_call_is_executed(env: Env) {
    let Pair { connection, recorder, listener: _listening } = pair(&env).await;
    let waited = env.client_handle.timeout(Duration::from_millis(5), connection.call(message(SLEEP, &[40], &[])));
    assert!(waited.await.is_none(), "given up before the answer");
    assert_eq!(recorder.finished.get(), 0);
    eventually(&env.client_handle, "it ends all the same", || recorder.finished.get() == 1).await;
    // Its late reply disturbs nobody.
    env.client_handle.sleep(Duration::from_millis(20)).await;
    assert_eq!(connection.call(message(ECHO, b"next", b"")).await, Ok(message(ECHO + 100, b"next", b"")));
}

pub async fn too_large_is_refused(env: Env) {
    let Pair { connection, recorder, listener: _listening } = pair(&env).await;
    let (body, bulk) = (vec![0; RPC_BODY_BYTES_MAX + 1], vec![0; RPC_BULK_BYTES_MAX + 1]);
    let refused = |length, limit| Err(FabricError::TooLarge { length, limit });
    let outcome = connection.call(message(ECHO, &body, b"")).await;
    assert_eq!(outcome, refused(body.len(), RPC_BODY_BYTES_MAX));
    let outcome = connection.call(message(ECHO, b"", &bulk)).await;
    assert_eq!(outcome, refused(bulk.len(), RPC_BULK_BYTES_MAX));
    assert!(recorder.asked.borrow().is_empty(), "neither was sent");
    // A reply that does not fit is refused as well, and the connection lives on.
    let outcome = connection.call(message(TOO_LARGE, b"", b"")).await;
    assert_eq!(outcome, refused(bulk.len(), RPC_BULK_BYTES_MAX));
    assert_eq!(connection.call(message(ECHO, &body[1..], b"")).await, Ok(message(ECHO + 100, &body[1..], b"")));
}

/// Callers that wait for a slot are lost with the connection, not left waiting.
pub async fn waiting_callers_are_lost_too(env: Env) {
    let Pair { connection, recorder, listener } = pair(&env).await;
    let calls = (0..cfs_fabric::CALLS_MAX + 3).map(|_| {
        let connection = connection.clone();
        env.client_handle.spawn(async move { connection.call(message(NEVER, b"", b"")).await })
    });
    let calls: Vec<_> = calls.collect();
    eventually(&env.client_handle, "as many run as may", || recorder.running.get() == cfs_fabric::CALLS_MAX).await;
    drop(listener);
    for call in calls {
        let outcome = call.await.unwrap();
        assert!(is_lost(&outcome), "{outcome:?}");
    }
    assert_eq!(recorder.asked.borrow().len(), cfs_fabric::CALLS_MAX);
}

pub async fn calls_under_way_are_bounded(env: Env) {
    let Pair { connection, recorder, listener: _listening } = pair(&env).await;
    const CALLS: usize = cfs_fabric::CALLS_MAX + 100;
    let calls = (0..CALLS).map(|index| {
        let connection = connection.clone();
        let body = index.to_le_bytes();
        env.client_handle.spawn(async move { connection.call(message(GATED, &body, b"")).await })
    });
    let calls: Vec<_> = calls.collect();
    eventually(&env.client_handle, "as many run as may", || recorder.running.get() == cfs_fabric::CALLS_MAX).await;
    env.client_handle.sleep(Duration::from_millis(20)).await;
    assert_eq!(recorder.asked.borrow().len(), cfs_fabric::CALLS_MAX, "and not one more");
    recorder.open.set(true);
    recorder.gate.notify_all();
    for (index, call) in calls.into_iter().enumerate() {
        let expected = message(GATED + 100, &index.to_le_bytes(), b"");
        assert_eq!(call.await.unwrap(), Ok(expected));
    }
    assert!(recorder.running_max.get() <= cfs_fabric::CALLS_MAX);
}

/// Runs every story with `$run(name, story)`.
#[macro_export]
macro_rules! conformance {
    ($run:path) => {
        $crate::conformance!($run; echo answers_overtake large_bulk server_death_loses_the_call
            dropped_listener_closes abandoned_call_is_executed too_large_is_refused
            waiting_callers_are_lost_too calls_under_way_are_bounded);
    };
    ($run:path; $($story:ident)*) => {
        $(#[test]
        fn $story() {
            $run(conformance::$story);
        })*
    };
}
