//! Where the mapping slices in memory are: by number, without a lock.
//!
//! An image of a terabyte has tens of thousands of slices, and most layers of a chain have few
//! of them, so the pointers come in groups that are made when they are first needed.

use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use super::l2::Slice;

/// Slices in a group.
const GROUP: usize = 128;

type Group = Box<[ArcSwapOption<Slice>]>;

/// The slices of an image by number: guest cluster / entries in a slice.
#[derive(Debug)]
pub struct Directory {
    groups: Box<[OnceLock<Group>]>,
    count: u64,
}

impl Directory {
    /// Room for `count` slices, none of which is there.
    #[must_use]
    pub fn new(count: u64) -> Self {
        let groups = count.div_ceil(GROUP as u64);
        Self {
            groups: (0..groups).map(|_| OnceLock::new()).collect(),
            count,
        }
    }

    /// The slice, if it is in memory.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Guard<Option<Arc<Slice>>>> {
        let group = self.groups.get(number as usize / GROUP)?.get()?;
        let guard = group.get(number as usize % GROUP)?.load();
        guard.is_some().then_some(guard)
    }

    /// Puts a slice into its place, or takes it out. False: the image has no such slice.
    pub fn set(&self, number: u64, slice: Option<Arc<Slice>>) -> bool {
        if number >= self.count {
            return false;
        }
        let Some(group) = self.groups.get(number as usize / GROUP) else {
            return false;
        };
        let group = group.get_or_init(|| (0..GROUP).map(|_| ArcSwapOption::empty()).collect());
        match group.get(number as usize % GROUP) {
            Some(place) => {
                place.store(slice);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: slices that share a place, places past the end.

    use super::*;

    #[test]
    fn every_slice_has_a_place_of_its_own() {
        let count = 3 * GROUP as u64 + 5;
        let directory = Directory::new(count);
        let slice = |number: u64| Arc::new(Slice::from_bytes(&number.to_be_bytes(), false));
        for number in 0..count {
            assert!(directory.get(number).is_none());
            assert!(directory.set(number, Some(slice(number))));
        }
        for number in 0..count {
            let guard = directory.get(number).unwrap();
            assert_eq!(guard.as_ref().unwrap().get(0).descriptor, number);
        }
        assert!(directory.set(7, None));
        assert!(directory.get(7).is_none());
        assert!(!directory.set(count, Some(slice(0))));
        assert!(directory.get(count).is_none());
    }
}
