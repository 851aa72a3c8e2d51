use super::core::SUBMIT_AT_BY_WORKER;
use super::*;
use crate::buffer::DmaBuf;
use crate::clock::KernelClock;
use crate::executor::Driver;
use crate::{Executor, Handle};
use cfs_wire::limits::PAGE;
use futures_util::future::join_all;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::ReadWriteFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::future::Future;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

/// Runs `body` on an executor of its own that sleeps in a ring of `entries`.
fn run<T: 'static, F: Future<Output = T> + 'static>(entries: u32, body: impl FnOnce(Rc<Ring>, Handle) -> F) -> T {
    let ring = Ring::new(entries).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let body = body(ring.clone(), handle.clone());
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, body).unwrap()
}

fn file(ring: &Rc<Ring>) -> Rc<RingFile> {
    ring.file(memfd_create("ring-test", MemfdFlags::CLOEXEC).unwrap())
}

fn sockets() -> (Rc<OwnedFd>, Rc<OwnedFd>) {
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    (Rc::new(one), Rc::new(other))
}

/// Waits until every cancelled operation is through; the test's own time limit is the bound.
async fn settle(ring: &Ring, handle: &Handle) {
    while ring.in_flight() > 0 {
        handle.yield_now().await;
    }
}

#[test]
fn parts_written_at_an_offset_read_back() {
    run(8, async |ring, _| {
        let file = file(&ring);
        let parts = vec![Bytes::from_static(b"one "), Bytes::new(), Bytes::from_static(b"two")];
        let (written, parts) = ring.write_at(&file, parts, 5, ReadWriteFlags::DSYNC).await;
        assert_eq!((written, parts.len()), (Ok(7), 3));
        assert_eq!(ring.sync(&file, true).await, Ok(0));
        let (read, buffer) = ring.read_at(&file, DmaBuf::zeroed(100), 0).await;
        assert_eq!(read, Ok(12));
        assert_eq!(&buffer[..13], b"\0\0\0\0\0one two\0");
        let (read, buffer) = ring.read_range_at(&file, buffer, 50..53, 5).await;
        assert_eq!((read, &buffer[49..54]), (Ok(3), &b"\0one\0"[..]));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(ring.fallocate(&file, hole, 5, 3).await, Ok(0));
        let (read, buffer) = ring.read_at(&file, DmaBuf::zeroed(12), 0).await;
        assert_eq!((read, &buffer[..]), (Ok(12), &b"\0\0\0\0\0\0\0\0 two"[..]));
        assert_eq!(ring.in_flight(), 0);
    });
}

/// A file beside the source: not in memory, or else reads into registered memory go untested.
fn file_on_disk(ring: &Rc<Ring>) -> Rc<RingFile> {
    let path = format!("{}/ring-test.{}", env!("CARGO_MANIFEST_DIR"), std::process::id());
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = open(&path, flags, Mode::RUSR | Mode::WUSR).unwrap();
    std::fs::remove_file(path).unwrap();
    ring.file(file)
}

#[test]
fn registered_and_other_memory_and_files_carry_the_same_bytes() {
    carries_the_same_bytes(file);
    carries_the_same_bytes(file_on_disk);
}

/// Arena memory and heap memory, whole and in part, alone and together.
fn carries_the_same_bytes(file: fn(&Rc<Ring>) -> Rc<RingFile>) {
    run(8, async move |ring, _| {
        let file = file(&ring);
        assert_eq!((file.is_registered(), ring.has_registered_buffers()), (true, true));
        let bytes: Vec<u8> = (0..3 * 4096u32).map(|index| (index / 7) as u8).collect();
        let fixed = DmaBuf::copy_of(&bytes).freeze();
        assert!(crate::arena::contains(&fixed));
        let plain = Bytes::from(bytes.clone());
        assert!(!crate::arena::contains(&plain));
        let none = ReadWriteFlags::empty();
        for parts in [
            vec![fixed.clone()],
            vec![fixed.slice(..5), fixed.slice(5..4097), fixed.slice(4097..)],
            vec![fixed.slice(..5), plain.slice(5..4097), fixed.slice(4097..)],
            vec![plain.clone()],
        ] {
            let blank = vec![Bytes::from(vec![0; bytes.len()])];
            assert_eq!(ring.write_at(&file, blank, 0, none).await.0, Ok(bytes.len()));
            let (written, back) = ring.write_at(&file, parts, 0, ReadWriteFlags::DSYNC).await;
            assert!(written == Ok(bytes.len()) && back.concat() == bytes, "{written:?}");
            let (read, buffer) = ring.read_range_at(&file, DmaBuf::zeroed(5 * 4096), 100..100 + bytes.len(), 0).await;
            assert!(read == Ok(bytes.len()) && buffer[100..100 + bytes.len()] == bytes, "{read:?}");
            // Longer than any block of the arena.
            let (read, buffer) = ring.read_at(&file, DmaBuf::zeroed(5 << 20), 4096).await;
            assert!(read == Ok(8192) && buffer[..8192] == bytes[4096..], "{read:?}");
        }
    });
}

