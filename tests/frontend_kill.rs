//! SIGKILL of the daemon at random moments of a write-heavy load. After every kill the image must
//! be sound (clusters may be leaked), nothing that was flushed may be gone, and every other sector
//! holds one of the values that it legally may. Then the daemon starts again on what was left.
//!
//! It would catch: a mapping that reaches the file before what it points to, reference counts that
//! are too low, a flush that does not write all of the metadata, a stream that cuts off its base
//! before the copied data is there.
//!
//! `STRATABLK_SEED=n` repeats the choices of a run; `STRATABLK_KILLS=n` sets how many each test
//! does.

mod common;

use common::Res;
use common::daemon::{Daemon, Program, Setup};
use common::frontend::{self, Frontend, Op, Segment};
use common::images::{self, ChainPlan};
use common::qmp::{self, Qmp};
use common::rng::{Rng, seed_from_environment};
use common::stamp::{self, Owner, SECTOR};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Requests in flight.
const DEPTH: usize = 16;
/// Sectors in the longest write.
const LONGEST: u64 = 512;
/// Bytes of shared memory for each request.
const SLOT: usize = LONGEST as usize * SECTOR;
/// Bytes of the disk.
const DISK: u64 = 32 << 20;

/// Options of the guest's layer, one set for each image.
const LAYERS: [&str; 5] = [
    "cluster_size=64k",
    "cluster_size=4k",
    "cluster_size=64k,refcount_bits=1",
    "cluster_size=512",
    "cluster_size=2M,refcount_bits=64",
];

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    kills: usize,
    /// Kills survived by one image before a new one takes its place.
    kills_per_image: usize,
    /// Discards and write-zeroes among the writes.
    zeroes: bool,
    /// A stream of the base in the background.
    stream: bool,
}

#[test]
fn nothing_flushed_is_lost_under_allocating_writes() -> Res<()> {
    run(Case {
        name: "writes",
        kills: 100,
        kills_per_image: 20,
        zeroes: false,
        stream: false,
    })
}

#[test]
fn nothing_flushed_is_lost_under_writes_and_discards() -> Res<()> {
    run(Case {
        name: "writes and discards",
        kills: 50,
        kills_per_image: 10,
        zeroes: true,
        stream: false,
    })
}

#[test]
fn nothing_is_lost_while_a_stream_runs_or_ends() -> Res<()> {
    run(Case {
        name: "stream",
        kills: 50,
        kills_per_image: 5,
        zeroes: false,
        stream: true,
    })
}

/// A write that a sector may or may not show.
#[derive(Clone, Copy)]
struct Later {
    owner: Owner,
    /// When its completion was seen, by the clock of the model.
    completed: Option<u64>,
    /// A discard: the sector may go on showing what it held before, for ever.
    weak: bool,
}

#[derive(Clone, Default)]
struct Sector {
    /// What was there when the daemon started, or was flushed since.
    base: Owner,
    /// What was written after that, in order.
    later: Vec<Later>,
}

impl Sector {
    fn legal(&self) -> impl Iterator<Item = Owner> + '_ {
        std::iter::once(self.base).chain(self.later.iter().map(|l| l.owner))
    }

    /// A flush that was sent at `sent` has completed.
    fn flushed(&mut self, sent: u64) {
        let stable = |l: &Later| !l.weak && l.completed.is_some_and(|at| at < sent);
        if let Some(last) = self.later.iter().rposition(stable) {
            self.base = self.later.get(last).map_or(self.base, |l| l.owner);
            self.later.drain(..=last);
        }
    }
}

#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    start: u64,
    count: u64,
    sent: u64,
}

/// What the disk may hold.
struct Model {
    sectors: Vec<Sector>,
    /// Sectors with later writes.
    touched: Vec<u64>,
    busy: Vec<bool>,
    clock: u64,
    writes: u64,
}

/// One image and the model of it.
struct Image {
    dir: tempfile::TempDir,
    setup: Setup,
    top: PathBuf,
    lower: Vec<(PathBuf, u64)>,
    model: Model,
    options: &'static str,
}

