//! What format an image has, by looking at it.
//!
//! A container of another program is known by name, so that it is never taken for a raw disk: a
//! guest that writes one destroys it, and a tool that copies its bytes copies no disk. Raw is what
//! looks like nothing else, a CD or DVD included. The data of a guest is never looked at: a data
//! file is raw by definition.

use std::fmt;

use super::{qcow2, qed};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose, Storage};

/// Bytes at the start that decide.
pub const START: usize = 512;
/// Bytes at the end that decide, too.
pub const END: usize = 512;

/// The format that an image seems to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// None that is known: a disk as it is.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// QEMU's enhanced disk.
    Qed,
    /// One that is not served.
    Foreign(Foreign),
}

/// A format that is recognised, and not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// As users call it.
    pub name: &'static str,
    /// As QEMU's options call it.
    pub driver: &'static str,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn foreign(name: &'static str, driver: &'static str) -> Foreign {
    Foreign { name, driver }
}

const VMDK: Foreign = foreign("VMDK", "vmdk");
const VHD: Foreign = foreign("VHD", "vpc");
const VHDX: Foreign = foreign("VHDX", "vhdx");
const VDI: Foreign = foreign("VDI", "vdi");
const LUKS: Foreign = foreign("LUKS", "luks");
const PARALLELS: Foreign = foreign("Parallels", "parallels");
const BOCHS: Foreign = foreign("Bochs", "bochs");
const CLOOP: Foreign = foreign("cloop", "cloop");
const DMG: Foreign = foreign("DMG", "dmg");
const QCOW: Foreign = foreign("qcow version 1", "qcow");

/// What files of a format begin with.
const SIGNATURES: &[(&[u8], Foreign)] = &[
    (b"KDMV", VMDK),
    // Of ESX, and of the first versions.
    (b"COWD", VMDK),
    (b"# Disk DescriptorFile", VMDK),
    // A dynamic one has a copy of its footer here.
    (b"conectix", VHD),
    (b"vhdxfile", VHDX),
    (b"LUKS\xba\xbe\x00\x01", LUKS),
    (b"LUKS\xba\xbe\x00\x02", LUKS),
    (b"WithoutFreeSpace", PARALLELS),
    (b"WithouFreSpacExt", PARALLELS),
    (b"Bochs Virtual HD Image", BOCHS),
    (b"#!/bin/sh\n#V2.0 Format\n", CLOOP),
    (b"QFI\xfb", QCOW),
];

/// Where VDI has its signature, behind a text.
const VDI_AT: usize = 64;
const VDI_SIGNATURE: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();

/// The format of an image of `len` bytes that begins with `start` and ends with `end`: [`START`]
/// and [`END`] of its bytes, or all that there are.
#[must_use]
pub fn detect(start: &[u8], end: &[u8], len: u64) -> Detected {
    if qcow2::header::probe(start) {
        return Detected::Qcow2;
    }
    if qed::probe(start) {
        return Detected::Qed;
    }
    let signature = SIGNATURES
        .iter()
        .find(|(bytes, _)| start.starts_with(bytes));
    let at_start = match signature {
        Some((_, foreign)) => Some(*foreign),
        None if begins(start, VDI_AT, &VDI_SIGNATURE) => Some(VDI),
        None if is_descriptor(start) => Some(VMDK),
        None => at_end(end, len),
    };
    at_start.map_or(Detected::Raw, Detected::Foreign)
}

/// Formats with their header at the end: a disk of fixed size is raw before it.
fn at_end(end: &[u8], len: u64) -> Option<Foreign> {
    // A footer is a sector, or a byte less in files of early versions. What was cut off within the
    // footer is no disk either: it would begin where the last sector does.
    let sector = end.len().checked_sub((len % 512) as usize);
    let footer = [Some(0), Some(1), sector];
    let has = |signature| {
        footer
            .iter()
            .flatten()
            .any(|&at| begins(end, at, signature))
    };
    if has(b"conectix") {
        return Some(VHD);
    }
    has(b"koly").then_some(DMG)
}

fn begins(bytes: &[u8], at: usize, with: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(with))
}

/// Whether this is the text that describes a VMDK disk of several files: comments and empty lines,
/// then the version.
fn is_descriptor(start: &[u8]) -> bool {
    start
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .find(|line| !line.starts_with(b"#") && line.iter().any(|&byte| byte != b' '))
        .is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}

/// The format of the image in `storage`.
///
/// # Errors
/// When it cannot be read.
pub async fn detect_in(storage: &dyn Storage) -> Result<Detected> {
    let len = storage
        .len()
        .await
        .map_err(|error| Error::io(crate::error::Action::Read, storage.name(), 0, &error))?;
    let first = storage::io::fetch(
        Purpose::Header.on(storage),
        0,
        len.min(START as u64) as usize,
    )
    .await?;
    let ending = len.min(END as u64);
    let last =
        storage::io::fetch(Purpose::Header.on(storage), len - ending, ending as usize).await?;
    Ok(detect(&first, &last, len))
}

