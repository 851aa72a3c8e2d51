//! The queues, and what became of every operation on them.

use io_uring::squeue::EntryMarker;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use slab::Slab;
use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::Duration;

use super::file::WRITEV_FIXED;
use crate::arena;
use crate::executor::Unpark;

/// Completions of the eventfd read, of cancellations, and of the wait for another ring; no slot ever has
/// these keys.
const KEY_WAKE: u64 = u64::MAX;
const KEY_IGNORED: u64 = u64::MAX - 1;
const KEY_SIBLING: u64 = u64::MAX - 2;
/// Keeps a slot's generation away from the keys above.
const GENERATION_MASK: u64 = 0x7FFF_FFFF;
/// Completion entries per submission entry: operations outlive their submission, and an
/// overflow costs a system call.
const COMPLETIONS_PER_ENTRY: u32 = 4;
/// Places for registered files: the targets of one node.
const FILES_MAX: u32 = 64;
/// Queued entries that are submitted without waiting for the turn's end. A device that gets all
/// its work once per turn completes it as one lot too and idles meanwhile: 4 KiB reads at depth
/// 32 from a virtio disk are a fifth slower submitted by 32 than by 4, and by 1 or 2 cost a third
/// more processor time.
pub(super) const SUBMIT_AT: usize = 4;
/// The same for reads that the kernel gives to a thread of its own: each lot wakes that thread, and
/// the rate is a tenth lower by 4 than by 16 or more.
pub(super) const SUBMIT_AT_BY_WORKER: usize = 32;
/// What is under a file, as far as it changes how the kernel is best asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Medium {
    /// Operations wait for a device, here or elsewhere.
    Device,
    /// Operations are copies (tmpfs), which the kernel gives to a thread all the same.
    Memory,
}

/// The files a ring has, and how many threads the kernel may have for what waits on them.
#[derive(Default)]
struct Files {
    on_devices: usize,
    in_memory: usize,
    /// The kernel's own bound of threads, once it was replaced.
    usual_workers: Option<u32>,
}

impl Files {
    fn count(&mut self, medium: Medium) -> &mut usize {
        match medium {
            Medium::Device => &mut self.on_devices,
            Medium::Memory => &mut self.in_memory,
        }
    }
}

/// How long a ring that closes waits before it asks again for what is left to be cancelled.
const CLOSE_RETRY: Duration = Duration::from_millis(100);

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error(
        "io_uring is not allowed here ({0}): allow io_uring_setup in the container's seccomp profile and set \
         the sysctl kernel.io_uring_disabled to 0"
    )]
    NotAllowed(io::Error),
    #[error("the kernel has no io_uring ({0}): Linux 5.11 or later is needed")]
    Missing(io::Error),
    #[error("setting up io_uring failed: {0}")]
    Setup(io::Error),
    #[error("the kernel's io_uring has no timed wait: Linux 5.11 or later is needed")]
    NoTimedWait,
}

/// Something did.
pub(super) struct Completed;

/// Names one operation; the generation keeps a reused slot's completions apart.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    fn new(index: usize, generation: u64) -> Key {
        Key(((generation & GENERATION_MASK) << 32) | index as u64)
    }

    fn index(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }
}

enum Progress {
    /// The kernel has it, and a future waits for it.
    Waiting(Option<Waker>),
    /// The kernel has it, and nobody waits; what it works on is kept here.
    Orphaned(Box<dyn Any>),
    /// Completed and not fetched by its future yet.
    Done(i32),
}

struct Slot {
    key: Key,
    progress: Progress,
    /// A result is a new file descriptor: closed if nobody takes it.
    opens_fd: bool,
}

/// What reaping brought out; handled once no borrow is held.
#[derive(Default)]
pub(super) struct Harvest {
    pub wakers: Vec<Waker>,
    pub released: Vec<Box<dyn Any>>,
}

/// Wakes a parked driver by its eventfd, at most once until the driver has seen it.
pub(super) struct Wakeup {
    event: OwnedFd,
    notified: AtomicBool,
}

