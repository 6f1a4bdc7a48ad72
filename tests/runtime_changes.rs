//! Nodes, exports and objects that come and go while the daemon runs, with guests.
//!
//! What would be caught: something that a removed or failed thing leaves behind (a descriptor, a
//! thread, a lock on an image, a socket's file, a record); a guest that is cut off by a safe removal;
//! an image that is not stable, or still locked, when its export is gone; a guest that notices that
//! another export comes or goes; a change that the next process does not know of, or that it knows
//! of though the command line has learnt of it; a start that guesses where record and command line
//! differ.

mod common;

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{Frontend, OK, Op, PATIENCE};
use common::images;
use common::qmp::{Qmp, Refusal};
use common::stamp::SECTOR;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DISK: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// A daemon that has nothing but its control socket at first.
struct Bed {
    dir: tempfile::TempDir,
    args: Vec<String>,
}

impl Bed {
    fn new() -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let chardev = format!("socket,id=c,path={},server=on,wait=off", path(&dir, "qmp")?);
        let args = ["--chardev", &chardev, "--monitor", "c"];
        let args = args.map(str::to_owned).to_vec();
        Ok(Self { dir, args })
    }

    /// With a folder for the state.
    fn with_state() -> Res<Self> {
        let mut bed = Self::new()?;
        let state = path(&bed.dir, "state")?;
        std::fs::create_dir(&state)?;
        let more = ["--state", &state, "--state-name", "vm"];
        bed.args.extend(more.map(str::to_owned));
        Ok(bed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> Res<String> {
        path(&self.dir, name)
    }

    /// A new qcow2 image.
    fn image(&self, name: &str, below: Option<&str>) -> Res<()> {
        let below = below.map(|below| self.path(below));
        let below = below.as_deref().map(|below| (below, "qcow2"));
        images::create(&self.path(name), DISK, "compat=1.1", below)
    }

    fn start(&self) -> Res<Life> {
        let mut daemon = Daemon::start(&Program::under_test(), &self.args, self.dir.path(), None)?;
        let qmp = daemon.qmp(&self.path("qmp"))?;
        Ok(Life { daemon, qmp })
    }

    fn node(&self, name: &str, image: &str) -> Res<Value> {
        let file = json!({"driver": "file", "filename": self.text(image)?});
        Ok(json!({"driver": "qcow2", "node-name": name, "file": file}))
    }

    fn export(&self, id: &str, node: &str) -> Res<Value> {
        let addr = json!({"type": "unix", "path": self.text(&format!("{id}.sock"))?});
        Ok(
            json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": addr,
            "writable": true}),
        )
    }

    fn guest(&self, life: &mut Life, id: &str) -> Res<Frontend> {
        let socket = self.path(&format!("{id}.sock"));
        life.daemon.connect(&socket, 1, 64, BLOCK)
    }

    /// The files there are, without the fences, which stay.
    fn files(&self) -> Res<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.dir.path())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.ends_with(".fence") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

fn path(dir: &tempfile::TempDir, name: &str) -> Res<String> {
    Ok(images::text(&dir.path().join(name))?.to_owned())
}

struct Life {
    daemon: Daemon,
    qmp: Qmp,
}

impl Life {
    fn get(&mut self, command: &str, arguments: Value) -> Res<Value> {
        Ok(self.qmp.execute(command, arguments)??)
    }

    fn refused(&mut self, command: &str, arguments: Value) -> Res<String> {
        match self.qmp.execute(command, arguments)? {
            Err(Refusal { desc, .. }) => Ok(desc),
            Ok(value) => Err(format!("{command} works out: {value}").into()),
        }
    }

    fn remove_export(&mut self, id: &str) -> Res<()> {
        self.get("block-export-del", json!({"id": id}))?;
        self.deleted(id)
    }

    fn deleted(&mut self, id: &str) -> Res<()> {
        let data = json!({"id": id});
        let is_it =
            |event: &Value| event["event"] == "BLOCK_EXPORT_DELETED" && event["data"] == data;
        self.qmp.event(is_it)?;
        Ok(())
    }

