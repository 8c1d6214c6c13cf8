//! A place for one test: a namespace with the chart's RBAC, a repository prefix, and operators that watch it.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use imagemirror::api::{ImageMirror, ImageMirrorStatus};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Namespace, Secret},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::ObjectMeta,
    runtime::wait::await_condition,
};
use serde_json::{Value, json};
use testenv::{Env, Process, Proxy, Registry, images::Image};
use tokio::sync::OnceCell;

use crate::{audit::trespasses, statuses::Watch};

/// Longer than anything a test waits for should take, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A place for one test.
pub(crate) struct Place {
    pub(crate) env: &'static Env,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    /// The first part of every repository that the test uses.
    pub(crate) prefix: String,
    kubeconfig: PathBuf,
    /// Every status that is written here.
    pub(crate) statuses: Watch,
    /// The namespaces that operators of this place serve.
    served: Mutex<Vec<String>>,
    watches_secrets: AtomicBool,
    makes_tokens: AtomicBool,
}

/// A status that breaks a rule fails the test that it was written in.
impl Drop for Place {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let mut violations = self.statuses.finish();
            violations.truncate(10);
            assert!(violations.is_empty(), "statuses that break a rule:\n{}", violations.join("\n"));
            let served = self.served.lock().map(|served| served.clone()).unwrap_or_default();
            let may = [&self.watches_secrets, &self.makes_tokens].map(|right| right.load(Ordering::Relaxed));
            let trespasses = trespasses(self.env, &self.namespace, &served, may);
            assert!(trespasses.is_empty(), "what no operator may ask:\n{}", trespasses.join("\n"));
        }
    }
}

/// A running operator.
pub(crate) struct Operator {
    pub(crate) process: Process,
    pub(crate) log: PathBuf,
    pub(crate) listen: String,
    pub(crate) config: PathBuf,
}

