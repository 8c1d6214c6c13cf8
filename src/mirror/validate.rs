//! Checks a spec and turns it into plain values. Everything is checked here, also what the API server checked: an
//! object may have been stored under an older schema, and the command line has no API server.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use kube::ResourceExt as _;

use crate::{
    api::parse_duration,
    api::schema::{self, Violation},
    api::v1alpha1::{Image, ImageMirror, ImageMirrorSpec, Provider, ReferrersPolicy, Select},
    auth::cloud::Cloud,
    copy::{CopyOptions, Referrers},
    oci::{Digest, Host, PlatformFilter, Reference, RepositoryName, Tag},
    plan::Policy,
    schedule::{Calendar, DEFAULT_INTERVAL, MIN_INTERVAL, Schedule},
    select::{Rules, Selection},
    sync::ImageSource,
};

/// Of `spec.timeout`: of the object, and not of the operator, as the two of `schedule`.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(6);
const DEFAULT_TEMPLATE: &str = "{repository}";
/// Errors that are said at once.
const MAX_ERRORS: usize = 5;

/// An `ImageMirror` that can be carried out.
#[derive(Clone, Debug)]
pub struct ValidatedMirror {
    /// The object's namespace: the only one in which anything it names is looked up.
    pub namespace: String,
    /// The object's name.
    pub name: String,
    /// The generation of the spec.
    pub generation: i64,
    /// A hash of what decides the outcome of a run: the spec without `suspend`, `interval`, `schedule`,
    /// `timeZone` and `timeout`.
    pub spec_hash: String,
    /// Start no runs.
    pub suspended: bool,
    /// When to run.
    pub schedule: Schedule,
    /// How long a run may take.
    pub timeout: Duration,
    /// The token of the annotation that asks for a run now.
    pub requested_at: Option<String>,
    /// The images, one for each target tag, no two with the same.
    pub images: Vec<WantedImage>,
    /// The repositories whose tags are chosen by rule.
    pub selections: Vec<WantedTags>,
    /// What is copied beside the images themselves.
    pub options: CopyOptions,
    /// What to do where there is a choice.
    pub policy: Policy,
    /// The target registry.
    pub target_host: Host,
    /// The Secret for the target.
    pub target_secret: Option<String>,
    /// The Secrets for the sources, in order.
    pub pull_secrets: Vec<String>,
    /// The `ServiceAccount` whose pull secrets follow.
    pub service_account: Option<String>,
    /// How single registries are reached.
    pub registries: BTreeMap<Host, RegistrySettings>,
}

/// One image and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedImage {
    /// Where it comes from.
    pub source: ImageSource,
    /// The repository at the target.
    pub target_repository: RepositoryName,
    /// The tag at the target.
    pub target_tag: Tag,
    /// The platforms that are kept; none named is all.
    pub platforms: Vec<PlatformFilter>,
}

/// A repository whose tags are chosen by rule, and where they go.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedTags {
    /// The registry.
    pub host: Host,
    /// The repository.
    pub repository: RepositoryName,
    /// Which tags.
    pub select: Selection,
    /// The repository at the target.
    pub target_repository: RepositoryName,
    /// The platforms that are kept; none named is all.
    pub platforms: Vec<PlatformFilter>,
}

/// How the spec says to reach one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistrySettings {
    /// The cloud whose identities log in there, in place of pull secrets.
    pub cloud: Option<Cloud>,
    /// Without TLS.
    pub plain_http: bool,
    /// The Secret with CA and client certificate.
    pub cert_secret: Option<String>,
    /// The Secret with the proxy on the way there.
    pub proxy_secret: Option<String>,
}

/// A spec that cannot be carried out, with every field that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", errors.join("; "))]
pub struct InvalidSpec {
    errors: Vec<String>,
}

impl InvalidSpec {
    /// A spec that could not even be read.
    #[must_use]
    pub fn unreadable(why: &str, refused: &[Violation]) -> Self {
        let errors: Vec<String> = refused.iter().take(MAX_ERRORS).map(ToString::to_string).collect();
        let errors = if errors.is_empty() { vec![why.to_owned()] } else { errors };
        Self { errors: vec![format!("the stored object cannot be read: {}", errors.join("; "))] }
    }
}

