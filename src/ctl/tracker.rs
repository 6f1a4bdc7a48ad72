//! What is known of running jobs, put together from polls and events.
//!
//! Polls tell progress, events tell the outcome: a job that ended by itself is gone from the
//! polls. Events are sent before the answer to a later poll, so a job that a poll no longer shows
//! has told its outcome, if it ever does.

use super::client::Event;
use super::units;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back the measured rate looks.
const RATE_WINDOW: Duration = Duration::from_secs(4);
/// The text with which a cancelled job ends.
const CANCELLED: &str = "Operation canceled";

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done.
    Completed,
    /// It ended with this error.
    Failed(String),
    /// Somebody cancelled it.
    Cancelled,
}

/// The bytes that a job moves: what it only passes over is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// Bytes that were copied.
    pub copied: u64,
    /// Bytes that are to be copied, `copied` included.
    pub to_copy: u64,
    /// There are no more: all has been looked at.
    pub is_final: bool,
}

/// One job.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub id: String,
    /// What it does, such as `stream`.
    pub kind: String,
    /// Its state, such as `running`.
    pub status: String,
    /// Bytes done.
    pub offset: u64,
    /// Bytes to do.
    pub len: u64,
    /// What of it is data to move, if the daemon says so.
    pub data: Option<Data>,
    /// Limit in bytes per second, 0 being none.
    pub speed: u64,
    /// `ok`, or why it stopped.
    pub io_status: String,
    /// The error that it has met.
    pub error: Option<String>,
    /// How it ended, when it has.
    pub outcome: Option<Outcome>,
    began: Instant,
    began_at: Option<u64>,
    ended: Option<Instant>,
    samples: VecDeque<(Instant, u64)>,
}

impl Job {
    fn new(id: &str, now: Instant) -> Self {
        Self {
            id: id.to_owned(),
            kind: String::new(),
            status: "created".to_owned(),
            offset: 0,
            len: 0,
            data: None,
            speed: 0,
            io_status: "ok".to_owned(),
            error: None,
            outcome: None,
            began: now,
            began_at: None,
            ended: None,
            samples: VecDeque::new(),
        }
    }

    fn update(&mut self, info: &Value, now: Instant) {
        let text = |key: &str| info.get(key).and_then(Value::as_str).map(str::to_owned);
        let number = |key: &str| info.get(key).and_then(Value::as_u64);
        self.kind = text("type").unwrap_or_default();
        self.status = text("status").unwrap_or_default();
        self.error = text("error").or(self.error.take());
        self.offset = number("offset").or(number("current-progress")).unwrap_or(0);
        self.len = number("len").or(number("total-progress")).unwrap_or(0);
        if let (Some(copied), Some(to_copy)) = (number("copied"), number("to-copy")) {
            let is_final = info.get("to-copy-final").and_then(Value::as_bool);
            self.data = Some(Data {
                copied,
                to_copy,
                is_final: is_final.unwrap_or(false),
            });
        }
        self.speed = number("speed").unwrap_or(self.speed);
        self.io_status = text("io-status").unwrap_or_else(|| "ok".to_owned());
        self.sample(now);
        if matches!(self.status.as_str(), "concluded" | "null") {
            self.end(self.error.clone(), now);
        }
    }

    /// What is measured: the bytes moved, or the progress of those who do not tell them.
    fn done(&self) -> u64 {
        self.data.map_or(self.offset, |data| data.copied)
    }

    fn sample(&mut self, now: Instant) {
        self.began_at.get_or_insert(self.done());
        self.samples.push_back((now, self.done()));
        // One sample older than the window stays, as the far end to measure from.
        while let Some((second, _)) = self.samples.get(1)
            && now.saturating_duration_since(*second) >= RATE_WINDOW
        {
            self.samples.pop_front();
        }
    }

    fn end(&mut self, error: Option<String>, now: Instant) {
        if self.outcome.is_none() {
            self.ended = Some(now);
            self.outcome = Some(match error {
                None => Outcome::Completed,
                Some(error) if error == CANCELLED => Outcome::Cancelled,
                Some(error) => Outcome::Failed(error),
            });
        }
    }

