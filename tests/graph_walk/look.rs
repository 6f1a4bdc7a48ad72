//! What a client and the machine see of a daemon, and whether it is what it should be.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::Res;
use crate::common::frontend::PATIENCE;
use crate::scene::{Scene, files};
use crate::world::{self, Seen, World};

/// What the daemon holds, besides what the graph says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The nodes, also those without a name.
    pub nodes: Vec<String>,
    /// Descriptors.
    pub descriptors: usize,
    /// Locks on files.
    pub locks: usize,
    /// Files of the images' folder.
    pub files: Vec<String>,
}

/// How long a job may be there when it has done its work.
const ENDING: Duration = Duration::from_secs(5);

impl Scene {
    fn seen(&mut self) -> Res<Seen> {
        let nodes = self.get("query-named-block-nodes", json!({"flat": true}))?;
        let exports = self.get("query-block-exports", json!({}))?;
        let jobs = self.get("query-jobs", json!({}))?;
        let objects = self.get("query-iothreads", json!({}))?;
        let mut seen = Seen::of(&nodes, &exports, &jobs, &objects);
        for id in &self.down {
            if seen.exports.contains_key(id) {
                return Err(format!("export '{id}' is there again").into());
            }
            if let Some(node) = self.world.exports.get(id) {
                seen.put_export(id.clone(), node.clone());
            }
        }
        Ok(seen)
    }

    /// What there is. Several queries are no instant: they are made until nothing changes between them.
    pub fn still(&mut self) -> Res<Seen> {
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.seen()?;
        loop {
            let seen = self.seen()?;
            if seen == before {
                return Ok(seen);
            }
            before = seen;
            if Instant::now() > deadline {
                return Err("the graph never stays as it is".into());
            }
        }
    }

    /// The one of `worlds` that there is.
    pub fn find(&mut self, worlds: &[World]) -> Res<World> {
        self.find_by(worlds, world::find)
    }

    /// The one of the worlds, as a process has left them, that the next one has.
    pub fn find_restarted(&mut self, worlds: &[World]) -> Res<World> {
        self.find_by(worlds, world::find_restarted)
    }

    fn find_by(
        &mut self,
        worlds: &[World],
        find: fn(&[World], &Seen) -> Result<World, String>,
    ) -> Res<World> {
        let deadline = Instant::now() + ENDING;
        loop {
            let seen = self.still()?;
            match find(worlds, &seen) {
                // One that has changed the graph is there for a moment longer.
                Err(_) if !seen.jobs.is_empty() && Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                found => return Ok(found?),
            }
        }
    }

    /// Looks whether there is what there should be, guests are well and no job has failed.
    pub fn look(&mut self) -> Res<()> {
        self.world = self.find(std::slice::from_ref(&self.world.clone()))?;
        let events = self
            .life
            .as_mut()
            .ok_or("no process")?
            .qmp
            .pending_events()?;
        judge(events)?;
        for (id, guest) in &self.guests {
            guest.check().map_err(|e| format!("guest of '{id}': {e}"))?;
        }
        for id in self.world.exports.keys() {
            let fence = PathBuf::from(self.export_socket(id)?).with_extension("sock.fence");
            if is_free(&fence)? != self.down.contains(id) {
                return Err(format!("the fence of export '{id}' is not as it should be").into());
            }
        }
        Ok(())
    }

    /// What the daemon holds now.
    pub fn held(&mut self) -> Res<Held> {
        let nodes = self.get("query-named-block-nodes", json!({"flat": true}))?;
        let nodes = nodes.as_array().into_iter().flatten().map(|node| {
            format!(
                "{} {} {} {} {}",
                node["node-name"], node["drv"], node["file"], node["ro"], node["children"]
            )
        });
        let life = self.life.as_ref().ok_or("no process")?;
        let names = files(&self.images)?;
        let state = self.images.join("state");
        let names = names.iter().filter(|path| !path.starts_with(&state));
        let mut held = Held {
            nodes: nodes.collect(),
            descriptors: life.daemon.descriptors()?,
            locks: locks(life.daemon.pid())?,
            files: names.map(|path| path.display().to_string()).collect(),
        };
        held.files.sort();
        Ok(held)
    }

    /// Waits until the daemon holds what it held before.
    pub fn holds(&mut self, before: &Held) -> Res<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let now = self.held()?;
            if now == *before {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("it holds {now:#?}, and held {before:#?}").into());
            }
            std::thread::yield_now();
        }
    }
}

/// How many locks a process has on files, of its descriptors.
fn locks(pid: u32) -> Res<usize> {
    let mut count = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        count += text
            .lines()
            .filter(|line| line.starts_with("lock:"))
            .count();
    }
    Ok(count)
}

fn is_free(path: &Path) -> Res<bool> {
    use std::os::fd::AsRawFd;

    let file = fs::File::options().read(true).write(true).open(path)?;
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_len = 1;
    // SAFETY: the call reads and writes one flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

/// Fails at an event that tells of an error.
pub fn judge(events: Vec<Value>) -> Res<()> {
    for event in events {
        let name = event["event"].as_str().unwrap_or_default();
        let failed = !event["data"]["error"].is_null();
        if failed || name.ends_with("_ERROR") || name == "BLOCK_IMAGE_CORRUPTED" {
            return Err(format!("an event tells of an error: {event}").into());
        }
    }
    Ok(())
}
