//! What a job is to clients in the graph: a node over the one that it works on.
//!
//! It is a name, and what is told under it ([`shown`](super::shown)); no edge leads to it, and chains are
//! compiled as if it was not there. Whatever is asked for by its name is asked of the node under it, or
//! refused as QEMU does.

/// What kind of job has the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterKind {
    /// A stream into the node under it.
    Stream,
    /// A commit of layers under an image, the first of which is under the filter.
    Commit,
    /// A commit of layers the first of which guests write.
    ActiveCommit,
}

impl FilterKind {
    /// The driver of QEMU's filter for such a job.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Self::Stream => "copy-on-read",
            Self::Commit => "commit_top",
            Self::ActiveCommit => "mirror_top",
        }
    }

    /// What the node under it is to the filter, in QEMU's words.
    #[must_use]
    pub fn child(self) -> &'static str {
        match self {
            Self::Stream => "file",
            Self::Commit | Self::ActiveCommit => "backing",
        }
    }

    /// What kind of job it is.
    #[must_use]
    pub fn job(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Commit | Self::ActiveCommit => "commit",
        }
    }

    /// Whether the filter itself is the job's, and not only what is under it: then it is the one that is
    /// busy for who comes from above.
    #[must_use]
    pub fn is_held(self) -> bool {
        self != Self::Commit
    }
}

/// The filter of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFilter {
    /// Its name.
    pub name: String,
    /// A client has given the name.
    pub named: bool,
    /// What kind of job has it.
    pub kind: FilterKind,
    /// The job's name.
    pub job: String,
    /// The node under it.
    pub node: String,
    /// The image over it that gets another image under it at the end, for a commit between layers.
    pub overlay: Option<String>,
    /// The top of the chain that the client of a commit named.
    pub top: Option<String>,
}

impl JobFilter {
    /// What is told to who would cover the filter.
    #[must_use]
    pub fn busy(&self) -> String {
        match &self.overlay {
            Some(overlay) => self.is_backing_of(overlay),
            None => busy(&self.name, self.kind.job()),
        }
    }

    /// What is told to who would remove it from under `overlay`.
    pub(super) fn is_backing_of(&self, overlay: &str) -> String {
        format!(
            "Node '{}' is busy: node is used as backing hd of '{overlay}'",
            self.name
        )
    }
}

/// What a client is told of a node that a job of this kind has.
#[must_use]
pub fn busy(node: &str, kind: &str) -> String {
    format!("Node '{node}' is busy: block device is in use by block job: {kind}")
}
