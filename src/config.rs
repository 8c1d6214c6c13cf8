//! The operator's own configuration: a YAML file, read once at start. `config/operator.yaml` shows every key.
//!
//! Unknown keys are refused, so that a typing error is not a setting that silently does nothing. An error names the
//! file, the key and what to write. Credentials are no part of it.

mod timing;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    net::IpAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use ipnet::IpNet;
use serde::Deserialize;

pub use timing::Timing;

use crate::{
    api::parse_duration,
    auth::{
        NewRepository,
        cloud::{EcrHost, GcpTrust, GcpTrustError},
    },
    oci::Host,
    registry::{
        self, ClientOptions, Floor, HostOptions, Memory, Networks, Proxy, Quirks, Transport, TransportError,
        UploadStrategy,
    },
    telemetry::logging::{self, Format},
};

/// No limit is higher: what it counts takes memory and connections.
const MAX_LIMIT: usize = 10_000;
/// What is below is too slow: an ordinary line is not.
const MAX_FLOOR: u64 = 1 << 20;
/// Mebibytes for manifests and lists: two of the largest must have room, and more than a Pod has is no bound.
const MEMORY: RangeInclusive<u32> = 8..=1024;
/// No duration is longer: thirty days.
const MAX_DURATION: Duration = Duration::from_hours(720);
/// What is left, when the write of a tag has ended, of the time that had to be left when it began.
const TAG_WRITE_SLACK: Duration = Duration::from_secs(1);

/// The operator's own configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// How registries are reached, by host.
    pub registries: HashMap<Host, RegistryConfig>,
    /// The file with certificates to trust for every registry, beside the system's roots and its own.
    pub ca_file: Option<PathBuf>,
    /// What was in it. Filled by [`Config::load`].
    pub ca: Option<Bytes>,
    /// What is bounded.
    pub limits: Limits,
    /// The networks that no connection to a registry goes to.
    pub networks: Networks,
    /// Namespaces whose objects are served; empty: all.
    pub watch_namespaces: Vec<String>,
    /// The namespaces whose objects may log in to registries of clouds with the operator's own identity.
    pub identity_namespaces: Vec<String>,
    /// By what Google knows the cluster.
    pub gcp_trust: Option<GcpTrust>,
    /// Whether Secrets are watched, so that what waits for one goes on at once.
    pub watch_secrets: bool,
    /// Every duration.
    pub timing: Timing,
    /// What is logged, and how.
    pub log: Log,
    /// How metrics are served.
    pub metrics: Metrics,
}

/// How metrics are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// With TLS, on a listener of their own.
    pub tls: Option<TlsFiles>,
    /// Who may read them.
    pub authentication: Authentication,
}

/// A certificate chain and its key, PEM both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// Who may read the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Authentication {
    /// Everybody who reaches them.
    #[default]
    None,
    /// Those of whose bearer token the API server says that they may `get` the path `/metrics`.
    TokenReview,
}

/// How one registry is reached.
#[derive(Clone, Debug, Default)]
pub struct RegistryConfig {
    /// Talk HTTP without TLS.
    pub plain_http: bool,
    /// The file with certificates to trust beside the system's roots.
    pub ca_file: Option<PathBuf>,
    /// What was in it, and in the one for every registry. Filled by [`Config::load`].
    pub ca: Option<Bytes>,
    /// The proxy that connections go through.
    pub proxy: Option<Arc<Proxy>>,
    /// Token servers and limits.
    pub options: HostOptions,
}

