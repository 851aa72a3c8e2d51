//! One connection's endpoint with its queues: `fid_ep`, `fid_cq`, `fid_eq`.
//!
//! Soundness rests on three rules. Memory that is named to the provider lies on the heap and never moves.
//! It belongs to the endpoint, by the number of its operation, until that has completed; memory that a peer may
//! reach belongs to it until it is withdrawn. When the endpoint goes away it is closed first, after which the
//! provider touches none of it, and then the memory is freed; if it cannot be closed, nothing is freed.
//!
//! The library is called from one thread only, in the calls of this type, and it makes progress only there
//! (FI_PROGRESS_MANUAL, FI_THREAD_DOMAIN).

use super::domain::{Access, Description, Domain, Exposed, Registration, Remote, close};
use super::info::{Info, OfiError, check};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::collections::HashMap;
use cfs_wire::packet::{PACKET_BYTES_MAX, PACKETS_MAX};
use libfabric_sys as sys;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::rc::Rc;

/// Messages received at once at most: as many as the peer sends without having heard from us.
pub(super) const RECEIVES: usize = PACKETS_MAX;
/// Messages sent whose memory the provider is not done with.
const SENDS: usize = RECEIVES;
/// Reads and writes of the peer's memory under way at most: some hundred MiB at 1 MiB each.
pub(super) const TRANSFERS: usize = 32;
pub(super) const TRANSMITS: usize = SENDS + TRANSFERS;
const OPERATIONS: usize = RECEIVES + TRANSMITS;
/// A message at most.
const SLOT_BYTES: usize = PACKET_BYTES_MAX;
/// Completions taken at once: less than a task may take without yielding.
const BATCH: usize = 16;
/// An event with what a peer sent along, of which nothing is used.
const EVENT_BYTES: usize = 512;

/// What happened to a connection.
#[derive(Debug)]
pub(super) enum Event {
    Connected,
    Shutdown,
}

/// An operation that ended well.
pub(super) enum Completion {
    /// A message lies in this slot, for [`Endpoint::received`].
    Received { slot: usize, length: usize },
    /// A message was sent.
    Sent,
    /// The peer's memory was read to here.
    Read { transfer: usize, into: DmaBuf },
    /// It was written to.
    Written { transfer: usize },
}

/// Why an operation was not started.
#[derive(Debug)]
pub(super) enum Refused {
    /// Too much is under way: again after something completed.
    Busy,
    Failed(OfiError),
}

/// What an operation works on. A description goes before the memory it is of, by the order of the fields.
enum Operation {
    Free,
    Receive,
    Send,
    Read { _described: Description, into: DmaBuf },
    Write { _described: Description, _from: Bytes },
}

/// Messages of [`SLOT_BYTES`] each, reached through a pointer only, since the provider writes to some of them.
struct Slots {
    start: *mut u8,
    description: Description,
    _memory: DmaBuf,
}

impl Slots {
    fn new(domain: &Rc<Domain>, count: usize, key: u64) -> Result<Slots, OfiError> {
        let mut memory = DmaBuf::apart(count * SLOT_BYTES);
        let start = memory.as_mut_ptr();
        // SAFETY: the memory goes with the description, and after it, by the order of the fields.
        let description = unsafe { domain.describe(start, memory.len(), key)? };
        Ok(Slots { start, description, _memory: memory })
    }

    /// Where a slot begins.
    fn at(&self, slot: usize) -> *mut u8 {
        // The callers' slots are below the count.
        self.start.wrapping_add(slot * SLOT_BYTES)
    }
}

/// What is freed once the endpoint is closed.
struct Memory {
    operations: Vec<Operation>,
    receives: Slots,
    sends: Slots,
    exposed: HashMap<u64, (Registration, Exposed)>,
    /// Named to the provider with each operation, which may use them (FI_CONTEXT2).
    contexts: Box<[UnsafeCell<sys::fi_context2>]>,
}

/// The objects of one connection.
pub(super) struct Endpoint {
    ep: *mut sys::fid_ep,
    cq: *mut sys::fid_cq,
    eq: *mut sys::fid_eq,
    memory: ManuallyDrop<Memory>,
    /// What keys of registered memory are made from.
    last_key: u64,
    domain: Rc<Domain>,
}

