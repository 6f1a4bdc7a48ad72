//! A daemon with a disk of three layers, on storage that fails on demand, and a guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Case;
use crate::common::Res;
use crate::common::daemon::{Daemon, Program};
use crate::common::frontend::{Frontend, OK, Op, PATIENCE};
use crate::common::images;
use crate::common::qmp::Qmp;
use crate::common::stamp::SECTOR;
use crate::cut_fs::{CutFs, Faults};
use crate::look::Look;

/// Bytes of a disk.
pub const DISK: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Blocks that the guest has written.
const WRITTEN: [u64; 3] = [0, 17, 200];

/// A daemon, its guest, and its files.
pub struct Scene {
    guest: Frontend,
    /// The control socket.
    pub qmp: Qmp,
    daemon: Daemon,
    /// What fails.
    pub faults: Arc<Faults>,
    written: u8,
    _fs: CutFs,
    images: PathBuf,
    dir: TempDir,
}

impl Scene {
    /// Layers `base`, `mid` and `top`, served by the export `disk`, and images beside them. `None`:
    /// the machine has no file systems in user space.
    pub fn new() -> Res<Option<Self>> {
        let dir = tempfile::tempdir()?;
        let images = dir.path().join("images");
        std::fs::create_dir(&images)?;
        let Some(fs) = CutFs::mount(&images) else {
            return Ok(None);
        };
        std::fs::create_dir(images.join("state"))?;
        let at = |name: &str| images.join(name);
        let over = |name: &str, below: Option<&str>| {
            let below = below.map(|below| (at(below), "qcow2"));
            let below = below
                .as_ref()
                .map(|(path, format)| (path.as_path(), *format));
            images::create(&at(name), DISK, "compat=1.1", below)
        };
        over("base", None)?;
        over("mid", Some("base"))?;
        over("top", Some("mid"))?;
        over("new", Some("top"))?;
        over("other", None)?;
        std::fs::File::create(at("raw"))?.set_len(DISK)?;
        for (layer, byte) in [("base", 1), ("mid", 2), ("top", 3)] {
            let write = format!("write -q -P {byte} {} 64k", (byte * 128) << 10);
            let file = at(layer);
            images::qemu_io(&["-f", "qcow2", "-c", &write, images::text(&file)?])?;
        }
        let mut args = Vec::new();
        let mut word = |option: &str, value: String| args.extend([option.to_owned(), value]);
        word("--state", images::text(&at("state"))?.to_owned());
        word("--state-name", "vm".to_owned());
        let socket =
            |name: &str| -> Res<String> { Ok(images::text(&dir.path().join(name))?.to_owned()) };
        let chardev = format!("socket,id=c,path={},server=on,wait=off", socket("qmp")?);
        word("--chardev", chardev);
        word("--monitor", "c".to_owned());
        for (name, below) in [("base", None), ("mid", Some("base")), ("top", Some("mid"))] {
            let is_lower = name != "top";
            let node = json!({"driver": "qcow2", "node-name": name, "backing": below,
                "read-only": is_lower, "file": {"driver": "file", "read-only": is_lower,
                "auto-read-only": is_lower, "filename": images::text(&at(name))?}});
            word("--blockdev", node.to_string());
        }
        let export = json!({"type": "vhost-user-blk", "id": "disk", "node-name": "top",
            "writable": true, "addr": {"type": "unix", "path": socket("disk.sock")?}});
        word("--export", export.to_string());
        let mut daemon = Daemon::start(&Program::under_test(), &args, dir.path(), None)?;
        let mut qmp = daemon.qmp(&dir.path().join("qmp"))?;
        // So that there is a record.
        qmp.execute("object-add", json!({"qom-type": "iothread", "id": "first"}))??;
        let guest = daemon.connect(&dir.path().join("disk.sock"), 1, 64, BLOCK)?;
        Ok(Some(Scene {
            guest,
            qmp,
            daemon,
            faults: fs.faults(),
            written: 0,
            _fs: fs,
            images,
            dir,
        }))
    }

    /// The path of a file.
    pub fn file(&self, name: &str) -> Res<String> {
        Ok(images::text(&self.images.join(name))?.to_owned())
    }

    /// The path of a socket.
    pub fn socket(&self, name: &str) -> Res<String> {
        Ok(images::text(&self.dir.path().join(name))?.to_owned())
    }

