//! Tables for people.

use super::Failure;
use std::io::Write;

/// Columns as wide as their widest cell; the first row is their heads.
pub fn write_table<const N: usize>(
    rows: &[[String; N]],
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
