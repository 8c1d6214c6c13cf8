//! The distribution protocol (opencontainers/distribution-spec v1.1) as a client that moves images between registries.
//!
//! One [`Client`] serves the whole process: it owns the connection pools, the limits per host and the token cache. A
//! [`Repository`] is a cheap handle on one repository with the credentials that match it. Nothing a registry sends is
//! trusted: bodies are bounded, digests computed, and a redirect, token server or upload location is followed only
//! where credentials and bytes may go.
//!
//! Errors say which step failed at which host with which answer ([`Error`]), map to one
//! [`Reason`](crate::reason::Reason), and know whether to try again.

mod body;
mod client;
mod error;
mod limits;
mod network;
mod repository;
mod send;
mod transport;
mod upload;

pub use body::{BlobStream, BodyFailed, HoldBack};
pub use client::{Client, ClientOptions, HostOptions, Timing};
pub use error::{Error, ErrorKind, Side, Step};
pub use network::{Denied, Networks};
pub use repository::{Access, Repository};
pub use transport::{Transport, TransportError};
pub use upload::{MountFrom, Started, StreamError, Upload};
