//! `qemu-storage-daemon` as a server of disks, and a client of NBD that is small enough to trust.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long to wait for something that takes milliseconds before calling it lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `qemu-storage-daemon`. Dropping it kills it.
pub struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Serves the disks of `nodes`, each under the name of its node.
    pub fn start(dir: &Path, nodes: &[Value]) -> Self {
        let (socket, log) = (dir.join("nbd"), dir.join("log"));
        let mut command = Command::new("qemu-storage-daemon");
        for node in nodes {
            command.arg("--blockdev").arg(node.to_string());
        }
        let path = socket.to_str().unwrap();
        command.arg("--nbd-server");
        command.arg(format!("addr.type=unix,addr.path={path}"));
        for node in nodes {
            let name = node["node-name"].as_str().unwrap();
            command.arg("--export").arg(format!(
                "nbd,id=e-{name},node-name={name},name={name},writable=on"
            ));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).unwrap());
        // SAFETY: between fork and exec one system call is made, which touches no memory. A test
        // that is killed must not leave the server behind.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("qemu-storage-daemon: {e}; contrib/setup installs it"));
        Self { child, socket, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A client of the disk `name`, as soon as the server listens.
    pub fn connect(&mut self, name: &str) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                let client = Client::negotiate(stream, name);
                return client.unwrap_or_else(|e| panic!("{name}: {e}: {}", self.log()));
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("qemu-storage-daemon: {status}: {}", self.log());
            }
            assert!(Instant::now() < deadline, "it never listens");
            // A poll of a condition with a deadline: nothing depends on how long this takes.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends it; its images are closed.
    pub fn stop(mut self) {
        // SAFETY: the child has not been waited for, so that its id is its own.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}: {}", self.log());
                return;
            }
            assert!(Instant::now() < deadline, "it never ends");
            // As above.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail if it has ended already, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a client asks for; the numbers are those of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    Zero = 6,
}

/// That zeros are to be written, and no holes made.
const NO_HOLE: u16 = 1 << 1;

/// A client of one disk, which asks for one thing at a time.
pub struct Client {
    stream: UnixStream,
    size: u64,
}

impl Client {
    /// The old way to choose an export: by its name, and nothing else is asked for.
    fn negotiate(mut stream: UnixStream, name: &str) -> std::io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = Vec::new();
        // Fixed newstyle, and no zeros after the answer.
        hello.extend(3u32.to_be_bytes());
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name.as_bytes());
        stream.write_all(&hello)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        let size = u64::from_be_bytes(*answer.first_chunk().unwrap());
        Ok(Self { stream, size })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn send(&mut self, kind: Kind, flags: u16, offset: u64, len: usize, data: &[u8]) {
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(0x2560_9513_u32.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend((kind as u16).to_be_bytes());
        request.extend(7u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend((len as u32).to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).unwrap();
    }

    fn ask(&mut self, kind: Kind, flags: u16, offset: u64, len: usize, data: &[u8]) {
        self.send(kind, flags, offset, len, data);
        let mut answer = [0; 16];
        self.stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer[..4], &0x6744_6698_u32.to_be_bytes());
        let errno = u32::from_be_bytes(*answer[4..].first_chunk().unwrap());
        assert_eq!(errno, 0, "{kind:?} of {len} bytes at {offset}");
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.ask(Kind::Read, 0, offset, len, &[]);
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.ask(Kind::Write, 0, offset, bytes.len(), bytes);
    }

    pub fn zero(&mut self, offset: u64, len: usize, unmap: bool) {
        let flags = if unmap { 0 } else { NO_HOLE };
        self.ask(Kind::Zero, flags, offset, len, &[]);
    }

    pub fn discard(&mut self, offset: u64, len: usize) {
        self.ask(Kind::Trim, 0, offset, len, &[]);
    }

    pub fn flush(&mut self) {
        self.ask(Kind::Flush, 0, 0, 0, &[]);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // There is no answer to it.
        if !std::thread::panicking() {
            self.send(Kind::Disconnect, 0, 0, 0, &[]);
        }
    }
}
