//! Writing to images, damaged and whole.
//!
//! Whatever the damage: no panic, no endless loop, no write far behind the image's end. An image
//! without a contradiction (see [`references`]) must also behave as a disk does, and must
//! still be without one when it is closed, or when the process ends in the midst of it.

use std::sync::Arc;

use stratablk::chain::resize::{Resize, grow, shrink};
use stratablk::chain::{Chain, Span, View};
use stratablk::format::Qcow2;
use stratablk::format::qcow2::bitmaps::{InForce, check_resize};

use super::image::{Files, How, WHOLE, reactor, read, write};
use super::recipe::{self, Input};
use super::references;

const SECTOR: u64 = 512;
/// Operations of a recipe that are carried out.
const OPERATIONS: u8 = 24;

/// What the disk must hold.
struct Model {
    bytes: Vec<u8>,
    /// By sector: discarded and not written since, so its contents are anybody's choice.
    unknown: Vec<bool>,
}

impl Model {
    fn sectors(offset: u64, len: u64) -> std::ops::Range<usize> {
        (offset / SECTOR) as usize..((offset + len) / SECTOR) as usize
    }

    fn fill(&mut self, offset: u64, len: u64, value: u8) {
        self.bytes[offset as usize..(offset + len) as usize].fill(value);
        self.unknown[Self::sectors(offset, len)].fill(false);
    }

    fn verify(&self, offset: u64, bytes: &[u8], when: &str) {
        for (index, got) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = (offset / SECTOR) as usize + index;
            let at = sector * SECTOR as usize;
            if !self.unknown[sector] {
                let expected = &self.bytes[at..at + got.len()];
                assert!(
                    got == expected,
                    "{when}: at {at:#x}: {:?} instead of {:?}",
                    &got[..8],
                    &expected[..8]
                );
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Write,
    Zero,
    Unmap,
    Discard,
    Flush,
    Read,
    Copy,
    Reopen,
    /// To the end of the range, or to four times that beyond the disk's end.
    Resize {
        grow: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    kind: Kind,
    offset: u64,
    len: u64,
}

impl Operation {
    fn parse(input: &mut Input<'_>, size: u64) -> Self {
        let kind = input.byte();
        let (offset, len) = (u64::from(input.word()), u64::from(input.byte()));
        let sectors = (size / SECTOR).max(1);
        // Of large disks the beginning or the end.
        let within = offset % sectors;
        let sector = if kind & 0x80 == 0 {
            within
        } else {
            sectors - 1 - within
        };
        Self {
            kind: match kind % 16 {
                0..=4 => Kind::Write,
                5 | 6 => Kind::Zero,
                7 | 8 => Kind::Unmap,
                12 if kind & 0x60 == 0x60 => Kind::Resize {
                    grow: kind & 0x10 != 0,
                },
                9 | 10 => Kind::Discard,
                11 | 12 => Kind::Flush,
                13 => Kind::Read,
                14 => Kind::Copy,
                _ => Kind::Reopen,
            },
            offset: sector * SECTOR,
            len: (len + 1).min(sectors - sector) * SECTOR,
        }
    }
}

/// An image that is being written.
struct Run<'a> {
    files: &'a Files,
    how: How,
    image: Arc<Qcow2>,
    chain: Arc<Chain>,
    /// `None`: the image contradicts itself, and anything may come of it.
    model: Option<Model>,
}

impl Run<'_> {
    fn judge<T>(&self, what: &str, result: stratablk::error::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) if self.model.is_some() => panic!("{what}: {error}"),
            Err(_) => None,
        }
    }

    async fn operate(&mut self, operation: Operation, value: u8) -> Option<()> {
        let Operation { kind, offset, len } = operation;
        let what = format!("{operation:?}");
        let view = View::of(self.chain.clone());
        let result = match kind {
            Kind::Write => {
                drop(view);
                write(&self.chain, offset, &vec![value; len as usize]).await
            }
            Kind::Zero => view.write_zeroes(offset, len, false).await,
            Kind::Unmap => view.write_zeroes(offset, len, true).await,
            Kind::Discard => view.discard(offset, len).await,
            Kind::Flush => {
                drop(view);
                self.chain.flush().await
            }
            Kind::Read => {
                drop(view);
                let bytes = read(&self.chain, offset, len as usize).await;
                if let (Some(model), Ok(bytes)) = (&self.model, &bytes) {
                    model.verify(offset, bytes, &what);
                }
                bytes.map(drop)
            }
            Kind::Copy => {
                let end = self.chain.layers().len();
                let span = Span::new(0, end).compressed(self.how.compress);
                let copied = view.copy(span, offset, len).await;
                copied.map(drop)
            }
            Kind::Reopen => {
                drop(view);
                return self.reopen().await;
            }
            Kind::Resize { grow } => {
                drop(view);
                return self
                    .resize(if grow {
                        self.chain.size() + 4 * len
                    } else {
                        offset + len
                    })
                    .await;
            }
        };
        self.judge(&what, result);
        if let Some(model) = &mut self.model {
            match kind {
                Kind::Write => model.fill(offset, len, value),
                Kind::Zero | Kind::Unmap => model.fill(offset, len, 0),
                Kind::Discard => model.unknown[Model::sectors(offset, len)].fill(true),
                _ => {}
            }
        }
        Some(())
    }

    /// Closes the image and opens it again; `None` when it cannot be.
    async fn reopen(&mut self) -> Option<()> {
        let closed = self.image.close().await;
        self.judge("close", closed)?;
        let opened = self.files.open(self.how).await;
        (self.image, self.chain) = self.judge("open again", opened)?;
        Some(())
    }

    /// Gives the disk another size, if that is possible, and opens it again.
    async fn resize(&mut self, size: u64) -> Option<()> {
        let (header, old) = (self.image.header(), self.chain.size());
        let storage = self.image.storage();
        let tracked = check_resize(&**storage, &header, size).await;
        if size > WHOLE || header.snapshots > 0 && header.version < 3 || tracked.is_err() {
            return Some(());
        }
        // The bitmaps were marked when the image was opened: writes have been made since.
        let in_force = InForce::new();
        let result = if size >= old {
            let wanted = Resize {
                size,
                ..Resize::default()
            };
            grow(&self.chain, wanted, &in_force).await
        } else {
            shrink(&self.chain, size, &in_force).await
        };
        self.judge("resize", result)?;
        let opened = self.files.open(self.how).await;
        (self.image, self.chain) = self.judge("open with another size", opened)?;
        if let Some(model) = &mut self.model {
            assert_eq!(self.chain.size(), size, "resized");
            model.bytes.resize(size as usize, 0);
            model.unknown.resize((size / SECTOR) as usize, false);
        }
        Some(())
    }

    async fn verify(&self, when: &str) {
        let Some(model) = &self.model else {
            let _ = read(&self.chain, 0, self.chain.size().min(WHOLE) as usize).await;
            return;
        };
        let bytes = read(&self.chain, 0, model.bytes.len()).await;
        if let Some(bytes) = self.judge(when, bytes) {
            model.verify(0, &bytes, when);
        }
    }
}

