//! The main job: an `ImageMirror` is applied, three images arrive, and `kubectl get` says so.

use anyhow::{Result, ensure};
use oci_client::{Reference, client::ClientConfig, secrets::RegistryAuth};
use serde_json::json;
use testenv::images::Image;

use crate::support::{Place, condition, message};

const PLATFORMS: [&str; 2] = ["linux/amd64", "linux/arm64"];

#[tokio::test]
async fn three_images_arrive_and_kubectl_says_so() -> Result<()> {
    let place = Place::new("main-job").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let images = [
        ("agent", Image::multi_arch(1, &[3_000_000, 200_000, 10], &PLATFORMS)),
        ("cluster-agent", Image::docker(2, &[1_500_000, 1], &PLATFORMS)),
        ("operator", Image::single(3, &[1_048_577, 1_048_576])),
    ];
    for (name, image) in &images {
        place.push(source, name, "7.70.0", image).await?;
    }
    let _operator = place.operator()?;
    let spec = place.spec(source, target, &images.each_ref().map(|(name, _)| (*name, &["7.70.0"][..])));
    place.apply("datadog", &spec).await?;

    let mirror = place.until_ready("datadog").await?;
    let status = mirror.status.clone().unwrap_or_default();
    ensure!(condition(&status, "TargetInSync") == ("True", "Succeeded"));
    ensure!(condition(&status, "CredentialsResolved") == ("True", "Succeeded"));
    ensure!(condition(&status, "Reconciling") == ("", ""), "Reconciling is there only while it is true");
    ensure!(Some(status.observed_generation) == mirror.metadata.generation);
    ensure!(status.synced.as_deref() == Some("3/3") && status.images.len() == 3 && status.progress.is_none());
    for (name, image) in &images {
        ensure!(place.holds(target, name, "7.70.0", image).await?, "{name} is not whole at the target");
        ensure!(pulled_by_another_client(&place, name).await? == image.digest());
        let found = status.images.iter().find(|status| status.source.ends_with(&format!("/{name}")));
        let digest = found.and_then(|status| status.digest.as_ref()).map(ToString::to_string);
        ensure!(digest.as_deref() == Some(image.digest()), "the status names another digest for {name}");
    }

    let table = place.kubectl(&["get", "imagemirror"])?;
    let (header, row) = table.split_once('\n').unwrap_or_default();
    for column in ["NAME", "READY", "SYNCED", "FAILED", "TARGET", "LAST SYNC", "AGE"] {
        ensure!(header.contains(column), "no column {column} in {header}");
    }
    for value in ["datadog", "True", "3/3", target.host.as_str()] {
        ensure!(row.contains(value), "no {value} in {row}");
    }
    place.kubectl(&["wait", "--for=condition=Ready", "imir/datadog", "--timeout=5s"])?;
    let events = place.kubectl(&["get", "events.events.k8s.io", "-o", "jsonpath={.items[*].reason}"])?;
    ensure!(events.split(' ').filter(|reason| *reason == "Synced").count() == 1, "the events are {events}");
    ensure!(mirror.metadata.finalizers.is_none(), "nothing at the target is ever deleted: no finalizer");
    Ok(())
}

/// Pulls the manifest with another implementation, and returns the digest that it computes.
async fn pulled_by_another_client(place: &Place, name: &str) -> Result<String> {
    let target = &place.env.target;
    let certificate = oci_client::client::Certificate {
        encoding: oci_client::client::CertificateEncoding::Pem,
        data: place.env.ca_pem.clone().into_bytes(),
    };
    let config = ClientConfig { extra_root_certificates: vec![certificate], ..ClientConfig::default() };
    let client = oci_client::Client::try_from(config)?;
    let reference = Reference::with_tag(target.host.clone(), place.repository(name), "7.70.0".into());
    let (user, password) = (target.username.clone().unwrap_or_default(), target.password.clone().unwrap_or_default());
    let auth = RegistryAuth::Basic(user, password);
    let accepted = [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ];
    let (_, digest) = client.pull_manifest_raw(&reference, &auth, &accepted).await?;
    Ok(digest)
}

#[tokio::test]
async fn a_moved_source_tag_comes_over_and_a_deleted_target_tag_comes_back_when_asked() -> Result<()> {
    let place = Place::new("request").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let (old, new) = (Image::multi_arch(11, &[50_000], &PLATFORMS), Image::multi_arch(12, &[60_000], &PLATFORMS));
    place.push(source, "agent", "latest", &old).await?;
    let _operator = place.operator()?;
    place.apply("m", &place.spec(source, target, &[("agent", &["latest"])])).await?;
    place.until_ready("m").await?;

    place.push(source, "agent", "latest", &new).await?;
    let mirror = place.request("m").await?;
    ensure!(place.holds(target, "agent", "latest", &new).await?);
    let status = mirror.status.unwrap_or_default();
    ensure!(condition(&status, "Ready") == ("True", "Succeeded"), "{}", message(&status, "Ready"));

    testenv::Client::new(place.env, target)?.delete(&place.repository("agent"), "latest").await?;
    ensure!(place.digest_of(target, "agent", "latest").await?.is_none());
    place.request("m").await?;
    ensure!(place.holds(target, "agent", "latest", &new).await?);
    let events = place.kubectl(&["get", "events.events.k8s.io", "-o", "jsonpath={.items[*].reason}"])?;
    ensure!(events.contains("DriftRestored"), "the events are {events}");
    Ok(())
}

