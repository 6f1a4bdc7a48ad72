//! One disk under test: its image, the guest that uses it, and what it may hold.

use crate::common::frontend::{
    self, DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES,
};
use crate::common::images::{self, ChainPlan};
use crate::common::rng::Rng;
use crate::common::stamp::{self, Owner, SECTOR};
use crate::common::{Res, daemon::Program};
use crate::guest::{Answer, Driver, Guest, Request, Used, Woken};
use crate::model::{Model, Range, Wrong};
use crate::tally::Tally;
use crate::variants::{Begin, Top, Variant};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of a disk.
const SIZE: u64 = 32 << 20;
/// A request type that there is not.
const UNKNOWN: u32 = 77;
/// How long nothing may be answered before the rest counts as never answered.
const PATIENCE: Duration = Duration::from_secs(15);
/// The same of the reference, where it is to be expected.
const PATIENCE_WITH_REFERENCE: Duration = Duration::from_secs(1);

/// What is left out for the back-end under test.
#[derive(Clone, Copy)]
pub struct Abilities {
    /// Write-zeroes requests.
    pub zeroes: bool,
    /// How long an answer is waited for.
    pub patience: Duration,
}

impl Abilities {
    /// Those of `program`: the reference is known to fail some write-zeroes.
    pub fn of(program: &Program) -> Self {
        Abilities {
            zeroes: !program.is_reference(),
            patience: if program.is_reference() {
                PATIENCE_WITH_REFERENCE
            } else {
                PATIENCE
            },
        }
    }
}

/// Whether the back-end is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As far as is known.
    Alive,
    /// It has hung up.
    Gone,
}

/// A disk.
pub struct Disk {
    /// Which one of its process.
    pub number: usize,
    /// The front-end's socket.
    pub socket: PathBuf,
    /// The guest's layer.
    pub top: PathBuf,
    /// Its format.
    pub format: &'static str,
    /// The guest.
    pub guest: Guest,
    model: Model,
    writes: Owner,
    abilities: Abilities,
    variant: Variant,
    /// The last kill, until something was answered after it.
    pub died: Option<Instant>,
    /// The last connection, likewise.
    pub connected: Option<Instant>,
    /// Requests answered since the start.
    pub answers: u64,
    /// Bytes of a cluster, for images that have clusters.
    cluster: Option<u64>,
    copy_on_read: bool,
    /// Clusters that requests may have allocated or freed since the last flush, since the one
    /// before, and since the one before that.
    recent: [u64; 3],
    /// How many clusters the kills so far may have left to nobody.
    leaks_allowed: u64,
    /// An answer was wrong: the ring cannot be gone on with.
    broken: bool,
}

impl Disk {
    /// Makes the image of `variant` in `dir`, and a guest.
    pub fn new(
        dir: &Path,
        number: usize,
        variant: Variant,
        abilities: Abilities,
        rng: &mut Rng,
    ) -> Res<Self> {
        let dir = dir.join(format!("disk{number}"));
        std::fs::create_dir(&dir)?;
        let plan = ChainPlan {
            sectors: SIZE / SECTOR as u64,
            layers: variant.layers.to_vec(),
            pieces: 60,
        };
        let chain = images::make_chain(&dir, &plan, rng)?;
        let (top, format) = chain.layers.first().cloned().ok_or("no layers")?;
        if matches!(variant.top, Top::DataFile | Top::RawDataFile) {
            let options = variant.layers.first().copied().unwrap_or_default();
            let mut options = format!("{options},data_file={}", dir.join("data").display());
            if variant.top == Top::RawDataFile {
                options.push_str(",data_file_raw=on");
            }
            let backing = chain.layers.get(1);
            let backing = backing.map(|(path, format)| (path.as_path(), *format));
            std::fs::remove_file(&top)?;
            images::create(&top, SIZE, &options, backing)?;
        }
        let driver = choose_driver(variant, rng);
        let cluster = match format {
            "qcow2" => Some(cluster_size(&top)?),
            _ => None,
        };
        Ok(Disk {
            number,
            socket: dir.join("vhost.sock"),
            top,
            format,
            guest: Guest::new(driver)?,
            model: Model::new(&chain.owners),
            writes: 1,
            abilities,
            variant,
            died: None,
            connected: None,
            answers: 0,
            cluster,
            copy_on_read: variant.copy_on_read,
            recent: [0; 3],
            leaks_allowed: if variant.stream { u64::MAX } else { 0 },
            broken: false,
        })
    }

