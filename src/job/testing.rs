//! What the tests of jobs need: a source with faults, time that tests own, and an ear for events.

use std::collections::BTreeSet;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use event_listener::Event as Signal;
use futures_util::future::LocalBoxFuture;
use parking_lot::Mutex;

use super::ledger::Change;
use super::source::{CopySource, GuestLoad, JobIoError, yield_now};
use super::*;
use crate::chain::CopyStatus;
use crate::graph::Graph;
use crate::state::record::{self, State};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Time that passes only when nobody has anything else to do (or never, with `frozen`).
#[derive(Default)]
pub struct VirtualTime {
    now: Mutex<Duration>,
    sleepers: Mutex<Vec<(Duration, Waker)>>,
    ticks: Mutex<Option<Ticks>>,
    pub frozen: bool,
}

/// What is done at regular times.
struct Ticks {
    period: Duration,
    next: Duration,
    action: Box<dyn FnMut(Duration) + Send>,
}

impl VirtualTime {
    /// From now on `action` is done whenever `period` has passed, and told the time.
    pub fn every(&self, period: Duration, action: impl FnMut(Duration) + Send + 'static) {
        *self.ticks.lock() = Some(Ticks {
            period,
            next: *self.now.lock() + period,
            action: Box::new(action),
        });
    }

    /// Goes on to when the first sleeper wants to be woken, and wakes it.
    fn jump(&self) -> bool {
        let mut sleepers = self.sleepers.lock();
        let Some(mut first) = sleepers.iter().map(|sleeper| sleeper.0).min() else {
            return false;
        };
        let mut ticks = self.ticks.lock();
        if let Some(ticks) = ticks.as_mut().filter(|ticks| ticks.next <= first) {
            first = ticks.next;
            ticks.next += ticks.period;
            *self.now.lock() = first;
            (ticks.action)(first);
        }
        let mut now = self.now.lock();
        *now = first.max(*now);
        let now = *now;
        sleepers.retain(|(deadline, waker)| {
            if *deadline <= now {
                waker.wake_by_ref();
            }
            *deadline > now
        });
        true
    }
}

impl Clock for VirtualTime {
    fn now(&self) -> Duration {
        *self.now.lock()
    }
}

struct VirtualTimer(Arc<VirtualTime>);

impl Timer for VirtualTimer {
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        let time = self.0.clone();
        let deadline = time.now() + duration;
        Box::pin(std::future::poll_fn(move |context| {
            if time.now() >= deadline {
                return std::task::Poll::Ready(());
            }
            time.sleepers
                .lock()
                .push((deadline, context.waker().clone()));
            std::task::Poll::Pending
        }))
    }
}

/// Whether a task wants to be polled, and a bell for the thread that polls it.
#[derive(Default)]
struct Bell(std::sync::Mutex<bool>, Condvar);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Runs jobs in [`VirtualTime`].
pub struct VirtualRunner(pub Arc<VirtualTime>);

impl JobRunner for VirtualRunner {
    fn run(&self, main: JobMain) -> io::Result<()> {
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        let mut future = pin!(main(Rc::new(VirtualTimer(self.0.clone()))));
        while future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
        {
            let mut rung = bell.0.lock().unwrap();
            while !*rung {
                drop(rung);
                let jumped = !self.0.frozen && self.0.jump();
                rung = bell.0.lock().unwrap();
                if !jumped && !*rung {
                    rung = bell.1.wait(rung).unwrap();
                }
            }
            *rung = false;
        }
        Ok(())
    }
}