#[tokio::test]
async fn a_pinned_digest_is_copied_under_the_tags_that_are_named() -> Result<()> {
    let place = Place::new("pinned").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let (pinned, moved) = (Image::single(21, &[1000]), Image::single(22, &[1000]));
    place.push(source, "agent", "1", &pinned).await?;
    place.push(source, "agent", "1", &moved).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(source, target, &[]);
    let repository = format!("{}/{}", source.host, place.repository("agent"));
    spec["images"] = json!([
        {"source": format!("{repository}@{}", pinned.digest()), "targetTags": ["a", "b"]},
        {"source": format!("{repository}:1@{}", pinned.digest()), "targetRepository": format!("{}/kept", place.prefix)},
        {"source": format!("{repository}:1"), "targetTags": ["moved"]},
    ]);
    place.apply("m", &spec).await?;
    place.until_ready("m").await?;
    for (name, tag, image) in
        [("agent", "a", &pinned), ("agent", "b", &pinned), ("kept", "1", &pinned), ("agent", "moved", &moved)]
    {
        ensure!(place.holds(target, name, tag, image).await?, "{name}:{tag} is not what was pinned");
    }
    Ok(())
}

#[tokio::test]
async fn pull_secrets_of_a_service_account_and_basic_auth_are_used() -> Result<()> {
    let place = Place::new("account").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let image = Image::single(171, &[1000]);
    place.push(source, "agent", "1", &image).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([]);
    spec["serviceAccountName"] = json!("puller");
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "SecretNotFound").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("ServiceAccount \"puller\" does not exist"), "{status:?}");

    let user = source.username.clone().unwrap_or_default();
    let password = source.password.clone().unwrap_or_default();
    let literals = [format!("--from-literal=username={user}"), format!("--from-literal=password={password}")];
    let create =
        ["create", "secret", "generic", "basic", "--type=kubernetes.io/basic-auth", &literals[0], &literals[1]];
    place.kubectl(&create)?;
    let registry = format!("imagemirror.dev/registry={}/{}", source.host, place.prefix);
    place.kubectl(&["annotate", "secret", "basic", &registry])?;
    place.kubectl(&["create", "serviceaccount", "puller"])?;
    place.kubectl(&["patch", "serviceaccount", "puller", "-p", r#"{"imagePullSecrets": [{"name": "basic"}]}"#])?;
    place.until_ready("m").await?;
    ensure!(place.holds(target, "agent", "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn plain_http_is_spoken_only_where_it_is_asked_for() -> Result<()> {
    let place = Place::new("plain").await?;
    let (source, open) = (&place.env.source, &place.env.open);
    let image = Image::single(181, &[1000]);
    place.push(source, "agent", "1", &image).await?;
    let _operator = place.operator()?;
    let plain = place.spec(source, open, &[("agent", &["1"])]);
    let mut tls = plain.clone();
    tls["registries"] = json!([plain["registries"][0]]);
    let mut plain = plain;
    for spec in [&mut tls, &mut plain] {
        // The open registry wants no credential, and the pull secret has none for it.
        if let Some(target) = spec["target"].as_object_mut() {
            target.remove("secretRef");
        }
    }
    place.apply("m", &tls).await?;
    place.until("m", "a failure", |status| !status.failures.is_empty()).await?;
    ensure!(place.digest_of(open, "agent", "1").await?.is_none(), "it fell back to plain HTTP");
    place.apply("m", &plain).await?;
    place.until_ready("m").await?;
    ensure!(place.holds(open, "agent", "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn a_run_that_takes_too_long_is_ended_and_said_to_have_been() -> Result<()> {
    let place = Place::new("timeout").await?;
    let image = Image::single(191, &[3_000_000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let slow = testenv::Proxy::to(place.env, &place.env.source).bytes_per_second_down(300_000).start().await?;
    place.pull_secret("pull", &[slow.registry()]).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(slow.registry(), &place.env.target, &[("agent", &["1"])]);
    spec["timeout"] = json!("1s");
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "Timeout").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("spec.timeout (1s)"), "{}", message(&status, "Ready"));
    spec["timeout"] = json!("10m");
    place.apply("m", &spec).await?;
    place.until_ready("m").await?;
    Ok(())
}
