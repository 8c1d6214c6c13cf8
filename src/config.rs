//! The operator's own configuration: one YAML file, parsed once into types that cannot hold nonsense.
//!
//! It holds how registries are reached, limits and times, and never a credential. Unknown keys are refused, so that a
//! misspelt one is not silently without effect. `config/operator.yaml` shows every key with its default.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use kube::core::Duration as GoDuration;
use serde::{Deserialize, Deserializer, de};

use crate::{
    oci::Host,
    registry::{ClientOptions, HostOptions, Timing as RegistryTiming, Transport},
    telemetry::logging::Format,
};

/// The operator's configuration.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The limits of the process.
    pub limits: Limits,
    /// The namespaces that are watched; all where none is named.
    pub watch_namespaces: Vec<String>,
    /// Every duration and back-off.
    pub timing: Timing,
    /// What is logged, and how.
    pub log: Log,
    hosts: HashMap<Host, HostOptions>,
    transports: HashMap<Host, Transport>,
}

/// The limits of the process.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Runs at a time.
    pub runs: usize,
}

/// What is logged, and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Log {
    /// Text or JSON.
    pub format: Format,
    /// A level, or a filter.
    pub level: String,
}

/// A configuration that the operator does not start with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the operator's configuration {path} cannot be read: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file does not parse.
    #[error("the operator's configuration {path} is invalid: {what}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong, where.
        what: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
struct File {
    registries: Vec<RegistryEntry>,
    limits: Limits,
    watch_namespaces: Vec<String>,
    timing: Timing,
    log: Log,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RegistryEntry {
    host: Host,
    #[serde(default, rename = "plainHTTP")]
    plain_http: bool,
    ca_file: Option<PathBuf>,
    #[serde(default)]
    auth_hosts: Vec<Host>,
    #[serde(default)]
    limits: RegistryLimits,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RegistryLimits {
    requests: Option<usize>,
    streams: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { runs: 4 }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: Format::default(), level: "info".into() }
    }
}

macro_rules! timing {
    ($($(#[$doc:meta])* $name:ident = $default:expr,)*) => {
        /// Every duration and back-off of the operator. Tests run the same binary with short ones.
        #[derive(Clone, Debug, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub struct Timing {
            $($(#[$doc])* #[serde(deserialize_with = "go_duration")] pub $name: Duration,)*
        }

        impl Default for Timing {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }
    };
}

timing! {
    /// For every call to the Kubernetes API.
    api_timeout = Duration::from_secs(10),
    /// After this time without a renewal the lease may be taken over.
    lease_duration = Duration::from_secs(15),
    /// How often the lease is renewed.
    lease_renew = Duration::from_secs(3),
    /// For the write of one tag.
    tag_write_timeout = Duration::from_secs(8),
    /// The write of a tag begins only with this much of the lease left.
    tag_write_margin = Duration::from_secs(9),
    /// The first retry of a failure that passes by itself; later ones double.
    retry_transient_min = Duration::from_secs(30),
    /// The longest wait between such retries.
    retry_transient_max = Duration::from_mins(15),
    /// The retry of a refused credential.
    retry_auth = Duration::from_mins(15),
    /// How often a Secret that is missing or wrong is looked at, at first.
    secret_retry = Duration::from_secs(5),
    /// For how long that goes on before the waits grow.
    secret_retry_window = Duration::from_mins(2),
    /// The longest wait between looks at a Secret.
    secret_retry_max = Duration::from_mins(5),
    /// When progress is first written.
    progress_first = Duration::from_secs(2),
    /// How often progress is written after that; three times as long once it has been written six times.
    progress_interval = Duration::from_secs(10),
    /// For the head of the answer to a request without a body.
    head_timeout = Duration::from_secs(30),
    /// For the next byte of a transfer.
    idle_timeout = Duration::from_secs(30),
    /// For the answer after the last byte of an upload.
    answer_timeout = Duration::from_mins(10),
    /// The bound of the first wait before a request is repeated; later ones double.
    backoff_first = Duration::from_secs(1),
    /// The highest bound of such waits.
    backoff_max = Duration::from_secs(30),
    /// For runs to end after a signal.
    shutdown = Duration::from_secs(20),
}

/// A positive duration as Go writes it: `90s`, `1h30m`, `500ms`.
fn go_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let parsed = text.parse::<GoDuration>().ok().filter(|duration| !duration.is_negative()).map(Duration::from);
    parsed
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| de::Error::custom(format!("{text:?} is not a duration above zero; write for example 30s or 5m")))
}

impl Config {
    /// Reads the file, or returns the defaults where none is named.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = read(path)?;
        Self::parse(&text, path)
    }

    /// Parses the text of a configuration; `path` is said in errors. Reads the CA files that it names.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let invalid = |what: String| ConfigError::Parse { path: path.to_owned(), what };
        // A file of comments alone is an empty document.
        let file: Option<File> = serde_saphyr::from_str(text).map_err(|error| invalid(error.to_string()))?;
        let File { registries, limits, watch_namespaces, timing, log } = file.unwrap_or_default();
        if limits.runs == 0 {
            return Err(invalid("limits.runs must be at least 1".into()));
        }
        timing.check().map_err(invalid)?;
        let mut config = Self { limits, watch_namespaces, timing, log, ..Self::default() };
        for entry in registries {
            config.add(entry, path)?;
        }
        Ok(config)
    }

    fn add(&mut self, entry: RegistryEntry, path: &Path) -> Result<(), ConfigError> {
        let RegistryEntry { host, plain_http, ca_file, auth_hosts, limits } = entry;
        let invalid =
            |what: &str| ConfigError::Parse { path: path.to_owned(), what: format!("registries, {host}: {what}") };
        let default = HostOptions::default();
        let requests = limits.requests.unwrap_or(default.requests);
        let streams = limits.streams.unwrap_or(default.streams);
        if requests == 0 || streams == 0 {
            return Err(invalid("limits must be at least 1"));
        }
        // A copy inside one registry holds a request for the upload and one for the download.
        if requests <= streams {
            return Err(invalid("limits.requests must be larger than limits.streams"));
        }
        if plain_http && ca_file.is_some() {
            return Err(invalid("plainHTTP and caFile exclude each other"));
        }
        let ca = ca_file.map(|file| read(&file).map(Bytes::from)).transpose()?;
        let transport = Transport { plain_http, ca, identity: None };
        transport.check().map_err(|_| invalid("caFile holds no valid PEM certificate"))?;
        let options = HostOptions { auth_hosts, requests, streams };
        if self.hosts.insert(host.clone(), options).is_some() {
            return Err(invalid("the host is listed twice"));
        }
        self.transports.insert(host, transport);
        Ok(())
    }

    /// Whether objects of this namespace are ours.
    #[must_use]
    pub fn watches(&self, namespace: &str) -> bool {
        self.watch_namespaces.is_empty() || self.watch_namespaces.iter().any(|watched| watched == namespace)
    }

    /// How a registry is reached where the object does not say.
    #[must_use]
    pub fn transport_for(&self, host: &Host) -> Transport {
        self.transports.get(host).cloned().unwrap_or_default()
    }

    /// What the registry client is made with.
    #[must_use]
    pub fn client_options(&self) -> ClientOptions {
        let timing = RegistryTiming {
            head: self.timing.head_timeout,
            idle: self.timing.idle_timeout,
            answer: self.timing.answer_timeout,
            backoff_first: self.timing.backoff_first,
            backoff_max: self.timing.backoff_max,
            tag_write: self.timing.tag_write_timeout,
            tag_write_margin: self.timing.tag_write_margin,
            ..RegistryTiming::default()
        };
        ClientOptions { timing, hosts: self.hosts.clone() }
    }
}

