//! Where jobs are recorded, so that another process can go on with them.

use super::Refused;
use crate::state::record::{Job, State};
use crate::state::{StateError, Store};

/// The records of jobs. What a call returns from is stable; one that fails has changed nothing.
pub trait Ledger: Send + Sync {
    /// Adds a job.
    ///
    /// # Errors
    /// When it cannot be recorded, as for the other calls.
    fn add(&self, job: Job) -> Result<(), Refused>;

    /// Changes a job, if it is recorded.
    fn change(&self, id: &str, change: &mut dyn FnMut(&mut Job)) -> Result<(), Refused>;

    /// Takes a job away, which has `completed` or come to nothing. The result of one that has
    /// completed stays recorded where the next process needs it.
    fn remove(&self, id: &str, completed: bool) -> Result<(), Refused>;
}

impl From<StateError> for Refused {
    fn from(error: StateError) -> Self {
        Self(error.to_string())
    }
}

impl Ledger for Store {
    fn add(&self, job: Job) -> Result<(), Refused> {
        Ok(Store::change(self, |state| state.jobs.push(job))?)
    }

    fn change(&self, id: &str, change: &mut dyn FnMut(&mut Job)) -> Result<(), Refused> {
        Ok(Store::change(self, |state| {
            if let Some(job) = state.job_mut(id) {
                change(job);
            }
        })?)
    }

    fn remove(&self, id: &str, completed: bool) -> Result<(), Refused> {
        Ok(Store::change(self, |state: &mut State| {
            state.remove_job(id, completed)
        })?)
    }
}
