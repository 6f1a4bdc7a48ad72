//! Syncs, and what a failed one means.
//!
//! When the kernel cannot write back what waits in its page cache, it says so in one `fdatasync`
//! of each descriptor and marks the pages clean. The next `fdatasync` finds nothing to write and
//! succeeds, though what was written never reached the disk. Therefore:
//!
//! * A file that is written through the page cache keeps its first failure. Every later sync of it
//!   fails, without being tried, until somebody who knows what became of the file clears that.
//! * The failure is the file's, not a descriptor's: a storage that opens the file again in this process,
//!   or has it open already, with `O_DIRECT` or without, gets it too.
//! * A sync that runs beside the one that fails may succeed, since the kernel has told this
//!   descriptor already. One sync of a file runs at a time, and those that come meanwhile share the
//!   next one.
//!
//! With `O_DIRECT` alone nothing of ours waits in memory: a write that has completed has been taken
//! by the device, and a sync that fails is the flush of the device's cache. That cache still has
//! the data, and a later flush that succeeds speaks for all of it.

use std::collections::HashMap;
use std::fs::Metadata;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Instant, SystemTime};

use super::identity::identity_of;
use super::silence::{LastEnd, UnderWay};
use super::{Identity, Storage, are_different, is_known};
use crate::error::SyncFailure;
use crate::sync::{AsyncMutex, Mutex};

/// The syncs of one file.
#[derive(Debug)]
pub struct Syncs {
    /// Held by the sync under way.
    turn: AsyncMutex<()>,
    state: Mutex<State>,
    /// Of operations of tasks.
    last_end: LastEnd,
}

#[derive(Debug, Default)]
struct State {
    /// What was written may wait in memory that a failed sync throws away.
    page_cache: bool,
    /// Syncs that have begun.
    begun: u64,
    /// When the one that is under way began.
    since: Option<Instant>,
    /// The latest one that succeeded.
    succeeded: u64,
    failure: Option<SyncFailure>,
    /// The file; zeros where that is not known.
    identity: Identity,
}

/// Is told of a failure that stays.
type Listener = Box<dyn Fn(&Arc<Syncs>, &SyncFailure) + Send + Sync>;

/// What the process knows of the files that it syncs.
#[derive(Default)]
struct Registry {
    /// By device and inode; block devices by their number alone.
    files: HashMap<(u64, u64), Arc<Syncs>>,
    /// Of storages that name no [`Syncs`], by address: no other storage has it while the entry is
    /// there.
    others: HashMap<usize, (Weak<dyn Storage>, Arc<Syncs>)>,
    /// Failures of files that have not been seen yet.
    waiting: Vec<(SyncFailure, Identity)>,
    listener: Option<Arc<Listener>>,
    on_removal: Option<Arc<Listener>>,
}

/// Held for a look-up at a time.
static REGISTRY: LazyLock<parking_lot::Mutex<Registry>> = LazyLock::new(Default::default);

/// From now on `listener` is told of failures that stay, on the thread that met one: it must not
/// block.
pub fn on_failure(listener: impl Fn(&Arc<Syncs>, &SyncFailure) + Send + Sync + 'static) {
    REGISTRY.lock().listener = Some(Arc::new(Box::new(listener)));
}

/// From now on `listener` is told of failures whose files were [removed](remove_file), on the thread that
/// did it: it must not block.
pub fn on_removal(listener: impl Fn(&Arc<Syncs>, &SyncFailure) + Send + Sync + 'static) {
    REGISTRY.lock().on_removal = Some(Arc::new(Box::new(listener)));
}

/// Removes a file that this process has made and that is not needed. That its flush has failed concerns
/// nobody; that of another file which had this name before is not meant.
///
/// # Errors
/// What the system reports.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    let metadata = std::fs::symlink_metadata(path)?;
    std::fs::remove_file(path)?;
    let (syncs, listener) = {
        let registry = REGISTRY.lock();
        let syncs = registry.files.get(&key_of(&metadata)).cloned();
        (syncs, registry.on_removal.clone())
    };
    if let Some(syncs) = syncs
        && let Some(failure) = syncs.clear()
        && let Some(listener) = listener
    {
        listener(&syncs, &failure);
    }
    Ok(())
}