impl Unpark for Wakeup {
    fn unpark(&self) {
        if self.notified.swap(true, Ordering::AcqRel) {
            return;
        }
        // The counter is far from full, since every write is read before the next.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// How large a ring's entries are: all that its kinds of operations need.
pub trait Layout: 'static {
    type Submission: squeue::EntryMarker;
    type Completion: cqueue::EntryMarker;
    /// Whether an entry has to stay as it is until its operation has completed. Kernels from 6.10 on, until
    /// they were mended (6.14; "io_uring/uring_cmd: switch sqe to async_data on EAGAIN"), read a device's
    /// command anew from the submission queue when they give it to a thread, as they do where a command
    /// would have to wait: another command may stand there by then.
    const ENTRIES_STAY: bool;
}

/// Entries for files and sockets.
pub enum Plain {}

impl Layout for Plain {
    type Submission = squeue::Entry;
    type Completion = cqueue::Entry;
    const ENTRIES_STAY: bool = false;
}

/// Entries with room for a device's own commands (IORING_SETUP_SQE128 and IORING_SETUP_CQE32).
pub enum Wide {}

impl Layout for Wide {
    type Submission = squeue::Entry128;
    type Completion = cqueue::Entry32;
    const ENTRIES_STAY: bool = true;
}

/// What the ring has registered with the kernel, beyond files.
#[derive(Clone, Copy, Default)]
pub(super) struct Fixed {
    /// The arena.
    pub buffers: bool,
    /// Whether the kernel writes several parts of it at once.
    pub vectors: bool,
}

pub(super) struct Core<L: Layout = Plain> {
    uring: IoUring<L::Submission, L::Completion>,
    pub fixed: Fixed,
    files: Files,
    /// Free places in the table of registered files; `None` until the first file.
    free_files: Option<Vec<u32>>,
    slots: Slab<Slot>,
    next_generation: u64,
    /// Entries the full submission queue did not take, in order.
    backlog: VecDeque<L::Submission>,
    /// Where entries stay: what was put last into each place of the submission queue, and how many were.
    places: Vec<Key>,
    pushed: usize,
    wakeup: Arc<Wakeup>,
    /// Where the read of the eventfd lands.
    wake_count: Box<[u8; 8]>,
    wake_armed: bool,
    /// Counts up when something completes, for the ring that sleeps for this one.
    signal: Option<Rc<OwnedFd>>,
    /// The signal of another ring is waited for.
    sibling_armed: bool,
    closing: bool,
    /// io_uring_enter.
    #[cfg(test)]
    pub calls: u64,
}

/// Errors after which waiting or submitting is simply tried again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// Whether completions are announced by the kernel, to who waits in this ring or in another, or looked for
/// by us (IORING_SETUP_IOPOLL): a ring is of one kind, and a polled one takes reads and writes of files, and
/// devices' commands, only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Completions {
    Announced,
    Signalled,
    Polled,
}

fn setup<L: Layout>(entries: u32, kind: Completions) -> io::Result<IoUring<L::Submission, L::Completion>> {
    let builder = || {
        let mut builder = IoUring::<L::Submission, L::Completion>::builder();
        builder.setup_clamp().setup_cqsize(entries * COMPLETIONS_PER_ENTRY);
        if kind == Completions::Polled {
            builder.setup_iopoll();
        }
        builder
    };
    // Linux 6.1: completions are worked off only when we ask, never by interrupting a task.
    let mut deferred = builder();
    deferred.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    match deferred.setup_single_issuer().setup_defer_taskrun().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder().build(entries),
        other => other,
    }
}

/// An eventfd that counts the completions of a ring. Signalled for what is deferred too, which is why it is
/// not the ring's own descriptor that another ring waits for: that becomes readable only with an entry in
/// the completion queue, and of a ring whose completions are deferred its thread is to put them there.
fn register_signal<L: Layout>(uring: &IoUring<L::Submission, L::Completion>) -> Result<Rc<OwnedFd>, RingError> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let event = event.map_err(|errno| RingError::Setup(errno.into()))?;
    uring.submitter().register_eventfd(event.as_raw_fd()).map_err(RingError::Setup)?;
    Ok(Rc::new(event))
}