fn run(case: Case) -> Res<()> {
    let seed = seed_from_environment();
    println!("{}: STRATABLK_SEED={seed}", case.name);
    let kills = std::env::var("STRATABLK_KILLS")
        .ok()
        .and_then(|n| n.parse().ok());
    let program = Program::under_test();
    if case.stream && program.is_reference() {
        println!("left out: the reference is known to lose the base when it is killed");
        return Ok(());
    }
    let mut rng = Rng::new(seed);
    let mut image = None;
    for kill in 0..kills.unwrap_or(case.kills) {
        if kill % case.kills_per_image == 0 {
            let number = kill / case.kills_per_image;
            let options = LAYERS
                .get(number % LAYERS.len())
                .copied()
                .unwrap_or_default();
            image = Some(Image::new(
                options,
                number.is_multiple_of(2),
                case.stream,
                &mut rng,
            )?);
        }
        let image = image.as_mut().ok_or("no image")?;
        image.live_and_die(&program, case, &mut rng).map_err(|e| {
            let options = image.options;
            format!(
                "{}, STRATABLK_SEED={seed}, kill {kill}, {options}: {e}",
                case.name
            )
        })?;
    }
    Ok(())
}

impl Image {
    fn new(options: &'static str, direct: bool, stream: bool, rng: &mut Rng) -> Res<Self> {
        let dir = tempfile::tempdir()?;
        let sectors = DISK / SECTOR as u64;
        let layers = vec![options, "cluster_size=64k", "raw"];
        let plan = ChainPlan {
            sectors,
            layers,
            pieces: 60,
        };
        let chain = images::make_chain(dir.path(), &plan, rng)?;
        // Only the guest's layer is named: the others are found by its header, also after a
        // stream has changed it.
        let top = chain.layers.first().cloned().ok_or("no layers")?;
        let mut setup = Setup::new(dir.path(), std::slice::from_ref(&top));
        setup.direct = direct;
        if !stream {
            setup.qmp = None;
        }
        let lower = chain.layers.iter().skip(1);
        let lower = lower
            .map(|(path, _)| Ok((path.clone(), images::fingerprint(path)?)))
            .collect::<Res<_>>()?;
        let model = Model {
            sectors: chain
                .owners
                .iter()
                .map(|&base| Sector {
                    base,
                    later: Vec::new(),
                })
                .collect(),
            touched: Vec::new(),
            busy: vec![false; sectors as usize],
            clock: 0,
            writes: 1,
        };
        Ok(Image {
            dir,
            setup,
            top: top.0,
            lower,
            model,
            options,
        })
    }

    fn live_and_die(&mut self, program: &Program, case: Case, rng: &mut Rng) -> Res<()> {
        let mut daemon = self.setup.start(program, self.dir.path(), None)?;
        let mut frontend = daemon.connect(&self.setup.socket, 1, 128, DEPTH * SLOT)?;
        let mut stream = match &self.setup.qmp {
            Some(socket) => Some(Stream::start(daemon.qmp(socket)?, rng)?),
            None => None,
        };
        let zeroes = case.zeroes && !program.is_reference();
        let mut load = Load {
            frontend: &mut frontend,
            model: &mut self.model,
            slots: vec![None; DEPTH],
            discards: case.zeroes,
            zeroes,
        };
        load.run(&mut daemon, stream.as_mut(), rng)
            .map_err(|e| format!("{e}; the daemon says: {}", daemon.log()))?;
        // What had reached the ring when the daemon died was seen by the guest.
        load.take_completions()?;
        drop(load);
        drop(frontend);
        self.examine()
    }

    fn examine(&mut self) -> Res<()> {
        images::wait_unlocked(&self.top)?;
        images::check(&self.top)?;
        let found = images::read_owners(&self.top, "qcow2", &self.dir.path().join("scratch"))?;
        self.model.settle(&found)?;
        for (path, fingerprint) in &self.lower {
            let now = images::fingerprint(path)?;
            assert_eq!(*fingerprint, now, "{} was written to", path.display());
        }
        Ok(())
    }
}

