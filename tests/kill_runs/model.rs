//! What each sector of a disk may hold.
//!
//! No two requests in flight touch the same sector unless both read it, so a sector holds what was
//! written last, or, while a write is in flight and after a back-end died with it, either of two.
//! A discard may leave what was there. What was once seen is what is there from then on.

use crate::common::rng::Rng;
use crate::common::stamp::{self, Owner, SECTOR};

/// Sectors in the longest request.
pub const LONGEST: u64 = 128;

#[derive(Clone, Default)]
struct Sector {
    /// What a read may find; nothing for a sector of which nothing is known any more.
    legal: Vec<Owner>,
    /// A write in flight: what it puts there, and whether it may also leave what is there.
    pending: Option<(Owner, bool)>,
    /// Reads in flight.
    readers: u16,
}

/// A sector that holds what it may not.
pub struct Wrong {
    /// The write that should be there, or the first of several.
    pub expected: Owner,
    /// In words.
    pub text: String,
}

/// A range of sectors that a request works on.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub count: u64,
}

impl Range {
    fn indices(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.count) as usize
    }
}

/// The disk.
pub struct Model {
    sectors: Vec<Sector>,
}

impl Model {
    /// A disk that reads as `owners`.
    pub fn new(owners: &[Owner]) -> Self {
        let sector = |&owner: &Owner| Sector {
            legal: vec![owner],
            ..Sector::default()
        };
        Model {
            sectors: owners.iter().map(sector).collect(),
        }
    }

    /// Number of sectors.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn part(&mut self, range: Range) -> &mut [Sector] {
        self.sectors.get_mut(range.indices()).unwrap_or_default()
    }

    /// A range that no write in flight touches, nor, for a write, a read: often near others.
    pub fn choose(&self, write: bool, rng: &mut Rng) -> Option<Range> {
        let step = if rng.below(4) > 0 { 8 } else { 1 };
        let start = if rng.one_in(2) {
            // In one MiB, so that neighbours in one cluster are in flight together, and writes
            // follow each other on the same sectors.
            self.len() / 3 + rng.below(2048)
        } else {
            rng.below(self.len())
        };
        let start = start.next_multiple_of(step);
        let longest = if rng.one_in(2) { 8 } else { LONGEST };
        let count = rng.between(step, longest.max(step)).next_multiple_of(step);
        let is_free = |s: &&Sector| s.pending.is_none() && !(write && s.readers > 0);
        let wanted = self.sectors.iter().skip(start as usize);
        let free = wanted.take(count as usize).take_while(is_free).count() as u64;
        let count = free - free % step;
        (count > 0).then_some(Range { start, count })
    }

    /// A write of `owner` was sent; with `weak` it may leave what is there.
    pub fn send_write(&mut self, range: Range, owner: Owner, weak: bool) {
        for sector in self.part(range) {
            sector.pending = Some((owner, weak));
        }
    }

    /// That write was answered.
    pub fn complete_write(&mut self, range: Range) {
        for sector in self.part(range) {
            match sector.pending.take() {
                // A discard of what is unknown leaves it unknown.
                Some((owner, true)) if !sector.legal.is_empty() => sector.legal.push(owner),
                Some((_, true)) | None => {}
                Some((owner, false)) => sector.legal = vec![owner],
            }
        }
    }

    /// Nobody will answer that write any more: it may have happened or not.
    pub fn abandon_write(&mut self, range: Range) {
        for sector in self.part(range) {
            if let Some((owner, _)) = sector.pending.take()
                && !sector.legal.is_empty()
            {
                sector.legal.push(owner);
            }
        }
    }

    /// A read was sent.
    pub fn send_read(&mut self, range: Range) {
        for sector in self.part(range) {
            sector.readers += 1;
        }
    }

    /// That read is over.
    pub fn end_read(&mut self, range: Range) {
        for sector in self.part(range) {
            sector.readers = sector.readers.saturating_sub(1);
        }
    }

    /// Compares what was read with what may be there; from then on it is what was found.
    pub fn compare(&mut self, range: Range, data: &[u8], wrong: &mut Vec<Wrong>) {
        let sectors = self.part(range).iter_mut().zip(range.start..);
        for ((sector, at), bytes) in sectors.zip(data.chunks_exact(SECTOR)) {
            let found = stamp::owner_of(bytes, at);
            if let Some(&expected) = sector.legal.first()
                && !found.is_some_and(|owner| sector.legal.contains(&owner))
            {
                let legal: Vec<_> = sector
                    .legal
                    .iter()
                    .map(|&o| stamp::describe_owner(o))
                    .collect();
                let text = stamp::describe(bytes);
                wrong.push(Wrong {
                    expected,
                    text: format!("sector {at}: found {text}, may be {}", legal.join(" or ")),
                });
            }
            if sector.pending.is_none() {
                sector.legal = found.into_iter().collect();
            }
        }
    }

    /// Nothing is known of these sectors any more, until they are written again.
    pub fn forget(&mut self, range: Range) {
        for sector in self.part(range) {
            sector.pending = None;
            sector.legal.clear();
        }
    }

    /// The whole disk, in pieces of one request.
    pub fn pieces(&self) -> impl Iterator<Item = Range> + use<> {
        let len = self.len();
        (0..len).step_by(LONGEST as usize).map(move |start| Range {
            start,
            count: LONGEST.min(len - start),
        })
    }
}
