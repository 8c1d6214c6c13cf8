//! What the fields of the API do, seen through the API server and at the registries.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use imagemirror::api::{ImageMirrorStatus, v1alpha1::ImageState};
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use testenv::{
    Tunnel,
    images::Image,
    proxy::{Action, Matcher, Proxy, Route},
};

use crate::support::{Place, condition, eventually, message};

fn image(seed: u64) -> Image {
    Image::single(seed, &[1000])
}

async fn push_all(place: &Place, name: &str, tags: &[&str]) -> Result<()> {
    for (seed, tag) in (1..).zip(tags) {
        place.push(&place.env.source, name, tag, &image(seed)).await?;
    }
    Ok(())
}

/// The tags of the target that the status names, and the state of each.
fn states(status: &ImageMirrorStatus) -> Vec<(&str, ImageState)> {
    let tag = |target: &'_ str| target.rfind(':').map_or(0, |at| at + 1);
    status.images.iter().map(|image| (&image.target[tag(&image.target)..], image.state)).collect()
}

#[tokio::test]
async fn tags_are_selected_by_rule_and_new_ones_come_over() -> Result<()> {
    let place = Place::new("select").await?;
    push_all(&place, "agent", &["7.59.0", "7.60.0", "7.61.0-rc1", "v7.61", "8.0.0", "latest"]).await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(source.registry(), &place.env.target, &[("agent", &["latest"])]);
    spec["referrers"] = json!({"policy": "None"});
    spec["images"][0]["select"] = json!({"semver": ">=7.60 <8"});
    place.apply("m", &spec).await?;
    let status = place.until_ready("m").await?.status.unwrap_or_default();
    let synced = ImageState::Synced;
    ensure!(states(&status) == [("latest", synced), ("v7.61", synced), ("7.60.0", synced)], "{:?}", states(&status));
    ensure!(status.synced.as_deref() == Some("3/3"));
    let lists = source.requests().iter().filter(|r| r.key.route == Route::Tags && r.status == Some(200)).count();
    ensure!(lists == 1, "{lists} lists of one repository");

    push_all(&place, "agent", &["7.70.1"]).await?;
    let status = place.request("m").await?.status.unwrap_or_default();
    ensure!(states(&status).contains(&("7.70.1", synced)), "{:?}", states(&status));
    ensure!(place.holds(&place.env.target, "agent", "7.70.1", &image(1)).await?);
    Ok(())
}

#[tokio::test]
async fn a_list_that_cannot_be_read_fails_its_images_alone_and_is_tried_again() -> Result<()> {
    let place = Place::new("select-fails").await?;
    push_all(&place, "agent", &["1.0"]).await?;
    push_all(&place, "operator", &["1.0"]).await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let list = Matcher::new().method("GET").route(Route::Tags).repository(&place.repository("agent"));
    source.rule(list, Action::respond(500));
    let _operator = place.operator()?;
    let mut spec = place.spec(source.registry(), &place.env.target, &[("agent", &[]), ("operator", &["1.0"])]);
    spec["images"][0] = json!({"source": spec["images"][0]["source"], "select": {"semver": "*"}});
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "PartialFailure").await?.status.unwrap_or_default();
    ensure!(status.synced.as_deref() == Some("1/2"), "{status:?}");
    ensure!(message(&status, "Ready").contains("listing the tags"), "{}", message(&status, "Ready"));
    source.clear();
    let status = place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(status.synced.as_deref() == Some("2/2") && status.failures.is_empty(), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn of_two_images_that_are_selected_for_one_tag_the_first_has_it() -> Result<()> {
    let place = Place::new("select-twice").await?;
    push_all(&place, "a/agent", &["1.0", "2.0"]).await?;
    push_all(&place, "b/agent", &["2.0", "3.0"]).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("a/agent", &[]), ("b/agent", &[])]);
    for at in 0..2 {
        spec["images"][at] = json!({"source": spec["images"][at]["source"], "select": {"semver": "*"}});
    }
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "PartialFailure").await?.status.unwrap_or_default();
    ensure!(status.synced.as_deref() == Some("3/4"), "{status:?}");
    let failure = status.failures.first().context("no failure")?;
    ensure!(failure.reason.as_str() == "Conflict" && failure.source.contains("/b/agent:2.0"), "{failure:?}");
    ensure!(place.holds(&place.env.target, "agent", "2.0", &image(2)).await?);
    Ok(())
}

