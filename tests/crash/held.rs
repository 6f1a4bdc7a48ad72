//! Requests that keep the chain of before a stream's end, and go on when others have used the new
//! one.
//!
//! What would be caught: bytes of a base that has been let go of, read or copied up over a discard
//! or a write of zeros that had completed; the same after several ends in a row, of which only the
//! oldest chain still has requests; a disk that gives no space back any more once they are gone.

use std::path::PathBuf;
use std::rc::Rc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use stratablk::chain::{Chain, Layer, Span, View};
use stratablk::error::Result;
use stratablk::format::{Format, Place, Qcow2};
use stratablk::graph::Graph;
use stratablk::graph::{Node, Role};
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs};

use crate::disk::{Below, Disk, Recipe, read_all, write};
use crate::history::{SECTOR, fill, stamp_of};
use crate::machine::Machine;
use crate::workload::Work;
use crate::{alone, seed};

/// The cluster that is worked on: eight sectors that the base has.
const START: usize = 40;
const END: usize = 48;
/// What the guest writes there before it clears it.
const WRITTEN: u32 = 0xb000_0000;
/// What the old request writes, into one sector.
const LATE: u32 = 0xc000_0000;
const LATE_AT: usize = START + 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clear {
    Discard,
    Unmap,
    Zero,
}

/// What a request with an old chain does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    Read,
    Write,
    /// What copy-on-read and jobs do.
    Copy,
    Discard,
    Zero,
}

/// Nodes for the layers of a chain, `n0` on top.
fn graph_of(chain: &Chain) -> Graph {
    let graph = Graph::default();
    let count = chain.layers().len();
    for (index, layer) in chain.layers().iter().enumerate().rev() {
        let name = format!("n{index}");
        let value = json!({"driver": "raw", "node-name": name,
            "file": {"driver": "file", "filename": "machine"}});
        let below = (index + 1 < count).then(|| format!("n{}", index + 1));
        let layer = Layer {
            name,
            ..Layer::clone(layer)
        };
        let options = BlockdevOptions::from_value(&value, Dialect::Json).unwrap();
        let node = Node::new(options, layer, PathBuf::from("machine"));
        let node = node.over(Role::Backing, below.as_deref());
        graph.add(node).unwrap();
    }
    graph
}

fn image(view: &View) -> &Qcow2 {
    match &view.chain.top().format {
        Format::Qcow2(image) => image,
        _ => panic!("the top layer is qcow2"),
    }
}

/// Copies what is above layer `end` into the top, and lets go of all that lies between.
async fn stream(graph: &Graph, view: &Rc<View>, end: usize, base: Option<&str>) -> Result<()> {
    let size = view.chain.size();
    view.copy(Span::new(0, end), 0, size).await?;
    // The name in the header does not matter here: nobody opens it again.
    if base.is_none() {
        image(view).set_backing(None).await?;
    }
    graph.set_backing("n0", base)
}

async fn clear(view: Rc<View>, how: Clear) -> Result<()> {
    let (at, len) = ((START * SECTOR) as u64, ((END - START) * SECTOR) as u64);
    match how {
        Clear::Discard => view.discard(at, len).await,
        Clear::Unmap => view.write_zeroes(at, len, true).await,
        Clear::Zero => view.write_zeroes(at, len, false).await,
    }
}

/// What the sectors of the cluster hold, by `view`.
async fn stamps(view: &Rc<View>) -> Result<Vec<Option<u32>>> {
    let len = (END - START) * SECTOR;
    let buffer = AlignedBuf::zeroed(len);
    // SAFETY: `buffer` outlives the read.
    let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
    Rc::clone(view).read((START * SECTOR) as u64, bufs).await?;
    Ok(buffer.chunks(SECTOR).map(stamp_of).collect())
}

async fn perform(view: &Rc<View>, late: Late) -> Result<()> {
    let at = (LATE_AT * SECTOR) as u64;
    match late {
        Late::Read => Ok(()),
        Late::Write => {
            let mut buffer = AlignedBuf::zeroed(SECTOR);
            fill(&mut buffer, LATE);
            // SAFETY: `buffer` outlives the write.
            let bufs = unsafe { IoBufs::of(&buffer, 0, SECTOR) };
            Rc::clone(view).write(at, bufs).await
        }
        Late::Copy => {
            let span = Span::new(0, view.chain.layers().len());
            view.copy(span, at, SECTOR as u64).await.map(drop)
        }
        Late::Discard => clear(view.clone(), Clear::Discard).await,
        Late::Zero => clear(view.clone(), Clear::Zero).await,
    }
}

