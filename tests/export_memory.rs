//! Memory that front-ends share, against the other exports of the process: what cannot be mapped
//! safely is refused, what is taken away costs its owner alone, and nothing of it stays behind.
//!
//! What would be caught: SIGBUS that ends the process (huge pages of which none is free, regions
//! that are no whole huge pages, more regions than a table has room for, files that shrink), bytes
//! in the wrong place of a huge page, a worker that hangs in a page fault, and descriptors,
//! mappings and addresses that regions use up.

#![allow(clippy::unwrap_used)]

#[path = "common/skips.rs"]
mod skips;

mod export_common;

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use export_common::hand::*;
use export_common::*;
use memmap2::MmapMut;
use skips::skip;
use stratablk::export::Export;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const IOERR: u8 = 1;
const DISK: usize = 1 << 20;
const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// Where the regions of the tests begin in the guest's eyes, above [`Hand`]'s own.
const EXTRA: u64 = 0x10_0000_0000;

fn memfd(name: &CStr, flags: u32, len: usize) -> OwnedFd {
    // SAFETY: the name is a string, and the descriptor is new and ours.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64).unwrap();
    file.into()
}

/// A region of `file` at `guest`; the front-end need not have it mapped.
fn region(file: &OwnedFd, guest: u64, offset: usize, len: usize) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: len as u64,
        userspace_addr: guest,
        mmap_offset: offset as u64,
        mmap_handle: file.as_raw_fd(),
    }
}

/// An export of a disk in memory, whose bytes are 7.
fn sevens(place: &Place) -> Export {
    start(place.config(), memory_root(vec![7; DISK]).0)
}

/// A front-end of the export at `place` is served.
fn serves(place: &Place) {
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.bytes(DATA, 512).fill(0);
    assert_eq!(hand.request(IN, 0, &[(DATA, 512, true)]).1, OK);
    assert_eq!(hand.bytes(DATA, 512), [7; 512]);
}

/// Lines of `/proc/self/maps` that name a file.
fn mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

/// Descriptors of this process that name a file.
fn descriptors(name: &str) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    targets
        .filter(|target| target.to_string_lossy().contains(name))
        .count()
}

fn free_huge_pages() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("HugePages_Free:"));
    let count = line.and_then(|line| line.split_whitespace().nth(1));
    count.map_or(0, |count| count.parse().unwrap())
}

