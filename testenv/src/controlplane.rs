//! A Kubernetes control plane without a node (`node` adds one): etcd, kube-apiserver and kube-controller-manager (for ServiceAccounts,
//! garbage collection and Jobs), on free ports of 127.0.0.1. Enough for every test of a controller, with real
//! validation, CEL, RBAC and watches.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use crate::certs::{self, Ca, Identity, http_client};
use crate::env::log_path;
use crate::process::Process;
use crate::tools::Tools;

/// Generous, because a loaded machine with cold disks takes many times the usual five seconds.
const DEADLINE: Duration = Duration::from_secs(90);

/// The addresses of Services.
pub(crate) const SERVICES: &str = "10.96.0.0/16";

/// Who reaches the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This machine.
    Loopback,
    /// Pods, too, at [`certs::HOST`], which must be an address of this machine.
    Pods,
}

impl Reach {
    fn arguments(self) -> Vec<String> {
        match self {
            // There is no address that pods could reach, and 127.0.0.1 is not accepted as an endpoint.
            Self::Loopback => vec!["--bind-address=127.0.0.1".to_owned(), "--endpoint-reconciler-type=none".to_owned()],
            Self::Pods => vec!["--bind-address=0.0.0.0".to_owned(), format!("--advertise-address={}", certs::HOST)],
        }
    }
}

/// A running control plane; dropping it kills it.
pub struct ControlPlane {
    /// `https://127.0.0.1:PORT`
    pub url: String,
    /// `http://127.0.0.1:PORT`
    pub etcd: String,
    /// A user in `system:masters`.
    pub kubeconfig: PathBuf,
    /// What was asked of Secrets and ServiceAccounts, and by whom: a JSON object of `audit.k8s.io/v1` a line.
    pub audit: PathBuf,
    _parts: [Process; 3],
}

impl ControlPlane {
    /// Starts the three parts with their files in `run_dir`; the authority must be saved at `ca_path`.
    pub async fn start(tools: &Tools, run_dir: &Path, ca: &Ca, ca_path: &Path, reach: Reach) -> Result<Self> {
        let dir = run_dir.join("controlplane");
        std::fs::create_dir_all(&dir)?;
        let identity = ca.server()?;
        identity.save(&dir.join("server.pem"), &dir.join("server.key"))?;
        // Signs ServiceAccount tokens; of the certificate, only the public key is used.
        ca.client("service-accounts", "testenv")?.save(&dir.join("sa.pem"), &dir.join("sa.key"))?;
        let admin = ca.client("admin", "system:masters")?;
        admin.save(&dir.join("admin.pem"), &dir.join("admin.key"))?;
        let client = http_client(ca.cert_pem(), Some(&admin))?;

        let (etcd, etcd_url) = start_etcd(tools, run_dir, &dir, &client).await?;
        let port = free_port()?;
        let url = format!("https://127.0.0.1:{port}");
        let kubeconfig = dir.join("admin.kubeconfig");
        std::fs::write(&kubeconfig, kubeconfig_with_identity(&url, ca.cert_pem(), &admin))?;

        let (policy, audit) = (dir.join("audit-policy.json"), log_path(run_dir, "audit"));
        std::fs::write(&policy, audit_policy().to_string())?;
        let mut command = Command::new(tools.path("kube-apiserver"));
        command
            .args(["--authorization-mode=Node,RBAC", "--allow-privileged=true"])
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-cluster-ip-range={SERVICES}"))
            .args(["--profiling=false", "--external-hostname=127.0.0.1"])
            .args(reach.arguments())
            // For the logs of pods.
            .arg("--kubelet-preferred-address-types=InternalIP")
            .arg(format!("--kubelet-client-certificate={}", dir.join("admin.pem").display()))
            .arg(format!("--kubelet-client-key={}", dir.join("admin.key").display()))
            .arg(format!("--audit-policy-file={}", policy.display()))
            .arg(format!("--audit-log-path={}", audit.display()))
            .arg(format!("--secure-port={port}"))
            .arg(format!("--etcd-servers={etcd_url}"))
            .arg(format!("--client-ca-file={}", ca_path.display()))
            .arg(format!("--tls-cert-file={}", dir.join("server.pem").display()))
            .arg(format!("--tls-private-key-file={}", dir.join("server.key").display()))
            .arg(format!("--service-account-key-file={}", dir.join("sa.pem").display()))
            .arg(format!("--service-account-signing-key-file={}", dir.join("sa.key").display()));
        let mut apiserver = Process::spawn_part("kube-apiserver", command, &log_path(run_dir, "kube-apiserver"))?;
        let readyz = format!("{url}/readyz");
        apiserver.until_ready(DEADLINE, async || is_ok(&client, &readyz).await).await?;

        let mut command = Command::new(tools.path("kube-controller-manager"));
        command
            .args(["--leader-elect=false", "--secure-port=0"])
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--service-account-private-key-file={}", dir.join("sa.key").display()))
            .arg(format!("--root-ca-file={}", ca_path.display()));
        let log = log_path(run_dir, "kube-controller-manager");
        let mut manager = Process::spawn_part("kube-controller-manager", command, &log)?;
        // It has no port; what it does for the namespace shows that it works.
        let account = format!("{url}/api/v1/namespaces/default/serviceaccounts/default");
        manager.until_ready(DEADLINE, async || is_ok(&client, &account).await).await?;
        Ok(Self { url, etcd: etcd_url, kubeconfig, audit, _parts: [manager, apiserver, etcd] })
    }
}

