//! Takes a body through the states of a job, on the job's thread.

use std::rc::Rc;
use std::sync::Arc;

use serde_json::json;

use super::context::JobContext;
use super::handle::Job;
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

/// Concludes a job when it is dropped, so that it does not stay listed as running when its thread
/// dies.
pub(super) struct ConcludeOnDrop(Option<Box<dyn FnOnce(Outcome) + Send>>);

impl ConcludeOnDrop {
    /// Calls `conclude` with how the job ended, once.
    pub fn new(conclude: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self(Some(Box::new(conclude)))
    }

    /// Concludes the job.
    pub fn conclude(mut self, outcome: Outcome) {
        self.now(outcome);
    }

    fn now(&mut self, outcome: Outcome) {
        if let Some(conclude) = self.0.take() {
            conclude(outcome);
        }
    }
}

impl Drop for ConcludeOnDrop {
    fn drop(&mut self) {
        let error = JobError::new("The job's thread ended unexpectedly");
        self.now(Outcome::Failed(error));
    }
}

/// Runs the job whose body `factory` makes.
pub(super) async fn drive(
    job: Arc<Job>,
    timer: Rc<dyn Timer>,
    factory: BodyFactory,
    end: ConcludeOnDrop,
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
    end.conclude(outcome);
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
