//! Records: what they say, and how they stand in the log.

use super::super::words::Words;

/// Words before the entries of a mapping, and all words of other records.
pub(super) const HEAD: u64 = 2;
pub(super) const FIXED: u64 = 3;
/// The most that a record can count.
pub(super) const MOST: u64 = (1 << 24) - 1;

/// What kind of record it is, in its lowest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Mapping = 1,
    Refcounts = 2,
    L1 = 3,
    Block = 4,
}

impl Kind {
    fn of(word: u64) -> Option<Self> {
        [Self::Mapping, Self::Refcounts, Self::L1, Self::Block]
            .into_iter()
            .find(|kind| *kind as u64 == word & 0xff)
    }
}

/// A change of an image's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// L2 entries.
    Mapping {
        /// Guest cluster of the first one.
        first: u64,
        /// The entries.
        entries: Vec<Words>,
    },
    /// Refcounts.
    Refcounts {
        /// The first host cluster.
        first: u64,
        /// How many.
        count: u64,
        /// What each of them has.
        value: u64,
    },
    /// An entry of the L1 table.
    L1 {
        /// Its index.
        index: u64,
        /// The entry.
        value: u64,
    },
    /// A new refcount block, all of whose refcounts are 0.
    Block {
        /// Index in the refcount table.
        index: u64,
        /// Where the block is.
        offset: u64,
    },
}

/// The first word of a record without its checksum.
pub(super) fn first_word(kind: Kind, count: u64) -> u64 {
    kind as u64 | count << 8
}

/// The state of a checksum after one more word.
#[inline]
pub(super) fn mix(state: u64, word: u64) -> u64 {
    (state ^ word)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
}

/// A checksum, in the upper half of a word.
#[inline]
pub(super) fn finish(state: u64) -> u64 {
    mix(state, 0) & !0xffff_ffff
}

/// The words of records that begin at `position`: what a log holds of them.
#[must_use]
pub fn encode(records: &[Record], position: u64, seed: u64, extended: bool) -> Vec<u64> {
    let mut words = Vec::new();
    for record in records {
        let (kind, count, body) = match record {
            Record::Mapping { first, entries } => {
                let mut body = vec![*first];
                for entry in entries {
                    body.push(entry.descriptor);
                    body.extend(extended.then_some(entry.bitmap));
                }
                (Kind::Mapping, entries.len() as u64, body)
            }
            Record::Refcounts {
                first,
                count,
                value,
            } => (Kind::Refcounts, *count, vec![*first, *value]),
            Record::L1 { index, value } => (Kind::L1, 1, vec![*index, *value]),
            Record::Block { index, offset } => (Kind::Block, 1, vec![*index, *offset]),
        };
        let first = first_word(kind, count);
        let begin = mix(mix(seed, position + words.len() as u64), first);
        words.push(first | finish(body.iter().copied().fold(begin, mix)));
        words.extend(body);
    }
    words
}

/// Takes the records apart that fill `words`, which begin at `position`. `extended`: entries have
/// two words.
///
/// # Errors
/// Says where something stands that is no record.
pub fn parse(
    words: &[u64],
    position: u64,
    seed: u64,
    extended: bool,
) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some(rest) = words.get(at..)
        && !rest.is_empty()
    {
        let position = position + at as u64;
        let (record, len) = parse_one(rest, position, seed, extended)
            .ok_or_else(|| format!("there is no whole record at word {position}"))?;
        records.push(record);
        at += len;
    }
    Ok(records)
}

fn parse_one(words: &[u64], position: u64, seed: u64, extended: bool) -> Option<(Record, usize)> {
    let &first = words.first()?;
    let kind = Kind::of(first)?;
    let count = first >> 8 & MOST;
    let width = if extended { 2 } else { 1 };
    let len = match kind {
        Kind::Mapping => HEAD + count * width,
        _ => FIXED,
    } as usize;
    let words = words.get(..len)?;
    let body = words.get(1..)?;
    let begin = mix(mix(seed, position), first & 0xffff_ffff);
    if finish(body.iter().copied().fold(begin, mix)) != first & !0xffff_ffff {
        return None;
    }
    let (&one, &two) = (body.first()?, body.get(1).unwrap_or(&0));
    let record = match kind {
        Kind::Mapping => Record::Mapping {
            first: one,
            entries: entries(body.get(1..)?, extended),
        },
        Kind::Refcounts => Record::Refcounts {
            first: one,
            count,
            value: two,
        },
        Kind::L1 => Record::L1 {
            index: one,
            value: two,
        },
        Kind::Block => Record::Block {
            index: one,
            offset: two,
        },
    };
    Some((record, len))
}

fn entries(words: &[u64], extended: bool) -> Vec<Words> {
    words
        .chunks(if extended { 2 } else { 1 })
        .map(|entry| Words {
            descriptor: entry.first().copied().unwrap_or_default(),
            bitmap: entry.get(1).copied().unwrap_or_default(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    //! What would be caught: a record that reads as another one, one that is taken for whole when a
    //! bit of it is wrong, when it is one of an earlier time in the same place, or another journal's.

    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        let words =
            any::<(u64, u64)>().prop_map(|(descriptor, bitmap)| Words { descriptor, bitmap });
        prop_oneof![
            (any::<u64>(), prop::collection::vec(words, 1..5))
                .prop_map(|(first, entries)| Record::Mapping { first, entries }),
            (any::<u64>(), 1..=MOST, any::<u64>()).prop_map(|(first, count, value)| {
                Record::Refcounts {
                    first,
                    count,
                    value,
                }
            }),
            any::<(u64, u64)>().prop_map(|(index, value)| Record::L1 { index, value }),
            any::<(u64, u64)>().prop_map(|(index, offset)| Record::Block { index, offset }),
        ]
    }

    proptest! {
        #[test]
        fn records_read_as_they_were_written(
            mut records in prop::collection::vec(record(), 1..6), position: u32, seed: u64,
            extended: bool, flip: prop::sample::Index, bit in 0u32..64,
        ) {
            if !extended {
                for record in &mut records {
                    if let Record::Mapping { entries, .. } = record {
                        entries.iter_mut().for_each(|entry| entry.bitmap = 0);
                    }
                }
            }
            let position = u64::from(position);
            let mut words = encode(&records, position, seed, extended);
            prop_assert_eq!(parse(&words, position, seed, extended), Ok(records));
            prop_assert!(parse(&words, position + 32768, seed, extended).is_err());
            prop_assert!(parse(&words, position, seed ^ 1, extended).is_err());
            let at = flip.index(words.len());
            words[at] ^= 1 << bit;
            prop_assert!(parse(&words, position, seed, extended).is_err());
        }
    }
}
