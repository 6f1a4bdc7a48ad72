//! The control thread: the one that publishes all changes of the graph, in one order.
//!
//! What takes time (opening images, locks, flushes) happens on the threads of those who want the
//! change, under grants that others see. What comes here is checked against the graph as it is by
//! then and put in force, and waits for nothing. Queries do not come here.

use std::sync::mpsc::channel;

use crate::error::{Error, Result};
use crate::graph::{Graph, Task};

/// Starts the control thread of `graph`. It ends with the graph.
///
/// # Errors
/// When there can be no thread for it.
pub fn start(graph: &Graph) -> Result<()> {
    let (send, changes) = channel::<Task>();
    let thread = std::thread::Builder::new()
        .name("control".into())
        .spawn(move || changes.into_iter().for_each(|publish| publish()))
        .map_err(|error| Error::Invalid(format!("starting: {error}")))?;
    graph.owned_by(thread.thread().id(), move |task| {
        // A change that finds the thread gone is published by who wants it.
        let _ = send.send(task);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    //! What would be caught: a graph without its thread, and a thread that outlives its graph.

    use std::time::{Duration, Instant};

    use super::*;

    fn threads() -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.flatten().map(|task| task.path().join("comm"));
        let names = names.filter_map(|path| std::fs::read_to_string(path).ok());
        names.filter(|name| name.trim_end() == "control").count()
    }

    #[test]
    fn the_thread_lives_as_long_as_its_graph() {
        let graph = Graph::default();
        let before = threads();
        start(&graph).unwrap();
        // It goes through the thread, or would never end.
        graph.commit(graph.transaction()).unwrap();
        assert_eq!(threads(), before + 1);
        drop(graph);
        let deadline = Instant::now() + Duration::from_secs(60);
        while threads() > before {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }
}