/// What a file is known by.
fn key_of(metadata: &Metadata) -> (u64, u64) {
    match metadata.file_type().is_block_device() {
        true => (u64::MAX, metadata.rdev()),
        false => (metadata.dev(), metadata.ino()),
    }
}

impl Syncs {
    /// Those of a file that nobody else has. `page_cache`: what is written to it may be lost
    /// with a sync that fails.
    #[must_use]
    pub fn new(page_cache: bool) -> Arc<Self> {
        Arc::new(Self {
            turn: AsyncMutex::default(),
            state: Mutex::new(State {
                page_cache,
                ..State::default()
            }),
            last_end: LastEnd::default(),
        })
    }

    /// Those of the file with this metadata, the same for all who open it. `page_cache`: it is
    /// about to be written through the page cache.
    pub(super) fn of_file(metadata: &Metadata, page_cache: bool) -> Arc<Self> {
        let key = key_of(metadata);
        let mut registry = REGISTRY.lock();
        registry
            .files
            .retain(|_, syncs| Arc::strong_count(syncs) > 1 || syncs.failure().is_some());
        let syncs = registry
            .files
            .entry(key)
            .or_insert_with(|| Self::new(false))
            .clone();
        let identity = identity_of(metadata).unwrap_or_default();
        let is_it =
            |(_, other): &mut (SyncFailure, Identity)| is_known(identity) && *other == identity;
        let kept = registry.waiting.extract_if(.., is_it).last();
        drop(registry);
        if let Some((failure, _)) = &kept {
            log::error!("{failure}");
        }
        let mut state = syncs.state.lock();
        state.page_cache |= page_cache;
        state.identity = identity;
        if let Some((failure, _)) = kept {
            state.failure.get_or_insert(failure);
        }
        drop(state);
        syncs
    }

    /// From now on the file named in `failure` has failed, as an earlier process found. Where
    /// `identity` is known that is the file, whatever its path: until it is opened, the failure
    /// [waits](Self::waiting).
    pub fn keep(failure: SyncFailure, identity: Identity) {
        let metadata = std::fs::metadata(&failure.file).ok();
        let found = metadata.filter(|metadata| {
            let now = identity_of(metadata).unwrap_or_default();
            !are_different(now, identity)
        });
        let Some(metadata) = found else {
            return REGISTRY.lock().waiting.push((failure, identity));
        };
        log::error!("{failure}");
        // Kept in the registry by the failure itself.
        let syncs = Self::of_file(&metadata, false);
        syncs.state.lock().failure = Some(failure);
    }

    /// Failures of an earlier process whose files were not opened yet.
    #[must_use]
    pub fn waiting() -> Vec<(SyncFailure, Identity)> {
        REGISTRY.lock().waiting.clone()
    }