/// Closes what was opened before something failed.
struct Opened(*mut sys::fid);

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: it is open, and nobody else has it.
        unsafe { close(self.0) };
    }
}

impl Endpoint {
    /// An endpoint that has all of its receives posted and is not connected. `key` is random: registered memory
    /// can't be guessed from it.
    pub fn open(domain: &Rc<Domain>, info: &Info, key: u64) -> Result<Endpoint, OfiError> {
        let memory = Memory {
            operations: (0..OPERATIONS).map(|_| Operation::Free).collect(),
            receives: Slots::new(domain, RECEIVES, key)?,
            sends: Slots::new(domain, SENDS, key.wrapping_add(1))?,
            exposed: HashMap::default(),
            // SAFETY: it is plain memory for the provider.
            contexts: (0..OPERATIONS).map(|_| UnsafeCell::new(unsafe { std::mem::zeroed() })).collect(),
        };
        let eq = open_events(domain.network().raw())?;
        let opened_eq = Opened(eq.cast());
        let mut cq = ptr::null_mut();
        // SAFETY: plain data; zero asks for defaults.
        let mut attributes: sys::fi_cq_attr = unsafe { std::mem::zeroed() };
        attributes.size = OPERATIONS;
        attributes.format = sys::FI_CQ_FORMAT_MSG;
        attributes.wait_obj = sys::FI_WAIT_FD;
        // SAFETY: domain and attributes are alive.
        check("fi_cq_open", unsafe { sys::fi_cq_open(domain.raw(), &mut attributes, &mut cq, ptr::null_mut()) })?;
        let opened_cq = Opened(cq.cast());
        let mut ep = ptr::null_mut();
        // SAFETY: domain and info are alive.
        check("fi_endpoint", unsafe { sys::fi_endpoint(domain.raw(), info.raw(), &mut ep, ptr::null_mut()) })?;
        // From here on `Endpoint`'s drop closes them.
        std::mem::forget((opened_eq, opened_cq));
        let memory = ManuallyDrop::new(memory);
        let mut endpoint = Endpoint { ep, cq, eq, memory, last_key: key, domain: domain.clone() };
        let transmit_receive = u64::from(sys::FI_TRANSMIT | sys::FI_RECV);
        // SAFETY: all three are open.
        unsafe {
            check("fi_ep_bind", sys::fi_bind(ep.cast(), eq.cast(), 0))?;
            check("fi_ep_bind", sys::fi_bind(ep.cast(), cq.cast(), transmit_receive))?;
            check("fi_enable", sys::fi_enable(ep))?;
        }
        for slot in 0..RECEIVES {
            endpoint.receive(slot).map_err(|refused| match refused {
                Refused::Busy => OfiError { call: "fi_recv", code: sys::FI_EAGAIN as i32 },
                Refused::Failed(error) => error,
            })?;
        }
        Ok(endpoint)
    }

    /// Begins to connect to where the info leads. An event tells the outcome.
    pub fn connect(&mut self, info: &Info) -> Result<(), OfiError> {
        // SAFETY: the endpoint is open, the address lives as long as the info.
        check("fi_connect", unsafe { sys::fi_connect(self.ep, info.destination(), ptr::null(), 0) })
    }

    /// Accepts the request that the endpoint was opened for.
    pub fn accept(&mut self) -> Result<(), OfiError> {
        // SAFETY: the endpoint is open.
        check("fi_accept", unsafe { sys::fi_accept(self.ep, ptr::null(), 0) })
    }

    /// Descriptors, to sleep on if [`Endpoint::may_sleep`].
    pub fn descriptors(&self) -> Result<[OwnedFd; 2], OfiError> {
        // SAFETY: both are open and were asked to have one.
        unsafe { Ok([descriptor(self.cq.cast())?, descriptor(self.eq.cast())?]) }
    }

    /// Whether there is nothing to be taken, so that a descriptor becomes readable when there is.
    pub fn may_sleep(&self) -> bool {
        let mut fids = [self.cq.cast(), self.eq.cast()];
        // SAFETY: they are open and of this network.
        unsafe { sys::fi_trywait(self.domain.network().raw(), fids.as_mut_ptr(), 2) == 0 }
    }

