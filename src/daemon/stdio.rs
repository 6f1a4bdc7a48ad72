//! A control client on standard input and output: `--chardev stdio`.
//!
//! The control server knows sockets, so that two threads carry bytes between one and the two streams.
//! The end of the input is the client's end, and not the daemon's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use crate::control::Endpoint;

/// The client, and what is told when all that it is sent has been written.
///
/// # Errors
/// When a descriptor or a thread cannot be had.
pub fn endpoint() -> io::Result<(Endpoint, Receiver<()>)> {
    let (ours, theirs) = UnixStream::pair()?;
    // Without the standard library's buffers: an answer is out when it is written.
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let (to_server, from_server) = (ours.try_clone()?, ours);
    spawn("stdio-in", move || {
        carry(input, &to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    })?;
    let (tell, written) = channel();
    spawn("stdio-out", move || {
        carry(&from_server, output);
        // The daemon may have ended without this.
        let _ = tell.send(());
    })?;
    Ok((Endpoint::from_fd(theirs.into()), written))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.into());
    thread.spawn(work).map(drop)
}

/// Carries bytes until one side ends.
fn carry(mut from: impl Read, mut to: impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if to.write_all(bytes).is_err() {
            return;
        }
    }
}