impl ValidatedMirror {
    /// The registries that images come from.
    pub fn source_hosts(&self) -> impl Iterator<Item = &Host> {
        let literal = self.images.iter().map(|image| &image.source.host);
        literal.chain(self.selections.iter().map(|selection| &selection.host))
    }

    /// The target of an image as status and messages name it.
    #[must_use]
    pub fn target_of(&self, image: &WantedImage) -> String {
        format!("{}/{}:{}", self.target_host, image.target_repository, image.target_tag)
    }
}

/// Checks a spec. All errors are found, the first five are said.
pub fn validate(mirror: &ImageMirror) -> Result<ValidatedMirror, InvalidSpec> {
    // Serialising plain structs of strings does not fail.
    let spec = serde_json::to_value(&mirror.spec).unwrap_or_default();
    validate_with(mirror, &schema::check_spec(&spec))
}

/// Checks a spec of which it is known what the schema refuses.
pub fn validate_with(mirror: &ImageMirror, refused: &[Violation]) -> Result<ValidatedMirror, InvalidSpec> {
    let mut errors = Errors::default();
    let spec = &mirror.spec;
    let target_host = errors.take("spec.target.registry", spec.target.registry.parse::<Host>());
    let template = spec.target.repository.as_deref().unwrap_or(DEFAULT_TEMPLATE);
    let schedule = errors.schedule(spec);
    let timeout = errors.duration("spec.timeout", spec.timeout.as_deref(), DEFAULT_TIMEOUT, Duration::from_nanos(1));
    let (mut images, mut selections) = (Vec::new(), Vec::new());
    if spec.images.is_empty() {
        errors.add("spec.images", "name at least one image");
    }
    for (index, image) in spec.images.iter().enumerate() {
        let field = format!("spec.images[{index}]");
        match wanted_images(image, template, &field) {
            Ok((found, selection)) => {
                images.extend(found);
                selections.extend(selection);
            }
            Err(message) => errors.0.push(message),
        }
    }
    errors.collisions(&images);
    let registries = errors.registries(spec);
    let options = errors.options(spec);
    let policy = errors.policy(spec, images.len());
    errors.refused(refused);
    let (Some(target_host), Some(schedule), true) = (target_host, schedule, errors.0.is_empty()) else {
        errors.0.truncate(MAX_ERRORS);
        return Err(InvalidSpec { errors: errors.0 });
    };
    Ok(ValidatedMirror {
        namespace: mirror.namespace().unwrap_or_default(),
        name: mirror.name_any(),
        generation: mirror.metadata.generation.unwrap_or_default(),
        spec_hash: spec_hash(spec),
        suspended: spec.suspend.unwrap_or_default(),
        schedule,
        timeout,
        requested_at: mirror.requested_at().map(str::to_owned),
        images,
        selections,
        options,
        policy,
        target_host,
        target_secret: spec.target.secret_ref.as_ref().map(|secret| secret.name.clone()),
        pull_secrets: spec.image_pull_secrets.iter().map(|secret| secret.name.clone()).collect(),
        service_account: spec.service_account_name.clone(),
        registries,
    })
}

#[derive(Default)]
struct Errors(Vec<String>);

impl Errors {
    fn add(&mut self, field: &str, what: &str) {
        self.0.push(format!("{field}: {what}"));
    }

    /// What the schema refuses, where nothing better has been said of the field.
    fn refused(&mut self, refused: &[Violation]) {
        for violation in refused {
            // Of an entry it is enough that something has been said of its list.
            let list = violation.field.strip_suffix(']').and_then(|field| field.rsplit_once('[')).map(|(list, _)| list);
            let is_said = |error: &String| {
                let field = error.split_once(": ").map(|(field, _)| field);
                field == Some(&violation.field) || (list.is_some() && field == list)
            };
            if !self.0.iter().any(is_said) {
                self.0.push(violation.to_string());
            }
        }
    }

