//! The image engine, compiled from its own sources with the primitives of a model checker
//! ([`sync`]) in the place of the real ones.
//!
//! Nothing here is a model of the algorithms: claims, grace periods, the chain and the qcow2
//! engine are the very files that the daemon is made of. The checker runs all threads of a test on
//! one, and decides at every primitive who goes on. It knows sequential consistency only: what
//! depends on weaker memory ordering it does not see.

#[path = "../../../../src/chain/mod.rs"]
pub mod chain;
pub mod disk;
#[path = "../../../../src/error.rs"]
pub mod error;
#[path = "../../../../src/format/mod.rs"]
pub mod format;
#[path = "../../../../src/grace.rs"]
pub mod grace;
#[path = "../../../../src/planted.rs"]
pub mod planted;
#[path = "../../../../src/reactor/mod.rs"]
pub mod reactor;
// The exports, which look at more of it, are not here.
#[allow(dead_code)]
#[path = "../../../../src/shared_memory/mod.rs"]
pub mod shared_memory;
#[path = "../../../../src/storage/mod.rs"]
pub mod storage;
pub mod sync;

pub use shuttle;
