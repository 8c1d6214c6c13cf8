//! `imagemirror.dev/v1alpha1`. The descriptions here are what `kubectl explain imagemirror` prints.
//!
//! No field of the spec has a default in the schema: defaults inside lists make GitOps tools see a difference for
//! ever. Grammar lives in patterns, which cost no CEL budget; what excludes or requires what lives in CEL rules.
//! Enumerations have no description of their own: it would replace that of the field.

#![allow(unreachable_pub, reason = "the derive macro for the schema repeats the types inside a function")]

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::{
    copy::ForeignLayers,
    oci::Digest,
    plan::{Overwrite, SourceMoved},
    reason::Reason,
    select::SortBy,
};

/// A duration such as `90s`, `1h` or `1h30m`.
const DURATION: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";
/// `host[:port]`.
const HOST: &str = r"^([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?$";
/// `[host[:port]/]repository[:tag][@digest]`.
const SOURCE: &str = r"^(([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?/)?[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}))?$";
/// A tag.
const TAG: &str = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$";
/// A repository in which `{registry}`, `{repository}`, `{parent}` and `{name}` may stand.
const TEMPLATE: &str = r"^([a-z0-9._/-]|\{(registry|repository|parent|name)\})+$";
/// `os/arch` or `os/arch/variant`.
const PLATFORM: &str = r"^[a-z0-9]{1,32}/[a-z0-9]{1,32}(/[a-z0-9]{1,32})?$";
/// A media type (RFC 6838).
const MEDIA_TYPE: &str = r"^[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}$";
/// Five cron fields.
const CRON: &str = r"^[0-9A-Za-z*/,-]+( [0-9A-Za-z*/,-]+){4}$";
/// The IANA name of a time zone.
const ZONE: &str = r"^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$";
/// A range of versions as node-semver writes it.
const RANGE: &str = r"^[0-9A-Za-z .*<>=~^|+-]+$";
/// The name of a Secret or `ServiceAccount`.
const OBJECT_NAME: &str = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$";

/// Images that are kept in step at a target registry.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "imagemirror.dev",
    version = "v1alpha1",
    kind = "ImageMirror",
    namespaced,
    status = "ImageMirrorStatus",
    shortname = "imir",
    category = "imagemirror",
    doc = "An ImageMirror names container images, a target registry and pull secrets. The operator copies what is missing at the target, byte for byte, keeps it in step, and says the truth about it in the status.",
    selectable = ".spec.target.registry",
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Synced", type_ = "string", json_path = ".status.synced"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.summary.failed"),
    printcolumn(name = "Target", type_ = "string", json_path = ".spec.target.registry"),
    printcolumn(name = "Last Sync", type_ = "date", json_path = ".status.lastSync.finishedAt"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].message"#, priority = 1),
    printcolumn(name = "Suspended", type_ = "boolean", json_path = ".spec.suspend", priority = 1),
    validation = Rule::new("self.metadata.name.size() <= 52").message("metadata.name must be at most 52 characters")
)]
#[x_kube(
    validation = Rule::new("!has(self.schedule) || !has(self.interval)").message("schedule and interval exclude each other: remove one of them"),
    validation = Rule::new("!has(self.timeZone) || has(self.schedule)").message("timeZone goes with schedule: write a schedule, or remove timeZone")
)]
#[serde(rename_all = "camelCase")]
pub struct ImageMirrorSpec {
    /// What to mirror. Example: `[{source: gcr.io/datadoghq/agent, tags: ["7.70.0"]}]`.
    #[schemars(length(min = 1, max = 500))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub images: Vec<Image>,
    /// Where to mirror it to.
    pub target: Target,
    /// Secrets of this namespace with credentials for the sources, matched by registry and repository as the kubelet
    /// matches them: kubernetes.io/dockerconfigjson, kubernetes.io/dockercfg, or kubernetes.io/basic-auth with the
    /// annotation imagemirror.dev/registry. When absent: sources are read without a credential.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub image_pull_secrets: Vec<SecretReference>,
    /// A `ServiceAccount` of this namespace whose imagePullSecrets are appended to those named here. When absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub service_account_name: Option<String>,
    /// How to reach single registries. When absent: TLS with the system's certificates, or what the operator's
    /// configuration says of the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["host".into()]))]
    pub registries: Vec<Registry>,
    /// How often everything is compared again, at least 30s, with a jitter of 5 %. Example: `6h`. When absent: 1h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = DURATION))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('30s')").message("interval must be at least 30s, for example 1h"))]
    pub interval: Option<String>,
    /// When everything is compared again, in place of interval: five cron fields, minute, hour, day of month, month, day of
    /// week. A new spec is carried out at once all the same; what was missed while the operator was down happens once.
    /// Example: `0 3 * * 1-5`. When absent: interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 100), regex(pattern = CRON))]
    pub schedule: Option<String>,
    /// The IANA time zone of schedule. Example: `Europe/Berlin`. When absent: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = ZONE))]
    pub time_zone: Option<String>,
    /// Start no more runs; one that is running ends by itself. When absent: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
    /// What of that which is attached to images is copied with them: signatures, SBOMs and the like, found by the referrers
    /// API, its fallback tag and the tags of cosign. When absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referrers: Option<Referrers>,
    /// What to do where there is a choice. When absent: see its fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// How long one whole run may take. Example: `30m`. When absent: 6h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = DURATION))]
    #[x_kube(validation = Rule::new("duration(self) > duration('0s')").message("timeout must be longer than 0s, for example 6h"))]
    pub timeout: Option<String>,
}

