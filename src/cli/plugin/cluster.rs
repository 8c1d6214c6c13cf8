//! The cluster that the kubeconfig names, as kubectl reads it, and its errors in words: what, where, what to do.

use std::{collections::BTreeMap, error::Error as _, path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    api::v1alpha1::ImageMirror,
    auth::cloud::GcpTrust,
    cli::{Failure, operator::can_be_read},
    controller::{
        api_words,
        identity::{AskedBy, ServiceAccountTokens},
    },
    mirror::{Account, Problem, Secrets, ValidatedMirror, is_object_name, validate},
    reason::Reason,
};

/// What the operator's configuration says, which the user may not be able to read.
#[derive(Debug, Args)]
pub(super) struct OfOperator {
    /// By what Google knows the cluster: gcp.workloadIdentity of the operator's configuration.
    #[arg(long, value_name = "RESOURCE")]
    gcp_workload_identity: Option<GcpTrust>,
}

/// For one question to the API server.
const DEADLINE: Duration = Duration::from_secs(30);
const MANAGER: &str = "kubectl-imagemirror";

/// Which cluster, as whom, and which namespace: as kubectl has it.
#[derive(Debug, Args)]
pub(super) struct Connection {
    /// The kubeconfig, in place of $KUBECONFIG and ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE", help_heading = "Cluster")]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    context: Option<String>,
    /// The cluster of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    cluster: Option<String>,
    /// The user of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    user: Option<String>,
    /// Act as this user.
    #[arg(long = "as", global = true, value_name = "USER", help_heading = "Cluster")]
    impersonate: Option<String>,
    /// Act as a member of this group.
    #[arg(long = "as-group", global = true, value_name = "GROUP", help_heading = "Cluster")]
    groups: Vec<String>,
    /// The namespace; that of the context where none is named.
    #[arg(short, long, global = true, help_heading = "Cluster")]
    namespace: Option<String>,
}

/// A cluster and a namespace in it.
pub(super) struct Cluster {
    client: Client,
    /// The API server.
    url: String,
    pub(super) namespace: String,
}

impl Cluster {
    pub(super) async fn connect(connection: &Connection) -> Result<Self, Failure> {
        let config = config(connection).await?;
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace = connection.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        if !is_object_name(&namespace) {
            return Err(Failure::Usage(format!("{namespace:?} is not the name of a namespace; correct --namespace")));
        }
        let client = Client::try_from(config).map_err(|error| {
            let what = format!("no connection to {url} can be made: {}", sources(&error));
            Failure::Usage(format!("{what}; correct the kubeconfig"))
        })?;
        Ok(Self { client, url, namespace })
    }

    /// The `ImageMirror`s of the namespace.
    pub(super) fn mirrors(&self) -> Api<ImageMirror> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Those of all namespaces.
    pub(super) fn all_mirrors(&self) -> Api<ImageMirror> {
        Api::all(self.client.clone())
    }

    pub(super) async fn get(&self, name: &str) -> Result<ImageMirror, Failure> {
        if !is_object_name(name) {
            return Err(Failure::Usage(format!("{name:?} is not the name of an ImageMirror; correct it")));
        }
        self.ask(&format!("ImageMirror {name:?} cannot be read"), self.mirrors().get(name)).await
    }

    /// What a mirror of the namespace says, if it can be carried out.
    pub(super) fn validated(&self, mirror: &ImageMirror) -> Result<ValidatedMirror, Failure> {
        validate(mirror).map_err(|error| {
            let place = format!("{}/{}", self.namespace, mirror.name_any());
            Failure::Failed(format!("ImageMirror {place} is invalid: {error}"))
        })
    }

    pub(super) async fn patch(&self, name: &str, patch: &Value) -> Result<ImageMirror, Failure> {
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let patch = Patch::Merge(patch);
        let changed = self.mirrors();
        self.ask(&format!("ImageMirror {name:?} cannot be changed"), changed.patch(name, &params, &patch)).await
    }

