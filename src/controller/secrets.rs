//! With `secrets.watch`: the objects to look at because a Secret has changed. Only the metadata of Secrets is asked for, and
//! none of it is kept; an object that is looked at reads what it needs by name, as ever.

use std::sync::Arc;

use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Resource as _,
    core::PartialObjectMeta,
    runtime::{
        reflector::{ObjectRef, Store},
        watcher::{self, Event},
    },
};

use super::{
    context::Context,
    decide::waiting_for_credentials,
    reconcile::Guarded,
    watch::{apis, watch},
};

/// The objects that wait for a Secret, each time that one of their namespace changes.
pub(super) fn awaited(
    context: Arc<Context>,
    objects: Store<Guarded>,
) -> impl Stream<Item = ObjectRef<Guarded>> + Send + 'static {
    let config = Arc::clone(&context.config);
    let apis = if config.watch_secrets { apis(&context.client, &config.watch_namespaces) } else { Vec::new() };
    let watches = apis.into_iter().map(|api| watch(api, config.timing.clone()).boxed());
    stream::select_all(watches).flat_map(move |event| {
        let waiting = forget(&context, event).map(|namespace| waiting(&objects, &namespace));
        stream::iter(waiting.unwrap_or_default())
    })
}

/// Forgets what a Secret said that has changed, and gives its namespace: an empty one if it may be any.
fn forget(context: &Context, event: watcher::Result<Event<PartialObjectMeta<Secret>>>) -> Option<String> {
    match event {
        Ok(Event::Apply(secret)) => {
            let (namespace, name) = (secret.metadata.namespace.unwrap_or_default(), secret.metadata.name);
            context.contents.forget(&namespace, &name.unwrap_or_default());
            Some(namespace)
        }
        // What has changed between two lists is not known.
        Ok(Event::InitDone) => {
            context.contents.forget_all();
            Some(String::new())
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "the watch of Secrets failed");
            None
        }
    }
}

/// What waits there. It reads only what has been forgotten.
fn waiting(objects: &Store<Guarded>, namespace: &str) -> Vec<ObjectRef<Guarded>> {
    let is_there = |object: &Guarded| namespace.is_empty() || object.meta().namespace.as_deref() == Some(namespace);
    let waits = |object: &Guarded| {
        let status = object.0.as_ref().ok().and_then(|mirror| mirror.status.as_ref());
        status.is_some_and(|status| waiting_for_credentials(status).is_some())
    };
    let objects = objects.state().into_iter().filter(|object| is_there(object) && waits(object));
    objects.map(|object| ObjectRef::from_obj(&*object)).collect()
}
