//! What would be caught: two processes that write one file; a file that others can read, and one that
//! they have put in its place.

use super::*;

#[test]
fn a_lock_whose_file_was_removed_is_taken_again_or_lost() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::open_within(dir.path(), "d", Owner::Own, Duration::ZERO);
    let remove = || std::fs::remove_file(dir.path().join("d.lock")).unwrap();
    let first = open().unwrap();
    remove();
    first.change(|now| *now = state()).unwrap();
    let locked = open().unwrap_err();
    assert!(matches!(locked, StateError::Locked { .. }), "{locked}");
    remove();
    let second = open().unwrap();
    let error = first.change(|now| now.jobs.clear()).unwrap_err();
    assert!(error.to_string().contains("has the state now"), "{error}");
    assert_eq!(second.state(), state());
    second.change(|now| now.links.clear()).unwrap();
}

/// Would catch what another process has recorded meanwhile, and that is overwritten.
#[test]
fn a_lock_that_is_taken_again_is_of_no_use_where_another_process_has_had_it() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::open_within(dir.path(), "d", Owner::Own, Duration::ZERO);
    let first = open().unwrap();
    first.change(|now| *now = state()).unwrap();
    std::fs::remove_file(dir.path().join("d.lock")).unwrap();
    let second = open().unwrap();
    second.change(|now| now.failed_syncs.clear()).unwrap();
    let recorded = second.state();
    drop(second);
    std::fs::remove_file(dir.path().join("d.lock")).unwrap();
    for _ in 0..2 {
        let error = first.change(|now| now.jobs.clear()).unwrap_err();
        assert!(error.to_string().contains("has changed it"), "{error}");
        first.happened(|now| now.links.clear()).unwrap_err();
    }
    drop(first);
    assert_eq!(open().unwrap().state(), recorded);
}

#[test]
fn a_copy_of_the_folder_that_is_made_of_links_has_a_lock_of_its_own() {
    let [dir, copy] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let open = |dir: &Path| Store::open_within(dir, "d", Owner::Own, Duration::ZERO);
    let first = open(dir.path()).unwrap();
    let name = |dir: &tempfile::TempDir| dir.path().join("d.lock");
    std::fs::hard_link(name(&dir), name(&copy)).unwrap();
    // There is no telling the folders' daemons from each other while one has it.
    open(copy.path()).unwrap_err();
    drop(first);
    let _second = open(copy.path()).unwrap();
    let _first = open(dir.path()).unwrap();
}

/// Would catch a user whose every change fails, for a group that is not the user's to give.
#[test]
fn a_file_of_another_group_can_be_changed_by_its_owner() {
    use std::os::unix::fs::{MetadataExt, chown};

    // SAFETY: the call always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("d.state");
    std::fs::write(&file, text::write(&state())).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    chown(dir.path(), Some(12345), None).unwrap();
    chown(&file, Some(12345), Some(54321)).unwrap();
    let change = || {
        // SAFETY: without the library's help it is about this thread alone.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 12345, -1) };
        assert_eq!(changed, 0);
        let store = Store::open_within(dir.path(), "d", Owner::Own, Duration::ZERO).unwrap();
        store.change(|now| now.jobs.clear()).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(change).join().unwrap());
    let now = std::fs::metadata(&file).unwrap();
    assert_eq!((now.uid(), now.mode() & 0o777), (12345, 0o600));
}

/// A file that somebody else has, and that is not to be touched.
fn victim(dir: &Path) -> PathBuf {
    let path = dir.join("victim");
    std::fs::write(&path, "mine").unwrap();
    path
}

#[test]
fn what_others_have_planted_is_neither_followed_nor_believed() {
    use std::os::unix::fs::{chown, symlink};

    let dir = tempfile::tempdir().unwrap();
    let victim = victim(dir.path());
    let path = |name: &str| dir.path().join(name);
    let open = || Store::open_within(dir.path(), "d", Owner::Own, Duration::ZERO);
    let refused = |word: &str| {
        let error = open().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let mode = |path: &Path, mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).unwrap();
    };
    for name in ["d.lock", "d.state"] {
        symlink(&victim, path(name)).unwrap();
        refused("symbolic links");
        std::fs::remove_file(path(name)).unwrap();
    }
    std::fs::remove_file(path("d.lock")).unwrap();
    std::fs::hard_link(&victim, path("d.lock")).unwrap();
    open().unwrap();
    assert_eq!(std::fs::read(&victim).unwrap(), b"mine");
    symlink(&victim, path("d.state.new")).unwrap();
    open().unwrap().change(|now| *now = state()).unwrap();
    assert_eq!(std::fs::read(&victim).unwrap(), b"mine");
    assert_eq!(open().unwrap().state(), state());

    for bad in [0o606, 0o660] {
        mode(&path("d.state"), bad);
        refused("others may write it");
    }
    mode(&path("d.state"), 0o640);
    for bad in [0o777, 0o770] {
        mode(dir.path(), bad);
        refused("others may replace files in it");
    }
    mode(dir.path(), 0o1777);
    open().unwrap();
    // SAFETY: the call always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    chown(path("d.state"), Some(12345), Some(54321)).unwrap();
    refused("belongs to user 12345");
    // An operator's change leaves it to its owner.
    let store = Store::open_anybodys(dir.path(), "d").unwrap();
    store.change(|now| now.jobs.clear()).unwrap();
    let now = std::fs::metadata(path("d.state")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(
        (now.uid(), now.gid(), now.mode() & 0o777),
        (12345, 54321, 0o640)
    );
}
