//! A canary: secrets are looked for in everything that leaves the operator and the commands, at the most talkative log
//! level, whatever goes wrong with them.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures::future::try_join_all;
use serde_json::{Value, json};
use testenv::{
    Env, Registry, Tunnel,
    images::Image,
    proxy::{Action, Matcher, Proxy},
};

use crate::support::Place;

const TALKATIVE: &str = "trace,hyper=trace,h2=trace,rustls=trace,kube=trace,reqwest=trace";
const DOCKER_CONFIG: &str = "kubernetes.io/dockerconfigjson";

/// An object that fails, the Secret that it uses, and what that holds.
struct Failing {
    name: &'static str,
    reason: &'static str,
    type_: &'static str,
    data: Vec<(&'static str, String)>,
    /// Changes the spec so that it uses the Secret.
    uses: Box<dyn Fn(&mut Value)>,
    source: Registry,
}

fn pull(name: &'static str, reason: &'static str, source: Registry, config: &Value) -> Failing {
    let data = vec![(".dockerconfigjson", config.to_string())];
    let uses = Box::new(move |spec: &mut Value| spec["imagePullSecrets"] = json!([{"name": name}]));
    Failing { name, reason, type_: DOCKER_CONFIG, data, uses, source }
}

fn of_registry(
    name: &'static str,
    field: &'static str,
    reason: &'static str,
    source: &Registry,
    data: &[(&'static str, &str)],
) -> Failing {
    let data = data.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
    let uses = Box::new(move |spec: &mut Value| spec["registries"][0][field] = json!({"name": name}));
    Failing { name, reason, type_: "Opaque", data, uses, source: source.clone() }
}

/// Proxies of registries that do what makes each of the objects fail.
struct Hostile {
    forbids: Proxy,
    realm: Proxy,
    redirects: Proxy,
    tunnel: Tunnel,
}

impl Hostile {
    async fn start(env: &'static Env) -> Result<Self> {
        let start = async || Proxy::to(env, &env.source).start().await;
        let (forbids, realm, redirects) = (start().await?, start().await?, start().await?);
        // It says what it was shown, in each form.
        let shown = STANDARD.encode("puller:canary-forbidden");
        let echo = json!({"errors": [{"code": "DENIED", "message": format!("no canary-forbidden here, nor {shown}")}]});
        forbids.rule(Matcher::new(), Action::respond(403).body(echo.to_string()));
        let challenge = r#"Bearer realm="https://localhost:1/token",service="x""#;
        realm.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", challenge));
        redirects.rule(Matcher::new(), Action::respond(307).header("Location", "http://127.0.0.1:1/v2/"));
        Ok(Self { forbids, realm, redirects, tunnel: Tunnel::start(Some(("tenant", "right"))).await? })
    }

    fn cases(&self, env: &Env) -> Vec<Failing> {
        let source = &env.source;
        let login = |registry: &Registry, password: &str| -> (Registry, Value) {
            let registry = registry.with_credentials("puller", password);
            let config = registry.dockerconfigjson();
            (registry, serde_json::from_str(&config).unwrap_or_default())
        };
        let (unauthorized, wrong) = login(source, "canary-unauthorized");
        let (forbidden, denied) = login(self.forbids.registry(), "canary-forbidden");
        let (realm, elsewhere) = login(self.realm.registry(), "canary-realm");
        let (redirected, away) = login(self.redirects.registry(), "canary-redirected");
        let (untrusted, unseen) = login(source, "canary-untrusted");
        let identity = env.target.with_credentials("<token>", "canary-identity");
        let token = json!({"auths": {&env.target.host: {"auth": STANDARD.encode("<token>:"), "identitytoken": "canary-identity"}}});
        let url = self.tunnel.url();
        let mut tls = pull("untrusted", "CertificateInvalid", untrusted, &unseen);
        tls.uses = Box::new(|spec| {
            spec["imagePullSecrets"] = json!([{"name": "untrusted"}]);
            spec["registries"][0] = json!({"host": spec["registries"][0]["host"]});
        });
        let in_key = format!("https://u:canary-in-key@{}", source.host);
        let raw = |text: &str| json!({"auths": {&source.host: {"auth": text}}});
        vec![
            pull("unauthorized", "AuthenticationFailed", unauthorized, &wrong),
            pull("forbidden", "PermissionDenied", forbidden, &denied),
            pull("realm", "Blocked", realm, &elsewhere),
            pull("redirected", "Blocked", redirected, &away),
            pull("identity", "AuthenticationFailed", identity, &token),
            tls,
            pull("malformed", "SecretInvalid", source.clone(), &raw("canary-malformed")),
            pull("colonless", "SecretInvalid", source.clone(), &raw(&STANDARD.encode("canary-colonless"))),
            pull("in-key", "SecretInvalid", source.clone(), &json!({"auths": {in_key: {"auth": "?"}}})),
            Failing {
                type_: "kubernetes.io/basic-auth",
                data: vec![("username", "u".into()), ("password", "canary-nowhere".into())],
                ..pull("nowhere", "SecretInvalid", source.clone(), &json!({}))
            },
            of_registry(
                "in-address",
                "proxySecretRef",
                "SecretInvalid",
                source,
                &[("address", "http://u:canary-in-address@127.0.0.1:1")],
            ),
            of_registry(
                "at-proxy",
                "proxySecretRef",
                "SourceUnavailable",
                source,
                &[("address", &url), ("username", "tenant"), ("password", "canary-at-proxy")],
            ),
            of_registry(
                "key",
                "certSecretRef",
                "CertificateInvalid",
                source,
                &[
                    ("tls.crt", &env.ca_pem),
                    ("tls.key", "-----BEGIN PRIVATE KEY-----\nY2FuYXJ5LWtleQ==\n-----END PRIVATE KEY-----"),
                ],
            ),
        ]
    }
}

#[tokio::test]
async fn no_secret_is_in_any_log_event_status_metric_output_or_argument() -> Result<()> {
    let place = Place::new("canary").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let image = Image::single(31, &[2_000_000, 10]);
    place.push(source, "agent", "1", &image).await?;
    let operator = place.operator_with(&json!({}), TALKATIVE)?;
    place.apply("good", &place.spec(source, target, &[("agent", &["1"])])).await?;
    place.until_ready("good").await?;
    let hostile = Hostile::start(place.env).await?;
    let mut canaries = vec!["Bearer ey".to_owned(), "Y2FuYXJ5LWtleQ==".to_owned()];
    let mut documents = vec![
        place.document("push", DOCKER_CONFIG, &[(".dockerconfigjson", &target.dockerconfigjson())]),
        place.document("pull", DOCKER_CONFIG, &[(".dockerconfigjson", &source.dockerconfigjson())]),
        place.document("ca", "Opaque", &[("ca.crt", &place.env.ca_pem)]),
    ];
    for case in hostile.cases(place.env) {
        let data: Vec<(&str, &str)> = case.data.iter().map(|(key, value)| (*key, value.as_str())).collect();
        place.secret(case.name, case.type_, &data).await?;
        documents.push(place.document(case.name, case.type_, &data));
        let mut spec = place.spec(&case.source, target, &[("agent", &["1"])]);
        spec["target"]["repository"] = json!(format!("{}/{}", place.prefix, case.name));
        (case.uses)(&mut spec);
        place.apply(case.name, &spec).await?;
        place.until_reason(case.name, case.reason).await.with_context(|| case.name)?;
        let object = json!({"apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
            "metadata": {"name": case.name, "namespace": place.namespace}, "spec": spec});
        documents.push(object);
        let canary = format!("canary-{}", case.name);
        canaries.extend([STANDARD.encode(&canary), STANDARD.encode(format!("puller:{canary}")), canary]);
    }
    // What works is as secret as what does not.
    for registry in [source, target] {
        let user = registry.username.clone().unwrap_or_default();
        let password = registry.password.clone().unwrap_or_default();
        ensure!(password.len() > 5, "a password too short to look for");
        canaries.extend([STANDARD.encode(format!("{user}:{password}")), password]);
    }
    let pid = operator.process.pid();
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    let mut seen = vec![
        ("log", operator.logged()?),
        ("objects", place.kubectl(&["get", "imagemirrors,events.events.k8s.io,leases", "-o", "yaml"])?),
        ("metrics", operator.get("/metrics").await?.1),
        ("readyz", operator.get("/readyz").await?.1),
        ("environment", proc("environ")?),
        ("arguments", proc("cmdline")?),
    ];
    ensure!(seen[0].1.contains("TRACE") && seen[1].1.contains("PermissionDenied"), "there is nothing to look through");
    let text: Vec<String> = documents.iter().map(Value::to_string).collect();
    let path = place.env.run_dir.join(format!("{}.yaml", place.namespace));
    std::fs::write(&path, text.join("\n---\n"))?;
    let commands = [
        &["validate"][..],
        &["plan"],
        &["plan", "-o", "json"],
        &["check"],
        &["check", "-o", "json"],
        &["sync"],
        &["sync", "-o", "json"],
    ];
    let outputs = commands.map(|arguments| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        command.args(["--log-level", TALKATIVE]).args(arguments).arg("-f").arg(&path);
        tokio::task::spawn_blocking(move || command.output())
    });
    for (arguments, output) in commands.iter().zip(try_join_all(outputs).await?) {
        let output = output?;
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        let is_run = arguments[0] == "validate" || (said.contains("TRACE") && said.contains("PermissionDenied"));
        ensure!(is_run, "{arguments:?} came to nothing: {said}");
        seen.push(("output of a command", said));
    }
    for (place, text) in &seen {
        for canary in &canaries {
            let at = text.find(canary.as_str());
            let around = at
                .map(|at| text[..at].chars().rev().take(200).collect::<Vec<_>>().into_iter().rev().collect::<String>());
            ensure!(at.is_none(), "{canary} is in the {place}: {around:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn closed_networks_are_not_connected_to_by_address_by_name_or_by_redirect() -> Result<()> {
    let place = Place::new("closed").await?;
    let listener = Proxy::to(place.env, &place.env.source).start().await?;
    let port = listener.host().rsplit(':').next().unwrap_or_default().to_owned();
    let operator = place.operator_in(&json!({}), &json!({}), "debug")?;
    for (name, host) in [("address", listener.host()), ("name", format!("localhost:{port}"))] {
        let source = place.env.source.at(&host);
        place.pull_secret("pull", &[&source]).await?;
        place.apply(name, &place.spec(&source, &place.env.target.at(&host), &[("agent", &["1"])])).await?;
        place.pull_secret("push", &[&source]).await?;
        let status = place.until_reason(name, "Blocked").await?.status.unwrap_or_default();
        let said = crate::support::message(&status, "Ready");
        ensure!(said.contains("is in a denied network") && said.contains("networks.allow"), "{said}");
    }
    operator.process.kill().await?;

    // What is open may lead to what is closed.
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    let image = Image::single(301, &[10]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let away = format!("https://[::1]:{port}/v2/");
    source.rule(Matcher::new().path_contains("/blobs/"), Action::respond(307).header("Location", &away));
    place.pull_secret("pull", &[source.registry()]).await?;
    place.pull_secret("push", &[&place.env.target]).await?;
    let _operator = place.operator_in(&json!({"allow": ["127.0.0.1"]}), &json!({}), "debug")?;
    place.apply("redirect", &place.spec(source.registry(), &place.env.target, &[("agent", &["1"])])).await?;
    place.until_reason("redirect", "Blocked").await?;
    ensure!(listener.requests().is_empty(), "it was connected to: {:?}", listener.requests());
    Ok(())
}