    /// What there is: nodes, exports and objects by name.
    fn there_is(&mut self) -> Res<[Vec<String>; 3]> {
        let nodes = self.get("query-named-block-nodes", json!({"flat": true}))?;
        let exports = self.get("query-block-exports", json!({}))?;
        let objects = self.get("query-iothreads", json!({}))?;
        let names = |list: &Value, key: &str| {
            let list = list.as_array().into_iter().flatten();
            let names = list.filter_map(|one| one[key].as_str());
            let names = names.filter(|name| !name.starts_with('#'));
            let mut names: Vec<String> = names.map(str::to_owned).collect();
            names.sort();
            names
        };
        Ok([
            names(&nodes, "node-name"),
            names(&exports, "id"),
            names(&objects, "id"),
        ])
    }

    /// Waits until the process holds no more than `wanted`: threads leave the list a moment after
    /// they have ended, those that were counted in `wanted` perhaps as well.
    fn holds(&self, wanted: (usize, usize)) -> Res<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let held = (self.daemon.descriptors()?, self.daemon.threads()?);
            if held.0 <= wanted.0 && held.1 <= wanted.1 {
                return Ok(());
            }
            if Instant::now() > deadline {
                let text = format!("holds {held:?} (descriptors, threads), and held {wanted:?}");
                return Err(text.into());
            }
            std::thread::yield_now();
        }
    }
}

fn write(guest: &mut Frontend, block: u64, byte: u8) -> Res<()> {
    guest.memory.write(0, &[byte; BLOCK]);
    let sector = block * (BLOCK / SECTOR) as u64;
    assert_eq!(guest.queues[0].run(&Op::write(sector, &[(0, BLOCK)]))?, OK);
    Ok(())
}

fn read(guest: &mut Frontend, block: u64) -> Res<u8> {
    let sector = block * (BLOCK / SECTOR) as u64;
    assert_eq!(guest.queues[0].run(&Op::read(sector, &[(0, BLOCK)]))?, OK);
    let mut bytes = [0; BLOCK];
    guest.memory.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    Ok(bytes[0])
}

#[test]
fn what_comes_and_goes_leaves_nothing() -> Res<()> {
    let bed = Bed::new()?;
    bed.image("base", None)?;
    bed.image("top", Some("base"))?;
    let mut life = bed.start()?;
    let round = |life: &mut Life| -> Res<()> {
        let object = json!({"qom-type": "iothread", "id": "io", "poll-max-ns": 1000});
        life.get("object-add", object)?;
        life.get("blockdev-add", bed.node("t", "top")?)?;
        let mut export = bed.export("e", "t")?;
        export["iothread"] = json!("io");
        export["num-queues"] = json!(3);
        life.get("block-export-add", export)?;
        let mut guest = bed.guest(life, "e")?;
        write(&mut guest, 3, 7)?;
        // A guest is not cut off, and what it uses stays.
        for _ in 0..2 {
            let refused = life.refused("block-export-del", json!({"id": "e"}))?;
            assert_eq!(refused, "export 'e' still in use");
        }
        assert_eq!(read(&mut guest, 3)?, 7);
        let refused = life.refused("blockdev-del", json!({"node-name": "t"}))?;
        assert_eq!(refused, "Node t is in use");
        let refused = life.refused("object-del", json!({"id": "io"}))?;
        assert_eq!(refused, "object 'io' is in use, can not be deleted");
        life.get("block-export-del", json!({"id": "e", "mode": "hard"}))?;
        life.deleted("e")?;
        drop(guest);
        // Other programs may read the image by now, which is sound, and write it when it is no node.
        assert!(!images::check(&bed.path("top"))?, "clusters are lost");
        let text = bed.text("top")?;
        images::qemu_io(&["-r", "-f", "qcow2", "-c", "read -P 7 12k 4k", &text])?;
        life.get("blockdev-del", json!({"node-name": "t"}))?;
        images::qemu_io(&["-f", "qcow2", "-c", "write -q 64k 4k", &text])?;
        life.get("object-del", json!({"id": "io"}))?;
        assert_eq!(life.there_is()?, NOTHING.map(|names| names.to_vec()));
        Ok(())
    };
    // What is made once and kept is made here.
    round(&mut life)?;
    let (files, before) = (
        bed.files()?,
        (life.daemon.descriptors()?, life.daemon.threads()?),
    );
    for _ in 0..10 {
        round(&mut life)?;
    }
    life.holds(before)?;
    assert_eq!(bed.files()?, files);
    life.daemon.stop()
}