    /// The words for the back-end's command line.
    pub fn args(&self, variant: Variant, direct: bool) -> Vec<String> {
        let n = self.number;
        let top = self.top.display();
        let mut file = format!("driver=file,node-name=file{n},filename={top},discard=unmap");
        let mut node = format!("driver={},node-name=disk{n},file=file{n}", self.format);
        node.push_str(",discard=unmap");
        if direct {
            file.push_str(",cache.direct=on");
        }
        if variant.detect_zeroes {
            node.push_str(",detect-zeroes=unmap");
        }
        let mut args = vec!["--blockdev".to_owned(), file, "--blockdev".to_owned(), node];
        let mut root = format!("disk{n}");
        if variant.copy_on_read {
            args.push("--blockdev".to_owned());
            args.push(format!(
                "driver=copy-on-read,node-name=filter{n},file=disk{n}"
            ));
            root = format!("filter{n}");
        }
        args.push("--export".to_owned());
        args.push(format!(
            "type=vhost-user-blk,id=export{n},node-name={root},addr.type=unix,addr.path={},\
             num-queues={},writable=on",
            self.socket.display(),
            self.guest.queues()
        ));
        args
    }

    /// Fills the rings with new requests.
    pub fn fill(&mut self, rng: &mut Rng) -> Res<()> {
        for queue in 0..self.guest.queues() {
            while let Some((slot, data)) = self.guest.free_slot(queue) {
                let request = self.choose(rng);
                if !self.submit(queue, slot, data, request, rng) {
                    break;
                }
            }
        }
        if self.guest.is_linked() {
            self.guest.kick()?;
        }
        Ok(())
    }

    fn choose(&self, rng: &mut Rng) -> Request {
        let kind = match rng.below(32) {
            0 | 1 => FLUSH,
            2 => GET_ID,
            3 => UNKNOWN,
            4..=9 => IN,
            10 | 11 => DISCARD,
            12 | 13 if self.abilities.zeroes => WRITE_ZEROES,
            _ => OUT,
        };
        let nothing = Range { start: 0, count: 0 };
        let mut request = Request {
            kind,
            range: nothing,
            owner: 0,
            status: if kind == UNKNOWN { UNSUPP } else { OK },
        };
        if kind == IN && rng.one_in(16) {
            // Behind the end of the disk: refused, but it was taken from the ring.
            request.range = Range {
                start: self.model.len(),
                count: 8,
            };
            request.status = IOERR;
        } else if matches!(kind, IN | OUT | DISCARD | WRITE_ZEROES) {
            match self.model.choose(kind != IN, rng) {
                Some(range) => request.range = range,
                None => request.kind = FLUSH,
            }
        }
        if request.kind == OUT && !rng.one_in(16) {
            request.owner = self.writes;
        }
        request
    }

    fn submit(
        &mut self,
        queue: usize,
        slot: usize,
        data: usize,
        request: Request,
        rng: &mut Rng,
    ) -> bool {
        if request.kind == OUT {
            self.guest.memory.write(data, &bytes_of(&request));
        }
        if !self.guest.submit(queue, slot, request, rng) {
            return false;
        }
        if request.kind != IN || self.copy_on_read {
            self.count_clusters(request.range);
        }
        match request.kind {
            IN if request.status == OK => self.model.send_read(request.range),
            OUT | DISCARD | WRITE_ZEROES => {
                self.writes += 1;
                let weak = request.kind == DISCARD;
                self.model.send_write(request.range, request.owner, weak);
            }
            _ => {}
        }
        true
    }

    fn count_clusters(&mut self, range: Range) {
        if let (Some(cluster), [now, ..]) = (self.cluster, &mut self.recent)
            && range.count > 0
        {
            // Its own, those that it has a part of, and tables for them.
            *now += (range.count * SECTOR as u64).div_ceil(cluster) + 6;
        }
    }

    /// The process was killed: so many clusters more may belong to nobody.
    pub fn note_kill(&mut self) {
        let recent = self.recent.iter().sum();
        self.leaks_allowed = self.leaks_allowed.saturating_add(recent);
    }

    /// Takes what stands in the used rings, and judges it.
    pub fn take_answers(&mut self, tally: &mut Tally) {
        for queue in 0..self.guest.queues() {
            loop {
                match self.guest.pop(queue) {
                    Ok(None) => break,
                    Ok(Some(Used::Answer(answer))) => self.judge(&answer, tally),
                    Ok(Some(Used::Stray(id))) => {
                        tally.strays += 1;
                        tally.tell(|| format!("queue {queue}: descriptor {id} was answered again"));
                        self.broken = true;
                    }
                    Err(error) => {
                        tally.broken_rings += 1;
                        tally.tell(|| format!("queue {queue}: {error}"));
                        self.broken = true;
                        self.guest.disconnect();
                        return;
                    }
                }
            }
        }
    }

