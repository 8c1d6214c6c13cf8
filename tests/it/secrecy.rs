//! A canary: passwords are looked for in everything that leaves the operator, at the most talkative log level.

use anyhow::{Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use testenv::{
    images::Image,
    proxy::{Action, Matcher, Proxy},
};

use crate::support::Place;

#[tokio::test]
async fn no_password_is_in_any_log_event_status_or_metric() -> Result<()> {
    let place = Place::new("canary").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let image = Image::single(31, &[2_000_000, 10]);
    place.push(source, "agent", "1", &image).await?;
    let operator = place.operator_with(&serde_json::json!({}), "trace,hyper=trace,h2=trace,rustls=trace,kube=trace")?;
    // One object that works, and one whose password is refused.
    place.apply("good", &place.spec(source, target, &[("agent", &["1"])])).await?;
    place.until_ready("good").await?;
    place.pull_secret("wrong", &[&source.with_credentials("puller", "canary-wrong-password")]).await?;
    let mut spec = place.spec(source, target, &[("agent", &["2"])]);
    spec["imagePullSecrets"] = serde_json::json!([{"name": "wrong"}]);
    place.apply("bad", &spec).await?;
    place.until_reason("bad", "AuthenticationFailed").await?;

    let mut canaries = vec!["canary-wrong-password".to_owned()];
    for registry in [source, target, &source.with_credentials("puller", "canary-wrong-password")] {
        let (user, password) =
            (registry.username.clone().unwrap_or_default(), registry.password.clone().unwrap_or_default());
        ensure!(password.len() > 5, "a password too short to look for");
        canaries.push(STANDARD.encode(format!("{user}:{password}")));
        canaries.push(password);
    }
    let (_, metrics) = operator.get("/metrics").await?;
    let objects = place.kubectl(&["get", "imagemirrors,events.events.k8s.io", "-o", "yaml"])?;
    let log = operator.logged()?;
    ensure!(log.contains("TRACE"), "the log is not at trace level");
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", operator.process.pid()))?;
    for (place, text) in [("log", &log), ("objects", &objects), ("metrics", &metrics), ("environment", &environment)] {
        for canary in &canaries {
            ensure!(!text.contains(canary.as_str()), "a password is in the {place}");
        }
        ensure!(!text.contains("Bearer ey"), "a token is in the {place}");
    }
    Ok(())
}

#[tokio::test]
async fn closed_networks_are_not_connected_to_by_address_by_name_or_by_redirect() -> Result<()> {
    let place = Place::new("closed").await?;
    let listener = Proxy::to(place.env, &place.env.source).start().await?;
    let port = listener.host().rsplit(':').next().unwrap_or_default().to_owned();
    let operator = place.operator_in(&json!({}), &json!({}), "debug")?;
    for (name, host) in [("address", listener.host()), ("name", format!("localhost:{port}"))] {
        let source = place.env.source.at(&host);
        place.pull_secret("pull", &[&source]).await?;
        place.apply(name, &place.spec(&source, &place.env.target.at(&host), &[("agent", &["1"])])).await?;
        place.pull_secret("push", &[&source]).await?;
        let status = place.until_reason(name, "Blocked").await?.status.unwrap_or_default();
        let said = crate::support::message(&status, "Ready");
        ensure!(said.contains("is in a denied network") && said.contains("networks.allow"), "{said}");
    }
    operator.process.kill().await?;

    // What is open may lead to what is closed.
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    let image = Image::single(301, &[10]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let away = format!("https://[::1]:{port}/v2/");
    source.rule(Matcher::new().path_contains("/blobs/"), Action::respond(307).header("Location", &away));
    place.pull_secret("pull", &[source.registry()]).await?;
    place.pull_secret("push", &[&place.env.target]).await?;
    let _operator = place.operator_in(&json!({"allow": ["127.0.0.1"]}), &json!({}), "debug")?;
    place.apply("redirect", &place.spec(source.registry(), &place.env.target, &[("agent", &["1"])])).await?;
    place.until_reason("redirect", "Blocked").await?;
    ensure!(listener.requests().is_empty(), "it was connected to: {:?}", listener.requests());
    Ok(())
}
