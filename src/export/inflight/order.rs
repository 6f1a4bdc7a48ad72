//! Completions in the order in which the chains were taken.
//!
//! Without an inflight region nothing but the used index says which chains were answered. If they
//! are shown in order, it says it exactly.

/// The chains of a ring that were taken and are not in its used ring. Allocates nothing once it is
/// made. Nearly always the chain that is done is the next one in order, so that is the short way.
#[derive(Debug)]
pub(in crate::export) struct Order {
    /// Heads in the order in which they were taken, in a circle.
    taken: Box<[u16]>,
    /// Of each head that is done and waits for others: its length and one. 0 of all others.
    done: Box<[u64]>,
    /// How many wait for others.
    waiting: u16,
    first: u16,
    next: u16,
    /// Makes a place of the circle out of an index.
    mask: u16,
}

impl Order {
    /// For a ring of `size` entries, a power of two.
    pub(in crate::export) fn new(size: u16) -> Self {
        Self {
            taken: vec![0; usize::from(size)].into(),
            done: vec![0; usize::from(size)].into(),
            waiting: 0,
            first: 0,
            next: 0,
            mask: size.wrapping_sub(1),
        }
    }

    /// A chain has been taken that is not under way already. False: it is done and has not been
    /// shown, or there are more chains than a ring has.
    #[inline]
    pub(in crate::export) fn take(&mut self, head: u16) -> bool {
        if self.next.wrapping_sub(self.first) > self.mask || self.waits(head) {
            return false;
        }
        if let Some(place) = self.taken.get_mut(usize::from(self.next & self.mask)) {
            *place = head;
            self.next = self.next.wrapping_add(1);
        }
        true
    }

    #[inline]
    fn waits(&self, head: u16) -> bool {
        self.waiting > 0 && self.done.get(usize::from(head)).is_some_and(|&len| len > 0)
    }

    /// The chain that was taken last was not taken.
    pub(in crate::export) fn put_back(&mut self) {
        self.next = self.next.wrapping_sub(1);
    }

    /// A chain is done. True: it is the next in order, and to be shown now; then
    /// [`Order::pop`] says whether others waited for it. False: it waits.
    #[inline]
    pub(in crate::export) fn done(&mut self, head: u16, len: u32) -> bool {
        if self.taken.get(usize::from(self.first & self.mask)) == Some(&head) {
            self.first = self.first.wrapping_add(1);
            return true;
        }
        if let Some(done) = self.done.get_mut(usize::from(head)) {
            *done = u64::from(len) + 1;
            self.waiting += 1;
        }
        false
    }

    /// Whether chains that are done wait for others.
    #[inline]
    pub(in crate::export) fn has_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// The next chain in order, if it is done: its head and length.
    pub(in crate::export) fn pop(&mut self) -> Option<(u16, u32)> {
        if self.waiting == 0 {
            return None;
        }
        let head = *self.taken.get(usize::from(self.first & self.mask))?;
        let done = self.done.get_mut(usize::from(head))?;
        let len = done.checked_sub(1)? as u32;
        *done = 0;
        self.waiting -= 1;
        self.first = self.first.wrapping_add(1);
        Some((head, len))
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a completion that overtakes another, one that is shown twice or never,
    //! and a circle that ends somewhere.

    use super::*;

    /// What is shown when a chain is done.
    fn shown(order: &mut Order, head: u16, len: u32) -> Vec<(u16, u32)> {
        let first = order.done(head, len).then_some((head, len));
        first
            .into_iter()
            .chain(std::iter::from_fn(|| order.pop()))
            .collect()
    }

    #[test]
    fn the_first_taken_is_the_first_shown() {
        let mut order = Order::new(4);
        for round in 0..40_000u32 {
            for head in [2, 0, 3] {
                assert!(order.take(head));
            }
            assert_eq!(shown(&mut order, 3, round), []);
            assert_eq!(shown(&mut order, 0, 0), []);
            assert!(!order.take(0), "it is done and not back");
            assert!(order.take(1));
            assert!(!order.take(2), "there are no more");
            let all = [(2, 9), (0, 0), (3, round)];
            assert_eq!(shown(&mut order, 2, 9), all);
            order.put_back();
            assert!(order.take(1));
            assert_eq!(shown(&mut order, 1, u32::MAX), [(1, u32::MAX)]);
        }
    }
}
