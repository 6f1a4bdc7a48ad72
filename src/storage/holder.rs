//! Who holds a lock on a file: what the kernel tells about the open files of processes
//! (proc(5), `/proc/PID/fdinfo`).
//!
//! A lock of an open file belongs to no process by number, so this looks for a process that has
//! the file open with that lock. It finds none for a process that was killed and whose last I/O
//! in its io_uring has not ended: the file is closed only then, and its locks go with it.

use std::fmt;
use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process, with another descriptor.
    Own,
    /// A process that runs.
    Process {
        /// Its number.
        pid: u32,
        /// The name of its program, as the kernel has it.
        command: String,
    },
    /// A process that has been killed, or has crashed, and is not gone.
    Ending {
        /// Its number.
        pid: u32,
        /// The name of its program, as the kernel has it.
        command: String,
    },
    /// None that could be found.
    Unknown {
        /// Whether every process could be looked at.
        all_seen: bool,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("This process uses it itself, in another node"),
            Self::Process { pid, command } => write!(f, "Process {pid} ({command}) holds the lock"),
            Self::Ending { pid, command } => write!(
                f,
                "Process {pid} ({command}), which has been killed and has not ended, holds the lock"
            ),
            Self::Unknown { all_seen: true } => f.write_str(
                "No process that runs here holds the lock: it is left over from one that was \
                 killed and whose last I/O has not ended, or held on another host or in another \
                 container",
            ),
            Self::Unknown { all_seen: false } => f.write_str(
                "No process that this user may look at holds the lock: it is another user's, or \
                 left over from one that was killed and whose last I/O has not ended, or held on \
                 another host or in another container",
            ),
        }
    }
}

/// Looks for the process that holds a lock on `byte` of the file that `file` has open, other
/// than by `file` itself. It never waits for a file system.
#[must_use]
pub fn find(file: &File, byte: i64) -> Holder {
    let Some(wanted) = name_of(file) else {
        return Holder::Unknown { all_seen: false };
    };
    let own = std::process::id();
    let mut all_seen = !processes_are_hidden();
    let mut ending = None;
    let Ok(processes) = fs::read_dir("/proc") else {
        return Holder::Unknown { all_seen: false };
    };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let skip = (pid == own).then(|| file.as_raw_fd());
        match holds(&entry.path(), &wanted, byte, skip) {
            Ok(true) if pid == own => return Holder::Own,
            Ok(true) => {
                let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                let command = command.trim_end().to_owned();
                if !ends(&entry.path()) {
                    return Holder::Process { pid, command };
                }
                ending = Some(Holder::Ending { pid, command });
            }
            Ok(false) => {}
            Err(error) => all_seen &= error.kind() != io::ErrorKind::PermissionDenied,
        }
    }
    ending.unwrap_or(Holder::Unknown { all_seen })
}

/// Whether `/proc` may leave out processes of other users.
fn processes_are_hidden() -> bool {
    // What cannot be read is as good as hidden.
    let read = |path| fs::read_to_string(path).ok();
    let mounts = read("/proc/self/mounts");
    let status = read("/proc/self/status");
    mounts
        .zip(status)
        .is_none_or(|(mounts, status)| hides_processes(&mounts) && !may_look_at_all(&status))
}

/// Whether `/proc` is mounted with `hidepid`, according to the list of mounts.
fn hides_processes(mounts: &str) -> bool {
    // The last one hides those before it.
    let proc = mounts.lines().rev().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        match (words.next(), words.next(), words.next()) {
            (Some("/proc"), Some("proc"), Some(options)) => Some(options),
            _ => None,
        }
    });
    let hidden = |options: &str| {
        let mut values = options
            .split(',')
            .filter_map(|o| o.strip_prefix("hidepid="));
        values.any(|value| !matches!(value, "0" | "off"))
    };
    proc.is_none_or(hidden)
}

/// Whether a process with this status (proc(5)) has CAP_SYS_PTRACE.
fn may_look_at_all(status: &str) -> bool {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set & CAP_SYS_PTRACE != 0)
}

