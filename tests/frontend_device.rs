//! What the device must do for any front-end: statuses, the configuration space, the serial,
//! signals, front-ends that come and go, and what is left when the daemon ends.
//!
//! Where the reference back-end is known to do otherwise, it is let off, and the test says so.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{
    self, DISCARD, FLUSH, Frontend, GET_ID, IN, IOERR, OK, OUT, Op, PATIENCE, Segment, UNSUPP,
    WRITE_ZEROES, piece, usual_features,
};
use common::images;
use common::rng::Rng;
use common::stamp::{self, SECTOR};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

/// Bytes of the disk: the last cluster is cut short.
const DISK: u64 = (8 << 20) + 512;
const SECTORS: u64 = DISK / SECTOR as u64;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 128;

/// A daemon that serves an empty qcow2 image.
struct Bed {
    dir: tempfile::TempDir,
    image: PathBuf,
    setup: Setup,
    program: Program,
}

impl Bed {
    fn new() -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("disk.qcow2");
        images::create(&image, DISK, "compat=1.1", None)?;
        let mut setup = Setup::new(dir.path(), &[(image.clone(), "qcow2")]);
        setup.qmp = None;
        Ok(Bed {
            dir,
            image,
            setup,
            program: Program::under_test(),
        })
    }

    fn start(&self) -> Res<Daemon> {
        self.setup.start(&self.program, self.dir.path(), None)
    }

    fn connect(&self, daemon: &mut Daemon) -> Res<Frontend> {
        daemon.connect(&self.setup.socket, self.setup.queues, QUEUE, MEMORY)
    }

    fn both(&self) -> Res<(Daemon, Frontend)> {
        let mut daemon = self.start()?;
        let frontend = self.connect(&mut daemon)?;
        Ok((daemon, frontend))
    }

    fn socket(&self) -> &Path {
        &self.setup.socket
    }
}

/// Writes stamped sectors and waits.
fn write(frontend: &mut Frontend, sector: u64, count: usize, owner: u64) -> Res<u8> {
    let mut bytes = vec![0; count * SECTOR];
    stamp::fill_all(&mut bytes, owner, sector);
    frontend.memory.write(0, &bytes);
    frontend.queues[0].run(&Op::write(sector, &[(0, bytes.len())]))
}

/// Reads sectors and says whose stamps they bear.
fn owners(frontend: &mut Frontend, sector: u64, count: usize) -> Res<Vec<Option<u64>>> {
    let mut bytes = vec![0xee; count * SECTOR];
    frontend.memory.write(0, &bytes);
    let status = frontend.queues[0].run(&Op::read(sector, &[(0, bytes.len())]))?;
    assert_eq!(status, OK, "reading {count} sectors at {sector}");
    frontend.memory.read(0, &mut bytes);
    let sectors = bytes.chunks_exact(SECTOR).zip(sector..);
    Ok(sectors
        .map(|(data, at)| stamp::owner_of(data, at))
        .collect())
}

/// The device still works: it takes a write and gives it back.
fn alive(frontend: &mut Frontend) -> Res<()> {
    assert_eq!(
        write(frontend, 8, 8, 4711)?,
        OK,
        "a write after an odd request"
    );
    assert_eq!(
        owners(frontend, 8, 8)?,
        vec![Some(4711); 8],
        "a read after an odd request"
    );
    Ok(())
}

fn serial(frontend: &mut Frontend) -> Res<Vec<u8>> {
    frontend.memory.write(0, &[0xee; 20]);
    let op = Op {
        kind: GET_ID,
        sector: 0,
        data: &[(0, 20)],
        segments: &[],
    };
    assert_eq!(frontend.queues[0].run(&op)?, OK, "GET_ID");
    let mut serial = vec![0; 20];
    frontend.memory.read(0, &mut serial);
    Ok(serial)
}