#[test]
fn what_fails_leaves_nothing() -> Res<()> {
    let bed = Bed::with_state()?;
    bed.image("base", None)?;
    bed.image("top", Some("base"))?;
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("t", "top")?)?;
    let mut read_only = bed.node("r", "base")?;
    read_only["read-only"] = json!(true);
    life.get("blockdev-add", read_only)?;
    // What is made once and kept is made here.
    life.get("block-export-add", bed.export("e", "t")?)?;
    life.remove_export("e")?;
    let there = life.there_is()?;
    let state = std::fs::read(bed.path("state/vm.state"))?;
    let before = (life.daemon.descriptors()?, life.daemon.threads()?);
    let files = bed.files()?;
    let mut nowhere = bed.export("e", "t")?;
    nowhere["addr"]["path"] = json!(bed.text("none/e.sock")?);
    std::fs::write(bed.path("busy.sock"), "precious")?;
    let mut many = bed.export("e", "t")?;
    many["num-queues"] = json!(257);
    let mut broken = bed.node("n", "top")?;
    broken["backing"] = json!({"driver": "qcow2", "file":
        {"driver": "file", "filename": bed.text("missing")?}});
    for (command, arguments, said) in [
        ("block-export-add", nowhere, "its fence"),
        (
            "block-export-add",
            bed.export("busy", "t")?,
            "Failed to bind socket",
        ),
        ("block-export-add", many, "num-queues must be 1 to 256"),
        (
            "block-export-add",
            bed.export("e", "r")?,
            "Cannot export read-only node as writable",
        ),
        (
            "block-export-add",
            bed.export("e", "x")?,
            "Cannot find device='' nor node-name='x'",
        ),
        ("blockdev-add", broken, "No such file or directory"),
        (
            "blockdev-add",
            bed.node("t", "base")?,
            "Duplicate nodes with node-name='t'",
        ),
        (
            "blockdev-del",
            json!({"node-name": "x"}),
            "Failed to find node",
        ),
        (
            "block-export-del",
            json!({"id": "x"}),
            "Export 'x' is not found",
        ),
    ] {
        for _ in 0..5 {
            let refused = life.refused(command, arguments.clone())?;
            assert!(refused.contains(said), "{command} {arguments}: {refused}");
        }
    }
    std::fs::remove_file(bed.path("busy.sock"))?;
    life.holds(before)?;
    assert_eq!(life.there_is()?, there);
    assert_eq!(bed.files()?, files);
    assert_eq!(std::fs::read(bed.path("state/vm.state"))?, state);
    // The writer's lock of the image has been given back: others may read it.
    let text = bed.text("top")?;
    images::qemu_io(&["-r", "-f", "qcow2", "-c", "read -q 0 4k", &text])?;
    life.daemon.stop()
}

