//! Numbers that name journals and boots, and the names of the journals' files.

use std::io;
use std::path::Path;

use crate::error::{Error, Result};

/// 16 bytes that nobody else has: a nonce, or the kernel's number of this boot.
pub(super) type Id = [u64; 2];

pub(super) fn file_name([one, two]: Id) -> String {
    format!("{one:016x}{two:016x}.journal")
}

/// Removes a journal's file.
pub(super) fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{}: removing the journal: {error}", path.display());
    }
}

/// 16 bytes by chance.
pub(super) fn nonce() -> Result<Id> {
    let mut bytes = [0u8; 16];
    // SAFETY: the call writes that many bytes.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count != 16 {
        let error = io::Error::last_os_error();
        return Err(Error::Invalid(format!("a number for a journal: {error}")));
    }
    Ok(id(u128::from_ne_bytes(bytes)))
}

/// The kernel's number of this boot.
pub(super) fn boot() -> Result<Id> {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    let failed = |what: String| Error::Invalid(format!("{FILE}: {what}"));
    let text = std::fs::read_to_string(FILE).map_err(|error| failed(error.to_string()))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16)
        .map(id)
        .map_err(|_| failed(format!("no number of this boot: '{}'", text.trim())))
}

fn id(number: u128) -> Id {
    [(number >> 64) as u64, number as u64]
}
