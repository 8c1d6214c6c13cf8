//! Which registry takes which form of manifest. What it takes, it gives back byte by byte.

use serde_json::{Value, json};
use testenv::artifacts::{cosign_tag, fallback_tag};
use testenv::registry::Kind::{self, Crane, Distribution, Distribution2, Olareg};
use testenv::registry::RegistryOptions;
use testenv::{Content, Env, Image, RegistryServer};

use crate::{client, repository};

/// Who refuses a form, and with what in the answer.
type Refused = (&'static [Kind], &'static str);

/// Nobody.
const TAKEN: Refused = (&[], "");

fn forms() -> Vec<(&'static str, Image, Refused)> {
    let seed = fastrand::u64(..);
    let nowhere = Content::new(testenv::images::OCI_MANIFEST, "nowhere");
    let single = Image::single(seed, &[300]);
    let index = Image::multi_arch(seed, &[300], &["linux/amd64", "linux/arm/v7"]);
    let mut gap = index.clone();
    gap.manifests.pop();
    let fields = json!({ "annotations": { "a": "b" } });
    let artifact = Image::artifact(seed, "application/x");
    let old_artifact = Image::artifact_manifest(seed, "application/x");
    let foreign = Image::with_foreign_layer(seed, "https://example.org/layer");
    let unknown_field = single.clone().with_fields(&json!({ "x-unknown": { "a": [1, null] } }));
    vec![
        ("nested index", Image::index_of(&[(&index, json!({})), (&single, fields)]), TAKEN),
        ("empty index", Image::index_of(&[]), TAKEN),
        ("missing child", gap, (&[Distribution, Distribution2, Olareg, Crane], "_UNKNOWN")),
        ("index with a blob", Image::index_with_blob(seed), (&[Distribution], "MANIFEST_BLOB_UNKNOWN")),
        ("index with an artifact", Image::index_of(&[(&artifact, json!({}))]), TAKEN),
        ("attestations", index.with_attestations(seed), TAKEN),
        ("artifact", artifact, TAKEN),
        ("artifact manifest", old_artifact, (&[Distribution, Distribution2, Olareg], "MANIFEST_INVALID")),
        ("missing subject", Image::referrer(&nowhere, seed, "application/x"), TAKEN),
        ("foreign layer", foreign, (&[Distribution, Distribution2], "500 Internal Server Error")),
        ("schema 1", Image::schema_1(seed), (&[Distribution, Distribution2, Olareg], "MANIFEST_INVALID")),
        (
            "sha512",
            Image::sha512(seed, &["linux/amd64", "linux/arm/v7"]),
            (&[Distribution, Distribution2], "DIGEST_INVALID"),
        ),
        ("unknown type", Image::unknown(seed), (&[Distribution, Distribution2, Olareg], "MANIFEST_INVALID")),
        ("unknown field", unknown_field, TAKEN),
        ("white space", single.spaced(), TAKEN),
        ("empty layer", Image::single(seed, &[0]), TAKEN),
    ]
}

async fn server(kind: Kind, extra: Value) -> RegistryServer {
    let options = RegistryOptions { name: format!("forms-{kind:?}"), kind, tls: false, extra, ..Default::default() };
    RegistryServer::start(Env::get(), options).await.unwrap()
}

#[tokio::test]
async fn every_form_is_taken_as_it_is_or_refused() {
    for kind in [Distribution, Distribution2, Olareg, Crane] {
        let server = server(kind, Value::Null).await;
        let client = client(server.registry());
        for (form, image, (refused_by, how)) in forms() {
            let repository = repository("forms");
            let pushed = client.push(&repository, "latest", &image).await;
            if refused_by.contains(&kind) {
                let error = pushed.unwrap_err().to_string();
                assert!(error.contains(how), "{kind:?}, {form}: {error}");
            } else {
                pushed.unwrap_or_else(|error| panic!("{kind:?}, {form}: {error:#}"));
                assert!(client.holds(&repository, "latest", &image).await.unwrap(), "{kind:?}, {form}");
            }
        }
    }
}

#[tokio::test]
async fn distribution_takes_foreign_layers_where_their_url_is_allowed() {
    let extra = json!({ "validation": { "manifests": { "urls": { "allow": ["^https://example\\.org/"] } } } });
    let server = server(Distribution, extra).await;
    let (client, repository) = (client(server.registry()), repository("foreign"));
    let image = Image::with_foreign_layer(1, "https://example.org/layer");
    client.push(&repository, "latest", &image).await.unwrap();
    assert!(client.holds(&repository, "latest", &image).await.unwrap());
}

#[tokio::test]
async fn a_registry_without_the_referrers_api_keeps_referrers_under_tags() {
    let client = client(&Env::get().open);
    let (repository, image) = (repository("referrers"), Image::single(fastrand::u64(..), &[300]));
    client.push(&repository, "latest", &image).await.unwrap();
    let referrers = [1, 2].map(|seed| Image::referrer(&image.root, seed, "application/spdx+json"));
    let tag = fallback_tag(&image.root);
    let index = Image::fallback_index(&[&referrers[0], &referrers[1]]);
    client.push(&repository, &tag, &index).await.unwrap();
    let signature = Image::cosign_signature(&image.root, 3);
    client.push(&repository, &cosign_tag(&image.root, "sig"), &signature).await.unwrap();

    assert!(client.holds(&repository, &tag, &index).await.unwrap());
    assert!(client.holds(&repository, &format!("{tag}.sig"), &signature).await.unwrap());
    assert!(client.holds(&repository, referrers[1].digest(), &referrers[1]).await.unwrap());
    assert_eq!(client.referrers(&repository, image.digest()).await.unwrap(), None);
}

#[tokio::test]
async fn olareg_lists_referrers_whichever_comes_first() {
    let server = server(Olareg, Value::Null).await;
    let (client, repository) = (client(server.registry()), repository("referrers"));
    let image = Image::single(fastrand::u64(..), &[300]);
    let referrers = [1, 2].map(|seed| Image::referrer(&image.root, seed, "application/spdx+json"));
    client.push(&repository, referrers[0].digest(), &referrers[0]).await.unwrap();
    client.push(&repository, "latest", &image).await.unwrap();
    client.push(&repository, referrers[1].digest(), &referrers[1]).await.unwrap();

    let listed = client.referrers(&repository, image.digest()).await.unwrap().unwrap();
    for referrer in &referrers {
        let entry = listed.iter().find(|entry| entry["digest"] == referrer.digest()).unwrap();
        assert_eq!(entry["artifactType"], "application/spdx+json");
        assert!(client.holds(&repository, referrer.digest(), referrer).await.unwrap());
    }
    assert_eq!(listed.len(), 2);
    assert_eq!(client.tags(&repository).await.unwrap(), ["latest"]);
}
