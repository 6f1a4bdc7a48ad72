//! What the guest did to each sector, when, and what a sector may therefore hold.
//!
//! Time is a count of events that grows. A sector that was written and flushed holds what was
//! written last before the flush began, or anything that was begun after that.

pub const SECTOR: usize = 512;

/// What an operation does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sector `i` of the range holds stamp `self.0 + i`.
    Write(u32),
    Zero,
    /// Zeros, or what was there before: the device's choice.
    Discard,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    began: usize,
    ended: usize,
    start: usize,
    change: Change,
}

#[derive(Clone, Default)]
pub struct History {
    /// Stamps at the beginning.
    first: Vec<u32>,
    operations: Vec<Operation>,
    /// By sector: the operations that touched it.
    sectors: Vec<Vec<usize>>,
    /// When each successful flush began and ended.
    flushes: Vec<(usize, usize)>,
    /// From this time on the image stands alone: it names no backing file.
    pub alone_from: Option<usize>,
}

impl History {
    pub fn new(first: Vec<u32>) -> Self {
        Self {
            sectors: vec![Vec::new(); first.len()],
            first,
            ..Self::default()
        }
    }

    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// An operation begins; returns its number.
    pub fn begin(&mut self, now: usize, start: usize, len: usize, change: Change) -> usize {
        let number = self.operations.len();
        self.operations.push(Operation {
            began: now,
            ended: usize::MAX,
            start,
            change,
        });
        for sector in &mut self.sectors[start..start + len] {
            sector.push(number);
        }
        number
    }

    /// It succeeded. One that failed never ends: its effect is uncertain for ever.
    pub fn end(&mut self, number: usize, now: usize) {
        self.operations[number].ended = now;
    }

    /// A flush that began at `began` has succeeded.
    pub fn flushed(&mut self, began: usize, now: usize) {
        self.flushes.push((began, now));
    }

    /// The time up to which everything is stable when the machine stops after `cut` events.
    pub fn stable_at(&self, cut: usize) -> usize {
        let ended = self.flushes.iter().filter(|(_, ended)| *ended <= cut);
        ended.map(|(began, _)| *began).max().unwrap_or(0)
    }

    /// What a sector may hold then, when everything up to `stable` is.
    pub fn after_cut(&self, sector: usize, stable: usize, cut: usize) -> Vec<u32> {
        self.possible(sector, stable, cut)
    }

    /// What a sector may read as now, if nothing in flight touches it.
    pub fn visible(&self, sector: usize) -> Vec<u32> {
        self.possible(sector, usize::MAX - 1, usize::MAX)
    }

    /// What was ended by `settled` is certain; what was begun before `cut` is possible.
    fn possible(&self, sector: usize, settled: usize, cut: usize) -> Vec<u32> {
        let mut possible = vec![self.first[sector]];
        for &number in &self.sectors[sector] {
            let operation = &self.operations[number];
            if operation.began > cut {
                break;
            }
            let value = match operation.change {
                Change::Write(stamp) => stamp + (sector - operation.start) as u32,
                Change::Zero | Change::Discard => 0,
            };
            if operation.ended <= settled && operation.change != Change::Discard {
                possible.clear();
            }
            possible.push(value);
        }
        possible
    }
}

/// The stamp that a sector holds; `None`: it is torn.
pub fn stamp_of(sector: &[u8]) -> Option<u32> {
    let first: [u8; 4] = sector.get(..4)?.try_into().ok()?;
    sector
        .chunks_exact(4)
        .all(|word| word == first)
        .then(|| u32::from_le_bytes(first))
}

/// Fills sectors with the stamps from `stamp` on.
pub fn fill(bytes: &mut [u8], stamp: u32) {
    for (stamp, sector) in (stamp..).zip(bytes.chunks_mut(SECTOR)) {
        for word in sector.chunks_mut(4) {
            word.copy_from_slice(&stamp.to_le_bytes());
        }
    }
}