impl<L: Layout> Core<L> {
    pub fn new(entries: u32, kind: Completions) -> Result<Core<L>, RingError> {
        let uring = setup::<L>(entries.clamp(1, 1 << 15), kind).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => RingError::NotAllowed(error),
            Some(libc::ENOSYS) => RingError::Missing(error),
            _ => RingError::Setup(error),
        })?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(RingError::NoTimedWait);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| RingError::Setup(errno.into()))?;
        let wakeup = Arc::new(Wakeup { event, notified: AtomicBool::new(false) });
        let signal = if kind == Completions::Signalled { Some(register_signal::<L>(&uring)?) } else { None };
        let mut core = Core {
            uring,
            fixed: Fixed::default(),
            files: Files::default(),
            free_files: None,
            slots: Slab::new(),
            next_generation: 0,
            backlog: VecDeque::new(),
            places: Vec::new(),
            pushed: 0,
            wakeup,
            wake_count: Box::new([0; 8]),
            wake_armed: false,
            signal,
            sibling_armed: false,
            closing: false,
            #[cfg(test)]
            calls: 0,
        };
        // Nobody sleeps in the others, and a polled one could not read an eventfd.
        if kind == Completions::Announced {
            core.arm_wakeup();
        }
        Ok(core)
    }

    pub fn wakeup(&self) -> Arc<Wakeup> {
        self.wakeup.clone()
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len()
    }

    fn arm_wakeup(&mut self) {
        self.wake_armed = true;
        let event = types::Fd(self.wakeup.event.as_raw_fd());
        let entry = opcode::Read::new(event, self.wake_count.as_mut_ptr(), 8).build();
        // SAFETY: the box is freed only with the core, after this read completed.
        unsafe { self.push(entry.user_data(KEY_WAKE).into(), SUBMIT_AT) };
    }

    /// What another ring is to wait for before it sleeps while something is under way here, and whether
    /// anything completed meanwhile. Looked at after the signal was taken back: what completes later sets it
    /// again.
    pub fn prepare_sleep(&mut self, harvest: &mut Harvest) -> Result<Option<Rc<OwnedFd>>, Completed> {
        if self.slots.is_empty() && self.backlog.is_empty() && self.uring.submission().is_empty() {
            return Ok(None);
        }
        if let Some(signal) = &self.signal {
            // The count, or EAGAIN.
            let _ = rustix::io::read(&**signal, &mut [0; 8]);
        }
        if self.turn(harvest) { Err(Completed) } else { Ok(self.signal.clone()) }
    }

    /// Wakes who waits in this ring when something completes in another.
    pub fn await_sibling(&mut self, signal: &OwnedFd) {
        if self.sibling_armed {
            return;
        }
        self.sibling_armed = true;
        let entry = opcode::PollAdd::new(types::Fd(signal.as_raw_fd()), libc::POLLIN as u32).build();
        // SAFETY: refers to no memory.
        unsafe { self.push(entry.user_data(KEY_SIBLING).into(), SUBMIT_AT) };
    }

    /// Takes a file up. Gives its place in the table of registered files, if there is one.
    pub fn register_file(&mut self, file: &OwnedFd, medium: Medium) -> Option<u32> {
        *self.files.count(medium) += 1;
        self.bound_workers();
        if self.free_files.is_none() {
            self.free_files = Some(self.register_tables());
        }
        let free = self.free_files.as_mut()?;
        let slot = free.pop()?;
        match self.uring.submitter().register_files_update(slot, &[file.as_raw_fd()]) {
            Ok(_) => Some(slot),
            Err(error) => {
                tracing::debug!(%error, "a file was not registered with io_uring");
                free.push(slot);
                None
            }
        }
    }

    pub fn unregister_file(&mut self, slot: Option<u32>, medium: Medium) {
        *self.files.count(medium) -= 1;
        self.bound_workers();
        // A place that can't be emptied is not used again.
        if let Some(slot) = slot
            && self.uring.submitter().register_files_update(slot, &[-1]).is_ok()
        {
            self.free_files.get_or_insert_default().push(slot);
        }
    }

    /// A thread of the kernel that copies is never idle while there is work, so more of them than
    /// there are processors beside ours only take turns with us: with two processors and two such
    /// threads 4 KiB reads from tmpfs are an eighth slower than with one. Threads that wait for
    /// devices are left to the kernel, which adds one for each that waits.
    fn bound_workers(&mut self) {
        let only_in_memory = self.files.on_devices == 0 && self.files.in_memory > 0;
        let bound = match (only_in_memory, self.files.usual_workers) {
            (true, None) => {
                let processors = std::thread::available_parallelism().map_or(1, usize::from);
                u32::try_from(processors - 1).unwrap_or(u32::MAX).max(1)
            }
            // The bound is the thread's, which may have other rings after this one.
            (false, Some(usual)) => usual,
            _ => return,
        };
        // The second bound is that of sockets; 0 leaves it as it is.
        let mut bounds = [bound, 0];
        match self.uring.submitter().register_iowq_max_workers(&mut bounds) {
            Ok(()) if self.files.usual_workers.is_none() => self.files.usual_workers = Some(bounds[0]),
            Ok(()) => self.files.usual_workers = None,
            Err(error) => tracing::debug!(%error, bound, "the kernel's threads for files were not bounded"),
        }
    }

    #[cfg(test)]
    pub fn read_worker_bounds(&mut self, bounds: &mut [u32; 2]) {
        self.uring.submitter().register_iowq_max_workers(bounds).unwrap();
    }

    /// Makes the table of files and registers the arena, once a ring has a file at all. What the
    /// kernel refuses is done without. Gives the free places of the table.
    fn register_tables(&mut self) -> Vec<u32> {
        let submitter = self.uring.submitter();
        if let Some((start, length)) = arena::establish() {
            let range = libc::iovec { iov_base: start.cast(), iov_len: length };
            // SAFETY: the arena is mapped for ever.
            match unsafe { submitter.register_buffers(&[range]) } {
                Ok(()) => self.fixed.buffers = true,
                Err(error) => tracing::info!(
                    %error,
                    bytes = length,
                    "io_uring did not register the I/O buffers, which costs some speed: raise the limit of locked memory"
                ),
            }
        }
        let mut probe = Probe::new();
        if submitter.register_probe(&mut probe).is_ok() {
            self.fixed.vectors = probe.is_supported(WRITEV_FIXED);
        }
        match submitter.register_files_sparse(FILES_MAX) {
            Ok(()) => (0..FILES_MAX).rev().collect(),
            Err(error) => {
                tracing::info!(%error, "io_uring has no table of files here (Linux 5.19 has)");
                Vec::new()
            }
        }
    }

    /// Queues an operation. It is submitted with others: when `lot` entries are queued, or the turn
    /// ends.
    ///
    /// # Safety
    /// What the entry points to must stay valid, unmoved and otherwise unused until the
    /// operation's completion was reaped: the caller holds it and hands it to [`Core::orphan`]
    /// if it gives up first.
    pub unsafe fn start(&mut self, mut entry: L::Submission, opens_fd: bool, lot: usize) -> Key {
        let slot = self.slots.vacant_entry();
        let key = Key::new(slot.key(), self.next_generation);
        self.next_generation += 1;
        slot.insert(Slot { key, progress: Progress::Waiting(None), opens_fd });
        entry.set_user_data(key.0);
        // SAFETY: passed on to our caller.
        unsafe { self.push(entry, lot) };
        key
    }

    /// # Safety
    /// As for [`Core::start`].
    unsafe fn push(&mut self, entry: L::Submission, lot: usize) {
        // SAFETY: passed on to our caller.
        if self.backlog.is_empty() && unsafe { self.place(&entry) } {
            if self.uring.submission().len() >= lot {
                // What fails is tried again at the driver's next turn.
                let _ = self.enter();
            }
            return;
        }
        self.backlog.push_back(entry);
        // A failed submission is tried again at the driver's next turn.
        let _ = self.submit();
    }

    /// Puts an entry into the submission queue. False if there is no place for it.
    ///
    /// # Safety
    /// As for [`Core::start`].
    unsafe fn place(&mut self, entry: &L::Submission) -> bool {
        let entries = self.uring.params().sq_entries() as usize;
        let place = self.pushed % entries;
        let stays = |key: &Key| {
            let slot = self.slots.get(key.index()).filter(|slot| slot.key == *key);
            slot.is_some_and(|slot| !matches!(slot.progress, Progress::Done(_)))
        };
        if self.places.get(place).is_some_and(stays) {
            return false;
        }
        // SAFETY: passed on to our caller.
        if unsafe { self.uring.submission().push(entry) }.is_err() {
            return false;
        }
        if L::ENTRIES_STAY {
            let key = Key(entry.get_user_data());
            match self.places.get_mut(place) {
                Some(last) => *last = key,
                None => self.places.push(key),
            }
            self.pushed += 1;
        }
        true
    }

    /// The result of a completed operation, or `None` after noting whom to wake.
    pub fn poll(&mut self, key: Key, waker: &Waker) -> Option<i32> {
        let slot = self.slots.get_mut(key.index()).filter(|slot| slot.key == key).expect("an operation has its slot");
        match &mut slot.progress {
            Progress::Done(result) => {
                let result = *result;
                self.slots.remove(key.index());
                Some(result)
            }
            Progress::Waiting(current) => {
                match current {
                    Some(current) => current.clone_from(waker),
                    None => *current = Some(waker.clone()),
                }
                None
            }
            Progress::Orphaned(_) => unreachable!("an orphaned operation has no future"),
        }
    }

    /// Takes over what a dropped operation works on and cancels it. Gives back what is to be
    /// dropped once no borrow is held.
    pub fn orphan(&mut self, key: Key, kept: Box<dyn Any>) -> Harvest {
        let mut harvest = Harvest::default();
        let slot = self.slots.get_mut(key.index()).filter(|slot| slot.key == key).expect("an operation has its slot");
        if let Progress::Done(result) = slot.progress {
            let slot = self.slots.remove(key.index());
            close_unclaimed(&slot, result);
            harvest.released.push(kept);
            return harvest;
        }
        slot.progress = Progress::Orphaned(kept);
        self.cancel(key.0);
        harvest
    }

    fn cancel(&mut self, key: u64) {
        let entry = opcode::AsyncCancel::new(key).build().user_data(KEY_IGNORED);
        // SAFETY: a cancellation refers to no memory.
        unsafe { self.push(entry.into(), SUBMIT_AT) };
    }

    /// Whether the kernel has anything to be told, or anything for us that takes a call: on a
    /// polled ring whatever is under way.
    fn wants_submit(&mut self) -> bool {
        if self.uring.params().is_setup_iopoll() && !self.slots.is_empty() {
            return true;
        }
        let queue = self.uring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow() || !self.backlog.is_empty()
    }

    fn enter(&mut self) -> io::Result<usize> {
        self.count_call();
        self.uring.submit()
    }

    fn count_call(&mut self) {
        #[cfg(test)]
        {
            self.calls += 1;
        }
    }

    /// Hands the queued entries to the kernel, without waiting.
    fn submit(&mut self) -> io::Result<()> {
        loop {
            self.enter()?;
            if !self.refill() {
                return Ok(());
            }
        }
    }

    /// Whether any entry that waited for a place has one.
    fn refill(&mut self) -> bool {
        let mut any = false;
        while let Some(entry) = self.backlog.pop_front() {
            // SAFETY: whoever pushed the entry vouched for it until its completion.
            if !unsafe { self.place(&entry) } {
                self.backlog.push_front(entry);
                break;
            }
            any = true;
        }
        any
    }

    /// Submits if there is anything to submit, and reaps. True when anything completed.
    pub fn turn(&mut self, harvest: &mut Harvest) -> bool {
        if self.wants_submit() {
            match self.submit() {
                Ok(()) => {}
                Err(error) if is_transient(&error) => {}
                Err(error) => panic!("io_uring_enter refused our submissions: {error}"),
            }
        }
        self.reap(harvest)
    }

    /// Submits and sleeps until something completes or the time is over, then reaps: one call.
    pub fn wait(&mut self, timeout: Option<Duration>, harvest: &mut Harvest) -> bool {
        // More than the queue holds takes a call of its own; so does nothing to wait for.
        if (!self.backlog.is_empty() && self.turn(harvest)) || self.reap(harvest) {
            return true;
        }
        self.count_call();
        let waited = match timeout {
            None => self.uring.submit_and_wait(1),
            Some(timeout) => {
                let until = types::Timespec::from(timeout);
                self.uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&until))
            }
        };
        match waited {
            Ok(_) => {}
            Err(error) if is_transient(&error) => {}
            Err(error) => panic!("io_uring_enter refused to wait: {error}"),
        }
        self.reap(harvest)
    }

    fn reap(&mut self, harvest: &mut Harvest) -> bool {
        let mut rearm = false;
        let mut any = false;
        for completion in self.uring.completion() {
            any = true;
            let completion: cqueue::Entry = completion.into();
            match completion.user_data() {
                KEY_IGNORED => {}
                KEY_SIBLING => self.sibling_armed = false,
                KEY_WAKE => {
                    self.wake_armed = false;
                    rearm = !self.closing;
                    // After this the executor looks at its remote queue; a wake-up whose task
                    // was queued later writes the eventfd again.
                    self.wakeup.notified.swap(false, Ordering::AcqRel);
                }
                key => complete(&mut self.slots, Key(key), completion.result(), harvest),
            }
        }
        if rearm {
            self.arm_wakeup();
        }
        any
    }

    /// Cancels everything and waits for it. False if the kernel would not say.
    fn close(&mut self) -> bool {
        self.closing = true;
        if self.wake_armed {
            self.cancel(KEY_WAKE);
        }
        if self.sibling_armed {
            self.cancel(KEY_SIBLING);
        }
        let mut harvest = Harvest::default();
        while self.wake_armed || self.sibling_armed || !self.slots.is_empty() {
            let until = types::Timespec::from(CLOSE_RETRY);
            if let Err(error) = self.submit()
                && !is_transient(&error)
            {
                return false;
            }
            let args = types::SubmitArgs::new().timespec(&until);
            match self.uring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => self.cancel_all(),
                Err(error) if is_transient(&error) => {}
                Err(_) => return false,
            }
            self.reap(&mut harvest);
        }
        true
    }

    fn cancel_all(&mut self) {
        let keys: Vec<u64> = self.slots.iter().map(|(_, slot)| slot.key.0).chain([KEY_WAKE, KEY_SIBLING]).collect();
        for key in keys {
            self.cancel(key);
        }
    }
}

