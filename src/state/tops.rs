//! Which images were put on top of others: how the records of that are kept, and what of them still
//! holds after streams.

use super::record::{Identity, Link, Made, Moved, State, Top};
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

    /// The record of the node on top, which its snapshot has made.
    fn made(&self) -> Made {
        Made {
            node: self.top.clone(),
            identity: self.top_identity,
            open_as: self.open_as.clone(),
            below: self.covered.clone(),
            below_identity: self.identity,
        }
    }
}

impl Made {
    fn is_called_as(&self, other: &Self) -> bool {
        self.node.name == other.node.name
    }
}

impl Moved {
    fn from(&self) -> (&str, Identity) {
        (&self.from.file, self.identity)
    }

    fn to(&self) -> (&str, Identity) {
        (&self.to.file, self.to_identity)
    }
}

/// Records for which there was no place any more beside a new one, each with the place that it had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    tops: Vec<(usize, Top)>,
    moved: Vec<(usize, Moved)>,
    made: Vec<(usize, Made)>,
    links: Vec<(usize, Link)>,
}

/// Takes those out of a list that are meant.
fn extract<T>(list: &mut Vec<T>, is_meant: impl Fn(&T) -> bool) -> Vec<(usize, T)> {
    let (mut gone, mut left) = (Vec::new(), Vec::new());
    for (at, item) in std::mem::take(list).into_iter().enumerate() {
        match is_meant(&item) {
            true => gone.push((at, item)),
            false => left.push(item),
        }
    }
    *list = left;
    gone
}

impl State {
    /// Records that an image was put on top of another one. What was on top of that one before is not
    /// any more, nothing is on top of the new one, no guest has left that, and what lay under it before
    /// does not count. `is_made` says that the snapshot has made its node, to which a client gave a
    /// name. Returns what had to go.
    pub fn put_top(&mut self, top: Top, is_made: bool) -> Gone {
        let (covered, on_top) = (top.covered(), top.top());
        let covers = |other: &Top| {
            is_same_image(other.covered(), covered) || is_same_image(other.covered(), on_top)
        };
        let is_under = |link: &Link| is_same_image((&link.node.file, link.identity), on_top);
        let named = is_made.then(|| top.made());
        let is_called_so = |made: &Made| named.as_ref().is_some_and(|new| new.is_called_as(made));
        let gone = Gone {
            tops: extract(&mut self.tops, covers),
            moved: extract(&mut self.moved, |moved| is_same_image(moved.from(), on_top)),
            made: extract(&mut self.made, is_called_so),
            links: extract(&mut self.links, is_under),
        };
        self.made.extend(named);
        self.tops.push(top);
        gone
    }

    /// Takes the record of `top` back, for which `gone` had to go.
    pub fn take_top_back(&mut self, top: &Top, gone: &Gone) {
        self.tops.retain(|other| other != top);
        let made = top.made();
        self.made.retain(|other| *other != made);
        self.put_back(gone);
    }

    /// Forgets a node that a snapshot had made: a client has removed it, or given it other options.
    pub fn forget_made(&mut self, name: &str) {
        self.made
            .retain(|made| made.node.name.as_deref() != Some(name));
    }

    /// A client has an export of this id show the image in this file, to be written if it is
    /// `writable`. Whoever is served it so has neither left it, nor gone on to what is on top of it.
    pub fn serve(&mut self, image: (&str, Identity), (export, writable): (&str, bool)) {
        if writable {
            self.forget_moved(image);
            self.tops.retain(|top| !is_same_image(top.covered(), image));
        }
        let covering = self.tops.iter_mut();
        for top in covering.filter(|top| is_same_image(top.covered(), image)) {
            top.exports.retain(|known| known != export);
        }
    }

    /// Records that a guest writes another image: no guest has left that one any more, and nothing is
    /// on top of it. Returns what had to go.
    pub fn put_moved(&mut self, moved: Moved) -> Gone {
        let (from, to) = (moved.from(), moved.to());
        let is_of =
            |other: &Moved| is_same_image(other.from(), to) || is_same_image(other.from(), from);
        let gone = Gone {
            tops: extract(&mut self.tops, |top| is_same_image(top.covered(), to)),
            moved: extract(&mut self.moved, is_of),
            ..Gone::default()
        };
        self.moved.push(moved);
        gone
    }

