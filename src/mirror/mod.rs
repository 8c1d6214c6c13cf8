//! From what the user wrote to what the engine is asked: pure, and shared by operator and command line.
//!
//! ```text
//! ImageMirror ──validate──▶ ValidatedMirror ──prepare(secrets)──▶ Prepared { SyncRequest, Registries, problems }
//! ```
//!
//! After [`validate`] nobody reads the raw spec. Names in references never carry a namespace: it is the object's own.

mod prepare;
mod secret;
mod validate;

pub use prepare::{Prepared, last_digests, prepare};
pub use secret::{Account, Problem, Secrets, content, fingerprint, is_object_name};
pub use validate::{InvalidSpec, RegistrySettings, ValidatedMirror, WantedImage, WantedTags, validate, validate_with};
