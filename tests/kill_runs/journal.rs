//! What happens between a kill and the next start: to the image, to the journal, to the host.
//!
//! Writes complete, are never flushed, and the process is killed: they are in the journal alone.
//! Then something is done to the image or to the journal, and the next start either has all of
//! them, or says what is wrong and changes nothing, or knows that they were lost with the host.
//!
//! What would be caught: a journal that is put over other bytes than its own (an older copy, an
//! image that another program has written, another image at the same path); an image that is
//! served, read or changed as if its journal were not there; a journal of before the host's last
//! start that counts; a start that fails half way; a page that is not there when a record is stored.

use crate::common::Res;
use crate::common::daemon::{Daemon, Program, Setup};
use crate::common::frontend::{Frontend, OK, Op};
use crate::common::images;
use crate::common::stamp::{self, Owner, SECTOR};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Sectors of a write: of one cluster, so that each changes the mapping.
const SECTORS: u64 = 128;
/// Bytes of the disk.
const SIZE: u64 = 64 << 20;
/// The header extension in which an image names its journal.
const EXTENSION: u32 = 0x5354_4a4c;
/// Where the number of the boot lies in it.
const BOOT: u64 = 24;

/// An image, its journal, and the words to serve it.
struct Place {
    dir: TempDir,
    journals: PathBuf,
    _memory: Option<TempDir>,
    image: PathBuf,
    setup: Setup,
}

impl Place {
    fn new() -> Res<Self> {
        let memory = tempfile::tempdir_in("/dev/shm")?;
        let journals = memory.path().to_owned();
        let mut place = Place::with_journals(&journals)?;
        place._memory = Some(memory);
        Ok(place)
    }

    fn with_journals(journals: &Path) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("image.qcow2");
        images::create(&image, SIZE, "cluster_size=64k", None)?;
        let setup = Place::setup(dir.path(), &image, journals)?;
        Ok(Place {
            dir,
            journals: journals.to_owned(),
            _memory: None,
            image,
            setup,
        })
    }

    fn setup(dir: &Path, image: &Path, journals: &Path) -> Res<Setup> {
        let mut setup = Setup::new(dir, &[(image.to_owned(), "qcow2")]);
        setup.qmp = None;
        setup.extra = vec!["--journal".to_owned(), images::text(journals)?.to_owned()];
        Ok(setup)
    }

    fn start(&self) -> Res<(Daemon, Frontend)> {
        start(&self.setup, self.dir.path())
    }

    /// A start that must fail: what it says. The image must be as it was.
    fn refused(&self) -> Res<String> {
        let before = fs::read(&self.image)?;
        let said = fail_to_start(&self.setup, self.dir.path())?;
        if fs::read(&self.image)? != before {
            return Err(format!("the image was changed by a start that failed: {said}").into());
        }
        Ok(said)
    }

    /// Writes without a flush, and kills.
    fn write_and_kill(&self, owners: &[Owner]) -> Res<()> {
        let (mut daemon, mut frontend) = self.start()?;
        write(&mut frontend, owners)?;
        daemon.kill()
    }

    /// Starts, and compares; then ends in order, after which `qemu-img` must find the same.
    fn serves(&self, owners: &[Owner], absent: &[Owner]) -> Res<()> {
        let (daemon, mut frontend) = self.start()?;
        compare(&mut frontend, owners, absent)?;
        drop(frontend);
        daemon.stop()?;
        images::check(&self.image)?;
        let found = images::read_owners(&self.image, "qcow2", &self.dir.path().join("flat"))?;
        for &owner in owners {
            let at = (owner * SECTORS) as usize;
            if found.get(at) != Some(&Ok(owner)) {
                return Err(
                    format!("write {owner} is not in the image: {:?}", found.get(at)).into(),
                );
            }
        }
        Ok(())
    }
}

fn start(setup: &Setup, dir: &Path) -> Res<(Daemon, Frontend)> {
    let mut daemon = setup.start(&Program::under_test(), dir, None)?;
    let frontend = daemon.connect(&setup.socket, 1, 64, SECTORS as usize * SECTOR)?;
    Ok((daemon, frontend))
}