    /// What is told right before the end.
    fn copied_at_end(&mut self, copied: u64) {
        let to_copy = self.data.map_or(0, |data| data.to_copy).max(copied);
        self.data = Some(Data {
            copied,
            to_copy,
            is_final: true,
        });
    }

    /// Whether it has copied all, and goes on until it is completed.
    pub fn is_ready(&self) -> bool {
        self.outcome.is_none() && self.status == "ready"
    }

    fn failed(&self) -> bool {
        !matches!(self.outcome, None | Some(Outcome::Completed))
    }

    /// The rate of the last seconds, in bytes per second.
    pub fn rate(&self) -> u64 {
        let (Some((from, low)), Some((to, high))) = (self.samples.front(), self.samples.back())
        else {
            return 0;
        };
        per_second(
            high.saturating_sub(*low),
            to.saturating_duration_since(*from),
        )
    }

    /// The time until the end at the present rate, if that can be told.
    pub fn time_left(&self) -> Option<Duration> {
        let left = match self.data {
            Some(data) if data.is_final => data.to_copy.saturating_sub(data.copied),
            Some(_) => return None,
            None => self.len.saturating_sub(self.offset),
        };
        left.checked_div(self.rate()).map(Duration::from_secs)
    }

    /// How much is done, in percent of what is to be moved; of the length where nothing is, or
    /// where that is all that is known.
    pub fn percent(&self) -> String {
        match self.data {
            Some(data) if !data.is_final && self.outcome.is_none() => "?".to_owned(),
            Some(data) if data.to_copy > 0 => units::percent(data.copied, data.to_copy),
            _ => units::percent(self.offset, self.len),
        }
    }

    /// The state, with what is special about it.
    pub fn state(&self) -> String {
        match self.io_status.as_str() {
            "ok" => self.status.clone(),
            io_status => format!("{} ({io_status})", self.status),
        }
    }

    /// How it ended, in a sentence.
    pub fn outcome_text(&self) -> String {
        match &self.outcome {
            None => format!("{}: {}", self.id, self.state()),
            Some(Outcome::Failed(error)) => format!("{}: failed: {error}", self.id),
            Some(Outcome::Cancelled) => {
                let at = units::percent(self.offset, self.len);
                match self.data {
                    Some(data) => {
                        let copied = units::bytes(data.copied);
                        format!("{}: cancelled at {at}, {copied} copied", self.id)
                    }
                    None => format!("{}: cancelled at {at}", self.id),
                }
            }
            Some(Outcome::Completed) => {
                let time = self
                    .ended
                    .map(|ended| ended.saturating_duration_since(self.began))
                    .unwrap_or_default();
                let done = self.done().saturating_sub(self.began_at.unwrap_or(0));
                let what = match self.data {
                    Some(_) => format!("{} copied of", units::bytes(done)),
                    None => format!("{} covered of", units::bytes(done)),
                };
                format!(
                    "{}: completed, {what} {} in {:.1} s ({}/s)",
                    self.id,
                    units::bytes(self.len),
                    time.as_secs_f64(),
                    units::bytes(per_second(done, time))
                )
            }
        }
    }

    /// The job for programs.
    pub fn to_json(&self) -> Value {
        let mut value = json!({
            "job": self.id,
            "type": self.kind,
            "status": self.status,
            "offset": self.offset,
            "len": self.len,
            "speed": self.speed,
            "io-status": self.io_status,
            "rate": self.rate(),
        });
        if let (Some(map), Some(data)) = (value.as_object_mut(), self.data) {
            map.insert("copied".to_owned(), json!(data.copied));
            map.insert("to-copy".to_owned(), json!(data.to_copy));
            map.insert("to-copy-final".to_owned(), json!(data.is_final));
        }
        let (outcome, error) = match &self.outcome {
            None => (None, None),
            Some(Outcome::Completed) => (Some("completed"), None),
            Some(Outcome::Cancelled) => (Some("cancelled"), None),
            Some(Outcome::Failed(error)) => (Some("failed"), Some(error)),
        };
        if let (Some(map), Some(outcome)) = (value.as_object_mut(), outcome) {
            map.insert("outcome".to_owned(), json!(outcome));
            if let Some(error) = error {
                map.insert("error".to_owned(), json!(error));
            }
        }
        value
    }
}

