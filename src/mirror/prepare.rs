//! From a checked spec and the Secrets it names to what the engine is asked, and what cannot be asked.
//!
//! A missing Secret does not stop the run: images that another credential matches are copied, and only those that
//! would go anonymous because of it fail with its reason. A bad Secret for the target fails all, without a request.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    api::v1alpha1::ImageMirrorStatus,
    auth::{
        CredentialStore, Unusable,
        cloud::{self, Cloud},
    },
    oci::{Digest, Host, RepositoryName, Tag},
    reason::Reason,
    registry::{Access, Transport},
    sync::{Blocked, Destination, ImageRequest, Last, Registries, SelectionRequest, Sources, SyncRequest},
};

use super::{
    secret::{Account, Problem, Secrets, credentials, proxy, transport},
    validate::{RegistrySettings, ValidatedMirror},
};

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// What to do.
    pub request: SyncRequest,
    /// The repositories from whose tags more images are to be chosen.
    pub selections: Vec<SelectionRequest>,
    /// How the registries are reached.
    pub registries: Registries,
    /// The repositories that no image is copied from or to.
    pub blocked: Blocked,
    /// What is missing or cannot be used, in the order of the spec.
    pub problems: Vec<Problem>,
    /// The same as long as the Secrets say the same: a change is a reason to try again.
    pub fingerprint: Digest,
}

