//! Another size for a disk that a front-end is using, with the daemon and files.
//!
//! What would be caught: a front-end that is not told, or is told before it can see the new size; what
//! is new and reads as anything but zeros; a write behind the old end that fails, or is gone after a
//! kill; a request above the new end of a smaller disk that is carried out; a command that fails and
//! leaves something behind; an export that cannot get another size before it has had a client, which
//! crashes qemu-storage-daemon; another process that serves another size.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{self, Frontend, IOERR, OK, Op, Queue, Segment};
use common::images;
use common::qmp::Qmp;
use common::skips::skip;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const QUEUE: u16 = 64;

/// A daemon with one export, `disk`, whose top is node `layer0`.
struct Bed {
    dir: tempfile::TempDir,
    setup: Setup,
    daemon: Daemon,
    qmp: Qmp,
}

impl Bed {
    fn begin(layers: &[(&str, &'static str)], make: impl Fn(&Path) -> Res<()>) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        make(dir.path())?;
        let layers: Vec<_> = layers
            .iter()
            .map(|(file, format)| (dir.path().join(file), *format))
            .collect();
        let setup = Setup::new(dir.path(), &layers);
        Self::start(dir, setup)
    }

    fn start(dir: tempfile::TempDir, setup: Setup) -> Res<Self> {
        let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
        let qmp = daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?)?;
        Ok(Self {
            dir,
            setup,
            daemon,
            qmp,
        })
    }

    fn guest(&mut self) -> Res<Guest> {
        let socket = self.setup.socket.clone();
        let mut front = self
            .daemon
            .connect_tracked(&socket, 1, QUEUE, MIB as usize, true)?;
        let channel = front.tracked()?.channel()?;
        Ok(Guest { front, channel })
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Res<Value> {
        Ok(self.qmp.execute(command, arguments)??)
    }

    fn resize(&mut self, size: u64) -> Res<()> {
        self.ask("block_resize", json!({"device": "disk", "size": size}))?;
        Ok(())
    }

    fn refused(&mut self, arguments: Value) -> Res<String> {
        match self.qmp.execute("block_resize", arguments)? {
            Ok(answer) => Err(format!("not refused: {answer}").into()),
            Err(refusal) => Ok(refusal.to_string()),
        }
    }

    /// The sizes that queries tell of a node.
    fn size_of(&mut self, node: &str) -> Res<u64> {
        let nodes = self.ask("query-named-block-nodes", json!({"flat": true}))?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|found| found["node-name"] == node);
        let size = node.and_then(|node| node["image"]["virtual-size"].as_u64());
        Ok(size.ok_or("no such node")?)
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.dir.path().join(file)
    }

    /// Ends the daemon, with what else there is.
    fn end(self, guest: Guest) -> Res<tempfile::TempDir> {
        drop((guest, self.qmp));
        self.daemon.stop()?;
        Ok(self.dir)
    }
}

struct Guest {
    front: Frontend,
    channel: UnixStream,
}

impl Guest {
    fn run(&mut self, op: &Op) -> Res<u8> {
        self.front.queues[0].run(op)
    }

    fn write(&mut self, at: u64, len: usize, byte: u8) -> Res<u8> {
        self.front.memory.write(0, &vec![byte; len]);
        self.run(&Op::write(at / SECTOR, &[(0, len)]))
    }

    fn read(&mut self, at: u64, len: usize) -> Res<Vec<u8>> {
        self.front.memory.write(0, &vec![0xee; len]);
        assert_eq!(self.run(&Op::read(at / SECTOR, &[(0, len)]))?, OK);
        let mut bytes = vec![0; len];
        self.front.memory.read(0, &mut bytes);
        Ok(bytes)
    }

    fn capacity(&self) -> Res<u64> {
        Ok(self.front.config()?.capacity.to_native() * SECTOR)
    }

    /// Waits to be told, and looks at the size then.
    fn is_told(&mut self) -> Res<u64> {
        let mut message = [0u8; 12];
        self.channel.read_exact(&mut message)?;
        let words: Vec<u32> = message
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        assert_eq!(words, [2, 1, 0], "a change of the configuration");
        self.capacity()
    }

