//! A machine's disks: files in memory whose operations stay pending until the test lets one
//! finish, in any order, and which log when each was issued and when it was done. One log for
//! all files, so that a cut is one instant for all of them. Operations fail on demand.
//!
//! The disks are files of a page cache, unless [`Traits`] say something else.
//!
//! An operation takes effect when it is done. A barrier covers what was done before the barrier
//! was issued, as `fdatasync` does. When one fails, a machine with a page cache throws away what it
//! covered, as Linux does: reads still find it there, no later barrier makes it stable.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;
use stratablk::format::qcow2::journal::Folder;
use stratablk::reactor::{Reactor, Token};
use stratablk::shared_memory::Gate;
use stratablk::storage::fault::Uneven;
use stratablk::storage::{Answer, IoBufs, Limits, Op, Storage, Submission, Syncs, at_once};

use crate::journals::{Journals, Left, Store};
use crate::states::State as Ended;

/// What kind of storage the files of a machine are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Bytes of a block: whole ones are read and written.
    pub block: u64,
    /// The first file is a device of so many bytes. It has no holes, and what was on it before.
    pub device: Option<u64>,
    /// Transfers are short and operations interrupted, by this seed.
    pub uneven: Option<u64>,
}

impl Traits {
    pub const FILE: Self = Self {
        block: 1,
        device: None,
        uneven: None,
    };
}

/// What an operation does to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Makes the file longer, as a write does.
    Zero {
        offset: u64,
        len: u64,
    },
    /// Zeros within the file.
    Punch {
        offset: u64,
        len: u64,
    },
    /// The length is at least this.
    Grow(u64),
    SetLen(u64),
    Sync,
    Read,
}

/// A line of the log.
#[derive(Clone, Debug)]
pub enum Event {
    Issued {
        id: usize,
        file: usize,
        effect: Effect,
    },
    Done {
        id: usize,
    },
    /// It failed, and did no more than this.
    Failed {
        id: usize,
        effect: Effect,
    },
    /// The process has changed a journal.
    Stored(Store),
}

/// What counts for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    Reads,
    /// All but reads.
    Changes,
    /// Those of the changes that make others stable.
    Barriers,
}

impl Counted {
    fn has(self, effect: &Effect) -> bool {
        match self {
            Self::Reads => *effect == Effect::Read,
            Self::Changes => *effect != Effect::Read,
            Self::Barriers => *effect == Effect::Sync,
        }
    }
}

/// Which operations fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Operations on this file count, if they are among `of`.
    pub file: usize,
    pub of: Counted,
    /// The first one that fails, by its number among those that count.
    pub from: usize,
    /// The first one that does not fail any more.
    pub until: usize,
    pub errno: i32,
}

struct Pending {
    id: usize,
    file: usize,
    token: Token,
    effect: Effect,
    /// Where a read goes.
    target: Vec<libc::iovec>,
    offset: u64,
    fault: Option<i32>,
    /// It is interrupted, and nothing is done.
    interrupted: Option<i32>,
    /// Operations that were done when it was issued.
    done: usize,
}

// SAFETY: the vectors name the submitter's memory, which stays valid until the completion; the
// test completes operations on the submitter's thread.
unsafe impl Send for Pending {}

struct State {
    files: Vec<Vec<u8>>,
    log: Vec<Event>,
    pending: Vec<Pending>,
    next: usize,
    held: bool,
    /// Space behind the end can be reserved.
    reserves: bool,
    fault: Option<Fault>,
    counted: usize,
    failed: usize,
    traits: Traits,
    uneven: Option<Uneven>,
    cache: Option<Cache>,
    journals: Option<Journals>,
    /// Nothing comes into the log.
    quiet: bool,
}

/// What a page cache holds, and the disks under it.
#[derive(Default)]
struct Cache {
    stable: Vec<Vec<u8>>,
    /// Operations that were done.
    done: usize,
    /// Those that are not stable: number, file, effect.
    dirty: Vec<(usize, usize, Effect)>,
}

impl Cache {
    fn add(&mut self, file: usize, effect: &Effect) {
        self.dirty.push((self.done, file, effect.clone()));
        self.done += 1;
    }

