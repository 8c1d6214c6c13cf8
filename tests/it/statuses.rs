//! Every status that the operator writes in a place, watched beside its test and held against the rules by which
//! `kubectl wait`, Flux, Helm and Argo CD read one (kstatus). A place looks when it is dropped: no test can forget to.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, mpsc},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use imagemirror::api::{ImageMirror, ImageMirrorStatus};
use kube::{
    Api, ResourceExt as _,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, WatchEvent, WatchParams},
};
use serde_json::{Value, json};
use testenv::{Env, images::Image};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, Place, admin, eventually};

/// The operator's field manager.
const MANAGER: &str = "imagemirror";
const MAX_STATUS: usize = 64 << 10;

/// An object as it was written once.
#[derive(Clone, Debug)]
struct Seen {
    uid: String,
    name: String,
    version: String,
    generation: i64,
    spec: Value,
    status: Value,
    /// The operator has written the status, and not only a test.
    is_ours: bool,
}

/// A running watch of one namespace.
pub(crate) struct Watch {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: CancellationToken,
    ended: mpsc::Receiver<Result<()>>,
}

/// Apart from the tests' own runtimes: those stand still while a test blocks, and while a place is dropped.
#[allow(clippy::expect_used, reason = "without it there is no test")]
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).thread_name("statuses").enable_all().build().expect("a runtime")
});

impl Watch {
    pub(crate) fn start(env: &'static Env, namespace: &str) -> Self {
        let seen = Arc::default();
        let stop = CancellationToken::new();
        let (end, ended) = mpsc::channel();
        let watch = watch(env, namespace.to_owned(), Arc::clone(&seen), stop.clone());
        RUNTIME.spawn(async move { end.send(watch.await) });
        Self { seen, stop, ended }
    }

    /// The statuses of an object, one after the other.
    pub(crate) fn seen(&self, name: &str) -> Vec<Value> {
        let seen = lock(&self.seen);
        let mut statuses: Vec<Value> =
            seen.iter().filter(|seen| seen.name == name).map(|seen| seen.status.clone()).collect();
        statuses.dedup();
        statuses
    }

    /// An object as it was after each write, without most of its metadata.
    pub(crate) fn objects(&self, name: &str) -> Vec<Value> {
        let seen = lock(&self.seen);
        let object = |seen: &Seen| {
            json!({
                "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
                "metadata": {"name": seen.name, "generation": seen.generation},
                "spec": seen.spec, "status": seen.status,
            })
        };
        seen.iter().filter(|seen| seen.name == name).map(object).collect()
    }

    /// What was wrong with the statuses that were written until now.
    pub(crate) fn finish(&self) -> Vec<String> {
        self.stop.cancel();
        match self.ended.recv_timeout(PATIENCE) {
            Ok(Ok(())) => violations(&lock(&self.seen)),
            Ok(Err(error)) => vec![format!("the watch of statuses failed: {error:#}")],
            Err(_) => vec!["the watch of statuses did not end".to_owned()],
        }
    }
}

fn lock(seen: &Mutex<Vec<Seen>>) -> MutexGuard<'_, Vec<Seen>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records every write until `stop`, and then until the objects that there are have been seen as they are.
async fn watch(env: &Env, namespace: String, seen: Arc<Mutex<Vec<Seen>>>, stop: CancellationToken) -> Result<()> {
    let client = admin(env).await?;
    let api: Api<DynamicObject> = Api::namespaced_with(client, &namespace, &ApiResource::erase::<ImageMirror>(&()));
    let mut version = "0".to_owned();
    let mut wanted: Option<Vec<(Option<String>, Option<String>)>> = None;
    loop {
        let mut events = api.watch(&WatchParams::default(), &version).await?.boxed();
        loop {
            let is_seen = |(uid, version): &(Option<String>, Option<String>)| {
                let is = |seen: &Seen| Some(&seen.uid) == uid.as_ref() && Some(&seen.version) == version.as_ref();
                lock(&seen).iter().any(is)
            };
            if wanted.as_ref().is_some_and(|wanted| wanted.iter().all(is_seen)) {
                return Ok(());
            }
            let event = tokio::select! {
                () = stop.cancelled(), if wanted.is_none() => {
                    let objects = api.list(&ListParams::default()).await?;
                    wanted = Some(objects.iter().map(|object| (object.uid(), object.resource_version())).collect());
                    continue;
                }
                event = events.try_next() => event?,
            };
            match event {
                Some(WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object)) => {
                    version = object.resource_version().context("no resourceVersion")?;
                    lock(&seen).push(Seen::of(&object, version.clone()));
                }
                Some(WatchEvent::Bookmark(bookmark)) => version = bookmark.metadata.resource_version,
                Some(WatchEvent::Error(error)) => bail!("{error:?}"),
                // The API server ends every watch some time.
                None => break,
            }
        }
    }
}

