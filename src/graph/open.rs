//! Opening images: from options to nodes, down to the last backing file.
//!
//! Images are opened as readers: they share their files with other readers, and nothing is
//! written to them. Whoever is going to write (an export, a job) asks for it with
//! [`Graph::make_writable`].

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use super::below::{backing_options, file_named};
use super::descent::{Descent, WHOLE, behind};
use super::together::Place;
use super::{Graph, Node, filter_layer};
use crate::chain::Layer;
use crate::error::{Action, Error, Result};
use crate::format::qcow2::{self, Backing};
use crate::format::{Format, Qcow2, Qed, Raw, probe};
use crate::options::{
    AutoOptions, BackingRef, BlockRef, BlockdevOptions, Discard, Driver, FileOptions, Locking,
    Qcow2Options, QedOptions, RawOptions,
};
use crate::storage::file::OpenFlags;
use crate::storage::{FileStorage, Storage, Window};
use futures_util::future::LocalBoxFuture;

/// Who asked for a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A user, by name.
    Named,
    /// It is written inside another node.
    Nested,
    /// The header of the image above it.
    Header,
}

impl Graph {
    /// Opens an image with everything under it. Returns the node's name.
    ///
    /// # Errors
    /// When a file cannot be opened or is no image that can be served. No node is added then.
    pub async fn open(&self, options: &BlockdevOptions) -> Result<String> {
        self.open_in(options, Place::default()).await
    }

    /// As [`Graph::open`], of a node that may be one of several.
    pub(super) async fn open_in(&self, options: &BlockdevOptions, place: Place) -> Result<String> {
        let mut descent = Descent::new(place);
        let result = self.open_node(options, &mut descent, Origin::Named).await;
        if result.is_err() {
            for name in descent.added.iter().rev() {
                self.remove(name);
            }
        }
        result
    }