/// One source repository and which of its images are wanted.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.tags) || !self.source.contains('@')").message("source has a digest: remove tags; write targetTags for the tags to write at the target"),
    validation = Rule::new("!has(self.tags) || !self.source.matches('^[^@]*:[^/@]+(@|$)')").message("source has a tag: write tags either in source or in tags, not in both"),
    validation = Rule::new("has(self.tags) || has(self.select) || self.source.contains('@') || self.source.matches('^[^@]*:[^/@]+(@|$)')").message("name what to mirror: add a tag to source, as in registry.example.com/app:1.0, or list tags, or select them by rule"),
    validation = Rule::new("!has(self.select) || !(self.source.contains('@') || self.source.matches('^[^@]*:[^/@]+(@|$)'))").message("source has a tag or a digest: select chooses among the tags of a repository, so write source without one"),
    validation = Rule::new("!has(self.select) || !has(self.targetTags)").message("select keeps the tags of the source: remove targetTags"),
    validation = Rule::new("!self.source.contains('@') || self.source.matches('^[^@]*:[^/@]+(@|$)') || has(self.targetTags)").message("source has a digest and no tag: write targetTags, the tags to write at the target"),
    validation = Rule::new("!has(self.targetTags) || !has(self.tags) || self.tags.size() == 1").message("targetTags is for a source with one tag or a digest: list one tag, or remove targetTags")
)]
pub struct Image {
    /// `repository`, `repository:tag`, `repository@digest` or `repository:tag@digest`. With a digest that digest is
    /// copied and the tag is not followed. Docker Hub short names are read as Docker reads them. Example:
    /// `gcr.io/datadoghq/agent`.
    #[schemars(length(min = 1, max = 512), regex(pattern = SOURCE))]
    pub source: String,
    /// Tags to mirror by name; not together with a tag or digest in source. Example: `["7.70.0"]`. When absent: the tag of
    /// source, or what select chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 100), inner(regex(pattern = TAG)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub tags: Vec<String>,
    /// Tags to mirror by rule; may stand beside tags. Example: `{semver: ">=7.60 <8", limit: 5}`. When absent: no tag is
    /// chosen by rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Select>,
    /// The repository at the target for this image; a template as target.repository is. When absent:
    /// target.repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = TEMPLATE))]
    pub target_repository: Option<String>,
    /// Tags to write at the target, for a source with one tag or a digest. When absent: the source's tag.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 100), inner(regex(pattern = TAG)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub target_tags: Vec<String>,
    /// Platforms to keep, as `os/arch` with any variant or `os/arch/variant`. The index is rewritten to list these alone, so
    /// that its digest at the target is another, and what is attached to the whole index is not copied. Example:
    /// `["linux/amd64", "linux/arm64"]`. When absent: all, and the digest stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 20), inner(regex(pattern = PLATFORM)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub platforms: Vec<String>,
}

