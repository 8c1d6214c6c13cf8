//! What happens while a run goes on: the spec changes, the object or the operator goes away, another replica leads.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::api::DeleteParams;
use serde_json::json;
use testenv::{
    images::Image,
    proxy::{Exchange, Matcher, Proxy, Route},
};
use tokio::time::Instant;

use crate::support::{Place, condition, eventually};

/// An image with a layer that takes its time, and a target that counts.
struct Slow {
    place: Place,
    source: Proxy,
    target: Proxy,
    image: Image,
}

impl Slow {
    /// The source sends so many bytes a second.
    async fn new(test: &str, bytes_per_second: u64) -> Result<Self> {
        let place = Place::new(test).await?;
        let image = Image::multi_arch(41, &[2_000_000, 3_000_000], &["linux/amd64", "linux/arm64"]);
        place.push(&place.env.source, "agent", "1", &image).await?;
        let source = Proxy::to(place.env, &place.env.source)
            .label("source")
            .bytes_per_second_down(bytes_per_second)
            .start()
            .await?;
        let target = Proxy::to(place.env, &place.env.target).label("target").start().await?;
        place.pull_secret("pull", &[source.registry(), &place.env.source]).await?;
        place.pull_secret("push", &[target.registry()]).await?;
        Ok(Self { place, source, target, image })
    }

    fn spec(&self, tags: &[&str]) -> serde_json::Value {
        self.place.spec(self.source.registry(), self.target.registry(), &[("agent", tags)])
    }

    /// Waits until bytes of a large blob are on their way to the target.
    async fn until_copying(&self) -> Result<()> {
        self.target.wait_for_request(&Matcher::new().method("PUT").route(Route::Upload)).await
    }

    fn tag_writes(&self) -> usize {
        self.target.count(&Matcher::new().method("PUT").route(Route::Manifest).reference("1"))
    }
}

/// Whether an upload was given up: cancelled, or found to be unknown to the registry, as one is that got no byte.
fn gave_up(log: &[Exchange]) -> bool {
    log.iter().any(|exchange| {
        let is_session = exchange.key.route == Route::Upload;
        is_session
            && (exchange.key.method == "DELETE" || (exchange.key.method == "GET" && exchange.status == Some(404)))
    })
}

#[tokio::test]
async fn an_operator_killed_in_mid_copy_is_followed_by_one_that_finishes() -> Result<()> {
    let slow = Slow::new("killed", 3_000_000).await?;
    let operator = slow.place.operator()?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.until_copying().await?;
    operator.process.kill().await?;
    ensure!(slow.tag_writes() == 0, "the tag was written before its content");
    let _operator = slow.place.operator()?;
    slow.place.until_ready("m").await?;
    ensure!(slow.place.holds(&slow.place.env.target, "agent", "1", &slow.image).await?);
    let violations = slow.target.violations();
    ensure!(violations.is_empty(), "manifests were written before their children: {violations:?}");
    Ok(())
}

#[tokio::test]
async fn progress_is_seen_while_it_is_made() -> Result<()> {
    let slow = Slow::new("progress", 2_000_000).await?;
    let _operator = slow.place.operator()?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    let seen =
        slow.place.until("m", "progress", |status| status.progress.is_some_and(|progress| progress.bytes_done > 0));
    let status = seen.await?.status.unwrap_or_default();
    let progress = status.progress.context("progress")?;
    ensure!(progress.bytes_done <= progress.bytes_total && progress.images_total == 1);
    ensure!(condition(&status, "Ready") == ("Unknown", "Progressing"));
    ensure!(condition(&status, "TargetInSync") == ("False", "Progressing"));
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.progress.is_none());
    let last = status.last_sync.context("lastSync")?;
    let blobs = |is_counted: fn(usize) -> bool| -> usize {
        slow.image.blobs.iter().map(|blob| blob.bytes.len()).filter(|size| is_counted(*size)).sum()
    };
    // A run that lost its lease on a busy machine has left the configurations there, which are small.
    let (large, all) = (blobs(|size| size > 1000), blobs(|_| true));
    let expected = if last.blobs_present == 0 { all..=all } else { large..=all };
    ensure!(expected.contains(&usize::try_from(last.bytes_copied)?), "{last:?} of {all} bytes");
    Ok(())
}

