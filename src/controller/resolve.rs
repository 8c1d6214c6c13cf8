//! Reads the Secrets and the `ServiceAccount` that a mirror names: by name, with `get`, in the object's own namespace.

use std::{sync::Arc, time::Duration};

use futures::future::{join_all, try_join_all};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Api;

use super::{
    context::Context,
    error::{Error, call, is_forbidden, is_not_found},
    identity::{AskedBy, ServiceAccountTokens},
};
use crate::{
    auth::cloud::Principal,
    mirror::{Account, Problem, Secrets, ValidatedMirror, content, fingerprint, is_object_name},
    oci::Digest,
    reason::Reason,
};

/// What the Secrets of a mirror said when somebody last looked.
pub(super) struct Glance {
    /// As [`Secrets::fingerprint`] has it.
    pub(super) fingerprint: Digest,
    /// How long ago the first of it was read.
    pub(super) age: Duration,
}

/// Reads everything that the mirror names, for a run. What is missing is part of the answer; only a Kubernetes API that
/// cannot be asked is an error.
pub(super) async fn resolve(context: &Context, mirror: &ValidatedMirror) -> Result<Secrets, Error> {
    let namespace = &mirror.namespace;
    let account = match &mirror.service_account {
        None => Account::default(),
        Some(name) => read_account(context, namespace, name).await?,
    };
    if let Some(name) = &mirror.service_account {
        context.accounts.put(namespace, name, account.clone());
    }
    let read = async |name: String| {
        let found = read_secret(context, namespace, &name).await?;
        context.contents.put(namespace, &name, content(&found));
        Ok::<_, Error>((name, found))
    };
    let found = join_all(mirror.secret_names(&account).into_iter().map(read)).await;
    let principal = principal(context, mirror, &account);
    Ok(Secrets { found: found.into_iter().collect::<Result<_, _>>()?, account, principal })
}

/// Who logs in where an identity does: the `ServiceAccount`, else the operator itself, where the administrator lets it.
fn principal(context: &Context, mirror: &ValidatedMirror, account: &Account) -> Result<Principal, Problem> {
    let namespace = &mirror.namespace;
    let Some(name) = &mirror.service_account else {
        let may = context.config.identity_namespaces.contains(namespace);
        return may.then_some(Principal::Program).ok_or_else(|| Problem {
            reason: Reason::Forbidden,
            message: format!(
                "the namespace {namespace} may not use the operator's own identity; name a ServiceAccount in \
                 spec.serviceAccountName, or have the namespace added to identityNamespaces in the operator's configuration"
            ),
        });
    };
    let timeout = context.config.timing.api_timeout;
    let identity = ServiceAccountTokens::new(context.client.clone(), (namespace, name), AskedBy::Operator, timeout);
    Ok(account.principal(namespace, name, context.config.gcp_trust.clone(), Arc::new(identity)))
}

/// The same for an object that waits: one question for all that wait for the same Secret. Nothing of it is kept but
/// digests.
pub(super) async fn glance(
    context: &Context,
    mirror: &ValidatedMirror,
    is_fresh: impl Fn(Duration) -> bool,
) -> Result<Glance, Error> {
    let namespace = &mirror.namespace;
    let (account, age) = match &mirror.service_account {
        None => (Account::default(), Duration::ZERO),
        Some(name) => {
            let read = async || read_account(context, namespace, name).await;
            context.accounts.get(namespace, name, &is_fresh, read).await?
        }
    };
    let names = mirror.secret_names(&account);
    let one = async |name: &String| {
        let read = async || Ok(content(&read_secret(context, namespace, name).await?));
        context.contents.get(namespace, name, &is_fresh, read).await
    };
    let contents = try_join_all(names.iter().map(one)).await?;
    let age = contents.iter().map(|(_, age)| *age).fold(age, Ord::max);
    let contents = names.iter().zip(contents).map(|(name, (content, _))| (name, content));
    Ok(Glance { fingerprint: fingerprint(&account, contents), age })
}

async fn read_account(context: &Context, namespace: &str, name: &str) -> Result<Account, Error> {
    let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), namespace);
    let read = call("reading a ServiceAccount", context.config.timing.api_timeout, api.get(name)).await;
    Ok(match named("ServiceAccount", name, read)? {
        Ok(account) => Account::of(account),
        Err(problem) => Account { problem: Some(problem), ..Account::default() },
    })
}

async fn read_secret(context: &Context, namespace: &str, name: &str) -> Result<Result<Secret, Problem>, Error> {
    // Names become paths. Those in the spec were checked by its schema; a ServiceAccount's were not.
    if !is_object_name(name) {
        let message = format!("{name:?} is not the name of a Secret; correct it in the ServiceAccount");
        return Ok(Err(Problem { reason: Reason::SecretInvalid, message }));
    }
    let api: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
    named("Secret", name, call("reading a Secret", context.config.timing.api_timeout, api.get(name)).await)
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
