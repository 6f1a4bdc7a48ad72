//! Which clusters are free, and handing them out.

use std::ops::Range;

use super::{Allocation, Allocator, Need};
use crate::format::qcow2::soundness::Fault;

impl Allocator {
    /// Allocates up to `wanted` contiguous clusters, at least one.
    ///
    /// # Errors
    /// What must be done first; nothing has been allocated then.
    pub fn allocate(&mut self, wanted: u64) -> Result<Allocation, Need> {
        // One slice at a time, so that nobody waits for all of them.
        if self.free.is_empty() {
            self.look_for_free()?;
        }
        loop {
            while let Some((&start, &len)) = self.free.first_key_value() {
                let range = start..start + len.min(wanted);
                if let Some(allocation) = self.take(range, wanted)? {
                    return Ok(allocation);
                }
            }
            match self.append(wanted) {
                Err(Need::Full | Need::Table) if self.find_more()? => {}
                other => return other,
            }
        }
    }

    /// Allocates `len` bytes for a compressed cluster, less than a cluster: in the host cluster that
    /// the last ones went to, if there is room, with one more reference to it.
    ///
    /// # Errors
    /// As for [`Allocator::allocate`].
    pub fn allocate_part(&mut self, len: u64) -> Result<u64, Need> {
        let bits = self.geometry.cluster_bits;
        if let Some(part) = self
            .part
            .clone()
            .filter(|part| part.end - part.start >= len)
        {
            let cluster = part.start >> bits;
            let count = self.refcount(cluster)?.unwrap_or(0);
            if count > 0 && count < self.geometry.max_refcount() {
                self.set(cluster, count + 1)?;
                self.part = Some(part.start + len..part.end);
                return Ok(part.start);
            }
        }
        let start = self.allocate(1)?.offset;
        self.part = Some(start + len..start + (1 << bits));
        Ok(start)
    }

    /// Finds what is free in the next slice of the clusters that the file had when it was opened.
    pub(super) fn look_for_free(&mut self) -> Result<(), Need> {
        let per_slice = self.geometry.per_slice();
        let after = |cluster: u64| (cluster / per_slice + 1) * per_slice;
        while let Some(Range { start, end }) = self.unseen.last().cloned() {
            let stop = end.min(after(start));
            // Without a block there is no telling, and none is made for what lies before the end
            // as long as there is room elsewhere.
            let covered = self.slice_offset(self.slice_of(start)).is_some();
            let looked_at = if covered { start..stop } else { stop..stop };
            for cluster in looked_at {
                if self.refcount(cluster)? == Some(0)
                    && self.may_use(cluster)
                    && !self.is_free(cluster)
                {
                    self.add_free(cluster, 1);
                }
            }
            match self.unseen.last_mut() {
                Some(last) if stop < end => last.start = stop,
                _ => drop(self.unseen.pop()),
            }
            if covered {
                break;
            }
        }
        Ok(())
    }

