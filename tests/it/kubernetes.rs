//! The API server fails, all of it behind the fault proxy: what was begun goes on, what was missed is made up for, and
//! the mirror ends in step.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use testenv::{
    images::Image,
    proxy::{Action, Close, Exchange, Gate, Matcher, Proxy, Route},
};

use crate::support::{Operator, PATIENCE, Place, condition, eventually};

/// A place whose operator reaches the API server through a proxy.
struct Behind {
    place: Place,
    api: Proxy,
    source: Proxy,
    target: Proxy,
    operator: Operator,
}

impl Behind {
    async fn new(test: &str, timing: &Value) -> Result<Self> {
        let place = Place::new(test).await?;
        let api = place.api_proxy().await?;
        let source = Proxy::to(place.env, &place.env.source).label("source").start().await?;
        let target = Proxy::to(place.env, &place.env.target).label("target").start().await?;
        place.pull_secret("pull", &[source.registry()]).await?;
        place.pull_secret("push", &[target.registry()]).await?;
        let operator = Self::operator(&place, timing)?;
        Ok(Self { place, api, source, target, operator })
    }

    /// A lease that outlasts the faults, so that whatever is begun twice was not begun again for its sake.
    fn operator(place: &Place, timing: &Value) -> Result<Operator> {
        let mut times = json!({
            "apiTimeout": "1s", "apiBackoffFirst": "100ms", "apiBackoffMax": "500ms", "watchTimeout": "1s",
            "leaseDuration": "15s", "leaseRenew": "1s", "tagWriteMargin": "9s", "tagWriteTimeout": "8s",
            "idleTimeout": "30s", "headTimeout": "30s",
        });
        if let (Some(times), Some(changes)) = (times.as_object_mut(), timing.as_object()) {
            times.extend(changes.clone());
        }
        place.operator_with(&times, "debug")
    }

    /// An image at the source, and the spec that mirrors it.
    async fn image(&self, name: &str, seed: u64) -> Result<(Image, Value)> {
        let image = Image::single(seed, &[200_000]);
        self.place.push(&self.place.env.source, name, "1", &image).await?;
        Ok((image, self.place.spec(self.source.registry(), self.target.registry(), &[(name, &["1"])])))
    }

    /// Applies a mirror of an image and waits until its copy stands before the gate.
    async fn copying(&self, name: &str, seed: u64) -> Result<(Image, Gate)> {
        let (image, spec) = self.image(name, seed).await?;
        let gate = Gate::new();
        self.source.rule(blob(&image), Action::GateAnswer(gate.clone()));
        self.place.apply(name, &spec).await?;
        gate.arrived(1).await?;
        Ok((image, gate))
    }

    /// Waits until requests that match have met with what a rule does.
    async fn met(&self, matcher: &Matcher, count: usize) -> Result<()> {
        let is_met =
            |exchange: &&Exchange| !exchange.actions.is_empty() && matcher.matches(&exchange.key, &exchange.path);
        self.api.wait_for(|log| log.iter().filter(is_met).count() >= count, PATIENCE).await
    }

    async fn ends_in_step(&self, name: &str, image: &Image) -> Result<()> {
        let status = self.place.until_ready(name).await?.status.unwrap_or_default();
        let digest = status.images.first().and_then(|image| image.digest.as_ref()).map(ToString::to_string);
        ensure!(
            digest.as_deref() == Some(image.digest()) && status.synced.as_deref() == Some("1/1"),
            "{name}: {status:?}"
        );
        ensure!(condition(&status, "TargetInSync") == ("True", "Succeeded"), "{name}: {status:?}");
        ensure!(self.place.holds(&self.place.env.target, name, "1", image).await?, "{name} is not whole at the target");
        ensure!(!self.operator.logged()?.contains("panicked"), "{name}");
        Ok(())
    }

    async fn readiness(&self, status: u16, says: &str) -> Result<()> {
        let is_so = || async {
            let (found, text) = self.operator.get("/readyz").await?;
            Ok(found == status && text.contains(says))
        };
        eventually(&format!("readiness {status} with {says:?}"), is_so).await
    }
}

fn blob(image: &Image) -> Matcher {
    let layer = image.blobs.iter().max_by_key(|blob| blob.bytes.len()).map(|blob| blob.digest.as_str());
    Matcher::new().method("GET").route(Route::Blob).reference(layer.unwrap_or_default())
}

fn all() -> Matcher {
    Matcher::new()
}

fn watches() -> Matcher {
    Matcher::new().path_contains("watch=true")
}

fn statuses() -> Matcher {
    Matcher::new().method("PATCH").path_contains("/status?")
}

fn kind() -> Matcher {
    Matcher::new().path_contains("/apis/imagemirror.dev/")
}

/// What the API server says of a kind that it does not know.
fn unknown() -> Action {
    Action::respond(404).header("Content-Type", "text/plain; charset=utf-8").body("404 page not found\n")
}

/// A refusal as the API server words one.
fn refusal(code: u16, reason: &str) -> Action {
    let status = status(code, reason).to_string();
    Action::respond(code).header("Content-Type", "application/json").header("Retry-After", "1").body(status)
}

