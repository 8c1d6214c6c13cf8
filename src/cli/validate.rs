//! `imagemirror validate -f FILE…`: what the API server would refuse, and what the operator would, without either.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, documents::Documents, say};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files with ImageMirrors; `-` is standard input.
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mirrors = Documents::of(&arguments.files)?.validated()?;
    for mirror in &mirrors {
        say(&format!("{}/{}: valid\n", mirror.namespace, mirror.name));
    }
    Ok(())
}
