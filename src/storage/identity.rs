//! Which file is which: by what a file system says of it, whatever its path.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Inode and time of birth of a file, in nanoseconds since 1970. Zeros, where they are written down:
/// not known.
pub type Identity = [u64; 2];

/// Whether it tells a file from others.
#[must_use]
pub fn is_known(identity: Identity) -> bool {
    !identity.contains(&0)
}

/// Whether these are two files for sure.
#[must_use]
pub fn are_different(one: Identity, other: Identity) -> bool {
    is_known(one) && is_known(other) && one != other
}

/// What makes a file or a device the same one, whatever its name: device and inode, or the device's
/// number.
#[must_use]
pub fn number(metadata: &Metadata) -> (u64, u64) {
    match metadata.file_type().is_block_device() {
        true => (0, metadata.rdev()),
        false => (metadata.dev(), metadata.ino()),
    }
}

/// Whether both paths lead to one file.
#[must_use]
pub fn is_same_path(one: &Path, other: &Path) -> bool {
    let found = |path: &Path| std::fs::metadata(path).ok().map(|file| number(&file));
    one == other || found(one).is_some_and(|one| found(other) == Some(one))
}

/// Whether two records, or one and a file that is open, are about the same file: by identity, where
/// both are known, and by path otherwise. A copy of a whole file system has the same identities: a
/// file that is still where its record has it is not the one in the copy.
#[must_use]
pub fn is_same_file(one: (&Path, Identity), other: (&Path, Identity)) -> bool {
    is_same_among(one, other, |path| {
        let file = std::fs::metadata(path).ok()?;
        Some((number(&file), identity_of(&file).unwrap_or_default()))
    })
}

/// As [`is_same_file`], where paths lead to what `found` says: number and identity.
fn is_same_among(
    one: (&Path, Identity),
    other: (&Path, Identity),
    found: impl Fn(&Path) -> Option<((u64, u64), Identity)>,
) -> bool {
    if one == other {
        return true;
    }
    if are_different(one.1, other.1) {
        return false;
    }
    let (first, second) = (found(one.0), found(other.0));
    let number = |file: Option<((u64, u64), Identity)>| file.map(|(number, _)| number);
    if one.0 == other.0 || (first.is_some() && number(first) == number(second)) {
        return true;
    }
    let is_there =
        |file: Option<((u64, u64), Identity)>| file.is_some_and(|(_, identity)| identity == one.1);
    is_known(one.1) && one.1 == other.1 && !(is_there(first) && is_there(second))
}

/// What tells a file from a copy of it that has taken its place, as [`Storage::identity`](super::Storage::identity) says it.
#[must_use]
pub fn identity_of(metadata: &Metadata) -> Option<Identity> {
    if !metadata.is_file() {
        return None;
    }
    // Not every file system has it. Inodes alone are soon the same.
    let birth = metadata.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    let identity = [metadata.ino(), u64::try_from(birth.as_nanos()).ok()?];
    is_known(identity).then_some(identity)
}

/// What tells whether a file has been changed since: its length, and when it was changed, in
/// nanoseconds since 1970. Zeros of a device, of which it is not known.
pub type Content = [u64; 2];

/// What is in the files at `paths`, so that it is known whether somebody has changed them.
///
/// # Errors
/// What the system reports; that it does not say when files were changed.
pub fn contents_of(paths: &[PathBuf]) -> io::Result<Vec<Content>> {
    let content = |path: &PathBuf| {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Ok([0, 0]);
        }
        let at = metadata.modified()?.duration_since(UNIX_EPOCH);
        let at = at.map_err(io::Error::other)?.as_nanos();
        Ok([metadata.len(), u64::try_from(at).map_err(io::Error::other)?])
    };
    paths.iter().map(content).collect()
}

#[cfg(test)]
mod tests {
    //! What would be caught: a record that is not about its file because that has another path, or
    //! is about another file: one under the same path, or in a copy of the file system.

    use super::*;

    #[test]
    fn files_are_the_same_by_identity_and_by_path_where_there_is_none() {
        const ONE: Identity = [1, 7];
        const OTHER: Identity = [2, 8];
        const NONE: Identity = [0, 0];
        let found = |path: &Path| match path.to_str()? {
            "/a" | "/link" => Some(((1, 1), ONE)),
            "/copy" => Some(((2, 1), ONE)),
            "/b" => Some(((1, 2), OTHER)),
            "/unborn" | "/unborn-link" => Some(((3, 1), NONE)),
            _ => None,
        };
        let same = |one: (&str, Identity), other: (&str, Identity)| {
            let (one, other) = ((Path::new(one.0), one.1), (Path::new(other.0), other.1));
            let is_same = is_same_among(one, other, found);
            assert_eq!(
                is_same,
                is_same_among(other, one, found),
                "{one:?} {other:?}"
            );
            is_same
        };
        assert!(same(("/gone", ONE), ("/a", ONE)));
        assert!(same(("/b", ONE), ("/a", ONE)));
        assert!(same(("/link", ONE), ("/a", ONE)));
        assert!(!same(("/a", ONE), ("/copy", ONE)));
        assert!(same(("/gone", ONE), ("/copy", ONE)));
        assert!(!same(("/a", ONE), ("/a", OTHER)));
        assert!(!same(("/a", OTHER), ("/link", ONE)));
        // A time of birth that is not known says nothing, whatever the inode.
        for unknown in [NONE, [1, 0], [0, 7]] {
            assert!(same(("/unborn", unknown), ("/unborn", NONE)));
            assert!(same(("/unborn", unknown), ("/unborn-link", unknown)));
            assert!(!same(("/gone", unknown), ("/unborn", unknown)));
            assert!(same(("/a", unknown), ("/link", ONE)));
            assert!(!same(("/gone", unknown), ("/a", ONE)));
        }
    }
}
