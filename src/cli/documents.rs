//! What the files of a command hold: `ImageMirror`s, and the Secrets and `ServiceAccount`s that they name.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Failure, read_text};
use crate::{
    api::{
        ImageMirror,
        schema::{self, Violation},
    },
    auth::cloud::Principal,
    mirror::{Account, Prepared, Problem, Secrets, ValidatedMirror, prepare, validate_with},
    reason::Reason,
    registry::Transport,
};

/// Errors of one object that are said at once.
const MAX_ERRORS: usize = 5;

/// What the files hold. Objects without a namespace are in `default`.
#[derive(Default)]
pub(super) struct Documents {
    mirrors: Vec<Found>,
    secrets: BTreeMap<(String, String), Secret>,
    accounts: BTreeMap<(String, String), ServiceAccount>,
}

/// An `ImageMirror` of the files.
struct Found {
    /// The file and the number of the document in it.
    place: String,
    mirror: ImageMirror,
    /// What the schema refuses in it.
    refused: Vec<Violation>,
}

impl Documents {
    /// Reads the files.
    pub(super) fn of(files: &[PathBuf]) -> Result<Self, Failure> {
        let mut documents = Self::default();
        for file in files {
            documents.read(file)?;
        }
        Ok(documents)
    }

    /// Whether there are Secrets, which then are the only credentials.
    pub(super) fn have_secrets(&self) -> bool {
        !self.secrets.is_empty()
    }

    fn read(&mut self, file: &Path) -> Result<(), Failure> {
        self.parse(&read_text(file)?, &file.display().to_string())
    }

    /// Reads the text of a file that is called `shown`.
    pub(super) fn parse(&mut self, text: &str, shown: &str) -> Result<(), Failure> {
        // The parser's own words may quote a password.
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| {
            let place = error.location().map(|at| format!(", line {}, column {}", at.line(), at.column()));
            Failure::Usage(format!("{shown}{}: this is not valid YAML; correct it there", place.unwrap_or_default()))
        })?;
        for (number, document) in documents.into_iter().enumerate() {
            if document.is_null() {
                continue;
            }
            let place = format!("{shown}, document {}", number + 1);
            self.add(document, &place).map_err(|what| Failure::Usage(format!("{place}: {what}")))?;
        }
        Ok(())
    }

    fn add(&mut self, document: Value, place: &str) -> Result<(), String> {
        let field = |pointer: &str| document.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let key = (namespace_or_default(field("/metadata/namespace")), field("/metadata/name"));
        let (version, kind) = (field("/apiVersion"), field("/kind"));
        match (version.as_str(), kind.as_str()) {
            ("imagemirror.dev/v1alpha1", "ImageMirror") => {
                let refused = schema::check(&document);
                let said = refused.iter().take(MAX_ERRORS).map(ToString::to_string).collect::<Vec<_>>().join("; ");
                let mirror = read_as::<ImageMirror>(schema::as_kept(document));
                let mut mirror = mirror.map_err(|error| {
                    let said = if said.is_empty() { error } else { said };
                    format!("ImageMirror {:?} is invalid: {said}; `imagemirror crd` has the whole schema", key.1)
                })?;
                mirror.metadata.namespace = Some(key.0);
                self.mirrors.push(Found { place: place.to_owned(), mirror, refused });
            }
            ("v1", "Secret") => {
                // The parser's own words may quote the content.
                let secret: Secret = serde_json::from_value(document).map_err(|_| {
                    format!("Secret {:?} is invalid; compare it with what `kubectl create secret --dry-run=client -o yaml` prints", key.1)
                })?;
                self.secrets.insert(key, with_string_data(secret));
            }
            ("v1", "ServiceAccount") => {
                let account = read_as(document)
                    .map_err(|error| format!("ServiceAccount {:?} is invalid: {error}; correct the field", key.1))?;
                self.accounts.insert(key, account);
            }
            _ => {
                let what =
                    if kind.is_empty() { "an object without a kind".to_owned() } else { format!("{version} {kind}") };
                return Err(format!(
                    "{what} is not known here; give ImageMirrors of imagemirror.dev/v1alpha1, Secrets and ServiceAccounts"
                ));
            }
        }
        Ok(())
    }

    /// The mirrors, if all can be carried out beside each other.
    pub(super) fn validated(&self) -> Result<Vec<ValidatedMirror>, Failure> {
        if self.mirrors.is_empty() {
            return Err(Failure::Usage("the files hold no ImageMirror; name a file with one".into()));
        }
        let validated = |Found { place, mirror, refused }: &Found| {
            let name = mirror.metadata.name.clone().unwrap_or_default();
            validate_with(mirror, refused)
                .map_err(|error| Failure::Usage(format!("{place}: ImageMirror {name:?} is invalid: {error}")))
        };
        let mirrors: Vec<ValidatedMirror> = self.mirrors.iter().map(validated).collect::<Result<_, _>>()?;
        let mut wanted: HashMap<String, &str> = HashMap::new();
        for mirror in &mirrors {
            for target in mirror.images.iter().map(|image| mirror.target_of(image)) {
                let what = format!("both want the target tag {target}; give one of them another target");
                if let Some(other) = wanted.insert(target, &mirror.name) {
                    return Err(Failure::Usage(format!("ImageMirror {other:?} and {:?} {what}", mirror.name)));
                }
            }
        }
        Ok(mirrors)
    }

    /// A run with the Secrets of the files.
    pub(super) fn prepare(&self, mirror: &ValidatedMirror) -> Prepared {
        let key = |name: &str| (mirror.namespace.clone(), name.to_owned());
        let mut secrets = Secrets { principal: Ok(Principal::Program), ..Secrets::default() };
        if let Some(name) = &mirror.service_account {
            match self.accounts.get(&key(name)) {
                Some(account) => secrets.account = Account::of(account.clone()),
                None => {
                    let message = format!(
                        "ServiceAccount {name:?} is not in the files; add it, or remove spec.serviceAccountName"
                    );
                    secrets.account.problem = Some(Problem { reason: Reason::SecretNotFound, message });
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
            documents.add(secret, "").unwrap();
        }
        let mirror = serde_json::json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"namespace": "c", "name": "m"},
            "spec": {"images": [{"source": "gcr.io/a:1"}], "target": {"registry": "t.io"}, "imagePullSecrets": [{"name": "pull"}]},
        });
        documents.add(mirror, "").unwrap();
        let mirrors = documents.validated().unwrap();
        let prepared = documents.prepare(&mirrors[0]);
        assert_eq!(prepared.problems[0].reason, Reason::SecretNotFound);
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let error = Documents::default().add(serde_json::json!({"apiVersion": "v1", "kind": "Pod"}), "").unwrap_err();
        assert!(error.starts_with("v1 Pod is not known here"), "{error}");
    }
}
