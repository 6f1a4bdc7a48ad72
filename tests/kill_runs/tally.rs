//! What a run found.

use crate::common::stamp::Owner;
use std::collections::HashSet;
use std::time::Duration;

/// Faults that are told in words; the others are only counted.
const TOLD: usize = 12;

/// Counts of a run. Faults first.
#[derive(Default)]
pub struct Tally {
    /// Writes whose sectors hold something else, though they were answered.
    lost: HashSet<(usize, Owner)>,
    /// Sectors that hold what they may not.
    pub wrong_sectors: u64,
    /// Requests that were never answered.
    pub unanswered: u64,
    /// Answers that nobody was waiting for.
    pub strays: u64,
    /// Answers with another status than the request should get.
    pub statuses: u64,
    /// Data to be written that changed in the guest's memory while it was.
    pub overwritten: u64,
    /// Answers that were never signalled.
    pub unsignalled: u64,
    /// Rings whose used index cannot be right.
    pub broken_rings: u64,
    /// Starts that ended by themselves.
    pub failed_starts: u64,
    /// Jobs that were there before a kill and not after it.
    pub lost_jobs: u64,
    /// Images that `qemu-img` found errors in.
    pub corrupt: u64,
    /// Images with more leaked clusters than the kills explain.
    pub excessive_leaks: u64,
    /// Disks with which it could not go on: a back-end that ends by itself, or answers no more.
    pub given_up: u64,

    /// Kills.
    pub kills: u64,
    /// Kills with nothing answered since the start before.
    pub barren_kills: u64,
    /// Requests in flight at the kills.
    pub in_flight: u64,
    /// Requests that were answered.
    pub answers: u64,
    /// Guests that began anew.
    pub reboots: u64,
    /// Connections that were closed by a back-end that was alive.
    pub hang_ups: u64,
    /// From a kill to the first answer after it.
    pub stalls: Vec<Duration>,
    /// From the end of the connection's messages to the first answer.
    pub served: Vec<Duration>,
    /// Leaked clusters of each image, and their bytes, and the kills that it had.
    pub leaks: Vec<(String, u64, u64, u64)>,
    /// The first faults, in words.
    told: Vec<String>,
}

impl Tally {
    /// Says what a fault was, if not too many were told before.
    pub fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.told.len() < TOLD {
            let text = text();
            println!("  fault: {text}");
            self.told.push(text);
        }
    }

    /// The write `owner` of disk `disk` was answered, and is gone.
    pub fn lose(&mut self, disk: usize, owner: Owner) {
        self.lost.insert((disk, owner));
    }

    /// All that a correct back-end does not do.
    fn faults(&self) -> [(&'static str, u64); 13] {
        [
            ("completed writes lost", self.lost.len() as u64),
            ("wrong sectors", self.wrong_sectors),
            ("requests never answered", self.unanswered),
            ("answers twice or to nobody", self.strays),
            ("wrong status", self.statuses),
            ("data overwritten by a dead process", self.overwritten),
            ("signals missed", self.unsignalled),
            ("broken rings", self.broken_rings),
            ("starts failed", self.failed_starts),
            ("jobs lost", self.lost_jobs),
            ("images with errors", self.corrupt),
            ("images with too many leaks", self.excessive_leaks),
            ("disks given up", self.given_up),
        ]
    }

    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.faults().iter().all(|&(_, count)| count == 0)
    }

    /// Prints all of it.
    pub fn print(&mut self, program: &str) {
        println!("\n{program}:");
        println!("  kills                              {}", self.kills);
        println!("  with nothing answered since start  {}", self.barren_kills);
        println!("  requests in flight at the kills    {}", self.in_flight);
        println!("  requests answered                  {}", self.answers);
        println!("  guests rebooted                    {}", self.reboots);
        println!("  connections closed while alive     {}", self.hang_ups);
        for (what, count) in self.faults() {
            println!("  {what:<34} {count}");
        }
        print_times("kill to first answer", &mut self.stalls);
        print_times("connected to first answer", &mut self.served);
        let (clusters, bytes, kills) = self.leaks.iter().fold((0, 0, 0), |sum, leak| {
            (sum.0 + leak.1, sum.1 + leak.2, sum.2 + leak.3)
        });
        println!(
            "  leaked clusters                    {clusters} ({} KiB) after {kills} kills",
            bytes >> 10
        );
        for (name, clusters, bytes, kills) in &self.leaks {
            if *clusters > 0 {
                println!(
                    "    {name:<32} {clusters} ({} KiB) after {kills} kills",
                    bytes >> 10
                );
            }
        }
    }
}

fn print_times(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |percent: usize| {
        let i = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(i).map_or(0.0, |t| t.as_secs_f64() * 1e3)
    };
    println!(
        "  {what:<34} median {:.1} ms, 90 % {:.1} ms, longest {:.1} ms, of {}",
        at(50),
        at(90),
        at(100),
        times.len()
    );
    let shown: Vec<String> = times
        .iter()
        .map(|t| format!("{:.0}", t.as_secs_f64() * 1e3))
        .collect();
    for line in shown.chunks(24) {
        println!("    {}", line.join(" "));
    }
}
