//! The table of the row about a neighbour that hangs.

use crate::pairs::Ratio;
use crate::samples::Disturbance;
use std::fmt::Write;

/// What a load gave.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests per second.
    pub iops: f64,
    /// Median latency in microseconds.
    pub p50: f64,
    /// 99th percentile of the latency in microseconds.
    pub p99: f64,
}

/// What one run gave.
#[derive(Clone, Copy, Debug)]
pub struct HungSample {
    /// Beside a disk that does nothing.
    pub alone: Figures,
    /// Beside a disk that hangs.
    pub beside: Figures,
    /// What disturbed it.
    pub other: Disturbance,
}

/// The table of all runs, each a row and a back-end.
pub fn table(samples: &[(String, &'static str, HungSample)], text: &mut String) {
    let _ = writeln!(
        text,
        "| row | back-end | rounds | 1000 IOPS alone | beside | p50 µs alone | beside | p99 µs alone | \
         beside | p99 beside to alone, round by round |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut known: Vec<(&str, &str)> = Vec::new();
    for (row, name, _) in samples {
        if known.contains(&(row.as_str(), name)) {
            continue;
        }
        known.push((row, name));
        let of = |get: fn(&HungSample) -> f64| -> Vec<f64> {
            let runs = samples.iter().filter(|(r, n, _)| r == row && n == name);
            runs.map(|(_, _, sample)| get(sample)).collect()
        };
        let (alone, beside) = (of(|s| s.alone.p99), of(|s| s.beside.p99));
        let ratio = Ratio::new(&beside, &alone);
        let _ = writeln!(
            text,
            "| {row} | {name} | {} | {:.1} | {:.1} | {:.0} | {:.0} | {:.0} | {:.0} | {} |",
            alone.len(),
            median(of(|s| s.alone.iops / 1000.0)),
            median(of(|s| s.beside.iops / 1000.0)),
            median(of(|s| s.alone.p50)),
            median(of(|s| s.beside.p50)),
            median(alone),
            median(beside),
            ratio.map_or("–".to_owned(), |ratio| ratio.to_string()),
        );
    }
    text.push('\n');
}

/// The one in the middle; of an even number, the mean of the two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let half = values.len() / 2;
    match values.len() % 2 {
        0 => (at(half.wrapping_sub(1)) + at(half)) / 2.0,
        _ => at(half),
    }
}