/// Huge pages for a test, given back at its end.
struct Pool {
    before: String,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Pool {
    /// `None`: the machine lets us have none.
    fn of(count: usize) -> Option<Self> {
        let before = std::fs::read_to_string(POOL).ok()?;
        let pool = Self { before };
        std::fs::write(POOL, count.to_string()).ok()?;
        (free_huge_pages() >= count).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        std::fs::write(POOL, &self.before).unwrap();
    }
}

/// Regions of a file of huge pages: whole ones, parts at the begin, in the middle and at the end
/// of a page, and one that reaches over a border.
const PARTS: [(usize, usize); 5] = [
    (0, HUGE),
    (0, PAGE),
    (3 * PAGE, PAGE),
    (HUGE - PAGE, PAGE),
    (HUGE - PAGE, 2 * PAGE),
];

/// One test, since both halves need the machine's huge pages to be as they say.
#[test]
fn regions_of_huge_pages_are_served_and_cost_their_owner_only() {
    huge_pages_that_cannot_be_had();
    huge_pages_that_are_there();
}

fn huge_pages_that_cannot_be_had() {
    if free_huge_pages() > 0 {
        eprintln!("skipped: somebody has huge pages free, so that none can be missing");
        return;
    }
    let place = Place::new();
    let export = sevens(&place);
    let file = memfd(c"huge-none", libc::MFD_HUGETLB, 2 * HUGE);
    for (offset, len) in PARTS {
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        // Data in a page that cannot be had, and then a header as well.
        hand.front
            .add_mem_region(&region(&file, EXTRA, offset, len))
            .unwrap();
        hand.chain(0, IN, 0, &[(EXTRA, 512, true)]);
        hand.push(0);
        hand.chain(4, IN, 0, &[(DATA, 512, true)]);
        hand.desc(4, EXTRA, 16, NEXT, 5);
        hand.push(4);
        hand.kick();
        hand.front.get_vring_base(0).unwrap();
        drop(hand);
        serves(&place);
    }
    eventually("the last session ends", || !export.info().connected);
    eventually("no region stays mapped", || mappings("huge-none") == 0);
}

fn huge_pages_that_are_there() {
    let Some(_pool) = Pool::of(2) else {
        eprintln!("skipped: the machine lets us have no huge pages");
        return;
    };
    let place = Place::new();
    let export = sevens(&place);
    let file = memfd(c"huge-some", libc::MFD_HUGETLB, 2 * HUGE);
    // SAFETY: nobody truncates the file.
    let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
    for (offset, len) in PARTS {
        map.fill(1);
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        hand.front
            .add_mem_region(&region(&file, EXTRA, offset, len))
            .unwrap();
        let last = EXTRA + len as u64 - 512;
        assert_eq!(hand.request(IN, 0, &[(EXTRA, 512, true)]).1, OK);
        assert_eq!(hand.request(IN, 0, &[(last, 512, true)]).1, OK);
        drop(hand);
        eventually("the session ends", || !export.info().connected);
        let last = offset + len - 512;
        for (at, byte) in map.iter().enumerate() {
            let read = (offset..offset + 512).contains(&at) || (last..last + 512).contains(&at);
            assert_eq!(*byte, if read { 7 } else { 1 }, "{at:#x} of {offset:#x}");
        }
    }
    drop(map);
    eventually("no region stays mapped", || mappings("huge-some") == 0);
}

const EXPORTS: usize = 5;
const REGIONS: usize = 500;

/// Catches: a table of regions that is full.
#[test]
fn memory_that_is_taken_away_under_thousands_of_regions_costs_its_owners_only() {
    let places: Vec<Place> = (0..EXPORTS).map(|_| Place::new()).collect();
    let exports: Vec<Export> = places.iter().map(sevens).collect();
    let files: Vec<OwnedFd> = places
        .iter()
        .map(|_| memfd(c"many-regions", 0, REGIONS * PAGE))
        .collect();
    let at = |index: usize| EXTRA + (index * 2 * PAGE) as u64;
    let shrunk = AtomicBool::new(false);
    let gate = std::sync::Barrier::new(EXPORTS + 1);
    std::thread::scope(|scope| {
        for (place, file) in places.iter().zip(&files) {
            let (shrunk, gate) = (&shrunk, &gate);
            scope.spawn(move || {
                let mut hand = Hand::ready(&place.socket(), PLAIN);
                for index in 0..REGIONS {
                    hand.front
                        .add_mem_region(&region(file, at(index), index * PAGE, PAGE))
                        .unwrap();
                }
                gate.wait();
                // Before, while and after the memory goes. A queue whose memory has gone may stop,
                // so nobody waits for an answer then.
                let mut index = REGIONS;
                let mut last_round = false;
                while !last_round {
                    last_round = shrunk.load(Ordering::SeqCst);
                    if last_round {
                        // Those that came last: a table without an end has room for them too.
                        index = REGIONS;
                    }
                    for head in [0, 3, 6, 9, 12] {
                        index = index.checked_sub(1).unwrap_or(REGIONS - 1);
                        hand.chain(head, IN, 0, &[(at(index), 512, true)]);
                        hand.push(head);
                    }
                    hand.kick();
                    let began = std::time::Instant::now();
                    while !hand.all_used() && !shrunk.load(Ordering::SeqCst) {
                        assert!(began.elapsed() < PATIENCE, "nothing comes back");
                        std::thread::yield_now();
                    }
                }
                hand.front.get_vring_base(0).unwrap();
            });
        }
        gate.wait();
        for file in &files {
            File::from(file.try_clone().unwrap()).set_len(0).unwrap();
        }
        shrunk.store(true, Ordering::SeqCst);
    });
    places.iter().for_each(serves);
    eventually("all sessions end", || {
        exports.iter().all(|export| !export.info().connected)
    });
    eventually("no region stays mapped", || mappings("many-regions") == 0);
}

/// Catches: a front-end that uses up the process's descriptors with its regions.
#[test]
fn a_region_keeps_no_descriptor_and_leaves_no_mapping() {
    let place = Place::new();
    let export = sevens(&place);
    let file = memfd(c"one-by-one", 0, REGIONS * PAGE);
    let before = descriptors("one-by-one");
    for _ in 0..3 {
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        for index in 0..REGIONS {
            let at = EXTRA + (index * 2 * PAGE) as u64;
            hand.front
                .add_mem_region(&region(&file, at, index * PAGE, PAGE))
                .unwrap();
        }
        assert_eq!(hand.request(IN, 0, &[(EXTRA, 512, true)]).1, OK);
        assert!(mappings("one-by-one") > 0);
        assert_eq!(descriptors("one-by-one"), before);
        drop(hand);
        eventually("the session ends", || !export.info().connected);
        assert_eq!(mappings("one-by-one"), 0);
    }
}

/// Catches: what is written to a disk after its guest's memory has gone: zeros, which nobody
/// meant.
#[test]
fn a_queue_whose_memory_was_taken_away_writes_nothing_more() {
    let place = Place::new();
    let (root, storage) = memory_root(vec![7; DISK]);
    let _export = start(place.config(), root);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let error = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    hand.front.get_vring_base(0).unwrap();
    hand.front.set_vring_err(0, &error).unwrap();
    hand.set_up();
    let file = memfd(c"goes", 0, 2 * PAGE);
    hand.front
        .add_mem_region(&region(&file, EXTRA, 0, 2 * PAGE))
        .unwrap();
    File::from(file).set_len(0).unwrap();
    hand.chain(0, IN, 0, &[(EXTRA, 512, true)]);
    hand.push(0);
    hand.kick();
    assert!(wait_readable(error.as_raw_fd()), "its driver hears of it");
    hand.chain(4, OUT, 0, &[(EXTRA, 512, false)]);
    hand.push(4);
    hand.kick();
    hand.front.get_vring_base(0).unwrap();
    assert_eq!(storage.snapshot(), [7; DISK]);
    drop(hand);
    serves(&place);
}

/// Catches: a write that is called done although the zeros of lost memory, and not what the guest
/// had there, are on the disk; zeros that are found there and written by the shorter way.
#[test]
fn a_write_of_memory_that_was_taken_away_fails() {
    for detect_zeroes in [None, Some(false), Some(true)] {
        let place = Place::new();
        let (root, storage) = memory_root(vec![7; DISK]);
        let mut config = place.config();
        config.detect_zeroes = detect_zeroes;
        let _export = start(config, root);
        let mut hand = Hand::ready(&place.socket(), PLAIN);
        let file = memfd(c"goes", 0, 2 * PAGE);
        hand.front
            .add_mem_region(&region(&file, EXTRA, 0, 2 * PAGE))
            .unwrap();
        File::from(file).set_len(0).unwrap();
        let (_, status) = hand.request(OUT, 0, &[(EXTRA, 512, false)]);
        assert_eq!(status, IOERR, "{detect_zeroes:?}");
        if detect_zeroes.is_some() {
            assert_eq!(storage.snapshot(), [7; DISK]);
        }
    }
}

/// Catches: one front-end that maps so much that no address is left for the others.
#[test]
fn the_addresses_that_a_front_end_may_use_are_bounded() {
    const LEN: usize = 4 << 40;
    let place = Place::new();
    let _export = sevens(&place);
    let file = memfd(c"endless", 0, LEN);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    let accepted = (0..64u64)
        .take_while(|index| {
            let region = region(&file, EXTRA + index * (LEN as u64), 0, LEN);
            hand.front.add_mem_region(&region).is_ok()
        })
        .count();
    assert!((1..=4).contains(&accepted), "{accepted} times 4 TiB");
    drop(hand);
    serves(&place);
}

/// A file of a file system in user space, whose server answers when it likes.
struct Served {
    server: Child,
    file: std::path::PathBuf,
}

impl Served {
    /// `None`: the machine has no such file systems.
    fn mount(place: &Place) -> Option<Self> {
        let (image, file) = (place.file("image"), place.file("file"));
        std::fs::write(&image, vec![0; DISK]).unwrap();
        std::fs::write(&file, []).unwrap();
        let mut command = Command::new("qemu-storage-daemon");
        // SAFETY: between fork and exec one system call is made, which touches no memory. A test
        // that is killed must not leave the server behind.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                std::io::Result::Ok(())
            });
        }
        let server = command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,filename={}",
                image.display()
            ))
            .arg("--export")
            .arg(format!(
                "type=fuse,id=e,node-name=f,writable=on,mountpoint={}",
                file.display()
            ))
            .spawn()
            .ok()?;
        let mut served = Self { server, file };
        let began = std::time::Instant::now();
        while std::fs::metadata(&served.file).unwrap().len() == 0 {
            if served.server.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(began.elapsed() < PATIENCE, "it never mounts");
            std::thread::yield_now();
        }
        Some(served)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let file = std::ffi::CString::new(self.file.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the path is a string. Nobody else unmounts what its server has left behind.
        unsafe { libc::umount2(file.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Catches: a worker, and with it the export and the end of the daemon, that waits for ever for
/// a page that the front-end's own file system does not give.
#[test]
fn memory_on_a_file_system_that_can_stall_is_refused() {
    let place = Place::new();
    let _export = sevens(&place);
    // Goes before the export, whose thread may wait for it.
    let Some(served) = Served::mount(&place) else {
        skip("no file systems in user space here").unwrap();
        return;
    };
    let file = File::options()
        .read(true)
        .write(true)
        .open(&served.file)
        .unwrap()
        .into();
    let one = region(&file, EXTRA, 0, PAGE);
    let hand = Hand::ready(&place.socket(), PLAIN);
    assert!(hand.front.set_mem_table(&[hand.region(), one]).is_err());
    drop(hand);
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    assert!(hand.front.add_mem_region(&one).is_err());
    drop(hand);
    serves(&place);
}

/// Catches: the memory of `memory-backend-file` on a local disk that is refused with it.
#[test]
fn memory_in_a_file_of_a_local_disk_is_served() {
    let place = Place::new();
    let _export = sevens(&place);
    let path = place.file("memory");
    std::fs::write(&path, vec![0; PAGE]).unwrap();
    let file: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap()
        .into();
    let mut hand = Hand::ready(&place.socket(), PLAIN);
    hand.front
        .add_mem_region(&region(&file, EXTRA, 0, PAGE))
        .unwrap();
    assert_eq!(hand.request(IN, 0, &[(EXTRA, 512, true)]).1, OK);
    assert_eq!(std::fs::read(&path).unwrap()[..512], [7; 512]);
}
