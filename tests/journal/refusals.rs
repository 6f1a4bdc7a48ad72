//! Images that do not go with their journal, and those who must not touch an image before its journal
//! has been taken over. On files, since it is about these too.
//!
//! What would be caught: a journal adopted by an older copy, by another file, after a power cut, or
//! when somebody else has written; one that contradicts itself and is used in part; an image that is
//! read or written as though it had no journal; a mark that QEMU does not accept; a header that loses
//! its backing file for the mark's sake; changes that complete when the journal's memory is gone.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stratablk::chain::{Chain, Layer, View};
use stratablk::error::Result;
use stratablk::format::qcow2::journal::{self, Folder};
use stratablk::format::{Format, Qcow2, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::OpenFlags;
use stratablk::storage::{AlignedBuf, FileStorage, IoBufs, Storage};

use crate::support::*;

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 64 << 10;

/// An image in a file, with a folder for its journal.
struct Place {
    dir: tempfile::TempDir,
    path: PathBuf,
    reactor: Reactor,
}

/// A process that has the image; dropped, it has been killed.
struct Process {
    image: Arc<Qcow2>,
    chain: Arc<Chain>,
    reactor: Reactor,
}

impl Place {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = in_dir(&dir, "image.qcow2");
        create(&path, options, SIZE);
        Self {
            dir,
            path,
            reactor: Reactor::for_this_thread().unwrap(),
        }
    }

    /// Opens the image in another boot.
    fn open_in_boot(&self, boot: [u64; 2]) -> Result<Process> {
        self.open_with(qcow2::Options {
            writable: true,
            journal: Some(Folder::of_boot(self.dir.path(), None, boot).unwrap()),
            ..Default::default()
        })
    }

    fn folder(&self) -> Arc<Folder> {
        Folder::open(self.dir.path(), None).unwrap()
    }

    fn open_with(&self, options: qcow2::Options) -> Result<Process> {
        let flags = OpenFlags {
            writable: options.writable,
            ..OpenFlags::default()
        };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&self.path, flags).unwrap());
        let image = self
            .reactor
            .block_on(Qcow2::open(storage.clone(), options))?;
        let image = Arc::new(image);
        let layer = Layer {
            name: "top".into(),
            format: Format::Qcow2(image.clone()),
            storage,
            read_only: false,
            discard: true,
            copy_on_read: false,
        };
        Ok(Process {
            image,
            chain: Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap()),
            reactor: self.reactor.clone(),
        })
    }

    fn open(&self) -> Result<Process> {
        self.open_with(qcow2::Options {
            writable: true,
            journal: Some(self.folder()),
            ..Default::default()
        })
    }

    /// Says why the image is not opened.
    fn refusal(&self) -> String {
        let text = self.open().err().expect("the image was opened").to_string();
        assert!(text.contains("forget-journal"), "{text}");
        text
    }

    fn journal(&self) -> PathBuf {
        let mut files = fs::read_dir(self.dir.path()).unwrap();
        let path = files.find_map(|entry| {
            let path = entry.unwrap().path();
            path.extension()
                .is_some_and(|it| it == "journal")
                .then_some(path)
        });
        path.expect("there is no journal")
    }

    fn forget(&self) {
        let flags = OpenFlags {
            writable: true,
            ..OpenFlags::default()
        };
        let storage = FileStorage::open(&self.path, flags).unwrap();
        let forgotten = self.reactor.block_on(journal::forget(&storage));
        assert!(forgotten.unwrap().is_some());
    }

    /// Changes bytes of the image's header.
    fn change_header(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(&self.path).unwrap();
        change(&mut bytes);
        write_in_place(&self.path, &bytes);
    }
}

/// As `cp` does over a file that is there: the inode stays.
fn write_in_place(path: &Path, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

impl Process {
    fn write(&self, cluster: u64, value: u8) -> Result<()> {
        let mut buffer = AlignedBuf::zeroed(4096);
        buffer.fill(value);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, 4096) };
        let view = View::of(self.chain.clone());
        self.reactor.block_on(view.write(cluster * CLUSTER, bufs))
    }

    fn read(&self, cluster: u64) -> u8 {
        let buffer = AlignedBuf::zeroed(4096);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, 4096) };
        let view = View::of(self.chain.clone());
        self.reactor
            .block_on(view.read(cluster * CLUSTER, bufs))
            .unwrap();
        buffer[0]
    }

    fn flush(&self) {
        self.reactor.block_on(self.image.flush()).unwrap();
    }
}