    /// What the API server answers; `what` is said of a failure.
    pub(super) async fn ask<T>(
        &self,
        what: &str,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(answer) => answer.map_err(|error| self.explain(what, &error)),
            Err(_) => Err(Failure::Failed(format!(
                "{what}: {} has not answered within {} s; try again, or name another --context",
                self.url,
                DEADLINE.as_secs()
            ))),
        }
    }

    /// A failure in words.
    pub(super) fn explain(&self, what: &str, error: &kube::Error) -> Failure {
        let Self { url, namespace, .. } = self;
        let kube::Error::Api(status) = error else {
            let what = format!("{what}: {url} cannot be reached: {}", sources(error.source().unwrap_or(error)));
            return Failure::Failed(format!("{what}; check the kubeconfig, or name another --context"));
        };
        let said = api_words(error);
        Failure::Failed(match status.code {
            401 => format!("{what}: {url} does not know the user; log in again, or name another --context"),
            403 => format!("{what}: {url} forbids it: {said}; ask for a role that allows it"),
            404 if status.details.as_ref().is_some_and(|details| !details.name.is_empty()) => format!(
                "{what}: it does not exist in the namespace {namespace} of {url}; `kubectl imagemirror list -A` shows those that do"
            ),
            404 => format!(
                "{what}: {url} does not know ImageMirrors of imagemirror.dev/v1alpha1; install their definition with the chart, or with `imagemirror crd | kubectl apply --server-side -f -`"
            ),
            _ => format!("{what}: {url} says: {said}; try again"),
        })
    }

    /// Everything that a mirror names, read as the user; what cannot be read is part of the answer.
    pub(super) async fn secrets(&self, mirror: &ValidatedMirror, of_operator: &OfOperator) -> Result<Secrets, Failure> {
        let mut account = Account::default();
        if let Some(name) = &mirror.service_account {
            match self.read::<ServiceAccount>("ServiceAccount", name).await? {
                Ok(found) => account = Account::of(found),
                Err(problem) => account.problem = Some(problem),
            }
        }
        let mut found = BTreeMap::new();
        for name in mirror.secret_names(&account) {
            let secret = self.read::<Secret>("Secret", &name).await?;
            found.insert(name, secret);
        }
        let principal = match &mirror.service_account {
            Some(name) => {
                let place = (self.namespace.as_str(), name.as_str());
                let tokens = ServiceAccountTokens::new(self.client.clone(), place, AskedBy::User, DEADLINE);
                let gcp_trust = of_operator.gcp_workload_identity.clone();
                Ok(account.principal(&self.namespace, name, gcp_trust, Arc::new(tokens)))
            }
            // The user's own would say nothing of it.
            None => Err(Problem {
                reason: Reason::Forbidden,
                message: "the operator's own identity is used, which nobody else has: what registries answer to it is in the \
                          status; only a ServiceAccount of spec.serviceAccountName can be tried from here"
                    .to_owned(),
            }),
        };
        Ok(Secrets { found, account, principal })
    }

    async fn read<K>(&self, kind: &str, name: &str) -> Result<Result<K, Problem>, Failure>
    where
        K: Clone + std::fmt::Debug + DeserializeOwned + kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        let problem = |reason, message| Ok(Err(Problem { reason, message }));
        if !is_object_name(name) {
            return problem(Reason::SecretInvalid, format!("{name:?} is not the name of a {kind}; correct it"));
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        match tokio::time::timeout(DEADLINE, api.get(name)).await {
            Ok(Ok(found)) => Ok(Ok(found)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => problem(
                Reason::SecretNotFound,
                format!(
                    "{kind} {name:?} does not exist in {}; create it, or correct its name in the spec",
                    self.namespace
                ),
            ),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => problem(
                Reason::Forbidden,
                format!("you may not get {kind} {name:?} in {}; ask for a role that allows it", self.namespace),
            ),
            Ok(Err(error)) => Err(self.explain(&format!("{kind} {name:?} cannot be read"), &error)),
            Err(_) => {
                let what = format!("{kind} {name:?} cannot be read: {} does not answer; try again", self.url);
                Err(Failure::Failed(what))
            }
        }
    }
}

async fn config(connection: &Connection) -> Result<Config, Failure> {
    let Connection { kubeconfig, context, cluster, user, impersonate, groups, .. } = connection;
    let read = match kubeconfig {
        Some(path) => {
            can_be_read(path)?;
            Kubeconfig::read_from(path)
        }
        None => Kubeconfig::read(),
    };
    let what = kubeconfig
        .as_ref()
        .map_or_else(|| "the kubeconfig".to_owned(), |path| format!("the kubeconfig {}", path.display()));
    let fail = |error: &dyn std::error::Error| {
        let hint = "name another with --kubeconfig, or another --context";
        Failure::Usage(format!("{what} cannot be used: {}; {hint}", sources(error)))
    };
    let options = KubeConfigOptions { context: context.clone(), cluster: cluster.clone(), user: user.clone() };
    let mut config = match read {
        Ok(read) => Config::from_custom_kubeconfig(read, &options).await.map_err(|error| fail(&error))?,
        // In a pod there is none, and the pod's own ServiceAccount instead.
        Err(error) => match Config::incluster() {
            Ok(config) if kubeconfig.is_none() && context.is_none() => config,
            _ => return Err(fail(&error)),
        },
    };
    if impersonate.is_some() {
        config.auth_info.impersonate.clone_from(impersonate);
    }
    if !groups.is_empty() {
        config.auth_info.impersonate_groups = Some(groups.clone());
    }
    Ok(config)
}

/// An error and what it comes from, each said once.
fn sources(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !said.contains(&more) {
            said = format!("{said}: {more}");
        }
        source = error.source();
    }
    said
}