/// Puts a run together. `operator_transport` is what the operator's configuration says of a host, and `last` how
/// target tags were after the last run.
#[must_use]
pub fn prepare(
    mirror: &ValidatedMirror,
    secrets: &Secrets,
    operator_transport: impl Fn(&Host) -> Transport,
    last: &BTreeMap<String, Last>,
) -> Prepared {
    let mut problems = Vec::new();
    let (pull, gaps) = pull_credentials(mirror, secrets);
    problems.extend(gaps.iter().cloned());
    // A Secret that is named for the target comes before an identity there.
    let target_without_secret = mirror.target_secret.is_none().then_some(&mirror.target_host);
    let logins: BTreeMap<&Host, Result<CredentialStore, Problem>> = mirror
        .source_hosts()
        .chain(target_without_secret)
        .filter_map(|host| Some((host, login(host, mirror.registries.get(host)?.cloud?, secrets))))
        .collect();
    problems.extend(logins.values().filter_map(|login| login.as_ref().err().cloned()));
    let target = match &mirror.target_secret {
        Some(name) => secrets.get(name).and_then(|secret| credentials(name, secret)),
        None => logins.get(&mirror.target_host).cloned().unwrap_or_else(|| Ok(pull.clone())),
    };
    // It may be that of a source, too.
    let of_target = target.as_ref().err().filter(|problem| !problems.contains(problem)).cloned();
    problems.extend(of_target);
    let mut transports = BTreeMap::new();
    let hosts = mirror.source_hosts().chain([&mirror.target_host]);
    for host in hosts {
        if !transports.contains_key(host) {
            let found = transport_for(mirror.registries.get(host), secrets, operator_transport(host));
            problems.extend(found.as_ref().err().cloned());
            transports.insert(host.clone(), found);
        }
    }
    let usable = |host: &Host| transports.get(host).and_then(|found| found.as_ref().ok()).cloned().unwrap_or_default();
    let target_access = Access {
        host: mirror.target_host.clone(),
        transport: usable(&mirror.target_host),
        credentials: target.clone().unwrap_or_default(),
    };
    let transport_problem = |host: &Host| transports.get(host).and_then(|found| found.as_ref().err()).cloned();
    let target_problem = |repository: &RepositoryName| {
        let unmatched = || target_is_unmatched(mirror, &target_access.credentials, repository, &gaps);
        target.as_ref().err().cloned().or_else(|| transport_problem(&mirror.target_host)).or_else(unmatched)
    };
    let source_problem = |host: &Host, repository: &RepositoryName| {
        let gap = || match logins.get(host) {
            Some(login) => login.as_ref().err().cloned(),
            None if pull.matching(host, repository).is_empty() => gaps.first().cloned(),
            None => None,
        };
        transport_problem(host).or_else(gap)
    };
    let mut blocked = Blocked::default();
    let images = mirror.images.iter().map(|it| (&it.source.host, &it.source.repository, &it.target_repository));
    let selections = mirror.selections.iter().map(|it| (&it.host, &it.repository, &it.target_repository));
    for (host, repository, target_repository) in images.chain(selections) {
        let of_source = source_problem(host, repository).map(|problem| ((host.clone(), repository.clone()), problem));
        blocked.sources.extend(of_source);
        blocked.targets.extend(target_problem(target_repository).map(|problem| (target_repository.clone(), problem)));
    }
    let why_blocked = |host: &Host, repository: &RepositoryName, target_repository: &RepositoryName| {
        let of_source = || blocked.sources.get(&(host.clone(), repository.clone())).cloned();
        blocked.targets.get(target_repository).cloned().or_else(of_source)
    };
    let images = mirror.images.iter().map(|image| ImageRequest {
        source: image.source.clone(),
        target_repository: image.target_repository.clone(),
        target_tag: image.target_tag.clone(),
        platforms: image.platforms.clone(),
        last: last.get(&mirror.target_of(image)).cloned(),
        is_contested: false,
        blocked: why_blocked(&image.source.host, &image.source.repository, &image.target_repository),
    });
    let selections = mirror.selections.iter().map(|wanted| SelectionRequest {
        host: wanted.host.clone(),
        repository: wanted.repository.clone(),
        select: wanted.select.clone(),
        target_repository: wanted.target_repository.clone(),
        platforms: wanted.platforms.clone(),
        last: last_of(&format!("{}/{}:", mirror.target_host, wanted.target_repository), last),
        blocked: why_blocked(&wanted.host, &wanted.repository, &wanted.target_repository),
    });
    let selections = selections.collect();
    let request = SyncRequest {
        images: images.collect(),
        unknown: Vec::new(),
        timeout: mirror.timeout,
        options: mirror.options.clone(),
        policy: mirror.policy,
        looks_at_attached: true,
    };
    let sources = mirror.source_hosts().map(|host| {
        let login = logins.get(host).map(|login| login.clone().unwrap_or_default());
        let credentials = login.unwrap_or_else(|| pull.clone());
        let access = Access { host: host.clone(), transport: usable(host), credentials };
        (host.clone(), access)
    });
    let registries =
        Registries { sources: Sources::Registries(sources.collect()), target: Destination::Registry(target_access) };
    Prepared { request, selections, registries, blocked, problems, fingerprint: secrets.fingerprint() }
}

/// How target tags were after the last run, as far as the status says. What their digests were made of counts only for
/// the spec that is carried out now: another may name other platforms.
#[must_use]
pub fn last_digests(mirror: &ValidatedMirror, status: &ImageMirrorStatus) -> BTreeMap<String, Last> {
    let is_current = status.last_sync.as_ref().is_some_and(|last| last.spec_hash == mirror.spec_hash);
    let known = status.images.iter().filter_map(|image| {
        let source_digest = image.source_digest.clone().filter(|_| is_current);
        Some((image.target.clone(), Last { digest: image.digest.clone()?, source_digest }))
    });
    known.collect()
}

impl ValidatedMirror {
    /// The names of all Secrets that it needs.
    #[must_use]
    pub fn secret_names(&self, account: &Account) -> BTreeSet<String> {
        let settings =
            self.registries.values().flat_map(|settings| settings.cert_secret.iter().chain(&settings.proxy_secret));
        let pull = self.pull_secrets.iter().chain(&self.target_secret).chain(&account.pull_secrets);
        pull.chain(settings).cloned().collect()
    }
}

/// What is known of the tags of one repository.
fn last_of(place: &str, last: &BTreeMap<String, Last>) -> BTreeMap<Tag, Last> {
    let following =
        last.range(place.to_owned()..).map_while(|(target, last)| Some((target.strip_prefix(place)?, last)));
    following.filter_map(|(tag, last)| Some((tag.parse().ok()?, last.clone()))).collect()
}