/// Would catch a capacity in the wrong unit or rounded to clusters, a segment limit that rings of
/// this size cannot hold, a cache that is denied (a guest would then not flush).
#[test]
fn the_configuration_space_is_true() -> Res<()> {
    let mut bed = Bed::new()?;
    bed.setup.queues = 3;
    let (daemon, frontend) = bed.both()?;
    let config = frontend.config()?;
    let features = VirtioBlkFeatureFlags::from_bits_truncate(frontend.features());
    for wanted in [
        VirtioBlkFeatureFlags::SEG_MAX,
        VirtioBlkFeatureFlags::BLK_SIZE,
        VirtioBlkFeatureFlags::FLUSH,
        VirtioBlkFeatureFlags::TOPOLOGY,
        VirtioBlkFeatureFlags::CONFIG_WCE,
        VirtioBlkFeatureFlags::MQ,
        VirtioBlkFeatureFlags::DISCARD,
        VirtioBlkFeatureFlags::WRITE_ZEROES,
    ] {
        assert!(
            features.contains(wanted),
            "the feature {wanted:?} is not offered"
        );
    }
    assert!(
        !features.contains(VirtioBlkFeatureFlags::RO),
        "a writable device says read-only"
    );
    assert_eq!(config.capacity.to_native(), SECTORS);
    assert_eq!(config.blk_size.to_native(), 512);
    assert_eq!(config.num_queues.to_native(), 3);
    let seg_max = config.seg_max.to_native();
    assert!((1..=254).contains(&seg_max), "seg_max {seg_max}");
    for (name, sectors, segments) in [
        (
            "discard",
            config.max_discard_sectors,
            config.max_discard_seg,
        ),
        (
            "write zeroes",
            config.max_write_zeroes_sectors,
            config.max_write_zeroes_seg,
        ),
    ] {
        assert!(
            sectors.to_native() > 0 && segments.to_native() > 0,
            "no limit for {name}"
        );
    }
    if !bed.program.is_reference() {
        assert_eq!(
            config.writeback, 1,
            "metadata is cached, and the guest must know"
        );
    }
    drop(frontend);
    daemon.stop()
}

/// Would catch a serial that is empty, not text, the same for two exports, or new at every start.
#[test]
fn each_export_has_a_lasting_serial_of_its_own() -> Res<()> {
    let mut bed = Bed::new()?;
    let second = bed.dir.path().join("second.raw");
    std::fs::File::create(&second)?.set_len(DISK)?;
    let socket = bed.dir.path().join("second.sock");
    let (file, path) = (second.display(), socket.display());
    bed.setup.extra = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=second,filename={file}"),
        "--export".to_owned(),
        format!("type=vhost-user-blk,id=two,node-name=second,addr.type=unix,addr.path={path}"),
    ]
    .to_vec();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let _ = std::fs::remove_file(&socket);
        let (mut daemon, mut first) = bed.both()?;
        let mut second = daemon.connect(&socket, 1, QUEUE, MEMORY)?;
        seen.push((serial(&mut first)?, serial(&mut second)?));
        drop((first, second));
        daemon.stop()?;
    }
    let [before, after] = seen.as_slice() else {
        return Err("two starts".into());
    };
    assert_eq!(before, after, "the serials change from start to start");
    for serial in [&before.0, &before.1] {
        let text: Vec<u8> = serial.iter().copied().take_while(|&b| b != 0).collect();
        assert!(
            !text.is_empty() && text.iter().all(u8::is_ascii_graphic),
            "serial {serial:?}"
        );
    }
    if !bed.program.is_reference() {
        assert_ne!(before.0, before.1, "two exports share a serial");
    }
    Ok(())
}