#[tokio::test]
async fn deleting_the_object_stops_its_run_within_two_seconds_and_no_tag_is_written() -> Result<()> {
    let slow = Slow::new("deleted", 1_000_000).await?;
    let _operator = slow.place.operator()?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.until_copying().await?;
    slow.place.mirrors().delete("m", &DeleteParams::default()).await?;
    let deleted = Instant::now();
    // The run gives up what it opened: that is the last that is heard of it.
    slow.target.wait_for(gave_up, crate::support::PATIENCE).await?;
    ensure!(deleted.elapsed() < Duration::from_secs(2), "it took {:?}", deleted.elapsed());
    eventually("every request to the source to end", || async {
        Ok(slow.source.requests().iter().all(|exchange| exchange.done))
    })
    .await?;
    ensure!(slow.tag_writes() == 0, "a tag was written after its object was deleted");
    ensure!(slow.place.digest_of(&slow.place.env.target, "agent", "1").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn a_changed_spec_cancels_the_run_and_starts_another() -> Result<()> {
    let slow = Slow::new("changed", 1_500_000).await?;
    slow.place.push(&slow.place.env.source, "agent", "2", &Image::single(42, &[1000])).await?;
    let _operator = slow.place.operator()?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.until_copying().await?;
    // The same object with another tag: what is being copied is wanted no more.
    slow.place.apply("m", &slow.spec(&["2"])).await?;
    let mirror = slow.place.until_ready("m").await?;
    let status = mirror.status.unwrap_or_default();
    ensure!(status.images.iter().map(|image| image.tag.as_str()).eq(["2"]));
    ensure!(status.last_sync.context("lastSync")?.generation == 2);
    ensure!(slow.tag_writes() == 0, "the tag of the old spec was written");
    Ok(())
}

#[tokio::test]
async fn a_change_that_does_not_alter_the_outcome_leaves_the_run_alone() -> Result<()> {
    let slow = Slow::new("unaltered", 3_000_000).await?;
    let _operator = slow.place.operator()?;
    let mut spec = slow.spec(&["1"]);
    slow.place.apply("m", &spec).await?;
    slow.until_copying().await?;
    spec["interval"] = json!("2h");
    slow.place.apply("m", &spec).await?;
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.observed_generation == 2);
    ensure!(status.last_sync.context("lastSync")?.generation == 1, "the run was started again");
    ensure!(slow.target.count(&Matcher::new().method("DELETE").route(Route::Upload)) == 0, "uploads were given up");
    // And once idle: only the generations move.
    spec["interval"] = json!("3h");
    slow.place.apply("m", &spec).await?;
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.observed_generation == 3 && status.last_sync.context("lastSync")?.generation == 1);
    Ok(())
}

#[tokio::test]
async fn a_suspended_object_starts_nothing_until_it_is_resumed() -> Result<()> {
    let slow = Slow::new("suspended", 50_000_000).await?;
    let _operator = slow.place.operator()?;
    let mut spec = slow.spec(&["1"]);
    spec["suspend"] = json!(true);
    slow.place.apply("m", &spec).await?;
    let status = slow.place.until_reason("m", "Suspended").await?.status.unwrap_or_default();
    ensure!(condition(&status, "Reconciling") == ("", ""));
    ensure!(slow.source.requests().is_empty() && slow.target.requests().is_empty(), "a run was started");
    spec["suspend"] = json!(false);
    slow.place.apply("m", &spec).await?;
    slow.place.until_ready("m").await?;
    spec["suspend"] = json!(true);
    slow.place.apply("m", &spec).await?;
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.observed_generation == 3, "Ready stays for a spec that has been carried out");
    Ok(())
}

