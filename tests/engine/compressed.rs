//! Compressed clusters that several want at once.
//!
//! What would be caught: each of them reading and decompressing the cluster for itself.

use std::rc::Rc;
use std::sync::Arc;

use stratablk::format::{Format, Place, Qcow2, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::FileStorage;
use stratablk::storage::OpenFlags;

use crate::support::run;

#[test]
fn a_cluster_is_read_once_for_all_who_want_it() {
    // Not in memory, where reads are done in line and nobody meets anybody.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (raw, path) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    std::fs::write(&raw, [7; 65536]).unwrap();
    let names = [raw.to_str().unwrap(), path.to_str().unwrap()];
    run(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", names[0], names[1]],
    );
    let storage = Arc::new(FileStorage::open(&path, OpenFlags::default()).unwrap());
    let reactor = Reactor::for_this_thread().unwrap();
    let image = reactor.block_on(async {
        let image = Qcow2::open(storage, qcow2::Options::default()).await;
        let image = Format::Qcow2(Arc::new(image.unwrap()));
        image.load(0).await.unwrap();
        image
    });
    let Place::Compressed(compressed) = image.map(0, 1).place else {
        panic!("the cluster is not compressed");
    };
    let Format::Qcow2(image) = image else {
        panic!("another format");
    };
    let answers = Rc::new(std::cell::Cell::new(0));
    for _ in 0..16 {
        let (image, answers) = (image.clone(), answers.clone());
        reactor.spawn(async move {
            let cluster = image.decompress(compressed).await.unwrap();
            assert!(cluster.iter().all(|&byte| byte == 7) && cluster.len() == 65536);
            answers.set(answers.get() + 1);
        });
    }
    while reactor.tasks() > 0 {
        if !reactor.turn() {
            reactor.wait(None);
        }
        assert!(reactor.in_flight() <= 1, "the cluster is read again");
    }
    assert_eq!(answers.get(), 16);
}
