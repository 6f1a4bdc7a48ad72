//! Serves a raw file until its standard input ends: for measurements by hand.
//! `EXPORT_FILE=disk.raw EXPORT_SOCKET=/tmp/s cargo test --release --test export_serve -- --ignored`

use std::sync::Arc;

use stratablk::chain::{Chain, Layer, Root};
use stratablk::export::{Export, ExportConfig, SocketSource};
use stratablk::format::{Format, Raw};
use stratablk::storage::{FileStorage, Storage, file::OpenFlags};

#[test]
#[ignore = "a program, not a test"]
fn serve() {
    let var = |name: &str| std::env::var(name).unwrap();
    let flags = OpenFlags {
        writable: true,
        direct: std::env::var("EXPORT_DIRECT").is_ok(),
        ..OpenFlags::default()
    };
    let storage: Arc<dyn Storage> =
        Arc::new(FileStorage::open(var("EXPORT_FILE").as_ref(), flags).unwrap());
    let size = storage.len().unwrap();
    let layer = Layer {
        name: "node0".into(),
        format: Format::Raw(Raw::new(0, size)),
        storage,
        read_only: false,
        discard: true,
        copy_on_read: false,
    };
    let mut config = ExportConfig::new("disk0", SocketSource::Path(var("EXPORT_SOCKET").into()));
    config.writable = true;
    if let Ok(us) = std::env::var("EXPORT_POLL") {
        config.poll_max_us = us.parse().unwrap();
    }
    let root = Root::new(Chain::new(vec![Arc::new(layer)]).unwrap());
    let export = Export::start(config, root).unwrap();
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    for stats in export.stats() {
        eprintln!("{stats:?}");
    }
    export.shutdown();
}
