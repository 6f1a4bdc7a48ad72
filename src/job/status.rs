//! The states of a job and what each allows.

pub use crate::state::record::IoStatus;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Made, not yet started.
    Created,
    /// At work, or asleep because of its speed limit.
    Running,
    /// Stopped by a client, or by an error it was told to stop at.
    Paused,
    /// Has done all and goes on following its source. (Of use to jobs that mirror.)
    Ready,
    /// Paused while ready.
    Standby,
    /// Done, waiting for the others of its transaction.
    Waiting,
    /// Done, its result not yet in force.
    Pending,
    /// Cancelled or failed, cleaning up.
    Aborting,
    /// Over, but still listed.
    Concluded,
    /// Gone.
    Null,
}

impl Status {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a client may use `verb` in this state.
    pub fn allows(self, verb: Verb) -> bool {
        use Status::*;
        match verb {
            Verb::Cancel => {
                matches!(
                    self,
                    Created | Running | Paused | Ready | Standby | Waiting | Pending
                )
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }
}

/// What a client may ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Give up.
    Cancel,
    /// Stop until resumed.
    Pause,
    /// Go on.
    Resume,
    /// Another speed limit.
    SetSpeed,
    /// End a job that is ready.
    Complete,
    /// Put the result in force.
    Finalize,
    /// Forget a job that is over.
    Dismiss,
}

impl Verb {
    /// The name in error texts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }
}

impl IoStatus {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// How much is copied, and how much is to be: bytes that are moved, not the length of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were copied.
    pub copied: u64,
    /// Bytes that are to be copied, `copied` included, as far as is known.
    pub to_copy: u64,
    /// That is all: the whole device has been looked at.
    pub all_seen: bool,
}