#[tokio::test]
async fn of_too_many_tags_none_is_copied() -> Result<()> {
    let place = Place::new("select-many").await?;
    push_all(&place, "agent", &["1"]).await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let tags: Vec<String> = (0..10_001).map(|n| format!("1.{n}.0")).collect();
    let list = json!({"name": place.repository("agent"), "tags": tags}).to_string();
    let lists = Matcher::new().method("GET").route(Route::Tags);
    source.rule(lists, Action::respond(200).header("Content-Type", "application/json").body(list));
    let _operator = place.operator()?;
    let mut spec = place.spec(source.registry(), &place.env.target, &[("agent", &["1"])]);
    spec["images"][0]["select"] = json!({"semver": "1.x"});
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "InvalidSpec").await?.status.unwrap_or_default();
    ensure!(
        message(&status, "Ready").contains("10002 tags are wanted, at most 10000"),
        "{}",
        message(&status, "Ready")
    );
    ensure!(condition(&status, "Stalled") == ("", ""), "what rules choose may be less tomorrow");
    ensure!(place.digest_of(&place.env.target, "agent", "1").await?.is_none(), "one was copied");
    Ok(())
}

/// What happens to a tag that has been mirrored, with a policy.
struct Policy {
    place: Place,
    _operator: crate::support::Operator,
}

impl Policy {
    async fn new(test: &str, policy: &Value) -> Result<Self> {
        let place = Place::new(test).await?;
        push_all(&place, "agent", &["1"]).await?;
        let operator = place.operator()?;
        let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
        spec["policy"] = policy.clone();
        place.apply("m", &spec).await?;
        place.until_ready("m").await?;
        Ok(Self { place, _operator: operator })
    }

    /// The status after a run, and whether the target has this image.
    async fn run(&self, expected: u64) -> Result<(ImageMirrorStatus, bool)> {
        let status = self.place.request("m").await?.status.unwrap_or_default();
        let holds = self.place.holds(&self.place.env.target, "agent", "1", &image(expected)).await?;
        Ok((status, holds))
    }
}

#[tokio::test]
async fn what_was_mirrored_first_is_kept() -> Result<()> {
    let policy = Policy::new("keep", &json!({"sourceMoved": "Keep"})).await?;
    let place = &policy.place;
    place.push(&place.env.source, "agent", "1", &image(2)).await?;
    let (status, holds_old) = policy.run(1).await?;
    ensure!(holds_old && states(&status) == [("1", ImageState::Skipped)], "{:?}", status.images);
    ensure!(condition(&status, "Ready").0 == "True" && condition(&status, "TargetInSync").0 == "True");
    // Gone at the target, it comes back as it was, although the source's tag has moved.
    testenv::Client::new(place.env, &place.env.target)?.delete(&place.repository("agent"), "1").await?;
    let (_, holds_old) = policy.run(1).await?;
    ensure!(holds_old, "the tag was not restored to what was mirrored first");
    Ok(())
}

#[tokio::test]
async fn a_foreign_digest_is_left_and_our_own_is_updated() -> Result<()> {
    let policy = Policy::new("owned", &json!({"overwrite": "IfOwned"})).await?;
    let place = &policy.place;
    place.push(&place.env.source, "agent", "1", &image(2)).await?;
    let (status, holds_new) = policy.run(2).await?;
    ensure!(holds_new && condition(&status, "TargetInSync").0 == "True", "{status:?}");
    place.push(&place.env.target, "agent", "1", &image(3)).await?;
    let (status, holds_foreign) = policy.run(3).await?;
    ensure!(holds_foreign && states(&status) == [("1", ImageState::Skipped)], "{:?}", status.images);
    ensure!(condition(&status, "Ready") == ("True", "Succeeded"));
    ensure!(condition(&status, "TargetInSync") == ("False", "TargetChanged"));
    ensure!(message(&status, "TargetInSync").contains("spec.policy.overwrite"), "{}", message(&status, "TargetInSync"));
    Ok(())
}