#[test]
fn the_kernels_threads_are_bounded_while_all_files_are_in_memory() {
    run(256, async |ring, _| {
        let bound = || {
            let mut bounds = [0, 0];
            ring.core.borrow_mut().read_worker_bounds(&mut bounds);
            bounds
        };
        let usual = bound();
        let processors = std::thread::available_parallelism().unwrap().get() as u32;
        let bounded = [(processors - 1).max(1), usual[1]];
        if bounded == usual {
            eprintln!("skipped: the kernel's own bound is that of {processors} processors");
            return;
        }
        let one = file(&ring);
        let other = file(&ring);
        assert_eq!(bound(), bounded);
        // A device's node lies in memory too.
        let device = ring.file(open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap());
        assert_eq!(bound(), usual);
        drop(one);
        assert_eq!(bound(), usual);
        drop(device);
        assert_eq!(bound(), bounded);
        drop(other);
        assert_eq!(bound(), usual);
        let _device = ring.file(open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap());
        assert_eq!(bound(), usual);
    });
}

#[test]
fn a_files_place_in_the_table_is_used_again_and_more_files_than_places_work() {
    run(8, async |ring, _| {
        for _ in 0..200 {
            assert!(file(&ring).is_registered());
        }
        let files: Vec<_> = (0..70).map(|_| file(&ring)).collect();
        assert_eq!(files.iter().filter(|file| file.is_registered()).count(), 64);
        for (index, file) in files.iter().enumerate() {
            let part = Bytes::copy_from_slice(&[index as u8; 9]);
            assert_eq!(ring.write_at(file, vec![part], 0, ReadWriteFlags::empty()).await.0, Ok(9));
        }
        for (index, file) in files.iter().enumerate() {
            let (read, buffer) = ring.read_at(file, DmaBuf::zeroed(9), 0).await;
            assert_eq!((read, &buffer[..]), (Ok(9), &[index as u8; 9][..]));
        }
    });
}

