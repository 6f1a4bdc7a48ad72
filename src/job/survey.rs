//! What is left to copy: a look ahead of the copies, so that progress can be told in bytes that
//! are to be moved, and not in the length of a device that may be empty for the most part.
//!
//! The survey goes through the device while the first copies are under way, on the same thread. It
//! asks for what each range needs, as the copier will do later, and keeps a sum for each window of
//! the device. What the copier meets takes the place of what was seen ahead: guests write
//! meanwhile. Until the survey has come to the end, what it knows is a lower bound.

use std::cell::RefCell;

use async_lock::{Mutex, MutexGuard};

use super::context::{JobContext, Progress};
use super::stream::{ChunkStatus, GuestLoad, StreamSource, yield_now};

/// The least that is summed up in one number.
const WINDOW: u64 = 64 << 20;
/// The most numbers that are kept.
const MAX_WINDOWS: u64 = 4096;

/// How long a look ahead waits after each window while a guest is active.
const POLITE_WAIT: std::time::Duration = std::time::Duration::from_millis(1);

/// A survey of a stream's device.
pub(super) struct Survey<'a> {
    source: &'a dyn StreamSource,
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
    /// The window that the copier is in.
    current: usize,
    /// What the copier has begun there.
    begun: u64,
    /// What it has begun and not yet brought to an end, anywhere.
    open: u64,
    /// What it has moved of what it has brought to an end.
    copied: u64,
    /// What it has moved beyond that: a cluster larger than a piece moves with its first piece.
    moved_ahead: u64,
}

impl<'a> Survey<'a> {
    pub fn new(source: &'a dyn StreamSource, context: &'a JobContext) -> Self {
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
        survey.tell(&survey.account.borrow());
        survey
    }

    /// Looks through the device, and is never done: it is dropped at the job's end.
    pub async fn run(&self) -> std::convert::Infallible {
        let windows = self.account.borrow().ahead.len();
        for number in 0..windows {
            let start = number as u64 * self.window;
            let found = self.look(start, (start + self.window).min(self.len)).await;
            self.found(number, found);
            match self.source.guest_load() {
                GuestLoad::Idle => yield_now().await,
                GuestLoad::Active | GuestLoad::Crowded => self.context.sleep(POLITE_WAIT).await,
            }
        }
        std::future::pending().await
    }

    /// The bytes to copy of a part of the device, if that can be found out.
    async fn look(&self, start: u64, end: u64) -> Option<u64> {
        let (mut at, mut found) = (start, 0);
        while at < end {
            let looking = self.looking.lock().await;
            // What cannot be looked up is the copier's to report.
            let lookup = self.source.chunk_status(at, WINDOW.min(end - at));
            let (len, status) = lookup.await.ok()?;
            drop(looking);
            if status == ChunkStatus::NeedsCopy {
                found += len;
            }
            at += len.max(1);
            yield_now().await;
        }
        Some(found)
    }

    fn found(&self, number: usize, found: Option<u64>) {
        let mut account = self.account.borrow_mut();
        let begun = match number.cmp(&account.current) {
            std::cmp::Ordering::Less => return,
            std::cmp::Ordering::Equal => account.begun,
            std::cmp::Ordering::Greater => 0,
        };
        let found = found.map(|found| found.saturating_sub(begun));
        if let Some(ahead) = account.ahead.get_mut(number) {
            *ahead = found;
            account.left += found.unwrap_or(0);
        }
        self.tell(&account);
    }

    /// Waits until no look is under way. None begins while what is returned is held.
    pub async fn rest(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().await
    }

    /// The copier has come to `offset`: what was seen before it does not count any longer.
    pub fn passed(&self, offset: u64) {
        let mut account = self.account.borrow_mut();
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
        (account.current, account.begun) = (now, 0);
        self.tell(&account);
    }

    /// The copier begins to copy `len` bytes at `offset`.
    pub fn begin(&self, offset: u64, len: u64) {
        self.passed(offset);
        let mut account = self.account.borrow_mut();
        account.open += len;
        account.begun += len;
        let current = account.current;
        if let Some(Some(ahead)) = account.ahead.get_mut(current) {
            let seen = len.min(*ahead);
            *ahead -= seen;
            account.left -= seen;
        }
        self.tell(&account);
    }

    /// A copy of `len` bytes has ended, and has moved `moved`.
    pub fn end(&self, len: u64, moved: u64) {
        let mut account = self.account.borrow_mut();
        account.open = account.open.saturating_sub(len);
        let all = account.moved_ahead.saturating_add(moved);
        account.copied += all.min(len);
        account.moved_ahead = all.saturating_sub(len);
        self.tell(&account);
    }

    fn tell(&self, account: &Account) {
        let ahead = account.ahead.get(account.current..).unwrap_or_default();
        self.context.set_progress(Progress {
            copied: account.copied,
            to_copy: account.copied + account.open + account.left,
            all_seen: ahead.iter().all(Option::is_some),
        });
    }
}
