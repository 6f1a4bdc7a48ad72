//! A guest that always has requests in flight, on a thread of its own, and knows what its disk holds.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::Res;
use crate::common::frontend::{self, Frontend, OK, Op, PATIENCE, Segment};
use crate::common::rng::Rng;
use crate::common::stamp::{self, Owner, SECTOR};
use crate::model::{LONGEST, Model, Range};

/// Requests in flight.
const DEPTH: usize = 24;
const RING: u16 = 128;
const SLOT: usize = LONGEST as usize * SECTOR;

#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    range: Range,
    sent: u64,
}

/// What the guest's thread has.
pub struct Inner {
    socket: PathBuf,
    frontend: Option<Frontend>,
    /// A back-end serves it.
    linked: bool,
    model: Model,
    slots: Vec<Option<Request>>,
    owner: Owner,
    rng: Rng,
    /// One of so many requests is a flush.
    flushes: u64,
    answers: u64,
    failure: Option<String>,
}

/// What a guest looks at when it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At nothing in particular.
    Nothing,
    /// At the whole disk, which holds all that completed.
    Whole,
    /// The same after a power cut: what it finds counts from then on.
    AfterCut,
}

type Order = Box<dyn FnOnce(&mut Inner) + Send>;

/// A guest.
pub struct Guest {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// A guest whose disk, served at `socket`, reads as `owners`. It is not connected yet.
    pub fn new(socket: PathBuf, owners: &[Owner], rng: Rng) -> Self {
        let (orders, received) = channel();
        let inner = Inner {
            socket,
            frontend: None,
            linked: false,
            model: Model::new(owners),
            slots: vec![None; DEPTH],
            owner: 1,
            rng,
            flushes: 32,
            answers: 0,
            failure: None,
        };
        Guest {
            orders: Some(orders),
            thread: Some(std::thread::spawn(move || live(inner, &received))),
        }
    }

