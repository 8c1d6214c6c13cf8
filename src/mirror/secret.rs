//! Secrets as credentials and certificates. Messages name the Secret and the key, never the content.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
};
use secrecy::{SecretSlice, SecretString};

use crate::{
    api::REGISTRY_OF_SECRET,
    auth::{
        Credential, CredentialStore, Identity,
        cloud::{self, Cloud, GcpTrust, Principal},
    },
    oci::{Algorithm, Digest},
    reason::Reason,
    registry::{Proxy, Transport},
    sync::Failure,
};

/// Something named in the spec that is missing or cannot be used.
pub type Problem = Failure;

/// The Secrets that an object names, as they were read, and its `ServiceAccount`.
#[derive(Clone)]
pub struct Secrets {
    /// By name: the Secret, or why it could not be read.
    pub found: BTreeMap<String, Result<Secret, Problem>>,
    /// The `ServiceAccount`; empty without one.
    pub account: Account,
    /// Who logs in where an identity does, or why nobody does.
    pub principal: Result<Principal, Problem>,
}

/// Without anything, and without an identity.
impl Default for Secrets {
    fn default() -> Self {
        let nobody = Failure::new(Reason::InternalError, "no identity is used here; name a Secret");
        Self { found: BTreeMap::new(), account: Account::default(), principal: Err(nobody) }
    }
}

/// Names alone.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.found.keys()).finish()
    }
}

/// What a `ServiceAccount` says of Secrets.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// The names of its `imagePullSecrets`.
    pub pull_secrets: Vec<String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Why it could not be read.
    pub problem: Option<Problem>,
}

impl Account {
    /// What is known of one that was read.
    #[must_use]
    pub fn of(account: ServiceAccount) -> Self {
        let names = account.image_pull_secrets.into_iter().flatten().map(|reference| reference.name);
        let pull_secrets = names.filter(|name| !name.is_empty()).collect();
        Self { pull_secrets, annotations: account.metadata.annotations.unwrap_or_default(), problem: None }
    }

    /// As clouds see it.
    #[must_use]
    pub fn principal(
        &self,
        namespace: &str,
        name: &str,
        gcp_trust: Option<GcpTrust>,
        identity: Arc<dyn Identity>,
    ) -> Principal {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let annotations = self.annotations.clone();
        Principal::Account(cloud::Account { namespace, name, annotations, gcp_trust, identity })
    }
}

/// The same as long as a Secret says the same, or has the same problem.
#[must_use]
pub fn content(found: &Result<Secret, Problem>) -> Digest {
    let mut hasher = Algorithm::Sha256.hasher();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    match found {
        Ok(secret) => {
            part(secret.type_.as_deref().unwrap_or_default().as_bytes());
            let registry = secret.metadata.annotations.as_ref().and_then(|all| all.get(REGISTRY_OF_SECRET));
            part(registry.map(String::as_bytes).unwrap_or_default());
            for (key, value) in secret.data.iter().flatten() {
                part(key.as_bytes());
                part(&value.0);
            }
        }
        Err(problem) => part(problem.reason.as_str().as_bytes()),
    }
    hasher.finish()
}

/// The same as long as the `ServiceAccount` and the Secrets, by their names and [contents](content), say the same.
#[must_use]
pub fn fingerprint<'a>(account: &Account, contents: impl Iterator<Item = (&'a String, Digest)>) -> Digest {
    let mut hasher = Algorithm::Sha256.hasher();
    let mut line = |text: &str| {
        hasher.update(text.as_bytes());
        hasher.update(b"\n");
    };
    contents.for_each(|(name, content)| line(&format!("{name} {content}")));
    account.problem.iter().for_each(|problem| line(problem.reason.as_str()));
    account.pull_secrets.iter().for_each(|name| line(name));
    account.annotations.iter().for_each(|(key, value)| line(&format!("{key}: {value}")));
    hasher.finish()
}

impl Secrets {
    /// The same as long as all that was read says the same: a change is a reason to try again.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        fingerprint(&self.account, self.found.iter().map(|(name, found)| (name, content(found))))
    }

    pub(super) fn get(&self, name: &str) -> Result<&Secret, Problem> {
        match self.found.get(name) {
            Some(Ok(secret)) => Ok(secret),
            Some(Err(problem)) => Err(problem.clone()),
            None => Err(not_found(name)),
        }
    }
}

