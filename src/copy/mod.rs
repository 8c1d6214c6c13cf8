//! The graph copy: an image goes from one repository to another byte for byte, children before parents, the tag last.
//!
//! ```text
//! index ──▶ manifests ──▶ blobs          read in this order
//! blobs ──▶ manifests ──▶ index ──▶ tag   written in this order
//! ```
//!
//! A [`Run`] is what the copies of one sync share: each digest goes to each repository once, whoever asks for it
//! first; what was opened at the target and not finished is cancelled. Every byte is hashed on its way, nothing is
//! written to disk, and memory is bounded by streams times buffer whatever the size of a layer.

mod attached;
mod blob;
mod error;
mod fence;
mod graph;
mod missing;
mod options;
mod run;
mod subset;

pub use attached::may_have_attached;
pub use error::CopyError;
pub use fence::Fence;
pub use graph::{copy, copy_attached};
pub use missing::missing;
pub use options::{CopyOptions, Expected, ForeignLayers, Referrers};
pub use run::{Counter, Progress, ProgressSnapshot, Run, Totals};
pub use subset::Root;
