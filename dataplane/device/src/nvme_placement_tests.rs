use super::super::model::{ModelOptions, PlacementFlaw, PlacementOptions};
use super::*;

const BLOCK: u64 = 4096;

fn with_handles(handles: u16) -> ModelOptions {
    ModelOptions { placement: PlacementOptions { handles, flaw: None }, ..ModelOptions::default() }
}

/// A block of each stream, from block `first` on.
async fn write_each(device: &Device, first: u64) {
    let write = |placement: Placement| {
        let block = first + placement as u64;
        device.write(block * BLOCK, vec![pattern(block, BLOCK as usize)], placement, false)
    };
    assert!(join_all(Placement::ALL.map(write)).await.iter().all(Result::is_ok));
    for block in first..first + Placement::ALL.len() as u64 {
        assert_eq!(device.read(block * BLOCK, BLOCK as usize).await.unwrap()[..], pattern(block, BLOCK as usize)[..]);
    }
}

fn handles_of_each(model: &Model, first: u64) -> Vec<Option<u16>> {
    (first..first + Placement::ALL.len() as u64).map(|block| model.handle_of(block)).collect()
}

async fn handles_told(device: &Device) -> u16 {
    device.health().await.unwrap().expect("NVMe controllers tell").placement_handles
}

fn some(handles: [u16; 6]) -> Vec<Option<u16>> {
    handles.map(Some).to_vec()
}

#[test]
fn data_of_different_streams_goes_to_different_handles() {
    for (handles, expected) in [(8, [0, 1, 2, 3, 4, 5]), (4, [0, 0, 1, 2, 2, 3]), (1, [0; 6])] {
        run(with_handles(handles), 40, move |device, model, _| async move {
            assert_eq!(handles_told(&device).await, handles);
            write_each(&device, 0).await;
            assert_eq!(handles_of_each(&model, 0), some(expected), "{handles} handles");
            let counts = model.counts();
            assert_eq!((counts.invalid_placements, counts.memory_faults), (0, 0));
        });
    }
}

/// Whatever way its memory takes, and in every piece.
#[test]
fn all_of_a_write_goes_to_the_handle_of_its_stream() {
    let options = ModelOptions { transfer_shift: 2, ..with_handles(6) };
    run(options, 41, |device, model, _| async move {
        let memory = pattern(1, 40 * BLOCK as usize + 1);
        device.write(0, vec![memory.slice(..40 * BLOCK as usize)], Placement::Relocated, true).await.unwrap();
        device.write(40 * BLOCK, vec![memory.slice(1..)], Placement::Parity, true).await.unwrap();
        let parts = vec![memory.slice(..BLOCK as usize), memory.slice(1..1 + BLOCK as usize)];
        device.write(80 * BLOCK, parts, Placement::Hot, false).await.unwrap();
        let expected = [(0..40, 5), (40..80, 4), (80..82, 1)];
        for (blocks, handle) in expected {
            for block in blocks {
                assert_eq!(model.handle_of(block), Some(handle), "block {block}");
            }
        }
        assert_eq!(model.counts().forced_writes, 20, "the rest of their flags stays");
    });
}

#[test]
fn a_controller_is_asked_for_its_handles_again_after_a_reset() {
    run(with_handles(6), 42, |device, model, handle| async move {
        let mut first = 0;
        for (handles, expected) in [(3, some([0, 0, 0, 1, 1, 2])), (0, vec![None; 6]), (6, some([0, 1, 2, 3, 4, 5]))] {
            write_each(&device, first).await;
            let writes = (100..140)
                .map(|block| device.write(block * BLOCK, vec![pattern(block, BLOCK as usize)], Placement::Data, false));
            // What is under way has identifiers of before.
            let writes: Vec<_> = writes.collect();
            model.place_by(PlacementOptions { handles, flaw: None });
            model.reset_function();
            assert!(join_all(writes).await.iter().all(Result::is_ok), "to {handles} handles");
            first += 6;
            // The first write has it asked.
            device.write(first * BLOCK, vec![pattern(1, BLOCK as usize)], Placement::Log, false).await.unwrap();
            handle.sleep(Duration::from_millis(100)).await;
            assert_eq!(handles_told(&device).await, handles);
            let directives = model.counts().directives;
            write_each(&device, first).await;
            assert_eq!(handles_of_each(&model, first), expected, "{handles} handles");
            assert_eq!(model.counts().directives - directives, if handles == 0 { 0 } else { 6 });
        }
        let counts = model.counts();
        assert_eq!((device.resets(), counts.invalid_placements, counts.memory_faults), (3, 0, 0));
    });
}

