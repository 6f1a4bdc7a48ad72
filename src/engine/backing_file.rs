//! `change-backing-file`: another name for what lies under an image, in its header alone.
//!
//! Nothing changes for the nodes that are there. Where it is recorded what lies under the image, the
//! record says what the header is going to be before it is changed: a process that is killed in
//! between leaves it to the next one to look (as at the end of a stream).

use super::nodes::refused;
use super::stream::no_such_device;
use super::{Engine, on_this_thread};
use crate::format::Format;
use crate::format::qcow2::Backing;
use crate::graph::recorded::is_same_image;
use crate::graph::{Demand, Holder, Node, Request, Rights, Role};
use crate::job::Refused;
use crate::job::records::{self, identity};
use crate::state::record::{Commit, End, Job, Link, OnError, Stream, Work};

impl Engine {
    /// Makes the header of node `image`, which is in the chain of `device`, name another backing file.
    ///
    /// # Errors
    /// In QEMU's words where it has some. The header is as before then.
    pub fn change_backing_file(
        &self,
        device: &str,
        image: &str,
        name: &str,
    ) -> Result<(), Refused> {
        let refuse = |text: String| Err(Refused(text));
        if self.graph.filter(device).is_some() {
            return refuse("Need a root block node".into());
        }
        if self.graph.filter(image).is_some() {
            return refuse(format!(
                "Could not change backing file to '{name}': Operation not supported"
            ));
        }
        let found = self.find_device(device);
        let (top, _) = found.ok_or_else(|| no_such_device(device, device))?;
        let state = self.graph.state();
        let mut above = state.nodes().iter();
        if above.any(|node| node.child(Role::Backing) == Some(top.as_str())) {
            return refuse("Need a root block node".into());
        }
        let node = self.graph.node(image);
        let node = node.map_err(|_| no_such_device("", image))?;
        if node.child(Role::Backing).is_none() {
            let text = "not allowing backing file change on an image without a backing file";
            return refuse(text.into());
        }
        let chain = state.chain_nodes(&top).map_err(refused)?;
        if !chain.iter().any(|layer| layer.name == image) {
            return refuse(format!(
                "'{device}' and image file are not in the same chain"
            ));
        }
        drop(state);
        let demand = Demand {
            does: Rights::WRITE_UNCHANGED | Rights::OPEN,
            tolerates: Rights::ALL,
        };
        let request = Request::new(Holder::Tool)
            .with(image, "root", demand)
            .frozen(image, Role::Backing)
            .reopening();
        let done = on_this_thread(|reactor| {
            reactor.block_on(async {
                let grant = self.graph.access(request).await?;
                // It may have changed until the grant was there: a reopen that has published its change
                // is recording it now.
                drop(self.runtime.change());
                let is_there = self.graph.node(image).is_ok_and(|node| {
                    let chain = self.graph.chain_nodes(&top).unwrap_or_default();
                    let in_chain = chain.iter().any(|layer| layer.name == image);
                    in_chain && node.child(Role::Backing).is_some()
                });
                let written = match is_there {
                    true => self.write_header(image, name).await,
                    false => Err(crate::error::Error::Invalid(format!(
                        "The chain of '{device}' has just changed"
                    ))),
                };
                let given = grant.give_back().await;
                written.and(given)
            })
        });
        done.map_err(refused)
    }

    async fn write_header(&self, image: &str, name: &str) -> crate::error::Result<()> {
        let node = self.graph.node(image)?;
        let Format::Qcow2(qcow2) = &node.layer.format else {
            return Err(crate::error::Error::Invalid(format!(
                "Format driver '{}' used by node '{image}' does not support changing the backing \
                 file",
                node.driver_name()
            )));
        };
        // The format as it is by now: a job that has just ended may have put another image there.
        let backing = &Backing {
            name: name.to_owned(),
            format: qcow2.backing().and_then(|old| old.format),
        };
        qcow2.check_backing(backing)?;
        let number = self.record_header(&node, backing)?;
        let written = qcow2.set_backing(Some(backing)).await;
        if let (Some(store), Some(number)) = (&self.store, number) {
            let in_force = qcow2.backing().as_ref() == Some(backing);
            if written.is_ok() {
                let decided = store.happened(|state| state.decide(number, in_force));
                if let Err(error) = decided {
                    log::error!("what lies under node '{image}' is not recorded yet: {error}");
                }
            }
        }
        written
    }

    /// Records what a header is going to say, if anything is recorded of its image. A change that is
    /// under way is recorded as what a job would have left that ended just then.
    fn record_header(&self, node: &Node, backing: &Backing) -> crate::error::Result<Option<u64>> {
        let Some(store) = &self.store else {
            return Ok(None);
        };
        let (file, own) = (self.graph.file_of(node)?, identity(node));
        let state = store.state();
        let is_it = |link: &&Link| is_same_image((&link.node.file, link.identity), (&file, own));
        let Some(link) = state.links.iter().rev().find(is_it) else {
            return Ok(None);
        };
        let target = records::node(&self.graph, node)?;
        let job = Job {
            number: 0,
            id: format!("#header-{}", state.next_job),
            work: Work::Stream(Stream {
                target,
                identity: own,
                base: None,
                backing_file: Some(backing.name.clone()),
                compress: false,
            }),
            len: 0,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            paused: false,
            io_status: crate::state::record::IoStatus::Ok,
            cancelled: false,
            filter: None,
            completing: false,
            finalized: true,
            commit: Some(Commit {
                link: Link {
                    header: Some(records::header(backing)),
                    ..link.clone()
                },
                done: false,
            }),
            end: Some(End {
                error: Some("the header may have been changed".to_owned()),
                len: 0,
                offset: 0,
                copied: 0,
            }),
        };
        let mut added = Ok(0);
        store.change(|state| added = state.add_job(job))?;
        added.map(Some).map_err(crate::error::Error::Invalid)
    }
}
