//! What holds of the parsers for any text, found with texts that nobody wrote by hand.

use proptest::{collection::vec, prelude::*, sample::subsequence};
use serde_json::{Value, json};

use super::{Child, Descriptor, Digest, Host, PlatformFilter, RawIndex, RawManifest, Reference, Tag, media_type};

/// A registry as references name it, in upper case too.
const HOST: &str =
    r"([A-Za-z0-9]{1,8}\.){1,3}[a-z]{2,6}|[a-z0-9]{1,8}:[1-9][0-9]{0,3}|localhost|LOCALHOST|\[[0-9a-f:]{2,8}\]";
const REPOSITORY: &str =
    r"[a-z0-9]{1,6}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}){0,3}";
const TAG: &str = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,40}";
const DIGEST: &str = "sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}";

fn manifest(media_type: &str, bytes: &[u8]) -> RawManifest {
    RawManifest { bytes: bytes.to_vec().into(), media_type: media_type.into(), digest: Digest::sha256(bytes) }
}

/// Digests that are all different, each written as JSON names it.
fn digests(most: usize) -> impl Strategy<Value = Vec<String>> {
    (0..=most).prop_map(|count| (0..count).map(|n| Digest::sha256(&n.to_le_bytes()).to_string()).collect())
}

fn descriptor(digest: &str, size: u64, media_type: &str) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": size})
}

fn names(children: &[Child]) -> Vec<String> {
    children.iter().map(|child| child.descriptor().digest.to_string()).collect()
}