    fn judge(&mut self, answer: &Answer, tally: &mut Tally) {
        if let Some(died) = self.died.take() {
            tally.stalls.push(died.elapsed());
        }
        if let Some(connected) = self.connected.take() {
            tally.served.push(connected.elapsed());
        }
        self.answers += 1;
        tally.answers += 1;
        let request = answer.request;
        if answer.status != request.status {
            tally.statuses += 1;
            tally.tell(|| format!("{request:?}: status {}", answer.status));
        }
        let right = answer.status == OK && request.status == OK;
        match request.kind {
            IN if request.status == OK => {
                self.model.end_read(request.range);
                if right {
                    let mut data = vec![0; request.range.count as usize * SECTOR];
                    self.guest.memory.read(answer.data, &mut data);
                    self.compare(request.range, &data, tally);
                }
            }
            OUT => {
                let mut data = vec![0; request.range.count as usize * SECTOR];
                self.guest.memory.read(answer.data, &mut data);
                if data != bytes_of(&request) {
                    // Whatever was written: it came from what the guest did not put there.
                    tally.overwritten += 1;
                    tally.tell(|| format!("{request:?}: its data has changed in memory"));
                    self.model.forget(request.range);
                } else if right {
                    self.model.complete_write(request.range);
                } else {
                    self.model.abandon_write(request.range);
                }
            }
            FLUSH if right => {
                self.recent.rotate_right(1);
                let [now, ..] = &mut self.recent;
                *now = 0;
            }
            DISCARD | WRITE_ZEROES if right => self.model.complete_write(request.range),
            DISCARD | WRITE_ZEROES => self.model.abandon_write(request.range),
            _ => {}
        }
    }

    fn compare(&mut self, range: Range, data: &[u8], tally: &mut Tally) {
        let mut found: Vec<Wrong> = Vec::new();
        self.model.compare(range, data, &mut found);
        let mut told = None;
        for wrong in found {
            tally.wrong_sectors += 1;
            tally.lose(self.number, wrong.expected);
            // Once for all sectors of a write.
            if told.replace(wrong.expected) != Some(wrong.expected) {
                tally.tell(|| format!("disk {}: {}", self.number, wrong.text));
            }
        }
    }

    /// Waits for signals and takes answers, once.
    pub fn turn(&mut self, patience: Duration, tally: &mut Tally) -> Res<(State, Woken)> {
        let woken = self.guest.sleep(patience)?;
        if woken == Woken::HungUp {
            return Ok((State::Gone, woken));
        }
        self.take_answers(tally);
        Ok((State::Alive, woken))
    }

    /// Waits until nothing is in flight. What is never answered is counted, and the guest reboots.
    pub fn drain(&mut self, tally: &mut Tally, rng: &mut Rng) -> Res<State> {
        let patience = self.abilities.patience;
        let mut last = Instant::now();
        self.take_answers(tally);
        while self.guest.in_flight() > 0 {
            let before = self.guest.in_flight();
            let (state, woken) = self.turn(patience, tally)?;
            if state == State::Gone {
                return Ok(state);
            }
            if self.guest.in_flight() < before {
                last = Instant::now();
            }
            if woken == Woken::TimedOut || last.elapsed() > patience {
                let missed = self.guest.look() as u64;
                if missed > 0 {
                    tally.unsignalled += missed;
                    tally.tell(|| format!("{missed} queues have answers and no signal"));
                    last = Instant::now();
                    self.take_answers(tally);
                    continue;
                }
                let lost = self.guest.in_flight() as u64;
                tally.unanswered += lost;
                tally.tell(|| format!("{lost} requests are never answered"));
                self.broken = true;
                break;
            }
        }
        if self.broken {
            self.guest.disconnect();
            self.reboot(rng)?;
            return self.reconnect();
        }
        Ok(State::Alive)
    }

    /// Connects again to a back-end that was alive a moment ago.
    fn reconnect(&mut self) -> Res<State> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while let Err(error) = self.guest.connect(&self.socket) {
            if Instant::now() > deadline {
                println!("  no new connection: {error}");
                return Ok(State::Gone);
            }
            // A poll of a condition with a deadline: nothing depends on how long this takes.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(State::Alive)
    }

