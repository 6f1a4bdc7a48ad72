//! Showing jobs until they end.
//!
//! Progress comes from polls, the end from events; between polls the wait is for events, so that
//! an end is seen at once. On a terminal each job has a bar; elsewhere a line is written when a
//! job's state changes, and once a second while it gets on.

use super::Failure;
use super::client::{Client, ClientError, Event};
use super::jobs;
use super::tracker::{Job, Tracker};
use super::units;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Time between polls while bars are drawn.
const BAR_INTERVAL: Duration = Duration::from_millis(250);
/// Time between polls, and between lines about one job's progress.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the jobs until all have ended; with `complete` one that is ready is completed. An end other
/// than completion is a [`Failure::Job`].
pub fn watch(
    client: &mut Client,
    mut tracker: Tracker,
    complete: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut display: Box<dyn Display> = if json {
        Box::new(Lines::new(true))
    } else if std::io::stdout().is_terminal() {
        Box::new(Bars::new())
    } else {
        Box::new(Lines::new(false))
    };
    let mut completed = HashSet::new();
    loop {
        let (jobs, block_jobs) = jobs::query(client)?;
        let events = client.queued_events();
        for text in events.iter().filter_map(error_text) {
            display.note(&text, out)?;
        }
        tracker.poll(&jobs, &block_jobs, &events, Instant::now());
        display.show(tracker.jobs(), out)?;
        if tracker.all_ended() {
            break;
        }
        for job in tracker
            .jobs()
            .iter()
            .filter(|job| complete && job.is_ready())
        {
            if completed.insert(job.id.clone())
                && let Err(error) = client.execute("job-complete", json!({"id": job.id}))
                && !matches!(error, ClientError::Answer(_))
            {
                return Err(error.into());
            }
            // What the daemon refuses, another client has asked for, or the job has just failed: the
            // events tell how it ends.
        }
        take_events(
            client,
            &mut tracker,
            display.interval(),
            display.as_mut(),
            out,
        )?;
        display.show(tracker.jobs(), out)?;
        if tracker.all_ended() {
            break;
        }
    }
    if tracker.jobs().is_empty() && !json {
        writeln!(out, "No active jobs")?;
    }
    if tracker.any_failed() {
        Err(Failure::Job)
    } else {
        Ok(())
    }
}

/// Takes in events for the length of `time`, or until nothing is left to wait for.
fn take_events(
    client: &mut Client,
    tracker: &mut Tracker,
    time: Duration,
    display: &mut dyn Display,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Some(event) = client.next_event(left)? else {
            return Ok(());
        };
        tracker.event(&event, Instant::now());
        if let Some(text) = error_text(&event) {
            display.note(&text, out)?;
        }
        if tracker.all_ended() || event.name == "BLOCK_JOB_READY" {
            return Ok(());
        }
    }
}

/// What to tell of an error that a job met.
fn error_text(event: &Event) -> Option<String> {
    if event.name != "BLOCK_JOB_ERROR" {
        return None;
    }
    let text = |key: &str| {
        event
            .data
            .get(key)
            .and_then(|value| value.as_str())
            .unwrap_or("?")
    };
    let (device, operation, action) = (text("device"), text("operation"), text("action"));
    Some(format!("{device}: {operation} error, action: {action}"))
}

trait Display {
    fn interval(&self) -> Duration;
    fn show(&mut self, jobs: &[Job], out: &mut dyn Write) -> Result<(), Failure>;
    fn note(&mut self, text: &str, out: &mut dyn Write) -> Result<(), Failure>;
}

/// Lines for files and pipes.
struct Lines {
    json: bool,
    shown: HashMap<String, Shown>,
}

/// What was last said about a job.
struct Shown {
    at: Instant,
    offset: u64,
    state: String,
    ended: bool,
}

impl Lines {
    fn new(json: bool) -> Self {
        Self {
            json,
            shown: HashMap::new(),
        }
    }

    /// Whether there is something new to say about the job.
    fn is_news(&self, job: &Job, now: Instant) -> bool {
        match self.shown.get(&job.id) {
            None => true,
            // A job that has ended says no more, until another of its name begins.
            Some(shown) if shown.ended => job.outcome.is_none(),
            Some(shown) if job.outcome.is_some() || shown.state != job.state() => {
                // The states on the way to the end are told by the end.
                job.outcome.is_some() || !matches!(job.status.as_str(), "waiting" | "aborting")
            }
            Some(shown) => {
                job.offset != shown.offset
                    && now.saturating_duration_since(shown.at) >= LINE_INTERVAL
            }
        }
    }
}

impl Display for Lines {
    fn interval(&self) -> Duration {
        LINE_INTERVAL
    }

