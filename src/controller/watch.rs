//! The objects of one or more namespaces as one stream of changes, and word of every object that is gone: also of one
//! whose deletion was missed while the watch was down.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{Stream, StreamExt as _, stream};
use kube::{
    Api, Client, Resource as _,
    core::{DeserializeGuard, ObjectMeta, error_boundary::InvalidObject},
    runtime::{WatchStreamExt as _, watcher},
};

use super::reconcile::Guarded;

type Change = watcher::Result<watcher::Event<Guarded>>;

/// Changes in these namespaces, or in all where none is named. `gone` hears of every object that does not exist any
/// more, before the change that says so.
pub(super) fn changes(
    client: &Client,
    namespaces: &[String],
    gone: &Arc<dyn Fn(&ObjectMeta) + Send + Sync>,
) -> impl Stream<Item = Change> + Send + 'static {
    let apis: Vec<Api<Guarded>> = match namespaces {
        [] => vec![Api::all(client.clone())],
        named => named.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect(),
    };
    let scopes = apis.into_iter().map(|api| {
        let mut scope = Scope { known: HashMap::new(), listed: None, gone: Arc::clone(gone) };
        watcher(api, watcher::Config::default())
            .default_backoff()
            .flat_map(move |event| stream::iter(scope.changes(event)))
            .boxed()
    });
    // Several lists make one store: it is complete as soon as it may hold anything, and each list is told apart here.
    let opening = [Ok(watcher::Event::Init), Ok(watcher::Event::InitDone)];
    stream::iter(opening).chain(stream::select_all(scopes))
}

/// What one watch has shown.
struct Scope {
    known: HashMap<(String, String), ObjectMeta>,
    listed: Option<HashSet<(String, String)>>,
    gone: Arc<dyn Fn(&ObjectMeta) + Send + Sync>,
}

impl Scope {
    fn changes(&mut self, event: Change) -> Vec<Change> {
        match event {
            Err(error) => vec![Err(error)],
            Ok(watcher::Event::Init) => {
                self.listed = Some(HashSet::new());
                Vec::new()
            }
            Ok(watcher::Event::InitApply(object)) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(key(object.meta()));
                }
                self.seen(object)
            }
            Ok(watcher::Event::InitDone) => self.missing(),
            Ok(watcher::Event::Apply(object)) => self.seen(object),
            Ok(watcher::Event::Delete(object)) => {
                (self.gone)(object.meta());
                self.known.remove(&key(object.meta()));
                vec![Ok(watcher::Event::Delete(object))]
            }
        }
    }

    /// An object that exists. One of the same name with another uid exists no more.
    fn seen(&mut self, object: Guarded) -> Vec<Change> {
        let meta = object.meta();
        let identity = ObjectMeta {
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            ..ObjectMeta::default()
        };
        let before = self.known.insert(key(meta), identity);
        if let Some(before) = before.filter(|before| before.uid != meta.uid) {
            (self.gone)(&before);
        }
        vec![Ok(watcher::Event::Apply(object))]
    }

    /// What was there before a new list and is not in it.
    fn missing(&mut self) -> Vec<Change> {
        let listed = self.listed.take().unwrap_or_default();
        let missing: Vec<_> = self.known.keys().filter(|key| !listed.contains(key)).cloned().collect();
        let metas = missing.iter().filter_map(|key| self.known.remove(key));
        let gone = |metadata: ObjectMeta| {
            (self.gone)(&metadata);
            let invalid = InvalidObject { error: "deleted while the watch was down".into(), metadata };
            Ok(watcher::Event::Delete(DeserializeGuard(Err(invalid))))
        };
        metas.map(gone).collect()
    }
}

fn key(meta: &ObjectMeta) -> (String, String) {
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn object(name: &str, uid: &str) -> Guarded {
        let metadata = ObjectMeta {
            name: Some(name.into()),
            namespace: Some("n".into()),
            uid: Some(uid.into()),
            ..ObjectMeta::default()
        };
        DeserializeGuard(Err(InvalidObject { error: String::new(), metadata }))
    }

    #[test]
    fn deletions_are_heard_of_even_if_the_event_was_missed() {
        let gone = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&gone);
        let hear = move |meta: &ObjectMeta| heard.lock().unwrap().push(meta.uid.clone().unwrap());
        let mut scope = Scope { known: HashMap::new(), listed: None, gone: Arc::new(hear) };
        let mut send = |event| scope.changes(Ok(event)).len();
        send(watcher::Event::Init);
        send(watcher::Event::InitApply(object("a", "1")));
        send(watcher::Event::InitApply(object("b", "2")));
        assert_eq!(send(watcher::Event::InitDone), 0);
        assert_eq!(send(watcher::Event::Apply(object("a", "3"))), 1);
        send(watcher::Event::Init);
        send(watcher::Event::InitApply(object("a", "3")));
        assert_eq!(send(watcher::Event::InitDone), 1);
        send(watcher::Event::Delete(object("a", "3")));
        assert_eq!(*gone.lock().unwrap(), ["1", "2", "3"]);
    }
}
