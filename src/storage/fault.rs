//! Storage as the kernel may be at any time: transfers that are short, operations that are
//! interrupted or to be tried again. A seed decides which, so that tests can repeat it.

use std::io;

/// Decides what becomes of each operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uneven {
    state: u64,
}

impl Uneven {
    /// The decisions that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed ^ 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// A number below `end`, which is above 0 (splitmix64).
    fn below(&mut self, end: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    /// Whether an operation that moves nothing is carried out.
    ///
    /// # Errors
    /// EINTR or EAGAIN, one time in eight: nothing is done then.
    pub fn admit(&mut self) -> io::Result<()> {
        match self.below(16) {
            0 => Err(io::Error::from_raw_os_error(libc::EINTR)),
            1 => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            _ => Ok(()),
        }
    }

    /// How many bytes of a transfer of `len` are moved: at least one block of `block` bytes, and
    /// whole blocks unless it is all of them.
    ///
    /// # Errors
    /// As for [`Uneven::admit`].
    pub fn transfer(&mut self, len: usize, block: u64) -> io::Result<usize> {
        self.admit()?;
        let blocks = len as u64 / block.max(1);
        if blocks < 2 || self.below(2) == 0 {
            return Ok(len);
        }
        Ok(((1 + self.below(blocks - 1)) * block.max(1)) as usize)
    }
}
