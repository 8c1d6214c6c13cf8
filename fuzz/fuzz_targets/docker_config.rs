//! A Docker configuration that is read or refused repeats none of its secrets. The secret is a word to look for.

#![no_main]

use imagemirror::auth::CredentialStore;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const SECRET: &str = "hunter2";

fuzz_target!(|bytes: &[u8]| {
    let (Ok(host), Ok(repository)) = ("gcr.io:5000".parse(), "team/app".parse()) else { return };
    let document: Option<Value> = serde_json::from_slice(bytes).ok();
    for read in [CredentialStore::from_docker_config_json, CredentialStore::from_docker_cfg] {
        let store = read(bytes, "x");
        let printed = match &store {
            Ok(store) => format!("{store:?} {:?}", store.matching(&host, &repository)),
            Err(error) => format!("{error} {error:?}"),
        };
        // What is ignored is not checked, so that a document may be read that is no JSON in the end.
        let is_public = document.as_ref().is_none_or(|document| may_be_printed(document, store.is_ok()));
        assert!(!printed.contains(SECRET) || is_public, "{printed}");
    }
});

/// Whether the word stands where it is no secret: in a key or a user name. Of a configuration that is read, `auth` is
/// one too: it holds the user name, in base64.
fn may_be_printed(value: &Value, is_read: bool) -> bool {
    match value {
        Value::String(text) => text.contains(SECRET),
        Value::Array(items) => items.iter().any(|item| may_be_printed(item, is_read)),
        Value::Object(fields) => fields.iter().any(|(key, value)| match key.as_str() {
            "password" if value.is_string() => false,
            "auth" if value.is_string() => is_read,
            other => other.contains(SECRET) || may_be_printed(value, is_read),
        }),
        _ => false,
    }
}
