//! A number for each host cluster: how often it is referred to, or its refcount.
//!
//! Only parts of the file in which there is anything take memory, at two bytes a cluster: a
//! sparse file of any length costs nothing. The few numbers that do not fit stand apart.

use std::collections::{BTreeMap, HashMap};

/// Clusters that are kept together.
pub const CHUNK: u64 = 4096;
/// The number stands in `large`.
const LARGE: u16 = u16::MAX;

/// Numbers of clusters; those never set are 0.
#[derive(Debug, Default)]
pub struct Counts {
    chunks: BTreeMap<u64, Box<[u16]>>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// The number of `cluster`.
    #[must_use]
    pub fn get(&self, cluster: u64) -> u64 {
        let small = self
            .chunks
            .get(&(cluster / CHUNK))
            .and_then(|chunk| chunk.get((cluster % CHUNK) as usize))
            .copied()
            .unwrap_or_default();
        if small == LARGE {
            return self.large.get(&cluster).copied().unwrap_or_default();
        }
        small.into()
    }

    /// Sets the number of `cluster`.
    pub fn set(&mut self, cluster: u64, value: u64) {
        let chunk = self
            .chunks
            .entry(cluster / CHUNK)
            .or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
        let Some(place) = chunk.get_mut((cluster % CHUNK) as usize) else {
            return;
        };
        match u16::try_from(value) {
            Ok(small) if small != LARGE => {
                if *place == LARGE {
                    self.large.remove(&cluster);
                }
                *place = small;
            }
            _ => {
                *place = LARGE;
                self.large.insert(cluster, value);
            }
        }
    }

    /// Adds to the number of `cluster`.
    pub fn add(&mut self, cluster: u64, by: u64) {
        self.set(cluster, self.get(cluster).saturating_add(by));
    }

    /// Takes from the number of `cluster`.
    pub fn subtract(&mut self, cluster: u64, by: u64) {
        self.set(cluster, self.get(cluster).saturating_sub(by));
    }

    /// The first cluster from `from` on that is in a part where there is anything.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        let (&number, _) = self.chunks.range(from / CHUNK..).next()?;
        Some(from.max(number * CHUNK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch numbers that are cut off, or stand in for others, and clusters passed over.
    #[test]
    fn small_and_large_numbers() {
        let mut counts = Counts::default();
        for (cluster, value) in [(7, 65534), (8, 65535), (1 << 50, 1 << 40), (9, 3)] {
            counts.set(cluster, value);
            assert_eq!(counts.get(cluster), value);
        }
        counts.add(7, 1);
        counts.subtract(8, 1);
        assert_eq!(
            (counts.get(7), counts.get(8), counts.get(9)),
            (65535, 65534, 3)
        );
        counts.add(1 << 50, u64::MAX);
        assert_eq!(counts.get(1 << 50), u64::MAX);
        assert_eq!(counts.get(6), 0);
        assert_eq!(counts.next(8), Some(8));
        assert_eq!(counts.next(CHUNK), Some(1 << 50));
        assert_eq!(counts.next((1 << 50) + CHUNK), None);
    }
}
