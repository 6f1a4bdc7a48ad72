//! What would be caught: a disk whose holes are told as data, so that a stream copies zeros and a
//! check reads tables that are not there; data, or what cannot be told, that is told as a hole; a
//! walk without an end.

use super::super::super::{CopyStatus, Span};
use super::*;

const KIB: u64 = 1 << 10;
const C: u64 = CLUSTER as u64;

fn data_of(disk: &dyn Storage) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = now(disk.next_data(at)) {
        assert!(start >= at && end > start, "{start}..{end} from {at} on");
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
        at = end;
    }
    found
}

/// An image over a raw base that has data from 1 MiB to 1.5 MiB. In the image are two clusters of
/// data, and one of zeros in front of the base's.
fn sparse() -> (Arc<MemoryStorage>, Arc<Root>) {
    let bottom = Arc::new(MemoryStorage::new(Vec::new()));
    let file: Arc<dyn Storage> = bottom.clone();
    let made = new_image(&file, INNER, |_| ());
    let mut bytes = vec![0; INNER as usize];
    bytes[1 << 20..1536 << 10].fill(9);
    let base = FaultStorage::over(Arc::new(MemoryStorage::new(bytes)));
    let base = base.with_data(1 << 20..1536 << 10);
    let top = made.chain().top().clone();
    let below: Arc<dyn Storage> = Arc::new(base);
    let disk = root(vec![
        (top.format.clone(), top.storage.clone()),
        (Format::Raw(Raw::new(INNER)), below),
    ]);
    write(&disk, C, &[1; CLUSTER]).unwrap();
    write(&disk, 3 << 20, &[2; CLUSTER]).unwrap();
    let view = View::of(disk.chain());
    let zeros = view.write_zeroes((1 << 20) + C, C, true);
    reactor().block_on(zeros).unwrap();
    (bottom, disk)
}

#[test]
fn holes_of_the_disk_below_are_holes() {
    let (_bottom, inner) = sparse();
    let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner.clone()).unwrap());
    let expected = [
        (C, 2 * C),
        (1 << 20, (1 << 20) + C),
        ((1 << 20) + 2 * C, 1536 << 10),
        (3 << 20, (3 << 20) + C),
    ];
    assert_eq!(data_of(&*disk), expected);
    // Within data, within a hole, and where nothing follows.
    assert_eq!(now(disk.next_data(C + 5)), Some((C + 5, 2 * C)));
    assert_eq!(now(disk.next_data(2 * C + 5)).unwrap().0, 1 << 20);
    for end in [(3 << 20) + C, INNER - 1, INNER, INNER + 1, u64::MAX] {
        assert_eq!(now(disk.next_data(end)), None, "{end}");
    }
    // A window of it has the part that is in it.
    let window = window_of(disk, C + 512, INNER / 2);
    assert_eq!(data_of(&*window)[0], (0, C - 512));
    assert_eq!(data_of(&*window)[1].0, (1 << 20) - C - 512);

    // A stream copies what is data, and nothing else.
    let bottom: Arc<dyn Storage> = Arc::new(MemoryStorage::new(Vec::new()));
    let top = new_image(&bottom, INNER, |_| ()).chain().top().clone();
    let disk: Arc<dyn Storage> = Arc::new(Backed::new(inner).unwrap());
    let outer = root(vec![
        (top.format.clone(), top.storage.clone()),
        (Format::Raw(Raw::new(INNER)), disk),
    ]);
    let chain = outer.chain();
    let status = |at| {
        let status = chain.status(Span::new(0, 2).sparse(), at, C);
        reactor().block_on(status).unwrap()
    };
    assert_eq!(status(0), (CopyStatus::Zero, C));
    assert_eq!(status(C), (CopyStatus::Data, C));
    assert_eq!(status((1 << 20) + C), (CopyStatus::Zero, C));
    assert_eq!(status(2 << 20), (CopyStatus::Zero, C));
    Reactor::leave_thread();
}

/// Compressed clusters, and tables that cannot be read.
#[test]
fn what_is_not_known_to_be_zeros_is_data() {
    let (bottom, inner) = sparse();
    flush(&inner).unwrap();
    let image = bottom.snapshot();
    drop(inner);
    let bottom = Arc::new(MemoryStorage::new(image));
    let anew = root(vec![image_in(bottom.clone())]);
    let disk = Backed::new(anew).unwrap();
    bottom.fail_after(0, libc::EIO);
    assert_eq!(now(disk.next_data(0)), Some((0, INNER)));
    bottom.fail_after(usize::MAX, 0);
    assert_eq!(now(disk.next_data(0)), Some((C, 2 * C)));
    Reactor::leave_thread();
}

/// A hole of more extents than are looked at is told in parts.
#[test]
fn a_long_hole_is_told_in_parts() {
    let bottom: Arc<dyn Storage> = Arc::new(MemoryStorage::new(Vec::new()));
    let size = 4 << 30;
    let inner = new_image(&bottom, size, |options| options.cluster_size = 4096);
    write(&inner, size - 4 * KIB, &[1; 4096]).unwrap();
    let disk = Backed::new(inner).unwrap();
    let mut at = 0;
    let mut parts = 0;
    while at < size - 4 * KIB {
        let (start, _) = now(disk.next_data(at)).unwrap();
        assert!(start > at, "no way on from {at}");
        at = start;
        parts += 1;
    }
    assert_eq!(at, size - 4 * KIB);
    assert!((2..=8).contains(&parts), "{parts}");
    Reactor::leave_thread();
}
