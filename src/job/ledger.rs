//! Where jobs are recorded, so that another process can go on with them.

use super::Refused;
use crate::state::record::{Job, State};
use crate::state::{StateError, Store};

/// A change of the records.
pub type Change<'a> = &'a mut dyn FnMut(&mut State);

/// The records of jobs.
pub trait Ledger: Send + Sync {
    /// Makes a change that is in force when it is recorded. When this returns, that is stable.
    ///
    /// # Errors
    /// When it cannot be recorded: then nothing has changed.
    fn change(&self, change: Change<'_>) -> Result<(), Refused>;

    /// Makes a change that is in force in any case.
    ///
    /// # Errors
    /// When it cannot be recorded now: then it is with the next change.
    fn happened(&self, change: Change<'_>) -> Result<(), Refused>;

    /// Adds a job, and returns the number of its record.
    ///
    /// # Errors
    /// When it cannot be recorded, or one of its name is.
    fn add(&self, job: Job) -> Result<u64, Refused> {
        let mut added = Ok(0);
        self.change(&mut |state| added = state.add_job(job.clone()))?;
        added.map_err(Refused)
    }
}

impl From<StateError> for Refused {
    fn from(error: StateError) -> Self {
        Self(error.to_string())
    }
}

impl Ledger for Store {
    fn change(&self, change: Change<'_>) -> Result<(), Refused> {
        Ok(Store::change(self, change)?)
    }

    fn happened(&self, change: Change<'_>) -> Result<(), Refused> {
        Ok(Store::happened(self, change)?)
    }
}
