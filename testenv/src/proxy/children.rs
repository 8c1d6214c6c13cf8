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
    let mut checks = Vec::new();
    for (kind, digest) in children(&manifest) {
        let url = format!("{upstream}/v2/{repository}/{kind}/{digest}");
        let mut head = client.head(url).header(header::ACCEPT, &accept).header(header::USER_AGENT, USER_AGENT);
        if let Some(authorization) = authorization {
            head = head.header(header::AUTHORIZATION, authorization);
        }
        let child = format!("{kind}/{digest}");
        checks.push(async move {
            match head.send().await {
                // A redirect is to where the blob is.
                Ok(answer) if answer.status().is_success() || answer.status().is_redirection() => None,
                Ok(answer) => Some(format!("{child}: {}", answer.status())),
                Err(error) => Some(format!("{child}: {error}")),
            }
        });
    }
    let lines: Vec<Option<String>> = futures::stream::iter(checks).buffer_unordered(CHECKS_AT_ONCE).collect().await;
    lines.into_iter().flatten().collect()
}

/// What must be there. Not what a manifest may name without its being there: a descriptor with `urls`, and the
/// `subject` (distribution specification, "Pushing manifests with subject").
fn children(manifest: &Value) -> Vec<(&'static str, &str)> {
    let list = |key: &str| manifest[key].as_array().into_iter().flatten();
    let manifests = list("manifests").map(|descriptor| ("manifests", descriptor));
    let blobs = list("layers").chain(list("blobs")).chain([&manifest["config"]]).map(|child| ("blobs", child));
    manifests
        .chain(blobs)
        .filter(|(_, descriptor)| descriptor["urls"].as_array().is_none_or(Vec::is_empty))
        .filter_map(|(kind, descriptor)| Some((kind, descriptor["digest"].as_str()?)))
        .collect()
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
        assert_eq!(children(&manifest), [("blobs", "l"), ("blobs", "e"), ("blobs", "c")]);
        assert_eq!(children(&json!({ "manifests": [{ "digest": "m" }] })), [("manifests", "m")]);
    }
}
