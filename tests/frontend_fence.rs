//! The fence: a daemon that takes the place of one that was killed serves only when the other's I/O
//! has ended.
//!
//! What would be caught: a daemon that serves while a read of the one before still writes into the
//! guest's memory, or a write still takes from it, be it of a base, of a block device, of an image
//! without locks, or of another export; images that are still locked by then; a ring that knows of no fence; a start beside a daemon that
//! runs; a wait for what never ends, or one that cannot be ended, or that names nobody.
//!
//! Storage that hangs is a loop device over a file whose server is stopped: nothing here depends on
//! how fast anything is.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{Frontend, GET_ID, OK, Op, PATIENCE};
use common::images;
use common::skips::skip;
use common::slow::{LoopDevice, Slow};
use common::stamp::{self, SECTOR};
use io_uring::IoUring;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DISK: u64 = 8 << 20;
const QUEUE: u16 = 128;
/// Bytes of a request.
const LEN: usize = 64 << 10;
/// Requests of each kind in flight.
const COUNT: usize = 8;
/// Where a request for the serial puts it.
const SERIAL: usize = 2 * COUNT * LEN;
const MEMORY: usize = SERIAL + 4096;

/// Who wrote what is on the disk at first.
const OLD: u64 = 7;
/// What the guest writes, the same everywhere: the server of qemu-storage-daemon 10.0 takes the data
/// of one write for that of another that is in flight with it.
static NEW: [u8; LEN] = [0xdd; LEN];

fn fence(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".fence");
    name.into()
}

/// Waits until the log of `daemon` says `words`, or `unless` happens, which is an error.
fn wait_for_words(daemon: &mut Daemon, words: &str, mut unless: impl FnMut() -> bool) -> Res<()> {
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains(words) {
        if unless() {
            return Err(format!("it did not wait: {}", daemon.log()).into());
        }
        if !daemon.alive()? || Instant::now() > deadline {
            return Err(format!("it never says {words:?}: {}", daemon.log()).into());
        }
        // A poll of a condition with a deadline: nothing depends on how long this takes.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Waits until a start has failed, and returns what it said.
fn refusal(daemon: &mut Daemon) -> Res<String> {
    let status = daemon.wait_for_end()?;
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    Ok(daemon.log())
}

fn say_everything(setup: &mut Setup) {
    setup
        .extra
        .extend(["--trace".to_owned(), "enable=*".to_owned()]);
}

/// The words for another disk beside the one of a `Setup`.
fn another_export(image: &Path, socket: &Path, writable: &str) -> Vec<String> {
    let (image, socket) = (image.display(), socket.display());
    [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=second,filename={image},cache.direct=on,locking=off,\
             auto-read-only=on"
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=two,node-name=second,writable={writable},addr.type=unix,\
             addr.path={socket}"
        ),
    ]
    .to_vec()
}

/// Storage that can be made to hang, with a stamp in each sector.
struct Hanging {
    device: LoopDevice,
    slow: Slow,
}

impl Hanging {
    fn new(dir: &Path) -> Res<Option<Self>> {
        let Some(slow) = Slow::mount(dir, DISK)? else {
            return Ok(None);
        };
        let mut bytes = vec![0; DISK as usize];
        stamp::fill_all(&mut bytes, OLD, 0);
        OpenOptions::new()
            .write(true)
            .open(&slow.file)?
            .write_all(&bytes)?;
        let device = LoopDevice::over(&slow.file)?;
        Ok(device.map(|device| Hanging { device, slow }))
    }

    /// What is on the disk, from request `n` on.
    fn on_disk(&self, n: usize) -> Res<Vec<u8>> {
        let mut bytes = vec![0; LEN];
        File::open(&self.slow.image)?.read_exact_at(&mut bytes, (n * LEN) as u64)?;
        Ok(bytes)
    }
}

/// What was on the disk at first, for request `n`.
fn stamps(n: usize) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    stamp::fill_all(&mut bytes, OLD, (n * LEN / SECTOR) as u64);
    bytes
}

fn in_memory(frontend: &Frontend, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    frontend.memory.read(n * LEN, &mut bytes);
    bytes
}

