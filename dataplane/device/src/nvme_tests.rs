use super::model::{Model, ModelOptions, PlacementOptions};
use super::spec::{NamespaceError, Status};
use super::*;
use crate::conformance::{self, pattern};
use cfs_reactor::Executor;
use cfs_reactor::clock::SimClock;
use futures_util::future::{join_all, join3};
use std::future::Future;
use std::time::Duration;

#[path = "nvme_placement_tests.rs"]
mod placement;

type Device = Rc<NvmeDevice<Rc<Model>>>;

/// A story with a device on a model, on virtual time.
fn run<T: 'static, F: Future<Output = T> + 'static>(
    options: ModelOptions,
    seed: u64,
    story: impl FnOnce(Device, Rc<Model>, Handle) -> F + 'static,
) -> T {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let main = {
        let handle = handle.clone();
        async move {
            let model = Model::new(options, seed);
            model.serve(&handle);
            let device = NvmeDevice::open(model.clone(), 1, &handle).await.expect("opens");
            story(device, model, handle.clone()).await
        }
    };
    executor.run_simulated(&handle, main).expect("no deadlock").expect("not cancelled")
}

async fn refusal(options: ModelOptions, namespace: u32, handle: &Handle) -> NvmeError {
    let model = Model::new(options, 1);
    model.serve(handle);
    NvmeDevice::open(model, namespace, handle).await.err().expect("is refused")
}

#[test]
fn the_driver_conforms_on_controllers_of_every_kind() {
    let usual = ModelOptions::default();
    let kinds = [
        usual.clone(),
        ModelOptions { block_shift: 9, blocks: 32_768, ..usual.clone() },
        ModelOptions { transfer_shift: 1, ..usual.clone() },
        ModelOptions { transfer_shift: 0, ..usual.clone() },
        ModelOptions { queue_entries_max: 2, ..usual.clone() },
        ModelOptions { queue_entries_max: 5, volatile_cache: false, ..usual.clone() },
        ModelOptions { deallocates: false, ..usual.clone() },
        ModelOptions { shadow_doorbells: true, ..usual.clone() },
        ModelOptions { shadow_doorbells: true, queue_entries_max: 3, ..usual.clone() },
        ModelOptions { placement: PlacementOptions { handles: 4, flaw: None }, ..usual },
    ];
    for (seed, options) in (1..).zip(kinds) {
        let counts = run(options, seed, move |device, model, _| async move {
            conformance::all(device, seed).await;
            model.counts()
        });
        assert_eq!((counts.memory_faults, counts.resets), (0, 0), "seed {seed}: {counts:?}");
        assert!(counts.commands > 250, "seed {seed}: {counts:?}");
    }
}

#[test]
fn commands_of_one_turn_share_a_doorbell() {
    run(ModelOptions::default(), 3, |device, model, _| async move {
        let before = model.counts();
        let reads = (0..64).map(|index| device.read(index * 4096, 4096));
        assert!(join_all(reads).await.iter().all(Result::is_ok));
        let (rung, commands) = {
            let after = model.counts();
            (after.doorbells - before.doorbells, after.commands - before.commands)
        };
        assert_eq!(commands, 64);
        assert!(rung < 40, "{rung} doorbells for {commands} commands");
    });
}

#[test]
fn a_write_is_forced_and_a_flush_sent_only_where_there_is_a_volatile_cache() {
    for volatile_cache in [true, false] {
        let options = ModelOptions { volatile_cache, ..ModelOptions::default() };
        let counts = run(options, 4, |device, model, _| async move {
            device.write(0, vec![pattern(1, 4096)], Placement::Log, true).await.unwrap();
            device.write(4096, vec![pattern(2, 4096)], Placement::Log, false).await.unwrap();
            device.flush().await.unwrap();
            model.counts()
        });
        let expected = if volatile_cache { (1, 1) } else { (0, 0) };
        assert_eq!((counts.forced_writes, counts.flushes), expected, "volatile cache: {volatile_cache}");
    }
}