    /// What the first `covered` operations left dirty in a file is stable, or lost.
    fn clean(&mut self, file: usize, covered: usize, stable: bool) {
        let stable = stable.then(|| &mut self.stable[file]);
        let covers = |entry: &(usize, usize, Effect)| entry.1 == file && entry.0 < covered;
        if let Some(bytes) = stable {
            for (_, _, effect) in self.dirty.iter().filter(|entry| covers(entry)) {
                apply(bytes, effect);
            }
        }
        self.dirty.retain(|entry| !covers(entry));
    }
}

/// The disks of one machine. Clones name the same machine.
#[derive(Clone)]
pub struct Machine {
    state: Arc<Mutex<State>>,
    syncs: Vec<Arc<Syncs>>,
}

/// One file of a machine.
#[derive(Clone)]
pub struct File {
    machine: Machine,
    index: usize,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "file {}", self.index)
    }
}

impl Machine {
    /// A machine whose files are written directly: a barrier that fails takes nothing away, and
    /// the next one covers it.
    pub fn new(files: &[Vec<u8>]) -> Self {
        let state = State {
            files: files.to_vec(),
            log: Vec::new(),
            pending: Vec::new(),
            next: 0,
            held: false,
            reserves: false,
            fault: None,
            counted: 0,
            failed: 0,
            traits: Traits::FILE,
            uneven: None,
            cache: None,
            journals: None,
            quiet: false,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            syncs: files.iter().map(|_| Syncs::new(false)).collect(),
        }
    }

    /// A machine whose files are written through a page cache.
    pub fn cached(files: &[Vec<u8>]) -> Self {
        let machine = Self::new(files);
        machine.state.lock().cache = Some(Cache {
            stable: files.to_vec(),
            ..Cache::default()
        });
        Self {
            syncs: files.iter().map(|_| Syncs::new(true)).collect(),
            ..machine
        }
    }

    /// The machine after a kill, for the next process: with what is left, and the log so far.
    pub fn after_kill(state: &Ended, log: &[Event]) -> Self {
        let machine = Self::new(&state.files);
        {
            let mut inner = machine.state.lock();
            inner.log = log[..state.cut].to_vec();
            inner.log.extend_from_slice(&state.landings);
            let ids = inner.log.iter().map(|event| match event {
                Event::Issued { id, .. } => id + 1,
                _ => 0,
            });
            inner.next = ids.max().unwrap_or(0);
        }
        if let Some(left) = &state.journals {
            machine.keep_journals(left);
        }
        machine
    }

    /// Has a folder for journals, with these in it.
    pub fn keep_journals(&self, left: &Left) {
        self.state.lock().journals = Some(Journals::new(left));
    }

    /// From now on nothing comes into the log; or again everything.
    pub fn be_quiet(&self, quiet: bool) {
        let mut state = self.state.lock();
        if let Some(journals) = state.journals.as_mut().filter(|_| !quiet) {
            journals.look();
        }
        state.quiet = quiet;
    }

    /// What the files and the journals hold.
    pub fn left(&self) -> (Vec<Vec<u8>>, Option<Left>) {
        let state = self.state.lock();
        let journals = state.journals.as_ref().map(Journals::left);
        (state.files.clone(), journals)
    }

    /// The folder for journals, if there is one. What the process stores there comes into the log.
    pub fn journals(&self) -> Option<Arc<Folder>> {
        let path = self.state.lock().journals.as_ref()?.path().to_owned();
        let folder = Folder::open(&path, None).unwrap();
        folder.set_gate(Arc::new(Tap(self.clone())));
        Some(folder)
    }

    /// What a file holds when a machine with a page cache stops.
    pub fn stable(&self, file: usize) -> Vec<u8> {
        let state = self.state.lock();
        state.cache.as_ref().unwrap().stable[file].clone()
    }

    /// Barriers of a file are tried again after one has failed.
    pub fn clear_sync_error(&self, file: usize) -> bool {
        self.syncs[file].clear().is_some()
    }

    pub fn file(&self, index: usize) -> Arc<File> {
        Arc::new(File {
            machine: self.clone(),
            index,
        })
    }

    /// From now on operations stay pending; or no longer.
    pub fn hold(&self, held: bool) {
        self.state.lock().held = held;
    }

    /// From now on space can be reserved behind the end of the files.
    pub fn allow_reserving(&self) {
        self.state.lock().reserves = true;
    }

    /// Makes the files another kind of storage.
    pub fn behave(&self, traits: Traits) {
        let mut state = self.state.lock();
        state.traits = traits;
        state.uneven = traits.uneven.map(Uneven::new);
    }

