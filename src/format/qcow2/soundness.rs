//! What is known of an image's soundness while it is open, and who is told when it contradicts itself.
//!
//! ```text
//!   sound ──a contradiction that can be stepped around: told, once──▶ in doubt
//!     └──────────────┬──────────────────────────────────────────────────┘
//!                    └──one that leaves nothing to rely on: told──▶ corrupt: nothing is written
//! ```
//!
//! Which entries are wrong says nothing about the others. Where an entry points at no cluster, or at
//! the image's own tables, the image may have been written by two at a time, or its storage may
//! have lost writes, so that what looks free need not be: then guests' writes are refused from that
//! moment on, nothing is allocated and nothing is freed. What had been written before is still
//! flushed. The header says so as well ([`Qcow2::mark_corrupt`]), and the image cannot be opened to be
//! written before it is repaired. An image that is only read is told of, and nothing else.

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::Qcow2;
use super::header::INCOMPATIBLE_CORRUPT;
use crate::error::{Error, Result};
use crate::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

/// A contradiction in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// The image's node.
    pub node: Arc<str>,
    /// What was found.
    pub message: String,
    /// The bytes of the file that are concerned, start and length.
    pub place: Option<(u64, u64)>,
    /// Nothing is written to the image any more.
    pub fatal: bool,
}

type Listener = Box<dyn Fn(Corruption) + Send + Sync>;

/// Where contradictions in images are told. Those that are found before anybody listens wait.
#[derive(Default)]
pub struct Reports {
    listener: OnceLock<Listener>,
    waiting: parking_lot::Mutex<Vec<Corruption>>,
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reports")
    }
}

impl Reports {
    /// Has `listener` told, which must not block: it is called with locks held. Can be said once.
    pub fn listen(&self, listener: impl Fn(Corruption) + Send + Sync + 'static) {
        let mut waiting = self.waiting.lock();
        let _ = self.listener.set(Box::new(listener));
        if let Some(listener) = self.listener.get() {
            waiting.drain(..).for_each(listener);
        }
    }

    fn tell(&self, corruption: Corruption) {
        let mut waiting = self.waiting.lock();
        match self.listener.get() {
            Some(listener) => {
                drop(waiting);
                listener(corruption);
            }
            None => waiting.push(corruption),
        }
    }
}

/// Whom an image tells, and under which name.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// The image's node.
    pub node: Arc<str>,
    /// Where contradictions are told.
    pub reports: Arc<Reports>,
}

/// What was found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub what: String,
    /// The bytes of the file that are concerned, start and length.
    pub place: Option<(u64, u64)>,
    /// It leaves nothing to rely on.
    pub fatal: bool,
}

/// An image's state. See the module.
#[derive(Debug)]
pub(super) struct Soundness {
    /// Guests may write. Looked at by each write.
    writes: AtomicBool,
    /// It was opened to be written, and has been found corrupt since.
    corrupt: AtomicBool,
    /// Something has been told.
    told: Mutex<bool>,
    reporter: Option<Reporter>,
}

impl Soundness {
    /// That of an image that was opened just now.
    pub fn new(writable: bool, reporter: Option<Reporter>) -> Arc<Self> {
        Arc::new(Self {
            writes: AtomicBool::new(writable),
            corrupt: AtomicBool::new(false),
            told: Mutex::new(false),
            reporter,
        })
    }

    /// Whether guests may write.
    pub fn allows_writes(&self) -> bool {
        self.writes.load(Ordering::Relaxed)
    }

    /// Whether it has been found corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Acquire)
    }

    /// From now on it is only read.
    pub fn lower(&self) {
        self.writes.store(false, Ordering::Release);
    }

    /// Something has been found.
    pub fn found(&self, file: &str, fault: Fault) {
        let fatal = {
            let mut told = self.told.lock();
            let was_corrupt = self.is_corrupt();
            // One that is only read, or no longer written, cannot be harmed.
            let fatal = fault.fatal && (self.allows_writes() || was_corrupt);
            if was_corrupt || (*told && !fatal) {
                return;
            }
            *told = true;
            if fatal {
                self.corrupt.store(true, Ordering::Release);
                self.writes.store(false, Ordering::Release);
            }
            fatal
        };
        let end = match fatal {
            true => "it is marked corrupt, and nothing is written to it any more",
            false => "further ones that are no worse are not told of",
        };
        log::error!("{file}: image is corrupt: {} ({end})", fault.what);
        if let Some(Reporter { node, reports }) = &self.reporter {
            reports.tell(Corruption {
                node: node.clone(),
                message: fault.what,
                place: fault.place,
                fatal,
            });
        }
    }
}

