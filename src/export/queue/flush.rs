//! Flushes in groups: requests that wait for stable storage share one flush.
//!
//! A flush covers what was written before it began. Requests that come while one is
//! running wait for the next, all together.

/// The requests of a queue that wait for a flush.
#[derive(Debug, Default)]
pub(super) struct FlushGroup {
    running: bool,
    waiting: Vec<u16>,
}

impl FlushGroup {
    /// Adds a request. What it wants stable has been written.
    pub(super) fn join(&mut self, head: u16) {
        self.waiting.push(head);
    }

    /// The requests of the next flush, if one is to begin now.
    pub(super) fn begin(&mut self) -> Option<Vec<u16>> {
        if self.running || self.waiting.is_empty() {
            return None;
        }
        self.running = true;
        Some(std::mem::take(&mut self.waiting))
    }

    /// The running flush has ended.
    pub(super) fn end(&mut self) {
        self.running = false;
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a request answered by a flush that began before its write was
    //! done, or by none.

    use super::*;

    #[test]
    fn who_comes_during_a_flush_waits_for_the_next() {
        let mut group = FlushGroup::default();
        group.join(1);
        group.join(2);
        assert_eq!(group.begin(), Some(vec![1, 2]));
        group.join(3);
        assert_eq!(
            group.begin(),
            None,
            "the running one may be too early for 3"
        );
        group.end();
        assert_eq!(group.begin(), Some(vec![3]));
        group.end();
        assert_eq!(group.begin(), None);
    }
}
