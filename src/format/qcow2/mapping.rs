//! Where guest data is: the synchronous core, which reads the cached mapping without a lock and
//! never waits.

use std::sync::Arc;

use super::Qcow2;
use super::l2::{self, Shape, Slice, State};
use super::words::Words;
use crate::format::{Extent, Place};
use crate::sync;

impl Qcow2 {
    /// Slice number and index in it for a guest cluster.
    pub(super) fn place(&self, cluster: u64) -> (u64, usize) {
        (
            cluster / self.slice_entries(),
            (cluster % self.slice_entries()) as usize,
        )
    }

    pub(super) fn slice(&self, number: u64) -> Option<sync::Guard<Option<Arc<Slice>>>> {
        self.directory.get(number)
    }

    /// Where the slice's bytes are in the file; `None`: its table does not exist.
    pub(super) fn slice_offset(&self, number: u64) -> Option<u64> {
        let cluster = number * self.slice_entries();
        let table = self.l1_entry(cluster / self.table_entries()) & l2::OFFSET;
        (table != 0).then(|| table + cluster % self.table_entries() * self.shape.entry_bytes())
    }

    /// See [`crate::format::Format::map`].
    pub(in crate::format) fn map(&self, offset: u64, len: u64) -> Extent {
        let cluster = offset >> self.cluster_bits;
        let (number, index) = self.place(cluster);
        let Some(slice) = self.slice(number) else {
            return self.map_without_slice(offset, len);
        };
        let Some(slice) = slice.as_ref() else {
            return Extent {
                place: Place::Unknown,
                len,
            };
        };
        slice.touch();
        let within = offset & (self.cluster_size() - 1);
        let unit = within >> self.shape.unit_bits();
        let in_unit = offset & (self.unit_size() - 1);
        let words = slice.get(index);
        let first = self.shape.state(words, unit);
        let place = match first {
            State::Unallocated => Place::Below,
            State::Zero => Place::Zero,
            State::Data(host) => Place::Data(host.offset + in_unit),
            State::Compressed { offset, len } => {
                Place::Compressed(Shape::compressed(offset, len, within))
            }
        };
        let run = self.run(slice, index, unit, words, in_unit + len);
        Extent {
            place,
            len: len.min((run << self.shape.unit_bits()) - in_unit),
        }
    }

    /// How many units from unit `unit` of entry `index` on continue its state, which `words` has,
    /// up to `bytes` of them.
    fn run(&self, slice: &Slice, index: usize, unit: u64, words: Words, bytes: u64) -> u64 {
        let shape = self.shape;
        let first = shape.state(words, unit);
        let limit = bytes.div_ceil(self.unit_size());
        let entries = self.slice_entries();
        let mut count = shape.same(words, unit);
        let mut at = index as u64 + 1;
        while count < limit && (unit + count).is_multiple_of(shape.units()) && at < entries {
            let words = slice.get(at as usize);
            let next = shape.state(words, 0);
            let continues = match (first, next) {
                (State::Unallocated, State::Unallocated) | (State::Zero, State::Zero) => true,
                (State::Data(a), State::Data(b)) => {
                    a.offset + (count << shape.unit_bits()) == b.offset && a.owned == b.owned
                }
                _ => false,
            };
            if !continues {
                break;
            }
            count += shape.same(words, 0);
            at += 1;
        }
        count
    }

    fn map_without_slice(&self, offset: u64, len: u64) -> Extent {
        let coverage = self.table_entries() << self.cluster_bits;
        if self.l1_entry(offset / coverage) & l2::OFFSET == 0 {
            // No table, so nothing of its whole range is here.
            let len = len.min(coverage - offset % coverage);
            return Extent {
                place: Place::Below,
                len,
            };
        }
        Extent {
            place: Place::Unknown,
            len,
        }
    }

    /// See [`crate::format::Format::map_write`].
    pub(in crate::format) fn map_write(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let end = self.mapped_end();
        if !self.soundness.allows_writes() || offset >= end {
            return None;
        }
        let (number, index) = self.place(offset >> self.cluster_bits);
        let slice = self.slice(number)?;
        let slice = slice.as_ref()?;
        slice.touch();
        let words = slice.get(index);
        let within = offset & (self.cluster_size() - 1);
        let unit = within >> self.shape.unit_bits();
        let State::Data(host) = self.shape.state(words, unit) else {
            return None;
        };
        if !host.owned {
            return None;
        }
        let in_unit = offset & (self.unit_size() - 1);
        let len = len.min(end - offset);
        let run = self.run(slice, index, unit, words, in_unit + len);
        Some((
            host.offset + in_unit,
            len.min((run << self.shape.unit_bits()) - in_unit),
        ))
    }
}