/// Tags by rule, in this order: pattern, extract, exclude, semver, sortBy, limit. Tags that are made of a digest, such as
/// `sha256-…`, are never selected.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.pattern) || has(self.semver)").message("write a pattern or a semver range; all tags is pattern '.*'"),
    validation = Rule::new("!has(self.extract) || has(self.pattern)").message("extract needs a pattern with the groups that it names"),
    validation = Rule::new("!has(self.semver) || !has(self.sortBy) || self.sortBy == 'Semver'").message("sortBy is Semver where semver is given: remove sortBy"),
    validation = Rule::new("!has(self.limit) || has(self.semver) || has(self.sortBy)").message("limit needs sortBy, so that it is known which tags are the highest")
)]
pub struct Select {
    /// A regular expression (RE2) that the whole tag must match. Example: `v?[0-9.]+`. When absent: any tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("''.matches(self) || !''.matches(self)").message("not a valid regular expression"))]
    pub pattern: Option<String>,
    /// What of a tag is compared by semver and sortBy, made of the groups of pattern. Example: `$version`. When absent: the
    /// whole tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub extract: Option<String>,
    /// Regular expressions (RE2); a tag that one of them matches as a whole is left out. Example: `[".*-rc.*"]`. When
    /// absent: none is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), inner(length(min = 1, max = 256)))]
    #[x_kube(merge_strategy = ListMerge::Atomic, validation = Rule::new("self.all(p, ''.matches(p) || !''.matches(p))").message("not a valid regular expression"))]
    pub exclude: Vec<String>,
    /// A range of versions with the grammar and the pre-release rule of node-semver. A `v` before a version is left out,
    /// parts that are missing are 0, and `_` is read as `+`. Example: `>=7.60 <8`. When absent: any tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = RANGE))]
    pub semver: Option<String>,
    /// How tags are compared for limit: Semver, Alphabetical or Numerical; what is no version or no number is left out.
    /// When absent: Semver with semver, else not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sort_by: Option<SortBy>,
    /// How many tags at most, the highest first. Example: `5`. When absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub limit: Option<i32>,
}

/// Which of the artifacts that are attached to images are copied.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.artifactTypes) && self.artifactTypes.size() > 0) == (has(self.policy) && self.policy == 'Selected')").message("artifactTypes goes with policy Selected, and Selected needs artifactTypes")
)]
pub struct Referrers {
    /// All, None, or Selected by artifactTypes. When absent: All.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<ReferrersPolicy>,
    /// The artifact types to copy with policy Selected. Example: `["application/vnd.dev.cosign.artifact.sig.v1+json"]`. When
    /// absent: none are named, as every other policy wants it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20), inner(regex(pattern = MEDIA_TYPE)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub artifact_types: Vec<String>,
}

/// Which of the artifacts that are attached to images are copied.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(description = "")]
pub enum ReferrersPolicy {
    /// Every one.
    All,
    /// None.
    None,
    /// Those of the artifact types that are named.
    Selected,
}

/// What to do where there is a choice.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// What to do when a tag has a new digest at the source. Update: copy it. Keep: keep at the target what was mirrored
    /// first. When absent: Update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_moved: Option<SourceMoved>,
    /// What to do when the target tag has another digest than the wanted one. Always: write the tag. `IfOwned`: only if its
    /// digest is one that this object wrote there. Never: leave it. What is left is reported as `TargetChanged`. When
    /// absent: Always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<Overwrite>,
    /// Layers with `urls`, which their vendors distribute elsewhere. Skip: they stay there. Copy: they are copied, from the
    /// source or from their urls. When absent: Skip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign_layers: Option<ForeignLayers>,
}

/// Where images are mirrored to.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// The registry as host or host:port, without a scheme and without a path. Example: `registry.example.com`.
    #[schemars(length(min = 1, max = 253), regex(pattern = HOST))]
    pub registry: String,
    /// The repository: a template of {registry} (`:` becomes `-`), {repository} (the full path at the source),
    /// {parent} (the path without its last part) and {name} (the last part). Example: `datadog/{name}`. When absent:
    /// `{repository}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = TEMPLATE))]
    pub repository: Option<String>,
    /// The Secret with credentials for the target. When absent: imagePullSecrets are matched for the target too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
}

/// The name of a Secret in the object's own namespace.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
pub struct SecretReference {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub name: String,
}

/// How to reach one registry.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Registry {
    /// The registry as host or host:port, as it stands in source or target. Example: `registry.example.com:5000`.
    #[schemars(length(min = 1, max = 253), regex(pattern = HOST))]
    pub host: String,
    /// Log in with an identity of the cloud whose registry this is, in place of pull secrets: that of the ServiceAccount in
    /// serviceAccountName, else the operator's own, if the administrator lets this namespace use it. Only for hosts of that
    /// cloud, with TLS and the certificates that the administrator trusts. When absent: generic, which is pull secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// Talk HTTP without TLS. When absent: false.
    #[serde(default, rename = "plainHTTP", skip_serializing_if = "Option::is_none")]
    pub plain_http: Option<bool>,
    /// A Secret with `ca.crt` (certificates to trust beside the system's), and `tls.crt` with `tls.key` to show a client
    /// certificate. When absent: the system's certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert_secret_ref: Option<SecretReference>,
    /// A Secret with `address`, the `http://host:port` of a proxy that connections to this registry and to its token server
    /// go through, and, if it asks for a login, `username` and `password`. When absent: no proxy, or the one of the
    /// operator's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_secret_ref: Option<SecretReference>,
}