impl Place {
    pub(crate) async fn new(test: &str) -> Result<Self> {
        let env = Env::get();
        // The first of the tests that run side by side installs it for all.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        install_crd(env).await?;
        let suffix = format!("{:06x}", fastrand::u32(..0x100_0000));
        let namespace = format!("{test}-{suffix}");
        let client = admin(env).await?;
        let metadata = ObjectMeta { name: Some(namespace.clone()), ..ObjectMeta::default() };
        let object = Namespace { metadata, ..Namespace::default() };
        Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &object).await?;
        install_rbac(env, &namespace, &[&namespace], "")?;
        let token = kubectl(env, &["create", "token", "imagemirror", "-n", &namespace, "--duration=1h"])?;
        let kubeconfig = env.run_dir.join(format!("{namespace}.kubeconfig"));
        std::fs::write(&kubeconfig, env.kubeconfig_for(token.trim()))?;
        let statuses = Watch::start(env, &namespace);
        let served = Mutex::new(vec![namespace.clone()]);
        let (watches_secrets, makes_tokens) = (AtomicBool::new(false), AtomicBool::new(false));
        let prefix = format!("{test}-{suffix}");
        let place =
            Self { env, client, namespace, prefix, kubeconfig, statuses, served, watches_secrets, makes_tokens };
        place.pull_secret("pull", &[&env.source]).await?;
        place.pull_secret("push", &[&env.target]).await?;
        place.secret("ca", "Opaque", &[("ca.crt", &env.ca_pem)]).await?;
        Ok(place)
    }

    /// A proxy before the API server: operators that are started from now on go through it.
    pub(crate) async fn api_proxy(&self) -> Result<Proxy> {
        let proxy = Proxy::to_apiserver(self.env).start().await?;
        let kubeconfig = std::fs::read_to_string(&self.kubeconfig)?;
        std::fs::write(&self.kubeconfig, kubeconfig.replace(&self.env.apiserver, &proxy.url()))?;
        Ok(proxy)
    }

    pub(crate) fn repository(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// An operator for this namespace alone, with times that suit a test.
    pub(crate) fn operator(&self) -> Result<Operator> {
        self.operator_with(&json!({}), "debug")
    }

    pub(crate) fn operator_with(&self, timing: &Value, level: &str) -> Result<Operator> {
        self.operator_from(json!({}), timing, level)
    }

    pub(crate) fn operator_in(&self, networks: &Value, timing: &Value, level: &str) -> Result<Operator> {
        self.operator_from(json!({"networks": networks}), timing, level)
    }

    /// Lets operators of this place that are started from now on serve another, too.
    pub(crate) fn serve(&self, other: &Self) -> Result<()> {
        let mut served = self.served.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        served.push(other.namespace.clone());
        install_rbac(self.env, &self.namespace, &served.iter().map(String::as_str).collect::<Vec<_>>(), "")
    }

    /// Lets operators of this place watch Secrets, too.
    pub(crate) fn watch_secrets(&self) -> Result<()> {
        self.watches_secrets.store(true, Ordering::Relaxed);
        install_rbac(self.env, &self.namespace, &[&self.namespace], ",secrets.watch=true")
    }

    /// Lets operators of this place make tokens of `ServiceAccount`s.
    pub(crate) fn make_tokens(&self) -> Result<()> {
        self.makes_tokens.store(true, Ordering::Relaxed);
        install_rbac(self.env, &self.namespace, &[&self.namespace], ",serviceAccountTokens.create=true")
    }

    /// An operator with more of a configuration than its timing.
    pub(crate) fn operator_from(&self, config: Value, timing: &Value, level: &str) -> Result<Operator> {
        self.operator_of(&self.settings(config, timing)?, &["--log-level", level])
    }

    /// A configuration for this place, with times and networks that suit a test.
    pub(crate) fn settings(&self, mut config: Value, timing: &Value) -> Result<Value> {
        let mut times = json!({
            "apiTimeout": "5s", "leaseDuration": "3s", "leaseRenew": "500ms", "tagWriteTimeout": "1200ms", "tagWriteMargin": "2200ms",
            "retryTransientMin": "500ms", "retryTransientMax": "2s", "retryAuth": "10m", "secretRetry": "200ms",
            "progressFirst": "200ms", "progressInterval": "200ms", "backoffFirst": "20ms", "backoffMax": "100ms",
            "headTimeout": "10s", "idleTimeout": "10s", "shutdown": "10s",
        });
        if let (Some(times), Some(changes)) = (times.as_object_mut(), timing.as_object()) {
            times.extend(changes.clone());
        }
        config["timing"] = times;
        if config.get("networks").is_none() {
            // Registries of tests are on this machine, which is closed by default.
            config["networks"] = json!({"allow": ["127.0.0.0/8", "::1"]});
        }
        config["watchNamespaces"] = json!(*self.served.lock().map_err(|_| anyhow::anyhow!("poisoned"))?);
        Ok(config)
    }

    /// With this configuration, and these arguments beside those that every test needs.
    pub(crate) fn operator_of(&self, config: &Value, arguments: &[&str]) -> Result<Operator> {
        self.operator_where(config, arguments, &[])
    }

    /// And with these variables.
    pub(crate) fn operator_where(
        &self,
        config: &Value,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Operator> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        command.envs(variables.iter().copied());
        self.start(command, config, arguments)
    }

    /// And of another build.
    pub(crate) fn start(&self, mut command: Command, config: &Value, arguments: &[&str]) -> Result<Operator> {
        let name = format!("{}-{:06x}", self.namespace, fastrand::u32(..0x100_0000));
        let path = self.env.run_dir.join(format!("{name}.yaml"));
        std::fs::write(&path, config.to_string())?;
        let listen = format!("127.0.0.1:{}", free_port()?);
        command.arg("operator").arg("--config").arg(&path).arg("--kubeconfig").arg(&self.kubeconfig).args([
            "--listen",
            &listen,
            "--lease-namespace",
            &self.namespace,
            "--identity",
            &name,
        ]);
        command.args(arguments);
        let log = self.env.log(&name);
        let process = Process::spawn(&name, command, &log)?;
        Ok(Operator { process, log, listen, config: path })
    }

    pub(crate) async fn secret(&self, name: &str, type_: &str, data: &[(&str, &str)]) -> Result<()> {
        let data = data.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.as_bytes().to_vec())));
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            type_: Some(type_.into()),
            data: Some(data.collect()),
            ..Secret::default()
        };
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        // The type of a Secret cannot be changed: putting one right means replacing it.
        if api.get_opt(name).await?.is_some() {
            api.delete(name, &kube::api::DeleteParams::default()).await?;
        }
        api.create(&PostParams::default(), &secret).await?;
        Ok(())
    }

    /// The same as a document for the command line.
    pub(crate) fn document(&self, name: &str, type_: &str, data: &[(&str, &str)]) -> Value {
        let data: serde_json::Map<_, _> = data.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": self.namespace},
            "type": type_, "stringData": data,
        })
    }

    pub(crate) async fn pull_secret(&self, name: &str, registries: &[&Registry]) -> Result<()> {
        let mut auths = serde_json::Map::new();
        for registry in registries {
            let config: Value = serde_json::from_str(&registry.dockerconfigjson())?;
            auths.extend(config["auths"].as_object().context("auths")?.clone());
        }
        let config = json!({"auths": auths}).to_string();
        self.secret(name, "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &config)]).await
    }

    /// A spec that mirrors these images from `source` to `target` with the Secrets of this place.
    pub(crate) fn spec(&self, source: &Registry, target: &Registry, images: &[(&str, &[&str])]) -> Value {
        let images: Vec<Value> = images
            .iter()
            .map(|(name, tags)| json!({"source": format!("{}/{}", source.host, self.repository(name)), "tags": tags}))
            .collect();
        let registry = |registry: &Registry| {
            let how = if registry.tls { json!({"certSecretRef": {"name": "ca"}}) } else { json!({"plainHTTP": true}) };
            let mut entry = json!({"host": registry.host});
            if let (Some(entry), Some(how)) = (entry.as_object_mut(), how.as_object()) {
                entry.extend(how.clone());
            }
            entry
        };
        let mut registries = vec![registry(source)];
        if source.host != target.host {
            registries.push(registry(target));
        }
        json!({
            "imagePullSecrets": [{"name": "pull"}],
            "target": {
                "registry": target.host,
                "repository": format!("{}/{{name}}", self.prefix),
                "secretRef": {"name": "push"},
            },
            "registries": registries,
            "images": images,
        })
    }

    pub(crate) fn mirrors(&self) -> Api<ImageMirror> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies an `ImageMirror`, as `kubectl apply --server-side` does.
    pub(crate) async fn apply(&self, name: &str, spec: &Value) -> Result<ImageMirror> {
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
            "metadata": {"name": name, "namespace": self.namespace}, "spec": spec,
        });
        let params = PatchParams::apply("test").force();
        Ok(self.mirrors().patch(name, &params, &Patch::Apply(&object)).await?)
    }

    /// Asks for a sync now and waits for its end.
    pub(crate) async fn request(&self, name: &str) -> Result<ImageMirror> {
        let token = format!("t{:08x}", fastrand::u32(..));
        let patch = json!({"metadata": {"annotations": {"imagemirror.dev/requestedAt": token}}});
        self.mirrors().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        let handled = token.clone();
        self.until(name, "the requested sync to end", move |status| {
            status.last_handled_reconcile_at.as_ref() == Some(&handled)
        })
        .await
    }

    /// Waits until the status is as wanted; says what it was instead when that takes too long.
    pub(crate) async fn until(
        &self,
        name: &str,
        what: &str,
        is_so: impl Fn(&ImageMirrorStatus) -> bool,
    ) -> Result<ImageMirror> {
        let condition =
            |object: Option<&ImageMirror>| object.and_then(|object| object.status.as_ref()).is_some_and(&is_so);
        match tokio::time::timeout(PATIENCE, await_condition(self.mirrors(), name, condition)).await {
            Ok(found) => found?.context("the object is gone"),
            Err(_) => {
                let now = self.mirrors().get(name).await?;
                bail!("waited for {what}; the status is {}", serde_json::to_string_pretty(&now.status)?)
            }
        }
    }

    pub(crate) async fn until_ready(&self, name: &str) -> Result<ImageMirror> {
        let object = self.mirrors().get(name).await?;
        let generation = object.metadata.generation.unwrap_or_default();
        self.until(name, "Ready=True", move |status| {
            status.observed_generation >= generation && condition(status, "Ready").0 == "True"
        })
        .await
    }

    /// Waits until Ready has this status and reason.
    pub(crate) async fn until_reason(&self, name: &str, reason: &'static str) -> Result<ImageMirror> {
        self.until(name, reason, move |status| condition(status, "Ready") == ("False", reason)).await
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        kubectl(self.env, &[&["-n", &self.namespace], arguments].concat())
    }

    pub(crate) async fn push(&self, registry: &Registry, name: &str, tag: &str, image: &Image) -> Result<()> {
        testenv::Client::new(self.env, registry)?.push(&self.repository(name), tag, image).await
    }

    /// Whether the target holds the image under the tag, every byte of it.
    pub(crate) async fn holds(&self, registry: &Registry, name: &str, tag: &str, image: &Image) -> Result<bool> {
        testenv::Client::new(self.env, registry)?.holds(&self.repository(name), tag, image).await
    }

    pub(crate) async fn digest_of(&self, registry: &Registry, name: &str, tag: &str) -> Result<Option<String>> {
        testenv::Client::new(self.env, registry)?.digest_of(&self.repository(name), tag).await
    }
}

