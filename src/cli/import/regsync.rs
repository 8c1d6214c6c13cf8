//! regsync's configuration (`version`, `creds`, `defaults`, `sync`), as its documentation and its source have it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{
    Times,
    draft::{Base, Drafts, Host, OneLine, secret_name},
    parse, unread,
};
use crate::{
    api::v1alpha1::{
        Image, ImageMirrorSpec, Policy, Referrers, ReferrersPolicy, Registry, SecretReference, Select, Target,
    },
    copy::ForeignLayers,
    oci::Reference,
};

#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    creds: Vec<Login>,
    defaults: Step,
    sync: Vec<Step>,
}

/// A registry. Its user, password and keys are never read.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Login {
    registry: String,
    tls: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Step {
    source: String,
    target: String,
    #[serde(rename = "type")]
    kind: String,
    tags: Tags,
    tag_sets: Vec<Tags>,
    digest_tags: Option<bool>,
    referrers: Option<bool>,
    referrer_filters: Option<Vec<Filter>>,
    platform: Option<String>,
    platforms: Vec<String>,
    include_external: Option<bool>,
    interval: Option<String>,
    schedule: Option<String>,
}

#[derive(Deserialize, Default, PartialEq)]
#[serde(default, rename_all = "camelCase")]
struct Tags {
    allow: Vec<String>,
    deny: Vec<String>,
    semver_range: Vec<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default, rename_all = "camelCase")]
struct Filter {
    artifact_type: String,
    annotations: BTreeMap<String, String>,
}

const CONFIG_KEYS: [&str; 4] = ["version", "creds", "defaults", "sync"];
const STEP_KEYS: [&str; 14] = [
    "source",
    "target",
    "type",
    "tags",
    "tagSets",
    "digestTags",
    "referrers",
    "referrerFilters",
    "platform",
    "platforms",
    "includeExternal",
    "interval",
    "schedule",
    "repos",
];
const LOGIN_KEYS: [&str; 12] = [
    "registry",
    "tls",
    "user",
    "pass",
    "token",
    "credHelper",
    "credExpire",
    "credHost",
    "regcert",
    "clientcert",
    "clientkey",
    "repoAuth",
];
const NEEDLESS: &str = "not needed here";
const LIMITS: &str = "limits are the operator's: registries[].limits of its configuration";
const STEP_EXPLAINED: [(&str, &str); 16] = [
    ("backup", "no equal: a tag that is overwritten is not kept; policy.overwrite can leave those of others"),
    ("ratelimit", "not needed here: what a registry says of its limits is obeyed"),
    ("parallel", LIMITS),
    ("fastCheck", NEEDLESS),
    ("forceRecursive", NEEDLESS),
    ("referrerSlow", NEEDLESS),
    ("referrerSource", "no equal: what is attached is looked for beside the image"),
    ("referrerTarget", "no equal: what is attached is written beside the image"),
    ("mediaTypes", "no equal: manifests of every type are copied"),
    ("hooks", "no equal"),
    ("blobLimit", NEEDLESS),
    ("cacheCount", NEEDLESS),
    ("cacheTime", NEEDLESS),
    ("skipDockerConfig", "no equal: the operator uses Secrets alone"),
    ("userAgent", "no equal"),
    ("name", NEEDLESS),
];
const LOGIN_EXPLAINED: [(&str, &str); 9] = [
    ("hostname", "no equal: a registry is reached under the name that images have"),
    ("pathPrefix", "no equal: write the whole repository in source"),
    ("mirrors", "no equal: write the mirror in source"),
    ("priority", "no equal"),
    ("blobChunk", "the operator's: registries[].uploadStrategy of its configuration"),
    ("blobMax", "the operator's: registries[].uploadStrategy of its configuration"),
    ("reqPerSec", LIMITS),
    ("reqConcurrent", LIMITS),
    ("scheme", "write tls: disabled for plain HTTP"),
];