/// Would catch a write that reaches a read-only image, or reads that fail with it.
#[test]
fn a_read_only_device_refuses_writes_and_goes_on() -> Res<()> {
    let mut bed = Bed::new()?;
    bed.setup.writable = false;
    let before = images::fingerprint(&bed.image)?;
    let (daemon, mut frontend) = bed.both()?;
    let features = VirtioBlkFeatureFlags::from_bits_truncate(frontend.features());
    assert!(
        features.contains(VirtioBlkFeatureFlags::RO),
        "RO is not offered"
    );
    assert_eq!(write(&mut frontend, 0, 8, 1)?, IOERR, "a write");
    let segment = [Segment {
        sector: 0,
        count: 8,
        flags: 0,
    }];
    for kind in [DISCARD, WRITE_ZEROES] {
        let status = frontend.queues[0].run(&Op::ranges(kind, &segment))?;
        // Without the features, the types may also be unknown.
        assert_ne!(status, OK, "request type {kind}");
    }
    assert_eq!(frontend.queues[0].run(&Op::flush())?, OK, "a flush");
    assert_eq!(owners(&mut frontend, 0, 8)?, vec![Some(0); 8], "a read");
    drop(frontend);
    daemon.stop()?;
    assert_eq!(
        before,
        images::fingerprint(&bed.image)?,
        "the image was written to"
    );
    Ok(())
}

/// Would catch arithmetic that wraps, checks that look at the start only, and a device that stops
/// after such a request.
#[test]
fn requests_past_the_end_fail_and_harm_nothing() -> Res<()> {
    let bed = Bed::new()?;
    let (daemon, mut frontend) = bed.both()?;
    let last = SECTORS - 1;
    for sector in [
        SECTORS,
        last,
        SECTORS + 1000,
        u64::MAX,
        u64::MAX - 1,
        1 << 55,
        u64::MAX >> 9,
    ] {
        let data = [(0, 2 * SECTOR)];
        for op in [Op::read(sector, &data), Op::write(sector, &data)] {
            assert_eq!(frontend.queues[0].run(&op)?, IOERR, "{op:?}");
        }
        for (kind, count) in [(DISCARD, 2), (WRITE_ZEROES, 2), (DISCARD, 4000)] {
            let segment = [Segment {
                sector,
                count,
                flags: 0,
            }];
            let status = frontend.queues[0].run(&Op::ranges(kind, &segment))?;
            assert_eq!(status, IOERR, "request type {kind}, sector {sector}");
        }
    }
    assert_eq!(write(&mut frontend, last, 1, 7)?, OK, "the last sector");
    assert_eq!(
        owners(&mut frontend, last, 1)?,
        vec![Some(7)],
        "the last sector"
    );
    alive(&mut frontend)?;
    drop(frontend);
    daemon.stop()
}

/// Would catch a request that is taken for another one, done in part, or that stops the device.
#[test]
fn what_is_not_supported_is_refused() -> Res<()> {
    let bed = Bed::new()?;
    let (daemon, mut frontend) = bed.both()?;
    let queue = &mut frontend.queues[0];
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 100, u32::MAX] {
        let op = Op {
            kind,
            sector: 0,
            data: &[(0, SECTOR)],
            segments: &[],
        };
        assert_eq!(queue.run(&op)?, UNSUPP, "request type {kind}");
    }
    alive(&mut frontend)?;
    let queue = &mut frontend.queues[0];
    let whole = Segment {
        sector: 8,
        count: 8,
        flags: 0,
    };
    for (kind, flags) in [
        (WRITE_ZEROES, 2),
        (WRITE_ZEROES, 1 << 31),
        (DISCARD, 2),
        (DISCARD, 1),
    ] {
        let segments = [Segment { flags, ..whole }];
        let status = queue.run(&Op::ranges(kind, &segments))?;
        assert_eq!(status, UNSUPP, "request type {kind} with flags {flags:#x}");
    }
    if frontend.config()?.max_write_zeroes_seg.to_native() == 1 {
        for kind in [WRITE_ZEROES, DISCARD] {
            let status = frontend.queues[0].run(&Op::ranges(kind, &[whole, whole]))?;
            assert_eq!(status, UNSUPP, "two segments in request type {kind}");
        }
    }
    assert_eq!(
        owners(&mut frontend, 8, 8)?,
        vec![Some(4711); 8],
        "what was refused was done"
    );
    drop(frontend);
    daemon.stop()
}

