//! The load generator: a fixed number of requests in flight on each queue, latencies in a histogram.

use crate::blocks::{self, BLOCK};
use crate::common::Res;
use crate::common::frontend::{self, Frontend, Op, PATIENCE, Queue};
use crate::common::rng::Rng;
use std::time::{Duration, Instant};

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Anywhere.
    Random,
    /// One after another.
    Sequential,
    /// To every cluster of 64 KiB once, in random order; the load ends when all had their turn.
    EachClusterOnce,
}

/// What a load does.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Writes, else reads.
    pub write: bool,
    /// Bytes in each request.
    pub len: usize,
    /// Queues.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// Where they go.
    pub order: Order,
    /// A flush follows after so many of them.
    pub flush_every: Option<u64>,
}

/// Latencies, in buckets of at most 1/32 of their value.
#[derive(Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    fn new() -> Self {
        Histogram {
            buckets: vec![0; 64 * 32],
            count: 0,
        }
    }

    fn add(&mut self, latency: Duration) {
        let ns = (latency.as_nanos() as u64).max(32);
        let exponent = 63 - ns.leading_zeros() as usize;
        let index = exponent * 32 + ((ns >> (exponent - 5)) & 31) as usize;
        if let Some(bucket) = self.buckets.get_mut(index) {
            *bucket += 1;
        }
        self.count += 1;
    }

    /// The latency in microseconds that the given part of all requests did not exceed.
    pub fn percentile(&self, part: f64) -> f64 {
        let rank = (self.count as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (index, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank && *n > 0 {
                let exponent = index / 32;
                let width = 2f64.powi(exponent as i32 - 5);
                return (32.0 + (index % 32) as f64 + 1.0) * width / 1000.0;
            }
        }
        0.0
    }
}

/// What a load did in the time that counts.
pub struct Measured {
    /// Completed requests.
    pub requests: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Their latencies.
    pub latencies: Histogram,
}

impl Measured {
    fn new() -> Self {
        Measured {
            requests: 0,
            elapsed: Duration::ZERO,
            latencies: Histogram::new(),
        }
    }