impl Seen {
    fn of(object: &DynamicObject, version: String) -> Self {
        let is_operators = |entry: &&k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry| {
            let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
            entry.manager.as_deref() == Some(MANAGER)
                && fields.is_some_and(|fields| fields["f:status"]["f:observedGeneration"].is_object())
        };
        Self {
            uid: object.uid().unwrap_or_default(),
            name: object.name_any(),
            version,
            generation: object.metadata.generation.unwrap_or_default(),
            spec: object.data["spec"].clone(),
            status: object.data["status"].clone(),
            is_ours: object.managed_fields().iter().find(is_operators).is_some(),
        }
    }

    fn conditions(&self) -> HashMap<&str, &Value> {
        let conditions = self.status["conditions"].as_array().into_iter().flatten();
        conditions.map(|condition| (text(condition, "type"), condition)).collect()
    }

    /// The rules that one status has to keep.
    fn wrong(&self) -> Vec<String> {
        let conditions = self.conditions();
        let state = |kind| conditions.get(kind).map(|condition| text(condition, "status"));
        let (ready, reconciling, stalled) = (state("Ready"), state("Reconciling"), state("Stalled"));
        let observed = self.status["observedGeneration"].as_i64();
        let size = self.status.to_string().len();
        let is_empty = |list: &str| self.status[list].as_array().is_none_or(Vec::is_empty);
        let is_behind = |condition: &&Value| condition["observedGeneration"].as_i64() != observed;
        let is_unknown = |condition: &&Value| {
            let known = ["Ready", "Reconciling", "Stalled", "CredentialsResolved", "TargetInSync"];
            let reason: Result<imagemirror::api::Reason, _> = serde_json::from_value(condition["reason"].clone());
            !known.contains(&text(condition, "type")) || reason.is_err()
        };
        let rules = [
            (!matches!(ready, Some("True" | "False" | "Unknown")), "Ready is always there"),
            (reconciling.is_some_and(|state| state != "True"), "Reconciling is there only while it is true"),
            (stalled.is_some_and(|state| state != "True"), "Stalled is there only while it is true"),
            (reconciling.is_some() && stalled.is_some(), "never both Reconciling and Stalled"),
            (
                ready == Some("True") && (reconciling.is_some() || stalled.is_some()),
                "nothing abnormal beside Ready=True",
            ),
            (ready == Some("Unknown") && reconciling.is_none(), "Ready=Unknown only beside Reconciling"),
            (ready == Some("True") && !is_empty("failures"), "no failures beside Ready=True"),
            (ready == Some("True") && !self.status["lastSync"].is_object(), "Ready=True only after a run"),
            (
                self.status["progress"].is_object() && state("TargetInSync") != Some("False"),
                "progress only while not in sync",
            ),
            (observed.is_none_or(|observed| observed > self.generation), "observedGeneration is one that there was"),
            (conditions.values().any(is_behind), "conditions are about the generation of the status"),
            (conditions.values().any(is_unknown), "types and reasons are of the closed lists"),
            (size > MAX_STATUS, "a status is at most 64 KiB"),
        ];
        rules.into_iter().filter(|(is_broken, _)| *is_broken).map(|(_, rule)| rule.to_owned()).collect()
    }