    fn show(&mut self, jobs: &[Job], out: &mut dyn Write) -> Result<(), Failure> {
        let now = Instant::now();
        for job in jobs {
            if !self.is_news(job, now) {
                continue;
            }
            let shown = Shown {
                at: now,
                offset: job.offset,
                state: job.state(),
                ended: job.outcome.is_some(),
            };
            self.shown.insert(job.id.clone(), shown);
            if self.json {
                writeln!(out, "{}", job.to_json())?;
            } else if job.outcome.is_some() {
                writeln!(out, "{}", job.outcome_text())?;
            } else {
                writeln!(out, "{}: {}", job.id, progress(job))?;
            }
        }
        Ok(out.flush()?)
    }

    fn note(&mut self, text: &str, out: &mut dyn Write) -> Result<(), Failure> {
        if !self.json {
            writeln!(out, "{text}")?;
        }
        Ok(())
    }
}

/// `running 12.5% 128.0 MiB of 1.0 GiB to copy, at 3.0 GiB of 8.0 GiB, 20.0 MiB/s, 0:44 left`.
fn progress(job: &Job) -> String {
    let at = format!("{} of {}", units::bytes(job.offset), units::bytes(job.len));
    let mut text = match job.data {
        None => format!("{} {} {at}", job.state(), job.percent()),
        Some(data) => {
            let (percent, more) = match data.is_final {
                true => (format!(" {}", job.percent()), ""),
                false => (String::new(), "at least "),
            };
            format!(
                "{}{percent} {} of {more}{} to copy, at {at}",
                job.state(),
                units::bytes(data.copied),
                units::bytes(data.to_copy)
            )
        }
    };
    let speed = speed(job);
    if !speed.is_empty() {
        text.push_str(", ");
        text.push_str(&speed);
    }
    text
}

/// The rate and the time left, where they mean something.
fn speed(job: &Job) -> String {
    if job.status == "pending" {
        return format!("'finalize {}' makes it effective", job.id);
    }
    if job.status == "paused" {
        return format!("'resume {}' lets it go on", job.id);
    }
    let mut text = String::new();
    if job.rate() > 0 {
        text = format!("{}/s", units::bytes(job.rate()));
        if let Some(left) = job.time_left() {
            text.push_str(&format!(", {} left", units::clock(left)));
        }
    }
    text
}

/// Bars for terminals.
struct Bars {
    all: MultiProgress,
    bars: HashMap<String, ProgressBar>,
    told: HashSet<String>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        Self {
            all,
            bars: HashMap::new(),
            told: HashSet::new(),
        }
    }

    /// Puts the job's end, once, in the place of its bar.
    fn end(&mut self, job: &Job) -> Result<(), Failure> {
        if let Some(bar) = self.bars.remove(&job.id) {
            bar.finish_and_clear();
            self.all.remove(&bar);
        }
        if self.told.insert(job.id.clone()) {
            self.say(&job.outcome_text())?;
        }
        Ok(())
    }

    /// Writes a line that stays, above the bars. The bars' own way to do it writes nothing where
    /// no bar can be drawn.
    fn say(&self, text: &str) -> Result<(), Failure> {
        Ok(self.all.suspend(|| writeln!(std::io::stdout(), "{text}"))?)
    }

    fn bar(&mut self, job: &Job) -> ProgressBar {
        let all = &self.all;
        self.bars
            .entry(job.id.clone())
            .or_insert_with(|| {
                let bar = ProgressBar::new(job.len).with_style(style());
                all.add(bar.with_prefix(job.id.clone()))
            })
            .clone()
    }
}

fn style() -> ProgressStyle {
    let bar = ProgressStyle::default_bar();
    // The template is fixed: a mistake in it would show the default bar, not end the program.
    ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}")
        .map(|style| style.progress_chars("=> "))
        .unwrap_or(bar)
}

impl Display for Bars {
    fn interval(&self) -> Duration {
        BAR_INTERVAL
    }

    fn show(&mut self, jobs: &[Job], _out: &mut dyn Write) -> Result<(), Failure> {
        for job in jobs {
            if job.outcome.is_some() {
                self.end(job)?;
                continue;
            }
            self.told.remove(&job.id);
            let bar = self.bar(job);
            // Every setting is drawn: those that seldom change are left alone.
            let (done, of) = match job.data {
                Some(data) if data.to_copy > 0 => (data.copied, data.to_copy),
                _ => (job.offset, job.len),
            };
            if bar.length() != Some(of) {
                bar.set_length(of);
            }
            bar.set_position(done);
            bar.set_message(progress(job));
        }
        Ok(())
    }

    fn note(&mut self, text: &str, _out: &mut dyn Write) -> Result<(), Failure> {
        self.say(text)
    }
}
