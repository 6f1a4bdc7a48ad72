//! The thread through which all changes of a graph are sent, if there is one.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::ThreadId;

use parking_lot::Mutex;

use super::Graph;

/// What the owner's thread is to do, without waiting for anything.
pub type Task = Box<dyn FnOnce() + Send>;

/// The owner's thread, and the way to it.
pub(super) struct Owner {
    thread: ThreadId,
    send: Box<dyn Fn(Task) + Send + Sync>,
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Owner").field(&self.thread).finish()
    }
}

impl Graph {
    /// From now on all changes are published on `thread`, to which `send` takes them: in one order
    /// with all else that happens there. Who asks for a change waits for it, unless it asks on
    /// that thread. A task that is dropped instead of run, as at the thread's end, is carried out
    /// by who asked. Can be said once.
    pub fn owned_by(&self, thread: ThreadId, send: impl Fn(Task) + Send + Sync + 'static) {
        let send = Box::new(send);
        let _ = self.0.owner.set(Owner { thread, send });
    }

    /// Runs `task` on the owner's thread, if there is one, and waits for its result. `None`: it has
    /// panicked there.
    pub(super) fn by_owner<T: Send + 'static>(
        &self,
        task: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let owner = self.0.owner.get();
        let Some(owner) = owner.filter(|owner| owner.thread != std::thread::current().id()) else {
            return Some(task());
        };
        let here = Arc::new(Mutex::new(Some(task)));
        let (there, (tell, told)) = (here.clone(), channel());
        (owner.send)(Box::new(move || {
            let task = there.lock().take();
            if let Some(task) = task {
                // Who asked waits.
                let _ = tell.send(task());
            }
        }));
        told.recv().ok().or_else(|| {
            let task = here.lock().take();
            task.map(|task| task())
        })
    }
}
