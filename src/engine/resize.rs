//! `block_resize`: another size for a disk, whether or not guests use it.
//!
//! The node and all whose size follows it are kept from jobs meanwhile, and the image is opened to be
//! written if it is not, all on the thread of the client. Front-ends are told when it is done.

use super::nodes::refused;
use super::stream::no_such_device;
use super::{Engine, on_this_thread};
use crate::error::Error;
use crate::graph::{Demand, Holder, Request, Rights, busy};
use crate::job::Refused;

impl Engine {
    /// Gives the disk of an export, or of a node, another size.
    ///
    /// # Errors
    /// What stands in the way, in QEMU's words where it has some. All is as before then.
    pub fn resize(
        &self,
        device: Option<&str>,
        node: Option<&str>,
        size: i64,
    ) -> Result<(), Refused> {
        let name = self.resized(device, node)?;
        let size = u64::try_from(size)
            .map_err(|_| Refused("Parameter 'size' expects a >0 size".into()))?;
        let busy = |name: &str, kind| Refused(busy(name, kind));
        // It is told first, as QEMU does.
        if let Some(kind) = self.graph.reserved_by(&name) {
            return Err(busy(&name, kind));
        }
        let nodes = self.graph.nodes_resized_with(&name).map_err(refused)?;
        let reserved = self.jobs.reserve(&nodes, "resize");
        let _reserved = reserved.map_err(|held| {
            let node = nodes.get(held.index).unwrap_or(&name);
            busy(node, held.kind)
        })?;
        let state = self.graph.state();
        let is_read_only = [state.node(&name), state.image_node(&name)]
            .iter()
            .any(|node| node.as_ref().is_ok_and(|node| node.fixed_read_only));
        drop(state);
        if is_read_only {
            return Err(Refused("Image is read-only".into()));
        }
        let before = self.sizes_served();
        let resized = on_this_thread(|reactor| reactor.block_on(self.resize_granted(&name, size)));
        let tell = |(_, old): &(String, u64)| match &resized {
            Ok(()) => true,
            // They may have seen that it was to become smaller.
            Err(_) => *old < size,
        };
        let unchanged: Vec<_> = before.into_iter().filter(tell).collect();
        self.tell_sizes(&nodes, &unchanged);
        resized.map_err(refused)
    }

    /// The node that is meant: the top of an export's disk, or else the node.
    fn resized(&self, device: Option<&str>, node: Option<&str>) -> Result<String, Refused> {
        let exports = self.exports.list();
        if let Some(name) = node {
            self.check_no_filter(name)?;
        }
        let export = exports
            .iter()
            .find(|served| Some(served.options.id.as_str()) == device);
        if let Some(served) = export {
            return Ok(served.export.node_name());
        }
        match node.filter(|name| self.graph.node(name).is_ok()) {
            Some(name) => Ok(name.to_owned()),
            None => Err(no_such_device(
                device.unwrap_or_default(),
                node.unwrap_or_default(),
            )),
        }
    }

    async fn resize_granted(&self, name: &str, size: u64) -> Result<(), Error> {
        let demand = Demand {
            does: Rights::RESIZE | Rights::OPEN,
            tolerates: Rights::ALL,
        };
        let request = Request::new(Holder::Tool).with(name, "root", demand);
        let grant = self.graph.access(request).await?;
        let resized = self.graph.resize_in_use(&grant, name, size).await;
        if let Err(error) = grant.give_back().await {
            log::error!("node '{name}': back to read-only: {error}");
        }
        resized
    }

    /// The size of each export's disk.
    fn sizes_served(&self) -> Vec<(String, u64)> {
        let exports = self.exports.list().into_iter();
        let sizes = exports.filter_map(|served| {
            let size = served.export.root()?.chain().size();
            Some((served.options.id.clone(), size))
        });
        sizes.collect()
    }

    /// Tells the front-ends that have one of `nodes`, and a size that is not known to be as before.
    fn tell_sizes(&self, nodes: &[String], before: &[(String, u64)]) {
        for served in self.exports.list() {
            let Some(root) = served.export.root() else {
                continue;
            };
            let (id, size) = (&served.options.id, root.chain().size());
            let known = before.iter().find(|(other, _)| other == id);
            let is_one = nodes.contains(&served.export.node_name());
            if is_one && known.is_none_or(|(_, old)| *old != size) {
                log::info!("export '{id}': its disk has {size} bytes");
                served.export.config_changed();
            }
        }
    }
}