#[tokio::test]
async fn a_tag_that_exists_is_never_overwritten() -> Result<()> {
    let policy = Policy::new("never", &json!({"overwrite": "Never"})).await?;
    let place = &policy.place;
    place.push(&place.env.source, "agent", "1", &image(2)).await?;
    let (status, holds_old) = policy.run(1).await?;
    ensure!(holds_old && condition(&status, "TargetInSync") == ("False", "TargetChanged"), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn a_tag_with_some_platforms_is_left_at_every_run() -> Result<()> {
    let place = Place::new("never-parts").await?;
    let image = |seed| Image::multi_arch(seed, &[1000], &["linux/amd64", "linux/arm64"]);
    place.push(&place.env.source, "agent", "1", &image(1)).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["policy"] = json!({"overwrite": "Never"});
    spec["images"][0]["platforms"] = json!(["linux/amd64"]);
    place.apply("m", &spec).await?;
    place.until_ready("m").await?;
    let first = place.digest_of(&place.env.target, "agent", "1").await?;
    place.push(&place.env.source, "agent", "1", &image(2)).await?;
    for _ in 0..2 {
        let status = place.request("m").await?.status.unwrap_or_default();
        ensure!(states(&status) == [("1", ImageState::Skipped)], "{:?}", status.images);
        ensure!(condition(&status, "TargetInSync") == ("False", "TargetChanged"), "{status:?}");
        ensure!(place.digest_of(&place.env.target, "agent", "1").await? == first);
    }
    Ok(())
}

#[tokio::test]
async fn a_tag_that_others_write_as_often_as_it_is_restored_is_left_to_them() -> Result<()> {
    let policy = Policy::new("flap", &json!({})).await?;
    let place = &policy.place;
    for _ in 0..3 {
        place.push(&place.env.target, "agent", "1", &image(9)).await?;
        let (_, holds_ours) = policy.run(1).await?;
        ensure!(holds_ours, "the tag was not restored");
    }
    place.push(&place.env.target, "agent", "1", &image(9)).await?;
    let (status, holds_theirs) = policy.run(9).await?;
    ensure!(holds_theirs, "the tag was restored a fourth time");
    ensure!(condition(&status, "Ready") == ("False", "TargetChanged"), "{status:?}");
    // One that is gone is nobody else's.
    testenv::Client::new(place.env, &place.env.target)?.delete(&place.repository("agent"), "1").await?;
    let (status, holds_ours) = policy.run(1).await?;
    ensure!(holds_ours && condition(&status, "Ready").0 == "True", "{status:?}");
    Ok(())
}

#[tokio::test]
async fn of_two_mirrors_that_want_one_tag_the_older_keeps_it() -> Result<()> {
    let place = Place::new("conflict").await?;
    push_all(&place, "a/agent", &["1"]).await?;
    place.push(&place.env.source, "b/agent", "1", &image(2)).await?;
    let spec = |name| place.spec(&place.env.source, &place.env.target, &[(name, &["1"])]);
    let mut suspended = spec("a/agent");
    suspended["suspend"] = json!(true);
    place.apply("older", &suspended).await?;
    // Ages are counted in seconds.
    let born = place.mirrors().get("older").await?.metadata.creation_timestamp.context("no creationTimestamp")?.0;
    eventually("the next second", || async { Ok(jiff::Timestamp::now() > born + std::time::Duration::from_secs(1)) })
        .await?;
    place.apply("younger", &spec("b/agent")).await?;
    let _operator = place.operator()?;
    let status = place.until_reason("younger", "Conflict").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("the older ImageMirror \"older\""), "{}", message(&status, "Ready"));
    ensure!(place.digest_of(&place.env.target, "agent", "1").await?.is_none(), "the younger one wrote the tag");
    place.apply("older", &spec("a/agent")).await?;
    place.until_ready("older").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &image(1)).await?);
    place.mirrors().delete("older", &DeleteParams::default()).await?;
    place.until_ready("younger").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &image(2)).await?);
    Ok(())
}

