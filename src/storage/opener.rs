//! The opener: the only place that opens the files of images.
//!
//! To open a file may take as long as its file system likes, and so may a look at it. Threads that
//! serve others ask for both with [`outside`].

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::calls::Calls;
use super::identity::{Content, contents_of};

/// How to open a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// Open for writing.
    pub writable: bool,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Flushes do nothing: for throw-away guests (`cache.no-flush`).
    pub no_flush: bool,
    /// Take no image locks (`locking=off`).
    pub no_lock: bool,
    /// Let others write the file meanwhile (`force-share`); read-only opens alone.
    pub force_share: bool,
}

/// Carries out `call` on a thread that may hang for it.
///
/// # Errors
/// Those of the call; or there is no thread for it.
pub async fn outside<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    Calls::default().run(call).await?
}

/// What a file system says of the file at `path`.
///
/// # Errors
/// What the system reports.
pub async fn look(path: &Path) -> io::Result<Metadata> {
    let path = path.to_owned();
    outside(move || std::fs::metadata(path)).await
}

/// What is in files that nobody writes any more; what their file systems say of that is stable then.
///
/// # Errors
/// What the system reports.
pub async fn settled_contents(paths: Vec<PathBuf>) -> io::Result<Vec<Content>> {
    outside(move || {
        for path in &paths {
            // To flush data alone leaves out when they were changed.
            File::open(path)?.sync_all()?;
        }
        contents_of(&paths)
    })
    .await
}

/// Opens an image's file; says whether it is a block device.
pub(super) fn open_file(path: &Path, flags: OpenFlags) -> io::Result<(Arc<File>, bool)> {
    let failed = |error: io::Error| {
        let text = match error.raw_os_error() {
            Some(code) => crate::error::errno_text(code),
            None => error.to_string(),
        };
        io::Error::new(
            error.kind(),
            format!("Could not open '{}': {text}", path.display()),
        )
    };
    // Before it is opened: a pipe would keep us until somebody writes to it.
    let block_device =
        is_block_device(&std::fs::metadata(path).map_err(failed)?).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .write(flags.writable)
        .custom_flags(libc::O_CLOEXEC | if flags.direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .map_err(failed)?;
    Ok((Arc::new(file), block_device))
}

/// Tells a block device from a file.
///
/// # Errors
/// When it is neither.
pub(super) fn is_block_device(metadata: &Metadata) -> io::Result<bool> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind.is_block_device());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "not a file or a block device",
    ))
}