/// An image whose process was killed: cluster 1 was flushed, cluster 2 was not.
fn killed() -> Place {
    let place = Place::new("compat=1.1");
    let process = place.open().unwrap();
    process.write(1, 1).unwrap();
    process.flush();
    process.write(2, 2).unwrap();
    place
}

fn position_of_mark(bytes: &[u8]) -> usize {
    let kind = journal::EXTENSION.to_be_bytes();
    let at = bytes[..512].windows(4).position(|bytes| bytes == kind);
    at.expect("there is no mark") + 8
}

#[test]
fn qemu_reads_an_image_with_a_journal_and_clears_the_bit_when_it_writes() {
    let place = killed();
    let path = place.path.to_str().unwrap();
    let before = fs::read(&place.path).unwrap();
    check(&place.path, true);
    run("qemu-img", &["info", path]);
    run("qemu-img", &["compare", path, path]);
    assert_eq!(before, fs::read(&place.path).unwrap());
    // It can still be taken over.
    let process = place.open().unwrap();
    assert_eq!((process.read(1), process.read(2)), (1, 2));
    drop(process);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 4k", path]);
    let text = place.refusal();
    assert!(text.contains("another program"), "{text}");
    place.forget();
    let process = place.open().unwrap();
    assert_eq!((process.read(1), process.read(2)), (1, 0));
}

