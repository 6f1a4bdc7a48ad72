//! Options as JSON values again: the form in which `from_value` reads them, with every default
//! spelled out. What is written here and read back is the same options.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::blockdev::{
    Aio, BackingRef, BlockRef, BlockdevOptions, DetectZeroes, Discard, Driver, FileOptions,
    Locking, OverlapCheck, Qcow2Options,
};
use super::export::{ExportOptions, SOCKET_PATH_MAX, SocketAddress};
use super::object::ObjectOptions;

/// The members of an object that is being written.
struct Members(Map<String, Value>);

impl Members {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    fn put_some(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }
}

/// A path as another process finds it, which may begin in another folder.
fn absolute(path: &mut PathBuf) {
    if let Ok(absolute) = std::path::absolute(&*path) {
        *path = absolute;
    }
}

impl BlockdevOptions {
    /// The same options for a process that begins in another folder.
    #[must_use]
    pub fn with_absolute_paths(mut self) -> Self {
        match &mut self.driver {
            Driver::File(file) | Driver::HostDevice(file) => absolute(&mut file.filename),
            Driver::Blkdebug(blkdebug) => {
                blkdebug.config.as_mut().map(absolute);
            }
            _ => {}
        }
        for child in self.driver.children_mut() {
            if let BlockRef::Inline(inner) = child {
                **inner = inner.as_ref().clone().with_absolute_paths();
            }
        }
        self
    }

    /// The node with all nodes that are written inside it, as `blockdev-add` takes it.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut members = Members(Map::new());
        members.put("driver", self.driver.name());
        members.put_some("node-name", self.node_name.clone());
        members.put("read-only", self.read_only);
        members.put("auto-read-only", self.auto_read_only);
        members.put("force-share", self.force_share);
        members.put("discard", self.discard.word());
        members.put("detect-zeroes", self.detect_zeroes.word());
        let cache = json!({"direct": self.cache.direct, "no-flush": self.cache.no_flush});
        members.put("cache", cache);
        self.driver.write(&mut members);
        Value::Object(members.0)
    }
}

impl Discard {
    fn word(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Unmap => "unmap",
        }
    }
}

impl DetectZeroes {
    /// The word for it in options and answers.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

impl Driver {
    fn write(&self, members: &mut Members) {
        match self {
            Self::File(file) | Self::HostDevice(file) => file.write(members),
            Self::Raw(raw) => {
                members.put("file", raw.file.to_value());
                members.put("offset", raw.offset);
                members.put_some("size", raw.size);
            }
            Self::Qcow2(qcow2) => qcow2.write(members),
            Self::Qed(qed) => {
                members.put("file", qed.file.to_value());
                members.put_some("backing", qed.backing.to_value());
            }
            Self::CopyOnRead(filter) => {
                members.put("file", filter.file.to_value());
                members.put_some("bottom", filter.bottom.clone());
            }
            Self::NullCo(null) | Self::NullAio(null) => {
                members.put("size", null.size);
                members.put("latency-ns", null.latency_ns);
                members.put("read-zeroes", null.read_zeroes);
            }
            Self::Blkdebug(blkdebug) => {
                members.put("image", blkdebug.image.to_value());
                members.0.extend(blkdebug.members());
            }
            Self::Auto(probed) => {
                members.put("file", probed.file.to_value());
                members.put("copy-on-read", probed.copy_on_read);
            }
        }
    }
}

impl FileOptions {
    fn write(&self, members: &mut Members) {
        members.put("filename", self.filename.display().to_string());
        members.put_some(
            "aio",
            self.aio.map(|aio| match aio {
                Aio::Threads => "threads",
                Aio::Native => "native",
                Aio::IoUring => "io_uring",
            }),
        );
        let locking = match self.locking {
            Locking::Auto => "auto",
            Locking::On => "on",
            Locking::Off => "off",
        };
        members.put("locking", locking);
    }
}

impl Qcow2Options {
    fn write(&self, members: &mut Members) {
        members.put("file", self.file.to_value());
        members.put_some("backing", self.backing.to_value());
        members.put_some("data-file", self.data_file.as_ref().map(BlockRef::to_value));
        // QEMU has no such option: it is said only where it says something.
        members.put_some("copy-on-read", self.copy_on_read.then_some(true));
        members.put_some("lazy-refcounts", self.lazy_refcounts);
        members.put_some("pass-discard-request", self.pass_discard_request);
        members.put("pass-discard-snapshot", self.pass_discard_snapshot);
        members.put("pass-discard-other", self.pass_discard_other);
        members.put("discard-no-unref", self.discard_no_unref);
        let overlap = match self.overlap_check {
            OverlapCheck::None => "none",
            OverlapCheck::Constant => "constant",
            OverlapCheck::Cached => "cached",
            OverlapCheck::All => "all",
        };
        members.put("overlap-check", overlap);
        members.put_some("cache-size", self.cache_size);
        members.put_some("l2-cache-size", self.l2_cache_size);
        members.put_some("l2-cache-entry-size", self.l2_cache_entry_size);
        members.put_some("refcount-cache-size", self.refcount_cache_size);
        members.put_some("cache-clean-interval", self.cache_clean_interval);
    }
}

impl BlockRef {
    fn to_value(&self) -> Value {
        match self {
            Self::Name(name) => json!(name),
            Self::Inline(node) => node.to_value(),
        }
    }
}

impl BackingRef {
    fn to_value(&self) -> Option<Value> {
        match self {
            Self::Default => None,
            Self::None => Some(Value::Null),
            Self::Node(node) => Some(node.to_value()),
        }
    }
}

impl ExportOptions {
    /// The same options for a process that begins in another folder.
    #[must_use]
    pub fn with_absolute_paths(mut self) -> Self {
        if let SocketAddress::Unix(path) = &mut self.addr {
            let given = path.clone();
            absolute(path);
            // What no socket can have would keep the next process from starting.
            if path.as_os_str().len() > SOCKET_PATH_MAX {
                *path = given;
            }
        }
        self
    }

