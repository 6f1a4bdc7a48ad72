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
        Err(_) if job.lock().cancel => Outcome::Cancelled,
        Err(error) => Outcome::Failed(error),
    };
    obituary.tell(outcome);
}

async fn live(job: &Job, context: &JobContext, body: &mut dyn Body) -> Outcome {
    let result = body.run(context).await;
    if job.lock().cancel {
        return Outcome::Cancelled;
    }
    if let Err(error) = result {
        return Outcome::Failed(error);
    }
    if !wait_for_finalize(job).await {
        return Outcome::Cancelled;
    }
    match body.commit(context).await {
        Ok(()) => Outcome::Completed,
        Err(error) => Outcome::Failed(error),
    }
}

/// Goes through `waiting` and `pending`; false if the job was cancelled there.
async fn wait_for_finalize(job: &Job) -> bool {
    {
        let mut state = job.lock();
        if state.cancel {
            return false;
        }
        // A pause that came too late to be honoured must not show for ever.
        state.pause = false;
        job.set_status(&mut state, Status::Waiting);
        job.set_status(&mut state, Status::Pending);
        if job.spec().auto_finalize {
            state.committing = true;
            return true;
        }
        job.emit(
            "BLOCK_JOB_PENDING",
            json!({"type": job.spec().kind, "id": job.id()}),
        );
    }
    loop {
        let listener = job.listen();
        {
            let mut state = job.lock();
            if state.cancel {
                return false;
            }
            if state.finalize {
                state.committing = true;
                return true;
            }
        }
        listener.await;
    }
}