#[test]
fn an_error_names_its_errno_and_gives_the_memory_back() {
    run(8, async |ring, _| {
        let (one, _other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let one = ring.file(one);
        let (written, parts) = ring.write_at(&one, vec![Bytes::from_static(b"x")], 77, ReadWriteFlags::empty()).await;
        assert_eq!((written, parts), (Err(Errno::SPIPE), vec![Bytes::from_static(b"x")]));
        let (read, buffer) = ring.read_at(&one, DmaBuf::zeroed(9), 77).await;
        assert_eq!((read, buffer.len()), (Err(Errno::SPIPE), 9));
    });
}

#[test]
fn many_more_operations_than_entries_all_complete() {
    const COUNT: u64 = 5000;
    run(4, async |ring, _| {
        let file = file(&ring);
        let writes = (0..COUNT).map(|index| {
            let part = Bytes::copy_from_slice(&index.to_le_bytes());
            ring.write_at(&file, vec![part], index * 8, ReadWriteFlags::empty())
        });
        for (written, _) in join_all(writes).await {
            assert_eq!(written, Ok(8));
        }
        let (read, buffer) = ring.read_at(&file, DmaBuf::zeroed(COUNT as usize * 8), 0).await;
        assert_eq!(read, Ok(COUNT as usize * 8));
        for (index, word) in buffer.chunks(8).enumerate() {
            assert_eq!(word, (index as u64).to_le_bytes());
        }
    });
}

#[test]
fn operations_started_at_once_are_submitted_several_to_a_call() {
    const COUNT: u64 = 64;
    run(256, async |ring, _| {
        let file = file(&ring);
        let calls = || ring.core.borrow().calls;
        let before = calls();
        let write =
            |index| ring.write_at(&file, vec![Bytes::from_static(b"8 bytes.")], index * 8, ReadWriteFlags::empty());
        assert!(join_all((0..COUNT).map(write)).await.iter().all(|(written, _)| *written == Ok(8)));
        let together = calls() - before;
        assert!(together <= COUNT / 2, "{together} calls for {COUNT} operations");
        // The twin: one after the other, each takes a call.
        let before = calls();
        for index in 0..COUNT {
            assert_eq!(write(index).await.0, Ok(8));
        }
        assert!(calls() - before >= COUNT, "calls are not counted");
    });
}

#[test]
fn reads_that_a_thread_does_anyway_are_handed_over_in_larger_lots() {
    const COUNT: usize = 4 * SUBMIT_AT_BY_WORKER;
    run(256, async |ring, _| {
        let file = file(&ring);
        let page = Bytes::from(vec![7; PAGE]);
        assert_eq!(ring.write_at(&file, vec![page.clone()], 0, ReadWriteFlags::empty()).await.0, Ok(PAGE));
        // Shared memory has no reads that don't wait, on kernels that are known.
        let lot = file.lot();
        let before = ring.core.borrow().calls;
        let reads = (0..COUNT).map(|_| ring.read_at(&file, DmaBuf::zeroed(PAGE), 0)).collect::<Vec<_>>();
        let calls = ring.core.borrow().calls - before;
        assert!(calls.abs_diff((COUNT / lot) as u64) <= 1, "{calls} calls for {COUNT} reads in lots of {lot}");
        for (read, buffer) in join_all(reads).await {
            assert_eq!((read, &buffer[..]), (Ok(PAGE), &page[..]));
        }
    });
}

#[test]
fn a_dropped_receive_is_cancelled_and_takes_nothing_from_the_stream() {
    run(8, async |ring, handle| {
        let (one, other) = sockets();
        let dropped = ring.recv(&one, DmaBuf::zeroed(64));
        assert!(handle.timeout(Duration::from_millis(5), dropped).await.is_none());
        // Its memory is the ring's until the cancellation is through.
        assert_eq!(ring.in_flight(), 1);
        settle(&ring, &handle).await;
        assert_eq!(Rc::strong_count(&one), 1);
        let (sent, _) = ring.send(&other, vec![Bytes::from_static(b"kept")]).await;
        assert_eq!(sent, Ok(4));
        let (received, buffer) = ring.recv(&one, DmaBuf::zeroed(64)).await;
        assert_eq!((received, &buffer[..4]), (Ok(4), &b"kept"[..]));
    });
}

#[test]
fn memory_of_a_dropped_operation_is_nobody_elses_while_the_kernel_may_write_to_it() {
    run(8, async |ring, handle| {
        let (one, other) = sockets();
        for round in 0..200 {
            let doomed = ring.recv(&one, DmaBuf::zeroed(4096));
            handle.yield_now().await;
            drop(doomed);
            // Of the same pool and size: the memory just dropped, had it been given back.
            let mut canary = DmaBuf::uninitialised(4096);
            canary.fill(0xAA);
            rustix::io::write(&*other, &[0x55; 100]).unwrap();
            settle(&ring, &handle).await;
            assert!(canary.iter().all(|byte| *byte == 0xAA), "round {round}");
        }
    });
}

#[test]
fn operations_dropped_before_their_submission_leave_nothing_behind() {
    run(4, async |ring, handle| {
        let (one, _other) = sockets();
        let doomed: Vec<_> = (0..100).map(|_| ring.recv(&one, DmaBuf::zeroed(64))).collect();
        drop(doomed);
        settle(&ring, &handle).await;
        assert_eq!(Rc::strong_count(&one), 1);
    });
}

#[test]
fn a_completed_operation_dropped_unread_leaves_nothing_behind() {
    run(8, async |ring, _| {
        let (one, other) = sockets();
        rustix::io::write(&*other, b"here already").unwrap();
        let received = ring.recv(&one, DmaBuf::zeroed(5));
        // Submitted after it and answered: so is the receive.
        ring.poll_readable(&one).await.unwrap();
        assert_eq!(ring.in_flight(), 1);
        drop(received);
        assert_eq!((ring.in_flight(), Rc::strong_count(&one)), (0, 1));
        let (rest, buffer) = ring.recv(&one, DmaBuf::zeroed(64)).await;
        assert_eq!((rest, &buffer[..7]), (Ok(7), &b"already"[..]));
    });
}

#[test]
fn a_ring_dropped_with_operations_in_flight_waits_for_them_and_frees_their_memory() {
    let (one, other) = sockets();
    let ring = Ring::new(8).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    for _ in 0..3 {
        let (ring, one) = (ring.clone(), one.clone());
        handle.spawn(async move { ring.recv(&one, DmaBuf::zeroed(1 << 20)).await });
    }
    let sleeper = handle.clone();
    let main = async move { sleeper.sleep(Duration::from_millis(2)).await };
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, main).unwrap();
    drop(handle);
    drop(executor);
    assert_eq!((ring.in_flight(), Rc::strong_count(&ring)), (3, 1));
    drop(ring);
    assert_eq!(Rc::strong_count(&one), 1);
    rustix::io::write(&*other, b"nobody reads").unwrap();
    let mut buffer = [0; 32];
    assert_eq!(rustix::io::read(&*one, &mut buffer), Ok(12));
}