    /// The file, by what tells it from others; zeros where that is not known.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.state.lock().identity
    }

    /// Those of a storage. One that does not say which they are counts as a file of its own,
    /// written through the page cache.
    #[must_use]
    pub fn of(storage: &Arc<dyn Storage>) -> Arc<Self> {
        if let Some(syncs) = storage.syncs() {
            return syncs.clone();
        }
        let key = Arc::as_ptr(storage).cast::<()>() as usize;
        let mut registry = REGISTRY.lock();
        if let Some((_, syncs)) = registry.others.get(&key) {
            return syncs.clone();
        }
        registry
            .others
            .retain(|_, (storage, _)| storage.strong_count() > 0);
        let syncs = Self::new(true);
        let entry = (Arc::downgrade(storage), syncs.clone());
        registry.others.insert(key, entry);
        syncs
    }

    /// The failure that the file keeps.
    #[must_use]
    pub fn failure(&self) -> Option<SyncFailure> {
        self.state.lock().failure.clone()
    }

    /// Fails if a sync would fail for what happened before.
    ///
    /// # Errors
    /// The failure that the file keeps.
    pub fn check(&self) -> io::Result<()> {
        self.failure().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// Whether a sync is being carried out just now.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.state.lock().since.is_some()
    }

    /// An operation of the file has ended.
    pub(super) fn note_end(&self) {
        self.last_end.note();
    }

    /// Since when a sync is under way, or a call that is since `call`, without any operation of a
    /// task that has ended. `None`: none is under way.
    #[must_use]
    pub fn silent_since(&self, call: Option<Instant>) -> Option<Instant> {
        let sync = self.state.lock().since;
        let since = sync.into_iter().chain(call).min()?;
        Some(self.last_end.at().map_or(since, |last| last.max(since)))
    }

    /// Forgets the failure: the next sync is tried again. Returns what it was.
    pub fn clear(&self) -> Option<SyncFailure> {
        self.state.lock().failure.take()
    }

    /// Makes stable what was written before this call, by a sync that begins after it.
    pub(super) async fn share(
        self: &Arc<Self>,
        file: &str,
        sync: impl Future<Output = io::Result<u32>>,
    ) -> io::Result<()> {
        let arrived = self.state.lock().begun;
        let _turn = self.turn.lock().await;
        let number = {
            let mut state = self.state.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone().into());
            }
            if state.succeeded > arrived {
                return Ok(());
            }
            state.begun += 1;
            state.begun
        };
        let under_way = SyncUnderWay::begin(self);
        let result = sync.await;
        drop(under_way);
        if result.is_ok() {
            self.state.lock().succeeded = number;
        }
        result.map(drop).map_err(|error| self.fail(file, error))
    }

    /// Keeps a failure, if it is one that stays.
    fn fail(self: &Arc<Self>, file: &str, error: io::Error) -> io::Error {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        {
            let mut state = self.state.lock();
            if !state.page_cache || !was_tried(errno) {
                return error;
            }
            state.failure = Some(SyncFailure {
                file: file.to_owned(),
                errno,
                at: SystemTime::now(),
            });
        }
        let Some(failure) = self.failure() else {
            return error;
        };
        log::error!("{failure}");
        let listener = REGISTRY.lock().listener.clone();
        if let Some(listener) = listener {
            listener(self, &failure);
        }
        failure.into()
    }
}

/// The sync of a file that is under way: until it has ended, or nobody waits for it any more.
struct SyncUnderWay<'a> {
    syncs: &'a Syncs,
    _counted: UnderWay,
}

impl<'a> SyncUnderWay<'a> {
    fn begin(syncs: &'a Syncs) -> Self {
        let counted = UnderWay::begin();
        syncs.state.lock().since = Some(counted.since());
        Self {
            syncs,
            _counted: counted,
        }
    }
}

impl Drop for SyncUnderWay<'_> {
    fn drop(&mut self) {
        self.syncs.state.lock().since = None;
    }
}

/// Whether the kernel can have tried to write anything back.
fn was_tried(errno: i32) -> bool {
    !matches!(
        errno,
        libc::EINTR
            | libc::EAGAIN
            | libc::ECANCELED
            | libc::EBADF
            | libc::EINVAL
            | libc::ENOSYS
            | libc::EOPNOTSUPP
    )
}

#[cfg(test)]
mod tests {
    //! What would be caught: a sync that succeeds after one that failed, or beside it; a failure
    //! that another descriptor of the file does not see, that goes when the file is closed, or
    //! that stays where it should not; a request answered by a sync that began before it.

    #![allow(clippy::unwrap_used)]

    use std::cell::Cell;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::reactor::Reactor;
    use crate::storage::OpenFlags;
    use crate::storage::{FileStorage, io as storage_io};

