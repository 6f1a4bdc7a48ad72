//! The way down while an image is opened: what has been opened, to find loops.
//!
//! An image may be laid out in a part of a file, and its backing file in another part of the same
//! one. So a chain is a loop where two of its images have bytes in common, not where they have a
//! file in common.

use std::fs::Metadata;
use std::path::Path;

use super::driver::{self, Extent, WHOLE};
use super::{Node, State};
use crate::error::{Error, Result};
use crate::options::{BlockRef, BlockdevOptions};
use crate::storage::identity::number;

/// Layers that a chain may have.
const MAX_DEPTH: usize = 200;

/// What has been opened on the way down.
pub(super) struct Descent {
    /// The parts of files that are in use.
    used: Vec<((u64, u64), Extent)>,
    /// The part of the next file that is wanted.
    pub(super) wanted: Extent,
    depth: usize,
    /// The place of the uppermost node in the list of those that are opened together.
    pub(super) place: usize,
}

impl Descent {
    pub fn new(place: usize) -> Self {
        Self {
            used: Vec::new(),
            wanted: WHOLE,
            depth: 0,
            place,
        }
    }

    /// Goes on to the backing file that the header of `image` names.
    ///
    /// # Errors
    /// When it would be one layer too many.
    pub fn step_down(&mut self, image: &Path) -> Result<()> {
        self.depth += 1;
        self.wanted = WHOLE;
        if self.depth >= MAX_DEPTH {
            return Err(Error::Invalid(format!(
                "{}: the chain has more than {MAX_DEPTH} layers",
                image.display()
            )));
        }
        Ok(())
    }

    /// How many parts of files are in use.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// Lets go of those that were taken into use after the first `count`.
    pub fn keep(&mut self, count: usize) {
        self.used.truncate(count);
    }

    /// Takes the wanted part of a file into use.
    ///
    /// # Errors
    /// When something of it is in use already.
    pub fn enter(&mut self, path: &Path, file: &Metadata) -> Result<()> {
        let (key, wanted) = (number(file), self.wanted.clone());
        let rival = self
            .used
            .iter()
            .find(|(of, used)| *of == key && meet(used, &wanted));
        if let Some((_, used)) = rival {
            return Err(is_loop(path, used, &wanted));
        }
        self.used.push((key, wanted));
        Ok(())
    }
}

fn meet(one: &Extent, other: &Extent) -> bool {
    one.start < other.end && other.start < one.end
}

fn is_loop(path: &Path, used: &Extent, wanted: &Extent) -> Error {
    let parts = match (used == &WHOLE, wanted == &WHOLE) {
        (true, true) => String::new(),
        _ => format!(" ({} and {} overlap)", told(used), told(wanted)),
    };
    Error::Invalid(format!(
        "{}: the image is under itself: the chain is a loop{parts}",
        path.display()
    ))
}

fn told(extent: &Extent) -> String {
    match extent.end {
        u64::MAX => format!("all from byte {} on", extent.start),
        end => format!("bytes {} to {end}", extent.start),
    }
}

/// What an image that is described in place is in: the file's own options, which part of it, and
/// where that is said. `None`: the file is no part of the description.
fn file_of(options: &mut BlockdevOptions) -> Option<(&mut BlockRef, Extent)> {
    let mut extent = WHOLE;
    let mut node = options;
    loop {
        extent = driver::of(&node.driver).behind(&extent);
        let below = node.driver.file_mut()?;
        let is_file = match below {
            BlockRef::Inline(below) => driver::of(&below.driver).path().is_some(),
            BlockRef::Name(_) => true,
        };
        match below {
            below if is_file => return Some((below, extent)),
            BlockRef::Inline(below) => node = below,
            BlockRef::Name(_) => return None,
        }
    }
}

impl State {
    /// Puts the backing file that `options` describe into the node that the image `above`, whose
    /// header names it, is in, if it is another part of the same file: two nodes on one file would
    /// lock each other out.
    ///
    /// # Errors
    /// When that part is in use already, by the image itself perhaps.
    pub(super) fn share_file(
        &self,
        options: &mut BlockdevOptions,
        above: &Node,
        descent: &mut Descent,
    ) -> Result<()> {
        let Some((file, extent)) = file_of(options) else {
            return Ok(());
        };
        let BlockRef::Inline(inline) = &*file else {
            return Ok(());
        };
        let Some(path) = driver::of(&inline.driver).path() else {
            return Ok(());
        };
        let stat = |path: &Path| std::fs::metadata(path).ok();
        let (Some(own), Some(other)) = (stat(&above.filename), stat(path)) else {
            return Ok(());
        };
        if number(&own) != number(&other) {
            return Ok(());
        }
        let image = self.extent(above)?;
        if meet(&image, &extent) {
            return Err(is_loop(path, &image, &extent));
        }
        descent.wanted = extent;
        descent.enter(path, &other)?;
        descent.wanted = WHOLE;
        *file = BlockRef::Name(self.bottom(above)?);
        Ok(())
    }

    /// The part of the file at the bottom of a node that the node is in.
    ///
    /// # Errors
    /// When a node does not exist.
    pub(super) fn extent(&self, node: &Node) -> Result<Extent> {
        let (mut node, mut extent) = (node, WHOLE);
        loop {
            extent = node.driver().behind(&extent);
            let Some(file) = node.file() else {
                return Ok(extent);
            };
            let below = self.node(file)?;
            if self.is_disk(below) && !node.is_filter() {
                // Anywhere in there.
                return Ok(WHOLE);
            }
            node = below;
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a part of a part that is taken for another one, and parts beside each
    //! other that are taken for one, or the other way round.

    use super::*;
    use crate::graph::driver::Driver;
    use crate::options::RawOptions;

    fn raw(offset: u64, size: Option<u64>) -> RawOptions {
        RawOptions {
            file: BlockRef::Name("f".into()),
            offset,
            size,
        }
    }

    #[test]
    fn parts_of_parts_are_found_in_the_file() {
        assert_eq!(raw(0, None).behind(&WHOLE), WHOLE);
        let inner = raw(512, Some(1024)).behind(&WHOLE);
        assert_eq!(inner, 512..1536);
        assert_eq!(raw(4096, None).behind(&inner), 4608..5632);
        // What is said to be longer than what it is in.
        assert_eq!(raw(4096, Some(1000)).behind(&inner), 4608..5096);
        assert_eq!(raw(u64::MAX, Some(9)).behind(&inner), u64::MAX..u64::MAX);
    }

    #[test]
    fn only_what_has_bytes_in_common_is_a_loop() {
        let file = std::fs::metadata("/").unwrap();
        let mut descent = Descent::new(0);
        let mut enter = |part: Extent| {
            descent.wanted = part;
            descent.enter(Path::new("disk"), &file)
        };
        enter(4096..8192).unwrap();
        enter(0..4096).unwrap();
        enter(8192..u64::MAX).unwrap();
        for part in [4095..4096, 8191..8193, WHOLE, 1 << 40..u64::MAX] {
            let error = enter(part.clone()).unwrap_err().to_string();
            assert!(
                error.contains("loop (") && error.contains("overlap"),
                "{part:?}: {error}"
            );
        }
    }
}
