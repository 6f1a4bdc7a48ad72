//! A row about I/O: which load on which image.

use crate::disks::Disk;
use crate::load::Shape;

/// One row: a load on an image.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The image.
    pub disk: Disk,
    /// What the load is called.
    pub load: &'static str,
    /// The load.
    pub shape: Shape,
    /// The front-end polls its ring.
    pub poll: bool,
}

impl Row {
    /// One whose front-end waits for its eventfd.
    pub fn new(disk: Disk, load: &'static str, shape: Shape) -> Self {
        Row {
            disk,
            load,
            shape,
            poll: false,
        }
    }

    /// Its name in the report.
    pub fn name(&self, place: &str) -> String {
        let poll = if self.poll { ", polling" } else { "" };
        format!("{place} {}, {}{poll}", self.disk.name(), self.load)
    }

    /// Whether files grow by it.
    pub fn allocates(&self) -> bool {
        self.shape.write && matches!(self.disk, Disk::Overlay | Disk::Empty)
    }
}