    fn is_told_nothing(&self) -> Res<()> {
        self.channel.set_nonblocking(true)?;
        let read = (&self.channel).read(&mut [0]);
        self.channel.set_nonblocking(false)?;
        match read {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            other => Err(format!("it was told something: {other:?}").into()),
        }
    }
}

fn qcow2(
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

fn raw(dir: &Path, file: &str, size: u64, byte: u8) -> Res<()> {
    if byte == 0 {
        return Ok(File::create(dir.join(file))?.set_len(size)?);
    }
    Ok(fs::write(dir.join(file), vec![byte; size as usize])?)
}

/// Grows a disk of `old` bytes under its guest, and shrinks it again.
fn grows_and_shrinks(bed: &mut Bed, guest: &mut Guest, old: u64, what: &str) -> Res<()> {
    let new = 3 * MIB + 7 * SECTOR;
    let last = 16 << 10;
    assert_eq!(guest.write(old - last, last as usize, 5)?, OK);
    assert_eq!(guest.write(old, 512, 6)?, IOERR, "{what}: it is not there");
    guest.is_told_nothing()?;
    bed.resize(new)?;
    assert_eq!(guest.is_told()?, new, "{what}");
    assert_eq!(bed.size_of("layer0")?, new);
    assert!(
        guest
            .read(old - last, last as usize)?
            .iter()
            .all(|byte| *byte == 5)
    );
    for at in (old..new).step_by(64 << 10) {
        let len = (new - at).min(64 << 10) as usize;
        let zeros = guest.read(at, len)?.iter().all(|byte| *byte == 0);
        assert!(zeros, "{what}: what is new at {at}");
    }
    assert_eq!(guest.write(old, 1024, 7)?, OK);
    assert_eq!(guest.write(new - 512, 512, 8)?, OK);
    assert_eq!(guest.write(new, 512, 9)?, IOERR);
    let discard = [Segment {
        sector: (new - 4096) / SECTOR,
        count: 7,
        flags: 0,
    }];
    let discard = Op::ranges(frontend::DISCARD, &discard);
    assert_eq!(guest.run(&discard)?, OK);
    assert_eq!(guest.read(new - 512, 512)?, [8; 512]);

    let small = MIB - 3 * SECTOR;
    bed.resize(small)?;
    assert_eq!(guest.is_told()?, small, "{what}");
    assert_eq!(guest.write(small - 512, 1024, 9)?, IOERR, "{what}");
    assert_eq!(guest.write(small - 512, 512, 4)?, OK);
    // What was above does not come back.
    bed.resize(new)?;
    assert_eq!(guest.is_told()?, new);
    for at in (small..new).step_by(64 << 10) {
        let len = (new - at).min(64 << 10) as usize;
        let zeros = guest.read(at, len)?.iter().all(|byte| *byte == 0);
        assert!(zeros, "{what}: what is new once more, at {at}");
    }
    assert_eq!(guest.read(small - 512, 512)?, [4; 512]);
    assert_eq!(guest.run(&Op::flush())?, OK);
    Ok(())
}

/// Catches what depends on the kind of the image.
#[test]
fn images_of_every_kind() -> Res<()> {
    let old = MIB + 5 * SECTOR;
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
    ] {
        let options = options.to_owned();
        let make = |dir: &Path| {
            let data = format!("data_file={}", dir.join("data.raw").display());
            let options = options.replace("data_file=data.raw", &data);
            qcow2("top.qcow2", old, &options, None)(dir)
        };
        let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, &options)?;
        let dir = bed.end(guest)?;
        assert!(!images::check(&dir.path().join("top.qcow2"))?, "{options}");
    }
    for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
        let make = |dir: &Path| {
            raw(dir, "some.raw", old, 0x11)?;
            let (from, to) = (dir.join("some.raw"), dir.join("top.qcow2"));
            let (from, to) = (images::text(&from)?, images::text(&to)?);
            let words = [
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to,
            ];
            images::qemu_img(&words)?;
            Ok(())
        };
        let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, "compressed")?;
        assert_eq!(guest.read(0, 4096)?, [0x11; 4096]);
        let dir = bed.end(guest)?;
        assert!(!images::check(&dir.path().join("top.qcow2"))?, "{options}");
    }
    let mut bed = Bed::begin(&[("disk.raw", "raw")], |dir| raw(dir, "disk.raw", old, 0))?;
    let mut guest = bed.guest()?;
    grows_and_shrinks(&mut bed, &mut guest, old, "raw")?;
    assert_eq!(
        fs::metadata(bed.path("disk.raw"))?.len(),
        3 * MIB + 7 * SECTOR
    );
    bed.end(guest)?;
    Ok(())
}

