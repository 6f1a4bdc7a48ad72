//! What there is to be seen of a daemon from outside.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::Res;
use crate::common::qmp::Qmp;

/// Answers of all queries, descriptors with their locks, and files.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    answers: BTreeMap<&'static str, Value>,
    /// What each open descriptor names, with its locks, and how many there are of it.
    pub descriptors: BTreeMap<String, usize>,
    files: BTreeMap<String, Vec<u8>>,
}

/// What of a header has to stay: all but where tables are, which may have been moved.
const HEADER: [std::ops::Range<usize>; 4] = [0..36, 60..64, 72..80, 96..512];

impl Look {
    /// Takes a look at process `pid` and the folder of its files.
    pub fn take(qmp: &mut Qmp, pid: u32, folder: &Path) -> Res<Self> {
        let mut answers = BTreeMap::new();
        for (query, arguments) in [
            ("query-named-block-nodes", json!({"flat": true})),
            ("query-block", json!({})),
            ("query-block-exports", json!({})),
            ("query-jobs", json!({})),
            ("query-block-jobs", json!({})),
            ("query-iothreads", json!({})),
            ("x-debug-query-block-graph", json!({})),
        ] {
            let mut answer = qmp.execute(query, arguments)??;
            // What a file takes on the disk is no part of the graph.
            forget(&mut answer, "actual-size");
            sort(&mut answer);
            answers.insert(query, answer);
        }
        let mut files = BTreeMap::new();
        collect(folder, folder, &mut files)?;
        Ok(Look {
            answers,
            descriptors: descriptors(pid)?,
            files,
        })
    }

    /// What is another thing than in `self`.
    pub fn difference(&self, now: &Self) -> Option<String> {
        for (query, before) in &self.answers {
            let after = now.answers.get(query);
            if let Some(text) = first_difference(before, after.unwrap_or(&Value::Null)) {
                return Some(format!("{query}{text}"));
            }
        }
        if self.descriptors != now.descriptors {
            let without = |one: &Self, other: &Self| {
                let mut left = one.descriptors.clone();
                left.retain(|name, count| other.descriptors.get(name) != Some(count));
                left
            };
            let (gone, mut new) = (without(self, now), without(now, self));
            // A file that has been opened to be written has a second descriptor from then on.
            new.retain(|name, count| {
                *count > 1 || !name.ends_with("images/mid ") && !name.ends_with("images/base ")
            });
            if !gone.is_empty() || !new.is_empty() {
                return Some(format!("descriptors: {gone:?} are now {new:?}"));
            }
        }
        let names = |look: &Self| look.files.keys().cloned().collect::<Vec<_>>();
        if names(self) != names(now) {
            return Some(format!(
                "files: {:?}\nare now {:?}",
                names(self),
                names(now)
            ));
        }
        let mut files = self.files.iter();
        let changed = files.find(|(name, bytes)| now.files.get(*name) != Some(bytes));
        changed.map(|(name, before)| {
            let [before, after] = [Some(before), now.files.get(name)].map(|bytes| {
                let bytes = bytes.map(Vec::as_slice).unwrap_or_default();
                String::from_utf8_lossy(bytes).into_owned()
            });
            match name.ends_with(".state") {
                true => format!("{name}: {before}\nis now {after}"),
                false => format!("the header of {name} is another one"),
            }
        })
    }
}

/// Where two answers differ first, and in what.
fn first_difference(before: &Value, now: &Value) -> Option<String> {
    match (before, now) {
        (Value::Object(old), Value::Object(new)) if old.keys().eq(new.keys()) => {
            let mut names = old.keys();
            names.find_map(|name| {
                let text = first_difference(&old[name], &new[name])?;
                Some(format!(".{name}{text}"))
            })
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            let mut pairs = old.iter().zip(new).enumerate();
            pairs
                .find_map(|(at, (old, new))| Some(format!("[{at}]{}", first_difference(old, new)?)))
        }
        (before, now) => (before != now).then(|| format!(": {before}\nis now {now}")),
    }
}

/// Puts lists of things with names in order, and names in the place of numbers.
fn sort(answer: &mut Value) {
    match answer {
        Value::Array(list) => sort_list(list),
        graph => sort_graph(graph),
    }
}

fn sort_list(list: &mut [Value]) {
    let names = ["node-name", "id"];
    list.sort_by_key(|item| match names.iter().find_map(|name| item.get(name)) {
        Some(name) => name.to_string(),
        None => item.to_string(),
    });
}

fn sort_graph(graph: &mut Value) {
    let nodes = graph["nodes"].as_array().into_iter().flatten();
    let names: BTreeMap<_, _> = nodes
        .map(|node| (node["id"].to_string(), node["name"].clone()))
        .collect();
    for edge in graph["edges"].as_array_mut().into_iter().flatten() {
        for end in ["parent", "child"] {
            edge[end] = names
                .get(&edge[end].to_string())
                .cloned()
                .unwrap_or_default();
        }
    }
    forget(graph, "id");
    for part in ["nodes", "edges"] {
        if let Some(list) = graph[part].as_array_mut() {
            sort_list(list);
        }
    }
}

fn forget(value: &mut Value, name: &str) {
    match value {
        Value::Object(members) => {
            members.remove(name);
            members.values_mut().for_each(|value| forget(value, name));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| forget(value, name)),
        _ => {}
    }
}

/// A record without its checksum and the number of the next job, of which a failed one has had one;
/// and without jobs that have failed when a header may have been changed, which the next process looks
/// at.
fn without_numbers(bytes: &[u8]) -> Res<Vec<u8>> {
    let mut record: Value = serde_json::from_slice(bytes)?;
    forget(&mut record, "crc32");
    forget(&mut record, "next-job");
    if let Some(jobs) = record["state"]["jobs"].as_array_mut() {
        jobs.retain(|job| job["end"]["error"] != "the header may have been changed");
    }
    Ok(record.to_string().into_bytes())
}

fn collect(top: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Res<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(top, &path, files)?;
            continue;
        }
        let name = path.strip_prefix(top)?.to_string_lossy().into_owned();
        let mut bytes = fs::read(&path)?;
        match name.ends_with(".state") {
            true => bytes = without_numbers(&bytes)?,
            false => {
                let parts = HEADER.iter().filter_map(|part| bytes.get(part.clone()));
                bytes = parts.flatten().copied().collect();
            }
        }
        files.insert(name, bytes);
    }
    Ok(())
}

fn descriptors(pid: u32) -> Res<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // It may have been closed by now.
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().display());
        let info = fs::read_to_string(info).unwrap_or_default();
        let locks = info.lines().filter(|line| line.starts_with("lock:"));
        // "lock:  1: OFDLCK ADVISORY  READ -1 00:2e:2 100 100": the kind and the range.
        let locks = locks.map(|line| {
            let words: Vec<_> = line.split_whitespace().skip(3).collect();
            words.join(" ")
        });
        let mut locks: Vec<_> = locks.collect();
        locks.sort();
        let link = link.to_string_lossy();
        // Sockets and pipes have numbers.
        let kind = link.split(":[").next().unwrap_or_default();
        *counts
            .entry(format!("{kind} {}", locks.join(", ")))
            .or_default() += 1;
    }
    Ok(counts)
}