fn status(code: u16, reason: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "by the fault proxy",
        "reason": reason, "code": code, "details": {"retryAfterSeconds": 1},
    })
}

#[tokio::test]
async fn a_copy_under_way_goes_on_whatever_the_api_server_does() -> Result<()> {
    let behind = Behind::new("apifaults", &json!({})).await?;
    let faults = [
        ("restarted", all(), Action::CloseBefore(Close::Reset)),
        ("silent", all(), Action::Stall),
        ("slow", all(), Action::Delay(Duration::from_millis(500))),
        ("late", all(), Action::DelayAnswer(Duration::from_millis(1500))),
        ("throttled", all(), refusal(429, "TooManyRequests")),
        ("broken", all(), refusal(500, "InternalError")),
        ("away", all(), Action::respond(503).body("<html>no backend</html>")),
        ("conflict", statuses(), refusal(409, "Conflict")),
        ("forbidden", statuses(), refusal(403, "Forbidden")),
        ("kindless", kind(), unknown()),
    ];
    for (seed, (name, matcher, action)) in (100..).zip(faults) {
        let (image, gate) = behind.copying(name, seed).await?;
        behind.api.rule(matcher, action);
        if name == "restarted" {
            behind.api.cut();
        }
        gate.open();
        // What the run came to is tried to be written, and again.
        behind.met(&statuses(), if name == "slow" { 1 } else { 2 }).await?;
        behind.api.clear();
        behind.ends_in_step(name, &image).await?;
        ensure!(behind.source.count(&blob(&image)) == 1, "{name}: the copy was begun again");
        behind.api.forget();
    }
    ensure!(!behind.operator.logged()?.contains("lease lost"));
    Ok(())
}

#[tokio::test]
async fn a_watch_that_fails_is_back_soon_and_shows_what_was_missed() -> Result<()> {
    let behind = Behind::new("watchfaults", &json!({})).await?;
    let gone = json!({"type": "ERROR", "object": status(410, "Expired")});
    let lists = || kind().path_contains("limit=");
    let faults = [
        ("gone-in-stream", watches().times(1), Action::replace_body(format!("{gone}\n"))),
        // For ever: whoever asks for the same version again never hears of anything.
        ("gone-by-status", watches(), refusal(410, "Expired")),
        ("bad-by-status", watches(), refusal(400, "BadRequest")),
        ("no-answer", watches().times(1), Action::Stall),
        ("no-event", watches().times(1), Action::StallResponseBody { after: 0 }),
        ("half-event", watches().times(1), Action::CutResponseBody { after: 150, close: Close::Reset }),
        ("garbage", watches().times(1), Action::replace_body("<html>\n")),
        ("no-list", lists().times(1), Action::Stall),
    ];
    for (seed, (name, matcher, action)) in (200..).zip(faults) {
        let (image, spec) = behind.image(name, seed).await?;
        if name == "no-list" {
            behind.api.rule(watches().times(1), refusal(410, "Expired"));
        }
        behind.api.rule(matcher.clone(), action);
        behind.api.cut();
        behind.met(&matcher, 1).await?;
        behind.place.apply(name, &spec).await?;
        behind.ends_in_step(name, &image).await?;
        behind.api.clear();
        behind.api.forget();
    }
    Ok(())
}

