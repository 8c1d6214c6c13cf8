//! Objects that were stored under another schema, older and looser or newer: each harms only itself. They are put where
//! the API server stores them, because it would not take them any more.

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use testenv::images::Image;

use crate::support::{Place, condition, eventually};

/// Asks etcd, through the gateway that speaks JSON.
async fn etcd(place: &Place, what: &str, request: &Value) -> Result<Value> {
    let url = format!("{}/v3/kv/{what}", place.env.etcd);
    let answer = reqwest::Client::new().post(url).body(request.to_string()).send().await?.error_for_status()?;
    Ok(serde_json::from_str(&answer.text().await?)?)
}

/// Changes an object where it is stored.
async fn store(place: &Place, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    let key = format!("/registry/imagemirror.dev/imagemirrors/{}/{name}", place.namespace);
    let key = BASE64_STANDARD.encode(key);
    let found = etcd(place, "range", &json!({"key": key})).await?;
    let stored = found["kvs"][0]["value"].as_str().context("the object is not in etcd")?;
    let mut object: Value = serde_json::from_slice(&BASE64_STANDARD.decode(stored)?)?;
    change(&mut object["spec"]);
    etcd(place, "put", &json!({"key": key, "value": BASE64_STANDARD.encode(object.to_string())})).await?;
    // What is stored is seen through the API server's own watch.
    let is_seen = || async {
        let seen: Value = serde_json::from_str(&place.kubectl(&["get", "imagemirror", name, "-o", "json"])?)?;
        Ok(seen["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"])
    };
    eventually("the stored object to be seen", is_seen).await
}

#[tokio::test]
async fn an_object_that_was_stored_under_another_schema_harms_only_itself() -> Result<()> {
    let place = Place::new("stored").await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let spec = |name: &str| {
        let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
        spec["target"]["repository"] = json!(format!("{}/{name}", place.prefix));
        spec
    };
    let broken = [
        ("enum", "/policy", json!({"overwrite": "Sometimes"}), "spec.policy.overwrite: \\\"Sometimes\\\" is none of"),
        ("type", "/images", json!("all of them"), "spec.images: must be a list"),
        ("gone", "/target", Value::Null, "spec.target: is required"),
        ("boolean", "/suspend", json!("yes"), "spec.suspend: must be true or false"),
        ("form", "/images/0/source", json!("https://gcr.io/a"), "spec.images[0].source"),
        ("path", "/imagePullSecrets", json!([{"name": "../../secrets/pull"}]), "spec.imagePullSecrets[0].name"),
        ("many", "/images/0/tags", (0..101).map(|n| format!("t{n}")).collect(), "spec.images[0].tags"),
        ("long", "/timeout", json!("1h1h1h1h1h1h1h1h1h"), "spec.timeout"),
    ];
    for (name, pointer, value, _) in &broken {
        place.apply(name, &spec(name)).await?;
        store(&place, name, |spec| {
            let (parent, field) = pointer.rsplit_once('/').unwrap_or_default();
            if let Some(parent) = spec.pointer_mut(parent) {
                parent[field] = value.clone();
            }
        })
        .await?;
    }
    // A field of another version is nothing that anybody has to know.
    place.apply("future", &spec("future")).await?;
    store(&place, "future", |spec| spec["future"] = json!({"is": "bright"})).await?;
    place.apply("good", &spec("good")).await?;

    // Looked at again and again, an object is told once all the same.
    let operator = place.operator_with(&json!({"retryAuth": "200ms"}), "debug")?;
    place.until_ready("good").await?;
    place.until_ready("future").await?;
    for (name, _, _, text) in &broken {
        let said = || place.kubectl(&["get", "imagemirror", name, "-o", "jsonpath={.status.conditions}"]);
        eventually(&format!("{name} to be told so"), || async { Ok(said()?.contains("InvalidSpec")) }).await?;
        // What has other types than the schema takes no status but one that goes away again by itself.
        let is_stalled = !["type", "boolean"].contains(name);
        let said = said()?;
        ensure!(said.contains(text) && said.contains("Stalled") == is_stalled, "{name}: {said}");
    }
    place.request("good").await?;
    for (name, ..) in &broken {
        let told = place.statuses.seen(name).iter().filter(|status| status.to_string().contains("InvalidSpec")).count();
        ensure!(told == 1, "{name} was told {told} times");
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": name}, "spec": spec(name),
        });
        let path = place.env.run_dir.join(format!("{}.{name}.json", place.namespace));
        std::fs::write(&path, object.to_string())?;
        place.kubectl(&["replace", "-f", &path.display().to_string()])?;
    }
    for (name, ..) in &broken {
        let status = place.until_ready(name).await?.status.unwrap_or_default();
        ensure!(condition(&status, "TargetInSync") == ("True", "Succeeded"), "{name}: {status:?}");
    }
    ensure!(!operator.logged()?.contains("panicked"));
    Ok(())
}
