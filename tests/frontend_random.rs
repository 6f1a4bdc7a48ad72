//! Random requests, many in flight on two queues, on an overlay over a chain of layers, while a
//! stream job runs, is cancelled and starts again: checked against a model in memory, and at the
//! end by `qemu-img`.
//!
//! It would catch: lost or torn writes, copy-on-write that brings back old data next to a write in
//! flight, a stream that overwrites what the guest wrote, reads from a wrong layer, mappings or
//! reference counts that are wrong on disk.
//!
//! `STRATABLK_SEED=n` repeats the choices of a run; `STRATABLK_REQUESTS=n` makes it longer.

mod common;

use common::Res;
use common::daemon::{Program, Setup};
use common::frontend::{self, Frontend, Op, Segment};
use common::images::{self, ChainPlan};
use common::qmp::Qmp;
use common::rng::{Rng, seed_from_environment};
use common::stamp::{self, Owner, SECTOR};
use serde_json::{Value, json};
use std::fmt;

/// Requests in flight on each queue.
const DEPTH: usize = 32;
/// Sectors in the longest read or write.
const LONGEST: u64 = 512;
/// Sectors in the longest discard or write-zeroes.
const LONGEST_ZERO: u64 = 4096;
/// Bytes of shared memory for each request: the data, and room to place it unaligned.
const SLOT: usize = LONGEST as usize * SECTOR + 4096;

struct Case {
    name: &'static str,
    layers: &'static [&'static str],
    direct: bool,
    /// Name only the guest's layer to the daemon, which finds the others by the headers.
    by_header: bool,
}

/// What a request in flight will have done.
#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    start: u64,
    count: u64,
    owner: Owner,
    at: usize,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Request {
            start,
            count,
            owner,
            ..
        } = self;
        match self.kind {
            frontend::IN => write!(f, "read")?,
            frontend::OUT => write!(f, "write {owner}")?,
            frontend::DISCARD => write!(f, "discard")?,
            frontend::WRITE_ZEROES => write!(f, "write zeroes")?,
            _ => return write!(f, "flush"),
        }
        write!(f, " of sectors {start}..{}", start + count)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

/// What a sector may read as.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    owner: Owner,
    /// It was discarded since: it may as well be zeros.
    discarded: bool,
}

struct Test {
    rng: Rng,
    frontend: Frontend,
    qmp: Qmp,
    model: Vec<State>,
    busy: Vec<bool>,
    slots: Vec<Option<Request>>,
    writes: u64,
    job: Job,
    depth_of_chain: usize,
    reference: bool,
    /// Everything that was done, for the message of a failure.
    history: Vec<Step>,
}

/// A line of the history.
#[derive(Clone, Debug)]
enum Step {
    Sent(Request),
    Done(Request),
    Job(String),
}

#[derive(Default)]
struct Job {
    running: bool,
    paused: bool,
    started: usize,
}

#[test]
fn clusters_of_64k_over_a_raw_image() -> Res<()> {
    run(&Case {
        name: "64k over 64k over raw",
        layers: &["cluster_size=64k", "cluster_size=64k", "raw"],
        direct: false,
        by_header: false,
    })
}

#[test]
fn clusters_of_4k_over_mixed_sizes_past_the_page_cache() -> Res<()> {
    run(&Case {
        name: "4k over 64k over 512",
        layers: &["cluster_size=4k", "cluster_size=64k", "cluster_size=512"],
        direct: true,
        by_header: false,
    })
}

#[test]
fn clusters_of_2m_over_compressed_ones() -> Res<()> {
    run(&Case {
        name: "2M over compressed 64k",
        layers: &[
            "cluster_size=2M,refcount_bits=64",
            "compressed cluster_size=64k",
        ],
        direct: false,
        by_header: true,
    })
}

