//! What completed outlives the process: a redo log of the mapping, in shared memory.
//!
//! Between flushes the changes of an image's metadata are in memory alone, and a SIGKILL would lose
//! writes that have completed. The log has each change in a file on a tmpfs: appended without a
//! system call, by the thread that makes the change, under the lock that every change takes anyway. The
//! next process puts the log over what the disk has ([`adopt`]) and goes on as if nothing had
//! happened. A power cut takes the log with it; then what was flushed counts, as without one.
//!
//! * [`record`]: what a record says, and its checksum;
//! * `log`: the ring that records are appended to;
//! * [`file`](mod@file): the folder and its files;
//! * `mark`: what the image's header says of its journal, and `verdict`: what follows from that;
//! * `adopt`: the next process's part.
//!
//! # Layout
//!
//! ```text
//!   image, first sector                     FOLDER/<nonce>.journal
//!   ┌───────────────────────────────┐       ┌────────────────────────────────────────────┐
//!   │ autoclear bit 62              │    0  │ magic, version, nonce, boot, words, inode, │
//!   │ extension 0x53544a4c:         │       │ time of birth, checksum                    │
//!   │   nonce    ───────────────────┼──►    ├────────────────────────────────────────────┤
//!   │   flushed  (a position)       │  512  │ head: where the next process begins        │
//!   │   boot                        │ 1024  │ tail: behind the last whole record         │
//!   └───────────────────────────────┘       ├────────────────────────────────────────────┤
//!                                     4096  │ ring of words, a power of two of them      │
//!                                           │    ... [head │ record │ record │ tail] ... │
//!                                           └────────────────────────────────────────────┘
//!
//!   record: │ kind 8 │ count 24 │ checksum 32 │ 1. word │ 2. word │ more, of a mapping │
//!           mapping          guest cluster, then one or two words of each L2 entry
//!           refcounts        host cluster, the refcount that `count` clusters from it on have
//!           L1 entry         index, value
//!           refcount block   index in the refcount table, offset; all its refcounts are 0, the one to it is 1
//! ```
//!
//! Positions are words since the journal began; they never come back, so that a position is a
//! record's sequence number. The checksum covers it, the nonce and the record.
//!
//! # Invariants
//!
//! 1. **A record is whole before anybody acts on its change.** An L2 or L1 entry is stored where
//!    readers without a lock see it after its record has been committed: otherwise another queue
//!    could write in place through the new mapping, complete, and lose its write. [`Slice::set`]
//!    asks for a [`Recorded`], which only the log gives. Refcounts and the refcount table are seen
//!    under the lock alone; they change in two functions of the allocator, which record.
//! 2. **The tail is the commit.** A record's words are stored first, the tail last, in one store.
//!    What lies behind the tail was never said; what lies between head and tail is whole, and
//!    anything else there is a contradiction, by which the whole journal is refused.
//! 3. **Records are absolute**, and by index: not where an entry lies in the file, but which one it
//!    is. Over a disk on which a flush has written any part of what it was to write, they give the
//!    same state, and they do so again after a second kill. A table that has moved meanwhile (a
//!    longer refcount or L1 table is written directly, and named by the header when it is stable)
//!    has the same indices.
//! 4. **From the head on, everything is in the log that the disk may lack.** The head moves to the
//!    tail that a flush noted when it took its snapshot, under the same lock, and only when that
//!    flush has succeeded. What is appended meanwhile stays, and so does everything if it fails.
//! 5. **A new table voids what was said of its place before.** A record of an L1 entry says that the
//!    L2 table's contents are those on the disk at that instant: zeros or a copy, which are written
//!    before. A record of a refcount block says that all of it is 0, whatever the disk has: its
//!    zeros are not written before the next flush. And the cluster that the block is in has one
//!    reference, which it may cover itself: a kill may come before the record of that.
//! 6. **Frees are said, never derived.** A cluster is free when a record says that its refcount
//!    is 0, and that is recorded only when the mapping without it is stable and its grace period
//!    has ended. What was unmapped and not yet released keeps its reference in the next process,
//!    and is lost to the image until a check finds it: at most what the last two intervals between
//!    flushes unmapped. To take the reference off because an old entry named the cluster and a new
//!    one does not would be wrong: over a flush that was written in part, the disk's entry may be
//!    one that nobody has had for long, and its cluster somebody else's.
//! 7. **What the allocator hands out has refcount 0 in the adopted state.** It looks at nothing
//!    before that is complete: end of the file, metadata, free clusters, what is virgin. A cluster
//!    that was handed out has a record, or its refcount is on the disk, even if the flush that wrote
//!    it never ended; one that was freed and has a record is nobody's, on the disk too.
//! 8. **There is room.** Who changes something looks, under the lock, whether the largest step still
//!    fits, and otherwise waits for a flush without the lock. A flush has a reserve for the
//!    references that it takes off, and leaves some for the next one when that is used up: it never
//!    waits for itself.
//! 9. **Adopting changes nothing.** It writes neither image nor journal, until the next flush: a kill
//!    during it, or after it, finds what it found. New records go behind the old ones.
//! 10. **The journal belongs to the bytes under it.** The header names it by a nonce that is new
//!     each time an image is opened; other programs that write it clear the autoclear bit. A flush
//!     that moves the head has written that position to the header (with its refcounts, so that it
//!     costs no barrier): an older copy of the image, put back in its place, has a position before
//!     the head. A copy in another file has another inode or birth. What is not told apart is a copy
//!     that was made since the last flush of the dead process and written over the same file; such a
//!     one is mostly too short for what the journal maps.
//! 11. **What the journal maps is there.** A write that completed outlives the process in the storage
//!     of the image, data file included ([`outlives_process`](crate::storage::Storage::outlives_process)):
//!     in a file it does. An image in the disk of another one has no journal: the next process would
//!     put what was lost below over what was flushed.
//!
//! Lost memory (the file was cut short) stops changes of the mapping; they fail. Reads, writes in
//! place and flushes go on, and a flush makes stable what there is.

mod adopt;
pub mod file;
mod ids;
mod log;
mod mark;
pub mod record;
mod verdict;

pub(super) use adopt::Adoption;
pub use file::{Folder, seed_of};
pub use log::Recorded;
pub(super) use log::{Admission, Log};
pub use mark::{AUTOCLEAR, EXTENSION, Mark};
pub use record::{Record, encode};
pub use verdict::{forget, require_none};