    /// Requests per second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// A load on the queues of a front-end.
pub struct Load {
    frontend: Frontend,
    shape: Shape,
    size: u64,
    poll: bool,
    tag: u64,
    rng: Rng,
    next: u64,
    clusters: Vec<u64>,
    started: Vec<Instant>,
    offsets: Vec<u64>,
    /// Slots with a flush in flight.
    flushing: Vec<bool>,
    scratch: Vec<u8>,
    verified: usize,
    written: Vec<u64>,
}

/// Bytes of shared memory that a load of `shape` needs.
pub fn memory_for(shape: Shape) -> usize {
    (shape.slots() + 1) * shape.len
}

impl Shape {
    /// Requests in flight on all queues together.
    fn slots(&self) -> usize {
        self.depth * self.queues
    }
}

/// Reads checked in full before the measurement, and writes read back after it.
const SAMPLES: usize = 256;

impl Load {
    /// A load of `shape` over a disk of `size` bytes. `seed` chooses the places, and is the tag of
    /// what it writes.
    pub fn new(frontend: Frontend, shape: Shape, size: u64, poll: bool, seed: u64) -> Res<Self> {
        let memory = frontend.memory.clone();
        let mut rng = Rng::new(seed);
        let mut block = vec![0; BLOCK];
        blocks::fill_written(&mut block, 0, seed);
        for at in (0..shape.slots() * shape.len).step_by(BLOCK) {
            memory.write(at, &block);
        }
        let mut clusters = Vec::new();
        if shape.order == Order::EachClusterOnce {
            clusters = (0..size / 65536).collect();
            for i in (1..clusters.len()).rev() {
                clusters.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        Ok(Load {
            frontend,
            shape,
            size,
            poll,
            tag: seed,
            rng,
            next: 0,
            clusters,
            started: vec![Instant::now(); shape.slots()],
            offsets: vec![0; shape.slots()],
            flushing: vec![false; shape.slots()],
            scratch: vec![0; shape.len],
            verified: 0,
            written: Vec::new(),
        })
    }

    /// Runs until `stop` says so (it is asked about every millisecond and at every wake-up), then
    /// until nothing is in flight. Requests count that complete before the stop.
    pub fn run(&mut self, mut stop: impl FnMut() -> Res<bool>) -> Res<Measured> {
        let mut measured = Measured::new();
        let begin = Instant::now();
        let mut asked = begin;
        for slot in 0..self.shape.slots() {
            self.start(slot, begin)?;
        }
        self.kick()?;
        while self.in_flight() {
            self.wait()?;
            let now = Instant::now();
            if now.duration_since(asked) >= Duration::from_millis(1) {
                asked = now;
                if stop()? {
                    break;
                }
            }
            for queue in 0..self.frontend.queues.len() {
                self.complete(queue, now, &mut measured)?;
            }
            self.kick()?;
        }
        measured.elapsed = begin.elapsed();
        self.drain()?;
        Ok(measured)
    }

    /// Takes what a queue has completed, and lays the next requests into it.
    fn complete(&mut self, queue: usize, now: Instant, measured: &mut Measured) -> Res<()> {
        while let Some(done) = self.frontend.queues[queue].pop()? {
            let slot = done.token as usize;
            self.finish(slot, done.status)?;
            if std::mem::take(&mut self.flushing[slot]) {
                self.start(slot, now)?;
                continue;
            }
            measured.requests += 1;
            let latency = now.duration_since(self.started[slot]);
            measured.latencies.add(latency);
            match self.shape.flush_every {
                Some(every) if measured.requests.is_multiple_of(every) => {
                    self.flushing[slot] = true;
                    self.frontend.queues[queue].submit(&Op::flush(), slot as u64)?;
                }
                _ => self.start(slot, now)?,
            }
        }
        Ok(())
    }

    fn kick(&mut self) -> Res<()> {
        self.frontend.queues.iter_mut().try_for_each(Queue::kick)
    }

    fn in_flight(&self) -> bool {
        self.frontend
            .queues
            .iter()
            .any(|queue| queue.in_flight() > 0)
    }

    /// Runs for `time`, or until every cluster had its turn.
    pub fn run_for(&mut self, time: Duration) -> Res<Measured> {
        let end = Instant::now() + time;
        self.run(|| Ok(Instant::now() >= end))
    }

    fn wait(&mut self) -> Res<()> {
        if !self.poll {
            return frontend::wait_any(&mut self.frontend.queues.iter_mut().collect::<Vec<_>>());
        }
        let start = Instant::now();
        while !self.frontend.queues.iter_mut().any(Queue::ready) {
            std::hint::spin_loop();
            if start.elapsed() > PATIENCE {
                return Err("the back-end completed nothing for a minute".into());
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Res<()> {
        while self.in_flight() {
            self.wait()?;
            for queue in 0..self.frontend.queues.len() {
                while let Some(done) = self.frontend.queues[queue].pop()? {
                    let slot = done.token as usize;
                    self.finish(slot, done.status)?;
                    self.flushing[slot] = false;
                }
            }
        }
        Ok(())
    }

    /// Makes stable what was written.
    pub fn flush(&mut self) -> Res<()> {
        match self.first()?.run(&Op::flush())? {
            frontend::OK => Ok(()),
            status => Err(format!("a flush completed with status {status}").into()),
        }
    }

    fn place(&mut self) -> Option<u64> {
        let len = self.shape.len as u64;
        match self.shape.order {
            Order::Random => Some(self.rng.below(self.size / len) * len),
            Order::Sequential => {
                let at = self.next;
                self.next = (at + len) % (self.size / len * len);
                Some(at)
            }
            Order::EachClusterOnce => {
                let inside = self.rng.below(65536 / len) * len;
                self.clusters.pop().map(|cluster| cluster * 65536 + inside)
            }
        }
    }

    fn start(&mut self, slot: usize, now: Instant) -> Res<()> {
        let Some(offset) = self.place() else {
            return Ok(());
        };
        let len = self.shape.len;
        let at = slot * len;
        if self.shape.write {
            for piece in (0..len).step_by(BLOCK) {
                let header = blocks::header(offset + piece as u64, self.tag);
                self.frontend.memory.write(at + piece, &header);
            }
        }
        self.started[slot] = now;
        self.offsets[slot] = offset;
        let data = [(at, len)];
        let sector = offset / 512;
        let op = if self.shape.write {
            Op::write(sector, &data)
        } else {
            Op::read(sector, &data)
        };
        let queue = slot / self.shape.depth;
        self.frontend.queues[queue].submit(&op, slot as u64)
    }

    fn first(&mut self) -> Res<&mut Queue> {
        self.frontend
            .queues
            .first_mut()
            .ok_or_else(|| "no queue".into())
    }

    fn finish(&mut self, slot: usize, status: u8) -> Res<()> {
        let offset = self.offsets[slot];
        if status != frontend::OK {
            return Err(format!("a request at {offset:#x} completed with status {status}").into());
        }
        if self.flushing[slot] {
            return Ok(());
        }
        if self.shape.write {
            if self.written.len() < SAMPLES {
                self.written.push(offset);
            }
        } else if self.verified < SAMPLES {
            self.verified += 1;
            self.frontend
                .memory
                .read(slot * self.shape.len, &mut self.scratch);
            blocks::verify(&self.scratch, offset, None)?;
        }
        Ok(())
    }

    /// Reads samples: of what was written, or else of anything; and checks them.
    pub fn verify_samples(&mut self) -> Res<()> {
        let len = self.shape.len;
        let at = self.shape.slots() * len;
        let tag = self.shape.write.then_some(self.tag);
        let mut offsets = std::mem::take(&mut self.written);
        if !self.shape.write {
            let blocks = self.size / len as u64;
            offsets = (0..64)
                .map(|_| self.rng.below(blocks) * len as u64)
                .collect();
        }
        for offset in offsets {
            let status = self.first()?.run(&Op::read(offset / 512, &[(at, len)]))?;
            if status != frontend::OK {
                return Err(format!("reading back {offset:#x}: status {status}").into());
            }
            self.frontend.memory.read(at, &mut self.scratch);
            blocks::verify(&self.scratch, offset, tag)?;
        }
        Ok(())
    }
}
