//! Which step comes next: one of those that must work as things are.

use crate::common::rng::Rng;
use crate::refusals::REFUSALS;
use crate::scene::Scene;
use crate::steps::Step;
use crate::world::{Work, World};

/// Images in a chain, at most: then they become fewer.
const LONGEST: usize = 6;
/// Bytes of a disk that gets no larger.
const LARGEST: u64 = 6 << 20;
/// Jobs at a time.
const JOBS: usize = 2;

fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> Option<T> {
    from.get(rng.below(from.len() as u64) as usize).cloned()
}

/// Nobody outside of the chain has the node under it.
fn is_alone(world: &World, name: &str, chain: &[String]) -> bool {
    let over = world.over(name);
    over.iter().all(|node| chain.contains(node))
}

impl Scene {
    /// The next step.
    pub fn choose(&mut self) -> Step {
        loop {
            let mut rng = self.rng.clone();
            let step = self.try_choose(&mut rng);
            self.rng = rng;
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn try_choose(&self, rng: &mut Rng) -> Option<Step> {
        let power = self.has_power_cuts();
        match rng.below(40) {
            0..=15 => self.one_command(rng),
            16..=19 => self.job_step(rng),
            20 | 21 => self.add(rng),
            22 => self.insert_step(rng),
            23..=25 => Some(Step::Refused(rng.below(REFUSALS))),
            // Where the power can fail, it does so most often: what a kill shows, other walks find.
            27..=29 | 32..=34 if power => {
                self.until_cut(rng).map(|step| Step::CutDuring(step.into()))
            }
            26 | 27 => Some(Step::Kill),
            28..=30 => self.during(rng).map(|step| Step::KillDuring(step.into())),
            31 if power => Some(Step::Cut),
            35 => Some(Step::Restart),
            36 | 37 => Some(Step::Verify),
            38 | 39 => Some(Step::Check),
            _ => self.one_command(rng),
        }
    }

    fn during(&self, rng: &mut Rng) -> Option<Step> {
        match rng.below(8) {
            0 => self.complete(rng),
            1 => self
                .add(rng)
                .filter(|step| matches!(step, Step::Add { by_jobs: false, .. })),
            2 | 3 => self.snapshot_step(rng),
            4 => self
                .job_step(rng)
                .filter(|step| matches!(step, Step::Await(_))),
            _ => self.one_command(rng),
        }
        .filter(|step| !matches!(step, Step::ExportDel(_)))
    }

    /// What is done when the power fails: most often a job comes to its end.
    fn until_cut(&self, rng: &mut Rng) -> Option<Step> {
        match rng.below(8) {
            0 | 1 => self.complete(rng),
            2 => self
                .job_step(rng)
                .filter(|step| matches!(step, Step::Await(_))),
            3 => self.stream(rng),
            4 | 5 => self.commit(rng),
            _ => self.during(rng),
        }
    }

    fn export(&self, rng: &mut Rng) -> Option<String> {
        let exports: Vec<_> = self.world.exports.keys().cloned().collect();
        pick(rng, &exports)
    }

    fn add(&self, rng: &mut Rng) -> Option<Step> {
        let by_jobs = rng.one_in(4);
        let export = self.export(rng)?;
        (self.spares().len() < 3).then_some(Step::Add { export, by_jobs })
    }

    /// Nodes that wait to be put on top of something.
    fn spares(&self) -> Vec<String> {
        let nodes = self.world.nodes.iter();
        let spare = nodes.filter(|(name, node)| {
            node.backing.is_none()
                && node.header.is_some()
                && !node.left
                && !self.world.is_served(name)
        });
        spare.map(|(name, _)| name.clone()).collect()
    }

    fn one_command(&self, rng: &mut Rng) -> Option<Step> {
        match rng.below(20) {
            0..=2 => self.snapshot_step(rng),
            3 => self.inside(rng),
            4..=6 => self.stream(rng),
            7..=9 => self.commit(rng),
            10..=12 => self.active(rng),
            13..=15 => self.del(rng),
            16 => self.extract(rng),
            17 => self.rename_step(rng),
            18 => match self.down.iter().next() {
                Some(id) => Some(Step::ExportAdd(id.clone())),
                None => self.export_del(rng),
            },
            _ => match self.world.objects.iter().next() {
                Some(id) if rng.one_in(2) => Some(Step::ObjectDel(id.clone())),
                _ => (self.world.objects.len() < 3).then_some(Step::ObjectAdd),
            },
        }
    }

    fn export_del(&self, rng: &mut Rng) -> Option<Step> {
        let id = self.export(rng)?;
        // A job on its own layer goes by the export's guests.
        let top = self.world.exports.get(&id)?;
        (!self.world.is_busy(top)).then_some(Step::ExportDel(id))
    }

    fn snapshot_step(&self, rng: &mut Rng) -> Option<Step> {
        let mut spares = self.spares();
        let count = if rng.one_in(3) {
            self.world.exports.len()
        } else {
            1
        };
        let mut covers = Vec::new();
        let first = rng.below(self.world.exports.len() as u64) as usize;
        let exports = self.world.exports.iter().cycle().skip(first).take(count);
        let fits = |overlay: &String, export: &String| {
            let node = self.world.nodes.get(overlay);
            node.map(|node| &node.size) == self.world.sizes.get(export)
        };
        for (export, top) in exports {
            let chain = self.world.chain(top);
            // An image that was left over it shows what is out of date.
            if self.world.is_busy(top)
                || chain.len() >= LONGEST
                || !self.world.over(top).is_empty()
                || self.down.contains(export)
            {
                continue;
            }
            let overlay = match rng.one_in(2) {
                true => spares.pop().filter(|overlay| fits(overlay, export)),
                false => None,
            };
            covers.push((export.clone(), overlay));
        }
        (!covers.is_empty()).then_some(Step::Snapshot(covers))
    }

    /// An export, and its chain, if there may be one more job.
    fn chain_for_job(&self, rng: &mut Rng) -> Option<(String, Vec<String>)> {
        let export = self.export(rng)?;
        let top = self.world.exports.get(&export)?;
        let chain = self.world.chain(top);
        let fits = self.world.jobs.len() < JOBS && !self.down.contains(&export);
        fits.then_some((export, chain))
    }

    fn are_free(&self, nodes: &[String], chain: &[String]) -> bool {
        let mut nodes = nodes.iter();
        nodes.all(|name| !self.world.is_busy(name) && is_alone(&self.world, name, chain))
    }

    fn stream(&self, rng: &mut Rng) -> Option<Step> {
        let (export, chain) = self.chain_for_job(rng)?;
        let at = if rng.one_in(2) {
            0
        } else {
            rng.below(chain.len() as u64) as usize
        };
        let end = rng.between(at as u64 + 2, chain.len().max(at + 2) as u64) as usize;
        let nodes = chain.get(at..end)?;
        // The base belongs to nobody, but must stay.
        let base = chain.get(end).cloned();
        let target = nodes.first()?.clone();
        self.are_free(nodes, &chain).then_some(Step::Stream {
            export,
            target,
            base,
        })
    }

    fn commit(&self, rng: &mut Rng) -> Option<Step> {
        let (export, chain) = self.chain_for_job(rng)?;
        let at = rng.between(1, chain.len() as u64) as usize;
        let end = rng.between(at as u64 + 1, chain.len().max(at + 1) as u64) as usize;
        let nodes = chain.get(at - 1..=end)?;
        let (top, base) = (chain.get(at)?.clone(), chain.get(end)?.clone());
        let free = self.are_free(nodes, &chain) && self.world.over(chain.first()?).is_empty();
        free.then_some(Step::Commit { export, top, base })
    }

    fn active(&self, rng: &mut Rng) -> Option<Step> {
        let (export, chain) = self.chain_for_job(rng)?;
        let end = rng.between(1, chain.len() as u64) as usize;
        let nodes = chain.get(..=end)?;
        let base = chain.get(end)?.clone();
        self.are_free(nodes, &chain)
            .then_some(Step::Active { export, base })
    }

    fn complete(&self, rng: &mut Rng) -> Option<Step> {
        let jobs = self.world.jobs.iter();
        let active = jobs.filter(|(_, job)| {
            matches!(&job.work, Work::Active { completing, .. } if !completing) && !job.paused
        });
        let active: Vec<_> = active.map(|(id, _)| id.clone()).collect();
        pick(rng, &active).map(Step::Complete)
    }

    fn job_step(&self, rng: &mut Rng) -> Option<Step> {
        let jobs: Vec<_> = self.world.jobs.keys().cloned().collect();
        let id = pick(rng, &jobs)?;
        let job = self.world.jobs.get(&id)?;
        let is_active = matches!(job.work, Work::Active { .. });
        if job.paused {
            return Some(Step::Pause(id));
        }
        match rng.below(8) {
            0 => Some(Step::Cancel(id)),
            1 => Some(Step::Pause(id)),
            _ if is_active => Some(Step::Complete(id)),
            _ => Some(Step::Await(id)),
        }
    }

    fn del(&self, rng: &mut Rng) -> Option<Step> {
        let nodes = self.world.nodes.iter();
        let unused = nodes.filter(|(name, node)| {
            let of_use = self.world.is_served(name) || self.world.is_busy(name);
            let unneeded = node.left || rng.one_in(8);
            unneeded && !of_use && self.world.over(name).is_empty()
        });
        let unused: Vec<_> = unused.map(|(name, _)| name.clone()).collect();
        pick(rng, &unused).map(Step::Del)
    }

    fn insert_step(&self, rng: &mut Rng) -> Option<Step> {
        let (_, chain) = self.chain_for_job(rng)?;
        let at = rng.below(chain.len() as u64 - 1) as usize;
        let pair = chain.get(at..at + 2)?;
        let fits = chain.len() < LONGEST && self.are_free(pair, &chain);
        let above = pair.first()?.clone();
        fits.then_some(Step::Insert { above })
    }

    fn extract(&self, rng: &mut Rng) -> Option<Step> {
        let (_, chain) = self.chain_for_job(rng)?;
        let mut pairs = chain.windows(2);
        let pair = pairs.find(|pair| {
            let empty = pair.last().and_then(|name| self.world.nodes.get(name));
            empty.is_some_and(|node| node.empty && node.backing.is_some())
                && self.are_free(pair, &chain)
        })?;
        let [above, empty] = pair else { return None };
        Some(Step::Extract {
            above: above.clone(),
            empty: empty.clone(),
        })
    }

    fn rename_step(&self, rng: &mut Rng) -> Option<Step> {
        let (export, chain) = self.chain_for_job(rng)?;
        let node = pick(rng, &chain)?;
        let found = self.world.nodes.get(&node)?;
        // It is to name what is under it.
        let below = self.world.nodes.get(found.backing.as_ref()?)?;
        let same = |header: &str| header.replace("/./", "/") == below.file;
        // A device under another node is refused.
        let fits =
            found.header.as_deref().is_some_and(same) && self.world.over(chain.first()?).is_empty();
        (fits && self.are_free(std::slice::from_ref(&node), &chain))
            .then_some(Step::Rename { export, node })
    }

    /// What changes an image and not the graph: its size, or snapshots inside of it.
    fn inside(&self, rng: &mut Rng) -> Option<Step> {
        let export = self.export(rng)?;
        let top = self.world.exports.get(&export)?;
        let free = !self.world.is_busy(top) && self.world.over(top).is_empty();
        if !free || self.down.contains(&export) {
            return None;
        }
        let (node, size) = (self.world.nodes.get(top)?, self.world.sizes.get(&export)?);
        let inside: Vec<_> = node.snapshots.iter().cloned().collect();
        match rng.below(3) {
            0 if *size < LARGEST => {
                let size = size + 512 * rng.between(1, 1024);
                Some(Step::Resize { export, size })
            }
            1 if inside.len() < 3 => Some(Step::Keep(export)),
            _ => pick(rng, &inside).map(|name| Step::Forget {
                node: top.clone(),
                name,
            }),
        }
    }
}
