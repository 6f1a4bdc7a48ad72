//! Starting and stopping a back-end, and asking the kernel about it.

use super::Res;
use super::frontend::{Frontend, PATIENCE};
use super::qmp::Qmp;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The program to start, and what may be expected of it.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
}

impl Program {
    /// The daemon under test: `STRATABLK_DAEMON` if set, else the one that cargo has just built.
    pub fn under_test() -> Self {
        let built = env!("CARGO_BIN_EXE_stratablk");
        let path = std::env::var_os("STRATABLK_DAEMON").map_or_else(|| built.into(), PathBuf::from);
        Program { path }
    }

    /// The reference.
    pub fn reference() -> Self {
        Program {
            path: "qemu-storage-daemon".into(),
        }
    }

    /// True if this is the reference, some known faults of which the tests step around.
    pub fn is_reference(&self) -> bool {
        self.path
            .file_name()
            .is_some_and(|name| name == "qemu-storage-daemon")
    }

    /// The daemon under test with a library, made from a source of the repository, that is loaded
    /// before its own, and with these variables: a script in `dir`.
    pub fn with_library(source: &str, variables: &[(&str, &str)], dir: &Path) -> Res<Self> {
        let library = dir.join("preloaded.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let status = Command::new("cc")
            .args(["-O2", "-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .status()?;
        if !status.success() {
            let source = source.display();
            return Err(format!("cc {source}: {status}; contrib/setup installs it").into());
        }
        let variables: Vec<_> = variables
            .iter()
            .map(|(name, value)| format!("{name}='{value}'"))
            .collect();
        let path = dir.join("daemon");
        let script = format!(
            "#!/bin/sh\n{} LD_PRELOAD='{}' exec '{}' \"$@\"\n",
            variables.join(" "),
            library.display(),
            Self::under_test().path.display()
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { path })
    }
}

/// A running back-end. Dropping it kills it.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    reference: bool,
}

impl Daemon {
    /// Starts `program` with `args`; its standard error goes to a file in `dir`, and with `cpu` it
    /// stays on that CPU.
    pub fn start(program: &Program, args: &[String], dir: &Path, cpu: Option<usize>) -> Res<Self> {
        let log = dir.join("daemon.log");
        let stderr = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&program.path);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        // SAFETY: between fork and exec only two system calls are made, which touch no memory of
        // the parent.
        unsafe {
            command.pre_exec(move || {
                // A test that is killed must not leave its back-end behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match cpu {
                    Some(cpu) => pin_this_thread(cpu),
                    None => Ok(()),
                }
            });
        }
        let child = command
            .spawn()
            .map_err(|e| format!("{}: {e}", program.path.display()))?;
        let reference = program.is_reference();
        Ok(Daemon {
            child,
            log,
            reference,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to its standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Connects a front-end, as soon as the back-end listens on `socket`.
    pub fn connect(
        &mut self,
        socket: &Path,
        queues: usize,
        size: u16,
        memory: usize,
    ) -> Res<Frontend> {
        self.retry(|| Frontend::connect(socket, queues, size, memory))
    }

    /// Connects a front-end that outlives the back-end, as soon as this one listens. With `track`
    /// there is an inflight region.
    pub fn connect_tracked(
        &mut self,
        socket: &Path,
        queues: usize,
        size: u16,
        memory: usize,
        track: bool,
    ) -> Res<Frontend> {
        self.retry(|| Frontend::connect_tracked(socket, queues, size, memory, track))
    }

    /// Lets a front-end go on, as soon as the back-end listens on `socket`.
    pub fn reconnect(&mut self, frontend: &mut Frontend, socket: &Path) -> Res<()> {
        self.retry(|| frontend.reconnect(socket))
    }

    /// Connects to the control socket, as soon as the back-end listens there.
    ///
    /// The reference is tried again after a while: about once in a thousand starts its main loop
    /// misses a client that came while it began, and sleeps until something else happens.
    pub fn qmp(&mut self, socket: &Path) -> Res<Qmp> {
        let patience = if self.reference {
            PATIENCE / 6
        } else {
            PATIENCE
        };
        self.retry(|| Qmp::connect_within(socket, patience))
    }

    /// Does `step` again for as long as all that is wrong with it is that nobody listens yet, or
    /// that the daemon hangs up because it has not yet noticed that the last front-end is gone.
    pub fn retry<T>(&mut self, mut step: impl FnMut() -> Res<T>) -> Res<T> {
        let _watchdog = Watchdog::new(self.pid());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match step() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the back-end ended with {status}: {}", self.log()).into());
            }
            let again = is_too_early(&*error) || self.reference && is_timeout(&*error);
            if !again || Instant::now() > deadline {
                return Err(format!("{error}; the back-end says: {}", self.log()).into());
            }
            // A poll of a condition with a deadline: nothing depends on how long this takes.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// True while the process runs.
    pub fn alive(&mut self) -> Res<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Res<()> {
        // SAFETY: the child has not been waited for, so that its id is its own.
        if unsafe { libc::kill(self.child.id() as i32, signal) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// Kills it at once and waits for its end.
    pub fn kill(&mut self) -> Res<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends it by `signal` and waits for its end.
    pub fn end_by(&mut self, signal: i32) -> Res<ExitStatus> {
        self.signal(signal)?;
        self.wait_for_end()
    }

    /// Asks it to end with SIGTERM and waits; anything but exit code 0 is an error.
    pub fn stop(mut self) -> Res<()> {
        let status = self.terminate()?;
        if status.code() != Some(0) {
            let signal = status.signal();
            return Err(format!("ended with {status} ({signal:?}): {}", self.log()).into());
        }
        Ok(())
    }

    /// Asks it to end with SIGTERM and waits, however it ends. An error if it was gone before.
    pub fn terminate(&mut self) -> Res<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Err(format!("had ended before, with {status}: {}", self.log()).into());
        }
        self.signal(libc::SIGTERM)?;
        self.wait_for_end()
    }

    /// Waits for its end, however it ends.
    pub fn wait_for_end(&mut self) -> Res<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(
                    format!("did not end within a minute of SIGTERM: {}", self.log()).into(),
                );
            }
            // A poll of a condition with a deadline, as above.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// CPU time of the process so far, all threads and io_uring workers included.
    pub fn cpu_time(&self) -> Res<Duration> {
        cpu_time_of(self.pid())
    }

    /// Bytes that the process has written to disks past the page cache so far.
    pub fn bytes_written(&self) -> Res<u64> {
        let text = fs::read_to_string(format!("/proc/{}/io", self.pid()))?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes: "));
        Ok(value.ok_or("no write_bytes")?.parse()?)
    }

    /// How many descriptors the process has open.
    pub fn descriptors(&self) -> Res<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// How many pieces of other processes' shared memory it has mapped.
    pub fn shared_mappings(&self) -> Res<usize> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        Ok(maps.lines().filter(|line| line.contains("/memfd:")).count())
    }

    /// How many threads the process has, without the kernel's io_uring workers, which come and go.
    pub fn threads(&self) -> Res<usize> {
        let mut count = 0;
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let name = fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
            count += usize::from(!name.starts_with("iou-"));
        }
        Ok(count)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail if it has ended already, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a process that takes too long over something; dropping this calls it off. A handshake has
/// no time limit of its own, and must not hang the tests for ever.
struct Watchdog {
    _called_off: mpsc::Sender<()>,
}

impl Watchdog {
    /// The process must be a child that is not waited for in the meantime.
    fn new(pid: u32) -> Self {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                // SAFETY: a system call without memory; the child still has its id.
                unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            }
        });
        Watchdog {
            _called_off: sender,
        }
    }
}

