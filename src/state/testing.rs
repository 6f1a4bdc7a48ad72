//! A folder for the tests of what records something.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Folder, Store};

/// A step of a replacement.
#[derive(Clone, Debug)]
pub enum Step {
    Write(String, Vec<u8>),
    Sync(String),
    Rename(String, String),
    SyncNames,
    Remove(String),
}

/// A folder in memory that remembers its steps, and fails at one of them.
#[derive(Clone, Debug, Default)]
pub struct Steps(pub Arc<Mutex<Memory>>);

#[derive(Debug, Default)]
pub struct Memory {
    pub files: BTreeMap<String, Vec<u8>>,
    pub steps: Vec<Step>,
    /// The number of the step that fails.
    pub fail: Option<usize>,
    /// All steps fail from this one on.
    pub fail_from: Option<usize>,
    /// All steps fail.
    pub full: bool,
}

impl Steps {
    /// From now on there is no room, or there is again.
    pub fn set_full(&self, full: bool) {
        self.0.lock().full = full;
    }

    /// The store called `d` in this folder, as a process has it that starts now.
    pub fn store(&self) -> Store {
        Store::read(Arc::new(self.clone()), Path::new("/state"), "d", None).unwrap()
    }

    fn step(&self, step: Step) -> io::Result<()> {
        let mut memory = self.0.lock();
        let number = memory.steps.len();
        memory.steps.push(step.clone());
        let from = memory.fail_from.is_some_and(|from| number >= from);
        let fails = memory.full || from || memory.fail == Some(number);
        match step {
            // A part of it may get there.
            Step::Write(name, mut bytes) => {
                bytes.truncate(if fails { bytes.len() / 2 } else { bytes.len() });
                memory.files.insert(name, bytes);
            }
            _ if fails => {}
            Step::Rename(from, to) => {
                let bytes = memory.files.remove(&from).unwrap();
                memory.files.insert(to, bytes);
            }
            Step::Remove(name) => drop(memory.files.remove(&name)),
            Step::Sync(_) | Step::SyncNames => {}
        }
        match fails {
            true => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            false => Ok(()),
        }
    }
}

impl Folder for Steps {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().files.get(name).cloned())
    }

    fn write(&self, name: &str, _like: &str, bytes: &[u8]) -> io::Result<()> {
        self.step(Step::Write(name.to_owned(), bytes.to_vec()))
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.step(Step::Sync(name.to_owned()))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step(Step::Rename(from.to_owned(), to.to_owned()))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.step(Step::SyncNames)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.step(Step::Remove(name.to_owned()))
    }
}