impl Timing {
    /// The times that only make sense together.
    fn check(&self) -> Result<(), String> {
        let (duration, renew) = (self.lease_duration, self.lease_renew);
        if renew * 3 > duration {
            return Err(format!(
                "timing.leaseDuration ({duration:?}) must be at least 3 × timing.leaseRenew ({renew:?})"
            ));
        }
        let (write, margin) = (self.tag_write_timeout, self.tag_write_margin);
        if write >= margin {
            return Err(format!(
                "timing.tagWriteMargin ({margin:?}) must be longer than timing.tagWriteTimeout ({write:?})"
            ));
        }
        if margin + renew > duration {
            return Err(format!(
                "timing.tagWriteMargin ({margin:?}) and timing.leaseRenew ({renew:?}) together must not be longer than \
                 timing.leaseDuration ({duration:?}), else no tag could ever be written"
            ));
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("operator.yaml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        for text in ["", "# nothing\n", "{}"] {
            let config = parse(text).unwrap();
            assert_eq!((config.limits.runs, config.timing.lease_duration), (4, Duration::from_secs(15)));
        }
    }

    #[test]
    fn what_is_set_is_used() {
        let text = "registries:\n- {host: a.example:5000, plainHTTP: true, authHosts: [auth.example], limits: {requests: 9}}\n\
                    watchNamespaces: [a]\ntiming: {headTimeout: 1500ms}\n";
        let config = parse(text).unwrap();
        let host: Host = "a.example:5000".parse().unwrap();
        assert!(config.transport_for(&host).plain_http);
        let options = config.client_options();
        assert_eq!((options.hosts[&host].requests, options.timing.head), (9, Duration::from_millis(1500)));
        assert!(config.watches("a") && !config.watches("b"));
    }

    #[test]
    fn what_is_wrong_is_refused_with_a_word_on_what_to_write() {
        for (text, expected) in [
            ("registry: []", "registry"),
            ("timing: {headTimeout: 5}", "not a duration"),
            ("timing: {headTimeout: -5s}", "not a duration"),
            ("timing: {headTimeout: 0s}", "not a duration"),
            ("timing: {leaseRenew: 10s}", "leaseDuration"),
            ("timing: {tagWriteTimeout: 9s}", "tagWriteMargin"),
            ("timing: {tagWriteMargin: 13s}", "no tag could ever be written"),
            ("limits: {runs: 0}", "limits.runs"),
            ("registries: [{host: 'https://x'}]", "without a scheme"),
            ("registries: [{host: x}, {host: x}]", "listed twice"),
            ("registries: [{host: x, limits: {requests: 2}}]", "larger than limits.streams"),
            ("registries: [{host: x, caFile: /does/not/exist}]", "/does/not/exist cannot be read"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn the_example_holds_the_defaults() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/operator.yaml")).unwrap();
        let without_ca: String =
            text.lines().filter(|line| !line.contains("caFile")).fold(String::new(), |all, line| all + line + "\n");
        let example = parse(&without_ca).unwrap();
        assert_eq!(format!("{:?}", example.timing), format!("{:?}", Timing::default()));
        assert_eq!(example.limits.runs, Limits::default().runs);
    }
}