fn is_too_early(error: &(dyn std::error::Error + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<io::Error>() else {
        return false;
    };
    match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => true,
        // What virtio-driver says when it reads the end of the stream.
        _ => error.to_string().contains("failed to receive"),
    }
}

/// What [`Qmp::connect_within`] says when its patience is over.
fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// CPU time of a process so far, all threads included.
pub fn cpu_time_of(pid: u32) -> Res<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces: count the fields from behind it.
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok());
    let (user, system) = field(11)
        .zip(field(12))
        .ok_or("a stat line that is too short")?;
    Ok(ticks(user + system))
}

/// The kernel's clock ticks as time.
pub fn ticks(count: u64) -> Duration {
    // SAFETY: asks for a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs_f64(count as f64 / per_second as f64)
}

/// Keeps the calling thread on one CPU.
pub fn pin_this_thread(cpu: usize) -> io::Result<()> {
    // SAFETY: the set is plain data that is initialised here, and its size is given with it.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What to export: a chain of image files from the top down, and how.
#[derive(Clone, Debug)]
pub struct Setup {
    /// (file, format) of each layer, the guest's first.
    pub layers: Vec<(PathBuf, &'static str)>,
    /// The front-end's socket.
    pub socket: PathBuf,
    /// The control socket, if one is wanted.
    pub qmp: Option<PathBuf>,
    /// Virtqueues.
    pub queues: usize,
    /// Whether guests may write.
    pub writable: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// `aio=` of the files, if any.
    pub aio: Option<&'static str>,
    /// Serve the export from a thread of its own.
    pub iothread: bool,
    /// How long that thread polls at most before it sleeps, in nanoseconds.
    pub poll_max_ns: Option<u32>,
    /// More words for the command line.
    pub extra: Vec<String>,
}

impl Setup {
    /// An export of `layers` with sockets in `dir`: writable, one queue, buffered, with QMP.
    pub fn new(dir: &Path, layers: &[(PathBuf, &'static str)]) -> Self {
        Setup {
            layers: layers.to_vec(),
            socket: dir.join("vhost.sock"),
            qmp: Some(dir.join("qmp.sock")),
            queues: 1,
            writable: true,
            direct: false,
            aio: None,
            iothread: false,
            poll_max_ns: None,
            extra: Vec::new(),
        }
    }

    /// The node name of layer `i`, 0 being the guest's.
    pub fn node(i: usize) -> String {
        format!("layer{i}")
    }

    /// The command line, in the words of qemu-storage-daemon. Layers below the first are named
    /// explicitly, so that they too get the cache and aio options.
    pub fn args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut option = |name: &str, value: String| {
            args.push(name.to_owned());
            args.push(value);
        };
        for (i, (path, format)) in self.layers.iter().enumerate().rev() {
            let mut file = format!("driver=file,node-name=file{i},filename={}", path.display());
            let mut node = format!("driver={format},node-name={},file=file{i}", Self::node(i));
            if self.direct {
                file.push_str(",cache.direct=on");
            }
            if let Some(aio) = self.aio {
                file.push_str(&format!(",aio={aio}"));
            }
            if i == 0 && self.writable {
                file.push_str(",discard=unmap");
                node.push_str(",discard=unmap");
            } else {
                // A lower layer opens for reading and is reopened if a job must write to it.
                let mode = if self.writable {
                    ",auto-read-only=on"
                } else {
                    ""
                };
                file.push_str(&format!(",read-only=on{mode}"));
                node.push_str(",read-only=on");
            }
            if i + 1 < self.layers.len() {
                node.push_str(&format!(",backing={}", Self::node(i + 1)));
            }
            option("--blockdev", file);
            option("--blockdev", node);
        }
        let mut export = format!(
            "type=vhost-user-blk,id=disk,node-name={},addr.type=unix,addr.path={},num-queues={}",
            Self::node(0),
            self.socket.display(),
            self.queues,
        );
        export.push_str(if self.writable {
            ",writable=on"
        } else {
            ",writable=off"
        });
        if self.iothread {
            let poll = self.poll_max_ns.map(|ns| format!(",poll-max-ns={ns}"));
            let object = format!("iothread,id=worker{}", poll.unwrap_or_default());
            option("--object", object);
            export.push_str(",iothread=worker");
        }
        option("--export", export);
        if let Some(qmp) = &self.qmp {
            let chardev = format!(
                "socket,id=control,path={},server=on,wait=off",
                qmp.display()
            );
            option("--chardev", chardev);
            option("--monitor", "chardev=control".to_owned());
        }
        args.extend(self.extra.iter().cloned());
        args
    }

    /// Starts the back-end, removing the sockets that an earlier one may have left.
    pub fn start(&self, program: &Program, dir: &Path, cpu: Option<usize>) -> Res<Daemon> {
        for socket in [Some(&self.socket), self.qmp.as_ref()]
            .into_iter()
            .flatten()
        {
            match fs::remove_file(socket) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
        Daemon::start(program, &self.args(), dir, cpu)
    }
}