/// Whether it is a DNS subdomain (RFC 1123), as the names of Secrets are.
#[must_use]
pub fn is_object_name(name: &str) -> bool {
    let is_end = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    name.len() <= 253
        && name.bytes().all(inner)
        && is_end(name.bytes().next())
        && is_end(name.bytes().last())
        && !name.contains("..")
}

/// A Secret that does not exist.
#[must_use]
pub(crate) fn not_found(name: &str) -> Problem {
    let message =
        format!("Secret {name:?} does not exist in this namespace; create it, or correct its name in the spec");
    Problem { reason: Reason::SecretNotFound, message }
}

fn invalid(name: &str, what: &str) -> Problem {
    Problem {
        reason: Reason::SecretInvalid,
        message: format!("Secret {name:?} cannot be used: {what}; correct it, or name another in the spec"),
    }
}

/// Reads a Secret as credentials.
pub(super) fn credentials(name: &str, secret: &Secret) -> Result<CredentialStore, Problem> {
    let origin = format!("Secret {name:?}");
    let data = |key: &str| value(secret, key).ok_or_else(|| invalid(name, &format!("its key {key} is missing")));
    let broken = |key: &str, what: &str| invalid(name, &format!("{key}: {what}"));
    match secret.type_.as_deref().unwrap_or("Opaque") {
        "kubernetes.io/dockerconfigjson" => {
            CredentialStore::from_docker_config_json(data(".dockerconfigjson")?, &origin)
                .map_err(|error| broken(".dockerconfigjson", &error.to_string()))
        }
        "kubernetes.io/dockercfg" => CredentialStore::from_docker_cfg(data(".dockercfg")?, &origin)
            .map_err(|error| broken(".dockercfg", &error.to_string())),
        "kubernetes.io/basic-auth" => {
            let text = |key| {
                let bytes = data(key)?.to_vec();
                String::from_utf8(bytes).map_err(|_| broken(key, "it is not text"))
            };
            let annotations = secret.metadata.annotations.as_ref();
            let registry =
                annotations.and_then(|annotations| annotations.get(REGISTRY_OF_SECRET)).ok_or_else(|| {
                    invalid(
                        name,
                        &format!("a basic-auth Secret needs the annotation {REGISTRY_OF_SECRET}: host[:port][/path]"),
                    )
                })?;
            if registry.contains(['*', '?', '[']) && !registry.starts_with('[') {
                return Err(invalid(
                    name,
                    &format!("the annotation {REGISTRY_OF_SECRET} names one registry, without wildcards"),
                ));
            }
            // Azure's tokens have no name.
            let has_names = registry.parse().ok().and_then(|host| Cloud::of(&host)) != Some(Cloud::Azure);
            let username =
                if has_names || value(secret, "username").is_some() { text("username")? } else { String::new() };
            let credential = Credential::new(username, SecretString::from(text("password")?), &origin);
            CredentialStore::single(registry, credential).map_err(|error| invalid(name, &error.to_string()))
        }
        other => Err(invalid(
            name,
            &format!(
                "its type is {other}; make it with `kubectl create secret docker-registry`, which has the type \
                 kubernetes.io/dockerconfigjson"
            ),
        )),
    }
}

/// Reads a Secret as CA and client certificate.
pub(super) fn transport(name: &str, secret: &Secret) -> Result<Transport, Problem> {
    let ca = value(secret, "ca.crt").map(Bytes::copy_from_slice);
    let identity = match (value(secret, "tls.crt"), value(secret, "tls.key")) {
        (Some(chain), Some(key)) => Some((Bytes::copy_from_slice(chain), Arc::new(SecretSlice::from(key.to_vec())))),
        (None, None) => None,
        _ => return Err(invalid(name, "tls.crt and tls.key go together")),
    };
    if ca.is_none() && identity.is_none() {
        return Err(invalid(name, "it has none of the keys ca.crt, tls.crt and tls.key"));
    }
    let transport = Transport { ca, identity, ..Transport::default() };
    transport.check().map_err(|error| Problem {
        reason: Reason::CertificateInvalid,
        message: format!("Secret {name:?} cannot be used: {error}"),
    })?;
    Ok(transport)
}