async fn run(files: &Files, how: How, close: bool, mut input: Input<'_>) {
    let before = references::check(&files.image);
    let Ok((image, chain)) = files.open(how).await else {
        return;
    };
    let size = chain.size();
    let mut model = None;
    if size <= WHOLE
        && before
            .as_ref()
            .is_some_and(|report| report.errors.is_empty() && !report.shared)
    {
        // A damaged compressed cluster is a contradiction too.
        if let Ok(bytes) = read(&chain, 0, size as usize).await {
            model = Some(Model {
                unknown: vec![false; bytes.len() / SECTOR as usize],
                bytes,
            });
        }
    }
    let mut run = Run {
        files,
        how,
        image,
        chain,
        model,
    };
    for value in 1..=OPERATIONS {
        let size = run.chain.size();
        if input.is_empty() || size == 0 {
            break;
        }
        let operation = Operation::parse(&mut input, size);
        if run.operate(operation, value).await.is_none() {
            return;
        }
    }
    run.verify("at the end").await;
    if !close {
        let sound = run.model.is_some();
        drop(run);
        assert_sound(files, sound, "killed");
        return;
    }
    if run.reopen().await.is_none() {
        return;
    }
    let no_leaks = before.is_some_and(|report| report.leaks == 0);
    if let (Some(_), Some(after)) = (&run.model, references::check(&files.image)) {
        assert!(after.errors.is_empty(), "closed: {:#?}", after.errors);
        assert!(
            !no_leaks || after.leaks == 0,
            "closed: {} leaks",
            after.leaks
        );
    }
    run.verify("opened again").await;
}

fn assert_sound(files: &Files, sound: bool, when: &str) {
    if let (true, Some(report)) = (sound, references::check(&files.image)) {
        assert!(report.errors.is_empty(), "{when}: {:#?}", report.errors);
    }
}

fn how(flags: u8) -> How {
    How {
        writable: true,
        discard: flags & 4 != 0,
        small_cache: flags & 8 != 0,
        copy_on_read: flags & 16 != 0,
        compress: flags & 32 != 0,
    }
}

/// The target: a recipe.
pub fn qcow2_write(data: &[u8]) {
    let mut input = Input(data);
    let (_, flags, files) = recipe::damaged(&mut input);
    reactor().block_on(run(&files, how(flags), flags & 1 == 0, input));
}

/// The target: a whole file, read and then written.
pub fn qcow2_file(data: &[u8]) {
    let files = Files::new(data.into(), 1);
    super::read::look(&files, How::default());
    // Four writes here and there, a flush between.
    const OPERATIONS: [u8; 20] = [
        0, 0, 0, 9, 11, 0, 0, 0, 0, 60, 0, 40, 7, 20, 0, 30, 0x80, 0, 0, 3,
    ];
    reactor().block_on(run(&files, how(4), true, Input(&OPERATIONS)));
}
