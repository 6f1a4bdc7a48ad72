//! One job as its clients see it: what they may ask of it and what it tells about itself.

use std::sync::Arc;

use event_listener::{Event as Signal, EventListener};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};

use super::context::Progress;
use super::manager::Lease;
use super::pacing::{Bucket, Grant, Ticket};
use super::runner::Clock;
use super::status::{IoStatus, Status, Verb};
use super::{Event, EventSink, Refused};

/// What a job does about an I/O error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// End with the error.
    #[default]
    Report,
    /// Go on with the next range, and end with the error.
    Ignore,
    /// Pause; when resumed, try the range again.
    Stop,
    /// `Stop` when there is no space left, `Report` otherwise.
    Enospc,
}

/// What a new job is to be.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Its name.
    pub id: String,
    /// What kind of job it is: `stream`.
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
}

impl JobSpec {
    /// A stream job with the defaults of QMP.
    pub fn stream(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            kind: "stream",
            len: 0,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
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

/// What changes in a job's life. Changes are made, and told, with the lock held, so that events come
/// in the order of the changes.
pub(super) struct State {
    pub status: Status,
    /// A client wants it to pause, or an error has made it.
    pub pause: bool,
    pub cancel: bool,
    /// The body is asleep: it waits for its speed limit or to be resumed.
    pub idle: bool,
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
    /// Told at every change the body or the driver may wait for.
    changed: Signal,
    clock: Arc<dyn Clock>,
    events: EventSink,
}

impl Job {
    pub(super) fn new(
        spec: JobSpec,
        lease: Lease,
        clock: Arc<dyn Clock>,
        events: EventSink,
    ) -> Self {
        let state = State {
            status: Status::Created,
            pause: false,
            cancel: false,
            idle: false,
            finalize: false,
            committing: false,
            len: spec.len,
            offset: 0,
            progress: Progress::default(),
            io_status: IoStatus::Ok,
            error: None,
            bucket: Bucket::new(spec.speed, clock.now()),
            lease: Some(lease),
        };
        Self {
            spec,
            state: Mutex::new(state),
            changed: Signal::new(),
            clock,
            events,
        }
    }

    /// The job's name.
    pub fn id(&self) -> &str {
        &self.spec.id
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
        let mut state = self.lock();
        self.check(&state, Verb::Pause)?;
        if state.pause {
            return Err(Refused("Job is already paused".to_owned()));
        }
        state.pause = true;
        self.wake();
        Ok(())
    }

    /// Lets a paused job go on.
    pub fn resume(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        if !state.pause {
            return Err(Refused("Can't resume a job that was not paused".to_owned()));
        }
        self.check(&state, Verb::Resume)?;
        state.pause = false;
        state.io_status = IoStatus::Ok;
        self.wake();
        Ok(())
    }

    /// Gives the job another speed limit, in force at once. 0 is none.
    pub fn set_speed(&self, speed: i64) -> Result<(), Refused> {
        let mut state = self.lock();
        self.check(&state, Verb::SetSpeed)?;
        let speed = checked_speed(speed)?;
        state.bucket.set_speed(speed, self.clock.now());
        self.wake();
        Ok(())
    }

    /// Makes the job give up. Only by `force` does that reach a paused job through the older
    /// command; see [`block_cancel`](Self::block_cancel).
    pub fn cancel(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        self.check(&state, Verb::Cancel)?;
        state.cancel = true;
        state.pause = false;
        self.wake();
        Ok(())
    }

    /// Cancels as `block-job-cancel` does: without `force` a paused job is left alone.
    pub fn block_cancel(&self, force: bool) -> Result<(), Refused> {
        if !force && self.lock().pause {
            return Err(Refused(format!(
                "The block job for device '{}' is currently paused",
                self.spec.id
            )));
        }
        self.cancel()
    }

    /// Ends a job that is ready.
    pub fn complete(&self) -> Result<(), Refused> {
        let state = self.lock();
        self.check(&state, Verb::Complete)
    }

    /// Puts the result of a pending job in force.
    pub fn finalize(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        self.check(&state, Verb::Finalize)?;
        if state.finalize || state.committing {
            return Err(Refused(format!(
                "Job '{}' is already being finalized",
                self.spec.id
            )));
        }
        state.finalize = true;
        self.wake();
        Ok(())
    }

    /// Whether a client may forget the job now.
    pub(super) fn check_dismiss(&self) -> Result<(), Refused> {
        self.check(&self.lock(), Verb::Dismiss)
    }

    /// Wakes whoever waits for a change.
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

    /// Tells that the job is over.
    pub(super) fn emit_end(&self, name: &'static str, state: &State) {
        let mut data = json!({
            "device": self.spec.id,
            "len": state.len,
            "offset": state.offset,
            "speed": state.bucket.speed(),
            "type": self.spec.kind,
            "copied": state.progress.copied,
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
