//! All jobs of the process, and which nodes they hold.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::driver::{self, ConcludeOnDrop, Outcome};
use super::handle::{Job, JobInfo, JobSpec};
use super::ledger::Ledger;
use super::runner::{Clock, JobRunner};
use super::status::Status;
use super::{BodyFactory, EventSink, JobError, JobMain, Lease, Refused};
use crate::graph::{Busy, Graph};
use crate::state::record;

/// The name of a job that is being made. It is free again when this is dropped, if the job has not
/// come to be.
#[derive(Debug)]
pub struct ClaimedId {
    id: String,
    all: Arc<Mutex<HashSet<String>>>,
}

impl Drop for ClaimedId {
    fn drop(&mut self) {
        self.all.lock().remove(&self.id);
    }
}

/// How a job ended whose end nobody was told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Untold {
    /// It has completed.
    Completed,
    /// It was cancelled.
    Cancelled,
    /// It failed, for this reason.
    Failed(String),
}

#[derive(Default)]
struct Inner {
    /// In the order of their making.
    jobs: Vec<Arc<Job>>,
    threads: Vec<JobThread>,
    /// Jobs whose threads are just being made.
    starting: usize,
    /// No more jobs are taken.
    closed: bool,
}

/// The thread of a job, which may outlive the job by a moment.
struct JobThread {
    id: String,
    nodes: Vec<String>,
    thread: JoinHandle<()>,
}

/// A job that was told to end.
pub struct EndingJob {
    /// Its name.
    pub id: String,
    /// The nodes that it held: what it streams into, and what it streams away.
    pub nodes: Vec<String>,
    /// Jobs of one name follow each other: the last may have to be waited for before it is gone.
    threads: Vec<JoinHandle<()>>,
}

impl EndingJob {
    /// Waits until it has ended.
    pub fn wait(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("the thread of job '{}' panicked", self.id);
            }
        }
    }
}

/// A job, and how it ended.
type Ended = (Arc<Job>, Outcome);

/// The jobs of the process.
pub struct Manager {
    /// Held while a job ends and its end is told, so that a client that learns of it finds it gone.
    inner: Mutex<Inner>,
    /// Told when no thread is being made any more.
    started: Condvar,
    graph: Graph,
    /// Names of jobs that are being made.
    ids: Arc<Mutex<HashSet<String>>>,
    runner: Arc<dyn JobRunner>,
    clock: Arc<dyn Clock>,
    events: EventSink,
    /// Where jobs are recorded, if they are.
    ledger: Option<Arc<dyn Ledger>>,
    /// Jobs of an earlier process that have ended, and how, until somebody listens who can be told:
    /// `None` from then on.
    untold: Mutex<Option<Vec<Ended>>>,
    myself: Weak<Manager>,
}

impl Manager {
    /// No jobs yet. They will be run by `runner` on nodes of `graph`, and tell what happens to
    /// `events`.
    pub fn new(
        graph: Graph,
        runner: Arc<dyn JobRunner>,
        clock: Arc<dyn Clock>,
        events: EventSink,
    ) -> Arc<Self> {
        Self::recorded(graph, runner, clock, events, None)
    }

