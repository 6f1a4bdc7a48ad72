//! What would be caught: a state that is half the old and half the new one after a kill or a power
//! cut between any two steps, or is lost; a change that fails and leaves a trace; a file of a newer
//! program that is overwritten, an older one that is refused, a damaged one that is dropped; two
//! processes that write one file; a file that others can read.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::record::*;
use super::testing::*;
use super::*;

/// A disk: what is stable, and what is not yet.
#[derive(Clone, Default)]
struct Disk {
    /// Of each file what is stable, and what was written.
    files: Vec<(Vec<u8>, Vec<u8>)>,
    names: BTreeMap<String, usize>,
    /// What names were when they were last made stable, and after each change since then.
    history: Vec<BTreeMap<String, usize>>,
}

impl Disk {
    fn with(name: &str, bytes: &[u8]) -> Self {
        let names = BTreeMap::from([(name.to_owned(), 0)]);
        Self {
            files: vec![(bytes.to_vec(), bytes.to_vec())],
            history: vec![names.clone()],
            names,
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Write(name, bytes) => {
                let file = *self.names.entry(name.clone()).or_insert(self.files.len());
                match self.files.get_mut(file) {
                    Some(file) => file.1 = bytes.clone(),
                    None => self.files.push((Vec::new(), bytes.clone())),
                }
            }
            Step::Sync(name) => {
                let file = &mut self.files[self.names[name]];
                file.0 = file.1.clone();
                return;
            }
            Step::Rename(from, to) => {
                let file = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), file);
            }
            Step::Remove(name) => drop(self.names.remove(name)),
            Step::SyncNames => self.history.clear(),
        }
        self.history.push(self.names.clone());
    }

    /// What the file `name` may have after a power cut: `None` if it is gone.
    fn after_power_cut(&self, name: &str) -> Vec<Option<Vec<u8>>> {
        let mut found = Vec::new();
        for names in &self.history {
            let Some(&file) = names.get(name) else {
                found.push(None);
                continue;
            };
            let (stable, written) = &self.files[file];
            found.push(Some(stable.clone()));
            found.push(Some(written.clone()));
            if stable != written {
                found.push(Some(written[..written.len() / 2].to_vec()));
            }
        }
        found
    }
}

fn node(file: &str) -> Node {
    Node {
        name: Some("n2".to_owned()),
        format: "qcow2".to_owned(),
        file: file.to_owned(),
    }
}

fn link() -> Link {
    Link {
        node: node("/disks/top.qcow2"),
        header: Some(Header {
            name: "base.raw".to_owned(),
            format: None,
        }),
        below: Some(Below {
            node: Node {
                name: None,
                format: "raw".to_owned(),
                file: "/disks/base.raw".to_owned(),
            },
            open_as: "/disks/base.raw".to_owned(),
        }),
        identity: [7, 1_795_424_733_000_000_000],
        released: vec!["n1".to_owned()],
        released_files: vec!["/disks/mid.qcow2".to_owned()],
        let_go: false,
    }
}

fn job(id: &str) -> Job {
    Job {
        number: u64::from(id == "k"),
        id: id.to_owned(),
        work: Work::Stream(Stream {
            target: node("/disks/top.qcow2"),
            identity: [7, 1_795_424_733_000_000_000],
            base: None,
            backing_file: Some("base.raw".to_owned()),
            compress: true,
        }),
        len: 1 << 40,
        speed: u64::MAX,
        on_error: OnError::Enospc,
        auto_finalize: false,
        auto_dismiss: true,
        paused: true,
        io_status: IoStatus::NoSpace,
        cancelled: false,
        completing: false,
        finalized: false,
        commit: Some(Commit {
            link: link(),
            done: false,
        }),
        end: Some(End {
            error: Some("Input/output error \"\u{e9}\"".to_owned()),
            len: 7,
            offset: 6,
            copied: 5,
        }),
    }
}

