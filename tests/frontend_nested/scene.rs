//! Disks in disks: their files, a daemon that serves one, and a guest that knows what it holds.

use crate::common::Res;
use crate::common::daemon::{Daemon, Program};
use crate::common::frontend::{DISCARD, Frontend, OK, Op, Segment, WRITE_ZEROES};
use crate::common::images::{self, text};
use crate::common::qmp::Qmp;
use crate::common::rng::Rng;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the guest's disk.
pub const SIZE: usize = 1 << 20;
pub const SECTOR: usize = 512;
const SECTORS: u64 = (SIZE / SECTOR) as u64;
/// Bytes of a request at most.
const PIECE: usize = 64 << 10;
/// Where a window begins, and what lies behind it.
const FRONT: usize = 37 * SECTOR;
const BACK: usize = 2 * SECTOR;
/// Room that an image has in the disk that it is in.
const ROOM: usize = 2 << 20;

/// What a disk is laid out in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Image,
    Raw,
    Window,
}

use Part::{Image, Raw, Window};

/// Disks in disks, the guest's first; the last one is in a file.
pub const STACKS: &[&[Part]] = &[
    &[Image, Image],
    &[Raw, Image],
    &[Window, Image, Raw],
    &[Image, Window, Image],
    &[Raw, Image, Raw, Image],
];

/// The files of a stack.
pub struct Scene {
    pub dir: tempfile::TempDir,
    pub stack: &'static [Part],
    /// What all is in.
    pub file: PathBuf,
    /// What the guest's image is over.
    pub base: Option<PathBuf>,
    /// The nodes, each within the one over it. The guest's is `n0`.
    pub node: Value,
    /// What the guest's disk holds.
    pub model: Model,
    /// Whether the guest's reads are copied up.
    pub copies: bool,
    /// More words for the command line.
    pub words: Vec<String>,
}

impl Scene {
    /// A disk with data in its second half, in `folder`.
    pub fn new(stack: &'static [Part], over_base: bool, folder: &Path) -> Res<Self> {
        let dir = tempfile::tempdir_in(folder)?;
        let mut disk = vec![0; SIZE];
        for (number, piece) in disk.chunks_mut(8192).enumerate().skip(64) {
            piece.fill(number as u8 + 1);
        }
        let base = over_base.then(|| dir.path().join("base"));
        if let Some(base) = &base {
            fs::write(base, &disk)?;
        }
        let mut bytes = disk.clone();
        let mut parts = Vec::new();
        for (depth, part) in stack.iter().enumerate() {
            let len = bytes.len();
            match part {
                Raw => {}
                Window => {
                    let mut all = vec![0xee; FRONT + len + BACK];
                    all.get_mut(FRONT..FRONT + len)
                        .ok_or("a window")?
                        .copy_from_slice(&bytes);
                    bytes = all;
                }
                Image => {
                    let base = base.as_deref().filter(|_| depth == 0);
                    bytes = image_of(dir.path(), &bytes, base)?;
                    if depth + 1 < stack.len() {
                        bytes.resize((bytes.len() + ROOM).next_multiple_of(PIECE), 0);
                    }
                }
            }
            parts.push((*part, len));
        }
        let file = dir.path().join("file");
        fs::write(&file, &bytes)?;
        let mut node = json!({"driver": "file", "node-name": "f", "filename": text(&file)?,
            "discard": "unmap"});
        for (depth, (part, len)) in parts.iter().enumerate().rev() {
            let driver = if *part == Image { "qcow2" } else { "raw" };
            let name = format!("n{depth}");
            node = json!({"driver": driver, "node-name": name, "discard": "unmap", "file": node});
            if *part == Window {
                node["offset"] = json!(FRONT);
                node["size"] = json!(len);
            }
        }
        if let Some(base) = &base {
            node["backing"] = json!({"driver": "raw", "node-name": "base", "file":
                {"driver": "file", "node-name": "base-file", "filename": text(base)?}});
        }
        Ok(Self {
            stack,
            file,
            base,
            node,
            model: Model {
                bytes: disk,
                discarded: vec![false; SIZE / SECTOR],
            },
            copies: false,
            words: Vec::new(),
            dir,
        })
    }