/// The kernel's name of a file in its lists of locks, `major:minor:inode`: taken from such a list
/// when we hold a lock on it, since file systems may show another device to stat(2).
fn name_of(file: &File) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    if let Some(lock) = info.lines().find_map(Lock::parse) {
        return Some(lock.file.to_owned());
    }
    let stat = file.metadata().ok()?;
    let (major, minor) = (libc::major(stat.dev()), libc::minor(stat.dev()));
    Some(format!("{major:02x}:{minor:02x}:{}", stat.ino()))
}

/// Whether a process has such a lock; `skip` is a descriptor that is not meant.
fn holds(process: &Path, wanted: &str, byte: i64, skip: Option<RawFd>) -> io::Result<bool> {
    for entry in fs::read_dir(process.join("fd"))?.flatten() {
        let fd = entry.file_name();
        if skip.is_some_and(|skip| fd.to_str() == Some(&skip.to_string()))
            || !is_file(&entry.path())
        {
            continue;
        }
        let info = fs::read_to_string(process.join("fdinfo").join(fd)).unwrap_or_default();
        let mut locks = info.lines().filter_map(Lock::parse);
        if locks.any(|lock| lock.file == wanted && lock.first <= byte && byte <= lock.last) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a descriptor is of something with a name: pipes, sockets and the like have no locks.
/// The link is read, and not followed: a file system that hangs would keep us.
fn is_file(descriptor: &Path) -> bool {
    fs::read_link(descriptor).is_ok_and(|target: PathBuf| target.is_absolute())
}

/// Whether a process does nothing more than end.
fn ends(process: &Path) -> bool {
    let read = |name| fs::read_to_string(process.join(name)).unwrap_or_default();
    is_killed(&read("status")) || is_exiting(&read("stat"))
}

/// Whether it is dead, has a signal that will kill it, or is writing its memory to a file after a
/// crash.
fn is_killed(status: &str) -> bool {
    let killed = 1_u64 << (libc::SIGKILL - 1);
    status.lines().any(|line| match line.split_once(':') {
        Some(("State", state)) => state.trim_start().starts_with(['Z', 'X']),
        Some(("CoreDumping", dumping)) => dumping.trim() == "1",
        Some(("SigPnd" | "ShdPnd", set)) => {
            u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & killed != 0)
        }
        _ => false,
    })
}

/// Whether it takes itself apart: the signal has been taken then, and the memory of a large guest is
/// given back before the files are closed.
fn is_exiting(stat: &str) -> bool {
    const PF_EXITING: u32 = 4;
    // Behind the name, which may hold anything: state, four numbers of other processes and of the
    // terminal, its foreground group, and the flags.
    let flags = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(6));
    flags.is_some_and(|flags| {
        flags
            .parse::<u32>()
            .is_ok_and(|flags| flags & PF_EXITING != 0)
    })
}

/// A line of `fdinfo` about a lock of byte ranges.
#[derive(Debug, PartialEq, Eq)]
struct Lock<'a> {
    file: &'a str,
    first: i64,
    last: i64,
}

