//! An export on storage whose operations are carried out and completed by another thread, as those
//! of a client library would be.
//!
//! What would be caught: a completion that is lost, reaches another request, or finds the worker
//! asleep and leaves it so; on the data path and in tasks.

#![allow(clippy::unwrap_used)]

mod export_common;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use export_common::*;
use rand::prelude::*;
use stratablk::reactor::{Reactor, Remote, Token};
use stratablk::storage::memory::MemoryStorage;
use stratablk::storage::{Answer, Limits, Op, Storage, Submission};

/// An operation on its way to the other thread.
enum Work {
    Read(Vec<libc::iovec>, u64),
    Write(Vec<libc::iovec>, u64),
    Sync,
    Zero(u64, u64),
}

// SAFETY: the memory is valid until the token is completed, by the contract of `submit`.
unsafe impl Send for Work {}

/// Storage in memory that a thread of its own works on.
#[derive(Debug)]
struct Elsewhere {
    inner: Arc<MemoryStorage>,
    work: Sender<(Work, Token, Arc<Remote>)>,
}

impl Elsewhere {
    fn new(len: usize) -> Arc<Self> {
        let inner = Arc::new(MemoryStorage::new(vec![0; len]));
        let (work, arrived) = channel::<(Work, Token, Arc<Remote>)>();
        let storage = inner.clone();
        std::thread::spawn(move || {
            let reactor = Reactor::for_this_thread().unwrap();
            for (work, token, remote) in arrived {
                let op = match &work {
                    Work::Read(iovecs, offset) => Op::Read {
                        iovecs,
                        offset: *offset,
                    },
                    Work::Write(iovecs, offset) => Op::Write {
                        iovecs,
                        offset: *offset,
                    },
                    Work::Sync => Op::Sync,
                    Work::Zero(offset, len) => Op::Zero {
                        offset: *offset,
                        len: *len,
                        unmap: true,
                    },
                };
                // SAFETY: as for `Work`.
                match unsafe { storage.submit(&reactor, op, token) } {
                    Submission::Ready(result) => remote.complete(token, result),
                    Submission::Pending => unreachable!("memory answers at once"),
                }
            }
            Reactor::leave_thread();
        });
        Arc::new(Self { inner, work })
    }
}

impl Storage for Elsewhere {
    unsafe fn submit(&self, reactor: &Reactor, op: Op<'_>, token: Token) -> Submission {
        let work = match op {
            Op::Read { iovecs, offset } => Work::Read(iovecs.to_vec(), offset),
            Op::Write { iovecs, offset } => Work::Write(iovecs.to_vec(), offset),
            Op::Sync => Work::Sync,
            Op::Zero { offset, len, .. } => Work::Zero(offset, len),
            Op::Reserve { .. } => {
                return Submission::Ready(Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
            }
        };
        self.work.send((work, token, reactor.remote())).unwrap();
        Submission::Pending
    }

    fn len(&self) -> Answer<'_, std::io::Result<u64>> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Answer<'_, std::io::Result<()>> {
        self.inner.set_len(len)
    }

    fn limits(&self) -> Limits {
        // So that some requests go to the ring as they are, and others take a task that copies.
        Limits {
            memory_align: 512,
            ..self.inner.limits()
        }
    }

    fn name(&self) -> &str {
        "elsewhere"
    }

    fn writable(&self) -> bool {
        true
    }
}

#[test]
fn completions_from_another_thread_reach_their_requests() {
    const BLOCK: usize = 8192;
    const COUNT: usize = 30;
    let place = Place::new();
    let storage = Elsewhere::new(COUNT * BLOCK);
    let root = raw_root(storage.clone(), (COUNT * BLOCK) as u64, false);
    let export = start(place.config(), root);
    let mut guest = Guest::connect(&place.socket(), 1);
    let mut random = StdRng::seed_from_u64(1);
    for round in 0..100 {
        // One of them is not aligned; and one at a time finds the worker asleep.
        let count = if round % 2 == 0 { COUNT } else { 1 };
        let part = |guest: &mut Guest, block: usize| {
            let skew = if block == 3 { 8 } else { 0 };
            guest.memory.part(block * 2 * BLOCK + skew, BLOCK)
        };
        let mut model = Vec::new();
        for block in 0..count {
            let bytes = part(&mut guest, block);
            random.fill_bytes(bytes);
            model.push(bytes.to_vec());
            let at = (block * BLOCK) as u64;
            guest.queues[0].write(at, bytes, 0).unwrap();
        }
        guest.kick(0);
        assert!(guest.wait(0, count).iter().all(|(_, result)| *result == 0));
        for block in 0..count {
            let bytes = part(&mut guest, block);
            bytes.fill(0xee);
            let at = (block * BLOCK) as u64;
            guest.queues[0].read(at, bytes, 0).unwrap();
        }
        guest.queues[0].flush(0).unwrap();
        guest.kick(0);
        let done = guest.wait(0, count + 1);
        assert!(done.iter().all(|(_, result)| *result == 0));
        for (block, bytes) in model.iter().enumerate() {
            assert!(*part(&mut guest, block) == **bytes, "block {block}");
        }
    }
    drop(guest);
    export.shutdown();
}