/// Catches bytes of an image below that come to light: it is longer than the disk was.
#[test]
fn over_images_that_are_longer_and_shorter() -> Res<()> {
    let old = MIB + 5 * SECTOR;
    for (below, options) in [
        (4 * MIB, "cluster_size=64k"),
        (4 * MIB, "cluster_size=16k,extended_l2=on"),
        (4 * MIB, "cluster_size=64k,compat=0.10"),
        (MIB / 2, "cluster_size=64k"),
    ] {
        let make = |dir: &Path| {
            raw(dir, "base.raw", below, 0xbb)?;
            qcow2("top.qcow2", old, options, Some(("base.raw", "raw")))(dir)
        };
        let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
        let mut bed = Bed::begin(&layers, make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, options)?;
        let dir = bed.end(guest)?;
        assert!(
            !images::check(&dir.path().join("top.qcow2"))?,
            "clusters have leaked"
        );
        assert!(
            fs::read(dir.path().join("base.raw"))?
                .iter()
                .all(|byte| *byte == 0xbb)
        );
    }
    Ok(())
}

/// Catches nodes that go on with the old size, and exports whose front-ends hear nothing, or too much.
#[test]
fn nodes_and_exports_over_one_image() -> Res<()> {
    let make = qcow2("top.qcow2", MIB, "", None);
    let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
    raw(bed.dir.path(), "other.raw", MIB, 0)?;
    let other = json!({"driver": "file", "node-name": "of", "filename": bed.path("other.raw")});
    bed.ask("blockdev-add", other)?;
    for node in [
        json!({"driver": "copy-on-read", "node-name": "cor", "file": "layer0"}),
        json!({"driver": "raw", "node-name": "plain", "file": "layer0"}),
        json!({"driver": "blkdebug", "node-name": "debug", "image": "plain"}),
        json!({"driver": "raw", "node-name": "window", "file": "of", "offset": MIB / 2}),
        json!({"driver": "raw", "node-name": "fixed", "file": "of", "size": MIB / 2}),
    ] {
        bed.ask("blockdev-add", node)?;
    }
    let mut guest = bed.guest()?;
    let mut guests = Vec::new();
    for node in ["layer0", "cor", "debug", "window"] {
        let socket = bed.path(&format!("{node}.sock"));
        bed.ask(
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": node, "node-name": node,
                "addr": {"type": "unix", "path": socket}}),
        )?;
        let mut front = bed
            .daemon
            .connect_tracked(&socket, 1, QUEUE, MIB as usize, true)?;
        let channel = front.tracked()?.channel()?;
        guests.push(Guest { front, channel });
    }
    // Whichever of them is named.
    for (round, node) in ["layer0", "cor", "plain", "debug"].into_iter().enumerate() {
        let size = (round as u64 + 2) * MIB;
        bed.ask("block_resize", json!({"node-name": node, "size": size}))?;
        assert_eq!(guest.is_told()?, size, "{node}");
        for told in &mut guests[..3] {
            assert_eq!(told.is_told()?, size, "{node}");
            assert_eq!(told.read(size - 512, 512)?, [0; 512]);
        }
        for node in ["layer0", "cor", "plain", "debug"] {
            assert_eq!(bed.size_of(node)?, size, "{node}");
        }
    }
    guests[3].is_told_nothing()?;
    assert_eq!(guest.write(5 * MIB - 512, 512, 3)?, OK);
    for told in &mut guests[..3] {
        assert_eq!(told.read(5 * MIB - 512, 512)?, [3; 512]);
    }
    // A window without an end is the end of its file; others in that file have their place.
    let text = bed.refused(json!({"node-name": "window", "size": MIB}))?;
    assert!(text.contains("unshared by node 'fixed'"), "{text}");
    bed.ask("blockdev-del", json!({"node-name": "fixed"}))?;
    bed.ask("block_resize", json!({"node-name": "window", "size": MIB}))?;
    assert_eq!(guests[3].is_told()?, MIB);
    assert_eq!(fs::metadata(bed.path("other.raw"))?.len(), MIB + MIB / 2);
    let text = bed.refused(json!({"node-name": "of", "size": MIB}))?;
    assert!(text.contains("unshared by node 'window'"), "{text}");
    drop(guests);
    bed.end(guest)?;
    Ok(())
}