/// Reads a Secret as a proxy.
pub(super) fn proxy(name: &str, secret: &Secret) -> Result<Proxy, Problem> {
    let text = |key: &str| match value(secret, key).map(std::str::from_utf8) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(_)) => Err(invalid(name, &format!("{key}: it is not text"))),
    };
    let address = text("address")?.ok_or_else(|| invalid(name, "its key address is missing"))?;
    let login = match (text("username")?, text("password")?) {
        (None, None) => None,
        (Some(username), Some(password)) => Some((username.to_owned(), SecretString::from(password))),
        _ => return Err(invalid(name, "username and password go together")),
    };
    Proxy::new(address, login).map_err(|error| invalid(name, &error.to_string()))
}

fn value<'a>(secret: &'a Secret, key: &str) -> Option<&'a [u8]> {
    let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(type_: &str, data: &[(&str, &str)], registry: Option<&str>) -> Secret {
        let mut secret = Secret { type_: Some(type_.into()), ..Secret::default() };
        let entry = |(key, value): &(&str, &str)| ((*key).to_owned(), ByteString(value.as_bytes().to_vec()));
        secret.data = Some(data.iter().map(entry).collect());
        secret.metadata.annotations =
            registry.map(|registry| [(REGISTRY_OF_SECRET.to_owned(), registry.to_owned())].into());
        secret
    }

    #[test]
    fn basic_auth_belongs_to_the_registry_that_it_names() {
        let data = [("username", "u"), ("password", "p")];
        let good = credentials("s", &secret("kubernetes.io/basic-auth", &data, Some("gcr.io/team"))).unwrap();
        assert_eq!(good.matching(&"gcr.io".parse().unwrap(), &"team/a".parse().unwrap()).len(), 1);
        for registry in [None, Some("*.io")] {
            assert!(credentials("s", &secret("kubernetes.io/basic-auth", &data, registry)).is_err());
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_without_its_content() {
        for (secret, expected) in [
            (secret("Opaque", &[("password", "hunter2")], None), "its type is Opaque"),
            (
                secret("kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", "{hunter2")], None),
                ".dockerconfigjson: it is not valid",
            ),
            (secret("kubernetes.io/dockerconfigjson", &[], None), ".dockerconfigjson is missing"),
            (secret("kubernetes.io/basic-auth", &[("username", "u")], Some("gcr.io")), "password is missing"),
        ] {
            let problem = credentials("pull", &secret).unwrap_err();
            assert_eq!(problem.reason, Reason::SecretInvalid);
            assert!(problem.message.contains(expected) && problem.message.contains("\"pull\""), "{}", problem.message);
            assert!(!problem.message.contains("hunter2"));
        }
    }

    #[test]
    fn a_proxy_is_an_address_and_perhaps_a_login() {
        let found = |data: &[(&str, &str)]| proxy("p", &secret("Opaque", data, None));
        let address = ("address", "http://proxy:3128");
        assert!(found(&[address]).is_ok() && found(&[address, ("username", "u"), ("password", "p")]).is_ok());
        for (data, expected) in [
            (&[][..], "address is missing"),
            (&[("address", "http://u:hunter2@proxy:3128")], "not http://host:port"),
            (&[address, ("username", "u")], "go together"),
        ] {
            let problem = found(data).unwrap_err();
            assert_eq!(problem.reason, Reason::SecretInvalid);
            assert!(problem.message.contains(expected) && !problem.message.contains("hunter2"), "{}", problem.message);
        }
    }

    #[test]
    fn certificates_are_checked_before_they_are_used() {
        for (data, reason) in [
            (&[("ca.crt", "garbage")][..], Reason::CertificateInvalid),
            (&[("tls.crt", "x")], Reason::SecretInvalid),
            (&[("other", "x")], Reason::SecretInvalid),
        ] {
            assert_eq!(transport("ca", &secret("Opaque", data, None)).unwrap_err().reason, reason);
        }
    }

    #[test]
    fn names_that_would_be_other_paths_are_no_names() {
        assert!(is_object_name("registry-push.v1"));
        for bad in ["", "../../other/secrets/x", "a/b", "a b", "A", "-a", "a.", "a..b", &"a".repeat(254)] {
            assert!(!is_object_name(bad), "{bad}");
        }
    }
}