/// Would catch lengths that are rounded, and buffers that are overrun.
#[test]
fn data_that_is_no_whole_sector_fails() -> Res<()> {
    let bed = Bed::new()?;
    let (daemon, mut frontend) = bed.both()?;
    for len in [1, 511, 513, 4095] {
        for kind in [IN, OUT] {
            let op = Op {
                kind,
                sector: 8,
                data: &[(0, len)],
                segments: &[],
            };
            assert_ne!(frontend.queues[0].run(&op)?, OK, "{op:?}");
        }
    }
    alive(&mut frontend)?;
    drop(frontend);
    daemon.stop()
}

/// A guest that points outside its memory loses at most its own device. Would catch a daemon that
/// follows such pointers, or gives up altogether.
#[test]
fn an_address_outside_the_memory_harms_only_its_owner() -> Res<()> {
    let bed = Bed::new()?;
    let (mut daemon, mut frontend) = bed.both()?;
    let end = frontend.memory.address(MEMORY);
    for address in [0, 4096, usize::MAX - 100, end, end - 256] {
        for kind in [IN, OUT] {
            let op = Op {
                kind,
                sector: 0,
                data: &[],
                segments: &[],
            };
            frontend.queues[0].submit_at(&op, &[piece(address, SECTOR)], 1)?;
            frontend.queues[0].kick()?;
            // It may be answered with an error, or the queue may be stopped for good: then there
            // is no answer to wait for, but what follows must work all the same.
            if bed.program.is_reference() {
                continue;
            }
            frontend::poll(&[frontend.queues[0].call_fd()], Duration::from_millis(50))?;
            if let Some(done) = frontend.queues[0].pop()? {
                assert_eq!(
                    done.status, IOERR,
                    "an answer to an address of {address:#x}"
                );
            }
        }
    }
    drop(frontend);
    let mut next = bed.connect(&mut daemon)?;
    alive(&mut next)?;
    drop(next);
    daemon.stop()
}

/// Would catch an SG list that is cut, put together in the wrong order or copied by sectors.
#[test]
fn data_may_lie_in_many_odd_pieces() -> Res<()> {
    let bed = Bed::new()?;
    let (daemon, mut frontend) = bed.both()?;
    let total = 64 * SECTOR;
    let mut bytes = vec![0; total];
    stamp::fill_all(&mut bytes, 9, 100);
    let mut rng = Rng::new(1);
    for round in 0..20 {
        // Pieces of any length, in memory that has gaps between them.
        let limit = if round == 0 { 1 } else { 120 };
        let mut pieces = Vec::new();
        let (mut at, mut done) = (rng.below(100) as usize, 0);
        while done < total {
            let mut len = rng.between(1, 1200) as usize;
            if pieces.len() + 1 >= limit || done + len > total {
                len = total - done;
            }
            pieces.push((at, len));
            done += len;
            at += len + rng.below(50) as usize;
        }
        let mut from = 0;
        for &(at, len) in &pieces {
            frontend
                .memory
                .write(at, bytes.get(from..from + len).unwrap_or_default());
            from += len;
        }
        assert_eq!(
            frontend.queues[0].run(&Op::write(100, &pieces))?,
            OK,
            "{pieces:?}"
        );
        assert_eq!(
            owners(&mut frontend, 100, 64)?,
            vec![Some(9); 64],
            "{pieces:?}"
        );
        frontend.memory.write(0, &vec![0; MEMORY / 2]);
        assert_eq!(
            frontend.queues[0].run(&Op::read(100, &pieces))?,
            OK,
            "{pieces:?}"
        );
        let mut read = Vec::new();
        for &(at, len) in &pieces {
            let mut part = vec![0; len];
            frontend.memory.read(at, &mut part);
            read.extend(part);
        }
        assert!(read == bytes, "read back otherwise into {pieces:?}");
    }
    drop(frontend);
    daemon.stop()
}

