//! The control sockets of the configuration.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{during, inherited};
use crate::config::{ChardevOptions, Config, SocketAddress};
use crate::control::{Control, Endpoint, EventHub, Server};
use crate::error::Result;

/// The running control sockets.
pub struct Monitors {
    server: Mutex<Server>,
}

impl Monitors {
    /// Serves all monitors of `config`, and waits for a client where one is to be waited for.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn start(config: &Config, control: Arc<Control>, hub: Arc<EventHub>) -> Result<Self> {
        let endpoints = config
            .monitor_sockets()
            .map(|(_, chardev)| endpoint(chardev))
            .collect::<Result<Vec<_>>>()?;
        let server = Server::start(endpoints, control, hub)
            .map_err(|error| during("starting the control sockets", &error))?;
        if config
            .monitor_sockets()
            .any(|(_, chardev)| chardev.server && chardev.wait)
        {
            server.wait_for_client(None);
        }
        Ok(Self {
            server: Mutex::new(server),
        })
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
