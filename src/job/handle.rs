//! One job as its clients see it: what they may ask of it and what it tells about itself.

use std::sync::Arc;

use event_listener::{Event as Signal, EventListener};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};

use super::Lease;
use super::ledger::Ledger;
use super::runner::Clock;
use super::status::{IoStatus, Progress, Status, Verb};
use super::{Event, EventSink, Refused};
use crate::state::record::{self, Work};
use crate::throttle::pacing::{Bucket, Grant, Ticket};

pub use crate::state::record::OnError;

/// What a new job is to be.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Its name.
    pub id: String,
    /// What kind of job it is: `stream` or `commit`.
    pub kind: &'static str,
    /// How much there is to do, in bytes, so that clients know before the body has begun.
    pub len: u64,
    /// Its speed limit in bytes per second; 0 is none.
    pub speed: u64,
    /// What it does about errors.
    pub on_error: OnError,
    /// Whether its result is put in force without being asked.
    pub auto_finalize: bool,
    /// Whether it disappears when it is over.
    pub auto_dismiss: bool,
    /// What it does, for those who go on with it in another process: `None` if nobody can.
    pub work: Option<Work>,
    /// The name that its client has given its filter in the graph.
    pub filter: Option<String>,
    /// Whether its nodes stay its own when it has ended, until it is dismissed.
    pub holds: HoldsNodes,
}

/// Which jobs keep their nodes until they are dismissed: as in QEMU, those whose filter node goes only
/// then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldsNodes {
    /// However it has ended.
    Always,
    /// When its result is in force.
    Completed,
    /// It does not.
    Never,
}

impl HoldsNodes {
    /// Whether a job that has ended, and has `completed` or not, holds its nodes.
    #[must_use]
    pub fn after(self, completed: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Completed => completed,
            Self::Never => false,
        }
    }

    /// For a job that does this.
    #[must_use]
    pub fn of(work: &Work) -> Self {
        match work {
            Work::Stream(_) => Self::Always,
            Work::Commit(commit) => Self::of_commit(commit.overlay.is_some()),
        }
    }

    /// For a commit, which changes the header of an overlay or puts the guest on the base.
    #[must_use]
    pub fn of_commit(has_overlay: bool) -> Self {
        match has_overlay {
            true => Self::Completed,
            false => Self::Never,
        }
    }
}

impl JobSpec {
    /// A stream job with the defaults of QMP.
    pub fn stream(id: impl Into<String>) -> Self {
        Self::new("stream", id)
    }

    /// A job of this kind with the defaults of QMP.
    pub fn new(kind: &'static str, id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            kind,
            len: 0,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            work: None,
            holds: HoldsNodes::Always,
            filter: None,
        }
    }

    /// What a job is that was recorded.
    pub(super) fn recorded(job: &record::Job) -> Self {
        Self {
            len: job.len,
            speed: job.speed,
            on_error: job.on_error,
            auto_finalize: job.auto_finalize,
            auto_dismiss: job.auto_dismiss,
            work: Some(job.work.clone()),
            holds: HoldsNodes::of(&job.work),
            filter: job.filter.clone(),
            ..Self::new(job.work.kind(), &job.id)
        }
    }

    /// Whether it is a job on a disk that guests may use. Others are known to the commands and events
    /// for all jobs alone.
    #[must_use]
    pub fn is_block_job(&self) -> bool {
        is_block_job(self.kind)
    }

    /// The record of a new job.
    fn record(&self) -> Option<record::Job> {
        Some(record::Job {
            number: 0,
            id: self.id.clone(),
            work: self.work.clone()?,
            filter: self.filter.clone(),
            len: self.len,
            speed: self.speed,
            on_error: self.on_error,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            paused: false,
            io_status: IoStatus::Ok,
            cancelled: false,
            completing: false,
            finalized: false,
            commit: None,
            end: None,
        })
    }
}

fn is_block_job(kind: &str) -> bool {
    kind != "create"
}