/// Would catch a call descriptor that is not signalled when it is handed over (a front-end that
/// reconnects would wait for ever), and completions that are not signalled, with and without
/// event indices.
#[test]
fn the_call_descriptor_is_signalled() -> Res<()> {
    let mut bed = Bed::new()?;
    bed.setup.queues = 2;
    let mut daemon = bed.start()?;
    let index = VirtioFeatureFlags::RING_EVENT_IDX.bits();
    for features in [usual_features(), usual_features() & !index] {
        let mut frontend =
            daemon.retry(|| Frontend::connect_with(bed.socket(), 2, QUEUE, MEMORY, features))?;
        for queue in &mut frontend.queues {
            let signalled = frontend::poll(&[queue.call_fd()], PATIENCE)?;
            assert!(signalled, "no signal after the call descriptor was set");
            for round in 0..500u64 {
                // From one request to many at a time, each time waiting for the descriptor.
                for token in 0..=round % 20 {
                    queue.submit(
                        &Op::read(token, &[(token as usize * SECTOR, SECTOR)]),
                        token,
                    )?;
                }
                queue.kick()?;
                while queue.in_flight() > 0 {
                    queue.wait()?;
                    while let Some(done) = queue.pop()? {
                        assert_eq!(done.status, OK, "a read");
                    }
                }
            }
        }
    }
    daemon.stop()
}

/// Would catch descriptors, threads or mappings that stay behind when a front-end goes, however
/// it goes.
#[test]
fn front_ends_come_and_go_without_a_trace() -> Res<()> {
    let mut bed = Bed::new()?;
    bed.setup.queues = 2;
    let mut daemon = bed.start()?;
    let mut baseline = (0, 0);
    for round in 0..200 {
        let mut frontend = bed.connect(&mut daemon)?;
        match round % 4 {
            // Without a word.
            0 => {}
            1 => alive(&mut frontend)?,
            // With requests in flight. (The reference aborts when they complete.)
            2 if !bed.program.is_reference() => {
                for queue in &mut frontend.queues {
                    for token in 0..30 {
                        let data = [(token as usize * SECTOR, SECTOR)];
                        queue.submit(&Op::write(token * 50, &data), token)?;
                    }
                    queue.kick()?;
                }
            }
            // Before it has said what it wants, or after nonsense.
            3 => {
                drop(frontend);
                drop(UnixStream::connect(bed.socket())?);
                // The daemon may hang up before it has read all of this.
                let _ = UnixStream::connect(bed.socket())?.write_all(&[0x55; 64]);
                continue;
            }
            _ => {}
        }
        drop(frontend);
        if round == 20 {
            baseline = settled(&daemon, None)?;
        }
    }
    // One more that works, after which all is as it was.
    let mut frontend = bed.connect(&mut daemon)?;
    alive(&mut frontend)?;
    drop(frontend);
    let end = settled(&daemon, Some(baseline))?;
    assert!(
        end.0 <= baseline.0,
        "descriptors: {} at first, {} at last",
        baseline.0,
        end.0
    );
    assert!(
        end.1 <= baseline.1,
        "threads: {} at first, {} at last",
        baseline.1,
        end.1
    );
    daemon.stop()
}

