//! Where the mapping slices in memory are: by number, without a lock.
//!
//! An image of a terabyte has tens of thousands of slices, and most layers of a chain have few
//! of them, so the pointers come in groups that are made when they are first needed. How large a
//! disk is, is what its header says, and a damaged one can say anything within the limits of its
//! format: a group is large enough for the largest disk to have some tens of megabytes of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::growing::Growing;
use crate::sync::{ArcSwapOption, Guard};

/// Slices in a group.
const GROUP: usize = 1024;

type Group<T> = Box<[ArcSwapOption<T>]>;

/// The slices of an image by number: guest cluster / entries in a slice.
#[derive(Debug)]
pub struct Directory<T> {
    groups: Growing<OnceLock<Group<T>>>,
    count: AtomicU64,
}

impl<T> Directory<T> {
    /// Room for `count` slices, none of which is there.
    #[must_use]
    pub fn new(count: u64) -> Self {
        let groups = count.div_ceil(GROUP as u64);
        Self {
            groups: (0..groups).map(|_| OnceLock::new()).collect(),
            count: AtomicU64::new(count),
        }
    }

    /// Makes room for `count` slices, if there is less. Those that are there stay where they are.
    pub fn grow(&self, count: u64) {
        let groups = count.div_ceil(GROUP as u64) as usize;
        self.groups.grow(groups, OnceLock::new);
        self.count.fetch_max(count, Ordering::Release);
    }

    /// The slice, if it is in memory.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Guard<Option<Arc<T>>>> {
        let group = self.groups.get(number as usize / GROUP)?.get()?;
        let guard = group.get(number as usize % GROUP)?.load();
        guard.is_some().then_some(guard)
    }

    /// Puts a slice into its place, or takes it out. False: the image has no such slice.
    pub fn set(&self, number: u64, slice: Option<Arc<T>>) -> bool {
        if number >= self.count.load(Ordering::Acquire) {
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
        for number in 0..count {
            assert!(directory.get(number).is_none());
            assert!(directory.set(number, Some(Arc::new(number))));
        }
        for number in 0..count {
            assert_eq!(directory.get(number).unwrap().as_deref(), Some(&number));
        }
        assert!(directory.set(7, None));
        assert!(directory.get(7).is_none());
        assert!(!directory.set(count, Some(Arc::new(0))));
        assert!(directory.get(count).is_none());
    }

    #[test]
    fn a_directory_that_grows_keeps_its_slices() {
        let directory = Directory::new(3);
        assert!(directory.set(2, Some(Arc::new(2))));
        directory.grow(2 * GROUP as u64 + 1);
        directory.grow(1);
        assert_eq!(directory.get(2).unwrap().as_deref(), Some(&2));
        assert!(directory.get(2 * GROUP as u64).is_none());
        assert!(directory.set(2 * GROUP as u64, Some(Arc::new(7))));
        assert_eq!(
            directory.get(2 * GROUP as u64).unwrap().as_deref(),
            Some(&7)
        );
        assert!(!directory.set(2 * GROUP as u64 + 1, Some(Arc::new(0))));
    }
}
