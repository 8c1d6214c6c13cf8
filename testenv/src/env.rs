//! What a test knows of the run it is in: addresses, credentials and paths, read from the file that
//! `$IMAGEMIRROR_TESTENV` names. `testenv up` writes it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::certs::Ca;
use crate::registry::Registry;
use crate::token::TokenEndpoint;

/// The environment variable with the path of `env.json`.
pub const VARIABLE: &str = "IMAGEMIRROR_TESTENV";
/// Its name in the run directory.
pub(crate) const FILE: &str = "env.json";

/// A running test environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Env {
    /// A fresh directory of this run; its `logs` are kept when COMMAND fails.
    pub run_dir: PathBuf,
    /// Every program under its usual name: etcd, kube-apiserver, kubectl, helm, registry, crane, olareg, …
    pub tools: PathBuf,
    /// Of a user in `system:masters`.
    pub kubeconfig: PathBuf,
    /// `https://127.0.0.1:PORT`
    pub apiserver: String,
    /// `http://127.0.0.1:PORT`, what the API server stores objects in: a test can put there what it would refuse.
    pub etcd: String,
    /// The API server's audit log: what was asked of Secrets and ServiceAccounts, and by whom.
    pub audit: PathBuf,
    /// The one authority that signs for everything in the run.
    pub ca_pem: String,
    pub ca_path: PathBuf,
    pub ca_key_path: PathBuf,
    /// TLS, htpasswd, user `puller`.
    pub source: Registry,
    /// TLS, bearer tokens of `token`; the credentials are those of user `push`.
    pub target: Registry,
    /// Plain HTTP, no authentication.
    pub open: Registry,
    /// The token server of `target`.
    pub token: TokenEndpoint,
}

impl Env {
    /// The environment of this run, read once.
    ///
    /// # Panics
    ///
    /// Without a running environment, with a message that says how to start one: every test would fail.
    #[must_use]
    #[allow(clippy::panic, reason = "a test has nothing to do without it")]
    pub fn get() -> &'static Env {
        static ENV: OnceLock<Env> = OnceLock::new();
        ENV.get_or_init(|| Env::load().unwrap_or_else(|error| panic!("{error:#}")))
    }

    pub fn load() -> Result<Env> {
        let path = std::env::var_os(VARIABLE).map(PathBuf::from).with_context(|| {
            format!(
                "{VARIABLE} is not set: run the tests with `make test`, or a single one with \
                 `cargo run -p testenv -- up -- cargo test NAME`"
            )
        })?;
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("read {}: is the `testenv up` that set {VARIABLE} still there?", path.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
    }

    pub(crate) fn save(&self) -> Result<()> {
        let path = self.run_dir.join(FILE);
        std::fs::write(&path, serde_json::to_vec_pretty(self)?)?;
        Ok(())
    }

    pub fn ca(&self) -> Result<Ca> {
        Ca::load(&self.ca_path, &self.ca_key_path)
    }

    /// A new path for the log of `name`, in the directory that is kept on failure.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        log_path(&self.run_dir, name)
    }

    /// A kubeconfig for somebody who has only a token, such as a ServiceAccount.
    #[must_use]
    pub fn kubeconfig_for(&self, token: &str) -> String {
        crate::controlplane::kubeconfig_with_token(&self.apiserver, &self.ca_pem, token)
    }
}

/// Numbered with the process and a counter, because tests start the same part many times side by side.
pub(crate) fn log_path(run_dir: &Path, name: &str) -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    run_dir.join("logs").join(format!("{name}-{}-{number}.log", std::process::id()))
}
