//! A daemon with one disk, and its guest.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::daemon::{Daemon, Program, Setup};
use crate::common::frontend::{Frontend, OK, Op};
use crate::common::qmp::Qmp;
use crate::common::{Res, images};

pub const MIB: u64 = 1 << 20;
pub const SECTOR: u64 = 512;
pub const QUEUE: u16 = 64;

/// A daemon with one export, `disk`, whose top is node `layer0`.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub setup: Setup,
    pub daemon: Daemon,
    pub qmp: Qmp,
}

impl Bed {
    pub fn begin(layers: &[(&str, &'static str)], make: impl Fn(&Path) -> Res<()>) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        make(dir.path())?;
        let layers: Vec<_> = layers
            .iter()
            .map(|(file, format)| (dir.path().join(file), *format))
            .collect();
        let setup = Setup::new(dir.path(), &layers);
        Self::start(dir, setup)
    }

    pub fn start(dir: tempfile::TempDir, setup: Setup) -> Res<Self> {
        let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
        let qmp = daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?)?;
        Ok(Self {
            dir,
            setup,
            daemon,
            qmp,
        })
    }

    pub fn guest(&mut self) -> Res<Guest> {
        let socket = self.setup.socket.clone();
        self.guest_at(&socket)
    }

    /// A guest of node `node`, by an export of that name.
    pub fn guest_of(&mut self, node: &str, writable: bool) -> Res<Guest> {
        let socket = self.path(&format!("{node}.sock"));
        self.ask(
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": node, "node-name": node,
                "writable": writable, "addr": {"type": "unix", "path": socket}}),
        )?;
        self.guest_at(&socket)
    }

    fn guest_at(&mut self, socket: &Path) -> Res<Guest> {
        let mut front = self
            .daemon
            .connect_tracked(socket, 1, QUEUE, MIB as usize, true)?;
        let channel = front.tracked()?.channel()?;
        Ok(Guest { front, channel })
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Res<Value> {
        Ok(self.qmp.execute(command, arguments)??)
    }

    pub fn resize(&mut self, size: u64) -> Res<()> {
        self.ask("block_resize", json!({"device": "disk", "size": size}))?;
        Ok(())
    }

    pub fn refused(&mut self, arguments: Value) -> Res<String> {
        match self.qmp.execute("block_resize", arguments)? {
            Ok(answer) => Err(format!("not refused: {answer}").into()),
            Err(refusal) => Ok(refusal.to_string()),
        }
    }

    /// The sizes that queries tell of a node.
    pub fn size_of(&mut self, node: &str) -> Res<u64> {
        let nodes = self.ask("query-named-block-nodes", json!({"flat": true}))?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|found| found["node-name"] == node);
        let size = node.and_then(|node| node["image"]["virtual-size"].as_u64());
        Ok(size.ok_or("no such node")?)
    }

    pub fn path(&self, file: &str) -> std::path::PathBuf {
        self.dir.path().join(file)
    }

    /// Ends the daemon, with what else there is.
    pub fn end(self, guest: Guest) -> Res<tempfile::TempDir> {
        drop((guest, self.qmp));
        self.daemon.stop()?;
        Ok(self.dir)
    }
}

pub struct Guest {
    pub front: Frontend,
    pub channel: UnixStream,
}

impl Guest {
    pub fn run(&mut self, op: &Op) -> Res<u8> {
        self.front.queues[0].run(op)
    }

    pub fn write(&mut self, at: u64, len: usize, byte: u8) -> Res<u8> {
        self.front.memory.write(0, &vec![byte; len]);
        self.run(&Op::write(at / SECTOR, &[(0, len)]))
    }

    pub fn read(&mut self, at: u64, len: usize) -> Res<Vec<u8>> {
        self.front.memory.write(0, &vec![0xee; len]);
        assert_eq!(self.run(&Op::read(at / SECTOR, &[(0, len)]))?, OK);
        let mut bytes = vec![0; len];
        self.front.memory.read(0, &mut bytes);
        Ok(bytes)
    }

    pub fn capacity(&self) -> Res<u64> {
        Ok(self.front.config()?.capacity.to_native() * SECTOR)
    }

    /// Waits to be told, and looks at the size then.
    pub fn is_told(&mut self) -> Res<u64> {
        let mut message = [0u8; 12];
        self.channel.read_exact(&mut message)?;
        let words: Vec<u32> = message
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        assert_eq!(words, [2, 1, 0], "a change of the configuration");
        self.capacity()
    }

    pub fn is_told_nothing(&self) -> Res<()> {
        self.channel.set_nonblocking(true)?;
        let read = (&self.channel).read(&mut [0]);
        self.channel.set_nonblocking(false)?;
        match read {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            other => Err(format!("it was told something: {other:?}").into()),
        }
    }
}

pub fn qcow2(
    file: &str,
    size: u64,
    options: &str,
    below: Option<(&str, &str)>,
) -> impl Fn(&Path) -> Res<()> {
    let (file, options) = (file.to_owned(), options.to_owned());
    let below = below.map(|(file, format)| (file.to_owned(), format.to_owned()));
    move |dir| {
        let path = dir.join(&file);
        let size = size.to_string();
        let mut words = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            words.extend(["-o", &options]);
        }
        if let Some((below, format)) = &below {
            words.extend(["-b", below, "-F", format]);
        }
        words.extend([images::text(&path)?, &size]);
        images::qemu_img(&words)?;
        Ok(())
    }
}

pub fn raw(dir: &Path, file: &str, size: u64, byte: u8) -> Res<()> {
    if byte == 0 {
        return Ok(File::create(dir.join(file))?.set_len(size)?);
    }
    Ok(fs::write(dir.join(file), vec![byte; size as usize])?)
}
