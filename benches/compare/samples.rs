//! What runs give: the figures that the report is made of.

/// What disturbed a run, in CPUs: with more than a few per cent of one, its figures are not to be
/// trusted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disturbance {
    /// Kept busy by other programs.
    pub programs: f64,
    /// Taken away by the host of this virtual machine, as far as it says so.
    pub host: f64,
}

/// What one run of an I/O row gave.
#[derive(Clone, Copy, Debug)]
pub struct IoSample {
    /// Requests per second.
    pub iops: f64,
    /// Median latency in microseconds.
    pub p50: f64,
    /// 99th percentile of the latency in microseconds.
    pub p99: f64,
    /// CPU seconds of the back-end per million requests.
    pub cpu: f64,
    /// KiB written to the disk for each request, flushed; NaN where that is not counted.
    pub written: f64,
    /// What disturbed it.
    pub other: Disturbance,
}

/// What a turn of the daemon against itself gave.
#[derive(Clone, Copy, Debug)]
pub struct TurnSample {
    /// The run.
    pub io: IoSample,
    /// Its requests per second, to those of the round's first.
    pub iops_to_first: f64,
    /// Its CPU time per request, to that of the round's first.
    pub cpu_to_first: f64,
}

/// What one run of a stream row gave.
/// NaN stands for a figure that the row does not have.
#[derive(Clone, Copy, Debug)]
pub struct StreamSample {
    /// From the command to the completion event.
    pub seconds: f64,
    /// CPU seconds of the back-end meanwhile, where no guest ran.
    pub cpu: f64,
    /// The guest's requests per second before the stream.
    pub iops_before: f64,
    /// The guest's p99 in microseconds before the stream.
    pub p99_before: f64,
    /// The guest's requests per second while it ran.
    pub iops: f64,
    /// The guest's p99 in microseconds while it ran.
    pub p99: f64,
    /// What disturbed it.
    pub other: Disturbance,
}

impl StreamSample {
    /// A sample without figures.
    pub fn new() -> Self {
        let none = f64::NAN;
        StreamSample {
            seconds: none,
            cpu: none,
            iops_before: none,
            p99_before: none,
            iops: none,
            p99: none,
            other: Disturbance::default(),
        }
    }
}

/// What one run of a start row gave.
#[derive(Clone, Copy, Debug)]
pub struct StartSample {
    /// Milliseconds from the start of the process to the end of a front-end's handshake.
    pub ready: f64,
    /// Resident memory then, in MiB.
    pub resident: f64,
    /// How often threads woke up in a second without a request.
    pub wakeups: f64,
    /// CPU seconds per million requests of a guest that sends 1000 each second.
    pub cpu: f64,
    /// Milliseconds from a second start, right after a SIGKILL with requests in flight, to the end of
    /// a front-end's handshake.
    pub again: f64,
    /// How many of them were spent waiting for the I/O of the killed process; NaN for a back-end
    /// that does not.
    pub fence: f64,
}

/// What the kernel alone needed for a row.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    /// Requests per second.
    pub iops: f64,
    /// CPU seconds per million requests.
    pub cpu: f64,
}

impl Floor {
    /// Of requests that consist of one of each.
    pub fn then(self, other: Floor) -> Floor {
        Floor {
            iops: 1.0 / (1.0 / self.iops + 1.0 / other.iops),
            cpu: self.cpu + other.cpu,
        }
    }
}