#[tokio::test]
async fn a_watch_event_that_never_came_is_made_up_for_by_the_next_list() -> Result<()> {
    let behind = Behind::new("dropped", &json!({"watchRelist": "1s"})).await?;
    let drops = |name: &str| behind.api.rule(watches(), Action::DropLines(format!("\"name\":\"{name}\"")));
    for name in ["m", "n"] {
        drops(name);
    }
    behind.api.cut();
    behind.met(&watches(), 1).await?;
    // Created, changed, and deleted in mid-copy.
    let (image, mut spec) = behind.image("m", 300).await?;
    behind.place.apply("m", &spec).await?;
    behind.ends_in_step("m", &image).await?;
    let (_, other) = behind.image("other", 301).await?;
    spec["images"] = other["images"].clone();
    behind.place.apply("m", &spec).await?;
    let status = behind.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.observed_generation == 2 && status.images[0].source.ends_with("/other"), "{status:?}");
    let (_, gate) = behind.copying("n", 302).await?;
    behind.place.mirrors().delete("n", &DeleteParams::default()).await?;
    let is_broken_off = |log: &[Exchange]| {
        log.iter().any(|exchange| exchange.key.route == Route::Upload && exchange.key.method == "DELETE")
    };
    behind.target.wait_for(is_broken_off, PATIENCE).await?;
    gate.open();
    ensure!(behind.place.digest_of(&behind.place.env.target, "n", "1").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn an_object_that_is_deleted_and_created_again_in_mid_copy_is_another() -> Result<()> {
    let behind = Behind::new("recreated", &json!({"watchRelist": "1s"})).await?;
    // With the events of that, and with neither of them.
    for (seed, name) in [(310, "seen"), (312, "missed")] {
        let (_, gate) = behind.copying(name, seed).await?;
        if name == "missed" {
            behind.api.rule(watches(), Action::DropLines(format!("\"name\":\"{name}\"")));
            behind.api.cut();
            behind.met(&watches(), 1).await?;
        }
        let old = behind.place.mirrors().get(name).await?.metadata.uid;
        behind.place.mirrors().delete(name, &DeleteParams::default()).await?;
        let (image, mut spec) = behind.image(&format!("{name}-new"), seed + 1).await?;
        spec["images"][0]["targetRepository"] = json!(behind.place.repository(name));
        spec["images"][0]["targetTags"] = json!(["new"]);
        let new = behind.place.apply(name, &spec).await?.metadata.uid;
        let status = behind.place.until_ready(name).await?.status.unwrap_or_default();
        gate.open();
        let is_new = status.images.iter().map(|image| image.target.ends_with(":new")).eq([true]);
        ensure!(old != new && is_new, "{name}: {status:?}");
        ensure!(behind.place.holds(&behind.place.env.target, name, "new", &image).await?);
        ensure!(
            behind.place.digest_of(&behind.place.env.target, name, "1").await?.is_none(),
            "{name}: the old one's tag"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_kind_that_is_missing_is_waited_for_at_the_start_and_in_operation() -> Result<()> {
    let place = Place::new("crd").await?;
    let api = place.api_proxy().await?;
    api.rule(kind(), unknown());
    let mut early = Behind::operator(&place, &json!({}))?;
    api.wait_for_request(&kind()).await?;
    early.process.signal(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(early.process.wait().await?.success(), "it does not end in order while it waits");

    let mut behind = Behind::new("kind", &json!({})).await?;
    behind.api.rule(kind(), unknown());
    behind.operator = Behind::operator(&behind.place, &json!({}))?;
    let waits = "crd: waiting for the CustomResourceDefinition imagemirrors.imagemirror.dev to be installed";
    behind.readiness(503, waits).await?;
    behind.met(&kind(), 2).await?;
    behind.api.clear();
    behind.readiness(200, "crd: ready").await?;
    let (image, spec) = behind.image("m", 320).await?;
    behind.place.apply("m", &spec).await?;
    behind.ends_in_step("m", &image).await?;

    behind.target.forget();
    behind.api.rule(kind(), unknown());
    behind.api.cut();
    behind.readiness(503, waits).await?;
    // With the kind its objects are gone, and what comes back are others.
    behind.place.mirrors().delete("m", &DeleteParams::default()).await?;
    let (other, other_spec) = behind.image("n", 321).await?;
    behind.place.apply("n", &other_spec).await?;
    ensure!(behind.target.requests().is_empty(), "the target was touched");
    ensure!(behind.place.holds(&behind.place.env.target, "m", "1", &image).await?);
    behind.api.clear();
    behind.readiness(200, "crd: ready").await?;
    behind.ends_in_step("n", &other).await
}

#[tokio::test]
async fn an_object_that_does_not_fit_the_types_does_not_disturb_98_others() -> Result<()> {
    let place = Place::new("unreadable").await?;
    let image = Image::single(330, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let spec = |name: &str| {
        let mut spec = place.spec(&place.env.source, &place.env.open, &[("agent", &["1"])]);
        spec["target"] = json!({"registry": place.env.open.host, "repository": place.repository(name)});
        spec
    };
    place.apply("bad", &spec("bad")).await?;
    // The API server's pattern takes any two digits for the hours of an offset; no clock has this one.
    let time = "2026-01-01T00:00:00+99:99";
    let bad = json!({"type": "Ready", "status": "True", "reason": "Odd", "message": "", "lastTransitionTime": time});
    let patch = json!({"status": {"conditions": [bad]}}).to_string();
    place.kubectl(&["patch", "imagemirror", "bad", "--subresource=status", "--type=merge", "-p", &patch])?;
    ensure!(place.mirrors().get("bad").await.is_err(), "the object fits the types after all");
    let names: Vec<String> = (1..=98).map(|number| format!("good-{number}")).collect();
    let specs: Vec<Value> = names.iter().map(|name| spec(name)).collect();
    try_join_all(names.iter().zip(&specs).map(|(name, spec)| place.apply(name, spec))).await?;
    let operator = place.operator()?;
    try_join_all(names.iter().map(|name| place.until_ready(name))).await?;
    for name in &names {
        ensure!(place.digest_of(&place.env.open, name, "1").await?.as_deref() == Some(image.digest()), "{name}");
    }
    // What is said of it replaces what could not be read: from then on it is an object like the others.
    eventually("the unreadable object to be told so", || async {
        let columns = "jsonpath={.status.conditions[?(@.type=='Ready')].reason}";
        let reason = place.kubectl(&["get", "imagemirror", "bad", "-o", columns])?;
        Ok(reason == "InvalidSpec" || reason == "Succeeded")
    })
    .await?;
    ensure!(!operator.logged()?.contains("panicked"));
    Ok(())
}
