//! A daemon, its images, its guests, and what is known of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::daemon::{Daemon, Program};
use crate::common::frontend::PATIENCE;
use crate::common::qmp::{Qmp, Refusal};
use crate::common::rng::Rng;
use crate::common::{Res, images};
use crate::cut_fs::CutFs;
use crate::guest::Guest;
use crate::world::World;

/// Bytes of a disk at first.
pub const DISK: u64 = 4 << 20;

/// A running daemon.
pub struct Life {
    /// The process.
    pub daemon: Daemon,
    /// A client.
    pub qmp: Qmp,
}

/// All of it.
pub struct Scene {
    /// What is served, by export.
    pub guests: Vec<(String, Guest)>,
    /// The process, while there is one.
    pub life: Option<Life>,
    /// What there should be.
    pub world: World,
    /// Exports of which guests are cut off.
    pub down: std::collections::BTreeSet<String>,
    /// Random choices.
    pub rng: Rng,
    /// Images and jobs made so far.
    pub made: u64,
    /// A process was killed, so that clusters may have leaked.
    pub killed: bool,
    /// Where the images are.
    pub images: PathBuf,
    /// The command line.
    pub args: Vec<String>,
    /// The daemon.
    pub program: Program,
    /// The file system whose power fails, if there is one.
    pub cut: Option<CutFs>,
    /// The folder of the journals.
    pub journals: TempDir,
    /// Everything else.
    pub dir: TempDir,
}

impl Scene {
    /// The path of a file in the images' folder.
    pub fn file(&self, name: &str) -> Res<String> {
        Ok(images::text(&self.images.join(name))?.to_owned())
    }

    /// The path of a socket.
    pub fn socket(&self, name: &str) -> Res<String> {
        Ok(images::text(&self.dir.path().join(name))?.to_owned())
    }

    /// The socket of an export.
    pub fn export_socket(&self, id: &str) -> Res<String> {
        self.socket(&format!("{id}.sock"))
    }

    /// A name that nothing has had.
    pub fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}{}", self.made)
    }

    /// The guest of an export.
    pub fn guest(&self, id: &str) -> Res<&Guest> {
        let mut guests = self.guests.iter();
        let found = guests.find(|(of, _)| of == id);
        Ok(&found.ok_or("no such guest")?.1)
    }

    /// The power can fail.
    pub fn has_power_cuts(&self) -> bool {
        self.cut.is_some()
    }

    /// Runs a command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Res<Result<Value, Refusal>> {
        let life = self.life.as_mut().ok_or("no process")?;
        life.qmp.execute(command, arguments)
    }

    /// Runs a command that must work.
    pub fn get(&mut self, command: &str, arguments: Value) -> Res<Value> {
        let answer = self.execute(command, arguments.clone())?;
        answer.map_err(|e| format!("{command} {arguments}: {e}").into())
    }

    /// Waits until the job is gone.
    pub fn job_is_gone(&mut self, id: &str) -> Res<()> {
        self.until(&format!("job '{id}' does not end"), |scene| {
            let jobs = scene.get("query-jobs", json!({}))?;
            let mut jobs = jobs.as_array().into_iter().flatten();
            Ok(!jobs.any(|job| job["id"] == id))
        })
    }

    /// The status of a job.
    pub fn job_status(&mut self, id: &str) -> Res<Option<String>> {
        let jobs = self.get("query-jobs", json!({}))?;
        let mut jobs = jobs.as_array().into_iter().flatten();
        let job = jobs.find(|job| job["id"] == id);
        Ok(job.and_then(|job| Some(job["status"].as_str()?.to_owned())))
    }

    /// Waits for something, and says what did not happen.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> Res<bool>) -> Res<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self)? {
            if Instant::now() > deadline {
                return Err(what.into());
            }
            // A poll of a condition with a deadline.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// What the daemon has written to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }
}

/// Options of images.
pub const CLUSTERS: [&str; 3] = ["cluster_size=64k", "cluster_size=4k", "cluster_size=16k"];

/// Makes a file and its name stable.
pub fn make_stable(path: &Path) -> Res<()> {
    fs::File::open(path)?.sync_all()?;
    let folder = path.parent().ok_or("a file in no folder")?;
    Ok(fs::File::open(folder)?.sync_all()?)
}

/// All files in a folder and those in it.
pub fn files(folder: &Path) -> Res<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}