/// The credentials for the sources, and what is missing of them.
fn pull_credentials(mirror: &ValidatedMirror, secrets: &Secrets) -> (CredentialStore, Vec<Problem>) {
    let mut store = CredentialStore::default();
    let mut gaps: Vec<Problem> = secrets.account.problem.iter().cloned().collect();
    for name in mirror.pull_secrets.iter().chain(&secrets.account.pull_secrets) {
        match secrets.get(name).and_then(|secret| credentials(name, secret)) {
            Ok(found) => store.append(found),
            Err(problem) => gaps.push(problem),
        }
    }
    (store, gaps)
}

/// The login of an identity in place of Secrets.
fn login(host: &Host, cloud: Cloud, secrets: &Secrets) -> Result<CredentialStore, Problem> {
    if let Some(problem) = &secrets.account.problem {
        return Err(problem.clone());
    }
    let principal = secrets.principal.as_ref().map_err(Clone::clone)?;
    let failed = |Unusable { reason, message }| Problem { reason, message };
    let credential = cloud::login(cloud, host, principal).map_err(failed)?;
    CredentialStore::single(host.as_str(), credential)
        .map_err(|error| Problem { reason: Reason::InternalError, message: error.to_string() })
}

/// A Secret that was named for the target and has nothing for it never means anonymous.
fn target_is_unmatched(
    mirror: &ValidatedMirror,
    store: &CredentialStore,
    repository: &RepositoryName,
    gaps: &[Problem],
) -> Option<Problem> {
    if !store.matching(&mirror.target_host, repository).is_empty() {
        return None;
    }
    match &mirror.target_secret {
        Some(name) => Some(Problem {
            reason: Reason::SecretInvalid,
            message: format!(
                "Secret {name:?} of spec.target.secretRef has no entry for {}/{repository}; add one for that registry",
                mirror.target_host
            ),
        }),
        None => gaps.first().cloned(),
    }
}

