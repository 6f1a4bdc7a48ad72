//! What is recorded: plain data, in terms of images and not of the process that had them open.
//!
//! Each change of these types is a new version of the file's format (`text`).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::graph::recorded::is_same_image;
pub use crate::storage::{Content, Identity, are_different};

/// All that a daemon records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct State {
    /// What lies under images since streams have ended.
    pub links: Vec<Link>,
    /// The jobs, in the order of their making.
    pub jobs: Vec<Job>,
    /// The number of the next job that is added.
    pub next_job: u64,
    /// Files that could not be made stable.
    pub failed_syncs: Vec<FailedSync>,
    /// What was added and removed while the daemon ran.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub changes: Changes,
    /// Which images were put on top of others, in that order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tops: Vec<Top>,
    /// Images whose guests write other ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moved: Vec<Moved>,
    /// Nodes that snapshots have made and clients have named, in that order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub made: Vec<Made>,
}

/// How what there is differs from what the command line names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Changes {
    /// Nodes.
    pub nodes: Changed,
    /// Exports.
    pub exports: Changed,
    /// Helper objects.
    pub objects: Changed,
}

impl Changes {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What was added and removed of one kind. Options are as clients give them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Changed {
    /// The options of those that are there and that the command line does not name, in the order
    /// of their making.
    pub added: Vec<Value>,
    /// The options of those that the command line names and that are not there, or have other
    /// options by now.
    pub removed: Vec<Value>,
}

/// An image that was committed while a guest wrote it: the guest writes the base since, and what the
/// image has is out of date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Moved {
    /// The image that the guest has left.
    pub from: Node,
    /// Its file.
    pub identity: Identity,
    /// The image that the guest writes.
    pub to: Node,
    /// Its file.
    pub to_identity: Identity,
    /// What was in the files of the image that the guest has left, from when nothing was on its way there
    /// any more: who has changed it since has made another disk of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Vec<Content>>,
}

/// A node, so that it is found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Node {
    /// Its name, if somebody gave it one.
    pub name: Option<String>,
    /// Its format.
    pub format: String,
    /// What its bytes are in: the path of a file, or a part of one in the form `json:…`.
    pub file: String,
}

/// A node that lies under another one, so that it can be opened anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Below {
    /// The node.
    pub node: Node,
    /// How an image's header would name it: a path, or `json:…`.
    pub open_as: String,
}

/// What an image's header says of its backing file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Header {
    /// The name.
    pub name: String,
    /// The format.
    pub format: Option<String>,
}

/// What lies under an image, as the end of a stream has left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Link {
    /// The image.
    pub node: Node,
    /// The image's file.
    pub identity: Identity,
    /// What its header says since then.
    pub header: Option<Header>,
    /// What lies under it.
    pub below: Option<Below>,
    /// The names of nodes that were under it before: they need not exist any longer.
    pub released: Vec<String>,
    /// The files of images that were under it before.
    pub released_files: Vec<String>,
    /// A stream has let go of the image, and another image has taken its path since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub let_go: bool,
}

/// An image that was put on top of another one: the guest of that one writes there since. The options
/// of a later process may still name the one below, whose guest would go back by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Top {
    /// The image below.
    pub covered: Node,
    /// Its file.
    pub identity: Identity,
    /// The image on top.
    pub top: Node,
    /// Its file.
    pub top_identity: Identity,
    /// The exports whose guests write there since.
    pub exports: Vec<String>,
    /// The options of its node, without what lies under it.
    pub open_as: serde_json::Value,
    /// The image below has been made stable, and given back to its readers. Until then it may hold
    /// what its guest has written and not flushed.
    #[serde(default = "before_closing_was_recorded")]
    pub closed: bool,
}

/// A node that a snapshot has made, and that a client gave its name to: it is there until a client
/// removes it, whatever becomes of the disk that it was put on top of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Made {
    /// The node.
    pub node: Node,
    /// Its file.
    pub identity: Identity,
    /// Its options, without what lies under it.
    pub open_as: serde_json::Value,
    /// What it was put on top of.
    pub below: Node,
    /// The file of that.
    pub below_identity: Identity,
}

/// Records of version 3 may lack it: a snapshot ended only when the image below was closed.
fn before_closing_was_recorded() -> bool {
    true
}

/// What a job does about an I/O error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// End with the error.
    #[default]
    Report,
    /// Go on with the next range, and end with the error.
    Ignore,
    /// Pause; when resumed, try the range again.
    Stop,
    /// `Stop` when there is no space left, `Report` otherwise.
    Enospc,
}

