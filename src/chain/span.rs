//! Which layers a copy is about.

/// Where a copy goes, how far down it looks, and how it is kept.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub(super) target: usize,
    pub(super) end: usize,
    pub(super) compress: bool,
    sparse: bool,
}

impl Span {
    /// Into layer `target`, from those above `end`: the index of the base, or the number of layers.
    #[must_use]
    pub fn new(target: usize, end: usize) -> Self {
        Self {
            target,
            end,
            compress: false,
            sparse: false,
        }
    }

    /// The file system is asked for the holes of raw layers, which are zeros then. It may have to
    /// look for them at a server: not for threads that serve guests.
    #[must_use]
    pub fn sparse(self) -> Self {
        Self {
            sparse: true,
            ..self
        }
    }

    pub(super) fn target(self) -> usize {
        self.target
    }

    pub(super) fn end(self) -> usize {
        self.end
    }

    pub(super) fn is_sparse(self) -> bool {
        self.sparse
    }

    /// Whole clusters that become smaller by it are compressed, if `on`.
    #[must_use]
    pub fn compressed(self, on: bool) -> Self {
        Self {
            compress: on,
            ..self
        }
    }
}