    /// Reads the whole disk and compares it.
    pub fn verify(&mut self, tally: &mut Tally, rng: &mut Rng) -> Res<State> {
        let pieces: Vec<Range> = self.model.pieces().collect();
        let mut pieces = pieces.into_iter().peekable();
        while pieces.peek().is_some() {
            for queue in 0..self.guest.queues() {
                while let Some((slot, data)) = self.guest.free_slot(queue)
                    && let Some(&range) = pieces.peek()
                {
                    let request = Request {
                        kind: IN,
                        range,
                        owner: 0,
                        status: OK,
                    };
                    if !self.submit(queue, slot, data, request, rng) {
                        break;
                    }
                    pieces.next();
                }
            }
            self.guest.kick()?;
            let (state, woken) = self.turn(frontend::PATIENCE, tally)?;
            if state == State::Gone {
                return Ok(state);
            }
            if woken == Woken::TimedOut {
                break;
            }
        }
        self.drain(tally, rng)
    }

    /// The guest begins anew. Nobody answers what it had in flight.
    pub fn reboot(&mut self, rng: &mut Rng) -> Res<()> {
        let driver = choose_driver(self.variant, rng);
        self.broken = false;
        for request in self.guest.reboot(driver)? {
            match request.kind {
                IN if request.status == OK => self.model.end_read(request.range),
                OUT | DISCARD | WRITE_ZEROES => self.model.abandon_write(request.range),
                _ => {}
            }
        }
        Ok(())
    }

    /// The guest shuts its device down properly and begins anew. All that the back-end has taken must
    /// have been answered by then; the rest is still the guest's.
    pub fn reboot_properly(&mut self, tally: &mut Tally, rng: &mut Rng) -> Res<()> {
        let untaken = self.guest.stop_device(rng.one_in(2))?;
        self.guest.look();
        self.take_answers(tally);
        let left = self.guest.in_flight();
        if left != untaken {
            tally.unanswered += left.abs_diff(untaken) as u64;
            tally.tell(|| {
                format!(
                    "{left} requests in flight, {untaken} not taken, when the device was stopped"
                )
            });
        }
        self.reboot(rng)
    }

    /// The image by itself, after the back-end's end: `qemu-img check`, and every byte.
    pub fn judge_image(&mut self, tally: &mut Tally, name: &str, kills: u64) -> Res<()> {
        images::wait_unlocked(&self.top)?;
        if self.format == "qcow2" {
            match leaks(&self.top) {
                Ok((clusters, bytes)) => {
                    tally.leaks.push((name.to_owned(), clusters, bytes, kills))
                }
                Err(error) => {
                    tally.corrupt += 1;
                    tally.tell(|| error.to_string());
                }
            }
        }
        let scratch = self.top.with_extension("flat");
        let names = (images::text(&self.top)?, images::text(&scratch)?);
        images::qemu_img(&["convert", "-f", self.format, "-O", "raw", names.0, names.1])?;
        let file = File::open(&scratch)?;
        for range in self.model.pieces() {
            let mut data = vec![0; range.count as usize * SECTOR];
            file.read_exact_at(&mut data, range.start * SECTOR as u64)?;
            self.compare(range, &data, tally);
        }
        Ok(std::fs::remove_file(&scratch)?)
    }
}

fn bytes_of(request: &Request) -> Vec<u8> {
    let mut bytes = vec![0; request.range.count as usize * SECTOR];
    stamp::fill_all(&mut bytes, request.owner, request.range.start);
    bytes
}

fn choose_driver(variant: Variant, rng: &mut Rng) -> Driver {
    let indirect = rng.one_in(2);
    Driver {
        queues: variant.queues,
        region: variant.region,
        // A ring may be smaller than what the back-end was told that a queue can be.
        ring: if indirect && rng.one_in(2) { 64 } else { 128 },
        indirect,
        event_idx: !rng.one_in(4),
        index: match variant.begin {
            Begin::Zero => 0,
            Begin::Anywhere => rng.below(1 << 16) as u16,
            Begin::BeforeTheWrap => 65_400 + rng.below(130) as u16,
        },
    }
}

/// Leaked clusters of an image, and their bytes. Errors in the image are an error.
fn leaks(path: &Path) -> Res<(u64, u64)> {
    images::check(path)?;
    let size = cluster_size(path)?;
    let words = ["check", "-f", "qcow2", "--output=json", images::text(path)?];
    let output = images::run("qemu-img", &words)?;
    let checked: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let clusters = checked["leaks"].as_u64().unwrap_or(0);
    Ok((clusters, clusters * size))
}

fn cluster_size(path: &Path) -> Res<u64> {
    let words = ["info", "-f", "qcow2", "--output=json", images::text(path)?];
    let info: serde_json::Value = serde_json::from_str(&images::qemu_img(&words)?)?;
    Ok(info["cluster-size"].as_u64().ok_or("no cluster size")?)
}
