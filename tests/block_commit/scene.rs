//! A daemon that serves a chain of four nodes, `act` on top of `top`, `mid` and `base`.

use crate::common::Res;
use crate::common::daemon::{Daemon, Program};
use crate::common::frontend::{Frontend, OK, Op};
use crate::common::images;
use crate::common::qmp::Qmp;
use crate::common::stamp::SECTOR;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Bytes of a cluster of the images.
pub const CLUSTER: u64 = 64 << 10;

/// The nodes, the guest's first.
pub const NODES: [&str; 4] = ["act", "top", "mid", "base"];

/// The files of a chain.
pub struct Chain {
    /// Where they are.
    pub dir: PathBuf,
    /// The base's format.
    pub base: &'static str,
    /// Between `act` and `top` is a filter, `G`.
    pub filter: bool,
    /// More words for the layers under the guest's, each with its own name in the place of `NODE`.
    pub lower: &'static str,
}

impl Chain {
    /// Images of so many clusters each, the guest's first. Every layer has data of its own, and some of
    /// it lies over what the others have; `mid` has zeros over the base.
    pub fn create(dir: &Path, base: &'static str, clusters: [u64; 4]) -> Res<Self> {
        let chain = Self {
            dir: dir.to_owned(),
            base,
            filter: false,
            lower: "",
        };
        let names = NODES.iter().zip(clusters).enumerate().rev();
        for (depth, (node, clusters)) in names {
            let (path, size) = (chain.path(node), clusters * CLUSTER);
            if depth == 3 {
                let size = size.to_string();
                images::qemu_img(&["create", "-q", "-f", base, images::text(&path)?, &size])?;
            } else {
                let below = chain.path(NODES[depth + 1]);
                let format = chain.format(NODES[depth + 1]);
                images::create(&path, size, "compat=1.1", Some((&below, format)))?;
            }
            for at in 0..clusters {
                // Each has some clusters alone, some with others, and nobody has some.
                if (at >> depth) % 3 == 1 {
                    let write = format!("write -q -P {} {} 48k", 0x10 * depth + 1, at * CLUSTER);
                    chain.qemu_io(node, &write)?;
                }
            }
        }
        if clusters[2] > 8 {
            chain.qemu_io("mid", &format!("write -q -z {} 128k", 6 * CLUSTER))?;
        }
        Ok(chain)
    }

    /// The file of a node.
    pub fn path(&self, node: &str) -> PathBuf {
        self.dir.join(format!("{node}.img"))
    }

    fn format(&self, node: &str) -> &'static str {
        if node == "base" { self.base } else { "qcow2" }
    }

    fn qemu_io(&self, node: &str, command: &str) -> Res<()> {
        let path = self.path(node);
        let args = ["-f", self.format(node), "-c", command, images::text(&path)?];
        images::qemu_io(&args).map(drop)
    }

    /// What a guest reads, as QEMU has it.
    pub fn contents(&self, node: &str) -> Res<Vec<u8>> {
        let (path, raw) = (self.path(node), self.dir.join("contents.raw"));
        let args = ["convert", "-f", self.format(node), "-O", "raw"];
        let files = [images::text(&path)?, images::text(&raw)?];
        images::qemu_img(&[&args[..], &files].concat())?;
        Ok(std::fs::read(&raw)?)
    }

    /// The name of the backing file in a node's header.
    pub fn backing(&self, node: &str) -> Res<Option<String>> {
        let path = self.path(node);
        let text = images::qemu_img(&["info", "-U", "--output=json", images::text(&path)?])?;
        let info: Value = serde_json::from_str(&text)?;
        Ok(info["full-backing-filename"].as_str().map(str::to_owned))
    }

    /// `qemu-img check` of all images: no errors, no leaks.
    pub fn check(&self) -> Res<()> {
        for node in NODES {
            if self.format(node) == "qcow2" && images::check(&self.path(node))? {
                return Err(format!("{node} leaks clusters").into());
            }
        }
        Ok(())
    }

    /// The words that serve the chain.
    fn args(&self, extra: &[&str]) -> Vec<String> {
        let mut args = Vec::new();
        for (depth, node) in NODES.iter().enumerate().rev() {
            let (path, format) = (self.path(node), self.format(node));
            let mut option = format!(
                "driver={format},node-name={node},discard=unmap,file.driver=file,\
                 file.discard=unmap,file.filename={}",
                path.display()
            );
            if depth > 0 && !self.lower.is_empty() {
                option.push_str(&format!(",{}", self.lower.replace("NODE", node)));
            }
            if depth == 0 && self.filter {
                let filter = "driver=copy-on-read,node-name=G,file=top";
                args.extend(["--blockdev".to_owned(), filter.to_owned()]);
                option.push_str(",backing=G");
            } else if let Some(below) = NODES.get(depth + 1) {
                option.push_str(&format!(",backing={below}"));
            }
            args.extend(["--blockdev".to_owned(), option]);
        }
        let dir = self.dir.display();
        args.extend([
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=disk,node-name=act,addr.type=unix,\
                 addr.path={dir}/vhost.sock,writable=on"
            ),
            "--chardev".to_owned(),
            format!("socket,id=c,path={dir}/qmp.sock,server=on,wait=off"),
            "--monitor".to_owned(),
            "chardev=c".to_owned(),
        ]);
        args.extend(extra.iter().map(|word| (*word).to_owned()));
        args
    }
}

