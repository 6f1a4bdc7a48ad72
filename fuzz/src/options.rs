//! What users and clients write: options, in both notations, and the bytes of a QMP connection.

use stratablk::config;
use stratablk::control::wire::Decoder;
use stratablk::options::{
    BlockdevOptions, ChardevOptions, Dialect, ExportOptions, MonitorOptions, ObjectOptions, keyval,
    size,
};

fn all_options(value: &serde_json::Value, dialect: Dialect) {
    let _ = BlockdevOptions::from_value(value, dialect);
    let _ = ExportOptions::from_value(value, dialect);
    let _ = ObjectOptions::from_value(value, dialect);
    let _ = ChardevOptions::from_value(value, dialect);
    let _ = MonitorOptions::from_value(value, dialect);
}

fn connection(bytes: &[u8]) {
    let whole = Decoder::new().push_all(bytes);
    // However it is cut into packets, it means the same.
    let mut decoder = Decoder::new();
    let mut pieces = Vec::new();
    for chunk in bytes.chunks(3) {
        pieces.extend(decoder.push_all(chunk));
    }
    assert_eq!(whole, pieces);
    for value in whole.into_iter().flatten() {
        all_options(&value, Dialect::Json);
        let _ = keyval::format(&value);
    }
}

/// The target: the first byte says what the others are.
pub fn options(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(rest);
    match kind % 4 {
        0 => {
            let _ = size::parse(&text);
            let notation = keyval::Notation {
                implied_key: Some("driver"),
                flags: &["server", "wait"],
            };
            if let Ok(value) = keyval::parse(&text, notation) {
                all_options(&value, Dialect::Keyval);
            }
        }
        1 => connection(rest),
        2 => {
            let words = text.split('\n').map(str::to_owned);
            let _ = config::parse(std::iter::once("stratablk".to_owned()).chain(words));
        }
        _ => {
            if let Ok(value) = serde_json::from_str(&text) {
                all_options(&value, Dialect::Json);
            }
        }
    }
}
