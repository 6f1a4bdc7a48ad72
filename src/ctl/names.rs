//! Names that are made from others.

use crate::options::is_well_formed_id;
use std::collections::HashSet;

/// A name like `stem` that is a well-formed one and none of `taken`; `before` is put before what is not
/// well-formed by itself.
pub fn free_name(stem: &str, before: &str, taken: &HashSet<String>) -> String {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let mut stem: String = stem.chars().filter(allowed).collect();
    if !is_well_formed_id(&stem) {
        stem.insert_str(0, before);
    }
    let mut names = (2..).map(|number: u32| format!("{stem}-{number}"));
    if !taken.contains(&stem) {
        return stem;
    }
    names.find(|name| !taken.contains(name)).unwrap_or(stem)
}