/// Puts reads, and writes if wanted, into the queue, all of which hang. Returns when the worker has
/// given them to the kernel.
fn leave_in_flight(frontend: &mut Frontend, writes: bool) -> Res<()> {
    let kinds = if writes { 2 } else { 1 };
    for n in 0..kinds * COUNT {
        let (sector, data) = ((n * LEN / SECTOR) as u64, [(n * LEN, LEN)]);
        let op = if n < COUNT {
            frontend.memory.write(n * LEN, &[0xee; LEN]);
            Op::read(sector, &data)
        } else {
            frontend.memory.write(n * LEN, &NEW);
            Op::write(sector, &data)
        };
        frontend.queues[0].submit(&op, n as u64)?;
    }
    // The worker takes requests in order, and submits at the end of a turn what it has not taken
    // for longer than a turn.
    for token in [100, 101, 102] {
        let serial = Op {
            kind: GET_ID,
            ..Op::read(0, &[(SERIAL, 20)])
        };
        frontend.queues[0].submit(&serial, token)?;
        frontend.queues[0].kick()?;
        loop {
            match frontend.queues[0].pop()? {
                Some(done) if done.token == token => break,
                Some(done) => return Err(format!("{done:?} did not hang").into()),
                None => frontend.queues[0].wait()?,
            }
        }
    }
    Ok(())
}

/// A daemon is killed under I/O that hangs; the next one, with `next`, must not serve before the I/O
/// has ended. `at` is the socket of the disk that hangs.
fn outlived(dir: &Path, hanging: &Hanging, setup: &Setup, at: &Path, next: &Setup) -> Res<()> {
    let program = Program::under_test();
    let mut daemon = setup.start(&program, dir, None)?;
    // With an inflight region, without which answers come in the order of the requests.
    let mut frontend = daemon.connect_tracked(at, 1, QUEUE, MEMORY, true)?;
    // What has to be read before it is.
    let data = [(0, LEN)];
    assert_eq!(frontend.queues[0].run(&Op::read(0, &data))?, OK);
    let writes = setup.extra.iter().any(|word| word.contains("writable=on"))
        || (setup.layers.len() == 1 && setup.writable);
    hanging.slow.signal(libc::SIGSTOP);
    let left = leave_in_flight(&mut frontend, writes).and_then(|()| daemon.kill());
    if left.is_err() {
        // Or it could not even be killed.
        hanging.slow.signal(libc::SIGCONT);
    }
    left?;

    let mut next_daemon = next.start(&program, dir, None)?;
    let served = || UnixStream::connect(&next.socket).is_ok();
    let waits = wait_for_words(&mut next_daemon, "waiting for the fence", served);
    for n in 0..COUNT {
        assert!(in_memory(&frontend, n) == [0xee; LEN], "it did not hang");
    }
    hanging.slow.signal(libc::SIGCONT);
    waits?;
    let mut guest = next_daemon.connect(&next.socket, 1, QUEUE, MEMORY)?;
    // All that was in flight has ended, and the memory belongs to the guest again.
    for n in 0..COUNT {
        assert!(in_memory(&frontend, n) == stamps(n), "a read goes on");
    }
    if writes {
        for n in COUNT..2 * COUNT {
            assert!(hanging.on_disk(n)? == NEW, "a write goes on");
        }
    }
    assert_eq!(guest.queues[0].run(&Op::read(0, &data))?, OK);
    let log = next_daemon.log();
    let line = log.lines().rfind(|line| line.contains("serving after"));
    let line = line.ok_or("it does not say when it serves")?;
    let fenced = line.rsplit("fence ").next().unwrap_or_default();
    assert!(!fenced.starts_with("0 "), "{line}");
    assert!(log.contains("fence: waited"), "{log}");
    next_daemon.stop()
}

/// The disk that hangs, or `None` where the machine cannot have one.
fn bed() -> Res<Option<(tempfile::TempDir, Hanging)>> {
    let dir = tempfile::tempdir()?;
    let Some(hanging) = Hanging::new(dir.path())? else {
        skip("no loop device over a file system in user space here")?;
        return Ok(None);
    };
    Ok(Some((dir, hanging)))
}

