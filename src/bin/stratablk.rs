//! The `stratablk` daemon: see the library's `config` for its options and `daemon` for the rest.

use std::io::Write;
use std::process::ExitCode;

use stratablk::config::{self, Action};

/// The exit status for a command line that is wrong, and will be so at the next start: supervisors
/// can tell it from what may get better.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let action = match config::parse(std::env::args_os()) {
        Ok(action) => action,
        Err(error) => {
            eprintln!("stratablk: {error}");
            return ExitCode::from(USAGE);
        }
    };
    match action {
        Action::Run(config) => {
            stratablk::daemon::abort_on_panic();
            ExitCode::from(stratablk::daemon::run(&config))
        }
        Action::PrintCapabilities => print(config::CAPABILITIES),
        Action::Help(text) => print(&text),
        Action::Version => print(&config::version_line()),
    }
}

/// Prints to standard output; a reader who has gone away is no error.
fn print(text: &str) -> ExitCode {
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}
