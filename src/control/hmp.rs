//! The human monitor: lines such as people type them, carried by `human-monitor-command`.
//!
//! Each command of the human monitor is put into the form of its QMP command and carried out as
//! that. What comes back is text, its lines ended by CRLF as on a terminal.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::args::Args;
use super::command::{Answer, Control, Done};
use super::error::CommandError;
use super::exports::with_tops;
use super::nodes::{Nodes, io_status};

/// What a word of a command line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A letter after a dash.
    Flag(char),
    /// A string.
    Str,
    /// A number of bytes; MiB when no unit is given.
    Size,
}

/// A parameter of a command.
struct Param {
    name: &'static str,
    form: Form,
    /// What is said when it is missing; nothing if it may be.
    missing: Option<&'static str>,
}

/// A command of the human monitor.
struct HumanCommand {
    /// Its names, the first of which is shown.
    names: &'static [&'static str],
    /// How its parameters are shown.
    usage: &'static str,
    help: &'static str,
    params: &'static [Param],
    run: fn(&Control, Words) -> Result<Output, CommandError>,
}

/// The parameters that were given, by name.
type Words = Map<String, Value>;

#[derive(Default)]
struct Output {
    text: String,
    quit: bool,
}

const fn flag(name: &'static str, letter: char) -> Param {
    Param {
        name,
        form: Form::Flag(letter),
        missing: None,
    }
}

const fn optional(name: &'static str, form: Form) -> Param {
    Param {
        name,
        form,
        missing: None,
    }
}

const DEVICE: Param = Param {
    name: "device",
    form: Form::Str,
    missing: Some("block device name expected"),
};

static COMMANDS: &[HumanCommand] = &[
    HumanCommand {
        names: &["help", "?"],
        usage: "[cmd]",
        help: "show the help",
        params: &[optional("name", Form::Str), optional("item", Form::Str)],
        run: |_, words| Ok(help(word(&words, "name"), word(&words, "item"))),
    },
    HumanCommand {
        names: &["block_stream"],
        usage: "device [speed [base]]",
        help: "copy data from a backing file into a block device",
        params: &[
            DEVICE,
            optional("speed", Form::Size),
            optional("base", Form::Str),
        ],
        run: block_stream,
    },
    HumanCommand {
        names: &["block_job_set_speed"],
        usage: "device speed",
        help: "set maximum speed for a background block operation",
        params: &[
            DEVICE,
            Param {
                name: "speed",
                form: Form::Size,
                missing: Some(""),
            },
        ],
        run: |control, words| quiet(control, "block-job-set-speed", words),
    },
    HumanCommand {
        names: &["block_job_cancel"],
        usage: "[-f] device",
        help: "stop an active background block operation (use -f to reach a paused one, too)",
        params: &[flag("force", 'f'), DEVICE],
        run: |control, words| quiet(control, "block-job-cancel", words),
    },
    HumanCommand {
        names: &["block_job_pause"],
        usage: "device",
        help: "pause an active background block operation",
        params: &[DEVICE],
        run: |control, words| quiet(control, "block-job-pause", words),
    },
    HumanCommand {
        names: &["block_job_resume"],
        usage: "device",
        help: "resume a paused background block operation",
        params: &[DEVICE],
        run: |control, words| quiet(control, "block-job-resume", words),
    },
    HumanCommand {
        names: &["block_job_complete"],
        usage: "device",
        help: "end a background block operation that is ready",
        params: &[DEVICE],
        run: |control, words| quiet(control, "block-job-complete", words),
    },
    HumanCommand {
        names: &["quit", "q"],
        usage: "",
        help: "end the daemon",
        params: &[],
        run: |_, _| {
            Ok(Output {
                quit: true,
                ..Output::default()
            })
        },
    },
];

static INFO: &[HumanCommand] = &[
    HumanCommand {
        names: &["block"],
        usage: "[-n] [-v] [device]",
        help: "show info of one block device or all block devices (-n: show named nodes; \
               -v: show details)",
        params: &[
            flag("nodes", 'n'),
            flag("verbose", 'v'),
            optional("device", Form::Str),
        ],
        run: info_block,
    },
    HumanCommand {
        names: &["block-jobs"],
        usage: "",
        help: "show progress of ongoing block device operations",
        params: &[],
        run: |control, _| Ok(info_block_jobs(control)),
    },
    HumanCommand {
        names: &["version"],
        usage: "",
        help: "show the version of stratablk",
        params: &[],
        run: |_, _| Ok(concat!("stratablk ", env!("CARGO_PKG_VERSION"), "\n").into()),
    },
];