/// How a registry is reached: as the spec says, and where it says nothing, as the operator's configuration does.
fn transport_for(
    settings: Option<&RegistrySettings>,
    secrets: &Secrets,
    of_operator: Transport,
) -> Result<Transport, Problem> {
    let Some(settings) = settings else { return Ok(of_operator) };
    let proxy = match &settings.proxy_secret {
        Some(name) => Some(Arc::new(secrets.get(name).and_then(|secret| proxy(name, secret))?)),
        None => of_operator.proxy.clone(),
    };
    let transport = match &settings.cert_secret {
        _ if settings.plain_http => Transport { plain_http: true, ..Transport::default() },
        Some(name) => {
            let own = secrets.get(name).and_then(|secret| transport(name, secret))?;
            // A Secret with a client certificate alone says nothing about whom to trust.
            Transport { ca: own.ca.clone().or(of_operator.ca), ..own }
        }
        None => of_operator,
    };
    Ok(Transport { proxy, ..transport })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{ByteString, api::core::v1::Secret};

    use super::*;
    use crate::mirror::{secret::not_found, validate};

    fn mirror(rest: &str) -> ValidatedMirror {
        let text = format!(
            "apiVersion: imagemirror.dev/v1alpha1\nkind: ImageMirror\nmetadata: {{name: a, namespace: n}}\n\
             spec:\n  images: [{{source: 'gcr.io/a:1'}}, {{source: 'quay.io/b:1'}}]\n{rest}"
        );
        validate(&serde_saphyr::from_str(&text).unwrap()).unwrap()
    }

    fn docker_config(host: &str) -> Secret {
        let json = format!(r#"{{"auths":{{"{host}":{{"username":"u","password":"p"}}}}}}"#);
        Secret {
            type_: Some("kubernetes.io/dockerconfigjson".into()),
            data: Some([(".dockerconfigjson".to_owned(), ByteString(json.into_bytes()))].into()),
            ..Secret::default()
        }
    }

    fn secrets(found: &[(&str, Option<Secret>)]) -> Secrets {
        let entry = |(name, secret): &(&str, Option<Secret>)| {
            ((*name).to_owned(), secret.clone().ok_or_else(|| not_found(name)))
        };
        Secrets { found: found.iter().map(entry).collect(), ..Secrets::default() }
    }

    fn blocked(mirror: &ValidatedMirror, secrets: &Secrets) -> Vec<Option<Reason>> {
        let prepared = prepare(mirror, secrets, |_| Transport::default(), &BTreeMap::new());
        prepared.request.images.iter().map(|image| image.blocked.as_ref().map(|problem| problem.reason)).collect()
    }

    #[test]
    fn a_missing_pull_secret_blocks_only_what_would_go_anonymous() {
        let mirror = mirror(
            "  target: {registry: t.io, secretRef: {name: push}}\n  imagePullSecrets: [{name: gcr}, {name: gone}]",
        );
        let with =
            secrets(&[("gcr", Some(docker_config("gcr.io"))), ("gone", None), ("push", Some(docker_config("t.io")))]);
        assert_eq!(blocked(&mirror, &with), [None, Some(Reason::SecretNotFound)]);
    }

    #[test]
    fn a_bad_target_secret_blocks_everything() {
        let mirror = mirror("  target: {registry: t.io, secretRef: {name: push}}");
        let all = |reason| vec![Some(reason), Some(reason)];
        assert_eq!(blocked(&mirror, &secrets(&[("push", None)])), all(Reason::SecretNotFound));
        let other_host = secrets(&[("push", Some(docker_config("other.io")))]);
        assert_eq!(blocked(&mirror, &other_host), all(Reason::SecretInvalid));
        assert_eq!(blocked(&mirror, &secrets(&[("push", Some(docker_config("t.io")))])), [None, None]);
    }

    #[test]
    fn without_secrets_everything_is_anonymous() {
        let mirror = mirror("  target: {registry: t.io}");
        assert_eq!(blocked(&mirror, &Secrets::default()), [None, None]);
    }

    /// A panic says what somebody formatted: nothing of what a run is made of tells a password.
    #[test]
    fn a_panic_that_shows_a_run_shows_no_password() {
        let mirror = mirror("  target: {registry: t.io, secretRef: {name: push}}");
        let canary = "canary-1f0c";
        let json = format!(r#"{{"auths":{{"t.io":{{"username":"u","password":"{canary}"}}}}}}"#);
        let secret = Secret {
            type_: Some("kubernetes.io/dockerconfigjson".into()),
            data: Some([(".dockerconfigjson".to_owned(), ByteString(json.into_bytes()))].into()),
            ..Secret::default()
        };
        let secrets = secrets(&[("push", Some(secret))]);
        let prepared = prepare(&mirror, &secrets, |_| Transport::default(), &BTreeMap::new());
        let shown = std::panic::AssertUnwindSafe(|| panic!("{prepared:?} of {mirror:?} with {secrets:?}"));
        let panic = std::panic::catch_unwind(shown).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.contains("t.io") && message.contains("push"), "{message}");
        let bytes = format!("{:?}", canary.as_bytes());
        for form in [canary, bytes.trim_matches(['[', ']'])] {
            assert!(!message.contains(form), "{message}");
        }
    }

    #[test]
    fn the_fingerprint_follows_the_content() {
        let mirror = mirror("  target: {registry: t.io, secretRef: {name: push}}");
        let of = |secrets| prepare(&mirror, &secrets, |_| Transport::default(), &BTreeMap::new()).fingerprint;
        let missing = of(secrets(&[("push", None)]));
        let one = of(secrets(&[("push", Some(docker_config("t.io")))]));
        let two = of(secrets(&[("push", Some(docker_config("u.io")))]));
        assert!(missing != one && one != two);
        assert_eq!(one, of(secrets(&[("push", Some(docker_config("t.io")))])));
    }
}