    /// As the failure of a test is told.
    pub fn what(&self) -> String {
        let base = self.base.is_some();
        format!("{:?}, over a base: {base}", self.stack)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn args(&self) -> Res<Vec<String>> {
        let mut args = vec!["--blockdev".to_owned(), self.node.to_string()];
        let mut top = "n0";
        if self.copies {
            let filter = json!({"driver": "copy-on-read", "node-name": "copies", "file": "n0"});
            args.extend(["--blockdev".to_owned(), filter.to_string()]);
            top = "copies";
        }
        args.extend([
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=disk,node-name={top},writable=on,addr.type=unix,addr.path={}",
                text(&self.socket("vhost"))?
            ),
            "--chardev".to_owned(),
            format!(
                "socket,id=c,path={},server=on,wait=off",
                text(&self.socket("qmp"))?
            ),
            "--monitor".to_owned(),
            "chardev=c".to_owned(),
        ]);
        args.extend(self.words.iter().cloned());
        Ok(args)
    }

    pub fn start(&self) -> Res<Life> {
        self.start_program(&Program::under_test())
    }

    pub fn start_program(&self, program: &Program) -> Res<Life> {
        for name in ["vhost", "qmp"] {
            match fs::remove_file(self.socket(name)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
        let mut daemon = Daemon::start(program, &self.args()?, self.dir.path(), None)?;
        let guest = daemon.connect(&self.socket("vhost"), 1, 64, PIECE)?;
        let qmp = daemon.qmp(&self.socket("qmp"))?;
        Ok(Life { daemon, guest, qmp })
    }

    /// The node as QEMU's tools take it, from `depth` on down.
    fn for_tools(&self, depth: usize, alone: bool) -> Res<String> {
        let mut node = &self.node;
        for _ in 0..depth {
            node = &node["file"];
        }
        let mut node = without_names(node);
        if alone {
            node["backing"] = Value::Null;
        }
        Ok(format!("json:{node}"))
    }

    /// What QEMU reads of the disk; `alone`: without the base.
    pub fn by_qemu(&self, alone: bool) -> Res<Vec<u8>> {
        let out = self.dir.path().join("out");
        let node = self.for_tools(0, alone)?;
        images::qemu_img(&["convert", "-O", "raw", &node, text(&out)?])?;
        Ok(fs::read(out)?)
    }

    /// Has QEMU check all images. `leaks`: clusters may have been lost to a kill.
    pub fn check(&self, leaks: bool) -> Res<()> {
        let images = self.stack.iter().enumerate();
        for (depth, _) in images.filter(|(_, part)| **part == Image) {
            let node = self.for_tools(depth, true)?;
            let output = images::run("qemu-img", &["check", &node])?;
            let code = output.status.code();
            let fine = code == Some(0) || (leaks && code == Some(3));
            let found = String::from_utf8_lossy(&output.stdout);
            assert!(fine, "{}: image {depth}: {found}", self.what());
        }
        Ok(())
    }

    /// Judges the files of a daemon that has ended well.
    pub fn judge(&self) -> Res<()> {
        let seen = self.by_qemu(false)?;
        self.model.compare(0, &seen, &self.what());
        self.check(false)
    }
}

/// The bytes of an image that holds `disk`; over `base` it has nothing of its own.
fn image_of(dir: &Path, disk: &[u8], base: Option<&Path>) -> Res<Vec<u8>> {
    let (raw, image) = (dir.join("raw"), dir.join("image"));
    match base {
        Some(_) => {
            let size = disk.len().to_string();
            let args = ["create", "-q", "-f", "qcow2", text(&image)?, &size];
            images::qemu_img(&args)?;
        }
        None => {
            fs::write(&raw, disk)?;
            let args = ["convert", "-f", "raw", "-O", "qcow2"];
            images::qemu_img(&[&args[..], &[text(&raw)?, text(&image)?]].concat())?;
        }
    }
    Ok(fs::read(image)?)
}

fn without_names(node: &Value) -> Value {
    match node {
        Value::Object(map) => map
            .iter()
            .filter(|(key, _)| *key != "node-name")
            .map(|(key, value)| (key.clone(), without_names(value)))
            .collect(),
        other => other.clone(),
    }
}

/// What a disk holds. A discarded sector holds that or zeros.
#[derive(Clone)]
pub struct Model {
    pub bytes: Vec<u8>,
    discarded: Vec<bool>,
}

impl Model {
    pub fn compare(&self, start: usize, seen: &[u8], what: &str) {
        for (sector, seen) in (start..).zip(seen.chunks(SECTOR)) {
            let bytes = &self.bytes[sector * SECTOR..][..SECTOR];
            let is_zero = self.discarded[sector] && seen.iter().all(|&byte| byte == 0);
            assert!(
                seen == bytes || is_zero,
                "{what}: sector {sector} (discarded: {}): {:?} for {:?}",
                self.discarded[sector],
                &seen[..4],
                &bytes[..4]
            );
        }
    }

    fn set(&mut self, sector: u64, count: usize, value: u8, discarded: bool) {
        let start = sector as usize;
        if !discarded {
            self.bytes[start * SECTOR..(start + count) * SECTOR].fill(value);
        }
        self.discarded[start..start + count].fill(discarded);
    }
}

/// A daemon, its guest and its operator.
pub struct Life {
    pub daemon: Daemon,
    pub guest: Frontend,
    pub qmp: Qmp,
}

impl Life {
    pub fn run(&mut self, op: &Op) -> Res<u8> {
        self.guest
            .queues
            .first_mut()
            .ok_or("the guest has a queue")?
            .run(op)
    }

    pub fn write(&mut self, model: &mut Model, sector: u64, count: usize, value: u8) -> Res<()> {
        let len = count * SECTOR;
        self.guest.memory.write(0, &vec![value; len]);
        assert_eq!(self.run(&Op::write(sector, &[(0, len)]))?, OK);
        model.set(sector, count, value, false);
        Ok(())
    }

    pub fn read(&mut self, sector: u64, count: usize) -> Res<Vec<u8>> {
        let mut bytes = vec![0; count * SECTOR];
        assert_eq!(self.run(&Op::read(sector, &[(0, bytes.len())]))?, OK);
        self.guest.memory.read(0, &mut bytes);
        Ok(bytes)
    }

    pub fn flush(&mut self) -> Res<()> {
        assert_eq!(self.run(&Op::flush())?, OK);
        Ok(())
    }

    /// Reads and compares all of the disk.
    pub fn read_all(&mut self, model: &Model, what: &str) -> Res<()> {
        for start in (0..SIZE).step_by(PIECE) {
            let sector = start / SECTOR;
            let seen = self.read(sector as u64, PIECE / SECTOR)?;
            model.compare(sector, &seen, what);
        }
        Ok(())
    }

    /// Requests of all kinds at random, with a flush behind the last one.
    pub fn work(&mut self, model: &mut Model, rng: &mut Rng, what: &str) -> Res<()> {
        for _ in 0..80 {
            let sector = rng.below(SECTORS);
            let count = rng.between(1, (PIECE / SECTOR) as u64);
            let count = count.min(SECTORS - sector);
            let segment = |flags| Segment {
                sector,
                count: count as u32,
                flags,
            };
            match rng.below(8) {
                0..=2 => self.write(model, sector, count as usize, rng.next() as u8)?,
                3 | 4 => {
                    let seen = self.read(sector, count as usize)?;
                    model.compare(sector as usize, &seen, what);
                }
                5 => {
                    let segment = [segment(rng.below(2) as u32)];
                    assert_eq!(self.run(&Op::ranges(WRITE_ZEROES, &segment))?, OK);
                    model.set(sector, count as usize, 0, false);
                }
                6 => {
                    assert_eq!(self.run(&Op::ranges(DISCARD, &[segment(0)]))?, OK);
                    model.set(sector, count as usize, 0, true);
                }
                _ => self.flush()?,
            }
        }
        self.flush()
    }

    /// Ends it as an administrator does.
    pub fn stop(self) -> Res<()> {
        drop((self.guest, self.qmp));
        self.daemon.stop()
    }

    /// Kills it; the locks on its file go, too.
    pub fn kill(mut self, scene: &Scene) -> Res<()> {
        self.daemon.kill()?;
        images::wait_unlocked(&scene.file)
    }
}