#[test]
fn reads_of_a_base() -> Res<()> {
    let Some((dir, hanging)) = bed()? else {
        return Ok(());
    };
    let (top, base) = (dir.path().join("top.qcow2"), &hanging.device.path);
    images::create(&top, DISK, "compat=1.1", Some((base.as_path(), "raw")))?;
    let layers = [(top, "qcow2"), (base.clone(), "raw")];
    let mut setup = Setup::new(dir.path(), &layers);
    setup.direct = true;
    say_everything(&mut setup);
    outlived(dir.path(), &hanging, &setup, &setup.socket, &setup)
}

#[test]
fn reads_and_writes_of_a_block_device() -> Res<()> {
    let Some((dir, hanging)) = bed()? else {
        return Ok(());
    };
    let mut setup = Setup::new(dir.path(), &[(hanging.device.path.clone(), "raw")]);
    setup.direct = true;
    say_everything(&mut setup);
    outlived(dir.path(), &hanging, &setup, &setup.socket, &setup)
}

/// The next daemon has the other export alone, on storage that is fast: its fence is in the rings of
/// the one that hangs.
#[test]
fn requests_of_another_export_and_without_locks() -> Res<()> {
    let Some((dir, hanging)) = bed()? else {
        return Ok(());
    };
    let top = dir.path().join("top.qcow2");
    images::create(&top, DISK, "compat=1.1", None)?;
    let mut next = Setup::new(dir.path(), &[(top, "qcow2")]);
    say_everything(&mut next);
    let mut setup = next.clone();
    let socket = dir.path().join("second.sock");
    let second = another_export(&hanging.device.path, &socket, "on");
    setup.extra.extend(second);
    outlived(dir.path(), &hanging, &setup, &socket, &next)
}

/// Kills under direct I/O on an ordinary disk, of a chain whose layers are all locked: with the fence
/// the images are free, too.
#[test]
fn the_locks_of_images_are_free_with_the_fence() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let (top, base) = (dir.path().join("top.qcow2"), dir.path().join("base.raw"));
    fs::write(&base, vec![1; DISK as usize])?;
    images::create(&top, DISK, "compat=1.1", Some((base.as_path(), "raw")))?;
    let mut setup = Setup::new(dir.path(), &[(top, "qcow2"), (base, "raw")]);
    setup.direct = true;
    setup.qmp = None;
    say_everything(&mut setup);
    let program = Program::under_test();
    let mut daemon = setup.start(&program, dir.path(), None)?;
    for _ in 0..10 {
        let mut frontend = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
        for n in 0..2 * COUNT {
            let (sector, data) = ((n * LEN / SECTOR) as u64, [(n * LEN, LEN)]);
            // Each write is of a new cluster, for which more is read and written.
            let op = match n % 2 {
                0 => Op::read(sector, &data),
                _ => Op::write(sector, &data),
            };
            frontend.queues[0].submit(&op, n as u64)?;
        }
        frontend.queues[0].kick()?;
        daemon.kill()?;
        daemon = setup.start(&program, dir.path(), None)?;
        let mut next = daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
        let memory = |n| in_memory(&frontend, n);
        let seen: Vec<_> = (0..2 * COUNT).map(memory).collect();
        // Whatever is still to come has time to.
        for n in 0..2 * COUNT {
            let data = [(0, LEN)];
            let op = Op::read((n * LEN / SECTOR) as u64, &data);
            assert_eq!(next.queues[0].run(&op)?, OK);
        }
        assert!((0..2 * COUNT).map(memory).eq(seen), "it goes on");
    }
    let log = daemon.log();
    daemon.stop()?;
    assert!(!log.contains("waiting for a lock on"), "{log}");
    Ok(())
}

