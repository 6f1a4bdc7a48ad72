//! The `stratactl` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(stratablk::ctl::run(std::env::args_os()))
}
