//! Which objects want which target tags. Of two that want one tag the older keeps it, whether it is suspended or not:
//! the other's image fails, and nobody takes turns in writing it.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use kube::Resource as _;
use tokio::sync::watch;

use crate::{
    api::ImageMirror,
    mirror::validate,
    reason::Reason,
    sync::{Destination, Failure, SyncRequest},
};

/// A target tag. Hashed, because there may be a hundred thousand of them.
type Key = (u64, u64);

/// The claims of all objects that are watched.
pub(super) struct Claims {
    hashers: (RandomState, RandomState),
    inner: Mutex<Inner>,
    /// Whether every object is known.
    is_complete: watch::Sender<bool>,
}

#[derive(Default)]
struct Inner {
    objects: HashMap<String, Claimant>,
    claims: HashMap<Key, Vec<Arc<Object>>>,
}

/// An object, ordered by its age.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Object {
    created: Timestamp,
    uid: String,
    namespace: String,
    name: String,
}

struct Claimant {
    object: Arc<Object>,
    /// Tags that the spec names.
    literal: HashSet<Key>,
    /// Tags that the last run of everything chose, and those after it.
    chosen: HashSet<Key>,
}

/// What the images of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All that the object wants.
    All,
    /// Some: it wants the others still.
    Some,
}

impl Claims {
    pub(super) fn new() -> Self {
        Self { hashers: Default::default(), inner: Mutex::default(), is_complete: watch::Sender::new(false) }
    }

