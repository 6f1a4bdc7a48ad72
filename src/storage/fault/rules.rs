//! Which calls of storage hang or fail: by their kind, and by what they are for.

use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::reactor::{Reactor, Remote, Token};
use crate::storage::{Op, Purpose};
use crate::sync::Event;

/// A kind of call that storage is asked to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Op::Read`].
    Read,
    /// [`Op::Write`].
    Write,
    /// [`Op::Sync`].
    Sync,
    /// [`Op::Reserve`].
    Reserve,
    /// [`Op::Zero`].
    Zero,
    /// [`Storage::len`] and [`Storage::capacity`].
    Len,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::set_access`].
    SetAccess,
    /// [`Storage::open_writable`].
    OpenWritable,
    /// [`Storage::next_data`].
    NextData,
    /// The last reference goes.
    Close,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Read,
        Self::Write,
        Self::Sync,
        Self::Reserve,
        Self::Zero,
        Self::Len,
        Self::SetLen,
        Self::SetAccess,
        Self::OpenWritable,
        Self::NextData,
        Self::Close,
    ];

    pub(super) fn of(op: &Op<'_>) -> Self {
        match op {
            Op::Read { .. } => Self::Read,
            Op::Write { .. } => Self::Write,
            Op::Sync => Self::Sync,
            Op::Reserve { .. } => Self::Reserve,
            Op::Zero { .. } => Self::Zero,
        }
    }
}

/// Where calls hang, until it is opened by any thread. Operations that have hung end as
/// interrupted then, having done nothing, and are tried again; everything else goes on.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    opened: Event,
    opened_to_threads: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    shut: Vec<(Call, Option<Purpose>)>,
    operations: Vec<(Arc<Remote>, Token)>,
    /// Calls that have hung.
    hung: usize,
}

impl GateState {
    fn is_shut(&self, call: Call, purpose: Option<Purpose>) -> bool {
        let mut shut = self.shut.iter();
        shut.any(|&(kind, only)| kind == call && (only.is_none() || only == purpose))
    }
}

impl Gate {
    /// Calls of these kinds hang from now on.
    pub fn shut(&self, calls: &[Call]) {
        let all = calls.iter().map(|&call| (call, None));
        self.state.lock().shut.extend(all);
    }

    /// Operations of this kind hang from now on if they are for this.
    pub fn shut_for(&self, call: Call, purpose: Purpose) {
        self.state.lock().shut.push((call, Some(purpose)));
    }

    /// Nothing hangs any more.
    pub fn open(&self) {
        let operations = {
            let mut state = self.state.lock();
            state.shut.clear();
            std::mem::take(&mut state.operations)
        };
        self.opened.notify(usize::MAX);
        self.opened_to_threads.notify_all();
        for (remote, token) in operations {
            remote.complete(token, Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        }
    }

    /// How many calls have hung so far.
    #[must_use]
    pub fn hung(&self) -> usize {
        self.state.lock().hung
    }

    /// Whether an operation hangs.
    pub(super) fn holds(
        &self,
        op: &Op<'_>,
        purpose: Purpose,
        reactor: &Reactor,
        token: Token,
    ) -> bool {
        let mut state = self.state.lock();
        let shut = state.is_shut(Call::of(op), Some(purpose));
        if shut {
            state.hung += 1;
            state.operations.push((reactor.remote(), token));
        }
        shut
    }

    /// Hangs while the gate is shut for `call`; blocks nobody.
    pub(super) async fn pass(&self, call: Call) {
        let mut counted = false;
        loop {
            let opened = self.opened.listen();
            {
                let mut state = self.state.lock();
                if !state.is_shut(call, None) {
                    return;
                }
                state.hung += usize::from(!std::mem::replace(&mut counted, true));
            }
            opened.await;
        }
    }

    /// As [`pass`](Self::pass) for [`Call::Close`], and blocks its thread.
    pub(super) fn pass_close(&self) {
        let mut state = self.state.lock();
        state.hung += usize::from(state.is_shut(Call::Close, None));
        while state.is_shut(Call::Close, None) {
            self.opened_to_threads.wait(&mut state);
        }
    }
}

/// Operations that fail, until they are told to stop.
#[derive(Debug, Default)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
}

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Their kind: one that is an [`Op`].
    pub call: Call,
    /// What they are for; anything if that is not said.
    pub purpose: Option<Purpose>,
    /// The error number.
    pub errno: i32,
    /// How many of them fail.
    pub times: u32,
}

impl Faults {
    /// Such operations fail from now on.
    pub fn add(&self, rule: Rule) {
        self.rules.lock().push(rule);
    }

    /// Nothing fails any more.
    pub fn clear(&self) {
        self.rules.lock().clear();
    }

    /// Whether an operation fails, and with which error.
    pub(super) fn meet(&self, op: &Op<'_>, purpose: Purpose) -> io::Result<()> {
        let mut rules = self.rules.lock();
        let met = rules.iter_mut().find(|rule| {
            rule.times > 0
                && rule.call == Call::of(op)
                && rule.purpose.is_none_or(|only| only == purpose)
        });
        let Some(rule) = met else {
            return Ok(());
        };
        rule.times -= 1;
        Err(io::Error::from_raw_os_error(rule.errno))
    }
}
