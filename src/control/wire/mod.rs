//! From the bytes of a control connection to JSON values.
//!
//! QMP puts one JSON value after another on the socket, with no framing: a packet may hold several
//! values, or a part of one. [`Decoder`] takes the bytes as they come and hands out whole values, or
//! the error a broken one deserves, and goes on with what follows.
//!
//! The work is split in two: `lexer` cuts the stream into tokens and knows, from the braces and
//! brackets alone, where a value ends; `parser` turns the tokens of one value into a
//! [`serde_json::Value`]. A value parser that reads from a buffer could not do the first, and
//! `serde_json` accepts neither single-quoted strings nor reports duplicate keys, both of which QMP
//! clients meet with QEMU.

mod lexer;
mod parser;
mod pool;

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;

use lexer::Lexer;
pub use pool::Pool;
use pool::Share;

/// The deepest nesting of objects and lists that is accepted, QEMU's limit.
pub const MAX_NESTING: usize = 1024;

/// The most bytes one value may have, white space between its tokens not counted.
pub const MAX_VALUE_BYTES: usize = 64 << 20;

/// The most tokens one value may have.
pub const MAX_TOKENS: usize = 2 << 20;

/// After so many bytes it is looked at what is held.
const PIECE: usize = 4 << 10;

/// Turns a stream of bytes into JSON values.
///
/// ```
/// use stratablk::control::wire::Decoder;
/// let mut decoder = Decoder::new();
/// let mut seen = Vec::new();
/// decoder.push(b"{'execute': 'query-ver", &mut |item| seen.push(item));
/// assert!(seen.is_empty());
/// decoder.push(b"sion'} [", &mut |item| seen.push(item));
/// assert_eq!(seen, [Ok(serde_json::json!({"execute": "query-version"}))]);
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    lexer: Lexer,
    /// What is held of the value under way, where that is limited.
    share: Option<Share>,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// A decoder at the start of a stream, whose unfinished values are to have room in `pool`.
    pub fn within(pool: Arc<Pool>) -> Self {
        Self {
            lexer: Lexer::default(),
            share: Some(Share::of(pool)),
        }
    }

    /// Takes the next bytes of the stream and gives `found` each value that they complete, in order,
    /// or the description of what is wrong with it.
    pub fn push(&mut self, bytes: &[u8], found: &mut dyn FnMut(Result<Value, String>)) {
        let mut found = |item: Result<_, String>| found(item.and_then(parser::parse));
        for piece in bytes.chunks(PIECE) {
            for &byte in piece {
                self.lexer.push(byte, &mut found);
            }
            if let Some(share) = &mut self.share
                && !share.set(self.lexer.held())
            {
                let why = "Too much is held of unfinished values, of all clients together";
                self.lexer.discard(why, &mut found);
                share.set(0);
            }
        }
    }

    /// Like [`push`](Self::push), gathering what was found.
    pub fn push_all(&mut self, bytes: &[u8]) -> VecDeque<Result<Value, String>> {
        let mut found = VecDeque::new();
        self.push(bytes, &mut |item| found.push_back(item));
        found
    }
}

#[cfg(test)]
mod tests;
