//! The back-ends that are compared.

use crate::common::Res;
use crate::common::daemon::{Daemon, Program, Setup};
use crate::common::frontend::Frontend;
use std::cell::Cell;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A back-end with its options.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Its name in the report.
    pub name: &'static str,
    /// The program.
    pub program: Program,
    /// `aio=` of its files.
    pub aio: &'static str,
    /// Whether it wants an iothread named on the command line to be at its best.
    pub iothread: bool,
    /// `poll-max-ns=` of that.
    pub poll_max_ns: Option<u32>,
    /// It is measured in the rows about raw images only.
    pub raw_only: bool,
    /// Its images have a journal in this folder, and its front-end an inflight region: what
    /// completes outlives it.
    pub journals: Option<PathBuf>,
    /// How many of its processes died of a signal when they were asked to end.
    pub died: Rc<Cell<usize>>,
}

/// The name of the daemon that is to be measured.
pub const UNDER_TEST: &str = "stratablk";

/// All of them, or those whose name contains one of `words`. The first is the one under test; the
/// last, if given, are the same with a journal in the folder `journals`, and another binary of it.
pub fn wanted(words: &[String], journals: Option<&Path>, before: Option<&Path>) -> Vec<Variant> {
    let stratablk = |name, program| Variant {
        name,
        program,
        aio: "io_uring",
        iothread: false,
        poll_max_ns: None,
        raw_only: false,
        journals: None,
        died: Rc::default(),
    };
    let reference = |name, aio| Variant {
        name,
        program: Program::reference(),
        aio,
        iothread: true,
        poll_max_ns: None,
        raw_only: false,
        journals: None,
        died: Rc::default(),
    };
    let polling = |name, poll_max_ns| Variant {
        poll_max_ns: Some(poll_max_ns),
        raw_only: true,
        ..reference(name, "native")
    };
    let all = [
        stratablk(UNDER_TEST, Program::under_test()),
        reference("qsd-uring", "io_uring"),
        reference("qsd-native", "native"),
        polling("qsd-native, poll 0", 0),
        polling("qsd-native, poll 1 ms", 1_000_000),
    ];
    let kept = journals.map(|folder| Variant {
        journals: Some(folder.into()),
        ..stratablk("kept", Program::under_test())
    });
    let before = before.map(|path| stratablk("before", Program { path: path.into() }));
    all.into_iter()
        .chain(kept)
        .chain(before)
        .filter(|v| words.is_empty() || words.iter().any(|word| v.name.contains(word.as_str())))
        .collect()
}

impl Variant {
    /// The export of `layers` by this back-end, past the page cache, with sockets in `dir`. An
    /// iothread is left out where the row starts a job: the reference aborts on that combination.
    pub fn setup(&self, dir: &Path, layers: &[(PathBuf, &'static str)], job: bool) -> Setup {
        let mut setup = Setup::new(dir, layers);
        setup.direct = true;
        setup.aio = Some(self.aio);
        setup.iothread = self.iothread && !job;
        setup.poll_max_ns = self.poll_max_ns;
        if !job {
            setup.qmp = None;
        }
        if let Some(folder) = &self.journals {
            setup.extra.push(format!("--journal={}", folder.display()));
        }
        setup
    }

    /// Connects a front-end to the export of `daemon`.
    pub fn connect(&self, daemon: &mut Daemon, setup: &Setup, memory: usize) -> Res<Frontend> {
        const SIZE: u16 = 256;
        match self.journals {
            None => daemon.connect(&setup.socket, setup.queues, SIZE, memory),
            Some(_) => daemon.connect_tracked(&setup.socket, setup.queues, SIZE, memory, true),
        }
    }

    /// Ends `daemon` after it was measured.
    ///
    /// A reference that dies of a signal then has been measured all the same, and what it wrote has
    /// been read back: its figures stand, and the report says how often that was. The daemon under
    /// test fails the row.
    pub fn end(&self, mut daemon: Daemon) -> Res<()> {
        if self.name == UNDER_TEST {
            return daemon.stop();
        }
        let status = daemon.terminate()?;
        if let Some(signal) = status.signal() {
            eprintln!("    died of signal {signal} when asked to end");
            self.died.set(self.died.get() + 1);
        } else if !status.success() {
            return Err(format!("ended with {status}: {}", daemon.log()).into());
        }
        Ok(())
    }
}
