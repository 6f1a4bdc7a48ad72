//! Back-ends compared round by round.
//!
//! The speed of a disk changes from minute to minute. The runs of a round follow one another, so
//! that their ratio says more than that of two medians; and many of them say how far to trust it.

use std::fmt;

/// With fewer rounds their spread says nothing.
const LEAST: usize = 6;

/// The ratio of one back-end's figure to another's, over the rounds.
#[derive(Clone, Copy, Debug)]
pub struct Ratio {
    /// The geometric mean.
    mean: f64,
    /// Its standard error.
    error: f64,
}

impl Ratio {
    /// That of `first` to `other`, figures of the same rounds. None if they are too few, if a
    /// round has one of the two alone, or if a figure is not above zero.
    pub fn new(first: &[f64], other: &[f64]) -> Option<Self> {
        if first.len() != other.len() || first.len() < LEAST {
            return None;
        }
        let logs: Vec<f64> = first
            .iter()
            .zip(other)
            .map(|(first, other)| (first / other).ln())
            .collect();
        let rounds = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / rounds;
        let squares: f64 = logs.iter().map(|log| (log - mean).powi(2)).sum();
        // The spread of the logarithms is that of the ratios to their mean.
        let error = (squares / (rounds - 1.0) / rounds).sqrt() * mean.exp();
        mean.is_finite().then_some(Ratio {
            mean: mean.exp(),
            error,
        })
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ± {:.2}", self.mean, self.error)
    }
}
