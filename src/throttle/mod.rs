//! Limits of rates.
//!
//! - [`pacing`]: the speed limit of jobs

pub mod pacing;
