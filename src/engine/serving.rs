//! Making exports and ending them, at the start and while the daemon runs.
//!
//! What an export needs is taken in this order: its name, its fence, its node with the image open to
//! be written, its queues and its socket. It is given back the other way round, on a thread of
//! its own: the requests that a guest has made may take long to end, and so may a flush.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use serde_json::json;

use super::objects::poll_max_us;
use super::runtime::{Change, Runtime};
use super::stream::no_such_device;
use super::{Engine, Served, neighbours, nodes::refused, on_this_thread};
use crate::error::{Error, Result};
use crate::export::{Export, ExportConfig, SocketSource};
use crate::format::Format;
use crate::graph::{FilterKind, Grant, Graph, Holder, Request, busy};
use crate::job::records::identity;
use crate::job::{Event, Refused};
use crate::options::{DetectZeroes, ExportOptions, IothreadOptions, SocketAddress};
use crate::planted::{Fault, is_planted};

/// How long the answer to a removal waits for its end. What takes longer is told by the event.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts an export whose node has been granted to it.
///
/// # Errors
/// When the node is gone, or the export cannot be made.
pub fn start(options: &ExportOptions, graph: &Graph, runtime: &Runtime) -> Result<Export> {
    let thread = options.iothread.as_deref().map(|id| {
        let thread = runtime.objects.want(id);
        thread.ok_or_else(|| Error::Invalid(format!("iothread \"{id}\" not found")))
    });
    let thread = thread.transpose()?;
    let thread = thread.as_ref().map(|thread| thread.thread());
    start_with(options, graph, runtime, thread)
}

fn start_with(
    options: &ExportOptions,
    graph: &Graph,
    runtime: &Runtime,
    thread: Option<&IothreadOptions>,
) -> Result<Export> {
    let root = graph.root(&options.node_name)?;
    // What the disk cannot write by itself the guest must not ask for.
    let block = root.chain().top().storage.limits().offset_align;
    let logical_block_size = options
        .logical_block_size
        .max(u32::try_from(block).unwrap_or(512));
    let mut export = ExportConfig::new(options.id.clone(), socket_source(&options.addr)?);
    export.queues = options.num_queues;
    export.writable = options.writable;
    export.serial.clone_from(&options.serial);
    export.logical_block_size = logical_block_size;
    export.write_cache = !options.writethrough;
    export.on_failure = Some(runtime.incidents.of_export(&options.id, &root));
    export.detect_zeroes = match graph.node(&options.node_name)?.options.detect_zeroes {
        DetectZeroes::Off => None,
        DetectZeroes::On => Some(false),
        DetectZeroes::Unmap => Some(true),
    };
    if let Some(thread) = thread {
        export.poll_max_us = poll_max_us(thread);
    }
    Export::start(export, root)
}

fn socket_source(address: &SocketAddress) -> Result<SocketSource> {
    Ok(match address {
        SocketAddress::Unix(path) => SocketSource::Path(path.clone()),
        SocketAddress::Fd(fd) => {
            let fd = inherited(*fd)?;
            if is_listening(&fd) {
                SocketSource::ListenFd(fd)
            } else {
                SocketSource::ConnectedFd(fd)
            }
        }
    })
}

/// A descriptor that the process was started with.
///
/// # Errors
/// When it is none.
pub fn inherited(fd: i32) -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(Error::Invalid(format!(
            "file descriptor {fd} is not an open socket"
        )));
    }
    // SAFETY: it is open, and the user has given it to this option alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn is_listening(fd: &OwnedFd) -> bool {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call writes one int and its length.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    result == 0 && value != 0
}

/// Says that an export's image does without a journal, if it does.
pub fn warn_without_journal(graph: &Graph, options: &ExportOptions) {
    let node = graph.node(&options.node_name);
    let has_mapping = node.is_ok_and(|node| matches!(node.layer.format, Format::Qcow2(_)));
    if options.writable && has_mapping && !graph.has_journals() {
        log::warn!(
            "export '{}': without --journal, writes to qcow2 images that a guest has not flushed \
             are lost if this process is killed",
            options.id
        );
    }
}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Not while a front-end is connected.
    Safe,
    /// In any case: a front-end that is connected is hung up on.
    Hard,
}