    /// Notes clusters before the frontier that may be free.
    pub(super) fn look_later(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        match self.unseen.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.unseen.push(clusters),
        }
    }

    pub(super) fn is_free(&self, cluster: u64) -> bool {
        self.free
            .range(..=cluster)
            .next_back()
            .is_some_and(|(start, len)| cluster < start + len)
    }

    /// Whether a cluster is left alone, whatever its refcount: it is withheld, or holds metadata.
    pub(super) fn is_kept(&self, cluster: u64) -> bool {
        self.is_withheld(cluster) || self.metadata.what(cluster).is_some()
    }

    /// False for a cluster that is withheld, and for one that holds metadata: its refcount is wrong.
    pub(super) fn may_use(&self, cluster: u64) -> bool {
        if self.is_withheld(cluster) {
            return false;
        }
        let Some(what) = self.metadata.what(cluster) else {
            return true;
        };
        if let Some((soundness, file)) = &self.soundness {
            let bits = self.geometry.cluster_bits;
            soundness.found(
                file,
                Fault {
                    what: format!(
                        "cluster {cluster} has refcount 0, but {what} is there: it is left alone"
                    ),
                    place: Some((cluster << bits, 1 << bits)),
                    fatal: false,
                },
            );
        }
        false
    }

    /// Takes a run out of `free`, checking that it is. Where it has no refcount block its first
    /// cluster becomes that.
    pub(super) fn take(
        &mut self,
        range: Range<u64>,
        wanted: u64,
    ) -> Result<Option<Allocation>, Need> {
        if self.refcount(range.start)?.is_none() {
            self.add_block(range.start)?;
            self.remove_free(range.start, 1);
            return Ok(None);
        }
        let mut count = 0;
        for cluster in range.clone() {
            match self.refcount(cluster) {
                Ok(Some(0)) => count += 1,
                // Where another block begins, or its slice is not loaded: a shorter run.
                Ok(None) | Err(Need::Slice(_)) if count > 0 => break,
                Ok(other) => {
                    log::error!("cluster {cluster} was thought free but has refcount {other:?}");
                    break;
                }
                Err(need) => return Err(need),
            }
        }
        let taken = count.max(1);
        self.remove_free(range.start, taken);
        if count == 0 {
            return Ok(None);
        }
        debug_assert!(count <= wanted);
        self.set_run(range.start..range.start + count, 1)?;
        Ok(Some(self.allocation(range.start, count)))
    }

    pub(super) fn remove_free(&mut self, start: u64, count: u64) {
        if let Some(len) = self.free.remove(&start)
            && len > count
        {
            self.free.insert(start + count, len - count);
        }
    }

    pub(super) fn allocation(&mut self, start: u64, clusters: u64) -> Allocation {
        let fresh = start >= self.virgin_from;
        if self.virgin_from != u64::MAX {
            self.virgin_from = self.virgin_from.max(start + clusters);
        }
        Allocation {
            offset: start << self.geometry.cluster_bits,
            clusters,
            fresh,
        }
    }

    /// Allocates behind everything else.
    pub(super) fn append(&mut self, wanted: u64) -> Result<Allocation, Need> {
        loop {
            let start = self.frontier;
            if start >= self.limit {
                return Err(Need::Full);
            }
            match self.refcount(start)? {
                None if self.is_withheld(start) => self.frontier += 1,
                // It would cover itself alone.
                None if start + 1 >= self.limit => return Err(Need::Full),
                None => {
                    self.add_block(start)?;
                    self.frontier = start + 1;
                }
                Some(0) if !self.may_use(start) => self.frontier += 1,
                Some(0) => {
                    let count = self.run_of_free(start, wanted)?;
                    self.set_run(start..start + count, 1)?;
                    self.frontier = start + count;
                    return Ok(self.allocation(start, count));
                }
                Some(_) => self.frontier += 1,
            }
        }
    }

    pub(super) fn run_of_free(&self, start: u64, wanted: u64) -> Result<u64, Need> {
        let mut count = 1;
        while count < wanted.min(self.limit - start) {
            match self.refcount(start + count) {
                Ok(Some(0)) if !self.is_kept(start + count) => count += 1,
                // Where the next block begins, or its slice is not loaded: a shorter run.
                Ok(_) | Err(Need::Slice(_)) => break,
                Err(other) => return Err(other),
            }
        }
        Ok(count)
    }

    /// No more compressed clusters go to `cluster`.
    pub(super) fn close_part(&mut self, cluster: u64) {
        let at = self.part.as_ref().map(|part| part.start);
        if at.is_some_and(|at| at >> self.geometry.cluster_bits == cluster) {
            self.part = None;
        }
    }

    pub(super) fn add_free(&mut self, start: u64, len: u64) {
        let mut range = start..(start + len).min(self.limit);
        if range.is_empty() {
            return;
        }
        if let Some((&before, &count)) = self.free.range(..start).next_back()
            && before + count == start
        {
            self.free.remove(&before);
            range.start = before;
        }
        if let Some(count) = self.free.remove(&range.end) {
            range.end += count;
        }
        self.free.insert(range.start, range.end - range.start);
    }

    /// Where allocation goes on, and nothing behind is in use.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Lowers the frontier: the clusters from `cluster` on turned out to be free.
    pub fn lower_frontier(&mut self, cluster: u64) {
        self.frontier = self.frontier.min(cluster);
        for range in &mut self.unseen {
            range.end = range.end.min(cluster);
        }
        self.unseen.retain(|range| !range.is_empty());
    }
}