#[test]
fn version_2_over_a_chain_found_by_the_headers() -> Res<()> {
    run(&Case {
        name: "version 2 over 4k over raw",
        layers: &["compat=0.10,cluster_size=64k", "cluster_size=4k", "raw"],
        direct: true,
        by_header: true,
    })
}

fn run(case: &Case) -> Res<()> {
    let seed = seed_from_environment();
    println!("{}: STRATABLK_SEED={seed}", case.name);
    drive(case, seed).map_err(|e| format!("{}, STRATABLK_SEED={seed}: {e}", case.name).into())
}

fn drive(case: &Case, seed: u64) -> Res<()> {
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir()?;
    // A size that is no multiple of the cluster: the last one is cut short.
    let sectors = (16 << 20) / SECTOR as u64 + rng.below(100);
    let plan = ChainPlan {
        sectors,
        layers: case.layers.to_vec(),
        pieces: 40,
    };
    let chain = images::make_chain(dir.path(), &plan, &mut rng)?;
    let lower: Vec<_> = chain
        .layers
        .iter()
        .skip(1)
        .map(|(path, _)| path.clone())
        .collect();
    let before = lower
        .iter()
        .map(|p| images::fingerprint(p))
        .collect::<Res<Vec<_>>>()?;

    let named = if case.by_header {
        1
    } else {
        chain.layers.len()
    };
    let mut setup = Setup::new(dir.path(), chain.layers.get(..named).unwrap_or_default());
    setup.queues = 2;
    setup.direct = case.direct;
    let program = Program::under_test();
    let mut daemon = setup.start(&program, dir.path(), None)?;
    let frontend = daemon.connect(&setup.socket, 2, 256, SLOT * 2 * DEPTH)?;
    let qmp = daemon.qmp(setup.qmp.as_ref().ok_or("no control socket")?)?;
    let model = chain
        .owners
        .iter()
        .map(|&owner| State {
            owner,
            discarded: false,
        })
        .collect();
    let mut test = Test {
        rng,
        frontend,
        qmp,
        model,
        busy: vec![false; sectors as usize],
        slots: vec![None; 2 * DEPTH],
        writes: 0,
        job: Job::default(),
        depth_of_chain: named,
        reference: program.is_reference(),
        history: Vec::new(),
    };

    let requests = std::env::var("STRATABLK_REQUESTS")
        .ok()
        .and_then(|n| n.parse().ok());
    test.load(requests.unwrap_or(6000))
        .map_err(|e| format!("{e}; {}", daemon.log()))?;
    let owners = test.read_all()?;
    drop(test);
    daemon.stop()?;

    let top = chain
        .layers
        .first()
        .map(|(path, _)| path.clone())
        .ok_or("no layers")?;
    let leaks = images::check(&top)?;
    assert!(!leaks, "clusters are lost after a clean end");
    let expected = dir.path().join("expected.raw");
    images::write_raw(&expected, &owners)?;
    let names = (images::text(&top)?, images::text(&expected)?);
    images::qemu_img(&["compare", "-f", "qcow2", "-F", "raw", names.0, names.1])?;
    let after = lower
        .iter()
        .map(|p| images::fingerprint(p))
        .collect::<Res<Vec<_>>>()?;
    assert_eq!(before, after, "a layer below the guest's was written to");
    Ok(())
}

impl Test {
    /// Keeps both queues full until `requests` have been sent, then waits for the rest of them and
    /// for the job.
    fn load(&mut self, requests: usize) -> Res<()> {
        let mut sent = 0;
        let mut next_job_step = 50;
        while sent < requests || self.in_flight() > 0 {
            for slot in 0..self.slots.len() {
                if sent < requests && self.slots.get(slot).is_some_and(Option::is_none) {
                    self.start(slot)?;
                    sent += 1;
                }
            }
            for queue in &mut self.frontend.queues {
                queue.kick()?;
            }
            if sent >= next_job_step {
                next_job_step = sent + self.rng.between(20, 300) as usize;
                self.job_step(sent > requests / 2)?;
            }
            self.complete()?;
        }
        self.finish_job()?;
        assert!(self.job.started > 0, "no job was ever started");
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.frontend.queues.iter().map(|q| q.in_flight()).sum()
    }

