//! `stratactl image` beside `qemu-img`: the same commands on the same inputs. What `qemu-img`
//! says of the results is the judge.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/bitmaps.rs"]
mod bitmaps;
mod compare;
mod create;
mod describe;
mod foreign;
mod rebase;
mod resize;
mod tools;