/// What a job looks like at one moment.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// What kind of job it is.
    pub kind: &'static str,
    /// Its state.
    pub status: Status,
    /// How much there is to do, in bytes.
    pub len: u64,
    /// How much is done.
    pub offset: u64,
    /// How much of it is copied, and is to be.
    pub progress: Progress,
    /// Whether it is at work right now, rather than asleep.
    pub busy: bool,
    /// Whether it was told to pause.
    pub paused: bool,
    /// Its speed limit; 0 is none.
    pub speed: u64,
    /// How its last I/O went.
    pub io_status: IoStatus,
    /// See [`JobSpec::auto_finalize`].
    pub auto_finalize: bool,
    /// See [`JobSpec::auto_dismiss`].
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
}

impl JobInfo {
    /// See [`JobSpec::is_block_job`].
    #[must_use]
    pub fn is_block_job(&self) -> bool {
        is_block_job(self.kind)
    }

    /// The job as an item of `query-block-jobs`.
    pub fn to_block_job(&self) -> Value {
        let mut value = json!({
            "auto-finalize": self.auto_finalize,
            "io-status": self.io_status.name(),
            "device": self.id,
            "auto-dismiss": self.auto_dismiss,
            "busy": self.busy,
            "len": self.len,
            "offset": self.offset,
            "status": self.status.name(),
            "paused": self.paused,
            "speed": self.speed,
            "ready": matches!(self.status, Status::Ready | Status::Standby),
            "type": self.kind,
            "copied": self.progress.copied,
            "to-copy": self.progress.to_copy,
            "to-copy-final": self.progress.all_seen,
        });
        self.add_error(&mut value);
        value
    }

    /// The job as an item of `query-jobs`.
    pub fn to_job(&self) -> Value {
        let mut value = json!({
            "current-progress": self.offset,
            "status": self.status.name(),
            "total-progress": self.len,
            "type": self.kind,
            "id": self.id,
        });
        self.add_error(&mut value);
        value
    }

    fn add_error(&self, value: &mut Value) {
        if let (Some(error), Some(members)) = (&self.error, value.as_object_mut()) {
            members.insert("error".to_owned(), error.as_str().into());
        }
    }
}

/// How a job that is ready is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Its result is put in force.
    Result,
    /// The copy is left as it is.
    Copy,
}

/// What changes in a job's life. Changes are made, and told, with the lock held, so that events come
/// in the order of the changes.
pub(super) struct State {
    pub status: Status,
    /// A client wants it to pause, or an error has made it.
    pub pause: bool,
    pub cancel: bool,
    /// It is to end for now: another process goes on with it.
    pub suspend: bool,
    /// The body is asleep: it waits for its speed limit or to be resumed.
    pub idle: bool,
    /// It has done all, and follows what it copies.
    pub ready: bool,
    /// A client asked a job that is ready to end: with its result, or without.
    pub complete: Option<Completion>,
    /// A client asked for the result to be put in force.
    pub finalize: bool,
    /// The result is being put in force: too late to cancel.
    pub committing: bool,
    pub len: u64,
    pub offset: u64,
    pub progress: Progress,
    pub io_status: IoStatus,
    pub error: Option<String>,
    pub bucket: Bucket,
    /// The nodes the job works on, until nobody sees it any more.
    pub lease: Option<Lease>,
}

/// A job. Clients hold it through the [`super::Manager`].
pub struct Job {
    spec: JobSpec,
    state: Mutex<State>,
    /// Held while something about the job that is recorded changes: first on the disk, and then,
    /// with what it was checked against still true, in [`State`]. Taken before any other lock.
    turn: Mutex<()>,
    /// Where it is recorded.
    ledger: Option<Arc<dyn Ledger>>,
    /// The number of its record.
    number: u64,
    /// Another process began it.
    restored: bool,
    /// Told at every change the body or the driver may wait for.
    changed: Signal,
    clock: Arc<dyn Clock>,
    events: EventSink,
}

