//! Requests that need room on a full disk, while what was freed waits for requests to end.
//!
//! What would be caught: a request that fails for want of room although there is enough as soon as
//! it, or another that waits as well, lets go of its view; requests that wait for each other for
//! ever; one that waits for room although nothing will be free, or for ever for a request that
//! hangs; bytes that a second attempt puts elsewhere, or clusters that it loses.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use stratablk::chain::{Chain, Span, View, with_room};
use stratablk::format::qcow2::Preallocation;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::disk::{Below, Disk, Opened, Recipe, read_all, write};
use crate::history::{SECTOR, fill};
use crate::machine::{Machine, Traits};
use crate::qcow2::Image;
use crate::{alone, seed};

const DEVICE: u64 = 1 << 20;
/// Of a disk that is larger than its device.
const SECTORS: usize = 4096;
/// Sectors of a cluster.
const CLUSTER: usize = 8;
/// Requests at the same time.
const REQUESTS: usize = 6;
/// Sectors of which each lets go before it takes as many elsewhere.
const PART: usize = 8 * CLUSTER;

/// How a request takes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taking {
    Write,
    Copy,
    CopyCompressed,
}

struct Full {
    _dir: tempfile::TempDir,
    disk: Disk,
    reactor: Reactor,
    machine: Machine,
    opened: Opened,
    /// What each sector is to hold.
    expected: Vec<u32>,
    /// The first sector of the first cluster for which there is no room.
    end: usize,
}

impl Full {
    fn new(options: &'static str, below: Below) -> Self {
        let storage = Traits {
            device: Some(DEVICE),
            ..Traits::FILE
        };
        let recipe = Recipe {
            storage,
            below,
            ..Recipe::new(options, SECTORS)
        };
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::make(dir.path(), recipe);
        let reactor = Reactor::for_this_thread().unwrap();
        let machine = Machine::new(&disk.files);
        let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
        let mut full = Self {
            expected: disk.first.clone(),
            _dir: dir,
            disk,
            reactor,
            machine,
            opened,
            end: 0,
        };
        while full.write(full.end, 0x1000_0000) == Ok(()) {
            full.end += CLUSTER;
        }
        assert!(full.end > 2 * REQUESTS * PART && full.end + 2 * REQUESTS * PART < SECTORS);
        full
    }

    fn chain(&self) -> &Arc<Chain> {
        &self.opened.chain
    }

    /// Writes a cluster; the error number.
    fn write(&mut self, start: usize, stamp: u32) -> Result<(), i32> {
        let stamp = stamp + start as u32;
        write(&self.reactor, self.chain(), start, CLUSTER, stamp).map_err(|error| error.errno())?;
        self.expect(start, CLUSTER, stamp);
        Ok(())
    }

    fn expect(&mut self, start: usize, count: usize, stamp: u32) {
        let sectors = &mut self.expected[start..start + count];
        sectors
            .iter_mut()
            .zip(stamp..)
            .for_each(|(old, new)| *old = new);
    }

    fn discard(&mut self, start: usize, count: usize) {
        let discard = View::of(self.chain().clone());
        let discard = discard.discard((start * SECTOR) as u64, (count * SECTOR) as u64);
        self.reactor.block_on(discard).unwrap();
        self.expected[start..start + count].fill(0);
    }

    /// Everything is there, and nothing is lost of the image.
    fn judge(self, what: &str) {
        let seen = read_all(&self.reactor, self.chain()).unwrap();
        for (sector, (seen, expected)) in seen.iter().zip(&self.expected).enumerate() {
            assert_eq!(*seen, Some(*expected), "{what}: sector {sector}");
        }
        self.reactor.block_on(self.opened.image.close()).unwrap();
        let files: Vec<_> = (0..self.disk.files.len())
            .map(|file| self.machine.bytes(file))
            .collect();
        let checked = Image::new(&files[0]).and_then(|image| image.check());
        assert_eq!(checked, Ok(0), "{what}: clusters leaked, or what is wrong");
        self.disk.qemu_check(&files).unwrap();
    }
}

