//! The model: a disk in memory, and a generator of operations that overlap as little as a
//! guest's do: never in a sector, often in a cluster.

use std::cell::RefCell;
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::support::Disk;

pub const SECTOR: usize = 512;

/// The seed of this run: `STRATABLK_SEED` repeats one.
pub fn seed() -> u64 {
    std::env::var("STRATABLK_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(rand::random)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero,
    Unmap,
    Discard,
    Flush,
}

/// A disk in memory. After a discard a sector's contents are the device's choice until it is
/// written again; the model adopts what it reads.
pub struct Model {
    pub bytes: Vec<u8>,
    /// Sectors of a block: whole ones are asked for.
    pub grain: usize,
    discarded: Vec<bool>,
    busy: Vec<bool>,
    rng: StdRng,
    stamp: u32,
}

impl Model {
    pub fn new(bytes: Vec<u8>, seed: u64) -> Rc<RefCell<Self>> {
        let sectors = bytes.len() / SECTOR;
        Rc::new(RefCell::new(Self {
            bytes,
            grain: 1,
            discarded: vec![false; sectors],
            busy: vec![false; sectors],
            rng: StdRng::seed_from_u64(seed),
            stamp: 1,
        }))
    }

    /// A range that nothing in flight touches.
    fn pick(&mut self, longest: usize) -> (usize, usize) {
        // Of a small disk, many at once must leave something.
        let longest = longest.min((self.busy.len() / 32).max(1));
        loop {
            let len = 1 + self.rng.random_range(0..longest);
            let start = self.rng.random_range(0..self.busy.len()) / self.grain * self.grain;
            let len = len.min(self.busy.len() - start);
            let len = len.next_multiple_of(self.grain);
            if self.busy[start..start + len].iter().all(|busy| !busy) {
                self.busy[start..start + len].fill(true);
                return (start, len);
            }
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for sector in buffer.chunks_mut(SECTOR) {
            self.stamp += 1;
            let stamp = self.stamp.to_le_bytes();
            for chunk in sector.chunks_mut(4) {
                chunk.copy_from_slice(&stamp[..chunk.len()]);
            }
        }
    }

    /// Compares what was read; sectors with undefined contents are adopted.
    pub fn verify(&mut self, start: usize, bytes: &[u8], seed: u64) {
        for (index, got) in bytes.chunks(SECTOR).enumerate() {
            let sector = start + index;
            let range = sector * SECTOR..sector * SECTOR + got.len();
            if self.discarded[sector] {
                self.bytes[range].copy_from_slice(got);
                continue;
            }
            let expected = &self.bytes[range];
            assert!(
                got == expected,
                "seed {seed}: sector {sector}: expected stamp {:?}, read {:?}",
                &expected[..8],
                &got[..8]
            );
        }
    }
}

/// Runs one operation of `kind` on `disk` and updates the model.
pub async fn operate(disk: &Disk, model: &Rc<RefCell<Model>>, kind: Kind, seed: u64) {
    let longest = match kind {
        Kind::Flush => {
            disk.root.chain().flush().await.unwrap();
            return;
        }
        Kind::Zero | Kind::Unmap | Kind::Discard => 400,
        _ => 200,
    };
    let (start, len) = model.borrow_mut().pick(longest);
    let (offset, bytes) = ((start * SECTOR) as u64, len * SECTOR);
    let mut buffer = AlignedBuf::zeroed(bytes);
    if kind == Kind::Write {
        model.borrow_mut().fill(&mut buffer);
    }
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, bytes) };
    let view = disk.view();
    match kind {
        Kind::Read => view.read(offset, bufs).await.unwrap(),
        Kind::Write => view.write(offset, bufs).await.unwrap(),
        Kind::Zero => view
            .write_zeroes(offset, bytes as u64, false)
            .await
            .unwrap(),
        Kind::Unmap => view.write_zeroes(offset, bytes as u64, true).await.unwrap(),
        Kind::Discard => view.discard(offset, bytes as u64).await.unwrap(),
        Kind::Flush => {}
    }
    let mut model = model.borrow_mut();
    match kind {
        Kind::Read => model.verify(start, &buffer, seed),
        Kind::Discard => model.discarded[start..start + len].fill(true),
        _ => {
            let at = start * SECTOR;
            model.bytes[at..at + bytes].copy_from_slice(&buffer);
            model.discarded[start..start + len].fill(false);
        }
    }
    model.busy[start..start + len].fill(false);
}