    fn take<T, E: std::fmt::Display>(&mut self, field: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(field, &error.to_string())).ok()
    }

    fn duration(&mut self, field: &str, text: Option<&str>, default: Duration, min: Duration) -> Duration {
        let Some(text) = text else { return default };
        match parse_duration(text) {
            Some(duration) if duration >= min => duration,
            Some(_) => {
                self.add(field, &format!("{text} is too short, write at least {}s", min.as_secs().max(1)));
                default
            }
            None => {
                self.add(field, &format!("{text:?} is not a duration, write for example 90s, 1h or 1h30m"));
                default
            }
        }
    }

    fn schedule(&mut self, spec: &ImageMirrorSpec) -> Option<Schedule> {
        let interval = self.duration("spec.interval", spec.interval.as_deref(), DEFAULT_INTERVAL, MIN_INTERVAL);
        let Some(schedule) = &spec.schedule else {
            if spec.time_zone.is_some() {
                self.add("spec.timeZone", "goes with schedule: write a schedule, or remove timeZone");
            }
            return Some(Schedule::Interval(interval));
        };
        if spec.interval.is_some() {
            self.add("spec.schedule", "schedule and interval exclude each other: remove one of them");
        }
        self.take("spec.schedule", Calendar::new(schedule, spec.time_zone.as_deref()))
            .map(Box::new)
            .map(Schedule::Calendar)
    }

    fn policy(&mut self, spec: &ImageMirrorSpec, images: usize) -> Policy {
        let policy = spec.policy.clone().unwrap_or_default();
        let policy = Policy {
            source_moved: policy.source_moved.unwrap_or_default(),
            overwrite: policy.overwrite.unwrap_or_default(),
        };
        if let Some(what) = policy.too_many(images) {
            self.add("spec.images", &what);
        }
        policy
    }

    /// Two images that would take turns in writing one tag.
    fn collisions(&mut self, images: &[WantedImage]) {
        let mut seen: HashMap<(&RepositoryName, &Tag), &ImageSource> = HashMap::new();
        for image in images {
            let key = (&image.target_repository, &image.target_tag);
            if let Some(other) = seen.insert(key, &image.source) {
                let one = format!("{}/{}", other.host, other.repository);
                let two = format!("{}/{}", image.source.host, image.source.repository);
                let what = format!(
                    "{one} and {two} both want the target tag {}:{}; give one of them a targetRepository or targetTags",
                    image.target_repository, image.target_tag
                );
                self.add("spec.images", &what);
            }
        }
    }

    fn options(&mut self, spec: &ImageMirrorSpec) -> CopyOptions {
        let referrers = spec.referrers.clone().unwrap_or_default();
        let types = referrers.artifact_types;
        let selects = referrers.policy == Some(ReferrersPolicy::Selected);
        if selects == types.is_empty() {
            self.add("spec.referrers", "artifactTypes goes with policy Selected, and Selected needs artifactTypes");
        }
        let referrers = match referrers.policy {
            None | Some(ReferrersPolicy::All) => Referrers::All,
            Some(ReferrersPolicy::None) => Referrers::None,
            Some(ReferrersPolicy::Selected) => Referrers::Selected(types),
        };
        let foreign_layers = spec.policy.as_ref().and_then(|policy| policy.foreign_layers).unwrap_or_default();
        CopyOptions { referrers, foreign_layers }
    }

    fn registries(&mut self, spec: &ImageMirrorSpec) -> BTreeMap<Host, RegistrySettings> {
        let mut registries = BTreeMap::new();
        for (index, registry) in spec.registries.iter().enumerate() {
            let field = format!("spec.registries[{index}].host");
            let Some(host) = self.take(&field, registry.host.parse::<Host>()) else { continue };
            let cloud = match registry.provider.unwrap_or(Provider::Generic) {
                Provider::Generic => None,
                Provider::Aws => Some(Cloud::Aws),
                Provider::Azure => Some(Cloud::Azure),
                Provider::Gcp => Some(Cloud::Gcp),
            };
            if let Some(cloud) = cloud.filter(|cloud| Cloud::of(&host) != Some(*cloud)) {
                self.add(
                    &format!("spec.registries[{index}].provider"),
                    &format!(
                        "{cloud} is only for registries of that cloud, which {host} is not; remove it, and use a Secret"
                    ),
                );
            }
            let settings = RegistrySettings {
                cloud,
                plain_http: registry.plain_http.unwrap_or_default(),
                cert_secret: registry.cert_secret_ref.as_ref().map(|secret| secret.name.clone()),
                proxy_secret: registry.proxy_secret_ref.as_ref().map(|secret| secret.name.clone()),
            };
            // Its tokens are good for more than this registry, and go only to whom the administrator trusts to be it.
            if cloud.is_some() && (settings.plain_http || settings.cert_secret.is_some()) {
                self.add(&field, "provider goes with neither plainHTTP nor certSecretRef; remove these");
            }
            if settings.plain_http && settings.cert_secret.is_some() {
                self.add(&field, "plainHTTP and certSecretRef exclude each other");
            }
            if registries.insert(host, settings).is_some() {
                self.add(&field, "the host is listed twice");
            }
        }
        registries
    }
}