#[test]
fn a_guest_does_not_notice_other_exports() -> Res<()> {
    let bed = Bed::new()?;
    for name in ["one", "two"] {
        bed.image(name, None)?;
    }
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("n1", "one")?)?;
    life.get("block-export-add", bed.export("e1", "n1")?)?;
    let mut guest = bed.guest(&mut life, "e1")?;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = stop.clone();
    let busy = std::thread::spawn(move || {
        let mut worst = Duration::ZERO;
        let mut done = 0_u64;
        while !told.load(std::sync::atomic::Ordering::Relaxed) {
            let began = Instant::now();
            write(&mut guest, done % 64, 1).map_err(|error| error.to_string())?;
            worst = worst.max(began.elapsed());
            done += 1;
        }
        Ok::<_, String>((worst, done))
    });
    for _ in 0..10 {
        life.get("blockdev-add", bed.node("n2", "two")?)?;
        life.get("block-export-add", bed.export("e2", "n2")?)?;
        let mut other = bed.guest(&mut life, "e2")?;
        write(&mut other, 0, 2)?;
        drop(other);
        life.get("block-export-del", json!({"id": "e2", "mode": "hard"}))?;
        life.deleted("e2")?;
        life.get("blockdev-del", json!({"node-name": "n2"}))?;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let (worst, done) = busy.join().map_err(|_| "the guest has panicked")??;
    // Not a measurement: a request that waits for another export's sockets, threads or flushes
    // would wait for all of them.
    assert!(
        worst < Duration::from_secs(5) && done > 100,
        "{worst:?}, {done}"
    );
    life.daemon.stop()
}

/// All that the command line and clients have made.
fn everything(bed: &Bed, life: &mut Life) -> Res<()> {
    life.get(
        "object-add",
        json!({"qom-type": "iothread", "id": "io2", "poll-max-ns": 7}),
    )?;
    let set = json!({"path": "io1", "property": "poll-max-ns", "value": 9000});
    life.get("qom-set", set)?;
    life.get("blockdev-add", bed.node("n2", "two")?)?;
    let mut export = bed.export("e2", "n2")?;
    export["iothread"] = json!("io2");
    life.get("block-export-add", export)?;
    life.remove_export("e0")?;
    life.get("blockdev-del", json!({"node-name": "n0"}))?;
    life.get("object-del", json!({"id": "io0"})).map(drop)
}

fn with_command_line(bed: &mut Bed) -> Res<()> {
    let mut words = Vec::new();
    for (name, image) in [("n0", "zero"), ("n1", "one")] {
        bed.image(image, None)?;
        let file = bed.text(image)?;
        let node = format!("qcow2,node-name={name},file.driver=file,file.filename={file}");
        words.extend(["--blockdev".to_owned(), node]);
    }
    bed.image("two", None)?;
    for id in ["io0", "io1"] {
        words.extend(["--object".to_owned(), format!("iothread,id={id}")]);
    }
    for (id, node, thread) in [("e0", "n0", "io0"), ("e1", "n1", "io1")] {
        let socket = bed.text(&format!("{id}.sock"))?;
        let export = format!(
            "vhost-user-blk,id={id},node-name={node},addr.type=unix,addr.path={socket},\
             writable=on,iothread={thread}"
        );
        words.extend(["--export".to_owned(), export]);
    }
    bed.args.extend(words);
    Ok(())
}

const NOTHING: [&[&str]; 3] = [&[], &[], &[]];
const AFTER: [&[&str]; 3] = [&["n1", "n2"], &["e1", "e2"], &["io1", "io2"]];

#[test]
fn the_next_process_has_what_this_one_had() -> Res<()> {
    let mut bed = Bed::with_state()?;
    with_command_line(&mut bed)?;
    let mut life = bed.start()?;
    everything(&bed, &mut life)?;
    let socket = bed.path("e2.sock");
    let mut guest = life.daemon.connect_tracked(&socket, 1, 64, BLOCK, true)?;
    write(&mut guest, 1, 5)?;
    assert_eq!(guest.queues[0].run(&Op::flush())?, OK);
    for _ in 0..2 {
        life.daemon.kill()?;
        let Life { daemon, qmp } = life;
        drop((daemon, qmp));
        life = bed.start()?;
        assert_eq!(life.there_is()?, AFTER.map(|names| names.to_vec()));
        let get = json!({"path": "io1", "property": "poll-max-ns"});
        assert_eq!(life.get("qom-get", get)?, 9000);
        // Its guest goes on.
        life.daemon.reconnect(&mut guest, &socket)?;
        assert_eq!(read(&mut guest, 1)?, 5);
    }
    drop(guest);
    life.daemon.stop()
}