/// A kubeconfig for somebody who has only a token, such as a ServiceAccount.
#[must_use]
pub fn kubeconfig_with_token(server: &str, ca_pem: &str, token: &str) -> String {
    kubeconfig(server, ca_pem, &json!({ "token": token }))
}

pub(crate) fn kubeconfig_with_identity(server: &str, ca_pem: &str, identity: &Identity) -> String {
    let user = json!({
        "client-certificate-data": BASE64_STANDARD.encode(&identity.cert_pem),
        "client-key-data": BASE64_STANDARD.encode(&identity.key_pem),
    });
    kubeconfig(server, ca_pem, &user)
}

/// JSON, which is YAML too.
fn kubeconfig(server: &str, ca_pem: &str, user: &serde_json::Value) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "testenv",
            "cluster": { "server": server, "certificate-authority-data": BASE64_STANDARD.encode(ca_pem) },
        }],
        "users": [{ "name": "testenv", "user": user }],
        "contexts": [{ "name": "testenv", "context": { "cluster": "testenv", "user": "testenv" } }],
        "current-context": "testenv",
    });
    format!("{config:#}\n")
}

/// Who asks what of Secrets and ServiceAccounts; never what is in them.
fn audit_policy() -> serde_json::Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted"],
        "rules": [
            {"level": "Metadata", "resources": [{"group": "", "resources": ["secrets", "serviceaccounts", "serviceaccounts/token"]}]},
            {"level": "None"},
        ],
    })
}

async fn start_etcd(tools: &Tools, run_dir: &Path, dir: &Path, client: &reqwest::Client) -> Result<(Process, String)> {
    let url = format!("http://127.0.0.1:{}", free_port()?);
    let peers = format!("http://127.0.0.1:{}", free_port()?);
    let mut command = Command::new(tools.path("etcd"));
    command
        .args(["--name=testenv", "--unsafe-no-fsync", "--log-level=warn"])
        .arg(format!("--data-dir={}", dir.join("etcd").display()))
        .arg(format!("--listen-client-urls={url}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg(format!("--listen-peer-urls={peers}"))
        .arg(format!("--initial-advertise-peer-urls={peers}"))
        .arg(format!("--initial-cluster=testenv={peers}"));
    let mut etcd = Process::spawn_part("etcd", command, &log_path(run_dir, "etcd"))?;
    let health = format!("{url}/health");
    etcd.until_ready(DEADLINE, async || is_ok(client, &health).await).await?;
    Ok((etcd, url))
}

async fn is_ok(client: &reqwest::Client, url: &str) -> Option<()> {
    client.get(url).send().await.ok()?.status().is_success().then_some(())
}

/// A port that nobody listens on, below the range that the kernel hands out to outgoing connections: one of those could
/// not take it before the program it is for does.
pub fn free_port() -> Result<u16> {
    for _ in 0..100 {
        let port = fastrand::u16(16_384..32_768);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port between 16384 and 32767")
}