impl Job {
    pub(super) fn new(
        spec: JobSpec,
        lease: Option<Lease>,
        clock: Arc<dyn Clock>,
        events: EventSink,
        ledger: Option<Arc<dyn Ledger>>,
    ) -> Self {
        let state = State {
            status: Status::Created,
            pause: false,
            cancel: false,
            suspend: false,
            idle: false,
            ready: false,
            complete: None,
            finalize: false,
            committing: false,
            len: spec.len,
            offset: 0,
            progress: Progress::default(),
            io_status: IoStatus::Ok,
            error: None,
            bucket: Bucket::new(spec.speed, clock.now()),
            lease,
        };
        let ledger = ledger.filter(|_| spec.work.is_some());
        Self {
            spec,
            state: Mutex::new(state),
            turn: Mutex::new(()),
            ledger,
            number: 0,
            restored: false,
            changed: Signal::new(),
            clock,
            events,
        }
    }

    /// A job that another process recorded as `from`.
    pub(super) fn restored(
        from: &record::Job,
        lease: Option<Lease>,
        clock: Arc<dyn Clock>,
        events: EventSink,
        ledger: Option<Arc<dyn Ledger>>,
    ) -> Self {
        let job = Self::new(JobSpec::recorded(from), lease, clock, events, ledger);
        {
            let mut state = job.lock();
            state.pause = from.paused;
            state.io_status = from.io_status;
            state.finalize = from.finalized;
            state.complete = from.completing.then_some(Completion::Result);
        }
        Self {
            restored: true,
            number: from.number,
            ..job
        }
    }

    /// Whether another process began it.
    pub(super) fn is_restored(&self) -> bool {
        self.restored
    }