/// What is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Objects that are synced at one time.
    pub runs: usize,
    /// Bytes of a body that have to move in a second, on average over [`Timing::floor_window`]; 0 is no bound.
    pub min_bytes_per_second: u64,
    /// Bytes of manifests and lists that are in memory at one time.
    pub memory: u32,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// How lines are written.
    pub format: Format,
    /// A level or a filter, as [`logging::init`] takes it.
    pub level: String,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {} cannot be read: {source}; name another with --config", path.display())]
    Read {
        /// The configuration.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not YAML of the known keys.
    #[error("{}: {source}; correct it there", path.display())]
    Yaml {
        /// The configuration.
        path: PathBuf,
        /// Where and why.
        source: Box<serde_saphyr::Error>,
    },
    /// A value is wrong, or does not go with another.
    #[error("{}: {key}: {problem}", path.display())]
    Value {
        /// The configuration.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, and what to write.
        problem: String,
    },
    /// A CA file cannot be read.
    #[error("{}: caFile {} of {of} cannot be read: {source}", path.display(), file.display())]
    CaRead {
        /// The configuration.
        path: PathBuf,
        /// The CA file.
        file: PathBuf,
        /// What it is for.
        of: String,
        /// Why.
        source: io::Error,
    },
    /// A CA file holds no usable certificate.
    #[error("{}: caFile {} of {of} holds no valid PEM certificate", path.display(), file.display())]
    Ca {
        /// The configuration.
        path: PathBuf,
        /// The CA file.
        file: PathBuf,
        /// What it is for.
        of: String,
        /// Why.
        source: TransportError,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            registries: HashMap::new(),
            ca_file: None,
            ca: None,
            limits: Limits::default(),
            networks: Networks::closed(Vec::new(), Vec::new()),
            watch_namespaces: Vec::new(),
            identity_namespaces: Vec::new(),
            gcp_trust: None,
            watch_secrets: false,
            timing: Timing::default(),
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { runs: 4, min_bytes_per_second: Floor::default().per_second, memory: Memory::DEFAULT }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: Format::Json, level: "info".to_owned() }
    }
}

impl Config {
    /// The configuration in a file and the CA files it names; a relative one is looked for beside it. Without a file,
    /// the default.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config = Self::parse(&text, path)?;
        let beside = |file: &Path| path.parent().map_or_else(|| file.to_owned(), |folder| folder.join(file));
        if let Some(tls) = &mut config.metrics.tls {
            (tls.cert, tls.key) = (beside(&tls.cert), beside(&tls.key));
        }
        let read_ca = |file: &Path, of: String| read_ca(path, beside(file), of);
        config.ca = config.ca_file.as_deref().map(|file| read_ca(file, "all registries".to_owned())).transpose()?;
        for (host, registry) in &mut config.registries {
            let own = registry.ca_file.as_deref().map(|file| read_ca(file, format!("registry {host}"))).transpose()?;
            registry.ca = both(own, config.ca.clone());
        }
        Ok(config)
    }

    /// The configuration in a text. Reads no file; `path` is what errors call the text.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! { with_snippet: false };
        let file: Option<File> = serde_saphyr::from_str_with_options(text, options)
            .map_err(|source| ConfigError::Yaml { path: path.to_owned(), source: Box::new(source) })?;
        file.unwrap_or_default().validate().map_err(|Wrong { key, problem }| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        })
    }

    /// Whether the objects of a namespace are served.
    #[must_use]
    pub fn watches(&self, namespace: &str) -> bool {
        self.watch_namespaces.is_empty() || self.watch_namespaces.iter().any(|watched| watched == namespace)
    }

    /// The timing that decides when Secrets are asked for: as seldom as can be where they are watched.
    #[must_use]
    pub fn timing_of_decisions(&self) -> Timing {
        let mut timing = self.timing.clone();
        if self.watch_secrets {
            timing.secret_retry = timing.secret_retry_max;
        }
        timing
    }

    /// What the registry client needs to know.
    #[must_use]
    pub fn client_options(&self) -> ClientOptions {
        let timing = registry::Timing {
            connect: self.timing.connect_timeout,
            pool_idle: self.timing.pool_idle_timeout,
            head: self.timing.head_timeout,
            idle: self.timing.idle_timeout,
            floor: Floor { per_second: self.limits.min_bytes_per_second, window: self.timing.floor_window },
            hold: self.timing.hold_timeout,
            answer: self.timing.answer_timeout,
            cancel: self.timing.cancel_timeout,
            backoff_first: self.timing.backoff_first,
            backoff_max: self.timing.backoff_max,
            tag_write: self.timing.tag_write_timeout,
            rate_pause: self.timing.rate_pause,
            rate_pause_max: self.timing.rate_pause_max,
            rate_wait_max: self.timing.rate_wait_max,
        };
        let hosts = self.registries.iter().map(|(host, registry)| (host.clone(), registry.options.clone())).collect();
        let transports = self.registries.keys().map(|host| (host.clone(), self.transport_for(host))).collect();
        ClientOptions {
            timing,
            networks: self.networks.clone(),
            hosts,
            transports,
            transport: self.transport_for_others(),
            memory: Some(self.limits.memory),
            counters: None,
        }
    }

    /// How a host is reached, as far as the operator's configuration says.
    #[must_use]
    pub fn transport_for(&self, host: &Host) -> Transport {
        self.registries.get(host).map_or_else(
            || self.transport_for_others(),
            |registry| Transport {
                plain_http: registry.plain_http,
                ca: registry.ca.clone(),
                identity: None,
                proxy: registry.proxy.clone(),
            },
        )
    }

    fn transport_for_others(&self) -> Transport {
        Transport { ca: self.ca.clone(), ..Transport::default() }
    }
}

