//! Ends in the midst of something: the process is killed at some moment, or the power fails behind some
//! barrier.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::Res;
use crate::common::frontend::PATIENCE;
use crate::guest::Look;
use crate::machine::{Barriers, Trap};
use crate::scene::Scene;
use crate::steps::{Act, Step};
use crate::walk::is_ready;
use crate::world::World;

/// Requests that each guest gets answered before the power fails in any case.
const MORE: u64 = 150;

/// The process ends while it carries out a command, or shortly after.
pub fn during(scene: &mut Scene, step: &Step, cut: bool) -> Res<()> {
    if let Step::Complete(id) = step
        && !is_ready(scene, id)?
    {
        return Ok(());
    }
    let Some(act) = scene.act(step)? else {
        return Err(format!("{step:?} is no command").into());
    };
    let Act {
        command,
        arguments,
        after,
    } = act;
    let killer = match cut {
        true => scene.set_trap(step).map(|()| None)?,
        false => Some(killer(scene)?),
    };
    let answer = scene.execute(command, arguments.clone());
    match killer {
        Some(killer) => killer.join().map_err(|_| "the killer's thread failed")?,
        None if matches!(answer, Ok(Ok(_))) => until_cut(scene, job_of(step, &arguments))?,
        None => {}
    }
    let before = scene.world.clone();
    let worlds = match answer {
        Ok(Ok(_)) => vec![after],
        // It may have ended.
        Ok(Err(_)) if matches!(step, Step::Await(_)) => vec![after],
        Ok(Err(refusal)) => return Err(format!("{command} {arguments}: {refusal}").into()),
        // Whether it was told to complete is not to be seen while it is there.
        Err(_) if matches!(step, Step::Complete(_)) => vec![after],
        Err(_) => vec![before, after],
    };
    if let Step::ExportAdd(id) = step {
        // Whether it is there is for the next process to say: there is no other way to know.
        return restart_with_export(scene, id, &worlds, cut);
    }
    scene.restart(&worlds, cut)
}

fn killer(scene: &mut Scene) -> Res<JoinHandle<()>> {
    let moment = match scene.rng.below(3) {
        0 => Duration::from_micros(scene.rng.below(2000)),
        1 => Duration::from_micros(scene.rng.below(20_000)),
        _ => Duration::from_micros(scene.rng.below(60_000)),
    };
    let pid = scene.life.as_ref().ok_or("no process")?.daemon.pid();
    Ok(std::thread::spawn(move || {
        // The moment itself, not a wait for something.
        std::thread::sleep(moment);
        // SAFETY: the process is a child that nobody waits for before this thread has been joined.
        unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    }))
}

/// Waits until the power has failed, or what was begun is over and guests have gone on for a while.
fn until_cut(scene: &mut Scene, job: Option<String>) -> Res<()> {
    let deadline = Instant::now() + PATIENCE;
    let answers = |scene: &Scene| -> Res<Vec<u64>> {
        let guests = scene.guests.iter();
        let served = guests.filter(|(id, _)| !scene.down.contains(id));
        served.map(|(_, guest)| guest.answers()).collect()
    };
    let begun = answers(scene)?;
    loop {
        if scene.has_lost_power() {
            return Ok(());
        }
        let now = answers(scene)?;
        let mut both = begun.iter().zip(&now);
        if both.all(|(begun, now)| *now >= begun + MORE)
            && job.as_ref().is_none_or(|job| is_over(scene, job))
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err("guests or a job do not go on".into());
        }
        // A poll of a condition with a deadline.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The job that ends if one lets it.
fn job_of(step: &Step, arguments: &Value) -> Option<String> {
    match step {
        Step::Await(id) | Step::Complete(id) => Some(id.clone()),
        Step::Stream { .. } | Step::Commit { .. } => {
            arguments["job-id"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// The job is gone, or the process.
fn is_over(scene: &mut Scene, job: &str) -> bool {
    let speed = json!({"device": job, "speed": 0});
    // It may have ended.
    if scene.execute("block-job-set-speed", speed).is_err() {
        return true;
    }
    match scene.execute("query-jobs", json!({})) {
        Ok(Ok(jobs)) => {
            let mut jobs = jobs.as_array().into_iter().flatten();
            !jobs.any(|found| found["id"] == job)
        }
        _ => true,
    }
}

fn restart_with_export(scene: &mut Scene, id: &str, worlds: &[World], cut: bool) -> Res<()> {
    let answered = worlds.len() == 1;
    let before = scene.down.clone();
    scene.down.remove(id);
    match scene.restart(worlds, cut) {
        Err(_) if !answered && scene.life.is_some() => {
            scene.down = before;
            scene.world = scene.find_restarted(worlds)?;
            scene.connect(match cut {
                true => Look::AfterCut,
                false => Look::Nothing,
            })
        }
        other => other,
    }
}

impl Scene {
    /// The power is to fail behind some barrier from now on: most often by which a step comes to count.
    fn set_trap(&mut self, step: &Step) -> Res<()> {
        let links = matches!(
            step,
            Step::Stream { .. } | Step::Commit { .. } | Step::Await(_)
        );
        let (of, number) = match (self.rng.below(4), links) {
            (0, _) => (Barriers::All, self.rng.between(1, 30)),
            (1, true) | (_, false) => (Barriers::OfHeaders, self.rng.between(1, 4)),
            (_, true) => (Barriers::OfLinks, 1),
        };
        let pid = self.life.as_ref().ok_or("no process")?.daemon.pid();
        let cut = self.cut.as_ref().ok_or("the power cannot fail")?;
        cut.set(Some(Trap { of, number, pid }));
        Ok(())
    }
}
