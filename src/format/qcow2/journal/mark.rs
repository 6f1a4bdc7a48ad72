//! What the header of an image says of its journal.

use super::super::numbers::{be64, put};
use super::ids::file_name;

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
