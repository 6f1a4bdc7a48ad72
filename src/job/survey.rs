//! What is left to copy: a look ahead of the copies, so that progress can be told in bytes that
//! are to be moved, and not in the length of a device that may be empty for the most part.
//!
//! The survey goes through the device while the first copies are under way, on the same thread. It
//! asks for what each range needs, as the copier will do later, and keeps a sum for each window of
//! the device. What the copier meets takes the place of what was seen ahead: guests write
//! meanwhile. Until the survey has come to the end, what it knows is a lower bound.
//!
//! Both may be in the same window. Each byte counts once: the survey leaves out what is before the
//! copier's place, and the copier takes what it begins off what the survey has counted there. What
//! was told when all had been seen is an upper bound from then on: a range that the copier met
//! before a guest wrote it is begun all the same, and moves nothing.

use std::cell::RefCell;

use async_lock::{Mutex, MutexGuard};

use super::context::JobContext;
use super::source::{CopySource, GuestLoad, yield_now};
use super::status::Progress;
use crate::chain::CopyStatus;

/// The least that is summed up in one number.
const WINDOW: u64 = 64 << 20;
/// The most numbers that are kept.
const MAX_WINDOWS: u64 = 4096;

/// How long a look ahead waits after each window while a guest is active.
const POLITE_WAIT: std::time::Duration = std::time::Duration::from_millis(1);

/// A survey of a stream's device.
pub(super) struct Survey<'a> {
    source: &'a dyn CopySource,
    context: &'a JobContext,
    len: u64,
    window: u64,
    account: RefCell<Account>,
    /// Held during each look.
    looking: Mutex<()>,
}

#[derive(Default)]
struct Account {
    /// The bytes to copy of each window that has been looked at, those that were begun left out.
    ahead: Vec<Option<u64>>,
    /// The sum of these.
    left: u64,
    /// The window that is being looked at.
    looking: usize,
    /// The bytes to copy that were found there so far, those that were begun left out.
    found: u64,
    /// All of the window before this has been looked at.
    looked: u64,
    /// The window that the copier is in.
    current: usize,
    /// Where the copier is: all before it was begun or passed over.
    next: u64,
    /// What it has begun and not yet brought to an end, anywhere.
    open: u64,
    /// What it has moved of what it has brought to an end.
    copied: u64,
    /// What it has moved beyond that: a cluster larger than a piece moves with its first piece.
    moved_ahead: u64,
    /// What there was to copy when all had been looked at.
    most: Option<u64>,
}

impl Account {
    /// Counts a range that was looked at.
    fn add(&mut self, at: u64, len: u64, status: CopyStatus) {
        self.looked = at + len;
        if status == CopyStatus::Data {
            self.found += self.looked.saturating_sub(at.max(self.next));
        } else if (at..self.looked).contains(&self.next) {
            // The rest of a cluster that the copier is in the middle of: moved, but not begun.
            self.found += self.moved_ahead.saturating_sub(self.open);
        }
    }

    /// Takes off `[start, end)` of window `number`, which the copier begins.
    fn take_off(&mut self, number: usize, start: u64, end: u64) {
        match self.ahead.get_mut(number) {
            Some(Some(ahead)) => {
                let seen = (end - start).min(*ahead);
                *ahead -= seen;
                self.left -= seen;
            }
            _ if number != self.looking => {}
            _ => {
                let counted = self.looked.min(end).saturating_sub(start);
                self.found -= counted.min(self.found);
            }
        }
    }
}

impl<'a> Survey<'a> {
    pub fn new(source: &'a dyn CopySource, context: &'a JobContext) -> Self {
        let len = source.len();
        let window = len
            .div_ceil(MAX_WINDOWS)
            .next_multiple_of(WINDOW)
            .max(WINDOW);
        let windows = usize::try_from(len.div_ceil(window)).unwrap_or(0);
        let account = Account {
            ahead: vec![None; windows],
            ..Account::default()
        };
        let survey = Self {
            source,
            context,
            len,
            window,
            account: RefCell::new(account),
            looking: Mutex::new(()),
        };
        survey.tell(&mut survey.account.borrow_mut());
        survey
    }