/// The certificates of a file, which can be used all of them.
fn read_ca(path: &Path, file: PathBuf, of: String) -> Result<Bytes, ConfigError> {
    let path = path.to_owned();
    let ca = match fs::read(&file) {
        Ok(bytes) => Bytes::from(bytes),
        Err(source) => return Err(ConfigError::CaRead { path, file, of, source }),
    };
    match (Transport { ca: Some(ca.clone()), ..Transport::default() }).check() {
        Ok(()) => Ok(ca),
        Err(source) => Err(ConfigError::Ca { path, file, of, source }),
    }
}

/// Certificates of two files as those of one.
fn both(one: Option<Bytes>, other: Option<Bytes>) -> Option<Bytes> {
    match (one, other) {
        (Some(one), Some(other)) => Some([&one[..], b"\n", &other[..]].concat().into()),
        (one, other) => one.or(other),
    }
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct File {
    registries: Vec<RegistryEntry>,
    #[serde(rename = "caFile")]
    ca: Option<PathBuf>,
    limits: LimitsEntry,
    networks: NetworksEntry,
    watch_namespaces: Vec<String>,
    identity_namespaces: Vec<String>,
    gcp: GcpEntry,
    secrets: SecretsEntry,
    timing: BTreeMap<String, String>,
    log: LogEntry,
    metrics: MetricsEntry,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RegistryEntry {
    host: String,
    #[serde(default, rename = "plainHTTP")]
    plain_http: bool,
    ca_file: Option<PathBuf>,
    proxy: Option<String>,
    #[serde(default)]
    auth_hosts: Vec<String>,
    #[serde(default)]
    upload_hosts: Vec<String>,
    upload_strategy: Option<StrategyEntry>,
    #[serde(default)]
    quirks: QuirksEntry,
    create_repositories: Option<NewRepositoryEntry>,
    #[serde(default)]
    limits: HostLimitsEntry,
}

/// How repositories are made that pushes need.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct NewRepositoryEntry {
    tags: BTreeMap<String, String>,
    immutable_tags: bool,
    scan_on_push: bool,
}

/// How large blobs are sent.
#[derive(Clone, Copy, Debug, Deserialize)]
enum StrategyEntry {
    Put,
    Patch,
    Chunks,
}

/// What a registry does and does not do, where that is not what is known of its host.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct QuirksEntry {
    mounts: Option<bool>,
    resumes_uploads: Option<bool>,
    #[serde(rename = "referrersAPI")]
    referrers_api: Option<bool>,
    absent_is_forbidden: Option<bool>,
}

