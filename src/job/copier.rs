//! The copier: what all jobs that copy a device have in common. It goes through the device in order,
//! keeps the low-water mark, and sees to errors, pauses and the speed limit.
//!
//! Ranges that need no copy are passed over at no cost; of the others several copies are in flight
//! at once, in pieces small enough for the speed limit to be kept smoothly. While a guest is
//! active, there is one at a time, and a smaller one where it would wait for the processor
//! meanwhile. Copies may land in any order; what clients see as `offset` is the mark below which
//! all have landed.
//!
//! How ranges are looked up and copied is the business of a [`CopySource`]. What makes the result
//! count is the body's.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;

use futures_util::StreamExt;
use futures_util::future::{self, Either, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;

use super::JobError;
use super::context::{ErrorAction, Flow, JobContext};
use super::settle::Settle;
use super::source::{CopySource, GuestLoad, JobIoError, yield_now};
use super::survey::Survey;
use crate::chain::CopyStatus;

/// The most that is copied by one request. Larger clusters are copied whole all the same: the first
/// request that touches one does it.
pub const MAX_COPY: u64 = 512 << 10;

/// How many copies are in flight at most.
pub const MAX_IN_FLIGHT: usize = 4;

/// How many copies are in flight at most while a guest is active: it may have to wait for that long
/// behind them at the disk.
pub const POLITE_IN_FLIGHT: usize = 1;

/// The most that is copied by one request while a guest's threads wait for a processor, which the
/// job may hold: they wait until it is done. Less costs the stream more than it brings them.
pub const CONTENDED_COPY: u64 = 128 << 10;

/// How far ahead ranges are looked up at once.
const LOOK_AHEAD: u64 = 64 << 20;

/// Copies all that `source` has to copy, as the job's verbs and its speed allow, and makes it stable.
/// Ends early when the job is to stop.
///
/// # Errors
/// The error that ends the job.
pub async fn run(source: &dyn CopySource, context: &JobContext) -> Result<(), JobError> {
    context.set_len(source.len());
    let survey = Survey::new(source, context);
    let settle = Settle::new(source, context);
    let copying = pin!(async {
        let mut result = Copier::new(source, context, &survey, &settle).run().await;
        // What they have begun comes to its end.
        drop(survey.rest().await);
        match &result {
            _ if context.is_suspended() => {}
            Ok(()) => result = settle.last().await,
            Err(_) => settle.try_now().await,
        }
        drop(settle.rest().await);
        result
    });
    let (surveying, settling) = (pin!(survey.run()), pin!(settle.run()));
    let beside = future::select(surveying, settling);
    match future::select(copying, beside).await {
        Either::Left((result, _)) => result,
        Either::Right((Either::Left((never, _)) | Either::Right((never, _)), _)) => match never {},
    }
}

/// A stretch of the device.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    end: u64,
    /// It has data to move, not only zeros to be noted.
    data: bool,
}

impl Range {
    fn len(self) -> u64 {
        self.end - self.start
    }
}

/// A copy that came to its end.
struct Landed {
    range: Range,
    /// It was let through by a speed limit, which has to know what it moved.
    limited: bool,
    result: Result<u64, JobIoError>,
}

/// What is to be done next.
enum Work {
    /// Copy this; it was tried before.
    Again(Range),
    /// Copy this, the next in order.
    Next(Range),
    /// A range was passed over, or an error was seen to.
    Moved,
    /// All has been begun.
    None,
}

struct Copier<'a> {
    source: &'a dyn CopySource,
    context: &'a JobContext,
    survey: &'a Survey<'a>,
    settle: &'a Settle<'a>,
    /// All before it was begun or passed over.
    next: u64,
    /// What is known to need copying from `next` on.
    known: Option<Range>,
    /// What failed and is to be tried again.
    failed: VecDeque<Range>,
    in_flight: FuturesUnordered<LocalBoxFuture<'a, Landed>>,
    /// All before it is done.
    low_water: u64,
    /// What is done beyond `low_water`: starts and ends.
    done: BTreeMap<u64, u64>,
    /// The job was told to stop at an error, and did not get there yet.
    stopping: bool,
    /// The first error that was ignored.
    ignored: Option<JobError>,
    /// The error that ends the job.
    fatal: Option<JobError>,
}

