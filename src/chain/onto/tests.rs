//! What would be caught: bytes of a commit that do not arrive, or arrive at another place; a disk that
//! reads differently while a copy goes on, or after a part of it; what a base has of its own and loses;
//! zeros that become data, or data of the base that comes to light; layers that are shorter or longer
//! than those under them; compressed clusters, windows, external data files and blocks that are copied
//! as if they were none.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::chain::{Chain, Layer, Root, Span};
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::qcow2::{self, Backing};
use crate::format::{Format, Qcow2, Raw};
use crate::reactor::Reactor;
use crate::storage::fault::FaultStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::{AlignedBuf, Storage, Window};

/// How a layer is laid out.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Raw,
    /// A part of a file.
    Window,
    /// A file with blocks of 4 KiB.
    Blocks,
    /// Version, cluster size, subclusters.
    Qcow2(u32, u64, bool),
    /// With a file of its own for data.
    DataFile,
}

fn images() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Qcow2(3, 4096, false)),
        Just(Kind::Qcow2(3, 512, false)),
        Just(Kind::Qcow2(3, 16 << 10, true)),
        Just(Kind::Qcow2(2, 16 << 10, false)),
        Just(Kind::DataFile),
    ]
}

fn bases() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Raw),
        Just(Kind::Window),
        Just(Kind::Blocks),
        images(),
    ]
}

fn now<T>(future: impl Future<Output = T>) -> T {
    Reactor::for_this_thread().unwrap().block_on(future)
}

/// An empty layer of `size` bytes.
fn layer(kind: Kind, size: u64, backed: bool) -> Arc<Layer> {
    let memory = |len: u64| Arc::new(MemoryStorage::new(vec![0; len as usize]));
    let raw = Format::Raw(Raw::new(size));
    let image = |options: &CreateOptions, data: Option<Arc<dyn Storage>>| {
        let storage = Arc::new(MemoryStorage::new(Vec::new()));
        now(create(&*storage, options)).unwrap();
        let opened = qcow2::Options {
            writable: true,
            discard: true,
            ..Default::default()
        };
        let image = now(Qcow2::open_with_data(storage, data, opened)).unwrap();
        let storage = image.data_storage().clone();
        (Format::Qcow2(Arc::new(image)), storage)
    };
    let options = CreateOptions {
        backing: backed.then(|| Backing {
            name: "below".into(),
            format: Some("raw".into()),
        }),
        ..CreateOptions::new(size)
    };
    let (format, storage): (Format, Arc<dyn Storage>) = match kind {
        Kind::Raw => (raw, memory(size)),
        Kind::Window => {
            let window = Window::of(memory(size + 3072), 1024, Some(size));
            (raw, now(window).unwrap())
        }
        Kind::Blocks => {
            let blocks = FaultStorage::over(memory(size)).with_blocks(512, 4096);
            (raw, Arc::new(blocks))
        }
        Kind::Qcow2(version, cluster_size, extended_l2) => image(
            &CreateOptions {
                version,
                cluster_size,
                extended_l2,
                ..options
            },
            None,
        ),
        Kind::DataFile => image(
            &CreateOptions {
                cluster_size: 4096,
                data_file: Some("data".into()),
                ..options
            },
            Some(memory(size)),
        ),
    };
    Arc::new(Layer {
        name: "layer".into(),
        format,
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    })
}

fn root(layers: &[Arc<Layer>]) -> Arc<Root> {
    Root::new(Chain::new(layers.to_vec()).unwrap())
}

fn read(root: &Root) -> Vec<u8> {
    let buffer = AlignedBuf::zeroed(root.chain().size() as usize);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    now(View::of(root.chain()).read(0, bufs)).unwrap();
    buffer.to_vec()
}

/// What is done to a layer: where, how long, what.
type Change = (prop::sample::Index, u64, u8);

