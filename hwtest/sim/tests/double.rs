//! Where two lost targets are promised to be bridged, any two are, however they are lost, in data
//! and metadata alike.

mod common;

use cfs_device::mem::Faults;
use cfs_sim::ledger::Trust;
use cfs_sim::report::Violation;
use cfs_sim::world::{Death, Shape, Started, World};
use cfs_wire::Policy;
use common::{degraded, expect_files, filled_cluster, refilled, simulated, write_length};

const TARGETS: usize = 5;

/// All of what is stored is on three targets and more, and any three are enough.
fn shape() -> Shape {
    Shape { targets: TARGETS, policy: Policy::new(3, 2).unwrap(), ..Shape::default() }
}

fn pairs() -> impl Iterator<Item = [usize; 2]> {
    (0..TARGETS).flat_map(|first| (first + 1..TARGETS).map(move |second| [first, second]))
}

/// Everything is there and takes writes.
async fn expect_working(world: &World, context: &str) {
    expect_files(world, context).await;
    let late = world.mount("late").await.unwrap();
    let ino = late.client.root();
    write_length(&late.client, 444_444).await;
    late.client.unlink(ino, b"444444").await.unwrap();
    late.kill();
}

async fn restart(world: &World) {
    world.crash_server(Death::Power);
    assert_eq!(world.start_server().await.unwrap(), Started::Serving);
}

async fn start_without(world: &World, lost: &[usize]) -> Result<Started, Violation> {
    world.crash_server(Death::Power);
    lost.iter().for_each(|disk| world.disk(*disk).fail());
    world.start_server().await
}

#[test]
fn any_two_may_be_missing_at_a_start() {
    simulated(60, |handle| async move {
        let world = filled_cluster(&handle, shape(), 60).await;
        for pair in pairs() {
            assert_eq!(start_without(&world, &pair).await.unwrap(), Started::Serving);
            expect_working(&world, &format!("{pair:?} missing")).await;
            pair.iter().for_each(|disk| world.disk(*disk).restore());
            restart(&world).await;
        }
        // The twin: three are too many.
        let refusal = start_without(&world, &[0, 1, 2]).await.unwrap_err().detail;
        assert!(refusal.contains("3 of 5 targets are missing"), "{refusal}");
    });
}

#[test]
fn any_two_may_answer_with_errors() {
    simulated(61, |handle| async move {
        for (index, pair) in pairs().enumerate() {
            let world = filled_cluster(&handle, shape(), 61 + index as u64).await;
            for disk in pair {
                world.disk(disk).set_faults(Faults { read_error: 1.0, write_error: 1.0, ..Faults::default() });
                world.distrust(disk, Trust::Faulty);
            }
            expect_working(&world, &format!("{pair:?} answer with errors")).await;
            restart(&world).await;
            expect_working(&world, &format!("{pair:?} answer with errors, restarted")).await;
            world.crash_server(Death::Process);
        }
    });
}

#[test]
fn any_two_may_rot_and_a_repair_makes_good_both() {
    simulated(62, |handle| async move {
        for (index, pair) in pairs().enumerate() {
            let world = filled_cluster(&handle, shape(), 80 + index as u64).await;
            for disk in pair {
                assert!(world.disk(disk).corrupt_written(200, 5 + disk as u64) > 20);
                world.distrust(disk, Trust::Faulty);
            }
            expect_files(&world, &format!("{pair:?} rotted")).await;
            restart(&world).await;
            expect_working(&world, &format!("{pair:?} rotted, restarted")).await;
            let report = world.node().check(true, true).await;
            assert_eq!(report.problems, Vec::<String>::new());
            assert_eq!(degraded(&world).await, 0, "{pair:?}");
            // Two others: what was repaired carries its part.
            let others: Vec<usize> = (0..TARGETS).filter(|disk| !pair.contains(disk)).take(2).collect();
            others.iter().for_each(|disk| world.disk(*disk).fail());
            expect_files(&world, &format!("{pair:?} rotted and repaired, {others:?} lost")).await;
            world.crash_server(Death::Process);
        }
    });
}

#[test]
fn two_may_be_replaced_at_once_and_then_any_two_others_may_go() {
    simulated(63, |handle| async move {
        let world = filled_cluster(&handle, shape(), 63).await;
        for pair in [[0, 1], [2, 3], [4, 0]] {
            world.stop_server().await;
            for disk in pair {
                world.replace_disk(disk).await.unwrap();
            }
            assert_eq!(world.start_server().await.unwrap(), Started::Serving);
            refilled(&world).await;
            assert_eq!(degraded(&world).await, 0, "{pair:?} replaced");
        }
        for pair in pairs() {
            assert_eq!(start_without(&world, &pair).await.unwrap(), Started::Serving);
            expect_files(&world, &format!("{pair:?} lost after all were replaced")).await;
            pair.iter().for_each(|disk| world.disk(*disk).restore());
            restart(&world).await;
        }
    });
}
