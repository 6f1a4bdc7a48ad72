//! What an image's header says, in the form of `qemu-img info --output=json`.

use super::open::probe;
use super::snapshot;
use crate::chain::graph::resolve;
use crate::error::{Action, Error, Result};
use crate::format::qcow2::header::{Backing, INCOMPATIBLE_DIRTY};
use crate::format::qcow2::{bitmaps, describe_header, format_specific};
use crate::format::{Format, Qed};
use crate::storage::file::OpenFlags;
use crate::storage::{FileStorage, Storage};
use serde_json::{Map, Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A described image.
pub struct Described {
    /// In QEMU's form.
    pub value: Value,
    /// Where its backing file is and what format it is said to have.
    pub below: Option<(PathBuf, Option<String>)>,
}

/// Describes the image in `path`; nothing under it is opened, and it may be in use.
pub async fn describe(path: &Path, format: Option<&str>) -> Result<Described> {
    let format = match format {
        Some(format) => format,
        None => probe(path)?,
    };
    let flags = OpenFlags {
        force_share: true,
        ..OpenFlags::default()
    };
    let storage = FileStorage::open(path, flags).map_err(|e| Error::Invalid(e.to_string()))?;
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let file = FileInfo::of(path, &*storage)?;
    let mut value = Map::new();
    value.insert(
        "children".to_owned(),
        json!([{"name": "file", "info": file.to_json()}]),
    );
    let backing = match format {
        "raw" | "file" | "host_device" => {
            let size = file.len.next_multiple_of(512);
            common(&mut value, &file, "raw", size, None);
            value.insert("dirty-flag".to_owned(), json!(false));
            None
        }
        "qcow2" => describe_qcow2(&mut value, &file, &storage).await?,
        "qed" => {
            let image = Qed::open(storage).await?;
            let backing = image.backing().cloned();
            let image = Format::Qed(Arc::new(image));
            let cluster = Some(image.cluster_size());
            common(&mut value, &file, "qed", image.size(), cluster);
            value.insert("dirty-flag".to_owned(), json!(false));
            backing
        }
        other => {
            return Err(Error::Invalid(format!(
                "Unknown driver '{other}' (expected raw, qcow2 or qed)"
            )));
        }
    };
    let below = backing.map(|backing| name_below(&mut value, path, backing));
    Ok(Described {
        value: Value::Object(value),
        below,
    })
}

/// The file that an image is in.
struct FileInfo {
    name: String,
    len: u64,
    allocated: u64,
    device: bool,
}

impl FileInfo {
    fn of(path: &Path, storage: &dyn Storage) -> Result<Self> {
        let failed = |error| Error::io(Action::Read, storage.name(), 0, &error);
        let metadata = std::fs::metadata(path).map_err(failed)?;
        Ok(Self {
            name: path.display().to_string(),
            len: storage.len().map_err(failed)?,
            allocated: metadata.blocks() * 512,
            device: metadata.file_type().is_block_device(),
        })
    }

    fn driver(&self) -> &'static str {
        if self.device { "host_device" } else { "file" }
    }

    fn to_json(&self) -> Value {
        json!({
            "children": [],
            // QEMU counts in sectors.
            "virtual-size": self.len.next_multiple_of(512),
            "filename": self.name,
            "format": self.driver(),
            "actual-size": self.allocated,
            "format-specific": {"type": self.driver(), "data": {}},
            "dirty-flag": false,
        })
    }
}

fn common(
    value: &mut Map<String, Value>,
    file: &FileInfo,
    format: &str,
    size: u64,
    cluster: Option<u64>,
) {
    value.insert("virtual-size".to_owned(), json!(size));
    value.insert("filename".to_owned(), json!(file.name));
    if let Some(cluster) = cluster {
        value.insert("cluster-size".to_owned(), json!(cluster));
    }
    value.insert("format".to_owned(), json!(format));
    value.insert("actual-size".to_owned(), json!(file.allocated));
}

async fn describe_qcow2(
    value: &mut Map<String, Value>,
    file: &FileInfo,
    storage: &Arc<dyn Storage>,
) -> Result<Option<Backing>> {
    let header = describe_header(&**storage).await?;
    let size = header.size.next_multiple_of(512);
    common(value, file, "qcow2", size, Some(1 << header.cluster_bits));
    let snapshots = snapshot::of_image(&**storage, &header).await?;
    if !snapshots.is_empty() {
        value.insert("snapshots".to_owned(), Value::Array(snapshots));
    }
    let bitmaps = bitmaps::list(&**storage, &header).await?;
    value.insert(
        "format-specific".to_owned(),
        format_specific(&header, &bitmaps),
    );
    if header.encryption.is_some() {
        value.insert("encrypted".to_owned(), json!(true));
    }
    let dirty = header.incompatible & INCOMPATIBLE_DIRTY != 0;
    value.insert("dirty-flag".to_owned(), json!(dirty));
    Ok(header.backing)
}

/// Adds how the image names its backing file. Returns where that is.
fn name_below(
    value: &mut Map<String, Value>,
    image: &Path,
    backing: Backing,
) -> (PathBuf, Option<String>) {
    let plain = backing.name.strip_prefix("file:").unwrap_or(&backing.name);
    let path = if plain.starts_with("json:") {
        PathBuf::from(plain)
    } else {
        resolve(image, plain)
    };
    value.insert("backing-filename".to_owned(), json!(backing.name));
    value.insert(
        "full-backing-filename".to_owned(),
        json!(path.display().to_string()),
    );
    if let Some(format) = &backing.format {
        value.insert("backing-filename-format".to_owned(), json!(format));
    }
    (path, backing.format)
}
