//! A real Kubernetes control plane and real registries for the tests and the demo of ImageMirror, without Docker and
//! without root.
//!
//! `testenv up -- COMMAND` starts everything and runs COMMAND, whose tests find it through [`Env::get`]. Tests run side
//! by side: each owns a namespace and a repository prefix. What a single test needs for itself (a registry with other
//! options, a proxy that breaks things, a slow line) it starts with the modules here; what is dropped is stopped, and
//! the guard of the run kills what a killed test leaves behind.

pub mod amazon;
pub mod artifacts;
pub mod certs;
pub mod chart;
pub mod client;
mod commands;
pub mod controlplane;
pub mod demo;
pub mod e2e;
pub mod env;
pub mod forwarder;
pub mod guard;
mod gzip;
pub mod hostile;
pub mod hosts;
pub mod images;
mod node;
pub mod oidc;
mod pace;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod supervisor;
mod terminal;
pub mod token;
pub mod tools;
pub mod trap;
pub mod tunnel;
pub mod witness;

pub use client::Client;
pub use env::Env;
pub use forwarder::Forwarder;
pub use hosts::Hosts;
pub use images::{Content, Image};
pub use process::Process;
pub use proxy::Proxy;
pub use registry::{Registry, RegistryOptions, RegistryServer};
pub use trap::Trap;
pub use tunnel::Tunnel;