/// Catches the crash that qemu-storage-daemon has here, and a first front-end that sees the old size.
#[test]
fn before_there_was_a_front_end() -> Res<()> {
    let make = qcow2("top.qcow2", MIB, "", None);
    let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
    bed.resize(2 * MIB)?;
    let mut guest = bed.guest()?;
    assert_eq!(guest.capacity()?, 2 * MIB);
    assert_eq!(guest.write(2 * MIB - 512, 512, 1)?, OK);
    guest.is_told_nothing()?;
    bed.end(guest)?;
    Ok(())
}

/// Catches a guest that goes on with the old size behind a lost connection or another process, and
/// completed writes behind the old end that are gone.
#[test]
fn across_lost_connections_and_kills() -> Res<()> {
    let dir = tempfile::tempdir()?;
    qcow2("top.qcow2", MIB + 512, "cluster_size=4k", None)(dir.path())?;
    let mut setup = Setup::new(dir.path(), &[(dir.path().join("top.qcow2"), "qcow2")]);
    let journal = tempfile::tempdir_in("/dev/shm")?;
    let state = dir.path().join("state");
    fs::create_dir(&state)?;
    let text = |path: &Path| path.display().to_string();
    setup.extra = [
        "--journal".into(),
        text(journal.path()),
        "--state".into(),
        text(&state),
    ]
    .into();
    let mut bed = Bed::start(dir, setup)?;
    let socket = bed.setup.socket.clone();
    let mut guest = bed.guest()?;
    assert_eq!(guest.write(0, 4096, 1)?, OK);
    for round in 0..3u64 {
        let size = MIB + 512 + (round + 1) * 700 * 512;
        bed.resize(size)?;
        assert_eq!(guest.is_told()?, size);
        assert_eq!(guest.write(size - 1024, 1024, round as u8 + 2)?, OK);
        // Nothing has been flushed since.
        bed.daemon.kill()?;
        let program = Program::under_test();
        bed.daemon = bed.setup.start(&program, bed.dir.path(), None)?;
        let qmp = bed.setup.qmp.clone().ok_or("no control socket")?;
        bed.qmp = bed.daemon.qmp(&qmp)?;
        bed.daemon.reconnect(&mut guest.front, &socket)?;
        guest.channel = guest.front.tracked()?.channel()?;
        // Its guest may have seen another size before.
        assert_eq!(guest.is_told()?, size, "round {round}");
        assert_eq!(guest.read(size - 1024, 1024)?, [round as u8 + 2; 1024]);
        assert_eq!(guest.read(0, 4096)?, [1; 4096]);
    }
    let dir = bed.end(guest)?;
    fs::remove_dir_all(&journal)?;
    images::check(&dir.path().join("top.qcow2"))?;
    Ok(())
}