#[test]
fn a_command_line_that_has_learnt_is_no_difference() -> Res<()> {
    let mut bed = Bed::with_state()?;
    with_command_line(&mut bed)?;
    let old = bed.args.clone();
    let mut life = bed.start()?;
    everything(&bed, &mut life)?;
    life.daemon.stop()?;
    // Without what was removed, and with what was added.
    let gone = ["node-name=n0,", "id=e0,", "id=io0"];
    let mut words = Vec::new();
    for pair in old.chunks(2) {
        if !gone.iter().any(|gone| pair[1].contains(gone)) {
            words.extend(pair.iter().map(|word| match word.as_str() {
                "iothread,id=io1" => "iothread,id=io1,poll-max-ns=9000".to_owned(),
                word => word.to_owned(),
            }));
        }
    }
    let mut export = bed.export("e2", "n2")?;
    export["iothread"] = json!("io2");
    for (option, value) in [
        ("--object", "iothread,id=io2,poll-max-ns=7".to_owned()),
        ("--blockdev", bed.node("n2", "two")?.to_string()),
        ("--export", export.to_string()),
    ] {
        words.extend([option.to_owned(), value]);
    }
    bed.args = words;
    let mut life = bed.start()?;
    assert_eq!(life.there_is()?, AFTER.map(|names| names.to_vec()));
    life.daemon.stop()?;
    let state = std::fs::read_to_string(bed.path("state/vm.state"))?;
    assert!(!state.contains("\"changes\""), "{state}");
    // From here on the old words are as good as any.
    bed.args = old;
    let mut life = bed.start()?;
    let all = [vec!["n0", "n1"], vec!["e0", "e1"], vec!["io0", "io1"]];
    assert_eq!(life.there_is()?, all);
    life.daemon.stop()
}

#[test]
fn what_differs_is_not_guessed() -> Res<()> {
    let mut bed = Bed::with_state()?;
    with_command_line(&mut bed)?;
    let old = bed.args.clone();
    let mut life = bed.start()?;
    everything(&bed, &mut life)?;
    life.daemon.stop()?;
    for (from, to, named) in [
        (
            "qcow2,node-name=n0",
            "qcow2,node-name=n0,discard=unmap",
            "node 'n0'",
        ),
        ("id=e0,", "id=e0,num-queues=2,", "export 'e0'"),
        (
            "iothread,id=io1",
            "iothread,id=io1,poll-max-ns=1",
            "object 'io1'",
        ),
    ] {
        let changed = old.iter().map(|word| word.replace(from, to));
        let args: Vec<String> = changed.collect();
        let mut daemon = Daemon::start(&Program::under_test(), &args, bed.dir.path(), None)?;
        assert_eq!(daemon.wait_for_end()?.code(), Some(1));
        let log = daemon.log();
        let said = log.lines().last().unwrap_or_default();
        assert!(said.contains(named) && said.contains("vm.state"), "{said}");
    }
    bed.args = old;
    let mut life = bed.start()?;
    assert_eq!(life.there_is()?, AFTER.map(|names| names.to_vec()));
    life.daemon.stop()
}

