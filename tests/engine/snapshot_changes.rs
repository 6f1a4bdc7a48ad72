//! What snapshots find in an image on the way.
//!
//! What would be caught: clusters that leak where the refcount table becomes longer for a snapshot.

use std::sync::Arc;
use std::time::SystemTime;

use stratablk::error::Result;
use stratablk::format::qcow2::Qcow2;
use stratablk::format::qcow2::check::{self, Summary};
use stratablk::format::qcow2::create::{CreateOptions, create};
use stratablk::format::qcow2::snapshots::change::Prepared;
use stratablk::reactor::Reactor;
use stratablk::storage::memory::MemoryStorage;

use crate::support::*;

fn made(reactor: &Reactor, options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new(Vec::new()));
    reactor.block_on(create(&*storage, options)).unwrap();
    storage
}

fn take(reactor: &Reactor, image: &Arc<Qcow2>, name: &str) -> Result<Prepared> {
    let names = [name.to_owned()];
    reactor.block_on(image.take_snapshots(&names, SystemTime::UNIX_EPOCH))
}

fn checked(reactor: &Reactor, bytes: Vec<u8>) -> Summary {
    let storage = MemoryStorage::new(bytes);
    let told = &mut |finding| println!("{finding}");
    reactor.block_on(check::check(&storage, told)).unwrap()
}

#[test]
fn a_refcount_table_that_grows_for_a_snapshot_leaves_nothing_behind() {
    // The table of one cluster counts 4096 clusters. It becomes too short in the midst of what a
    // snapshot allocates, each time at another place.
    const CLUSTER: u64 = 512;
    const BEFORE: u64 = 3700;
    let reactor = Reactor::for_this_thread().unwrap();
    let options = CreateOptions {
        cluster_size: CLUSTER,
        refcount_bits: 64,
        ..CreateOptions::new(4 << 20)
    };
    let storage = made(&reactor, &options);
    let (image, chain) = open_memory(&reactor, &storage);
    let len = (BEFORE * CLUSTER) as usize;
    write_value(&reactor, &chain, 0, len, 1).unwrap();
    drop(chain);
    reactor.block_on(image.close()).unwrap();
    let bytes = storage.snapshot();
    let mut grown = 0;
    for more in (5..270).step_by(5) {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let (image, chain) = open_memory(&reactor, &storage);
        let len = (more * CLUSTER) as usize;
        write_value(&reactor, &chain, BEFORE * CLUSTER, len, 2).unwrap();
        let clusters = image.header().reftable_clusters;
        let prepared = take(&reactor, &image, "one").unwrap();
        reactor.block_on(prepared.take_effect().finish()).unwrap();
        grown += u32::from(image.header().reftable_clusters > clusters);
        drop(chain);
        reactor.block_on(image.close()).unwrap();
        let summary = checked(&reactor, storage.snapshot());
        assert!(summary.is_clean(), "{more} clusters: {summary:?}");
    }
    assert!(grown > 0, "no table has become longer for a snapshot");
}
