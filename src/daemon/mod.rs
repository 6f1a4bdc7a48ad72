//! The daemon: puts the parts together as the configuration says, and takes them apart again.
//!
//! Set-up begins when the daemon before this one is gone (`fence`), and goes from the bottom to the
//! top: nodes, exports, monitors. At the end each job, each export with all its requests, and the
//! monitors, when clients have heard of the jobs, end side by side, and each image is closed clean
//! when its users have ended (`ending`, `parts`).

mod fence;
mod logging;
mod monitors;
mod process;
mod stdio;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use parking_lot::{Condvar, Mutex};

use crate::config::Config;
use crate::control::{Control, EventHub};
use crate::engine::stream::on_graph;
use crate::engine::sync_errors::Watch;
use crate::engine::{
    self, Engine, Exports, Runtime, Served, Setup, control_thread, ending, neighbours,
    nodes_at_start, parts, serving, state,
};
use crate::error::{Error, Result};
use crate::format::qcow2::journal::Folder;
use crate::graph::{Graph, Holder, Request};
use crate::job::{JobMain, JobRunner, Ledger, Manager, SystemClock, Timer};
use crate::options::ExportOptions;
use crate::reactor::Reactor;
use crate::state::Store;

use fence::Fences;
use monitors::Monitors;
pub use process::abort_on_panic;
use process::{Foreground, PidFile};

/// What the main thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The order to end.
    Stop,
    /// A control socket that was waited for has its first client.
    Client,
}

/// Runs the daemon until it is told to end. Returns the process's exit code.
#[must_use]
pub fn run(config: &Config) -> u8 {
    let began = Instant::now();
    logging::start(!config.trace.is_empty());
    process::raise_descriptor_limit();
    match serve(config, began) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("stratablk: {error}");
            1
        }
    }
}

fn serve(config: &Config, began: Instant) -> Result<()> {
    // When it has not been told by then, it hears of a failure with the end of this.
    let mut foreground = match config.daemonize {
        true => Some(process::daemonize().map_err(|e| during("going to the background", &e))?),
        false => None,
    };
    let (stop, stopped) = channel();
    let starting = Arc::new(Starting::default());
    let patience = config
        .stop_timeout
        .unwrap_or(START_TIMEOUT)
        .min(START_TIMEOUT);
    watch_signals(&stop, &starting, patience)?;
    let mut setup = state::expected(config.state.as_ref(), &named(config));
    // Before anything is opened, and before the first ring is made.
    let fences = fence::hold(
        &setup.exports,
        config
            .state
            .as_ref()
            .map(|state| state.dir.join(&state.name))
            .as_deref(),
        config.fence_timeout,
        &stopped,
    )?;
    let Some(fences) = fences.map(Arc::new) else {
        return Ok(());
    };
    let reactor = Reactor::for_this_thread().map_err(|e| during("starting", &e))?;
    let graph = Arc::new(Graph::default());
    control_thread::start(&graph)?;
    let exports = Arc::new(Exports::default());
    // Before the first image is opened: whatever fails from then on is to be recorded.
    let watched = state::open(config.state.as_ref()).and_then(|store| {
        let held = std::mem::take(&mut setup.exports);
        setup = state::setup(store.as_ref(), &named(config))?;
        // What the process before this one has still changed at its end.
        for gone in held.iter().filter(|export| !setup.exports.contains(export)) {
            engine::Fences::give_back(&*fences, &gone.id);
        }
        let mut more = setup.exports.iter().filter(|export| !held.contains(export));
        more.try_for_each(|export| engine::Fences::take(&*fences, export))?;
        let watch = Watch::start(&graph, &exports, store.clone())?;
        Ok((store, watch))
    });
    let (result, watch) = match watched {
        Ok((store, watch)) => (
            set_up(
                config,
                &reactor,
                &graph,
                &exports,
                (&stop, &starting),
                (store, &watch),
                (setup, fences.clone()),
            ),
            Some(watch),
        ),
        Err(error) => (Err(error), None),
    };
    starting.has_ended();
    let (result, running) = match result {
        Ok(running) => {
            log::info!(
                "serving after {} ms, of which fence {} ms",
                began.elapsed().as_millis(),
                fences.waited.as_millis()
            );
            (
                wait(config, &running, &mut foreground, &stopped),
                Some(running),
            )
        }
        Err(error) => (Err(error), None),
    };
    let (result, pid_file) = match result {
        Ok(pid_file) => (Ok(()), pid_file),
        Err(error) => (Err(error), None),
    };
    fences.say_that_it_ends();
    let patience = ending::Patience::within(config.stop_timeout);
    let jobs = running.as_ref().map(|running| running.manager.clone());
    let sockets = running.map(|running| -> Box<dyn FnMut() + Send> {
        Box::new(move || running.monitors.shut_down())
    });
    let began = Instant::now();
    let ended = ending::end(
        parts::of(&graph, &exports, jobs.as_deref(), sockets),
        patience,
    );
    if let Some(watch) = watch {
        watch.finish(patience.left(began.elapsed()));
    }
    if ended.is_err() {
        // Whatever would be dropped here would be waited for.
        std::mem::forget((graph, exports, jobs));
    } else {
        drop((graph, exports, jobs));
        if reactor.is_last_and_idle() {
            fences.give_back();
        }
    }
    // Who waits for the file to go wants the images and the sockets.
    drop(pid_file);
    match (result, ended) {
        (Err(first), Err(last)) => Err(Error::Invalid(format!("{first}; at the end: {last}"))),
        (result, ended) => result.and(ended),
    }
}

