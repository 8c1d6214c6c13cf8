//! Which credential belongs to which repository, matched as the kubelet matches pull secrets
//! (kubernetes.io/docs/concepts/containers/images, "Interpretation of config.json").
//!
//! A key is `[scheme://]host[:port][/path]`. Each label of the host may hold globs and stands for one label; ports must
//! be equal; the path is a prefix, here on a `/` boundary so that `/team` never opens `/teamwork`. The longest key goes
//! first, then the order of the list. `credHelpers` and `credsStore` are never run.

use std::{collections::BTreeMap, fmt, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use glob::Pattern;
use secrecy::SecretString;
use serde::Deserialize;

use super::Credential;
use crate::oci::{Host, RepositoryName};

/// Credentials in the order in which they are tried.
#[derive(Clone, Default)]
pub struct CredentialStore {
    entries: Vec<Entry>,
}

#[derive(Clone)]
struct Entry {
    key: Key,
    credential: Arc<Credential>,
}

#[derive(Clone)]
struct Key {
    labels: Vec<Pattern>,
    port: Option<String>,
    path: String,
    len: usize,
}

/// A Docker configuration that cannot be used. Never holds content of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON of a Docker configuration.
    #[error("it is not valid Docker configuration JSON (line {line}, column {column})")]
    Json {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
    /// `auth` is not base64 of `user:password`.
    #[error("the `auth` of {0:?} is not base64 of user:password")]
    Auth(String),
    /// The key is not `host[:port][/path]`.
    #[error("the key {0:?} is not host[:port][/path]")]
    Key(String),
    /// No entry has a user name and a password.
    #[error("it holds no entry with a user name and a password")]
    Empty,
}

#[derive(Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: SecretString,
    auth: Option<SecretString>,
    /// What a token server gave at the login, in place of a password.
    identitytoken: Option<SecretString>,
}

impl CredentialStore {
    /// Reads the value of `.dockerconfigjson`: `{"auths": {key: {username, password, auth}}}`.
    pub fn from_docker_config_json(bytes: &[u8], origin: &str) -> Result<Self, ConfigError> {
        let config: DockerConfig = serde_json::from_slice(bytes).map_err(|error| json_error(&error))?;
        Self::from_auths(config.auths, origin)
    }

    /// Reads the value of `.dockercfg`, the older form: `{key: {username, password, auth}}`.
    pub fn from_docker_cfg(bytes: &[u8], origin: &str) -> Result<Self, ConfigError> {
        let auths: BTreeMap<String, AuthEntry> = serde_json::from_slice(bytes).map_err(|error| json_error(&error))?;
        Self::from_auths(auths, origin)
    }

    /// One credential for one key, as a `kubernetes.io/basic-auth` Secret gives it.
    pub fn single(key: &str, credential: Credential) -> Result<Self, ConfigError> {
        let key = Key::parse(key).ok_or_else(|| ConfigError::Key(shorten(key)))?;
        Ok(Self { entries: vec![Entry { key, credential: Arc::new(credential) }] })
    }

    fn from_auths(auths: BTreeMap<String, AuthEntry>, origin: &str) -> Result<Self, ConfigError> {
        let mut entries = Vec::new();
        for (key, entry) in auths {
            let Some(credential) = entry.credential(&key, origin)? else { continue };
            let key = Key::parse(&key).ok_or_else(|| ConfigError::Key(shorten(&key)))?;
            entries.push(Entry { key, credential: Arc::new(credential) });
        }
        if entries.is_empty() {
            return Err(ConfigError::Empty);
        }
        Ok(Self { entries })
    }

    /// Adds the entries of another store behind these.
    pub fn append(&mut self, other: Self) {
        self.entries.extend(other.entries);
    }

    /// The credentials for a repository, in the order in which to try them.
    #[must_use]
    pub fn matching(&self, host: &Host, repository: &RepositoryName) -> Vec<Arc<Credential>> {
        let mut found: Vec<&Entry> = self.entries.iter().filter(|entry| entry.key.matches(host, repository)).collect();
        found.sort_by_key(|entry| std::cmp::Reverse(entry.key.len));
        found.into_iter().map(|entry| Arc::clone(&entry.credential)).collect()
    }
}

