//! The daemon as a process: the background, the pid file, its limits.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sched;

/// Lets a panic of any thread end the process, after its message: a crash, from which inflight regions,
/// journals and a supervisor recover. Without that thread its device would never answer, and what it
/// had half changed would be flushed by others.
pub fn abort_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
}

/// What the process in the background reports to the one in the foreground.
#[derive(Debug)]
pub struct Foreground {
    pipe: std::fs::File,
}

impl Foreground {
    /// Says that everything is set up: the process in the foreground ends with success.
    pub fn ready(mut self) {
        if let Err(error) = self.pipe.write_all(b"1") {
            log::debug!("telling the foreground: {error}");
        }
        redirect_standard_streams();
    }
}

/// Goes to the background. The process in the foreground waits until the one in the background
/// is ready, or has failed, and ends.
///
/// # Errors
/// What `pipe(2)`, `fork(2)` or `setsid(2)` report.
pub fn daemonize() -> io::Result<Foreground> {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new descriptors that nobody else owns.
    let (reader, writer) =
        unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: called at the very start, before any thread is made.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: no memory is passed.
            if unsafe { libc::setsid() } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Foreground {
                pipe: writer.into(),
            })
        }
        _ => {
            drop(writer);
            let mut answer = [0; 1];
            let ready = std::fs::File::from(reader).read_exact(&mut answer).is_ok();
            std::process::exit(i32::from(!ready));
        }
    }
}

fn redirect_standard_streams() {
    let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    else {
        return;
    };
    for stream in 0..3 {
        // SAFETY: no memory is passed; the standard streams belong to the process.
        unsafe { libc::dup2(null.as_raw_fd(), stream) };
    }
}

/// How much the threads of jobs step back: they get a little less than a guest's thread where
/// both want the same processor.
const JOB_NICE: i32 = 1;

/// How long they want to run at a time: the least there is, since a job that yields after a piece
/// loses the rest of it.
const JOB_SLICE: Duration = Duration::from_micros(100);

/// Lets the threads that serve guests have more where there is one processor for both.
pub fn step_back() {
    if let Err(error) = sched::set(sched::nice() + JOB_NICE, JOB_SLICE) {
        log::debug!("priority of a job: {error}");
    }
}

/// A file with the process's number; it goes when this is dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Writes the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(path: &Path) -> io::Result<Self> {
        std::fs::write(path, format!("{}\n", std::process::id()))?;
        let path = std::path::absolute(path)?;
        Ok(Self { path })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // The next daemon may have begun by now, and written its own.
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        if text.trim() != std::process::id().to_string() {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("removing '{}': {error}", self.path.display());
        }
    }
}

/// Lets the process have as many descriptors as it may: each queue of each export has some, and a
/// service manager's usual soft limit is there for programs that use select(2).
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes one rlimit.
    let mut result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if result == 0 && limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the call reads one rlimit.
        result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
    if result < 0 {
        let error = io::Error::last_os_error();
        log::warn!("raising the limit of open files: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Would catch a thread that panics and leaves a process behind which looks as if it served.
    #[test]
    #[allow(clippy::panic)]
    fn a_panic_of_any_thread_ends_the_process() {
        const CHILD: &str = "STRATABLK_TEST_PANIC";
        if std::env::var_os(CHILD).is_some() {
            abort_on_panic();
            let thread = std::thread::spawn(|| panic!("of a thread"));
            let _ = thread.join();
            return;
        }
        let name = "daemon::process::tests::a_panic_of_any_thread_ends_the_process";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGABRT));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("of a thread"), "{text}");
    }
}
