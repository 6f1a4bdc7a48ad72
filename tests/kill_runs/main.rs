//! SIGKILL of the back-end at random moments, again and again, under guests that live on: each
//! request is answered exactly once, and what was answered is kept.
//!
//! A front-end by hand keeps two or three queues full with reads, writes, discards, write-zeroes,
//! flushes and refused requests. The process is killed, started again with the same words, and
//! connected to again as QEMU does. After each kill, unless the next one follows at once, all that
//! was in flight must be answered, and every byte of the disk is compared. At the end the process
//! ends in order, and `qemu-img` judges the images.
//!
//! What would be caught: a completed write, discard or write-zeroes that is gone after a kill, or
//! comes back later over what was written since (a request that is carried out again after it
//! was answered, direct I/O of the dead process); a request that is answered twice, or never, or
//! that nobody signals; a request's buffer that a dead process still writes to; a mapping that
//! becomes visible before it would survive; a recovery that does not survive its own death; images
//! that `qemu-img` finds errors in; starts that fail because the dead process's I/O still holds
//! an image; jobs that are gone.
//!
//! `STRATABLK_KILLS=n` sets the number of kills, `STRATABLK_SEED=n` repeats the choices of a run,
//! `STRATABLK_VARIANT=words` runs only the disks with these words in their name.
//! `STRATABLK_DAEMON=qemu-storage-daemon` counts what the reference loses, and fails for nothing.
//! Moments are random, so that two runs of a seed differ in what they meet.

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod guest;
mod journal;
mod model;
mod ring;
mod scene;
mod tally;
mod variants;

use common::Res;
use common::daemon::Program;
use common::rng::{Rng, seed_from_environment};
use scene::Scene;
use tally::Tally;
use variants::VARIANTS;

/// Kills of one image before the next one takes its place.
const KILLS_PER_IMAGE: u64 = 15;

#[test]
fn nothing_completed_is_lost_and_nothing_answered_twice() -> Res<()> {
    run(3 * VARIANTS.len() as u64)
}

#[test]
#[ignore = "takes minutes: contrib/test kills"]
fn five_hundred_kills() -> Res<()> {
    run(500)
}

fn run(kills: u64) -> Res<()> {
    let seed = seed_from_environment();
    println!("STRATABLK_SEED={seed}");
    let kills = std::env::var("STRATABLK_KILLS").map_or(Ok(kills), |n| n.parse())?;
    let wanted = std::env::var("STRATABLK_VARIANT").unwrap_or_default();
    let variants: Vec<_> = VARIANTS
        .iter()
        .filter(|v| v.name.contains(&wanted))
        .collect();
    let count = variants.len() as u64;
    let rounds = (kills / (count * KILLS_PER_IMAGE)).max(1);
    let program = Program::under_test();
    let mut rng = Rng::new(seed);
    let mut tally = Tally::default();
    for image in 0..count * rounds {
        let variant = variants
            .get((image % count) as usize)
            .ok_or("no such variant")?;
        // So that all of them together are as many as were asked for.
        let share = kills * (image + 1) / (count * rounds) - kills * image / (count * rounds);
        let mut rng = Rng::new(rng.next());
        let mut scene = Scene::new(&program, **variant, &mut rng)?;
        if let Err(error) = scene.run(share, &mut tally, &mut rng) {
            let error = format!("STRATABLK_SEED={seed}, {}: {error}", variant.name);
            if !program.is_reference() {
                return Err(error.into());
            }
            println!("  given up: {error}");
            tally.given_up += 1;
        }
    }
    tally.print(&program.path.display().to_string());
    if !tally.is_clean() && !program.is_reference() {
        return Err(format!("STRATABLK_SEED={seed}: see the counts above").into());
    }
    Ok(())
}
