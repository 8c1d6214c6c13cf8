//! The distribution protocol (opencontainers/distribution-spec v1.1) as a client that moves images between registries.
//!
//! One [`Client`] serves the whole process: it owns the connection pools, the limits per host and the token cache. A
//! [`Repository`] is a cheap handle on one repository with the credentials that match it. Nothing a registry sends is
//! trusted: bodies are bounded, digests computed, and a redirect, token server or upload location is followed only
//! where credentials and bytes may go.
//!
//! Errors say which step failed at which host with which answer ([`Error`]), map to one
//! [`Reason`](crate::reason::Reason), and know whether to try again.

mod backend;
mod body;
mod check;
mod client;
mod counters;
mod envelope;
mod error;
pub mod header;
mod known;
mod layout;
mod limits;
mod list;
mod login;
mod memory;
mod network;
mod pace;
#[cfg(test)]
mod properties;
mod proxy;
mod pull;
mod push;
mod quirks;
mod repository;
mod send;
mod spacing;
mod token;
mod transport;
mod upload;

pub use backend::{BlobOpener, Source, Target};
pub use body::{BlobStream, Meter};
pub use check::Probe;
pub use client::{Client, ClientOptions, HostOptions, Timing};
pub use counters::{Code, Counters, HostCounters};
pub use error::{CertificateProblem, Error, ErrorKind, Side, Step};
pub use layout::{Layout, LayoutError, LayoutRepository};
pub use list::{MAX_PAGES, TagList};
pub use memory::Memory;
pub use network::{Denied, Networks, SURROUNDINGS};
pub use pace::Floor;
pub use proxy::{Proxy, ProxyError};
pub use push::{PutOptions, Stored};
pub use quirks::{Fact, Met, Quirks, UploadStrategy, VENDORS, Vendor};
pub use repository::{Access, Repository};
pub use spacing::Quota;
pub use transport::{Transport, TransportError};
pub use upload::{PutError, Sessions};
