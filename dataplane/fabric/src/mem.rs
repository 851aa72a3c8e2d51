//! Fabric within one process, under a seed: every delay, loss and reset is drawn from it, so a
//! run replays. All nodes share one executor, each in its own domain; a killed domain resets
//! its connections as a killed process does.
//!
//! It fails only as TCP does: a call ends or is lost, executed or not; nothing is duplicated.
//! A message to a partitioned node waits, as a retransmission would, and goes through if the
//! partition heals in time.

use crate::{Address, CALLS_MAX, Connection, Fabric, FabricError, Listener, Message, Peer, Service};
use cfs_reactor::Handle;
use cfs_reactor::buffer::{DmaBuf, is_page_aligned};
use cfs_reactor::clock::SplitMix64;
use cfs_reactor::collections::FixedHasher;
use cfs_reactor::sync::{Notify, OneshotReceiver, OneshotSender, Permit, Semaphore, oneshot};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// The denominator of fault probabilities.
pub const MILLION: u32 = 1_000_000;

/// What goes wrong how often. The default is a healthy rack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Faults {
    /// One way, at least and at most; drawn for each message.
    pub delay: (Duration, Duration),
    /// Calls in a million whose request never arrives.
    pub request_loss: u32,
    /// Calls in a million that are executed and whose reply never arrives.
    pub reply_loss: u32,
    /// Calls in a million during which the connection is reset, with every call on it.
    pub reset: u32,
    /// How long a lost or partitioned call hangs before it is given up.
    pub lost_after: Duration,
}

impl Default for Faults {
    fn default() -> Faults {
        let delay = (Duration::from_micros(10), Duration::from_micros(50));
        Faults { delay, request_loss: 0, reply_loss: 0, reset: 0, lost_after: Duration::from_millis(500) }
    }
}

/// The network that the nodes of one simulation share. Holds no node alive.
pub struct MemNetwork {
    faults: RefCell<Faults>,
    random: RefCell<SplitMix64>,
    listeners: RefCell<BTreeMap<Address, Weak<Served>>>,
    links: RefCell<Vec<Weak<Link>>>,
    /// Ordered pairs (from, to) that messages do not pass.
    cuts: RefCell<BTreeSet<(String, String)>>,
    fuse: RefCell<Option<Fuse>>,
    healed: Rc<Notify>,
}

/// A partition that begins with a call.
struct Fuse {
    from: String,
    to: String,
    calls: u64,
    burnt: OneshotSender<()>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Arrives,
    RequestLost,
    ReplyLost,
    Reset,
}

/// One call's drawn future.
struct Course {
    out: Duration,
    back: Duration,
    fate: Fate,
    reset_after: Duration,
}

impl MemNetwork {
    pub fn new(seed: u64) -> Rc<MemNetwork> {
        Rc::new(MemNetwork {
            faults: RefCell::default(),
            random: RefCell::new(SplitMix64::new(seed)),
            listeners: RefCell::default(),
            links: RefCell::default(),
            cuts: RefCell::default(),
            fuse: RefCell::default(),
            healed: Notify::new(),
        })
    }

    /// Node `name`'s access to the network. A node that restarts asks again with its new domain.
    pub fn endpoint(self: &Rc<Self>, name: &str, handle: &Handle) -> Rc<MemFabric> {
        Rc::new(MemFabric { network: self.clone(), name: name.to_owned(), handle: handle.clone() })
    }

    /// For messages sent from now on.
    pub fn set_faults(&self, faults: Faults) {
        *self.faults.borrow_mut() = faults;
    }

    /// Cuts (or heals) both ways between two nodes.
    pub fn partition(&self, a: &str, b: &str, cut: bool) {
        self.partition_one_way(a, b, cut);
        self.partition_one_way(b, a, cut);
    }

