//! The user's own logins, where the files have no Secrets: variables of the environment as GitHub Codespaces names them,
//! and for hosts that none of them names, the Docker configuration with its credential helpers.
//!
//! A login in the environment is three variables with one prefix: `<NAME>_CONTAINER_REGISTRY_SERVER`, `_USER` and
//! `_PASSWORD` (docs.github.com, "Allowing your codespace to access a private registry").

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::PathBuf,
};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use super::Failure;
use crate::{
    auth::{
        Credential, CredentialStore,
        cloud::{Cloud, Principal},
    },
    mirror::{Prepared, Secrets, ValidatedMirror, prepare},
    oci::Host,
    registry::Transport,
};

const SERVER: &str = "_CONTAINER_REGISTRY_SERVER";
const USER: &str = "_CONTAINER_REGISTRY_USER";
const PASSWORD: &str = "_CONTAINER_REGISTRY_PASSWORD";

/// The logins of the environment; those of the Docker configuration are asked for when they are wanted.
#[derive(Debug)]
pub(super) struct Logins {
    names: Vec<String>,
    store: CredentialStore,
    hosts: BTreeSet<Host>,
}

impl Logins {
    /// Those of the environment that this program was started in.
    pub(super) fn of_environment() -> Result<Self, Failure> {
        let variables = std::env::vars_os();
        Self::of(variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))))
    }

    /// An empty variable is none.
    fn of(variables: impl Iterator<Item = (String, String)>) -> Result<Self, Failure> {
        let variables: BTreeMap<String, String> = variables.filter(|(_, value)| !value.is_empty()).collect();
        let mut logins = Self { names: Vec::new(), store: CredentialStore::default(), hosts: BTreeSet::new() };
        for (variable, server) in &variables {
            let Some(name) = variable.strip_suffix(SERVER).filter(|name| !name.is_empty()) else { continue };
            let host = host_of(server)
                .ok_or_else(|| Failure::Usage(format!("{variable}: {server:?} is no registry; write its host")))?;
            let value = |suffix: &str| {
                variables.get(&format!("{name}{suffix}")).ok_or_else(|| {
                    let what = format!("{variable} is set, and {name}{suffix} is not");
                    Failure::Usage(format!("{what}; set it too, or unset both"))
                })
            };
            // Azure's tokens have no name.
            let user = match value(USER) {
                Err(_) if Cloud::of(&host) == Some(Cloud::Azure) => String::new(),
                user => user?.clone(),
            };
            let origin = format!("{name}_CONTAINER_REGISTRY_* of the environment");
            let credential = Credential::new(user, value(PASSWORD)?.as_str().into(), &origin);
            logins.store.append(single(&host, credential, &origin)?);
            logins.names.push(origin);
            logins.hosts.insert(host);
        }
        Ok(logins)
    }

    /// Where they are, in words.
    pub(super) fn place(&self) -> String {
        let places = self.names.iter().map(String::as_str).chain(["the Docker configuration"]);
        places.collect::<Vec<_>>().join(", then ")
    }

    /// A run with them. The names of Secrets in the spec mean nothing without their content.
    pub(super) fn prepare(&self, mirror: &ValidatedMirror) -> Result<Prepared, Failure> {
        let without_secrets =
            ValidatedMirror { pull_secrets: Vec::new(), target_secret: None, service_account: None, ..mirror.clone() };
        let program = Secrets { principal: Ok(Principal::Program), ..Secrets::default() };
        let mut prepared = prepare(&without_secrets, &program, |_| Transport::default(), &BTreeMap::new());
        let hosts: BTreeSet<&Host> = mirror.source_hosts().chain([&mirror.target_host]).collect();
        let mut store = self.store.clone();
        for host in hosts.into_iter().filter(|host| !self.hosts.contains(host)) {
            if let Some(found) = docker_login(host)? {
                store.append(found);
            }
        }
        let has_identity = |host: &Host| mirror.registries.get(host).is_some_and(|settings| settings.cloud.is_some());
        for access in prepared.registries.accesses_mut().filter(|access| !has_identity(&access.host)) {
            access.credentials = store.clone();
        }
        Ok(prepared)
    }
}

/// The host of a server as people write it: `ghcr.io`, `https://index.docker.io/v1/`.
fn host_of(server: &str) -> Option<Host> {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().parse().ok()
}

fn single(host: &Host, credential: Credential, origin: &str) -> Result<CredentialStore, Failure> {
    let store = CredentialStore::single(host.as_str(), credential);
    store.map_err(|error| Failure::Usage(format!("{origin}: {error}")))
}

