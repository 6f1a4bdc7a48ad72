//! The fence: a daemon serves only when the one before it is really gone.
//!
//! A process that was killed is not gone when `waitpid` returns. Its direct I/O goes on: the reads
//! write into the guest's memory, tens of milliseconds later and with slow storage much later, and
//! the writes reach the images. A daemon that serves the same guest by then would have its memory and its
//! disk changed by a request that it has answered itself. So before a start opens, locks or serves
//! anything it takes a lock on a file for each of its exports, the export's fence, which lies beside
//! the socket (`place`). The file is registered in every io_uring of the process
//! ([`crate::reactor::uring`]): the kernel gives the lock back when the last operation of the last
//! ring has ended, and not before.
//!
//! What this must take care of:
//!
//! * The locks of images are no fence: a second reader gets its lock on a base at once, block
//!   devices are locked by nobody else, and `locking=off` takes none. With the fences held they are
//!   free, too.
//! * All rings hold all fences: an export's disk may be read by a job's ring, and the next daemon may
//!   have one of the exports only. So fences are taken before the first ring is made. Those of
//!   exports that come later reach the rings through [`crate::reactor::kept`].
//! * A lock belongs to an open file description, which `fork` shares: fences are taken when the
//!   daemon has gone to the background, and are closed in whatever it may execute.
//! * At an orderly end they are given back when all that rings have begun has ended, and not when
//!   something was abandoned: the kernel frees even an idle ring only some time after the process.
//! * A fence is never removed. Who waits for it has it open, and would lock a file that nobody else
//!   will find. Where somebody else removes or replaces it, the file that is found at its name after
//!   the lock was taken is another one, and is tried in its place.
//! * The name may be in a folder that others can write: what lies there is opened only as a regular
//!   file, through no symbolic link, and never written.
//!
//! **Waiting.** A process that holds a fence and runs will not let it go: it is named at once,
//! or nearly. A process that has been killed, or that nobody sees any more, is waited for.

mod file;
mod later;
mod place;

use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Call;
use crate::error::{Error, Result};
use crate::options::ExportOptions;
use crate::reactor::uring;
use crate::storage::holder::{self, Holder};

use file::FenceFile;

/// How soon a fence that is held is tried again: the guest waits meanwhile.
const PAUSE: Duration = Duration::from_millis(1);
/// When the first look for the holder is due. It costs a walk through all processes, and after a
/// kill the fence is free before.
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// After so much time the user is told why the start takes so long.
const LONG: Duration = Duration::from_secs(1);

/// The fences of a daemon. They are held when this is dropped, too: for as long as the process and
/// its I/O last.
#[derive(Debug)]
pub struct Fences {
    /// Each with the export whose it is.
    files: Mutex<Vec<(String, FenceFile)>>,
    /// The file of the daemon's state, without its ending.
    state: Option<PathBuf>,
    timeout: Duration,
    /// The process is about to end: none is waited for any more.
    ending: AtomicBool,
    /// How long they were waited for.
    pub waited: Duration,
}

impl Fences {
    /// Shows who waits that this process is about to end: its end is waited for.
    pub fn say_that_it_ends(&self) {
        self.ending.store(true, Ordering::Relaxed);
        for (_, file) in &*self.files.lock() {
            if let Err(error) = file.mark_ending() {
                log::debug!("the fence {file}: {error}");
            }
        }
    }

    /// Gives them back to the next process after an orderly end: the kernel would take its time with rings
    /// in which nothing is in flight, as well. Only for a process all of whose I/O has ended.
    pub fn give_back(&self) {
        for (_, file) in &*self.files.lock() {
            if let Err(error) = file.unlock() {
                log::debug!("giving the fence {file} back: {error}");
            }
        }
    }
}

/// Takes the fence of each export. `state` is the file of the daemon's state, without its ending:
/// those whose socket has no name lie beside it. `None` if the daemon was told to end meanwhile.
///
/// # Errors
/// When a running process holds one, when one is not given back within `timeout`, and when its file
/// cannot be had. None is held then.
pub fn hold(
    exports: &[ExportOptions],
    state: Option<&Path>,
    timeout: Duration,
    stopped: &Receiver<Call>,
) -> Result<Option<Fences>> {
    let mut world = System {
        since: Instant::now(),
        paused: false,
        stopped,
    };
    let mut held: Vec<(String, FenceFile)> = Vec::with_capacity(exports.len());
    let mut without = Vec::new();
    for export in exports {
        let Some(fence) = place::open(export, state)? else {
            without.push(export.id.as_str());
            continue;
        };
        refuse_shared(&held, export, &fence)?;
        match take(fence, timeout, &mut world)
            .map_err(|text| Error::Invalid(format!("export '{}': {text}", export.id)))?
        {
            Some(fence) => held.push((export.id.clone(), fence)),
            None => return Ok(None),
        }
    }
    if !without.is_empty() {
        warn_without(&without);
    }
    let failed = |error| Error::Invalid(format!("preparing for more fences: {error}"));
    uring::keep_more_open().map_err(failed)?;
    uring::keep_open(held.iter().map(|(_, fence)| fence.shared()));
    let mut waited = Duration::ZERO;
    if world.paused {
        waited = world.waited();
        log::info!("fence: waited {} ms", waited.as_millis());
    }
    Ok(Some(Fences {
        files: Mutex::new(held),
        state: state.map(Path::to_owned),
        timeout,
        waited,
        ending: AtomicBool::new(false),
    }))
}