    /// Cuts (or heals) what `from` sends to `to`: requests and replies alike.
    pub fn partition_one_way(&self, from: &str, to: &str, cut: bool) {
        let pair = (from.to_owned(), to.to_owned());
        if cut {
            self.cuts.borrow_mut().insert(pair);
        } else {
            self.cuts.borrow_mut().remove(&pair);
            self.healed.notify_all();
        }
    }

    /// Cuts both ways with the `calls`-th further call from one node to another (the next one is 1), which
    /// is the first that does not pass. Tells when; an error if it is healed before.
    pub fn partition_at_call(&self, from: &str, to: &str, calls: u64) -> OneshotReceiver<()> {
        let (burnt, receiver) = oneshot();
        let fuse = Fuse { from: from.to_owned(), to: to.to_owned(), calls: calls.max(1), burnt };
        *self.fuse.borrow_mut() = Some(fuse);
        receiver
    }

    fn count_call(&self, link: &Link) {
        let mut fuse = self.fuse.borrow_mut();
        let Some(burning) = fuse.as_mut().filter(|fuse| fuse.from == link.from && fuse.to == link.to) else { return };
        burning.calls -= 1;
        if burning.calls == 0
            && let Some(Fuse { from, to, burnt, .. }) = fuse.take()
        {
            self.partition(&from, &to, true);
            // Whoever lit it may not wait any more.
            let _ = burnt.send(());
        }
    }

    /// Heals every partition, also one that is to begin with a call.
    pub fn heal(&self) {
        self.fuse.borrow_mut().take();
        self.cuts.borrow_mut().clear();
        self.healed.notify_all();
    }

    /// Resets every connection that node `name` made or serves.
    pub fn reset(&self, name: &str) {
        let links: Vec<Rc<Link>> = self.links.borrow().iter().filter_map(Weak::upgrade).collect();
        for link in links.iter().filter(|link| link.from == name || link.to == name) {
            link.close();
        }
    }

    fn delay(&self) -> Duration {
        let (least, most) = self.faults.borrow().delay;
        let spread = most.saturating_sub(least).as_nanos() as u64;
        least + Duration::from_nanos(self.random.borrow_mut().below(spread + 1))
    }

    fn draw_course(&self) -> Course {
        let (out, back) = (self.delay(), self.delay());
        let faults = self.faults.borrow();
        let mut random = self.random.borrow_mut();
        let die = random.below(u64::from(MILLION)) as u32;
        let bounds = [faults.request_loss, faults.reply_loss, faults.reset];
        let fates = [Fate::RequestLost, Fate::ReplyLost, Fate::Reset];
        let mut above = 0u32;
        let mut fate = Fate::Arrives;
        for (bound, candidate) in bounds.into_iter().zip(fates) {
            if (above..above.saturating_add(bound)).contains(&die) {
                fate = candidate;
            }
            above = above.saturating_add(bound);
        }
        let whole = (out + back).as_nanos() as u64;
        let reset_after = Duration::from_nanos(random.below(whole + 1));
        Course { out, back, fate, reset_after }
    }

    /// Waits until `from` can reach `to`; false if that takes too long.
    async fn passes(&self, handle: &Handle, from: &str, to: &str) -> bool {
        let pair = (from.to_owned(), to.to_owned());
        let deadline = handle.now() + self.faults.borrow().lost_after;
        loop {
            let healed = self.healed.notified();
            if !self.cuts.borrow().contains(&pair) {
                return true;
            }
            if handle.now() >= deadline {
                return false;
            }
            handle.timeout(deadline - handle.now(), healed).await;
        }
    }

    /// A live listener at this address.
    fn served(&self, address: &Address) -> Option<Rc<Served>> {
        let served = self.listeners.borrow().get(address).and_then(Weak::upgrade);
        served.filter(|served| served.handle.is_alive())
    }
}

