//! `null-co` and `null-aio`: storage that keeps nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use serde_json::{Map, Value, json};

use super::{layer, raw};
use crate::error::Result;
use crate::format::{Format, Raw};
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opened, Opening};
use crate::graph::{Graph, Node};
use crate::options::{BlockdevOptions, NullOptions};
use crate::storage::{Null, Storage};

impl Driver for NullOptions {
    /// Its bytes are zeros, whatever it was told: so others are to read them.
    fn describe(&self, options: &mut Map<String, Value>) {
        options.insert("size".into(), self.size.into());
        options.insert("read-zeroes".into(), true.into());
    }
}

impl OpenNode for NullOptions {
    fn open<'a>(
        &'a self,
        _opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        _descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        let told = told(options.driver.name(), self);
        let storage = Null::new(told.clone(), self.size)
            .with_latency(Duration::from_nanos(self.latency_ns))
            .known_zero(self.read_zeroes);
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let format = Format::Raw(Raw::new(self.size.next_multiple_of(512)));
        let layer = layer(name, options, (format, storage));
        let node = Node::new(options.clone(), layer, PathBuf::from(told));
        Box::pin(std::future::ready(Ok(node)))
    }

    fn reopen<'a>(
        &'a self,
        graph: &'a Graph,
        node: &'a Node,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(raw::reopen(graph, node))
    }
}

/// What stands for the name of a file, as QEMU has it: how long operations take is no part of it.
fn told(driver: &str, options: &NullOptions) -> String {
    let default = NullOptions::default();
    if options.size == default.size && options.read_zeroes == default.read_zeroes {
        return format!("{driver}://");
    }
    let mut map = Map::new();
    map.insert("driver".into(), json!(driver));
    if options.size != default.size {
        map.insert("size".into(), json!(options.size));
    }
    if options.read_zeroes != default.read_zeroes {
        map.insert("read-zeroes".into(), json!(options.read_zeroes));
    }
    format!("json:{}", Value::Object(map))
}
