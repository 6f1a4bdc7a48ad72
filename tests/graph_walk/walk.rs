//! Carries out the steps, and judges what there is after each.

use std::fs;

use serde_json::json;

use crate::common::daemon::Program;
use crate::common::{Res, images};
use crate::guest::Look;
use crate::scene::Scene;
use crate::steps::Step;
use crate::sudden;
use crate::world::{Work, World};

/// A walk by a seed: how far it goes.
pub struct Walk {
    /// The seed.
    pub seed: u64,
    /// Steps.
    pub steps: u64,
    /// The power may fail.
    pub power: bool,
}

/// What a walk has found.
pub struct Found {
    /// The step, from 1.
    pub step: u64,
    /// What is wrong.
    pub error: String,
    /// That, with all that led to it.
    pub text: String,
}

impl Walk {
    /// Walks. `None`: all was as it should be.
    ///
    /// # Errors
    /// The images could not be made, or the first process did not start.
    pub fn run(&self, program: &Program) -> Res<Option<Found>> {
        let disks = 2 + (self.seed % 2) as usize;
        let mut scene = Scene::new(self.seed, disks, self.power, program.clone())?;
        let mut done: Vec<String> = Vec::new();
        for number in 1..=self.steps {
            let step = scene.choose();
            done.push(format!("{number:4} {step:?}"));
            let walked = take(&mut scene, &step).and_then(|()| scene.look());
            if let Err(error) = walked {
                return Ok(Some(self.found(number, &done, &scene, &*error)));
            }
        }
        match end(&mut scene) {
            Ok(()) => Ok(None),
            Err(error) => {
                done.push("     the end".to_owned());
                Ok(Some(self.found(self.steps, &done, &scene, &*error)))
            }
        }
    }

    fn found(
        &self,
        step: u64,
        done: &[String],
        scene: &Scene,
        error: &(dyn std::error::Error + Send + Sync),
    ) -> Found {
        let log = scene.log();
        let lines: Vec<_> = log.lines().collect();
        let last = lines
            .get(lines.len().saturating_sub(20)..)
            .unwrap_or_default();
        let text = format!(
            "{error}\n\nthe steps:\n{}\n\nthe daemon's last words:\n{}\n\nagain: STRATABLK_SEED={} \
             STRATABLK_WALK_STEPS={step} STRATABLK_WALK_POWER={} cargo test --test graph_walk \
             a_walk_from_a_seed -- --ignored --nocapture\n",
            done.join("\n"),
            last.join("\n"),
            self.seed,
            u8::from(self.power),
        );
        let error = error.to_string();
        Found { step, error, text }
    }
}

fn take(scene: &mut Scene, step: &Step) -> Res<()> {
    match step {
        Step::Kill | Step::Cut => {
            let world = [scene.world.clone()];
            scene.restart(&world, matches!(step, Step::Cut))
        }
        Step::KillDuring(step) => sudden::during(scene, step, false),
        Step::CutDuring(step) => sudden::during(scene, step, true),
        Step::Restart => scene.stop_and_start(),
        Step::Verify => verify(scene),
        Step::Check => check(scene),
        Step::Refused(first) => (0..4).try_for_each(|at| refused(scene, first + 3 * at)),
        Step::Insert { above, .. } => scene.insert(above),
        Step::Add {
            export,
            by_jobs: true,
        } => scene.add_by_jobs(export),
        Step::Cancel(id) => cancel(scene, id),
        Step::Complete(id) => complete(scene, id),
        Step::Pause(id) => pause(scene, id),
        Step::Await(id) => {
            let act = scene.act(step)?.ok_or("no command")?;
            // It may have ended.
            scene.execute(act.command, act.arguments)?.ok();
            scene.job_is_gone(id)
        }
        Step::Snapshot(_) => {
            scene.set_slow(true);
            let taken = command(scene, step);
            scene.set_slow(false);
            taken
        }
        Step::ExportDel(id) => export_del(scene, id),
        step => command(scene, step),
    }
}

fn command(scene: &mut Scene, step: &Step) -> Res<()> {
    let act = scene.act(step)?.ok_or("a step that is no command")?;
    scene.get(act.command, act.arguments)?;
    scene.world = act.after;
    match step {
        Step::ExportAdd(id) => {
            scene.down.remove(id);
            scene.guest(id)?.connect(Look::Nothing)
        }
        Step::Resize { export, .. } => scene.guest(export)?.grown(),
        _ => Ok(()),
    }
}

/// The job is ready to be completed, if it has not ended.
pub fn is_ready(scene: &mut Scene, id: &str) -> Res<bool> {
    scene
        .execute("block-job-set-speed", json!({"device": id, "speed": 0}))?
        .ok();
    scene.until(&format!("job '{id}' is never ready"), |scene| {
        Ok(!matches!(
            scene.job_status(id)?.as_deref(),
            Some("created" | "running")
        ))
    })?;
    Ok(scene.job_status(id)?.as_deref() == Some("ready"))
}

fn complete(scene: &mut Scene, id: &str) -> Res<()> {
    let completing = matches!(
        scene.world.jobs.get(id).map(|job| &job.work),
        Some(Work::Active {
            completing: true,
            ..
        })
    );
    let ready = is_ready(scene, id)?;
    if !ready && !completing {
        return Err(format!("job '{id}' is not ready").into());
    }
    let act = scene
        .act(&Step::Complete(id.to_owned()))?
        .ok_or("no command")?;
    let answer = scene.execute(act.command, act.arguments)?;
    if !completing {
        answer?;
    }
    scene.world = act.after;
    scene.job_is_gone(id)
}

