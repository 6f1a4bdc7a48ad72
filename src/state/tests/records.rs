//! What would be caught: what was let go of and counts again; what a failed job may have changed and
//! nobody looks at; a guest that is recorded to be on two images.

use super::*;

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
