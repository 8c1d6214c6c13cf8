//! The objects of one or more namespaces as one stream of changes, and word of every object that is there or gone: also
//! of one whose deletion was missed while the watch was down.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::{Stream, StreamExt as _, stream};
use kube::{
    Api, Client, Resource as _,
    core::{DeserializeGuard, ObjectMeta, error_boundary::InvalidObject},
    runtime::{WatchStreamExt as _, watcher},
};

use super::reconcile::Guarded;

type Change = watcher::Result<watcher::Event<Guarded>>;

/// Who hears of objects before the changes that say so.
pub(super) trait Observer: Send + Sync {
    /// An object is there, new or changed.
    fn shown(&self, object: &Guarded);
    /// An object does not exist any more.
    fn gone(&self, meta: &ObjectMeta);
    /// Every object that there is has been shown.
    fn complete(&self);
}

/// Changes in these namespaces, or in all where none is named.
pub(super) fn changes(
    client: &Client,
    namespaces: &[String],
    observer: &Arc<dyn Observer>,
) -> impl Stream<Item = Change> + Send + 'static {
    let apis: Vec<Api<Guarded>> = match namespaces {
        [] => vec![Api::all(client.clone())],
        named => named.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect(),
    };
    let incomplete = Arc::new(AtomicUsize::new(apis.len()));
    let scopes = apis.into_iter().map(|api| {
        let mut scope = Scope::new(Arc::clone(observer), Arc::clone(&incomplete));
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
    is_complete: bool,
    /// How many scopes are not complete.
    incomplete: Arc<AtomicUsize>,
    observer: Arc<dyn Observer>,
}

impl Scope {
    fn new(observer: Arc<dyn Observer>, incomplete: Arc<AtomicUsize>) -> Self {
        Self { known: HashMap::new(), listed: None, is_complete: false, incomplete, observer }
    }

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
            Ok(watcher::Event::InitDone) => {
                let missing = self.missing();
                self.complete();
                missing
            }
            Ok(watcher::Event::Apply(object)) => self.seen(object),
            Ok(watcher::Event::Delete(object)) => {
                self.observer.gone(object.meta());
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
            self.observer.gone(&before);
        }
        self.observer.shown(&object);
        vec![Ok(watcher::Event::Apply(object))]
    }

    /// The first list has been read. The last scope of which that is so makes the whole complete.
    fn complete(&mut self) {
        if !std::mem::replace(&mut self.is_complete, true) && self.incomplete.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.observer.complete();
        }
    }

    /// What was there before a new list and is not in it.
    fn missing(&mut self) -> Vec<Change> {
        let listed = self.listed.take().unwrap_or_default();
        let missing: Vec<_> = self.known.keys().filter(|key| !listed.contains(key)).cloned().collect();
        let metas = missing.iter().filter_map(|key| self.known.remove(key));
        let gone = |metadata: ObjectMeta| {
            self.observer.gone(&metadata);
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

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Heard {
        fn add(&self, what: &str, meta: &ObjectMeta) {
            self.0.lock().unwrap().push(format!("{what}{}", meta.uid.as_deref().unwrap_or_default()));
        }
    }

    impl Observer for Heard {
        fn shown(&self, object: &Guarded) {
            self.add("+", object.meta());
        }

        fn gone(&self, meta: &ObjectMeta) {
            self.add("-", meta);
        }

        fn complete(&self) {
            self.add("complete", &ObjectMeta::default());
        }
    }

    #[test]
    fn deletions_are_heard_of_even_if_the_event_was_missed() {
        let heard = Arc::new(Heard::default());
        let mut scope = Scope::new(Arc::clone(&heard) as Arc<dyn Observer>, Arc::new(AtomicUsize::new(1)));
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
        assert_eq!(*heard.0.lock().unwrap(), ["+1", "+2", "complete", "-1", "+3", "+3", "-2", "-3"]);
    }

    #[test]
    fn all_scopes_make_the_whole() {
        let heard = Arc::new(Heard::default());
        let incomplete = Arc::new(AtomicUsize::new(2));
        let [mut one, mut two] =
            [(); 2].map(|()| Scope::new(Arc::clone(&heard) as Arc<dyn Observer>, Arc::clone(&incomplete)));
        for _ in 0..2 {
            one.changes(Ok(watcher::Event::InitDone));
        }
        assert!(heard.0.lock().unwrap().is_empty());
        two.changes(Ok(watcher::Event::InitDone));
        assert_eq!(*heard.0.lock().unwrap(), ["complete"]);
    }
}
