//! `ImageMirror` copies container images from registry to registry, byte for byte, and keeps them in step.
//!
//! The library is the copy engine and, with the feature `operator`, the Kubernetes operator around it. The way of the
//! data is one direction: a step gets plain values from the one before it and knows nothing of the one after.
//!
//! | module | what it is | does I/O |
//! |---|---|---|
//! | [`oci`] | digests, references, descriptors, manifests | no |
//! | [`auth`] | credentials, how they are matched, challenges, tokens | tokens only |
//! | [`registry`] | the distribution protocol: one client for the process, cheap handles on repositories | yes |
//! | [`copy`] | the graph copy: manifests, blobs, deduplication, progress | yes |
//! | [`select`] | which tags are wanted, by rule | no |
//! | [`plan`] | what is wanted against what is there | no |
//! | [`schedule`] | when the next run is due | no |
//! | [`sync`](mod@sync) | the one entry that operator and command line share | yes |
//! | `api`, `mirror` | the custom resource, and its validated form | no |
//! | `controller`, `cli`, `telemetry`, `config` | the I/O side around it | yes |

pub mod auth;
pub mod copy;
pub mod oci;
pub mod plan;
pub mod reason;
pub mod registry;
pub mod schedule;
pub mod select;
pub mod sync;

#[cfg(feature = "operator")]
pub mod api;
#[cfg(feature = "operator")]
pub mod cli;
#[cfg(feature = "operator")]
pub mod config;
#[cfg(feature = "operator")]
pub mod controller;
#[cfg(feature = "operator")]
pub mod mirror;
#[cfg(feature = "operator")]
pub mod telemetry;
