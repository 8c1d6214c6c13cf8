//! Portager's `ImageSync` (`portager.portager.io/v1alpha1`): one source registry, one destination, images with tags or a
//! range of versions.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{
    Times,
    draft::{Base, Drafts, Host, OneLine},
    parse, unread,
};
use crate::api::v1alpha1::{
    Image, ImageMirrorSpec, Referrers, ReferrersPolicy, Registry, SecretReference, Select, Target,
};

/// Of the newest that match, so many are copied where nothing is said.
const MAX_TAGS: i32 = 10;

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Object {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: Spec,
    /// Of a List, as `kubectl get -o yaml` prints it.
    items: Vec<Object>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Metadata {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    schedule: String,
    source: Source,
    destination: Destination,
    images: Vec<Entry>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Source {
    registry: String,
    auth_secret_ref: Option<Secret>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Destination {
    registry: String,
    auth: Auth,
    repository_prefix: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Auth {
    method: String,
    secret_ref: Option<Secret>,
}

#[derive(Deserialize)]
struct Secret {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Entry {
    name: String,
    tags: Vec<String>,
    semver: String,
    max_tags: Option<i32>,
}

const SPEC_KEYS: [&str; 4] = ["schedule", "source", "destination", "images"];
const SPEC_EXPLAINED: [(&str, &str); 2] = [
    ("validation", "NO EQUAL YET: images are copied without being verified; check signatures where images are run"),
    ("createDestinationRepos", "no equal: a registry that wants repositories to exist fails with RepositoryMissing"),
];
const ENTRY_KEYS: [&str; 4] = ["name", "tags", "semver", "maxTags"];

/// The objects that the `ImageSync`s of a file amount to.
pub(super) fn import(text: &str) -> Result<Drafts, String> {
    const WHAT: &str = "a file with ImageSyncs of Portager";
    let objects = flat(parse::<Object>(text, WHAT)?, |object| std::mem::take(&mut object.items));
    let items = |value: &mut Value| match value["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    let raws = flat(parse::<Value>(text, WHAT)?, items);
    let mut drafts = Drafts::default();
    let mut hosts = BTreeMap::new();
    let mut found = false;
    for (object, raw) in objects.iter().zip(&raws).filter(|(object, _)| object.kind == "ImageSync") {
        if !object.api_version.starts_with("portager.") {
            continue;
        }
        found = true;
        let name = format!("ImageSync {}", OneLine(&object.metadata.name));
        let before = unread(&raw["spec"], &format!("{name}: spec."), &SPEC_KEYS, &SPEC_EXPLAINED);
        if let Err(why) = add(&mut drafts, object, &raw["spec"], before, &mut hosts) {
            drafts.note(format!("{name} is left out: {why}"));
        }
    }
    if found { Ok(drafts.with_hosts(&hosts)) } else { Err(format!("it has no ImageSync; name {WHAT}")) }
}

/// The objects with those of lists in the place of the lists.
fn flat<T>(documents: Vec<T>, items: impl Fn(&mut T) -> Vec<T>) -> Vec<T> {
    let mut all = Vec::new();
    for mut document in documents {
        let inner = items(&mut document);
        all.extend(if inner.is_empty() { vec![document] } else { inner });
    }
    all
}

fn add(
    drafts: &mut Drafts,
    object: &Object,
    raw: &Value,
    mut notes: Vec<String>,
    hosts: &mut BTreeMap<String, Host>,
) -> Result<(), String> {
    let Object { metadata, spec, .. } = object;
    let times = Times::of_cron(&spec.schedule)?;
    let (registry, path) = spec.destination.registry.split_once('/').unwrap_or((&spec.destination.registry, ""));
    let prefix = [path, &spec.destination.repository_prefix].map(|part| part.trim_matches('/'));
    let prefix: String = prefix.iter().filter(|part| !part.is_empty()).flat_map(|part| [part, "/"]).collect();
    let mut secret = |secret: &Option<Secret>| {
        let secret = secret.as_ref()?;
        let other = secret.namespace.as_ref().filter(|other| Some(*other) != metadata.namespace.as_ref());
        notes.extend(other.map(|other| {
            format!(
                "the Secret {} is in the namespace {}: it must be in the object's own",
                OneLine(&secret.name),
                OneLine(other)
            )
        }));
        Some(SecretReference { name: secret.name.clone() })
    };
    let (pull, push) = (secret(&spec.source.auth_secret_ref), secret(&spec.destination.auth.secret_ref));
    if !matches!(spec.destination.auth.method.as_str(), "secret" | "anonymous" | "") {
        let method = OneLine(&spec.destination.auth.method);
        notes.push(format!("spec.destination.auth.method {method}: no equal yet; name a Secret in target.secretRef"));
    }
    notes.push("referrers: none, as Portager copies none; without this, signatures and SBOMs come too".into());
    for host in [&spec.source.registry, registry].map(|name| name.split('/').next().unwrap_or_default()) {
        // These Portager reaches without TLS.
        if host.starts_with("localhost") || host.starts_with("127.0.0.1") {
            let settings = Registry { host: host.to_owned(), plain_http: Some(true), ..Registry::default() };
            hosts.insert(host.to_owned(), Host { settings: Some(settings), ..Host::default() });
        }
    }
    let base = Base {
        name: metadata.name.clone(),
        namespace: metadata.namespace.clone(),
        spec: ImageMirrorSpec {
            target: Target {
                registry: registry.to_owned(),
                repository: Some(format!("{prefix}{{name}}")),
                secret_ref: push,
            },
            image_pull_secrets: pull.into_iter().collect(),
            interval: times.interval,
            schedule: times.schedule,
            time_zone: times.time_zone,
            referrers: Some(Referrers { policy: Some(ReferrersPolicy::None), artifact_types: Vec::new() }),
            ..ImageMirrorSpec::default()
        },
    };
    for (number, entry) in spec.images.iter().enumerate() {
        let at = format!("ImageSync {}: spec.images[{number}]", OneLine(&metadata.name));
        let mut notes = std::mem::take(&mut notes);
        notes.extend(unread(&raw["images"][number], &format!("{at}."), &ENTRY_KEYS, &[]));
        let limit = Some(entry.max_tags.unwrap_or(MAX_TAGS)).filter(|limit| *limit > 0);
        let semver = Some(entry.semver.replace(',', " ")).filter(|range| !range.is_empty());
        let image = Image {
            source: format!("{}/{}", spec.source.registry.trim_end_matches('/'), entry.name),
            tags: entry.tags.clone(),
            select: semver.map(|range| Select { semver: Some(range), limit, ..Select::default() }),
            target_repository: entry.name.contains('/').then(|| format!("{prefix}{}", entry.name)),
            ..Image::default()
        };
        drafts.add(base.clone(), &at, image, notes);
    }
    Ok(())
}
