//! The invariant "never half an image": when a manifest is put, everything it names is at the target already. Checked
//! for every manifest that goes through, whatever the test is about.

use futures::StreamExt;
use http::{HeaderValue, header};
use serde_json::Value;

use crate::images::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};

/// In the upstream's access log, so that tests can leave these requests out of a count.
pub const USER_AGENT: &str = "testenv-children-check";
const CHECKS_AT_ONCE: usize = 8;

/// One line for each child of `manifest` that the upstream does not have, or says nothing about.
pub(super) async fn missing(
    client: &reqwest::Client,
    upstream: &str,
    repository: &str,
    manifest: &[u8],
    authorization: Option<&HeaderValue>,
) -> Vec<String> {
    let Ok(manifest) = serde_json::from_slice::<Value>(manifest) else {
        return vec!["the manifest is not JSON".to_owned()];
    };
    let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
    let head = async |kind: &str, digest: String| {
        let child = format!("{kind}/{digest}");
        let mut head = client.head(format!("{upstream}/v2/{repository}/{child}"));
        head = head.header(header::ACCEPT, &accept).header(header::USER_AGENT, USER_AGENT);
        if let Some(authorization) = authorization {
            head = head.header(header::AUTHORIZATION, authorization);
        }
        match head.send().await {
            // A redirect is to where the blob is.
            Ok(answer) if answer.status().is_success() || answer.status().is_redirection() => None,
            Ok(answer) => Some(format!("{child}: {}", answer.status())),
            Err(error) => Some(format!("{child}: {error}")),
        }
    };
    let mut checks = Vec::new();
    for (kinds, digest) in children(&manifest) {
        let (head, digest) = (&head, digest.to_owned());
        checks.push(async move {
            let mut missing = None;
            for kind in kinds {
                missing = Some(head(kind, digest.clone()).await?);
            }
            missing
        });
    }
    let lines: Vec<Option<String>> = futures::stream::iter(checks).buffer_unordered(CHECKS_AT_ONCE).collect().await;
    lines.into_iter().flatten().collect()
}

const BLOB: &[&str] = &["blobs"];
const MANIFEST: &[&str] = &["manifests"];
/// An index may list something of a type that nobody knows, a blob even.
const EITHER: &[&str] = &["manifests", "blobs"];

/// What must be there, with the endpoints at one of which it must be. Not what a manifest may name without its being
/// there: a descriptor with `urls`, and the `subject` (distribution specification, "Pushing manifests with subject").
fn children(manifest: &Value) -> Vec<(&'static [&'static str], &str)> {
    let list = |key: &str| manifest[key].as_array().into_iter().flatten();
    let manifests = list("manifests").map(|descriptor| match descriptor["mediaType"].as_str() {
        Some(OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST) => (MANIFEST, descriptor),
        _ => (EITHER, descriptor),
    });
    let blobs = list("layers").chain(list("blobs")).chain([&manifest["config"]]).map(|child| (BLOB, child));
    let named = manifests
        .chain(blobs)
        .filter(|(_, descriptor)| descriptor["urls"].as_array().is_none_or(Vec::is_empty))
        .filter_map(|(kinds, descriptor)| Some((kinds, descriptor["digest"].as_str()?)));
    // Schema 1.
    let fs_layers = list("fsLayers").filter_map(|layer| Some((BLOB, layer["blobSum"].as_str()?)));
    named.chain(fs_layers).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn children_are_all_but_foreign_layers_and_the_subject() {
        let manifest = json!({
            "config": { "digest": "c" },
            "layers": [{ "digest": "l" }, { "digest": "f", "urls": ["https://example.org/f"] }, { "digest": "e", "urls": [] }],
            "subject": { "digest": "s" },
        });
        assert_eq!(children(&manifest), [(BLOB, "l"), (BLOB, "e"), (BLOB, "c")]);
        let index = json!({ "manifests": [{ "digest": "m", "mediaType": OCI_MANIFEST }, { "digest": "u" }] });
        assert_eq!(children(&index), [(MANIFEST, "m"), (EITHER, "u")]);
        assert_eq!(children(&json!({ "fsLayers": [{ "blobSum": "b" }] })), [(BLOB, "b")]);
    }
}