fn refuse_shared(
    held: &[(String, FenceFile)],
    export: &ExportOptions,
    fence: &FenceFile,
) -> Result<()> {
    if held.iter().any(|(_, other)| other.is_same(fence)) {
        return Err(Error::Invalid(format!(
            "export '{}': its fence {fence} is another export's, too: each needs a socket of its \
             own",
            export.id
        )));
    }
    Ok(())
}

fn warn_without(exports: &[&str]) {
    log::warn!(
        "no fence for export '{}': its socket has no name in a folder that can be written, and no \
         --state folder is given. Should this process be killed, nothing keeps the next one from \
         serving the guest while I/O of this one still goes on",
        exports.join("', '")
    );
}

/// What waiting needs of the world.
trait World {
    fn holder(&mut self, file: &File) -> Holder;
    fn waited(&self) -> Duration;
    /// Lets time pass. False: the daemon was told to end.
    fn pause(&mut self) -> bool;
}

struct System<'a> {
    since: Instant,
    /// Whether anything had to be waited for.
    paused: bool,
    stopped: &'a Receiver<Call>,
}

impl World for System<'_> {
    fn holder(&mut self, file: &File) -> Holder {
        holder::find(file, file::BYTE)
    }

    fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    fn pause(&mut self) -> bool {
        self.paused = true;
        match self.stopped.recv_timeout(PAUSE) {
            Ok(Call::Stop) | Err(RecvTimeoutError::Disconnected) => false,
            Ok(Call::Client) | Err(RecvTimeoutError::Timeout) => true,
        }
    }
}

/// Waits until the lock is ours. `None`: the daemon was told to end.
///
/// A file that somebody takes away meanwhile is not forgotten: the I/O for which it was locked goes
/// on all the same. It is waited for, and so is the one that lies there now.
fn take(
    fence: FenceFile,
    timeout: Duration,
    world: &mut dyn World,
) -> std::result::Result<Option<FenceFile>, String> {
    let mut next_look = FIRST_LOOK;
    let mut told = false;
    let mut gone: Vec<FenceFile> = Vec::new();
    let mut last = fence;
    loop {
        let try_lock = |fence: &FenceFile| {
            let locked = fence.try_lock();
            locked.map_err(|error| format!("locking its fence {fence}: {error}"))
        };
        let mut held = Vec::new();
        for file in gone {
            if !try_lock(&file)? {
                held.push(file);
            }
        }
        gone = held;
        let locked = try_lock(&last)? && gone.is_empty();
        if locked && last.is_in_place() {
            return Ok(Some(last));
        }
        let fence = gone.first().unwrap_or(&last);
        if !std::mem::replace(&mut told, true) {
            log::debug!("waiting for the fence {fence}");
        }
        let waited = world.waited();
        if !locked && waited >= next_look.min(timeout) {
            let holder = world.holder(fence.file());
            let runs = matches!(holder, Holder::Own | Holder::Process { .. });
            let runs = runs && !fence.is_ending();
            if runs || waited >= timeout {
                return Err(refusal(fence, &holder, waited));
            }
            if waited >= LONG {
                log::warn!(
                    "waiting for the fence {fence}, which nobody must remove: {}",
                    cause(&holder)
                );
            }
            next_look = waited.saturating_mul(2);
        } else if waited >= timeout {
            return Err(format!(
                "its fence {fence} is replaced again and again: nothing else may touch it"
            ));
        }
        if !world.pause() {
            return Ok(None);
        }
        if !last.is_in_place() {
            let next = last
                .open_again()
                .map_err(|error| format!("its fence {last}: {error}"))?;
            gone.push(std::mem::replace(&mut last, next));
        }
    }
}

fn refusal(fence: &FenceFile, holder: &Holder, waited: Duration) -> String {
    let mut text = format!("its fence {fence} is held");
    // Writing to a string does not fail.
    let _ = match holder {
        Holder::Own => write!(text, " by this process itself"),
        Holder::Process { pid, command } => write!(
            text,
            " by process {pid} ({command}), which {}: end it first, or {}",
            if fence.is_ending() {
                "does not end"
            } else {
                "runs"
            },
            fence.alternative()
        ),
        Holder::Ending { .. } | Holder::Unknown { .. } => write!(
            text,
            " after {} ms: {}. Its requests may still change the guest's memory and the images, so \
             nothing is served. See to the storage that does not answer, then start again; \
             --fence-timeout=SECONDS waits longer",
            waited.as_millis(),
            cause(holder)
        ),
    };
    text
}

/// What a holder that is waited for is.
fn cause(holder: &Holder) -> String {
    let other = "or a process that cannot be seen from here (another container or host) holds it";
    match holder {
        Holder::Ending { pid, command } => {
            format!("process {pid} ({command}) has been killed and has not ended")
        }
        Holder::Unknown { all_seen: true } => {
            format!("I/O of a process that has ended has not ended, {other}")
        }
        Holder::Unknown { all_seen: false } => {
            format!("I/O of a process that has ended has not ended, or another user's, {other}")
        }
        running => running.to_string(),
    }
}

#[cfg(test)]
mod tests;