/// Catches refusals that change something, and jobs whose disk gets another size under them.
#[test]
fn what_is_refused_leaves_everything_as_it_was() -> Res<()> {
    let make = |dir: &Path| {
        raw(dir, "base.raw", 2 * MIB, 0xbb)?;
        raw(dir, "some.raw", MIB, 1)?;
        qcow2("top.qcow2", MIB, "", Some(("base.raw", "raw")))(dir)
    };
    let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
    let mut bed = Bed::begin(&layers, make)?;
    let file = json!({"driver": "file", "filename": bed.path("some.raw")});
    for node in [
        json!({"driver": "raw", "node-name": "ro", "read-only": true, "file": file}),
        json!({"driver": "null-co", "node-name": "null", "size": MIB}),
    ] {
        bed.ask("blockdev-add", node)?;
    }
    let mut guest = bed.guest()?;
    let before = (
        fs::read(bed.path("top.qcow2"))?,
        fs::read(bed.path("base.raw"))?,
    );
    for (arguments, words) in [
        (
            json!({"device": "nope", "size": MIB}),
            "Cannot find device='nope' nor node-name=''",
        ),
        (json!({"device": "disk", "size": -1}), "expects a >0 size"),
        (
            json!({"device": "disk", "size": MIB + 1}),
            "must be a multiple of 512",
        ),
        (
            json!({"device": "disk", "size": 1i64 << 62}),
            "Failed to grow the L1 table",
        ),
        (
            json!({"node-name": "layer1", "size": 4 * MIB}),
            "node is used as backing hd of 'layer0'",
        ),
        (
            json!({"node-name": "file0", "size": 4 * MIB}),
            "unshared by node 'layer0'",
        ),
        (
            json!({"node-name": "ro", "size": 4 * MIB}),
            "Image is read-only",
        ),
        (
            json!({"node-name": "null", "size": 4 * MIB}),
            "driver does not support resize",
        ),
    ] {
        let text = bed.refused(arguments.clone())?;
        assert!(text.contains(words), "{arguments}: {text}");
    }
    bed.ask(
        "block-stream",
        json!({"device": "disk", "job-id": "j", "speed": 1}),
    )?;
    let text = bed.refused(json!({"device": "disk", "size": 4 * MIB}))?;
    assert!(
        text.contains("Node 'layer0' is busy: block device is in use by block job: stream"),
        "{text}"
    );
    bed.ask("block-job-cancel", json!({"device": "j", "force": true}))?;
    bed.qmp.job_end("j")?;
    assert_eq!(guest.capacity()?, MIB);
    guest.is_told_nothing()?;
    let after = (
        fs::read(bed.path("top.qcow2"))?,
        fs::read(bed.path("base.raw"))?,
    );
    assert!(before.1 == after.1 && before.0.len() == after.0.len());
    // And now it can be done; what a snapshot covers has its new size, and the overlay as well.
    bed.resize(3 * MIB)?;
    assert_eq!(guest.is_told()?, 3 * MIB);
    assert_eq!(guest.read(MIB, 4096)?, [0; 4096]);
    assert_eq!(guest.read(0, 512)?, [0xbb; 512]);
    let file = bed.path("snap.qcow2");
    bed.ask(
        "blockdev-snapshot-sync",
        json!({"device": "disk", "snapshot-file": file, "snapshot-node-name": "snap"}),
    )?;
    bed.resize(4 * MIB)?;
    assert_eq!(guest.is_told()?, 4 * MIB);
    assert_eq!(
        (bed.size_of("snap")?, bed.size_of("layer0")?),
        (4 * MIB, 3 * MIB)
    );
    assert_eq!(guest.write(4 * MIB - 512, 512, 9)?, OK);
    bed.ask(
        "block-commit",
        json!({"device": "disk", "job-id": "c", "top-node": "snap", "base-node": "layer0"}),
    )?;
    bed.qmp.event(|event| event["event"] == "BLOCK_JOB_READY")?;
    let text = bed.refused(json!({"device": "disk", "size": 5 * MIB}))?;
    assert!(text.contains("in use by block job: commit"), "{text}");
    bed.ask("block-job-complete", json!({"device": "c"}))?;
    bed.qmp.job_end("c")?;
    assert_eq!(guest.capacity()?, 4 * MIB);
    assert_eq!(guest.read(4 * MIB - 512, 512)?, [9; 512]);
    let dir = bed.end(guest)?;
    assert!(
        !images::check(&dir.path().join("top.qcow2"))?,
        "clusters have leaked"
    );
    Ok(())
}