/// Takes `PART` sectors from `start` on, in one request that may be tried several times.
async fn take(view: Rc<View>, taking: Taking, start: usize, bytes: &AlignedBuf) -> Result<(), i32> {
    let chain = view.chain.clone();
    let (offset, len) = ((start * SECTOR) as u64, bytes.len());
    let span = Span::new(0, chain.layers().len()).compressed(taking == Taking::CopyCompressed);
    let request = async |view: Rc<View>| {
        if taking == Taking::Write {
            // SAFETY: `bytes` outlives the operation.
            let bufs = unsafe { IoBufs::of(bytes, 0, len) };
            return view.write(offset, bufs).await;
        }
        view.copy(span, offset, len as u64).await.map(drop)
    };
    with_room(view, || chain.clone(), request)
        .await
        .map_err(|error| error.errno())
}

/// All have their view before the first one begins, so that each holds up the room of all others.
fn at_once(seed: u64, takings: &[Taking]) {
    let case = format!("STRATABLK_SEED={seed}, {takings:?}");
    let mut full = Full::new("cluster_size=4k", Below::Raw);
    let mut rng = StdRng::seed_from_u64(seed);
    let results = Rc::new(RefCell::new(Vec::new()));
    for index in 0..REQUESTS {
        let taking = takings[index % takings.len()];
        let (from, to) = (index * PART, full.end + index * PART);
        let stamp = 0x2000_0000 + to as u32;
        full.expected[from..from + PART].fill(0);
        if taking == Taking::Write {
            full.expect(to, PART, stamp);
        }
        let (chain, results) = (full.chain().clone(), results.clone());
        let view = View::of(chain.clone());
        full.reactor.spawn(async move {
            let (offset, len) = ((from * SECTOR) as u64, (PART * SECTOR) as u64);
            View::of(chain).discard(offset, len).await.unwrap();
            let mut bytes = AlignedBuf::zeroed(PART * SECTOR);
            fill(&mut bytes, stamp);
            let result = take(view, taking, to, &bytes).await;
            results.borrow_mut().push((index, taking, result));
        });
    }
    full.machine.run(&full.reactor, &mut rng);
    let results = results.take();
    assert_eq!(results.len(), REQUESTS, "{case}");
    for (index, taking, result) in results {
        assert_eq!(result, Ok(()), "{case}: request {index}, {taking:?}");
    }
    full.judge(&case);
}

#[test]
fn requests_that_hold_up_the_room_of_each_other() {
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    let _alone = alone();
    for (round, takings) in [
        &[Taking::Write][..],
        &[Taking::Copy],
        &[Taking::Write, Taking::Copy, Taking::CopyCompressed],
    ]
    .into_iter()
    .cycle()
    .take(12)
    .enumerate()
    {
        at_once(seed.wrapping_add(round as u64), takings);
    }
}

/// Nothing waits to be free: then no request waits for it either. A task that waits for a timer
/// alone ends the run of the machine.
#[test]
fn a_disk_that_stays_full_says_so_at_once() {
    let _alone = alone();
    let full = Full::new("cluster_size=4k", Below::Raw);
    let results = Rc::new(RefCell::new(Vec::new()));
    for taking in [Taking::Write, Taking::Copy, Taking::CopyCompressed] {
        let (view, results) = (View::of(full.chain().clone()), results.clone());
        let start = full.end;
        full.reactor.spawn(async move {
            let bytes = AlignedBuf::zeroed(PART * SECTOR);
            let result = take(view, taking, start, &bytes).await;
            results.borrow_mut().push(result);
        });
    }
    let mut rng = StdRng::seed_from_u64(0);
    full.machine.run(&full.reactor, &mut rng);
    assert_eq!(results.take(), [Err(libc::ENOSPC); 3]);
}

/// A request that hangs is waited for, but not for ever.
#[test]
fn a_request_that_hangs_holds_up_the_room() {
    let _alone = alone();
    let mut full = Full::new("cluster_size=4k", Below::Nothing);
    let hanging = View::of(full.chain().clone());
    full.discard(0, CLUSTER);
    let end = full.end;
    assert_eq!(full.write(end, 0x2000_0000), Err(libc::ENOSPC));
    drop(hanging);
    full.write(end, 0x3000_0000).unwrap();
    full.judge("after all");
}

/// Who has no view needs no other attempt: what was discarded is free after the second flush.
#[test]
fn space_is_allocated_ahead_from_what_was_discarded() {
    let _alone = alone();
    let mut full = Full::new("cluster_size=4k", Below::Nothing);
    full.discard(0, PART);
    let (from, len) = ((full.end * SECTOR) as u64, (PART * SECTOR) as u64);
    let ahead = full
        .opened
        .image
        .preallocate(from, from + len, Preallocation::Full);
    full.reactor.block_on(ahead).unwrap();
    full.judge("allocated ahead");
}