/// Where Docker keeps what it is configured with (docs.docker.com, `docker` command line, "Configuration files").
fn docker_configuration() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")))?;
    Some(directory.join("config.json"))
}

/// The user's login for a registry, if there is one.
fn docker_login(host: &Host) -> Result<Option<CredentialStore>, Failure> {
    const ORIGIN: &str = "the Docker configuration";
    const LOG_IN: &str = "log in again, or add Secrets to the files";
    let server = if host.as_str() == Host::DOCKER_HUB { "https://index.docker.io/v1/" } else { host.as_str() };
    let Some(file) = docker_configuration() else { return Ok(None) };
    let content = match std::fs::read(&file) {
        Ok(content) => content,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        // That of somebody else, whose home directory is still in the environment.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            tracing::warn!(file = %file.display(), "the Docker configuration may not be read, and is left out");
            return Ok(None);
        }
        Err(error) => {
            return Err(Failure::Usage(format!("{ORIGIN} {} cannot be read: {error}", file.display())));
        }
    };
    if content.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    match docker_credential::get_credential_from_reader(&*content, server) {
        Ok(DockerCredential::UsernamePassword(username, password)) => {
            single(host, Credential::new(username, password.into(), ORIGIN), ORIGIN).map(Some)
        }
        Ok(DockerCredential::IdentityToken(token)) => {
            single(host, Credential::identity_token(token.into(), ORIGIN), ORIGIN).map(Some)
        }
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
        Err(CredentialRetrievalError::ConfigReadError) => Err(Failure::Usage(format!(
            "{ORIGIN} {} is not valid JSON of such a configuration; correct it",
            file.display()
        ))),
        // What helpers say where there is no login; the protocol has no other way to say it.
        Err(CredentialRetrievalError::HelperFailure { stdout, .. }) if stdout.contains("credentials not found") => {
            Ok(None)
        }
        Err(CredentialRetrievalError::HelperFailure { helper, .. }) => Err(Failure::Usage(format!(
            "{ORIGIN} gives no login for {host}: the credential helper {helper} failed; {LOG_IN}"
        ))),
        Err(error) => Err(Failure::Usage(format!("{ORIGIN} gives no login for {host}: {error}; {LOG_IN}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Logins, Failure> {
        Logins::of(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn servers_are_written_as_in_codespaces() {
        let account = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
        for (server, host) in [
            ("https://index.docker.io/v1/", "docker.io"),
            ("ghcr.io", "ghcr.io"),
            ("https://ghcr.io", "ghcr.io"),
            ("myregistry.azurecr.io", "myregistry.azurecr.io"),
            (account, account),
            ("eu.gcr.io", "eu.gcr.io"),
        ] {
            let logins = of(&[
                ("A_B_CONTAINER_REGISTRY_SERVER", server),
                ("A_B_CONTAINER_REGISTRY_USER", "u"),
                ("A_B_CONTAINER_REGISTRY_PASSWORD", "p"),
            ]);
            let logins = logins.unwrap();
            let found = logins.store.matching(&host.parse().unwrap(), &"a/b".parse().unwrap());
            assert_eq!(found[0].username(), "u", "{server}");
            assert_eq!(logins.place(), "A_B_CONTAINER_REGISTRY_* of the environment, then the Docker configuration");
        }
        assert_eq!(
            of(&[("_CONTAINER_REGISTRY_SERVER", "x"), ("PATH", "/")]).unwrap().place(),
            "the Docker configuration"
        );
    }

    #[test]
    fn what_is_missing_of_a_login_is_named() {
        let server = ("A_CONTAINER_REGISTRY_SERVER", "ghcr.io");
        let user = ("A_CONTAINER_REGISTRY_USER", "u");
        let password = ("A_CONTAINER_REGISTRY_PASSWORD", "hunter2");
        for (variables, expected) in [
            (vec![server, user], "A_CONTAINER_REGISTRY_PASSWORD is not; set it"),
            (vec![server, user, (password.0, "")], "A_CONTAINER_REGISTRY_PASSWORD is not; set it"),
            (vec![server, password], "A_CONTAINER_REGISTRY_USER is not; set it"),
            (vec![(server.0, "a b"), user, password], "is no registry; write its host"),
        ] {
            let message = of(&variables).unwrap_err().to_string();
            assert!(message.contains(expected) && !message.contains("hunter2"), "{message}");
        }
        assert!(of(&[(server.0, "r.azurecr.io"), password]).is_ok());
    }
}