impl<'a> Copier<'a> {
    fn new(
        source: &'a dyn CopySource,
        context: &'a JobContext,
        survey: &'a Survey<'a>,
        settle: &'a Settle<'a>,
    ) -> Self {
        Self {
            source,
            context,
            survey,
            settle,
            next: 0,
            known: None,
            failed: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            low_water: 0,
            done: BTreeMap::new(),
            stopping: false,
            ignored: None,
            fatal: None,
        }
    }

    async fn run(&mut self) -> Result<(), JobError> {
        if self.context.is_restored() {
            self.pass_over().await;
        }
        loop {
            // `stopping` by itself, too: the job may have been resumed before it got here.
            if self.fatal.is_some() || self.stopping || self.context.interrupted() {
                self.land_all().await;
                if let Some(error) = self.fatal.take() {
                    return Err(error);
                }
                let resting = self.survey.rest().await;
                if !self.context.should_stop() {
                    self.settle.try_now().await;
                }
                self.context.pause_point().await;
                drop(resting);
                if self.context.should_stop() {
                    return Ok(());
                }
                self.stopping = false;
            }
            if self.in_flight.len() >= self.max_in_flight() {
                self.land_one().await;
                continue;
            }
            match self.find_work().await {
                Work::Again(range) => {
                    if self.pay(range).await {
                        self.failed.pop_front();
                        self.launch(range);
                    }
                }
                Work::Next(range) => {
                    if self.pay(range).await {
                        self.next = range.end;
                        if range.data {
                            self.survey.begin(range.start, range.len());
                        }
                        self.launch(range);
                    }
                }
                Work::Moved => yield_now().await,
                Work::None if self.in_flight.is_empty() => break,
                Work::None => self.land_one().await,
            }
        }
        self.ignored.take().map_or(Ok(()), Err)
    }

    /// Goes on to the first range that needs something, paused or not: to where the process came
    /// that began the job.
    async fn pass_over(&mut self) {
        while !self.context.should_stop() && !self.stopping && self.fatal.is_none() {
            match self.find_work().await {
                Work::Moved => yield_now().await,
                Work::Again(_) | Work::Next(_) | Work::None => return,
            }
        }
    }

    fn max_in_flight(&self) -> usize {
        match self.source.guest_load() {
            GuestLoad::Idle => MAX_IN_FLIGHT,
            GuestLoad::Active | GuestLoad::CpuContended => POLITE_IN_FLIGHT,
        }
    }

    /// The most to copy at once, where clusters have `cluster` bytes.
    fn max_copy(&self, cluster: u64) -> u64 {
        match self.source.guest_load() {
            GuestLoad::Idle | GuestLoad::Active => MAX_COPY,
            // A cluster is copied whole in any case.
            GuestLoad::CpuContended => CONTENDED_COPY.max(cluster),
        }
    }

    async fn find_work(&mut self) -> Work {
        if let Some(range) = self.failed.front() {
            return Work::Again(*range);
        }
        let len = self.source.len();
        if self.next >= len {
            self.survey.passed(u64::MAX);
            return Work::None;
        }
        if let Some(known) = self.known
            && known.end > self.next
        {
            return Work::Next(self.piece_of(known.end, known.data));
        }
        self.survey.passed(self.next);
        let source = self.source;
        let lookup = source.status(self.next, LOOK_AHEAD.min(len - self.next));
        match self.meanwhile(lookup).await {
            None => Work::Moved,
            Some(Ok((0, _))) => self.lookup_failed(JobIoError {
                errno: libc::EIO,
                write: false,
                text: format!("nothing is known about the device at {}", self.next),
            }),
            Some(Ok((found, status))) => {
                let end = self.next.saturating_add(found).min(len);
                let found = Range {
                    start: self.next,
                    end,
                    data: status == CopyStatus::Data,
                };
                if found.data || status == CopyStatus::Zero {
                    self.known = Some(found);
                    return Work::Next(self.piece_of(end, found.data));
                }
                self.mark_done(found);
                self.next = end;
                Work::Moved
            }
            Some(Err(error)) => self.lookup_failed(error),
        }
    }