/// What a [`FakeSource`] is made of, shared with the test.
pub struct Disk {
    pub len: u64,
    pub cluster: u64,
    /// Clusters that have to be copied, and (removed from it) were.
    pub needed: Mutex<BTreeSet<u64>>,
    /// Clusters that only have to be marked as zeros.
    pub zeroes: BTreeSet<u64>,
    /// What was copied, in the order in which it was begun.
    pub copied: Mutex<Vec<(u64, u64)>>,
    /// Reads at these offsets fail, each as often as it is listed, with this error number.
    pub faults: Mutex<Vec<(u64, i32)>>,
    /// Whether the result was put in force.
    pub finished: Mutex<bool>,
    pub finish_error: Mutex<Option<i32>>,
    /// What is done when the result is put in force.
    pub on_finish: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// How often the source was closed.
    pub closed: Mutex<u32>,
    /// While set, copies wait.
    pub gate: Mutex<bool>,
    pub gate_moved: Signal,
    /// How many copies were in flight at once at most, and are now.
    pub most_in_flight: Mutex<(usize, usize)>,
    pub guest_load: Mutex<GuestLoad>,
    /// How often it was looked at what a range needs.
    pub looks: Mutex<u64>,
    /// Whose job `j` is asked for its progress at each step, on the job's own thread.
    pub watched: Mutex<Option<Arc<Manager>>>,
    /// What it told.
    pub told: Mutex<Vec<Progress>>,
    /// When what is told here happens.
    pub clock: Mutex<Option<Arc<VirtualTime>>>,
    /// Copies that ended, and (`true`) the times that they were made stable.
    pub log: Mutex<Vec<(Duration, bool)>>,
    /// How often it fails to make copies stable.
    pub settle_faults: Mutex<u32>,
    /// How often copies began to be made stable.
    pub settling: Mutex<u32>,
    /// While set, copies are not made stable but wait.
    pub settle_gate: Mutex<bool>,
}

impl Disk {
    pub fn new(clusters: u64, needed: impl IntoIterator<Item = u64>) -> Arc<Self> {
        Self::with_clusters(64 * KIB, clusters, needed)
    }

    pub fn with_clusters(
        cluster: u64,
        clusters: u64,
        needed: impl IntoIterator<Item = u64>,
    ) -> Arc<Self> {
        Self::with_zeroes(cluster, clusters, needed, [])
    }

    pub fn with_zeroes(
        cluster: u64,
        clusters: u64,
        needed: impl IntoIterator<Item = u64>,
        zeroes: impl IntoIterator<Item = u64>,
    ) -> Arc<Self> {
        Arc::new(Self {
            zeroes: zeroes.into_iter().collect(),
            len: clusters * cluster,
            cluster,
            needed: Mutex::new(needed.into_iter().collect()),
            copied: Mutex::default(),
            faults: Mutex::default(),
            finished: Mutex::default(),
            finish_error: Mutex::default(),
            on_finish: Mutex::default(),
            closed: Mutex::default(),
            gate: Mutex::new(false),
            gate_moved: Signal::new(),
            most_in_flight: Mutex::default(),
            guest_load: Mutex::default(),
            looks: Mutex::default(),
            watched: Mutex::default(),
            told: Mutex::default(),
            clock: Mutex::default(),
            log: Mutex::default(),
            settle_faults: Mutex::default(),
            settling: Mutex::default(),
            settle_gate: Mutex::default(),
        })
    }

    /// Notes that a copy has ended, or that all that did are stable.
    fn note(&self, stable: bool) {
        let now = self.clock.lock().as_ref().map(|clock| clock.now());
        self.log.lock().push((now.unwrap_or_default(), stable));
    }

    pub fn set_settle_gate(&self, shut: bool) {
        *self.settle_gate.lock() = shut;
        self.gate_moved.notify(usize::MAX);
    }

    pub fn set_gate(&self, shut: bool) {
        *self.gate.lock() = shut;
        self.gate_moved.notify(usize::MAX);
    }
}

struct FakeSource(Arc<Disk>);

impl FakeSource {
    fn step(&self) {
        let job = self
            .0
            .watched
            .lock()
            .as_ref()
            .and_then(|manager| manager.job("j"));
        self.0
            .told
            .lock()
            .extend(job.map(|job| job.info().progress));
    }
}

impl CopySource for FakeSource {
    fn len(&self) -> u64 {
        self.0.len
    }

    fn cluster_size(&self) -> u64 {
        self.0.cluster
    }

    fn guest_load(&self) -> GuestLoad {
        *self.0.guest_load.lock()
    }

