//! What would be caught: an operation that fails and is passed on all the same, or the other way
//! round; one that is counted twice, as by the data path, which tries again; a descriptor that is
//! opened later and knows nothing of what has happened before; a transfer beyond its limit, or one
//! that loses bytes at it; an event that does not come, or comes too early.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::storage::fault::FaultStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::{AlignedBuf, io as storage_io};
use rules::{InjectError, SetState};

const LEN: usize = 16 << 10;
const RULE: InjectError = InjectError {
    event: Event::None,
    state: None,
    iotype: None,
    errno: 5,
    sector: None,
    once: false,
    immediately: false,
};

fn over(inner: &Arc<MemoryStorage>, inject: &[InjectError]) -> Blkdebug {
    let rules = Rules {
        inject: inject.to_vec(),
        set_state: Vec::new(),
    };
    let settings = Settings {
        rules,
        ..Settings::default()
    };
    Blkdebug::new(inner.clone(), &settings)
}

fn memory() -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::new(vec![7; LEN]))
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    Reactor::for_this_thread().unwrap().block_on(future)
}

fn read(storage: &dyn Storage, sector: u64) -> Option<i32> {
    let from = Purpose::Data.on(storage);
    let read = wait(storage_io::read_buf(from, sector * 512, 512));
    read.map(|bytes| assert!(bytes[..] == [7; 512]))
        .err()
        .and_then(|error| error.raw_os_error())
}

fn write(storage: &dyn Storage, sector: u64) -> Option<i32> {
    let bytes = AlignedBuf::copy_of(&[9; 512]);
    let to = Purpose::Data.on(storage);
    let written = wait(storage_io::write_buf(to, sector * 512, &bytes));
    written.err().and_then(|error| error.raw_os_error())
}

#[test]
fn operations_fail_by_the_rules_and_are_not_passed_on() {
    for immediately in [false, true] {
        let inner = memory();
        let rule = |iotype, errno| InjectError {
            iotype: Some(iotype),
            errno,
            once: true,
            immediately,
            ..RULE
        };
        let storage = over(
            &inner,
            &[
                rule(IoType::Write, 28),
                rule(IoType::Read, 5),
                rule(IoType::Flush, 6),
                rule(IoType::WriteZeroes, 5),
                rule(IoType::BlockStatus, 5),
            ],
        );
        assert_eq!(write(&storage, 1), Some(28));
        assert_eq!(read(&storage, 1), Some(5));
        let zero = || wait(storage_io::zero(&storage, 0, 512, false));
        assert_eq!(zero().unwrap_err().raw_os_error(), Some(5));
        assert!(inner.snapshot() == [7; LEN]);
        let sync = || wait(storage_io::sync(&storage));
        assert_eq!(sync().unwrap_err().raw_os_error(), Some(6));
        assert_eq!(
            wait(storage.next_data(LEN as u64)),
            Some((LEN as u64, u64::MAX))
        );
        // Each was to fire once.
        assert_eq!((write(&storage, 1), read(&storage, 0)), (None, None));
        zero().unwrap();
        sync().unwrap();
        assert_eq!(wait(storage.next_data(3)), wait(inner.next_data(3)));
        assert!(inner.snapshot()[..1024] == [[0; 512], [9; 512]].concat());
        Reactor::leave_thread();
    }
}

#[test]
fn the_data_path_does_not_hide_what_has_failed() {
    let reactor = Reactor::for_this_thread().unwrap();
    let rule = InjectError { once: true, ..RULE };
    let storage = over(&memory(), &[rule]);
    let buffer = AlignedBuf::zeroed(512);
    let iovecs = [libc::iovec {
        iov_base: buffer.as_ptr().cast_mut().cast(),
        iov_len: 512,
    }];
    let op = Op::Read {
        iovecs: &iovecs,
        offset: 0,
    };
    // SAFETY: the operation is not started.
    let tried = unsafe { storage.submit(&reactor, op, Token::client(3)) };
    let Submission::Ready(Err(error)) = tried else {
        panic!("it is to be tried again");
    };
    assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    assert_eq!(read(&storage, 0), Some(5));
    assert_eq!(read(&storage, 0), None);
    Reactor::leave_thread();
}

#[test]
fn a_descriptor_for_writing_goes_on_with_the_same_rules() {
    let (first, second) = (memory(), memory());
    let rule = InjectError { once: true, ..RULE };
    let storage = over(&first, &[rule, InjectError { errno: 28, ..rule }]);
    assert_eq!(read(&storage, 0), Some(5));
    let second: Arc<dyn Storage> = second;
    let other = storage.over(&second).unwrap();
    assert_eq!(write(&*other, 0), Some(28));
    assert_eq!((write(&*other, 0), read(&storage, 0)), (None, None));
    Reactor::leave_thread();
}

#[test]
fn transfers_are_cut_at_the_limit_and_at_blocks() {
    let inner = memory();
    let blocks: Arc<dyn Storage> = Arc::new(FaultStorage::over(inner.clone()).with_blocks(1, 1024));
    let settings = Settings {
        rules: Rules {
            // Of a transfer that is not cut the fourth sector would be one.
            inject: vec![InjectError {
                sector: Some(4),
                iotype: Some(IoType::Write),
                ..RULE
            }],
            set_state: Vec::new(),
        },
        align: Some(512),
        max_transfer: Some(1536),
    };
    let storage = Blkdebug::new(blocks, &settings);
    assert_eq!(storage.limits().offset_align, 1024);
    let bytes = AlignedBuf::copy_of(&(0..4096_u32).map(|at| (at / 3) as u8).collect::<Vec<_>>());
    let error = wait(storage_io::write_buf(&storage, 0, &bytes)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
    let mut expected = vec![7; LEN];
    expected[..2048].copy_from_slice(&bytes[..2048]);
    assert!(inner.snapshot() == expected);
    wait(storage_io::write_buf(&storage, 8192, &bytes)).unwrap();
    let seen = wait(storage_io::read_buf(&storage, 8192, 4096)).unwrap();
    assert!(seen[..] == bytes[..]);
    Reactor::leave_thread();
}

#[test]
fn a_write_is_an_event_before_it_and_one_when_it_has_ended() {
    let inner = memory();
    let in_state = |state, errno| InjectError {
        event: Event::ReadAio,
        state: Some(state),
        errno,
        iotype: Some(IoType::Read),
        ..RULE
    };
    let to = |event, state, new_state| SetState {
        event,
        state: Some(state),
        new_state,
    };
    let rules = Rules {
        inject: vec![in_state(1, 1), in_state(2, 2), in_state(3, 3)],
        set_state: vec![
            to(Event::Pwritev, 1, 2),
            to(Event::PwritevDone, 2, 3),
            to(Event::FlushToDisk, 3, 4),
            to(Event::PwritevZero, 4, 1),
        ],
    };
    let settings = Settings {
        rules,
        ..Settings::default()
    };
    let storage = Blkdebug::new(inner, &settings);
    assert_eq!(read(&storage, 9), Some(1));
    assert_eq!(write(&storage, 0), None);
    assert_eq!(read(&storage, 9), Some(3));
    wait(storage_io::sync(&storage)).unwrap();
    // State 4 arms nothing, and what was armed stays so.
    assert_eq!(read(&storage, 9), Some(3));
    wait(storage_io::zero(&storage, 0, 512, false)).unwrap();
    assert_eq!(read(&storage, 9), Some(1));
    Reactor::leave_thread();
}
