//! A new size while requests are on their way.

use std::path::Path;
use std::sync::mpsc;

use serde_json::json;

use crate::common::frontend::{self, OK, Op, Queue, Segment};
use crate::common::{Res, images};
use crate::scene::{Bed, MIB, SECTOR, qcow2, raw};

/// Writes and discards around the end of a disk, so many in flight at all times. The last cluster is
/// cleared as a whole, if anything is.
struct Load {
    end: u64,
    in_flight: u64,
}

impl Load {
    const DEPTH: u64 = 16;
    /// The token of a request that is not one of these.
    const NEW: u64 = Self::DEPTH;

    fn begin(queue: &mut Queue, end: u64) -> Res<Self> {
        let mut load = Load { end, in_flight: 0 };
        for number in 0..Self::DEPTH {
            load.submit(queue, number)?;
        }
        queue.kick()?;
        Ok(load)
    }

    fn submit(&mut self, queue: &mut Queue, number: u64) -> Res<()> {
        let sector = self.end - 8 * (number / 2 + 1);
        let discard = [Segment {
            sector,
            count: 8,
            flags: 0,
        }];
        let data = [(0, 4096)];
        let op = match number % 2 {
            0 => Op::write(sector, &data),
            _ => Op::ranges(frontend::DISCARD, &discard),
        };
        queue.submit(&op, number)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Begins another one for each that has ended.
    fn go_on(&mut self, queue: &mut Queue) -> Res<()> {
        queue.wait()?;
        while let Some(done) = queue.pop()? {
            assert_eq!(done.status, OK, "{done:?}");
            self.in_flight -= 1;
            self.submit(queue, done.token)?;
        }
        queue.kick()
    }

    /// Waits for all, and for one more.
    fn end(self, queue: &mut Queue) -> Res<()> {
        let mut left = self.in_flight + 1;
        while left > 0 {
            queue.wait()?;
            while let Some(done) = queue.pop()? {
                assert_eq!(done.status, OK, "{done:?}");
                left -= 1;
            }
        }
        Ok(())
    }
}

/// Catches a disk that is one size for some requests and another one for others, and lost writes: guests
/// write all the while.
#[test]
fn while_requests_are_on_their_way() -> Res<()> {
    let make = |dir: &Path| {
        raw(dir, "base.raw", 64 * MIB, 0xbb)?;
        qcow2(
            "top.qcow2",
            MIB + 512,
            "cluster_size=64k",
            Some(("base.raw", "raw")),
        )(dir)
    };
    let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
    let mut bed = Bed::begin(&layers, make)?;
    let mut guest = bed.guest()?;
    guest.front.memory.write(0, &[7; 4096]);
    let mut end = MIB + 512;
    for round in 1..=24u64 {
        let new = MIB + 512 + round * 1001 * SECTOR;
        // Requests are in flight when the command is sent, and whenever it looks.
        let mut load = Load::begin(&mut guest.front.queues[0], end / SECTOR)?;
        let (tell, answer) = mpsc::channel();
        std::thread::scope(|scope| -> Res<()> {
            let qmp = &mut bed.qmp;
            scope.spawn(move || {
                let arguments = json!({"device": "disk", "size": new});
                let answered = qmp.execute("block_resize", arguments);
                let _ = tell.send(answered.and_then(|answer| Ok(answer?)).map(drop));
            });
            loop {
                match answer.try_recv() {
                    Ok(answered) => return answered,
                    Err(_) => load.go_on(&mut guest.front.queues[0])?,
                }
            }
        })?;
        assert_eq!(guest.is_told()?, new);
        // What is new is there for a request behind those that began before.
        let sector = end / SECTOR;
        let queue = &mut guest.front.queues[0];
        queue.submit(&Op::write(sector, &[(0, 4096)]), Load::NEW)?;
        queue.kick()?;
        load.end(queue)?;
        assert_eq!(guest.read(end, 4096)?, [7; 4096], "round {round}");
        let rest = (new - end - 4096).min(512 << 10) as usize;
        assert!(guest.read(end + 4096, rest)?.iter().all(|byte| *byte == 0));
        guest.front.memory.write(0, &[7; 4096]);
        end = new;
    }
    let dir = bed.end(guest)?;
    assert!(
        !images::check(&dir.path().join("top.qcow2"))?,
        "clusters have leaked"
    );
    Ok(())
}
