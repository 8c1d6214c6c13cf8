//! What `sync` and `plan` share: files, credentials, and directories in place of registries.
//!
//! Credentials are the Secrets in the files; where there are none, the [user's own logins](super::logins). Which of the two
//! is said in one line.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Failure, Output, documents::Documents, logins::Logins, signals};
use crate::{
    mirror::{Prepared, ValidatedMirror},
    registry::{Client, ClientOptions, Layout, LayoutError},
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
    /// Where the files have no Secrets.
    own: Option<Logins>,
    validated: Vec<ValidatedMirror>,
}

impl Mirrors {
    /// Reads and checks the files.
    pub(super) fn of(arguments: &MirrorArguments) -> Result<Self, Failure> {
        let this = Self::of_files(&arguments.files)?;
        Ok(Self { layouts: Layouts::of(arguments.from.as_deref(), arguments.to.as_deref())?, ..this })
    }

    /// The same, from registries to registries.
    pub(super) fn of_files(files: &[PathBuf]) -> Result<Self, Failure> {
        let documents = Documents::of(files)?;
        let validated = documents.validated()?;
        let own = if documents.have_secrets() { None } else { Some(Logins::of_environment()?) };
        Ok(Self { documents, layouts: Layouts::default(), own, validated })
    }

    /// Carries each out with `run`, which is given its name.
    pub(super) async fn each<R>(
        &self,
        run: impl AsyncFn(&str, &Client, (&SyncRequest, &Registries), &CancellationToken) -> Result<R, Failure>,
    ) -> Result<Vec<Outcome<R>>, Failure> {
        let client = Client::new(ClientOptions::default());
        let chosen = async |name: &str, prepared: Prepared, cancel: &CancellationToken| {
            let Prepared { request, selections, registries, .. } = prepared;
            let request = choose(&client, request, &selections, &registries, cancel).await;
            let request = request.ok_or_else(|| Failure::Interrupted(format!("{name} was not begun")))?;
            run(name, &client, (&request, &registries), cancel).await
        };
        self.each_prepared(chosen).await
    }

    /// The same before any registry has been asked.
    pub(super) async fn each_prepared<R>(
        &self,
        run: impl AsyncFn(&str, Prepared, &CancellationToken) -> Result<R, Failure>,
    ) -> Result<Vec<Outcome<R>>, Failure> {
        let cancel = signals();
        let place = self.own.as_ref().map_or_else(|| "the Secrets in the files".to_owned(), Logins::place);
        eprintln!("credentials: {place}");
        let mut outcomes = Vec::new();
        for mirror in &self.validated {
            let prepared = self.prepare(mirror)?;
            let report = run(&mirror.name, prepared, &cancel).await?;
            outcomes.push(Outcome::new(mirror, report));
        }
        Ok(outcomes)
    }

    fn prepare(&self, mirror: &ValidatedMirror) -> Result<Prepared, Failure> {
        let mirror = &self.layouts.without_target_secret(mirror);
        let mut prepared = match &self.own {
            Some(own) => own.prepare(mirror)?,
            None => self.documents.prepare(mirror),
        };
        self.layouts.replace(&mut prepared.registries);
        Ok(prepared)
    }
}

/// The directories that take the place of registries.
#[derive(Default)]
struct Layouts {
    from: Option<Layout>,
    to: Option<Layout>,
}

impl Layouts {
    fn of(from: Option<&Path>, to: Option<&Path>) -> Result<Self, Failure> {
        if from.is_some() && from == to {
            return Err(Failure::Usage("--from and --to name the same directory; write to another one".into()));
        }
        let usage = |error: LayoutError| Failure::Usage(error.to_string());
        let from = from.map(Layout::open).transpose().map_err(usage)?;
        let to = to.map(Layout::create).transpose().map_err(usage)?;
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
