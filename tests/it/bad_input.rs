//! What bad input gets: the exact condition and reason, a message that names the field or the registry and what to do;
//! other images go on; putting it right heals it without a restart.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testenv::{
    images::Image,
    proxy::{Action, Matcher, Proxy},
};

use crate::support::{Place, condition, message, run};

/// An image at the source, and an operator.
async fn prepared(test: &str) -> Result<(Place, crate::support::Operator, Image)> {
    let place = Place::new(test).await?;
    let image = Image::single(7, &[10_000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let operator = place.operator()?;
    Ok((place, operator, image))
}

/// Waits for Ready=False with this reason, and checks what the message says.
async fn refused(place: &Place, reason: &'static str, parts: &[&str]) -> Result<()> {
    let mirror = place.until_reason("m", reason).await?;
    let status = mirror.status.unwrap_or_default();
    let said = message(&status, "Ready");
    for part in parts {
        ensure!(said.contains(part), "the message does not say {part:?}: {said}");
    }
    ensure!(condition(&status, "Reconciling") == ("True", "ProgressingWithRetry"));
    ensure!(condition(&status, "Stalled") == ("", ""));
    ensure!(status.failures.first().is_some_and(|failure| failure.reason.as_str() == reason));
    Ok(())
}

async fn healed(place: &Place, image: &Image) -> Result<()> {
    place.until_ready("m").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", image).await?);
    Ok(())
}

fn spec(place: &Place) -> Value {
    place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])
}

