//! The operator: watches `ImageMirror` objects and keeps each in step.
//!
//! A reconcile is a row of named steps, one file each, and never copies anything itself:
//!
//! ```text
//! validate ──▶ decide ──▶ resolve ──▶ prepare ──▶ runner (in the background) ──▶ status
//!  (pure)      (pure)     Secrets      (pure)      sync()                        (pure, then one apply)
//! ```
//!
//! A run that ends wakes its object. Without the lease nothing is reconciled; when it is lost, runs are cancelled.

mod claims;
mod context;
mod decide;
mod error;
mod events;
pub(crate) mod identity;
mod lease;
mod operator;
mod reconcile;
mod resolve;
mod review;
mod runner;
mod secrets;
mod shared;
mod status;
mod turns;
mod watch;

pub use error::Error;
pub(crate) use error::api_words;
pub use operator::{OperatorError, Options, run};
