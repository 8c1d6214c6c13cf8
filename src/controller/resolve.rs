//! Reads the Secrets and the `ServiceAccount` that a mirror names: by name, with `get`, in the object's own namespace.

use std::collections::BTreeSet;

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Api;

use super::{
    context::Context,
    error::{Error, call, is_forbidden, is_not_found},
};
use crate::{
    mirror::{Problem, Secrets, ValidatedMirror},
    reason::Reason,
};

/// Reads everything that the mirror names. What is missing is part of the answer; only a Kubernetes API that cannot
/// be asked is an error.
pub(super) async fn resolve(context: &Context, mirror: &ValidatedMirror) -> Result<Secrets, Error> {
    let deadline = context.config.timing.api_timeout;
    let mut secrets = Secrets::default();
    if let Some(name) = &mirror.service_account {
        let accounts: Api<ServiceAccount> = Api::namespaced(context.client.clone(), &mirror.namespace);
        match named("ServiceAccount", name, call("reading a ServiceAccount", deadline, accounts.get(name)).await)? {
            Ok(account) => {
                let names = account.image_pull_secrets.into_iter().flatten().map(|reference| reference.name);
                secrets.of_service_account = names.filter(|name| !name.is_empty()).collect();
            }
            Err(problem) => secrets.service_account_problem = Some(problem),
        }
    }
    let settings =
        mirror.registries.values().flat_map(|settings| settings.cert_secret.iter().chain(&settings.proxy_secret));
    let names: BTreeSet<&String> = mirror
        .pull_secrets
        .iter()
        .chain(&mirror.target_secret)
        .chain(&secrets.of_service_account)
        .chain(settings)
        .collect();
    let api: Api<Secret> = Api::namespaced(context.client.clone(), &mirror.namespace);
    let read = |name: String| {
        let api = &api;
        async move {
            // Names become paths. Those in the spec were checked by its schema; a ServiceAccount's were not.
            if !is_object_name(&name) {
                let message = format!("{name:?} is not the name of a Secret; correct it in the ServiceAccount");
                return Ok((name, Err(Problem { reason: Reason::SecretInvalid, message })));
            }
            let found = named("Secret", &name, call("reading a Secret", deadline, api.get(&name)).await)?;
            Ok::<_, Error>((name, found))
        }
    };
    let found = join_all(names.into_iter().cloned().map(read)).await;
    secrets.found = found.into_iter().collect::<Result<_, _>>()?;
    Ok(secrets)
}

/// A DNS subdomain (RFC 1123), as the names of Secrets are.
fn is_object_name(name: &str) -> bool {
    let is_end = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    name.len() <= 253
        && name.bytes().all(inner)
        && is_end(name.bytes().next())
        && is_end(name.bytes().last())
        && !name.contains("..")
}

/// Tells what is wrong with the object's references from what is wrong with the API.
fn named<T>(kind: &str, name: &str, result: Result<T, Error>) -> Result<Result<T, Problem>, Error> {
    match result {
        Ok(found) => Ok(Ok(found)),
        Err(Error::Api { source, .. }) if is_not_found(&source) => {
            let message =
                format!("{kind} {name:?} does not exist in this namespace; create it, or correct its name in the spec");
            Ok(Err(Problem { reason: Reason::SecretNotFound, message }))
        }
        Err(Error::Api { source, .. }) if is_forbidden(&source) => {
            let message = format!(
                "the operator may not get {kind} {name:?} in this namespace; grant it that with the chart's RBAC"
            );
            Ok(Err(Problem { reason: Reason::Forbidden, message }))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_other_paths_are_no_names() {
        assert!(is_object_name("registry-push.v1"));
        for bad in ["", "../../other/secrets/x", "a/b", "a b", "A", "-a", "a.", "a..b", &"a".repeat(254)] {
            assert!(!is_object_name(bad), "{bad}");
        }
    }
}
