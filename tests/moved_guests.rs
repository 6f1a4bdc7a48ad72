//! Guests that have moved to the base of a commit, whose old layer a client removes: the next process
//! with the same command line.
//!
//! What would be caught: a start that is refused since the options name a node that was removed after
//! its guest had left it, or one that serves that guest anything but the base, with or without an
//! image that was put on top of it since.

mod common;

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{OK, Op};
use common::images;
use common::qmp::Qmp;
use common::stamp::SECTOR;
use serde_json::{Value, json};

const DISK: u64 = 1 << 20;
const BLOCK: usize = 4096;

struct Bed {
    dir: tempfile::TempDir,
    args: Vec<String>,
}

impl Bed {
    fn new() -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let args = Vec::new();
        let mut bed = Bed { dir, args };
        std::fs::create_dir(bed.dir.path().join("state"))?;
        let (base, top) = (bed.dir.path().join("base"), bed.dir.path().join("top"));
        images::create(&base, DISK, "compat=1.1", None)?;
        images::create(&top, DISK, "compat=1.1", Some((&base, "qcow2")))?;
        let chardev = format!("socket,id=c,path={},server=on,wait=off", bed.path("qmp")?);
        let node = |name: &str, file: &str, backing: Option<&str>| -> Res<String> {
            let file = json!({"driver": "file", "filename": bed.path(file)?});
            let node = json!({"driver": "qcow2", "node-name": name, "file": file,
                "backing": backing});
            Ok(node.to_string())
        };
        let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "t",
            "writable": true, "addr": {"type": "unix", "path": bed.path("e.sock")?}});
        let words = [
            ("--chardev", chardev),
            ("--monitor", "c".to_owned()),
            ("--state", bed.path("state")?),
            ("--blockdev", node("b", "base", None)?),
            ("--blockdev", node("t", "top", Some("b"))?),
            ("--export", export.to_string()),
        ];
        for (option, value) in words {
            bed.args.extend([option.to_owned(), value]);
        }
        Ok(bed)
    }

    fn path(&self, name: &str) -> Res<String> {
        Ok(images::text(&self.dir.path().join(name))?.to_owned())
    }

    fn start(&self) -> Res<(Daemon, Qmp)> {
        let mut daemon = Daemon::start(&Program::under_test(), &self.args, self.dir.path(), None)?;
        let qmp = daemon.qmp(&self.dir.path().join("qmp"))?;
        Ok((daemon, qmp))
    }
}

/// The node that the export shows.
fn shown(qmp: &mut Qmp) -> Res<Value> {
    let exports = qmp.execute("query-block-exports", json!({}))??;
    Ok(exports[0]["node-name"].clone())
}

#[test]
fn a_layer_that_a_guest_has_left_can_be_removed_for_good() -> Res<()> {
    for covered in [false, true] {
        let bed = Bed::new()?;
        let (mut daemon, mut qmp) = bed.start()?;
        let commit = json!({"device": "e", "job-id": "j"});
        qmp.execute("block-commit", commit)??;
        qmp.event(|event| event["event"] == "BLOCK_JOB_READY")?;
        qmp.execute("job-complete", json!({"id": "j"}))??;
        qmp.job_end("j")?;
        qmp.execute("blockdev-del", json!({"node-name": "t"}))??;
        let expected = match covered {
            false => "b",
            true => {
                let snapshot = json!({"node-name": "b", "snapshot-file": bed.path("new")?,
                    "snapshot-node-name": "n"});
                qmp.execute("blockdev-snapshot-sync", snapshot)??;
                "n"
            }
        };
        let socket = bed.dir.path().join("e.sock");
        let mut guest = daemon.connect(&socket, 1, 64, BLOCK)?;
        guest.memory.write(0, &[7; BLOCK]);
        let whole = [(0, BLOCK)];
        let sector = (BLOCK / SECTOR) as u64;
        assert_eq!(guest.queues[0].run(&Op::write(sector, &whole))?, OK);
        assert_eq!(guest.queues[0].run(&Op::flush())?, OK);
        drop(guest);
        for _ in 0..2 {
            daemon.kill()?;
            images::wait_unlocked(&bed.dir.path().join("base"))?;
            (daemon, qmp) = bed.start()?;
            assert_eq!(shown(&mut qmp)?, expected);
            let mut guest = daemon.connect(&socket, 1, 64, BLOCK)?;
            assert_eq!(guest.queues[0].run(&Op::read(sector, &whole))?, OK);
            let mut bytes = [0; BLOCK];
            guest.memory.read(0, &mut bytes);
            assert_eq!(bytes, [7; BLOCK]);
        }
        daemon.stop()?;
    }
    Ok(())
}
