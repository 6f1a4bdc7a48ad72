//! Writing [`BlockdevOptions`] as a JSON value, so that another process opens the same.

use serde_json::{Map, Value, json};

use super::blockdev::{
    Aio, BlockRef, BlockdevOptions, DetectZeroes, Discard, Driver, FileOptions, Locking,
    NullOptions, OverlapCheck, Qcow2Options,
};

/// The node of a name, as a value; `None`: it is written as the name.
type ByName<'a> = &'a dyn Fn(&str) -> Option<Value>;

impl BlockdevOptions {
    /// The options with every default spelled out, without what lies under an image. Nodes that are
    /// referred to are written as `by_name` says.
    pub fn to_value_by(&self, by_name: ByName<'_>) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("driver", json!(self.driver.name()));
        if let Some(name) = &self.node_name {
            put("node-name", json!(name));
        }
        put("read-only", json!(self.read_only));
        put("auto-read-only", json!(self.auto_read_only));
        put("force-share", json!(self.force_share));
        let discard = match self.discard {
            Discard::Ignore => "ignore",
            Discard::Unmap => "unmap",
        };
        put("discard", json!(discard));
        let zeroes = match self.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        };
        put("detect-zeroes", json!(zeroes));
        let cache = self.cache;
        put(
            "cache",
            json!({"direct": cache.direct, "no-flush": cache.no_flush}),
        );
        match &self.driver {
            Driver::File(file) | Driver::HostDevice(file) => write_file(file, &mut map),
            Driver::Raw(raw) => {
                map.insert("offset".into(), json!(raw.offset));
                map.extend(raw.size.map(|size| ("size".into(), json!(size))));
            }
            Driver::Qcow2(qcow2) => write_qcow2(qcow2, &mut map),
            Driver::CopyOnRead(filter) => {
                let bottom = filter.bottom.as_ref();
                map.extend(bottom.map(|bottom| ("bottom".into(), json!(bottom))));
            }
            Driver::NullCo(null) | Driver::NullAio(null) => map.extend(null.members()),
            Driver::Blkdebug(blkdebug) => map.extend(blkdebug.members()),
            Driver::Qed(_) | Driver::Auto(_) => {}
        }
        for (key, child) in self.children() {
            if key != "backing" {
                map.insert(key.to_owned(), child.to_value_by(by_name));
            }
        }
        Value::Object(map)
    }
}

impl BlockRef {
    fn to_value_by(&self, by_name: ByName<'_>) -> Value {
        match self {
            BlockRef::Name(name) => by_name(name).unwrap_or_else(|| json!(name)),
            BlockRef::Inline(options) => options.to_value_by(by_name),
        }
    }
}

impl NullOptions {
    /// Its own options as members.
    pub(super) fn members(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("size".into(), json!(self.size));
        map.insert("latency-ns".into(), json!(self.latency_ns));
        map.insert("read-zeroes".into(), json!(self.read_zeroes));
        map
    }
}

fn write_file(file: &FileOptions, map: &mut Map<String, Value>) {
    let path = std::path::absolute(&file.filename);
    let path = path.unwrap_or_else(|_| file.filename.clone());
    map.insert("filename".into(), json!(path.display().to_string()));
    let aio = file.aio.map(|aio| match aio {
        Aio::Threads => "threads",
        Aio::Native => "native",
        Aio::IoUring => "io_uring",
    });
    map.extend(aio.map(|aio| ("aio".into(), json!(aio))));
    let locking = match file.locking {
        Locking::Auto => "auto",
        Locking::On => "on",
        Locking::Off => "off",
    };
    map.insert("locking".into(), json!(locking));
}