impl<'a> Lock<'a> {
    /// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:10018923 100 100`; a last byte of `EOF` is none.
    fn parse(line: &'a str) -> Option<Self> {
        let words = line.strip_prefix("lock:")?;
        let words: Vec<_> = words.split_whitespace().collect();
        let &[_, kind, _, _, _, file, first, last] = words.as_slice() else {
            return None;
        };
        // Others (`FLOCK`, `LEASE`) do not meet ours.
        matches!(kind, "OFDLCK" | "POSIX").then_some(())?;
        let last = match last {
            "EOF" => i64::MAX,
            last => last.parse().ok()?,
        };
        Some(Self {
            file,
            first: first.parse().ok()?,
            last,
        })
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: fields of the kernel's lines that are taken for others, a lock of
    //! another kind or another byte that is blamed, our own descriptor that is taken for somebody
    //! else's, a process that is gone but for its last signal and is taken for one that lives, and
    //! processes that are hidden and taken for ones that are not there.

    use std::sync::Arc;

    use super::super::locking::{Access, ImageLock};
    use super::*;

    #[test]
    fn lines_about_locks_are_understood() {
        let lock = Lock::parse("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10018923 100 103");
        let (first, last) = (100, 103);
        let file = "fe:00:10018923";
        assert_eq!(lock, Some(Lock { file, first, last }));
        let lock = Lock::parse("lock:\t2: POSIX  ADVISORY  WRITE 4711 00:2a:7 0 EOF");
        let (file, first, last) = ("00:2a:7", 0, i64::MAX);
        assert_eq!(lock, Some(Lock { file, first, last }));
        for line in [
            "lock:\t1: FLOCK  ADVISORY  WRITE 4711 00:2a:7 0 EOF",
            "lock:\t1: OFDLCK ADVISORY  READ -1 00:2a:7 100",
            "pos:\t0",
            "",
        ] {
            assert_eq!(Lock::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_killed_process_is_ending() {
        for (status, ending) in [
            (
                "Name:\tx\nState:\tS (sleeping)\nSigPnd:\t0000000000000000\n",
                false,
            ),
            ("Name:\tx\nState:\tZ (zombie)\n", true),
            ("State:\tD (disk sleep)\nShdPnd:\t0000000000000100\n", true),
            ("State:\tR (running)\nSigPnd:\t0000000000000100\n", true),
            // SIGTERM: it may take its time, and is not dead.
            ("State:\tR (running)\nShdPnd:\t0000000000004000\n", false),
            ("Name:\tState: Z\nState:\tR (running)\n", false),
            ("State:\tS (sleeping)\nCoreDumping:\t1\n", true),
            ("State:\tS (sleeping)\nCoreDumping:\t0\n", false),
        ] {
            assert_eq!(is_killed(status), ending, "{status:?}");
        }
    }

    #[test]
    fn hidden_processes_are_not_taken_for_none() {
        let mounts =
            |options: &str| format!("dev /dev devtmpfs rw 0 0\nproc /proc proc {options} 0 0\n");
        for (options, hidden) in [
            ("rw,nosuid,relatime", false),
            ("rw,relatime,hidepid=invisible", true),
            ("rw,hidepid=2,gid=4", true),
            ("rw,hidepid=ptraceable", true),
            ("rw,hidepid=off", false),
            ("rw,hidepid=0", false),
        ] {
            assert_eq!(hides_processes(&mounts(options)), hidden, "{options}");
        }
        let over = mounts("rw,hidepid=2") + &mounts("rw");
        assert!(!hides_processes(&over));
        assert!(hides_processes("dev /dev devtmpfs rw 0 0\n"), "no /proc");
        let status = |set: &str| format!("Name:\tx\nCapInh:\t0000000000080000\nCapEff:\t{set}\n");
        assert!(may_look_at_all(&status("000001ffffffffff")));
        assert!(!may_look_at_all(&status("0000000000000000")));
        assert!(!may_look_at_all("Name:\tx\n"));
    }

    #[test]
    fn a_process_that_takes_itself_apart_is_ending() {
        for (stat, exiting) in [
            ("17 (x) R 1 17 17 0 -1 4194560 100 0", false),
            ("17 (x) R 1 17 17 0 -1 4194564 100 0", true),
            ("17 (a) S 4 4) D 1 17 17 0 -1 4194564 100 0", true),
            ("17 (a) S 4 4) S 4 4 4 4 4 4194560 4 4", false),
            ("", false),
        ] {
            assert_eq!(is_exiting(stat), exiting, "{stat:?}");
        }
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(!is_exiting(&own), "{own}");
        assert!(!ends(Path::new("/proc/self")));
    }

    #[test]
    fn our_own_other_descriptor_is_found_and_no_other_byte() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (file.reopen().unwrap(), Arc::new(file.reopen().unwrap()));
        let all_seen = matches!(find(&first, 100), Holder::Unknown { all_seen: true });
        let lock = ImageLock::new(second.clone(), file.path());
        lock.set(Access::Read).unwrap();
        assert_eq!(find(&first, 100), Holder::Own);
        assert_eq!(find(&first, 199), Holder::Unknown { all_seen });
        assert_eq!(find(&second, 100), Holder::Unknown { all_seen });
    }
}
