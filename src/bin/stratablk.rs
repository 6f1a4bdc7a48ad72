//! The `stratablk` program.

fn main() {}