    /// As [`new`](Self::new), with jobs that are recorded in `ledger`: those that can be gone on
    /// with in another process.
    pub fn recorded(
        graph: Graph,
        runner: Arc<dyn JobRunner>,
        clock: Arc<dyn Clock>,
        events: EventSink,
        ledger: Option<Arc<dyn Ledger>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|myself| Self {
            inner: Mutex::default(),
            started: Condvar::new(),
            graph,
            ids: Arc::default(),
            runner,
            clock,
            events,
            ledger,
            untold: Mutex::new(Some(Vec::new())),
            myself: myself.clone(),
        })
    }

    /// Takes `nodes` for a job of this kind, all or none.
    pub fn reserve(&self, nodes: &[String], kind: &'static str) -> Result<Lease, Busy> {
        // While a job ends nobody may see its nodes still taken.
        let _ending = self.inner.lock();
        self.graph.reserve(nodes, kind)
    }

    /// Takes a name for a job that is to be made.
    ///
    /// # Errors
    /// When it is no name, or another job's, that one being made or listed.
    pub fn claim_id(&self, id: &str) -> Result<ClaimedId, Refused> {
        let mut characters = id.chars();
        let well_formed = characters
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic())
            && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !well_formed {
            return Err(Refused(format!("Invalid job ID '{id}'")));
        }
        let inner = self.inner.lock();
        let listed = inner.jobs.iter().any(|job| job.id() == id);
        if listed || !self.ids.lock().insert(id.to_owned()) {
            return Err(Refused(format!("Job ID '{id}' already in use")));
        }
        Ok(ClaimedId {
            id: id.to_owned(),
            all: self.ids.clone(),
        })
    }

    /// Makes a job that holds `lease` and starts it.
    pub fn start(
        &self,
        spec: JobSpec,
        lease: Lease,
        body: BodyFactory,
    ) -> Result<Arc<Job>, Refused> {
        let id = self.claim_id(&spec.id)?;
        self.start_claimed(id, spec, lease, body)
    }

    /// As [`start`](Self::start), of a job whose name has been [claimed](Self::claim_id).
    pub fn start_claimed(
        &self,
        id: ClaimedId,
        spec: JobSpec,
        lease: Lease,
        body: BodyFactory,
    ) -> Result<Arc<Job>, Refused> {
        debug_assert_eq!(id.id, spec.id);
        let nodes = lease.nodes();
        let mut job = Job::new(
            spec,
            Some(lease),
            self.clock.clone(),
            self.events.clone(),
            self.ledger.clone(),
        );
        self.check_open()?;
        // What is not recorded does not begin.
        job.record_new()?;
        let job = Arc::new(job);
        let started = self.run(&job, id, nodes, body);
        if let Err(refused) = started {
            job.forget_anyway(false);
            return Err(refused);
        }
        Ok(job)
    }

    /// Goes on with a job that another process recorded as `from`.
    pub fn restore(
        &self,
        from: &record::Job,
        lease: Lease,
        body: BodyFactory,
    ) -> Result<Arc<Job>, Refused> {
        let id = self.claim_id(&from.id)?;
        let nodes = lease.nodes();
        let job = Arc::new(self.restored(from, Some(lease)));
        self.run(&job, id, nodes, body)?;
        Ok(job)
    }

    /// Lists a job again that another process recorded as `from`, and that is over: how it ended is
    /// told to the first who listen ([`tell`](Self::tell)), or was told already.
    pub fn restore_over(
        &self,
        from: &record::Job,
        lease: Option<Lease>,
        untold: Option<Untold>,
    ) -> Result<(), Refused> {
        let _id = self.claim_id(&from.id)?;
        let job = Arc::new(self.restored(from, lease));
        {
            let mut state = job.lock();
            state.idle = true;
            state.pause = false;
            state.status = Status::Concluded;
            if let Some(end) = &from.end {
                (state.len, state.offset) = (end.len, end.offset);
                state.progress.copied = end.copied;
                state.progress.to_copy = end.copied;
                state.error.clone_from(&end.error);
            }
        }
        let outcome = match untold {
            Some(Untold::Completed) => Some(Outcome::Completed),
            Some(Untold::Cancelled) => Some(Outcome::Cancelled),
            Some(Untold::Failed(text)) => Some(Outcome::Failed(JobError::new(text))),
            None => None,
        };
        self.inner.lock().jobs.push(job.clone());
        if matches!(outcome, Some(Outcome::Completed)) {
            // Known from the header so far, which others may change before anybody listens.
            job.record_anyway(record::Job::in_force);
        }
        if let Some(outcome) = outcome {
            self.conclude(&job, outcome);
        }
        Ok(())
    }

    fn restored(&self, from: &record::Job, lease: Option<Lease>) -> Job {
        Job::restored(
            from,
            lease,
            self.clock.clone(),
            self.events.clone(),
            self.ledger.clone(),
        )
    }

    /// Somebody listens to events now: tells how jobs ended that ended while nobody did, because
    /// the process ended as well.
    pub fn tell(&self) {
        let untold = self.untold.lock().take();
        for (job, outcome) in untold.into_iter().flatten() {
            self.conclude(&job, outcome);
        }
    }

    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    fn check_open(&self) -> Result<(), Refused> {
        match self.inner.lock().closed {
            true => Err(shutting_down()),
            false => Ok(()),
        }
    }

    /// Runs a new job, which holds `nodes`, on a thread of its own.
    fn run(
        &self,
        job: &Arc<Job>,
        claimed: ClaimedId,
        nodes: Vec<String>,
        body: BodyFactory,
    ) -> Result<(), Refused> {
        let manager = self.myself.upgrade().ok_or_else(shutting_down)?;
        let name = format!("job-{}", job.id());
        let id = job.id().to_owned();
        {
            let mut inner = self.inner.lock();
            if inner.closed {
                return Err(shutting_down());
            }
            inner.jobs.push(job.clone());
            // From here on the job's own name is in the list, until it goes.
            drop(claimed);
            inner.starting += 1;
            let mut state = job.lock();
            job.set_status(&mut state, Status::Created);
            job.set_status(&mut state, Status::Running);
        }
        let (concluding, ended) = (manager.clone(), job.clone());
        let end = ConcludeOnDrop::new(move |outcome| concluding.conclude(&ended, outcome));
        let runner = self.runner.clone();
        let running = job.clone();
        let main: JobMain =
            Box::new(move |timer| Box::pin(driver::drive(running, timer, body, end)));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = runner.run(main) {
                log::error!("a job could not be run: {error}");
            }
            drop(manager);
        });
        let mut inner = self.inner.lock();
        inner.starting -= 1;
        self.started.notify_all();
        match thread {
            Ok(thread) => {
                inner.threads.retain(|job| !job.thread.is_finished());
                inner.threads.push(JobThread { id, nodes, thread });
                Ok(())
            }
            // The body went down with the thread that was not to be, and what concludes it with it.
            Err(error) => Err(Refused(format!(
                "Could not start the job's thread: {error}"
            ))),
        }
    }

    /// The job of this name.
    pub fn job(&self, id: &str) -> Option<Arc<Job>> {
        self.inner
            .lock()
            .jobs
            .iter()
            .find(|job| job.id() == id)
            .cloned()
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        self.inner
            .lock()
            .jobs
            .iter()
            .map(|job| job.info())
            .collect()
    }

    /// Forgets a concluded job.
    pub fn dismiss(&self, id: &str) -> Option<Result<(), Refused>> {
        let job = self.job(id)?;
        let _turn = job.turn();
        // Somebody else may have had the turn before.
        self.job(id).filter(|other| Arc::ptr_eq(other, &job))?;
        if let Err(refused) = job.check_dismiss() {
            return Some(Err(refused));
        }
        let completed = job.lock().error.is_none();
        if let Err(refused) = job.forget(completed) {
            return Some(Err(refused));
        }
        Self::remove(&mut self.inner.lock(), &job);
        Some(Ok(()))
    }

    fn remove(inner: &mut Inner, job: &Arc<Job>) {
        inner.jobs.retain(|other| !Arc::ptr_eq(other, job));
        let mut state = job.lock();
        state.lease = None;
        job.set_status(&mut state, Status::Null);
    }

    /// Ends a job: tells how it ended, and forgets it unless it is to stay.
    pub(super) fn conclude(&self, job: &Arc<Job>, outcome: Outcome) {
        if matches!(outcome, Outcome::Suspended) {
            return;
        }
        let _turn = job.turn();
        // It is at work no longer.
        if let Some(lease) = &job.lock().lease {
            lease.hide_filter();
        }
        if job.is_restored()
            && let Some(untold) = &mut *self.untold.lock()
        {
            // The client that began it is on its way back, and would miss its end.
            Self::wait_to_be_told(job, &outcome);
            untold.push((job.clone(), outcome));
            return;
        }
        Self::record_end(job, &outcome);
        let mut inner = self.inner.lock();
        {
            let mut state = job.lock();
            state.idle = true;
            state.pause = false;
            let completed = matches!(outcome, Outcome::Completed);
            if job.spec().auto_dismiss || !job.spec().holds.after(completed) {
                // Before it is told: a client may go on with the nodes as soon as it hears of the end.
                state.lease = None;
            }
            match outcome {
                Outcome::Completed => {
                    state.offset = state.len;
                    job.emit_end("BLOCK_JOB_COMPLETED", &state);
                }
                Outcome::Cancelled => {
                    job.set_status(&mut state, Status::Aborting);
                    job.emit_end("BLOCK_JOB_CANCELLED", &state);
                }
                Outcome::Failed(JobError { text }) => {
                    state.error = Some(text);
                    job.set_status(&mut state, Status::Aborting);
                    job.emit_end("BLOCK_JOB_COMPLETED", &state);
                }
                Outcome::Suspended => {}
            }
            job.set_status(&mut state, Status::Concluded);
        }
        if job.spec().auto_dismiss {
            Self::remove(&mut inner, job);
        }
    }

    /// The state of a job that has ended, until its end is told.
    fn wait_to_be_told(job: &Job, outcome: &Outcome) {
        let mut state = job.lock();
        state.idle = true;
        state.pause = false;
        // As while it ended: too late to be cancelled.
        state.committing = true;
        if matches!(outcome, Outcome::Completed) {
            state.status = Status::Pending;
            state.offset = state.len;
        } else {
            state.status = Status::Aborting;
        }
    }

    /// Records how a job ended, before anybody is told: what is told is told once, and what was on
    /// its way when the process ended is lost with the listeners' connections.
    fn record_end(job: &Job, outcome: &Outcome) {
        let completed = matches!(outcome, Outcome::Completed);
        if job.spec().auto_dismiss {
            return job.forget_anyway(completed);
        }
        let end = {
            let state = job.lock();
            record::End {
                error: match outcome {
                    Outcome::Failed(error) => Some(error.text.clone()),
                    _ => None,
                },
                len: state.len,
                offset: if completed { state.len } else { state.offset },
                copied: state.progress.copied,
            }
        };
        job.record_anyway(|record| {
            record.paused = false;
            record.end = Some(end.clone());
            // One that has failed may have changed the header: the next process sees to it.
            if completed {
                record.in_force();
            }
        });
    }

    /// Cancels all jobs, and takes no more. Returns those that have yet to end. Jobs that are
    /// recorded are not cancelled: another process goes on with them.
    pub fn close(&self) -> Vec<EndingJob> {
        let jobs = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            self.started
                .wait_while(&mut inner, |inner| inner.starting > 0);
            inner.jobs.clone()
        };
        // Without the lock: a job that ends has its turn, for which these wait, and waits for it.
        for job in &jobs {
            if !job.suspend() {
                // A job that is over, or about to be, refuses; that is as good.
                let _ = job.cancel();
            }
        }
        let mut ending: Vec<EndingJob> = Vec::new();
        for JobThread { id, nodes, thread } in std::mem::take(&mut self.inner.lock().threads) {
            match ending.iter_mut().find(|job| job.id == id) {
                Some(job) => {
                    job.nodes.extend(nodes);
                    job.threads.push(thread);
                }
                None => ending.push(EndingJob {
                    id,
                    nodes,
                    threads: vec![thread],
                }),
            }
        }
        ending
    }

    /// Cancels all jobs, waits for their threads to end, and takes no more.
    pub fn shut_down(&self) {
        self.close().into_iter().for_each(EndingJob::wait);
    }
}

fn shutting_down() -> Refused {
    Refused("The daemon is shutting down".to_owned())
}
