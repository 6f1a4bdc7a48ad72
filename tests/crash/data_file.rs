//! Requests that overlap in time, on a disk with a data file.
//!
//! What would be caught: an image and a raw data file that disagree afterwards; bytes that none of
//! the requests can have left; bytes that change when others are written to their cluster, or when
//! the image is opened again.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use stratablk::chain::View;
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::disk::{Disk, Opened, Recipe, read_all, write};
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::Machine;
use crate::{alone, seed};

/// Orders of operations that are tried with each disk.
const ORDERS: u64 = 40;
/// Sectors that the requests are about.
const SECTORS: usize = 64;
const DISK: usize = 128;

#[derive(Clone, Copy, Debug)]
enum Request {
    /// The first sector gets this stamp, and so on.
    Write(u32),
    Zero,
    Unmap,
    Discard,
}

/// A request, and the sectors that it is about.
type Part = (Request, usize, usize);

async fn perform(view: std::rc::Rc<View>, (request, start, len): Part) {
    let (at, bytes) = ((start * SECTOR) as u64, (len * SECTOR) as u64);
    match request {
        Request::Write(stamp) => {
            let mut buffer = AlignedBuf::zeroed(len * SECTOR);
            fill(&mut buffer, stamp);
            // SAFETY: `buffer` outlives the write.
            let bufs = unsafe { IoBufs::of(&buffer, 0, len * SECTOR) };
            view.write(at, bufs).await
        }
        Request::Zero => view.write_zeroes(at, bytes, false).await,
        Request::Unmap => view.write_zeroes(at, bytes, true).await,
        Request::Discard => view.discard(at, bytes).await,
    }
    .unwrap();
}

/// Requests for whole clusters and for parts, some of them twice, as those of a back-end that was
/// killed.
fn requests(rng: &mut StdRng, cluster: usize) -> Vec<Part> {
    let mut requests = Vec::new();
    for index in 0..rng.random_range(2..6) {
        let first = rng.random_range(0..2) * cluster;
        let whole = rng.random_bool(0.7);
        let len = cluster.min(SECTORS - first);
        let (start, len) = if whole {
            (first, len)
        } else {
            let start = rng.random_range(0..len);
            (first + start, rng.random_range(1..=len - start))
        };
        let request = match rng.random_range(0..6) {
            0..3 => Request::Write(0xc000_0000 + 0x1000 * index),
            3 => Request::Zero,
            4 => Request::Unmap,
            _ => Request::Discard,
        };
        requests.push((request, start, len));
        if rng.random_bool(0.3) {
            requests.push((request, start, len));
        }
    }
    requests.shuffle(rng);
    requests
}

/// What a sector may hold after requests that all overlap.
fn possible(before: &[Option<u32>], requests: &[Part], sector: usize) -> Vec<u32> {
    let mut possible = Vec::new();
    let mut certain = false;
    for &(request, start, len) in requests {
        if !(start..start + len).contains(&sector) {
            continue;
        }
        certain |= !matches!(request, Request::Discard);
        possible.push(match request {
            Request::Write(stamp) => stamp + (sector - start) as u32,
            Request::Zero | Request::Unmap | Request::Discard => 0,
        });
    }
    if !certain {
        possible.extend(before[sector]);
    }
    possible
}

/// Several rounds of overlapping requests; then the image, its data file and the image when it is
/// opened again are compared.
fn overlap(disk: &Disk, cluster: usize, raw: bool, seed: u64) {
    let context = format!("STRATABLK_SEED={seed}: {:?}", disk.recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let Opened { chain, image } = reactor.block_on(disk.open(&machine, true)).unwrap();
    let agree = |seen: &[Option<u32>]| {
        let bytes = machine.bytes(1);
        for (sector, seen) in seen.iter().enumerate() {
            let there = stamp_of(&bytes[sector * SECTOR..][..SECTOR]);
            assert!(
                !raw || there == *seen,
                "{context}: sector {sector} is {seen:x?} in the image and {there:x?} in its data \
                 file"
            );
        }
    };
    let mut before = read_all(&reactor, &chain).unwrap();
    for round in 0..4 {
        let requests = requests(&mut rng, cluster);
        machine.hold(true);
        for &request in &requests {
            let view = View::of(chain.clone());
            reactor.spawn(perform(view, request));
            // Some go further than others before the next one comes.
            for _ in 0..rng.random_range(0..3) {
                reactor.turn();
            }
        }
        machine.run(&reactor, &mut rng);
        let seen = read_all(&reactor, &chain).unwrap();
        for (sector, stamp) in seen.iter().enumerate() {
            let mut possible = possible(&before, &requests, sector);
            if possible.is_empty() {
                possible.extend(before[sector]);
            }
            assert!(
                stamp.is_some_and(|stamp| possible.contains(&stamp)),
                "{context}: sector {sector} reads {stamp:x?} after {requests:x?}, possible are \
                 {possible:x?}"
            );
        }
        agree(&seen);
        before = seen;
        // What is there stays there when something else is written to its cluster.
        let (at, stamp) = (rng.random_range(0..SECTORS), 0xd000_0000 + round);
        write(&reactor, &chain, at, 1, stamp).unwrap();
        before[at] = Some(stamp);
        let seen = read_all(&reactor, &chain).unwrap();
        assert_eq!(seen, before, "{context}: after {requests:x?}");
        agree(&seen);
    }
    reactor.block_on(image.close()).unwrap();
    let files: Vec<_> = (0..disk.files.len()).map(|i| machine.bytes(i)).collect();
    let reopened = Machine::new(&files);
    let reopened = reactor.block_on(disk.open(&reopened, false)).unwrap();
    let seen = read_all(&reactor, &reopened.chain).unwrap();
    assert_eq!(seen, before, "{context}: when it is opened again");
    disk.qemu_check(&files).unwrap();
}

fn overlaps(options: &'static str, cluster: usize, raw: bool) {
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    for filled in [0, SECTORS] {
        let recipe = Recipe {
            data_file: true,
            filled,
            ..Recipe::new(options, DISK)
        };
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::make(dir.path(), recipe);
        for order in 0..ORDERS {
            overlap(&disk, cluster, raw, seed.wrapping_add(order));
        }
    }
}

#[test]
fn a_raw_data_file_and_its_image_agree() {
    overlaps("cluster_size=4k,data_file_raw=on", 8, true);
}

#[test]
fn a_raw_data_file_and_its_image_with_subclusters_agree() {
    overlaps("cluster_size=16k,extended_l2=on,data_file_raw=on", 32, true);
}

#[test]
fn overlapping_requests_to_a_data_file() {
    overlaps("cluster_size=4k", 8, false);
    overlaps("cluster_size=16k,extended_l2=on", 32, false);
}
