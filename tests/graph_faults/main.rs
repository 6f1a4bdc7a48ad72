//! Every change of the graph, again and again, each time with another one of its operations on storage
//! failing: opening, making, reading, writing, making stable, making longer, renaming, removing.
//!
//! The daemon is the real one, its files are on a file system in user space that fails the operation
//! that it is told to. One process meets all the failures of a command that refuses because of them, so
//! that what one leaves behind meets the next.
//!
//! What would be caught: a command that fails and has changed something: what clients are told, a
//! descriptor or a lock that is kept, a thread, a file that it has made, a header, the record of the
//! state; a command that succeeds though it has not done its work; a guest that notices; bytes that are
//! lost or leaked then.

#[path = "../common/mod.rs"]
mod common;
#[path = "../graph_walk/cut_fs.rs"]
#[allow(dead_code)]
mod cut_fs;
#[path = "../graph_walk/machine.rs"]
#[allow(dead_code)]
mod machine;

mod cases;
mod look;
mod scene;

use common::Res;
use common::skips::skip;
use scene::Scene;
use serde_json::Value;

/// What is done, and what its end looks like.
pub struct Case {
    /// Commands before, all of which succeed.
    pub before: Vec<(&'static str, Value)>,
    /// The command whose operations fail.
    pub command: &'static str,
    /// Its arguments.
    pub arguments: Value,
    /// It begins a job of this name, whose end is waited for.
    pub job: Option<&'static str>,
}

/// Operations of one command, at most: more are a command that never succeeds.
const MOST: u64 = 2000;

/// Fails each operation of a command in turn, until there is none left that could fail.
fn fail_each(make: impl Fn(&Scene) -> Res<Case>) -> Res<()> {
    let mut failing = 0;
    let mut refusals = 0;
    loop {
        let Some(mut scene) = Scene::new()? else {
            return Ok(skip("there are no file systems in user space")?);
        };
        let case = make(&scene)?;
        for (command, arguments) in &case.before {
            scene.qmp.execute(command, arguments.clone())??;
        }
        scene.guest_goes_on()?;
        let mut before = scene.look()?;
        loop {
            failing += 1;
            assert!(failing < MOST, "{} never succeeds", case.command);
            scene.faults.arm(failing);
            let outcome = scene.run(&case)?;
            let failed = scene.faults.disarm();
            let at = || {
                let failed = failed.as_deref().unwrap_or("nothing");
                format!("{}, operation {failing} ({failed})", case.command)
            };
            let done = outcome.is_ok() || outcome.as_ref().is_err_and(|text| has_stayed(text));
            match outcome {
                Err(text) if failed.is_none() => {
                    return Err(format!("{}: {text}", at()).into());
                }
                _ if done => {
                    scene.clear_sync_errors()?;
                    scene.end().map_err(|error| format!("{}: {error}", at()))?;
                    if failed.is_none() {
                        println!("{}: {refusals} of {failing} refused", case.command);
                        assert!(refusals > 0, "nothing of {} could fail", case.command);
                        return Ok(());
                    }
                    break;
                }
                _ => {
                    scene.clear_sync_errors()?;
                    // A header that may be on the disk is put right by the next flush.
                    scene.guest_goes_on()?;
                    if refusals == 0 {
                        // What is made once and kept is made by the first.
                        before.descriptors = scene.look()?.descriptors;
                    }
                    let seen = scene.is_as(&before);
                    seen.map_err(|error| format!("{}: {error}", at()))?;
                    refusals += 1;
                }
            }
        }
    }
}

/// Whether a command that has failed says that what it was asked for is there all the same: what was
/// flushed last could not be.
fn has_stayed(text: &str) -> bool {
    ["was taken, and stays", "was deleted, but"]
        .iter()
        .any(|words| text.contains(words))
}