#[test]
fn an_error_of_the_device_names_its_status_and_what_may_be_retried_is() {
    run(ModelOptions::default(), 5, |device, model, _| async move {
        model.fail_next(io::READ, Status::UNRECOVERED_READ);
        let error = device.read(8192, 4096).await.err().unwrap();
        let said = error.to_string();
        assert!(said.contains("nvme:model/1") && said.contains("read of 4096 bytes at 8192"), "{said}");
        assert!(said.contains("unrecovered read error (type 0x2, code 0x81)"), "{said}");
        model.fail_next(io::WRITE, Status::WRITE_FAULT);
        let written = device.write(0, vec![pattern(1, 4096)], Placement::Data, false).await;
        assert!(written.unwrap_err().to_string().contains("write fault"));
        // The controller says that it may be better later.
        model.fail_next(io::READ, Status::NOT_READY);
        assert!(device.read(8192, 4096).await.is_ok());
        for _ in 0..=RETRIES_MAX {
            model.fail_next(io::READ, Status::NOT_READY);
        }
        assert!(device.read(8192, 4096).await.err().unwrap().to_string().contains("not ready"));
        assert_eq!(device.resets(), 0);
    });
}

#[test]
fn what_is_not_answered_is_aborted_or_the_controller_reset_and_asked_again() {
    for aborts in [true, false] {
        let options = ModelOptions { aborts, ..ModelOptions::default() };
        run(options, 6, move |device, model, handle| async move {
            let bytes = pattern(7, 12_288);
            device.write(0, vec![bytes.clone()], Placement::Data, false).await.unwrap();
            model.swallow_next(1);
            let start = handle.now();
            // One of them, which one is drawn.
            let reads = join_all((0..40).map(|_| device.read(0, 12_288))).await;
            assert!(reads.into_iter().all(|read| read.unwrap()[..] == bytes[..]));
            let took = handle.now() - start;
            assert!((Duration::from_secs(30)..Duration::from_secs(60)).contains(&took), "{took:?}");
            assert_eq!((device.resets(), model.counts().resets), if aborts { (0, 0) } else { (1, 1) });
            assert_eq!(&device.read(0, 12_288).await.unwrap()[..], &bytes[..]);
        });
    }
}

#[test]
fn what_is_never_answered_is_an_error_in_the_end_and_the_controller_works_on() {
    let options = ModelOptions { aborts: false, ..ModelOptions::default() };
    run(options, 8, |device, model, handle| async move {
        let reading = device.clone();
        model.swallow_next(u32::MAX);
        let read = handle.spawn(async move { reading.read(0, 4096).await.map(|_| ()) });
        let error = read.await.unwrap().unwrap_err().to_string();
        assert!(error.contains("not answered, also not after a reset"), "{error}");
        assert_eq!(device.resets(), 3);
        model.swallow_next(0);
        device.write(0, vec![pattern(9, 4096)], Placement::Data, true).await.unwrap();
        assert_eq!(&device.read(0, 4096).await.unwrap()[..], &pattern(9, 4096)[..]);
    });
}

