//! Indexes (image-spec, image-index.md) whose text is kept: what is taken over into another index is taken over as it
//! was written, field by field, in its order and with its spaces.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::{RawValue, to_raw_value};

use super::{Descriptor, Digest, Platform, RawManifest, media_type};

/// An index with the text of each of its fields and descriptors.
#[derive(Clone, Debug)]
pub struct RawIndex {
    fields: Fields,
    /// What it lists.
    pub manifests: Vec<RawDescriptor>,
}

/// A descriptor with its text.
#[derive(Clone, Debug)]
pub struct RawDescriptor {
    /// As it was written.
    pub raw: Box<RawValue>,
    /// What it names.
    pub descriptor: Descriptor,
    /// What that runs on.
    pub platform: Option<Platform>,
    /// What kind of artifact it is.
    pub artifact_type: Option<String>,
    /// What is said of it.
    pub annotations: BTreeMap<String, String>,
}

/// The fields of a JSON object in their order.
#[derive(Clone, Debug, Default)]
struct Fields(Vec<(String, Box<RawValue>)>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rest {
    platform: Option<Platform>,
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AttachedManifest {
    subject: Option<Descriptor>,
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    media_type: &'a str,
    digest: &'a Digest,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
}

impl RawIndex {
    /// Reads an index. Whether it can be copied is checked elsewhere
    /// ([`RawManifest::children`](super::RawManifest::children)).
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let fields: Fields = serde_json::from_slice(bytes)?;
        let listed = fields.get("manifests").map(|raw| serde_json::from_str::<Option<Vec<Box<RawValue>>>>(raw.get()));
        let listed = listed.transpose()?.flatten().unwrap_or_default();
        let manifests = listed.into_iter().map(RawDescriptor::parse).collect::<Result<_, _>>()?;
        Ok(Self { fields, manifests })
    }

    /// An index of OCI's type that lists nothing.
    #[must_use]
    pub fn empty() -> Self {
        let field = |name: &str, text: &str| (name.to_owned(), RawValue::from_string(text.to_owned()));
        let fields = [
            field("schemaVersion", "2"),
            field("mediaType", &format!("\"{}\"", media_type::OCI_INDEX)),
            field("manifests", "[]"),
        ];
        let fields = fields.into_iter().filter_map(|(name, raw)| Some((name, raw.ok()?)));
        Self { fields: Fields(fields.collect()), manifests: Vec::new() }
    }

    /// The index as a manifest of this type, with the digest that its text then has.
    pub fn to_manifest(&self, media_type: &str, like: &Digest) -> Result<RawManifest, serde_json::Error> {
        let listed = to_raw_value(&self.manifests.iter().map(|entry| &entry.raw).collect::<Vec<_>>())?;
        let mut fields = self.fields.clone();
        fields.set("manifests", listed);
        let bytes = serde_json::to_vec(&fields)?;
        let digest = Digest::of(like.algorithm(), &bytes);
        Ok(RawManifest { bytes: bytes.into(), media_type: media_type.to_owned(), digest })
    }
}

impl RawDescriptor {
    /// What a manifest with a subject is attached to, and how it is listed there (distribution-spec, "Listing referrers":
    /// its type and its annotations are repeated). `None` if it has no subject.
    pub fn of_attached(manifest: &RawManifest) -> Result<Option<(Digest, Self)>, serde_json::Error> {
        let attached: AttachedManifest = serde_json::from_slice(&manifest.bytes)?;
        let Some(subject) = attached.subject else { return Ok(None) };
        let artifact_type = attached.artifact_type.or(attached.config.map(|config| config.media_type));
        let entry = Entry {
            media_type: &manifest.media_type,
            digest: &manifest.digest,
            size: manifest.bytes.len(),
            artifact_type: artifact_type.filter(|found| !found.is_empty()),
            annotations: attached.annotations,
        };
        Ok(Some((subject.digest, Self::parse(to_raw_value(&entry)?)?)))
    }

    /// Reads a descriptor.
    pub fn parse(raw: Box<RawValue>) -> Result<Self, serde_json::Error> {
        let descriptor = serde_json::from_str(raw.get())?;
        let rest: Rest = serde_json::from_str(raw.get())?;
        Ok(Self {
            raw,
            descriptor,
            platform: rest.platform,
            artifact_type: rest.artifact_type,
            annotations: rest.annotations.unwrap_or_default(),
        })
    }

    /// The same descriptor of other content of the same kind.
    pub fn naming(&self, content: &RawManifest) -> Result<Self, serde_json::Error> {
        let mut fields: Fields = serde_json::from_str(self.raw.get())?;
        fields.set("digest", to_raw_value(&content.digest)?);
        fields.set("size", to_raw_value(&content.bytes.len())?);
        Self::parse(to_raw_value(&fields)?)
    }
}

impl Fields {
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, raw)| raw.as_ref())
    }

    fn set(&mut self, name: &str, value: Box<RawValue>) {
        match self.0.iter_mut().find(|(field, _)| field == name) {
            Some((_, raw)) => *raw = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, raw) in &self.0 {
            map.serialize_entry(name, raw)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Fields, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = access.next_entry()? {
            fields.push(entry);
        }
        Ok(Fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(letter: char, more: &str) -> String {
        let digest = letter.to_string().repeat(64);
        format!(r#"{{ "size": 3,"digest":"sha256:{digest}", "mediaType":"application/x"{more}}}"#)
    }

    #[test]
    fn what_is_kept_keeps_its_text_and_its_place() {
        let (a, b) = (entry('a', r#", "x": {"b":1, "a":2}"#), entry('b', ""));
        let text = format!(r#"{{"z": [1,  2], "manifests":[{a}, {b}],"annotations":{{"k":"v"}}}}"#);
        let mut index = RawIndex::parse(text.as_bytes()).unwrap();
        index.manifests.pop();
        let manifest = index.to_manifest("application/x", &Digest::sha256(b"")).unwrap();
        let expected = format!(r#"{{"z":[1,  2],"manifests":[{a}],"annotations":{{"k":"v"}}}}"#);
        assert_eq!(manifest.bytes, expected.as_bytes());
        assert_eq!(manifest.digest, Digest::sha256(expected.as_bytes()));
    }

    #[test]
    fn a_descriptor_names_other_content_and_keeps_the_rest() {
        let raw = RawValue::from_string(entry('a', r#","platform":{"os":"linux","architecture":"arm64"}"#)).unwrap();
        let content = RawManifest { bytes: "{}".into(), media_type: String::new(), digest: Digest::sha256(b"{}") };
        let other = RawDescriptor::parse(raw).unwrap().naming(&content).unwrap();
        assert_eq!((&other.descriptor.digest, other.descriptor.size), (&content.digest, 2));
        assert_eq!(other.platform.unwrap().architecture, "arm64");
        assert!(other.raw.get().starts_with(r#"{"size":2,"digest":"#), "{}", other.raw);
    }

    #[test]
    fn what_has_a_subject_is_listed_with_its_type_and_its_annotations() {
        let text = format!(
            r#"{{"subject":{},"config":{},"annotations":{{"k":"v"}}}}"#,
            entry('a', ""),
            entry('b', "").replace("application/x", "application/y")
        );
        let manifest = RawManifest {
            bytes: text.clone().into(),
            media_type: media_type::OCI_MANIFEST.into(),
            digest: Digest::sha256(text.as_bytes()),
        };
        let (subject, listed) = RawDescriptor::of_attached(&manifest).unwrap().unwrap();
        assert_eq!(subject.hex(), "a".repeat(64));
        assert_eq!(listed.artifact_type.as_deref(), Some("application/y"));
        assert_eq!((listed.descriptor.size, &listed.annotations["k"][..]), (text.len() as u64, "v"));
        let plain = RawManifest { bytes: "{}".into(), ..manifest };
        assert!(RawDescriptor::of_attached(&plain).unwrap().is_none());
    }

    #[test]
    fn an_empty_index_is_one_that_can_be_copied() {
        let manifest = RawIndex::empty().to_manifest(media_type::OCI_INDEX, &Digest::sha256(b"")).unwrap();
        assert!(manifest.children().unwrap().is_empty());
    }
}
