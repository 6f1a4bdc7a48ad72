//! Space reserved behind the end of the file. What would be caught: space that is never given
//! back, an image that grows by a step with every kill, data cut off with what is given back.

use std::sync::Arc;

use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;

use crate::support::*;

#[test]
fn what_is_reserved_and_not_used_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "cluster_size=64k", 16 << 20);
    let reactor = Reactor::for_this_thread().unwrap();
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
    let mut longest = 0;
    for kill in 0..8u8 {
        let (_, chain) = open_memory(&reactor, &storage);
        write_value(&reactor, &chain, u64::from(kill) << 16, 65_536, kill + 1).unwrap();
        reactor.block_on(chain.flush()).unwrap();
        longest = storage.snapshot().len();
        // No close: as after a kill.
    }
    assert!(
        longest < 4 << 20,
        "{longest} bytes: each start reserved anew behind the last"
    );
    let (image, chain) = open_memory(&reactor, &storage);
    write_value(&reactor, &chain, 8 << 16, 65_536, 9).unwrap();
    reactor.block_on(image.close()).unwrap();
    assert!(storage.snapshot().len() < longest, "nothing was given back");
    std::fs::write(&path, storage.snapshot()).unwrap();
    check(&path, false);
    let mut expected = vec![0; 16 << 20];
    for index in 0..9 {
        expected[index << 16..][..65_536].fill(index as u8 + 1);
    }
    compare(&path, "qcow2", &expected);
}