    pub(super) fn open_node<'a>(
        &'a self,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
        origin: Origin,
    ) -> LocalBoxFuture<'a, Result<String>> {
        Box::pin(async move {
            let name = match &options.node_name {
                Some(name) => name.clone(),
                None => {
                    // So that the same configuration always gives the same names.
                    descent.place.turn().await;
                    self.make_name()
                }
            };
            let node = match &options.driver {
                Driver::File(file) | Driver::HostDevice(file) => {
                    open_file(&name, options, file, descent).await?
                }
                Driver::Raw(raw) => self.open_raw(&name, options, raw, descent).await?,
                Driver::Qcow2(qcow2) => self.open_qcow2(&name, options, qcow2, descent).await?,
                Driver::Qed(qed) => self.open_qed(&name, options, qed, descent).await?,
                Driver::Auto(auto) => {
                    return self
                        .open_probed(&name, options, auto, descent, origin)
                        .await;
                }
                Driver::CopyOnRead(filter) => {
                    let file = self.open_ref(&filter.file, descent).await?;
                    let below = self.node(&file)?;
                    Node {
                        name: name.clone(),
                        driver: "copy-on-read",
                        layer: filter_layer(&below.layer, &name),
                        file: Some(file),
                        options: options.clone(),
                        ..below
                    }
                }
            };
            // A node that is not a user's own may be made writable by a job that needs it.
            let own = origin == Origin::Named;
            let fixed_read_only = options.read_only && own;
            self.add(Node {
                implicit: !own,
                fixed_read_only,
                ..node
            })?;
            descent.added.push(name.clone());
            Ok(name)
        })
    }

    async fn open_ref(&self, node: &BlockRef, descent: &mut Descent) -> Result<String> {
        match node {
            BlockRef::Name(name) => {
                descent.place.wait_for(name).await;
                Ok(self.node(name)?.name)
            }
            BlockRef::Inline(options) => self.open_node(options, descent, Origin::Nested).await,
        }
    }

    async fn open_raw(
        &self,
        name: &str,
        options: &BlockdevOptions,
        raw: &RawOptions,
        descent: &mut Descent,
    ) -> Result<Node> {
        let part = descent.wanted.clone();
        descent.wanted = behind(raw, &part);
        let file = self.open_ref(&raw.file, descent).await?;
        descent.wanted = part;
        let file = self.node(&file)?;
        let storage = Window::of(bytes(name, "raw", &file)?, raw.offset, raw.size).await?;
        // What a file's last sector lacks reads as zeros; a window has whole sectors.
        let size = storage_len(&*storage).await?.next_multiple_of(512);
        let format = Format::Raw(Raw::new(size));
        Ok(make_node(
            name,
            "raw",
            options,
            (format, storage),
            &file,
            None,
        ))
    }

    async fn open_qcow2(
        &self,
        name: &str,
        options: &BlockdevOptions,
        qcow2: &Qcow2Options,
        descent: &mut Descent,
    ) -> Result<Node> {
        let file = self.node(&self.open_ref(&qcow2.file, descent).await?)?;
        let storage = bytes(name, "qcow2", &file)?;
        let header = qcow2::read_header(&*storage).await?;
        let data_file = match (&qcow2.data_file, &header.data_file) {
            (Some(node), _) => Some(self.open_ref(node, descent).await?),
            (None, Some(name)) => {
                let path = file_named(&file.filename, name, "data file")?;
                let node = BlockRef::Inline(Box::new(options.child_file(&path)));
                let opened = self.open_ref(&node, descent).await;
                Some(opened.map_err(|error| match error {
                    Error::Busy(text) => Error::Busy(format!("Could not open data file: {text}")),
                    other => Error::Invalid(format!("Could not open data file: {other}")),
                })?)
            }
            (None, None) => None,
        };
        let data = match &data_file {
            Some(node) => Some(bytes(name, "qcow2", &self.node(node)?)?),
            None => None,
        };
        let named = header.backing.clone();
        // Together, so that the tables of all layers are on their way at once: a long chain opens
        // in the time of its headers.
        let (image, backing) = futures_util::join!(
            Qcow2::open_parsed(storage, data, header, self.image_options(options, false)),
            self.open_below(options, &file, &qcow2.backing, named, descent),
        );
        let (image, backing) = (image?, backing?);
        let storage = image.data_storage().clone();
        let format = Format::Qcow2(Arc::new(image));
        let node = make_node(name, "qcow2", options, (format, storage), &file, backing);
        Ok(Node {
            layer: Arc::new(Layer {
                copy_on_read: qcow2.copy_on_read,
                ..(*node.layer).clone()
            }),
            data_file,
            ..node
        })
    }

    async fn open_qed(
        &self,
        name: &str,
        options: &BlockdevOptions,
        qed: &QedOptions,
        descent: &mut Descent,
    ) -> Result<Node> {
        let file = self.node(&self.open_ref(&qed.file, descent).await?)?;
        let storage = bytes(name, "qed", &file)?;
        let image = Qed::open(storage.clone()).await?;
        let named = image.backing().cloned();
        let backing = self
            .open_below(options, &file, &qed.backing, named, descent)
            .await?;
        let format = Format::Qed(Arc::new(image));
        let laid_out = (format, storage);
        Ok(make_node(name, "qed", options, laid_out, &file, backing))
    }

    /// Opens what lies under the image in node `image`: what the options say, or what its header
    /// names; but first of all what is recorded.
    async fn open_below(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        wanted: &BackingRef,
        named: Option<Backing>,
        descent: &mut Descent,
    ) -> Result<Option<String>> {
        let driver = above.driver.name();
        if let Some(link) = self.recorded_link(driver, image, named.as_ref(), descent)? {
            let Some(below) = &link.below else {
                return Ok(None);
            };
            let opened = self.open_recorded(above, image, wanted, below, descent);
            return Ok(Some(opened.await?));
        }
        match (wanted, named) {
            (BackingRef::None, _) | (BackingRef::Default, None) => Ok(None),
            (BackingRef::Node(node), _) => Ok(Some(self.open_ref(node, descent).await?)),
            (BackingRef::Default, Some(backing)) => Ok(Some(
                self.open_backing(above, image, &backing, descent).await?,
            )),
        }
    }

    /// Opens the backing file that a header names.
    async fn open_backing(
        &self,
        above: &BlockdevOptions,
        image: &Node,
        backing: &Backing,
        descent: &mut Descent,
    ) -> Result<String> {
        descent.step_down(&image.filename)?;
        let context = |error: Error| match error {
            Error::Invalid(text) => Error::Invalid(format!("Could not open backing file: {text}")),
            Error::Busy(text) => Error::Busy(format!("Could not open backing file: {text}")),
            other => other,
        };
        let mut options = backing_options(above, &image.filename, backing).map_err(context)?;
        self.share_file(&mut options, image, descent)
            .map_err(context)?;
        self.open_node(&options, descent, Origin::Header)
            .await
            .map_err(context)
    }

    /// Opens `backing` as the header of node `above`'s image would name it. It is not put under
    /// that node. Returns the new node's name.
    ///
    /// # Errors
    /// As for [`Graph::open`]; or the image is itself in that chain.
    pub async fn open_as_backing(&self, above: &str, backing: &Backing) -> Result<String> {
        let node = self.node(above)?;
        let options = backing_options(&node.options, &node.filename, backing)?;
        let mut descent = Descent::new(Place::default());
        if let Ok(stat) = std::fs::metadata(&node.filename) {
            descent.wanted = self.extent(&node)?;
            descent.enter(&node.filename, &stat)?;
            descent.wanted = WHOLE;
        }
        let result = self.open_node(&options, &mut descent, Origin::Header).await;
        if result.is_err() {
            for name in descent.added.iter().rev() {
                self.remove(name);
            }
        }
        result
    }

    async fn open_probed(
        &self,
        name: &str,
        options: &BlockdevOptions,
        auto: &AutoOptions,
        descent: &mut Descent,
        origin: Origin,
    ) -> Result<String> {
        let file = self.open_ref(&auto.file, descent).await?;
        let storage = bytes(name, "a format to be found out", &self.node(&file)?)?;
        let detected = probe::detect_in(&*storage).await?;
        let file = BlockRef::Name(file);
        let driver = match detected.supported(storage.name())? {
            "qcow2" => {
                let mut qcow2 = Qcow2Options::new(file);
                qcow2.copy_on_read = auto.copy_on_read;
                Driver::Qcow2(Box::new(qcow2))
            }
            "qed" => Driver::Qed(QedOptions {
                file,
                backing: BackingRef::Default,
            }),
            _ => {
                log::warn!(
                    "{}: no format was named and it looks raw; name it, since whoever writes a \
                     raw disk can make it look like another format",
                    storage.name()
                );
                Driver::Raw(RawOptions {
                    file,
                    offset: 0,
                    size: None,
                })
            }
        };
        let options = BlockdevOptions {
            node_name: Some(name.to_owned()),
            driver,
            ..options.clone()
        };
        self.open_node(&options, descent, origin).await
    }
}