/// The objects that a configuration amounts to.
pub(super) fn import(text: &str) -> Result<Drafts, String> {
    const WHAT: &str = "a configuration of regsync";
    let Some(config) = parse::<Config>(text, WHAT)?.into_iter().next() else { return Err("it is empty".into()) };
    let raw = parse::<Value>(text, WHAT)?.into_iter().next().unwrap_or_default();
    if config.sync.is_empty() {
        return Err("it has no entries under sync; name a configuration of regsync".into());
    }
    let mut drafts = Drafts::default();
    let defaults = unread(&raw["defaults"], "defaults.", &STEP_KEYS, &STEP_EXPLAINED);
    for note in unread(&raw, "", &CONFIG_KEYS, &[]).into_iter().chain(defaults) {
        drafts.note(note);
    }
    for (number, step) in config.sync.iter().enumerate() {
        let at = format!("sync[{number}]");
        let notes = unread(&raw["sync"][number], &format!("{at}."), &STEP_KEYS, &STEP_EXPLAINED);
        if let Err(why) = add(&mut drafts, &config.defaults, step, &at, notes) {
            drafts.note(format!("{at} is left out: {why}"));
        }
    }
    let logins = config.creds.iter().enumerate();
    let hosts = logins.map(|(number, login)| host(login, &raw["creds"][number], number)).collect();
    Ok(drafts.with_hosts(&hosts))
}

fn add(drafts: &mut Drafts, defaults: &Step, step: &Step, at: &str, mut notes: Vec<String>) -> Result<(), String> {
    if [&step.source, &step.target].iter().any(|text| text.contains("{{")) {
        return Err("it has a template, which regsync alone can expand; write out what it gives".into());
    }
    if [&step.source, &step.target].iter().any(|text| text.starts_with("ocidir://")) {
        return Err("it names a directory; `imagemirror sync --to oci:DIR` and `--from oci:DIR` do that".into());
    }
    let reference = |text: &str| text.parse::<Reference>().map_err(|error| OneLine(&error.to_string()).to_string());
    let images = match step.kind.as_str() {
        "image" => vec![one(&reference(&step.source)?, &reference(&step.target)?)?],
        "repository" => {
            let sets = step.tag_sets.iter().chain([&step.tags].into_iter().filter(|tags| **tags != Tags::default()));
            let mut selects: Vec<Select> = sets.map(select).collect();
            if selects.is_empty() {
                selects.push(select(&Tags::default()));
            }
            let source = reference(&step.source)?;
            let source = format!("{}/{}", source.host, source.repository);
            selects
                .into_iter()
                .map(|select| Image { source: source.clone(), select: Some(select), ..Image::default() })
                .collect()
        }
        "registry" => return Err("a whole registry has no equal; name its repositories one by one".into()),
        kind => return Err(format!("its type {:?} is unknown", OneLine(kind).to_string())),
    };
    let (source, target) = (reference(&step.source)?, reference(&step.target)?);
    let platforms = match &step.platform {
        Some(platform) => {
            notes.push(format!(
                "{at}.platform: the index stays, with this platform alone, where regsync writes the platform's manifest"
            ));
            vec![platform.clone()]
        }
        None => step.platforms.clone(),
    };
    let base = Base { name: "regsync".into(), namespace: None, spec: spec(&target, defaults, step, at, &mut notes)? };
    let keeps_path = target.repository == source.repository;
    for image in images {
        let target_repository = (!keeps_path).then(|| target.repository.to_string());
        let image = Image { target_repository, platforms: platforms.clone(), ..image };
        drafts.add(base.clone(), at, image, std::mem::take(&mut notes));
    }
    Ok(())
}

/// `latest` is what regsync reads where no tag is written.
fn one(source: &Reference, target: &Reference) -> Result<Image, String> {
    if target.digest.is_some() {
        return Err("its target has a digest, which cannot be chosen".into());
    }
    let tag = |reference: &Reference| reference.tag.as_ref().map_or_else(|| "latest".to_owned(), ToString::to_string);
    let repository = format!("{}/{}", source.host, source.repository);
    let (text, written) = match &source.digest {
        Some(digest) => (format!("{repository}@{digest}"), None),
        None => (format!("{repository}:{}", tag(source)), Some(tag(source))),
    };
    let target_tags = if written.as_ref() == Some(&tag(target)) { Vec::new() } else { vec![tag(target)] };
    Ok(Image { source: text, target_tags, ..Image::default() })
}

fn select(tags: &Tags) -> Select {
    let any_of = |patterns: &[String]| match patterns {
        [] => None,
        [one] => Some(one.clone()),
        many => Some(many.iter().map(|one| format!("(?:{one})")).collect::<Vec<_>>().join("|")),
    };
    let ranges: Vec<String> = tags.semver_range.iter().map(|range| range.replace(',', " ")).collect();
    let semver = (!ranges.is_empty()).then(|| ranges.join(" || "));
    let pattern = any_of(&tags.allow).or_else(|| semver.is_none().then(|| ".*".to_owned()));
    Select { pattern, semver, exclude: any_of(&tags.deny).into_iter().collect(), ..Select::default() }
}