impl fmt::Debug for CredentialStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|entry| &entry.credential)).finish()
    }
}

impl AuthEntry {
    /// An identity token wins over `auth`, and `auth` over the two fields, as in the kubelet. `None` where the entry holds
    /// nothing.
    fn credential(self, key: &str, origin: &str) -> Result<Option<Credential>, ConfigError> {
        use secrecy::ExposeSecret;
        if let Some(token) = self.identitytoken.filter(|token| !token.expose_secret().is_empty()) {
            return Ok(Some(Credential::identity_token(token, origin)));
        }
        if let Some(auth) = self.auth.filter(|auth| !auth.expose_secret().is_empty()) {
            let bytes = STANDARD
                .decode(auth.expose_secret().trim_end_matches('\0').trim())
                .map_err(|_| ConfigError::Auth(shorten(key)))?;
            let text = String::from_utf8(bytes).map_err(|_| ConfigError::Auth(shorten(key)))?;
            let (user, password) = text.split_once(':').ok_or_else(|| ConfigError::Auth(shorten(key)))?;
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credential::new(user.to_owned(), password.into(), origin)));
        }
        if self.username.is_empty() && self.password.expose_secret().is_empty() {
            return Ok(None);
        }
        Ok(Some(Credential::new(self.username, self.password, origin)))
    }
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // What clients append to the host, of old for Docker Hub: it does not name a repository.
        let path = path.trim_end_matches('/');
        let path = match path.split_once('/') {
            Some(("v1" | "v2", rest)) => rest,
            None if matches!(path, "v1" | "v2") => "",
            _ => path,
        };
        let (name, port) = crate::oci::split_port(authority);
        let name = match name.to_ascii_lowercase().as_str() {
            "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => Host::DOCKER_HUB.to_owned(),
            other => other.to_owned(),
        };
        if name.is_empty() || name.contains(char::is_whitespace) {
            return None;
        }
        let port = port.filter(|port| *port != "443" || name != Host::DOCKER_HUB).map(str::to_owned);
        // The brackets of an IPv6 address are no glob.
        let glob =
            |label| if name.starts_with('[') { Pattern::new(&Pattern::escape(label)) } else { Pattern::new(label) };
        let labels = name.split('.').map(glob).collect::<Result<_, _>>().ok()?;
        Some(Self { labels, port, path: path.to_owned(), len: name.len() + path.len() })
    }

    fn matches(&self, host: &Host, repository: &RepositoryName) -> bool {
        let (name, port) = crate::oci::split_port(host.as_str());
        let labels: Vec<&str> = name.split('.').collect();
        self.port.as_deref() == port
            && self.labels.len() == labels.len()
            && self.labels.iter().zip(labels).all(|(pattern, label)| pattern.matches(label))
            && self.path_is_prefix_of(repository.as_str())
    }

    fn path_is_prefix_of(&self, repository: &str) -> bool {
        self.path.is_empty()
            || repository.strip_prefix(self.path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

fn json_error(error: &serde_json::Error) -> ConfigError {
    ConfigError::Json { line: error.line(), column: error.column() }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(key: &str, host: &str, repository: &str) -> bool {
        let credential = Credential::new("u".into(), "p".to_owned().into(), "test");
        let store = CredentialStore::single(key, credential).unwrap();
        !store.matching(&host.parse().unwrap(), &repository.parse().unwrap()).is_empty()
    }

    #[test]
    fn keys_match_as_the_kubelet_matches_them() {
        for (key, host, repository, expected) in [
            ("gcr.io", "gcr.io", "a/b", true),
            ("https://gcr.io", "gcr.io", "a/b", true),
            ("https://gcr.io/v2/", "gcr.io", "a/b", true),
            ("http://gcr.io/v1", "gcr.io", "a/b", true),
            ("gcr.io/a", "gcr.io", "a/b", true),
            ("gcr.io/a/", "gcr.io", "a/b", true),
            ("gcr.io/a/b", "gcr.io", "a/b", true),
            ("gcr.io/a/b/c", "gcr.io", "a/b", false),
            ("gcr.io/tea", "gcr.io", "team/b", false),
            ("*.io", "gcr.io", "a", true),
            ("*.io", "eu.gcr.io", "a", false),
            ("*.gcr.io", "eu.gcr.io", "a", true),
            ("*.gcr.io", "gcr.io", "a", false),
            ("*.*.io", "eu.gcr.io", "a", true),
            ("prefix*.io", "prefixed.io", "a", true),
            ("?cr.io", "gcr.io", "a", true),
            ("gcr.io:443", "gcr.io", "a", false),
            ("gcr.io", "gcr.io:443", "a", false),
            ("gcr.io:5000", "gcr.io:5000", "a", true),
            ("*.io:5000", "gcr.io:5000", "a", true),
            ("ghcr.io", "ghcr.io.evil.example", "a", false),
            ("https://ghcr.io.evil.example", "ghcr.io", "a", false),
            ("gcr.io", "xgcr.io", "a", false),
            ("GCR.io", "gcr.io", "a", true),
            ("127.0.0.1:5000", "127.0.0.1:5000", "a", true),
            ("127.0.0.1:5000", "127.0.0.1:5001", "a", false),
            ("localhost:5000/a", "localhost:5000", "a", true),
            ("https://index.docker.io/v1/", "docker.io", "library/nginx", true),
            ("docker.io", "docker.io", "grafana/grafana", true),
            ("registry-1.docker.io", "docker.io", "grafana/grafana", true),
            ("https://index.docker.io/v1/grafana", "docker.io", "library/nginx", false),
            ("123.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com", "a", true),
            ("[::1]:5000", "[::1]:5000", "a", true),
        ] {
            assert_eq!(matches(key, host, repository), expected, "{key} for {host}/{repository}");
        }
    }

    #[test]
    fn the_longest_key_goes_first_then_the_order_of_the_list() {
        let config =
            br#"{"auths":{"gcr.io":{"username":"host","password":"p"},"gcr.io/a":{"username":"path","password":"p"}}}"#;
        let mut store = CredentialStore::from_docker_config_json(config, "one").unwrap();
        let second = br#"{"gcr.io":{"auth":"c2Vjb25kOnBhc3M6d29yZA=="}}"#;
        store.append(CredentialStore::from_docker_cfg(second, "two").unwrap());
        let third = br#"{"gcr.io":{"auth":"PHRva2VuPjo=","identitytoken":"eyJ"}}"#;
        store.append(CredentialStore::from_docker_cfg(third, "three").unwrap());
        let found = store.matching(&"gcr.io".parse().unwrap(), &"a/b".parse().unwrap());
        let names: Vec<_> = found.iter().map(|credential| credential.username()).collect();
        assert_eq!(names, ["path", "host", "second", "<token>"]);
        assert!(found[3].as_identity_token().is_some() && found[2].as_identity_token().is_none());
    }

    #[test]
    fn broken_configurations_are_named_without_their_content() {
        for (config, expected) in [
            (r#"{"auths":"#, "line 1, column 9"),
            (r#"{"auths":{"gcr.io":{"auth":"?hunter2"}}}"#, "not base64"),
            (r#"{"auths":{"gcr.io":{"auth":"aHVudGVyMg=="}}}"#, "not base64 of user:password"),
            (r#"{"auths":{}}"#, "no entry"),
            (r#"{"auths":{"gcr.io":{}},"credsStore":"desktop"}"#, "no entry"),
            (r#"{"auths":{"a b":{"username":"u","password":"hunter2"}}}"#, "not host[:port][/path]"),
        ] {
            let message = CredentialStore::from_docker_config_json(config.as_bytes(), "x").unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn secrets_do_not_print_themselves() {
        let config = br#"{"auths":{"gcr.io":{"username":"u","password":"hunter2"}}}"#;
        let store = CredentialStore::from_docker_config_json(config, "x").unwrap();
        let printed = format!("{store:?}");
        assert!(printed.contains("[redacted]") && !printed.contains("hunter2"), "{printed}");
    }
}