    /// Runs the command, and its job to the end. The inner error: it, or its job, has failed.
    pub fn run(&mut self, case: &Case) -> Res<Result<(), String>> {
        if let Err(refusal) = self.qmp.execute(case.command, case.arguments.clone())? {
            return Ok(Err(refusal.desc));
        }
        let Some(job) = case.job else {
            return Ok(Ok(()));
        };
        let mut error = None;
        loop {
            let event = self.qmp.event(|_| true)?;
            let data = &event["data"];
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_READY" => {
                    let complete = json!({"device": job});
                    // Where it is refused since it could not be recorded, it is not the next time.
                    for _ in 0..2 {
                        if self
                            .qmp
                            .execute("block-job-complete", complete.clone())?
                            .is_ok()
                        {
                            break;
                        }
                    }
                }
                "BLOCK_JOB_COMPLETED" => error = data["error"].as_str().map(str::to_owned),
                "JOB_STATUS_CHANGE" if data["status"] == "concluded" => {
                    let jobs = self.qmp.execute("query-jobs", json!({}))??;
                    let mut jobs = jobs.as_array().into_iter().flatten();
                    if let Some(listed) = jobs.find(|listed| listed["id"] == job) {
                        error = error.or(listed["error"].as_str().map(str::to_owned));
                        // Other jobs go by themselves, at once.
                        let _ = self.qmp.execute("job-dismiss", json!({"id": job}))?;
                    }
                }
                "JOB_STATUS_CHANGE" if data["status"] == "null" => break,
                _ => {}
            }
        }
        Ok(error.map_or(Ok(()), Err))
    }

    /// The guest writes, and has it made stable.
    pub fn guest_goes_on(&mut self) -> Res<()> {
        self.written += 1;
        for block in WRITTEN {
            self.guest.memory.write(0, &[self.written; BLOCK]);
            let op = [(0, BLOCK)];
            let op = Op::write(block * (BLOCK / SECTOR) as u64, &op);
            self.done("a write", &op)?;
        }
        self.done("a flush", &Op::flush())
    }

    fn done(&mut self, what: &str, op: &Op) -> Res<()> {
        let queue = self.guest.queues.first_mut().ok_or("no queue")?;
        match queue.run(op)? {
            OK => Ok(()),
            status => Err(format!("{what} of the guest ends with status {status}").into()),
        }
    }

    /// Reads what the guest has written, and what is in the layers.
    fn guest_reads(&mut self) -> Res<()> {
        let layers = [1, 2, 3].map(|byte| (u64::from(byte) * (128 << 10) / BLOCK as u64, byte));
        let own = WRITTEN.map(|block| (block, self.written));
        for (block, byte) in own.into_iter().chain(layers) {
            let op = [(0, BLOCK)];
            let op = Op::read(block * (BLOCK / SECTOR) as u64, &op);
            self.done("a read", &op)?;
            let mut bytes = [0; BLOCK];
            self.guest.memory.read(0, &mut bytes);
            if bytes != [byte; BLOCK] {
                return Err(format!("block {block} has no longer {byte}, but {}", bytes[0]).into());
            }
        }
        Ok(())
    }

    /// An administrator has looked at the files of which a flush has failed.
    pub fn clear_sync_errors(&mut self) -> Res<()> {
        let nodes = self.qmp.execute("query-named-block-nodes", json!({}))??;
        for node in nodes.as_array().into_iter().flatten() {
            // Refused where there is none.
            let arguments = json!({"device": node["node-name"]});
            let _ = self.qmp.execute("x-clear-sync-error", arguments)?;
        }
        Ok(())
    }

    /// What there is to be seen.
    pub fn look(&mut self) -> Res<Look> {
        Look::take(&mut self.qmp, self.daemon.pid(), &self.images)
    }

    /// Whether all is as it was, as soon as threads that have ended are gone, and the guest goes on.
    pub fn is_as(&mut self, before: &Look) -> Res<()> {
        let deadline = Instant::now() + PATIENCE / 4;
        while let Some(difference) = before.difference(&self.look()?) {
            if Instant::now() > deadline {
                return Err(format!("{difference}\n{}", self.daemon.log()).into());
            }
            std::thread::yield_now();
        }
        self.guest_reads()?;
        self.guest_goes_on()
    }

    /// The end of a daemon that has done the command: what was written is there, and no image has an
    /// error or a leak.
    pub fn end(mut self) -> Res<()> {
        self.guest_reads()?;
        self.guest_goes_on()?;
        self.guest_reads()?;
        let Scene {
            guest,
            qmp,
            daemon,
            images,
            _fs,
            dir,
            ..
        } = self;
        drop((guest, qmp));
        daemon.stop()?;
        for entry in std::fs::read_dir(&images)? {
            let path = entry?.path();
            if is_qcow2(&path)? && images::check(&path)? {
                return Err(format!("{}: clusters are lost", path.display()).into());
            }
        }
        drop((_fs, dir));
        Ok(())
    }
}

fn is_qcow2(path: &Path) -> Res<bool> {
    Ok(path.is_file() && std::fs::read(path)?.starts_with(b"QFI\xfb"))
}

/// The options of a node in place, for its file.
pub fn file(path: &str) -> Value {
    json!({"driver": "file", "filename": path})
}
