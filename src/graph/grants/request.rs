//! What a holder asks for: the nodes, what it does with each, and what it relies on.

use std::fmt;

use super::{Demand, Rights, Role, State};

/// Who holds a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// An export, by its id.
    Export(String),
    /// A job, by its kind and its id.
    Job(&'static str, String),
    /// A tool that has the graph for itself.
    Tool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(kind, id) => write!(f, "{kind} job '{id}'"),
            Self::Export(_) | Self::Tool => f.write_str("an unnamed block device"),
        }
    }
}

/// What a grant is for.
#[derive(Clone, Debug)]
pub struct Request {
    pub(super) holder: Holder,
    pub(super) uses: Vec<Use>,
    /// Links that stay as they are, each with the node that has the child.
    pub(super) frozen: Vec<(String, Role)>,
    /// Images whose own reading of what is under them does not count: what changes there is hidden by
    /// them, or by those above.
    pub(super) hidden: Vec<String>,
    /// Images that were opened to be read for good are opened to be written meanwhile.
    pub(super) reopens: bool,
}

/// One node of a grant.
#[derive(Clone, Debug)]
pub(super) struct Use {
    pub(super) node: String,
    /// What the node is to the holder, in QEMU's words.
    pub(super) child: &'static str,
    pub(super) demand: Demand,
    /// No other job has the node.
    pub(super) alone: bool,
}

impl Request {
    /// Nothing yet.
    #[must_use]
    pub fn new(holder: Holder) -> Self {
        Self {
            holder,
            uses: Vec::new(),
            frozen: Vec::new(),
            hidden: Vec::new(),
            reopens: false,
        }
    }

    /// And images that are `read-only` are written all the same, for as long as this is held: who gives
    /// that option for an image speaks of guests. Files that are `read-only` stay so.
    #[must_use]
    pub fn reopening(mut self) -> Self {
        self.reopens = true;
        self
    }

    /// To read the disk of `node`, or to write it, whatever others do.
    #[must_use]
    pub fn disk(holder: Holder, node: &str, writable: bool) -> Self {
        let does = match writable {
            true => Rights::READ | Rights::WRITE,
            false => Rights::READ,
        };
        let tolerates = Rights::ALL;
        Self::new(holder).with(node, "root", Demand { does, tolerates })
    }

    /// And `node`, which is `child` to the holder.
    #[must_use]
    pub fn with(mut self, node: &str, child: &'static str, demand: Demand) -> Self {
        self.uses.push(Use {
            node: node.to_owned(),
            child,
            demand,
            alone: false,
        });
        self
    }

    /// And the link of `node` to its child in this role.
    #[must_use]
    pub fn frozen(mut self, node: &str, role: Role) -> Self {
        self.frozen.push((node.to_owned(), role));
        self
    }

    /// For a stream into the first of `layers`, which may be written meanwhile, from the others.
    #[must_use]
    pub fn stream(state: &State, id: &str, layers: &[String]) -> Self {
        let mut request = Self::new(Holder::Job("stream", id.to_owned())).reopening();
        let tolerates = Rights::READ | Rights::WRITE_UNCHANGED;
        for (index, layer) in layers.iter().enumerate() {
            let (child, does, tolerates) = match index {
                // The disks over it read the same all the while.
                0 => (
                    "active node",
                    Rights::READ | Rights::WRITE_UNCHANGED | Rights::OPEN,
                    tolerates | Rights::WRITE,
                ),
                _ => ("intermediate node", Rights::READ, tolerates),
            };
            request = request
                .with(layer, child, Demand { does, tolerates })
                .frozen_below(state, layer);
        }
        request
    }

    /// For a commit of `layers`, top first, into `base`. The image of the `overlay` over them is to name
    /// the base at the end; where there is none, the first of the layers is written meanwhile.
    ///
    /// The layers hide what changes in the base. So they may be read all the while, through the first of
    /// them; who reads the base, or starts between, would see it change.
    #[must_use]
    pub fn commit(
        state: &State,
        id: &str,
        overlay: Option<&str>,
        layers: &[String],
        base: (&str, Rights),
    ) -> Self {
        let mut request = Self::new(Holder::Job("commit", id.to_owned())).reopening();
        let reads = Rights::READ | Rights::WRITE_UNCHANGED;
        if let Some(overlay) = overlay {
            let demand = Demand {
                does: Rights::READ | Rights::WRITE_UNCHANGED | Rights::OPEN,
                tolerates: reads | Rights::WRITE,
            };
            request = request
                .with(overlay, "main node", demand)
                .frozen_below(state, overlay);
        }
        for (index, layer) in layers.iter().enumerate() {
            let (child, tolerates) = match (index, overlay) {
                (0, None) => ("source", reads | Rights::WRITE),
                (0, Some(_)) => ("intermediate node", reads),
                _ => ("intermediate node", Rights::WRITE_UNCHANGED),
            };
            let does = Rights::NONE;
            request = request
                .with(layer, child, Demand { does, tolerates })
                .frozen_below(state, layer);
            let image = state.image_node(layer).map(|image| image.name.clone());
            request.hidden.extend(image);
        }
        let demand = Demand {
            does: Rights::READ | Rights::WRITE | base.1,
            tolerates: Rights::WRITE_UNCHANGED,
        };
        let child = match overlay {
            Some(_) => "base",
            None => "target",
        };
        request.with(base.0, child, demand)
    }

    /// And the links from `layer` down to what supplies what its image lacks.
    fn frozen_below(mut self, state: &State, layer: &str) -> Self {
        let mut node = state.node(layer);
        while let Ok(filter) = node
            && let Some(child) = filter.child(Role::Filtered)
        {
            self = self.frozen(&filter.name, Role::Filtered);
            node = state.node(child);
        }
        match node {
            Ok(image) => self.frozen(&image.name, Role::Backing),
            Err(_) => self,
        }
    }
}