#[tokio::test]
async fn probes_say_what_is_waited_for_and_metrics_what_there_is() -> Result<()> {
    let slow = Slow::new("probes", 50_000_000).await?;
    let operator = slow.place.operator()?;
    eventually("readiness", || async { Ok(operator.get("/readyz").await?.0 == 200) }).await?;
    let (status, ready) = operator.get("/readyz").await?;
    ensure!(status == 200 && ready.contains("crd: ready") && ready.contains("lease: ready"), "{ready}");
    ensure!(operator.get("/livez").await?.0 == 200);
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.place.until_ready("m").await?;
    let images = format!(r#"imagemirror_images{{namespace="{}",name="m",state="synced"}} 1"#, slow.place.namespace);
    eventually("the metrics of the object", || async { Ok(operator.get("/metrics").await?.1.contains(&images)) })
        .await?;
    let (_, metrics) = operator.get("/metrics").await?;
    for name in [
        "imagemirror_condition{",
        "imagemirror_sync_duration_seconds_bucket",
        "imagemirror_build_info{",
        "imagemirror_queue_depth 0",
    ] {
        ensure!(metrics.contains(name), "no {name} in {metrics}");
    }
    ensure!(!metrics.contains("agent"), "the name of an image is a label");
    for line in operator.logged()?.lines() {
        let entry: serde_json::Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        ensure!(entry["level"].is_string() && entry["timestamp"].is_string(), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn a_spec_that_is_taken_back_in_mid_copy_is_carried_out_again() -> Result<()> {
    let slow = Slow::new("reverted", 2_000_000).await?;
    slow.place.push(&slow.place.env.source, "small", "1", &Image::single(43, &[1000])).await?;
    let _operator = slow.place.operator()?;
    let small = slow.place.spec(slow.source.registry(), slow.target.registry(), &[("small", &["1"])]);
    slow.place.apply("m", &small).await?;
    slow.place.until_ready("m").await?;
    slow.target.forget();
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.until_copying().await?;
    slow.place.apply("m", &small).await?;
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.observed_generation == 3 && condition(&status, "Reconciling") == ("", ""));
    ensure!(slow.tag_writes() == 0, "the tag of the spec that was taken back was written");
    // The same after an invalid one.
    let mut invalid = small.clone();
    invalid["images"] = json!([small["images"][0], {"source": "gcr.io/other/small", "tags": ["1"]}]);
    slow.place.apply("m", &invalid).await?;
    slow.place.until_reason("m", "InvalidSpec").await?;
    slow.place.apply("m", &small).await?;
    slow.place.until_ready("m").await?;
    Ok(())
}

#[tokio::test]
async fn a_token_that_comes_during_a_run_is_answered_by_another_run() -> Result<()> {
    let slow = Slow::new("token", 3_000_000).await?;
    let _operator = slow.place.operator()?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    slow.until_copying().await?;
    let status = slow.place.request("m").await?.status.unwrap_or_default();
    ensure!(condition(&status, "Ready") == ("True", "Succeeded"));
    // The first run copied, the second found everything there.
    ensure!(
        status.last_sync.context("lastSync")?.bytes_copied == 0,
        "one run answered a token that came after it began"
    );
    ensure!(slow.tag_writes() == 1);
    Ok(())
}

#[tokio::test]
async fn a_status_of_another_version_does_not_make_the_object_unreadable() -> Result<()> {
    let slow = Slow::new("version", 50_000_000).await?;
    slow.place.apply("m", &slow.spec(&["1"])).await?;
    let entry = json!({"source": "a", "target": "b", "message": "", "since": "2026-01-01T00:00:00Z", "attempts": 1, "reason": "FromTheFuture"});
    let image = json!({"source": "a", "tag": "1", "target": "b", "state": "Hovering"});
    // As another version of the operator would write it: what it wrote and this one does not know goes away.
    let ready = json!({
        "type": "Ready", "status": "False", "reason": "SourceNotFound", "message": "", "observedGeneration": 0,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let status = json!({
        "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"},
        "status": {"observedGeneration": 0, "conditions": [ready], "failures": [entry], "images": [image]},
    });
    let params = kube::api::PatchParams::apply("imagemirror").force();
    slow.place.mirrors().patch_status("m", &params, &kube::api::Patch::Apply(&status)).await?;
    let _operator = slow.place.operator()?;
    let status = slow.place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.images.len() == 1 && status.failures.is_empty());
    Ok(())
}
