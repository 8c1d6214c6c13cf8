//! Events: one summary for each transition, never one for each image. Best effort: an event that cannot be written
//! fails nothing.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use super::context::Identity;

/// Longer notes are refused by the API server.
const MAX_NOTE: usize = 1000;

/// Writes events.
#[derive(Clone)]
pub(super) struct Events {
    recorder: Recorder,
    deadline: Duration,
}

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) reason: &'static str,
    pub(super) is_warning: bool,
    pub(super) note: String,
}

impl Events {
    pub(super) fn new(client: Client, instance: String, deadline: Duration) -> Self {
        let reporter = Reporter { controller: "imagemirror".into(), instance: Some(instance) };
        Self { recorder: Recorder::new(client, reporter), deadline }
    }

    pub(super) async fn publish(&self, id: &Identity, summary: Summary) {
        let event = Event {
            type_: if summary.is_warning { EventType::Warning } else { EventType::Normal },
            reason: summary.reason.into(),
            note: Some(summary.note.chars().take(MAX_NOTE).collect()),
            action: "Sync".into(),
            secondary: None,
        };
        let regarding = ObjectReference {
            api_version: Some("imagemirror.dev/v1alpha1".into()),
            kind: Some("ImageMirror".into()),
            name: Some(id.name.clone()),
            namespace: Some(id.namespace.clone()),
            uid: Some(id.uid.clone()),
            ..ObjectReference::default()
        };
        match tokio::time::timeout(self.deadline, self.recorder.publish(&event, &regarding)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "an event was not written"),
            Err(_) => tracing::debug!("an event was not written in time"),
        }
    }
}