    fn failed(errno: i32) -> io::Result<u32> {
        Err(io::Error::from_raw_os_error(errno))
    }

    /// The outcome of a sync that ends at once.
    fn sync(syncs: &Arc<Syncs>, result: io::Result<u32>) -> io::Result<()> {
        let mut future = pin!(syncs.share("disk", std::future::ready(result)));
        match future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("it waits for nobody"),
        }
    }

    /// What would be caught: another file's failure that is forgotten, since it had the name before.
    #[test]
    fn a_file_that_is_not_needed_takes_its_own_failure_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let failing = || {
            let file = std::fs::File::create_new(&path).unwrap();
            let syncs = Syncs::of_file(&file.metadata().unwrap(), true);
            assert!(sync(&syncs, failed(libc::EIO)).is_err());
            (file, syncs)
        };
        // The file stays open, so that no other one is known by the same.
        let (_file, old) = failing();
        std::fs::remove_file(&path).unwrap();
        let (_, new) = failing();
        remove_file(&path).unwrap();
        assert!(!path.exists());
        assert!(new.failure().is_none() && old.failure().is_some());
        old.clear();
    }

    #[test]
    fn a_failure_of_the_page_cache_stays_until_it_is_cleared() {
        let syncs = Syncs::new(true);
        sync(&syncs, Ok(0)).unwrap();
        assert!(sync(&syncs, failed(libc::ENOSPC)).is_err());
        let error = sync(&syncs, Ok(0)).unwrap_err().to_string();
        for words in [
            "disk: ",
            "UTC",
            "No space left on device",
            "clear-sync-error",
        ] {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert_eq!(syncs.clear().unwrap().errno, libc::ENOSPC);
        assert_eq!(syncs.clear(), None);
        sync(&syncs, Ok(0)).unwrap();
    }

    #[test]
    fn a_sync_that_was_not_tried_may_be_tried_again() {
        let syncs = Syncs::new(true);
        for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
            assert!(sync(&syncs, failed(errno)).is_err());
            sync(&syncs, Ok(0)).unwrap();
        }
    }

    #[test]
    fn without_the_page_cache_a_later_sync_counts() {
        let syncs = Syncs::new(false);
        let error = sync(&syncs, failed(libc::EIO)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        sync(&syncs, Ok(0)).unwrap();
    }

    /// The kernel tells a descriptor once: the second sync would succeed.
    #[test]
    fn a_sync_beside_the_one_that_fails_fails() {
        let syncs = Syncs::new(true);
        let result = Cell::new(None);
        let first = syncs.share(
            "disk",
            std::future::poll_fn(|_| result.take().map_or(Poll::Pending, Poll::Ready)),
        );
        let (mut first, mut second) = (pin!(first), pin!(syncs.share("disk", async { Ok(0) })));
        let mut context = Context::from_waker(Waker::noop());
        assert!(first.as_mut().poll(&mut context).is_pending());
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert!(syncs.is_under_way());
        result.set(Some(failed(libc::EIO)));
        let Poll::Ready(Err(_)) = first.as_mut().poll(&mut context) else {
            panic!("the first one has failed");
        };
        let Poll::Ready(Err(_)) = second.as_mut().poll(&mut context) else {
            panic!("the second one has failed, too");
        };
        assert!(!syncs.is_under_way());
    }

    /// Its waiter was cancelled: what is left of it is no sign of a disk that hangs.
    #[test]
    fn a_sync_that_nobody_waits_for_is_not_under_way() {
        let syncs = Syncs::new(true);
        let mut first = Box::pin(syncs.share("disk", std::future::pending()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(first.as_mut().poll(&mut context).is_pending());
        let began = syncs.silent_since(None).unwrap();
        syncs.note_end();
        assert!(
            syncs.silent_since(None).unwrap() > began,
            "an operation has ended"
        );
        drop(first);
        assert!(!syncs.is_under_way());
        assert_eq!(syncs.silent_since(None), None);
    }

    #[test]
    fn those_that_wait_share_one_sync_that_begins_after_them() {
        let syncs = Syncs::new(true);
        let (open, begun) = (Cell::new(false), Cell::new(0));
        let make = || {
            syncs.share("disk", async {
                begun.set(begun.get() + 1);
                std::future::poll_fn(|_| match open.get() {
                    true => Poll::Ready(Ok(0)),
                    false => Poll::Pending,
                })
                .await
            })
        };
        let (mut first, mut second, mut third) = (pin!(make()), pin!(make()), pin!(make()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(first.as_mut().poll(&mut context).is_pending());
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert!(third.as_mut().poll(&mut context).is_pending());
        open.set(true);
        assert!(first.as_mut().poll(&mut context).is_ready());
        assert!(second.as_mut().poll(&mut context).is_ready());
        assert_eq!(begun.get(), 2, "the first began before the second came");
        assert!(third.as_mut().poll(&mut context).is_ready());
        assert_eq!(begun.get(), 2);
    }

    #[test]
    fn a_file_keeps_its_failure_when_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let open = |writable| {
            let flags = OpenFlags {
                writable,
                ..OpenFlags::default()
            };
            FileStorage::open(&path, flags).unwrap()
        };
        let synced = |storage: &FileStorage| reactor.block_on(storage_io::sync(storage));
        let (one, other) = (open(true), open(false));
        synced(&one).unwrap();
        let syncs = one.syncs().unwrap();
        assert!(sync(syncs, failed(libc::EIO)).is_err());
        synced(&one).unwrap_err();
        synced(&other).unwrap_err();
        drop((one, other));
        let again = open(true);
        synced(&again).unwrap_err();
        // A file beside it has nothing to do with it.
        std::fs::write(dir.path().join("beside"), [0; 512]).unwrap();
        let flags = OpenFlags {
            writable: true,
            ..OpenFlags::default()
        };
        synced(&FileStorage::open(&dir.path().join("beside"), flags).unwrap()).unwrap();
        again.syncs().unwrap().clear().unwrap();
        synced(&again).unwrap();
        Reactor::leave_thread();
    }

    #[test]
    fn a_failure_of_an_earlier_process_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let failure = SyncFailure {
            file: path.display().to_string(),
            errno: libc::EIO,
            at: UNIX_EPOCH + Duration::from_secs(951_782_400),
        };
        Syncs::keep(failure.clone(), [0, 0]);
        for direct in [false, true] {
            let flags = OpenFlags {
                writable: true,
                direct,
                ..OpenFlags::default()
            };
            let Ok(storage) = FileStorage::open(&path, flags) else {
                // Not every file system has O_DIRECT.
                assert!(direct);
                continue;
            };
            let error = reactor.block_on(storage_io::sync(&storage)).unwrap_err();
            assert!(error.to_string().contains("2000-02-29"), "{error}");
            assert_eq!(storage.syncs().unwrap().failure(), Some(failure.clone()));
        }
        // Another test's file may have the same number.
        let flags = OpenFlags::default();
        let storage = FileStorage::open(&path, flags).unwrap();
        storage.syncs().unwrap().clear().unwrap();
        // One that is not there has it as soon as it is opened, under any path.
        let identity = storage.identity().unwrap_or_default();
        let moved = SyncFailure {
            file: dir.path().join("moved").display().to_string(),
            ..failure
        };
        Syncs::keep(moved.clone(), identity);
        assert!(Syncs::waiting().contains(&(moved.clone(), identity)));
        if identity != [0, 0] {
            let storage = FileStorage::open(&path, flags).unwrap();
            assert_eq!(storage.syncs().unwrap().failure(), Some(moved.clone()));
            assert!(!Syncs::waiting().contains(&(moved, identity)));
            storage.syncs().unwrap().clear().unwrap();
        }
        Reactor::leave_thread();
    }
}
