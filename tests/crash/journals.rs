//! A folder with the journals of images, on a tmpfs: like the files it outlives the process, and
//! unlike them not the machine's end.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// What is in such a folder: files by their names.
pub type Left = BTreeMap<String, Vec<u8>>;

/// What has changed in the folder.
#[derive(Clone, Debug)]
pub enum Store {
    /// These bytes of a file, which is there from now on.
    Bytes {
        name: String,
        at: usize,
        bytes: Vec<u8>,
    },
    Removed(String),
}

impl Store {
    /// Does to a folder what the process did.
    pub fn apply(&self, left: &mut Left) {
        match self {
            Self::Bytes { name, at, bytes } => {
                let file = left.entry(name.clone()).or_default();
                let end = at + bytes.len();
                file.resize(file.len().max(end), 0);
                file[*at..end].copy_from_slice(bytes);
            }
            Self::Removed(name) => {
                left.remove(name);
            }
        }
    }
}

pub struct Journals {
    dir: tempfile::TempDir,
    files: BTreeMap<String, Seen>,
}

/// A file, and what it held at the last look; nothing at first.
struct Seen {
    now: memmap2::Mmap,
    then: Vec<u8>,
}

/// Bytes that are compared at a time.
const CHUNK: usize = 4096;

impl Journals {
    pub fn new(left: &Left) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for (name, bytes) in left {
            let mut options = std::fs::OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o600);
            let file = file.open(dir.path().join(name)).unwrap();
            file.write_all_at(bytes, 0).unwrap();
        }
        let mut journals = Self {
            dir,
            files: BTreeMap::new(),
        };
        // What is there already is nothing new.
        journals.look();
        journals
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What is in it.
    pub fn left(&self) -> Left {
        let files = self.files.iter();
        files
            .map(|(name, file)| (name.clone(), file.now.to_vec()))
            .collect()
    }

    /// What has changed since the last look.
    pub fn look(&mut self) -> Vec<Store> {
        let mut stores = Vec::new();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !self.files.contains_key(&name) {
                let file = std::fs::File::open(self.dir.path().join(&name)).unwrap();
                // SAFETY: nobody cuts the file short. It is changed by this thread alone, which
                // keeps no reference to its bytes meanwhile.
                let now = unsafe { memmap2::Mmap::map(&file) }.unwrap();
                let then = Vec::new();
                self.files.insert(name.clone(), Seen { now, then });
            }
            names.push(name);
        }
        self.files.retain(|name, file| {
            if !names.contains(name) {
                stores.push(Store::Removed(name.clone()));
                return false;
            }
            if let Some((at, bytes)) = file.change() {
                let name = name.clone();
                stores.push(Store::Bytes { name, at, bytes });
            }
            true
        });
        stores
    }
}

impl Seen {
    /// What has changed since the last look: from the first to the last byte that has.
    fn change(&mut self) -> Option<(usize, Vec<u8>)> {
        let now = &self.now[..];
        if self.then.len() != now.len() {
            self.then = now.to_vec();
            return Some((0, now.to_vec()));
        }
        if self.then == now {
            return None;
        }
        let chunks = || now.chunks(CHUNK).zip(self.then.chunks(CHUNK)).enumerate();
        let changed = || chunks().filter(|(_, (now, then))| now != then);
        let (first, _) = changed().next()?;
        let (last, _) = changed().next_back()?;
        let mut range = first * CHUNK..((last + 1) * CHUNK).min(now.len());
        let same = |at: &usize| now[*at] == self.then[*at];
        range.start += range.clone().take_while(same).count();
        range.end -= range.clone().rev().take_while(same).count();
        let bytes = now[range.clone()].to_vec();
        self.then[range.clone()].copy_from_slice(&bytes);
        Some((range.start, bytes))
    }
}

/// How many words of a journal have been used, and how many it has.
pub fn usage(left: &Left) -> Option<(u64, u64)> {
    let bytes = left.values().next()?;
    let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let (head, tail) = (word(512), word(1024));
    Some((tail - head, (bytes.len() as u64 - 4096) / 8))
}

/// Where the header of an image says which journal it has, if it has one.
fn mark(image: &[u8]) -> Option<usize> {
    /// The type of the header's extension, and its length.
    const KIND: [u8; 8] = [0x53, 0x54, 0x4a, 0x4c, 0, 0, 0, 40];
    let header = &image[..512];
    let found = header.windows(KIND.len()).position(|bytes| bytes == KIND);
    found.map(|at| at + KIND.len())
}

/// Whether an image's header names a journal.
pub fn is_named(image: &[u8]) -> bool {
    mark(image).is_some()
}

/// Lets an image's header name a journal of another start of the machine, if it names one: a power
/// cut has ended the one that it was of.
pub fn age(image: &mut [u8]) {
    if let Some(at) = mark(image) {
        // Its last word is of the machine's start.
        image[at + 39] ^= 1;
    }
}
