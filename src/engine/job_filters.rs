//! The filters of jobs: what a job is called in the graph, and what clients are told who name it, or a
//! node that a job has.

use super::Engine;
use crate::graph::{Busy, FilterKind, JobFilter, busy};
use crate::job::{Lease, Refused};
use crate::options::{BlockRef, BlockdevOptions, check_node_name};

/// The nodes that a job wants, and how they came to be meant.
pub(super) struct Wanted<'a> {
    /// Top first, and then the image over them, if that belongs to the job.
    pub nodes: &'a [String],
    /// What the client called the first of them.
    pub device: &'a str,
    /// The image over them.
    pub overlay: Option<&'a str>,
}

impl Engine {
    /// Shows a job, which has `lease`, as a filter in the graph: under the name that its client has given,
    /// or under one that is made up.
    ///
    /// # Errors
    /// When that is no name, or another's; `prefix` is said before.
    pub(super) fn show_filter(
        &self,
        lease: &Lease,
        name: Option<&str>,
        prefix: &str,
        filter: JobFilter,
    ) -> Result<(), Refused> {
        if let Some(name) = name {
            check_node_name(name).map_err(|text| Refused(format!("{prefix}{text}")))?;
        }
        let filter = JobFilter {
            name: name.map_or_else(|| self.graph.make_name(), str::to_owned),
            named: name.is_some(),
            ..filter
        };
        let shown = lease.show_filter(filter);
        shown.map_err(|error| Refused(format!("{prefix}{error}")))
    }

    /// As [`show_filter`](Self::show_filter), of a job that another process has begun: where its name is
    /// taken by now, it gets another one.
    pub(super) fn show_filter_again(
        &self,
        lease: &Lease,
        name: Option<&str>,
        filter: &JobFilter,
    ) -> Result<(), Refused> {
        let shown = self.show_filter(lease, name, "", filter.clone());
        shown.or_else(|Refused(text)| {
            log::warn!(
                "job '{}': {text} (its filter node gets another name)",
                filter.job
            );
            self.show_filter(lease, None, "", filter.clone())
        })
    }

    /// What is told to the client of a job that cannot have one of the nodes it wants: the name that the
    /// client knows that by, or that of the filter which it meets on its way down.
    pub(super) fn busy(&self, wanted: &Wanted<'_>, Busy { index, kind }: &Busy) -> Refused {
        let node = wanted.nodes.get(*index).map_or("", String::as_str);
        let filters = self.graph.filters();
        let over = filters.iter().find(|filter| filter.node == node);
        let named = filters.iter().find(|filter| filter.name == wanted.device);
        let name = match over.filter(|over| over.kind.is_held()) {
            _ if Some(node) == wanted.overlay => node,
            _ if *index == 0 => match named {
                // That one is nobody's, but what is under it.
                Some(filter) if !filter.kind.is_held() => node,
                _ => wanted.device,
            },
            Some(over) => &over.name,
            None => node,
        };
        Refused(busy(name, kind))
    }

    /// As [`busy`](Self::busy), for a stream: an image over the layers of a commit is in the way of one
    /// that ends there, since that would have to hold on to what is under it.
    pub(super) fn busy_for_stream(&self, wanted: &Wanted<'_>, busy: &Busy) -> Refused {
        let node = wanted.nodes.get(busy.index);
        let filters = self.graph.filters();
        let below = filters
            .iter()
            .find(|filter| filter.overlay.as_ref() == node);
        let Some(filter) = below.filter(|_| node.is_some()) else {
            return self.busy(wanted, busy);
        };
        let index = match wanted.nodes.get(busy.index + 1) {
            // What the commit's client named is the commit's as well.
            _ if filter.top.as_ref() == wanted.nodes.first() => 0,
            Some(_) => busy.index + 1,
            None => {
                return Refused(format!("Cannot freeze 'backing' link to '{}'", filter.name));
            }
        };
        self.busy(wanted, &Busy { index, ..*busy })
    }

    /// `options` in which nodes that are meant by the names of filters have their own: a filter goes with
    /// its job, and they are recorded.
    pub(super) fn without_filters(&self, options: &BlockdevOptions) -> BlockdevOptions {
        let mut options = options.clone();
        for child in options.driver.children_mut() {
            match child {
                BlockRef::Name(name) => *name = self.graph.meant_by(name),
                BlockRef::Inline(inside) => **inside = self.without_filters(inside),
            }
        }
        options
    }

    /// Refuses what is to be done to a node if that is a job's filter.
    pub(super) fn check_no_filter(&self, name: &str) -> Result<(), Refused> {
        match self.graph.filter(name) {
            Some(filter) => Err(Refused(filter.busy())),
            None => Ok(()),
        }
    }
}

/// A filter of this kind over `node`, which has no name yet.
pub(super) fn filter(kind: FilterKind, job: &str, node: &str) -> JobFilter {
    JobFilter {
        name: String::new(),
        named: false,
        kind,
        job: job.to_owned(),
        node: node.to_owned(),
        overlay: None,
        top: None,
    }
}