/// The images that one entry of the list asks for, or what is wrong with it.
fn wanted_images(image: &Image, template: &str, field: &str) -> Result<(Vec<WantedImage>, Option<WantedTags>), String> {
    let fail = |field: &str, what: &str| format!("{field}: {what}");
    let source_field = format!("{field}.source");
    let reference: Reference = image.source.parse().map_err(|error| fail(&source_field, &format!("{error}")))?;
    let parse_tags = |name: &str, tags: &[String]| -> Result<Vec<Tag>, String> {
        let parse =
            |tag: &String| tag.parse::<Tag>().map_err(|error| fail(&format!("{field}.{name}"), &error.to_string()));
        tags.iter().map(parse).collect()
    };
    let tags = parse_tags("tags", &image.tags)?;
    let target_tags = parse_tags("targetTags", &image.target_tags)?;
    let platform = |text: &String| {
        text.parse::<PlatformFilter>().map_err(|error| fail(&format!("{field}.platforms"), &error.to_string()))
    };
    let platforms = image.platforms.iter().map(platform).collect::<Result<Vec<_>, _>>()?;
    check_form(image, &reference).map_err(|(name, what)| fail(&format!("{field}.{name}"), what))?;
    let template = image.target_repository.as_deref().unwrap_or(template);
    let target_repository = expand(template, &reference)
        .map_err(|what| fail(&format!("{field}.targetRepository or spec.target.repository"), &what))?;
    let select = image.select.as_ref().map(selection).transpose().map_err(|what| format!("{field}.{what}"))?;
    let selection = select.map(|select| WantedTags {
        host: reference.host.clone(),
        repository: reference.repository.clone(),
        select,
        target_repository: target_repository.clone(),
        platforms: platforms.clone(),
    });
    let source_tags: Vec<Option<Tag>> = match (&reference.tag, &reference.digest) {
        (None, None) => tags.into_iter().map(Some).collect(),
        (tag, _) => vec![tag.clone()],
    };
    let mut wanted = Vec::new();
    for tag in source_tags {
        let written: Vec<Tag> =
            if target_tags.is_empty() { tag.iter().cloned().collect() } else { target_tags.clone() };
        for target_tag in written {
            let source = ImageSource {
                host: reference.host.clone(),
                repository: reference.repository.clone(),
                tag: tag.clone(),
                digest: reference.digest.clone(),
            };
            let (target_repository, platforms) = (target_repository.clone(), platforms.clone());
            wanted.push(WantedImage { source, target_repository, target_tag, platforms });
        }
    }
    Ok((wanted, selection))
}

