//! Claims, grace periods, entries of the mapping and the chain's root.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Waker};

use stratablk_model::chain::{Chain, Layer, Root, Tap, ViewCache};
use stratablk_model::disk::Disk;
use stratablk_model::error::Error;
use stratablk_model::format::qcow2::claims::Claims;
use stratablk_model::format::qcow2::journal::Recorded;
use stratablk_model::format::qcow2::l2::Slice;
use stratablk_model::format::qcow2::words::Words;
use stratablk_model::format::{Format, Raw};
use stratablk_model::grace::{EraCache, Grace, Users};
use stratablk_model::shuttle::future::block_on;
use stratablk_model::shuttle::thread;
use stratablk_model::sync;

use crate::{every_order, many_orders};

/// Threads that claim ranges, from start to end; each looks whether it is alone. Those that are not
/// patient give up waiting.
fn claim(ranges: &[(u64, u64, bool)]) {
    let claims = Arc::new(Claims::default());
    let held: Arc<Vec<AtomicBool>> = Arc::new((0..8).map(|_| AtomicBool::new(false)).collect());
    let threads: Vec<_> = ranges
        .iter()
        .map(|&(start, end, patient)| {
            let (claims, held) = (claims.clone(), held.clone());
            thread::spawn(move || {
                if !patient {
                    // Polled once, perhaps left waiting, and dropped.
                    let mut claim = pin!(claims.claim(start..end));
                    let _ = claim.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                    return;
                }
                let claim = block_on(claims.claim(start..end));
                let held = &held[start as usize..end as usize];
                for cluster in held {
                    assert!(!cluster.swap(true, Ordering::SeqCst), "claimed twice");
                }
                for cluster in held {
                    cluster.store(false, Ordering::SeqCst);
                }
                drop(claim);
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    // All are free again: this does not wait.
    let mut claim = pin!(claims.claim(0..8));
    let polled = claim.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_ready(), "a claim is left over");
}

#[test]
fn two_claims_in_every_order() {
    every_order(30_000, 100, || claim(&[(0, 3, true), (2, 4, true)]));
}

#[test]
fn a_claim_that_is_given_up_in_every_order() {
    every_order(20_000, 100, || {
        claim(&[(0, 3, true), (2, 4, false), (1, 5, true)]);
    });
}

#[test]
fn many_claims() {
    many_orders(3000, || {
        claim(&[
            (0, 3, true),
            (2, 6, true),
            (1, 2, true),
            (5, 8, false),
            (0, 8, true),
        ]);
    });
}

/// Threads that hold ranges of two disks, and write both: in different orders, unless they hold what they
/// write. One gives up waiting.
fn hold(ranges: &[(usize, usize, bool)]) {
    let root = Root::new(Arc::into_inner(chain(0)).unwrap());
    let tap = Tap::new(root);
    let disks: Arc<Vec<[AtomicUsize; 2]>> = Arc::new((0..8).map(|_| Default::default()).collect());
    let threads: Vec<_> = ranges
        .iter()
        .enumerate()
        .map(|(number, &(start, end, patient))| {
            let (tap, disks) = (tap.clone(), disks.clone());
            thread::spawn(move || {
                let range = start as u64..end as u64;
                if !patient {
                    let mut hold = pin!(tap.hold(range));
                    let _ = hold.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                    return;
                }
                let hold = block_on(tap.hold(range));
                for disk in 0..2 {
                    for byte in &disks[start..end] {
                        byte[disk].store(number + 1, Ordering::SeqCst);
                    }
                    thread::yield_now();
                }
                drop(hold);
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    for (at, [one, other]) in disks.iter().enumerate() {
        let [one, other] = [one, other].map(|disk| disk.load(Ordering::SeqCst));
        assert_eq!(one, other, "the disks differ at {at}");
    }
    // All is free again: this does not wait.
    let mut hold = pin!(tap.hold(0..8));
    let polled = hold.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_ready(), "a hold is left over");
}

#[test]
fn two_disks_stay_the_same_in_every_order() {
    every_order(30_000, 100, || hold(&[(0, 3, true), (2, 4, true)]));
}

#[test]
fn a_hold_that_is_given_up_in_every_order() {
    every_order(20_000, 100, || {
        hold(&[(0, 3, true), (2, 4, false), (1, 5, true)]);
    });
}

#[test]
fn many_holds() {
    many_orders(3000, || {
        hold(&[
            (0, 3, true),
            (2, 6, true),
            (1, 2, true),
            (5, 8, false),
            (0, 8, true),
        ]);
    });
}

/// A guest's write that the second disk fails, while a job turns to it. The guest is told that it is
/// done only where it is on the disk that counts, and one of both is told: the guest, or the job.
fn turn(writes: usize) {
    let root = Root::new(Arc::into_inner(chain(0)).unwrap());
    let tap = Tap::new(root);
    let counts = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..writes as u64)
        .map(|at| {
            let tap = tap.clone();
            thread::spawn(move || {
                let hold = block_on(tap.hold(at..at + 1));
                let failed = Err(Error::Invalid("the second disk".into()));
                block_on(tap.settle(hold, Ok(()), failed)).is_ok()
            })
        })
        .collect();
    let job = {
        let (tap, counts) = (tap.clone(), counts.clone());
        thread::spawn(move || {
            let mut copied = 0;
            while let Some(range) = tap.take_dirty(1) {
                copied += range.end - range.start;
            }
            if tap.begin_turn() {
                let turned = tap.is_clean();
                counts.store(turned, Ordering::SeqCst);
                tap.end_turn(turned);
            }
            copied
        })
    };
    let done = writers.into_iter().map(|t| t.join().unwrap());
    let done = done.filter(|done| *done).count() as u64;
    let copied = job.join().unwrap();
    if counts.load(Ordering::SeqCst) {
        assert_eq!(done, copied, "done, and not on the disk that counts");
    } else {
        assert_eq!(done, writes as u64, "its own disk has it");
        assert_eq!(copied + tap.dirty(), done, "nobody will copy it");
    }
}

#[test]
fn who_is_told_of_a_failure_in_every_order() {
    every_order(30_000, 100, || turn(1));
}

#[test]
fn who_is_told_of_several_failures() {
    many_orders(3000, || turn(3));
}

/// Readers look a value up and use it, each as a chain that begins to be a user of it and ends;
/// a writer replaces it and frees it when nobody can have it any longer.
fn retire(readers: usize, looks: usize, replacements: usize) {
    let users = Arc::new(Users::default());
    let current = Arc::new(sync::atomic::AtomicUsize::new(0));
    let freed: Arc<Vec<AtomicBool>> = Arc::new(
        (0..replacements)
            .map(|_| AtomicBool::new(false))
            .chain([AtomicBool::new(false)])
            .collect(),
    );
    let mut threads: Vec<_> = (0..readers)
        .map(|_| {
            let (users, current, freed) = (users.clone(), current.clone(), freed.clone());
            thread::spawn(move || {
                let grace = Arc::new(Grace::default());
                users.add(&grace);
                let mut eras = EraCache::default();
                for _ in 0..looks {
                    let era = eras.enter(&grace);
                    let value = current.load(Ordering::SeqCst);
                    thread::yield_now();
                    assert!(!freed[value].load(Ordering::SeqCst), "freed while in use");
                    drop(era);
                }
                eras.leave();
                users.remove(&grace);
            })
        })
        .collect();
    let writer = {
        let (users, freed) = (users.clone(), freed.clone());
        thread::spawn(move || {
            for value in 0..replacements {
                current.store(value + 1, Ordering::SeqCst);
                let freed = freed.clone();
                users.retire(move || freed[value].store(true, Ordering::SeqCst));
            }
        })
    };
    threads.push(writer);
    threads.into_iter().for_each(|t| t.join().unwrap());
    for value in 0..replacements {
        assert!(
            freed[value].load(Ordering::SeqCst),
            "{value} is never freed"
        );
    }
}

#[test]
fn what_is_retired_waits_for_its_readers_in_every_order() {
    every_order(30_000, 100, || retire(1, 1, 1));
}

#[test]
fn what_is_retired_waits_for_many_readers() {
    many_orders(4000, || retire(3, 3, 4));
}

/// What would be caught: an entry of which a reader gets one word as it was and the other one as it
/// is; together they may mean a place that was never the cluster's.
#[test]
fn words_of_an_entry_change_together() {
    many_orders(2000, || {
        let slice = Arc::new(Slice::from_bytes(&[0; 64], true));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let slice = slice.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        let words = slice.get(1);
                        assert_eq!(words.descriptor, words.bitmap, "the entry is torn");
                    }
                })
            })
            .collect();
        for value in 1..4 {
            let words = Words {
                descriptor: value,
                bitmap: value,
            };
            slice.set(1, words, &Recorded::of_no_image());
        }
        readers.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// A chain that is told by the name of its layer.
fn chain(number: usize) -> Arc<Chain> {
    let layer = Layer {
        name: number.to_string(),
        format: Format::Raw(Raw::new(512)),
        storage: Disk::new(vec![0; 512]),
        read_only: false,
        discard: false,
        copy_on_read: false,
    };
    Arc::new(Chain::new(vec![Arc::new(layer)]).unwrap())
}

/// Workers take views; a job publishes chains. Old chains go with their last request.
fn publish(workers: usize, requests: usize, chains: usize) {
    let first = chain(0);
    let mut old = vec![Arc::downgrade(&first)];
    let root = Root::new(Arc::into_inner(first).unwrap());
    old[0] = Arc::downgrade(&root.chain());
    let published = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let (root, published) = (root.clone(), published.clone());
            thread::spawn(move || {
                let mut views = ViewCache::new(root);
                for _ in 0..requests {
                    let least = published.load(Ordering::SeqCst);
                    let view = views.get();
                    thread::yield_now();
                    let seen: usize = view.chain.top().name.parse().unwrap();
                    assert!(seen >= least, "chain {seen} after {least} was published");
                }
                views.leave();
            })
        })
        .collect();
    for number in 1..=chains {
        let next = chain(number);
        old.push(Arc::downgrade(&next));
        root.publish(next);
        published.store(number, Ordering::SeqCst);
    }
    threads.into_iter().for_each(|t| t.join().unwrap());
    let last = old.pop().unwrap();
    assert!(last.upgrade().is_some());
    for chain in old {
        assert!(chain.upgrade().is_none(), "an old chain lives on");
    }
}

#[test]
fn the_chain_is_replaced_in_every_order() {
    every_order(20_000, 100, || publish(1, 2, 2));
}

#[test]
fn the_chain_is_replaced_under_many_workers() {
    many_orders(3000, || publish(3, 3, 3));
}