    /// Waits for completions and checks them.
    fn complete(&mut self) -> Res<()> {
        if self.in_flight() > 0 {
            let mut queues: Vec<_> = self.frontend.queues.iter_mut().collect();
            frontend::wait_any(&mut queues)?;
        }
        for queue in 0..self.frontend.queues.len() {
            while let Some(done) = self.frontend.queues[queue].pop()? {
                self.finish(done.token as usize, done.status)?;
            }
        }
        Ok(())
    }

    /// A range that no request in flight touches; often right behind one that does.
    fn range(&mut self, longest: u64) -> Option<(u64, u64)> {
        let sectors = self.model.len() as u64;
        // Half of them in one MiB: neighbours in flight in one cluster are what is wanted.
        let start = match self.rng.below(4) {
            0 | 1 => sectors / 3 + self.rng.below(2048),
            _ => self.rng.below(sectors),
        };
        let mut start = start as usize;
        while *self.busy.get(start)? {
            start += 1;
        }
        let small = self.rng.below(4) > 0;
        let wanted = self
            .rng
            .between(1, if small { 24.min(longest) } else { longest });
        let free = self
            .busy
            .iter()
            .skip(start)
            .take(wanted as usize)
            .take_while(|b| !**b)
            .count();
        Some((start as u64, free as u64))
    }