#[test]
fn a_change_that_cannot_be_recorded_is_none() -> Res<()> {
    let bed = Bed::with_state()?;
    bed.image("top", None)?;
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("t", "top")?)?;
    life.get("block-export-add", bed.export("e", "t")?)?;
    let before = (life.daemon.descriptors()?, life.daemon.threads()?);
    // A folder in the place of the file that is written first.
    let block = bed.path("state/vm.state.new");
    std::fs::create_dir(&block)?;
    std::fs::write(block.join("x"), "")?;
    bed.image("other", None)?;
    for (command, arguments) in [
        ("blockdev-add", bed.node("n", "other")?),
        ("block-export-add", bed.export("f", "t")?),
        ("object-add", json!({"qom-type": "iothread", "id": "io"})),
        ("block-export-del", json!({"id": "e"})),
    ] {
        let refused = life.refused(command, arguments)?;
        assert!(
            refused.contains("recording the change"),
            "{command}: {refused}"
        );
    }
    let wanted: [&[&str]; 3] = [&["t"], &["e"], &[]];
    assert_eq!(life.there_is()?, wanted.map(|names| names.to_vec()));
    life.holds(before)?;
    assert!(!bed.path("f.sock").exists());
    std::fs::remove_dir_all(&block)?;
    life.remove_export("e")?;
    std::fs::create_dir(&block)?;
    std::fs::write(block.join("x"), "")?;
    let refused = life.refused("blockdev-del", json!({"node-name": "t"}))?;
    assert!(refused.contains("recording the change"), "{refused}");
    let wanted: [&[&str]; 3] = [&["t"], &[], &[]];
    assert_eq!(life.there_is()?, wanted.map(|names| names.to_vec()));
    std::fs::remove_dir_all(&block)?;
    // It is as good as before.
    life.get("block-export-add", bed.export("e", "t")?)?;
    let mut guest = bed.guest(&mut life, "e")?;
    write(&mut guest, 0, 3)?;
    assert_eq!(read(&mut guest, 0)?, 3);
    drop(guest);
    life.daemon.stop()
}

#[test]
fn a_daemon_without_a_state_says_what_it_forgets_once() -> Res<()> {
    let bed = Bed::new()?;
    bed.image("top", None)?;
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("t", "top")?)?;
    life.get("blockdev-del", json!({"node-name": "t"}))?;
    let log = life.daemon.log();
    assert_eq!(log.matches("without --state").count(), 1, "{log}");
    life.daemon.stop()
}

/// Nobody else serves the socket of an export that has come late, for as long as this process
/// runs; and another process may when the export has gone.
#[test]
fn an_export_that_comes_late_has_a_fence() -> Res<()> {
    let bed = Bed::new()?;
    bed.image("top", None)?;
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("t", "top")?)?;
    life.get("block-export-add", bed.export("e", "t")?)?;
    let held = || is_locked(&bed.path("e.sock.fence"));
    assert!(held()?);
    life.remove_export("e")?;
    assert!(!held()?);
    life.get("block-export-add", bed.export("e", "t")?)?;
    assert!(held()?);
    life.daemon.stop()?;
    assert!(!held()?);
    Ok(())
}

