//! Cuts a stream of bytes into the tokens of one JSON value after another.
//!
//! The rules of recovery are those of QEMU, because clients are tested against it: a byte that fits
//! nowhere throws away the value read so far, and reading goes on at the next control character or
//! structural character.
//!
//! In one thing this lexer is kinder. When a value is too large, too deep or has too many tokens,
//! QEMU starts afresh in the middle of it, and the rest of the value becomes a hail of errors or,
//! worse, an open bracket that swallows the next command. Here the rest is thrown away up to the end
//! of the value or of the line, whichever is first.

use super::{MAX_NESTING, MAX_TOKENS, MAX_VALUE_BYTES};

/// At most this much of a broken token is quoted in an error.
const QUOTED_BYTES: usize = 128;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One of `{}[]:,`.
    Punctuation(u8),
    /// A string with its quotes, escapes still in place.
    String,
    /// A number.
    Number,
    /// A run of lower-case letters.
    Keyword,
}

/// A token and where its text is in [`Message::text`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub kind: Kind,
    start: u32,
    end: u32,
}

/// The tokens of one value.
#[derive(Debug, Default)]
pub(super) struct Message {
    text: Vec<u8>,
    pub tokens: Vec<Token>,
}

impl Message {
    /// The text of `token`.
    pub fn text(&self, token: &Token) -> &[u8] {
        self.text
            .get(token.start as usize..token.end as usize)
            .unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    /// After an error: bytes are skipped until one that may begin something.
    Recovery,
    String(u8),
    Escape(u8),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// What a byte means in a state.
enum Step {
    /// It belongs to the token under way (or begins one).
    Take(State),
    /// It is not part of any token.
    Skip(State),
    /// It completes a token.
    End(Kind),
    /// The token ended before it: look at the byte again from the start.
    EndBefore(Kind),
    /// Look at the byte again from the start.
    Again,
    /// It cannot be here.
    Stray,
}

/// The lexer: feed it bytes, it calls back with whole values' tokens.
#[derive(Debug, Default)]
pub(super) struct Lexer {
    state: State,
    message: Message,
    token_start: usize,
    braces: i64,
    brackets: i64,
    /// A limit was passed: what is left of this value is read but not kept.
    discarding: bool,
}

impl Lexer {
    /// Takes one byte; calls `found` when it completes a value or makes one impossible.
    pub fn push(&mut self, byte: u8, found: &mut dyn FnMut(Result<Message, String>)) {
        loop {
            match step(self.state, byte) {
                Step::Take(state) => {
                    self.state = state;
                    self.keep(byte, found);
                    return;
                }
                Step::Skip(state) => {
                    self.state = state;
                    if byte == b'\n' && self.discarding {
                        self.reset();
                    }
                    return;
                }
                Step::End(kind) => {
                    self.state = State::Start;
                    self.keep(byte, found);
                    self.end_token(kind, found);
                    return;
                }
                Step::EndBefore(kind) => {
                    self.state = State::Start;
                    self.end_token(kind, found);
                }
                Step::Again => self.state = State::Start,
                Step::Stray => {
                    self.stray(byte, found);
                    return;
                }
            }
        }
    }

    fn keep(&mut self, byte: u8, found: &mut dyn FnMut(Result<Message, String>)) {
        if self.discarding {
            return;
        }
        if self.message.text.len() >= MAX_VALUE_BYTES {
            self.discard("JSON token size limit exceeded", found);
            return;
        }
        self.message.text.push(byte);
    }

    fn end_token(&mut self, kind: Kind, found: &mut dyn FnMut(Result<Message, String>)) {
        match kind {
            Kind::Punctuation(b'{') => self.braces += 1,
            Kind::Punctuation(b'}') => self.braces -= 1,
            Kind::Punctuation(b'[') => self.brackets += 1,
            Kind::Punctuation(b']') => self.brackets -= 1,
            _ => {}
        }
        if !self.discarding {
            let end = self.message.text.len();
            // MAX_VALUE_BYTES is far below 4 GiB, so the positions fit.
            let token = Token {
                kind,
                start: self.token_start as u32,
                end: end as u32,
            };
            self.token_start = end;
            if self.braces + self.brackets > MAX_NESTING as i64 {
                self.discard("JSON nesting depth limit exceeded", found);
            } else if self.message.tokens.len() >= MAX_TOKENS {
                self.discard("JSON token count limit exceeded", found);
            } else {
                self.message.tokens.push(token);
            }
        }
        let open = self.braces > 0 || self.brackets > 0;
        let overshot = self.braces < 0 || self.brackets < 0;
        if open && !overshot {
            return;
        }
        let discarded = self.discarding;
        let message = self.reset();
        if !discarded {
            found(Ok(message));
        }
    }

    /// The bytes that are held of the value under way.
    pub fn held(&self) -> usize {
        self.message.text.capacity() + self.message.tokens.capacity() * size_of::<Token>()
    }

    /// Gives up the value under way with an error, and forgets the rest of it as it comes.
    pub fn discard(&mut self, why: &str, found: &mut dyn FnMut(Result<Message, String>)) {
        self.discarding = true;
        self.message = Message::default();
        self.token_start = 0;
        found(Err(why.to_owned()));
    }

    fn stray(&mut self, byte: u8, found: &mut dyn FnMut(Result<Message, String>)) {
        self.state = State::Recovery;
        if self.discarding {
            if byte == b'\n' {
                self.reset();
            }
            return;
        }
        let text = self
            .message
            .text
            .get(self.token_start..)
            .unwrap_or_default();
        let text = text.get(..QUOTED_BYTES).unwrap_or(text);
        let mut quoted = text.to_vec();
        if byte != 0 {
            quoted.push(byte);
        }
        let quoted = String::from_utf8_lossy(&quoted).into_owned();
        self.reset();
        self.state = State::Recovery;
        found(Err(format!("JSON parse error, stray '{quoted}'")));
    }

    fn reset(&mut self) -> Message {
        self.token_start = 0;
        self.braces = 0;
        self.brackets = 0;
        self.discarding = false;
        std::mem::take(&mut self.message)
    }
}

fn is_structural(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',')
}

fn step(state: State, byte: u8) -> Step {
    match state {
        State::Start => start(byte),
        State::Recovery => match byte {
            b' '..=0xfd if !is_structural(byte) => Step::Skip(State::Recovery),
            _ => Step::Again,
        },
        State::String(quote) => match byte {
            b'\\' => Step::Take(State::Escape(quote)),
            byte if byte == quote => Step::End(Kind::String),
            b' '..=0xfd => Step::Take(state),
            _ => Step::Stray,
        },
        State::Escape(quote) => match byte {
            b' '..=0xfd => Step::Take(State::String(quote)),
            _ => Step::Stray,
        },
        State::Keyword => match byte {
            b'a'..=b'z' => Step::Take(State::Keyword),
            _ => Step::EndBefore(Kind::Keyword),
        },
        _ => number(state, byte),
    }
}

fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip(State::Start),
        b'"' | b'\'' => Step::Take(State::String(byte)),
        b'-' => Step::Take(State::Minus),
        b'0' => Step::Take(State::Zero),
        b'1'..=b'9' => Step::Take(State::Digits),
        b'a'..=b'z' => Step::Take(State::Keyword),
        byte if is_structural(byte) => Step::End(Kind::Punctuation(byte)),
        _ => Step::Stray,
    }
}

fn number(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Minus, b'0') => Step::Take(State::Zero),
        (State::Minus, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Minus, _) => Step::Stray,
        (State::Zero, b'0'..=b'9') => Step::Stray,
        (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::Exponent),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::Exponent, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => {
            Step::Take(State::ExponentDigits)
        }
        (State::Point | State::Exponent | State::ExponentSign, _) => Step::Stray,
        _ => Step::EndBefore(Kind::Number),
    }
}
