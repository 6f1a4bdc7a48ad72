//! A raw disk whose process is killed: it has no mapping that could be lost with the process.
//!
//! What would be caught: a write that completes before the kernel has it.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Layer};
use stratablk::format::{Format, Raw};
use stratablk::reactor::Reactor;

use crate::disk::read_all;
use crate::history::SECTOR;
use crate::landing::{Start, visit_kills};
use crate::machine::Machine;
use crate::states::State;
use crate::workload::Work;
use crate::{alone, number_from, seed, together};

const SECTORS: usize = 512;
/// States judged by default.
const STATES: usize = 2000;

fn chain(machine: &Machine) -> Arc<Chain> {
    let layer = Layer {
        name: "raw".into(),
        format: Format::Raw(Raw::new((SECTORS * SECTOR) as u64)),
        storage: machine.file(0),
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap())
}

#[test]
fn what_completed_on_a_raw_disk_outlives_the_process() {
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let reactor = Reactor::for_this_thread().unwrap();
    let files = [vec![0; SECTORS * SECTOR]];
    let machine = Machine::new(&files);
    let history = {
        let _alone = alone();
        let clock = machine.clone();
        let clock = Box::new(move || clock.now());
        let work = Work::new(chain(&machine), vec![0; SECTORS], seed, clock);
        for _ in 0..5 {
            work.spawn_guest(&reactor, 30);
        }
        machine.run(&reactor, &mut rng);
        work.history.take()
    };
    let _together = together();
    let start = Start::of(&files);
    let judge = |state: State, _: &mut StdRng| {
        let seen = read_all(&reactor, &chain(&Machine::new(&state.files))).unwrap();
        let settled = history.notes_at(state.cut);
        for (sector, stamp) in seen.into_iter().enumerate() {
            let allowed = history.after_cut(sector, settled, state.cut);
            assert!(
                stamp.is_some_and(|stamp| allowed.contains(&stamp)),
                "STRATABLK_SEED={seed}: killed after event {}, {:?} of what was under way: sector \
                 {sector} reads {stamp:x?}, allowed are {allowed:x?}",
                state.cut,
                state.kept
            );
        }
    };
    let budget = number_from("STRATABLK_CRASH_STATES").unwrap_or(STATES);
    let (total, judged) = visit_kills(start, &machine.log(), budget, &mut rng, judge);
    println!("{judged} of {total} states");
    assert!(judged * 2 > budget.min(total), "{judged} of {total} states");
}