/// Every ring of a process: what is registered in it.
fn rings(pid: u32) -> Res<Vec<BTreeSet<PathBuf>>> {
    let mut rings = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if target.as_os_str() != "anon_inode:[io_uring]" {
            continue;
        }
        let number = entry.file_name();
        let info = fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(number))?;
        // `    0: /path`, of the files that have one.
        let files = info
            .lines()
            .filter_map(|line| line.trim_start().split_once(": "));
        let paths =
            files.filter(|(number, path)| number.parse::<u32>().is_ok() && path.starts_with('/'));
        rings.push(paths.map(|(_, path)| path.trim().into()).collect());
    }
    Ok(rings)
}

#[test]
fn every_ring_has_every_fence() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    File::create(path("base.raw"))?.set_len(DISK)?;
    images::create(
        &path("top.qcow2"),
        DISK,
        "compat=1.1",
        Some((path("base.raw").as_path(), "raw")),
    )?;
    let layers = [(path("top.qcow2"), "qcow2"), (path("base.raw"), "raw")];
    File::create(path("second.raw"))?.set_len(DISK)?;
    let mut setup = Setup::new(dir.path(), &layers);
    setup.queues = 3;
    setup.extra = another_export(&path("second.raw"), &path("second.sock"), "on");
    let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let expected: BTreeSet<PathBuf> = [&setup.socket, &path("second.sock")]
        .map(|socket| fence(socket))
        .into();
    let _frontend = daemon.connect(&setup.socket, 3, QUEUE, MEMORY)?;
    let socket = setup.qmp.clone().ok_or("no control socket")?;
    let mut qmp = daemon.qmp(&socket)?;
    let before = rings(daemon.pid())?;
    // The thread of the daemon itself, and two for each queue.
    assert!(before.len() > 2 * 4, "{before:?}");
    // A ring that is made later.
    fs::write(path("base.raw"), vec![1; DISK as usize])?;
    let job = json!({"device": Setup::node(0), "job-id": "job", "speed": 1});
    qmp.execute("block-stream", job)??;
    let deadline = Instant::now() + PATIENCE;
    let after = loop {
        let after = rings(daemon.pid())?;
        // One that has just been made gets them before it is used.
        if after.len() > before.len() && after.iter().all(|ring| *ring == expected) {
            break after;
        }
        assert!(
            Instant::now() < deadline,
            "the job's ring does not come, or not with them: {after:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    };
    for ring in before.iter().chain(&after) {
        assert_eq!(*ring, expected);
    }
    daemon.stop()
}

/// A small disk with one export.
fn small(dir: &Path) -> Res<Setup> {
    let image = dir.join("disk.raw");
    File::create(&image)?.set_len(DISK)?;
    let mut setup = Setup::new(dir, &[(image, "raw")]);
    setup.qmp = None;
    Ok(setup)
}

#[test]
fn a_daemon_that_runs_is_named_at_once_and_left_alone() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut setup = small(dir.path())?;
    let mut first = setup.start(&Program::under_test(), dir.path(), None)?;
    let mut frontend = first.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    let other = dir.path().join("other");
    fs::create_dir(&other)?;
    setup.extra = vec!["--fence-timeout=3600".to_owned()];
    let mut second = Daemon::start(&Program::under_test(), &setup.args(), &other, None)?;
    let said = refusal(&mut second)?;
    let wanted = format!("is held by process {} (", first.pid());
    assert!(said.contains(&wanted), "{said}");
    let wanted = fence(&setup.socket).display().to_string();
    assert!(said.contains(&wanted), "{said}");
    let data = [(0, LEN)];
    assert_eq!(frontend.queues[0].run(&Op::read(0, &data))?, OK);
    drop(frontend);
    first.stop()?;
    assert!(!setup.socket.exists());
    // It stays for those who come after.
    assert!(fence(&setup.socket).exists());
    setup.start(&Program::under_test(), dir.path(), None)?;
    Ok(())
}

/// A lock that nobody is seen to hold, as of a process that has ended before its I/O.
struct Unseen {
    _ring: IoUring,
}

impl Unseen {
    fn hold(path: &Path) -> Res<Self> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        // SAFETY: all-zero bytes are a valid flock, which the call reads.
        let result = unsafe {
            let mut lock: libc::flock = std::mem::zeroed();
            lock.l_type = libc::F_WRLCK as i16;
            libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        #[expect(clippy::disallowed_methods, reason = "it does no I/O")]
        let ring = IoUring::new(1)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Unseen { _ring: ring })
    }
}

