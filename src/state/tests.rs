//! What would be caught: a state that is half the old and half the new one after a kill or a power
//! cut between any two steps, or is lost; a change that fails and leaves a trace; a file of a newer
//! program that is overwritten, an older one that is refused, a damaged one that is dropped.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::record::*;
use super::testing::*;
use super::*;

mod locks;
mod records;

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
        filter: Some("filter".into()),
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
        made: vec![Made {
            node: link().node,
            identity: [5, 6],
            open_as: json!({"driver": "qcow2", "file": {"driver": "file", "filename": "/n"}}),
            below: link().node,
            below_identity: [3, 4],
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
    assert_eq!(text::VERSION, 4);
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
    wanted.made.clear();
    let link = |link: &mut Link| {
        link.identity = [0, 0];
        link.released_files.clear();
    };
    wanted.links.iter_mut().for_each(link);
    for job in &mut wanted.jobs {
        job.filter = None;
        link(&mut job.commit.as_mut().unwrap().link);
        if let Work::Stream(stream) = &mut job.work {
            stream.identity = [0, 0];
        }
    }
    assert_eq!(text::parse(bytes, path()).unwrap(), wanted);
}

/// Records of version 3 that were written before it was recorded that an image below is closed.
#[test]
fn tops_without_the_mark_of_a_closed_image_are_read() {
    let mut wanted = state();
    assert!(!wanted.tops.is_empty());
    let mut value = serde_json::to_value(&wanted).unwrap();
    for top in value["tops"].as_array_mut().unwrap() {
        top.as_object_mut().unwrap().remove("closed").unwrap();
    }
    wanted.tops.iter_mut().for_each(|top| top.closed = true);
    assert_eq!(text::parse(&written(3, &value), path()).unwrap(), wanted);
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