fn cancel(scene: &mut Scene, id: &str) -> Res<()> {
    let answer = scene.execute("job-cancel", json!({"id": id}))?;
    let ended = answer.is_err();
    scene.job_is_gone(id)?;
    // It may have ended before, or as a cancel came too late.
    let mut worlds = vec![scene.world.clone(); 2];
    if let [cancelled, finished] = worlds.as_mut_slice() {
        cancelled.cancel(id);
        finished.finish(id);
    }
    if ended {
        worlds.remove(0);
    }
    scene.world = scene.find(&worlds)?;
    Ok(())
}

fn pause(scene: &mut Scene, id: &str) -> Res<()> {
    let act = scene
        .act(&Step::Pause(id.to_owned()))?
        .ok_or("no command")?;
    let pauses = act.command == "job-pause";
    match scene.execute(act.command, act.arguments)? {
        Ok(_) => {}
        // It has ended.
        Err(_) if pauses => return Ok(()),
        Err(error) => return Err(format!("{}: {error}", act.command).into()),
    }
    let unpaused = scene.world.clone();
    scene.world = act.after;
    if pauses {
        scene.until(&format!("job '{id}' does not pause"), |scene| {
            let status = scene.job_status(id)?;
            Ok(matches!(
                status.as_deref(),
                Some("paused" | "standby") | None
            ))
        })?;
        if scene.job_status(id)?.is_none() {
            scene.world = unpaused;
        }
    }
    Ok(())
}

fn export_del(scene: &mut Scene, id: &str) -> Res<()> {
    scene.get("block-export-del", json!({"id": id, "mode": "hard"}))?;
    scene.until(&format!("export '{id}' stays"), |scene| {
        let exports = scene.get("query-block-exports", json!({}))?;
        let mut exports = exports.as_array().into_iter().flatten();
        Ok(!exports.any(|export| export["id"] == id))
    })?;
    scene.guest(id)?.lose()?;
    scene.down.insert(id.to_owned());
    // What it held has been given back: others may have the image.
    let top = scene.world.exports.get(id).ok_or("no such export")?;
    let node = scene.world.nodes.get(top).ok_or("no such node")?;
    check_alone(&node.file)?;
    Ok(())
}

/// `qemu-img check` of an image, without those under it.
fn check_alone(file: &str) -> Res<bool> {
    let file = json!({"driver": "file", "filename": file});
    let image = json!({"driver": "qcow2", "file": file, "backing": null});
    images::check_named(&format!("json:{image}"))
}

/// A command that is refused changes nothing.
fn refused(scene: &mut Scene, kind: u64) -> Res<()> {
    let (command, arguments) = scene.refusal(kind)?;
    let still = scene.world.jobs.is_empty();
    let before = scene.held()?;
    if scene.execute(command, arguments.clone())?.is_ok() {
        return Err(format!("{command} {arguments} works").into());
    }
    match still {
        true => scene.holds(&before),
        false => Ok(()),
    }
}

fn verify(scene: &mut Scene) -> Res<()> {
    for (id, guest) in &scene.guests {
        if !scene.down.contains(id) {
            guest.work(200)?;
            let read = guest.verify();
            read.map_err(|e| format!("guest of '{id}': {e}"))?;
        }
    }
    Ok(())
}

/// `qemu-img` may look at what is not written, and finds it well; headers name what they should.
fn check(scene: &mut Scene) -> Res<()> {
    let exports = &scene.world.exports;
    for (name, node) in &scene.world.nodes {
        let written = exports
            .iter()
            .any(|(id, top)| top == name && !scene.down.contains(id));
        if written || scene.world.is_busy(name) {
            continue;
        }
        let checked = check_alone(&node.file);
        let leaks = checked.map_err(|e| format!("node '{name}': {e}"))?;
        if leaks && !scene.killed {
            return Err(format!("node '{name}': clusters have leaked").into());
        }
    }
    headers(&scene.world)
}

/// What images' headers say lies under them.
fn headers(world: &World) -> Res<()> {
    for (name, node) in &world.nodes {
        if world.is_busy(name) || node.left {
            continue;
        }
        let bytes = fs::read(&node.file)?;
        let word = |at: usize, len: usize| {
            let bytes = bytes.get(at..at + len).unwrap_or_default().iter();
            bytes.fold(0, |word, &byte| word << 8 | usize::from(byte))
        };
        let (at, len) = (word(8, 8), word(16, 4));
        let named = bytes.get(at..at + len).unwrap_or_default();
        let named = String::from_utf8_lossy(named).replace("/./", "/");
        let wanted = node.header.clone().unwrap_or_default().replace("/./", "/");
        // A path may be one from the image's folder.
        let folder = node.file.rsplit_once('/').map(|(folder, _)| folder);
        let whole = format!("{}/{named}", folder.unwrap_or_default());
        // Where options have put another chain together, the name says which one.
        if named != wanted && whole != wanted && !named.starts_with("json:") {
            return Err(
                format!("the header of node '{name}' names '{named}', not '{wanted}'").into(),
            );
        }
    }
    Ok(())
}

/// The process ends in order, and `qemu-img` reads what the guests have.
fn end(scene: &mut Scene) -> Res<()> {
    for id in scene.world.jobs.keys().cloned().collect::<Vec<_>>() {
        if scene.world.jobs.get(&id).is_some_and(|job| job.paused) {
            pause(scene, &id)?;
        }
        match scene.world.jobs.get(&id).map(|job| &job.work) {
            Some(Work::Active { .. }) => complete(scene, &id)?,
            _ => scene.job_is_gone(&id)?,
        }
        scene.look()?;
    }
    for id in scene.down.clone() {
        take(scene, &Step::ExportAdd(id))?;
    }
    verify(scene)?;
    scene.finish()?;
    headers(&scene.world)?;
    Ok(())
}
