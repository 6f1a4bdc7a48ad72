//! The table: medians over the rounds, and ratios of them.

use crate::hung_table::{self, HungSample};
use crate::pairs::Ratio;
use crate::samples::{Disturbance, Floor, IoSample, StartSample, StreamSample, TurnSample};
use crate::variants::Variant;
use std::fmt::Write;

/// Everything that was measured.
pub struct Report {
    machine: Vec<String>,
    io: Vec<(String, &'static str, IoSample)>,
    floors: Vec<(String, &'static str, Floor)>,
    turns: Vec<(String, &'static str, TurnSample)>,
    stream: Vec<(String, &'static str, StreamSample)>,
    start: Vec<(String, &'static str, StartSample)>,
    copies: Vec<(String, &'static str, f64)>,
    hung: Vec<(String, &'static str, HungSample)>,
    failures: Vec<String>,
}

impl Report {
    /// An empty report.
    pub fn new(machine: Vec<String>) -> Self {
        Report {
            machine,
            io: Vec::new(),
            floors: Vec::new(),
            turns: Vec::new(),
            stream: Vec::new(),
            start: Vec::new(),
            copies: Vec::new(),
            hung: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Takes a line that says what was measured on.
    pub fn note(&mut self, line: String) {
        eprintln!("{line}");
        self.machine.push(line);
    }

    /// Takes a run of an I/O row.
    pub fn add_io(&mut self, row: &str, variant: &'static str, sample: IoSample) {
        eprintln!("    {sample:.1?}");
        self.io.push((row.to_owned(), variant, sample));
    }

    /// Takes a turn of the daemon, and what it was on.
    pub fn add_turn(&mut self, row: &str, what: &'static str, sample: TurnSample) {
        eprintln!(
            "    {what}: {:.2} {:.2}",
            sample.iops_to_first, sample.cpu_to_first
        );
        self.turns.push((row.to_owned(), what, sample));
    }

    /// Takes the floor of an I/O row.
    pub fn add_floor(&mut self, row: &str, floor: Floor) {
        eprintln!("    {floor:.1?}");
        self.floors.push((row.to_owned(), FLOOR, floor));
    }

    /// Takes a run of a stream row.
    pub fn add_stream(&mut self, row: &str, variant: &'static str, sample: StreamSample) {
        eprintln!("    {sample:.1?}");
        self.stream.push((row.to_owned(), variant, sample));
    }

    /// Takes a run of a start row.
    pub fn add_start(&mut self, row: &str, variant: &'static str, sample: StartSample) {
        eprintln!("    {sample:.1?}");
        self.start.push((row.to_owned(), variant, sample));
    }

    /// Takes a run beside a disk that hangs.
    pub fn add_hung(&mut self, row: &str, variant: &'static str, sample: HungSample) {
        eprintln!("    {sample:.1?}");
        self.hung.push((row.to_owned(), variant, sample));
    }

    /// Takes the seconds of a plain copy of what a stream row copies.
    pub fn add_copy(&mut self, row: &str, seconds: f64) {
        self.copies.push((row.to_owned(), FLOOR, seconds));
    }

    /// Takes note of a run that failed.
    pub fn fail(&mut self, row: &str, variant: &str, error: &str) {
        eprintln!("    failed: {error}");
        self.failures.push(format!("{row}, {variant}: {error}"));
    }

    /// True if any run failed.
    pub fn failed(&self) -> bool {
        !self.failures.is_empty()
    }

    /// What disturbed the runs.
    fn disturbances(&self, text: &mut String) {
        let mut other: Vec<Disturbance> = self.io.iter().map(|s| s.2.other).collect();
        other.extend(self.turns.iter().map(|s| s.2.io.other));
        other.extend(self.stream.iter().map(|s| s.2.other));
        other.extend(self.hung.iter().map(|s| s.2.other));
        let mut line = |what: &str, get: fn(&Disturbance) -> f64| {
            let mean = other.iter().map(get).sum::<f64>() / other.len().max(1) as f64;
            let most = other.iter().map(get).fold(0.0, f64::max);
            let _ = writeln!(
                text,
                "- CPUs {what} during the runs: {mean:.2} on average, {most:.2} at most"
            );
        };
        line("kept busy by other programs", |o| o.programs);
        line("taken away by the host", |o| o.host);
    }

    /// The whole report.
    pub fn markdown(&self, variants: &[Variant]) -> String {
        let names: Vec<&'static str> = variants.iter().map(|v| v.name).collect();
        let mut text = String::new();
        for line in &self.machine {
            let _ = writeln!(text, "- {line}");
        }
        self.disturbances(&mut text);
        let _ = writeln!(
            text,
            "\nEach cell: {}. Ratios: {RATIO}.\n",
            names.join(" / ")
        );
        if !self.io.is_empty() {
            self.io_table(&mut text, &names);
            self.pair_table(&mut text, &names);
        }
        if !self.turns.is_empty() {
            self.turn_table(&mut text);
        }
        if !self.stream.is_empty() {
            self.stream_table(&mut text, &names);
        }
        if !self.hung.is_empty() {
            hung_table::table(&self.hung, &mut text);
        }
        if !self.start.is_empty() {
            self.start_table(&mut text, &names);
        }
        for variant in variants.iter().filter(|variant| variant.died.get() > 0) {
            let _ = writeln!(
                text,
                "{}: {} of its processes died of a signal when asked to end, after they had been \
                 measured.\n",
                variant.name,
                variant.died.get()
            );
        }
        if self.failed() {
            let _ = writeln!(text, "Failed runs:\n");
            for failure in &self.failures {
                let _ = writeln!(text, "- {}", failure.replace('\n', " "));
            }
        }
        text
    }

    fn io_table(&self, text: &mut String, names: &[&'static str]) {
        let _ = writeln!(
            text,
            "| row | 1000 IOPS | ratio | p50 µs | p99 µs | ratio | CPU s per million | ratio | \
             KiB written each | floor: 1000 IOPS | ratio | CPU s per million | ratio |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        for row in rows(&self.io) {
            let of = |get: fn(&IoSample) -> f64| medians(&self.io, row, names, get);
            let (iops, p50) = (of(|s| s.iops / 1000.0), of(|s| s.p50));
            let (p99, cpu) = (of(|s| s.p99), of(|s| s.cpu));
            let written = of(|s| s.written);
            let best = better(&iops, true);
            let floor = |get: fn(&Floor) -> f64| medians(&self.floors, row, &[FLOOR], get)[0];
            let (floor_iops, floor_cpu) = (floor(|f| f.iops / 1000.0), floor(|f| f.cpu));
            let to = |values: &[Option<f64>], floor| ratio(&[values[0], floor], Some(1));
            let _ = writeln!(
                text,
                "| {row} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                cells(&iops, 1),
                ratio(&iops, best),
                cells(&p50, 0),
                cells(&p99, 0),
                ratio(&p99, best),
                cells(&cpu, 2),
                ratio(&cpu, best),
                cells(&written, 1),
                cells(&[floor_iops], 1),
                to(&iops, floor_iops),
                cells(&[floor_cpu], 2),
                to(&cpu, floor_cpu),
            );
        }
        text.push('\n');
    }

    /// The first back-end beside each of the others, where there are rounds enough.
    fn pair_table(&self, text: &mut String, names: &[&'static str]) {
        let Some((first, others)) = names.split_first() else {
            return;
        };
        let mut lines = String::new();
        for row in rows(&self.io) {
            let cells: Vec<Option<String>> = others
                .iter()
                .map(|other| self.pair(row, first, other))
                .collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let cells = cells
                .into_iter()
                .map(|cell| cell.unwrap_or_else(|| "–".into()));
            let _ = writeln!(
                lines,
                "| {row} | {} |",
                cells.collect::<Vec<_>>().join(" | ")
            );
        }
        if !lines.is_empty() {
            let _ = writeln!(
                text,
                "Round by round, {first} to each of the others: the geometric means of the ratios, \
                 and their standard errors, of IOPS / CPU per request / p99.\n\n\
                 | row | {} |\n|{}\n{lines}",
                others.join(" | "),
                " --- |".repeat(1 + others.len())
            );
        }
    }

    /// What is said of one row and two back-ends, round by round.
    fn pair(&self, row: &str, first: &str, other: &str) -> Option<String> {
        let ratio = |get: fn(&IoSample) -> f64| {
            let of = |name| values(&self.io, row, name, get);
            Ratio::new(&of(first), &of(other))
        };
        let (iops, cpu, p99) = (ratio(|s| s.iops)?, ratio(|s| s.cpu)?, ratio(|s| s.p99)?);
        Some(format!("{iops} / {cpu} / {p99}"))
    }

    fn turn_table(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "| row | stratablk on | 1000 IOPS | to raw | CPU s per million | to raw |\n\
             | --- | --- | --- | --- | --- | --- |"
        );
        for row in rows(&self.turns) {
            let turns = self.turns.iter().filter(|turn| turn.0 == row);
            for name in distinct(turns.map(|turn| turn.1)) {
                let of = |get: fn(&TurnSample) -> f64| medians(&self.turns, row, &[name], get);
                let _ = writeln!(
                    text,
                    "| {row} | {name} | {} | {} | {} | {} |",
                    cells(&of(|s| s.io.iops / 1000.0), 1),
                    cells(&of(|s| s.iops_to_first), 2),
                    cells(&of(|s| s.io.cpu), 2),
                    cells(&of(|s| s.cpu_to_first), 2),
                );
            }
        }
        text.push('\n');
    }

    fn start_table(&self, text: &mut String, names: &[&'static str]) {
        let _ = writeln!(
            text,
            "| row | ready after ms | again after a kill ms | of which fence ms | MiB resident | \
             wake-ups per second, idle | CPU s per million at 1000 IOPS | ratio |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        for row in rows(&self.start) {
            let of = |get: fn(&StartSample) -> f64| medians(&self.start, row, names, get);
            let cpu = of(|s| s.cpu);
            let best = better(&cpu, false);
            let _ = writeln!(
                text,
                "| {row} | {} | {} | {} | {} | {} | {} | {} |",
                cells(&of(|s| s.ready), 1),
                cells(&of(|s| s.again), 1),
                cells(&of(|s| s.fence), 0),
                cells(&of(|s| s.resident), 1),
                cells(&of(|s| s.wakeups), 1),
                cells(&cpu, 0),
                ratio(&cpu, best),
            );
        }
        text.push('\n');
    }

    fn stream_table(&self, text: &mut String, names: &[&'static str]) {
        let _ = writeln!(
            text,
            "| row | seconds | ratio | plain copy s | ratio | CPU s | guest 1000 IOPS before | \
             guest 1000 IOPS during | guest p99 µs before | guest p99 µs during | ratio |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        for row in rows(&self.stream) {
            let of = |get: fn(&StreamSample) -> f64| medians(&self.stream, row, names, get);
            let (seconds, p99) = (of(|s| s.seconds), of(|s| s.p99));
            let best = better(&seconds, false);
            let copy = medians(&self.copies, row, &[FLOOR], |seconds| *seconds)[0];
            let _ = writeln!(
                text,
                "| {row} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                cells(&seconds, 2),
                ratio(&seconds, best),
                cells(&[copy], 2),
                ratio(&[seconds[0], copy], Some(1)),
                cells(&of(|s| s.cpu), 2),
                cells(&of(|s| s.iops_before / 1000.0), 1),
                cells(&of(|s| s.iops / 1000.0), 1),
                cells(&of(|s| s.p99_before), 0),
                cells(&p99, 0),
                ratio(&p99, best),
            );
        }
        text.push('\n');
    }
}

const RATIO: &str = "the first to the better of the others (in IOPS, or in seconds for a stream)";

/// What stands for a back-end's name where there is none.
const FLOOR: &str = "floor";

/// The names of the rows, in the order in which they were measured.
fn rows<'a, S>(samples: &'a [(String, &'static str, S)]) -> Vec<&'a str> {
    distinct(samples.iter().map(|(row, _, _)| row.as_str()))
}

/// Each of `names` once, in the order in which they come first.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut known = Vec::new();
    for name in names {
        if !known.contains(&name) {
            known.push(name);
        }
    }
    known
}

/// One figure of a back-end, of each round.
fn values<S>(
    samples: &[(String, &'static str, S)],
    row: &str,
    name: &str,
    get: fn(&S) -> f64,
) -> Vec<f64> {
    let of_row = samples.iter().filter(|(r, v, _)| r == row && *v == name);
    of_row.map(|s| get(&s.2)).collect()
}

/// The median over the rounds of one figure, for each back-end.
fn medians<S>(
    samples: &[(String, &'static str, S)],
    row: &str,
    names: &[&str],
    get: fn(&S) -> f64,
) -> Vec<Option<f64>> {
    let of = |name: &&str| {
        let mut values = values(samples, row, name, get);
        values.sort_by(f64::total_cmp);
        match (values.len() % 2, values.len() / 2) {
            (_, 0) => values.first().copied(),
            (1, middle) => values.get(middle).copied(),
            (_, middle) => Some((values.get(middle - 1)? + values.get(middle)?) / 2.0),
        }
    };
    names.iter().map(of).collect()
}

/// Which of the back-ends behind the first did better.
fn better(values: &[Option<f64>], more_is_better: bool) -> Option<usize> {
    let sign = if more_is_better { 1.0 } else { -1.0 };
    let others = values
        .iter()
        .enumerate()
        .skip(1)
        .filter_map(|(i, v)| v.map(|v| (i, v * sign)));
    others.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

fn ratio(values: &[Option<f64>], best: Option<usize>) -> String {
    let first = values.first().copied().flatten();
    let other = best
        .and_then(|i| values.get(i).copied().flatten())
        .filter(|v| *v > 0.0);
    first
        .zip(other)
        .map_or("–".to_owned(), |(a, b)| format!("{:.2}", a / b))
}

fn cells(values: &[Option<f64>], digits: usize) -> String {
    let cell = |v: &Option<f64>| {
        let known = v.filter(|v| !v.is_nan());
        known.map_or("–".to_owned(), |v| format!("{v:.digits$}"))
    };
    // Back-ends that a row does not have are the last ones.
    let known = values
        .iter()
        .rposition(Option::is_some)
        .map_or(1, |i| i + 1);
    let cells: Vec<_> = values.iter().take(known).map(cell).collect();
    cells.join(" / ")
}