/// Which fields exclude and need each other, as the rules of the schema say it.
fn check_form(image: &Image, source: &Reference) -> Result<(), (&'static str, &'static str)> {
    let (selects, has_own) = (image.select.is_some(), source.tag.is_some() || source.digest.is_some());
    if source.digest.is_some() && !image.tags.is_empty() {
        return Err(("tags", "source has a digest: remove tags; write targetTags for the tags to write at the target"));
    }
    if has_own && !image.tags.is_empty() {
        return Err(("tags", "source has a tag: write tags either in source or in tags, not in both"));
    }
    if has_own && selects {
        let what = "has a tag or a digest: select chooses among the tags of a repository, so write source without one";
        return Err(("source", what));
    }
    if !has_own && image.tags.is_empty() && !selects {
        let what =
            "name what to mirror: add a tag, as in registry.example.com/app:1.0, or list tags, or select them by rule";
        return Err(("source", what));
    }
    if source.digest.is_some() && source.tag.is_none() && image.target_tags.is_empty() {
        return Err(("source", "has a digest and no tag: write targetTags, the tags to write at the target"));
    }
    if !image.target_tags.is_empty() && selects {
        return Err(("targetTags", "select keeps the tags of the source: remove targetTags"));
    }
    if !image.target_tags.is_empty() && image.tags.len() > 1 {
        return Err(("targetTags", "is for a source with one tag or a digest: list one tag, or remove targetTags"));
    }
    Ok(())
}

fn selection(select: &Select) -> Result<Selection, String> {
    let limit = match select.limit {
        None => None,
        Some(limit) => Some(usize::try_from(limit).map_err(|_| "select.limit: write at least 1".to_owned())?),
    };
    let rules = Rules {
        pattern: select.pattern.clone(),
        extract: select.extract.clone(),
        exclude: select.exclude.clone(),
        semver: select.semver.clone(),
        sort_by: select.sort_by,
        limit,
    };
    Selection::try_from(rules).map_err(|error| error.to_string())
}

/// Expands `{registry}`, `{repository}`, `{parent}` and `{name}`. Doubled and leading slashes are removed.
fn expand(template: &str, source: &Reference) -> Result<RepositoryName, String> {
    let expanded = template
        .replace("{registry}", &source.host.as_str().replace(':', "-"))
        .replace("{repository}", source.repository.as_str())
        .replace("{parent}", source.repository.parent())
        .replace("{name}", source.repository.last_part());
    if expanded.contains(['{', '}']) {
        return Err(format!(
            "{template:?} has an unknown placeholder; write {{registry}}, {{repository}}, {{parent}} or {{name}}"
        ));
    }
    let parts: Vec<&str> = expanded.split('/').filter(|part| !part.is_empty()).collect();
    parts.join("/").parse().map_err(|error| format!("{error}"))
}

