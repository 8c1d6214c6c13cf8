//! Which credential belongs to which repository, matched as the kubelet matches pull secrets
//! (kubernetes.io/docs/concepts/containers/images, "Interpretation of config.json").
//!
//! A key is `[scheme://]host[:port][/path]`. Each label of the host may hold globs and stands for one label; ports must
//! be equal; the path is a prefix, here on a `/` boundary so that `/team` never opens `/teamwork`. The longest key goes
//! first, then the order of the list. `credHelpers` and `credsStore` are never run.

use std::{collections::BTreeMap, fmt, sync::Arc};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode::Indifferent, GeneralPurpose, GeneralPurposeConfig},
};
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

/// A credential, and the key that it is written under.
#[derive(Clone)]
pub struct Entry {
    key: Key,
    credential: Arc<Credential>,
}

#[derive(Clone)]
struct Key {
    /// As it is written, for messages.
    text: String,
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

/// `auth` as the kubelet reads it: with padding or without.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(Indifferent).with_decode_allow_trailing_bits(true),
);

#[derive(Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    username: Option<String>,
    password: Option<SecretString>,
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
        self.entries_for(host, repository).into_iter().map(|entry| Arc::clone(&entry.credential)).collect()
    }

    /// The same, with the keys that they are written under.
    #[must_use]
    pub fn entries_for(&self, host: &Host, repository: &RepositoryName) -> Vec<&Entry> {
        let mut found: Vec<&Entry> = self.entries.iter().filter(|entry| entry.key.matches(host, repository)).collect();
        found.sort_by_key(|entry| std::cmp::Reverse(entry.key.len));
        found
    }

    /// All entries, in the order of the lists that they are of.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A store with this entry and no other.
    #[must_use]
    pub fn only(entry: &Entry) -> Self {
        Self { entries: vec![entry.clone()] }
    }
}

impl Entry {
    /// The key that it is written under, as messages show it.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key.text
    }

    /// What it holds.
    #[must_use]
    pub fn credential(&self) -> &Credential {
        &self.credential
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
            let bytes = BASE64
                .decode(auth.expose_secret().trim_end_matches('\0').trim())
                .map_err(|_| ConfigError::Auth(shorten(key)))?;
            let text = String::from_utf8(bytes).map_err(|_| ConfigError::Auth(shorten(key)))?;
            let (user, password) = text.split_once(':').ok_or_else(|| ConfigError::Auth(shorten(key)))?;
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credential::new(user.to_owned(), password.into(), origin)));
        }
        let (username, password) = (self.username.unwrap_or_default(), self.password.unwrap_or_default());
        if username.is_empty() && password.expose_secret().is_empty() {
            return Ok(None);
        }
        Ok(Some(Credential::new(username, password, origin)))
    }
}

impl Key {
    fn parse(written: &str) -> Option<Self> {
        let rest = written.strip_prefix("https://").or_else(|| written.strip_prefix("http://")).unwrap_or(written);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // What clients append to the host, of old for Docker Hub: it does not name a repository.
        let path = path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path).trim_end_matches('/');
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
        let is_address = name.starts_with('[');
        let text = |label| if is_address { Pattern::escape(label) } else { as_glob(label) };
        let labels = name.split('.').map(|label| Pattern::new(&text(label))).collect::<Result<_, _>>().ok()?;
        Some(Self { text: shorten(written), labels, port, path: path.to_owned(), len: name.len() + path.len() })
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

/// A label in Go's syntax (`path.Match`) in that of the `glob` crate: there `!` is what `^` is here, and `**` means more than
/// `*`.
fn as_glob(label: &str) -> String {
    let mut label = label.replace("[!", "[").replace("[^", "[!");
    while label.contains("**") {
        label = label.replace("**", "*");
    }
    label
}

fn json_error(error: &serde_json::Error) -> ConfigError {
    ConfigError::Json { line: error.line(), column: error.column() }
}

/// A key as messages show it: not what stands before an `@`, which may be a login.
fn shorten(key: &str) -> String {
    let key = key.rsplit_once('@').map_or(key, |(_, rest)| rest);
    key.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_kubelet_reads_them() {
        for (entry, expected) in [
            (r#"{"username":"u","password":"p"}"#, Some(("u", "p"))),
            (r#"{"username":"other","password":"other","auth":"dTpwOnE="}"#, Some(("u", "p:q"))),
            (r#"{"username":"u","password":"p","auth":""}"#, Some(("u", "p"))),
            (r#"{"username":"u","password":"p","auth":null,"email":"e@x"}"#, Some(("u", "p"))),
            // Without padding.
            (r#"{"auth":"dTpwOnE"}"#, Some(("u", "p:q"))),
            (r#"{"auth":"dTo="}"#, Some(("u", ""))),
            (r#"{"username":null,"password":null}"#, None),
            (r"{}", None),
            // Ours: the kubelet leaves it to the runtime.
            (r#"{"auth":"PHRva2VuPjo=","identitytoken":"eyJ"}"#, Some(("<token>", "eyJ"))),
        ] {
            use secrecy::ExposeSecret as _;
            let text = format!(r#"{{"gcr.io":{entry}}}"#);
            let found = CredentialStore::from_docker_cfg(text.as_bytes(), "x").unwrap_or_default();
            let found = found.matching(&"gcr.io".parse().unwrap(), &"a/b".parse().unwrap());
            let found = found.first().map(|found| (found.username(), found.password().expose_secret()));
            assert_eq!(found, expected, "{entry}");
        }
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
            (r#"{"auths":{"https://u:hunter2@gcr.io":{"auth":"?"}}}"#, "\"gcr.io\" is not base64"),
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
