//! The jobs of the daemon: asking for them, and their table.

use super::Failure;
use super::client::Client;
use super::table::write_table;
use super::tracker::{Tracker, merge};
use super::units;
use serde_json::Value;
use std::io::Write;
use std::time::{Duration, Instant};

/// How long the end of a job that was cancelled is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The jobs that there are, in one list.
pub fn query(client: &mut Client) -> Result<(Value, Value), Failure> {
    let jobs = client.execute("query-jobs", Value::Null)?;
    let block_jobs = client.execute("query-block-jobs", Value::Null)?;
    Ok((jobs, block_jobs))
}

/// Waits until job `id` has ended, since what comes next may not expect it any more. One that waits for
/// a disk that does not answer is left to itself after a while.
pub fn wait_for_end(client: &mut Client, id: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = client.execute("query-jobs", Value::Null)?;
        let mut jobs = jobs.as_array().into_iter().flatten();
        let goes_on = jobs.any(|job| job["id"] == id && job["status"] != "concluded");
        let left = deadline.saturating_duration_since(Instant::now());
        if !goes_on || left.is_zero() {
            return Ok(());
        }
        // Whatever has happened, the list tells.
        client.next_event(left)?;
    }
}

/// Prints the jobs.
pub fn list(client: &mut Client, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let (jobs, block_jobs) = query(client)?;
    if json {
        writeln!(out, "{}", Value::Array(merge(&jobs, &block_jobs)))?;
        return Ok(());
    }
    write(&jobs, &block_jobs, out)
}

/// A table of the jobs.
pub fn write(jobs: &Value, block_jobs: &Value, out: &mut dyn Write) -> Result<(), Failure> {
    let mut tracker = Tracker::new(None, Instant::now());
    tracker.poll(jobs, block_jobs, &[], Instant::now());
    if tracker.jobs().is_empty() {
        writeln!(out, "No active jobs")?;
        return Ok(());
    }
    let mut rows = vec![
        [
            "JOB", "TYPE", "STATUS", "COPIED", "TO COPY", "", "AT", "OF", "LIMIT", "ERROR",
        ]
        .map(String::from),
    ];
    for job in tracker.jobs() {
        rows.push([
            job.id.clone(),
            job.kind.clone(),
            job.state(),
            job.data
                .map_or_else(String::new, |data| units::bytes(data.copied)),
            job.data.map_or_else(String::new, |data| {
                let more = if data.is_final { "" } else { "+" };
                format!("{}{more}", units::bytes(data.to_copy))
            }),
            job.percent(),
            units::bytes(job.offset),
            units::bytes(job.len),
            units::limit(job.speed),
            job.error.clone().unwrap_or_default(),
        ]);
    }
    write_table(&rows, out)
}