/// What listens at one address. Owned by its listener alone, so it dies with its node.
struct Served {
    network: Rc<MemNetwork>,
    address: Address,
    node: String,
    handle: Handle,
    service: Rc<dyn Service>,
    links: RefCell<Vec<Weak<Link>>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let mut listeners = self.network.listeners.borrow_mut();
        // A successor may listen there already.
        if listeners.get(&self.address).is_some_and(|listed| listed.strong_count() == 0) {
            listeners.remove(&self.address);
        }
        drop(listeners);
        for link in self.links.borrow().iter().filter_map(Weak::upgrade) {
            link.close();
        }
    }
}

/// One connection, as both ends know it.
struct Link {
    from: String,
    to: String,
    served: Weak<Served>,
    server: Handle,
    closed: Cell<bool>,
    slots: Rc<Semaphore>,
    calls: RefCell<BTreeMap<u64, Call>>,
    next_call: Cell<u64>,
}

/// A call under way. Without this entry it has no caller any more: dropping it loses the call.
struct Call {
    reply_to: OneshotSender<Result<Message, FabricError>>,
    _slot: Permit,
}

impl Link {
    /// Loses every call. What the server already executes it goes on executing.
    fn close(&self) {
        self.closed.set(true);
        let calls = std::mem::take(&mut *self.calls.borrow_mut());
        drop(calls);
    }
}

/// One node's fabric.
pub struct MemFabric {
    network: Rc<MemNetwork>,
    name: String,
    handle: Handle,
}

struct MemListener(Rc<Served>);

impl Listener for MemListener {
    fn address(&self) -> Address {
        self.0.address.clone()
    }
}

impl Fabric for MemFabric {
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
        if self.network.served(address).is_some() {
            let detail = "another listener is there: choose another name".to_owned();
            return Err(FabricError::Listen { address: address.clone(), detail });
        }
        let served = Rc::new(Served {
            network: self.network.clone(),
            address: address.clone(),
            node: self.name.clone(),
            handle: self.handle.clone(),
            service,
            links: RefCell::default(),
        });
        self.network.listeners.borrow_mut().insert(address.clone(), Rc::downgrade(&served));
        Ok(Box::new(MemListener(served)))
    }

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
        let address = address.clone();
        async move {
            let network = &self.network;
            let refused = |detail: &str| FabricError::Connect { address: address.clone(), detail: detail.to_owned() };
            let round_trip = network.delay() + network.delay();
            self.handle.trace(round_trip.as_nanos() as u64);
            self.handle.sleep(round_trip).await;
            // Nobody is held while waiting for a partition to heal.
            let node = network.served(&address).map(|served| served.node.clone());
            let node = node.ok_or_else(|| refused("connection refused"))?;
            let there = network.passes(&self.handle, &self.name, &node).await;
            if !there || !network.passes(&self.handle, &node, &self.name).await {
                return Err(refused("timed out"));
            }
            let served = network.served(&address).ok_or_else(|| refused("connection refused"))?;
            let link = Rc::new(Link {
                from: self.name.clone(),
                to: node,
                served: Rc::downgrade(&served),
                server: served.handle.clone(),
                closed: Cell::new(false),
                slots: Semaphore::new(CALLS_MAX),
                calls: RefCell::default(),
                next_call: Cell::new(0),
            });
            for list in [&network.links, &served.links] {
                let mut list = list.borrow_mut();
                list.retain(|link| link.strong_count() > 0);
                list.push(Rc::downgrade(&link));
            }
            let connection = MemConnection { network: network.clone(), handle: self.handle.clone(), address, link };
            Ok(Rc::new(connection) as Rc<dyn Connection>)
        }
        .boxed_local()
    }
}

struct MemConnection {
    network: Rc<MemNetwork>,
    handle: Handle,
    address: Address,
    link: Rc<Link>,
}

impl MemConnection {
    fn lost(&self, detail: &str) -> FabricError {
        FabricError::Lost { address: self.address.clone(), detail: detail.to_owned() }
    }

