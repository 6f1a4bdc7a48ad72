//! The device as a guest sees it, driven by the `virtio-driver` crate: a front-end and a driver
//! that others wrote.

mod export_common;

use export_common::*;
use rand::prelude::*;
use stratablk::storage::file::OpenFlags;

fn writable_file(place: &Place, size: u64) -> std::path::PathBuf {
    let path = place.file("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Catches: data that goes to the wrong place, or does not arrive, on either path.
#[test]
fn what_is_written_is_read_back_and_stands_in_the_file() {
    let place = Place::new();
    let path = writable_file(&place, 8 << 20);
    let root = file_root(
        &path,
        OpenFlags {
            writable: true,
            ..OpenFlags::default()
        },
    );
    let export = start(place.config(), root);
    let mut guest = Guest::connect(&place.socket(), 1);
    let out = guest.memory.part(0, 65536);
    let back = guest.memory.part(65536, 65536);
    rand::rng().fill_bytes(out);
    assert_eq!(guest.run(0, |q| q.write(1 << 20, out, 1)), 0);
    assert_eq!(guest.run(0, |q| q.read(1 << 20, back, 2)), 0);
    assert_eq!(out, back);
    assert_eq!(guest.run(0, |q| q.flush(3)), 0);
    let file = std::fs::read(&path).unwrap();
    assert_eq!(&file[1 << 20..(1 << 20) + 65536], out);
    assert_eq!(&file[..1 << 20], vec![0; 1 << 20]);
    drop(guest);
    export.shutdown();
    assert!(!place.socket().exists());
}
