//! The disk of a machine whose power can fail: files of which some bytes are stable and some not.
//!
//! What a barrier on a file has covered stays. Of everything else that was written to it any part
//! may be there after the power has failed: nothing, all, a beginning, or some writes and not others,
//! and of a write some sectors. What has happened to names is there up to some instant not before the
//! last barrier on a folder.
//!
//! The power fails when a test says so, or right behind a barrier that a [`Trap`] waits for: what counts
//! is often done by the next one.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::common::rng::Rng;
use crate::common::stamp::SECTOR;

/// The number of the top folder.
pub const ROOT: u64 = 1;

/// Where an image says what it is, and what lies under it.
const HEADER: u64 = 4096;

/// Which barriers a trap counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barriers {
    /// All.
    All,
    /// Those that cover the beginning of a file, or names: headers and records.
    OfHeaders,
    /// Those by which an image comes to name another one that it is over.
    OfLinks,
}

/// What a barrier has covered.
#[derive(Clone, Copy, Debug, Default)]
struct Covered {
    header: bool,
    link: bool,
}

/// The power fails right behind a barrier, for a process and its files.
#[derive(Clone, Copy, Debug)]
pub struct Trap {
    /// Which barriers count.
    pub of: Barriers,
    /// The one that it is, from 1.
    pub number: u64,
    /// The process that ends then.
    pub pid: u32,
}

/// Something that was done to a file's bytes.
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Length(u64),
}

/// A file or a folder.
pub struct Inode {
    /// It is a folder.
    pub folder: bool,
    /// Permissions.
    pub mode: u16,
    /// What it holds.
    pub bytes: Vec<u8>,
    /// When that changed last.
    pub changed: SystemTime,
    stable: Vec<u8>,
    stable_changed: SystemTime,
    log: Vec<Change>,
    /// The power has failed: nothing is kept of what still happens.
    lost: bool,
}

type Names = BTreeMap<(u64, String), u64>;
/// A name, and what it names from then on.
type Move = ((u64, String), Option<u64>);

/// All files.
pub struct Machine {
    inodes: BTreeMap<u64, Inode>,
    names: Names,
    stable_names: Names,
    /// Changes of names that are not stable, each of which is there in whole or not at all.
    moves: Vec<Vec<Move>>,
    next: u64,
    trap: Option<Trap>,
    /// The power has failed.
    lost: bool,
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            if let Some(place) = bytes.get_mut(*at as usize..end) {
                place.copy_from_slice(data);
            }
        }
        Change::Zero(at, len) => {
            let end = bytes.len().min((at + len) as usize);
            if let Some(place) = bytes.get_mut(*at as usize..end) {
                place.fill(0);
            }
        }
        Change::Length(len) => bytes.resize(*len as usize, 0),
    }
}

fn put(names: &mut Names, (name, inode): ((u64, String), Option<u64>)) {
    match inode {
        Some(inode) => names.insert(name, inode),
        None => names.remove(&name),
    };
}

/// The name of what an image is over, empty if that is nothing. `None`: it is no image.
fn link(bytes: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize, len: usize| {
        let bytes = bytes.get(at..at + len)?.iter();
        Some(bytes.fold(0, |word, &byte| word << 8 | usize::from(byte)))
    };
    if bytes.get(..4)? != b"QFI\xfb" {
        return None;
    }
    let (at, len) = (word(8, 8)?, word(16, 4)?);
    Some(bytes.get(at..at + len)?.to_vec())
}

impl Inode {
    fn new(folder: bool, mode: u16) -> Self {
        let now = SystemTime::now();
        Inode {
            folder,
            mode,
            bytes: Vec::new(),
            changed: now,
            stable: Vec::new(),
            stable_changed: now,
            log: Vec::new(),
            lost: false,
        }
    }

    fn change(&mut self, change: Change) {
        apply(&mut self.bytes, &change);
        self.changed = SystemTime::now();
        if !self.lost {
            self.log.push(change);
        }
    }

    /// Writes.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        self.change(Change::Write(at, data.to_vec()));
    }

    /// Puts zeros where there are bytes.
    pub fn zero(&mut self, at: u64, len: u64) {
        self.change(Change::Zero(at, len));
    }

    /// Sets its length.
    pub fn set_len(&mut self, len: u64) {
        if len != self.bytes.len() as u64 {
            self.change(Change::Length(len));
        }
    }

    /// A barrier.
    fn sync(&mut self) -> Covered {
        let before = link(&self.stable);
        let mut header = false;
        for change in self.log.drain(..) {
            header |= matches!(change, Change::Write(at, _) if at < HEADER);
            apply(&mut self.stable, &change);
        }
        self.stable_changed = self.changed;
        let link = header && before.is_some() && before != link(&self.stable);
        Covered { header, link }
    }

    fn cut(&mut self, rng: &mut Rng) {
        let choice = rng.below(5);
        let count = self.log.len() as u64;
        let beginning = rng.below(count + 1);
        let mut lost = false;
        for (at, mut change) in std::mem::take(&mut self.log).into_iter().enumerate() {
            let stays = match choice {
                0 | 1 => false,
                2 => true,
                3 => (at as u64) < beginning,
                _ => rng.one_in(2),
            };
            if let Change::Write(at, data) = &mut change
                && stays
                && choice == 4
                && rng.one_in(8)
            {
                let sectors = data.len() / SECTOR;
                let first = rng.below(sectors as u64 + 1) as usize * SECTOR;
                data.drain(..first);
                *at += first as u64;
            }
            match stays {
                true => apply(&mut self.stable, &change),
                false => lost = true,
            }
        }
        if lost {
            self.changed = self.stable_changed;
        }
        self.bytes.clone_from(&self.stable);
        self.stable_changed = self.changed;
        self.lost = false;
    }
}