#[tokio::test]
async fn a_missing_secret_is_named_and_noticed_when_it_is_created() -> Result<()> {
    let (place, _operator, image) = prepared("no-secret").await?;
    let mut spec = spec(&place);
    spec["imagePullSecrets"] = json!([{"name": "later"}]);
    place.apply("m", &spec).await?;
    refused(&place, "SecretNotFound", &["Secret \"later\" does not exist", "create it"]).await?;
    let status = place.mirrors().get("m").await?.status.unwrap_or_default();
    ensure!(condition(&status, "CredentialsResolved") == ("False", "SecretNotFound"));
    place.pull_secret("later", &[&place.env.source]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_missing_target_secret_stops_all_images_without_a_request() -> Result<()> {
    let (place, _operator, image) = prepared("no-target").await?;
    let proxy = Proxy::to(place.env, &place.env.target).start().await?;
    let mut spec = place.spec(&place.env.source, proxy.registry(), &[("agent", &["1"])]);
    spec["target"]["secretRef"]["name"] = json!("later");
    place.apply("m", &spec).await?;
    refused(&place, "SecretNotFound", &["Secret \"later\" does not exist"]).await?;
    ensure!(proxy.requests().is_empty(), "the target was asked without its credential");
    place.pull_secret("later", &[proxy.registry()]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_secret_of_the_wrong_type_is_refused_with_a_word_on_how_to_make_one() -> Result<()> {
    let (place, _operator, image) = prepared("wrong-type").await?;
    place.secret("pull", "Opaque", &[("password", "hunter2")]).await?;
    place.apply("m", &spec(&place)).await?;
    refused(
        &place,
        "SecretInvalid",
        &["Secret \"pull\"", "its type is Opaque", "kubectl create secret docker-registry"],
    )
    .await?;
    place.pull_secret("pull", &[&place.env.source]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_secret_without_credentials_is_refused_without_its_content() -> Result<()> {
    let (place, _operator, image) = prepared("bad-json").await?;
    // The API server checks that it is JSON; what is in it, it does not look at.
    let config = r#"{"auths": {"127.0.0.1": {"auth": "hunter2hunter2"}}}"#;
    place.secret("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", config)]).await?;
    place.apply("m", &spec(&place)).await?;
    refused(&place, "SecretInvalid", &["Secret \"pull\"", "is not base64 of user:password"]).await?;
    let status = serde_json::to_string(&place.mirrors().get("m").await?)?;
    ensure!(!status.contains("hunter2"), "the content of the Secret is in the object");
    place.pull_secret("pull", &[&place.env.source]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_wrong_password_names_the_registry_and_the_secret() -> Result<()> {
    let (place, _operator, image) = prepared("password").await?;
    let source = &place.env.source;
    let wrong = source.with_credentials("puller", "wrong");
    place.pull_secret("pull", &[&wrong]).await?;
    place.apply("m", &spec(&place)).await?;
    refused(&place, "AuthenticationFailed", &[&source.host, "401", "Secret \"pull\"", "check the entry"]).await?;
    let status = place.mirrors().get("m").await?.status.unwrap_or_default();
    ensure!(condition(&status, "CredentialsResolved") == ("True", "Succeeded"), "the Secret exists and parses");
    place.pull_secret("pull", &[source]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_wrong_password_for_the_target_is_told_apart_from_one_for_the_source() -> Result<()> {
    let (place, _operator, image) = prepared("push-pw").await?;
    let target = &place.env.target;
    place.pull_secret("push", &[&target.with_credentials("push", "wrong")]).await?;
    place.apply("m", &spec(&place)).await?;
    refused(&place, "AuthenticationFailed", &["401", "Secret \"push\"", "spec.target.secretRef"]).await?;
    place.pull_secret("push", &[target]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_login_without_the_right_to_push_says_which_right_is_missing() -> Result<()> {
    let (place, _operator, image) = prepared("no-push").await?;
    let target = &place.env.target;
    let user = place.env.token.user("pull").map(|user| target.with_credentials(&user.name, &user.password));
    let user = user.unwrap_or_else(|| target.anonymous());
    place.pull_secret("push", &[&user]).await?;
    place.apply("m", &spec(&place)).await?;
    let scope = format!("did not grant repository:{}:pull,push", place.repository("agent"));
    refused(&place, "AuthenticationFailed", &[&target.host, &scope]).await?;
    place.pull_secret("push", &[target]).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn an_unknown_ca_is_not_trusted_until_it_is_named() -> Result<()> {
    let (place, _operator, image) = prepared("unknown-ca").await?;
    let good = spec(&place);
    let mut without = good.clone();
    without["registries"] = json!([]);
    place.apply("m", &without).await?;
    refused(&place, "CertificateInvalid", &[&place.env.target.host, "certSecretRef", "ca.crt"]).await?;
    place.apply("m", &good).await?;
    healed(&place, &image).await
}

#[tokio::test]
async fn a_registry_that_refuses_connections_is_tried_again_until_it_is_there() -> Result<()> {
    let (place, _operator, image) = prepared("refused").await?;
    let forwarder = testenv::Forwarder::to(&place.env.source.host).start().await?;
    let host = forwarder.host();
    drop(forwarder);
    let source = place.env.source.at(&host);
    place.pull_secret("pull", &[&source]).await?;
    place.apply("m", &place.spec(&source, &place.env.target, &[("agent", &["1"])])).await?;
    refused(&place, "SourceUnavailable", &[&host, "no connection", "that the registry is up"]).await?;
    // Heals by the retry of transient failures alone.
    let _listening = forward_at(&host, &place.env.source.host).await?;
    healed(&place, &image).await
}

/// Forwards one address to another, for as long as the handle lives.
async fn forward_at(listen: &str, to: &str) -> Result<tokio_util::task::AbortOnDropHandle<()>> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    let to = to.to_owned();
    Ok(tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut incoming, _)) = listener.accept().await {
            let to = to.clone();
            tokio::spawn(async move {
                if let Ok(mut outgoing) = tokio::net::TcpStream::connect(to).await {
                    // Either side may hang up: that is for the client to see.
                    let _ = tokio::io::copy_bidirectional(&mut incoming, &mut outgoing).await;
                }
            });
        }
    })))
}

#[tokio::test]
async fn a_tag_that_does_not_exist_does_not_stop_the_others() -> Result<()> {
    let (place, _operator, image) = prepared("no-tag").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    place.apply("m", &place.spec(source, target, &[("agent", &["1", "2"])])).await?;
    let mirror = place.until_reason("m", "PartialFailure").await?;
    let status = mirror.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.starts_with("1 of 2 images failed: ") && said.contains("agent:2 (SourceNotFound"), "{said}");
    ensure!(said.contains("spec.images"), "{said}");
    ensure!(status.synced.as_deref() == Some("1/2"));
    ensure!(place.holds(target, "agent", "1", &image).await?, "the other tag is not there");
    place.push(source, "agent", "2", &image).await?;
    place.request("m").await?;
    place.until_ready("m").await?;
    Ok(())
}

#[tokio::test]
async fn a_forbidden_repository_is_permission_denied_and_other_objects_go_on() -> Result<()> {
    let (place, _operator, image) = prepared("forbidden").await?;
    let proxy = Proxy::to(place.env, &place.env.source).start().await?;
    let denied = r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#;
    proxy.rule(Matcher::new().repository(&place.repository("secret")), Action::respond(403).body(denied));
    place.push(&place.env.source, "secret", "1", &image).await?;
    place.pull_secret("pull", &[proxy.registry(), &place.env.source]).await?;
    place.apply("m", &place.spec(proxy.registry(), &place.env.target, &[("secret", &["1"])])).await?;
    place.apply("other", &spec(&place)).await?;
    refused(&place, "PermissionDenied", &[&proxy.host(), "403 DENIED", "Secret \"pull\"", "the right to pull"]).await?;
    place.until_ready("other").await?;
    proxy.clear();
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(place.holds(&place.env.target, "secret", "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn an_invalid_spec_is_refused_by_the_api_server_with_a_word_on_what_to_write() -> Result<()> {
    let place = Place::new("invalid").await?;
    let digest = format!("sha256:{}", "a".repeat(64));
    let image = |image: Value| json!({"target": {"registry": "t.example"}, "images": [image]});
    let with = |field: &str, value: Value| {
        let mut spec = image(json!({"source": "gcr.io/a:1"}));
        spec[field] = value;
        spec
    };
    for (spec, expected) in [
        (json!({"target": {"registry": "t.example"}, "images": []}), "spec.images"),
        (json!({"images": [{"source": "gcr.io/a:1"}]}), "spec.target: Required value"),
        (image(json!({"source": "gcr.io/a"})), "name what to mirror: add a tag to source"),
        (image(json!({"source": "gcr.io/a:1", "tags": ["2"]})), "write tags either in source or in tags"),
        (image(json!({"source": format!("gcr.io/a@{digest}"), "tags": ["2"]})), "remove tags"),
        (image(json!({"source": format!("gcr.io/a@{digest}")})), "write targetTags"),
        (
            image(json!({"source": "gcr.io/a", "tags": ["1", "2"], "targetTags": ["x"]})),
            "targetTags is for a source with one tag",
        ),
        (image(json!({"source": "https://gcr.io/a:1"})), "spec.images[0].source"),
        (image(json!({"source": "gcr.io/a", "tags": ["-x"]})), "spec.images[0].tags[0]"),
        (image(json!({"source": "gcr.io/a", "tags": ["x", "x"]})), "spec.images[0].tags[1]: Duplicate value"),
        (image(json!({"source": "gcr.io/a:1", "targetRepository": "{nme}"})), "spec.images[0].targetRepository"),
        (with("target", json!({"registry": "https://t.example"})), "spec.target.registry"),
        (with("interval", json!("10s")), "interval must be at least 30s"),
        (with("interval", json!("soon")), "spec.interval"),
        (with("timeout", json!("0s")), "timeout must be longer than 0s"),
        (with("imagePullSecrets", json!([{"name": "A b"}])), "spec.imagePullSecrets[0].name"),
        (with("registries", json!([{"host": "a"}, {"host": "a"}])), "spec.registries[1]: Duplicate value"),
        (with("platforms", json!(["linux/amd64"])), "unknown field \"spec.platforms\""),
    ] {
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
            "metadata": {"name": "m", "namespace": place.namespace}, "spec": spec,
        });
        let mut create = Command::new(place.env.tools.join("kubectl"));
        create.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["create", "--validate=strict", "-f", "-"]);
        let error = run(&mut create, Some(&object.to_string())).err().map(|error| format!("{error:#}"));
        ensure!(error.as_ref().is_some_and(|error| error.contains(expected)), "{spec} got {error:?}, not {expected:?}");
    }
    let long = json!({
        "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
        "metadata": {"name": "m".repeat(53), "namespace": place.namespace}, "spec": image(json!({"source": "gcr.io/a:1"})),
    });
    let mut create = Command::new(place.env.tools.join("kubectl"));
    create.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["create", "-f", "-"]);
    let error = run(&mut create, Some(&long.to_string())).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains("metadata.name must be at most 52 characters"), "{error}");
    Ok(())
}

#[tokio::test]
async fn what_the_schema_cannot_see_stalls_the_object_and_a_good_spec_heals_it() -> Result<()> {
    let (place, _operator, image) = prepared("collision").await?;
    let mut spec = spec(&place);
    let good = spec.clone();
    let source = spec["images"][0]["source"].clone();
    spec["images"] = json!([spec["images"][0], {"source": "gcr.io/other/agent", "tags": ["1"]}]);
    place.apply("m", &spec).await?;
    let mirror = place.until_reason("m", "InvalidSpec").await?;
    let status = mirror.status.unwrap_or_default();
    ensure!(condition(&status, "Stalled") == ("True", "InvalidSpec") && condition(&status, "Reconciling") == ("", ""));
    let said = message(&status, "Ready");
    for part in [source.as_str().unwrap_or_default(), "gcr.io/other/agent", "targetRepository"] {
        ensure!(said.contains(part), "{said}");
    }
    place.apply("m", &good).await?;
    healed(&place, &image).await
}