    /// Takes the record of `moved` back, for which `gone` had to go.
    pub fn take_move_back(&mut self, moved: &Moved, gone: &Gone) {
        self.moved.retain(|other| other != moved);
        self.put_back(gone);
    }

    fn put_back(&mut self, gone: &Gone) {
        for (at, top) in &gone.tops {
            self.tops.insert((*at).min(self.tops.len()), top.clone());
        }
        for (at, moved) in &gone.moved {
            self.moved
                .insert((*at).min(self.moved.len()), moved.clone());
        }
        for (at, made) in &gone.made {
            self.made.insert((*at).min(self.made.len()), made.clone());
        }
        for (at, link) in &gone.links {
            self.links.insert((*at).min(self.links.len()), link.clone());
        }
    }

    /// The images that the guest of the one in this file has gone on to, one after the other.
    pub fn moves_from<'a>(&'a self, image: (&'a str, Identity)) -> impl Iterator<Item = &'a Moved> {
        let first = self.moved_from(image);
        // A circle is damage: each is looked at once.
        std::iter::successors(first, |moved| self.moved_from(moved.to())).take(self.moved.len())
    }

    /// The image below one that was put on top of it has been closed.
    pub fn close_covered(&mut self, closed: &Top) {
        for top in self.tops.iter_mut().filter(|top| top.is_record_of(closed)) {
            top.closed = true;
        }
    }

    /// `top`, and what is recorded to be on top of that, and so on upwards.
    #[must_use]
    pub fn upwards<'a>(&'a self, top: &'a Top) -> Vec<&'a Top> {
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

#[cfg(test)]
mod tests {
    //! What would be caught: a record that a failed command has replaced and not put back, or of what
    //! was on top of an image before it was empty; an image that is looked for though a stream has let
    //! go of it, and one that is passed over though it is a part of the disk; records in a circle that
    //! are followed for ever.

    use super::*;
    use crate::state::record::Node;
    use serde_json::json;

    fn node(file: &str) -> Node {
        Node {
            name: None,
            format: "qcow2".into(),
            file: file.into(),
        }
    }

    fn top(covered: &str, top: &str) -> Top {
        Top {
            covered: node(covered),
            identity: [0, 0],
            top: node(top),
            top_identity: [0, 0],
            exports: vec![top.to_owned()],
            open_as: json!({"driver": top}),
            closed: true,
        }
    }

    fn link(file: &str, released: &[&str]) -> Link {
        Link {
            node: node(file),
            identity: [0, 0],
            header: None,
            below: None,
            released: Vec::new(),
            released_files: released.iter().map(|&file| file.to_owned()).collect(),
            let_go: false,
        }
    }

    #[test]
    fn what_had_to_go_comes_back() {
        let tops = [top("/t", "/a"), top("/n", "/b"), top("/x", "/y")];
        let mut state = State {
            tops: tops.to_vec(),
            ..State::default()
        };
        let new = top("/t", "/n");
        let gone = state.put_top(new.clone(), true);
        assert_eq!(state.tops, [tops[2].clone(), new.clone()]);
        state.take_top_back(&new, &gone);
        assert_eq!(state.tops, tops);
    }

    /// What would be caught: a node that is forgotten, or that a snapshot which fails leaves recorded; what
    /// a stream has left under an image, which counts though the image is on top of another one since.
    #[test]
    fn a_node_that_a_snapshot_makes_is_recorded_with_it() {
        let of = |name: &str, covered: &str, file: &str| Top {
            top: Node {
                name: Some(name.into()),
                ..node(file)
            },
            ..top(covered, file)
        };
        let before = State {
            links: vec![link("/x", &[]), link("/a", &["/t"])],
            ..State::default()
        };
        let mut state = before.clone();
        let (first, second) = (of("a", "/t", "/a"), of("a", "/n", "/b"));
        let gone = state.put_top(first.clone(), true);
        assert_eq!(state.made, [first.made()]);
        assert_eq!(state.links, before.links[..1]);
        // Another one of this name: that one is not there any more.
        let then = state.clone();
        let replaced = state.put_top(second.clone(), true);
        assert_eq!(state.made, [second.made()]);
        state.take_top_back(&second, &replaced);
        assert_eq!(state, then);
        state.take_top_back(&first, &gone);
        assert_eq!(state, before);
        state.put_top(first, true);
        state.forget_made("a");
        assert_eq!(state.made, []);
    }

    /// What would be caught: a guest that goes on to what was on top of the image where a client has put
    /// it since; and one of another export that does not.
    #[test]
    fn a_guest_is_where_a_client_has_put_it() {
        let mut state = State::default();
        state.put_top(top("/t", "/a"), false);
        let shown = state.clone();
        state.serve(("/t", [0, 0]), ("other", false));
        assert_eq!(state, shown);
        state.serve(("/t", [0, 0]), ("/a", false));
        assert!(state.tops[0].exports.is_empty());
        state.serve(("/t", [0, 0]), ("other", true));
        assert_eq!(state.tops, []);
    }

    /// What would be caught: a snapshot or a commit that fails and leaves the records of others changed.
    #[test]
    fn a_move_that_is_taken_back_leaves_the_records_as_they_were() {
        let moved = |from: &str, to: &str| Moved {
            from: node(from),
            identity: [0, 0],
            to: node(to),
            to_identity: [0, 0],
            left: None,
        };
        let before = State {
            tops: vec![top("/base", "/o1"), top("/x", "/y")],
            moved: vec![
                moved("/base", "/z"),
                moved("/o1", "/old"),
                moved("/q", "/r"),
            ],
            ..State::default()
        };
        let mut state = before.clone();
        let new = moved("/o1", "/base");
        let gone = state.put_moved(new.clone());
        assert_eq!(state.tops, before.tops[1..]);
        assert_eq!(state.moved, [before.moved[2].clone(), new.clone()]);
        state.take_move_back(&new, &gone);
        assert_eq!(state, before);
        // On top again: no guest has left it.
        let again = top("/x", "/o1");
        let gone = state.put_top(again.clone(), false);
        assert_eq!(state.tops, [before.tops[0].clone(), again.clone()]);
        assert_eq!(
            state.moved,
            [before.moved[0].clone(), before.moved[2].clone()]
        );
        state.take_top_back(&again, &gone);
        assert_eq!(state, before);
    }

    #[test]
    fn what_was_let_go_of_does_not_stand() {
        let tops = vec![top("/t", "/a"), top("/a", "/b"), top("/b", "/c")];
        let mut state = State {
            tops: tops.clone(),
            ..State::default()
        };
        let on_top = |state: &State| state.standing(&tops[0]).top.file;
        assert_eq!(on_top(&state), "/a");
        assert!(!state.has_let_go(&tops[0]));
        // A stream into the one on top leaves the one between.
        state.links = vec![link("/c", &["/a"])];
        assert_eq!(on_top(&state), "/b");
        state.links = vec![link("/c", &["/b", "/a"])];
        let standing = state.standing(&tops[0]);
        assert_eq!(standing.top.file, "/c");
        assert_eq!(standing.covered, tops[0].covered);
        assert_eq!(standing.open_as, tops[2].open_as);
        assert_eq!(standing.exports, ["/a", "/b", "/c"]);
        assert!(!state.has_let_go(&tops[0]));
        state.links.push(link("/c", &["/t"]));
        assert!(state.has_let_go(&tops[0]));
        // By somebody else's stream.
        state.links = vec![link("/z", &["/a", "/t"])];
        assert_eq!(on_top(&state), "/a");
        assert!(!state.has_let_go(&tops[0]));
        state.tops.push(top("/c", "/t"));
        assert_eq!(on_top(&state), "/a");
    }
}