    /// To be held while something that is recorded changes, and from before it is decided.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock()
    }

    /// Records the job, which is new.
    pub(super) fn record_new(&mut self) -> Result<(), Refused> {
        if let (Some(ledger), Some(record)) = (&self.ledger, self.spec.record()) {
            self.number = ledger.add(record)?;
        }
        Ok(())
    }

    /// Records a change of the job, which is to happen after it. The caller has the turn.
    pub(super) fn record(&self, mut change: impl FnMut(&mut record::Job)) -> Result<(), Refused> {
        let Some(ledger) = &self.ledger else {
            return Ok(());
        };
        ledger.change(&mut |state| {
            if let Some(job) = state.job_mut(self.number) {
                change(job);
            }
        })
    }

    /// As [`record`](Self::record), of a change that happens in any case.
    pub(super) fn record_anyway(&self, mut change: impl FnMut(&mut record::Job)) {
        let Some(ledger) = &self.ledger else {
            return;
        };
        let recorded = ledger.happened(&mut |state| {
            if let Some(job) = state.job_mut(self.number) {
                change(job);
            }
        });
        if let Err(error) = recorded {
            log::error!("job '{}' goes on unrecorded for now: {error}", self.spec.id);
        }
    }

    /// Forgets the record of the job, which is about to go, and has `completed` or come to nothing.
    /// What has come of one that has completed stays recorded.
    pub(super) fn forget(&self, completed: bool) -> Result<(), Refused> {
        match &self.ledger {
            Some(ledger) => ledger.change(&mut |state| state.remove_job(self.number, completed)),
            None => Ok(()),
        }
    }

    /// As [`forget`](Self::forget), of a job that goes in any case.
    pub(super) fn forget_anyway(&self, completed: bool) {
        let Some(ledger) = &self.ledger else {
            return;
        };
        let forgotten = ledger.happened(&mut |state| state.remove_job(self.number, completed));
        if let Err(error) = forgotten {
            log::error!(
                "the end of job '{}' is not recorded yet: {error}",
                self.spec.id
            );
        }
    }

    /// The job's name.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// See [`JobSpec::is_block_job`].
    #[must_use]
    pub fn is_block_job(&self) -> bool {
        self.spec.is_block_job()
    }

    pub(super) fn spec(&self) -> &JobSpec {
        &self.spec
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// What the job looks like now.
    pub fn info(&self) -> JobInfo {
        let state = self.lock();
        let at_work = matches!(state.status, Status::Running | Status::Waiting)
            || (state.status == Status::Pending && state.committing);
        JobInfo {
            id: self.spec.id.clone(),
            kind: self.spec.kind,
            status: state.status,
            len: state.len,
            offset: state.offset,
            progress: state.progress,
            busy: at_work && !state.idle,
            paused: state.pause,
            speed: state.bucket.speed(),
            io_status: state.io_status,
            auto_finalize: self.spec.auto_finalize,
            auto_dismiss: self.spec.auto_dismiss,
            error: state.error.clone(),
        }
    }

    fn check(&self, state: &State, verb: Verb) -> Result<(), Refused> {
        if state.status.allows(verb) {
            return Ok(());
        }
        Err(Refused(format!(
            "Job '{}' in state '{}' cannot accept command verb '{}'",
            self.spec.id,
            state.status.name(),
            verb.name()
        )))
    }

    /// Makes the job pause at the next opportunity.
    pub fn pause(&self) -> Result<(), Refused> {
        let _turn = self.turn();
        {
            let state = self.lock();
            self.check(&state, Verb::Pause)?;
            if state.pause {
                return Err(Refused("Job is already paused".to_owned()));
            }
        }
        self.record(|job| job.paused = true)?;
        self.lock().pause = true;
        self.wake();
        Ok(())
    }

    /// Lets a paused job go on.
    pub fn resume(&self) -> Result<(), Refused> {
        let _turn = self.turn();
        {
            let state = self.lock();
            if !state.pause {
                return Err(Refused("Can't resume a job that was not paused".to_owned()));
            }
            self.check(&state, Verb::Resume)?;
        }
        self.record(|job| {
            job.paused = false;
            job.io_status = IoStatus::Ok;
        })?;
        let mut state = self.lock();
        state.pause = false;
        state.io_status = IoStatus::Ok;
        self.wake();
        Ok(())
    }

    /// Gives the job another speed limit, in force at once. 0 is none.
    pub fn set_speed(&self, speed: i64) -> Result<(), Refused> {
        let _turn = self.turn();
        self.check(&self.lock(), Verb::SetSpeed)?;
        let speed = checked_speed(speed)?;
        self.record(|job| job.speed = speed)?;
        let mut state = self.lock();
        state.bucket.set_speed(speed, self.clock.now());
        self.wake();
        Ok(())
    }

    /// Makes the job give up. Only by `force` does that reach a paused job through the older
    /// command; see [`block_cancel`](Self::block_cancel).
    pub fn cancel(&self) -> Result<(), Refused> {
        let _turn = self.turn();
        self.check(&self.lock(), Verb::Cancel)?;
        self.record(|job| job.cancelled = true)?;
        let mut state = self.lock();
        state.cancel = true;
        state.pause = false;
        self.wake();
        Ok(())
    }

    /// Ends the job for now, if it is one that another process can go on with: nothing is told, and
    /// the record stays. False if it is not.
    pub(super) fn suspend(&self) -> bool {
        if self.ledger.is_none() {
            return false;
        }
        let mut state = self.lock();
        if state.status.allows(Verb::Cancel) && !state.cancel {
            state.cancel = true;
            state.suspend = true;
            self.wake();
        }
        true
    }

    /// Cancels as `block-job-cancel` does: without `force` a paused job is left alone, and one that is
    /// ready completes, and leaves its copy as it is.
    pub fn block_cancel(&self, force: bool) -> Result<(), Refused> {
        if !force && self.lock().pause {
            return Err(Refused(format!(
                "The block job for device '{}' is currently paused",
                self.spec.id
            )));
        }
        if !force && self.leave_copy()? {
            return Ok(());
        }
        self.cancel()
    }

    /// Has a job that is ready end, and leave its copy as it is; the next process ends it, too. False: it
    /// is not ready.
    fn leave_copy(&self) -> Result<bool, Refused> {
        let _turn = self.turn();
        let (is_ready, decided) = {
            let state = self.lock();
            (
                state.status.allows(Verb::Complete),
                state.complete.is_some(),
            )
        };
        if is_ready && !decided {
            self.record(|job| job.cancelled = true)?;
        }
        Ok(self.end_ready(Completion::Copy))
    }

    /// Ends a job that is ready.
    pub fn complete(&self) -> Result<(), Refused> {
        let _turn = self.turn();
        {
            let state = self.lock();
            self.check(&state, Verb::Complete)?;
            let gives_up = state.cancel || state.complete == Some(Completion::Copy);
            if gives_up && !state.suspend {
                return Err(Refused(format!(
                    "The active block job '{}' cannot be completed",
                    self.spec.id
                )));
            }
        }
        self.record(|job| job.completing = true)?;
        self.end_ready(Completion::Result);
        Ok(())
    }

    /// Tells a job how it is to end, if it is ready. What was said first counts.
    fn end_ready(&self, how: Completion) -> bool {
        let mut state = self.lock();
        let is_ready = state.status.allows(Verb::Complete);
        if is_ready {
            state.complete.get_or_insert(how);
            self.wake();
        }
        is_ready
    }

    /// Puts the result of a pending job in force.
    pub fn finalize(&self) -> Result<(), Refused> {
        let _turn = self.turn();
        {
            let state = self.lock();
            self.check(&state, Verb::Finalize)?;
            if state.finalize || state.committing {
                return Err(Refused(format!(
                    "Job '{}' is already being finalized",
                    self.spec.id
                )));
            }
        }
        self.record(|job| job.finalized = true)?;
        self.lock().finalize = true;
        self.wake();
        Ok(())
    }

    /// Whether a client may forget the job now.
    pub(super) fn check_dismiss(&self) -> Result<(), Refused> {
        self.check(&self.lock(), Verb::Dismiss)
    }

    /// Wakes all that wait for a change.
    pub(super) fn wake(&self) {
        self.changed.notify(usize::MAX);
    }

    /// To be taken before looking at the state, so that no change is missed.
    pub(super) fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// Asks the speed limit for `bytes`.
    pub(super) fn take_quota(&self, state: &mut State, bytes: u64, ticket: &mut Ticket) -> Grant {
        state.bucket.take(self.clock.now(), bytes, ticket)
    }

    pub(super) fn set_status(&self, state: &mut State, status: Status) {
        state.status = status;
        self.emit(
            "JOB_STATUS_CHANGE",
            json!({"status": status.name(), "id": self.spec.id}),
        );
    }

    pub(super) fn emit(&self, name: &'static str, data: Value) {
        (self.events)(Event { name, data });
    }

    /// Tells that the job is over, and before that how much it has copied: the event of the end has
    /// the members that QEMU's has and no more, since clients compare it whole.
    pub(super) fn emit_end(&self, name: &'static str, state: &State) {
        if !self.spec.is_block_job() {
            return;
        }
        let copied = json!({"id": self.spec.id, "copied": state.progress.copied});
        self.emit("JOB_COPIED", copied);
        let mut data = json!({
            "device": self.spec.id,
            "len": state.len,
            "offset": state.offset,
            "speed": state.bucket.speed(),
            "type": self.spec.kind,
        });
        if let (Some(error), Some(members)) = (&state.error, data.as_object_mut()) {
            members.insert("error".to_owned(), error.as_str().into());
        }
        self.emit(name, data);
    }
}

/// A speed limit from a client.
pub fn checked_speed(speed: i64) -> Result<u64, Refused> {
    u64::try_from(speed)
        .map_err(|_| Refused("Parameter 'speed' expects a non-negative value".to_owned()))
}