    /// The export as `block-export-add` takes it.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut members = Members(Map::new());
        members.put("type", "vhost-user-blk");
        members.put("id", self.id.clone());
        members.put("node-name", self.node_name.clone());
        let addr = match &self.addr {
            SocketAddress::Unix(path) => {
                json!({"type": "unix", "path": path.display().to_string()})
            }
            SocketAddress::Fd(fd) => json!({"type": "fd", "str": fd.to_string()}),
        };
        members.put("addr", addr);
        members.put("writable", self.writable);
        members.put("writethrough", self.writethrough);
        members.put("num-queues", self.num_queues);
        members.put("logical-block-size", self.logical_block_size);
        members.put_some("iothread", self.iothread.clone());
        members.put_some("serial", self.serial.clone());
        Value::Object(members.0)
    }
}

impl ObjectOptions {
    /// The object as `object-add` takes it.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let Self::Iothread(thread) = self;
        let mut members = Members(Map::new());
        members.put("qom-type", "iothread");
        members.put("id", thread.id.clone());
        members.put_some("poll-max-ns", thread.poll_max_ns);
        members.put_some("poll-grow", thread.poll_grow);
        members.put_some("poll-shrink", thread.poll_shrink);
        members.put_some("aio-max-batch", thread.aio_max_batch);
        Value::Object(members.0)
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: an option that is lost or changed on its way into a record and back,
    //! so that the next process opens another node than this one did.

    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::options::Dialect;