impl Qcow2 {
    /// Says that nobody writes the image any more, which has been closed: what is found wrong with it
    /// from now on harms nothing.
    pub fn lower(&self) {
        self.soundness.lower();
    }

    /// Tells of a contradiction that made what was tried fail. Nothing was changed by it, and guests go
    /// on.
    pub(super) fn told<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Corrupt { what, .. }) = &result {
            let fault = Fault {
                what: what.clone(),
                place: None,
                fatal: false,
            };
            self.soundness.found(self.storage.name(), fault);
        }
        result
    }

    /// Refuses to change an image that has been found corrupt.
    pub(super) fn check_sound(&self) -> Result<()> {
        match self.soundness.is_corrupt() {
            false => Ok(()),
            true => Err(Error::corrupt(
                self.storage.name(),
                "nothing is written to it any more: repair it with 'stratactl image check --repair \
                 all' when it is not in use",
            )),
        }
    }

    /// Has the header say that the image is corrupt, if it has been found so: until it is repaired,
    /// nobody opens it to be written. What had been written before is made stable first, and goes
    /// into the file: a journal would keep the image from those who repair it. An image of version 2
    /// has no place for it.
    ///
    /// # Errors
    /// What the storage reports.
    pub async fn mark_corrupt(&self) -> Result<()> {
        let has_place = self.shape.version >= 3;
        let is_marked = || self.header.lock().incompatible & INCOMPATIBLE_CORRUPT != 0;
        if !has_place || !self.soundness.is_corrupt() || is_marked() {
            return Ok(());
        }
        let settled = match self.flush().await {
            Ok(()) => self.end_journal().await,
            failed => failed,
        };
        if let Err(error) = settled {
            // The mark matters more: without it the next one who opens the image takes it for sound.
            let file = self.storage.name();
            log::error!("{file}: the corrupt image is marked, but not all is flushed: {error}");
        }
        let _turn = self.flush_turn().await;
        let header = self.header();
        let bits = header.incompatible | INCOMPATIBLE_CORRUPT;
        self.patch_header(&[header.with_incompatible(bits)]).await
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a contradiction that is told for each request that meets it, or not at
    //! all; one that is worse than what was told before and is passed over; an image that is only
    //! read and taken for one that was lost; something that is found before anybody listens.

    use std::sync::mpsc::channel;

    use super::*;

    fn fault(what: &str, fatal: bool) -> Fault {
        Fault {
            what: what.to_owned(),
            place: None,
            fatal,
        }
    }

    #[test]
    fn what_is_wrong_with_an_image_that_is_not_written_any_more_is_not_fatal() {
        let (send, told) = channel();
        let reports = Arc::<Reports>::default();
        reports.listen(move |corruption| drop(send.send(corruption)));
        let reporter = Reporter {
            node: "disk".into(),
            reports,
        };
        let soundness = Soundness::new(true, Some(reporter));
        soundness.lower();
        soundness.found("file", fault("a", true));
        assert!(!soundness.is_corrupt());
        assert!(!told.recv().unwrap().fatal);
    }

    #[test]
    fn each_step_down_is_told_once() {
        for writable in [true, false] {
            let reports = Arc::<Reports>::default();
            let reporter = Reporter {
                node: "disk".into(),
                reports: reports.clone(),
            };
            let soundness = Soundness::new(writable, Some(reporter));
            soundness.found("file", fault("a", false));
            let (send, told) = channel();
            reports.listen(move |corruption: Corruption| drop(send.send(corruption)));
            for (what, fatal) in [("b", false), ("c", true), ("d", true), ("e", false)] {
                soundness.found("file", fault(what, fatal));
            }
            assert_eq!(soundness.is_corrupt(), writable);
            assert!(!soundness.allows_writes());
            drop((soundness, reports));
            let told: Vec<_> = told.iter().map(|one| (one.message, one.fatal)).collect();
            let wanted = [("a".to_owned(), false), ("c".to_owned(), true)];
            assert_eq!(told, wanted[..1 + usize::from(writable)]);
        }
    }
}
