//! What a layer and those below it hold, without reading the data.

/// Whether a range is to be copied by a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The layer itself has it.
    Present,
    /// No layer above the base has it.
    Absent,
    /// A layer between has it.
    Below,
}