fn close_unclaimed(slot: &Slot, result: i32) {
    if slot.opens_fd && result >= 0 {
        // SAFETY: the kernel has just opened it for this operation, and nobody else was told.
        drop(unsafe { OwnedFd::from_raw_fd(result) });
    }
}

fn complete(slots: &mut Slab<Slot>, key: Key, result: i32, harvest: &mut Harvest) {
    let Some(slot) = slots.get_mut(key.index()).filter(|slot| slot.key == key) else {
        debug_assert!(false, "a completion without an operation");
        return;
    };
    match std::mem::replace(&mut slot.progress, Progress::Done(result)) {
        Progress::Waiting(waker) => harvest.wakers.extend(waker),
        Progress::Orphaned(kept) => {
            let slot = slots.remove(key.index());
            close_unclaimed(&slot, result);
            harvest.released.push(kept);
        }
        Progress::Done(_) => debug_assert!(false, "an operation completed twice"),
    }
}

impl<L: Layout> Drop for Core<L> {
    fn drop(&mut self) {
        // The kernel takes a ring apart later; files are to be closed, and their locks gone, now.
        let closed = self.close();
        self.files.in_memory = 0;
        self.bound_workers();
        if self.free_files.is_some() {
            let _ = self.uring.submitter().unregister_files();
        }
        if !closed {
            // The kernel may still write there: memory lost is better than memory overwritten.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::replace(&mut self.wake_count, Box::new([0; 8])));
        }
    }
}

/// A completion's result as the call it stands for would have returned it.
pub(super) fn outcome(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result))
}