    fn ask<R: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Inner) -> R + Send + 'static,
    ) -> Res<R> {
        let (answer, answered) = channel();
        let order: Order = Box::new(move |inner| {
            let _ = answer.send(what(inner));
        });
        let orders = self.orders.as_ref().ok_or("the guest has ended")?;
        orders
            .send(order)
            .map_err(|_| "the guest's thread has ended")?;
        answered
            .recv_timeout(2 * PATIENCE)
            .map_err(|_| "the guest's thread does not answer".into())
    }

    /// Connects to a back-end: with all that is in flight, if there was one before. It looks at its disk
    /// before anything else is asked for.
    pub fn connect(&self, look: Look) -> Res<()> {
        self.ask(move |inner| {
            let connected = inner.connect();
            let read = connected.and_then(|()| match look {
                Look::Nothing => Ok(()),
                Look::Whole => inner.verify(false),
                Look::AfterCut => inner.verify(true),
            });
            read.map_err(|e| e.to_string())
        })?
        .map_err(Into::into)
    }

    /// Looks how long the disk is, which has become longer.
    pub fn grown(&self) -> Res<()> {
        self.ask(|inner| inner.find_size().map_err(|e| e.to_string()))?
            .map_err(Into::into)
    }

    /// How many requests have been answered so far.
    pub fn answers(&self) -> Res<u64> {
        let (answers, failure) = self.ask(|inner| (inner.answers, inner.failure.clone()))?;
        failure.map_or(Ok(answers), |failure| Err(failure.into()))
    }

    /// The back-end is gone. What has been answered is seen.
    pub fn lose(&self) -> Res<()> {
        self.ask(Inner::lose)?.map_err(Into::into)
    }

    /// Waits for all that is in flight, and hangs up.
    pub fn leave(&self) -> Res<()> {
        self.ask(|inner| {
            let left = inner.drain().map_err(|e| e.to_string());
            inner.linked = false;
            inner.frontend = None;
            left
        })?
        .map_err(Into::into)
    }

    /// Compares what is on the disk now.
    pub fn compare(&self, found: Vec<Result<Owner, String>>) -> Res<()> {
        self.ask(move |inner| inner.model.compare_all(&found).map_err(|e| e.to_string()))?
            .map_err(Into::into)
    }

    /// The machine has stopped: what was in flight is nobody's.
    pub fn reboot(&self) -> Res<()> {
        self.ask(|inner| {
            inner.linked = false;
            inner.frontend = None;
            inner.slots.fill(None);
            inner.model.cut();
        })
    }

    /// Waits for all that is in flight and reads the whole disk.
    pub fn verify(&self) -> Res<()> {
        self.ask(|inner| inner.verify(false).map_err(|e| e.to_string()))?
            .map_err(Into::into)
    }

    /// Waits until so many more requests have been answered.
    pub fn work(&self, requests: u64) -> Res<()> {
        let begun = self.answers()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.answers()? >= begun + requests {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the guest's requests are not answered".into());
            }
            std::thread::yield_now();
        }
    }

    /// What has gone wrong, if anything has.
    pub fn check(&self) -> Res<()> {
        match self.ask(|inner| inner.failure.clone())? {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn live(mut inner: Inner, orders: &Receiver<Order>) {
    loop {
        match orders.try_recv() {
            Ok(order) => {
                order(&mut inner);
                continue;
            }
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {}
        }
        if inner.linked && inner.failure.is_none() {
            if let Err(error) = inner.turn() {
                inner.failure = Some(error.to_string());
            }
            continue;
        }
        match orders.recv() {
            Ok(order) => order(&mut inner),
            Err(_) => return,
        }
    }
}

impl Inner {
    fn connect(&mut self) -> Res<()> {
        match &mut self.frontend {
            Some(frontend) => frontend.reconnect(&self.socket)?,
            None => self.frontend = Some(connect(&self.socket)?),
        }
        self.linked = true;
        // Some guests flush all the time, others hardly ever.
        self.flushes = [8, 32, 32, 400, 4000][self.rng.below(5) as usize];
        self.find_size()
    }

    fn find_size(&mut self) -> Res<()> {
        let frontend = self.frontend.as_ref().ok_or("no front-end")?;
        let sectors = frontend.config()?.capacity.to_native();
        if sectors < self.model.len() {
            let had = self.model.len();
            return Err(format!("the disk has {sectors} sectors, and had {had}").into());
        }
        self.model.grow(sectors);
        Ok(())
    }

    fn lose(&mut self) -> Result<(), String> {
        self.linked = false;
        self.take().map_err(|e| e.to_string())
    }

    /// Sends what fits, waits a moment, and takes what has come.
    fn turn(&mut self) -> Res<()> {
        for slot in 0..DEPTH {
            if self.slots.get(slot).is_some_and(Option::is_none) {
                self.send(slot)?;
            }
        }
        self.wait(Duration::from_millis(2))?;
        self.take()
    }

    fn wait(&mut self, patience: Duration) -> Res<bool> {
        let frontend = self.frontend.as_mut().ok_or("no front-end")?;
        let queue = frontend.queues.first_mut().ok_or("no queue")?;
        queue.kick()?;
        let found = !queue.arm() || frontend::poll(&[queue.call_fd()], patience)?;
        queue.disarm()?;
        Ok(found)
    }

    fn send(&mut self, slot: usize) -> Res<()> {
        let kind = match self.rng.below(32) {
            _ if self.rng.one_in(self.flushes) => frontend::FLUSH,
            1 | 2 => frontend::DISCARD,
            3 | 4 => frontend::WRITE_ZEROES,
            5..=10 => frontend::IN,
            _ => frontend::OUT,
        };
        let writes = kind != frontend::IN;
        let range = match kind {
            frontend::FLUSH => Some(Range { start: 0, count: 0 }),
            _ => self.model.choose(writes, &mut self.rng),
        };
        let Some(range) = range else {
            return Ok(());
        };
        let sent = self.model.tick();
        match kind {
            frontend::FLUSH => {}
            frontend::IN => self.model.send_read(range),
            frontend::OUT => {
                self.owner += 1;
                self.model.send_write(range, self.owner, false, sent);
            }
            kind => self
                .model
                .send_write(range, 0, kind == frontend::DISCARD, sent),
        }
        let request = Request { kind, range, sent };
        let unmap = self.rng.one_in(2);
        self.submit(slot, request, unmap)
    }

    fn submit(&mut self, slot: usize, request: Request, unmap: bool) -> Res<()> {
        let Request { kind, range, .. } = request;
        let frontend = self.frontend.as_mut().ok_or("no front-end")?;
        let data = [(slot * SLOT, range.count as usize * SECTOR)];
        let segments = [Segment {
            sector: range.start,
            count: range.count as u32,
            flags: u32::from(kind == frontend::WRITE_ZEROES && unmap),
        }];
        let op = match kind {
            frontend::FLUSH => Op::flush(),
            frontend::IN => Op::read(range.start, &data),
            frontend::OUT => {
                let mut bytes = vec![0; range.count as usize * SECTOR];
                stamp::fill_all(&mut bytes, self.owner, range.start);
                frontend.memory.write(slot * SLOT, &bytes);
                Op::write(range.start, &data)
            }
            kind => Op::ranges(kind, &segments),
        };
        let queue = frontend.queues.first_mut().ok_or("no queue")?;
        queue.submit(&op, slot as u64)?;
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(request);
        }
        Ok(())
    }

    /// Takes what has been answered.
    fn take(&mut self) -> Res<()> {
        loop {
            let Some(frontend) = &mut self.frontend else {
                return Ok(());
            };
            let queue = frontend.queues.first_mut().ok_or("no queue")?;
            let Some(done) = queue.pop()? else {
                return Ok(());
            };
            let slot = done.token as usize;
            let request = self.slots.get_mut(slot).and_then(Option::take);
            let Request { kind, range, sent } = request.ok_or("an answer to no request")?;
            if done.status != OK {
                return Err(format!(
                    "request type {kind} at {} for {}: status {}",
                    range.start, range.count, done.status
                )
                .into());
            }
            self.answers += 1;
            match kind {
                frontend::FLUSH => self.model.complete_flush(sent),
                frontend::IN => {
                    let mut bytes = vec![0; range.count as usize * SECTOR];
                    frontend.memory.read(slot * SLOT, &mut bytes);
                    self.model.end_read(range);
                    self.model.compare(range, &bytes)?;
                }
                _ => self.model.complete_write(range, sent),
            }
        }
    }

    fn drain(&mut self) -> Res<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.slots.iter().any(Option::is_some) {
            self.wait(Duration::from_millis(50))?;
            self.take()?;
            if Instant::now() > deadline {
                let left = self.slots.iter().flatten().count();
                return Err(format!("{left} requests are never answered").into());
            }
        }
        Ok(())
    }

    fn verify(&mut self, after_cut: bool) -> Res<()> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone().into());
        }
        self.drain()?;
        let pieces: Vec<_> = self.model.pieces().collect();
        for range in pieces {
            let frontend = self.frontend.as_mut().ok_or("no front-end")?;
            let mut bytes = vec![0x5a; range.count as usize * SECTOR];
            frontend.memory.write(0, &bytes);
            let data = [(0, bytes.len())];
            let queue = frontend.queues.first_mut().ok_or("no queue")?;
            let status = queue.run(&Op::read(range.start, &data))?;
            if status != OK {
                return Err(format!("read of sector {}: status {status}", range.start).into());
            }
            frontend.memory.read(0, &mut bytes);
            if after_cut {
                self.model.settle(range, &bytes)?;
            } else {
                self.model.compare(range, &bytes)?;
            }
        }
        Ok(())
    }
}

fn connect(socket: &Path) -> Res<Frontend> {
    Frontend::connect_tracked(socket, 1, RING, DEPTH * SLOT, true)
}