/// JSON with every kind of value, three levels deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,6}", inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// One entry of an index, with spaces and a field of its own.
fn index_entry(digest: &str, more: &Value) -> String {
    format!(r#"{{ "x-own" :{more},  "digest": "{digest}","size":7 , "mediaType":"{}"}}"#, media_type::OCI_MANIFEST)
}

proptest! {
    #[test]
    fn a_reference_prints_as_one_that_is_read_to_the_same(
        host in proptest::option::of(HOST),
        repository in REPOSITORY,
        tag in proptest::option::of(TAG),
        digest in proptest::option::of(DIGEST),
    ) {
        // Without a host, a first part with a dot would be one.
        let repository = if host.is_none() { repository.replace('.', "_") } else { repository };
        let host = host.map(|host| format!("{host}/")).unwrap_or_default();
        let written = [host, repository, tag.map(|tag| format!(":{tag}")).unwrap_or_default(),
            digest.map(|digest| format!("@{digest}")).unwrap_or_default()].concat();
        let reference: Reference = written.parse().unwrap();
        prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference), "{}", written);
    }

    /// Also of text that is only nearly a reference.
    #[test]
    fn what_is_read_as_a_reference_is_printed_so_that_it_means_the_same(
        text in r"([aA1]|[./:@_-]|localhost|docker\.io|\[|\]){1,8}",
    ) {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
        }
    }

    #[test]
    fn a_character_outside_the_grammar_is_always_refused(
        (text, bad) in (
            prop_oneof![
                (HOST, REPOSITORY, TAG).prop_map(|(host, repository, tag)| format!("{host}/{repository}:{tag}")),
                (REPOSITORY, DIGEST).prop_map(|(repository, digest)| format!("{repository}@{digest}")),
            ],
            r"[^A-Za-z0-9._/:@\[\]-]",
        ),
        at in any::<prop::sample::Index>(),
    ) {
        let mut text = text;
        text.insert_str(at.index(text.len() + 1), &bad);
        prop_assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
        prop_assert!(text.parse::<Host>().is_err() && text.parse::<Tag>().is_err());
    }

    #[test]
    fn a_digest_is_printed_as_it_was_written(text in DIGEST) {
        let digest: Digest = text.parse().unwrap();
        prop_assert_eq!(digest.to_string(), &text[..]);
        prop_assert_eq!(format!("{}:{}", digest.algorithm(), digest.hex()), text);
    }

    #[test]
    fn a_digest_with_one_character_changed_is_another_or_none(
        text in DIGEST,
        at in any::<prop::sample::Index>(),
        c in any::<char>(),
    ) {
        let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        let at = at.index(text.len());
        let changed = format!("{}{c}{}", &text[..at], &text[at + 1..]);
        match changed.parse::<Digest>() {
            Ok(digest) => prop_assert_eq!(digest.to_string(), changed),
            Err(_) => prop_assert!(at < "sha256:".len() || !is_hex(c), "{changed} was refused"),
        }
    }

    #[test]
    fn a_platform_is_printed_as_it_was_written(text in "[a-z0-9]{1,8}/[a-z0-9]{1,8}(/[a-z0-9]{1,4})?") {
        prop_assert_eq!(text.parse::<PlatformFilter>().unwrap().to_string(), text);
    }

    #[test]
    fn platforms_have_two_or_three_words(text in "[a-zA-B0-9/ .-]{0,12}") {
        let is_word = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        let expected = matches!(text.split('/').count(), 2 | 3) && text.split('/').all(is_word);
        prop_assert_eq!(text.parse::<PlatformFilter>().is_ok(), expected);
    }

    #[test]
    fn an_image_names_its_config_and_layers_each_once_and_in_order(
        digests in digests(8),
        picks in vec(any::<prop::sample::Index>(), 0..12),
        sizes in vec(0..=i64::MAX.cast_unsigned(), 12),
        extra in any_json(),
    ) {
        prop_assume!(!digests.is_empty());
        let layers: Vec<&String> = picks.iter().map(|pick| pick.get(&digests)).collect();
        let listed = layers.iter().zip(&sizes).map(|(digest, size)| descriptor(digest, *size, "application/x"));
        let config = descriptor(&digests[0], 2, "application/y");
        let document = json!({"config": config, "layers": listed.collect::<Vec<_>>(), "annotations": extra});
        let children = manifest(media_type::OCI_MANIFEST, document.to_string().as_bytes()).children().unwrap();
        let mut expected = vec![digests[0].clone()];
        for digest in layers {
            if !expected.contains(digest) {
                expected.push(digest.clone());
            }
        }
        prop_assert_eq!(names(&children), expected);
        prop_assert!(children.iter().all(|child| matches!(child, Child::Blob(_))));
    }

    #[test]
    fn an_index_names_manifests_whatever_their_type(
        digests in digests(8),
        size in any::<u32>(),
        known in any::<bool>(),
    ) {
        let kind = if known { media_type::DOCKER_MANIFEST } else { "application/vnd.example" };
        let listed: Vec<Value> = digests.iter().map(|digest| descriptor(digest, size.into(), kind)).collect();
        let document = json!({"manifests": listed}).to_string();
        let children = manifest(media_type::OCI_INDEX, document.as_bytes()).children().unwrap();
        let manifests = |child: &Child| matches!(child, Child::Manifest(content) if content.size == u64::from(size));
        prop_assert!(children.iter().all(manifests));
        prop_assert_eq!(names(&children), digests);
    }

    /// Nothing but an object with a digest and a size is a descriptor.
    #[test]
    fn other_json_is_no_descriptor(
        value in any_json(),
        field in prop::sample::select(vec!["layers", "manifests", "blobs"]),
    ) {
        let document = json!({field: [value]}).to_string();
        prop_assert!(manifest(media_type::OCI_MANIFEST, document.as_bytes()).children().is_err());
    }

    #[test]
    fn a_key_that_is_named_twice_is_refused_at_any_depth(
        key in ".{1,6}",
        (first, second) in (any_json(), any_json()),
        path in vec(proptest::option::of("[a-z]{1,4}"), 0..6),
    ) {
        let name = Value::from(key);
        let mut inner = format!("{{{name}:{first},{name}:{second}}}");
        for step in path {
            inner = step.map_or_else(|| format!("[0,{inner}]"), |step| format!(r#"{{"{step}":{inner}}}"#));
        }
        let document = format!(r#"{{"layers":[],"annotations":{inner}}}"#);
        let refused = manifest(media_type::OCI_MANIFEST, document.as_bytes()).children().unwrap_err().to_string();
        prop_assert!(refused.contains("duplicate key"), "{}", refused);
    }

    #[test]
    fn bytes_that_are_no_document_are_refused(bytes in vec(any::<u8>(), 0..64)) {
        prop_assume!(!matches!(serde_json::from_slice(&bytes), Ok(Value::Object(_))));
        prop_assert!(manifest(media_type::OCI_MANIFEST, &bytes).children().is_err());
        prop_assert!(RawIndex::parse(&bytes).is_err());
    }

    #[test]
    fn an_index_from_which_nothing_is_taken_is_the_same(
        digests in digests(5),
        extra in vec(any_json(), 5),
        annotations in any_json(),
    ) {
        let entries: Vec<String> = digests.iter().zip(&extra).map(|(digest, more)| index_entry(digest, more)).collect();
        let text = format!(r#"{{"b": {annotations} ,"manifests": [ {} ], "a":[1,  2.50]}}"#, entries.join(" , "));
        let index = RawIndex::parse(text.as_bytes()).unwrap();
        let kept: Vec<&str> = index.manifests.iter().map(|entry| entry.raw.get()).collect();
        prop_assert_eq!(&kept, &entries);
        let written = index.to_manifest(media_type::OCI_INDEX, &Digest::sha256(b"")).unwrap();
        let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        prop_assert_eq!(read(&written.bytes), read(text.as_bytes()));
        prop_assert_eq!(&written.digest, &Digest::sha256(&written.bytes));
        prop_assert_eq!(names(&written.children().unwrap()), digests);
    }

    #[test]
    fn what_is_left_of_an_index_keeps_its_order(
        (all, kept) in digests(6).prop_flat_map(|all| (Just(all.clone()), subsequence(all.clone(), 0..=all.len()))),
    ) {
        let entries: Vec<String> = all.iter().map(|digest| index_entry(digest, &Value::Null)).collect();
        let mut index = RawIndex::parse(format!(r#"{{"manifests":[{}]}}"#, entries.join(",")).as_bytes()).unwrap();
        index.manifests.retain(|entry| kept.contains(&entry.descriptor.digest.to_string()));
        let written = index.to_manifest(media_type::OCI_INDEX, &Digest::sha256(b"")).unwrap();
        prop_assert_eq!(names(&written.children().unwrap()), kept);
    }

    #[test]
    fn a_descriptor_is_written_as_it_was_read(
        size in 0..=i64::MAX.cast_unsigned(),
        digest in DIGEST,
        media_type in ".{0,12}",
    ) {
        let written = descriptor(&digest, size, &media_type);
        let read: Descriptor = serde_json::from_value(written.clone()).unwrap();
        prop_assert_eq!(serde_json::to_value(read).unwrap(), written);
    }
}
