//! Edges between nodes: what a child is to the node over it, and what the one demands of the other.

use std::fmt;
use std::ops::{BitAnd, BitOr, Sub};

/// What a child is to the node over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The node's bytes are in it.
    File,
    /// It supplies what the node lacks.
    Backing,
    /// Guest data is in it, and only metadata in the file.
    DataFile,
    /// The node is a filter of it: it shows the child's disk.
    Filtered,
    /// The node has the bytes of the child's disk, and fails where it is told to.
    Image,
}

impl Role {
    /// The name of the option that holds such a child.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::File | Self::Filtered => "file",
            Self::Image => "image",
            Self::Backing => "backing",
            Self::DataFile => "data-file",
        }
    }
}

/// The way from a node to a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// What the child is to the node.
    pub role: Role,
    /// The child's name.
    pub child: String,
}

/// Things that can be done with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(u8);

impl Rights {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// To read what nobody is just changing in a way that shows.
    pub const READ: Self = Self(1);
    /// To write.
    pub const WRITE: Self = Self(2);
    /// To write what reads the same before and after, such as copies from below.
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// To change the size.
    pub const RESIZE: Self = Self(8);
    /// All of these.
    pub const ALL: Self = Self(15);
    /// That the image is open for writing. It concerns the files that the image is in, and no other
    /// user of the image.
    pub const OPEN: Self = Self(16);

    /// QEMU's names.
    const NAMES: [(Self, &str); 4] = [
        (Self::READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::WRITE_UNCHANGED, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    /// QEMU's names of those that there are, in the order in which it lists them.
    pub fn qemu_names(self) -> impl Iterator<Item = String> {
        let names = Self::NAMES.into_iter().rev();
        let order = move |(right, name): (Self, &'static str)| self.has(right).then_some(name);
        names.filter_map(order).map(|name| name.replace(' ', "-"))
    }

    /// Whether it has any of `other`.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self & other != Self::NONE
    }
}

impl BitOr for Rights {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Rights {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Sub for Rights {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::NAMES.iter().filter(|(right, _)| self.has(*right));
        let names: Vec<_> = names.map(|(_, name)| *name).collect();
        f.write_str(&names.join(", "))
    }
}

/// What is done with a node, and what is tolerated from others meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// What is done.
    pub does: Rights,
    /// What others may do.
    pub tolerates: Rights,
}

impl Demand {
    /// Nothing is done, and all may be.
    pub const NOTHING: Self = Self {
        does: Rights::NONE,
        tolerates: Rights::ALL,
    };

    /// The same, whatever others do.
    #[must_use]
    pub(super) fn minding_nothing(self) -> Self {
        Self {
            tolerates: Rights::ALL,
            ..self
        }
    }

    /// What a node demands of its child in this role, of which `own` is demanded in all: as an
    /// image, which lets nobody change the bytes that it is laid out in.
    #[must_use]
    pub(super) fn of_image(own: Self, role: Role) -> Self {
        let unchanged = Rights::ALL - Rights::WRITE - Rights::RESIZE;
        let changes = own.does.has(Rights::WRITE | Rights::RESIZE | Rights::OPEN);
        match role {
            Role::Filtered | Role::Image => own,
            Role::Backing => Self {
                does: own.does & Rights::READ,
                tolerates: match own.tolerates.has(Rights::WRITE) {
                    true => Rights::ALL,
                    false => unchanged,
                },
            },
            Role::File | Role::DataFile => Self {
                does: match changes {
                    true => Rights::READ | Rights::WRITE,
                    false => Rights::READ,
                },
                tolerates: unchanged,
            },
        }
    }
}
