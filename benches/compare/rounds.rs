//! The order of back-ends in the rounds of a row.

use crate::common::Res;
use crate::report::Report;
use crate::variants::Variant;

/// One round of a row: every back-end of `variants` in turn. From round to round both what comes
/// first and what comes after what change, in six rounds of three in every way: a run may leave
/// the disk, or its host, in a state that the next one finds. What a run gave goes to `take`.
pub fn in_turn<'a, S>(
    (row, round): (&str, usize),
    variants: impl Iterator<Item = &'a Variant>,
    report: &mut Report,
    take: impl Fn(&mut Report, &str, &'static str, S),
    mut run: impl FnMut(&Variant) -> Res<S>,
) {
    let mut variants: Vec<_> = variants.collect();
    if round % 2 == 1 {
        variants.reverse();
    }
    let first = round / 2 % variants.len().max(1);
    variants.rotate_left(first);
    for variant in variants {
        eprintln!("{row}: round {}, {}", round + 1, variant.name);
        match run(variant) {
            Ok(sample) => take(report, row, variant.name, sample),
            Err(error) => report.fail(row, variant.name, &error.to_string()),
        }
    }
}
