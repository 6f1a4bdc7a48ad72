//! A daemon, its images, its guests, and what is known of them.

use std::fs;
use std::os::unix::fs::FileExt;
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
use crate::world::{self, Node, Seen, World};

/// Bytes of a disk.
pub const DISK: u64 = 4 << 20;
/// The header extension in which an image names its journal, and where the boot's number is in it.
const JOURNAL: u32 = 0x5354_4a4c;
const BOOT: u64 = 24;

/// A running daemon.
pub struct Life {
    /// The process.
    pub daemon: Daemon,
    /// A client.
    pub qmp: Qmp,
}

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
    args: Vec<String>,
    program: Program,
    cut: Option<CutFs>,
    journals: TempDir,
    dir: TempDir,
}

impl Scene {
    /// So many disks, each an image over another one. With `power` the power may fail.
    pub fn new(seed: u64, disks: usize, power: bool, program: Program) -> Res<Self> {
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir()?;
        let journals = tempfile::tempdir_in("/dev/shm")?;
        let images = dir.path().join("images");
        fs::create_dir(&images)?;
        let cut = match power {
            true => CutFs::mount(&images),
            false => None,
        };
        fs::create_dir(images.join("state"))?;
        let mut scene = Scene {
            guests: Vec::new(),
            life: None,
            world: World::default(),
            down: std::collections::BTreeSet::new(),
            rng: Rng::new(rng.next()),
            made: 0,
            killed: false,
            images,
            args: Vec::new(),
            program,
            cut,
            journals,
            dir,
        };
        scene.words("--state", "state")?;
        scene
            .args
            .extend(["--state-name", "walk"].map(str::to_owned));
        let folder = images::text(scene.journals.path())?.to_owned();
        scene.args.extend(["--journal".to_owned(), folder]);
        let socket = scene.socket("qmp")?;
        let chardev = format!("socket,id=c,path={socket},server=on,wait=off");
        scene.args.extend(["--chardev".to_owned(), chardev]);
        scene.args.extend(["--monitor", "c"].map(str::to_owned));
        for number in 0..disks {
            scene.add_disk(number)?;
        }
        scene.stable()?;
        scene.start()?;
        scene.connect(false)?;
        Ok(scene)
    }

    fn words(&mut self, option: &str, file: &str) -> Res<()> {
        let file = self.file(file)?;
        self.args.extend([option.to_owned(), file]);
        Ok(())
    }

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

    fn add_disk(&mut self, number: usize) -> Res<()> {
        let layers = 2 + number % 2;
        let owners = self.rng.clone();
        let mut below: Option<(String, String)> = None;
        let plan = images::ChainPlan {
            sectors: DISK / 512,
            layers: [
                CLUSTERS[0],
                CLUSTERS[(number + 1) % CLUSTERS.len()],
                CLUSTERS[0],
            ]
            .into_iter()
            .take(layers)
            .collect(),
            pieces: 12,
        };
        let folder = self.images.join(format!("disk{number}"));
        fs::create_dir(&folder)?;
        let chain = images::make_chain(&folder, &plan, &mut owners.clone())?;
        self.rng.next();
        for (path, _) in chain.layers.iter().rev() {
            let (name, file) = (self.name("n"), images::text(path)?.to_owned());
            let backing = below.as_ref().map(|(name, _)| name.as_str());
            let options = world::options(&name, &file, backing);
            self.args
                .extend(["--blockdev".to_owned(), options.to_string()]);
            let node = Node {
                file: file.clone(),
                backing: backing.map(str::to_owned),
                header: below.as_ref().map(|(_, file)| file.clone()),
                empty: false,
                left: false,
                covered: false,
                by_snapshot: false,
            };
            self.world.nodes.insert(name.clone(), node);
            below = Some((name, file));
        }
        let id = format!("e{number}");
        let (top, _) = below.ok_or("no layers")?;
        let socket = self.export_socket(&id)?;
        let export = self.export_options(&id, &top)?;
        self.args
            .extend(["--export".to_owned(), export.to_string()]);
        self.world.exports.insert(id.clone(), top);
        let rng = Rng::new(self.rng.next());
        let guest = Guest::new(socket.into(), &chain.owners, rng);
        self.guests.push((id, guest));
        Ok(())
    }