impl Operator {
    /// The answer of a probe or of the metrics: status and body.
    pub(crate) async fn get(&self, path: &str) -> Result<(u16, String)> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&self.listen).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.listen);
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        Ok((status, body))
    }

    /// Whether it leads; false too if it does not answer.
    pub(crate) async fn leads(&self) -> bool {
        let answer = tokio::time::timeout(Duration::from_secs(1), self.get("/metrics")).await;
        answer.is_ok_and(|answer| answer.is_ok_and(|(_, metrics)| metrics.contains("imagemirror_leader 1")))
    }

    pub(crate) fn logged(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }
}

/// Status and reason of a condition; empty where there is none.
pub(crate) fn condition<'a>(status: &'a ImageMirrorStatus, kind: &str) -> (&'a str, &'a str) {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind);
    found.map_or(("", ""), |condition| (&condition.status, &condition.reason))
}

/// The message of a condition.
pub(crate) fn message<'a>(status: &'a ImageMirrorStatus, kind: &str) -> &'a str {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind);
    found.map_or("", |condition| &condition.message)
}

/// Polls something that cannot be watched.
pub(crate) async fn eventually<F: Future<Output = Result<bool>>>(
    what: &str,
    mut is_so: impl FnMut() -> F,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !is_so().await.unwrap_or(false) {
        ensure!(tokio::time::Instant::now() < deadline, "waited for {what}");
        // Between two looks: what is asked tells nobody when it changes.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

pub(crate) fn kubectl(env: &Env, arguments: &[&str]) -> Result<String> {
    run(Command::new(env.tools.join("kubectl")).arg("--kubeconfig").arg(&env.kubeconfig).args(arguments), None)
}

/// Runs a command to its end and returns what it printed.
pub(crate) fn run(command: &mut Command, input: Option<&str>) -> Result<String> {
    use std::io::Write as _;
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The chart's objects as `helm template` renders them.
pub(crate) fn rendered_chart(env: &Env, namespace: &str, arguments: &[&str]) -> Result<String> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/imagemirror");
    let mut helm = Command::new(env.tools.join("helm"));
    helm.args(["template", "imagemirror", chart, "--namespace", namespace, "--kube-version", "1.34.4"]).args(arguments);
    run(&mut helm, None)
}

pub(crate) async fn admin(env: &Env) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(&env.kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn install_crd(env: &Env) -> Result<()> {
    static INSTALLED: OnceCell<()> = OnceCell::const_new();
    let install = || async {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/crds/imagemirrors.imagemirror.dev.yaml");
        kubectl(env, &["apply", "--server-side", "-f", file])?;
        kubectl(env, &["wait", "--for=condition=Established", "crd/imagemirrors.imagemirror.dev", "--timeout=30s"])?;
        Ok::<_, anyhow::Error>(())
    };
    INSTALLED.get_or_try_init(install).await.map(|&()| ())
}

/// The ServiceAccount and the roles of the chart, for these namespaces: a right that is missing fails a test.
fn install_rbac(env: &Env, namespace: &str, watched: &[&str], more: &str) -> Result<()> {
    let watched = format!("watchNamespaces={{{}}}{more}", watched.join(","));
    let only =
        ["--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccount.yaml", "--set", &watched];
    let objects = rendered_chart(env, namespace, &only)?;
    let mut apply = Command::new(env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&env.kubeconfig).args(["apply", "-f", "-"]);
    run(&mut apply, Some(&objects)).map(|_| ())
}

pub(crate) fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Compares a text with the one in the repository, or writes it there.
pub(crate) fn golden(name: &str, text: &str) -> Result<()> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text)?;
    }
    let expected = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(text == expected, "{name} is not as it was; `make golden` writes it anew:\n{text}");
    Ok(())
}