    /// The next event, if there is one.
    pub fn event(&mut self) -> Result<Option<Event>, OfiError> {
        match next_event(self.eq, self.domain_functions())? {
            Some((sys::FI_CONNECTED, _)) => Ok(Some(Event::Connected)),
            Some((sys::FI_SHUTDOWN, _)) => Ok(Some(Event::Shutdown)),
            _ => Ok(None),
        }
    }

    fn domain_functions(&self) -> &'static sys::Functions {
        sys::functions().expect("it is loaded, since there is an endpoint")
    }

    /// Takes what completed. The first error ends the connection.
    pub fn completions(&mut self, into: &mut Vec<Completion>) -> Result<(), OfiError> {
        let empty = sys::fi_cq_msg_entry { op_context: ptr::null_mut(), flags: 0, len: 0 };
        let mut entries = [empty; BATCH];
        // SAFETY: there is room for as many.
        let count = unsafe { sys::fi_cq_read(self.cq, entries.as_mut_ptr().cast(), BATCH) };
        let Ok(count) = usize::try_from(count) else { return self.no_completion(count) };
        for entry in entries.get(..count).unwrap_or_default() {
            let place = self.place(entry.op_context);
            into.extend(place.and_then(|place| self.completed(place, entry.len)));
        }
        Ok(())
    }

    /// What it means that there is none.
    fn no_completion(&mut self, result: isize) -> Result<(), OfiError> {
        let code = -result as i32;
        if code == sys::FI_EAGAIN as i32 {
            return Ok(());
        }
        if code != sys::FI_EAVAIL as i32 {
            return Err(OfiError { call: "fi_cq_read", code });
        }
        // SAFETY: plain data, in which no memory is offered for more.
        let mut entry: sys::fi_cq_err_entry = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is open.
        let read = unsafe { sys::fi_cq_readerr(self.cq, &mut entry, 0) };
        if read < 0 {
            return if read == -(sys::FI_EAGAIN as isize) {
                Ok(())
            } else {
                Err(OfiError { call: "fi_cq_readerr", code: -read as i32 })
            };
        }
        let call = match self.place(entry.op_context).and_then(|place| self.memory.operations.get(place)) {
            Some(Operation::Read { .. }) => "reading the peer's memory",
            Some(Operation::Write { .. }) => "writing to the peer's memory",
            Some(Operation::Send) => "sending",
            _ => "receiving",
        };
        Err(OfiError { call, code: entry.err })
    }

    /// Which operation a context is of.
    fn place(&self, context: *mut c_void) -> Option<usize> {
        let bytes = (context as usize).checked_sub(self.memory.contexts.as_ptr() as usize)?;
        let place = bytes / size_of::<sys::fi_context2>();
        (place < OPERATIONS && bytes.is_multiple_of(size_of::<sys::fi_context2>())).then_some(place)
    }

    fn completed(&mut self, place: usize, length: usize) -> Option<Completion> {
        match std::mem::replace(&mut self.memory.operations[place], Operation::Free) {
            Operation::Free => None,
            Operation::Receive => Some(Completion::Received { slot: place, length }),
            Operation::Send => Some(Completion::Sent),
            Operation::Read { into, .. } => Some(Completion::Read { transfer: place, into }),
            Operation::Write { .. } => Some(Completion::Written { transfer: place }),
        }
    }

    /// A message that was received: valid until the slot receives again.
    pub fn received(&self, slot: usize, length: usize) -> &[u8] {
        if slot >= RECEIVES || !matches!(self.memory.operations[slot], Operation::Free) {
            return &[];
        }
        // SAFETY: inside the slot, which the provider is done with: it is free.
        unsafe { std::slice::from_raw_parts(self.memory.receives.at(slot), length.min(SLOT_BYTES)) }
    }

    /// Receives a message into a free slot.
    pub fn receive(&mut self, slot: usize) -> Result<(), Refused> {
        assert!(slot < RECEIVES && matches!(self.memory.operations[slot], Operation::Free), "it is a free slot");
        let (start, context) = (self.memory.receives.at(slot), self.memory.contexts[slot].get());
        let description = self.memory.receives.description.raw();
        // SAFETY: the slot belongs to the provider until the completion, for it is not free.
        let result = unsafe { sys::fi_recv(self.ep, start.cast(), SLOT_BYTES, description, 0, context.cast()) };
        started("fi_recv", result)?;
        self.memory.operations[slot] = Operation::Receive;
        Ok(())
    }

    fn free(&self, mut places: std::ops::Range<usize>) -> Option<usize> {
        places.find(|place| matches!(self.memory.operations[*place], Operation::Free))
    }

    /// Sends a message, which fits a slot.
    pub fn send(&mut self, message: &[u8]) -> Result<(), Refused> {
        let length = message.len();
        assert!(length <= SLOT_BYTES, "a message fits a slot");
        let place = self.free(RECEIVES..RECEIVES + SENDS).ok_or(Refused::Busy)?;
        let start = self.memory.sends.at(place - RECEIVES);
        // SAFETY: the slot is free, so it is ours alone.
        unsafe { std::slice::from_raw_parts_mut(start, length) }.copy_from_slice(message);
        let (context, description) = (self.memory.contexts[place].get(), self.memory.sends.description.raw());
        // SAFETY: the slot belongs to the provider until the completion, for it is not free.
        let result = unsafe { sys::fi_send(self.ep, start.cast(), length, description, 0, context.cast()) };
        started("fi_send", result)?;
        self.memory.operations[place] = Operation::Send;
        Ok(())
    }

    /// Reads the peer's memory into all of this buffer: the number of the transfer.
    pub fn read(&mut self, mut into: DmaBuf, from: Remote) -> Result<usize, (Refused, DmaBuf)> {
        let Some(place) = self.free(RECEIVES + SENDS..OPERATIONS) else { return Err((Refused::Busy, into)) };
        let (start, length) = (into.as_mut_ptr(), into.len());
        let key = self.next_key();
        // SAFETY: the description goes before the buffer, in the operation or here.
        let described = match unsafe { self.domain.describe(start, length, key) } {
            Ok(described) => described,
            Err(error) => return Err((Refused::Failed(error), into)),
        };
        let context = self.memory.contexts[place].get();
        // SAFETY: the buffer belongs to the operation until the completion; it lies on the heap.
        let result = unsafe {
            let (description, context) = (described.raw(), context.cast());
            sys::fi_read(self.ep, start.cast(), length, description, 0, from.address, from.key, context)
        };
        if let Err(refused) = started("fi_read", result) {
            drop(described);
            return Err((refused, into));
        }
        self.memory.operations[place] = Operation::Read { into, _described: described };
        Ok(place)
    }

    /// Writes these bytes to the peer's memory: the number of the transfer.
    pub fn write(&mut self, from: Bytes, to: Remote) -> Result<usize, Refused> {
        let place = self.free(RECEIVES + SENDS..OPERATIONS).ok_or(Refused::Busy)?;
        let key = self.next_key();
        // SAFETY: the bytes stay with the description, in the operation.
        let described = unsafe { self.domain.describe(from.as_ptr(), from.len(), key) }.map_err(Refused::Failed)?;
        let context = self.memory.contexts[place].get();
        // SAFETY: the bytes belong to the operation until the completion.
        let result = unsafe {
            let (description, context) = (described.raw(), context.cast());
            sys::fi_write(self.ep, from.as_ptr().cast(), from.len(), description, 0, to.address, to.key, context)
        };
        started("fi_write", result)?;
        self.memory.operations[place] = Operation::Write { _from: from, _described: described };
        Ok(place)
    }

    fn next_key(&mut self) -> u64 {
        // A step of the golden ratio: all keys of a connection differ, and none is near to another.
        self.last_key = self.last_key.wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.last_key
    }

    /// Lets the peer reach this memory under a key that `secret`, a random number, has part in: what it is
    /// withdrawn by, and what the peer needs.
    pub fn expose(&mut self, memory: Exposed, secret: u64) -> Result<(u64, Remote), OfiError> {
        let (start, length, access) = match &memory {
            Exposed::Read(bytes) => (bytes.as_ptr(), bytes.len(), Access::RemoteRead),
            Exposed::Write(buffer) => (buffer.as_ptr(), buffer.len(), Access::RemoteWrite),
        };
        let number = self.next_key();
        // SAFETY: the memory stays with the registration until this is closed.
        let registration = unsafe { self.domain.register(start, length, access, number ^ secret)? };
        let remote = registration.remote();
        self.memory.exposed.insert(number, (registration, memory));
        Ok((number, remote))
    }

    /// The peer reaches it no more.
    pub fn withdraw(&mut self, number: u64) -> Option<Exposed> {
        let (registration, memory) = self.memory.exposed.remove(&number)?;
        if registration.close() {
            return Some(memory);
        }
        // It may be reached for ever.
        std::mem::forget(memory);
        None
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // SAFETY: all three are open; what uses the queues goes first. The memory is freed when the provider
        // can't reach it any more, and is not used again.
        unsafe {
            if close(self.ep.cast()) {
                ManuallyDrop::drop(&mut self.memory);
            }
            close(self.cq.cast());
            close(self.eq.cast());
        }
    }
}