/// Writes and discards around the end of a disk, so many in flight at all times. The last cluster is
/// cleared as a whole, if anything is.
struct Load {
    end: u64,
    in_flight: u64,
}

impl Load {
    const DEPTH: u64 = 16;
    /// The token of a request that is not one of these.
    const NEW: u64 = Self::DEPTH;

    fn begin(queue: &mut Queue, end: u64) -> Res<Self> {
        let mut load = Load { end, in_flight: 0 };
        for number in 0..Self::DEPTH {
            load.submit(queue, number)?;
        }
        queue.kick()?;
        Ok(load)
    }

    fn submit(&mut self, queue: &mut Queue, number: u64) -> Res<()> {
        let sector = self.end - 8 * (number / 2 + 1);
        let discard = [Segment {
            sector,
            count: 8,
            flags: 0,
        }];
        let data = [(0, 4096)];
        let op = match number % 2 {
            0 => Op::write(sector, &data),
            _ => Op::ranges(frontend::DISCARD, &discard),
        };
        queue.submit(&op, number)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Begins another one for each that has ended.
    fn go_on(&mut self, queue: &mut Queue) -> Res<()> {
        queue.wait()?;
        while let Some(done) = queue.pop()? {
            assert_eq!(done.status, OK, "{done:?}");
            self.in_flight -= 1;
            self.submit(queue, done.token)?;
        }
        queue.kick()
    }

    /// Waits for all, and for one more.
    fn end(self, queue: &mut Queue) -> Res<()> {
        let mut left = self.in_flight + 1;
        while left > 0 {
            queue.wait()?;
            while let Some(done) = queue.pop()? {
                assert_eq!(done.status, OK, "{done:?}");
                left -= 1;
            }
        }
        Ok(())
    }
}

/// Catches a disk that is one size for some requests and another one for others, and lost writes: guests
/// write all the while.
#[test]
fn while_requests_are_on_their_way() -> Res<()> {
    let make = |dir: &Path| {
        raw(dir, "base.raw", 64 * MIB, 0xbb)?;
        qcow2(
            "top.qcow2",
            MIB + 512,
            "cluster_size=64k",
            Some(("base.raw", "raw")),
        )(dir)
    };
    let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
    let mut bed = Bed::begin(&layers, make)?;
    let mut guest = bed.guest()?;
    guest.front.memory.write(0, &[7; 4096]);
    let mut end = MIB + 512;
    for round in 1..=24u64 {
        let new = MIB + 512 + round * 1001 * SECTOR;
        // Requests are in flight when the command is sent, and whenever it looks.
        let mut load = Load::begin(&mut guest.front.queues[0], end / SECTOR)?;
        let (tell, answer) = mpsc::channel();
        std::thread::scope(|scope| -> Res<()> {
            let qmp = &mut bed.qmp;
            scope.spawn(move || {
                let arguments = json!({"device": "disk", "size": new});
                let answered = qmp.execute("block_resize", arguments);
                let _ = tell.send(answered.and_then(|answer| Ok(answer?)).map(drop));
            });
            loop {
                match answer.try_recv() {
                    Ok(answered) => return answered,
                    Err(_) => load.go_on(&mut guest.front.queues[0])?,
                }
            }
        })?;
        assert_eq!(guest.is_told()?, new);
        // What is new is there for a request behind those that began before.
        let sector = end / SECTOR;
        let queue = &mut guest.front.queues[0];
        queue.submit(&Op::write(sector, &[(0, 4096)]), Load::NEW)?;
        queue.kick()?;
        load.end(queue)?;
        assert_eq!(guest.read(end, 4096)?, [7; 4096], "round {round}");
        let rest = (new - end - 4096).min(512 << 10) as usize;
        assert!(guest.read(end + 4096, rest)?.iter().all(|byte| *byte == 0));
        guest.front.memory.write(0, &[7; 4096]);
        end = new;
    }
    let dir = bed.end(guest)?;
    assert!(
        !images::check(&dir.path().join("top.qcow2"))?,
        "clusters have leaked"
    );
    Ok(())
}

/// Catches a size that is taken from the command, and one that is not noticed.
#[test]
fn a_device_that_becomes_longer() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("device.raw");
    raw(dir.path(), "device.raw", 2 * MIB, 0)?;
    let losetup = |words: &[&str]| -> Res<String> {
        let output = images::run("losetup", words)?;
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout)?.trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
        }
    };
    let Ok(device) = losetup(&["--find", "--show", images::text(&file)?]) else {
        return Ok(skip("no loop devices")?);
    };
    let outcome = (|| {
        let mut setup = Setup::new(dir.path(), &[(device.clone().into(), "raw")]);
        setup.qmp = Some(dir.path().join("qmp.sock"));
        let mut bed = Bed::start(tempfile::tempdir()?, setup)?;
        let mut guest = bed.guest()?;
        let text = bed.refused(json!({"device": "disk", "size": 4 * MIB}))?;
        assert!(text.contains("Cannot grow device files"), "{text}");
        File::options().write(true).open(&file)?.set_len(4 * MIB)?;
        losetup(&["--set-capacity", &device])?;
        bed.resize(3 * MIB)?;
        assert_eq!(guest.is_told()?, 4 * MIB, "as long as the device is");
        assert_eq!(guest.write(4 * MIB - 512, 512, 1)?, OK);
        bed.end(guest)?;
        Ok(())
    })();
    losetup(&["--detach", &device])?;
    outcome
}

