//! The `stratactl` program.

fn main() {}