/// How the last I/O of a job went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoStatus {
    /// No error that stopped the job.
    #[default]
    Ok,
    /// The job stopped at an error.
    Failed,
    /// The job stopped because there was no space left.
    NoSpace,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Job {
    /// No other record has it, or had it.
    pub number: u64,
    /// Its name.
    pub id: String,
    /// What it does.
    pub work: Work,
    /// The name that its client has given the node which stands for it in the graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// How much there was to do when it began, in bytes.
    pub len: u64,
    /// Its speed limit in bytes per second; 0 is none.
    pub speed: u64,
    /// What it does about errors.
    pub on_error: OnError,
    /// Whether its result is put in force without being asked.
    pub auto_finalize: bool,
    /// Whether it disappears when it is over.
    pub auto_dismiss: bool,
    /// It was told to pause, or an error made it.
    pub paused: bool,
    /// How its last I/O went.
    pub io_status: IoStatus,
    /// It was told to give up.
    pub cancelled: bool,
    /// Its client, to whom it was ready, has asked for the result.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub completing: bool,
    /// It was told to put its result in force.
    pub finalized: bool,
    /// What its result is, from when that is about to be put in force.
    pub commit: Option<Commit>,
    /// How it ended, if it is over and waits to be dismissed.
    pub end: Option<End>,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Work {
    /// It copies into an image what it takes from those below.
    Stream(Stream),
    /// It copies what images hold into the one below them.
    Commit(Committed),
}

impl Work {
    /// What kind of job does it, as clients call it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Stream(_) => "stream",
            Self::Commit(_) => "commit",
        }
    }

    /// The image that it is about, and its file: its header, or what is recorded of its guest, says
    /// whether the result is in force.
    #[must_use]
    pub fn target(&self) -> (&Node, Identity) {
        match self {
            Self::Stream(stream) => (&stream.target, stream.identity),
            Self::Commit(commit) => (
                commit.overlay.as_ref().unwrap_or(&commit.top),
                commit.identity,
            ),
        }
    }

    /// The images that are changed, and their files.
    pub fn changed(&self) -> impl Iterator<Item = (&Node, Identity)> {
        let base = match self {
            Self::Stream(_) => None,
            Self::Commit(commit) => Some((&commit.base, commit.base_identity)),
        };
        [self.target()].into_iter().chain(base)
    }
}

/// A commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Committed {
    /// The image over the layers; none where a guest writes the first of them.
    pub overlay: Option<Node>,
    /// The file of the image over the layers, or of the first of them.
    pub identity: Identity,
    /// The first of the layers.
    pub top: Node,
    /// What they are committed into.
    pub base: Node,
    /// The file of what they are committed into.
    pub base_identity: Identity,
    /// What to write into the header, where the base's own name is not wanted.
    pub backing_file: Option<String>,
}

/// A stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Stream {
    /// The image streamed into.
    pub target: Node,
    /// The file of the image streamed into.
    pub identity: Identity,
    /// The one to stop above; none for the whole chain.
    pub base: Option<Node>,
    /// What to write into the header, where the base's own name is not wanted.
    pub backing_file: Option<String>,
    /// Clusters are compressed where that makes them smaller.
    pub compress: bool,
}

/// The result of a job. It is in force as soon as the image's header says what stands here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Commit {
    /// What lies under the image then.
    pub link: Link,
    /// The header has been changed: what it says now is the result's.
    pub done: bool,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct End {
    /// Why it failed.
    pub error: Option<String>,
    /// How much there was to do, in bytes.
    pub len: u64,
    /// How much of it was done.
    pub offset: u64,
    /// Bytes that were copied by the process that ended it.
    pub copied: u64,
}

/// A file that could not be made stable. Flushes of it fail until an operator says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FailedSync {
    /// The path that the file had.
    pub file: String,
    /// The file.
    pub identity: Identity,
    /// The system's error number.
    pub errno: i32,
    /// When that was, in seconds since 1970.
    pub at: u64,
}

impl Job {
    /// Its result, if it has one that is recorded, is in force.
    pub fn in_force(&mut self) {
        if let Some(commit) = &mut self.commit {
            commit.done = true;
        }
    }
}