pub(super) fn text(error: std::io::Error) -> Error {
    match error.kind() {
        // A lock is held by somebody else.
        std::io::ErrorKind::WouldBlock => Error::Busy(error.to_string()),
        _ => Error::Invalid(error.to_string()),
    }
}

async fn storage_len(storage: &dyn Storage) -> Result<u64> {
    storage
        .len()
        .await
        .map_err(|error| Error::io(Action::Read, storage.name(), 0, &error))
}

impl Graph {
    /// How the image of a node with these options is opened.
    pub(super) fn image_options(
        &self,
        options: &BlockdevOptions,
        writable: bool,
    ) -> qcow2::Options {
        qcow2::Options {
            journal: self.journal(),
            ..image_options(options, writable)
        }
    }
}

fn image_options(options: &BlockdevOptions, writable: bool) -> qcow2::Options {
    let cache_bytes = match &options.driver {
        Driver::Qcow2(qcow2) => qcow2.l2_cache_size.or(qcow2.cache_size),
        _ => None,
    };
    qcow2::Options {
        writable,
        discard: match &options.driver {
            Driver::Qcow2(qcow2) => qcow2
                .pass_discard_request
                .unwrap_or(options.discard == Discard::Unmap),
            _ => options.discard == Discard::Unmap,
        },
        cache_bytes: cache_bytes.unwrap_or(qcow2::DEFAULT_CACHE_BYTES),
        // Who reads what others may be writing has been told that it may be out of date.
        ignore_journal: options.force_share,
        ..qcow2::Options::default()
    }
}