impl Engine {
    /// Adds an export. Front-ends may connect when this returns.
    ///
    /// # Errors
    /// In QEMU's words where it has some. Everything is as before then.
    pub fn add_export(&self, options: &ExportOptions) -> std::result::Result<(), Refused> {
        // Held until the export is listed, or all that it had has been given back.
        let _name = self.exports.claim(&options.id)?;
        let filter = self.graph.filter(&options.node_name);
        let is_read = filter.is_some_and(|filter| filter.kind == FilterKind::Commit);
        let options = &ExportOptions {
            node_name: self.graph.meant_by(&options.node_name),
            ..options.clone()
        };
        let thread = options.iothread.as_deref().map(|id| {
            let thread = self.runtime.objects.want(id);
            thread.ok_or_else(|| Refused(format!("iothread \"{id}\" not found")))
        });
        let thread = thread.transpose()?;
        let node = &options.node_name;
        let unknown = |_| no_such_device("", node);
        let fixed = is_read
            || self.graph.node(node).map_err(unknown)?.fixed_read_only
            || self
                .graph
                .image_node(node)
                .map_err(unknown)?
                .fixed_read_only;
        if options.writable && fixed {
            return Err(Refused("Cannot export read-only node as writable".into()));
        }
        if self.store.is_some() && options.node_name.starts_with('#') {
            return Err(Refused(format!(
                "node '{}' has no name of a client's, and the next process may call another one so: \
                 with --state, an export needs a node that it finds again",
                options.node_name
            )));
        }
        if let SocketAddress::Fd(_) = options.addr {
            // Any number may be a descriptor of our own.
            return Err(Refused("only QEMU supports file descriptor passing".into()));
        }
        let (state, store) = (self.runtime.state.as_ref(), self.store.as_ref());
        let list = std::slice::from_ref(options);
        neighbours::check(list, state, &self.graph, store).map_err(refused)?;
        if !is_planted(Fault::NoFence) {
            self.runtime.fences.take(options).map_err(refused)?;
        }
        let thread_options = thread.as_ref().map(|thread| thread.thread());
        let made = self.make(options, thread_options).inspect_err(|_| {
            self.runtime.fences.give_back(&options.id);
        });
        let (export, grant) = made.map_err(refused)?;
        warn_without_journal(&self.graph, options);
        let served = Served::new(export, options.clone(), grant);
        let changing = self.runtime.change();
        let added = self.record_served(options);
        let added = added.and_then(|()| {
            self.exports.put(&served).inspect_err(|_| {
                // The process ends, and the next one is not to have it.
                if let Err(error) = self.record(&[Change::RemoveExport(&options.id)]) {
                    log::error!("export '{}', which was refused: {error}", options.id);
                }
            })
        });
        drop(changing);
        added.inspect_err(|_| self.end(&served))
    }

    /// Records an export that has been made, and that its guest is where a client has put it.
    fn record_served(&self, options: &ExportOptions) -> std::result::Result<(), Refused> {
        let image = self.graph.image_node(&options.node_name).map_err(refused)?;
        let file = self.graph.file_of(&image).map_err(refused)?;
        let image = (file.as_str(), identity(&image));
        self.record(&[Change::AddExport(options), Change::Serve(options, image)])
    }

    fn make(
        &self,
        options: &ExportOptions,
        thread: Option<&IothreadOptions>,
    ) -> Result<(Export, Grant)> {
        on_this_thread(|reactor| {
            let holder = Holder::Export(options.id.clone());
            let request = Request::disk(holder, &options.node_name, options.writable);
            let grant = reactor.block_on(self.graph.access(request))?;
            let started = self
                .check_covering(options)
                .and_then(|()| start_with(options, &self.graph, &self.runtime, thread));
            match started {
                Ok(export) => Ok((export, grant)),
                Err(error) => {
                    if let Err(error) = reactor.block_on(grant.give_back()) {
                        log::error!("{error}");
                    }
                    Err(error)
                }
            }
        })
    }