fn is_locked(path: &Path) -> Res<bool> {
    use std::os::fd::AsRawFd;

    let file = std::fs::File::options().read(true).write(true).open(path)?;
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_len = 1;
    // SAFETY: the call reads and writes one flock.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// A guest goes on while another image is put under its disk, and the next process finds that one
/// there, whether the node was named by the command line, by a client, or made from `--blk-file`.
#[test]
fn what_lies_under_a_disk_can_change() -> Res<()> {
    for blk_file in [false, true] {
        let mut bed = Bed::with_state()?;
        for (name, byte) in [("one", 1), ("two", 2)] {
            bed.image(name, None)?;
            let write = format!("write -q -P {byte} 0 1M");
            images::qemu_io(&["-f", "qcow2", "-c", &write, &bed.text(name)?])?;
        }
        bed.image("top", Some("one"))?;
        let name = if blk_file { "disk0-top" } else { "t" };
        let id = if blk_file { "disk0" } else { "e" };
        let socket = bed.text(&format!("{id}.sock"))?;
        if blk_file {
            let more = ["--socket-path", &socket, "--blk-file", &bed.text("top")?];
            bed.args.extend(more.map(str::to_owned));
        }
        let mut life = bed.start()?;
        if !blk_file {
            life.get("blockdev-add", bed.node("b1", "one")?)?;
            let mut node = bed.node("t", "top")?;
            node["backing"] = json!("b1");
            node["file"]["node-name"] = json!("tf");
            node["discard"] = json!("unmap");
            life.get("blockdev-add", node)?;
            life.get("block-export-add", bed.export("e", "t")?)?;
        }
        life.get("blockdev-add", bed.node("b2", "two")?)?;
        let mut guest = life
            .daemon
            .connect_tracked(Path::new(&socket), 1, 64, BLOCK, true)?;
        assert_eq!(read(&mut guest, 5)?, 1);
        write(&mut guest, 0, 9)?;
        assert_eq!(guest.queues[0].run(&Op::flush())?, OK);
        let file = if blk_file { "disk0-file" } else { "tf" };
        let options = |backing: Value| {
            json!({"options": [{"driver": "qcow2", "node-name": name, "file": file,
                "backing": backing, "discard": "unmap"}]})
        };
        life.get("blockdev-reopen", options(json!("b2")))?;
        // What the guest wrote, with the cluster that it is in, and what is below.
        for _ in 0..2 {
            assert_eq!(
                [0, 5, 100].map(|block| read(&mut guest, block).unwrap()),
                [9, 1, 2]
            );
            life.daemon.kill()?;
            let Life { daemon, qmp } = life;
            drop((daemon, qmp));
            life = bed.start()?;
            life.daemon.reconnect(&mut guest, Path::new(&socket))?;
        }
        let refused = life.refused("blockdev-del", json!({"node-name": "b2"}))?;
        assert_eq!(
            refused,
            format!("Node 'b2' is busy: node is used as backing hd of '{name}'")
        );
        life.get("blockdev-reopen", options(Value::Null))?;
        assert_eq!(
            [0, 100].map(|block| read(&mut guest, block).unwrap()),
            [9, 0]
        );
        life.get("blockdev-del", json!({"node-name": "b2"}))?;
        drop(guest);
        life.daemon.stop()?;
    }
    Ok(())
}

/// Would catch an image that is made over the disk of a guest.
#[test]
fn no_image_is_made_where_a_guest_is() -> Res<()> {
    let bed = Bed::new()?;
    std::fs::write(bed.path("disk"), vec![0; DISK as usize])?;
    let mut life = bed.start()?;
    let file = json!({"driver": "file", "node-name": "f", "filename": bed.text("disk")?});
    life.get("blockdev-add", file.clone())?;
    let over = json!({"driver": "raw", "node-name": "r", "file": "f"});
    life.get("blockdev-add", over)?;
    life.get("block-export-add", bed.export("e", "r")?)?;
    let mut guest = bed.guest(&mut life, "e")?;
    write(&mut guest, 0, 4)?;
    let create = |options: Value| json!({"job-id": "j", "options": options});
    for options in [
        json!({"driver": "qcow2", "file": "f", "size": DISK}),
        json!({"driver": "file", "filename": bed.text("disk")?, "size": 0}),
    ] {
        life.get("blockdev-create", create(options))?;
        let concluded = json!({"id": "j", "status": "concluded"});
        life.qmp.event(|event| event["data"] == concluded)?;
        let jobs = life.get("query-jobs", json!({}))?;
        let error = jobs[0]["error"].as_str().unwrap_or_default();
        let refused = error.contains("Permission conflict") || error.contains("lock");
        assert!(refused, "{jobs}");
        life.get("job-dismiss", json!({"id": "j"}))?;
        assert_eq!(read(&mut guest, 0)?, 4);
    }
    drop(guest);
    life.daemon.stop()
}

/// Would catch a header that is changed behind the record's back, so that the next start is refused
/// or opens another chain.
#[test]
fn a_header_and_its_record_change_together() -> Res<()> {
    let bed = Bed::with_state()?;
    bed.image("base", None)?;
    let write = "write -q -P 6 0 1M";
    images::qemu_io(&["-f", "qcow2", "-c", write, &bed.text("base")?])?;
    bed.image("mid", Some("base"))?;
    bed.image("top", Some("mid"))?;
    let mut life = bed.start()?;
    life.get("blockdev-add", bed.node("b", "base")?)?;
    for (name, image, below) in [("m", "mid", "b"), ("t", "top", "m")] {
        let mut node = bed.node(name, image)?;
        node["backing"] = json!(below);
        life.get("blockdev-add", node)?;
    }
    life.get("block-export-add", bed.export("e", "t")?)?;
    let stream = json!({"device": "e", "base-node": "b", "job-id": "j"});
    life.get("block-stream", stream)?;
    life.qmp.job_end("j")?;
    let name = bed.text("./base")?;
    let change = json!({"device": "e", "image-node-name": "t", "backing-file": name});
    life.get("change-backing-file", change)?;
    for _ in 0..2 {
        life.daemon.kill()?;
        let Life { daemon, qmp } = life;
        drop((daemon, qmp));
        images::wait_unlocked(&bed.path("top"))?;
        life = bed.start()?;
        let nodes = life.get("query-named-block-nodes", json!({}))?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let top = nodes
            .find(|node| node["node-name"] == "t")
            .ok_or("no node 't'")?;
        assert_eq!(top["backing_file_depth"], 1);
        let mut guest = bed.guest(&mut life, "e")?;
        assert_eq!(read(&mut guest, 9)?, 6);
        drop(guest);
    }
    let state = std::fs::read_to_string(bed.path("state/vm.state"))?;
    assert!(
        state.contains(&name) && !state.contains("#header"),
        "{state}"
    );
    life.daemon.stop()
}

/// Would catch a record of a stream that wins over what a client has put under the disk since.
#[test]
fn a_chain_that_was_streamed_can_change() -> Res<()> {
    let bed = Bed::with_state()?;
    for (name, byte) in [("base", 6), ("other", 8)] {
        bed.image(name, None)?;
        let write = format!("write -q -P {byte} 0 1M");
        images::qemu_io(&["-f", "qcow2", "-c", &write, &bed.text(name)?])?;
    }
    bed.image("mid", Some("base"))?;
    bed.image("top", Some("mid"))?;
    let mut life = bed.start()?;
    for (name, image, below) in [
        ("b", "base", None),
        ("o", "other", None),
        ("m", "mid", Some("b")),
        ("t", "top", Some("m")),
    ] {
        let mut node = bed.node(name, image)?;
        node["backing"] = json!(below);
        life.get("blockdev-add", node)?;
    }
    life.get("block-export-add", bed.export("e", "t")?)?;
    let stream = json!({"device": "e", "base-node": "b", "job-id": "j"});
    life.get("block-stream", stream)?;
    life.qmp.job_end("j")?;
    life.get("blockdev-del", json!({"node-name": "m"}))?;
    // A node in place is the one that is there.
    for (key, value) in [
        ("filename", bed.text("other")?),
        ("node-name", "x".to_owned()),
        ("driver", "host_device".to_owned()),
    ] {
        let mut below = bed.node("b", "base")?;
        match key {
            "node-name" => below[key] = json!(value),
            _ => below["file"][key] = json!(value),
        }
        let file = json!({"driver": "file", "filename": bed.text("top")?});
        let options = json!({"driver": "qcow2", "node-name": "t", "file": file,
            "backing": below});
        let refused = life.refused("blockdev-reopen", json!({"options": [options]}))?;
        assert_eq!(refused, format!("Cannot change the option '{key}'"));
    }
    for (backing, byte) in [(json!("o"), 8), (json!("b"), 6), (Value::Null, 0)] {
        let file = json!({"driver": "file", "filename": bed.text("top")?});
        let options = json!({"driver": "qcow2", "node-name": "t", "file": file,
            "backing": backing});
        life.get("blockdev-reopen", json!({"options": [options]}))?;
        life.daemon.kill()?;
        let Life { daemon, qmp } = life;
        drop((daemon, qmp));
        images::wait_unlocked(&bed.path("top"))?;
        life = bed.start()?;
        let mut guest = bed.guest(&mut life, "e")?;
        assert_eq!(read(&mut guest, 9)?, byte);
        drop(guest);
    }
    life.daemon.stop()
}
