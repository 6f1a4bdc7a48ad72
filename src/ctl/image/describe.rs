//! What an image's header says, in the form of `qemu-img info --output=json`.

use super::open::{Purpose, common as common_options, detect};
use super::snapshot;
use crate::error::{Action, Error, Result};
use crate::format::probe::Detected;
use crate::format::qcow2::header::{Backing, Encryption, INCOMPATIBLE_DIRTY};
use crate::format::qcow2::{bitmaps, describe_header, format_specific, luks};
use crate::format::{Format, Qed};
use crate::graph::backing_options;
use crate::graph::resolve;
use crate::options::{BlockRef, BlockdevOptions, Driver};
use crate::storage::OpenFlags;
use crate::storage::{FileStorage, Storage};
use serde_json::{Map, Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A described image.
pub struct Described {
    /// In QEMU's form.
    pub value: Value,
    /// Its backing file.
    pub backing: Option<Backing>,
}

/// Describes the image in `path`; nothing under it is opened, and it may be in use.
pub async fn describe(path: &Path, format: Option<&str>) -> Result<Described> {
    let detected = match format {
        Some(_) => Detected::Raw,
        None => detect(path)?,
    };
    let format = format.unwrap_or_else(|| detected.driver());
    let flags = OpenFlags {
        force_share: true,
        ..OpenFlags::default()
    };
    let storage = FileStorage::open(path, flags).map_err(|e| Error::Invalid(e.to_string()))?;
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let file = FileInfo::of(path, &*storage).await?;
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
        other if matches!(detected, Detected::Foreign(_)) => {
            // Its size is inside, in a form that is not known here.
            foreign(&mut value, &file, other);
            None
        }
        other => {
            return Err(Error::Invalid(format!(
                "Unknown driver '{other}' (expected raw, qcow2 or qed)"
            )));
        }
    };
    if let Some(backing) = &backing {
        name_below(&mut value, path, backing);
    }
    Ok(Described {
        value: Value::Object(value),
        backing,
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
    async fn of(path: &Path, storage: &dyn Storage) -> Result<Self> {
        let failed = |error| Error::io(Action::Read, storage.name(), 0, &error);
        let metadata = std::fs::metadata(path).map_err(failed)?;
        Ok(Self {
            name: path.display().to_string(),
            len: storage.len().await.map_err(failed)?,
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

/// An image of a format that is not supported: its file is all there is to say of it.
fn foreign(value: &mut Map<String, Value>, file: &FileInfo, format: &str) {
    value.insert("filename".to_owned(), json!(file.name));
    value.insert("format".to_owned(), json!(format));
    value.insert("actual-size".to_owned(), json!(file.allocated));
}

async fn describe_qcow2(
    value: &mut Map<String, Value>,
    file: &FileInfo,
    storage: &Arc<dyn Storage>,
) -> Result<Option<Backing>> {
    let header = describe_header(&**storage).await?;
    header.check_refcount_table()?;
    let size = header.size.next_multiple_of(512);
    common(value, file, "qcow2", size, Some(1 << header.cluster_bits));
    let snapshots = snapshot::of_image(&**storage, &header).await?;
    if !snapshots.is_empty() {
        value.insert("snapshots".to_owned(), Value::Array(snapshots));
    }
    let bitmaps = bitmaps::list(&**storage, &header).await?;
    let encryption = match header.encryption {
        None => None,
        Some(Encryption::Aes) => Some(json!({"format": "aes"})),
        Some(Encryption::Luks) => Some(luks::describe(&**storage, &header).await?),
    };
    value.insert(
        "format-specific".to_owned(),
        format_specific(&header, &bitmaps, encryption),
    );
    if header.encryption.is_some() {
        value.insert("encrypted".to_owned(), json!(true));
    }
    let dirty = header.incompatible & INCOMPATIBLE_DIRTY != 0;
    value.insert("dirty-flag".to_owned(), json!(dirty));
    Ok(header.backing)
}

/// The file and the format of the image that `image` names as its backing file.
///
/// # Errors
/// When the name makes no sense.
pub fn place_below(image: &Path, backing: &Backing) -> Result<(PathBuf, Option<String>)> {
    let options = backing_options(&common_options(Purpose::ReadShared), image, backing)?;
    file_of(&options)
        .map(|(path, format)| (path, format.map(str::to_owned)))
        .ok_or_else(|| {
            Error::Invalid(format!(
                "{}: backing file '{}' (expected an image in a file)",
                image.display(),
                backing.name
            ))
        })
}

/// The file that a node's options lead to, and the format of the image in it.
fn file_of(options: &BlockdevOptions) -> Option<(PathBuf, Option<&'static str>)> {
    let (file, format) = match &options.driver {
        Driver::File(file) | Driver::HostDevice(file) => {
            return Some((file.filename.clone(), None));
        }
        Driver::NullCo(_) | Driver::NullAio(_) => return None,
        Driver::Raw(raw) => (&raw.file, Some("raw")),
        Driver::Blkdebug(blkdebug) => (&blkdebug.image, None),
        Driver::Qcow2(qcow2) => (&qcow2.file, Some("qcow2")),
        Driver::Qed(qed) => (&qed.file, Some("qed")),
        Driver::CopyOnRead(filter) => (&filter.file, None),
        Driver::Auto(auto) => (&auto.file, None),
    };
    match file {
        BlockRef::Inline(below) => {
            let (path, inner) = file_of(below)?;
            Some((path, format.or(inner)))
        }
        BlockRef::Name(_) => None,
    }
}

/// Adds how the image names its backing file.
fn name_below(value: &mut Map<String, Value>, image: &Path, backing: &Backing) {
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
}
