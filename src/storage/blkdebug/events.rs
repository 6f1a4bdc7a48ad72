//! What happens by an operation, in the words of rules.
//!
//! Events of QEMU's that name a step of its own, and no operation on a file, never happen here:
//! `docs/command-line.md` has the list of those that do.

use super::rules::{Event, IoType};
use crate::storage::{Op, Purpose};

/// The events that an operation is, in their order.
pub(super) fn of(op: &Op<'_>, purpose: Purpose) -> impl Iterator<Item = Event> {
    let (meant, kind): (&[Event], &[Event]) = match op {
        Op::Read { .. } => (read(purpose), &[]),
        Op::Write { .. } => (write(purpose), &[Event::Pwritev]),
        Op::Sync => (&[Event::FlushToOs], &[Event::FlushToDisk]),
        Op::Reserve { .. } => (&[Event::ClusterAllocSpace], &[]),
        Op::Zero { .. } => match (is_discard(op, purpose), purpose) {
            (true, Purpose::Space) => (&[Event::ClusterFree], &[]),
            (true, _) => (&[], &[]),
            (false, _) => (write_zeroes(purpose), &[Event::PwritevZero]),
        },
    };
    meant.iter().chain(kind).copied()
}

/// The kind of an operation that rules are about, and where it is.
pub(super) fn range(op: &Op<'_>, purpose: Purpose) -> (Option<IoType>, u64, u64) {
    let len = |iovecs: &[libc::iovec]| iovecs.iter().map(|iovec| iovec.iov_len as u64).sum();
    match *op {
        Op::Read { iovecs, offset } => (Some(IoType::Read), offset, len(iovecs)),
        Op::Write { iovecs, offset } => (Some(IoType::Write), offset, len(iovecs)),
        Op::Sync => (Some(IoType::Flush), 0, 0),
        Op::Reserve { .. } => (None, 0, 0),
        Op::Zero { offset, len, .. } => match is_discard(op, purpose) {
            true => (Some(IoType::Discard), offset, len),
            false => (Some(IoType::WriteZeroes), offset, len),
        },
    }
}

/// Whether a range is given back, and need not read as zeros afterwards.
fn is_discard(op: &Op<'_>, purpose: Purpose) -> bool {
    matches!(op, Op::Zero { unmap: true, .. })
        && matches!(purpose, Purpose::Discard | Purpose::Space)
}

fn read(purpose: Purpose) -> &'static [Event] {
    match purpose {
        Purpose::Data | Purpose::Discard | Purpose::Copy => &[Event::ReadAio],
        Purpose::CopyOnWrite => &[Event::CowRead, Event::ReadAio],
        Purpose::Compressed => &[Event::ReadCompressed],
        Purpose::L2Table => &[Event::L2Load],
        Purpose::RefcountTable => &[Event::ReftableLoad],
        Purpose::RefcountBlock => &[Event::RefblockLoad],
        Purpose::Header
        | Purpose::L1Table
        | Purpose::Snapshots
        | Purpose::Bitmap
        | Purpose::Space
        | Purpose::Flush
        | Purpose::Check
        | Purpose::Other => &[],
    }
}

fn write(purpose: Purpose) -> &'static [Event] {
    match purpose {
        Purpose::Data | Purpose::Discard => &[Event::WriteAio],
        Purpose::CopyOnWrite => &[Event::CowWrite, Event::WriteAio],
        Purpose::Copy => &[Event::CorWrite, Event::WriteAio],
        Purpose::Compressed => &[Event::WriteCompressed],
        Purpose::L1Table => &[Event::L1Update],
        Purpose::L2Table => &[Event::L2Update],
        Purpose::RefcountTable => &[Event::ReftableUpdate],
        Purpose::RefcountBlock => &[Event::RefblockUpdatePart, Event::RefblockUpdate],
        Purpose::Space => &[Event::ClusterAllocSpace],
        Purpose::Header
        | Purpose::Snapshots
        | Purpose::Bitmap
        | Purpose::Flush
        | Purpose::Check
        | Purpose::Other => &[],
    }
}

fn write_zeroes(purpose: Purpose) -> &'static [Event] {
    match purpose {
        Purpose::Space => &[Event::ClusterAllocSpace],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an operation that is taken for another event or kind than it is.

    use super::*;

    #[test]
    fn an_operation_is_what_it_is_for() {
        let iovecs = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 1024,
        }];
        let read = Op::Read {
            iovecs: &iovecs,
            offset: 512,
        };
        let write = Op::Write {
            iovecs: &iovecs,
            offset: 512,
        };
        let zero = |unmap| Op::Zero {
            offset: 512,
            len: 1024,
            unmap,
        };
        let at = |kind| (Some(kind), 512, 1024);
        let [data, space, l2] = [Purpose::Data, Purpose::Space, Purpose::L2Table];
        let (discard, cow, copy) = (Purpose::Discard, Purpose::CopyOnWrite, Purpose::Copy);
        for (op, purpose, names, expected) in [
            (read, data, "read_aio", at(IoType::Read)),
            (read, l2, "l2_load", at(IoType::Read)),
            (read, cow, "cow_read read_aio", at(IoType::Read)),
            (read, Purpose::Header, "", at(IoType::Read)),
            (write, data, "write_aio pwritev", at(IoType::Write)),
            (write, l2, "l2_update pwritev", at(IoType::Write)),
            (
                write,
                copy,
                "cor_write write_aio pwritev",
                at(IoType::Write),
            ),
            (zero(false), data, "pwritev_zero", at(IoType::WriteZeroes)),
            (zero(true), data, "pwritev_zero", at(IoType::WriteZeroes)),
            (zero(true), discard, "", at(IoType::Discard)),
            (zero(true), space, "cluster_free", at(IoType::Discard)),
            (
                Op::Sync,
                data,
                "flush_to_os flush_to_disk",
                (Some(IoType::Flush), 0, 0),
            ),
            (
                Op::Reserve { offset: 0, len: 9 },
                space,
                "cluster_alloc_space",
                (None, 0, 0),
            ),
        ] {
            let name = |event| {
                let mut all = Event::ALL.iter();
                all.find(|(_, other)| *other == event)
                    .map(|(name, _)| *name)
            };
            let told: Vec<&str> = of(&op, purpose).filter_map(name).collect();
            assert_eq!(told.join(" "), names, "{op:?} {purpose:?}");
            assert_eq!(range(&op, purpose), expected, "{op:?} {purpose:?}");
        }
    }
}
