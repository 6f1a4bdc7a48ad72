//! The graph as clients see it: with the filters of jobs over the nodes that they work on.
//!
//! A filter is in force with its name as long as its job works: from before the job is listed until
//! before its end is told. The name is then no node's.

use std::sync::Arc;

use super::edges::{Demand, Edge, Rights, Role};
use super::grants::{Grant, Holder, NodeUse, NodeUser};
use super::job_filter::{FilterKind, JobFilter};
use super::nodes::{Node, State, duplicate_name};
use super::{Graph, Inner};
use crate::error::Result;
use crate::options::{BlockRef, CopyOnReadOptions, DetectZeroes, Driver};

impl Grant {
    /// Shows `filter` to clients for as long as this is held, or until it is
    /// [hidden](Self::hide_filter).
    ///
    /// # Errors
    /// When its name is a node's or another filter's.
    pub fn show_filter(&self, filter: JobFilter) -> Result<()> {
        let Some(graph) = self.graph() else {
            return Ok(());
        };
        let grants = graph.0.publishing.lock();
        let is_taken = graph.0.state.load().node(&filter.name).is_ok()
            || grants.filters().any(|other| other.name == filter.name);
        if is_taken {
            return Err(duplicate_name(&filter.name));
        }
        self.set_filter(&grants, Some(filter));
        Ok(())
    }

    /// Shows the filter no longer.
    pub fn hide_filter(&self) {
        if let Some(graph) = self.graph() {
            self.set_filter(&graph.0.publishing.lock(), None);
        }
    }
}

impl Graph {
    /// The filters of jobs.
    #[must_use]
    pub fn filters(&self) -> Vec<Arc<JobFilter>> {
        self.0.publishing.lock().filters().collect()
    }

    /// The filter of this name, if a job has one.
    #[must_use]
    pub fn filter(&self, name: &str) -> Option<Arc<JobFilter>> {
        let mut filters = self.filters().into_iter();
        filters.find(|filter| filter.name == name)
    }

    /// The filter over node `name`, if a job has one.
    #[must_use]
    pub fn filter_over(&self, name: &str) -> Option<Arc<JobFilter>> {
        let mut filters = self.filters().into_iter();
        filters.find(|filter| filter.node == name)
    }

    /// The node that a client means by `name`: the one under a filter, where it names that.
    #[must_use]
    pub fn meant_by(&self, name: &str) -> String {
        match self.filter(name) {
            Some(filter) => filter.node.clone(),
            None => name.to_owned(),
        }
    }

    /// Whether a node or a filter is called `name`.
    #[must_use]
    pub fn has_name(&self, name: &str) -> bool {
        self.state().node(name).is_ok() || self.filter(name).is_some()
    }

    /// The graph with the filters of jobs as nodes of it.
    #[must_use]
    pub fn shown(&self) -> State {
        self.shown_with(|_| true)
    }

    /// As [`shown`](Self::shown), with those filters alone whose names clients have given: a guest's disk
    /// shows no others.
    #[must_use]
    pub fn shown_named(&self) -> State {
        self.shown_with(|filter| filter.named)
    }

    fn shown_with(&self, wanted: impl Fn(&JobFilter) -> bool) -> State {
        let (state, filters) = self.0.seen();
        let mut shown = State::clone(&state);
        for filter in filters.iter().filter(|filter| wanted(filter)) {
            shown.insert_filter(filter);
        }
        shown
    }

    /// Who uses which node for what: all edges of the graph, and all grants, with the filters of jobs in
    /// between.
    #[must_use]
    pub fn uses_shown(&self) -> Vec<NodeUse> {
        let filters = self.filters();
        let mut uses = self.uses();
        for filter in &filters {
            uses = with_filter(uses, filter);
        }
        uses
    }
}

impl Inner {
    /// The graph and the filters at one moment.
    fn seen(&self) -> (Arc<State>, Vec<Arc<JobFilter>>) {
        let grants = self.publishing.lock();
        (self.state.load_full(), grants.filters().collect())
    }
}

impl Node {
    /// Whether it is what clients see of a job over node `name`.
    #[must_use]
    pub fn is_filter_over(&self, name: &str) -> bool {
        self.of_job.is_some() && self.edges.iter().any(|edge| edge.child == name)
    }
}

impl State {
    /// The name of what is shown in the place of node `name`: a filter over it, if this graph has one.
    #[must_use]
    pub fn shown_at<'a>(&'a self, name: &'a str) -> &'a str {
        let mut nodes = self.nodes().iter();
        match nodes.find(|node| node.is_filter_over(name)) {
            Some(filter) => &filter.name,
            None => name,
        }
    }

    /// Puts the filter between the node that it is over and those over that one.
    fn insert_filter(&mut self, filter: &JobFilter) {
        // The last of a job may have taken it away.
        let Ok(below) = self.node(&filter.node).cloned() else {
            return;
        };
        let above = self.all_over(&filter.node).map(|(node, _)| &node.name);
        for name in above.cloned().collect::<Vec<_>>() {
            if let Ok(node) = self.node_mut(&name) {
                let edges = node.edges.iter_mut();
                for edge in edges.filter(|edge| edge.child == filter.node) {
                    edge.child.clone_from(&filter.name);
                }
            }
        }
        let mut options = below.options.clone();
        options.node_name = Some(filter.name.clone());
        options.read_only = filter.kind == FilterKind::Commit;
        options.detect_zeroes = DetectZeroes::Off;
        options.driver = Driver::CopyOnRead(CopyOnReadOptions {
            file: BlockRef::Name(filter.node.clone()),
            bottom: None,
        });
        self.push(Arc::new(Node {
            name: filter.name.clone(),
            edges: vec![Edge {
                role: Role::Filtered,
                child: filter.node.clone(),
            }],
            options,
            implicit: true,
            of_job: Some((filter.kind, filter.named)),
            ..Node::clone(&below)
        }));
    }
}

/// `uses` with `filter` between the node that it is over and those who use that.
fn with_filter(uses: Vec<NodeUse>, filter: &JobFilter) -> Vec<NodeUse> {
    let is_own = |user: &NodeUser| match user {
        NodeUser::Holder(Holder::Job(kind, id)) => {
            *kind == filter.kind.job() && (id.is_empty() || *id == filter.job)
        }
        _ => false,
    };
    let mut own = Demand::NOTHING;
    let (mut done, mut left) = (Vec::new(), Vec::new());
    for mut used in uses {
        if used.node == filter.node && !is_own(&used.user) {
            own.does = own.does | used.demand.does;
            own.tolerates = own.tolerates & used.demand.tolerates;
            used.node.clone_from(&filter.name);
            done.push(used);
        } else {
            left.push(used);
        }
    }
    let demand = match filter.kind {
        FilterKind::Stream => Demand {
            does: own.does | Rights::WRITE_UNCHANGED,
            tolerates: own.tolerates & (Rights::ALL - Rights::RESIZE),
        },
        FilterKind::Commit => Demand::NOTHING,
        FilterKind::ActiveCommit => Demand {
            does: own.does & Rights::WRITE,
            tolerates: Rights::ALL - Rights::RESIZE,
        },
    };
    done.push(NodeUse {
        user: NodeUser::Node(filter.name.clone()),
        child: filter.kind.child(),
        node: filter.node.clone(),
        demand,
    });
    if filter.kind.is_held() {
        done.push(NodeUse {
            user: NodeUser::Holder(Holder::Job(filter.kind.job(), filter.job.clone())),
            child: "main node",
            node: filter.name.clone(),
            demand: Demand::NOTHING,
        });
    }
    done.append(&mut left);
    done
}
