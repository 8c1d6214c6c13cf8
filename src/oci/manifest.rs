//! Manifests as the bytes that were received, and the content they name.
//!
//! A manifest is only read to find its children and never written again. Documents that two readers may understand
//! differently are refused (image-spec CVE-2021-41190): duplicate keys, `manifests` beside `layers`, a `mediaType`
//! field that contradicts the `Content-Type`. Types that are not known are walked by the fields every type uses.

use bytes::Bytes;
use serde_json::Value;

use super::{Descriptor, Digest, strict_json};

/// The `Accept` header of every manifest request. A registry may answer 404 for a manifest whose type is not listed,
/// or convert it, so that all types are listed always.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.oci.artifact.manifest.v1+json, application/vnd.docker.distribution.manifest.v1+prettyjws, \
     application/vnd.docker.distribution.manifest.v1+json, */*";

/// A manifest: its bytes as received, the type to send it with, and the digest of the bytes.
#[derive(Clone, Debug)]
pub struct RawManifest {
    /// The bytes as received.
    pub bytes: Bytes,
    /// The media type, without parameters.
    pub media_type: String,
    /// The digest of the bytes.
    pub digest: Digest,
}

/// Content that a manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Child {
    /// Another manifest.
    Manifest(Descriptor),
    /// A blob.
    Blob(Descriptor),
}

/// A document that is not copied.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or JSON with a key named twice.
    #[error("the manifest is not a JSON document that can be trusted: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON, but not an object.
    #[error("the manifest is not a JSON object")]
    NotAnObject,
    /// Both an index and an image.
    #[error("the manifest has both `manifests` and `layers`")]
    Ambiguous,
    /// The header and the document differ.
    #[error("the Content-Type is {header:?} but the manifest says mediaType {field:?}")]
    MediaType {
        /// What the registry's header says.
        header: String,
        /// What the document says.
        field: String,
    },
    /// No known type and none of the fields that name content.
    #[error("media type {0:?} is not known and the document names no content")]
    Unknown(String),
    /// A descriptor that does not parse.
    #[error("malformed descriptor in `{field}`: {source}")]
    Descriptor {
        /// The field that holds it.
        field: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A field has another form than the specification gives it.
    #[error("`{0}` has an unexpected form")]
    Form(&'static str),
}

impl RawManifest {
    /// Checks that the document can be copied, and returns what it names, each once, in the document's order.
    pub fn children(&self) -> Result<Vec<Child>, ManifestError> {
        let document = strict_json::parse(&self.bytes)?;
        let Value::Object(fields) = &document else { return Err(ManifestError::NotAnObject) };
        if let Some(Value::String(field)) = fields.get("mediaType")
            && *field != self.media_type
        {
            return Err(ManifestError::MediaType { header: self.media_type.clone(), field: field.clone() });
        }
        let present = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
        if present("manifests") && (present("layers") || present("config")) {
            return Err(ManifestError::Ambiguous);
        }
        let mut children = Vec::new();
        if let Some(config) = fields.get("config").filter(|value| !value.is_null()) {
            children.push(Child::Blob(descriptor("config", config)?));
        }
        for name in ["layers", "blobs", "manifests"] {
            for item in array(name, fields.get(name))? {
                let descriptor = descriptor(name, item)?;
                let is_manifest = name == "manifests" || descriptor.is_manifest();
                children.push(if is_manifest { Child::Manifest(descriptor) } else { Child::Blob(descriptor) });
            }
        }
        for item in array("fsLayers", fields.get("fsLayers"))? {
            children.push(Child::Blob(schema1_layer(item)?));
        }
        let names_content =
            ["config", "layers", "blobs", "manifests", "fsLayers"].iter().any(|name| fields.contains_key(*name));
        if !names_content && !self.is_known_type() {
            return Err(ManifestError::Unknown(self.media_type.clone()));
        }
        let mut seen = std::collections::HashSet::new();
        children.retain(|child| seen.insert(child.descriptor().digest.clone()));
        Ok(children)
    }

    /// Whether the media type is that of an index.
    #[must_use]
    pub fn is_index(&self) -> bool {
        self.descriptor().is_index()
    }

    /// The configuration that it names, if it names one.
    pub fn config(&self) -> Result<Option<Descriptor>, ManifestError> {
        let document = strict_json::parse(&self.bytes)?;
        document.get("config").filter(|value| !value.is_null()).map(|config| descriptor("config", config)).transpose()
    }

    /// Whether it says that it is attached to another manifest.
    #[must_use]
    pub fn has_subject(&self) -> bool {
        strict_json::parse(&self.bytes)
            .is_ok_and(|document| document.get("subject").is_some_and(|subject| !subject.is_null()))
    }

    fn is_known_type(&self) -> bool {
        self.descriptor().is_manifest()
    }

    fn descriptor(&self) -> Descriptor {
        let (media_type, digest) = (self.media_type.clone(), self.digest.clone());
        Descriptor { media_type, digest, size: self.bytes.len() as u64, urls: Vec::new() }
    }
}

impl Child {
    /// The descriptor of the content.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        match self {
            Self::Manifest(descriptor) | Self::Blob(descriptor) => descriptor,
        }
    }
}

fn descriptor(field: &'static str, value: &Value) -> Result<Descriptor, ManifestError> {
    // An array of the fields would be read too, and by nobody else.
    if !value.is_object() {
        return Err(ManifestError::Form(field));
    }
    serde_json::from_value(value.clone()).map_err(|source| ManifestError::Descriptor { field, source })
}

fn array<'a>(field: &'static str, value: Option<&'a Value>) -> Result<&'a [Value], ManifestError> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(ManifestError::Form(field)),
    }
}

/// Schema 1 names its layers by digest alone: the size is learned from the registry.
fn schema1_layer(value: &Value) -> Result<Descriptor, ManifestError> {
    let digest = value.get("blobSum").cloned().ok_or(ManifestError::Form("fsLayers"))?;
    let digest =
        serde_json::from_value(digest).map_err(|source| ManifestError::Descriptor { field: "fsLayers", source })?;
    Ok(Descriptor { media_type: String::new(), digest, size: Descriptor::UNKNOWN_SIZE, urls: Vec::new() })
}

impl Descriptor {
    /// The size of content whose manifest does not name one.
    pub const UNKNOWN_SIZE: u64 = u64::MAX;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::media_type;

    fn manifest(media_type: &str, text: &str) -> RawManifest {
        RawManifest {
            bytes: Bytes::copy_from_slice(text.as_bytes()),
            media_type: media_type.into(),
            digest: Digest::sha256(text.as_bytes()),
        }
    }

    fn blob(letter: char) -> String {
        format!(r#"{{"mediaType":"application/x","digest":"sha256:{}","size":3}}"#, letter.to_string().repeat(64))
    }

    #[test]
    fn an_image_names_its_config_and_layers_once() {
        let (a, b) = (blob('a'), blob('b'));
        let text = format!(r#"{{"schemaVersion":2,"config":{a},"layers":[{b},{b},{a}]}}"#);
        let children = manifest(media_type::OCI_MANIFEST, &text).children().unwrap();
        assert_eq!(children.len(), 2);
        assert!(children.iter().all(|child| matches!(child, Child::Blob(_))));
    }

    #[test]
    fn an_index_names_manifests_and_may_be_empty() {
        let text = format!(r#"{{"manifests":[{}]}}"#, blob('a'));
        let children = manifest(media_type::OCI_INDEX, &text).children().unwrap();
        assert!(matches!(&children[..], [Child::Manifest(_)]));
        assert!(manifest(media_type::OCI_INDEX, r#"{"manifests":[]}"#).children().unwrap().is_empty());
    }

    #[test]
    fn unknown_types_are_walked_by_their_fields() {
        let text = format!(r#"{{"blobs":[{}],"subject":{}}}"#, blob('a'), blob('b'));
        assert_eq!(manifest("application/vnd.example+json", &text).children().unwrap().len(), 1);
        let layers = format!(r#"{{"schemaVersion":1,"fsLayers":[{{"blobSum":"sha256:{}"}}]}}"#, "c".repeat(64));
        assert_eq!(manifest(media_type::DOCKER_SCHEMA1_SIGNED, &layers).children().unwrap().len(), 1);
    }

    #[test]
    fn documents_that_can_be_read_in_two_ways_are_refused() {
        let a = blob('a');
        for text in [
            format!(r#"{{"manifests":[{a}],"layers":[{a}]}}"#),
            format!(r#"{{"manifests":[{a}],"config":{a}}}"#),
            format!(r#"{{"layers":[],"layers":[{a}]}}"#),
            format!(r#"{{"mediaType":"{}","layers":[{a}]}}"#, media_type::OCI_INDEX),
            "[]".to_owned(),
            "<html></html>".to_owned(),
            r#"{"layers":{}}"#.to_owned(),
            r#"{"layers":[{"digest":"sha256:x","size":1}]}"#.to_owned(),
            r#"{"layers":[{"size":1}]}"#.to_owned(),
            format!(r#"{{"layers":[{{"digest":"sha256:{}","size":{}}}]}}"#, "a".repeat(64), u64::MAX),
            format!(r#"{{"layers":[["application/x","sha256:{}",3]]}}"#, "a".repeat(64)),
        ] {
            assert!(manifest(media_type::OCI_MANIFEST, &text).children().is_err(), "{text} was accepted");
        }
        assert!(matches!(manifest("text/plain", "{}").children(), Err(ManifestError::Unknown(_))));
    }
}
