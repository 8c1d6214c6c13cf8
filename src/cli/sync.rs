//! `imagemirror sync -f FILE…`: one sync of the `ImageMirror`s in the files, without Kubernetes.
//!
//! Credentials are the Secrets in the files; where there are none, the user's Docker configuration with its
//! credential helpers. Which of the two is said in one line.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::Read as _,
    path::PathBuf,
    sync::Arc,
};

use clap::{Args, ValueEnum};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Failure, runtime, signals};
use crate::{
    api::ImageMirror,
    auth::{Credential, CredentialStore},
    copy::{Fence, Progress},
    mirror::{Prepared, Problem, Secrets, ValidatedMirror, prepare, validate},
    oci::Host,
    plan::Action,
    reason::Reason,
    registry::{Client, ClientOptions, Layout, LayoutError, Transport},
    sync::{Destination, ImageReport, Registries, Sources, SyncReport, sync},
    telemetry::logging::{self, Format},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files with ImageMirrors and, if wanted, Secrets and ServiceAccounts; `-` is standard input.
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Read the sources from this OCI image layout instead of their registries: `oci:DIR`.
    #[arg(long, value_name = "oci:DIR", value_parser = layout_dir)]
    from: Option<PathBuf>,
    /// Write the images to this OCI image layout instead of the target: `oci:DIR`, made if it is not there.
    #[arg(long, value_name = "oci:DIR", value_parser = layout_dir)]
    to: Option<PathBuf>,
    /// How the report is written to standard output.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// One line for each image.
    Text,
    /// One JSON document.
    Json,
}

/// The directories that take the place of registries.
struct Layouts {
    from: Option<Layout>,
    to: Option<Layout>,
}