fn state() -> State {
    State {
        moved: Vec::new(),
        links: vec![link()],
        jobs: vec![job("j"), job("k")],
        next_job: 2,
        changes: Changes::default(),
        failed_syncs: vec![FailedSync {
            file: "/disks/top.qcow2".to_owned(),
            identity: [0, 0],
            errno: 5,
            at: 1_795_424_733,
        }],
        tops: vec![Top {
            covered: link().node,
            identity: [3, 4],
            top: link().node,
            top_identity: [5, 6],
            exports: vec!["e".to_owned()],
            open_as: json!({"driver": "qcow2", "file": {"driver": "file", "filename": "/n"}}),
            closed: false,
        }],
    }
}

fn path() -> &'static Path {
    Path::new("/state/d.state")
}

fn store(steps: &Steps) -> Store {
    steps.store()
}

#[test]
fn every_record_comes_back() {
    let steps = Steps::default();
    store(&steps).change(|now| *now = state()).unwrap();
    assert_eq!(store(&steps).state(), state());
}

#[test]
fn a_change_is_whole_at_any_cut_and_lasts_once_it_is_made() {
    let steps = Steps::default();
    let store = store(&steps);
    let old = state();
    store.change(|now| *now = old.clone()).unwrap();
    let before = steps.read("d.state").unwrap().unwrap();
    steps.0.lock().steps.clear();
    // Shorter, so that the old text's end would show behind it.
    let mut new = state();
    new.jobs.clear();
    store.change(|now| *now = new.clone()).unwrap();

    let taken = steps.0.lock().steps.clone();
    assert!(taken.len() >= 4, "{taken:?}");
    let mut disk = Disk::with("d.state", &before);
    for (number, step) in taken.iter().enumerate() {
        disk.take(step);
        for bytes in disk.after_power_cut("d.state") {
            let bytes = bytes.unwrap_or_else(|| panic!("gone after {number}: {step:?}"));
            let found = text::parse(&bytes, path())
                .unwrap_or_else(|error| panic!("after {number}: {step:?}: {error}"));
            assert!(found == old || found == new, "after {number}: {step:?}");
            let made = number + 1 == taken.len();
            assert!(!made || found == new, "it was said to be made");
        }
        let now = &disk.files[disk.names["d.state"]].1;
        text::parse(now, path()).unwrap();
    }
}

