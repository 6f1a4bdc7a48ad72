//! Big-endian numbers in headers and tables.
//!
//! What lies past the end of the bytes reads as 0 and is not written: callers have checked what
//! matters to them.

/// The number of `len` bytes, at most 8, at `at`.
pub fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = at.checked_add(len).and_then(|end| bytes.get(at..end));
    bytes
        .unwrap_or_default()
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The number of 4 bytes at `at`.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    be(bytes, at, 4) as u32
}

/// The number of 8 bytes at `at`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    be(bytes, at, 8)
}

/// The words of a table.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| be(word, 0, 8))
}

/// Puts `value` at `at`, if there is room for all of it.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}