    /// An object is there, or has changed.
    pub(super) fn shown(&self, mirror: &ImageMirror) {
        let meta = mirror.meta();
        let Some(uid) = meta.uid.clone() else { return };
        let validated = validate(mirror).ok();
        let literal = validated.iter().flat_map(|mirror| mirror.images.iter().map(|image| mirror.target_of(image)));
        let literal: HashSet<Key> = literal.map(|target| self.key(&target)).collect();
        let object = Object {
            created: meta.creation_timestamp.as_ref().map_or(Timestamp::MAX, |time| time.0),
            uid: uid.clone(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        };
        let mut inner = self.inner();
        let before = inner.remove(&uid);
        // What is chosen is known again after the next run; until then it is as it was.
        let chosen = before.map(|before| before.chosen).unwrap_or_default();
        let chosen =
            if validated.is_some_and(|mirror| !mirror.selections.is_empty()) { chosen } else { HashSet::new() };
        inner.insert(uid, Claimant { object: Arc::new(object), literal, chosen });
    }

    /// An object is gone.
    pub(super) fn forget(&self, uid: &str) {
        self.inner().remove(uid);
    }

    /// Every object that there is has been shown.
    pub(super) fn complete(&self) {
        self.is_complete.send_replace(true);
    }

    /// Waits until every object is known.
    pub(super) async fn known(&self) {
        // The sender lives as long as this.
        let _ = self.is_complete.subscribe().wait_for(|is_complete| *is_complete).await;
    }

    /// A run of an object is about these images. Those whose tag an older object wants are blocked.
    pub(super) fn settle(&self, uid: &str, request: &mut SyncRequest, destination: &Destination, scope: Scope) {
        let targets: Vec<String> = request.images.iter().map(|image| destination.target_of(image)).collect();
        let keys: Vec<Key> = targets.iter().map(|target| self.key(target)).collect();
        let mut inner = self.inner();
        let Some(mut claimant) = inner.remove(uid) else { return };
        let object = Arc::clone(&claimant.object);
        if scope == Scope::All {
            claimant.chosen.clear();
        }
        claimant.chosen.extend(keys.iter().filter(|key| !claimant.literal.contains(key)));
        inner.insert(uid.to_owned(), claimant);
        for ((image, target), key) in request.images.iter_mut().zip(&targets).zip(&keys) {
            let oldest = inner.claims.get(key).and_then(|objects| objects.iter().min());
            let Some(oldest) = oldest.filter(|oldest| oldest.uid != uid && image.blocked.is_none()) else { continue };
            let who = if oldest.namespace == object.namespace {
                format!("the older ImageMirror {:?} of this namespace", oldest.name)
            } else {
                "an older ImageMirror of another namespace".to_owned()
            };
            let message = format!("{who} wants the target tag {target} too, and keeps it; choose another target");
            image.blocked = Some(Failure::new(Reason::Conflict, &message));
        }
    }

    fn key(&self, target: &str) -> Key {
        (self.hashers.0.hash_one(target), self.hashers.1.hash_one(target))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, uid: String, claimant: Claimant) {
        for key in claimant.literal.iter().chain(&claimant.chosen) {
            self.claims.entry(*key).or_default().push(Arc::clone(&claimant.object));
        }
        self.objects.insert(uid, claimant);
    }

    fn remove(&mut self, uid: &str) -> Option<Claimant> {
        let claimant = self.objects.remove(uid)?;
        for key in claimant.literal.iter().chain(&claimant.chosen) {
            if let Some(objects) = self.claims.get_mut(key) {
                objects.retain(|object| object.uid != uid);
                if objects.is_empty() {
                    self.claims.remove(key);
                }
            }
        }
        Some(claimant)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        api::v1alpha1::Select,
        mirror::{Secrets, prepare},
        registry::Transport,
    };

    fn mirror(name: &str, namespace: &str, created: &str, tags: &str) -> ImageMirror {
        let text = format!(
            "apiVersion: imagemirror.dev/v1alpha1\nkind: ImageMirror\n\
             metadata: {{name: {name}, namespace: {namespace}, uid: {name}, creationTimestamp: '{created}'}}\n\
             spec: {{images: [{{source: gcr.io/a, tags: [{tags}]}}], target: {{registry: t.io}}}}"
        );
        serde_saphyr::from_str(&text).unwrap()
    }

    /// Why each image of a run of this object is blocked.
    fn blocked(claims: &Claims, mirror: &ImageMirror) -> Vec<Option<String>> {
        let validated = validate(mirror).unwrap();
        let prepared = prepare(&validated, &Secrets::default(), |_| Transport::default(), &BTreeMap::new());
        let mut request = prepared.request;
        claims.settle(&validated.name, &mut request, &prepared.registries.target, Scope::All);
        request.images.into_iter().map(|image| image.blocked.map(|failure| failure.message)).collect()
    }

    #[test]
    fn the_older_object_keeps_the_tag() {
        let claims = Claims::new();
        let old = mirror("old", "n", "2026-01-01T00:00:00Z", "x, y");
        let young = mirror("young", "n", "2026-01-02T00:00:00Z", "y, z");
        let foreign = mirror("foreign", "m", "2026-01-03T00:00:00Z", "x");
        for object in [&young, &old, &foreign] {
            claims.shown(object);
        }
        assert_eq!(blocked(&claims, &old), [None, None]);
        let of_young = blocked(&claims, &young);
        assert!(
            of_young[0].as_ref().is_some_and(|why| why.contains("ImageMirror \"old\"") && why.contains("t.io/a:y"))
        );
        assert_eq!(of_young[1], None);
        let of_foreign = blocked(&claims, &foreign);
        assert!(of_foreign[0].as_ref().is_some_and(|why| why.contains("another namespace") && !why.contains("old\"")));
        claims.shown(&mirror("old", "n", "2026-01-01T00:00:00Z", "x"));
        assert_eq!(blocked(&claims, &young), [None, None]);
        claims.forget("old");
        assert_eq!(blocked(&claims, &foreign), [None]);
        assert_eq!(claims.inner().claims.len(), 3);
        claims.forget("young");
        claims.forget("foreign");
        assert!(claims.inner().claims.is_empty());
    }

    #[test]
    fn of_the_same_age_the_uid_decides() {
        let claims = Claims::new();
        let [a, b] = ["a", "b"].map(|name| mirror(name, "n", "2026-01-01T00:00:00Z", "x"));
        claims.shown(&b);
        claims.shown(&a);
        assert_eq!(blocked(&claims, &a), [None]);
        assert!(blocked(&claims, &b)[0].is_some());
    }

    #[test]
    fn a_run_of_some_images_gives_up_none_of_the_others() {
        let claims = Claims::new();
        let object = mirror("m", "n", "2026-01-01T00:00:00Z", "x");
        let mut selecting = object.clone();
        selecting.spec.images[0].tags.clear();
        selecting.spec.images[0].select = Some(Select { pattern: Some(".*".into()), ..Select::default() });
        claims.shown(&selecting);
        let chosen = mirror("m", "n", "2026-01-01T00:00:00Z", "x, y");
        let run = |tags: &[usize], scope| {
            let prepared =
                prepare(&validate(&chosen).unwrap(), &Secrets::default(), |_| Transport::default(), &BTreeMap::new());
            let images = tags.iter().map(|tag| prepared.request.images[*tag].clone()).collect();
            let mut request = SyncRequest { images, ..prepared.request };
            claims.settle("m", &mut request, &prepared.registries.target, scope);
            claims.inner().claims.len()
        };
        assert_eq!(run(&[0, 1], Scope::All), 2);
        assert_eq!(run(&[0], Scope::Some), 2);
        assert_eq!(run(&[0], Scope::All), 1);
    }
}