/// Descriptors and threads of a daemon, once the last front-end's memory is unmapped and, if a
/// goal is given, they are down to it; or when it has had time enough for that.
fn settled(daemon: &Daemon, goal: Option<(usize, usize)>) -> Res<(usize, usize)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = (daemon.descriptors()?, daemon.threads()?);
        let mappings = daemon.shared_mappings()?;
        let reached = goal.is_none_or(|goal| now.0 <= goal.0 && now.1 <= goal.1);
        if mappings == 0 && reached {
            return Ok(now);
        }
        if Instant::now() > deadline {
            assert_eq!(
                mappings, 0,
                "memory of front-ends that are gone is still mapped"
            );
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A second front-end may be refused, or wait for its turn; the first must not notice. Would catch
/// a daemon that lets the second one take over rings or memory of the first.
#[test]
fn a_second_front_end_does_no_harm_to_the_first() -> Res<()> {
    let bed = Bed::new()?;
    let (mut daemon, mut first) = bed.both()?;
    let socket = bed.socket().to_owned();
    let (sender, second) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(Frontend::connect(&socket, 1, QUEUE, MEMORY)));
    for round in 1..200 {
        let sector = round * 8 % 4000;
        assert_eq!(write(&mut first, sector, 8, round)?, OK, "round {round}");
        assert_eq!(
            owners(&mut first, sector, 8)?,
            vec![Some(round); 8],
            "round {round}"
        );
    }
    assert!(daemon.alive()?, "the daemon ended");
    drop(first);
    // If it had to wait, its turn has come.
    match second.recv_timeout(PATIENCE)? {
        Ok(mut second) => alive(&mut second)?,
        Err(refused) => println!("the second front-end was refused: {refused}"),
    }
    alive(&mut bed.connect(&mut daemon)?)?;
    daemon.stop()
}