#[test]
fn readiness_ends_a_poll_and_not_before() {
    run(8, async |ring, handle| {
        let (one, other) = sockets();
        let early = handle.timeout(Duration::from_millis(5), ring.poll_readable(&one)).await;
        assert_eq!(early, None);
        rustix::io::write(&*other, b"x").unwrap();
        assert_eq!(ring.poll_readable(&one).await.unwrap() & libc::POLLIN as usize, libc::POLLIN as usize);
    });
}

#[test]
fn a_connection_carries_more_than_the_socket_buffers_hold() {
    const PARTS: usize = 64;
    run(32, async |ring, handle| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = Rc::new(OwnedFd::from(listener));
        let server_ring = ring.clone();
        let server = handle.spawn(async move {
            let connection = Rc::new(server_ring.accept(&listener).await.unwrap());
            let whole = DmaBuf::zeroed(PARTS << 16);
            let length = whole.len();
            let (received, whole) = server_ring.recv_range(&connection, whole, 1..length, true).await;
            assert_eq!(received, Ok(length - 1));
            // The stream's last byte, then its end.
            let (last, _) = server_ring.recv(&connection, DmaBuf::zeroed(9)).await;
            let (end, _) = server_ring.recv(&connection, DmaBuf::zeroed(9)).await;
            (whole, last, end)
        });
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = Rc::new(socket.unwrap());
        ring.connect(&socket, address).await.unwrap();
        let parts: Vec<Bytes> = (0..PARTS).map(|index| Bytes::from(vec![index as u8; 1 << 16])).collect();
        let (sent, parts) = ring.send(&socket, parts).await;
        assert_eq!(sent, Ok(PARTS << 16));
        drop(socket);
        let (whole, last, end) = server.await.unwrap();
        assert!(whole[1..] == parts.concat()[..whole.len() - 1]);
        assert_eq!((last, end), (Ok(1), Ok(0)));
    });
}

#[test]
fn a_refused_connection_and_a_closed_peer_are_errors_and_no_signal() {
    run(8, async |ring, _| {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = Rc::new(socket.unwrap());
        assert_eq!(ring.connect(&socket, address).await, Err(Errno::CONNREFUSED));
        let (one, other) = sockets();
        drop(other);
        let (sent, _) = ring.send(&one, vec![Bytes::from_static(b"lost")]).await;
        assert_eq!(sent, Err(Errno::PIPE));
    });
}

#[test]
fn an_accepted_connection_nobody_takes_is_closed() {
    run(8, async |ring, handle| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = Rc::new(OwnedFd::from(listener));
        let accepted = ring.accept(&listener);
        let client = Rc::new(OwnedFd::from(TcpStream::connect(address).unwrap()));
        handle.sleep(Duration::from_millis(5)).await;
        drop(accepted);
        let end = handle.timeout(Duration::from_secs(5), ring.recv(&client, DmaBuf::zeroed(1))).await;
        assert_eq!(end.map(|(received, _)| received), Some(Ok(0)));
    });
}

/// Processor time of this thread.
fn busy() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_idle_executor_sleeps_in_the_kernel() {
    let (idle, elapsed) = run(8, async |_, handle| {
        let (before, start) = (busy(), handle.now());
        handle.sleep(Duration::from_millis(200)).await;
        (busy() - before, handle.now() - start)
    });
    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
    assert!(idle < Duration::from_millis(20), "{idle:?} of processor time while idle");
}