fn write_qcow2(qcow2: &Qcow2Options, map: &mut Map<String, Value>) {
    let overlap = match qcow2.overlap_check {
        OverlapCheck::None => "none",
        OverlapCheck::Constant => "constant",
        OverlapCheck::Cached => "cached",
        OverlapCheck::All => "all",
    };
    for (key, value) in [
        ("copy-on-read", Some(json!(qcow2.copy_on_read))),
        ("lazy-refcounts", qcow2.lazy_refcounts.map(Value::from)),
        (
            "pass-discard-request",
            qcow2.pass_discard_request.map(Value::from),
        ),
        (
            "pass-discard-snapshot",
            Some(json!(qcow2.pass_discard_snapshot)),
        ),
        ("pass-discard-other", Some(json!(qcow2.pass_discard_other))),
        ("discard-no-unref", Some(json!(qcow2.discard_no_unref))),
        ("overlap-check", Some(json!(overlap))),
        ("cache-size", qcow2.cache_size.map(Value::from)),
        ("l2-cache-size", qcow2.l2_cache_size.map(Value::from)),
        (
            "l2-cache-entry-size",
            qcow2.l2_cache_entry_size.map(Value::from),
        ),
        (
            "refcount-cache-size",
            qcow2.refcount_cache_size.map(Value::from),
        ),
        (
            "cache-clean-interval",
            qcow2.cache_clean_interval.map(Value::from),
        ),
    ] {
        map.extend(value.map(|value| (key.to_owned(), value)));
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an option that another process would not have.

    use super::*;
    use crate::options::Dialect;

    fn again(value: &Value, by_name: ByName<'_>) -> (BlockdevOptions, BlockdevOptions) {
        let options = BlockdevOptions::from_value(value, Dialect::Json).unwrap();
        let written = options.to_value_by(by_name);
        let read = BlockdevOptions::from_value(&written, Dialect::Json);
        (
            options,
            read.unwrap_or_else(|error| panic!("{written}: {error}")),
        )
    }

    #[test]
    fn what_is_written_is_read_again() {
        let file = json!({"driver": "file", "filename": "/a", "aio": "native", "locking": "off",
            "discard": "ignore"});
        for value in [
            json!({"driver": "qcow2", "node-name": "n", "discard": "unmap",
                "detect-zeroes": "unmap", "cache": {"direct": true, "no-flush": true},
                "auto-read-only": true, "copy-on-read": true, "lazy-refcounts": false,
                "pass-discard-request": false, "pass-discard-snapshot": false,
                "pass-discard-other": true, "discard-no-unref": true, "overlap-check": "all",
                "l2-cache-size": 1 << 20, "l2-cache-entry-size": 4096,
                "refcount-cache-size": 1 << 18, "cache-clean-interval": 7,
                "file": file, "data-file": {"driver": "file", "filename": "/d"}}),
            json!({"driver": "qcow2", "node-name": "n", "cache-size": 1 << 20,
                "read-only": true, "force-share": true, "file": file}),
            json!({"driver": "raw", "node-name": "r", "offset": 512, "size": 1024, "file": "f"}),
            json!({"driver": "copy-on-read", "node-name": "c", "bottom": "b", "file": "f"}),
            json!({"driver": "host_device", "node-name": "h", "filename": "/dev/x"}),
            json!({"driver": "blkdebug", "node-name": "d", "image": "f", "config": "/rules",
                "align": 512, "max-transfer": 1024,
                "inject-error": [{"event": "l2_load", "state": 2, "iotype": "read", "errno": 28,
                    "sector": 7, "once": true, "immediately": true}, {"event": "none"}],
                "set-state": [{"event": "none", "state": 1, "new_state": 3},
                    {"event": "read_aio", "new_state": 1}]}),
            json!({"driver": "null-aio", "node-name": "z", "size": 512, "latency-ns": 7,
                "read-zeroes": true}),
        ] {
            let (options, read) = again(&value, &|_| None);
            assert_eq!(options, read);
        }
    }

    #[test]
    fn nodes_that_are_referred_to_are_written_in_place() {
        let value = json!({"driver": "raw", "node-name": "r", "file": "f"});
        let file = json!({"driver": "file", "filename": "/x"});
        let (_, read) = again(&value, &|name| (name == "f").then(|| file.clone()));
        let children = read.children();
        assert!(matches!(children[..], [("file", BlockRef::Inline(_))]));
    }
}
