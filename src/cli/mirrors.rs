//! What `sync` and `plan` share: files, credentials, and directories in place of registries.
//!
//! Credentials are the Secrets in the files; where there are none, the user's Docker configuration with its
//! credential helpers. Which of the two is said in one line.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use clap::Args;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Failure, Output, documents::Documents, signals};
use crate::{
    auth::{Credential, CredentialStore, cloud::Principal},
    mirror::{Prepared, Secrets, ValidatedMirror, prepare},
    oci::Host,
    registry::{Client, ClientOptions, Layout, LayoutError, Transport},
    sync::{Destination, Registries, Sources, SyncRequest, choose},
};

/// Which mirrors, and from where to where.
#[derive(Debug, Args)]
pub(super) struct MirrorArguments {
    /// Files with ImageMirrors and, if wanted, Secrets and ServiceAccounts; `-` is standard input.
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// Read the sources from this OCI image layout instead of their registries: `oci:DIR`.
    #[arg(long, value_name = "oci:DIR", value_parser = layout_dir)]
    from: Option<PathBuf>,
    /// Write the images to this OCI image layout instead of the target: `oci:DIR`, made if it is not there.
    #[arg(long, value_name = "oci:DIR", value_parser = layout_dir)]
    to: Option<PathBuf>,
    /// How the report is written to standard output.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub(super) output: Output,
}

/// What came of one mirror.
#[derive(Serialize)]
pub(super) struct Outcome<R> {
    namespace: String,
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) report: R,
}

impl<R> Outcome<R> {
    pub(super) fn new(mirror: &ValidatedMirror, report: R) -> Self {
        Self { namespace: mirror.namespace.clone(), name: mirror.name.clone(), report }
    }
}

/// The mirrors of a command, ready to be carried out one after the other.
pub(super) struct Mirrors {
    documents: Documents,
    layouts: Layouts,
    validated: Vec<ValidatedMirror>,
}

impl Mirrors {
    /// Reads and checks the files.
    pub(super) fn of(arguments: &MirrorArguments) -> Result<Self, Failure> {
        let documents = Documents::of(&arguments.files)?;
        let validated = documents.validated()?;
        Ok(Self { documents, layouts: Layouts::of(arguments)?, validated })
    }

    /// Carries each out with `run`, which is given its name.
    pub(super) async fn each<R>(
        &self,
        run: impl AsyncFn(&str, &Client, (&SyncRequest, &Registries), &CancellationToken) -> Result<R, Failure>,
    ) -> Result<Vec<Outcome<R>>, Failure> {
        let cancel = signals();
        let client = Client::new(ClientOptions::default());
        let place = if self.documents.have_secrets() { "the Secrets in the files" } else { "the Docker configuration" };
        eprintln!("credentials: {place}");
        let mut outcomes = Vec::new();
        for mirror in &self.validated {
            let (request, registries) = self.request(mirror, &client, &cancel).await?;
            let report = run(&mirror.name, &client, (&request, &registries), &cancel).await?;
            outcomes.push(Outcome::new(mirror, report));
        }
        Ok(outcomes)
    }

    /// What a mirror asks for, with its tags chosen.
    async fn request(
        &self,
        mirror: &ValidatedMirror,
        client: &Client,
        cancel: &CancellationToken,
    ) -> Result<(SyncRequest, Registries), Failure> {
        let mirror = &self.layouts.without_target_secret(mirror);
        let from_files = self.documents.have_secrets();
        let prepared = if from_files { self.documents.prepare(mirror) } else { with_docker_configuration(mirror)? };
        let Prepared { request, selections, mut registries, .. } = prepared;
        self.layouts.replace(&mut registries);
        let request = choose(client, request, &selections, &registries, cancel).await;
        let request = request.ok_or_else(|| Failure::Interrupted(format!("{} was not begun", mirror.name)))?;
        Ok((request, registries))
    }
}

/// The directories that take the place of registries.
struct Layouts {
    from: Option<Layout>,
    to: Option<Layout>,
}

impl Layouts {
    fn of(arguments: &MirrorArguments) -> Result<Self, Failure> {
        if arguments.from.is_some() && arguments.from == arguments.to {
            return Err(Failure::Usage("--from and --to name the same directory; write to another one".into()));
        }
        let usage = |error: LayoutError| Failure::Usage(error.to_string());
        let from = arguments.from.as_deref().map(Layout::open).transpose().map_err(usage)?;
        let to = arguments.to.as_deref().map(Layout::create).transpose().map_err(usage)?;
        Ok(Self { from, to })
    }

    /// The mirror without the Secret for a target that is not written to.
    fn without_target_secret(&self, mirror: &ValidatedMirror) -> ValidatedMirror {
        let target_secret = mirror.target_secret.clone().filter(|_| self.to.is_none());
        ValidatedMirror { target_secret, ..mirror.clone() }
    }

    fn replace(&self, registries: &mut Registries) {
        if let Some(from) = &self.from {
            registries.sources = Sources::Layout(from.clone());
        }
        if let Some(to) = &self.to {
            registries.target = Destination::Layout(to.clone());
        }
    }
}

fn layout_dir(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("oci:") {
        Some(dir) if !dir.is_empty() => Ok(dir.into()),
        _ => Err("write oci:DIR, a directory in the form of an OCI image layout".into()),
    }
}

/// The names of Secrets in the spec mean nothing without their content: the user's own logins take their place.
fn with_docker_configuration(mirror: &ValidatedMirror) -> Result<Prepared, Failure> {
    let without_secrets =
        ValidatedMirror { pull_secrets: Vec::new(), target_secret: None, service_account: None, ..mirror.clone() };
    let program = Secrets { principal: Some(Principal::Program), ..Secrets::default() };
    let mut prepared = prepare(&without_secrets, &program, |_| Transport::default(), &BTreeMap::new());
    let hosts: BTreeSet<&Host> = mirror.source_hosts().chain([&mirror.target_host]).collect();
    let mut store = CredentialStore::default();
    for host in hosts {
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

/// The user's login for a registry, if there is one.
fn docker_login(host: &Host) -> Result<Option<CredentialStore>, Failure> {
    const ORIGIN: &str = "the Docker configuration";
    const LOG_IN: &str = "log in again, or add Secrets to the files";
    let server = if host.as_str() == Host::DOCKER_HUB { "https://index.docker.io/v1/" } else { host.as_str() };
    match docker_credential::get_credential(server) {
        Ok(DockerCredential::UsernamePassword(username, password)) => {
            let credential = Credential::new(username, password.into(), ORIGIN);
            let store = CredentialStore::single(host.as_str(), credential);
            store.map(Some).map_err(|error| Failure::Usage(format!("{ORIGIN}: {error}")))
        }
        Ok(DockerCredential::IdentityToken(token)) => {
            let store = CredentialStore::single(host.as_str(), Credential::identity_token(token.into(), ORIGIN));
            store.map(Some).map_err(|error| Failure::Usage(format!("{ORIGIN}: {error}")))
        }
        Err(
            CredentialRetrievalError::ConfigNotFound
            | CredentialRetrievalError::NoCredentialConfigured
            | CredentialRetrievalError::ConfigReadError,
        ) => Ok(None),
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
