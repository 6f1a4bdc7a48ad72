//! The control sockets of the configuration.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use parking_lot::Mutex;

use super::{Call, during, inherited};
use crate::config::Config;
use crate::control::{Control, Endpoint, EventHub, Server};
use crate::error::Result;
use crate::options::{ChardevOptions, SocketAddress};

/// The running control sockets.
pub struct Monitors {
    server: Mutex<Server>,
    /// How many of them are to have a client before the start is over.
    awaited: usize,
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
        let mut awaited = 0;
        // All are there before any has a client.
        let sockets = config.monitor_sockets();
        let endpoints = sockets
            .map(|(_, chardev)| Ok((endpoint(chardev)?, chardev)))
            .collect::<Result<Vec<_>>>()?;
        for (endpoint, chardev) in endpoints {
            if !(chardev.server && chardev.wait) {
                server.add(endpoint).map_err(failed)?;
                continue;
            }
            eprintln!(
                "stratablk: chardev '{}': waiting for a client on {}",
                chardev.id, chardev.addr
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
        })
    }

    /// Waits for the clients that are to be waited for. False when the daemon is to end.
    pub fn wait_for_clients(&self, calls: &Receiver<Call>) -> bool {
        (0..self.awaited).all(|_| calls.recv() == Ok(Call::Client))
    }

    /// Gives clients their last answers and events, and hangs up.
    pub fn shut_down(&self) {
        self.server.lock().stop();
    }
}

fn endpoint(chardev: &ChardevOptions) -> Result<Endpoint> {
    let failed = |error| {
        during(
            &format!("chardev '{}' ({})", chardev.id, chardev.addr),
            &error,
        )
    };
    match &chardev.addr {
        SocketAddress::Unix(path) if chardev.server => Endpoint::bind(path).map_err(failed),
        SocketAddress::Unix(path) => Endpoint::connect(path).map_err(failed),
        SocketAddress::Fd(fd) => {
            let fd: OwnedFd = inherited(*fd)?;
            Ok(Endpoint::from_fd(fd))
        }
    }
}