#[test]
fn a_change_that_fails_leaves_no_trace() {
    let count = {
        let steps = Steps::default();
        store(&steps).change(|now| *now = state()).unwrap();
        steps.0.lock().steps.len()
    };
    for fail in 0..count {
        let steps = Steps::default();
        let store = store(&steps);
        store.change(|now| *now = state()).unwrap();
        steps.0.lock().steps.clear();
        steps.0.lock().fail = Some(fail);
        let error = store.change(|now| now.jobs.clear()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/state/d.state"), "{text}");
        assert!(text.contains("No space left on device"), "{text}");
        assert_eq!(store.state(), state());
        let reader = super::tests::store(&steps);
        assert_eq!(reader.state(), state(), "step {fail}");
        let files: Vec<_> = steps.0.lock().files.keys().cloned().collect();
        assert_eq!(files, ["d.state"], "step {fail}");
        store.change(|now| now.jobs.clear()).unwrap();
    }
}

#[test]
fn what_does_not_change_is_not_written() {
    let steps = Steps::default();
    let store = store(&steps);
    store.change(|_| ()).unwrap();
    assert!(steps.0.lock().steps.is_empty());
}

fn written(version: u64, state: &Value) -> Vec<u8> {
    let sum = text::checksum(state);
    let value = json!({"stratablk-state": version, "crc32": sum, "state": state});
    serde_json::to_vec(&value).unwrap()
}

#[test]
fn a_newer_version_is_refused_whatever_is_in_it() {
    let newer = json!({"stratablk-state": text::VERSION + 1, "whatever": []});
    let bytes = serde_json::to_vec(&newer).unwrap();
    let error = text::parse(&bytes, path()).unwrap_err();
    let (found, known) = (text::VERSION + 1, text::VERSION);
    let wanted = StateError::Newer {
        path: path().to_owned(),
        found,
        known,
    };
    assert_eq!(error, wanted);
    let words = error.to_string();
    for word in [
        "/state/d.state".to_owned(),
        format!("version {found}"),
        format!("version {known} at most"),
        "remove the file".to_owned(),
    ] {
        assert!(words.contains(&word), "{words}");
    }
}

#[test]
fn versions_before_are_read_through_all_between() {
    let to_2: text::Upgrade = |state| Ok(json!({"two": state}));
    let to_3: text::Upgrade = |state| match state.get("two") {
        Some(_) => Ok(json!({"three": state})),
        None => Err("it has no 'two'".to_owned()),
    };
    let read = |version, state: Value| {
        text::current(&written(version, &state), path(), &[to_2, to_3])
            .map_err(|error| error.to_string())
    };
    assert_eq!(read(1, json!(1)).unwrap(), json!({"three": {"two": 1}}));
    let second = json!({"two": 1});
    assert_eq!(read(2, second.clone()).unwrap(), json!({"three": second}));
    assert_eq!(read(3, json!(1)).unwrap(), json!(1));
    assert!(read(2, json!(1)).unwrap_err().contains("no 'two'"));
    assert!(read(4, json!(1)).unwrap_err().contains("version 4"));
    assert!(read(0, json!(1)).unwrap_err().contains("no version"));
    // What this program writes it reads without any of them.
    assert_eq!(text::VERSION, 3);
}

#[test]
fn damage_is_told_and_nothing_is_dropped() {
    let whole = text::write(&state());
    let mut damaged: Vec<Vec<u8>> = (0..whole.len() - 1)
        .map(|len| whole[..len].to_vec())
        .collect();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        damaged.push(bytes);
    }
    damaged.push(written(1, &json!({"links": [], "jobs": []})));
    damaged.push(written(2, &json!({"links": [], "jobs": []})));
    let mut more = serde_json::to_value(State::default()).unwrap();
    more["more"] = json!(1);
    damaged.push(written(2, &more));
    damaged.push(written(3, &more));
    for bytes in damaged {
        match text::parse(&bytes, path()) {
            // White space is no part of it.
            Ok(found) => assert_eq!(found, state()),
            Err(StateError::Newer { found, .. }) => assert!(found > text::VERSION),
            Err(error) => {
                let words = error.to_string();
                assert!(words.contains("/state/d.state"), "{words}");
                assert!(words.contains("remove it"), "{words}");
            }
        }
    }
}

#[test]
fn a_damaged_file_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.state");
    std::fs::write(&path, "{").unwrap();
    let error = Store::open(dir.path(), "d").unwrap_err();
    assert!(matches!(error, StateError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"{");
}

