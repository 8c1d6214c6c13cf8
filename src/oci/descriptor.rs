//! Descriptors (image-spec, descriptor.md) and the media types that the engine knows by name.

use serde::{Deserialize, Deserializer, Serialize, de};

use super::Digest;

/// Media types of manifests and of layers that are not distributed.
pub mod media_type {
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker image manifest, schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker manifest, schema 1, signed.
    pub const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    /// Docker manifest, schema 1.
    pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
    /// OCI artifact manifest, withdrawn from the specification but still found.
    pub const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
}

/// What a manifest says of a piece of content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type of the content; absent in some old artifacts.
    #[serde(default)]
    pub media_type: String,
    /// The digest of the content.
    pub digest: Digest,
    /// The length of the content in bytes; the specification's type for it is `int64`.
    #[serde(deserialize_with = "int64")]
    pub size: u64,
    /// Where else the content may be fetched: set for foreign layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

impl Descriptor {
    /// Whether the media type is that of a manifest or an index.
    #[must_use]
    pub fn is_manifest(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            media_type::OCI_MANIFEST
                | media_type::OCI_INDEX
                | media_type::DOCKER_MANIFEST
                | media_type::DOCKER_LIST
                | media_type::DOCKER_SCHEMA1
                | media_type::DOCKER_SCHEMA1_SIGNED
                | media_type::OCI_ARTIFACT
        )
    }

    /// Whether the media type is that of an index.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), media_type::OCI_INDEX | media_type::DOCKER_LIST)
    }

    /// Whether this is a layer that its vendor distributes elsewhere: it has `urls` and one of the types for that
    /// (image-spec, layer.md, "Non-Distributable Layers"). Other layers with `urls` are in the registry too.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        let is_type = self.media_type.starts_with("application/vnd.oci.image.layer.nondistributable.v1.")
            || self.media_type == "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        is_type && !self.urls.is_empty()
    }
}

/// A larger number is refused: no other reader takes it, and the largest of `u64` stands for an unknown size here.
fn int64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let number = u64::deserialize(deserializer)?;
    if number > i64::MAX.cast_unsigned() {
        return Err(de::Error::custom(format_args!("size {number} is larger than an int64")));
    }
    Ok(number)
}