    async fn exchange(&self, request: Message) -> Result<Message, FabricError> {
        request.check_length()?;
        let link = &self.link;
        let slot = link.slots.acquire(1).await;
        if link.closed.get() {
            return Err(self.lost("connection reset"));
        }
        self.network.count_call(link);
        let course = self.network.draw_course();
        self.trace(&request, &course);
        if course.fate == Fate::Reset {
            let (link, server) = (link.clone(), link.server.clone());
            self.link.server.spawn(async move {
                server.sleep(course.reset_after).await;
                link.close();
            });
        }
        let (reply_to, reply) = oneshot();
        let id = link.next_call.get();
        link.next_call.set(id + 1);
        link.calls.borrow_mut().insert(id, Call { reply_to, _slot: slot });
        let flight = Flight { network: self.network.clone(), link: link.clone(), course, id };
        link.server.spawn(flight.run(request));
        if let Ok(reply) = reply.await {
            return reply;
        }
        if link.closed.get() {
            return Err(self.lost("connection reset"));
        }
        if !link.server.is_alive() {
            link.close();
        }
        // The server's end is gone or gave up; the news takes its way.
        self.handle.sleep(self.network.delay()).await;
        Err(self.lost("no reply"))
    }

    fn trace(&self, request: &Message, course: &Course) {
        let mut hasher = FixedHasher::default();
        hasher.write(self.link.from.as_bytes());
        hasher.write(self.link.to.as_bytes());
        hasher.write_u16(request.opcode);
        hasher.write(&request.body);
        hasher.write_usize(request.bulk.len());
        hasher.write_u8(course.fate as u8);
        self.handle.trace(hasher.finish());
        self.handle.trace(course.out.as_nanos() as u64);
        self.handle.trace(course.back.as_nanos() as u64);
    }
}

impl Connection for MemConnection {
    fn call(&self, request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        self.exchange(request).boxed_local()
    }

    fn is_closed(&self) -> bool {
        self.link.closed.get() || !self.link.server.is_alive()
    }

    fn peer_address(&self) -> Address {
        self.address.clone()
    }

    fn carrier(&self) -> String {
        "mem".to_owned()
    }
}

/// A call on its way: runs in the server's domain, so that it goes on when the caller gives up
/// and ends when the server dies.
struct Flight {
    network: Rc<MemNetwork>,
    link: Rc<Link>,
    course: Course,
    id: u64,
}

impl Drop for Flight {
    fn drop(&mut self) {
        let call = self.link.calls.borrow_mut().remove(&self.id);
        drop(call);
    }
}

impl Flight {
    /// Returning without a reply loses the call.
    async fn run(self, request: Message) {
        let Flight { network, link, course, id } = &self;
        let handle = link.server.clone();
        let lost_after = network.faults.borrow().lost_after;
        handle.sleep(course.out).await;
        if course.fate == Fate::RequestLost {
            handle.sleep(lost_after).await;
            return;
        }
        if !network.passes(&handle, &link.from, &link.to).await || link.closed.get() {
            return;
        }
        let Some(service) = link.served.upgrade().map(|served| served.service.clone()) else { return };
        let request = Message { bulk: at_page_start(request.bulk), ..request };
        let reply = service.handle(Peer::Simulated(link.from.clone()), request).await;
        drop(service);
        if course.fate == Fate::ReplyLost {
            handle.sleep(lost_after).await;
            return;
        }
        handle.sleep(course.back).await;
        if !network.passes(&handle, &link.to, &link.from).await {
            return;
        }
        let reply = reply.check_length().map(|()| Message { bulk: at_page_start(reply.bulk), ..reply });
        let call = link.calls.borrow_mut().remove(id);
        if let Some(Call { reply_to, .. }) = call {
            // A caller that gave up is not told.
            let _ = reply_to.send(reply);
        }
    }
}

/// As a real fabric delivers it.
fn at_page_start(bulk: bytes::Bytes) -> bytes::Bytes {
    if bulk.is_empty() || is_page_aligned(&bulk) { bulk } else { DmaBuf::copy_of(&bulk).freeze() }
}
