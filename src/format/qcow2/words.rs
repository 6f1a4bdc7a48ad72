//! Entries of L2 tables as they are stored.

/// An entry as it stands in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// The cluster descriptor.
    pub descriptor: u64,
    /// Bits 0–31: subclusters in the host cluster; 32–63: those that read as zeros. 0 in an image
    /// without subclusters.
    pub bitmap: u64,
}