    /// The rules that a status has to keep that follows another.
    fn wrong_after(&self, before: &Self) -> Vec<String> {
        let mut wrong = Vec::new();
        let observed = |seen: &Self| seen.status["observedGeneration"].as_i64();
        if observed(self) < observed(before) {
            wrong.push("observedGeneration never goes back".to_owned());
        }
        let earlier = before.conditions();
        for (kind, condition) in self.conditions() {
            let Some(earlier) = earlier.get(kind) else { continue };
            let at = |condition: &Value| text(condition, "lastTransitionTime").to_owned();
            if earlier["status"] == condition["status"] && at(earlier) != at(condition) {
                wrong.push(format!("lastTransitionTime of {kind} moves only with its status"));
            }
            if at(earlier) > at(condition) {
                wrong.push(format!("lastTransitionTime of {kind} never goes back"));
            }
        }
        wrong
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// Every rule that a status of the operator's broke.
fn violations(seen: &[Seen]) -> Vec<String> {
    let mut last: HashMap<&str, &Seen> = HashMap::new();
    let mut violations = Vec::new();
    for now in seen {
        let before = last.insert(&now.uid, now);
        if !now.is_ours || before.is_some_and(|before| before.status == now.status) {
            continue;
        }
        let mut wrong = now.wrong();
        if let Some(before) = before.filter(|before| before.is_ours) {
            wrong.extend(now.wrong_after(before));
        }
        violations
            .extend(wrong.into_iter().map(|rule| format!("{}: {rule}: {:.600}", now.name, now.status.to_string())));
    }
    violations
}

#[tokio::test]
async fn a_healthy_idle_object_gets_one_write_a_run() -> Result<()> {
    let place = Place::new("idle").await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    place.apply("m", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    let operator = place.operator()?;
    let status = place.until_ready("m").await?.status.unwrap_or_default();
    operator.process.kill().await?;
    // As if it had been long ago: the next operator makes the run that is due.
    let mut old = serde_json::to_value(status)?;
    let long_ago = json!("2020-06-01T00:00:00Z");
    old["lastSync"]["finishedAt"] = long_ago.clone();
    let patch = Patch::Merge(json!({"status": old}));
    place.mirrors().patch_status("m", &PatchParams::default(), &patch).await?;
    let _operator = place.operator()?;
    let year =
        |status: &ImageMirrorStatus| status.last_sync.as_ref().map(|last| last.finished().as_second() / 31_556_952);
    place.until("m", "the run that was due", |status| year(status) > Some(52)).await?;
    // What came after it would stand before what is asked for now, which is said when it begins and when it has ended.
    let status = serde_json::to_value(place.request("m").await?.status)?;
    let is_last = || async { Ok(place.statuses.seen("m").last() == Some(&status)) };
    eventually("the watch to see it", is_last).await?;
    let written = place.statuses.seen("m");
    let at = written.iter().position(|status| status["lastSync"]["finishedAt"] == long_ago).context("no old status")?;
    let [_, due, begun, ended] = &written[at..] else {
        bail!("{} statuses were written: {:#?}", written.len() - at - 1, &written[at + 1..]);
    };
    let without_run = |status: &Value| {
        let mut status = status.clone();
        status["lastSync"] = Value::Null;
        status
    };
    ensure!(without_run(due) == without_run(&old), "more than lastSync was written: {due}");
    ensure!(begun["lastSync"] == due["lastSync"] && begun["conditions"][0]["status"] == "Unknown", "{begun}");
    ensure!(ended["lastHandledReconcileAt"].is_string() && begun["lastHandledReconcileAt"].is_null(), "{ended}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(kind: &str, status: &str, generation: i64, time: &str) -> Value {
        json!({"type": kind, "status": status, "reason": "Progressing", "observedGeneration": generation, "lastTransitionTime": time})
    }

    fn seen(status: &Value) -> Seen {
        let (uid, name, version) = ("u".to_owned(), "m".to_owned(), "1".to_owned());
        Seen { uid, name, version, generation: 2, spec: Value::Null, status: status.clone(), is_ours: true }
    }

    #[test]
    fn each_rule_is_seen_to_be_broken() {
        let ready = |state, others: &[(&str, &str)]| {
            let mut conditions = vec![condition("Ready", state, 1, "1")];
            conditions.extend(others.iter().map(|(kind, state)| condition(kind, state, 1, "1")));
            json!({"observedGeneration": 1, "conditions": conditions, "lastSync": {}})
        };
        let with = |mut status: Value, field: &str, value: Value| {
            status[field] = value;
            status
        };
        let good = ready("True", &[("TargetInSync", "True")]);
        let busy = ready("Unknown", &[("Reconciling", "True"), ("TargetInSync", "False")]);
        for status in [&good, &busy, &ready("False", &[("Stalled", "True")]), &ready("False", &[])] {
            assert_eq!(violations(&[seen(status)]), [""; 0]);
        }
        for (status, rule) in [
            (with(good.clone(), "conditions", json!([])), "always there"),
            (ready("False", &[("Reconciling", "False")]), "only while it is true"),
            (ready("False", &[("Stalled", "False")]), "only while it is true"),
            (ready("False", &[("Stalled", "True"), ("Reconciling", "True")]), "never both"),
            (ready("True", &[("Reconciling", "True")]), "nothing abnormal"),
            (ready("Unknown", &[]), "only beside Reconciling"),
            (ready("False", &[("Synced", "True")]), "closed lists"),
            (with(good.clone(), "failures", json!([{}])), "no failures"),
            (with(good.clone(), "lastSync", Value::Null), "only after a run"),
            (with(good.clone(), "progress", json!({})), "progress only"),
            (with(good.clone(), "observedGeneration", json!(3)), "one that there was"),
            (with(good.clone(), "observedGeneration", json!(0)), "about the generation"),
            (with(good.clone(), "synced", json!("x".repeat(MAX_STATUS))), "64 KiB"),
        ] {
            let found = violations(&[seen(&status)]);
            assert!(found.iter().any(|found| found.contains(rule)), "{rule}: {found:?}");
        }
        let moved = |generation, state, time| json!({"observedGeneration": generation, "conditions": [condition("Ready", state, generation, time)], "lastSync": {}});
        for (before, after, rule) in [
            (moved(2, "True", "1"), moved(1, "True", "1"), "never goes back"),
            (moved(1, "True", "1"), moved(1, "True", "2"), "moves only with"),
            (moved(1, "True", "2"), moved(1, "False", "1"), "never goes back"),
        ] {
            let found = violations(&[seen(&before), seen(&after)]);
            assert!(found.iter().any(|found| found.contains(rule)), "{rule}: {found:?}");
        }
        assert_eq!(violations(&[seen(&moved(1, "True", "1")), seen(&moved(1, "False", "2"))]), [""; 0]);
    }
}
