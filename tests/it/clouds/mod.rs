//! The registries of clouds, and every way to log in there: real registries of this machine under the clouds' own names, in
//! front of them what the clouds document of their logins. Names in the objects are as users write them; the operator's
//! configuration leads to the stand-ins.

mod aws;
mod azure;
mod gcp;
mod guides;
mod logins;

use std::time::Instant;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use testenv::{images::Image, oidc::Issuer};

use crate::support::{Operator, PATIENCE, Place};

/// The API server as clouds know it.
fn issuer(place: &Place) -> Result<Issuer> {
    let get = |path| place.kubectl(&["get", "--raw", path]);
    Issuer::new(&get("/openid/v1/jwks")?, &get("/.well-known/openid-configuration")?)
}

/// Makes a `ServiceAccount`, or gives it these annotations.
async fn service_account(place: &Place, name: &str, annotations: Value) -> Result<()> {
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "annotations": annotations},
    });
    let api: Api<ServiceAccount> = Api::namespaced(place.client.clone(), &place.namespace);
    api.patch(name, &PatchParams::apply("test"), &Patch::Apply(&account)).await?;
    Ok(())
}

fn subject(place: &Place, account: &str) -> String {
    format!("system:serviceaccount:{}:{account}", place.namespace)
}

/// A spec that mirrors `agent:1` to a registry of a cloud with an identity: a `ServiceAccount`'s, else the operator's own.
fn spec(place: &Place, provider: &str, registry: &str, repository: &str, account: Option<&str>) -> Value {
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["target"] = json!({"registry": registry, "repository": repository});
    if let Some(registries) = spec["registries"].as_array_mut() {
        registries.push(json!({"host": registry, "provider": provider}));
    }
    if let Some(account) = account {
        spec["serviceAccountName"] = account.into();
    }
    spec
}

/// Pushes another image under the tag, and waits until it has come over.
async fn another_comes_over(place: &Place, mirror: &str, seed: u64) -> Result<()> {
    let image = Image::single(seed, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let status = place.request(mirror).await?.status.unwrap_or_default();
    let digest = status.images.first().and_then(|image| image.digest.as_ref()).map(ToString::to_string);
    ensure!(digest.as_ref() == Some(&image.root.digest), "{status:?}");
    Ok(())
}

/// Lets other images come over until something has happened.
async fn images_come_over_until(place: &Place, mirrors: &[&str], mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    for (seed, mirror) in (2..).zip(mirrors.iter().cycle()) {
        another_comes_over(place, mirror, seed).await?;
        if is_so() {
            break;
        }
        ensure!(Instant::now() < deadline, "no login was renewed");
    }
    Ok(())
}

/// Looks for secrets in everything that the operator has said.
async fn nothing_is_told(place: &Place, operator: &Operator, secrets: &[String]) -> Result<()> {
    let objects = place.mirrors().list(&ListParams::default()).await?;
    let events = place.kubectl(&["get", "events", "-o", "json"])?;
    let (_, metrics) = operator.get("/metrics").await?;
    ensure!(!secrets.is_empty());
    for (place, text) in [
        ("the log", operator.logged()?),
        ("the objects", serde_json::to_string(&objects)?),
        ("events", events),
        ("metrics", metrics),
    ] {
        // Also of one that was cut short: what comes after the header, which all tokens have, and is in the first words.
        let told = secrets.iter().find(|secret| text.contains(secret.get(120..200).unwrap_or(secret)));
        ensure!(told.is_none(), "{place}: {told:?}");
    }
    Ok(())
}

/// All there is to log.
const TALKATIVE: &str = "trace,hyper=trace,rustls=trace,kube=trace,reqwest=trace,azure_core=trace,azure_identity=trace,google_cloud_auth=trace,aws_config=trace,aws_smithy_runtime=trace";