#[test]
fn a_controller_without_placement_is_neither_asked_nor_told_of_it() {
    run(ModelOptions::default(), 43, |device, model, _| async move {
        let before = model.counts().commands;
        // Identify as for every namespace, and nothing else.
        device.sibling(1).await.unwrap();
        assert_eq!(model.counts().commands - before, 1);
        assert_eq!(handles_told(&device).await, 0);
        write_each(&device, 0).await;
        assert_eq!(model.counts().directives, 0);
        assert_eq!(handles_of_each(&model, 0), vec![None; 6]);
    });
}

#[test]
fn a_controller_that_tells_what_cannot_be_is_used_without_placement() {
    let flaws = [
        PlacementFlaw::SwitchedOff,
        PlacementFlaw::NoGroup,
        PlacementFlaw::NoHandles,
        PlacementFlaw::TooMany,
        PlacementFlaw::Short,
        PlacementFlaw::Repeated,
        PlacementFlaw::SeveralGroups,
        PlacementFlaw::RefusesStatus,
    ];
    for flaw in flaws {
        let placement = PlacementOptions { handles: 8, flaw: Some(flaw) };
        let options = ModelOptions { placement, ..ModelOptions::default() };
        run(options, 44, move |device, model, _| async move {
            // What lies where the answer is written is not taken for one.
            device.write(0, vec![pattern(1, 8193).slice(1..)], Placement::Log, false).await.unwrap();
            let again = device.sibling(1).await.unwrap();
            for device in [&device, &again] {
                write_each(device, 0).await;
                assert_eq!(handles_told(device).await, 0, "{flaw:?}");
            }
            let counts = model.counts();
            assert_eq!((counts.directives, counts.resets, counts.memory_faults), (0, 0, 0), "{flaw:?}");
        });
    }
}

#[test]
fn a_controller_that_refuses_placed_writes_loses_none_and_is_used_without() {
    let placement = PlacementOptions { handles: 8, flaw: Some(PlacementFlaw::RefusesWrites) };
    run(ModelOptions { placement, ..ModelOptions::default() }, 45, |device, model, _| async move {
        assert_eq!(handles_told(&device).await, 8);
        write_each(&device, 0).await;
        assert_eq!(model.counts().directives, 6, "all of them were under way");
        write_each(&device, 6).await;
        assert_eq!((handles_told(&device).await, model.counts().directives), (0, 6));
        // A refusal for another reason stays one.
        model.fail_next(io::WRITE, Status::INVALID_FIELD);
        let refused = device.write(0, vec![pattern(1, 4096)], Placement::Log, false).await.unwrap_err().to_string();
        assert!(refused.contains("invalid field"), "{refused}");
    });
}

#[test]
fn a_controller_that_does_not_say_what_handles_it_has_is_used_without_and_not_asked_again() {
    for aborts in [true, false] {
        let placement = PlacementOptions { handles: 8, flaw: Some(PlacementFlaw::Silent) };
        run(ModelOptions { placement, aborts, ..ModelOptions::default() }, 46, |device, model, handle| async move {
            assert_eq!(handles_told(&device).await, 0);
            let resets = device.resets();
            assert!(resets <= 3, "{resets} resets");
            write_each(&device, 0).await;
            model.reset_function();
            write_each(&device, 6).await;
            // These would have it asked.
            write_each(&device, 12).await;
            handle.sleep(Duration::from_secs(200)).await;
            write_each(&device, 18).await;
            assert_eq!((device.resets(), model.counts().directives), (resets + 1, 0));
        });
    }
}

#[test]
fn a_write_by_a_handle_that_is_gone_goes_where_the_controller_chooses() {
    run(with_handles(6), 47, |device, model, _| async move {
        // Without a reset: by somebody else.
        model.place_by(PlacementOptions { handles: 4, flaw: None });
        write_each(&device, 0).await;
        assert_eq!(handles_of_each(&model, 0), some([0, 1, 2, 3, 0, 0]));
        assert_eq!(model.counts().invalid_placements, 2);
    });
}