    /// The options of an export.
    pub fn export_options(&self, id: &str, node: &str) -> Res<Value> {
        let addr = json!({"type": "unix", "path": self.export_socket(id)?});
        Ok(
            json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": addr,
            "writable": true}),
        )
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

    /// Makes all files stable that the tests have made before the first start.
    fn stable(&self) -> Res<()> {
        for path in files(&self.images)? {
            make_stable(&path)?;
        }
        Ok(fs::File::open(&self.images)?.sync_all()?)
    }

    fn start(&mut self) -> Res<()> {
        let _ = fs::remove_file(self.dir.path().join("qmp"));
        let mut daemon = Daemon::start(&self.program, &self.args, self.dir.path(), None)?;
        let qmp = daemon.qmp(&self.dir.path().join("qmp"))?;
        self.life = Some(Life { daemon, qmp });
        Ok(())
    }

    /// Connects the guests of all exports that there are. After a power cut they look at their disks.
    pub fn connect(&self, after_cut: bool) -> Res<()> {
        for (id, guest) in &self.guests {
            if !self.down.contains(id) {
                let connected = guest.connect(after_cut);
                connected.map_err(|e| format!("guest of '{id}', power cut: {after_cut}: {e}"))?;
            }
        }
        Ok(())
    }

    /// The process has been killed, or is to be now; the next one starts. `worlds` are those that it may find.
    pub fn restart(&mut self, worlds: &[World], cut: bool) -> Res<()> {
        let Some(mut life) = self.life.take() else {
            return Err("no process".into());
        };
        life.daemon.kill()?;
        drop(life);
        self.killed = true;
        for (id, guest) in &self.guests {
            guest.lose().map_err(|e| format!("guest of '{id}': {e}"))?;
        }
        for path in self.image_files() {
            images::wait_unlocked(&path)?;
        }
        if cut {
            for (_, guest) in &self.guests {
                guest.reboot()?;
            }
            self.power_cut()?;
        }
        self.start()?;
        self.world = self.find_restarted(worlds)?;
        self.connect(cut)
    }

    /// The process ends in order for good. `qemu-img` reads what guests have read.
    pub fn finish(&mut self) -> Res<()> {
        let life = self.life.take().ok_or("no process")?;
        for (_, guest) in &self.guests {
            guest.leave()?;
        }
        life.daemon.stop()?;
        for path in self.image_files() {
            let leaks = images::check(&path)?;
            if leaks && !self.killed {
                return Err(format!("{}: clusters have leaked", path.display()).into());
            }
        }
        for (id, guest) in &self.guests {
            let top = self.world.exports.get(id).ok_or("no such export")?;
            let node = self.world.nodes.get(top).ok_or("no such node")?;
            // Files, since headers name them: the nodes may have been put together otherwise.
            if self.world.is_as_headers_say(top) {
                let scratch = self.dir.path().join("scratch");
                let found = images::read_owners(node.file.as_ref(), "qcow2", &scratch)?;
                guest
                    .compare(found)
                    .map_err(|e| format!("'{id}' at the end: {e}"))?;
            }
        }
        Ok(())
    }

    fn power_cut(&mut self) -> Res<()> {
        let cut = self.cut.as_ref().ok_or("the power cannot fail")?;
        cut.cut(&mut self.rng);
        for entry in fs::read_dir(self.journals.path())? {
            fs::remove_file(entry?.path())?;
        }
        let state = self.images.join("state");
        let all = files(&self.images)?.into_iter();
        for path in all.filter(|path| !path.starts_with(&state)) {
            boot_anew(&path, self.rng.next())?;
        }
        Ok(())
    }

    /// A process that ends in order, and the next one.
    pub fn stop_and_start(&mut self) -> Res<()> {
        let life = self.life.take().ok_or("no process")?;
        life.daemon.stop()?;
        for (id, guest) in &self.guests {
            guest.lose().map_err(|e| format!("guest of '{id}': {e}"))?;
        }
        for path in self.image_files() {
            images::check(&path)?;
        }
        self.start()?;
        let world = self.world.clone();
        self.world = self.find_restarted(&[world])?;
        self.connect(false)
    }

    /// The images of all nodes. There may be others, which killed commands have begun to make.
    fn image_files(&self) -> Vec<PathBuf> {
        let nodes = self.world.nodes.values();
        nodes.map(|node| PathBuf::from(&node.file)).collect()
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
                seen.exports.insert(id.clone(), node.clone());
            }
        }
        Ok(seen)
    }

    /// What there is. Several queries are no instant: they are made until nothing changes between them.
    fn still(&mut self) -> Res<Seen> {
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
        let seen = self.still()?;
        Ok(world::find(worlds, &seen)?)
    }

    /// The one of the worlds, as a process has left them, that the next one has.
    pub fn find_restarted(&mut self, worlds: &[World]) -> Res<World> {
        let seen = self.still()?;
        Ok(world::find_restarted(worlds, &seen)?)
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
        for event in events {
            let name = event["event"].as_str().unwrap_or_default();
            let failed = !event["data"]["error"].is_null();
            if failed || name.ends_with("_ERROR") {
                return Err(format!("an event tells of an error: {event}").into());
            }
        }
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

fn files(folder: &Path) -> Res<Vec<PathBuf>> {
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

/// Makes an image's journal one of another boot.
fn boot_anew(path: &Path, boot: u64) -> Res<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let word = |at: u64| -> Res<u32> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_be_bytes(bytes))
    };
    if word(0).unwrap_or(0) != 0x5146_49fb {
        return Ok(());
    }
    let mut at = u64::from(word(100)?);
    loop {
        let (kind, len) = (word(at)?, word(at + 4)?);
        match kind {
            0 => return Ok(()),
            JOURNAL => break,
            _ => at += 8 + u64::from(len).next_multiple_of(8),
        }
    }
    file.write_all_at(&boot.to_le_bytes(), at + 8 + BOOT)?;
    Ok(file.sync_all()?)
}