fn file_flags(options: &BlockdevOptions) -> OpenFlags {
    let locking = match &options.driver {
        Driver::File(file) | Driver::HostDevice(file) => file.locking,
        _ => Locking::Auto,
    };
    OpenFlags {
        writable: !options.read_only,
        direct: options.cache.direct,
        no_flush: options.cache.no_flush,
        no_lock: locking == Locking::Off,
        force_share: options.force_share,
    }
}

async fn open_file(
    name: &str,
    options: &BlockdevOptions,
    file: &FileOptions,
    descent: &mut Descent,
) -> Result<Node> {
    if let Ok(stat) = std::fs::metadata(&file.filename) {
        let path = file.filename.display();
        // To open another special file may do something, or wait for ever.
        if !stat.is_file() && !stat.file_type().is_block_device() {
            return Err(Error::Invalid(format!(
                "Could not open '{path}': not a file or a block device"
            )));
        }
        descent.enter(&file.filename, &stat)?;
    }
    let flags = file_flags(options);
    let storage = match FileStorage::open(&file.filename, flags) {
        Err(error) if flags.writable && options.auto_read_only && is_denied(&error) => {
            FileStorage::open(
                &file.filename,
                OpenFlags {
                    writable: false,
                    ..flags
                },
            )
        }
        other => other,
    };
    let storage: Arc<dyn Storage> = Arc::new(storage.map_err(text)?);
    let size = storage_len(&*storage).await?.next_multiple_of(512);
    Ok(Node {
        name: name.to_owned(),
        driver: if matches!(options.driver, Driver::File(_)) {
            "file"
        } else {
            "host_device"
        },
        layer: Arc::new(Layer {
            name: name.to_owned(),
            format: Format::Raw(Raw::new(size)),
            storage,
            read_only: true,
            discard: options.discard == Discard::Unmap,
            copy_on_read: false,
        }),
        filename: file.filename.clone(),
        backing: None,
        file: None,
        data_file: None,
        options: options.clone(),
        implicit: false,
        fixed_read_only: false,
    })
}

/// The bytes of node `file`, in which the image of node `above` is laid out.
///
/// # Errors
/// The node's bytes are those of a disk that a format keeps: there is no storage that has them.
fn bytes(above: &str, driver: &str, file: &Node) -> Result<Arc<dyn Storage>> {
    match &file.layer.format {
        Format::Raw(_) => Ok(file.layer.storage.clone()),
        format => Err(Error::Invalid(format!(
            "node '{above}' ({driver}) over node '{}' ({}): the disk inside a {} image cannot be \
             the file of another node (expected a file, host_device or raw node; to serve the \
             disk itself export '{}')",
            file.name,
            file.driver,
            format.name(),
            file.name
        ))),
    }
}

fn is_denied(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
    )
}

fn make_node(
    name: &str,
    driver: &'static str,
    options: &BlockdevOptions,
    (format, storage): (Format, Arc<dyn Storage>),
    file: &Node,
    backing: Option<String>,
) -> Node {
    Node {
        name: name.to_owned(),
        driver,
        layer: Arc::new(Layer {
            name: name.to_owned(),
            format,
            storage,
            read_only: true,
            discard: options.discard == Discard::Unmap,
            copy_on_read: false,
        }),
        filename: file.filename.clone(),
        backing,
        file: Some(file.name.clone()),
        data_file: None,
        options: options.clone(),
        implicit: false,
        fixed_read_only: false,
    }
}
