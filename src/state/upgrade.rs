//! States of earlier versions, made into the next one's.

use serde_json::{Value, json};

/// From version 1, where jobs had no numbers, nothing told a file from another one of the same
/// path, and a commit said whether its link was to be kept: now all are.
pub(super) fn to_2(mut state: Value) -> Result<Value, String> {
    for link in list(&mut state, "links")? {
        link_to_2(link)?;
    }
    let jobs = list(&mut state, "jobs")?;
    for (number, job) in jobs.iter_mut().enumerate() {
        put(job, "number", json!(number))?;
        let work = job.get_mut("work").ok_or("a job has no 'work'")?;
        put(work, "identity", json!([0, 0]))?;
        if let Some(commit) = job.get_mut("commit").filter(|commit| !commit.is_null()) {
            object(commit)?.remove("keep");
            link_to_2(commit.get_mut("link").ok_or("a commit has no 'link'")?)?;
        }
    }
    let next = jobs.len();
    put(&mut state, "next-job", json!(next))?;
    for failed in list(&mut state, "failed-syncs")? {
        put(failed, "identity", json!([0, 0]))?;
    }
    Ok(state)
}

/// From version 2, which knew no commits: nothing is to be changed.
pub(super) fn to_3(state: Value) -> Result<Value, String> {
    Ok(state)
}

/// From version 3, in which jobs had no filters and nodes that snapshots have made were not recorded by
/// themselves: nothing is to be changed.
pub(super) fn to_4(state: Value) -> Result<Value, String> {
    Ok(state)
}

fn link_to_2(link: &mut Value) -> Result<(), String> {
    put(link, "identity", json!([0, 0]))?;
    put(link, "released-files", json!([]))
}

fn list<'a>(state: &'a mut Value, key: &str) -> Result<&'a mut Vec<Value>, String> {
    let list = state.get_mut(key).and_then(Value::as_array_mut);
    list.ok_or_else(|| format!("it has no list '{key}'"))
}

fn object(value: &mut Value) -> Result<&mut serde_json::Map<String, Value>, String> {
    let text = "a number or text stands where a record is expected";
    value.as_object_mut().ok_or_else(|| text.to_owned())
}

fn put(record: &mut Value, key: &str, value: Value) -> Result<(), String> {
    object(record)?.insert(key.to_owned(), value);
    Ok(())
}
