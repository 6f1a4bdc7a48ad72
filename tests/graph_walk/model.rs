//! What each sector of a disk may hold: now, after a kill, and after a power cut.
//!
//! A sector keeps the writes that it may still show. One that has completed rules out those that had
//! completed before it was sent; of writes that were in flight together any may have come last. What
//! a flush has covered rules out the same for the time after a power cut. A discard rules out
//! nothing: what was there may stay.

use crate::common::Res;
use crate::common::rng::Rng;
use crate::common::stamp::{self, Owner, SECTOR};

/// Sectors in the longest request.
pub const LONGEST: u64 = 128;
/// When a write completed that has not.
const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Write {
    owner: Owner,
    sent: u64,
    done: u64,
    weak: bool,
}

#[derive(Clone, Debug)]
struct Sector {
    writes: Vec<Write>,
    /// A read has shown this one, and nothing was sent since.
    seen: Option<Owner>,
    readers: u16,
}

/// A range of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u64,
}

impl Range {
    fn indices(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.count) as usize
    }
}

/// A disk.
pub struct Model {
    sectors: Vec<Sector>,
    clock: u64,
}

impl Sector {
    fn of(owner: Owner) -> Self {
        let write = Write {
            owner,
            sent: 0,
            done: 0,
            weak: false,
        };
        Sector {
            writes: vec![write],
            seen: None,
            readers: 0,
        }
    }

    fn is_pending(&self) -> bool {
        self.writes.iter().any(|write| write.done == NEVER)
    }

    /// The writes that are not ruled out by one that was done before `time`.
    fn left(&self, time: u64) -> impl Iterator<Item = &Write> {
        self.writes.iter().filter(move |write| {
            let over = |later: &Write| !later.weak && later.done < time && later.sent > write.done;
            !self.writes.iter().any(over)
        })
    }

    fn may_read(&self) -> Vec<Owner> {
        match self.seen {
            Some(owner) => vec![owner],
            None => self.left(NEVER).map(|write| write.owner).collect(),
        }
    }
}

impl Model {
    /// A disk that reads as `owners`.
    pub fn new(owners: &[Owner]) -> Self {
        Model {
            sectors: owners.iter().map(|&owner| Sector::of(owner)).collect(),
            clock: 1,
        }
    }

    /// Sectors.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// It has so many sectors from now on, no fewer than before. What is new reads as zeros.
    pub fn grow(&mut self, sectors: u64) {
        self.sectors.resize_with(sectors as usize, || Sector::of(0));
    }

    /// The next instant.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn part(&mut self, range: Range) -> &mut [Sector] {
        self.sectors.get_mut(range.indices()).unwrap_or_default()
    }

    /// A range for a request, often near those of others. A read meets no write in flight. A write
    /// meets no read, and others only now and then.
    pub fn choose(&self, writes: bool, rng: &mut Rng) -> Option<Range> {
        let step = if rng.below(4) > 0 { 8 } else { 1 };
        let start = match rng.below(4) {
            // In one MiB, so that requests meet in a cluster.
            0 | 1 => self.len() / 3 + rng.below(2048),
            _ => rng.below(self.len()),
        };
        let start = start.next_multiple_of(step);
        let longest = if rng.below(4) > 0 { 8 } else { LONGEST };
        let count = rng.between(step, longest.max(step)).next_multiple_of(step);
        let overlaps = writes && rng.one_in(4);
        let is_free = |sector: &&Sector| {
            (overlaps || !sector.is_pending()) && !(writes && sector.readers > 0)
        };
        let wanted = self
            .sectors
            .iter()
            .skip(start as usize)
            .take(count as usize);
        let free = wanted.take_while(is_free).count() as u64;
        (free > 0).then_some(Range { start, count: free })
    }

    /// A write was sent at `sent`; a `weak` one may leave what is there.
    pub fn send_write(&mut self, range: Range, owner: Owner, weak: bool, sent: u64) {
        for sector in self.part(range) {
            sector.seen = None;
            sector.writes.push(Write {
                owner,
                sent,
                done: NEVER,
                weak,
            });
        }
    }

    /// The write that was sent at `sent` has completed.
    pub fn complete_write(&mut self, range: Range, sent: u64) {
        let now = self.tick();
        for sector in self.part(range) {
            if let Some(write) = sector.writes.iter_mut().find(|write| write.sent == sent) {
                write.done = now;
            }
        }
    }

    /// A flush that was sent at `sent` has completed.
    pub fn complete_flush(&mut self, sent: u64) {
        for sector in &mut self.sectors {
            if sector.writes.len() > 1 {
                sector.writes = sector.left(sent).copied().collect();
            }
        }
    }

    /// A read was sent.
    pub fn send_read(&mut self, range: Range) {
        for sector in self.part(range) {
            sector.readers += 1;
        }
    }

    /// A read is over.
    pub fn end_read(&mut self, range: Range) {
        for sector in self.part(range) {
            sector.readers = sector.readers.saturating_sub(1);
        }
    }

    /// Compares what was read. Nothing that writes there was in flight meanwhile.
    ///
    /// # Errors
    /// It cannot be there.
    pub fn compare(&mut self, range: Range, data: &[u8]) -> Res<()> {
        let sectors = self.part(range).iter_mut().zip(range.start..);
        for ((sector, at), bytes) in sectors.zip(data.chunks_exact(SECTOR)) {
            let legal = sector.may_read();
            let found = stamp::owner_of(bytes, at);
            if !found.is_some_and(|owner| legal.contains(&owner)) {
                return Err(wrong(at, bytes, sector, &legal).into());
            }
            sector.seen = found;
        }
        Ok(())
    }

    /// Compares the whole disk, of which somebody else has found out whose each sector is.
    ///
    /// # Errors
    /// A sector is not what it may be.
    pub fn compare_all(&mut self, found: &[Result<Owner, String>]) -> Res<()> {
        if found.len() != self.sectors.len() {
            return Err(format!("the disk has {} sectors", found.len()).into());
        }
        for (at, (sector, found)) in self.sectors.iter().zip(found).enumerate() {
            let legal = sector.may_read();
            if !found.as_ref().is_ok_and(|owner| legal.contains(owner)) {
                return Err(format!("sector {at} has {found:?}, and may have {legal:?}").into());
            }
        }
        Ok(())
    }

    /// The machine stopped: requests in flight are nobody's.
    pub fn cut(&mut self) {
        for sector in &mut self.sectors {
            sector.readers = 0;
            sector.seen = None;
        }
    }

    /// Compares what was read after a power cut; from then on it is what was found.
    ///
    /// # Errors
    /// It cannot be there.
    pub fn settle(&mut self, range: Range, data: &[u8]) -> Res<()> {
        let sectors = self.part(range).iter_mut().zip(range.start..);
        for ((sector, at), bytes) in sectors.zip(data.chunks_exact(SECTOR)) {
            let legal: Vec<_> = sector.writes.iter().map(|write| write.owner).collect();
            let found = stamp::owner_of(bytes, at);
            match found.filter(|owner| legal.contains(owner)) {
                Some(owner) => *sector = Sector::of(owner),
                None => return Err(wrong(at, bytes, sector, &legal).into()),
            }
        }
        Ok(())
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

fn wrong(at: u64, bytes: &[u8], sector: &Sector, legal: &[Owner]) -> String {
    let legal: Vec<_> = legal.iter().map(|&o| stamp::describe_owner(o)).collect();
    let found = stamp::describe(bytes);
    format!(
        "sector {at} has {found}, and may have {} (its writes: {:?})",
        legal.join(" or "),
        sector.writes
    )
}