    /// The next piece to copy, where all up to `end` needs it. Pieces end where clusters do.
    fn piece_of(&self, end: u64, data: bool) -> Range {
        let cluster = self.source.cluster_size().clamp(1, MAX_COPY);
        let size = self.context.smooth_request(cluster, self.max_copy(cluster));
        let wanted = self.next.saturating_add(size);
        let aligned = wanted - wanted % cluster;
        let piece_end = if aligned > self.next { aligned } else { wanted };
        Range {
            start: self.next,
            end: piece_end.min(end),
            data,
        }
    }

    fn lookup_failed(&mut self, error: JobIoError) -> Work {
        let range = self.piece_of(self.source.len(), false);
        if self.decide(&error) == Some(ErrorAction::Ignore) {
            self.mark_done(range);
            self.next = range.end;
        }
        Work::Moved
    }

    /// Waits for the speed limit; false if there is something else to see to first.
    async fn pay(&mut self, range: Range) -> bool {
        let context = self.context;
        self.meanwhile(context.limit(range.len())).await == Some(Flow::Go)
    }

    fn launch(&mut self, range: Range) {
        let source = self.source;
        let limited = self.context.is_limited();
        self.in_flight.push(Box::pin(async move {
            let result = source.copy(range.start, range.len()).await;
            Landed {
                range,
                limited,
                result,
            }
        }));
    }

    /// Waits for `future` while copies go on; nothing if one of them ends the job.
    async fn meanwhile<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        while !self.in_flight.is_empty() {
            match future::select(future.as_mut(), self.in_flight.next()).await {
                Either::Left((value, _)) => return Some(value),
                Either::Right((landed, _)) => {
                    if let Some(landed) = landed {
                        self.land(landed);
                    }
                    if self.fatal.is_some() {
                        return None;
                    }
                }
            }
        }
        Some(future.await)
    }

    async fn land_one(&mut self) {
        if let Some(landed) = self.in_flight.next().await {
            self.land(landed);
        }
    }

    async fn land_all(&mut self) {
        while !self.in_flight.is_empty() {
            self.land_one().await;
        }
    }

    fn land(&mut self, landed: Landed) {
        let Landed {
            range,
            limited,
            result,
        } = landed;
        let ended = |moved| {
            if range.data {
                self.survey.end(range.len(), moved);
            }
        };
        match result {
            Ok(moved) => {
                ended(moved);
                self.settle.copied();
                if limited {
                    self.context.settle(range.len(), moved);
                }
                self.mark_done(range);
            }
            Err(error) => match self.decide(&error) {
                Some(ErrorAction::Ignore) => {
                    ended(0);
                    self.mark_done(range);
                }
                _ => self.failed.push_back(range),
            },
        }
    }

    /// What is done about an error; nothing if the job is about to stop anyway. Then whatever
    /// failed is tried again later, and fails again if it must.
    fn decide(&mut self, error: &JobIoError) -> Option<ErrorAction> {
        log::warn!("{}: {error}", self.context.name());
        if self.stopping || self.fatal.is_some() || self.context.should_stop() {
            return None;
        }
        let action = self.context.error_action(error.errno, error.write);
        match action {
            ErrorAction::Report => self.fatal = Some(JobError::from_errno(error.errno)),
            ErrorAction::Ignore => {
                self.ignored
                    .get_or_insert_with(|| JobError::from_errno(error.errno));
            }
            ErrorAction::Stop => self.stopping = true,
        }
        Some(action)
    }

    fn mark_done(&mut self, range: Range) {
        self.done.insert(range.start, range.end);
        while let Some(entry) = self.done.first_entry() {
            if *entry.key() > self.low_water {
                break;
            }
            self.low_water = self.low_water.max(entry.remove());
        }
        self.context.advance(self.low_water);
    }
}