impl QuirksEntry {
    fn over(&self, known: Quirks, strategy: Option<StrategyEntry>) -> Quirks {
        let upload = strategy.map(|strategy| match strategy {
            StrategyEntry::Put => UploadStrategy::Put,
            StrategyEntry::Patch => UploadStrategy::Patch,
            StrategyEntry::Chunks => UploadStrategy::chunks(),
        });
        Quirks {
            upload: upload.unwrap_or(known.upload),
            mounts: self.mounts.unwrap_or(known.mounts),
            resumes_uploads: self.resumes_uploads.unwrap_or(known.resumes_uploads),
            referrers_api: self.referrers_api.or(known.referrers_api),
            absent_is_forbidden: self.absent_is_forbidden.unwrap_or(known.absent_is_forbidden),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct HostLimitsEntry {
    requests: Option<usize>,
    streams: Option<usize>,
    per_second: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct LimitsEntry {
    runs: Option<usize>,
    min_bytes_per_second: Option<u64>,
    memory: Option<String>,
}

impl LimitsEntry {
    fn validate(&self) -> Result<Limits, Wrong> {
        let default = Limits::default();
        let min_bytes_per_second = self.min_bytes_per_second.unwrap_or(default.min_bytes_per_second);
        if min_bytes_per_second > MAX_FLOOR {
            let problem = format!("{min_bytes_per_second} is out of range: write 0 (no bound) to {MAX_FLOOR}");
            return Err(Wrong::new("limits.minBytesPerSecond", problem));
        }
        let memory = self.memory.as_deref().map_or(Ok(default.memory), mebibytes)?;
        Ok(Limits { runs: limit("limits.runs", self.runs, default.runs)?, min_bytes_per_second, memory })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NetworksEntry {
    deny: Vec<String>,
    allow: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SecretsEntry {
    watch: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct GcpEntry {
    workload_identity: Option<String>,
}

impl GcpEntry {
    fn validate(&self) -> Result<Option<GcpTrust>, Wrong> {
        let wrong = |error: GcpTrustError| Wrong::new("gcp.workloadIdentity", error.to_string());
        self.workload_identity.as_deref().map(str::parse).transpose().map_err(wrong)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogEntry {
    format: Option<Format>,
    level: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct MetricsEntry {
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    authentication: Option<Authentication>,
}

impl MetricsEntry {
    fn validate(self) -> Result<Metrics, Wrong> {
        let authentication = self.authentication.unwrap_or_default();
        let tls = match (self.cert_file, self.key_file) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (None, None) if authentication == Authentication::TokenReview => {
                let problem = "needs TLS, or tokens would be sent in the clear: write certFile and keyFile";
                return Err(Wrong::new("metrics.authentication", problem));
            }
            (None, None) => None,
            (None, _) => return Err(Wrong::new("metrics.certFile", "is absent: write it beside keyFile")),
            (_, None) => return Err(Wrong::new("metrics.keyFile", "is absent: write it beside certFile")),
        };
        Ok(Metrics { tls, authentication })
    }
}

struct Wrong {
    key: String,
    problem: String,
}

impl Wrong {
    fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

fn check_namespaces(key: &str, namespaces: &[String]) -> Result<(), Wrong> {
    let mut seen = HashSet::new();
    for (index, namespace) in namespaces.iter().enumerate() {
        let problem = match () {
            () if !is_label(namespace) => "is no name of a namespace: use a-z, 0-9 and '-', at most 63 characters",
            () if !seen.insert(namespace) => "is there twice: write it once",
            () => continue,
        };
        return Err(Wrong::new(format!("{key}[{index}]"), format!("{namespace:?} {problem}")));
    }
    Ok(())
}

impl File {
    fn validate(self) -> Result<Config, Wrong> {
        let mut registries = HashMap::new();
        for (index, entry) in self.registries.into_iter().enumerate() {
            let key = format!("registries[{index}]");
            let (host, registry) = entry.validate(&key)?;
            if registries.insert(host.clone(), registry).is_some() {
                return Err(Wrong::new(format!("{key}.host"), format!("{host} is there twice: write it once")));
            }
        }
        check_namespaces("watchNamespaces", &self.watch_namespaces)?;
        check_namespaces("identityNamespaces", &self.identity_namespaces)?;
        let log = Log {
            format: self.log.format.unwrap_or(Log::default().format),
            level: self.log.level.unwrap_or(Log::default().level),
        };
        logging::filter(&log.level).map_err(|error| Wrong::new("log.level", error.to_string()))?;
        Ok(Config {
            registries,
            ca_file: self.ca,
            ca: None,
            limits: self.limits.validate()?,
            networks: self.networks.validate()?,
            watch_namespaces: self.watch_namespaces,
            identity_namespaces: self.identity_namespaces,
            gcp_trust: self.gcp.validate()?,
            watch_secrets: self.secrets.watch,
            timing: timing(&self.timing)?,
            log,
            metrics: self.metrics.validate()?,
        })
    }
}

impl RegistryEntry {
    fn validate(self, key: &str) -> Result<(Host, RegistryConfig), Wrong> {
        let parse = |key: String, text: &str| text.parse::<Host>().map_err(|error| Wrong::new(key, error.to_string()));
        let hosts = |name: &str, texts: &[String]| {
            let texts = texts.iter().enumerate();
            texts.map(|(index, text)| parse(format!("{key}.{name}[{index}]"), text)).collect::<Result<Vec<_>, _>>()
        };
        let host = parse(format!("{key}.host"), &self.host)?;
        let default = HostOptions::default();
        let per_second = self.limits.per_second.map(|found| limit(&format!("{key}.limits.perSecond"), Some(found), 1));
        let options = HostOptions {
            auth_hosts: hosts("authHosts", &self.auth_hosts)?,
            upload_hosts: hosts("uploadHosts", &self.upload_hosts)?,
            requests: limit(&format!("{key}.limits.requests"), self.limits.requests, default.requests)?,
            streams: limit(&format!("{key}.limits.streams"), self.limits.streams, default.streams)?,
            per_second: per_second.transpose()?.and_then(|found| u32::try_from(found).ok()),
            quirks: Some(self.quirks.over(Quirks::of(&host), self.upload_strategy)),
            new_repositories: self.create_repositories.map(|wanted| NewRepository {
                tags: wanted.tags,
                immutable_tags: wanted.immutable_tags,
                scan_on_push: wanted.scan_on_push,
            }),
        };
        let has_api = matches!(EcrHost::of(&host), Some(EcrHost::Private { .. }));
        if options.new_repositories.is_some() && !has_api {
            let problem = format!("{host} is no private registry of Amazon: repositories are created at these alone");
            return Err(Wrong::new(format!("{key}.createRepositories"), problem));
        }
        // A copy inside one registry holds a request for the upload and one for the download.
        if options.requests <= options.streams {
            let problem =
                format!("{} is too few: write more than limits.streams ({})", options.requests, options.streams);
            return Err(Wrong::new(format!("{key}.limits.requests"), problem));
        }
        if self.plain_http && self.ca_file.is_some() {
            return Err(Wrong::new(format!("{key}.caFile"), "goes with TLS only: write either plainHTTP or caFile"));
        }
        let proxy = self.proxy.as_deref().map(|address| Proxy::new(address, None).map(Arc::new)).transpose();
        let proxy = proxy.map_err(|error| Wrong::new(format!("{key}.proxy"), error.to_string()))?;
        let registry = RegistryConfig { plain_http: self.plain_http, ca_file: self.ca_file, ca: None, proxy, options };
        Ok((host, registry))
    }
}

impl NetworksEntry {
    fn validate(&self) -> Result<Networks, Wrong> {
        let parse = |key: &str, texts: &[String]| {
            let one = |(index, text): (usize, &String)| {
                let single = text.parse::<IpAddr>().map(IpNet::from);
                text.parse::<IpNet>().or(single).map_err(|_| {
                    let problem = format!("{text:?} is no network: write for example 10.96.0.0/12 or fd00::/8");
                    Wrong::new(format!("networks.{key}[{index}]"), problem)
                })
            };
            texts.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()
        };
        Ok(Networks::closed(parse("deny", &self.deny)?, parse("allow", &self.allow)?))
    }
}

fn limit(key: &str, found: Option<usize>, default: usize) -> Result<usize, Wrong> {
    match found.unwrap_or(default) {
        value if (1..=MAX_LIMIT).contains(&value) => Ok(value),
        value => Err(Wrong::new(key, format!("{value} is out of range: write 1 to {MAX_LIMIT}"))),
    }
}

/// Reads a quantity of memory, as Kubernetes writes them.
fn mebibytes(text: &str) -> Result<u32, Wrong> {
    let count = text.strip_suffix("Mi").and_then(|count| count.parse::<u32>().ok());
    let count = count.filter(|count| MEMORY.contains(count)).ok_or_else(|| {
        let problem = format!("{text:?} is no such quantity: write {}Mi to {}Mi", MEMORY.start(), MEMORY.end());
        Wrong::new("limits.memory", problem)
    })?;
    Ok(count << 20)
}

fn timing(entries: &BTreeMap<String, String>) -> Result<Timing, Wrong> {
    let mut timing = Timing::default();
    for (key, text) in entries {
        let Some(place) = timing.by_key(key) else {
            return Err(Wrong::new(
                format!("timing.{key}"),
                format!("unknown; use one of {}", Timing::KEYS.join(", ")),
            ));
        };
        *place = duration(text).ok_or_else(|| {
            let problem =
                format!("invalid duration {text:?}: write one above zero and up to 720h, such as 500ms, 30s or 1h30m");
            Wrong::new(format!("timing.{key}"), problem)
        })?;
    }
    check_rules(&timing)?;
    Ok(timing)
}

fn duration(text: &str) -> Option<Duration> {
    parse_duration(text).filter(|parsed| !parsed.is_zero() && *parsed <= MAX_DURATION)
}

/// Checks what durations have to do with each other.
fn check_rules(timing: &Timing) -> Result<(), Wrong> {
    let at_most = |key: &str, value: Duration, other: &str, bound: Duration| {
        let problem = || format!("{value:?} is too long: write at most {bound:?}, which is {other}");
        if value <= bound { Ok(()) } else { Err(Wrong::new(format!("timing.{key}"), problem())) }
    };
    let t = timing;
    at_most("leaseRenew", t.lease_renew, "a third of timing.leaseDuration", t.lease_duration / 3)?;
    let before_renewal = t.lease_duration.saturating_sub(t.lease_renew);
    at_most("tagWriteMargin", t.tag_write_margin, "timing.leaseDuration less timing.leaseRenew", before_renewal)?;
    let before_end = t.tag_write_margin.saturating_sub(TAG_WRITE_SLACK);
    at_most("tagWriteTimeout", t.tag_write_timeout, "timing.tagWriteMargin less a second", before_end)?;
    at_most("retryTransientMin", t.retry_transient_min, "timing.retryTransientMax", t.retry_transient_max)?;
    at_most("apiBackoffFirst", t.api_backoff_first, "timing.apiBackoffMax", t.api_backoff_max)?;
    at_most("ratePause", t.rate_pause, "timing.ratePauseMax", t.rate_pause_max)?;
    at_most("secretRetry", t.secret_retry, "timing.secretRetryMax", t.secret_retry_max)?;
    at_most("backoffFirst", t.backoff_first, "timing.backoffMax", t.backoff_max)
}

/// A DNS label (RFC 1123), as the names of namespaces are.
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests;
