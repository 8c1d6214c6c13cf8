//! The vocabulary of the OCI specifications: digests, references, descriptors, media types and manifests.
//!
//! Pure: nothing here does I/O. Types cannot hold bad text ([`Digest`], [`Host`], [`RepositoryName`], [`Tag`]), so that
//! no URL is ever built from an unchecked string. Manifests are kept as the bytes that were received
//! ([`RawManifest`]) and never serialised again: a digest is only ever computed over them.
//!
//! ```
//! use imagemirror::oci::Reference;
//! let image: Reference = "nginx:1.27".parse()?;
//! assert_eq!(image.to_string(), "docker.io/library/nginx:1.27");
//! # Ok::<(), imagemirror::oci::ReferenceError>(())
//! ```

mod descriptor;
mod digest;
mod index;
mod manifest;
mod name;
mod platform;
#[cfg(test)]
mod properties;
mod reference;
mod strict_json;

pub use descriptor::{Descriptor, media_type};
pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use index::{RawDescriptor, RawIndex};
pub use manifest::{ACCEPT, Child, ManifestError, RawManifest};
pub(crate) use name::split_port;
pub use name::{Host, NameError, RepositoryName, Tag};
pub use platform::{Platform, PlatformError, PlatformFilter};
pub use reference::{Reference, ReferenceError};
