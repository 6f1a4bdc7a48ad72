//! Requests that storage has failed, told to who wants to hear of them.
//!
//! What a guest gets wrong (a range behind the end of the disk, a write to a disk that is only read)
//! is no failure of storage and not told. A flush that fails since an earlier one of the same file has
//! is not told either: the storage has told of that one.

use std::fmt;
use std::sync::Arc;

/// A guest's request that storage has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestFailure {
    /// It was to change something, or to make it stable.
    pub is_write: bool,
    /// The system's error number.
    pub errno: i32,
}

/// Is told of failures, on the thread of the queue: it must neither block nor allocate.
#[derive(Clone)]
pub struct OnFailure(Arc<dyn Fn(RequestFailure) + Send + Sync>);

impl OnFailure {
    /// Tells `listener`.
    pub fn new(listener: impl Fn(RequestFailure) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    pub(super) fn tell(&self, failure: RequestFailure) {
        (self.0)(failure);
    }
}

impl fmt::Debug for OnFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnFailure")
    }
}