/// A daemon that serves a chain, its guest, and a client of its control socket.
pub struct Life {
    pub daemon: Daemon,
    pub guest: Frontend,
    pub qmp: Qmp,
}

impl Life {
    /// Starts it.
    pub fn begin(chain: &Chain, extra: &[&str]) -> Res<Self> {
        for socket in ["vhost.sock", "qmp.sock"] {
            let _ = std::fs::remove_file(chain.dir.join(socket));
        }
        let args = chain.args(extra);
        let mut daemon = Daemon::start(&Program::under_test(), &args, &chain.dir, None)?;
        let socket = chain.dir.join("vhost.sock");
        let guest = daemon.connect(&socket, 1, 64, CLUSTER as usize)?;
        let qmp = daemon.qmp(&chain.dir.join("qmp.sock"))?;
        Ok(Self { daemon, guest, qmp })
    }

    /// All that the guest reads.
    pub fn read_all(&mut self) -> Res<Vec<u8>> {
        let sectors = u64::from(self.guest.config()?.capacity);
        let mut all = vec![0; sectors as usize * SECTOR];
        for (index, bytes) in all.chunks_mut(CLUSTER as usize).enumerate() {
            let sector = index as u64 * (CLUSTER / SECTOR as u64);
            let op = [(0, bytes.len())];
            if self.guest.queues[0].run(&Op::read(sector, &op))? != OK {
                return Err(format!("sector {sector} cannot be read").into());
            }
            self.guest.memory.read(0, bytes);
        }
        Ok(all)
    }

    /// Writes a cluster full of `byte`.
    pub fn write(&mut self, cluster: u64, byte: u8) -> Res<()> {
        self.guest.memory.write(0, &vec![byte; CLUSTER as usize]);
        let sector = cluster * (CLUSTER / SECTOR as u64);
        let data = [(0, CLUSTER as usize)];
        match self.guest.queues[0].run(&Op::write(sector, &data))? {
            OK => Ok(()),
            status => Err(format!("a write ended with {status}").into()),
        }
    }

    /// Carries out a command that succeeds.
    pub fn run(&mut self, command: &str, arguments: Value) -> Res<Value> {
        Ok(self.qmp.execute(command, arguments)??)
    }

    /// Commits and waits for the end, which must be a good one.
    pub fn commit(&mut self, mut arguments: Value) -> Res<Value> {
        arguments["device"] = json!("disk");
        arguments["job-id"] = json!("j");
        self.run("block-commit", arguments)?;
        self.end()
    }

    /// Waits for a good end of job `j`.
    pub fn end(&mut self) -> Res<Value> {
        let end = self.qmp.job_end("j")?;
        if end["event"] != "BLOCK_JOB_COMPLETED" || end["data"].get("error").is_some() {
            return Err(format!("{end}: {}", self.daemon.log()).into());
        }
        Ok(end)
    }

    /// Waits for a state of job `j`.
    pub fn state(&mut self, name: &str) -> Res<()> {
        let is_it = |event: &Value| {
            event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == name
        };
        self.qmp.event(is_it).map(drop)
    }

    /// Dies, and the locks on its images with it.
    pub fn kill(mut self, chain: &Chain) -> Res<()> {
        self.daemon.kill()?;
        drop((self.guest, self.qmp));
        for node in NODES {
            images::wait_unlocked(&chain.path(node))?;
        }
        Ok(())
    }
}