    fn status(
        &self,
        offset: u64,
        max_len: u64,
    ) -> LocalBoxFuture<'_, Result<(u64, CopyStatus), JobIoError>> {
        let disk = &self.0;
        self.step();
        *disk.looks.lock() += 1;
        Box::pin(async move {
            let needed = disk.needed.lock();
            let status = |at: u64| match at / disk.cluster {
                cluster if needed.contains(&cluster) => CopyStatus::Data,
                cluster if disk.zeroes.contains(&cluster) => CopyStatus::Zero,
                _ => CopyStatus::Present,
            };
            let mut end = offset - offset % disk.cluster + disk.cluster;
            while end < offset + max_len && status(end) == status(offset) {
                end += disk.cluster;
            }
            Ok(((end - offset).min(max_len), status(offset)))
        })
    }

    fn copy(&self, offset: u64, len: u64) -> LocalBoxFuture<'_, Result<u64, JobIoError>> {
        let disk = &self.0;
        self.step();
        disk.copied.lock().push((offset, len));
        Box::pin(async move {
            {
                let mut count = disk.most_in_flight.lock();
                count.1 += 1;
                count.0 = count.0.max(count.1);
            }
            // Whatever else is to be in flight is begun meanwhile.
            yield_now().await;
            loop {
                let moved = disk.gate_moved.listen();
                if !*disk.gate.lock() {
                    break;
                }
                moved.await;
            }
            disk.most_in_flight.lock().1 -= 1;
            let mut faults = disk.faults.lock();
            if let Some(at) = faults
                .iter()
                .position(|f| (offset..offset + len).contains(&f.0))
            {
                let (at, errno) = faults.remove(at);
                return Err(JobIoError {
                    errno,
                    write: false,
                    text: format!("read at {at}"),
                });
            }
            let mut needed = disk.needed.lock();
            let clusters = offset / disk.cluster..(offset + len).div_ceil(disk.cluster);
            let moved = clusters.filter(|cluster| needed.remove(cluster)).count() as u64;
            disk.note(false);
            Ok(moved * disk.cluster)
        })
    }

    fn settle(&self) -> LocalBoxFuture<'_, Result<(), JobIoError>> {
        Box::pin(async move {
            *self.0.settling.lock() += 1;
            loop {
                let moved = self.0.gate_moved.listen();
                if !*self.0.settle_gate.lock() {
                    break;
                }
                moved.await;
            }
            let mut faults = self.0.settle_faults.lock();
            if *faults > 0 {
                *faults -= 1;
                return Err(JobIoError {
                    errno: libc::EIO,
                    write: true,
                    text: "cannot settle".to_owned(),
                });
            }
            self.0.note(true);
            Ok(())
        })
    }
}

/// Copies a [`Disk`].
struct FakeBody(FakeSource);

impl Body for FakeBody {
    fn run<'a>(&'a mut self, context: &'a JobContext) -> LocalBoxFuture<'a, Result<(), JobError>> {
        Box::pin(copier::run(&self.0, context))
    }

    fn commit<'a>(
        &'a mut self,
        _context: &'a JobContext,
    ) -> LocalBoxFuture<'a, Result<(), JobError>> {
        let disk = &self.0.0;
        Box::pin(async move {
            if disk.finish_error.lock().is_some() {
                return Err(JobError::new("cannot finish"));
            }
            *disk.finished.lock() = true;
            if let Some(act) = disk.on_finish.lock().take() {
                act();
            }
            Ok(())
        })
    }

    fn close(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async { *self.0.0.closed.lock() += 1 })
    }
}

