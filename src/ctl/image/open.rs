//! Opening images, with everything under them.

use crate::chain::Chain;
use crate::error::{Error, Result, errno_text};
use crate::format;
use crate::format::probe::{Detected, END, START};
use crate::graph::{Graph, layer_options};
use crate::options::{AutoOptions, BackingRef, BlockRef, BlockdevOptions, Discard, Driver};
use crate::reactor::Reactor;
use std::fs::File;
use std::future::Future;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read it; nobody may write it meanwhile.
    Read,
    /// To read it, even while others write it.
    ReadShared,
    /// To change it; nobody else may use it.
    Write,
}

impl Purpose {
    /// To read, or to read what may be in use (`-U`).
    pub fn reading(shared: bool) -> Self {
        if shared { Self::ReadShared } else { Self::Read }
    }
}

/// Open images, and the thread's I/O.
pub struct Images {
    /// Runs what is asynchronous.
    pub reactor: Reactor,
    /// The images.
    pub graph: Graph,
}

impl Images {
    /// With no image open.
    pub fn new() -> Result<Self> {
        let reactor = Reactor::for_this_thread()
            .map_err(|error| Error::Invalid(format!("preparing for I/O: {error}")))?;
        Ok(Self {
            reactor,
            graph: Graph::default(),
        })
    }

    /// Opens the image in `path` with all layers under it; without a format it is probed.
    /// Returns the node's name.
    pub fn open(&self, path: &Path, format: Option<&str>, purpose: Purpose) -> Result<String> {
        let options = layer_options(common(purpose), path, format)?;
        let options = BlockdevOptions {
            node_name: Some(self.graph.make_name()),
            ..options
        };
        self.run(self.graph.open(&options))
    }

    /// Opens the image in `path` without what lies under it.
    pub fn open_alone(
        &self,
        path: &Path,
        format: Option<&str>,
        purpose: Purpose,
    ) -> Result<String> {
        let format = match format {
            Some(format) => format,
            None => probe(path)?,
        };
        let mut options = layer_options(common(purpose), path, Some(format))?;
        match &mut options.driver {
            Driver::Qcow2(qcow2) => qcow2.backing = BackingRef::None,
            Driver::Qed(qed) => qed.backing = BackingRef::None,
            _ => {}
        }
        let options = BlockdevOptions {
            node_name: Some(self.graph.make_name()),
            ..options
        };
        self.run(self.graph.open(&options))
    }

    /// The layers of an open image.
    pub fn chain(&self, name: &str) -> Result<Arc<Chain>> {
        Ok(self.graph.root(name)?.chain())
    }

    /// Waits for something asynchronous.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.reactor.block_on(future)
    }
}

/// What the nodes of an image opened for `purpose` have in common.
pub fn common(purpose: Purpose) -> BlockdevOptions {
    let placeholder = Driver::Auto(AutoOptions {
        file: BlockRef::Name(String::new()),
        copy_on_read: false,
    });
    BlockdevOptions {
        read_only: purpose != Purpose::Write,
        force_share: purpose == Purpose::ReadShared,
        discard: Discard::Unmap,
        ..BlockdevOptions::new(placeholder)
    }
}

/// The format of the image in `path`, by looking at it.
///
/// # Errors
/// When it cannot be read, or is of a format that is not supported.
pub fn probe(path: &Path) -> Result<&'static str> {
    detect(path)?.supported(&path.display().to_string())
}

/// The format of the image in `path`, whether or not it is supported.
///
/// # Errors
/// When it cannot be read.
pub fn detect(path: &Path) -> Result<Detected> {
    let failed = |error: std::io::Error| {
        let text = errno_text(error.raw_os_error().unwrap_or(libc::EIO));
        Error::Invalid(format!("Could not open '{}': {text}", path.display()))
    };
    let mut file = File::open(path).map_err(failed)?;
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut part = |offset, len: usize| {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(offset))?;
        (&mut file).take(len as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let start = part(0, START).map_err(failed)?;
    let end = part(len.saturating_sub(END as u64), END).map_err(failed)?;
    Ok(format::probe::detect(&start, &end, len))
}
