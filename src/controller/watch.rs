//! The objects of one or more namespaces as one stream of changes, and word of every object that is there or gone: also
//! of one whose deletion was missed while the watch was down.
//!
//! kube's watcher goes on from where it was for as long as it can. What would keep it from the truth for good is mended
//! here: a refusal to go on from there that comes as an HTTP status, which it repeats for ever, and an event that never
//! came. A connection that says nothing any more is broken by the client's read timeout.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use kube::{
    Api, Client, Resource,
    core::{DeserializeGuard, NamespaceResourceScope, ObjectMeta, error_boundary::InvalidObject},
    runtime::watcher,
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, sleep_until};

use super::{error::is_not_found, reconcile::Guarded};
use crate::config::Timing;

type Change = watcher::Result<watcher::Event<Guarded>>;

/// Who hears of objects before the changes that say so.
pub(super) trait Observer: Send + Sync {
    /// An object is there, new or changed.
    fn shown(&self, object: &Guarded);
    /// An object does not exist any more.
    fn gone(&self, meta: &ObjectMeta);
    /// Every object that there is has been shown.
    fn complete(&self);
    /// Whether the API server knows the kind at all.
    fn served(&self, is_served: bool);
}

/// Changes in these namespaces, or in all where none is named.
pub(super) fn changes(
    client: &Client,
    namespaces: &[String],
    timing: &Timing,
    observer: &Arc<dyn Observer>,
) -> impl Stream<Item = Change> + Send + 'static {
    let apis: Vec<Api<Guarded>> = apis(client, namespaces);
    let incomplete = Arc::new(AtomicUsize::new(apis.len()));
    let scopes = apis.into_iter().map(|api| {
        let mut scope = Scope::new(Arc::clone(observer), Arc::clone(&incomplete));
        watch(api, timing.clone()).flat_map(move |event| stream::iter(scope.changes(event))).boxed()
    });
    // Several lists make one store: it is complete as soon as it may hold anything, and each list is told apart here.
    let opening = [Ok(watcher::Event::Init), Ok(watcher::Event::InitDone)];
    stream::iter(opening).chain(stream::select_all(scopes))
}

/// One for each of these namespaces, or one for all where none is named.
pub(super) fn apis<K>(client: &Client, namespaces: &[String]) -> Vec<Api<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespaces {
        [] => vec![Api::all(client.clone())],
        named => named.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect(),
    }
}

/// What happens to the objects of one kind, for good.
pub(super) fn watch<K: Watched>(
    api: Api<K>,
    timing: Timing,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send {
    stream::unfold(Watch::new(api, timing), |mut watch| async { Some((watch.next().await, watch)) })
}

/// A kind that can be watched.
pub(super) trait Watched:
    Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + 'static
{
}

impl<K: Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + 'static> Watched for K {}

/// A watch that begins anew from a list when it cannot go on, and now and then in any case.
struct Watch<K> {
    api: Api<K>,
    timing: Timing,
    events: BoxStream<'static, watcher::Result<watcher::Event<K>>>,
    /// Not while a list is being read.
    relist_at: Option<Instant>,
    backoff: Backoff,
}

impl<K: Watched> Watch<K> {
    fn new(api: Api<K>, timing: Timing) -> Self {
        let backoff = Backoff::new(timing.api_backoff_first, timing.api_backoff_max);
        Self { events: listed(&api, &timing), api, timing, relist_at: None, backoff }
    }

    async fn next(&mut self) -> watcher::Result<watcher::Event<K>> {
        self.backoff.wait().await;
        loop {
            let relist_at = self.relist_at;
            let change = tokio::select! {
                Some(change) = self.events.next() => change,
                () = sleep_until(relist_at.unwrap_or_else(Instant::now)), if relist_at.is_some() => {
                    self.begin();
                    continue;
                }
            };
            match &change {
                Ok(watcher::Event::InitDone) => self.relist_at = Some(Instant::now() + self.timing.watch_relist),
                Ok(_) => {}
                Err(error) => {
                    self.backoff.failed();
                    if is_refusal(error) {
                        self.begin();
                    }
                }
            }
            return change;
        }
    }

    fn begin(&mut self) {
        self.events = listed(&self.api, &self.timing);
        self.relist_at = None;
    }
}

fn listed<K: Watched>(api: &Api<K>, timing: &Timing) -> BoxStream<'static, watcher::Result<watcher::Event<K>>> {
    let seconds = u32::try_from(timing.watch_timeout.as_secs()).unwrap_or(u32::MAX).max(1);
    watcher(api.clone(), watcher::Config::default().timeout(seconds)).boxed()
}

/// Whether the API server, or what is in front of it, does not let a watch go on from where it was: asking for the same
/// again is of no use.
fn is_refusal(error: &watcher::Error) -> bool {
    let watcher::Error::WatchStartFailed(kube::Error::Api(status)) = error else { return false };
    (400..500).contains(&status.code) && status.code != 429
}

/// Whether the API server does not know the kind.
fn is_unserved(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => is_not_found(error),
        _ => false,
    }
}

/// How long to wait after errors. Not what works in between makes the waits short again, but time without an error: a
/// list that works and a watch that does not would else be asked for without a pause.
struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
    failed_at: Option<Instant>,
    is_due: bool,
}

impl Backoff {
    fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, next: first, failed_at: None, is_due: false }
    }

    fn failed(&mut self) {
        let now = Instant::now();
        let before = self.failed_at.replace(now);
        if before.is_none_or(|before| now.duration_since(before) > self.max * 2) {
            self.next = self.first;
        }
        self.is_due = true;
    }

    /// Waits if there was an error since, up to a half less than what is due so that replicas do not ask in step.
    async fn wait(&mut self) {
        if std::mem::take(&mut self.is_due) {
            sleep(self.next.mul_f64(1.0 - fastrand::f64() / 2.0)).await;
            self.next = (self.next * 2).min(self.max);
        }
    }
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
            Err(error) => {
                if is_unserved(&error) {
                    self.observer.served(false);
                }
                vec![Err(error)]
            }
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
                self.observer.served(true);
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

        fn served(&self, _: bool) {}
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

    #[tokio::test(start_paused = true)]
    async fn waits_after_errors_double_until_there_was_none_for_a_while() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(15));
        let waited = async |backoff: &mut Backoff| {
            let start = Instant::now();
            backoff.wait().await;
            start.elapsed().as_secs_f64()
        };
        for expected in [1.0, 2.0, 4.0, 8.0, 15.0, 15.0] {
            backoff.failed();
            let found = waited(&mut backoff).await;
            assert!((expected / 2.0..=expected + 0.01).contains(&found), "{found} of {expected}");
            assert!(waited(&mut backoff).await < 0.01, "nothing failed since");
        }
        tokio::time::advance(Duration::from_secs(31)).await;
        backoff.failed();
        assert!(waited(&mut backoff).await < 1.01);
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