#[test]
fn a_lock_that_is_given_back_in_time_is_taken() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut setup = small(dir.path())?;
    say_everything(&mut setup);
    let unseen = Unseen::hold(&fence(&setup.socket))?;
    let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let served = || UnixStream::connect(&setup.socket).is_ok();
    wait_for_words(&mut daemon, "waiting for the fence", served)?;
    // Neither opened nor locked.
    let image = fs::canonicalize(dir.path().join("disk.raw"))?;
    for entry in fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.flatten() {
        assert_ne!(fs::read_link(entry.path()).ok().as_ref(), Some(&image));
    }
    drop(unseen);
    daemon.connect(&setup.socket, 1, QUEUE, MEMORY)?;
    daemon.stop()
}

#[test]
fn a_wait_ends_with_its_time_and_with_an_order() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let mut setup = small(dir.path())?;
    say_everything(&mut setup);
    let _unseen = Unseen::hold(&fence(&setup.socket))?;
    let mut waiting = setup.start(&Program::under_test(), dir.path(), None)?;
    wait_for_words(&mut waiting, "waiting for the fence", || false)?;
    // Told to end, it ends in good order.
    waiting.stop()?;
    setup.extra.push("--fence-timeout=0".to_owned());
    let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let said = refusal(&mut daemon)?;
    for words in [
        "I/O of a process that has ended has not ended",
        &fence(&setup.socket).display().to_string(),
        "--fence-timeout=SECONDS waits longer",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert!(!setup.socket.exists());
    Ok(())
}

#[test]
fn a_link_in_the_place_of_the_fence_is_refused() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = small(dir.path())?;
    let target = dir.path().join("target");
    symlink(&target, fence(&setup.socket))?;
    let mut daemon = setup.start(&Program::under_test(), dir.path(), None)?;
    let said = refusal(&mut daemon)?;
    assert!(said.contains("symbolic link"), "{said}");
    assert!(!target.exists() && !setup.socket.exists());
    Ok(())
}

/// Lets the children of this process have a descriptor.
fn hand_down(fd: RawFd) -> Res<()> {
    // SAFETY: no memory is passed.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

#[test]
fn sockets_that_are_handed_down_have_a_fence_where_they_have_a_name() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let setup = small(dir.path())?;
    let image = &setup.layers.first().ok_or("no image")?.0;
    let hidden = SocketAddr::from_abstract_name(dir.path().as_os_str().as_encoded_bytes())?;
    for (listener, has_fence) in [
        (UnixListener::bind(&setup.socket)?, true),
        (UnixListener::bind_addr(&hidden)?, false),
    ] {
        hand_down(listener.as_raw_fd())?;
        let args = [
            format!("--fd={}", listener.as_raw_fd()),
            format!("--blk-file={}", image.display()),
            "--image-format=raw".to_owned(),
        ];
        let log = dir.path().join(format!("log-{has_fence}"));
        fs::create_dir(&log)?;
        // A client in the backlog is served.
        let waiting = match has_fence {
            true => UnixStream::connect(&setup.socket)?,
            false => UnixStream::connect_addr(&hidden)?,
        };
        let mut daemon = Daemon::start(&Program::under_test(), &args, &log, None)?;
        answered(&waiting)?;
        let warned = daemon.log().contains("no fence for export 'disk0'");
        assert_eq!(warned, !has_fence, "{}", daemon.log());
        let expected = BTreeSet::from_iter(has_fence.then(|| fence(&setup.socket)));
        for ring in rings(daemon.pid())? {
            assert_eq!(ring, expected);
        }
        daemon.kill()?;
    }
    Ok(())
}

/// Asks for the features, in the words of the protocol, and waits for the answer.
fn answered(mut stream: &UnixStream) -> Res<()> {
    const GET_FEATURES: [u32; 3] = [1, 1, 0];
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&GET_FEATURES.map(u32::to_le_bytes).concat())?;
    std::io::Read::read_exact(&mut stream, &mut [0; 20])?;
    Ok(())
}