    /// Refuses an export of a disk that a snapshot is about to cover: its guest would stay below. A
    /// snapshot that comes later finds the grant that is there before this.
    fn check_covering(&self, options: &ExportOptions) -> Result<()> {
        let image = self.graph.image_node(&options.node_name)?.name;
        match self.graph.reserved_by(&image) {
            Some(kind @ "snapshot") if options.writable => Err(Error::Invalid(busy(&image, kind))),
            _ => Ok(()),
        }
    }

    /// Removes an export. What it has still to do is done on a thread of its own; when all is
    /// done, `BLOCK_EXPORT_DELETED` is told. Where that is soon, this returns after it.
    ///
    /// # Errors
    /// In QEMU's words: there is none of this name, it is on its way out, or a front-end is
    /// connected. Nothing has changed then.
    pub fn remove_export(
        self: &std::sync::Arc<Self>,
        id: &str,
        how: Removal,
    ) -> std::result::Result<(), Refused> {
        let found = self.exports.find(id);
        let served = found.ok_or_else(|| Refused(format!("Export '{id}' is not found")))?;
        if !served.begin_to_end() {
            return Err(Refused(format!("Export '{id}' is already shutting down")));
        }
        if let Err(error) = self.close_export(&served, how) {
            served.goes_on();
            return Err(error);
        }
        let (engine, ending) = (self.clone(), served.clone());
        let thread = std::thread::Builder::new().name("export-end".into());
        match thread.spawn(move || engine.end(&ending)) {
            Ok(_) => served.wait_for_end(Some(PATIENCE)),
            Err(error) => {
                log::warn!("a thread for the end of export '{id}': {error}");
                self.end(&served);
            }
        }
        Ok(())
    }

    /// Lets no front-end in any more, and records that the export is gone.
    fn close_export(&self, served: &Served, how: Removal) -> std::result::Result<(), Refused> {
        let id = served.options.id.as_str();
        let in_use = || Err(Refused(format!("export '{id}' still in use")));
        if how == Removal::Safe && served.export.has_front_end() {
            return in_use();
        }
        let _changing = self.runtime.change();
        let before = self.store.as_ref().map(|store| store.state().changes);
        self.record(&[Change::RemoveExport(id)])?;
        if how == Removal::Hard {
            served.export.close();
        } else if !served.export.close_unless_connected() {
            // It has come in the meantime.
            if let (Some(store), Some(before)) = (&self.store, before)
                && let Err(error) = store.happened(|state| state.changes = before)
            {
                log::error!("export '{id}', which goes on, is not recorded yet: {error}");
            }
            return in_use();
        }
        Ok(())
    }

    /// Ends an export that lets no front-end in, gives back what it holds, and tells of it.
    fn end(&self, served: &Served) {
        served.export.shutdown();
        if let Some(grant) = served.take_grant() {
            let given = on_this_thread(|reactor| reactor.block_on(grant.give_back()));
            if let Err(error) = given {
                log::error!("export '{}', at its end: {error}", served.options.id);
            }
        }
        // An image that no client has named was there for this guest.
        let mut transaction = self.graph.transaction();
        transaction.sweep();
        match self.graph.commit(transaction) {
            Ok(released) => drop(released),
            Err(error) => log::error!("export '{}', at its end: {error}", served.options.id),
        }
        self.runtime.fences.give_back(&served.options.id);
        let listed = self.exports.ended(served);
        if listed {
            (self.runtime.events)(Event {
                name: "BLOCK_EXPORT_DELETED",
                data: json!({"id": served.options.id}),
            });
        }
        served.has_ended();
    }
}
