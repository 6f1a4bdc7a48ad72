//! What is known of a node by its driver alone, before anything is opened.

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::edges::{Demand, Role};
use crate::chain::Layer;
use crate::options::{self, BackingRef};

/// A part of a file, from where to where in bytes.
pub(super) type Extent = Range<u64>;

/// All of a file.
pub(super) const WHOLE: Extent = 0..u64::MAX;

/// The driver of a node with these options.
pub(super) fn of(options: &options::Driver) -> &dyn Driver {
    match options {
        options::Driver::File(file) | options::Driver::HostDevice(file) => file,
        options::Driver::Raw(raw) => raw,
        options::Driver::Qcow2(qcow2) => &**qcow2,
        options::Driver::Qed(qed) => qed,
        options::Driver::CopyOnRead(filter) => filter,
        options::Driver::Blkdebug(blkdebug) => &**blkdebug,
        options::Driver::NullCo(null) | options::Driver::NullAio(null) => null,
        options::Driver::Auto(probed) => probed,
    }
}

/// A node's driver, with the options that only it has.
pub(super) trait Driver: Debug {
    /// What a filter changes in the layer of what it filters; `None`: it is none.
    fn attribute(&self) -> Option<fn(&mut Layer)> {
        None
    }

    /// What a node demands of its child in this role, of which `own` is demanded in all.
    fn demand(&self, own: Demand, role: Role) -> Demand {
        Demand::of_image(own, role)
    }

    /// Where its bytes are, if it opens a file.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// What is to lie under it, if anything can.
    fn backing(&self) -> Option<&BackingRef> {
        None
    }

    /// Whether the options, and not a header, say what its data file is.
    fn has_own_data_file(&self) -> bool {
        false
    }

    /// Adds its own options to a node's description, where they say which bytes it has.
    fn describe(&self, _options: &mut Map<String, Value>) {}

    /// The part of its file that is behind its own part `of`.
    fn behind(&self, of: &Extent) -> Extent {
        of.clone()
    }
}
