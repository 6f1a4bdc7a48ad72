//! An image whose format is found out by looking at it.

use futures_util::future::LocalBoxFuture;

use super::of;
use crate::error::Result;
use crate::format::probe;
use crate::graph::Node;
use crate::graph::descent::Descent;
use crate::graph::driver::Driver;
use crate::graph::opening::{OpenNode, Opening};
use crate::options::{
    self, AutoOptions, BackingRef, BlockRef, BlockdevOptions, Qcow2Options, QedOptions, RawOptions,
};

impl Driver for AutoOptions {}

impl OpenNode for AutoOptions {
    fn open<'a>(
        &'a self,
        opening: &'a Opening<'_>,
        name: &'a str,
        options: &'a BlockdevOptions,
        descent: &'a mut Descent,
    ) -> LocalBoxFuture<'a, Result<Node>> {
        Box::pin(async move {
            let file = opening.open_ref(&self.file, descent).await?;
            let storage = opening.bytes(&*opening.node(&file)?)?;
            let detected = probe::detect_in(&*storage).await?;
            let detected = detected.supported(storage.name())?;
            let options = BlockdevOptions {
                node_name: Some(name.to_owned()),
                driver: self.detected(detected, BlockRef::Name(file), storage.name()),
                ..options.clone()
            };
            of(&options.driver)
                .open(opening, name, &options, descent)
                .await
        })
    }
}

impl AutoOptions {
    /// The options of an image of the format that was found in `file`.
    fn detected(&self, format: &str, file: BlockRef, path: &str) -> options::Driver {
        match format {
            "qcow2" => {
                let mut qcow2 = Qcow2Options::new(file);
                qcow2.copy_on_read = self.copy_on_read;
                options::Driver::Qcow2(Box::new(qcow2))
            }
            "qed" => options::Driver::Qed(QedOptions {
                file,
                backing: BackingRef::Default,
            }),
            _ => {
                log::warn!(
                    "{path}: no format was named and it looks raw; name it, since a guest \
                     that writes a raw disk can make it look like another format"
                );
                options::Driver::Raw(RawOptions {
                    file,
                    offset: 0,
                    size: None,
                })
            }
        }
    }
}
