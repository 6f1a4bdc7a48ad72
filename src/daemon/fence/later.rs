//! Fences of exports that come and go while the daemon runs.
//!
//! Who adds the export waits for its fence, on a thread of his own; nobody else does. A fence that
//! is given back is unlocked: rings may have the file open for some time yet.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::file::{self, FenceFile};
use super::{Fences, PAUSE, World, place, refuse_shared, take, warn_without};
use crate::engine;
use crate::error::{Error, Result};
use crate::options::ExportOptions;
use crate::reactor::kept;
use crate::storage::holder::{self, Holder};

impl engine::Fences for Fences {
    fn take(&self, export: &ExportOptions) -> Result<()> {
        let Some(fence) = place::open(export, self.state.as_deref())? else {
            warn_without(&[export.id.as_str()]);
            return Ok(());
        };
        refuse_shared(&self.files.lock(), export, &fence)?;
        let mut world = Now {
            since: Instant::now(),
            ending: &self.ending,
        };
        let told = |text: String| Error::Invalid(format!("export '{}': {text}", export.id));
        let Some(fence) = take(fence, self.timeout, &mut world).map_err(told)? else {
            return Err(told("the daemon is shutting down".to_owned()));
        };
        let mut files = self.files.lock();
        // Two that wanted the same one have found it locked by this process; but it may have been
        // another file then.
        refuse_shared(&files, export, &fence)?;
        kept::add(fence.shared()).map_err(|error| told(format!("its fence {fence}: {error}")))?;
        files.push((export.id.clone(), fence));
        Ok(())
    }

    fn give_back(&self, export: &str) {
        let mut files = self.files.lock();
        let (gone, left): (Vec<_>, Vec<_>) = files.drain(..).partition(|(id, _)| id == export);
        *files = left;
        for (_, fence) in gone {
            forget(&fence);
        }
    }
}

fn forget(fence: &FenceFile) {
    if let Err(error) = fence.unlock() {
        log::debug!("giving the fence {fence} back: {error}");
    }
    kept::remove(&fence.shared());
}

/// The world of a thread that waits for nothing else.
struct Now<'a> {
    since: Instant,
    ending: &'a AtomicBool,
}

impl World for Now<'_> {
    fn holder(&mut self, file: &File) -> Holder {
        holder::find(file, file::BYTE)
    }

    fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    fn pause(&mut self) -> bool {
        std::thread::sleep(PAUSE);
        !self.ending.load(Ordering::Relaxed)
    }
}