impl Detected {
    /// The driver that serves images of this format, in the file called `file`.
    ///
    /// # Errors
    /// When there is none.
    pub fn supported(self, file: &str) -> Result<&'static str> {
        match self {
            Self::Raw => Ok("raw"),
            Self::Qcow2 => Ok("qcow2"),
            Self::Qed => Ok("qed"),
            Self::Foreign(foreign) => Err(Error::unsupported(
                file,
                format!(
                    "this is a {foreign} image, and {foreign} is not supported (expected qcow2, \
                     which 'qemu-img convert -O qcow2' makes of it; name the format 'raw' only to \
                     use the bytes of the file itself as a disk)"
                ),
            )),
        }
    }

    /// The format's name in options.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            Self::Foreign(foreign) => foreign.driver,
        }
    }
}

#[cfg(test)]
mod tests {
    //! What would be caught: a container taken for a raw disk, and a disk taken for a container.

    use super::*;

    fn of(bytes: &[u8]) -> &'static str {
        let start = bytes.get(..START).unwrap_or(bytes);
        let end = bytes
            .get(bytes.len().saturating_sub(END)..)
            .unwrap_or(bytes);
        detect(start, end, bytes.len() as u64).driver()
    }

    /// A file of `len` bytes with `signature` at `at`.
    fn file(len: usize, at: usize, signature: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; len.max(at + signature.len())];
        for (byte, with) in bytes.iter_mut().skip(at).zip(signature) {
            *byte = *with;
        }
        bytes
    }

    #[test]
    fn containers_are_known_by_their_start() {
        for (signature, driver) in [
            (&b"KDMV"[..], "vmdk"),
            (b"COWD", "vmdk"),
            (b"# Disk DescriptorFile\nversion=1", "vmdk"),
            (b"# any comment\r\n\r\n  \nversion=2\r\n", "vmdk"),
            (b"version=3\n", "vmdk"),
            (b"conectix", "vpc"),
            (b"vhdxfile", "vhdx"),
            (b"LUKS\xba\xbe\x00\x01", "luks"),
            (b"LUKS\xba\xbe\x00\x02", "luks"),
            (b"WithoutFreeSpace", "parallels"),
            (b"WithouFreSpacExt", "parallels"),
            (b"Bochs Virtual HD Image", "bochs"),
            (b"#!/bin/sh\n#V2.0 Format\nmodprobe", "cloop"),
            (b"QFI\xfb\x00\x00\x00\x01", "qcow"),
            (b"QFI\xfb\x00\x00\x00\x02", "qcow2"),
            (b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
            (b"QED\x00", "qed"),
        ] {
            for len in [0, 700, 1 << 20] {
                let text = String::from_utf8_lossy(signature);
                assert_eq!(of(&file(len, 0, signature)), driver, "{text:?}, {len}");
                // Elsewhere it means nothing.
                assert_eq!(
                    of(&file(len + 4096, 8, signature)),
                    "raw",
                    "{text:?}, {len}"
                );
            }
        }
        assert_eq!(of(&file(4096, 64, &VDI_SIGNATURE)), "vdi");
    }

    #[test]
    fn containers_are_known_by_their_end() {
        for (signature, driver) in [(&b"conectix"[..], "vpc"), (b"koly", "dmg")] {
            for (len, footer) in [
                (512, 512),
                (511, 511),
                (1 << 20, 512),
                ((1 << 20) + 511, 511),
            ] {
                let bytes = file(len, len - footer, signature);
                assert_eq!(of(&bytes), driver, "{len}, {footer}");
            }
            // The rest of the last sector is lost.
            assert_eq!(of(&file((1 << 20) + 100, 1 << 20, signature)), driver);
            assert_eq!(of(&file(1 << 20, (1 << 20) - 500, signature)), "raw");
            assert_eq!(of(&file(1 << 20, (1 << 20) - 1024, signature)), "raw");
        }
    }

    #[test]
    fn disks_are_raw() {
        let iso = file(1 << 20, 32_769, b"CD001");
        let boot = file(1 << 20, 510, b"\x55\xaa");
        for bytes in [
            &[][..],
            b"K",
            b"LUKS",
            b"version=1",
            b"#",
            b"\n\n\n",
            &iso,
            &boot,
        ] {
            let driver = if bytes == b"version=1" { "vmdk" } else { "raw" };
            assert_eq!(of(bytes), driver, "{bytes:.20?}");
        }
    }
}