impl<T: Into<String>> From<T> for Output {
    fn from(text: T) -> Self {
        Self {
            text: text.into(),
            quit: false,
        }
    }
}

/// Carries out a line.
pub(super) fn human_monitor_command(control: &Control, args: &Args) -> Done {
    let output = run_line(control, args.required_str("command-line")?);
    Ok(Answer {
        value: output.text.replace('\n', "\r\n").into(),
        quit: output.quit,
    })
}

fn run_line(control: &Control, line: &str) -> Output {
    let line = line.trim();
    let (name, rest) = split_word(line);
    if name.is_empty() {
        return Output::default();
    }
    if name == "info" {
        let (item, rest) = split_word(rest);
        return match find(INFO, item) {
            _ if item.is_empty() => help("info", ""),
            Some(command) => run_command(control, command, &format!("info {item}"), rest),
            None => format!("unknown command: 'info {item}'\n").into(),
        };
    }
    match find(COMMANDS, name) {
        Some(command) => run_command(control, command, name, rest),
        None => format!("unknown command: '{name}'\n").into(),
    }
}

fn find(table: &'static [HumanCommand], name: &str) -> Option<&'static HumanCommand> {
    table.iter().find(|command| command.names.contains(&name))
}

fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace).unwrap_or((text, ""))
}

fn run_command(control: &Control, command: &HumanCommand, name: &str, rest: &str) -> Output {
    match read_words(command, rest) {
        Ok(words) => (command.run)(control, words)
            .unwrap_or_else(|error| format!("Error: {}\n", error.desc).into()),
        Err(why) => format!("{why}\nTry \"help {name}\" for more information\n").into(),
    }
}

/// Reads the parameters of `command` from a line.
fn read_words(command: &HumanCommand, line: &str) -> Result<Words, String> {
    let shown = command.names.join("|");
    let mut rest = line.trim_start();
    let mut words = Words::new();
    while let Some(letter) = flag_letter(rest) {
        let param = command
            .params
            .iter()
            .find(|param| param.form == Form::Flag(letter));
        let param = param.ok_or_else(|| format!("{shown}: unsupported option -{letter}"))?;
        words.insert(param.name.to_owned(), true.into());
        rest = rest.get(2..).unwrap_or_default().trim_start();
    }
    for param in command.params {
        match param.form {
            Form::Flag(_) => {}
            Form::Str => match take_string(rest) {
                Some((text, after)) => {
                    words.insert(param.name.to_owned(), text.into());
                    rest = after;
                }
                None => {
                    if let Some(missing) = param.missing {
                        return Err(format!("{shown}: {missing}"));
                    }
                }
            },
            Form::Size if rest.is_empty() && param.missing.is_none() => {}
            Form::Size => {
                let (size, after) = take_size(rest).ok_or("invalid size")?;
                words.insert(param.name.to_owned(), size.into());
                rest = after.trim_start();
            }
        }
    }
    if !rest.trim().is_empty() {
        return Err(format!("{shown}: extraneous characters at the end of line"));
    }
    Ok(words)
}

/// The letter of the flag that `text` starts with. A lone dash, or a negative number, is none.
fn flag_letter(text: &str) -> Option<char> {
    let letter = text.strip_prefix('-')?.chars().next()?;
    letter.is_ascii_alphabetic().then_some(letter)
}

/// Takes a word, or a string in quotes.
fn take_string(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = split_word(text);
        return (!word.is_empty()).then(|| (word.to_owned(), rest.trim_start()));
    };
    let mut string = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((string, quoted.get(at + 1..)?.trim_start())),
            '\\' => match characters.next()?.1 {
                'n' => string.push('\n'),
                'r' => string.push('\r'),
                other => string.push(other),
            },
            other => string.push(other),
        }
    }
    None
}

