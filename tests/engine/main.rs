//! The image engine against real images: `qemu-img` makes them and judges them.

mod model;
mod powercut;
mod random;
mod support;