fn spec_hash(spec: &ImageMirrorSpec) -> String {
    let relevant = ImageMirrorSpec {
        suspend: None,
        interval: None,
        schedule: None,
        time_zone: None,
        timeout: None,
        ..spec.clone()
    };
    // Serialising plain structs of strings does not fail; if it did, every spec would count as the same.
    Digest::sha256(&serde_json::to_vec(&relevant).unwrap_or_default()).hex().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror(images: &str, rest: &str) -> ImageMirror {
        let text = format!(
            "apiVersion: imagemirror.dev/v1alpha1\nkind: ImageMirror\nmetadata: {{name: a, namespace: n}}\n\
             spec:\n  target: {{registry: target.example.com, repository: 'mirror/{{name}}'}}\n  images: {images}\n{rest}"
        );
        serde_saphyr::from_str(&text).unwrap()
    }

    fn targets(images: &str) -> Vec<String> {
        let mirror = validate(&mirror(images, "")).unwrap();
        mirror.images.iter().map(|image| mirror.target_of(image)).collect()
    }

    fn error(images: &str, rest: &str) -> String {
        validate(&mirror(images, rest)).unwrap_err().to_string()
    }

    #[test]
    fn each_tag_has_one_target() {
        assert_eq!(
            targets(
                "[{source: gcr.io/a/agent, tags: ['1', '2']}, {source: nginx:1.27, targetRepository: '{registry}/{repository}'}]"
            ),
            [
                "target.example.com/mirror/agent:1",
                "target.example.com/mirror/agent:2",
                "target.example.com/docker.io/library/nginx:1.27"
            ]
        );
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(targets(&format!("[{{source: 'gcr.io/a@{digest}', targetTags: [x, y]}}]")).len(), 2);
        assert_eq!(targets(&format!("[{{source: 'gcr.io/a:t@{digest}'}}]")), ["target.example.com/mirror/a:t"]);
        assert_eq!(
            targets("[{source: 'localhost:5000/x:1', targetRepository: '/{registry}//{parent}/{name}'}]"),
            ["target.example.com/localhost-5000/x:1"]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (images, rest, expected) in [
            ("[]", "", "spec.images: name at least one image"),
            ("[{source: gcr.io/a}]", "", "spec.images[0].source: name what to mirror"),
            ("[{source: 'gcr.io/a:1', tags: ['2']}]", "", "not in both"),
            ("[{source: 'https://gcr.io/a:1'}]", "", "without a scheme"),
            (&format!("[{{source: 'gcr.io/a@{digest}'}}]"), "", "write targetTags"),
            ("[{source: gcr.io/a, tags: ['1','2'], targetTags: [x]}]", "", "targetTags"),
            ("[{source: gcr.io/a, tags: ['-']}]", "", "spec.images[0].tags: invalid tag"),
            (
                "[{source: 'gcr.io/a:1'}, {source: 'quay.io/a:1'}]",
                "",
                "gcr.io/a and quay.io/a both want the target tag mirror/a:1",
            ),
            ("[{source: 'gcr.io/a:1', targetRepository: '{nme}'}]", "", "unknown placeholder"),
            ("[{source: 'gcr.io/a:1', platforms: [amd64]}]", "", "spec.images[0].platforms: invalid platform"),
            ("[{source: 'gcr.io/a:1'}]", "  referrers: {policy: Selected}", "spec.referrers: artifactTypes goes with"),
            (
                "[{source: 'gcr.io/a:1'}]",
                "  referrers: {artifactTypes: [a/b]}",
                "spec.referrers: artifactTypes goes with",
            ),
            ("[{source: 'gcr.io/a:1', select: {pattern: a}}]", "", "select chooses among the tags"),
            (
                "[{source: gcr.io/a, select: {pattern: a}, targetTags: [b]}]",
                "",
                "spec.images[0].targetTags: select keeps",
            ),
            ("[{source: gcr.io/a, select: {pattern: '('}}]", "", "spec.images[0].select.pattern: \"(\" is no regular"),
            (
                "[{source: gcr.io/a, select: {semver: 1.x, limit: -1}}]",
                "",
                "spec.images[0].select.limit: write at least 1",
            ),
            ("[{source: 'gcr.io/a:1'}]", "  schedule: '0 3 * *'", "spec.schedule: \"0 3 * *\" is no schedule"),
            ("[{source: 'gcr.io/a:1'}]", "  schedule: '0 3 * * *'\n  interval: 1h", "exclude each other"),
            ("[{source: 'gcr.io/a:1'}]", "  timeZone: UTC", "spec.timeZone: goes with schedule"),
            (
                &format!(
                    "[{{source: gcr.io/a, tags: [{}]}}, {{source: gcr.io/b, tags: [x]}}]",
                    (0..100).map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", ")
                ),
                "  policy: {overwrite: IfOwned}",
                "spec.images: 101 tags are wanted, at most 100 can be with policy.overwrite IfOwned",
            ),
            ("[{source: 'gcr.io/a:1'}]", "  interval: 5s", "spec.interval: 5s is too short"),
            ("[{source: 'gcr.io/a:1'}]", "  interval: soon", "is not a duration"),
            ("[{source: 'gcr.io/a:1'}]", "  registries: [{host: 'http://x'}]", "spec.registries[0].host"),
            ("[{source: 'gcr.io/a:1'}]", "  registries: [{host: x.io}, {host: X.io}]", "listed twice"),
        ] {
            let message = error(images, rest);
            assert!(message.contains(expected), "{images} {rest}: {message}");
        }
    }

    #[test]
    fn the_hash_leaves_out_what_does_not_change_the_outcome() {
        let hash = |rest: &str| validate(&mirror("[{source: 'gcr.io/a:1'}]", rest)).unwrap().spec_hash;
        let plain = hash("");
        assert_eq!(hash("  interval: 2h\n  timeout: 1h\n  suspend: true"), plain);
        assert_eq!(hash("  schedule: '0 3 * * *'\n  timeZone: Europe/Berlin"), plain);
        assert_ne!(hash("  serviceAccountName: x"), plain);
    }
}
