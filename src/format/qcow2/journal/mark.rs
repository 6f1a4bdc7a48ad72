//! What the header of an image says of its journal, and what follows from it.
//!
//! | header | boot | what happened | whoever writes | whoever reads |
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
use super::super::numbers::{be64, put};
use super::super::read_header;
use super::adopt;
use super::file::{self, Folder, file_name};
use crate::error::{Error, Result};
use crate::storage::{self, Storage};

/// The header extension. Its data: nonce, position, boot.
pub const EXTENSION: u32 = 0x5354_4a4c;
/// The autoclear bit: nobody has written the image but who has adopted its journal.
pub const AUTOCLEAR: u64 = 1 << 62;

const LENGTH: usize = 40;

/// What the header says of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Names the journal; new each time.
    pub nonce: [u64; 2],
    /// Position in the journal up to which a flush has written everything, or is about to.
    pub flushed: u64,
    /// The kernel's number of the boot that it is of.
    pub boot: [u64; 2],
}

impl Mark {
    /// From the extension's data; `None`: it is none of ours.
    #[must_use]
    pub fn parse(data: &[u8]) -> Option<Self> {
        (data.len() == LENGTH).then(|| Self {
            nonce: [be64(data, 0), be64(data, 8)],
            flushed: be64(data, 16),
            // Last, and never all zeros: a header ends with its last byte that is none.
            boot: [be64(data, 24), be64(data, 32)],
        })
    }

    /// What the journal's file is called in the folder of the journals.
    #[must_use]
    pub fn file_name(&self) -> String {
        file_name(self.nonce)
    }

    /// The extension's data.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        let mut data = vec![0; LENGTH];
        let [one, two] = self.nonce;
        let [three, four] = self.boot;
        for (at, word) in (0..).step_by(8).zip([one, two, self.flushed, three, four]) {
            put(&mut data, at, &word.to_be_bytes());
        }
        data
    }
}

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
            None => file::boot()?,
        };
        let is_there = folder.is_some_and(|folder| folder.file(mark.nonce).exists());
        Ok(match (is_there || mark.boot == this, bit) {
            (false, _) => Self::Void,
            (true, true) => Self::Live(mark),
            (true, false) => Self::Foreign,
        })
    }
}

/// Refuses an image whose journal is live, to whoever would look at more of it than its header.
///
/// # Errors
/// The journal is live; or the header cannot be read.
pub async fn require_none(storage: &dyn Storage) -> Result<()> {
    let header = read_header(storage).await?;
    match Verdict::of(&header, None)? {
        Verdict::Live(_) => Err(adopt::live(storage.name())),
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
        storage::io::write_buf(storage, offset, &bytes)
            .await
            .map_err(failed)?;
        storage::io::sync(storage).await.map_err(failed)?;
    }
    Ok(Some(mark))
}
