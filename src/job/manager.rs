//! All jobs of the process, and which nodes they hold.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::driver::{self, Obituary, Outcome};
use super::handle::{Job, JobInfo, JobSpec};
use super::runner::{Clock, JobRunner};
use super::status::Status;
use super::{BodyFactory, EventSink, JobError, JobMain, Refused};

/// The nodes in use, each with the kind of the job that uses it.
type Nodes = Arc<Mutex<HashMap<String, &'static str>>>;

/// Nodes that a job holds. They are free again when this is dropped.
#[derive(Debug)]
pub struct Lease {
    nodes: Vec<String>,
    all: Nodes,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        for node in &self.nodes {
            all.remove(node);
        }
    }
}

/// A node that cannot be had because another job holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Which of the nodes asked for it is, counted from 0.
    pub index: usize,
    /// What kind of job holds it.
    pub kind: &'static str,
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

/// The jobs of the process.
pub struct Manager {
    /// Held while a job ends and its end is told, so that whoever learns of it finds it gone.
    inner: Mutex<Inner>,
    /// Told when no thread is being made any more.
    started: Condvar,
    nodes: Nodes,
    runner: Arc<dyn JobRunner>,
    clock: Arc<dyn Clock>,
    events: EventSink,
    myself: Weak<Manager>,
}

impl Manager {
    /// No jobs yet. They will be run by `runner`, and tell what happens to `events`.
    pub fn new(runner: Arc<dyn JobRunner>, clock: Arc<dyn Clock>, events: EventSink) -> Arc<Self> {
        Arc::new_cyclic(|myself| Self {
            inner: Mutex::default(),
            started: Condvar::new(),
            nodes: Nodes::default(),
            runner,
            clock,
            events,
            myself: myself.clone(),
        })
    }

    /// Takes `nodes` for a job of this kind, all or none.
    pub fn reserve(&self, nodes: &[String], kind: &'static str) -> Result<Lease, Busy> {
        // While a job ends nobody may see its nodes still taken.
        let _ending = self.inner.lock();
        let mut all = self.nodes.lock();
        for (index, node) in nodes.iter().enumerate() {
            if let Some(kind) = all.get(node) {
                return Err(Busy { index, kind });
            }
        }
        for node in nodes {
            all.insert(node.clone(), kind);
        }
        Ok(Lease {
            nodes: nodes.to_vec(),
            all: self.nodes.clone(),
        })
    }

    /// Whether a job holds `node`, and of which kind it is.
    pub fn node_user(&self, node: &str) -> Option<&'static str> {
        let _ending = self.inner.lock();
        self.nodes.lock().get(node).copied()
    }

    /// Whether a job could have this name.
    pub fn check_id(&self, id: &str) -> Result<(), Refused> {
        let mut characters = id.chars();
        let well_formed = characters
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic())
            && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !well_formed {
            return Err(Refused(format!("Invalid job ID '{id}'")));
        }
        if self.job(id).is_some() {
            return Err(Refused(format!("Job ID '{id}' already in use")));
        }
        Ok(())
    }

    /// Makes a job that holds `lease` and starts it.
    pub fn start(
        &self,
        spec: JobSpec,
        lease: Lease,
        body: BodyFactory,
    ) -> Result<Arc<Job>, Refused> {
        self.check_id(&spec.id)?;
        let gone = || Refused("The daemon is shutting down".to_owned());
        let manager = self.myself.upgrade().ok_or_else(gone)?;
        let name = format!("job-{}", spec.id);
        let (id, nodes) = (spec.id.clone(), lease.nodes.clone());
        let job = Arc::new(Job::new(
            spec,
            lease,
            self.clock.clone(),
            self.events.clone(),
        ));
        {
            let mut inner = self.inner.lock();
            if inner.closed {
                return Err(gone());
            }
            if inner.jobs.iter().any(|other| other.id() == job.id()) {
                return Err(Refused(format!("Job ID '{}' already in use", job.id())));
            }
            inner.jobs.push(job.clone());
            inner.starting += 1;
            let mut state = job.lock();
            job.set_status(&mut state, Status::Created);
            job.set_status(&mut state, Status::Running);
        }
        let obituary = Obituary::new(manager.clone(), job.clone());
        let runner = self.runner.clone();
        let running = job.clone();
        let main: JobMain =
            Box::new(move |timer| Box::pin(driver::drive(running, timer, body, obituary)));
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
                drop(inner);
                Ok(job)
            }
            // The body went down with the thread that was not to be, and its obituary with it.
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
        let mut inner = self.inner.lock();
        let job = inner.jobs.iter().find(|job| job.id() == id).cloned()?;
        if let Err(refused) = job.check_dismiss() {
            return Some(Err(refused));
        }
        Self::remove(&mut inner, &job);
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
        let mut inner = self.inner.lock();
        {
            let mut state = job.lock();
            state.idle = true;
            state.pause = false;
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
            }
            job.set_status(&mut state, Status::Concluded);
        }
        if job.spec().auto_dismiss {
            Self::remove(&mut inner, job);
        }
    }

    /// Cancels all jobs, and takes no more. Returns those that have yet to end.
    pub fn close(&self) -> Vec<EndingJob> {
        let mut inner = self.inner.lock();
        inner.closed = true;
        self.started
            .wait_while(&mut inner, |inner| inner.starting > 0);
        for job in &inner.jobs {
            // A job that is over, or about to be, refuses; that is as good.
            let _ = job.cancel();
        }
        let mut ending: Vec<EndingJob> = Vec::new();
        for JobThread { id, nodes, thread } in std::mem::take(&mut inner.threads) {
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