fn fail_to_start(setup: &Setup, dir: &Path) -> Res<String> {
    // What earlier processes said does not count.
    let log = dir.join("daemon.log");
    fs::write(&log, "")?;
    let mut daemon = setup.start(&Program::under_test(), dir, None)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.alive()? {
        if Frontend::connect(&setup.socket, 1, 64, 4096).is_ok() {
            return Err(format!("it serves: {}", daemon.log()).into());
        }
        if Instant::now() > deadline {
            return Err(format!("it neither ends nor serves: {}", daemon.log()).into());
        }
        // A poll of a condition with a deadline: nothing depends on how long this takes.
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = daemon.wait_for_end()?;
    let said = daemon.log();
    if status.code() != Some(1) {
        return Err(format!("ended with {status}: {said}").into());
    }
    Ok(said)
}

/// One cluster for each owner, at a place of its own.
fn write(frontend: &mut Frontend, owners: &[Owner]) -> Res<()> {
    for &owner in owners {
        let mut data = vec![0; SECTORS as usize * SECTOR];
        stamp::fill_all(&mut data, owner, owner * SECTORS);
        frontend.memory.write(0, &data);
        let whole = [(0, data.len())];
        run(frontend, &Op::write(owner * SECTORS, &whole))?;
    }
    Ok(())
}

fn run(frontend: &mut Frontend, op: &Op) -> Res<()> {
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    match queue.run(op)? {
        OK => Ok(()),
        status => Err(format!("{op:?}: status {status}").into()),
    }
}

fn compare(frontend: &mut Frontend, owners: &[Owner], absent: &[Owner]) -> Res<()> {
    let expected = owners.iter().map(|&owner| (owner, owner));
    for (place, owner) in expected.chain(absent.iter().map(|&owner| (owner, 0))) {
        let mut data = vec![0xee; SECTORS as usize * SECTOR];
        frontend.memory.write(0, &data);
        let whole = [(0, data.len())];
        run(frontend, &Op::read(place * SECTORS, &whole))?;
        frontend.memory.read(0, &mut data);
        for (bytes, at) in data.chunks_exact(SECTOR).zip(place * SECTORS..) {
            if stamp::owner_of(bytes, at) != Some(owner) {
                let found = stamp::describe(bytes);
                let wanted = stamp::describe_owner(owner);
                return Err(format!("sector {at}: found {found}, expected {wanted}").into());
            }
        }
    }
    Ok(())
}

fn contains(said: &str, words: &[&str]) -> Res<()> {
    for word in words {
        if !said.to_lowercase().contains(&word.to_lowercase()) {
            return Err(format!("'{word}' is not said: {said}").into());
        }
    }
    Ok(())
}

/// Runs a tool that must succeed.
fn tool(program: &str, args: &[&str]) -> Res<String> {
    let output = images::run(program, args)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{program} {args:?}: {said}").into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn what_completed_is_there_again() -> Res<()> {
    let place = Place::new()?;
    place.write_and_kill(&[1, 2, 3])?;
    place.write_and_kill(&[4])?;
    // Those who only look make no difference.
    images::wait_unlocked(&place.image)?;
    images::check(&place.image)?;
    images::qemu_img(&["info", images::text(&place.image)?])?;
    place.serves(&[1, 2, 3, 4], &[5])?;
    // A clean end leaves nothing behind.
    assert_eq!(fs::read_dir(&place.journals)?.count(), 0, "journals stay");
    place.serves(&[1, 2, 3, 4], &[5])
}

/// A tmpfs of its own, for as long as the value lives.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// None if nothing can be mounted here.
    fn new(size: &str) -> Res<Option<Self>> {
        let dir = tempfile::tempdir()?;
        let options = format!("size={size}");
        let path = images::text(dir.path())?;
        let words = ["-t", "tmpfs", "-o", &options, "none", path];
        let mounted = images::run("mount", &words)?;
        if !mounted.status.success() {
            println!("left out: a file system can only be mounted as root");
            return Ok(None);
        }
        Ok(Some(Tmpfs(dir)))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Nothing can be done about a failure here.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn without_room_for_the_journal_nothing_starts() -> Res<()> {
    let Some(small) = Tmpfs::new("16k")? else {
        return Ok(());
    };
    let place = Place::with_journals(small.0.path())?;
    let said = place.refused()?;
    contains(&said, &["No space left", images::text(small.0.path())?])?;
    assert_eq!(fs::read_dir(small.0.path())?.count(), 0, "half a journal");
    Ok(())
}

#[test]
fn a_tmpfs_that_is_full_later_does_not_matter() -> Res<()> {
    let Some(memory) = Tmpfs::new("64m")? else {
        return Ok(());
    };
    let place = Place::with_journals(memory.0.path())?;
    let (mut daemon, mut frontend) = place.start()?;
    write(&mut frontend, &[1])?;
    // Until there is no page left.
    let filler = File::create(memory.0.path().join("filler"))?;
    let block = vec![1; 1 << 16];
    let mut at = 0;
    while filler.write_at(&block, at).is_ok_and(|n| n > 0) {
        at += block.len() as u64;
    }
    let owners: Vec<Owner> = (1..900).collect();
    write(&mut frontend, &owners)?;
    daemon.kill()?;
    // Neither does it for the next one, which has its journal already.
    place.write_and_kill(&[900, 901])?;
    drop(filler);
    fs::remove_file(memory.0.path().join("filler"))?;
    place.serves(&(1..902).collect::<Vec<_>>(), &[902])
}

/// Puts the bytes of `copy` into the file at `image`, as a restore in place does.
fn restore(copy: &Path, image: &Path) -> Res<()> {
    let file = File::options().write(true).open(image)?;
    let bytes = fs::read(copy)?;
    file.set_len(bytes.len() as u64)?;
    Ok(file.write_all_at(&bytes, 0)?)
}

#[test]
fn an_image_restored_from_a_clean_copy_is_served_as_it_is() -> Res<()> {
    let place = Place::new()?;
    let (daemon, mut frontend) = place.start()?;
    write(&mut frontend, &[1])?;
    drop(frontend);
    daemon.stop()?;
    let copy = place.dir.path().join("copy");
    fs::copy(&place.image, &copy)?;
    place.write_and_kill(&[2, 3])?;
    images::wait_unlocked(&place.image)?;
    restore(&copy, &place.image)?;
    // The copy says of itself that nothing is missing in it.
    place.serves(&[1], &[2, 3])
}

#[test]
fn an_image_restored_from_a_copy_of_a_running_one_is_refused() -> Res<()> {
    let place = Place::new()?;
    let (mut daemon, mut frontend) = place.start()?;
    write(&mut frontend, &[1])?;
    run(&mut frontend, &Op::flush())?;
    let copy = place.dir.path().join("copy");
    fs::copy(&place.image, &copy)?;
    write(&mut frontend, &[2])?;
    run(&mut frontend, &Op::flush())?;
    write(&mut frontend, &[3])?;
    daemon.kill()?;
    images::wait_unlocked(&place.image)?;
    let killed = fs::read(&place.image)?;
    restore(&copy, &place.image)?;
    contains(&place.refused()?, &["journal", images::text(&place.image)?])?;
    // Nothing is lost by that: with the right image the journal still counts.
    fs::write(&copy, killed)?;
    restore(&copy, &place.image)?;
    place.serves(&[1, 2, 3], &[4])
}

#[test]
fn an_image_that_another_program_wrote_is_refused() -> Res<()> {
    let place = Place::new()?;
    place.write_and_kill(&[1, 2])?;
    images::wait_unlocked(&place.image)?;
    let path = images::text(&place.image)?.to_owned();
    let words = ["-f", "qcow2", "-c", "write -P 7 8M 64k", &path];
    tool("qemu-io", &words)?;
    contains(&place.refused()?, &["journal", &path])?;
    // `qemu-img` as well.
    let other = Place::new()?;
    other.write_and_kill(&[1, 2])?;
    images::wait_unlocked(&other.image)?;
    let path = images::text(&other.image)?.to_owned();
    images::qemu_img(&["resize", "-f", "qcow2", &path, "+64M"])?;
    contains(&other.refused()?, &["journal", &path])
}

/// A loop device with a file behind it, for as long as the value lives.
struct Loop(String);

impl Loop {
    fn attach(device: Option<&str>, file: &Path) -> Res<Self> {
        let file = images::text(file)?;
        let found = match device {
            Some(device) => {
                tool("losetup", &[device, file])?;
                device.to_owned()
            }
            None => tool("losetup", &["-f", "--show", file])?,
        };
        Ok(Loop(found))
    }

    /// Detaches it. What a killed process still has open keeps it for a moment.
    fn detach(&self) -> Res<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while images::run("losetup", &[&self.0])?.status.success() {
            images::run("losetup", &["-d", &self.0])?;
            if Instant::now() > deadline {
                return Err(format!("{} stays attached", self.0).into());
            }
            // A poll of a condition with a deadline.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = self.detach();
    }
}

#[test]
fn another_image_on_the_same_loop_device_is_another_image() -> Res<()> {
    let place = Place::new()?;
    let other = place.dir.path().join("other.qcow2");
    images::create(&other, SIZE, "cluster_size=64k", None)?;
    // A device is as long as it is: there must be room behind the image.
    for image in [&place.image, &other] {
        File::options().write(true).open(image)?.set_len(2 * SIZE)?;
    }
    let Ok(device) = Loop::attach(None, &place.image) else {
        println!("left out: no loop device can be had");
        return Ok(());
    };
    let setup = Place::setup(place.dir.path(), Path::new(&device.0), &place.journals)?;
    let words = setup.args().into_iter();
    let served = Device {
        words: words
            .map(|word| word.replace("driver=file,", "driver=host_device,"))
            .collect(),
        socket: setup.socket,
        dir: place.dir.path().to_owned(),
    };
    let (mut daemon, mut frontend) = served.start()?;
    write(&mut frontend, &[1, 2])?;
    daemon.kill()?;
    device.detach()?;

    // Another image: its own bytes, and nothing of the journal.
    let device = Loop::attach(Some(&device.0), &other)?;
    let (daemon, mut frontend) = served.start()?;
    compare(&mut frontend, &[], &[1, 2])?;
    drop(frontend);
    daemon.stop()?;
    images::check(Path::new(&device.0))?;
    device.detach()?;

    // The image of before, on the same device.
    let device = Loop::attach(Some(&device.0), &place.image)?;
    let (daemon, mut frontend) = served.start()?;
    compare(&mut frontend, &[1, 2], &[3])?;
    drop(frontend);
    daemon.stop()?;
    images::check(Path::new(&device.0))?;
    Ok(())
}

/// A daemon with words of its own.
struct Device {
    words: Vec<String>,
    socket: PathBuf,
    dir: PathBuf,
}

impl Device {
    fn start(&self) -> Res<(Daemon, Frontend)> {
        let mut daemon = Daemon::start(&Program::under_test(), &self.words, &self.dir, None)?;
        let frontend = daemon.connect(&self.socket, 1, 64, SECTORS as usize * SECTOR)?;
        Ok((daemon, frontend))
    }
}

#[test]
fn tools_do_not_touch_an_image_with_a_live_journal() -> Res<()> {
    let place = Place::new()?;
    place.write_and_kill(&[1, 2])?;
    images::wait_unlocked(&place.image)?;
    let path = images::text(&place.image)?.to_owned();
    let overlay = place.dir.path().join("overlay.qcow2");
    let backing = Some((place.image.as_path(), "qcow2"));
    images::create(&overlay, SIZE, "cluster_size=64k", backing)?;
    let overlay = images::text(&overlay)?.to_owned();
    let before = fs::read(&place.image)?;
    for words in [
        vec!["check", path.as_str()],
        vec!["check", "--repair", "all", &path],
        vec!["resize", &path, "+1M"],
        vec!["map", &path],
        vec!["map", &overlay],
        vec!["compare", &path, &overlay],
        vec!["rebase", "-b", "", &overlay],
    ] {
        let output = stratactl_image(&words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Err(format!("stratactl image {words:?} succeeds").into());
        }
        contains(&said, &["journal", &path]).map_err(|e| format!("{words:?}: {e}"))?;
        if fs::read(&place.image)? != before {
            return Err(format!("stratactl image {words:?} has changed the image").into());
        }
    }
    // Neither does a daemon as a layer below another image.
    let setup = Setup::new(place.dir.path(), &[(PathBuf::from(&overlay), "qcow2")]);
    contains(
        &fail_to_start(&setup, place.dir.path())?,
        &["journal", &path],
    )?;
    place.serves(&[1, 2], &[3])
}

fn stratactl_image(words: &[&str]) -> Res<Output> {
    let mut all = vec!["image"];
    all.extend(words);
    images::run(env!("CARGO_BIN_EXE_stratactl"), &all)
}

#[test]
fn the_journal_of_another_boot_is_void() -> Res<()> {
    for stays in [false, true] {
        let place = Place::new()?;
        let (mut daemon, mut frontend) = place.start()?;
        write(&mut frontend, &[1, 2])?;
        run(&mut frontend, &Op::flush())?;
        write(&mut frontend, &[3])?;
        daemon.kill()?;
        images::wait_unlocked(&place.image)?;
        let file = File::options().read(true).write(true).open(&place.image)?;
        let at = extension(&file)?.ok_or("the image does not name a journal")? + BOOT;
        let mut boot = [0; 16];
        file.read_exact_at(&mut boot, at)?;
        file.write_all_at(&boot.map(|byte| byte ^ 0x55), at)?;
        if !stays {
            // As after a real one: the tmpfs is empty.
            for entry in fs::read_dir(&place.journals)? {
                fs::remove_file(entry?.path())?;
            }
        }
        if stays {
            // No power cut leaves it: the header is somebody's.
            contains(&place.refused()?, &["journal", "of this boot"])?;
            continue;
        }
        // A power cut, then: what was flushed is there, and nothing of the rest.
        place.serves(&[1, 2], &[3])?;
        // And there is a journal again.
        place.write_and_kill(&[4])?;
        place.serves(&[1, 2, 4], &[3])?;
    }
    Ok(())
}

#[test]
fn a_journal_that_is_gone_is_missed() -> Res<()> {
    let place = Place::new()?;
    place.write_and_kill(&[1, 2])?;
    images::wait_unlocked(&place.image)?;
    for entry in fs::read_dir(&place.journals)? {
        fs::remove_file(entry?.path())?;
    }
    contains(&place.refused()?, &["journal", images::text(&place.image)?])
}

/// Where the data of the extension lies that names the journal.
fn extension(file: &File) -> Res<Option<u64>> {
    let word = |at: u64| -> Res<u32> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_be_bytes(bytes))
    };
    let mut at = u64::from(word(100)?);
    for _ in 0..32 {
        let (kind, len) = (word(at)?, word(at + 4)?);
        match kind {
            0 => break,
            EXTENSION => return Ok(Some(at + 8)),
            _ => at += 8 + u64::from(len).next_multiple_of(8),
        }
    }
    Ok(None)
}

/// One more kill in the midst of a recovery changes nothing: the moments are spread over a start.
#[test]
fn a_recovery_can_be_killed_at_any_moment() -> Res<()> {
    let place = Place::new()?;
    place.write_and_kill(&(1..200).collect::<Vec<_>>())?;
    for step in 0..24 {
        let mut daemon = place
            .setup
            .start(&Program::under_test(), place.dir.path(), None)?;
        // The moment itself, not a wait for something.
        std::thread::sleep(Duration::from_millis(2 * step));
        daemon.kill()?;
    }
    place.serves(&(1..200).collect::<Vec<_>>(), &[200])
}