/// Takes a number with an optional fraction and unit; without a unit it counts MiB.
fn take_size(text: &str) -> Option<(i64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let unit = rest.chars().next().map(|c| c.to_ascii_lowercase());
    let power = "bkmgtpe".find(unit.unwrap_or('m'));
    let rest = if power.is_some() {
        rest.get(1..).unwrap_or_default()
    } else {
        rest
    };
    let factor = 1_i64.checked_shl(10 * u32::try_from(power.unwrap_or(2)).ok()?)?;
    if let Ok(whole) = digits.parse::<i64>() {
        return Some((whole.checked_mul(factor)?, rest));
    }
    if !digits.contains('.') {
        return None;
    }
    let bytes = digits.parse::<f64>().ok()? * factor as f64;
    // Rounding down is what is wanted; the bound keeps the conversion exact enough.
    (bytes < i64::MAX as f64).then_some((bytes as i64, rest))
}

fn word<'a>(words: &'a Words, name: &str) -> &'a str {
    words.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Carries out the QMP command that says nothing when all is well.
fn quiet(control: &Control, command: &str, words: Words) -> Result<Output, CommandError> {
    control.execute(command, words)?;
    Ok(Output::default())
}

fn block_stream(control: &Control, mut words: Words) -> Result<Output, CommandError> {
    words.insert("on-error".to_owned(), "report".into());
    quiet(control, "block-stream", words)
}

fn help(name: &str, item: &str) -> Output {
    let mut text = String::new();
    let mut add = |prefix: &str, command: &HumanCommand| {
        let names = command.names.join("|");
        // A String takes all that is written to it.
        let _ = writeln!(
            text,
            "{prefix}{names} {} -- {}",
            command.usage, command.help
        );
    };
    match (name, item) {
        ("", _) => {
            COMMANDS.iter().for_each(|command| add("", command));
            INFO.iter().for_each(|command| add("info ", command));
        }
        ("info", "") => INFO.iter().for_each(|command| add("info ", command)),
        ("info", item) => match find(INFO, item) {
            Some(command) => add("info ", command),
            None => return format!("unknown command: 'info {item}'\n").into(),
        },
        (name, _) => match find(COMMANDS, name) {
            Some(command) => add("", command),
            None => return format!("unknown command: '{name}'\n").into(),
        },
    }
    text.into()
}

fn info_block_jobs(control: &Control) -> Output {
    let jobs = control.engine.jobs.list().into_iter();
    let jobs: Vec<_> = jobs.filter(|job| job.is_block_job()).collect();
    if jobs.is_empty() {
        return "No active jobs\n".into();
    }
    let mut text = String::new();
    for job in jobs {
        let what = if job.kind == "stream" {
            format!("Streaming device {}", job.id)
        } else {
            format!("Type {}, device {}", job.kind, job.id)
        };
        let _ = writeln!(
            text,
            "{what}: Completed {} of {} bytes, speed limit {} bytes/s",
            job.offset, job.len, job.speed
        );
    }
    text.into()
}

fn info_block(control: &Control, words: Words) -> Result<Output, CommandError> {
    let wanted = word(&words, "device");
    let exports = with_tops(&control.engine);
    let nodes = match words.contains_key("nodes") {
        true => Nodes::of(&control.engine),
        false => Nodes::of_guests(&control.engine),
    };
    let mut parts = Vec::new();
    if words.contains_key("nodes") {
        for node in nodes.each() {
            if wanted.is_empty() || wanted == node.name() {
                parts.push(node.describe(node.name()));
            }
        }
    } else {
        for (top, served) in &exports {
            let node = nodes.shown_at(top);
            let node_name = node.as_ref().map_or(&**top, |node| node.name());
            let id = &served.options.id;
            if !wanted.is_empty() && wanted != id && wanted != node_name {
                continue;
            }
            let title = format!("{id} ({node_name})");
            let mut text = match node {
                Some(node) => node.describe(&title),
                None => format!("{title}: [not inserted]\n"),
            };
            let failed = control.engine.sync_errors(top);
            if !failed.is_empty() {
                let status = io_status(&failed);
                let _ = writeln!(text, "    I/O status:       {status}");
            }
            for error in failed {
                let _ = writeln!(text, "    {}", error.description);
            }
            parts.push(text);
        }
    }
    Ok(parts.join("\n").into())
}
