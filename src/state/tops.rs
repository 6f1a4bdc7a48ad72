//! Which images were put on top of others: how the records of that are kept, and what of them still
//! holds after streams.

use super::record::{Identity, Link, State, Top};
use crate::graph::recorded::is_same_image;

impl Top {
    fn covered(&self) -> (&str, Identity) {
        (&self.covered.file, self.identity)
    }

    fn top(&self) -> (&str, Identity) {
        (&self.top.file, self.top_identity)
    }

    fn is_record_of(&self, other: &Self) -> bool {
        is_same_image(self.covered(), other.covered()) && is_same_image(self.top(), other.top())
    }
}

impl State {
    /// Records that an image was put on top of another one. What was on top of that one before is not
    /// any more.
    pub fn put_top(&mut self, top: Top) {
        self.forget_moved((&top.top.file, top.top_identity));
        self.uncover((&top.covered.file, top.identity));
        self.tops.push(top);
    }

    /// Records that nothing is on top of an image any more: what was has been merged into it.
    pub fn uncover(&mut self, image: (&str, Identity)) {
        self.tops.retain(|top| !is_same_image(top.covered(), image));
    }

    /// Forgets that an image is on top of another one.
    pub fn forget_top(&mut self, top: &Top) {
        self.tops.retain(|other| other != top);
    }

    /// The image below one that was put on top of it has been closed.
    pub fn close_covered(&mut self, closed: &Top) {
        for top in self.tops.iter_mut().filter(|top| top.is_record_of(closed)) {
            top.closed = true;
        }
    }

    /// `top`, and what is recorded to be on top of that, and so on upwards.
    fn upwards<'a>(&'a self, top: &'a Top) -> Vec<&'a Top> {
        let mut found = vec![top];
        let mut highest = top;
        let next = |of: &Top| {
            let mut tops = self.tops.iter();
            tops.find(|other| is_same_image(other.covered(), of.top()))
        };
        // Records that lead in a circle are damaged: each is looked at once.
        while let Some(other) = next(highest).filter(|_| found.len() < self.tops.len()) {
            found.push(other);
            highest = other;
        }
        found
    }

    /// Whether a stream into one of the images on top of `tops` has let go of the image in `file`.
    fn is_let_go(&self, file: &str, tops: &[&Top]) -> bool {
        let commits = self.jobs.iter().filter_map(|job| job.commit.as_ref());
        let in_force = commits.filter(|commit| commit.done);
        let links = in_force.map(|commit| &commit.link).chain(&self.links);
        let releases = |link: &Link| link.released_files.iter().any(|released| released == file);
        let mut releasing = links.filter(|link| releases(link));
        releasing.any(|link| {
            let image = (link.node.file.as_str(), link.identity);
            tops.iter().any(|top| is_same_image(top.top(), image))
        })
    }

    /// Whether the image that `top` is on top of is no part of that disk any more: a stream has let
    /// go of it.
    #[must_use]
    pub fn has_let_go(&self, top: &Top) -> bool {
        self.is_let_go(&top.covered.file, &self.upwards(top))
    }

    /// The record of the lowest image on top of what `top` covers that is still a part of the disk.
    /// Those between may be gone, where a stream into one above has let go of them.
    #[must_use]
    pub fn standing(&self, top: &Top) -> Top {
        let upwards = self.upwards(top);
        let stands = |at: &usize| {
            let above = upwards.get(at + 1..).unwrap_or_default();
            let file = upwards.get(*at).map(|top| top.top.file.as_str());
            file.is_some_and(|file| !self.is_let_go(file, above))
        };
        let at = (0..upwards.len()).find(stands).unwrap_or_default();
        let mut standing = top.clone();
        for other in upwards.into_iter().take(at + 1).skip(1) {
            standing.top = other.top.clone();
            standing.top_identity = other.top_identity;
            standing.open_as = other.open_as.clone();
            for export in &other.exports {
                if !standing.exports.contains(export) {
                    standing.exports.push(export.clone());
                }
            }
        }
        standing
    }
}
