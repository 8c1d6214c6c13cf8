//! A real node beside the control plane: containerd, kubelet, kube-proxy and kube-scheduler, and a DNS server. It needs
//! root and Debian's containerd, and stands within [`walls`] that leave nothing of it on the machine.

mod dns;
pub(crate) mod walls;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use self::dns::Dns;
use crate::certs::{HOST, http_client};
use crate::controlplane::kubeconfig_with_identity;
use crate::env::{Env, log_path};
use crate::process::Process;
use crate::registry::Registry;
use crate::tools::Tools;

const NAME: &str = "node";
const SOCKET: &str = "/run/containerd/containerd.sock";
const DEADLINE: Duration = Duration::from_secs(90);

/// A running node; dropping it kills its parts, but the pods end with the [`walls`].
pub(crate) struct Node {
    _parts: [Process; 4],
    _dns: Dns,
}

impl Node {
    /// Starts a node whose pods are in control group `cgroup`, and waits until it is Ready. `pause` is the image of
    /// every pod's first container, which `registry` has.
    pub(crate) async fn start(env: &Env, cgroup: &str, registry: &Registry, pause: &str) -> Result<Self> {
        let dir = env.run_dir.join(NAME);
        let (ca, tools) = (env.ca()?, Tools { dir: env.tools.clone() });
        let user = ca.client(&format!("system:node:{NAME}"), "system:nodes")?;
        let admin = ca.client("admin", "system:masters")?;
        let kubelet_config = dir.join("kubelet.kubeconfig");
        std::fs::write(&kubelet_config, kubeconfig_with_identity(&env.apiserver, &env.ca_pem, &user))?;
        let client = http_client(&env.ca_pem, Some(&admin))?;
        let dns = Dns::start(HOST, &env.apiserver, client.clone()).await?;

        let containerd = start_containerd(env, &dir, registry, pause).await?;
        let mut scheduler = Command::new(tools.path("kube-scheduler"));
        scheduler.args(["--leader-elect=false", "--secure-port=0"]).arg(flag("kubeconfig", &env.kubeconfig));
        let scheduler = spawn(env, "kube-scheduler", scheduler)?;
        let mut proxy = Command::new(tools.path("kube-proxy"));
        proxy
            .args(["--proxy-mode=iptables", &format!("--hostname-override={NAME}")])
            // Two pods on one bridge: answers must come back the way that the question went.
            .arg("--masquerade-all")
            // Settings of the whole machine stay as they are.
            .args(["--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s"])
            .arg("--conntrack-tcp-timeout-close-wait=0s")
            .arg(flag("kubeconfig", &env.kubeconfig));
        let proxy = spawn(env, "kube-proxy", proxy)?;

        let config = dir.join("kubelet.json");
        std::fs::write(&config, kubelet_configuration(env, cgroup).to_string())?;
        let mut kubelet = Command::new(tools.path("kubelet"));
        kubelet
            .args([format!("--hostname-override={NAME}"), format!("--node-ip={HOST}")])
            .args([flag("config", &config), flag("kubeconfig", &kubelet_config)]);
        let mut kubelet = spawn(env, "kubelet", kubelet)?;
        let url = format!("{}/api/v1/nodes/{NAME}", env.apiserver);
        kubelet.until_ready(DEADLINE, async || is_node_ready(&client, &url).await).await?;
        Ok(Self { _parts: [kubelet, proxy, scheduler, containerd], _dns: dns })
    }
}

async fn start_containerd(env: &Env, dir: &Path, registry: &Registry, pause: &str) -> Result<Process> {
    let plugins = walls::plugins().context("no CNI plugins")?;
    let networks = dir.join("networks");
    std::fs::create_dir_all(&networks)?;
    std::fs::write(networks.join("pods.conflist"), pod_network().to_string())?;
    let (username, password) = registry.username.as_deref().zip(registry.password.as_deref()).unwrap_or_default();
    let config = dir.join("containerd.toml");
    // Without CAP_SYS_RESOURCE no score can be lowered, and every pod would fail.
    let text = format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri".registry.configs."{host}".auth]
username = "{username}"
password = "{password}"
"#,
        host = registry.host,
        plugins = plugins.display(),
        networks = networks.display(),
    );
    std::fs::write(&config, text)?;
    let mut command = Command::new("containerd");
    command.arg("--config").arg(&config).env("SSL_CERT_FILE", &env.ca_path);
    let mut containerd = spawn(env, "containerd", command)?;
    containerd.until_ready(DEADLINE, async || UnixStream::connect(SOCKET).await.ok().map(drop)).await?;
    Ok(containerd)
}

fn spawn(env: &Env, name: &str, mut command: Command) -> Result<Process> {
    // Registries are on this machine, and no proxy knows them.
    for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        command.env_remove(variable);
    }
    Process::spawn_part(name, command, &log_path(&env.run_dir, name))
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

fn pod_network() -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "pods",
            "isGateway": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.85.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }],
    })
}

fn kubelet_configuration(env: &Env, cgroup: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": env.ca_path},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{cgroup}"),
        "failCgroupV1": false,
        "failSwapOn": false,
        "enforceNodeAllocatable": [],
        // It finds what it wants, or does not start; it changes nothing for the whole machine.
        "protectKernelDefaults": true,
        "clusterDNS": [HOST],
        "clusterDomain": dns::DOMAIN,
        "resolvConf": "",
        // A full disk of the machine is no matter of a test.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
    })
}

async fn is_node_ready(client: &reqwest::Client, url: &str) -> Option<()> {
    let node: Value = serde_json::from_slice(&client.get(url).send().await.ok()?.bytes().await.ok()?).ok()?;
    let conditions = node["status"]["conditions"].as_array()?;
    conditions.iter().any(|is| is["type"] == "Ready" && is["status"] == "True").then_some(())
}
