//! The `imagemirror` program: install the TLS provider, dispatch, map the outcome to an exit code.

use std::process::ExitCode;

use mimalloc::MiMalloc;

/// What registries send is freed in other orders than it was allocated in: the C library's allocator keeps twice of it.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    // One provider for the whole process, before anything makes a connection; it can only be installed once, here.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    imagemirror::cli::run(std::env::args_os())
}
