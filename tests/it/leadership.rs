//! Who leads, who follows and how soon, and that of two who believe to lead only one writes tags.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{api::coordination::v1::Lease, apimachinery::pkg::apis::meta::v1::MicroTime};
use kube::{Api, api::PostParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testenv::{
    images::Image,
    proxy::{Action, Exchange, Gate, Matcher, Proxy, Route},
};
use tokio::time::Instant;

use crate::support::{Operator, PATIENCE, Place, eventually};

/// Two replicas and what they copy between.
struct Pair {
    place: Place,
    source: Proxy,
    target: Proxy,
    leader: Operator,
    standby: Operator,
}

impl Pair {
    async fn new(test: &str, timing: &Value) -> Result<Self> {
        let place = Place::new(test).await?;
        let source = Proxy::to(place.env, &place.env.source).label("source").start().await?;
        let target = Proxy::to(place.env, &place.env.target).label("target").start().await?;
        place.pull_secret("pull", &[source.registry()]).await?;
        place.pull_secret("push", &[target.registry()]).await?;
        let leader = place.operator_with(timing, "debug")?;
        eventually("the first to lead", || async { Ok(leader.leads().await) }).await?;
        let standby = place.operator_with(timing, "debug")?;
        eventually("the standby to be ready", || async { Ok(standby.get("/readyz").await?.0 == 200) }).await?;
        ensure!(!standby.leads().await, "there are two leaders");
        Ok(Self { place, source, target, leader, standby })
    }

    /// Applies a mirror of a new image.
    async fn apply(&self, name: &str, seed: u64) -> Result<Image> {
        let image = Image::multi_arch(seed, &[3000], &["linux/amd64", "linux/arm64"]);
        self.place.push(&self.place.env.source, "agent", name, &image).await?;
        let spec = self.place.spec(self.source.registry(), self.target.registry(), &[("agent", &[name])]);
        self.place.apply(name, &spec).await?;
        Ok(image)
    }

    async fn ends_in_step(&self, name: &str, image: &Image) -> Result<()> {
        self.place.until_ready(name).await?;
        ensure!(
            self.place.holds(&self.place.env.target, "agent", name, image).await?,
            "{name} is not whole at the target"
        );
        let violations = self.target.violations();
        ensure!(violations.is_empty(), "manifests were written before their children: {violations:?}");
        Ok(())
    }

    fn tag_writes(&self, name: &str) -> usize {
        self.target.count(&Matcher::new().method("PUT").route(Route::Manifest).reference(name))
    }

    /// Stops the leader between two requests, after the answer to the `nth` on one side has come, and lets it go on when
    /// the other has done its work: then it writes no tag any more.
    async fn pause(&mut self, side: &str, nth: u32, seed: u64) -> Result<()> {
        let (gate, name) = (Gate::new(), format!("{side}-{nth}"));
        let proxy = if side == "source" { &self.source } else { &self.target };
        proxy.rule(Matcher::new().skip(nth - 1).times(1), Action::GateAnswer(gate.clone()));
        let image = self.apply(&name, seed).await?;
        gate.arrived(1).await.with_context(|| format!("{name}: there are fewer requests"))?;
        proxy.clear();
        self.leader.process.signal(Signal::SIGSTOP)?;
        gate.open();
        self.ends_in_step(&name, &image).await?;
        let written = self.tag_writes(&name);
        // Not by its metrics: on a busy machine it may lead again before anybody looks.
        let losses = || anyhow::Ok(self.leader.logged()?.matches("lease lost").count());
        let before = losses()?;
        self.leader.process.signal(Signal::SIGCONT)?;
        eventually("the old leader to know", || async { Ok(losses()? > before) }).await?;
        ensure!(self.tag_writes(&name) == written, "{name}: the old leader wrote a tag after the new one");
        eventually("one of them to lead", || async { Ok(self.standby.leads().await || self.leader.leads().await) })
            .await?;
        if self.standby.leads().await {
            std::mem::swap(&mut self.leader, &mut self.standby);
        }
        Ok(())
    }
}

/// As in a cluster: what is promised are times.
fn defaults() -> Value {
    json!({
        "apiTimeout": "10s", "leaseDuration": "15s", "leaseRenew": "3s", "tagWriteTimeout": "8s", "tagWriteMargin": "9s",
        "shutdown": "20s", "headTimeout": "30s", "idleTimeout": "30s",
    })
}

/// Applies a mirror and waits until an upload of its copy has been answered, which nobody hears until the gate is open.
async fn copying(pair: &Pair, name: &str, seed: u64) -> Result<(Image, Gate)> {
    let gate = Gate::new();
    let start = Matcher::new().method("PUT").route(Route::Upload).times(1);
    pair.target.rule(start, Action::GateAnswer(gate.clone()));
    let image = pair.apply(name, seed).await?;
    gate.arrived(1).await?;
    Ok((image, gate))
}

#[tokio::test]
async fn a_leader_that_is_killed_is_followed_within_twenty_seconds() -> Result<()> {
    let mut pair = Pair::new("killed", &defaults()).await?;
    let (image, _gate) = copying(&pair, "m", 400).await?;
    pair.leader.process.signal(Signal::SIGKILL)?;
    let killed = Instant::now();
    pair.leader.process.wait().await?;
    pair.place.until_ready("m").await?;
    ensure!(killed.elapsed() < Duration::from_secs(20), "it took {:?}", killed.elapsed());
    pair.ends_in_step("m", &image).await
}

#[tokio::test]
async fn a_leader_that_is_told_to_end_is_followed_within_three_seconds() -> Result<()> {
    let mut pair = Pair::new("ended", &defaults()).await?;
    let (image, _gate) = copying(&pair, "m", 410).await?;
    pair.target.forget();
    pair.leader.process.signal(Signal::SIGTERM)?;
    let told = Instant::now();
    eventually("the other to lead", || async { Ok(pair.standby.leads().await) }).await?;
    ensure!(told.elapsed() < Duration::from_secs(3), "it took {:?}", told.elapsed());
    let ended = tokio::time::timeout(Duration::from_secs(25), pair.leader.process.wait()).await??;
    ensure!(ended.success(), "it ended with {ended}");
    // Cancelled, or found to have ended: its last byte may have been on its way.
    let log = pair.target.requests();
    let given_up = log
        .iter()
        .filter(|one| one.key.route == Route::Upload)
        .any(|one| one.key.method == "DELETE" || (one.key.method == "GET" && one.status == Some(404)));
    ensure!(given_up, "no upload was given up: {log:#?}");
    ensure!(pair.leader.logged()?.contains("lease given up"));
    pair.ends_in_step("m", &image).await?;
    // The last one leaves nobody's lease.
    pair.standby.process.signal(Signal::SIGTERM)?;
    ensure!(pair.standby.process.wait().await?.success());
    let holder = pair.place.kubectl(&["get", "lease", "imagemirror", "-o", "jsonpath={.spec.holderIdentity}"])?;
    ensure!(holder.is_empty(), "the lease is still held by {holder:?}");
    Ok(())
}

#[tokio::test]
async fn a_target_that_says_nothing_does_not_hold_up_the_end() -> Result<()> {
    let mut pair = Pair::new("mute", &json!({"cancelTimeout": "300ms"})).await?;
    let (_, _gate) = copying(&pair, "m", 412).await?;
    pair.target.rule(Matcher::new(), Action::Stall);
    pair.leader.process.signal(Signal::SIGTERM)?;
    let ended = tokio::time::timeout(Duration::from_secs(4), pair.leader.process.wait()).await??;
    ensure!(ended.success() && pair.leader.logged()?.contains("lease given up"), "it ended with {ended}");
    eventually("the other to lead", || async { Ok(pair.standby.leads().await) }).await
}

/// Some points of twenty: four tests, so that they are taken side by side.
async fn pauses(test: &str, side: &str, points: std::ops::RangeInclusive<u32>) -> Result<()> {
    let mut pair = Pair::new(test, &json!({})).await?;
    for nth in points {
        pair.pause(side, nth, 420 + u64::from(nth)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_leader_that_slept_while_it_read_the_source_writes_no_tag() -> Result<()> {
    pauses("slept1", "source", 1..=4).await
}

#[tokio::test]
async fn a_leader_that_slept_while_it_copied_from_the_source_writes_no_tag() -> Result<()> {
    pauses("slept2", "source", 5..=8).await
}

#[tokio::test]
async fn a_leader_that_slept_while_it_wrote_to_the_target_writes_no_tag() -> Result<()> {
    pauses("slept3", "target", 1..=6).await
}

#[tokio::test]
async fn a_leader_that_slept_while_it_wrote_the_last_of_it_writes_no_tag() -> Result<()> {
    pauses("slept4", "target", 7..=12).await
}

#[tokio::test]
async fn a_leader_that_cannot_renew_begins_to_write_no_tag() -> Result<()> {
    // A tag is begun only in the half second after a renewal.
    let times = json!({"leaseDuration": "6s", "leaseRenew": "500ms", "tagWriteMargin": "5500ms"});
    let place = Place::new("fenced").await?;
    let api = place.api_proxy().await?;
    let target = Proxy::to(place.env, &place.env.target).label("target").start().await?;
    place.pull_secret("push", &[target.registry()]).await?;
    let image = Image::multi_arch(440, &[3000], &["linux/amd64", "linux/arm64"]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let gate = Gate::new();
    let manifests = |reference: &str| Matcher::new().method("PUT").route(Route::Manifest).reference(reference);
    target.rule(manifests(&image.manifests[1].digest), Action::GateAnswer(gate.clone()));
    let operator = place.operator_with(&times, "debug")?;
    place.apply("m", &place.spec(&place.env.source, target.registry(), &[("agent", &["1"])])).await?;
    gate.arrived(1).await?;
    let renewals = Matcher::new().path_contains("/leases/imagemirror");
    api.rule(renewals.clone(), Action::Stall);
    let stalled = |log: &[Exchange]| log.iter().filter(|exchange| !exchange.actions.is_empty()).count();
    // The second comes when the first was given up: the half second is over, the lease is not.
    api.wait_for(|log| stalled(log) >= 2, PATIENCE).await?;
    gate.open();
    let knows = || async { Ok(operator.get("/metrics").await?.1.contains("imagemirror_leader 0")) };
    eventually("the leader to know that it leads no more", knows).await?;
    ensure!(target.count(&manifests("1")) == 0, "a tag was begun to be written without time to end it");
    api.clear();
    place.until_ready("m").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &image).await?);
    Ok(())
}

/// Writes the lease as somebody whose clock is off by so much, if it is as wanted.
async fn write(leases: &Api<Lease>, off: SignedDuration, change: impl FnOnce(&mut Lease)) -> Result<()> {
    let mut lease = leases.get("imagemirror").await?;
    change(&mut lease);
    let spec = lease.spec.as_mut().context("spec")?;
    spec.renew_time = Some(MicroTime(Timestamp::now().checked_add(off)?));
    match leases.replace("imagemirror", &PostParams::default(), &lease).await {
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(()),
        outcome => Ok(outcome.map(|_| ())?),
    }
}

/// How often the lease was asked for.
fn looks(api: &Proxy) -> usize {
    api.count(&Matcher::new().method("GET").path_contains("/leases/imagemirror"))
}

#[tokio::test]
async fn clocks_an_hour_apart_neither_take_a_lease_nor_lose_one() -> Result<()> {
    let place = Place::new("clocks").await?;
    let api = place.api_proxy().await?;
    let leases: Api<Lease> = Api::namespaced(place.client.clone(), &place.namespace);
    let lease = json!({"metadata": {"name": "imagemirror"}, "spec": {"holderIdentity": "other", "leaseDurationSeconds": 2, "leaseTransitions": 0}});
    leases.create(&PostParams::default(), &serde_json::from_value(lease)?).await?;
    let operator = place.operator()?;
    for hours in [-1, 1] {
        let off = SignedDuration::from_hours(hours);
        let taken = || async { leases.get("imagemirror").await?.spec.context("spec") };
        // Alive, and twice as long as its lease lasts: it looks every quarter of a second, half as often when busy.
        // Said again as long as it is not heard: a busy operator may hear of it when the lease has run out.
        eventually("the operator to stand by", || async {
            write(&leases, off, |lease| lease.spec.get_or_insert_default().holder_identity = Some("other".into()))
                .await?;
            Ok(!operator.leads().await)
        })
        .await?;
        let before = taken().await?.lease_transitions.unwrap_or_default();
        api.forget();
        let started = Instant::now();
        while looks(&api) < 8 || started.elapsed() < Duration::from_secs(4) {
            write(&leases, off, |_| ()).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(
            taken().await?.holder_identity.as_deref() == Some("other"),
            "{hours} h: a lease that is held was taken"
        );
        // Dead: taken as soon as it has not changed for its two seconds, whatever its times say.
        let died = Instant::now();
        eventually("the operator to take the lease", || async { Ok(operator.leads().await) }).await?;
        ensure!(died.elapsed() < Duration::from_secs(10), "{hours} h: it took {:?}", died.elapsed());
        // The holder's own record, as if our clock were off: nothing but its name says whose it is.
        let standby = place.operator()?;
        for _ in 0..10 {
            write(&leases, off, |_| ()).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(operator.leads().await && !standby.leads().await, "{hours} h: the lease was lost for a time in it");
        ensure!(taken().await?.lease_transitions == Some(before + 1), "{hours} h");
    }
    Ok(())
}