#[tokio::test]
async fn a_tag_belongs_to_the_older_mirror_also_across_namespaces_which_are_not_named() -> Result<()> {
    let (theirs, ours) = (Place::new("conflict-theirs").await?, Place::new("conflict-ours").await?);
    push_all(&theirs, "a/agent", &["1"]).await?;
    push_all(&ours, "b/agent", &["1"]).await?;
    let spec = |place: &Place, name| {
        let mut spec = place.spec(&place.env.source, &place.env.target, &[(name, &["1"])]);
        spec["target"]["repository"] = json!(theirs.repository("agent"));
        spec
    };
    theirs.serve(&ours)?;
    let _operator = theirs.operator()?;
    theirs.apply("first-come", &spec(&theirs, "a/agent")).await?;
    let older = theirs.until_ready("first-come").await?;
    let born = older.metadata.creation_timestamp.context("no creationTimestamp")?.0;
    eventually("the next second", || async { Ok(jiff::Timestamp::now() > born + std::time::Duration::from_secs(1)) })
        .await?;
    ours.apply("m", &spec(&ours, "b/agent")).await?;
    let status = ours.until_reason("m", "Conflict").await?.status.unwrap_or_default();
    let shown = serde_json::to_string(&status)?;
    ensure!(!shown.contains("first-come") && !shown.contains(&format!("{}\"", theirs.namespace)), "{shown}");
    theirs.mirrors().delete("first-come", &DeleteParams::default()).await?;
    ours.until_ready("m").await?;
    Ok(())
}

#[tokio::test]
async fn a_run_that_was_missed_happens_once() -> Result<()> {
    let place = Place::new("calendar").await?;
    push_all(&place, "agent", &["1"]).await?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["schedule"] = json!("0 0 1 1 *");
    spec["timeZone"] = json!("Asia/Kathmandu");
    place.apply("m", &spec).await?;
    let operator = place.operator()?;
    let mirror = place.until_ready("m").await?;
    operator.process.kill().await?;
    let mut status = serde_json::to_value(mirror.status)?;
    status["lastSync"]["finishedAt"] = json!("2020-06-01T00:00:00Z");
    let patch = json!({"status": {"lastSync": status["lastSync"]}});
    place.mirrors().patch_status("m", &PatchParams::default(), &Patch::Merge(&patch)).await?;
    let operator = place.operator()?;
    let finished =
        |status: &ImageMirrorStatus| status.last_sync.as_ref().map(imagemirror::api::v1alpha1::LastSync::finished);
    let old: jiff::Timestamp = "2021-01-01T00:00:00Z".parse()?;
    let mirror = place.until("m", "the missed run", |status| finished(status).is_some_and(|at| at > old)).await?;
    let first = finished(&mirror.status.unwrap_or_default());
    // A run that is asked for is the second one only if no other has come in between.
    let target = place.request("m").await?.status.unwrap_or_default();
    ensure!(finished(&target) >= first);
    // The log is written after the status.
    let runs = || anyhow::Ok(operator.logged()?.matches("run ended").count());
    eventually("the log of two runs", || async { Ok(runs()? >= 2) }).await?;
    ensure!(runs()? == 2, "{} runs", runs()?);
    Ok(())
}

#[tokio::test]
async fn a_registry_is_reached_through_the_proxy_that_is_named_for_it() -> Result<()> {
    let place = Place::new("proxy").await?;
    push_all(&place, "agent", &["1"]).await?;
    let tunnel = Tunnel::start(Some(("tenant", "secret"))).await?;
    let _operator = place.operator()?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["registries"][0]["proxySecretRef"] = json!({"name": "proxy"});
    place.apply("m", &spec).await?;
    place.until_reason("m", "SecretNotFound").await?;
    let url = tunnel.url();
    place.secret("proxy", "Opaque", &[("address", &url), ("username", "tenant"), ("password", "wrong")]).await?;
    let status = place.until_reason("m", "SourceUnavailable").await?.status.unwrap_or_default();
    ensure!(tunnel.refused() > 0 && tunnel.opened().is_empty(), "{:?}", tunnel.opened());
    ensure!(!message(&status, "Ready").contains("wrong"), "{}", message(&status, "Ready"));
    place.secret("proxy", "Opaque", &[("address", &url), ("username", "tenant"), ("password", "secret")]).await?;
    place.until_ready("m").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &image(1)).await?);
    let opened = tunnel.opened();
    ensure!(opened.contains(&place.env.source.host) && !opened.contains(&place.env.target.host), "{opened:?}");
    Ok(())
}

