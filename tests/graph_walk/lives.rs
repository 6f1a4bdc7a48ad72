//! Processes: how they begin and end, in order, killed, or with the power.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::daemon::Daemon;
use crate::common::{Res, images};
use crate::cut_fs::CutFs;
use crate::guest::Look;
use crate::look::judge;
use crate::scene::{Life, Scene, files};
use crate::world::World;

/// The header extension in which an image names its journal, and where the boot's number is in it.
const JOURNAL: u32 = 0x5354_4a4c;
const BOOT: u64 = 24;
/// How much longer a write takes to slow files.
const SLOW: Duration = Duration::from_millis(1);

impl Scene {
    pub fn start(&mut self) -> Res<()> {
        let _ = fs::remove_file(self.dir.path().join("qmp"));
        let mut daemon = Daemon::start(&self.program, &self.args, self.dir.path(), None)?;
        let qmp = daemon.qmp(&self.dir.path().join("qmp"))?;
        self.life = Some(Life { daemon, qmp });
        Ok(())
    }

    /// Connects the guests of all exports that there are.
    pub fn connect(&self, look: Look) -> Res<()> {
        for (id, guest) in &self.guests {
            if !self.down.contains(id) {
                let connected = guest.connect(look);
                connected.map_err(|e| format!("guest of '{id}' begins ({look:?}): {e}"))?;
            }
        }
        Ok(())
    }

    /// The process has been killed, or is to be now; the next one starts. `worlds` are those that it may find.
    pub fn restart(&mut self, worlds: &[World], cut: bool) -> Res<()> {
        let Some(mut life) = self.life.take() else {
            return Err("no process".into());
        };
        if let Some(cut) = &self.cut {
            cut.set(None);
        }
        life.daemon.kill()?;
        // What it has said without power is nothing that counts.
        if !self.has_lost_power() {
            judge(life.qmp.last_events())?;
        }
        drop(life);
        self.killed = true;
        for (id, guest) in &self.guests {
            guest.lose().map_err(|e| format!("guest of '{id}': {e}"))?;
        }
        for path in self.image_files() {
            images::wait_unlocked(&path)?;
        }
        if cut {
            for (_, guest) in &self.guests {
                guest.reboot()?;
            }
            self.power_cut()?;
        }
        self.start()?;
        self.world = self.find_restarted(worlds)?;
        let look = match (cut, self.rng.one_in(2)) {
            (true, _) => Look::AfterCut,
            (false, true) => Look::Whole,
            (false, false) => Look::Nothing,
        };
        self.connect(look)
    }

    /// The process ends in order for good. `qemu-img` reads what guests have read.
    pub fn finish(&mut self) -> Res<()> {
        let Life { daemon, mut qmp } = self.life.take().ok_or("no process")?;
        for (_, guest) in &self.guests {
            guest.leave()?;
        }
        daemon.stop()?;
        judge(qmp.last_events())?;
        for path in self.image_files() {
            let leaks = images::check(&path)?;
            if leaks && !self.killed {
                return Err(format!("{}: clusters have leaked", path.display()).into());
            }
        }
        for (id, guest) in &self.guests {
            let top = self.world.exports.get(id).ok_or("no such export")?;
            let node = self.world.nodes.get(top).ok_or("no such node")?;
            // Files, since headers name them: the nodes may have been put together otherwise.
            if self.world.is_as_headers_say(top) {
                let scratch = self.dir.path().join("scratch");
                let found = images::read_owners(node.file.as_ref(), "qcow2", &scratch)?;
                guest
                    .compare(found)
                    .map_err(|e| format!("'{id}' at the end: {e}"))?;
            }
        }
        Ok(())
    }

    /// The power has failed already.
    pub fn has_lost_power(&self) -> bool {
        self.cut.as_ref().is_some_and(CutFs::is_lost)
    }

    /// Writes to files take longer, or not, where that can be.
    pub fn set_slow(&self, slow: bool) {
        if let Some(cut) = &self.cut {
            cut.set_delay(if slow { SLOW } else { Duration::ZERO });
        }
    }

    fn power_cut(&mut self) -> Res<()> {
        let cut = self.cut.as_ref().ok_or("the power cannot fail")?;
        cut.cut(&mut self.rng);
        for entry in fs::read_dir(self.journals.path())? {
            fs::remove_file(entry?.path())?;
        }
        let state = self.images.join("state");
        let all = files(&self.images)?.into_iter();
        for path in all.filter(|path| !path.starts_with(&state)) {
            boot_anew(&path, self.rng.next())?;
        }
        Ok(())
    }

    /// A process that ends in order, and the next one.
    pub fn stop_and_start(&mut self) -> Res<()> {
        let Life { daemon, mut qmp } = self.life.take().ok_or("no process")?;
        daemon.stop()?;
        judge(qmp.last_events())?;
        for (id, guest) in &self.guests {
            guest.lose().map_err(|e| format!("guest of '{id}': {e}"))?;
        }
        for path in self.image_files() {
            images::check(&path)?;
        }
        self.start()?;
        let world = self.world.clone();
        self.world = self.find_restarted(&[world])?;
        self.connect(Look::Nothing)
    }

    /// The images of all nodes. There may be others, which killed commands have begun to make.
    fn image_files(&self) -> Vec<PathBuf> {
        let nodes = self.world.nodes.values();
        nodes.map(|node| PathBuf::from(&node.file)).collect()
    }
}

/// Makes an image's journal one of another boot.
fn boot_anew(path: &Path, boot: u64) -> Res<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let word = |at: u64| -> Res<u32> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_be_bytes(bytes))
    };
    if word(0).unwrap_or(0) != 0x5146_49fb {
        return Ok(());
    }
    let mut at = u64::from(word(100)?);
    loop {
        let (kind, len) = (word(at)?, word(at + 4)?);
        match kind {
            0 => return Ok(()),
            JOURNAL => break,
            _ => at += 8 + u64::from(len).next_multiple_of(8),
        }
    }
    file.write_all_at(&boot.to_le_bytes(), at + 8 + BOOT)?;
    Ok(file.sync_all()?)
}
