//! The API server as a client, and the operator under measurement with the chart's rights.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testenv::controlplane::free_port;
use testenv::{Env, Process, certs};

/// Requests to the API server side by side.
const SIDE_BY_SIDE: usize = 32;
/// Between two looks at the metrics.
const LOOK: Duration = Duration::from_millis(50);
const MERGE: &str = "application/merge-patch+json";

/// The API server, asked as its administrator.
pub(super) struct Cluster {
    env: Env,
    http: reqwest::Client,
}

/// How often the API server was asked to write, since it started.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Writes {
    /// Of the status of an `ImageMirror`.
    pub(super) statuses: f64,
    /// Events and leases.
    pub(super) others: f64,
}

impl Cluster {
    /// With the CRD, and the ServiceAccount and roles of the chart for all namespaces.
    pub(super) fn prepare() -> Result<Self> {
        let env = Env::load()?;
        let administrator = env.ca()?.client("bench", "system:masters")?;
        let http = certs::http_client(&env.ca_pem, Some(&administrator))?;
        let cluster = Self { env, http };
        cluster.kubectl(&["apply", "--server-side", "-f", "crds/imagemirrors.imagemirror.dev.yaml"])?;
        cluster.kubectl(&["wait", "--for=condition=Established", "crd/imagemirrors.imagemirror.dev"])?;
        cluster.kubectl(&["create", "namespace", "imagemirror-system"])?;
        let chart = cluster.tool(
            "helm",
            &["template", "imagemirror", "charts/imagemirror", "--namespace", "imagemirror-system"],
            &["--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccount.yaml"],
        )?;
        let path = cluster.env.run_dir.join("rights.yaml");
        std::fs::write(&path, chart)?;
        cluster.kubectl(&["apply", "-f", &path.display().to_string()])?;
        Ok(cluster)
    }

    pub(super) fn env(&self) -> &Env {
        &self.env
    }

    pub(super) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.tool("kubectl", &["--kubeconfig", &self.env.kubeconfig.display().to_string()], arguments)
    }

    fn tool(&self, name: &str, first: &[&str], then: &[&str]) -> Result<String> {
        let output = Command::new(self.env.tools.join(name)).args(first).args(then).output()?;
        ensure!(output.status.success(), "{name} {then:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Creates objects of `plural` in `imagemirror.dev`, given by namespace, name and spec.
    pub(super) async fn create(&self, objects: &[(String, String, Value)]) -> Result<()> {
        let requests = objects.iter().map(async |(namespace, name, spec)| {
            let object = json!({
                "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
                "metadata": {"name": name, "namespace": namespace}, "spec": spec,
            });
            let request = self.http.post(self.url(namespace, "")).header("Content-Type", "application/json");
            checked(request.body(object.to_string())).await.map(drop)
        });
        stream::iter(requests).buffer_unordered(SIDE_BY_SIDE).try_collect().await
    }

    /// Patches each of these objects, or a subresource of it such as `/status`.
    pub(super) async fn patch(
        &self,
        objects: &[(String, String, Value)],
        subresource: &str,
        patch: &Value,
    ) -> Result<()> {
        let requests = objects.iter().map(async |(namespace, name, _)| {
            let url = format!("{}{subresource}", self.url(namespace, name));
            checked(self.http.patch(url).header("Content-Type", MERGE).body(patch.to_string())).await.map(drop)
        });
        stream::iter(requests).buffer_unordered(SIDE_BY_SIDE).try_collect().await
    }

    pub(super) async fn get(&self, namespace: &str, name: &str) -> Result<Value> {
        let text = checked(self.http.get(self.url(namespace, name))).await?;
        Ok(serde_json::from_str(&text)?)
    }

    fn url(&self, namespace: &str, name: &str) -> String {
        let slash = if name.is_empty() { "" } else { "/" };
        format!("{}/apis/imagemirror.dev/v1alpha1/namespaces/{namespace}/imagemirrors{slash}{name}", self.env.apiserver)
    }

    /// What the API server has counted.
    pub(super) async fn writes(&self) -> Result<Writes> {
        let text = checked(self.http.get(format!("{}/metrics", self.env.apiserver))).await?;
        let mut writes = Writes::default();
        for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let is = |label: &str, values: &[&str]| {
                values.iter().any(|value| line.contains(&format!("{label}=\"{value}\"")))
            };
            if !is("verb", &["POST", "PUT", "PATCH", "APPLY"]) {
                continue;
            }
            let count: f64 = line.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or_default();
            if is("resource", &["imagemirrors"]) && is("subresource", &["status"]) {
                writes.statuses += count;
            } else if is("resource", &["events", "leases"]) {
                writes.others += count;
            }
        }
        Ok(writes)
    }
}