/// Catches a change that fails half-way and leaves another size, or loses what was to be cut off.
#[test]
fn a_failure_leaves_the_old_size() -> Res<()> {
    let make = |dir: &Path| raw(dir, "disk.raw", MIB, 0);
    let mut bed = Bed::begin(&[("disk.raw", "raw")], make)?;
    for (round, (iotype, size)) in [
        ("write", 4 * MIB),
        ("write", MIB / 2),
        ("flush", 4 * MIB),
        ("flush", MIB / 2),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("q{round}");
        let file = bed.path(&format!("{name}.qcow2"));
        qcow2(&format!("{name}.qcow2"), MIB, "cluster_size=512", None)(bed.dir.path())?;
        images::qemu_io(&[
            "-f",
            "qcow2",
            "-c",
            "write -q -P 7 0 1M",
            images::text(&file)?,
        ])?;
        let socket = bed.path(&format!("{name}.sock"));
        bed.ask(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": {"driver": "blkdebug",
                "image": {"driver": "file", "filename": file},
                "inject-error": [{"event": "none", "iotype": iotype, "errno": 5, "once": true}]}}),
        )?;
        bed.ask(
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": name, "node-name": name, "writable": true,
                "addr": {"type": "unix", "path": socket}}),
        )?;
        let mut front = bed
            .daemon
            .connect_tracked(&socket, 1, QUEUE, MIB as usize, true)?;
        let channel = front.tracked()?.channel()?;
        let mut guest = Guest { front, channel };
        let arguments = json!({"device": name, "size": size});
        let text = bed.refused(arguments.clone())?;
        let context = format!("{iotype} to {size}: {text}");
        assert!(text.contains("Input/output error"), "{context}");
        assert_eq!(guest.capacity()?, MIB, "{context}");
        assert_eq!(bed.size_of(&name)?, MIB, "{context}");
        assert!(
            guest.read(0, MIB as usize)?.iter().all(|byte| *byte == 7),
            "{context}"
        );
        if iotype == "flush" {
            bed.ask("x-clear-sync-error", json!({"device": name}))?;
        }
        // The failure is over.
        bed.ask("block_resize", arguments)?;
        assert_eq!(guest.capacity()?, size, "{context}");
        let kept = size.min(MIB) as usize;
        assert!(guest.read(0, kept)?.iter().all(|byte| *byte == 7));
        assert_eq!(guest.write(size - 512, 512, 8)?, OK);
    }
    drop(bed.qmp);
    bed.daemon.stop()?;
    for round in 0..4 {
        images::check(&bed.dir.path().join(format!("q{round}.qcow2")))?;
    }
    Ok(())
}