/// A stream of the whole chain.
struct Stream {
    qmp: Qmp,
    /// The kill is to follow the job's end at once.
    kill_at_end: bool,
}

impl Stream {
    fn start(mut qmp: Qmp, rng: &mut Rng) -> Res<Self> {
        let kill_at_end = rng.one_in(3);
        let speed = if kill_at_end || rng.one_in(2) {
            0
        } else {
            rng.between(1, 64) << 20
        };
        let device = Setup::node(0);
        let arguments = json!({"device": device, "job-id": "job", "speed": speed});
        qmp.execute("block-stream", arguments)??;
        Ok(Stream { qmp, kill_at_end })
    }

    fn ended(&mut self) -> Res<bool> {
        for event in self.qmp.pending_events()? {
            if qmp::is_job_end(&event, "job") {
                if event["data"].get("error").is_some() {
                    return Err(format!("the job failed: {event}").into());
                }
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The writes of one life of the daemon.
struct Load<'a> {
    frontend: &'a mut Frontend,
    model: &'a mut Model,
    slots: Vec<Option<Request>>,
    discards: bool,
    zeroes: bool,
}

impl Load<'_> {
    /// Writes until the moment of the kill has come, and kills the daemon.
    fn run(
        &mut self,
        daemon: &mut Daemon,
        mut stream: Option<&mut Stream>,
        rng: &mut Rng,
    ) -> Res<()> {
        let mut left = rng.below(400);
        // The moment is a number of completed requests and a few microseconds: neither the test
        // nor the daemon can tell what will be on its way then.
        let extra = Duration::from_micros(rng.below(600));
        loop {
            self.fill(rng)?;
            self.frontend.queues[0].kick()?;
            let ended = match &mut stream {
                Some(stream) if stream.kill_at_end => stream.ended()?,
                _ => left == 0,
            };
            if ended {
                break;
            }
            if self.frontend.queues[0].in_flight() > 0 {
                self.frontend.queues[0].wait()?;
            }
            left = left.saturating_sub(self.take_completions()?);
        }
        let immediate = stream.is_some_and(|stream| stream.kill_at_end);
        let moment = Instant::now() + if immediate { Duration::ZERO } else { extra };
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        daemon.kill()
    }

    fn fill(&mut self, rng: &mut Rng) -> Res<()> {
        for slot in 0..DEPTH {
            if self.slots.get(slot).is_some_and(Option::is_some) {
                continue;
            }
            let request = self.choose(rng);
            let (start, count) = (request.start, request.count);
            let data = [(slot * SLOT, count as usize * SECTOR)];
            let unmap = request.kind == frontend::WRITE_ZEROES && rng.one_in(2);
            let segments = [Segment {
                sector: start,
                count: count as u32,
                flags: unmap.into(),
            }];
            let op = match request.kind {
                frontend::OUT => {
                    let mut bytes = vec![0; count as usize * SECTOR];
                    stamp::fill_all(&mut bytes, self.model.writes, start);
                    self.frontend.memory.write(slot * SLOT, &bytes);
                    Op::write(start, &data)
                }
                frontend::FLUSH => Op::flush(),
                kind => Op::ranges(kind, &segments),
            };
            self.model.send(&request);
            self.frontend.queues[0].submit(&op, slot as u64)?;
            if let Some(place) = self.slots.get_mut(slot) {
                *place = Some(request);
            }
        }
        Ok(())
    }

    fn choose(&mut self, rng: &mut Rng) -> Request {
        let kind = match rng.below(16) {
            0 => frontend::FLUSH,
            1 if self.discards => frontend::DISCARD,
            2 | 3 if self.zeroes => frontend::WRITE_ZEROES,
            _ => frontend::OUT,
        };
        let range = self.model.range(rng);
        self.model.clock += 1;
        let sent = self.model.clock;
        match range {
            Some((start, count)) if kind != frontend::FLUSH => Request {
                kind,
                start,
                count,
                sent,
            },
            _ => Request {
                kind: frontend::FLUSH,
                start: 0,
                count: 0,
                sent,
            },
        }
    }

    fn take_completions(&mut self) -> Res<u64> {
        let mut n = 0;
        while let Some(done) = self.frontend.queues[0].pop()? {
            let slot = self.slots.get_mut(done.token as usize);
            let request = slot.and_then(Option::take).ok_or("an empty slot")?;
            if done.status != frontend::OK {
                let (kind, start, status) = (request.kind, request.start, done.status);
                return Err(format!("request type {kind} at {start}: status {status}").into());
            }
            self.model.complete(&request);
            n += 1;
        }
        Ok(n)
    }
}

impl Model {
    /// A range that nothing in flight touches, often behind something that does.
    fn range(&self, rng: &mut Rng) -> Option<(u64, u64)> {
        let mut start = rng.below(self.sectors.len() as u64) as usize;
        if rng.one_in(2) {
            // In one MiB, so that neighbours in one cluster are in flight together.
            start = self.sectors.len() / 3 + rng.below(2048) as usize;
        }
        // Most are whole blocks of 4 KiB, as file systems write them.
        let step = if rng.below(4) > 0 { 8 } else { 1 };
        start = start.next_multiple_of(step);
        while *self.busy.get(start)? {
            start += step;
        }
        let longest = if rng.one_in(4) { LONGEST } else { 32 };
        let count = (rng.between(1, longest) as usize).next_multiple_of(step);
        let free = self
            .busy
            .iter()
            .skip(start)
            .take(count)
            .take_while(|b| !**b)
            .count();
        (free > 0).then_some((start as u64, free as u64))
    }

    fn range_of(request: &Request) -> std::ops::Range<usize> {
        request.start as usize..(request.start + request.count) as usize
    }

    fn send(&mut self, request: &Request) {
        let range = Self::range_of(request);
        let owner = if request.kind == frontend::OUT {
            self.writes
        } else {
            0
        };
        let weak = request.kind == frontend::DISCARD;
        for (sector, at) in self
            .sectors
            .get_mut(range.clone())
            .unwrap_or_default()
            .iter_mut()
            .zip(request.start..)
        {
            if sector.later.is_empty() {
                self.touched.push(at);
            }
            sector.later.push(Later {
                owner,
                completed: None,
                weak,
            });
        }
        self.busy.get_mut(range).unwrap_or_default().fill(true);
        self.writes += 1;
    }

    fn complete(&mut self, request: &Request) {
        self.clock += 1;
        if request.kind == frontend::FLUSH {
            let sectors = &mut self.sectors;
            self.touched.retain(|&at| {
                sectors.get_mut(at as usize).is_some_and(|sector| {
                    sector.flushed(request.sent);
                    !sector.later.is_empty()
                })
            });
            return;
        }
        let range = Self::range_of(request);
        for sector in self.sectors.get_mut(range.clone()).unwrap_or_default() {
            if let Some(last) = sector.later.last_mut() {
                last.completed = Some(self.clock);
            }
        }
        self.busy.get_mut(range).unwrap_or_default().fill(false);
    }

    /// Compares what is on the disk with what may be; from then on it is what was found.
    fn settle(&mut self, found: &[Result<Owner, String>]) -> Res<()> {
        if found.len() != self.sectors.len() {
            return Err(format!("the disk has {} sectors now", found.len()).into());
        }
        for (at, (sector, found)) in self.sectors.iter_mut().zip(found).enumerate() {
            let legal = found
                .as_ref()
                .ok()
                .filter(|&&owner| sector.legal().any(|o| o == owner));
            let Some(&owner) = legal else {
                let found = found
                    .as_ref()
                    .map_or_else(Clone::clone, |&o| stamp::describe_owner(o));
                let legal: Vec<_> = sector.legal().map(stamp::describe_owner).collect();
                return Err(format!("sector {at}: found {found}, may be one of {legal:?}").into());
            };
            *sector = Sector {
                base: owner,
                later: Vec::new(),
            };
        }
        self.touched.clear();
        self.busy.fill(false);
        Ok(())
    }
}