/// What the command line names.
fn named(config: &Config) -> Setup {
    Setup {
        objects: config.objects.clone(),
        nodes: config.blockdevs.clone(),
        exports: config.exports.clone(),
    }
}

fn during(what: &str, error: &std::io::Error) -> Error {
    Error::Invalid(format!("{what}: {error}"))
}

/// How long a start may go on that was told to end: an image may be on storage that does not answer.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the daemon is still starting, and has served nobody.
#[derive(Default)]
struct Starting {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Starting {
    fn has_ended(&self) {
        *self.ended.lock() = true;
        self.changed.notify_all();
    }

    /// Waits for the end of the start. False: it has not come in this time.
    fn wait(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut ended = self.ended.lock();
        while !*ended && !self.changed.wait_until(&mut ended, deadline).timed_out() {}
        *ended
    }
}

/// SIGTERM, SIGINT and SIGHUP end the daemon in good order. A start that hangs is ended as a kill
/// would end it: nobody has been served yet, and what was begun is what a kill may leave.
fn watch_signals(stop: &Sender<Call>, starting: &Arc<Starting>, patience: Duration) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| during("watching for signals", &error))?;
    let (stop, starting) = (stop.clone(), starting.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if stop.send(Call::Stop).is_err() {
                    return;
                }
                if !starting.wait(patience) {
                    eprintln!(
                        "stratablk: told to end while starting, which has not come to an end \
                         within {} s: storage does not answer",
                        patience.as_secs_f32()
                    );
                    // SAFETY: ends the process, whatever its other threads are at.
                    unsafe { libc::_exit(1) };
                }
            }
        })
        .map_err(|error| during("watching for signals", &error))?;
    Ok(())
}

/// What runs beside the exports.
struct Running {
    manager: Arc<Manager>,
    monitors: Monitors,
}