    /// Makes the device longer.
    pub fn lengthen(&self, len: u64) {
        let mut state = self.state.lock();
        state.traits.device = Some(len);
        state.files[0].resize(len as usize, 0xd5);
    }

    /// Events so far: the time.
    pub fn now(&self) -> usize {
        let mut state = self.state.lock();
        state.note_stores();
        state.log.len()
    }

    pub fn log(&self) -> Vec<Event> {
        let mut state = self.state.lock();
        state.note_stores();
        state.log.clone()
    }

    pub fn bytes(&self, file: usize) -> Vec<u8> {
        self.state.lock().files[file].clone()
    }

    /// Sets or ends a fault; counting begins anew.
    pub fn fail(&self, fault: Option<Fault>) {
        let mut state = self.state.lock();
        state.fault = fault;
        state.counted = 0;
        state.failed = 0;
    }

    /// Operations that counted for the fault, and those of them that failed.
    pub fn counted(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.counted, state.failed)
    }

    /// Lets a random pending operation finish. False: there is none.
    ///
    /// Those that fail do so together, when nothing else is pending: who waits for several and
    /// gives up at the first error has to wait for the others, which only this function ends.
    pub fn finish_one(&self, reactor: &Reactor, rng: &mut StdRng) -> bool {
        let ended: Vec<_> = {
            let mut state = self.state.lock();
            let pending = &state.pending;
            let sound: Vec<usize> = (0..pending.len())
                .filter(|&index| pending[index].fault.is_none())
                .collect();
            let chosen = match sound.len() {
                0 => std::mem::take(&mut state.pending),
                count => vec![state.pending.swap_remove(sound[rng.random_range(0..count)])],
            };
            let perform = |pending: Pending| (pending.token, state.perform(pending));
            chosen.into_iter().map(perform).collect()
        };
        let any = !ended.is_empty();
        for (token, result) in ended {
            reactor.complete(token, result);
        }
        any
    }

    /// How many of the pending operations are such.
    pub fn pending(&self, such: impl Fn(&Effect) -> bool) -> usize {
        let state = self.state.lock();
        state.pending.iter().filter(|one| such(&one.effect)).count()
    }

    /// Lets the oldest pending operation finish that is not `kept`. False: there is none.
    pub fn finish_others(&self, reactor: &Reactor, kept: impl Fn(&Effect) -> bool) -> bool {
        let (token, result) = {
            let mut state = self.state.lock();
            let other = state.pending.iter().position(|one| !kept(&one.effect));
            let Some(index) = other else { return false };
            let pending = state.pending.remove(index);
            (pending.token, state.perform(pending))
        };
        reactor.complete(token, result);
        true
    }

    /// Lets the pending operation finish that was issued first, or last. False: there is none.
    pub fn finish_in_order(&self, reactor: &Reactor, last: bool) -> bool {
        let ended = {
            let mut state = self.state.lock();
            let pending = state.pending.iter().enumerate();
            let chosen = pending.max_by_key(|(_, p)| if last { p.id } else { usize::MAX - p.id });
            let Some(index) = chosen.map(|(index, _)| index) else {
                return false;
            };
            let pending = state.pending.swap_remove(index);
            (pending.token, state.perform(pending))
        };
        reactor.complete(ended.0, ended.1);
        true
    }

    /// Runs all tasks of `reactor` to their end. Operations pile up: one is let go when no task
    /// can go on, and now and then before.
    pub fn run(&self, reactor: &Reactor, rng: &mut StdRng) {
        self.hold(true);
        while reactor.tasks() > 0 {
            if rng.random_range(0..8) == 0 {
                self.finish_one(reactor, rng);
            }
            if !reactor.turn() {
                assert!(self.finish_one(reactor, rng), "a task waits for nothing");
            }
        }
        while self.finish_one(reactor, rng) {}
        self.hold(false);
    }
}

/// Is asked before each store to a journal: what the one before has stored comes into the log.
struct Tap(Machine);

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the machine's log")
    }
}

impl Gate for Tap {
    fn is_open(&self) -> bool {
        self.0.state.lock().note_stores();
        true
    }
}

impl State {
    /// Adds what was stored since the last event to the log.
    fn note_stores(&mut self) {
        if self.quiet {
            return;
        }
        let stores = self.journals.as_mut().map(Journals::look);
        let stores = stores.into_iter().flatten();
        self.log.extend(stores.map(Event::Stored));
    }