/// Makes changes of a disk, in blocks of 4 KiB if its base has these.
fn change(root: &Root, changes: &[Change], block: u64) {
    let size = root.chain().size();
    for (place, len, what) in changes {
        let at = place.index((size / block) as usize) as u64 * block;
        let len = (len * 512).next_multiple_of(block).min(size - at);
        let view = View::of(root.chain());
        let compressed = async |bytes: &[u8]| {
            let chain = root.chain();
            let Format::Qcow2(image) = &chain.top().format else {
                return false;
            };
            let cluster = image.cluster_size();
            let at = at / cluster * cluster;
            if at + cluster > size || image.header().has_data_file() {
                return false;
            }
            let bytes = bytes.repeat(cluster as usize);
            let _claim = image.claim(at, cluster).await;
            image.write_compressed(at, &bytes).await.unwrap()
        };
        match what {
            0 => now(view.write_zeroes(at, len, true)).unwrap(),
            1 => now(view.discard(at, len)).unwrap(),
            2..5 if now(compressed(&[*what])) => {}
            what => {
                let buffer = AlignedBuf::copy_of(&vec![*what; len as usize]);
                // SAFETY: `buffer` outlives the write.
                let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
                now(view.write(at, bufs)).unwrap();
            }
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec((any::<prop::sample::Index>(), 1u64..60, 0u8..20), 0..12)
}

#[derive(Clone, Debug)]
struct Plan {
    base: Kind,
    between: [Kind; 2],
    /// In units of 4 KiB.
    sizes: [u64; 4],
    changes: [Vec<Change>; 4],
    /// Copied before the rest, in this order.
    first: Vec<(prop::sample::Index, u64)>,
    /// Whether something lies under the base.
    deeper: bool,
}

fn plans() -> impl Strategy<Value = Plan> {
    let sizes = [10u64..60, 10..60, 10..60, 10..60];
    let changes = [changes(), changes(), changes(), changes()];
    let first = prop::collection::vec((any::<prop::sample::Index>(), 1u64..100), 0..5);
    let kinds = (bases(), [images(), images()]);
    (kinds, sizes, changes, first, any::<bool>()).prop_map(
        |((base, between), sizes, changes, first, deeper)| Plan {
            base,
            between,
            sizes,
            changes,
            first,
            deeper,
        },
    )
}

/// Commits two layers between an overlay and a base.
fn commit(plan: &Plan) {
    let Plan { base, between, .. } = plan;
    let block = match base {
        Kind::Blocks => 4096,
        _ => 512,
    };
    let [top, mid, over] = [1, 2, 3].map(|at| plan.sizes[at] * 4096);
    // A base that is shorter is made longer before anything is copied.
    let size = (plan.sizes[0] * 4096).max(top);
    let deepest = layer(Kind::Raw, size + 4096, false);
    let is_raw = matches!(base, Kind::Raw | Kind::Window | Kind::Blocks);
    let deeper = plan.deeper && !is_raw;
    let mut layers = match deeper {
        true => vec![deepest],
        false => Vec::new(),
    };
    if deeper {
        change(&root(&layers), &plan.changes[3], block);
    }
    let kinds = [
        (*base, size),
        (between[0], mid),
        (between[1], top),
        (Kind::Qcow2(3, 4096, false), over),
    ];
    for ((kind, size), changes) in kinds.into_iter().zip(&plan.changes) {
        layers.insert(0, layer(kind, size, !layers.is_empty()));
        change(&root(&layers), changes, block);
    }
    let (whole, source, target) = (root(&layers), root(&layers[1..]), root(&layers[3..]));
    let (before, below) = (read(&whole), read(&target));
    let copy = |at: u64, len: u64| {
        let (source, target) = (View::of(source.chain()), View::of(target.chain()));
        now(source.copy_onto(2, &target, (at, len), None)).unwrap()
    };
    for (place, len) in &plan.first {
        let at = place.index((top / 512) as usize) as u64 * 512;
        copy(at, (len * 512).min(top - at));
        assert!(read(&whole) == before, "a part of a copy changes the disk");
    }
    copy(0, top);
    assert!(read(&whole) == before, "a copy changes the disk");
    assert!(
        read(&target)[top as usize..] == below[top as usize..],
        "what the base has behind the layers is its own"
    );
    // All that the layers hold is in the base: the overlay gets what only their ends said.
    let above = View::of(whole.chain());
    now(above.copy(Span::new(0, 3), top, over.saturating_sub(top))).unwrap();
    let after = root(&[&layers[..1], &layers[3..]].concat());
    let (after, before) = (read(&after), before);
    let differs = after
        .iter()
        .zip(&before)
        .position(|(one, other)| one != other);
    assert_eq!(differs, None, "without the layers the disk differs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_commit_keeps_all_that_is_read(plan in plans()) {
        commit(&plan);
        Reactor::leave_thread();
    }

    #[test]
    fn runs_end_where_units_do(
        zeros in prop::collection::vec(any::<bool>(), 1..40), offset in 0u64..16, unit in 1u64..5
    ) {
        let unit = unit * 512;
        let offset = offset * 512;
        let bytes: Vec<u8> = zeros.iter().flat_map(|zero| [u8::from(!zero); 512]).collect();
        let mut at = 0;
        for (start, end, zero) in runs(&bytes, offset, unit) {
            prop_assert_eq!(start, at);
            prop_assert!(!zero || bytes[start..end].iter().all(|byte| *byte == 0));
            let aligned = |at: usize| (offset + at as u64).is_multiple_of(unit);
            prop_assert!(start == 0 || aligned(start));
            at = end;
        }
        prop_assert_eq!(at, bytes.len());
    }
}

#[test]
fn zeros_take_no_room_and_what_was_not_written_is_not_copied() {
    let size = 1 << 20;
    let base = layer(Kind::Qcow2(3, 4096, false), size, false);
    let top = layer(Kind::Qcow2(3, 4096, false), size, true);
    let layers = [top, base];
    let (source, target) = (root(&layers), root(&layers[1..]));
    let zeros = AlignedBuf::zeroed(64 << 10);
    let data = AlignedBuf::copy_of(&[7; 8192]);
    for (at, buffer) in [(0, &zeros), (128 << 10, &data)] {
        // SAFETY: the buffers outlive the writes.
        let bufs = unsafe { IoBufs::of(buffer, 0, buffer.len()) };
        now(View::of(source.chain()).write(at, bufs)).unwrap();
    }
    now(View::of(source.chain()).write_zeroes(256 << 10, 4096, true)).unwrap();
    let (view, base) = (View::of(source.chain()), View::of(target.chain()));
    let copied = now(view.copy_onto(1, &base, (0, size), None)).unwrap();
    assert_eq!(copied.data, 8192);
    assert_eq!(copied.zero, (64 << 10) + 4096);
    Reactor::leave_thread();
}