/// The chain ends twice where it has two layers below, and each of its old chains in `held` still
/// has a request.
fn late_request(disk: &Disk, held: &[bool], how: Clear, late: Late) {
    let context = format!("{:?}: {how:?}, then {late:?} of {held:?}", disk.recipe);
    let reactor = Reactor::for_this_thread().unwrap();
    let machine = Machine::new(&disk.files);
    let _alone = alone();
    let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
    let graph = graph_of(&opened.chain);
    drop(opened);
    let root = graph.root("n0").unwrap();
    let mut old = Vec::new();
    for (end, &held) in held.iter().enumerate() {
        let view = View::of(root.chain());
        let last = view.chain.layers().len() - 1;
        let base = (end + 1 < held_ends(disk)).then(|| format!("n{}", last - end));
        let stop = if base.is_some() { last } else { last + 1 };
        reactor
            .block_on(stream(&graph, &view, stop, base.as_deref()))
            .unwrap();
        if held {
            old.push(view);
        }
    }
    // Published once more, as it is.
    let layer = graph.node("n0").unwrap().layer;
    graph.replace_layer("n0", layer).unwrap();
    let new = root.chain();
    assert_eq!(new.layers().len(), 1, "{context}");
    write(&reactor, &new, START, END - START, WRITTEN).unwrap();
    reactor.block_on(clear(View::of(new.clone()), how)).unwrap();
    reactor.block_on(new.flush()).unwrap();

    let sector = |index: usize| START + index;
    let allowed = |index: usize, stamp: Option<u32>| match stamp {
        Some(0) => true,
        Some(stamp) if sector(index) == LATE_AT && late == Late::Write => stamp == LATE,
        // A discard may leave what was there.
        Some(stamp) => how == Clear::Discard && stamp == WRITTEN + index as u32,
        None => false,
    };
    for view in &old {
        reactor.block_on(perform(view, late)).unwrap();
        let seen = reactor.block_on(stamps(view)).unwrap();
        for (index, stamp) in seen.into_iter().enumerate() {
            let sector = sector(index);
            assert!(
                allowed(index, stamp),
                "{context}: the old chain reads {stamp:x?} in sector {sector}"
            );
        }
    }
    let seen = read_all(&reactor, &new).unwrap();
    for (index, &stamp) in seen[START..END].iter().enumerate() {
        let sector = sector(index);
        assert!(
            allowed(index, stamp),
            "{context}: sector {sector} reads {stamp:x?}"
        );
    }
    if late == Late::Write {
        assert_eq!(seen[LATE_AT], Some(LATE), "{context}");
    }
    for (sector, &stamp) in seen.iter().enumerate() {
        let expected = Some(disk.first[sector]);
        assert!(
            (START..END).contains(&sector) || stamp == expected,
            "{context}: sector {sector} reads {stamp:x?}, expected {expected:x?}"
        );
    }
    // Their requests have ended: clusters are given back again.
    drop(old);
    reactor
        .block_on(clear(View::of(new.clone()), Clear::Discard))
        .unwrap();
    let place = |sector: usize| new.top().map_loaded((sector * SECTOR) as u64, 512);
    let extent = reactor.block_on(place(START)).unwrap();
    assert_eq!(extent.place, Place::Below, "{context}: is kept for ever");
}

/// How often the chain of a disk can end.
fn held_ends(disk: &Disk) -> usize {
    match disk.recipe.below {
        Below::Qcow2 => 2,
        _ => 1,
    }
}

fn every_late_request(options: &'static str, below: Below) {
    let recipe = Recipe {
        below,
        ..Recipe::new(options, 128)
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path(), recipe);
    let held: &[&[bool]] = match below {
        Below::Qcow2 => &[&[true, false], &[false, true], &[true, true]],
        _ => &[&[true]],
    };
    for held in held {
        for how in [Clear::Discard, Clear::Unmap, Clear::Zero] {
            for late in [
                Late::Read,
                Late::Write,
                Late::Copy,
                Late::Discard,
                Late::Zero,
            ] {
                late_request(&disk, held, how, late);
            }
        }
    }
}

#[test]
fn a_late_request_reads_no_base() {
    every_late_request("cluster_size=4k", Below::Raw);
}

#[test]
fn a_late_request_reads_no_base_without_zero_clusters() {
    every_late_request("cluster_size=4k,compat=0.10", Below::Raw);
}

#[test]
fn a_late_request_reads_no_base_into_subclusters() {
    every_late_request("cluster_size=16k,extended_l2=on", Below::Raw);
}

#[test]
fn a_late_request_of_two_ends_ago() {
    every_late_request("cluster_size=4k", Below::Qcow2);
    every_late_request("cluster_size=4k,compat=0.10", Below::Qcow2);
}

/// Guests with old chains and new ones work beside each other, in random order.
#[test]
fn guests_of_old_and_new_chains() {
    let seed = seed();
    println!("STRATABLK_SEED={seed}");
    for (round, options) in [
        "cluster_size=4k",
        "cluster_size=4k,compat=0.10",
        "cluster_size=16k,extended_l2=on",
    ]
    .into_iter()
    .cycle()
    .take(12)
    .enumerate()
    {
        let seed = seed.wrapping_add(round as u64);
        let recipe = Recipe {
            below: Below::Qcow2,
            filled: 100,
            ..Recipe::new(options, 256)
        };
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::make(dir.path(), recipe);
        let reactor = Reactor::for_this_thread().unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let machine = Machine::new(&disk.files);
        let _alone = alone();
        let opened = reactor.block_on(disk.open(&machine, true)).unwrap();
        let work = Work::new(opened.chain, disk.first.clone(), seed, Box::new(|| 0));
        work.keep_views.set(true);
        work.spawn_stream(&reactor, 2);
        for _ in 0..5 {
            work.spawn_guest(&reactor, 80);
        }
        machine.run(&reactor, &mut rng);
        let used = work.end_kept_views();
        assert!(used > 20, "seed {seed}: {used} requests had the old chain");
        let chain = work.chain.borrow().clone();
        reactor.block_on(opened.image.close()).unwrap();
        let history = work.history.borrow();
        for (sector, stamp) in read_all(&reactor, &chain).unwrap().into_iter().enumerate() {
            let possible = history.visible(sector);
            assert!(
                stamp.is_some_and(|stamp| possible.contains(&stamp)),
                "STRATABLK_SEED={seed}: {options}: sector {sector} reads {stamp:x?}, possible are \
                 {possible:x?}"
            );
        }
    }
}