    fn push(&mut self, event: Event) {
        self.note_stores();
        if !self.quiet {
            self.log.push(event);
        }
    }

    fn verdict(&mut self, file: usize, effect: &Effect) -> Option<i32> {
        let counts = |fault: &Fault| fault.file == file && fault.of.has(effect);
        let fault = self.fault.filter(counts)?;
        let number = self.counted;
        self.counted += 1;
        let fails = (fault.from..fault.until).contains(&number);
        self.failed += usize::from(fails);
        fails.then_some(fault.errno)
    }

    /// The length that a file has for good.
    fn capacity(&self, file: usize) -> Option<u64> {
        self.traits.device.filter(|_| file == 0)
    }

    /// What the kind of storage says to an operation, before it is begun.
    fn refusal(&self, file: usize, effect: &Effect) -> Option<i32> {
        let block = self.traits.block;
        let whole = |offset: u64, len: u64| {
            let aligned = offset.is_multiple_of(block) && len.is_multiple_of(block);
            assert!(aligned, "{len} bytes at {offset}, in blocks of {block}");
        };
        let behind = |end: u64| self.capacity(file).is_some_and(|capacity| end > capacity);
        match effect {
            Effect::Grow(_) if !self.reserves => Some(libc::EOPNOTSUPP),
            Effect::Zero { .. } | Effect::Punch { .. } | Effect::Grow(_)
                if self.capacity(file).is_some() =>
            {
                Some(libc::EOPNOTSUPP)
            }
            Effect::Write { offset, bytes } => {
                whole(*offset, bytes.len() as u64);
                behind(offset + bytes.len() as u64).then_some(libc::ENOSPC)
            }
            _ => None,
        }
    }

    /// Makes a transfer short; the error of one that is interrupted.
    fn disturb(&mut self, effect: &mut Effect, target: &mut Vec<libc::iovec>) -> Option<i32> {
        // By sectors: a cut tears none.
        let block = self.traits.block.max(512);
        let uneven = self.uneven.as_mut()?;
        let admitted = match effect {
            Effect::Write { bytes, .. } => {
                let count = uneven.transfer(bytes.len(), block);
                count.map(|count| bytes.truncate(count))
            }
            Effect::Read => {
                // SAFETY: the vectors are the submitter's; no memory is touched.
                let bufs = unsafe { IoBufs::new(target) };
                let count = uneven.transfer(bufs.len(), block);
                count.map(|count| *target = bufs.slice(0, count).iovecs().to_vec())
            }
            _ => uneven.admit(),
        };
        admitted.err()?.raw_os_error()
    }

    fn issue(&mut self, file: usize, effect: &Effect) -> usize {
        let id = self.next;
        self.next += 1;
        if *effect != Effect::Read {
            self.push(Event::Issued {
                id,
                file,
                effect: effect.clone(),
            });
        }
        id
    }

    fn perform(&mut self, pending: Pending) -> io::Result<u32> {
        if let Some(errno) = pending.interrupted {
            let (id, effect) = (pending.id, Effect::Read);
            self.push(Event::Failed { id, effect });
            return Err(io::Error::from_raw_os_error(errno));
        }
        if let Some(errno) = pending.fault {
            let effect = match &pending.effect {
                // Some of it reached the disk.
                Effect::Write { offset, bytes } => Effect::Write {
                    offset: *offset,
                    bytes: bytes[..bytes.len() / 1024 * 512].to_vec(),
                },
                _ => Effect::Read,
            };
            apply(&mut self.files[pending.file], &effect);
            if let Some(cache) = &mut self.cache {
                match pending.effect {
                    Effect::Sync => cache.clean(pending.file, pending.done, false),
                    _ => cache.add(pending.file, &effect),
                }
            }
            let id = pending.id;
            self.push(Event::Failed { id, effect });
            return Err(io::Error::from_raw_os_error(errno));
        }
        let result = match &pending.effect {
            Effect::Read => {
                let file = &self.files[pending.file];
                // SAFETY: valid until the completion, which follows.
                let bufs = unsafe { IoBufs::new(&pending.target) };
                let rest = file.get(pending.offset as usize..).unwrap_or(&[]);
                let count = rest.len().min(bufs.len());
                bufs.copy_from(&rest[..count]);
                return Ok(count as u32);
            }
            Effect::Write { bytes, .. } => bytes.len() as u32,
            _ => 0,
        };
        apply(&mut self.files[pending.file], &pending.effect);
        if let Some(cache) = &mut self.cache {
            match &pending.effect {
                Effect::Sync => cache.clean(pending.file, pending.done, true),
                effect => cache.add(pending.file, effect),
            }
        }
        self.push(Event::Done { id: pending.id });
        Ok(result)
    }
}

