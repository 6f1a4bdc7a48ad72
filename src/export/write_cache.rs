//! Whether the guest has a write cache: it sends flushes, or else every write is stable before it
//! completes.
//!
//! The guest can switch it off, and then sends no more flushes. Nobody says so a second time: a
//! front-end that lost its back-end and connects again does not, nor does one whose guest reboots
//! (QEMU shows the new guest the configuration that it had). So what was said is the device's, and
//! outlives sessions and resets ([`Kept`]), and the process where there is an inflight region.
//! Virtio leaves open what it is after a reset.
//!
//! Where nothing is known, the guest may have switched it off while another process served it. It
//! cannot have if the device begins anew and the front-end has read the configuration before that:
//! what it shows its guest is ours.

use std::sync::Arc;

use parking_lot::Mutex;

/// What an export keeps from one session to the next; `None`: nothing is known.
pub(super) type Kept = Arc<Mutex<Option<bool>>>;

/// What a session knows.
#[derive(Debug, Default)]
pub(super) struct WriteCache {
    kept: Kept,
    /// The front-end has read that it is on.
    read: bool,
    /// The front-end has set it.
    set: bool,
    /// It was not known, and is on since the device begins anew.
    anew: bool,
}

impl WriteCache {
    pub(super) fn new(kept: &Kept) -> Self {
        Self {
            kept: kept.clone(),
            ..Self::default()
        }
    }

    /// Whether it is on, as far as it is known.
    pub(super) fn is_on(&self) -> bool {
        self.known().unwrap_or(true)
    }

    pub(super) fn known(&self) -> Option<bool> {
        *self.kept.lock()
    }

    /// The front-end reads it.
    pub(super) fn read(&mut self) {
        self.read |= self.is_on();
    }

    /// The front-end sets it.
    pub(super) fn set(&mut self, on: bool) {
        *self.kept.lock() = Some(on);
        self.set = true;
        self.anew = false;
    }

    /// The front-end hands over a region that says so. It may have been set since the region had it
    /// last, in this session or in one before: off loses nothing.
    pub(super) fn found(&mut self, on: bool) {
        if !self.set {
            let mut kept = self.kept.lock();
            *kept = Some(on && *kept != Some(false));
            self.anew = false;
        }
    }

    /// A queue begins to be served; `goes_on`: one of the queues was served before this session, here
    /// or on the machine that the guest comes from. True: nothing was known, and now something is.
    pub(super) fn begin(&mut self, goes_on: bool) -> bool {
        let mut kept = self.kept.lock();
        if kept.is_some() && !self.anew {
            return false;
        }
        self.anew = self.read && !goes_on;
        kept.replace(self.anew) != Some(self.anew)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a guest that has switched its write cache off and gets it back, and a
    //! new one that has none.

    use super::*;

    fn session(kept: &Kept, read: bool) -> WriteCache {
        let mut cache = WriteCache::new(kept);
        if read {
            cache.read();
        }
        cache
    }

    #[test]
    fn a_new_device_has_one() {
        let kept = Kept::default();
        let mut cache = session(&kept, true);
        assert!(cache.begin(false) && cache.is_on());
        assert!(!cache.begin(false) && cache.is_on());
        // The next session need not ask.
        let mut next = session(&kept, false);
        assert!(!next.begin(true) && next.is_on());
    }

    #[test]
    fn without_knowledge_there_is_none() {
        for (read, goes_on) in [(false, false), (false, true), (true, true)] {
            let kept = Kept::default();
            let mut cache = session(&kept, read);
            assert!(cache.begin(goes_on) && !cache.is_on());
        }
        // The second queue is the one that tells.
        let mut cache = session(&Kept::default(), true);
        assert!(cache.begin(false) && cache.is_on());
        assert!(cache.begin(true) && !cache.is_on());
    }

    #[test]
    fn off_stays_until_somebody_sets_it() {
        let kept = Kept::default();
        session(&kept, true).set(false);
        let mut next = session(&kept, true);
        next.found(true);
        assert!(!next.begin(false) && !next.is_on());
        next.set(true);
        next.found(false);
        assert!(!next.begin(true) && next.is_on());
        let mut last = session(&kept, true);
        last.found(false);
        assert!(!last.is_on());
    }
}
