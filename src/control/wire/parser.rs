//! From the tokens of one value to a [`serde_json::Value`].
//!
//! Recursion is bounded: the lexer lets no value nest deeper than [`super::MAX_NESTING`].

use serde_json::{Map, Number, Value};

use super::lexer::{Kind, Message, Token};

/// Parses the value `message` holds; the error is the text a client gets to see.
pub(super) fn parse(message: Message) -> Result<Value, String> {
    let mut parser = Parser {
        message: &message,
        next: 0,
    };
    parser
        .value()
        .map_err(|why| format!("JSON parse error, {why}"))
}

struct Parser<'a> {
    message: &'a Message,
    next: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<Kind> {
        self.message.tokens.get(self.next).map(|token| token.kind)
    }

    fn take(&mut self) -> Option<&'a Token> {
        let token = self.message.tokens.get(self.next);
        self.next += 1;
        token
    }

    fn take_punctuation(&mut self, wanted: u8, otherwise: &str) -> Result<(), String> {
        match self.take().map(|token| token.kind) {
            Some(Kind::Punctuation(byte)) if byte == wanted => Ok(()),
            _ => Err(otherwise.to_owned()),
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        let token = self.take().ok_or("expecting value")?;
        let text = self.message.text(token);
        match token.kind {
            Kind::Punctuation(b'{') => self.object(),
            Kind::Punctuation(b'[') => self.list(),
            Kind::Punctuation(_) => Err("expecting value".to_owned()),
            Kind::String => string(text).map(Value::String),
            Kind::Number => Ok(Value::Number(number(text))),
            Kind::Keyword => match text {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                _ => Err(format!(
                    "invalid keyword '{}'",
                    String::from_utf8_lossy(text)
                )),
            },
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut members = Map::new();
        if self.peek() == Some(Kind::Punctuation(b'}')) {
            self.next += 1;
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err("key is not a string in object".to_owned());
            };
            self.take_punctuation(b':', "missing : in object pair")?;
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err("duplicate key".to_owned());
            }
            if self.peek() == Some(Kind::Punctuation(b'}')) {
                self.next += 1;
                return Ok(Value::Object(members));
            }
            self.take_punctuation(b',', "expected separator in dict")?;
        }
    }

    fn list(&mut self) -> Result<Value, String> {
        let mut items = Vec::new();
        if self.peek() == Some(Kind::Punctuation(b']')) {
            self.next += 1;
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            if self.peek() == Some(Kind::Punctuation(b']')) {
                self.next += 1;
                return Ok(Value::Array(items));
            }
            self.take_punctuation(b',', "expected separator in list")?;
        }
    }
}

/// The widest exact type that fits: `i64`, `u64`, then a floating-point number.
fn number(text: &[u8]) -> Number {
    // The lexer let through digits, signs, points and exponents only.
    let text = str::from_utf8(text).unwrap_or_default();
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    if let Ok(number) = text.parse::<u64>() {
        return number.into();
    }
    let number = text
        .parse::<f64>()
        .unwrap_or_default()
        .clamp(f64::MIN, f64::MAX);
    Number::from_f64(number).unwrap_or_else(|| 0.into())
}

/// Takes the quotes and escapes off a string token.
fn string(token: &[u8]) -> Result<String, String> {
    let inner = token
        .get(1..token.len().saturating_sub(1))
        .unwrap_or_default();
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.iter().position(|&byte| byte == b'\\' || byte == 0xc0) {
        let (plain, special) = rest.split_at(at);
        push_utf8(&mut text, plain)?;
        // The text shown for a bad \u runs into the closing quote, hence the token's own tail.
        let tail = token
            .get(token.len() - 1 - special.len()..)
            .unwrap_or_default();
        let (character, used) = match special {
            // The "modified UTF-8" spelling of NUL, which QEMU takes.
            [0xc0, 0x80, ..] => ('\0', 2),
            [b'\\', b'u', ..] => unicode_escape(tail)?,
            [b'\\', escaped, ..] => (simple_escape(*escaped)?, 2),
            _ => return Err("invalid UTF-8 sequence in string".to_owned()),
        };
        text.push(character);
        rest = special.get(used..).unwrap_or_default();
    }
    push_utf8(&mut text, rest)?;
    Ok(text)
}

fn push_utf8(text: &mut String, bytes: &[u8]) -> Result<(), String> {
    let valid = str::from_utf8(bytes).map_err(|_| "invalid UTF-8 sequence in string")?;
    text.push_str(valid);
    Ok(())
}

fn simple_escape(escaped: u8) -> Result<char, String> {
    match escaped {
        b'"' | b'\'' | b'\\' | b'/' => Ok(char::from(escaped)),
        b'b' => Ok('\u{8}'),
        b'f' => Ok('\u{c}'),
        b'n' => Ok('\n'),
        b'r' => Ok('\r'),
        b't' => Ok('\t'),
        _ => Err("invalid escape sequence in string".to_owned()),
    }
}

/// Decodes a `\uXXXX` escape, or two that make a surrogate pair; also says how long it was.
fn unicode_escape(text: &[u8]) -> Result<(char, usize), String> {
    let invalid = || {
        let shown = String::from_utf8_lossy(text.get(..6).unwrap_or(text)).into_owned();
        format!("{shown} is not a valid Unicode character")
    };
    let first = code_unit(text).ok_or_else(invalid)?;
    if let Some(character) = char::from_u32(first.into()) {
        return Ok((character, 6));
    }
    let second = text.get(6..).and_then(code_unit).ok_or_else(invalid)?;
    match char::decode_utf16([first, second]).next() {
        Some(Ok(character)) => Ok((character, 12)),
        _ => Err(invalid()),
    }
}

fn code_unit(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u16::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}