fn per_second(count: u64, time: Duration) -> u64 {
    let millis = time.as_millis();
    if millis == 0 {
        return 0;
    }
    u64::try_from(u128::from(count) * 1000 / millis).unwrap_or(u64::MAX)
}

/// The jobs under observation.
#[derive(Debug)]
pub struct Tracker {
    only: Option<String>,
    jobs: Vec<Job>,
    earlier_failed: bool,
}

impl Tracker {
    /// Observes one job, which has just been started, or all.
    pub fn new(only: Option<&str>, now: Instant) -> Self {
        // All that the job has done is done under observation.
        let fresh = |id| Job {
            began_at: Some(0),
            ..Job::new(id, now)
        };
        let jobs = only.map(fresh).into_iter().collect();
        Self {
            only: only.map(str::to_owned),
            jobs,
            earlier_failed: false,
        }
    }

    /// All jobs seen so far, those that have ended included.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Whether there is nothing left to wait for.
    pub fn all_ended(&self) -> bool {
        self.jobs.iter().all(|job| job.outcome.is_some())
    }

    /// Whether any job ended otherwise than completed.
    pub fn any_failed(&self) -> bool {
        self.earlier_failed || self.jobs.iter().any(Job::failed)
    }

    /// Takes in the answers to `query-jobs` and `query-block-jobs`, and the events that came
    /// before the answers.
    ///
    /// The order matters. Every event before these was sent before the questions: a job that is
    /// shown although it has ended is another of the same name. These events may have come
    /// between the answers, which may then show a job that ended meanwhile. Only after them is a
    /// job that is not shown known to have told nothing.
    pub fn poll(&mut self, jobs: &Value, block_jobs: &Value, events: &[Event], now: Instant) {
        let mut alive = Vec::new();
        for info in merge(jobs, block_jobs) {
            let Some(id) = info.get("id").and_then(Value::as_str) else {
                continue;
            };
            alive.push(id.to_owned());
            let Some(job) = self.job(id, now) else {
                continue;
            };
            if job.outcome.is_some() && is_running(&info) {
                // The next job of the same name.
                let failed = job.failed();
                *job = Job::new(id, now);
                job.update(&info, now);
                self.earlier_failed |= failed;
            } else {
                job.update(&info, now);
            }
        }
        for event in events {
            self.event(event, now);
        }
        for job in &mut self.jobs {
            if job.outcome.is_none() && !alive.contains(&job.id) {
                job.end(job.error.clone(), now);
            }
        }
    }

    /// Takes in an event.
    pub fn event(&mut self, event: &Event, now: Instant) {
        let text = |key: &str| event.data.get(key).and_then(Value::as_str);
        if event.name == "JOB_STATUS_CHANGE" && text("status") == Some("aborting") {
            // What went wrong comes with the job's own event, if it has one.
            let known = text("id").and_then(|id| self.jobs.iter_mut().find(|job| job.id == id));
            if let Some(job) = known {
                job.error.get_or_insert_with(|| "aborted".to_owned());
            }
            return;
        }
        let number = |key: &str| event.data.get(key).and_then(Value::as_u64);
        if event.name == "JOB_COPIED" {
            if let (Some(job), Some(copied)) = (
                text("id").and_then(|id| self.job(id, now)),
                number("copied"),
            ) {
                job.copied_at_end(copied);
            }
            return;
        }
        let cancelled = event.name == "BLOCK_JOB_CANCELLED";
        if !cancelled && event.name != "BLOCK_JOB_COMPLETED" {
            return;
        }
        let Some(job) = text("device").and_then(|id| self.job(id, now)) else {
            return;
        };
        job.kind = text("type").unwrap_or(&job.kind).to_owned();
        job.offset = number("offset").unwrap_or(job.offset);
        job.len = number("len").unwrap_or(job.len);
        // Seen for the first time at its end, a job has done all of it unobserved.
        job.began_at.get_or_insert(0);
        let error = if cancelled {
            Some(CANCELLED)
        } else {
            text("error")
        };
        job.status = if error.is_none() {
            "concluded"
        } else {
            "aborting"
        }
        .to_owned();
        job.error = error.map(str::to_owned);
        if let (None, Some(data)) = (error, &mut job.data) {
            // What is over has no more to copy than it has copied, if it went well.
            data.to_copy = data.copied;
        }
        job.end(job.error.clone(), now);
    }