    fn start(&mut self, slot: usize) -> Res<()> {
        let kind = match self.rng.below(20) {
            // The reference loses a write that shares its cluster with zeroes in flight.
            15..17 if self.reference => frontend::DISCARD,
            0..7 => frontend::IN,
            7..15 => frontend::OUT,
            15..17 => frontend::WRITE_ZEROES,
            17..19 => frontend::DISCARD,
            _ => frontend::FLUSH,
        };
        let zeroing = matches!(kind, frontend::WRITE_ZEROES | frontend::DISCARD);
        let longest = if zeroing { LONGEST_ZERO } else { LONGEST };
        let range = if kind == frontend::FLUSH {
            Some((0, 0))
        } else {
            self.range(longest)
        };
        // No room behind the last request in flight: a flush fits everywhere.
        let (kind, start, count) = match range {
            Some((start, count)) => (kind, start, count),
            None => (frontend::FLUSH, 0, 0),
        };
        for busy in self
            .busy
            .iter_mut()
            .skip(start as usize)
            .take(count as usize)
        {
            *busy = true;
        }
        // Guests place their buffers at any byte.
        let shift = if self.rng.one_in(4) {
            self.rng.below(2048) as usize
        } else {
            0
        };
        let mut request = Request {
            kind,
            start,
            count,
            owner: 0,
            at: slot * SLOT + shift,
        };
        let mut data = Vec::new();
        let mut segments = Vec::new();
        match kind {
            frontend::IN => data = self.pieces(&request),
            frontend::OUT => {
                self.writes += 1;
                request.owner = self.writes;
                data = self.pieces(&request);
                let mut bytes = vec![0; count as usize * SECTOR];
                stamp::fill_all(&mut bytes, request.owner, start);
                self.frontend.memory.write(request.at, &bytes);
            }
            frontend::WRITE_ZEROES | frontend::DISCARD => {
                let unmap = kind == frontend::WRITE_ZEROES && self.rng.one_in(2);
                let segment = Segment {
                    sector: start,
                    count: count as u32,
                    flags: unmap.into(),
                };
                segments.push(segment);
            }
            _ => {}
        }
        self.history.push(Step::Sent(request));
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(request);
        }
        let sector = if segments.is_empty() { start } else { 0 };
        let op = Op {
            kind,
            sector,
            data: &data,
            segments: &segments,
        };
        self.frontend.queues[slot / DEPTH].submit(&op, slot as u64)
    }

    /// Cuts the buffer of a request into up to three pieces, at any byte.
    fn pieces(&mut self, request: &Request) -> Vec<(usize, usize)> {
        let mut left = request.count as usize * SECTOR;
        let mut at = request.at;
        let mut pieces = Vec::new();
        while pieces.len() < 2 && self.rng.one_in(3) {
            let len = match self.rng.below(2) {
                0 => self.rng.below(left as u64 / SECTOR as u64) as usize * SECTOR,
                _ => self.rng.below(left as u64) as usize,
            };
            if len > 0 {
                pieces.push((at, len));
            }
            at += len;
            left -= len;
        }
        pieces.push((at, left));
        pieces
    }

    fn finish(&mut self, slot: usize, status: u8) -> Res<()> {
        let request = self
            .slots
            .get_mut(slot)
            .and_then(Option::take)
            .ok_or("an empty slot")?;
        if status != frontend::OK {
            return Err(format!("{request:?} completed with status {status}").into());
        }
        self.history.push(Step::Done(request));
        if request.kind == frontend::IN {
            self.verify(&request)?;
        }
        let range = request.start as usize..(request.start + request.count) as usize;
        for state in self.model.get_mut(range.clone()).unwrap_or_default() {
            match request.kind {
                frontend::OUT | frontend::WRITE_ZEROES => {
                    *state = State {
                        owner: request.owner,
                        discarded: false,
                    };
                }
                frontend::DISCARD => state.discarded = true,
                _ => {}
            }
        }
        self.busy.get_mut(range).unwrap_or_default().fill(false);
        Ok(())
    }

    /// Compares what a read brought with the model; returns the owners that it found.
    fn verify(&self, request: &Request) -> Res<Vec<Owner>> {
        let mut bytes = vec![0; request.count as usize * SECTOR];
        self.frontend.memory.read(request.at, &mut bytes);
        let mut owners = Vec::new();
        for (data, sector) in bytes.chunks_exact(SECTOR).zip(request.start..) {
            let state = self.model.get(sector as usize).copied().unwrap_or_default();
            let found = stamp::owner_of(data, sector);
            if found != Some(state.owner) && !(state.discarded && found == Some(0)) {
                return Err(format!(
                    "sector {sector} of {request:?}: expected {}{}, found {}\n{}",
                    stamp::describe_owner(state.owner),
                    if state.discarded { " or zeros" } else { "" },
                    stamp::describe(data),
                    self.history_of(sector),
                )
                .into());
            }
            owners.push(found.unwrap_or_default());
        }
        Ok(owners)
    }

    /// What happened around a sector: requests within 64 KiB of it, and what the job did.
    fn history_of(&self, sector: u64) -> String {
        let near = |r: &Request| r.start < sector + 128 && r.start + r.count + 128 > sector;
        let lines: Vec<String> = (0..)
            .zip(&self.history)
            .filter_map(|(i, step)| match step {
                Step::Sent(r) if near(r) => Some(format!("{i}: sent {r}")),
                Step::Done(r) if near(r) => Some(format!("{i}: done {r}")),
                Step::Job(text) => Some(format!("{i}: {text}")),
                _ => None,
            })
            .collect();
        let skipped = lines.len().saturating_sub(60);
        let last = lines.get(skipped..).unwrap_or_default().join("\n");
        format!(
            "({skipped} lines before)\n{last}\n{} lines in all",
            self.history.len()
        )
    }

    /// Does something to the job: starts it, or changes its mind.
    fn job_step(&mut self, late: bool) -> Res<()> {
        self.take_events()?;
        // At first the job has time to meet the guest; later it may also end.
        let speeds = [512 << 10, 2 << 20, 8 << 20, 0];
        let choices = if late { 4 } else { 3 };
        let speed = speeds
            .get(self.rng.below(choices) as usize)
            .copied()
            .unwrap_or_default();
        if !self.job.running {
            let mut arguments = json!({"device": Setup::node(0), "job-id": "job", "speed": speed});
            if self.depth_of_chain > 2 && self.rng.one_in(2) {
                arguments["base-node"] = json!(Setup::node(self.depth_of_chain - 1));
            }
            if self.command("block-stream", arguments)? {
                self.job = Job {
                    running: true,
                    paused: false,
                    started: self.job.started + 1,
                };
            }
            return Ok(());
        }
        let id = json!({"device": "job"});
        // A paused job gives up only when it is forced to.
        let force = json!({"device": "job", "force": self.job.paused});
        match self.rng.below(5) {
            0 | 1 => {
                if self.command("block-job-cancel", force)? && self.rng.one_in(2) {
                    self.qmp.job_end("job")?;
                    self.job.running = false;
                }
            }
            2 => {
                let arguments = json!({"device": "job", "speed": speed});
                self.command("block-job-set-speed", arguments)?;
            }
            3 if self.job.paused => {
                self.command("block-job-resume", id)?;
                self.job.paused = false;
            }
            3 => self.job.paused = self.command("block-job-pause", id)?,
            _ => {
                self.qmp.execute("query-block-jobs", json!({}))??;
            }
        }
        Ok(())
    }

    /// Runs a command that a job may refuse because it has ended, or is about to.
    fn command(&mut self, command: &str, arguments: Value) -> Res<bool> {
        let Err(refusal) = self.qmp.execute(command, arguments.clone())? else {
            return Ok(true);
        };
        let legal = [
            "not found",
            "cannot accept command verb",
            "lready paused",
            "was not paused",
            "is busy",
            "in use",
            // The layer that should become the base is no longer in the chain.
            "is not a backing image",
            "Can't find",
            "Cannot find",
        ];
        if legal.iter().any(|text| refusal.desc.contains(text)) {
            return Ok(false);
        }
        Err(format!("{command} {arguments}: {refusal}").into())
    }

    /// Looks for the end of the job among the events.
    fn take_events(&mut self) -> Res<()> {
        for event in self.qmp.pending_events()? {
            self.history.push(Step::Job(event.to_string()));
            if common::qmp::is_job_end(&event, "job") {
                self.job.running = false;
                if event["data"].get("error").is_some() {
                    return Err(format!("the job failed: {event}").into());
                }
            }
        }
        Ok(())
    }

    /// Lets the job end by itself or cancels it, and waits for its end.
    fn finish_job(&mut self) -> Res<()> {
        self.take_events()?;
        if !self.job.running {
            return Ok(());
        }
        let id = json!({"device": "job"});
        if self.job.paused {
            self.command("block-job-resume", id.clone())?;
        }
        if self.rng.one_in(2) {
            self.command("block-job-cancel", id)?;
        } else {
            self.command("block-job-set-speed", json!({"device": "job", "speed": 0}))?;
        }
        let end = self.qmp.job_end("job")?;
        if end["data"].get("error").is_some() {
            return Err(format!("the job failed: {end}").into());
        }
        Ok(())
    }

    /// Flushes, then reads the whole disk; what it finds in discarded sectors becomes the truth.
    fn read_all(&mut self) -> Res<Vec<Owner>> {
        let status = self.frontend.queues[0].run(&Op::flush())?;
        assert_eq!(status, frontend::OK, "the last flush");
        let sectors = self.model.len() as u64;
        let mut owners = Vec::new();
        for start in (0..sectors).step_by(LONGEST as usize) {
            let count = LONGEST.min(sectors - start);
            let request = Request {
                kind: frontend::IN,
                start,
                count,
                owner: 0,
                at: 0,
            };
            let data = [(0, count as usize * SECTOR)];
            let status = self.frontend.queues[1].run(&Op::read(start, &data))?;
            assert_eq!(status, frontend::OK, "reading sector {start}");
            owners.extend(self.verify(&request)?);
        }
        Ok(owners)
    }
}