/// Whose identity logs in to a registry.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(description = "")]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// That of pull secrets.
    Generic,
    /// One of Amazon's: `<account>.dkr.ecr.<region>.amazonaws.com`, `public.ecr.aws`.
    Aws,
    /// One of Azure's: `<name>.azurecr.io`.
    Azure,
    /// One of Google's: `<region>-docker.pkg.dev`, `gcr.io`.
    Gcp,
}

/// What the operator last saw.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ImageMirrorStatus {
    /// The generation of the spec that this status is about; -1 before the operator has read it.
    #[serde(default = "unobserved")]
    pub observed_generation: i64,
    /// The value of the annotation imagemirror.dev/requestedAt whose run has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
    /// Ready, Reconciling (only when true), Stalled (only when true), `CredentialsResolved`, `TargetInSync`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Images in step of all images, such as `118/120`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<String>,
    /// Images counted by state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
    /// The last run that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sync: Option<LastSync>,
    /// How far the current run is; only while one is running that has something to copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// The first failures, at most 20.
    #[serde(default, deserialize_with = "readable", skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(max = 20))]
    pub failures: Vec<FailureStatus>,
    /// Every image, if there are at most 100 and they fit in 48 KiB; else absent.
    #[serde(default, deserialize_with = "readable", skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(max = 100))]
    pub images: Vec<ImageStatus>,
    /// Whether images is absent because there are too many.
    #[serde(default)]
    pub truncated: bool,
}

fn unobserved() -> i64 {
    -1
}

/// The entries that this version can read. Another version may have written others: they say nothing to this one, and
/// must not make the object unreadable.
fn readable<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let entries = Option::<Vec<serde_json::Value>>::deserialize(deserializer)?.unwrap_or_default();
    Ok(entries.into_iter().filter_map(|entry| serde_json::from_value(entry).ok()).collect())
}

impl Default for ImageMirrorStatus {
    fn default() -> Self {
        Self {
            observed_generation: unobserved(),
            last_handled_reconcile_at: None,
            conditions: Vec::new(),
            synced: None,
            summary: None,
            last_sync: None,
            progress: None,
            failures: Vec::new(),
            images: Vec::new(),
            truncated: false,
        }
    }
}

/// Images counted by state.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// All images.
    pub total: i64,
    /// Images whose target tag has the wanted digest.
    pub synced: i64,
    /// Images that no run has ended for.
    pub pending: i64,
    /// Images that the last run could not bring in step.
    pub failed: i64,
    /// Images whose target a policy left as it is.
    pub skipped: i64,
}

/// The last run that ended.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LastSync {
    /// The generation it was for.
    pub generation: i64,
    /// A hash of the spec without suspend, interval, schedule, timeZone and timeout.
    pub spec_hash: String,
    /// When it began.
    pub started_at: Time,
    /// When it ended.
    pub finished_at: Time,
    /// Bytes of blobs sent to the target.
    pub bytes_copied: i64,
    /// Blobs sent to the target.
    pub blobs_copied: i64,
    /// Blobs that the target took from another of its repositories.
    pub blobs_mounted: i64,
    /// Blobs that the target had.
    pub blobs_present: i64,
}

/// How far the current run is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// Bytes that are at the target.
    pub bytes_done: i64,
    /// Bytes of everything found so far.
    pub bytes_total: i64,
    /// Images finished.
    pub images_done: i64,
    /// All images.
    pub images_total: i64,
}

/// An image that is not in step.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FailureStatus {
    /// The source with its tag or digest.
    pub source: String,
    /// The target with its tag.
    pub target: String,
    /// Why, of the closed list of reasons.
    #[schemars(with = "String")]
    pub reason: Reason,
    /// What happened, where, and what to do.
    pub message: String,
    /// When it first failed.
    pub since: Time,
    /// Runs in a row that it failed in.
    pub attempts: i64,
}

/// One image.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ImageStatus {
    /// The source without its tag.
    pub source: String,
    /// The tag or digest at the source.
    pub tag: String,
    /// The target with its tag.
    pub target: String,
    /// The digest at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub digest: Option<Digest>,
    /// The digest at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub source_digest: Option<Digest>,
    /// Pending, Synced, Failed or Skipped.
    #[schemars(with = "String")]
    pub state: ImageState,
    /// When the target tag was written, or first seen in step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced_at: Option<Time>,
}

/// The state of one image.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// No run has ended for it.
    Pending,
    /// The target tag has the wanted digest.
    Synced,
    /// The last run could not bring it in step.
    Failed,
    /// A policy left the target as it is.
    Skipped,
}

impl ImageMirror {
    /// The value of the annotation that asks for a sync now.
    #[must_use]
    pub fn requested_at(&self) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(super::REQUESTED_AT).map(String::as_str)
    }
}

impl LastSync {
    /// When it ended.
    #[must_use]
    pub fn finished(&self) -> Timestamp {
        self.finished_at.0
    }
}