#[test]
fn a_clean_close_leaves_nothing() {
    for backing in [
        None,
        Some("base.raw"),
        Some("a-name-that-is-rather-long-for-a-header.raw"),
    ] {
        let place = Place::new("compat=1.1");
        if let Some(name) = backing {
            let base = in_dir(&place.dir, name);
            fs::write(&base, vec![5; SIZE as usize]).unwrap();
            create_over(&place.path, "compat=1.1", Path::new(name), "raw");
        }
        let before = run("qemu-img", &["info", place.path.to_str().unwrap()]);
        let process = place.open().unwrap();
        process.write(1, 1).unwrap();
        drop(process);
        check(&place.path, true);
        let process = place.open().unwrap();
        process.reactor.block_on(process.image.close()).unwrap();
        let header = process.image.header();
        assert!(header.journal.is_none() && header.autoclear & journal::AUTOCLEAR == 0);
        drop(process);
        assert!(!fs::read_dir(place.dir.path()).unwrap().any(|entry| {
            entry
                .unwrap()
                .path()
                .extension()
                .is_some_and(|it| it == "journal")
        }));
        check(&place.path, false);
        let after = run("qemu-img", &["info", place.path.to_str().unwrap()]);
        let told = |text: &str| -> Vec<String> {
            let sizes = ["disk size", "file length"];
            let lines = text
                .lines()
                .filter(|line| sizes.iter().all(|size| !line.contains(size)));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(told(&before), told(&after));
    }
}

#[test]
fn an_older_copy_in_the_image_s_place_is_refused() {
    let place = Place::new("compat=1.1");
    let process = place.open().unwrap();
    process.write(1, 1).unwrap();
    process.flush();
    let old = fs::read(&place.path).unwrap();
    process.write(2, 2).unwrap();
    process.flush();
    process.write(3, 3).unwrap();
    drop(process);
    let now = fs::read(&place.path).unwrap();
    write_in_place(&place.path, &old);
    let text = place.refusal();
    assert!(text.contains("older than its journal"), "{text}");
    // A good copy in another file is not told from a bad one.
    fs::remove_file(&place.path).unwrap();
    fs::write(&place.path, &now).unwrap();
    let text = place.refusal();
    assert!(text.contains("copied, or restored"), "{text}");
}

#[test]
fn after_a_power_cut_the_journal_is_void() {
    let place = killed();
    fs::remove_file(place.journal()).unwrap();
    let process = place.open_in_boot([7, 9]).unwrap();
    assert_eq!((process.read(1), process.read(2)), (1, 0));
    process.write(2, 7).unwrap();
    drop(process);
    assert_eq!(place.open_in_boot([7, 9]).unwrap().read(2), 7);
}

/// A container has another number each time that it is started; the host's memory stays.
#[test]
fn a_journal_that_is_there_is_taken_over_whatever_the_boot() {
    let place = killed();
    let process = place.open_in_boot([7, 9]).unwrap();
    assert_eq!((process.read(1), process.read(2)), (1, 2));
    process.write(3, 3).unwrap();
    process.flush();
    process.write(4, 4).unwrap();
    drop(process);
    let process = place.open_in_boot([7, 10]).unwrap();
    assert_eq!((process.read(3), process.read(4)), (3, 4));
}

/// The mark is the last thing in the header of an image without a backing file, and zeros at the
/// header's end are cut off in memory.
#[test]
fn a_boot_whose_number_ends_in_zeros_is_like_any_other() {
    for boot in [[1, 0x7c00], [1 << 56, 0], [0, 0]] {
        let place = Place::new("compat=1.1");
        let process = place.open_in_boot(boot).unwrap();
        for round in 1..4 {
            process.write(round, round as u8).unwrap();
            process.flush();
        }
        process.write(4, 4).unwrap();
        drop(process);
        let process = place.open_in_boot(boot).unwrap();
        assert_eq!((process.read(3), process.read(4)), (3, 4), "{boot:?}");
    }
}

#[test]
fn a_journal_has_one_process_also_where_images_have_no_locks() {
    let place = killed();
    let reader = || {
        place.open_with(qcow2::Options {
            journal: Some(place.folder()),
            ..Default::default()
        })
    };
    let both = (reader().unwrap(), reader().unwrap());
    drop(both);
    let process = place.open().unwrap();
    for other in [place.open(), reader()] {
        let text = other.err().expect("it was opened").to_string();
        assert!(text.contains("is in use"), "{text}");
        assert!(!text.contains("forget-journal"), "{text}");
    }
    process.write(3, 3).unwrap();
    drop(process);
    assert_eq!(place.open().unwrap().read(3), 3);
}

#[test]
fn an_image_whose_header_has_no_room_for_the_mark_is_served_without_a_journal() {
    let place = Place::new("compat=1.1");
    let name = format!("{}.raw", "b".repeat(246));
    let below = in_dir(&place.dir, &name);
    fs::write(&below, vec![5; SIZE as usize]).unwrap();
    let name = format!("{}{name}", "./".repeat(50));
    create_over(
        &place.path,
        "compat=1.1,cluster_size=512",
        Path::new(&name),
        "raw",
    );
    let process = place.open().unwrap();
    assert!(process.image.header().journal.is_none());
    process.write(1, 1).unwrap();
    process.flush();
    drop(process);
    check(&place.path, true);
    let info = run("qemu-img", &["info", place.path.to_str().unwrap()]);
    assert!(info.contains(&name), "{info}");
}

/// A process may die when it has made a journal and not named it, or when it names it no longer and
/// has not removed it.
#[test]
fn journals_that_no_image_names_are_removed_when_their_image_has_another() {
    let place = killed();
    let process = place.open().unwrap();
    process.flush();
    drop(process);
    let left = place.journal();
    let empty = fs::read(&left).unwrap();
    let other = place.dir.path().join("other.qcow2");
    create(&other, "compat=1.1", SIZE);
    place.forget();
    // Of another image, which may be served again any time; and one that a process has.
    let neighbour = Place {
        path: other,
        dir: tempfile::tempdir_in("/dev/shm").unwrap(),
        reactor: place.reactor.clone(),
    };
    let process = neighbour.open().unwrap();
    process.write(1, 1).unwrap();
    drop(process);
    let name = neighbour.journal();
    let beside = place.dir.path().join(name.file_name().unwrap());
    fs::copy(&name, &beside).unwrap();
    let held = fs::File::open(&left).unwrap();
    held.lock_shared().unwrap();
    let reopen = || {
        let process = place.open().unwrap();
        process.reactor.block_on(process.image.close()).unwrap();
        (left.exists(), beside.exists())
    };
    assert_eq!(reopen(), (true, true));
    drop(held);
    // It has something that nobody else has: it may be that of an image with the same inode.
    let mut used = empty.clone();
    used[1024..1032].copy_from_slice(&(1u64 << 20).to_ne_bytes());
    write_in_place(&left, &used);
    assert_eq!(reopen(), (true, true));
    write_in_place(&left, &empty);
    assert_eq!(reopen(), (false, true));
    let process = place.open().unwrap();
    process.write(3, 3).unwrap();
    drop(process);
    assert_eq!(place.open().unwrap().read(3), 3);
}

/// Of a later version, for example.
#[test]
fn a_mark_of_another_form_is_refused() {
    let place = killed();
    place.change_header(|bytes| {
        let at = position_of_mark(bytes);
        bytes[at - 1] = 48;
    });
    let text = place.open().err().expect("it was opened").to_string();
    assert!(text.contains("version that is not known"), "{text}");
}

#[test]
fn nobody_touches_an_image_before_its_journal_is_adopted() {
    let place = killed();
    let with = |writable, ignore_journal| {
        let opened = place.open_with(qcow2::Options {
            writable,
            ignore_journal,
            ..Default::default()
        });
        opened.map(|process| process.read(2))
    };
    for (writable, ignore) in [(false, false), (true, false), (true, true)] {
        let text = with(writable, ignore).unwrap_err().to_string();
        assert!(text.contains("--journal"), "{text}");
    }
    assert_eq!(with(false, true).unwrap(), 0, "as the flush left it");
    // Who only reads sees what completed, and changes nothing.
    let before = fs::read(&place.path).unwrap();
    let reader = place.open_with(qcow2::Options {
        journal: Some(place.folder()),
        ..Default::default()
    });
    let reader = reader.unwrap();
    assert_eq!((reader.read(1), reader.read(2)), (1, 2));
    drop(reader);
    let path = place.path.to_str().unwrap();
    let stratactl = env!("CARGO_BIN_EXE_stratactl");
    for command in [
        vec!["map"],
        vec!["check"],
        vec!["check", "--repair=all"],
        vec!["resize"],
    ] {
        let mut args = vec!["image"];
        args.extend(&command);
        args.push(path);
        if command == ["resize"] {
            args.push("8M");
        }
        let refused = output(stratactl, &args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && text.contains("journal"),
            "{args:?}: {text}"
        );
    }
    run(stratactl, &["image", "map", "-U", path]);
    assert_eq!(before, fs::read(&place.path).unwrap());
    run(stratactl, &["image", "forget-journal", path]);
    run(stratactl, &["image", "map", path]);
}

#[test]
fn a_journal_that_is_gone_or_damaged_is_refused_as_a_whole() {
    let place = killed();
    let path = place.journal();
    let good = fs::read(&path).unwrap();
    let tail = u64::from_ne_bytes(good[1024..1032].try_into().unwrap());
    let head = u64::from_ne_bytes(good[512..520].try_into().unwrap());
    assert!(head > 0 && head < tail, "{head} {tail}");
    for at in (8..80)
        .step_by(8)
        .chain((head..tail).map(|word| 4096 + word as usize * 8))
    {
        let mut bad = good.clone();
        bad[at + 3] ^= 4;
        write_in_place(&path, &bad);
        place.refusal();
    }
    for (at, value) in [
        (512, tail + 1),
        (512, head + 1),
        (1024, tail - 1),
        (1024, tail + 3),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        write_in_place(&path, &bad);
        place.refusal();
    }
    write_in_place(&path, &good[..good.len() / 2]);
    place.refusal();
    fs::remove_file(&path).unwrap();
    assert!(place.refusal().contains("is not there"));
    // Somebody else's may not be used.
    fs::write(&path, &good).unwrap();
    assert!(place.refusal().contains("nobody else"));
}

#[test]
fn changes_fail_when_the_journal_s_memory_is_gone_and_the_rest_goes_on() {
    let place = killed();
    let process = place.open().unwrap();
    process.write(3, 3).unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(place.journal())
        .unwrap();
    file.set_len(0).unwrap();
    // The first one may be the one that meets it.
    let _ = process.write(4, 4);
    let text = process.write(5, 5).unwrap_err().to_string();
    assert!(text.contains("journal's memory"), "{text}");
    process.write(2, 8).unwrap();
    assert_eq!(
        (process.read(1), process.read(2), process.read(3)),
        (1, 8, 3)
    );
    process.flush();
    drop(process);
    assert!(place.refusal().contains("length"));
    place.forget();
    let process = place.open().unwrap();
    assert_eq!(
        (process.read(1), process.read(2), process.read(3)),
        (1, 8, 3)
    );
    drop(process);
    check(&place.path, true);
}

#[test]
fn an_image_of_version_2_has_no_journal() {
    let place = Place::new("compat=0.10");
    let process = place.open().unwrap();
    process.write(1, 1).unwrap();
    assert!(process.image.header().journal.is_none());
    process.flush();
    drop(process);
    check(&place.path, true);
}

#[test]
fn a_folder_on_a_disk_is_refused_and_so_are_odd_sizes() {
    let text = Folder::open(Path::new("/proc"), None)
        .unwrap_err()
        .to_string();
    assert!(text.contains("tmpfs"), "{text}");
    let place = Place::new("compat=1.1");
    for size in [0, 4096, 300 << 10, 1 << 40] {
        assert!(
            Folder::open(place.dir.path(), Some(size)).is_err(),
            "{size}"
        );
    }
    assert!(Folder::open(&place.path, None).is_err(), "no folder");
}
