//! The control sockets of the configuration.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use parking_lot::Mutex;

use super::{Call, during, stdio};
use crate::config::Config;
use crate::control::{Control, Endpoint, EventHub, Server};
use crate::engine::serving::inherited;
use crate::error::Result;
use crate::options::{ChardevOptions, SocketAddress};

/// How long the reader of standard output may take for the last answers.
const STDIO_TIMEOUT: Duration = Duration::from_secs(2);

/// The running control sockets.
pub struct Monitors {
    server: Mutex<Server>,
    /// How many of them are to have a client before the start is over.
    awaited: usize,
    /// Told when all has been written to standard output, if that is one of them.
    written: Mutex<Option<Receiver<()>>>,
}

impl Monitors {
    /// Serves all monitors of `config`. Of clients that are to be waited for `calls` is told.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn start(
        config: &Config,
        control: Arc<Control>,
        hub: Arc<EventHub>,
        calls: &Sender<Call>,
    ) -> Result<Self> {
        let failed = |error| during("starting the control sockets", &error);
        let mut server = Server::start(Vec::new(), control, hub).map_err(failed)?;
        let (mut awaited, mut written) = (0, None);
        // All are there before any has a client.
        let sockets = config.monitor_sockets();
        let endpoints = sockets
            .map(|(_, chardev)| Ok((endpoint(chardev, &mut written)?, chardev)))
            .collect::<Result<Vec<_>>>()?;
        for (endpoint, chardev) in endpoints {
            if !(chardev.server && chardev.wait) {
                server.add(endpoint).map_err(failed)?;
                continue;
            }
            eprintln!(
                "stratablk: chardev '{}': waiting for a client on {}",
                chardev.id,
                place(chardev)
            );
            let calls = calls.clone();
            let arrived = move || {
                // When nobody listens any more, the daemon is ending already.
                let _ = calls.send(Call::Client);
            };
            server.add_awaited(endpoint, arrived).map_err(failed)?;
            awaited += 1;
        }
        Ok(Self {
            server: Mutex::new(server),
            awaited,
            written: Mutex::new(written),
        })
    }

    /// Waits for the clients that are to be waited for. False when the daemon is to end.
    pub fn wait_for_clients(&self, calls: &Receiver<Call>) -> bool {
        (0..self.awaited).all(|_| calls.recv() == Ok(Call::Client))
    }

    /// Gives clients their last answers and events, and hangs up.
    pub fn shut_down(&self) {
        self.server.lock().stop();
        if let Some(written) = self.written.lock().take() {
            // Nobody may be reading it.
            let _ = written.recv_timeout(STDIO_TIMEOUT);
        }
    }
}

fn place(chardev: &ChardevOptions) -> String {
    let addr = chardev.addr.as_ref();
    addr.map_or_else(|| "stdio".to_owned(), ToString::to_string)
}

fn endpoint(chardev: &ChardevOptions, written: &mut Option<Receiver<()>>) -> Result<Endpoint> {
    let failed = |error| {
        during(
            &format!("chardev '{}' ({})", chardev.id, place(chardev)),
            &error,
        )
    };
    let Some(addr) = &chardev.addr else {
        let (endpoint, told) = stdio::endpoint().map_err(failed)?;
        *written = Some(told);
        return Ok(endpoint);
    };
    match addr {
        SocketAddress::Unix(path) if chardev.server => Endpoint::bind(path).map_err(failed),
        SocketAddress::Unix(path) => Endpoint::connect(path).map_err(failed),
        SocketAddress::Fd(fd) => {
            let fd: OwnedFd = inherited(*fd)?;
            Ok(Endpoint::from_fd(fd))
        }
    }
}
