//! The `imagemirror` program: install the TLS provider, dispatch, map the outcome to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    // One provider for the whole process, before anything makes a connection; it can only be installed once, here.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    imagemirror::cli::run(std::env::args_os())
}