#[test]
fn one_process_has_a_state_and_others_have_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name| Store::open_within(dir.path(), name, Owner::Own, Duration::ZERO);
    let first = open("d").unwrap();
    first.change(|now| *now = state()).unwrap();
    let error = open("d").unwrap_err().to_string();
    let own = std::process::id().to_string();
    for word in ["d.state", &own, "--state-name"] {
        assert!(error.contains(word), "{error}");
    }
    let second = open("other").unwrap();
    second.change(|now| now.jobs.push(job("k"))).unwrap();
    assert_eq!(names(dir.path()).unwrap(), ["d", "other"]);
    let others = others(dir.path(), "other").unwrap();
    let others = others.into_iter().map(|other| (other.path, other.state));
    let wanted = (dir.path().join("d.state"), Ok(state()));
    assert_eq!(others.collect::<Vec<_>>(), [wanted]);
    drop(first);
    assert_eq!(open("d").unwrap().state(), state());
    for name in ["d.state", "d.lock"] {
        let mode = std::fs::metadata(dir.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn a_folder_that_is_missing_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let error = Store::open(&dir.path().join("missing"), "d")
        .unwrap_err()
        .to_string();
    assert!(error.contains("mkdir -m 700"), "{error}");
    std::fs::write(dir.path().join("file"), "").unwrap();
    let error = Store::open(&dir.path().join("file"), "d")
        .unwrap_err()
        .to_string();
    assert!(error.contains("Not a directory"), "{error}");
}

/// What version 1 has written, of every kind of record.
#[test]
fn version_1_is_read() {
    let bytes = include_bytes!("fixtures/version1.json");
    let mut wanted = state();
    wanted.tops.clear();
    let link = |link: &mut Link| {
        link.identity = [0, 0];
        link.released_files.clear();
    };
    wanted.links.iter_mut().for_each(link);
    for job in &mut wanted.jobs {
        link(&mut job.commit.as_mut().unwrap().link);
        if let Work::Stream(stream) = &mut job.work {
            stream.identity = [0, 0];
        }
    }
    assert_eq!(text::parse(bytes, path()).unwrap(), wanted);
}

#[test]
fn what_has_happened_is_written_as_soon_as_it_can_be() {
    let steps = Steps::default();
    let store = store(&steps);
    store.change(|now| *now = state()).unwrap();
    steps.set_full(true);
    store.happened(|now| now.remove_job(0, true)).unwrap_err();
    store.change(|now| now.failed_syncs.clear()).unwrap_err();
    let mut wanted = state();
    wanted.remove_job(0, true);
    assert_eq!(store.state(), wanted);
    assert_eq!(super::tests::store(&steps).state(), state());
    steps.set_full(false);
    let job = Job {
        id: "l".to_owned(),
        ..job("j")
    };
    store.change(|now| drop(now.add_job(job.clone()))).unwrap();
    wanted.add_job(job).unwrap();
    assert_eq!(super::tests::store(&steps).state(), wanted);
    // Without another change it is at the end.
    steps.set_full(true);
    store.happened(|now| now.jobs.clear()).unwrap_err();
    steps.set_full(false);
    store.finish().unwrap();
    assert!(super::tests::store(&steps).state().jobs.is_empty());
}

#[test]
fn a_change_that_could_not_be_taken_back_is_with_the_next_one() {
    for next in [false, true] {
        let steps = Steps::default();
        let store = store(&steps);
        store.change(|now| *now = state()).unwrap();
        {
            // The new text has the name, and nothing can be done about it.
            let mut memory = steps.0.lock();
            memory.steps.clear();
            memory.fail_from = Some(3);
        }
        store.change(|now| now.jobs.clear()).unwrap_err();
        assert_eq!(store.state(), state());
        assert!(super::tests::store(&steps).state().jobs.is_empty());
        steps.0.lock().fail_from = None;
        match next {
            true => store.change(|_| ()).unwrap(),
            false => store.finish().unwrap(),
        }
        assert_eq!(super::tests::store(&steps).state(), state());
    }
}

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

/// Would catch a chain that is taken for one which a stream has let go of, though its file is in use
/// again.
#[test]
fn a_file_that_is_in_use_again_is_not_one_that_was_let_go_of() {
    let mut now = state();
    now.links[0].node = node("/disks/leaf.qcow2");
    now.links[0].identity = [8, 8];
    now.links[0].released_files = vec!["/disks/top.qcow2".to_owned(), "/disks/mid".to_owned()];
    now.remove_job(0, true);
    assert_eq!(now.links[0].released_files, ["/disks/mid"]);
    assert_eq!(now.links[1].node.file, "/disks/top.qcow2");
}

/// Would catch a result that is forgotten though the header may say that it is in force.
#[test]
fn what_a_failed_job_may_have_changed_stays_until_it_is_decided() {
    for in_force in [false, true] {
        let mut now = state();
        now.links.clear();
        let job = &mut now.jobs[0];
        job.end = None;
        job.commit.as_mut().unwrap().done = false;
        let (number, id) = (job.number, job.id.clone());
        now.remove_job(number, false);
        assert!(now.job_named(&id).is_none());
        assert!(now.job_mut(number).unwrap().commit.is_some());
        assert_eq!(now.links, []);
        now.decide(number, in_force);
        assert!(now.job_mut(number).is_none());
        assert_eq!(now.links.len(), usize::from(in_force));
    }
}

/// What would be caught: a start that looks for an image of which a stream has let go, since another
/// image has its path; and one that looks for what an earlier stream into the same image let go of.
#[test]
fn what_was_let_go_of_stays_so() {
    let of = |file: &str, identity: u64, released: &[&str]| Link {
        node: node(file),
        identity: [identity, 1],
        below: None,
        released: released.iter().map(|file| format!("node {file}")).collect(),
        released_files: released.iter().map(|&file| file.to_owned()).collect(),
        ..link()
    };
    let mut now = State::default();
    now.put_link(of("/disks/a", 1, &[]));
    now.put_link(of("/disks/t", 2, &["/disks/a"]));
    now.put_link(of("/disks/a", 3, &[]));
    let found: Vec<_> = (now.links.iter())
        .map(|link| (&*link.node.file, link.identity[0], link.let_go))
        .collect();
    let expected = [
        ("/disks/a", 1, true),
        ("/disks/t", 2, false),
        ("/disks/a", 3, false),
    ];
    assert_eq!(found, expected);
    assert!(now.links[1].released_files.is_empty());

    let mut now = State::default();
    now.put_link(of("/disks/t", 2, &["/disks/m", "/disks/a"]));
    let below = Some(Below {
        node: Node {
            name: Some("node /disks/a".to_owned()),
            ..node("/disks/a")
        },
        open_as: "/disks/a".to_owned(),
    });
    now.put_link(Link {
        below,
        ..of("/disks/t", 2, &["/disks/b"])
    });
    let [link] = &now.links[..] else {
        panic!("{:?}", now.links)
    };
    assert_eq!(link.released_files, ["/disks/b", "/disks/m"]);
    assert_eq!(link.released, ["node /disks/b", "node /disks/m"]);
}

/// What would be caught: a guest that is put on an image that it has left, or is kept from one that it
/// has come back to.
#[test]
fn a_guest_is_on_one_image_at_a_time() {
    let node = |file: &str| Node {
        name: None,
        format: "qcow2".to_owned(),
        file: file.to_owned(),
    };
    let moved = |from: &str, to: &str| Moved {
        from: node(from),
        identity: [0, 0],
        to: node(to),
        to_identity: [0, 0],
        left: None,
    };
    let mut state = State::default();
    state.put_moved(moved("/top", "/mid"));
    state.put_moved(moved("/mid", "/base"));
    let target = |state: &State, file: &str| {
        let moved = state.moved_from((file, [0, 0]))?;
        Some(moved.to.file.clone())
    };
    assert_eq!(target(&state, "/top").as_deref(), Some("/mid"));
    assert_eq!(target(&state, "/mid").as_deref(), Some("/base"));
    assert_eq!(target(&state, "/base"), None);
    // A new image has the name of the old one, and is committed as well.
    state.put_moved(moved("/top", "/base"));
    assert_eq!(state.moved.len(), 2);
    assert_eq!(target(&state, "/top").as_deref(), Some("/base"));
    // What it has left is kept with where it went, and other records stay as they are.
    state.keep_left(&moved("/top", "/base"), vec![[1, 2]]);
    state.keep_left(&moved("/mid", "/top"), vec![[3, 4]]);
    let left: Vec<_> = state.moved.iter().map(|moved| moved.left.clone()).collect();
    assert_eq!(left, [None, Some(vec![[1, 2]])]);
    // It was put back on the image that it had left.
    state.put_moved(moved("/other", "/mid"));
    assert_eq!(target(&state, "/mid"), None);
    let text = text::write(&state);
    assert_eq!(text::parse(&text, path()).unwrap(), state);
}
