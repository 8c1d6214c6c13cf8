//! Which runs start when there are more than places: after a restart, and when a namespace with many objects is beside one
//! with one.

use anyhow::{Result, ensure};
use imagemirror::api::ImageMirrorStatus;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use testenv::{
    images::Image,
    proxy::{Action, Gate, Matcher, Proxy, Route},
};

use crate::support::{Operator, Place, eventually};

/// The look at the target with which a run of a mirrored image begins.
fn looks() -> Matcher {
    Matcher::new().method("HEAD").route(Route::Manifest)
}

/// A mirror of one image to a tag of its own.
fn spec(place: &Place, target: &Proxy, tag: &str) -> Value {
    let source = format!("{}/{}:1", place.env.source.host, place.repository("agent"));
    let mut spec = place.spec(&place.env.source, target.registry(), &[]);
    spec["images"] = json!([{"source": source, "targetTags": [tag]}]);
    spec
}

fn with_runs(runs: usize) -> Value {
    json!({"limits": {"runs": runs}})
}

/// The tags that runs have looked at, in the order in which they began.
fn runs(target: &Proxy) -> Vec<String> {
    let mut runs: Vec<String> = Vec::new();
    for exchange in target.requests().iter().filter(|exchange| looks().matches(&exchange.key, "")) {
        if !runs.contains(&exchange.path) {
            runs.push(exchange.path.clone());
        }
    }
    runs
}

async fn until_queued(operator: &Operator, runs: usize) -> Result<()> {
    let line = format!("imagemirror_queue_depth {runs}\n");
    eventually("the others to wait for their turn", || async { Ok(operator.get("/metrics").await?.1.contains(&line)) })
        .await
}

#[tokio::test]
async fn after_a_restart_what_is_overdue_starts_a_few_at_a_time_and_the_rest_when_it_is_due() -> Result<()> {
    const OVERDUE: usize = 30;
    let place = Place::new("restart").await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let target = Proxy::to(place.env, &place.env.target).start().await?;
    place.pull_secret("push", &[target.registry()]).await?;
    let operator = place.operator()?;
    let names: Vec<String> = (0..OVERDUE + 10).map(|n| format!("m{n}")).collect();
    for name in &names {
        place.apply(name, &spec(&place, &target, name)).await?;
    }
    for name in &names {
        place.until_ready(name).await?;
    }
    operator.process.kill().await?;
    for name in &names[..OVERDUE] {
        let patch = json!({"status": {"lastSync": {"finishedAt": "2020-06-01T00:00:00Z"}}});
        place.mirrors().patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    }

    target.forget();
    let gate = Gate::new();
    // The first of all learns how to log in; nobody else asks before.
    target.rule(looks().skip(1), Action::Gate(gate.clone()));
    // What is held takes its time on a busy machine.
    let patient = json!({"headTimeout": "1m", "leaseDuration": "15s"});
    let operator = place.operator_from(with_runs(3), &patient, "debug")?;
    gate.arrived(3).await?;
    until_queued(&operator, OVERDUE - 3).await?;
    ensure!(runs(&target).len() == 3, "more are under way than may be: {:?}", runs(&target));
    gate.open();
    let old: jiff::Timestamp = "2021-01-01T00:00:00Z".parse()?;
    for name in &names[..OVERDUE] {
        let is_new = |status: &ImageMirrorStatus| status.last_sync.as_ref().is_some_and(|last| last.finished() > old);
        place.until(name, "the overdue run", is_new).await?;
    }
    let log = target.requests();
    let answered =
        log.iter().filter(|exchange| looks().matches(&exchange.key, "") && exchange.status == Some(200)).count();
    ensure!(answered == OVERDUE, "{answered} looks for {OVERDUE} overdue objects");
    Ok(())
}

#[tokio::test]
async fn a_newcomer_does_not_wait_for_runs_of_others_that_do_not_end() -> Result<()> {
    const PLACES: usize = 2;
    let (busy, newcomer) = (Place::new("busy").await?, Place::new("newcomer").await?);
    let target = Proxy::to(busy.env, &busy.env.target).start().await?;
    for place in [&busy, &newcomer] {
        place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
        place.pull_secret("push", &[target.registry()]).await?;
    }
    let gate = Gate::new();
    // The first of all learns how to log in; nobody else asks before.
    target.rule(looks().path_contains(&busy.prefix).skip(1), Action::Gate(gate.clone()));
    busy.serve(&newcomer)?;
    let patient = json!({"headTimeout": "1m", "leaseDuration": "15s"});
    let operator = busy.operator_from(with_runs(PLACES), &patient, "debug")?;
    for n in 0..20 {
        busy.apply(&format!("m{n}"), &spec(&busy, &target, &format!("t{n}"))).await?;
    }
    gate.arrived(PLACES).await?;
    until_queued(&operator, 20 - PLACES).await?;
    newcomer.apply("m", &spec(&newcomer, &target, "t")).await?;
    newcomer.until_ready("m").await?;
    ensure!(runs(&target).len() == PLACES + 1, "others began before the newcomer: {:?}", runs(&target));
    gate.open();
    for n in 0..20 {
        busy.until_ready(&format!("m{n}")).await?;
    }
    Ok(())
}
