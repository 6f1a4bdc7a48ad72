//! A file system in user space on a [`Machine`], so that a real daemon meets power cuts.
//!
//! The kernel passes on all that is written at once, and keeps a copy to read from, by the number of a
//! file: after a power cut all files have other numbers. Locks are the kernel's.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::common::rng::Rng;
use crate::machine::{Inode, Machine, Trap};

const NOW: Duration = Duration::ZERO;

/// An operation that is to fail with EIO.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<FaultsState>,
}

#[derive(Debug, Default)]
struct FaultsState {
    /// How many are to succeed before, if one is to fail at all.
    left: Option<u64>,
    /// The one that has failed.
    failed: Option<String>,
}

impl Faults {
    /// From now on the `nth` operation fails, the first being number 1, and no other.
    pub fn arm(&self, nth: u64) {
        *self.lock() = FaultsState {
            left: Some(nth.saturating_sub(1)),
            failed: None,
        };
    }

    /// None fails any longer. The one that has failed, if there was one.
    pub fn disarm(&self) -> Option<String> {
        std::mem::take(&mut *self.lock()).failed
    }

    /// Whether this operation fails.
    fn meets(&self, what: &str) -> bool {
        let mut state = self.lock();
        match state.left {
            None => false,
            Some(0) => {
                state.left = None;
                state.failed = Some(what.to_owned());
                true
            }
            Some(left) => {
                state.left = Some(left - 1);
                false
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, FaultsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A folder whose files are on a machine of their own.
pub struct CutFs {
    machine: Arc<Mutex<Machine>>,
    faults: Arc<Faults>,
    /// Microseconds that each write takes besides.
    delay: Arc<AtomicU64>,
    _session: BackgroundSession,
}

impl CutFs {
    /// In the place of the folder `path`. `None`: there are no file systems in user space here.
    pub fn mount(path: &Path) -> Option<Self> {
        let machine = Arc::new(Mutex::new(Machine::new()));
        let delay = Arc::new(AtomicU64::new(0));
        let faults = Arc::new(Faults::default());
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("cut".into())];
        let fs = Fs {
            machine: machine.clone(),
            faults: faults.clone(),
            delay: delay.clone(),
        };
        match fuser::spawn_mount(fs, path, &config) {
            Ok(session) => Some(CutFs {
                machine,
                faults,
                delay,
                _session: session,
            }),
            Err(error) => {
                println!("no file systems in user space: {error}");
                None
            }
        }
    }

    /// What of its operations fails.
    pub fn faults(&self) -> Arc<Faults> {
        self.faults.clone()
    }

    /// As [`Machine::set`].
    pub fn set(&self, trap: Option<Trap>) -> bool {
        lock(&self.machine).set(trap)
    }

    /// As [`Machine::is_lost`].
    pub fn is_lost(&self) -> bool {
        lock(&self.machine).is_lost()
    }

    /// Each write takes so much longer from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.delay
            .store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// The power fails. Nobody may be using the files.
    pub fn cut(&self, rng: &mut Rng) {
        lock(&self.machine).cut(rng);
    }
}

struct Fs {
    machine: Arc<Mutex<Machine>>,
    faults: Arc<Faults>,
    delay: Arc<AtomicU64>,
}

fn lock(machine: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attr(number: u64, inode: &Inode) -> FileAttr {
    let size = inode.bytes.len() as u64;
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(512),
        atime: inode.changed,
        mtime: inode.changed,
        ctime: inode.changed,
        crtime: inode.changed,
        kind: kind(inode),
        perm: inode.mode,
        nlink: 1,
        // SAFETY: these have no arguments and cannot fail.
        uid: unsafe { libc::geteuid() },
        // SAFETY: as above.
        gid: unsafe { libc::getegid() },
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn kind(inode: &Inode) -> FileType {
    match inode.folder {
        true => FileType::Directory,
        false => FileType::RegularFile,
    }
}

impl Fs {
    fn named(&self, folder: INodeNo, name: &OsStr) -> Option<FileAttr> {
        let mut machine = lock(&self.machine);
        let number = machine.find(folder.0, name.to_str()?)?;
        Some(attr(number, machine.inode(number)?))
    }

    fn make(&self, folder: INodeNo, name: &OsStr, is_folder: bool, mode: u32) -> Option<FileAttr> {
        let mut machine = lock(&self.machine);
        let mode = (mode & 0o7777) as u16;
        let number = machine.make(folder.0, name.to_str()?, is_folder, mode);
        Some(attr(number, machine.inode(number)?))
    }

    fn with<R>(&self, number: INodeNo, what: impl FnOnce(&mut Inode) -> R) -> Option<R> {
        lock(&self.machine).inode(number.0).map(what)
    }
}

fn done(reply: ReplyEmpty, outcome: Option<()>) {
    match outcome {
        Some(()) => reply.ok(),
        None => reply.error(Errno::ENOENT),
    }
}

fn answer_barrier(reply: ReplyEmpty, stable: bool) {
    match stable {
        true => reply.ok(),
        // Not to be told as stable by a process that is about to end.
        false => reply.error(Errno::EIO),
    }
}

#[allow(clippy::too_many_arguments)]
impl Filesystem for Fs {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.named(parent, name) {
            Some(attr) => reply.entry(&NOW, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(ino, |inode| attr(ino.0, inode)) {
            Some(attr) => reply.attr(&NOW, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if self.faults.meets("setattr") {
            return reply.error(Errno::EIO);
        }
        let changed = self.with(ino, |inode| {
            if let Some(mode) = mode {
                inode.mode = (mode & 0o7777) as u16;
            }
            if let Some(size) = size {
                inode.set_len(size);
            }
            attr(ino.0, inode)
        });
        match changed {
            Some(attr) => reply.attr(&NOW, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        if self.faults.meets("mkdir") {
            return reply.error(Errno::EIO);
        }
        match self.make(parent, name, true, mode) {
            Some(attr) => reply.entry(&NOW, &attr, Generation(0)),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        if self.faults.meets("create") {
            return reply.error(Errno::EIO);
        }
        match self.make(parent, name, false, mode) {
            Some(attr) => reply.created(
                &NOW,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::empty(),
            ),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if self.faults.meets("unlink") {
            return reply.error(Errno::EIO);
        }
        let removed = lock(&self.machine).remove(parent.0, name.to_str().unwrap_or_default());
        done(reply, removed.then_some(()));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(request, parent, name, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let [from, to] = [name, newname].map(|name| name.to_str().unwrap_or_default());
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        if self.faults.meets("rename") {
            return reply.error(Errno::EIO);
        }
        let renamed = lock(&self.machine).rename((parent.0, from), (newparent.0, to));
        done(reply, renamed.then_some(()));
    }

    fn open(&self, _: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.faults.meets("open") {
            return reply.error(Errno::EIO);
        }
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if self.faults.meets("read") {
            return reply.error(Errno::EIO);
        }
        let mut machine = lock(&self.machine);
        let Some(inode) = machine.inode(ino.0) else {
            return reply.error(Errno::ENOENT);
        };
        let begin = inode.bytes.len().min(offset as usize);
        let end = inode.bytes.len().min(offset as usize + size as usize);
        reply.data(inode.bytes.get(begin..end).unwrap_or_default());
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let delay = Duration::from_micros(self.delay.load(Ordering::Relaxed));
        if !delay.is_zero() {
            // What is slow here is what is tested.
            std::thread::sleep(delay);
        }
        if self.faults.meets("write") {
            return reply.error(Errno::EIO);
        }
        match self.with(ino, |inode| inode.write(offset, data)) {
            Some(()) => reply.written(data.len() as u32),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        if self.faults.meets("fsync") {
            return reply.error(Errno::EIO);
        }
        let stable = lock(&self.machine).sync(ino.0);
        answer_barrier(reply, stable);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        if self.faults.meets("fsync of a folder") {
            return reply.error(Errno::EIO);
        }
        let stable = lock(&self.machine).sync_names();
        answer_barrier(reply, stable);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut machine = lock(&self.machine);
        for (at, (name, number)) in machine.list(ino.0).into_iter().enumerate() {
            let kind = machine.inode(number).map(|inode| kind(inode));
            let kind = kind.unwrap_or(FileType::RegularFile);
            let place = at as u64 + 1;
            if place > offset && reply.add(INodeNo(number), place, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 24, 1 << 24, 1 << 24, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if self.faults.meets("fallocate") {
            return reply.error(Errno::EIO);
        }
        let changed = self.with(ino, |inode| {
            if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
                inode.set_len((inode.bytes.len() as u64).max(offset + length));
            }
            if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
                inode.zero(offset, length);
            }
        });
        done(reply, changed);
    }
}
