//! Judges what is left of a disk: its metadata, its contents, and whether it can still be used.

use stratablk::reactor::Reactor;

use crate::bitmaps::{AUTO, Bitmap, IN_USE, bitmaps};
use crate::disk::{Disk, read_all, write};
use crate::history::{History, SECTOR, stamp_of};
use crate::journals::{Left, age};
use crate::landing::Start;
use crate::machine::Machine;
use crate::qcow2::{Image, Sector};
use crate::states::{End, State};
use crate::{alone, together};

/// What is known of a disk, and what it is compared with.
pub struct Judge<'a> {
    pub seed: u64,
    pub disk: &'a Disk,
    pub reactor: Reactor,
    pub history: History,
    /// Where the log begins.
    pub start: Start<'a>,
}

impl Judge<'_> {
    /// Ends the test unless the state is sound. `thorough`: is written to as well; `qemu`:
    /// `qemu-img check` is asked too.
    pub fn judge(&self, state: &State, thorough: bool, qemu: bool) {
        let result = self.sound(&state.files).and_then(|()| {
            let seen = {
                let _together = together();
                self.readable(state)?
            };
            if qemu {
                self.disk.qemu_check(&state.files)?;
            }
            if thorough {
                let _alone = alone();
                self.usable(state, &seen)?;
            }
            Ok(())
        });
        if let Err(what) = result {
            panic!("{}: {what}", self.context(state));
        }
    }

    /// What this is about, for messages.
    pub fn context(&self, state: &State) -> String {
        format!(
            "STRATABLK_SEED={}: {:?}: {:?} after event {}, of what was not {} there is {:?}",
            self.seed,
            self.disk.recipe,
            state.end,
            state.cut,
            match state.end {
                End::PowerCut => "stable",
                End::Kill => "done",
            },
            state.kept,
        )
    }

    /// So many notes of the history are certain after the state's end.
    pub fn settled(&self, state: &State) -> usize {
        match state.end {
            End::Kill if state.journals.is_some() => self.history.notes_at(state.cut),
            _ => self.history.stable_at(state.cut),
        }
    }

    /// The machine for the next process: after a power cut no journal is left.
    fn machine(&self, state: &State) -> Machine {
        let mut files = state.files.clone();
        let nothing = self.disk.recipe.journaled.then(Left::new);
        if state.end == End::PowerCut {
            age(&mut files[0]);
        }
        let machine = Machine::new(&files);
        if let Some(left) = state.journals.as_ref().or(nothing.as_ref()) {
            machine.keep_journals(left);
        }
        machine
    }

    /// The metadata is consistent, and snapshots are what they were.
    fn sound(&self, files: &[Vec<u8>]) -> Result<(), String> {
        let image = Image::new(&files[0])?;
        image.check()?;
        for root in image.snapshots()? {
            for (sector, &expected) in self.disk.first.iter().enumerate() {
                let stamp = match image.find(root, sector as u64)? {
                    Sector::Host(at) => {
                        let bytes = files[0].get(at as usize..at as usize + SECTOR);
                        bytes.and_then(stamp_of)
                    }
                    Sector::Zero => Some(0),
                    Sector::Below => Some(self.disk.under[sector]),
                };
                if stamp != Some(expected) {
                    return Err(format!(
                        "sector {sector} of the snapshot is {stamp:x?}, was {expected:x}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Every sector reads as something it may hold.
    fn readable(&self, state: &State) -> Result<Vec<u32>, String> {
        let machine = self.machine(state);
        // Nothing is read of an image before its journal is adopted.
        let adopts = self.disk.recipe.journaled;
        let opened = self.reactor.block_on(self.disk.open(&machine, adopts));
        let opened = opened.map_err(|error| error.to_string())?;
        if opened.image.backing().is_some()
            && self.history.alone_from.is_some_and(|at| at <= state.cut)
        {
            return Err("the stream has ended, but the header names a base".into());
        }
        let seen = read_all(&self.reactor, &opened.chain).map_err(|error| error.to_string())?;
        let settled = self.settled(state);
        for (sector, &stamp) in seen.iter().enumerate() {
            let allowed = self.history.after_cut(sector, settled, state.cut);
            if !stamp.is_some_and(|stamp| allowed.contains(&stamp)) {
                return Err(format!(
                    "sector {sector} reads as stamp {stamp:x?}, allowed are {allowed:x?}"
                ));
            }
        }
        let recipe = &self.disk.recipe;
        if seen.len() != recipe.sectors && seen.len() != recipe.resized {
            return Err(format!("a disk of {} sectors", seen.len()));
        }
        // It has grown before anything was written there.
        for sector in recipe.sectors.max(seen.len())..recipe.resized {
            let allowed = self.history.after_cut(sector, settled, state.cut);
            if !allowed.contains(&0) {
                return Err(format!("sector {sector} is lost, allowed are {allowed:x?}"));
            }
        }
        let seen: Vec<u32> = seen.into_iter().flatten().collect();
        let in_force = |bitmap: &Bitmap| bitmap.flags & (IN_USE | AUTO) == AUTO;
        if seen != self.disk.first && bitmaps(&state.files[0]).iter().any(in_force) {
            return Err("the disk is not what it was, and a bitmap knows nothing of it".into());
        }
        Ok(seen)
    }

    /// Work goes on: what is written now is there, nothing else changes, nothing leaks.
    fn usable(&self, state: &State, seen: &[u32]) -> Result<(), String> {
        let text = |error: stratablk::error::Error| error.to_string();
        let leaks = Image::new(&state.files[0])?.check()?;
        let machine = self.machine(state);
        let opened = self.reactor.block_on(self.disk.open(&machine, true));
        let opened = opened.map_err(text)?;
        let mut expected = seen.to_vec();
        let mut uncertain = vec![false; expected.len()];
        let may_be_full = self.disk.recipe.storage.device.is_some();
        let block = (self.disk.recipe.storage.block as usize).div_ceil(SECTOR);
        for index in 0..8 {
            let start = (index * expected.len() / 8 + 3) / block * block;
            let end = (start + 13).next_multiple_of(block);
            let stamp = 0xb000_0000 + 64 * index as u32;
            match write(&self.reactor, &opened.chain, start, end - start, stamp) {
                Err(error) if may_be_full && error.errno() == libc::ENOSPC => {
                    uncertain[start..end].fill(true);
                    continue;
                }
                written => written.map_err(text)?,
            }
            for (stamp, sector) in (stamp..).zip(&mut expected[start..end]) {
                *sector = stamp;
            }
        }
        let closed = self.reactor.block_on(opened.image.close());
        closed.map_err(text)?;
        let files: Vec<_> = (0..state.files.len()).map(|i| machine.bytes(i)).collect();
        let after = Image::new(&files[0])?.check()?;
        self.sound(&files)?;
        // What the first process had taken out of the mapping is not freed by the next one.
        if after > leaks && state.journals.is_none() {
            return Err(format!(
                "{leaks} clusters leaked, {after} after work went on"
            ));
        }
        let machine = Machine::new(&files);
        let opened = self.reactor.block_on(self.disk.open(&machine, false));
        let opened = opened.map_err(text)?;
        let seen = read_all(&self.reactor, &opened.chain).map_err(text)?;
        for (sector, (seen, expected)) in seen.iter().zip(expected).enumerate() {
            if *seen != Some(expected) && !uncertain[sector] {
                return Err(format!(
                    "after work went on, sector {sector} reads {seen:x?}, expected {expected:x}"
                ));
            }
        }
        Ok(())
    }
}
