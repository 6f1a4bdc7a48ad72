//! What the guest did to each sector, when, and what a sector may therefore hold.
//!
//! A sector that was written and flushed holds what was written last before the flush began, or
//! anything that was begun after that. What came before what is told by the order in which it is
//! noted; when the machine stopped, by its own time, a count of events.

use crate::workload::Report;

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
    /// The time.
    began: usize,
    /// The number of the note.
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
    /// Of each successful flush: how many notes there were when it began, and the time at its end.
    flushes: Vec<(usize, usize)>,
    /// The time of each note.
    notes: Vec<usize>,
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

    /// Adds what happened at `now`; returns the number of an operation that began.
    ///
    /// An operation that failed never ends: its effect is uncertain for ever.
    pub fn note(&mut self, now: usize, report: Report) -> usize {
        self.notes.push(now);
        match report {
            Report::Began { start, len, change } => {
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
                return number;
            }
            Report::Ended(number) => self.operations[number].ended = self.notes.len() - 1,
            Report::Flushed(began) => self.flushes.push((began, now)),
            Report::Alone => self.alone_from = Some(now),
        }
        0
    }

    /// How many notes there are.
    pub fn notes(&self) -> usize {
        self.notes.len()
    }

    /// So many notes there were after `cut` events: what had completed when the process was killed.
    pub fn notes_at(&self, cut: usize) -> usize {
        self.notes.partition_point(|&at| at <= cut)
    }

    /// What is known after a kill at `cut`: of what began until then, the first `settled` notes
    /// are certain. All else is uncertain until it is written again.
    pub fn after_kill(&self, settled: usize, cut: usize) -> Self {
        let mut after = self.clone();
        after.notes.truncate(self.notes_at(cut));
        after.flushes.retain(|(_, ended)| *ended <= cut);
        after.alone_from = self.alone_from.filter(|at| *at <= cut);
        for operation in &mut after.operations {
            if operation.ended >= settled {
                operation.ended = usize::MAX;
            }
        }
        let began = |number: &usize| self.operations[*number].began <= cut;
        for sector in &mut after.sectors {
            sector.retain(began);
        }
        after
    }

    /// So many notes are certainly stable when the machine stops after `cut` events.
    pub fn stable_at(&self, cut: usize) -> usize {
        let ended = self.flushes.iter().filter(|(_, ended)| *ended <= cut);
        ended.map(|(began, _)| *began).max().unwrap_or(0)
    }

    /// What a sector may hold then, when the first `settled` notes are certain.
    pub fn after_cut(&self, sector: usize, settled: usize, cut: usize) -> Vec<u32> {
        self.possible(sector, settled, cut)
    }

    /// How many operations there are.
    pub fn operations(&self) -> usize {
        self.operations.len()
    }

    /// As [`Self::after_cut`], when of the operations only the first `operations` count.
    pub fn at_instant(
        &self,
        sector: usize,
        settled: usize,
        cut: usize,
        operations: usize,
    ) -> Vec<u32> {
        self.possible_of(sector, settled, cut, operations)
    }

    /// What a sector may read as now, if nothing in flight touches it.
    pub fn visible(&self, sector: usize) -> Vec<u32> {
        self.possible(sector, self.notes.len(), usize::MAX)
    }

    /// What ended in the first `settled` notes is certain; what began before `cut` is possible.
    fn possible(&self, sector: usize, settled: usize, cut: usize) -> Vec<u32> {
        self.possible_of(sector, settled, cut, usize::MAX)
    }

    fn possible_of(
        &self,
        sector: usize,
        settled: usize,
        cut: usize,
        operations: usize,
    ) -> Vec<u32> {
        let mut possible = vec![self.first[sector]];
        for &number in &self.sectors[sector] {
            let operation = &self.operations[number];
            if operation.began > cut || number >= operations {
                break;
            }
            let value = match operation.change {
                Change::Write(stamp) => stamp + (sector - operation.start) as u32,
                Change::Zero | Change::Discard => 0,
            };
            if operation.ended < settled && operation.change != Change::Discard {
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
    // Each word is as the one before.
    let same = sector.get(4..)? == sector.get(..sector.len() - 4)?;
    same.then(|| u32::from_le_bytes(first))
}

/// Fills sectors with the stamps from `stamp` on.
pub fn fill(bytes: &mut [u8], stamp: u32) {
    for (stamp, sector) in (stamp..).zip(bytes.chunks_mut(SECTOR)) {
        for word in sector.chunks_mut(4) {
            word.copy_from_slice(&stamp.to_le_bytes());
        }
    }
}
