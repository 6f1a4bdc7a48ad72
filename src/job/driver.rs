//! Takes a body through the states of a job, on the job's thread.

use std::rc::Rc;
use std::sync::Arc;

use serde_json::json;

use super::context::JobContext;
use super::handle::Job;
use super::manager::Manager;
use super::runner::Timer;
use super::status::Status;
use super::{Body, BodyFactory, JobError};

/// How a job ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Completed,
    Cancelled,
    Failed(JobError),
    /// Not ended: another process goes on with it.
    Suspended,
}

/// Sees to it that a job does not stay listed as running when its thread dies.
pub(super) struct Obituary {
    manager: Arc<Manager>,
    job: Arc<Job>,
    told: bool,
}

impl Obituary {
    pub fn new(manager: Arc<Manager>, job: Arc<Job>) -> Self {
        Self {
            manager,
            job,
            told: false,
        }
    }

    /// Concludes the job.
    pub fn tell(mut self, outcome: Outcome) {
        self.told = true;
        self.manager.conclude(&self.job, outcome);
    }
}

impl Drop for Obituary {
    fn drop(&mut self) {
        if !self.told {
            let error = JobError::new("The job's thread ended unexpectedly");
            self.manager.conclude(&self.job, Outcome::Failed(error));
        }
    }
}

/// Runs the job whose body `factory` makes.
pub(super) async fn drive(
    job: Arc<Job>,
    timer: Rc<dyn Timer>,
    factory: BodyFactory,
    obituary: Obituary,
) {
    let context = JobContext::new(job.clone(), timer);
    let outcome = match factory().await {
        Ok(mut body) => {
            let outcome = live(&job, &context, body.as_mut()).await;
            // What the body holds must be free before anybody learns that the job is over.
            body.close().await;
            drop(body);
            outcome
        }
        Err(error) => given_up(&job).unwrap_or(Outcome::Failed(error)),
    };
    obituary.tell(outcome);
}

async fn live(job: &Job, context: &JobContext, body: &mut dyn Body) -> Outcome {
    let result = body.run(context).await;
    if let Some(outcome) = given_up(job) {
        return outcome;
    }
    if let Err(error) = result {
        return Outcome::Failed(error);
    }
    if let Some(outcome) = wait_for_finalize(job).await {
        return outcome;
    }
    match body.commit(context).await {
        Ok(()) => Outcome::Completed,
        Err(error) => Outcome::Failed(error),
    }
}

/// How the job ends if it was told to.
fn given_up(job: &Job) -> Option<Outcome> {
    let state = job.lock();
    match (state.cancel, state.suspend) {
        (false, _) => None,
        (true, false) => Some(Outcome::Cancelled),
        (true, true) => Some(Outcome::Suspended),
    }
}

/// Goes through `waiting` and `pending`; how the job ends if it was told to meanwhile.
async fn wait_for_finalize(job: &Job) -> Option<Outcome> {
    {
        let _turn = job.turn();
        if let Some(outcome) = given_up(job) {
            return Some(outcome);
        }
        if job.lock().pause {
            job.record_anyway(|job| job.paused = false);
        }
        let mut state = job.lock();
        // A pause that came too late to be honoured must not show for ever.
        state.pause = false;
        job.set_status(&mut state, Status::Waiting);
        job.set_status(&mut state, Status::Pending);
        if job.spec().auto_finalize {
            state.committing = true;
            return None;
        }
        job.emit(
            "BLOCK_JOB_PENDING",
            json!({"type": job.spec().kind, "id": job.id()}),
        );
    }
    loop {
        let listener = job.listen();
        if let Some(outcome) = given_up(job) {
            return Some(outcome);
        }
        {
            let mut state = job.lock();
            if state.finalize && !state.cancel {
                state.committing = true;
                return None;
            }
        }
        listener.await;
    }
}