impl Layouts {
    fn of(arguments: &Arguments) -> Result<Self, Failure> {
        if arguments.from.is_some() && arguments.from == arguments.to {
            return Err(Failure::Usage("--from and --to name the same directory".into()));
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

/// What the files hold. Objects without a namespace are in `default`.
#[derive(Default)]
struct Documents {
    mirrors: Vec<ImageMirror>,
    secrets: BTreeMap<(String, String), Secret>,
    accounts: BTreeMap<(String, String), ServiceAccount>,
}

#[derive(Serialize)]
struct Outcome {
    namespace: String,
    name: String,
    #[serde(flatten)]
    report: SyncReport,
}

pub(super) fn run(arguments: &Arguments, format: Option<Format>, level: Option<String>) -> Result<(), Failure> {
    let level = level.unwrap_or_else(|| "error".to_owned());
    logging::init(format.unwrap_or_default(), &level).map_err(|error| Failure::Usage(error.to_string()))?;
    let mut documents = Documents::default();
    for file in &arguments.files {
        documents.read(file)?;
    }
    let mirrors = documents.validated()?;
    let layouts = Layouts::of(arguments)?;
    runtime()?.block_on(sync_all(&documents, &mirrors, &layouts, arguments.output))
}

async fn sync_all(
    documents: &Documents,
    mirrors: &[ValidatedMirror],
    layouts: &Layouts,
    output: Output,
) -> Result<(), Failure> {
    let cancel = signals();
    let client = Client::new(ClientOptions::default());
    let from_files = !documents.secrets.is_empty();
    eprintln!("credentials: {}", if from_files { "the Secrets in the files" } else { "the Docker configuration" });
    let mut outcomes = Vec::new();
    for mirror in mirrors {
        let mirror = &layouts.without_target_secret(mirror);
        let mut prepared = if from_files { documents.prepare(mirror) } else { with_docker_configuration(mirror)? };
        layouts.replace(&mut prepared.registries);
        let progress = Arc::new(Progress::default());
        let sync = sync(&client, &prepared.request, &prepared.registries, Fence::Open, progress, &cancel);
        let report = sync.await.ok_or(Failure::Interrupted)?;
        outcomes.push(Outcome { namespace: mirror.namespace.clone(), name: mirror.name.clone(), report });
    }
    match output {
        Output::Text => print!("{}", text(&outcomes)),
        Output::Json => {
            let json = serde_json::to_string_pretty(&serde_json::json!({ "mirrors": outcomes }));
            println!("{}", json.map_err(|error| Failure::Failed(error.to_string()))?);
        }
    }
    let failed = outcomes.iter().any(|outcome| outcome.report.failed().next().is_some());
    if failed { Err(Failure::Reported) } else { Ok(()) }
}

fn text(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for Outcome { name, report, .. } in outcomes {
        for image in &report.images {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}", line(image));
        }
        let total = report.images.len();
        let failed = report.failed().count();
        let seconds = report.finished_at.duration_since(report.started_at).as_secs_f64();
        let bytes = report.totals.bytes_copied;
        let _ = writeln!(text, "{name}: {}/{total} in step, {bytes} bytes copied in {seconds:.1} s", total - failed);
    }
    text
}

fn line(image: &ImageReport) -> String {
    let separator = if image.tag.contains(':') { '@' } else { ':' };
    let source = format!("{}{separator}{}", image.source, image.tag);
    if let Some(failure) = &image.failure {
        return format!("failed     {source}: {}: {}", failure.reason, failure.message);
    }
    let word = match image.action {
        Some(Action::Copy) => "copied",
        Some(Action::Update) => "updated",
        Some(Action::Restore) => "restored",
        Some(Action::Unchanged) | None => "unchanged",
    };
    let digest = image.digest.as_ref().map(ToString::to_string).unwrap_or_default();
    format!("{word:<10} {source} -> {} {digest}", image.target)
}

impl Documents {
    fn read(&mut self, file: &PathBuf) -> Result<(), Failure> {
        let shown = file.display();
        let text = if file.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        let text = text.map_err(|error| Failure::Usage(format!("{shown} cannot be read: {error}")))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).map_err(|_| Failure::Usage(format!("{shown} is not valid YAML")))?;
        for (number, document) in documents.into_iter().enumerate() {
            if document.is_null() {
                continue;
            }
            self.add(document).map_err(|what| Failure::Usage(format!("{shown}, document {}: {what}", number + 1)))?;
        }
        Ok(())
    }

    fn add(&mut self, document: Value) -> Result<(), String> {
        let field = |pointer: &str| document.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let key = (namespace_or_default(field("/metadata/namespace")), field("/metadata/name"));
        let (version, kind) = (field("/apiVersion"), field("/kind"));
        match (version.as_str(), kind.as_str()) {
            ("imagemirror.dev/v1alpha1", "ImageMirror") => {
                let mut mirror: ImageMirror = read_as(document)?;
                mirror.metadata.namespace = Some(key.0);
                self.mirrors.push(mirror);
            }
            ("v1", "Secret") => {
                // The parser's own words may quote the content.
                let secret: Secret = serde_json::from_value(document).map_err(|_| "not a valid Secret".to_owned())?;
                self.secrets.insert(key, with_string_data(secret));
            }
            ("v1", "ServiceAccount") => {
                self.accounts.insert(key, read_as(document)?);
            }
            _ => {
                return Err(format!(
                    "{version} {kind} is not known here; give ImageMirrors of imagemirror.dev/v1alpha1, Secrets and ServiceAccounts"
                ));
            }
        }
        Ok(())
    }

    fn validated(&self) -> Result<Vec<ValidatedMirror>, Failure> {
        if self.mirrors.is_empty() {
            return Err(Failure::Usage("the files hold no ImageMirror".into()));
        }
        let validated = |mirror: &ImageMirror| {
            let name = mirror.metadata.name.clone().unwrap_or_default();
            validate(mirror).map_err(|error| Failure::Usage(format!("ImageMirror {name:?} is invalid: {error}")))
        };
        self.mirrors.iter().map(validated).collect()
    }

    fn prepare(&self, mirror: &ValidatedMirror) -> Prepared {
        let key = |name: &str| (mirror.namespace.clone(), name.to_owned());
        let mut secrets = Secrets::default();
        if let Some(name) = &mirror.service_account {
            match self.accounts.get(&key(name)) {
                Some(account) => {
                    let references = account.image_pull_secrets.iter().flatten();
                    secrets.of_service_account = references.map(|reference| reference.name.clone()).collect();
                }
                None => {
                    let message = format!("ServiceAccount {name:?} is not in the files");
                    secrets.service_account_problem = Some(Problem { reason: Reason::SecretNotFound, message });
                }
            }
        }
        let in_files = self.secrets.iter().filter(|((namespace, _), _)| *namespace == mirror.namespace);
        secrets.found = in_files.map(|((_, name), secret)| (name.clone(), Ok(secret.clone()))).collect();
        prepare(mirror, &secrets, |_| Transport::default(), &BTreeMap::new())
    }
}

fn namespace_or_default(namespace: String) -> String {
    if namespace.is_empty() { "default".to_owned() } else { namespace }
}

fn read_as<T: DeserializeOwned>(document: Value) -> Result<T, String> {
    serde_json::from_value(document).map_err(|error| error.to_string())
}

/// What the API server does when a Secret is stored.
fn with_string_data(mut secret: Secret) -> Secret {
    for (key, text) in secret.string_data.take().into_iter().flatten() {
        secret.data.get_or_insert_default().insert(key, ByteString(text.into_bytes()));
    }
    secret
}

/// The names of Secrets in the spec mean nothing without their content: the user's own logins take their place.
fn with_docker_configuration(mirror: &ValidatedMirror) -> Result<Prepared, Failure> {
    let without_secrets =
        ValidatedMirror { pull_secrets: Vec::new(), target_secret: None, service_account: None, ..mirror.clone() };
    let mut prepared = prepare(&without_secrets, &Secrets::default(), |_| Transport::default(), &BTreeMap::new());
    let hosts: BTreeSet<&Host> =
        mirror.images.iter().map(|image| &image.source.host).chain([&mirror.target_host]).collect();
    let mut store = CredentialStore::default();
    for host in hosts {
        if let Some(found) = docker_login(host)? {
            store.append(found);
        }
    }
    for access in prepared.registries.accesses_mut() {
        access.credentials = store.clone();
    }
    Ok(prepared)
}

/// The user's login for a registry, if there is one.
fn docker_login(host: &Host) -> Result<Option<CredentialStore>, Failure> {
    const ORIGIN: &str = "the Docker configuration";
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
        Err(CredentialRetrievalError::HelperFailure { helper, .. }) => {
            Err(Failure::Usage(format!("{ORIGIN} gives no login for {host}: the credential helper {helper} failed")))
        }
        Err(error) => Err(Failure::Usage(format!("{ORIGIN} gives no login for {host}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_another_namespace_are_not_seen() {
        let mut documents = Documents::default();
        for (namespace, name) in [("a", "pull"), ("b", "pull")] {
            let secret = serde_json::json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": namespace, "name": name},
                "type": "kubernetes.io/dockercfg", "stringData": {".dockercfg": "{}"},
            });
            documents.add(secret).unwrap();
        }
        let mirror = serde_json::json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"namespace": "c", "name": "m"},
            "spec": {"images": [{"source": "gcr.io/a:1"}], "target": {"registry": "t.io"}, "imagePullSecrets": [{"name": "pull"}]},
        });
        documents.add(mirror).unwrap();
        let mirrors = documents.validated().unwrap();
        let prepared = documents.prepare(&mirrors[0]);
        assert_eq!(prepared.problems[0].reason, Reason::SecretNotFound);
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let error = Documents::default().add(serde_json::json!({"apiVersion": "v1", "kind": "Pod"})).unwrap_err();
        assert!(error.starts_with("v1 Pod is not known here"), "{error}");
    }
}
