//! What the LUKS header of an encrypted image says: to describe the image, not to open it.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Full disk encryption header pointer", and the
//! "LUKS1 On-Disk Format Specification".

use super::header::{EXT_CRYPTO_HEADER, Header};
use super::numbers::{be, be32, be64};
use crate::error::{Error, Result};
use crate::storage::{self, Purpose, Storage};
use serde_json::{Map, Value, json};

const MAGIC: &[u8] = b"LUKS\xba\xbe";
/// Bytes of the header.
const LENGTH: usize = 592;
const SECTOR: u64 = 512;
/// Where the key slots begin, how many there are, and how long each is.
const SLOTS: usize = 208;
const SLOT_COUNT: usize = 8;
const SLOT_LENGTH: usize = 48;
/// What marks a slot in use.
const ACTIVE: u32 = 0x00ac_71f3;

/// The encryption of an image as QMP describes it (`QCryptoBlockInfoLUKS`).
///
/// # Errors
/// When the header of the encryption cannot be read, or is none.
pub async fn describe(storage: &dyn Storage, header: &Header) -> Result<Value> {
    let damaged = |what: String| Error::corrupt(storage.name(), what);
    let pointer = header
        .extension(EXT_CRYPTO_HEADER)
        .ok_or_else(|| damaged("encrypted by LUKS, but without a LUKS header".to_owned()))?;
    let offset = be64(pointer, 0);
    let bytes = storage::io::fetch(Purpose::Header.on(storage), offset, LENGTH).await?;
    if !bytes.starts_with(MAGIC) || be(&bytes, 6, 2) != 1 {
        return Err(damaged(format!(
            "no LUKS header of version 1 at {offset:#x}"
        )));
    }
    Ok(parse(&bytes))
}

fn parse(header: &[u8]) -> Value {
    let mut all = Map::new();
    let mut put = |key: &str, value: Value| {
        all.insert(key.to_owned(), value);
    };
    let mode = text(header, 40, 32);
    let (mode, generator) = mode.split_once('-').unwrap_or((&mode, "plain"));
    let (generator, generator_hash) = match generator.split_once(':') {
        Some((generator, hash)) => (generator, Some(hash)),
        None => (generator, None),
    };
    // In this mode there are two keys.
    let keys = if mode == "xts" { 2 } else { 1 };
    let bits = be32(header, 108) / keys * 8;
    put("format", json!("luks"));
    put("detached-header", json!(false));
    put(
        "cipher-alg",
        json!(format!("{}-{bits}", text(header, 8, 32))),
    );
    put("cipher-mode", json!(mode));
    put("ivgen-alg", json!(generator));
    if let Some(hash) = generator_hash {
        put("ivgen-hash-alg", json!(hash));
    }
    put("hash-alg", json!(text(header, 72, 32)));
    put(
        "payload-offset",
        json!(u64::from(be32(header, 104)) * SECTOR),
    );
    put("master-key-iters", json!(be32(header, 164)));
    put("uuid", json!(text(header, 168, 40)));
    let slots = (0..SLOT_COUNT).map(|index| slot(header, SLOTS + index * SLOT_LENGTH));
    put("slots", slots.collect());
    Value::Object(all)
}

fn slot(header: &[u8], at: usize) -> Value {
    let offset = u64::from(be32(header, at + 40)) * SECTOR;
    if be32(header, at) != ACTIVE {
        return json!({"active": false, "key-offset": offset});
    }
    json!({
        "active": true,
        "iters": be32(header, at + 4),
        "stripes": be32(header, at + 44),
        "key-offset": offset,
    })
}

/// The text in a field, up to the first byte of 0.
fn text(header: &[u8], at: usize, len: usize) -> String {
    let field = header.get(at..at + len).unwrap_or_default();
    let end = field.iter().position(|byte| *byte == 0);
    let text = field.get(..end.unwrap_or(len)).unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}