impl Link {
    /// What an older link of the same image has let go of is not under it now either, but for what
    /// lies there again.
    fn release_as_well(&mut self, older: Self) {
        let below = self.below.as_ref().map(|below| &below.node);
        let name = below.and_then(|node| node.name.clone());
        let file = below.map(|node| node.file.clone());
        for released in older.released {
            let own = self.node.name.as_ref() == Some(&released);
            if !own && name.as_ref() != Some(&released) && !self.released.contains(&released) {
                self.released.push(released);
            }
        }
        for released in older.released_files {
            let own = self.node.file == released;
            if !own && file.as_ref() != Some(&released) && !self.released_files.contains(&released)
            {
                self.released_files.push(released);
            }
        }
    }

    /// Whether both are about the same image.
    #[must_use]
    pub fn supersedes(&self, other: &Self) -> bool {
        is_same_image(
            (&self.node.file, self.identity),
            (&other.node.file, other.identity),
        )
    }
}

impl State {
    /// Adds a job, and returns the number that it gets.
    ///
    /// # Errors
    /// When one of its name is there.
    pub fn add_job(&mut self, job: Job) -> Result<u64, String> {
        if self.job_named(&job.id).is_some() {
            return Err(format!("A job '{}' is recorded already", job.id));
        }
        let number = self.next_job;
        self.next_job += 1;
        self.jobs.push(Job { number, ..job });
        Ok(number)
    }

    /// The record of the job with this number.
    pub fn job_mut(&mut self, number: u64) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.number == number)
    }

    /// The record of the job of this name.
    pub fn job_named(&mut self, id: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.id == id)
    }

    /// Records what was in an image that a guest has left.
    pub fn keep_left(&mut self, moved: &Moved, left: Vec<Content>) {
        let of = |other: &&mut Moved| {
            is_same_image(
                (&other.from.file, other.identity),
                (&moved.from.file, moved.identity),
            ) && other.to.file == moved.to.file
        };
        if let Some(moved) = self.moved.iter_mut().find(of) {
            moved.left = Some(left);
        }
    }

    /// Forgets that guests have left the image in this file: one writes it again.
    pub fn forget_moved(&mut self, image: (&str, Identity)) {
        self.moved
            .retain(|moved| !is_same_image((&moved.from.file, moved.identity), image));
    }

    /// Where the guest of the image in this file has gone, if it has.
    #[must_use]
    pub fn moved_from(&self, image: (&str, Identity)) -> Option<&Moved> {
        let mut moved = self.moved.iter();
        moved.find(|moved| is_same_image((&moved.from.file, moved.identity), image))
    }

    /// Forgets a job. What lies under the image of one that has `completed` stays recorded: options
    /// of a later process may say otherwise, whatever those of this one say. Where the header may
    /// have been changed before the job failed, that stays, too, under a name that no client can
    /// give, until it is [decided](Self::decide).
    pub fn remove_job(&mut self, number: u64, completed: bool) {
        let Some(at) = self.jobs.iter().position(|job| job.number == number) else {
            return;
        };
        let mut job = self.jobs.remove(at);
        match &job.commit {
            Some(commit) if completed || commit.done => self.put_link(commit.link.clone()),
            Some(_) => {
                job.id = format!("#{number}");
                job.auto_dismiss = true;
                job.end.get_or_insert(End {
                    error: Some("the header may have been changed".to_owned()),
                    len: job.len,
                    offset: 0,
                    copied: 0,
                });
                self.jobs.insert(at, job);
            }
            None => {}
        }
    }

    /// The header of a job's image says whether the job's result is in force.
    pub fn decide(&mut self, number: u64, in_force: bool) {
        let Some(job) = self.job_mut(number) else {
            return;
        };
        match in_force {
            true => job.in_force(),
            false => job.commit = None,
        }
        if job.end.is_some() && job.auto_dismiss {
            self.remove_job(number, in_force);
        }
    }

    pub(super) fn put_link(&mut self, mut link: Link) {
        let links = std::mem::take(&mut self.links);
        let (superseded, mut links): (Vec<_>, Vec<_>) =
            links.into_iter().partition(|other| link.supersedes(other));
        for other in superseded {
            link.release_as_well(other);
        }
        // The path is in use again; what was let go of there before stays so.
        let file = &link.node.file;
        let mut was_let_go = false;
        for other in &mut links {
            was_let_go |= other.released_files.contains(file);
            other.released_files.retain(|released| released != file);
        }
        for other in links.iter_mut().filter(|other| other.node.file == *file) {
            other.let_go |= was_let_go;
        }
        self.links = links;
        self.links.push(link);
    }
}