/// What it means that an operation gives this.
fn started(call: &'static str, result: isize) -> Result<(), Refused> {
    match -result as i32 {
        0 => Ok(()),
        code if code == sys::FI_EAGAIN as i32 => Err(Refused::Busy),
        code => Err(Refused::Failed(OfiError { call, code })),
    }
}

/// A queue of events, with a descriptor.
pub(super) fn open_events(network: *mut sys::fid_fabric) -> Result<*mut sys::fid_eq, OfiError> {
    let mut eq = ptr::null_mut();
    // SAFETY: plain data; zero asks for defaults.
    let mut attributes: sys::fi_eq_attr = unsafe { std::mem::zeroed() };
    attributes.wait_obj = sys::FI_WAIT_FD;
    // SAFETY: network and attributes are alive.
    check("fi_eq_open", unsafe { sys::fi_eq_open(network, &mut attributes, &mut eq, ptr::null_mut()) })?;
    Ok(eq)
}

/// The next event of a queue with the info that it brings.
pub(super) fn next_event(
    eq: *mut sys::fid_eq,
    functions: &'static sys::Functions,
) -> Result<Option<(u32, Option<Info>)>, OfiError> {
    let mut room = [0u64; EVENT_BYTES / 8];
    let mut event = 0;
    // SAFETY: the queue is open, and there is room for as much.
    let read = unsafe { sys::fi_eq_read(eq, &mut event, room.as_mut_ptr().cast(), EVENT_BYTES, 0) };
    if read >= size_of::<sys::fi_eq_cm_entry>() as isize {
        if event != sys::FI_CONNREQ {
            return Ok(Some((event, None)));
        }
        // SAFETY: events of connections begin with such an entry, which is in aligned memory. Its info is
        // given away.
        let info = unsafe { Info::owned(functions, (*room.as_ptr().cast::<sys::fi_eq_cm_entry>()).info) };
        return Ok(Some((event, info)));
    }
    match -read as i32 {
        code if code == sys::FI_EAGAIN as i32 || read >= 0 => Ok(None),
        code if code == sys::FI_EAVAIL as i32 => {
            // SAFETY: plain data, in which no memory is offered for more.
            let mut entry: sys::fi_eq_err_entry = unsafe { std::mem::zeroed() };
            // SAFETY: the queue is open.
            match unsafe { sys::fi_eq_readerr(eq, &mut entry, 0) } {
                ..0 => Ok(None),
                _ => Err(OfiError { call: "the connection", code: entry.err }),
            }
        }
        code => Err(OfiError { call: "fi_eq_read", code }),
    }
}

/// A descriptor of one's own for what a queue sleeps on.
///
/// # Safety
/// The queue is open and was asked to have one.
pub(super) unsafe fn descriptor(queue: *mut sys::fid) -> Result<OwnedFd, OfiError> {
    let mut fd: RawFd = -1;
    // SAFETY: as the caller says; it writes a descriptor's number.
    let result = unsafe { sys::fi_control(queue, sys::FI_GETWAIT as i32, (&raw mut fd).cast()) };
    check("fi_control", result)?;
    if fd < 0 {
        return Err(OfiError { call: "fi_control", code: libc::EBADF });
    }
    // SAFETY: the queue's descriptor is open as long as the queue.
    let copied = rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3);
    copied.map_err(|errno| OfiError { call: "dup", code: errno.raw_os_error() })
}