/// Would catch queues that share state which they must not share, and allocations of several
/// queues that collide.
#[test]
fn four_queues_run_on_one_image() -> Res<()> {
    let mut bed = Bed::new()?;
    bed.setup.queues = 4;
    let (daemon, mut frontend) = bed.both()?;
    let memory = frontend.memory.clone();
    let threads: Vec<_> = frontend
        .queues
        .drain(..)
        .zip(0u64..)
        .map(|(mut queue, n)| {
            let memory = memory.clone();
            std::thread::spawn(move || -> Res<()> {
                // Each has every fourth sector: all clusters are everybody's.
                let base = n as usize * 64 * SECTOR;
                for round in 0..40u64 {
                    for token in 0..32u64 {
                        let sector = (round * 32 + token) * 4 + n;
                        let at = base + token as usize * SECTOR;
                        let mut bytes = [0; SECTOR];
                        stamp::fill(&mut bytes, n + 1, sector);
                        memory.write(at, &bytes);
                        queue.submit(&Op::write(sector, &[(at, SECTOR)]), token)?;
                    }
                    queue.kick()?;
                    while queue.in_flight() > 0 {
                        queue.wait()?;
                        while let Some(done) = queue.pop()? {
                            assert_eq!(done.status, OK, "a write");
                        }
                    }
                }
                assert_eq!(queue.run(&Op::flush())?, OK, "a flush");
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a queue's thread panicked")??;
    }
    drop(frontend);
    daemon.stop()?;
    assert!(!images::check(&bed.image)?, "clusters are lost");
    let found = images::read_owners(&bed.image, "qcow2", &bed.dir.path().join("scratch"))?;
    for (sector, owner) in (0..40 * 32 * 4).zip(found) {
        assert_eq!(owner, Ok(sector % 4 + 1), "sector {sector}");
    }
    Ok(())
}

/// Would catch counters of another queue, or of none, in what the control socket tells, and polling
/// although it is switched off.
#[test]
fn the_control_socket_tells_what_each_queue_has_done() -> Res<()> {
    let mut bed = Bed::new()?;
    if bed.program.is_reference() {
        eprintln!("skipped: the reference counts nothing for its exports");
        return Ok(());
    }
    let socket = bed.dir.path().join("qmp.sock");
    bed.setup.qmp = Some(socket.clone());
    bed.setup.queues = 2;
    bed.setup.iothread = true;
    bed.setup.poll_max_ns = Some(0);
    let (mut daemon, mut frontend) = bed.both()?;
    for _ in 0..5 {
        assert_eq!(write(&mut frontend, 8, 8, 1)?, OK, "a write");
    }
    owners(&mut frontend, 8, 16)?;
    assert_eq!(frontend.queues[1].run(&Op::flush())?, OK, "a flush");
    let mut qmp = daemon.qmp(&socket)?;
    let exports = qmp.execute("query-blockstats", serde_json::json!({}))??;
    let (export, queues) = (&exports[0], &exports[0]["queues"]);
    assert_eq!(export["device"], "disk");
    assert_eq!(export["stats"]["wr_bytes"], 5 * 8 * SECTOR);
    assert_eq!(export["stats"]["flush_operations"], 1);
    assert_eq!(export["poll-max-ns"], 0);
    for (counter, expected) in [
        ("writes", [5, 0]),
        ("reads", [1, 0]),
        ("read-bytes", [16 * SECTOR, 0]),
        ("flushes", [0, 1]),
        ("errors", [0, 0]),
        ("polls-found", [0, 0]),
        ("polls-missed", [0, 0]),
        ("poll-ns", [0, 0]),
    ] {
        let found = [0, 1].map(|queue: usize| &queues[queue][counter]);
        assert_eq!(found, expected.each_ref(), "{counter}");
    }
    assert_eq!(queues.as_array().map(Vec::len), Some(2));
    drop(frontend);
    daemon.stop()
}

/// Would catch a write that completes while its data or mapping is only in the daemon's memory,
/// though the guest cannot ask for more.
#[test]
fn without_flush_every_completed_write_survives_a_kill() -> Res<()> {
    let bed = Bed::new()?;
    if bed.program.is_reference() {
        println!("left out: the reference is known to lose such writes");
        return Ok(());
    }
    let mut daemon = bed.start()?;
    let cache = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::CONFIG_WCE;
    let features = usual_features() & !cache.bits();
    let mut frontend =
        daemon.retry(|| Frontend::connect_with(bed.socket(), 1, QUEUE, MEMORY, features))?;
    for round in 0..20 {
        assert_eq!(
            write(&mut frontend, round * 300, 16, round + 1)?,
            OK,
            "write {round}"
        );
    }
    daemon.kill()?;
    survived(&bed)
}

/// Would catch a flush that leaves anything behind in the daemon's memory.
#[test]
fn flushed_writes_survive_a_kill() -> Res<()> {
    let bed = Bed::new()?;
    let (mut daemon, mut frontend) = bed.both()?;
    for round in 0..20 {
        assert_eq!(
            write(&mut frontend, round * 300, 16, round + 1)?,
            OK,
            "write {round}"
        );
    }
    let flush = Op {
        kind: FLUSH,
        sector: 0,
        data: &[],
        segments: &[],
    };
    assert_eq!(frontend.queues[0].run(&flush)?, OK, "a flush");
    daemon.kill()?;
    survived(&bed)
}

fn survived(bed: &Bed) -> Res<()> {
    images::wait_unlocked(&bed.image)?;
    images::check(&bed.image)?;
    let found = images::read_owners(&bed.image, "qcow2", &bed.dir.path().join("scratch"))?;
    for round in 0..20u64 {
        for (sector, owner) in found.iter().enumerate().skip(round as usize * 300).take(16) {
            assert_eq!(*owner, Ok(round + 1), "sector {sector} after the kill");
        }
    }
    Ok(())
}

/// SIGTERM with a front-end connected and writes in flight: exit code 0, and an image that is
/// sound, with nothing leaked. Would catch a daemon that waits for its front-end, or leaves its
/// metadata behind.
#[test]
fn a_daemon_that_is_asked_to_end_leaves_a_clean_image() -> Res<()> {
    let bed = Bed::new()?;
    let (daemon, mut frontend) = bed.both()?;
    assert_eq!(write(&mut frontend, 0, 16, 1)?, OK, "a write before");
    for token in 0..30u64 {
        let data = [(token as usize * SECTOR * 8, SECTOR * 8)];
        frontend.queues[0].submit(&Op::write(1000 + token * 300, &data), token)?;
    }
    frontend.queues[0].kick()?;
    daemon.stop()?;
    images::wait_unlocked(&bed.image)?;
    assert!(!images::check(&bed.image)?, "clusters are lost");
    let found = images::read_owners(&bed.image, "qcow2", &bed.dir.path().join("scratch"))?;
    for owner in found.iter().take(16) {
        assert_eq!(*owner, Ok(1), "a write that had completed");
    }
    Ok(())
}