fn write(file: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset as usize..end].copy_from_slice(bytes);
}

/// Does to `file` what an operation does.
pub fn apply(file: &mut Vec<u8>, effect: &Effect) {
    match effect {
        Effect::Write { offset, bytes } => write(file, *offset, bytes),
        Effect::Zero { offset, len } => write(file, *offset, &vec![0; *len as usize]),
        Effect::Punch { offset, len } => {
            let end = ((offset + len) as usize).min(file.len());
            if let Some(range) = file.get_mut(*offset as usize..end) {
                range.fill(0);
            }
        }
        Effect::Grow(len) => file.resize(file.len().max(*len as usize), 0),
        Effect::SetLen(len) => file.resize(*len as usize, 0),
        Effect::Sync | Effect::Read => {}
    }
}

impl File {
    fn resize(&self, len: u64) -> io::Result<()> {
        let mut state = self.machine.state.lock();
        if let Some(capacity) = state.capacity(self.index) {
            let fits = len <= capacity;
            let full = io::Error::from_raw_os_error(libc::ENOSPC);
            return fits.then_some(()).ok_or(full);
        }
        let effect = Effect::SetLen(len);
        if let Some(errno) = state.verdict(self.index, &effect) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let id = state.issue(self.index, &effect);
        apply(&mut state.files[self.index], &effect);
        if let Some(cache) = &mut state.cache {
            cache.add(self.index, &effect);
        }
        state.push(Event::Done { id });
        Ok(())
    }
}

impl Storage for File {
    unsafe fn submit(&self, _reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        let mut target = Vec::new();
        let mut at = 0;
        let mut effect = match op {
            Op::Read { iovecs, offset } => {
                target = iovecs.to_vec();
                at = offset;
                Effect::Read
            }
            Op::Write { iovecs, offset } => {
                // SAFETY: valid by contract.
                let bufs = unsafe { IoBufs::new(iovecs) };
                let mut bytes = vec![0; bufs.len()];
                bufs.copy_to(&mut bytes);
                Effect::Write { offset, bytes }
            }
            Op::Sync => Effect::Sync,
            Op::Reserve { offset, len } => Effect::Grow(offset + len),
            Op::Zero { offset, len, unmap } if unmap => Effect::Punch { offset, len },
            Op::Zero { offset, len, .. } => Effect::Zero { offset, len },
        };
        let mut state = self.machine.state.lock();
        if let Some(errno) = state.refusal(self.index, &effect) {
            return Submission::Ready(Err(io::Error::from_raw_os_error(errno)));
        }
        let interrupted = state.disturb(&mut effect, &mut target);
        let fault = state.verdict(self.index, &effect);
        let pending = Pending {
            id: state.issue(self.index, &effect),
            file: self.index,
            token,
            effect,
            target,
            offset: at,
            interrupted: interrupted.filter(|_| fault.is_none()),
            fault,
            done: state.cache.as_ref().map_or(0, |cache| cache.done),
        };
        if state.held {
            state.pending.push(pending);
            return Submission::Pending;
        }
        Submission::Ready(state.perform(pending))
    }

    fn len(&self) -> Answer<'_, io::Result<u64>> {
        at_once(Ok(self.machine.state.lock().files[self.index].len() as u64))
    }

    fn set_len(&self, len: u64) -> Answer<'_, io::Result<()>> {
        at_once(self.resize(len))
    }

    fn capacity(&self) -> Answer<'_, io::Result<Option<u64>>> {
        at_once(Ok(self.machine.state.lock().capacity(self.index)))
    }

    fn outlives_process(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        let state = self.machine.state.lock();
        Limits {
            memory_align: 1,
            offset_align: state.traits.block,
            zero_past_end: state.capacity(self.index).is_none(),
        }
    }

    fn name(&self) -> &'static str {
        "machine"
    }

    fn writable(&self) -> bool {
        true
    }

    fn syncs(&self) -> Option<&Arc<Syncs>> {
        self.machine.syncs.get(self.index)
    }
}
