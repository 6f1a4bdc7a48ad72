//! Create jobs: images that are made for a client.

use super::Engine;
use crate::job::create::Create;
use crate::job::{Body, JobSpec, Refused};
use crate::options::ImageOptions;

impl Engine {
    /// Starts a job that makes an image. It stays listed until it is dismissed.
    ///
    /// # Errors
    /// When its name is none, or is taken.
    pub fn start_create(&self, id: &str, options: ImageOptions) -> Result<(), Refused> {
        let name = self.jobs.claim_id(id)?;
        let none = self.jobs.reserve(&[], "create");
        let lease = none.map_err(|_| Refused("Job cannot be made".to_owned()))?;
        let job = JobSpec {
            len: 1,
            auto_dismiss: false,
            ..JobSpec::new("create", id)
        };
        let graph = self.graph.clone();
        self.jobs.start_claimed(
            name,
            job,
            lease,
            Box::new(move || {
                let body: Box<dyn Body> = Box::new(Create::new(graph, options));
                Box::pin(async move { Ok(body) })
            }),
        )?;
        Ok(())
    }
}