    /// The job with this name, if it is under observation.
    fn job(&mut self, id: &str, now: Instant) -> Option<&mut Job> {
        if self.only.as_deref().is_some_and(|only| only != id) {
            return None;
        }
        if !self.jobs.iter().any(|job| job.id == id) {
            self.jobs.push(Job::new(id, now));
        }
        self.jobs.iter_mut().find(|job| job.id == id)
    }
}

fn is_running(info: &Value) -> bool {
    matches!(
        info.get("status").and_then(Value::as_str),
        Some("created" | "running" | "paused")
    )
}

/// One list of jobs from the two that QMP has: `query-jobs` knows them all, `query-block-jobs`
/// knows more about some. Each has an `id`.
pub fn merge(jobs: &Value, block_jobs: &Value) -> Vec<Value> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut merged = list(block_jobs);
    for job in &mut merged {
        if let Some(map) = job.as_object_mut()
            && let Some(device) = map.remove("device")
        {
            map.insert("id".to_owned(), device);
        }
    }
    for job in list(jobs) {
        if !merged.iter().any(|known| known.get("id") == job.get("id")) {
            merged.push(job);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event {
            name: name.to_owned(),
            data,
        }
    }

    fn running(id: &str, offset: u64) -> Value {
        json!([{"device": id, "type": "stream", "status": "running", "len": 100, "offset": offset,
                "speed": 10, "io-status": "ok"}])
    }

    /// Would catch a wrong rate or time left, and a rate that never forgets the past.
    #[test]
    fn rate_of_the_last_seconds() {
        let start = Instant::now();
        let mut tracker = Tracker::new(None, start);
        for second in 0..=10_u64 {
            // Ten a second at first, then five.
            let offset = if second < 5 {
                second * 10
            } else {
                50 + (second - 5) * 5
            };
            let now = start + Duration::from_secs(second);
            tracker.poll(&json!([]), &running("j", offset), &[], now);
        }
        let [job] = tracker.jobs() else { panic!() };
        assert_eq!((job.rate(), job.offset), (5, 75));
        assert_eq!(job.time_left(), Some(Duration::from_secs(5)));
        assert!(!tracker.all_ended());
    }

    /// Would catch a rate, a share or a time left of what is only passed over, and a time left that
    /// is told before all is known.
    #[test]
    fn work_is_what_is_to_be_copied() {
        let start = Instant::now();
        let mut tracker = Tracker::new(Some("j"), start);
        let mut poll = |second: u64, offset: u64, copied: u64, is_final: bool| {
            let mut jobs = running("j", offset);
            jobs[0]["copied"] = json!(copied);
            jobs[0]["to-copy"] = json!(40);
            jobs[0]["to-copy-final"] = json!(is_final);
            let now = start + Duration::from_secs(second);
            tracker.poll(&json!([]), &jobs, &[], now);
            let job = &tracker.jobs()[0];
            (job.rate(), job.time_left(), job.percent())
        };
        assert_eq!(poll(0, 0, 0, false), (0, None, "?".to_owned()));
        assert_eq!(poll(1, 50, 5, false), (5, None, "?".to_owned()));
        let left = Some(Duration::from_secs(6));
        assert_eq!(poll(2, 90, 10, true), (5, left, "25.0%".to_owned()));
        // The last of it, and a hole: nothing is left to wait for.
        assert_eq!(poll(3, 95, 40, true).1, Some(Duration::ZERO));
        let data = json!({"device": "j", "type": "stream", "len": 100, "offset": 100});
        let now = start + Duration::from_secs(4);
        tracker.event(&event("JOB_COPIED", json!({"id": "j", "copied": 38})), now);
        tracker.event(&event("BLOCK_JOB_COMPLETED", data), now);
        let [job] = tracker.jobs() else { panic!() };
        assert_eq!(job.percent(), "100.0%");
        assert!(
            job.outcome_text()
                .starts_with("j: completed, 38 B copied of 100 B in 4.0 s")
        );
    }

    /// Would catch a failed or cancelled job that is reported as completed.
    #[test]
    fn outcomes() {
        let now = Instant::now();
        let mut tracker = Tracker::new(None, now);
        let done = |id: &str| json!({"device": id, "type": "stream", "len": 5, "offset": 5});
        tracker.event(&event("BLOCK_JOB_COMPLETED", done("a")), now);
        let mut failed = done("b");
        failed["error"] = json!("Input/output error");
        tracker.event(&event("BLOCK_JOB_COMPLETED", failed), now);
        tracker.event(&event("BLOCK_JOB_CANCELLED", done("c")), now);
        // Jobs that stay until they are dismissed tell their outcome in the poll.
        let jobs = json!([
            {"id": "d", "type": "create", "status": "concluded", "error": "No space"},
            {"id": "e", "type": "create", "status": "concluded", "error": "Operation canceled"},
            {"id": "f", "type": "create", "status": "concluded"},
        ]);
        tracker.poll(&jobs, &json!([]), &[], now);
        let outcomes: Vec<_> = tracker
            .jobs()
            .iter()
            .filter_map(|job| job.outcome.clone())
            .collect();
        assert_eq!(
            outcomes,
            [
                Outcome::Completed,
                Outcome::Failed("Input/output error".into()),
                Outcome::Cancelled,
                Outcome::Failed("No space".into()),
                Outcome::Cancelled,
                Outcome::Completed,
            ]
        );
        assert!(tracker.all_ended());
    }

    /// Would catch a failure that is forgotten when a job of the same name is started again, and
    /// one that is taken for success because only its abortion was told.
    #[test]
    fn failures_are_remembered() {
        let now = Instant::now();
        let mut tracker = Tracker::new(None, now);
        tracker.poll(&json!([]), &running("j", 1), &[], now);
        let aborting = json!({"id": "j", "status": "aborting"});
        tracker.event(&event("JOB_STATUS_CHANGE", aborting), now);
        tracker.poll(&json!([]), &json!([]), &[], now);
        assert_eq!(
            tracker.jobs()[0].outcome,
            Some(Outcome::Failed("aborted".into()))
        );
        tracker.poll(&json!([]), &running("j", 2), &[], now);
        assert_eq!(tracker.jobs()[0].outcome, None);
        assert!(tracker.any_failed() && !tracker.all_ended());
    }

    /// Would catch a job that ended between the two answers and is taken for a new one, or for
    /// one that told no outcome.
    #[test]
    fn end_between_the_answers() {
        let now = Instant::now();
        let mut tracker = Tracker::new(Some("j"), now);
        let data = json!({"device": "j", "type": "stream", "len": 100, "offset": 100,
                          "error": "No space left on device"});
        let events = [event("BLOCK_JOB_COMPLETED", data)];
        tracker.poll(&json!([]), &running("j", 99), &events, now);
        let failed = Some(Outcome::Failed("No space left on device".into()));
        assert_eq!(tracker.jobs()[0].outcome, failed);
        let mut tracker = Tracker::new(Some("j"), now);
        tracker.poll(&json!([]), &json!([]), &events, now);
        assert_eq!(tracker.jobs()[0].outcome, failed);
    }

    /// Would catch another client's job that ends the wait for ours.
    #[test]
    fn only_one_job() {
        let now = Instant::now();
        let mut tracker = Tracker::new(Some("mine"), now);
        assert!(!tracker.all_ended());
        tracker.event(
            &event("BLOCK_JOB_CANCELLED", json!({"device": "other"})),
            now,
        );
        tracker.poll(&json!([]), &running("mine", 1), &[], now);
        assert_eq!(tracker.jobs().len(), 1);
        assert!(!tracker.all_ended());
        tracker.poll(&json!([]), &json!([]), &[], now);
        assert!(tracker.all_ended());
    }
}