/// A manager, and what it tells.
pub struct Bench {
    pub manager: Arc<Manager>,
    pub time: Arc<VirtualTime>,
    events: Receiver<Event>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(VirtualTime::default())
    }

    /// A bench on which a job that waits for its speed limit waits for ever.
    pub fn frozen() -> Self {
        Self::with(VirtualTime {
            frozen: true,
            ..VirtualTime::default()
        })
    }

    /// A bench whose jobs are recorded, and those that wait for their speed limit wait for ever.
    pub fn recorded(pages: &Arc<Pages>) -> Self {
        Self::recorded_in(pages.clone())
    }

    /// As [`recorded`](Self::recorded), in any ledger.
    pub fn recorded_in(ledger: Arc<dyn Ledger>) -> Self {
        let time = VirtualTime {
            frozen: true,
            ..VirtualTime::default()
        };
        Self::new_with(time, Some(ledger))
    }

    fn with(time: VirtualTime) -> Self {
        Self::new_with(time, None)
    }

    fn new_with(time: VirtualTime, ledger: Option<Arc<dyn Ledger>>) -> Self {
        let time = Arc::new(time);
        let (sender, events) = mpsc::channel();
        let sink: EventSink = Arc::new(move |event| {
            // It comes with each end, and says nothing about the order of states.
            if event.name != "JOB_COPIED" {
                drop(sender.send(event));
            }
        });
        let runner = Arc::new(VirtualRunner(time.clone()));
        Self {
            manager: Manager::recorded(Graph::default(), runner, time.clone(), sink, ledger),
            time,
            events,
        }
    }

    pub fn start(&self, spec: JobSpec, disk: &Arc<Disk>) -> Arc<Job> {
        self.try_start(spec, disk).unwrap()
    }

    pub fn try_start(&self, spec: JobSpec, disk: &Arc<Disk>) -> Result<Arc<Job>, Refused> {
        let lease = self.lease(&spec.id);
        self.manager.start(spec, lease, self.body(disk))
    }

    /// Goes on with a recorded job.
    pub fn restore(&self, from: &record::Job, disk: &Arc<Disk>) -> Arc<Job> {
        let lease = self.lease(&from.id);
        self.manager.restore(from, lease, self.body(disk)).unwrap()
    }

    fn lease(&self, id: &str) -> Lease {
        self.manager.reserve(&[id.to_owned()], "stream").unwrap()
    }

    fn body(&self, disk: &Arc<Disk>) -> BodyFactory {
        let disk = disk.clone();
        *disk.clock.lock() = Some(self.time.clone());
        Box::new(move || {
            let body = FakeBody(FakeSource(disk));
            Box::pin(async move { Ok(Box::new(body) as Box<dyn Body>) })
        })
    }

    /// The events that have come and were not looked at.
    pub fn events(&self) -> Vec<String> {
        self.events
            .try_iter()
            .map(|event| describe(&event))
            .collect()
    }

    /// Waits for the first event that is one of `wanted`.
    pub fn until_any(&self, wanted: &[&str]) -> String {
        loop {
            match self
                .events
                .recv_timeout(Duration::from_secs(20))
                .map(|event| describe(&event))
            {
                Ok(event) if wanted.contains(&event.as_str()) => return event,
                Ok(_) => {}
                Err(error) => panic!("none of {wanted:?} came ({error})"),
            }
        }
    }

    /// The events up to and including the first that `wanted` describes, as [`describe`] has them.
    pub fn until(&self, wanted: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().map(String::as_str) != Some(wanted) {
            match self.events.recv_timeout(Duration::from_secs(20)) {
                Ok(event) => seen.push(describe(&event)),
                Err(error) => panic!("{wanted} did not come ({error}); seen: {seen:?}"),
            }
        }
        seen
    }
}

/// An event in a word: the state reached, or the event's name with what matters of its members.
pub fn describe(event: &Event) -> String {
    let member = |name: &str| event.data[name].as_str().unwrap_or_default().to_owned();
    match event.name {
        "JOB_STATUS_CHANGE" => member("status"),
        "BLOCK_JOB_ERROR" => format!("ERROR {} {}", member("operation"), member("action")),
        name => [name, &member("error")].join(" ").trim_end().to_owned(),
    }
}

/// Records of jobs, as long as there is room for them.
#[derive(Default)]
pub struct Pages {
    state: Mutex<State>,
    full: Mutex<bool>,
}

impl Pages {
    pub fn set_full(&self, full: bool) {
        *self.full.lock() = full;
    }

    pub fn job(&self, id: &str) -> Option<record::Job> {
        self.state.lock().job_named(id).cloned()
    }
}

impl Ledger for Pages {
    fn change(&self, change: Change<'_>) -> Result<(), Refused> {
        if *self.full.lock() {
            return Err(Refused("No room for the record".to_owned()));
        }
        change(&mut self.state.lock());
        Ok(())
    }

    fn happened(&self, change: Change<'_>) -> Result<(), Refused> {
        self.change(change)
    }
}
