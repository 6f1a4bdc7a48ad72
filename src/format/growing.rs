//! A table that becomes longer while others read it, without a lock.
//!
//! Its entries never move: what it gains is in a piece of its own behind those that it had. Each
//! piece is at least as long as all before it, so that a table that grows often has few of them, and
//! who looks for an entry of the first one pays nothing for the others.

use std::sync::OnceLock;

/// The table.
#[derive(Debug)]
pub struct Growing<T> {
    first: Box<[T]>,
    more: OnceLock<Box<Self>>,
}

impl<T> FromIterator<T> for Growing<T> {
    fn from_iter<I: IntoIterator<Item = T>>(entries: I) -> Self {
        Self {
            first: entries.into_iter().collect(),
            more: OnceLock::new(),
        }
    }
}

impl<T> Growing<T> {
    /// The entry at `index`.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&T> {
        match self.first.get(index) {
            Some(entry) => Some(entry),
            None => self.behind(index),
        }
    }

    #[cold]
    fn behind(&self, index: usize) -> Option<&T> {
        self.more.get()?.get(index.checked_sub(self.first.len())?)
    }

    /// How many entries there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.first.len() + self.more.get().map_or(0, |more| more.count())
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let mut piece = Some(self);
        let pieces = std::iter::from_fn(move || {
            let this = piece?;
            piece = this.more.get().map(|more| &**more);
            Some(&*this.first)
        });
        pieces.flatten()
    }

    /// Makes sure that there are at least `len` entries; those that are new are what `make` makes.
    pub fn grow(&self, len: usize, make: impl Fn() -> T) {
        let mut last = self;
        let mut total = last.first.len();
        while let Some(more) = last.more.get() {
            last = more;
            total += last.first.len();
        }
        if total < len {
            let piece = total.max(len - total);
            last.more
                .get_or_init(|| Box::new((0..piece).map(|_| make()).collect()));
            // Who grew it at the same time may have wanted less.
            self.grow(len, make);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: entries that move or are lost when a table grows, that are found in the
    //! wrong place, and a piece for every little that it grows by.

    use super::*;

    #[test]
    fn entries_stay_where_they_are_and_new_ones_follow() {
        let table: Growing<usize> = (0..3).collect();
        let first = std::ptr::from_ref(table.get(2).unwrap());
        assert!(table.get(3).is_none());
        table.grow(2, || 9);
        assert_eq!(table.count(), 3, "it is long enough");
        table.grow(4, || 7);
        assert_eq!(
            table.iter().copied().collect::<Vec<_>>(),
            [0, 1, 2, 7, 7, 7]
        );
        table.grow(100, || 8);
        assert!(table.count() >= 100);
        assert_eq!(
            (table.get(5), table.get(6), table.get(99)),
            (Some(&7), Some(&8), Some(&8))
        );
        assert_eq!(first, std::ptr::from_ref(table.get(2).unwrap()));
        assert_eq!(table.iter().count(), table.count());
        assert!(table.get(table.count()).is_none());
    }

    #[test]
    fn a_table_that_grows_often_has_few_pieces() {
        let table: Growing<u8> = std::iter::once(0).collect();
        for len in 1..10_000 {
            table.grow(len, || 0);
        }
        let pieces = std::iter::successors(Some(&table), |piece| piece.more.get().map(|p| &**p));
        assert!(pieces.count() < 20);
    }

    #[test]
    fn an_empty_table_grows() {
        let table: Growing<u8> = std::iter::empty().collect();
        table.grow(0, || 1);
        assert_eq!((table.count(), table.get(0)), (0, None));
        table.grow(1, || 1);
        assert_eq!(table.get(0), Some(&1));
    }
}