#[test]
#[allow(clippy::disallowed_methods, reason = "another thread is what this test is about")]
fn another_thread_wakes_a_parked_executor_each_time() {
    run(8, async |_, handle| {
        for round in 0..50u64 {
            let mailbox = Arc::new(AtomicBool::new(false));
            let delivered = mailbox.clone();
            let mut sender = None;
            let waited = std::future::poll_fn(move |context| {
                if delivered.load(Ordering::Acquire) {
                    return Poll::Ready(());
                }
                if sender.is_none() {
                    let (waker, mailbox) = (context.waker().clone(), delivered.clone());
                    sender = Some(std::thread::spawn(move || {
                        // Some before the executor parks, some after.
                        std::thread::sleep(Duration::from_micros(round * 10));
                        mailbox.store(true, Ordering::Release);
                        waker.wake();
                    }));
                }
                Poll::Pending
            });
            // Far longer than the test takes: only the wake-up can end the wait.
            assert_eq!(handle.timeout(Duration::from_secs(100), waited).await, Some(()));
            assert!(mailbox.load(Ordering::Acquire));
        }
    });
}

#[test]
#[allow(clippy::disallowed_methods, reason = "another thread completes what the reactor sleeps for")]
fn what_completes_on_the_ring_of_commands_wakes_who_sleeps_in_the_first() {
    run(8, async |ring, handle| {
        let commands = ring.commands().unwrap();
        assert!(Rc::ptr_eq(&commands, &ring.commands().unwrap()));
        for round in 0..200 {
            let (one, other) = sockets();
            let entry = opcode::PollAdd::new(raw(&one), libc::POLLIN as u32).build();
            // SAFETY: refers to no memory.
            let waiting = unsafe { Operation::start(&commands, entry.into(), Kept::new((), one.clone()), false) };
            let other = other.try_clone().unwrap();
            let sender = std::thread::spawn(move || {
                // Some before the executor parks, some after.
                std::thread::sleep(Duration::from_micros(round * 10));
                rustix::io::write(&other, b"x").unwrap();
            });
            // Far longer than the test takes: only the wake-up can end the wait.
            let waited = handle.timeout(Duration::from_secs(100), waiting).await;
            assert_eq!(waited.map(|(result, ())| result), Some(Ok(libc::POLLIN as usize)));
            sender.join().unwrap();
        }
        assert_eq!(commands.in_flight(), 0);
    });
}

#[test]
fn a_file_that_takes_no_commands_refuses_them_and_gives_the_memory_back() {
    run(8, async |ring, _| {
        for commands in [ring.commands().unwrap(), ring.polled_commands().unwrap()] {
            let file = commands.file(memfd_create("ring-test", MemfdFlags::CLOEXEC).unwrap());
            let command = NvmeCommand { opcode: 0x02, namespace: 1, dwords: [0; 6] };
            let mut buffer = DmaBuf::zeroed(PAGE);
            let data = NvmeData::Run { start: buffer.as_mut_ptr(), bytes: PAGE };
            // SAFETY: the buffer is kept, and no controller ever hears of it.
            let (refused, buffer) = unsafe { commands.nvme(&file, command, data, true, buffer) }.await;
            assert_eq!((refused, buffer.len()), (Err(Errno::OPNOTSUPP), PAGE));
        }
    });
}

#[test]
fn the_entry_of_a_command_that_is_under_way_is_not_overwritten() {
    run(8, async |ring, _| {
        let commands = ring.commands().unwrap();
        let (silent, its_peer) = sockets();
        let (ready, peer) = sockets();
        rustix::io::write(&*peer, b"x").unwrap();
        let poll = |fd: &Rc<OwnedFd>| {
            let entry = opcode::PollAdd::new(raw(fd), libc::POLLIN as u32).build();
            // SAFETY: refers to no memory.
            unsafe { Operation::start(&commands, entry.into(), Kept::new((), fd.clone()), false) }
        };
        let first = poll(&silent);
        for _ in 1..COMMAND_ENTRIES {
            assert_eq!(poll(&ready).await.0, Ok(libc::POLLIN as usize));
        }
        let mut next = poll(&ready);
        for _ in 0..100 {
            assert!(futures_util::poll!(&mut next).is_pending(), "the first one's place was taken");
            let _ = ring.driver().poll();
        }
        rustix::io::write(&*its_peer, b"x").unwrap();
        assert_eq!((first.await.0, next.await.0), (Ok(libc::POLLIN as usize), Ok(libc::POLLIN as usize)));
        for _ in 0..10 {
            assert_eq!(poll(&ready).await.0, Ok(libc::POLLIN as usize));
        }
    });
}