    /// Looks through the device, and is never done: it is dropped at the job's end.
    pub async fn run(&self) -> std::convert::Infallible {
        let windows = self.account.borrow().ahead.len();
        for number in 0..windows {
            let start = number as u64 * self.window;
            let end = (start + self.window).min(self.len);
            let seen = self.look(number, start, end).await;
            self.looked_at(number, seen);
            match self.source.guest_load() {
                GuestLoad::Idle => yield_now().await,
                GuestLoad::Active | GuestLoad::CpuContended => {
                    self.context.sleep(POLITE_WAIT).await
                }
            }
        }
        std::future::pending().await
    }

    /// Counts the bytes to copy of a window. False: that cannot be found out.
    async fn look(&self, number: usize, start: u64, end: u64) -> bool {
        let mut at = start;
        {
            let mut account = self.account.borrow_mut();
            (account.looking, account.found, account.looked) = (number, 0, start);
        }
        while at < end {
            let looking = self.looking.lock().await;
            // What cannot be looked up is the copier's to report.
            let lookup = self.source.status(at, WINDOW.min(end - at));
            let Ok((len, status)) = lookup.await else {
                return false;
            };
            drop(looking);
            let len = len.max(1);
            self.account.borrow_mut().add(at, len, status);
            at += len;
            yield_now().await;
        }
        true
    }

    fn looked_at(&self, number: usize, seen: bool) {
        let mut account = self.account.borrow_mut();
        let found = std::mem::take(&mut account.found);
        if number < account.current || !seen {
            return;
        }
        if let Some(ahead) = account.ahead.get_mut(number) {
            *ahead = Some(found);
            account.left += found;
        }
        self.tell(&mut account);
    }

    /// Waits until no look is under way. None begins while what is returned is held.
    pub async fn rest(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().await
    }

    /// The copier has come to `offset`: what was seen before it does not count any longer.
    pub fn passed(&self, offset: u64) {
        let mut account = self.account.borrow_mut();
        account.next = account.next.max(offset);
        let now = usize::try_from(offset / self.window).unwrap_or(usize::MAX);
        if now == account.current {
            return;
        }
        let passed = account.current..now.min(account.ahead.len());
        let windows = account.ahead.get_mut(passed).unwrap_or_default();
        let seen: u64 = windows
            .iter_mut()
            .filter_map(|window| window.replace(0))
            .sum();
        account.left -= seen;
        account.current = now;
        self.tell(&mut account);
    }

    /// The copier begins to copy `len` bytes at `offset`.
    pub fn begin(&self, offset: u64, len: u64) {
        self.passed(offset);
        let mut account = self.account.borrow_mut();
        account.open += len;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let window = at / self.window;
            let until = end.min((window + 1) * self.window);
            account.take_off(usize::try_from(window).unwrap_or(usize::MAX), at, until);
            at = until;
        }
        account.next = account.next.max(end);
        self.tell(&mut account);
    }

    /// A copy of `len` bytes has ended, and has moved `moved`.
    pub fn end(&self, len: u64, moved: u64) {
        let mut account = self.account.borrow_mut();
        account.open = account.open.saturating_sub(len);
        let all = account.moved_ahead.saturating_add(moved);
        account.copied += all.min(len);
        account.moved_ahead = all.saturating_sub(len);
        self.tell(&mut account);
    }

    fn tell(&self, account: &mut Account) {
        let ahead = account.ahead.get(account.current..).unwrap_or_default();
        let all_seen = ahead.iter().all(Option::is_some);
        let mut to_copy = account.copied + account.open + account.left;
        if all_seen {
            let most = *account.most.get_or_insert(to_copy);
            to_copy = to_copy.min(most).max(account.copied);
        }
        self.context.set_progress(Progress {
            copied: account.copied,
            to_copy,
            all_seen,
        });
    }
}