fn set_up(
    config: &Config,
    reactor: &Reactor,
    graph: &Arc<Graph>,
    exports: &Arc<Exports>,
    (stop, starting): (&Sender<Call>, &Starting),
    (store, watch): (Option<Arc<Store>>, &Watch),
    (setup, fences): (Setup, Arc<Fences>),
) -> Result<Running> {
    graph.allow_backing(config.allow_backing);
    if let Some(folder) = &config.journal {
        graph.keep_journals(Folder::open(folder, config.journal_size)?);
    }
    let named_so = (&setup.nodes[..], &setup.exports[..]);
    let at_start = nodes_at_start::open(graph, store.as_ref(), named_so, reactor)?;
    let wanted = &at_start.exports;
    let plan = state::plan(config.state.as_ref(), graph, store.as_ref())?;
    neighbours::check(wanted, config.state.as_ref(), graph, store.as_ref())?;
    // All of them before the first guest is served: an image that does not answer would hold up the
    // end of those that are.
    let mut grants = Vec::new();
    for options in wanted {
        let holder = Holder::Export(options.id.clone());
        let request = Request::disk(holder, &options.node_name, options.writable);
        grants.push(
            reactor
                .block_on(graph.access(request))
                .map_err(about(options))?,
        );
    }
    let hub = EventHub::new();
    let runtime = Runtime::new(
        named(config),
        setup.objects,
        hub.sink(),
        fences,
        config.state.clone(),
    );
    runtime.incidents.of_images(graph, exports);
    for (options, grant) in wanted.iter().zip(grants) {
        let export = serving::start(options, graph, &runtime).map_err(about(options))?;
        serving::warn_without_journal(graph, options);
        exports.add(export, options.clone(), grant);
        // A guest may be served from here on.
        starting.has_ended();
    }
    at_start.disown(graph)?;
    end_with_last_front_end(config, exports, stop);
    watch.tell(hub.sink_of_each());
    let ledger = store.clone().map(|store| store as Arc<dyn Ledger>);
    let clock = Arc::new(SystemClock::new());
    let quit = stop.clone();
    let engine = Arc::new(Engine {
        jobs: Manager::recorded(
            Graph::clone(graph),
            Arc::new(ReactorRunner),
            clock,
            hub.sink(),
            ledger,
        ),
        streams: on_graph(graph, exports, store.as_ref()),
        graph: graph.clone(),
        exports: exports.clone(),
        store,
        runtime,
        quit: Box::new(move || {
            // When nobody listens any more, the daemon is ending already.
            let _ = quit.send(Call::Stop);
        }),
    });
    engine.go_on(plan);
    let manager = engine.jobs.clone();
    let control = Control::new(engine);
    let monitors = Monitors::start(config, control, hub, stop).inspect_err(|_| {
        // Before the images are closed.
        manager.shut_down();
    })?;
    Ok(Running { manager, monitors })
}

/// Says which export an error is about.
fn about(options: &ExportOptions) -> impl Fn(Error) -> Error {
    |error| match error {
        Error::Invalid(text) => Error::Invalid(format!("export '{}': {text}", options.id)),
        other => other,
    }
}

/// A daemon whose only purpose was one connection ends with it.
fn end_with_last_front_end(config: &Config, exports: &Exports, stop: &Sender<Call>) {
    if exports.list().len() != 1 || !config.monitors.is_empty() {
        return;
    }
    for Served { export, .. } in exports.list() {
        let stop = stop.clone();
        export.on_end(move || {
            let _ = stop.send(Call::Stop);
        });
    }
}

/// Waits for the order to end. Returns the pid file, which stays until the end is over.
fn wait(
    config: &Config,
    running: &Running,
    foreground: &mut Option<Foreground>,
    stopped: &Receiver<Call>,
) -> Result<Option<PidFile>> {
    if !running.monitors.wait_for_clients(stopped) {
        return Ok(None);
    }
    let pid_file = match &config.pidfile {
        Some(path) => Some(
            PidFile::write(path)
                .map_err(|error| during(&format!("writing '{}'", path.display()), &error))?,
        ),
        None => None,
    };
    if let Some(foreground) = foreground.take() {
        foreground.ready();
    }
    // The senders live as long as the signal thread: this ends with an order to stop.
    let _ = stopped.recv();
    Ok(pid_file)
}

/// Runs jobs on a reactor of their own thread.
struct ReactorRunner;

struct ReactorTimer(Reactor);

impl Timer for ReactorTimer {
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        Box::pin(self.0.sleep(duration))
    }
}

impl JobRunner for ReactorRunner {
    fn run(&self, main: JobMain) -> std::io::Result<()> {
        let reactor = Reactor::for_this_thread()?;
        process::step_back();
        reactor.block_on(main(Rc::new(ReactorTimer(reactor.clone()))));
        Reactor::end_thread();
        Ok(())
    }
}
