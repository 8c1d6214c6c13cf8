//! A manifest that can be copied names each content once, all of it standing in the document; an index that is read
//! is written as the same document.

#![no_main]

use std::collections::HashSet;

use imagemirror::oci::{Digest, RawIndex, RawManifest, media_type};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    for media_type in [media_type::OCI_MANIFEST, media_type::OCI_INDEX, media_type::DOCKER_SCHEMA1, "text/plain"] {
        let manifest = RawManifest {
            bytes: bytes.to_vec().into(),
            media_type: media_type.to_owned(),
            digest: Digest::sha256(b""),
        };
        let Ok(children) = manifest.children() else { continue };
        let document: Value = serde_json::from_slice(bytes).expect("what has children is JSON");
        assert!(document.is_object());
        let mut named = HashSet::new();
        strings(&document, &mut named);
        let digests: Vec<String> = children.iter().map(|child| child.descriptor().digest.to_string()).collect();
        assert!(digests.iter().all(|digest| named.contains(digest.as_str())));
        assert_eq!(digests.iter().collect::<HashSet<_>>().len(), digests.len(), "one is named twice");
        same_index(bytes, &document);
    }
});

/// All strings of a document.
fn strings<'a>(value: &'a Value, found: &mut HashSet<&'a str>) {
    match value {
        Value::String(text) => drop(found.insert(text)),
        Value::Array(items) => items.iter().for_each(|item| strings(item, found)),
        Value::Object(fields) => fields.values().for_each(|item| strings(item, found)),
        _ => {}
    }
}

fn same_index(bytes: &[u8], document: &Value) {
    let Ok(index) = RawIndex::parse(bytes) else { return };
    let written = index.to_manifest(media_type::OCI_INDEX, &Digest::sha256(b"")).expect("what was read can be written");
    let mut read: Value = serde_json::from_slice(&written.bytes).expect("what was written is JSON");
    // An index without a list, or with null in its place, is written with an empty one.
    if document.get("manifests").is_none_or(Value::is_null) {
        assert_eq!(read["manifests"].as_array().map(Vec::len), Some(0));
        read["manifests"] = Value::Null;
    }
    let mut document = document.clone();
    document.as_object_mut().map(|fields| fields.entry("manifests").or_insert(Value::Null));
    assert_eq!(read, document);
}
