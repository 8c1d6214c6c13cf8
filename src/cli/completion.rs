//! `imagemirror completion SHELL`: what makes a shell complete the arguments, for the program.

use clap::{Args, Command, CommandFactory as _};
use clap_complete::{Shell, generate};

use super::{Cli, say};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments) {
    say(&script(arguments.shell, &mut Cli::command()));
}

fn script(shell: Shell, command: &mut Command) -> String {
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    generate(shell, command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