impl Machine {
    /// An empty disk.
    pub fn new() -> Self {
        Machine {
            inodes: BTreeMap::from([(ROOT, Inode::new(true, 0o755))]),
            names: BTreeMap::new(),
            stable_names: BTreeMap::new(),
            moves: Vec::new(),
            next: ROOT,
            trap: None,
            lost: false,
        }
    }

    /// Sets a trap in the place of the one before, or none. Whether that one has gone off: the power has
    /// failed, then, and its process has been killed.
    pub fn set(&mut self, trap: Option<Trap>) -> bool {
        self.trap = trap;
        self.lost
    }

    /// The power has failed.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Something has become stable.
    fn barrier(&mut self, covered: Covered) {
        let Some(trap) = &mut self.trap else { return };
        let counts = match trap.of {
            Barriers::All => true,
            Barriers::OfHeaders => covered.header,
            Barriers::OfLinks => covered.link,
        };
        if !counts {
            return;
        }
        trap.number = trap.number.saturating_sub(1);
        if trap.number == 0 {
            let pid = trap.pid;
            self.trap = None;
            self.lost = true;
            self.inodes.values_mut().for_each(|inode| inode.lost = true);
            // SAFETY: a system call without memory; nobody waits for the child before the trap is gone.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
    }

    /// A barrier on a file. False: there is none, or no power.
    pub fn sync(&mut self, inode: u64) -> bool {
        if self.lost {
            return false;
        }
        let Some(covered) = self.inode(inode).map(Inode::sync) else {
            return false;
        };
        self.barrier(covered);
        !self.lost
    }

    /// A file or folder by number.
    pub fn inode(&mut self, inode: u64) -> Option<&mut Inode> {
        self.inodes.get_mut(&inode)
    }

    /// The number of what is called so in a folder.
    pub fn find(&self, folder: u64, name: &str) -> Option<u64> {
        self.names.get(&(folder, name.to_owned())).copied()
    }

    /// What is in a folder.
    pub fn list(&self, folder: u64) -> Vec<(String, u64)> {
        let names = self.names.iter().filter(|((of, _), _)| *of == folder);
        names
            .map(|((_, name), inode)| (name.clone(), *inode))
            .collect()
    }

    fn happen(&mut self, moves: Vec<((u64, String), Option<u64>)>) {
        for one in &moves {
            put(&mut self.names, one.clone());
        }
        if !self.lost {
            self.moves.push(moves);
        }
    }

    /// Makes a file or folder.
    pub fn make(&mut self, folder: u64, name: &str, is_folder: bool, mode: u16) -> u64 {
        self.next += 1;
        self.inodes.insert(self.next, Inode::new(is_folder, mode));
        self.happen(vec![((folder, name.to_owned()), Some(self.next))]);
        self.next
    }

    /// Takes a name away. What is open stays.
    pub fn remove(&mut self, folder: u64, name: &str) -> bool {
        let found = self.find(folder, name).is_some();
        if found {
            self.happen(vec![((folder, name.to_owned()), None)]);
        }
        found
    }

    /// Gives another name, or takes that one's place.
    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> bool {
        let Some(inode) = self.find(from.0, from.1) else {
            return false;
        };
        self.happen(vec![
            ((from.0, from.1.to_owned()), None),
            ((to.0, to.1.to_owned()), Some(inode)),
        ]);
        true
    }

    /// A barrier on a folder. False: there is no power.
    pub fn sync_names(&mut self) -> bool {
        if self.lost {
            return false;
        }
        let covered = Covered {
            header: !self.moves.is_empty(),
            link: false,
        };
        self.keep_names();
        self.barrier(covered);
        !self.lost
    }

    fn keep_names(&mut self) {
        for one in self.moves.drain(..).flatten() {
            put(&mut self.stable_names, one);
        }
    }

    /// The power fails, and comes back.
    pub fn cut(&mut self, rng: &mut Rng) {
        let count = rng.below(self.moves.len() as u64 + 1) as usize;
        self.moves.truncate(count);
        self.keep_names();
        self.names.clone_from(&self.stable_names);
        let names = &self.names;
        self.inodes
            .retain(|inode, _| *inode == ROOT || names.values().any(|named| named == inode));
        for inode in self.inodes.values_mut() {
            inode.cut(rng);
        }
        (self.trap, self.lost) = (None, false);
        self.number_anew();
    }

    /// Gives everything a number that it has not had: the kernel knows bytes by number.
    fn number_anew(&mut self) {
        let first = self.next + 1;
        let number = |old: u64| match old {
            ROOT => ROOT,
            old => old + first,
        };
        self.next = number(self.next);
        let inodes = std::mem::take(&mut self.inodes).into_iter();
        self.inodes = inodes.map(|(old, inode)| (number(old), inode)).collect();
        let names = std::mem::take(&mut self.names).into_iter();
        let names = names.map(|((folder, name), old)| ((number(folder), name), number(old)));
        self.names = names.collect();
        self.stable_names.clone_from(&self.names);
    }
}