    #[test]
    fn nodes_come_back_as_they_were() {
        let nested = json!({"driver": "qcow2", "node-name": "t", "discard": "unmap",
            "detect-zeroes": "unmap", "copy-on-read": true, "lazy-refcounts": false,
            "pass-discard-request": true, "pass-discard-snapshot": false,
            "pass-discard-other": true, "discard-no-unref": true, "overlap-check": "all",
            "cache-size": 1 << 20, "l2-cache-size": 4096, "l2-cache-entry-size": 4096,
            "cache-clean-interval": 7, "cache": {"direct": true, "no-flush": true},
            "file": {"driver": "file", "filename": "a b,c", "aio": "native", "locking": "off",
                "cache": {"direct": false}},
            "data-file": "d",
            "backing": {"driver": "raw", "offset": 512, "size": 1024,
                "file": {"driver": "host_device", "filename": "/dev/x", "node-name": "x"}}});
        let list = [
            nested,
            json!({"driver": "qcow2", "node-name": "t", "file": "f", "backing": null,
                "refcount-cache-size": 65536}),
            json!({"driver": "qcow2", "node-name": "t", "file": "f", "read-only": true,
                "force-share": true, "auto-read-only": true}),
            json!({"driver": "qed", "node-name": "t", "file": "f", "backing": "b"}),
            json!({"driver": "copy-on-read", "node-name": "t", "file": "f", "bottom": "b"}),
            json!({"driver": "blkdebug", "node-name": "d", "image": "f", "config": "/rules",
                "align": 512, "max-transfer": 1024,
                "inject-error": [{"event": "l2_load", "state": 2, "iotype": "read", "errno": 28,
                    "sector": 7, "once": true, "immediately": true}, {"event": "none"}],
                "set-state": [{"event": "none", "state": 1, "new_state": 3},
                    {"event": "read_aio", "new_state": 1}]}),
            json!({"driver": "null-co", "node-name": "t", "size": 512, "read-zeroes": true}),
            json!({"driver": "null-aio", "node-name": "t", "latency-ns": 7}),
        ];
        for value in list {
            let options = BlockdevOptions::from_value(&value, Dialect::Json).unwrap();
            let written = options.to_value();
            let again = BlockdevOptions::from_value(&written, Dialect::Json).unwrap();
            assert_eq!(again, options, "{written}");
        }
    }

    /// What would be caught: a record that means another file when the next process begins elsewhere.
    #[test]
    fn paths_are_those_of_this_folder() {
        let here = std::env::current_dir().unwrap();
        let file = json!({"driver": "file", "filename": "d/x"});
        let rules = json!({"driver": "blkdebug", "image": file, "config": "r"});
        let node = json!({"driver": "qcow2", "node-name": "n", "file": rules,
            "data-file": file, "backing": {"driver": "raw", "file": file}});
        let options = BlockdevOptions::from_value(&node, Dialect::Json).unwrap();
        let written = options.with_absolute_paths().to_value();
        let path = json!(here.join("d/x"));
        assert_eq!(written["file"]["config"], json!(here.join("r")));
        assert_eq!(written["file"]["image"]["filename"], path);
        assert_eq!(written["data-file"]["filename"], path);
        assert_eq!(written["backing"]["file"]["filename"], path);
        let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
            "addr": {"type": "unix", "path": "s"}});
        let options = ExportOptions::from_value(&export, Dialect::Json).unwrap();
        let written = options.with_absolute_paths().to_value();
        assert_eq!(written["addr"]["path"], json!(here.join("s")));
        // A start would refuse the longer one.
        let long = "d/".repeat(50) + "s";
        let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
            "addr": {"type": "unix", "path": long}});
        let options = ExportOptions::from_value(&export, Dialect::Json).unwrap();
        let written = options.with_absolute_paths().to_value();
        assert_eq!(written["addr"]["path"], json!(long));
    }

    #[test]
    fn exports_and_objects_come_back_as_they_were() {
        for value in [
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": true,
                "addr": {"type": "unix", "path": "/s"}, "writethrough": true, "num-queues": 7,
                "logical-block-size": 4096, "iothread": "i", "serial": "s"}),
            json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
                "addr": {"type": "fd", "str": "9"}}),
        ] {
            let options = ExportOptions::from_value(&value, Dialect::Json).unwrap();
            let again = ExportOptions::from_value(&options.to_value(), Dialect::Json).unwrap();
            assert_eq!(again, options);
        }
        let value = json!({"qom-type": "iothread", "id": "i", "poll-max-ns": 5, "poll-grow": 2,
            "poll-shrink": 3, "aio-max-batch": 4});
        let options = ObjectOptions::from_value(&value, Dialect::Json).unwrap();
        let again = ObjectOptions::from_value(&options.to_value(), Dialect::Json).unwrap();
        assert_eq!(again, options);
    }
}