async fn checked(request: reqwest::RequestBuilder) -> Result<String> {
    let answer = request.send().await?;
    let status = answer.status();
    let text = answer.text().await?;
    ensure!(status.is_success(), "the API server answered {status}: {text}");
    Ok(text)
}

/// The operator, and its metrics.
pub(super) struct Operator {
    process: Process,
    http: reqwest::Client,
    metrics: String,
}

impl Operator {
    /// Starts it with the default configuration but for these registries, which are trusted and on this machine.
    pub(super) fn start(cluster: &Cluster, binary: &Path, registries: &[&str]) -> Result<Self> {
        let env = cluster.env();
        let token =
            cluster.kubectl(&["create", "token", "imagemirror", "-n", "imagemirror-system", "--duration=2h"])?;
        let kubeconfig = env.run_dir.join("operator.kubeconfig");
        std::fs::write(&kubeconfig, env.kubeconfig_for(token.trim()))?;
        let hosts: Vec<Value> = registries.iter().map(|host| json!({"host": host, "caFile": env.ca_path})).collect();
        let config = env.run_dir.join("operator.yaml");
        std::fs::write(&config, json!({"registries": hosts, "networks": {"allow": ["127.0.0.0/8"]}}).to_string())?;
        let listen = format!("127.0.0.1:{}", free_port()?);
        let mut command = Command::new(binary);
        command.arg("operator").arg("--config").arg(config).arg("--kubeconfig").arg(kubeconfig);
        // As the image does.
        command.env("MALLOC_ARENA_MAX", "1");
        command.args(["--listen", &listen, "--lease-namespace", "imagemirror-system", "--log-level", "warn"]);
        let process = Process::spawn("the operator", command, &env.log("operator"))?;
        let http = certs::http_client(&env.ca_pem, None)?;
        Ok(Self { process, http, metrics: format!("http://{listen}/metrics") })
    }

    /// The sum of all samples whose line begins so.
    pub(super) async fn metric(&self, prefix: &str) -> Result<f64> {
        let text = self.http.get(&self.metrics).send().await?.text().await?;
        let values = text.lines().filter(|line| line.starts_with(prefix)).filter_map(|line| line.rsplit(' ').next());
        Ok(values.filter_map(|value| value.parse::<f64>().ok()).sum())
    }

    /// Waits until a metric is so much; gives the seconds that took.
    pub(super) async fn until(&self, prefix: &str, wanted: f64, deadline: Duration) -> Result<f64> {
        let started = Instant::now();
        loop {
            let now = self.metric(prefix).await.unwrap_or_default();
            if now >= wanted {
                return Ok(started.elapsed().as_secs_f64());
            }
            ensure!(started.elapsed() < deadline, "{prefix} is {now} and not {wanted} after {} s", deadline.as_secs());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What it holds in memory now, and the most that it has held, in MiB.
    pub(super) fn memory(&self) -> Result<(f64, f64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// As SIGKILL ends it: the lease stays held.
    pub(super) async fn kill(self) -> Result<()> {
        self.process.kill().await
    }

    /// As Kubernetes ends it.
    pub(super) async fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.wait().await?;
        ensure!(status.success(), "the operator ended with {status}");
        Ok(())
    }
}

/// The program that is measured.
pub(super) fn existing(binary: &Path) -> Result<PathBuf> {
    binary.canonicalize().with_context(|| format!("no operator at {}: `make release`", binary.display()))
}
