//! What a repair is going to write.
//!
//! A repair is made up as a whole before the first byte of it reaches the file: in what order it is
//! written, and what the image is afterwards. So one that cannot be finished, or that would change
//! what the disk reads as, leaves the file as it was.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::header::SECTOR;

/// One step of a plan.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Whole sectors are written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// What is written before becomes stable.
    Barrier,
}

/// What is going to be written, in order.
#[derive(Debug, Default)]
pub struct Plan {
    steps: Vec<Step>,
    /// For each sector, by number: the last step that writes it, and where it is in its bytes.
    sectors: BTreeMap<u64, (usize, usize)>,
}

impl Plan {
    /// Adds a write of whole sectors.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let first = offset / SECTOR as u64;
        for index in 0..bytes.len().div_ceil(SECTOR) {
            let place = (self.steps.len(), index * SECTOR);
            self.sectors.insert(first + index as u64, place);
        }
        self.steps.push(Step::Write {
            offset,
            bytes: bytes.to_vec(),
        });
    }

    /// Adds a barrier, where there is anything to be kept apart.
    pub fn barrier(&mut self) {
        if matches!(self.steps.last(), Some(Step::Write { .. })) {
            self.steps.push(Step::Barrier);
        }
    }

    /// The steps.
    pub fn into_steps(self) -> Vec<Step> {
        self.steps
    }

    /// Where the last sector ends.
    pub fn end(&self) -> u64 {
        let last = self.sectors.last_key_value();
        last.map_or(0, |(sector, _)| (sector + 1) * SECTOR as u64)
    }

    /// The first byte at or after `offset` that is going to be written.
    pub fn next(&self, offset: u64) -> Option<u64> {
        let (sector, _) = self.sectors.range(offset / SECTOR as u64..).next()?;
        Some(offset.max(sector * SECTOR as u64))
    }

    /// The ranges that are written, in ascending order; they do not touch.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for sector in self.sectors.keys() {
            let start = sector * SECTOR as u64;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += SECTOR as u64,
                _ => ranges.push(start..start + SECTOR as u64),
            }
        }
        ranges
    }

    /// Makes of `bytes`, which the file has at `offset`, what it will have.
    pub fn overlay(&self, offset: u64, bytes: &mut [u8]) {
        let sector = SECTOR as u64;
        let end = offset.saturating_add(bytes.len() as u64);
        for (&number, &(step, at)) in self.sectors.range(offset / sector..end.div_ceil(sector)) {
            let Some(Step::Write { bytes: new, .. }) = self.steps.get(step) else {
                continue;
            };
            // Its first byte may be in front of `bytes`.
            let start = number * sector;
            let skip = offset.saturating_sub(start) as usize;
            let place = start.saturating_sub(offset) as usize;
            let len = (SECTOR - skip).min(bytes.len().saturating_sub(place));
            if let Some(target) = bytes.get_mut(place..place + len)
                && let Some(source) = new.get(at + skip..at + skip + len)
            {
                target.copy_from_slice(source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a read of planned bytes that is off by some, or that shows what an earlier
    //! step wrote there.

    use super::*;

    #[test]
    fn reads_see_the_last_write() {
        let mut plan = Plan::default();
        plan.write(1024, &[1; 1024]);
        plan.barrier();
        plan.barrier();
        plan.write(1536, &[2; 512]);
        let mut bytes = [9; 1200];
        plan.overlay(1000, &mut bytes);
        let expected: Vec<u8> = [[9; 24].to_vec(), [1; 512].to_vec(), [2; 512].to_vec()].concat();
        assert_eq!(bytes.get(..1048), Some(&*expected));
        assert!(bytes.iter().skip(1048).all(|&byte| byte == 9));
        let ranges = plan.ranges();
        assert_eq!((ranges.len(), ranges.first()), (1, Some(&(1024..2048))));
        assert_eq!(plan.end(), 2048);
        assert_eq!(
            (plan.next(0), plan.next(1600), plan.next(2048)),
            (Some(1024), Some(1600), None)
        );
        assert_eq!(plan.into_steps().len(), 3);
    }
}