fn spec(
    target: &Reference,
    defaults: &Step,
    step: &Step,
    at: &str,
    notes: &mut Vec<String>,
) -> Result<ImageMirrorSpec, String> {
    let own = step.schedule.is_some() || step.interval.is_some();
    let from = if own { step } else { defaults };
    let times = match (&from.schedule, &from.interval) {
        (Some(schedule), _) => Times::of_cron(schedule)?,
        (None, interval) => Times { interval: interval.clone(), ..Times::default() },
    };
    if times.schedule.is_some() && times.time_zone.is_none() {
        notes.push("schedule: in UTC; regsync's is in the zone of its machine, which timeZone can name".into());
    }
    let is_set = |of: fn(&Step) -> Option<bool>| of(step).or(of(defaults)).unwrap_or_default();
    let policy = is_set(|step| step.include_external)
        .then(|| Policy { foreign_layers: Some(ForeignLayers::Copy), ..Policy::default() });
    Ok(ImageMirrorSpec {
        target: Target { registry: target.host.to_string(), ..Target::default() },
        interval: times.interval,
        schedule: times.schedule,
        time_zone: times.time_zone,
        referrers: if is_set(|step| step.digest_tags) {
            None
        } else if is_set(|step| step.referrers) {
            referrers(step.referrer_filters.as_ref().or(defaults.referrer_filters.as_ref()), at, notes)
        } else {
            notes.push(
                "referrers: none, as regsync does by default; without this, signatures and SBOMs come too".into(),
            );
            Some(Referrers { policy: Some(ReferrersPolicy::None), artifact_types: Vec::new() })
        },
        policy,
        ..ImageMirrorSpec::default()
    })
}

fn referrers(filters: Option<&Vec<Filter>>, at: &str, notes: &mut Vec<String>) -> Option<Referrers> {
    let filters = filters.filter(|filters| !filters.is_empty())?;
    if filters.iter().any(|filter| filter.artifact_type.is_empty() || !filter.annotations.is_empty()) {
        notes.push(format!("{at}.referrerFilters: annotations have no equal: every referrer is copied"));
        return None;
    }
    let artifact_types = filters.iter().map(|filter| filter.artifact_type.clone()).collect();
    Some(Referrers { policy: Some(ReferrersPolicy::Selected), artifact_types })
}

fn host(login: &Login, raw: &Value, number: usize) -> (String, Host) {
    let at = format!("creds[{number}]");
    let parsed = login.registry.parse::<crate::oci::Host>();
    let name = parsed.map_or_else(|_| login.registry.clone(), |host| host.to_string());
    let mut notes = unread(raw, &format!("{at}."), &LOGIN_KEYS, &LOGIN_EXPLAINED);
    let has = |keys: &[&str]| keys.iter().any(|key| raw[*key].as_str().is_some_and(|text| !text.is_empty()));
    let mut settings = None;
    if has(&["regcert", "clientcert", "clientkey"]) {
        let secret = secret_name(&name, "tls");
        notes.push(format!(
            "{at}: its certificates go into the Secret {secret}, as ca.crt, tls.crt and tls.key: kubectl create secret generic {secret} --from-file=ca.crt"
        ));
        let reference = Some(SecretReference { name: secret });
        settings = Some(Registry { host: name.clone(), cert_secret_ref: reference, ..Registry::default() });
    }
    match login.tls.to_ascii_lowercase().as_str() {
        "disabled" => settings = Some(Registry { host: name.clone(), plain_http: Some(true), ..Registry::default() }),
        "insecure" => notes.push(format!("{at}.tls: certificates are always verified; certSecretRef can name a CA")),
        _ => {}
    }
    let mut secret = None;
    if has(&["user", "pass", "token", "credHelper"]) {
        let called = secret_name(&name, "login");
        let server = if name == crate::oci::Host::DOCKER_HUB { "https://index.docker.io/v1/" } else { &name };
        notes.push(format!(
            "{at}: its login goes into the Secret {called}: kubectl create secret docker-registry {called} --docker-server={server} --docker-username=USER --docker-password=PASSWORD"
        ));
        secret = Some(called);
    }
    (name, Host { settings, secret, notes })
}
