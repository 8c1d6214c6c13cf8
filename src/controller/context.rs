//! What every reconcile shares.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use kube::{
    Api, Client, Resource as _,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
};
use serde_json::json;

use super::{
    error::{Error, call},
    events::Events,
    reconcile::Guarded,
    runner::Runner,
    shared::Shared,
};
use crate::{
    api::{ConditionType, ImageMirror, ImageMirrorStatus},
    config::Config,
    mirror::Account,
    oci::Digest,
    telemetry::{metrics::Metrics, server::Gates},
};

/// The field manager of everything we write.
const MANAGER: &str = "imagemirror";

/// What every reconcile shares.
pub(super) struct Context {
    pub(super) client: Client,
    pub(super) config: Arc<Config>,
    pub(super) runner: Runner,
    pub(super) events: Events,
    pub(super) metrics: Arc<Metrics>,
    pub(super) gates: Gates,
    /// What Secrets said when they were last read, by their contents' digests.
    pub(super) contents: Shared<Digest>,
    /// What ServiceAccounts said when they were last read.
    pub(super) accounts: Shared<Account>,
    /// What we last wrote of each object, by uid, for as long as the watch has not shown it to us.
    written: Mutex<HashMap<String, Written>>,
}

#[derive(Clone)]
struct Written {
    resource_version: String,
    status: ImageMirrorStatus,
}

/// An object as far as reconciling needs to know it.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

/// The newest status that we know of, and the version of the object that it belongs to.
#[derive(Clone, Debug)]
pub(super) struct Current {
    pub(super) status: ImageMirrorStatus,
    pub(super) resource_version: Option<String>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Context {
    pub(super) fn new(
        client: Client,
        config: Arc<Config>,
        runner: Runner,
        events: Events,
        metrics: Arc<Metrics>,
        gates: Gates,
    ) -> Self {
        let (contents, accounts) = (Shared::default(), Shared::default());
        Self { client, config, runner, events, metrics, gates, contents, accounts, written: Mutex::default() }
    }

    /// The status of the object, or what we wrote since the watch showed it to us.
    pub(super) fn current(&self, id: &Identity, mirror: &ImageMirror) -> Current {
        let shown = Current {
            status: mirror.status.clone().unwrap_or_default(),
            resource_version: mirror.metadata.resource_version.clone(),
        };
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        match written.get(&id.uid) {
            Some(ours) if is_newer(&ours.resource_version, shown.resource_version.as_deref()) => {
                Current { status: ours.status.clone(), resource_version: Some(ours.resource_version.clone()) }
            }
            Some(_) => {
                written.remove(&id.uid);
                shown
            }
            None => shown,
        }
    }

    /// The status of an object that cannot be read: what we last wrote of it, if nobody has written it since.
    pub(super) fn unread(&self, id: &Identity, resource_version: Option<String>) -> Current {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = written.get(&id.uid).filter(|ours| Some(&ours.resource_version) == resource_version.as_ref());
        Current { status: ours.map(|ours| ours.status.clone()).unwrap_or_default(), resource_version }
    }

    /// The object as it is stored, whatever it is.
    pub(super) async fn stored(&self, id: &Identity) -> Result<serde_json::Value, Error> {
        let kind = ApiResource::erase::<ImageMirror>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &id.namespace, &kind);
        Ok(call("reading the object", self.config.timing.api_timeout, api.get(&id.name)).await?.data)
    }

    /// Forgets an object that is gone.
    pub(super) fn forget(&self, uid: &str, namespace: &str, name: &str) {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.metrics.forget(namespace, name);
    }

    /// Writes a status if it differs from the current one. The write is refused if somebody wrote the object since.
    pub(super) async fn apply(
        &self,
        id: &Identity,
        current: &mut Current,
        status: ImageMirrorStatus,
    ) -> Result<(), Error> {
        if status == current.status {
            return Ok(());
        }
        let patch = Patch::Apply(json!({
            "apiVersion": "imagemirror.dev/v1alpha1",
            "kind": "ImageMirror",
            "metadata": {"name": id.name, "uid": id.uid, "resourceVersion": current.resource_version},
            "status": status,
        }));
        self.write(id, current, status, &PatchParams::apply(MANAGER).force(), &patch).await
    }

    /// Writes a status where the API server cannot apply one, because what is stored does not have the schema's types.
    /// Nobody owns what is written so: a condition that the next status does not have would stay.
    pub(super) async fn overwrite(
        &self,
        id: &Identity,
        current: &mut Current,
        status: ImageMirrorStatus,
    ) -> Result<(), Error> {
        let patch = json!({"metadata": {"uid": id.uid, "resourceVersion": current.resource_version}, "status": status});
        self.write(id, current, status, &PatchParams::default(), &Patch::Merge(patch)).await
    }

    async fn write(
        &self,
        id: &Identity,
        current: &mut Current,
        status: ImageMirrorStatus,
        params: &PatchParams,
        patch: &Patch<serde_json::Value>,
    ) -> Result<(), Error> {
        // Guarded: the answer for an object that does not fit our types does not fit them either.
        let api: Api<Guarded> = Api::namespaced(self.client.clone(), &id.namespace);
        let write = api.patch_status(&id.name, params, patch);
        let object = call("writing the status", self.config.timing.api_timeout, write).await?;
        let resource_version = object.meta().resource_version.clone();
        log_transition(&current.status, &status);
        *current = Current { status, resource_version: resource_version.clone() };
        if let Some(resource_version) = resource_version {
            let ours = Written { resource_version, status: current.status.clone() };
            self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(id.uid.clone(), ours);
        }
        self.observe(id, &current.status);
        Ok(())
    }

    /// Shows a status in the metrics, also one that this replica did not write.
    pub(super) fn observe(&self, id: &Identity, status: &ImageMirrorStatus) {
        let summary = status.summary.unwrap_or_default();
        let conditions: Vec<_> =
            status.conditions.iter().map(|condition| (condition.type_.as_str(), condition.status.as_str())).collect();
        self.metrics.observe_status(&id.namespace, &id.name, &summary, &conditions);
        let is_ready = conditions.contains(&("Ready", "True"));
        if let Some(last) = status.last_sync.as_ref().filter(|_| is_ready) {
            self.metrics.observe_success(&id.namespace, &id.name, last.finished());
        }
    }
}

/// One line where the object is another for those who wait for it.
fn log_transition(before: &ImageMirrorStatus, after: &ImageMirrorStatus) {
    let ready = |status: &ImageMirrorStatus| {
        status.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str()).cloned()
    };
    let (Some(now), before) = (ready(after), ready(before)) else { return };
    if before.is_none_or(|before| (before.status, before.reason) != (now.status.clone(), now.reason.clone())) {
        tracing::info!(ready = now.status, reason = now.reason, note = now.message, "the object's state has changed");
    }
}

/// Resource versions of one kind are numbers that grow (KEP-5504).
fn is_newer(ours: &str, shown: Option<&str>) -> bool {
    match (ours.parse::<u64>(), shown.and_then(|shown| shown.parse::<u64>().ok())) {
        (Ok(ours), Some(shown)) => ours > shown,
        _ => false,
    }
}