/// The exit code and the output of a command on a mirror of `agent:1`.
fn command(place: &Place, command: &str, changes: &Value) -> Result<(Option<i32>, String)> {
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    for (key, value) in changes.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let mirror = json!({
        "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
        "metadata": {"name": "m", "namespace": place.namespace}, "spec": spec,
    });
    let secret = |name: &str, type_: &str, key: &str, value: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": place.namespace},
            "type": type_, "stringData": {key: value},
        })
    };
    let kind = "kubernetes.io/dockerconfigjson";
    let documents = [
        mirror,
        secret("pull", kind, ".dockerconfigjson", &place.env.source.dockerconfigjson()),
        secret("push", kind, ".dockerconfigjson", &place.env.target.dockerconfigjson()),
        secret("ca", "Opaque", "ca.crt", &place.env.ca_pem),
    ];
    let text: Vec<String> = documents.iter().map(Value::to_string).collect();
    let path = place.env.run_dir.join(format!("{}.{command}.yaml", place.namespace));
    std::fs::write(&path, text.join("\n---\n"))?;
    let output = Command::new(env!("CARGO_BIN_EXE_imagemirror")).arg(command).arg("-f").arg(&path).output()?;
    Ok((output.status.code(), String::from_utf8(output.stdout)?))
}

#[tokio::test]
async fn a_plan_says_what_a_sync_does_and_exit_codes_say_what_came_of_it() -> Result<()> {
    let place = Place::new("plan").await?;
    push_all(&place, "agent", &["1"]).await?;
    let any = json!({});
    let (code, said) = command(&place, "plan", &any)?;
    ensure!(code == Some(4) && said.contains("does not have the tag") && said.contains(", 1.1 kB\n"), "{said}");
    ensure!(place.digest_of(&place.env.target, "agent", "1").await?.is_none(), "the plan wrote the tag");
    let (code, said) = command(&place, "sync", &any)?;
    ensure!(code == Some(0) && said.starts_with("copied"), "{said}");
    let (code, said) = command(&place, "plan", &any)?;
    ensure!(code == Some(0) && said.starts_with("unchanged"), "{said}");

    place.push(&place.env.target, "agent", "1", &image(2)).await?;
    let never = json!({"policy": {"overwrite": "Never"}});
    for subcommand in ["plan", "sync"] {
        let (code, said) = command(&place, subcommand, &never)?;
        let expected = if subcommand == "plan" { 0 } else { 3 };
        ensure!(
            code == Some(expected) && said.starts_with(if expected == 0 { "leave" } else { "left" }),
            "{code:?}: {said}"
        );
    }
    ensure!(place.holds(&place.env.target, "agent", "1", &image(2)).await?);
    let (code, said) = command(&place, "plan", &any)?;
    ensure!(code == Some(4) && said.starts_with("update"), "{said}");
    push_all(&place, "agent", &["1", "2", "3"]).await?;
    let source = format!("{}/{}", place.env.source.host, place.repository("agent"));
    let chosen = json!({"images": [{"source": source, "select": {"pattern": "[23]"}}]});
    let (code, said) = command(&place, "plan", &chosen)?;
    ensure!(code == Some(4) && said.contains("agent:3") && said.contains("2 of 2 tags"), "{said}");
    let (code, said) = command(&place, "validate", &any)?;
    ensure!(code == Some(0) && said.contains("valid"), "{said}");
    let (code, _) = command(&place, "validate", &json!({"policy": {"overwrite": "Sometimes"}}))?;
    ensure!(code == Some(2), "{code:?}");
    Ok(())
}
