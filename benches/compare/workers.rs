//! The CPU time of the kernel's own workers (`kworker` threads). With them the kernel does part of
//! a program's I/O: one that submits a request alone leaves it to a worker of the block layer to
//! notify the device, and the end of a write past the page cache is a worker's task. No program's
//! own figures have that time, so that without it those who leave more to the kernel would seem
//! to need less.

use crate::common::Res;
use crate::common::daemon::Daemon;
use std::collections::HashMap;
use std::fs;
use std::time::Duration;

/// Measures the workers from its start on.
pub struct Workers {
    before: HashMap<u32, Duration>,
}

impl Workers {
    pub fn start() -> Res<Self> {
        Ok(Workers { before: times()? })
    }

    /// The time that all of them took since. One that has ended meanwhile is not counted: they
    /// end after minutes without work.
    pub fn end(&self) -> Res<Duration> {
        Ok(since(&self.before, &times()?))
    }
}

/// Measures a back-end from its start on: its own threads and the kernel's workers.
pub struct BackendCpu {
    own: Duration,
    workers: Workers,
}

impl BackendCpu {
    pub fn start(daemon: &Daemon) -> Res<Self> {
        Ok(BackendCpu {
            own: daemon.cpu_time()?,
            workers: Workers::start()?,
        })
    }

    pub fn end(&self, daemon: &Daemon) -> Res<Duration> {
        Ok(daemon.cpu_time()?.saturating_sub(self.own) + self.workers.end()?)
    }
}

fn since(before: &HashMap<u32, Duration>, after: &HashMap<u32, Duration>) -> Duration {
    let zero = Duration::ZERO;
    let one = |(pid, &time): (&u32, &Duration)| {
        time.saturating_sub(before.get(pid).copied().unwrap_or(zero))
    };
    after.iter().map(one).sum()
}

/// The time of each worker that is there.
fn times() -> Res<HashMap<u32, Duration>> {
    let mut times = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Either file is gone when the worker has ended since.
        let read = |file| fs::read_to_string(entry.path().join(file));
        let (Ok(comm), Ok(schedstat)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        if comm.starts_with("kworker/") {
            times.insert(pid, on_cpu(&schedstat)?);
        }
    }
    Ok(times)
}

/// The first field of `/proc/PID/schedstat`: nanoseconds on a CPU.
fn on_cpu(schedstat: &str) -> Res<Duration> {
    let field = schedstat.split_whitespace().next();
    let ns = field.and_then(|field| field.parse().ok());
    Ok(Duration::from_nanos(
        ns.ok_or("a schedstat without figures")?,
    ))
}
