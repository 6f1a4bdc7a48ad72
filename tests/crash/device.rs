//! An image on storage of fixed length, filled to the end.
//!
//! What would be caught: a device that counts as full too early; a write behind its end; a full
//! device that fails anything but the writes that need space, or calls the image corrupt; space
//! that is not used again after a discard, or not found after the device became longer.

use std::sync::Arc;

use stratablk::chain::{Chain, View};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::alone;
use crate::disk::{Disk, Opened, Recipe, read_all, write};
use crate::history::stamp_of;
use crate::machine::{Machine, Traits};
use crate::qcow2::Image;

const DEVICE: u64 = 4 << 20;
/// Of a disk that is larger than its device.
const SECTORS: usize = 3 * DEVICE as usize / 512;
/// Sectors of a write.
const STEP: usize = 16;

const fn device(len: u64) -> Traits {
    Traits {
        device: Some(len),
        ..Traits::FILE
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    disk: Disk,
    reactor: Reactor,
    /// What each sector is to hold.
    expected: Vec<u32>,
}

impl Bench {
    fn new(options: &'static str, len: u64) -> Self {
        let recipe = Recipe {
            storage: device(len),
            ..Recipe::new(options, SECTORS)
        };
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::make(dir.path(), recipe);
        Self {
            expected: disk.first.clone(),
            disk,
            _dir: dir,
            reactor: Reactor::for_this_thread().unwrap(),
        }
    }

    fn open(&self, machine: &Machine) -> Opened {
        self.reactor
            .block_on(self.disk.open(machine, true))
            .unwrap()
    }

    /// Writes `STEP` sectors at `start`; false: there is no space.
    fn write(&mut self, chain: &Arc<Chain>, start: usize, stamp: u32) -> bool {
        let stamp = stamp + start as u32;
        match write(&self.reactor, chain, start, STEP, stamp) {
            Ok(()) => {
                let sectors = &mut self.expected[start..start + STEP];
                sectors
                    .iter_mut()
                    .zip(stamp..)
                    .for_each(|(old, new)| *old = new);
                true
            }
            Err(error) => {
                assert_eq!(error.errno(), libc::ENOSPC, "{error}");
                self.adopt(chain, start, stamp);
                false
            }
        }
    }

    /// Takes note of what a write that failed has left: some of its clusters may be new.
    fn adopt(&mut self, chain: &Arc<Chain>, start: usize, stamp: u32) {
        let buffer = AlignedBuf::zeroed(STEP * 512);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
        let read = View::of(chain.clone()).read(start as u64 * 512, bufs);
        self.reactor.block_on(read).unwrap();
        let sectors = buffer.chunks(512).map(stamp_of).zip(stamp..);
        for ((seen, new), old) in sectors.zip(&mut self.expected[start..start + STEP]) {
            assert!(seen == Some(new) || seen == Some(*old), "{seen:x?}");
            *old = seen.unwrap();
        }
    }

    /// Writes on from sector `start` until there is no space; where that is.
    fn fill(&mut self, chain: &Arc<Chain>, start: usize, stamp: u32) -> usize {
        let mut starts = (start..SECTORS).step_by(STEP);
        let full = starts.find(|&start| !self.write(chain, start, stamp));
        full.expect("the device is smaller than the disk")
    }

    /// Everything is there, and the image is sound.
    fn judge(&self, machine: &Machine, what: &str) {
        let files = [machine.bytes(0)];
        let after = Machine::new(&files);
        let opened = self.reactor.block_on(self.disk.open(&after, false));
        let seen = read_all(&self.reactor, &opened.unwrap().chain).unwrap();
        for (sector, (seen, expected)) in seen.iter().zip(&self.expected).enumerate() {
            assert_eq!(*seen, Some(*expected), "{what}: sector {sector}");
        }
        let checked = Image::new(&files[0]).and_then(|image| image.check());
        assert_eq!(checked, Ok(0), "{what}: clusters leaked, or what is wrong");
        self.disk.qemu_check(&files).unwrap();
    }
}

/// A device is filled to its end, and what comes after that.
fn fill(options: &'static str, len: u64, overhead: u64) {
    let mut bench = Bench::new(options, len);
    let _alone = alone();
    let machine = Machine::new(&bench.disk.files);
    let Opened { image, chain } = bench.open(&machine);
    let full = bench.fill(&chain, 0, 0x1000_0000);
    let held = full as u64 * 512;
    assert!(held + overhead >= len, "{options}: {held} bytes on {len}");
    // What is there can be written and read; what is not there cannot be written.
    assert!(bench.write(&chain, 0, 0x2000_0000));
    assert!(!bench.write(&chain, full, 0x2000_0000));
    bench.reactor.block_on(chain.flush()).unwrap();
    bench.reactor.block_on(image.close()).unwrap();
    drop((image, chain));
    bench.judge(&machine, options);

    // Opened anew it is as full; what is discarded makes room for as much.
    let machine = Machine::new(&[machine.bytes(0)]);
    let Opened { image, chain } = bench.open(&machine);
    assert!(!bench.write(&chain, full, 0x3000_0000));
    let (start, end) = (full / 4 / 512 * 512, full / 2 / 512 * 512);
    let discard = View::of(chain.clone()).discard(start as u64 * 512, (end - start) as u64 * 512);
    bench.reactor.block_on(discard).unwrap();
    bench.expected[start..end].fill(0);
    // Nobody flushes in between.
    let next = bench.fill(&chain, full, 0x4000_0000);
    let (gained, freed) = (next - full, end - start);
    assert!(
        gained + freed / 8 >= freed,
        "{options}: {gained} sectors for {freed}"
    );

    // A longer device: found without opening the image again.
    let longer = len + (1 << 20);
    machine.lengthen(longer);
    let full = bench.fill(&chain, next, 0x5000_0000);
    let gained = (full - next) as u64 * 512;
    assert!(
        gained + (128 << 10) >= 1 << 20,
        "{options}: {gained} bytes of 1 MiB"
    );
    bench.reactor.block_on(image.close()).unwrap();
    drop((image, chain));
    bench.disk.recipe.storage = device(longer);
    bench.judge(&machine, options);
}

#[test]
fn is_filled_to_its_end() {
    // What the tables take, and what is left of the last cluster.
    fill("cluster_size=4k", DEVICE, 40 << 10);
    fill("cluster_size=64k", DEVICE + 5000, 456 << 10);
    fill("cluster_size=16k,extended_l2=on", DEVICE + 4096, 160 << 10);
    // A block covers 64 clusters, the table 2 MiB at first.
    fill("cluster_size=512,refcount_bits=64", DEVICE, 256 << 10);
}

/// What would be caught: clusters behind the end that are written, or free, after the device has
/// become shorter than the image; others that cannot be used for that reason.
#[test]
fn has_become_shorter_than_its_image() {
    // Sectors that one slice of the mapping covers.
    const SLICE: usize = 4096;
    let mut bench = Bench::new("cluster_size=4k", DEVICE);
    let _alone = alone();
    let machine = Machine::new(&bench.disk.files);
    let Opened { image, chain } = bench.open(&machine);
    for start in (0..3 * SLICE / 2).step_by(STEP) {
        assert!(bench.write(&chain, start, 0x1000_0000));
    }
    bench.reactor.block_on(image.close()).unwrap();
    drop((image, chain));
    let mut bytes = machine.bytes(0);
    let shorter = 5 * SLICE / 4 * 512;
    bytes.truncate(shorter);
    let machine = Machine::new(&[bytes]);
    bench.disk.recipe.storage = device(shorter as u64);
    let Opened { image, chain } = bench.open(&machine);
    assert!(bench.write(&chain, 0, 0x2000_0000));
    let gone = write(&bench.reactor, &chain, 3 * SLICE / 2 - STEP, STEP, 7);
    assert_eq!(gone.map_err(|error| error.errno()), Err(libc::EIO));
    assert!(
        !bench.write(&chain, 2 * SLICE, 0x3000_0000),
        "there is no space"
    );
    let discard = View::of(chain.clone()).discard(0, SLICE as u64 / 2 * 512);
    bench.reactor.block_on(discard).unwrap();
    bench.expected[..SLICE / 2].fill(0);
    bench.reactor.block_on(chain.flush()).unwrap();
    let full = bench.fill(&chain, 2 * SLICE, 0x4000_0000);
    assert!(full - 2 * SLICE + 64 > SLICE / 2, "{full}");
    bench.reactor.block_on(image.close()).unwrap();
    drop((image, chain));
    let after = Machine::new(&[machine.bytes(0)]);
    let opened = bench.reactor.block_on(bench.disk.open(&after, false));
    let seen = read_all(&bench.reactor, &opened.unwrap().chain).unwrap();
    for sector in (0..SLICE).chain(2 * SLICE..SECTORS) {
        assert_eq!(
            seen[sector],
            Some(bench.expected[sector]),
            "sector {sector}"
        );
    }
}
