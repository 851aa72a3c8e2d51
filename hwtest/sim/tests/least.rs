//! On the fewest targets that `format` takes, the m that may be lost are lost: reads, writes and starts go
//! on.

mod common;

use cfs_device::mem::Faults;
use cfs_sim::ledger::Trust;
use cfs_sim::world::{Death, Shape, Started, World};
use cfs_wire::Policy;
use common::{degraded, expect_files, filled_cluster, refilled, simulated, write_length};

async fn expect_working(world: &World, context: &str) {
    expect_files(world, context).await;
    let late = world.mount("late").await.unwrap();
    for length in [444_444, 4444] {
        write_length(&late.client, length).await;
        late.client.unlink(late.client.root(), length.to_string().as_bytes()).await.unwrap();
    }
    late.kill();
}

async fn restart(world: &World) {
    world.crash_server(Death::Power);
    assert_eq!(world.start_server().await.unwrap(), Started::Serving);
}

fn loses_what_it_may(policy: &'static str, targets: usize, seed: u64) {
    simulated(seed, move |handle| async move {
        let policy: Policy = policy.parse().unwrap();
        let lost: Vec<usize> = (targets - policy.parity()..targets).collect();
        let shape = Shape { targets, policy, ..Shape::default() };
        let world = filled_cluster(&handle, shape.clone(), seed).await;
        // While it runs, then gone at a start, and at one more after that.
        for disk in &lost {
            world.disk(*disk).set_faults(Faults { read_error: 1.0, write_error: 1.0, ..Faults::default() });
            world.distrust(*disk, Trust::Faulty);
        }
        expect_working(&world, &format!("{policy}: {lost:?} answer with errors")).await;
        world.crash_server(Death::Power);
        lost.iter().for_each(|disk| world.disk(*disk).fail());
        for start in ["first", "second"] {
            assert_eq!(world.start_server().await.unwrap(), Started::Serving, "{policy}: {lost:?} missing");
            expect_working(&world, &format!("{policy}: {start} start without {lost:?}")).await;
            world.crash_server(Death::Power);
        }
        for disk in &lost {
            world.replace_disk(*disk).await.unwrap();
        }
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        assert_eq!(degraded(&world).await, 0);
        restart(&world).await;
        expect_working(&world, &format!("{policy}: {lost:?} replaced")).await;
        // The twin: one target fewer is refused.
        let fewer = World::new(&handle, Shape { targets: targets - 1, ..shape }, seed);
        let refusal = fewer.format().await.unwrap_err().detail;
        assert!(refusal.contains(&format!("needs {targets} targets")), "{refusal}");
    });
}

#[test]
fn two_copies_on_three_targets() {
    loses_what_it_may("2x", 3, 301);
}

#[test]
fn three_copies_on_five_targets() {
    loses_what_it_may("3x", 5, 302);
}

#[test]
fn two_and_two_on_five_targets() {
    loses_what_it_may("2+2", 5, 303);
}