#[test]
fn a_read_that_nobody_waits_for_keeps_its_memory_until_it_is_answered() {
    run(ModelOptions::default(), 10, |device, model, handle| async move {
        device.write(0, vec![Bytes::from_owner(DmaBuf::copy_of(&[0x55; 4096]))], Placement::Data, false).await.unwrap();
        for _ in 0..200 {
            let reading = device.clone();
            let doomed = handle.spawn(async move { reading.read(0, 4096).await.map(|_| ()) });
            handle.yield_now().await;
            doomed.abort();
            // Of the same pool and size: the memory just dropped, had it been given back.
            let canaries: Vec<DmaBuf> = (0..4).map(|_| DmaBuf::copy_of(&[0xAA; 4096])).collect();
            handle.sleep(Duration::from_millis(1)).await;
            assert!(canaries.iter().all(|canary| canary.iter().all(|byte| *byte == 0xAA)));
        }
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn a_device_pulled_out_is_gone_and_answers_everything_so() {
    run(ModelOptions::default(), 11, |device, model, handle| async move {
        let writing = device.clone();
        model.swallow_next(1);
        let write = handle.spawn(async move { writing.write(0, vec![pattern(1, 4096)], Placement::Data, false).await });
        handle.sleep(Duration::from_millis(1)).await;
        model.pull_out();
        assert!(write.await.unwrap().unwrap_err().is_gone());
        assert!(device.read(0, 4096).await.err().unwrap().is_gone());
        assert!(device.flush().await.unwrap_err().is_gone());
    });
}

#[test]
fn a_device_that_is_dropped_is_shut_down() {
    run(ModelOptions::default(), 12, |device, model, handle| async move {
        device.write(0, vec![pattern(1, 4096)], Placement::Data, false).await.unwrap();
        assert!(!model.was_shut_down());
        drop(device);
        handle.sleep(Duration::from_secs(1)).await;
        assert!(model.was_shut_down());
        // Another one takes the controller over, with what was written.
        let device = NvmeDevice::open(model.clone(), 1, &handle).await.unwrap();
        assert_eq!(&device.read(0, 4096).await.unwrap()[..], &pattern(1, 4096)[..]);
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn what_cannot_be_used_is_refused_by_name() {
    let executor = Executor::new(Rc::new(SimClock::new(1)));
    let handle = executor.domain();
    let story = {
        let handle = handle.clone();
        async move {
            let usual = ModelOptions::default();
            let absent = refusal(usual.clone(), 2, &handle).await;
            let why = NamespaceError::Absent;
            assert_eq!(absent, NvmeError::Namespace { device: "model".into(), namespace: 2, why });
            let large = refusal(ModelOptions { block_shift: 16, blocks: 16, ..usual.clone() }, 1, &handle).await;
            assert!(large.to_string().contains("65536 bytes") && large.to_string().contains("nvme format"), "{large}");
            let metadata = refusal(ModelOptions { metadata_bytes: 8, ..usual.clone() }, 1, &handle).await;
            assert!(metadata.to_string().contains("8 bytes of metadata"), "{metadata}");
            let model = Model::new(usual, 1);
            model.pull_out();
            let gone = NvmeDevice::open(model, 1, &handle).await.err().unwrap();
            assert_eq!(gone, NvmeError::Gone { device: "model".into() });
        }
    };
    executor.run_simulated(&handle, story).unwrap().unwrap();
}

/// A write, one that is forced, and a flush, none of which the controller answers before it is reset.
#[test]
fn what_was_asked_for_before_a_reset_is_asked_for_again_as_it_was() {
    let options = ModelOptions { aborts: false, ..ModelOptions::default() };
    run(options, 21, |device, model, _| async move {
        let before = model.counts();
        model.swallow_next(3);
        let write = device.write(0, vec![pattern(1, 4096)], Placement::Data, false);
        let forced = device.write(4096, vec![pattern(2, 8192)], Placement::Log, true);
        let (write, forced, flush) = join3(write, forced, device.flush()).await;
        assert_eq!((write, forced, flush), (Ok(()), Ok(()), Ok(())));
        let after = model.counts();
        assert_eq!(after.resets - before.resets, 1);
        assert_eq!((after.forced_writes, after.flushes), (1, 1), "what was swallowed was not done");
        assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(1, 4096)[..]);
        assert_eq!(device.read(4096, 8192).await.unwrap()[..], pattern(2, 8192)[..]);
    });
}

#[test]
fn a_read_that_nobody_waits_for_ends_with_a_reset_and_its_memory_only_then() {
    let options = ModelOptions { aborts: false, ..ModelOptions::default() };
    run(options, 22, |device, model, handle| async move {
        model.swallow_next(1);
        let reading = device.clone();
        let read = handle.spawn(async move { reading.read(0, 4096).await.map(drop) });
        handle.sleep(Duration::from_secs(1)).await;
        read.abort();
        assert_eq!(device.resets(), 0);
        handle.sleep(Duration::from_secs(60)).await;
        assert_eq!(device.resets(), 1);
        // All places are free again: as many commands as there are find one.
        let reads = (0..400).map(|index| device.read(index * 4096, 4096));
        assert!(join_all(reads).await.iter().all(Result::is_ok));
        assert_eq!((device.resets(), model.counts().memory_faults), (1, 0));
    });
}

#[test]
fn a_bounced_transfer_gives_its_turn_back_over_a_reset() {
    let options = ModelOptions { aborts: false, ..ModelOptions::default() };
    run(options, 23, |device, model, handle| async move {
        let elsewhere = Bytes::from(pattern(3, 8192).to_vec());
        model.swallow_next(1);
        let (writing, bytes) = (device.clone(), elsewhere.clone());
        let write = handle.spawn(async move { writing.write(0, vec![bytes], Placement::Data, false).await });
        handle.sleep(Duration::from_secs(1)).await;
        write.abort();
        device.write(8192, vec![elsewhere.clone()], Placement::Data, false).await.unwrap();
        assert_eq!(device.resets(), 1, "the turn was the first one's until then");
        assert_eq!(device.read(8192, 8192).await.unwrap()[..], elsewhere[..]);
    });
}

#[test]
fn commands_are_answered_while_an_abort_is_not_and_that_ends_in_a_reset() {
    run(ModelOptions::default(), 24, |device, model, handle| async move {
        model.swallow_next(1);
        let reading = device.clone();
        let stuck = handle.spawn(async move { reading.read(0, 4096).await.map(drop) });
        handle.sleep(Duration::from_secs(29)).await;
        model.swallow_admin_next(1);
        let mut longest = Duration::ZERO;
        for _ in 0..600 {
            let begun = handle.now();
            device.read(4096, 4096).await.unwrap();
            longest = longest.max(handle.now() - begun);
            handle.sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(device.resets(), 0, "the abort is waited for");
        assert!(longest < Duration::from_millis(1), "{longest:?}");
        assert_eq!(stuck.await.unwrap(), Ok(()));
        assert_eq!(device.resets(), 1);
    });
}

#[test]
fn a_controller_that_makes_answers_up_is_reset_and_what_was_under_way_is_asked_again() {
    run(ModelOptions::default(), 25, |device, model, handle| async move {
        device.write(0, vec![pattern(4, 4096)], Placement::Data, false).await.unwrap();
        for id in [0, 7, 200, u16::MAX] {
            let resets = device.resets();
            // Polled, it finds nothing to do, and looks for completions only when something is.
            model.make_up(id);
            model.swallow_next(1);
            assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(4, 4096)[..], "after {id} was made up");
            handle.sleep(Duration::from_secs(1)).await;
            assert_eq!(device.resets(), resets + 1, "after {id} was made up");
        }
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn a_flush_does_not_vouch_for_what_a_controller_held_when_it_failed() {
    run(ModelOptions::default(), 23, |device, model, handle| async move {
        let fail = async || {
            let before = device.resets();
            model.fail_fatally();
            while device.resets() == before {
                handle.sleep(Duration::from_millis(100)).await;
            }
            // Answered once it is brought up again.
            device.read(0, 4096).await.unwrap();
        };
        let write = |fua| device.write(0, vec![pattern(1, 4096)], Placement::Data, fua);
        // Nothing is in the cache: written through, or flushed.
        write(true).await.unwrap();
        fail().await;
        device.flush().await.unwrap();
        write(false).await.unwrap();
        device.flush().await.unwrap();
        fail().await;
        device.flush().await.unwrap();
        // A reset of another kind leaves the cache as it is.
        write(false).await.unwrap();
        let before = device.resets();
        model.reset_function();
        while device.resets() == before {
            handle.sleep(Duration::from_millis(100)).await;
        }
        device.flush().await.unwrap();
        // In several parts.
        device.write(0, vec![pattern(1, 4096), pattern(2, 4096)], Placement::Data, false).await.unwrap();
        fail().await;
        for _ in 0..2 {
            let refused = device.flush().await.unwrap_err().to_string();
            assert!(refused.contains("what was in its volatile cache may be lost"), "{refused}");
        }
    });
}

#[test]
fn a_controller_that_has_failed_is_reset_at_once_and_given_up_if_it_does_not_come_back() {
    run(ModelOptions::default(), 26, |device, model, handle| async move {
        model.swallow_next(1);
        model.fail_fatally();
        let begun = handle.now();
        device.write(0, vec![pattern(5, 4096)], Placement::Data, false).await.unwrap();
        assert!(handle.now() - begun < Duration::from_secs(3), "not after 30 s");
        assert_eq!(device.resets(), 1);
        model.break_down();
        model.swallow_next(1);
        model.fail_fatally();
        assert!(device.read(0, 4096).await.err().unwrap().is_gone());
        assert!(device.read(0, 4096).await.err().unwrap().is_gone());
    });
}

#[test]
fn a_controller_that_is_away_while_others_reset_it_is_waited_for_and_one_that_stays_away_is_gone() {
    run(ModelOptions::default(), 35, |device, model, handle| async move {
        for (round, away_ms) in [1, 400, 1100, 1900].into_iter().enumerate() {
            let writing = device.clone();
            model.go_away();
            let write = async move { writing.write(0, vec![pattern(7, 4096)], Placement::Data, false).await };
            let write = handle.spawn(write);
            handle.sleep(Duration::from_millis(away_ms)).await;
            model.come_back();
            write.await.unwrap().unwrap();
            assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(7, 4096)[..]);
            assert_eq!(device.resets(), round as u64 + 1, "away for {away_ms} ms");
        }
        model.go_away();
        let begun = handle.now();
        assert!(device.read(0, 4096).await.err().unwrap().is_gone());
        assert!(handle.now() - begun < Duration::from_secs(4), "not after 30 s");
        assert!(device.attached().unwrap_err().is_gone());
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn a_controller_that_others_reset_while_it_is_brought_up_is_brought_up_again() {
    run(ModelOptions::default(), 36, |device, model, handle| async move {
        let writing = device.clone();
        model.reset_function();
        let write = async move { writing.write(0, vec![pattern(9, 4096)], Placement::Data, false).await };
        let write = handle.spawn(write);
        // It is enabled and not ready yet when they do so again, three times.
        for _ in 0..3 {
            while !model.is_enabled() {
                handle.sleep(Duration::from_micros(100)).await;
            }
            model.reset_function();
        }
        let begun = handle.now();
        write.await.unwrap().unwrap();
        assert!(handle.now() - begun < Duration::from_secs(1), "nobody waits for what was undone");
        assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(9, 4096)[..]);
        assert_eq!(device.resets(), 1);
    });
}

#[test]
fn closing_waits_for_what_is_under_way_and_for_the_controller() {
    run(ModelOptions::default(), 27, |device, model, handle| async move {
        let write = |index| device.write(index * 4096, vec![pattern(index, 4096)], Placement::Data, false);
        let writes: Vec<_> = (0..40).map(write).collect();
        device.close().await;
        assert!(model.was_shut_down());
        assert!(join_all(writes).await.iter().all(Result::is_ok));
        assert!(device.read(0, 4096).await.err().unwrap().is_gone());
        device.close().await;
        let again = NvmeDevice::open(model.clone(), 1, &handle).await.unwrap();
        for index in 0..40 {
            assert_eq!(again.read(index * 4096, 4096).await.unwrap()[..], pattern(index, 4096)[..]);
        }
    });
}

#[test]
fn closing_during_a_reset_ends_what_was_under_way_and_the_controller() {
    let options = ModelOptions { aborts: false, ..ModelOptions::default() };
    run(options, 28, |device, model, handle| async move {
        model.swallow_next(1);
        let reading = device.clone();
        let read = handle.spawn(async move { reading.read(0, 4096).await.map(drop) });
        while device.resets() == 0 {
            handle.sleep(Duration::from_micros(500)).await;
        }
        device.close().await;
        assert!(read.await.unwrap().unwrap_err().is_gone());
        assert!(model.was_shut_down());
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn namespaces_of_one_controller_are_devices_of_their_own_and_end_together() {
    let options = ModelOptions { namespaces: 2, ..ModelOptions::default() };
    run(options, 29, |device, model, handle| async move {
        let other = device.sibling(2).await.unwrap();
        assert_eq!((device.namespace(), other.namespace()), (1, 2));
        assert_eq!(other.name(), "nvme:model/2");
        device.write(0, vec![pattern(1, 4096)], Placement::Data, false).await.unwrap();
        other.write(0, vec![pattern(2, 4096)], Placement::Data, false).await.unwrap();
        assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(1, 4096)[..]);
        assert_eq!(other.read(0, 4096).await.unwrap()[..], pattern(2, 4096)[..]);
        assert!(device.sibling(3).await.err().unwrap().to_string().contains("namespace 3"));
        drop(device);
        handle.sleep(Duration::from_secs(1)).await;
        assert!(!model.was_shut_down(), "the other one is still open");
        assert_eq!(other.read(0, 4096).await.unwrap()[..], pattern(2, 4096)[..]);
        drop(other);
        handle.sleep(Duration::from_secs(1)).await;
        assert!(model.was_shut_down());
    });
}

#[test]
fn a_controller_that_others_reset_is_brought_up_again_and_asked_again() {
    run(ModelOptions::default(), 30, |device, model, handle| async move {
        for round in 0..5u64 {
            let write = |index| device.write(index * 4096, vec![pattern(index + round, 4096)], Placement::Data, true);
            let writes: Vec<_> = (0..40).map(write).collect();
            if round % 2 == 0 {
                handle.yield_now().await;
            }
            model.reset_function();
            let begun = handle.now();
            assert!(join_all(writes).await.iter().all(Result::is_ok));
            assert!(handle.now() - begun < Duration::from_secs(3), "not after 30 s");
            assert_eq!(device.resets(), round + 1);
            for index in 0..40 {
                assert_eq!(device.read(index * 4096, 4096).await.unwrap()[..], pattern(index + round, 4096)[..]);
            }
        }
        assert_eq!(model.counts().memory_faults, 0);
    });
}

#[test]
fn a_controller_that_looks_at_doorbells_in_memory_is_seldom_told_by_its_registers() {
    let told = |shadow_doorbells| {
        let options = ModelOptions { shadow_doorbells, ..ModelOptions::default() };
        run(options, 31, |device, model, _| async move {
            let before = model.counts().doorbells;
            let readers = (0..32u64).map(|reader| {
                let device = &device;
                async move {
                    for round in 0..40 {
                        device.read((reader * 40 + round) % 4096 * 4096, 4096).await.unwrap();
                    }
                }
            });
            join_all(readers).await;
            assert_eq!(device.resets(), 0, "it heard of every command");
            model.counts().doorbells - before
        })
    };
    let (registers, memory) = (told(false), told(true));
    assert!(memory * 2 < registers, "{memory} against {registers}");
}

#[test]
fn a_controller_tells_of_its_health() {
    run(ModelOptions::default(), 32, |device, model, _| async move {
        let health = device.health().await.unwrap().expect("NVMe controllers tell");
        let expected = crate::DeviceHealth {
            warnings: crate::HealthWarnings::default(),
            temperature_c: 42,
            spare_percent: 100,
            spare_percent_min: 10,
            used_percent: 4,
            media_errors: 2,
            unsafe_shutdowns: 3,
            power_on_hours: 1000,
            placement_handles: 0,
        };
        assert_eq!(health, expected);
        model.wear_out(9);
        let health = device.health().await.unwrap().expect("NVMe controllers tell");
        assert!(health.warnings.spare_is_low);
        assert_eq!(health.spare_percent, 9);
        device.close().await;
        let error = device.health().await.unwrap_err().to_string();
        assert!(error.contains("does not answer when asked to tell of its health"), "{error}");
    });
}

#[test]
fn a_controller_that_is_wanted_back_is_given_up_at_work_and_idle() {
    for at_work in [true, false] {
        run(ModelOptions::default(), 33, move |device, model, handle| async move {
            model.swallow_next(u32::from(at_work));
            let reading = device.clone();
            let read = handle.spawn(async move { reading.read(0, 4096).await.map(drop) });
            handle.sleep(Duration::from_secs(3)).await;
            model.want_back();
            handle.sleep(Duration::from_secs(3)).await;
            assert!(!model.is_wanted_back(), "it was not given up");
            let read = read.await.unwrap();
            assert_eq!(read.is_err_and(|error| error.is_gone()), at_work);
            assert!(device.attached().unwrap_err().is_gone());
            assert!(device.read(0, 4096).await.err().unwrap().is_gone());
        });
    }
}

#[test]
fn a_controller_that_answers_no_admin_command_is_reset() {
    run(ModelOptions::default(), 34, |device, model, handle| async move {
        model.swallow_admin_next(1);
        let error = device.health().await.unwrap_err().to_string();
        assert!(error.contains("does not answer when asked to tell of its health"), "{error}");
        handle.sleep(Duration::from_secs(3)).await;
        assert_eq!(device.resets(), 1);
        assert!(device.health().await.unwrap().is_some());
        device.read(0, 4096).await.unwrap();
    });
}

#[test]
fn who_asks_for_the_health_does_not_hold_up_a_reset() {
    run(ModelOptions::default(), 35, |device, model, handle| async move {
        model.swallow_admin_next(1);
        let asked = (0..5).map(|_| {
            let device = device.clone();
            handle.spawn(async move { device.health().await })
        });
        let asked: Vec<_> = asked.collect();
        handle.sleep(Duration::from_millis(1)).await;
        model.swallow_next(1);
        model.fail_fatally();
        let begun = handle.now();
        device.read(0, 4096).await.unwrap();
        assert!(handle.now() - begun < Duration::from_secs(3), "{:?}", handle.now() - begun);
        for health in asked {
            let _ = health.await.unwrap();
        }
        handle.sleep(Duration::from_secs(30)).await;
        assert_eq!(device.resets(), 1);
        assert!(device.health().await.unwrap().is_some());
    });
}

#[test]
fn a_controller_that_is_wanted_back_is_given_up_under_little_work_too() {
    run(ModelOptions::default(), 36, |device, model, handle| async move {
        for round in 0..30 {
            if round == 5 {
                model.want_back();
            }
            let _ = device.read(0, 4096).await;
            handle.sleep(Duration::from_millis(300)).await;
        }
        assert!(!model.is_wanted_back(), "it was not given up");
        assert!(device.attached().unwrap_err().is_gone());
    });
}

#[test]
fn a_controller_that_fails_again_and_again_is_lost() {
    run(ModelOptions::default(), 37, |device, model, handle| async move {
        for _ in 0..60 {
            model.fail_fatally();
            handle.sleep(Duration::from_secs(1)).await;
        }
        assert!(device.attached().unwrap_err().is_gone());
        assert!(device.resets() < 12, "{} resets", device.resets());
    });
}
