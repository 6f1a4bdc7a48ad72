//! What follows from what the header of an image says of its journal.
//!
//! | header | boot | what happened | a writer | a reader |
//! | --- | --- | --- | --- | --- |
//! | no extension | | closed clean, or never had one | goes on | goes on |
//! | one of another length, bit | | a version that is not known has it | refuses | refuses |
//! | extension, bit | another, and there is no such file | a power cut | goes on: what was flushed counts | goes on |
//! | extension, no bit | another | a power cut | goes on | goes on |
//! | extension, bit | this; or there is its file, and so the memory that it is in | killed: the journal is live | adopts it, or refuses | adopts it, or refuses |
//! | extension, no bit | this | another program has written since | refuses | goes on |
//!
//! The image itself is sound in all of these. What is refused is to go on as if nothing were
//! missing: writes that completed and were never flushed are in the journal alone, and a guest that
//! still runs relies on them. It takes a user's word to do without ([`forget`]).

use super::super::header::{Header, Patch};
use super::super::read_header;
use super::file::Folder;
use super::ids;
use super::mark::{AUTOCLEAR, EXTENSION, Mark};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose, Storage};

/// What is to be thought of an image's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Verdict {
    /// There is none.
    None,
    /// What it said is lost, and that is a power cut's doing.
    Void,
    /// It has what completed: it is to be adopted.
    Live(Mark),
    /// Another program has written the image since.
    Foreign,
}

impl Verdict {
    /// Of an image with this header, if journals are in `folder`. What is in that outlives no boot:
    /// a container has another number each time that it is started, and its host goes on.
    ///
    /// # Errors
    /// When the kernel does not tell which boot this is, or a later version wrote the mark.
    pub(in super::super) fn of(header: &Header, folder: Option<&Folder>) -> Result<Self> {
        let bit = header.autoclear & AUTOCLEAR != 0;
        let Some(mark) = header.journal else {
            if bit && header.extension(EXTENSION).is_some() {
                return Err(header.unsupported(
                    "the image has a journal of a version that is not known (expected a daemon of \
                     the version that was killed)",
                ));
            }
            return Ok(Self::None);
        };
        let this = match folder {
            Some(folder) => folder.boot(),
            None => ids::boot()?,
        };
        let is_there = folder.is_some_and(|folder| folder.file(mark.nonce).exists());
        Ok(match (is_there || mark.boot == this, bit) {
            (false, _) => Self::Void,
            (true, true) => Self::Live(mark),
            (true, false) => Self::Foreign,
        })
    }
}

/// Refuses an image whose journal is live, when more of it than its header is to be read.
///
/// # Errors
/// The journal is live; or the header cannot be read.
pub async fn require_none(storage: &dyn Storage) -> Result<()> {
    let header = read_header(storage).await?;
    match Verdict::of(&header, None)? {
        Verdict::Live(_) => Err(live(storage.name())),
        Verdict::None | Verdict::Void | Verdict::Foreign => Ok(()),
    }
}

/// Takes the mark out of an image's header, and so gives up what its journal may have: a user's
/// word. Returns what was in it; `None`: there was none. The image must not be open.
///
/// # Errors
/// When the header has no room for the change, or cannot be read or written.
pub async fn forget(storage: &dyn Storage) -> Result<Option<Mark>> {
    let header = read_header(storage).await?;
    let Some(mark) = header.journal else {
        return Ok(None);
    };
    for Patch { offset, bytes } in header.plan_journal(None)? {
        let failed = |error| Error::io(crate::error::Action::Write, storage.name(), offset, &error);
        let bytes = storage::AlignedBuf::copy_of(&bytes);
        storage::io::write_buf(Purpose::Header.on(storage), offset, &bytes)
            .await
            .map_err(failed)?;
        storage::io::sync(storage).await.map_err(failed)?;
    }
    Ok(Some(mark))
}

pub(super) fn live(image: &str) -> Error {
    refused(
        image,
        "the process that had the image was killed, and its journal has writes that completed and \
         were not flushed (expected a daemon with the same '--journal' folder)",
    )
}

pub(super) fn refused(image: &str, what: &str) -> Error {
    Error::Invalid(format!(
        "{image}: {what}. To do without what the journal has, and take the image as it was at a \
         flush: 'stratactl image forget-journal'"
    ))
}
