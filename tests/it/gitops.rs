//! What GitOps tools make of an `ImageMirror`: Argo CD's scripts run by the interpreter that Argo CD has, Flux's wait by the
//! library that Flux has, and the samples in `gitops/` read as these tools read them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use serde_json::{Value, json};
use testenv::{
    Process, Proxy,
    images::Image,
    proxy::{Action, Gate, Matcher, Route},
    tools,
};

use crate::support::{Place, eventually, golden, kubectl, run};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const ARGO: &str = "gitops/argocd/resource_customizations/imagemirror.dev/ImageMirror";

fn read(path: &str) -> Result<String> {
    fs::read_to_string(Path::new(ROOT).join(path)).with_context(|| path.to_owned())
}

fn yaml(path: &str) -> Result<Value> {
    serde_saphyr::from_str(&read(path)?).with_context(|| path.to_owned())
}

async fn gitops() -> Result<PathBuf> {
    Ok(tools::find_gitops().await?.path("gitops"))
}

/// What the scripts for Argo CD say of each object.
async fn argo(objects: &[Value]) -> Result<Vec<Value>> {
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    let mut lua = Command::new(gitops().await?);
    let said = run(lua.arg("lua").arg(Path::new(ROOT).join(ARGO)), Some(&text.join("\n")))?;
    Ok(said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// As in Argo CD's own test, which a copy of the folder in its `resource_customizations` becomes a part of.
#[tokio::test]
async fn the_scripts_for_argo_cd_pass_the_cases_beside_them() -> Result<()> {
    let health = yaml(&format!("{ARGO}/health_test.yaml"))?;
    let mut seen = Vec::new();
    for test in health["tests"].as_array().context("no tests")? {
        let input = test["inputPath"].as_str().context("no input")?;
        let said = argo(&[yaml(&format!("{ARGO}/{input}"))?]).await?;
        ensure!(said[0]["health"] == test["healthStatus"], "{input}: {}", said[0]["health"]);
        seen.push(input.trim_start_matches("testdata/").to_owned());
    }
    let mut files: Vec<String> = fs::read_dir(Path::new(ROOT).join(ARGO).join("testdata"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    seen.sort();
    files.sort();
    ensure!(seen == files && files.len() >= 7, "{seen:?} of {files:?}");

    let cases = yaml(&format!("{ARGO}/actions/action_test.yaml"))?;
    let object = |path: &Value| yaml(&format!("{ARGO}/actions/{}", path.as_str().context("no path")?));
    for test in cases["discoveryTests"].as_array().context("no tests")? {
        let said = argo(&[object(&test["inputPath"])?]).await?;
        let actions = test["result"].as_array().into_iter().flatten();
        let named = actions.filter_map(|action| Some((action["name"].as_str()?.to_owned(), &action["disabled"])));
        let expected: BTreeMap<String, Value> =
            named.map(|(name, disabled)| (name, json!({"disabled": disabled}))).collect();
        ensure!(said[0]["actions"] == json!(expected), "{}: {}", test["inputPath"], said[0]["actions"]);
    }
    let mut tested = Vec::new();
    let token = Regex::new(r#""[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z""#)?;
    for test in cases["actionTests"].as_array().context("no tests")? {
        let action = test["action"].as_str().context("no action")?;
        let said = argo(&[object(&test["inputPath"])?]).await?;
        let after = said[0]["after"][action].to_string();
        let after: Value = serde_json::from_str(&token.replace(&after, "\"0001-01-01T00:00:00Z\""))?;
        ensure!(after == object(&test["expectedOutputPath"])?, "{action}: {after}");
        tested.push(action);
    }
    ensure!(tested == ["sync", "suspend", "resume"], "{tested:?}");
    Ok(())
}

/// An object as it is now, with what is others every time replaced.
fn shown(place: &Place, hosts: &[(&str, &str)]) -> Result<Value> {
    let object: Value = serde_json::from_str(&place.kubectl(&["get", "imagemirror", "m", "-o", "json"])?)?;
    let mut text = json!({
        "apiVersion": object["apiVersion"], "kind": object["kind"],
        "metadata": {
            "name": "m", "namespace": place.namespace, "generation": object["metadata"]["generation"],
            "creationTimestamp": object["metadata"]["creationTimestamp"],
        },
        "spec": object["spec"], "status": object["status"],
    })
    .to_string();
    for (host, shown) in hosts.iter().chain(&[(&*place.namespace, "team"), (&*place.prefix, "team")]) {
        text = text.replace(host, shown);
    }
    for (pattern, shown) in [
        (r#""[0-9-]{10}T[0-9:.]{8,}Z""#, r#""2026-01-01T00:00:00Z""#),
        (r#""specHash":"[^"]*""#, r#""specHash":"0123456789abcdef""#),
        (r#""lastHandledReconcileAt":"[^"]*""#, r#""lastHandledReconcileAt":"2026-01-01T00:00:00Z""#),
    ] {
        text = Regex::new(pattern)?.replace_all(&text, shown).into_owned();
    }
    Ok(serde_json::from_str(&text)?)
}

/// The objects are the test data of the scripts, and each state that is written on the way has the right health.
#[tokio::test]
async fn the_health_of_an_object_in_argo_cd_follows_it_and_its_states_are_as_in_the_golden_files() -> Result<()> {
    let place = Place::new("argo").await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let (from, to) = (source.host(), place.env.target.host.clone());
    let state = |name: &str| -> Result<()> {
        let object = shown(&place, &[(&from, "source.example.com"), (&to, "registry.example.com")])?;
        golden(&format!("{ARGO}/testdata/{name}.yaml"), &serde_saphyr::to_string(&object)?)
    };
    place.push(&place.env.source, "agent", "1", &Image::single(701, &[1000])).await?;
    let gate = Gate::new();
    source.rule(Matcher::new().route(Route::Blob), Action::Gate(gate.clone()));
    let spec = |images| place.spec(source.registry(), &place.env.target, images);
    place.apply("m", &spec(&[("agent", &["1"])])).await?;
    state("new")?;
    // The watch looks on from here.
    eventually("the watch", || async { Ok(!place.statuses.objects("m").is_empty()) }).await?;
    let operator = place.operator()?;
    gate.arrived(1).await?;
    let has_begun = |progress: imagemirror::api::v1alpha1::ProgressStatus| progress.bytes_total > 0;
    place.until("m", "progress", |status| status.progress.is_some_and(has_begun)).await?;
    state("progressing")?;
    gate.open();
    place.until_ready("m").await?;
    state("healthy")?;
    operator.process.stop().await?;
    let mut failing = spec(&[("agent", &["1", "2"])]);
    place.apply("m", &failing).await?;
    state("outdated")?;
    let _operator = place.operator()?;
    place.until_reason("m", "PartialFailure").await?;
    state("degraded")?;
    place.request("m").await?;
    failing["suspend"] = json!(true);
    let suspended = place.apply("m", &failing).await?.metadata.generation.unwrap_or_default();
    place.until("m", "it to be read", move |status| status.observed_generation == suspended).await?;
    state("suspended")?;
    failing["suspend"] = json!(false);
    let resumed = place.apply("m", &failing).await?.metadata.generation.unwrap_or_default();
    place.until("m", "it to be read", move |status| status.observed_generation == resumed).await?;
    place.push(&place.env.source, "agent", "2", &Image::single(702, &[1000])).await?;
    place.request("m").await?;
    let mut twice = spec(&[("a/agent", &["1"]), ("b/agent", &["1"])]);
    twice["target"]["repository"] = json!("one");
    place.apply("m", &twice).await?;
    place.until_reason("m", "InvalidSpec").await?;
    state("invalid")?;

    let said = argo(&place.statuses.objects("m")).await?;
    let mut health: Vec<&str> = said.iter().filter_map(|said| said["health"]["status"].as_str()).collect();
    health.dedup();
    let expected = [
        "Progressing",
        "Healthy", // new
        "Progressing",
        "Degraded", // a tag that is not there
        "Progressing",
        "Degraded", // asked for again
        "Suspended",
        "Progressing",
        "Degraded", // and resumed
        "Progressing",
        "Healthy", // the tag is there
        "Progressing",
        "Degraded", // a spec that cannot be carried out
    ];
    ensure!(health == expected, "{health:?}");
    Ok(())
}

#[tokio::test]
async fn the_configmap_of_argo_cd_is_as_in_the_golden_file_and_the_api_server_takes_it() -> Result<()> {
    let script = |path: &str| read(&format!("{ARGO}/{path}"));
    let indented = |text: &str, by: usize| {
        text.lines().map(|line| format!("{}{line}", " ".repeat(by)).trim_end().to_owned() + "\n").collect::<String>()
    };
    let mut actions = format!("discovery.lua: |\n{}definitions:\n", indented(&script("actions/discovery.lua")?, 2));
    for name in ["sync", "suspend", "resume"] {
        let action = indented(&script(&format!("actions/{name}/action.lua"))?, 4);
        write!(actions, "- name: {name}\n  action.lua: |\n{action}")?;
    }
    let patch = format!(
        "# For argocd-cm, until Argo CD knows the kind by itself (docs/guides/argocd.md). `make golden` writes it.\ndata:\n  \
         resource.customizations.health.imagemirror.dev_ImageMirror: |\n{}  \
         resource.customizations.actions.imagemirror.dev_ImageMirror: |\n{}",
        indented(&script("health.lua")?, 4),
        indented(&actions, 4)
    );
    golden("gitops/argocd/argocd-cm.yaml", &patch)?;

    let place = Place::new("argocd-cm").await?;
    place.kubectl(&["create", "configmap", "argocd-cm", "--from-literal=url=https://argocd.example.com"])?;
    place.kubectl(&[
        "patch",
        "configmap",
        "argocd-cm",
        "--patch-file",
        &format!("{ROOT}/gitops/argocd/argocd-cm.yaml"),
    ])?;
    let config: Value = serde_json::from_str(&place.kubectl(&["get", "configmap", "argocd-cm", "-o", "json"])?)?;
    ensure!(config["data"]["url"].is_string(), "{config}");
    ensure!(
        config["data"]["resource.customizations.health.imagemirror.dev_ImageMirror"] == script("health.lua")?,
        "{config}"
    );
    let text = config["data"]["resource.customizations.actions.imagemirror.dev_ImageMirror"].as_str();
    let actions: Value = serde_saphyr::from_str(text.context("no actions")?)?;
    ensure!(actions["discovery.lua"] == script("actions/discovery.lua")?, "{actions}");
    let named = actions["definitions"].as_array().into_iter().flatten();
    for action in named {
        let name = action["name"].as_str().unwrap_or_default();
        ensure!(action["action.lua"] == script(&format!("actions/{name}/action.lua"))?, "{action}");
    }
    Ok(())
}

/// Flux's wait for an object that has been applied, and what it says.
async fn flux(place: &Place, timeout: &str) -> Result<(Process, PathBuf)> {
    let log = place.env.log("flux");
    let mut wait = Command::new(gitops().await?);
    wait.arg("wait").arg("--kubeconfig").arg(&place.env.kubeconfig);
    wait.args(["--namespace", &place.namespace, "--name", "m", "--timeout", timeout]);
    Ok((Process::spawn("flux", wait, &log)?, log))
}

#[tokio::test]
async fn flux_waits_for_the_images_and_says_at_once_what_no_waiting_can_help() -> Result<()> {
    let place = Place::new("flux").await?;
    let _operator = place.operator()?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let image = Image::single(711, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let gate = Gate::new();
    source.rule(Matcher::new().route(Route::Blob), Action::Gate(gate.clone()));
    let spec = |images| place.spec(source.registry(), &place.env.target, images);
    place.apply("m", &spec(&[("agent", &["1"])])).await?;
    let (mut waiting, log) = flux(&place, "1m").await?;
    gate.arrived(1).await?;
    place.until("m", "progress to be written", |status| status.progress.is_some()).await?;
    ensure!(waiting.is_running()?, "Flux came back while the image was on its way: {}", fs::read_to_string(log)?);
    gate.open();
    ensure!(waiting.wait().await?.success() && place.holds(&place.env.target, "agent", "1", &image).await?);

    // What is tried again is waited for, until Flux's own time is over.
    place.apply("m", &spec(&[("agent", &["2"])])).await?;
    place.until_reason("m", "SourceNotFound").await?;
    let (mut waiting, log) = flux(&place, "1s").await?;
    ensure!(!waiting.wait().await?.success());
    let said = fs::read_to_string(&log)?;
    ensure!(said.contains("timeout waiting for: [ImageMirror/") && said.contains("status: 'InProgress'"), "{said}");

    let mut twice = spec(&[("a/agent", &["1"]), ("b/agent", &["1"])]);
    twice["target"]["repository"] = json!("one");
    place.apply("m", &twice).await?;
    let (mut waiting, log) = flux(&place, "10m").await?;
    let ended = tokio::time::timeout(crate::support::PATIENCE, waiting.wait()).await;
    let said = fs::read_to_string(&log)?;
    ensure!(!ended.context("Flux did not see that only a change of the spec helps")??.success());
    ensure!(said.contains("failed early due to stalled resources"), "{said}");
    Ok(())
}

/// What Renovate's regular expressions, which are RE2's as Rust's are, find in a file: name, tag, digest.
fn renovated(config: &Value, file: &str, text: &str) -> Result<Vec<(String, String, String)>> {
    let mut found = Vec::new();
    for manager in config["customManagers"].as_array().context("no managers")? {
        ensure!(manager["customType"] == "regex" && manager["datasourceTemplate"] == "docker", "{manager}");
        let strings = |key: &str| manager[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        let is_of = |pattern: &str| Ok::<_, anyhow::Error>(Regex::new(pattern.trim_matches('/'))?.is_match(file));
        if !strings("managerFilePatterns").map(is_of).collect::<Result<Vec<_>>>()?.contains(&true) {
            continue;
        }
        for pattern in strings("matchStrings") {
            for captures in Regex::new(pattern)?.captures_iter(text) {
                let group = |name: &str| captures.name(name).map_or_else(String::new, |part| part.as_str().to_owned());
                found.push((group("depName"), group("currentValue"), group("currentDigest")));
            }
        }
    }
    Ok(found)
}

#[test]
fn renovate_finds_every_image_that_has_one_tag_and_no_other() -> Result<()> {
    let config: Value = serde_json::from_str(&read("gitops/renovate/renovate.json")?)?;
    let sample = read("gitops/renovate/imagemirror.yaml")?;
    let digest = format!("sha256:{}", "1".repeat(64));
    let expected = [
        ("gcr.io/datadoghq/agent", "7.70.0", ""),
        ("busybox", "1.36", ""),
        ("quay.io/prometheus/node-exporter", "v1.8.2", &*digest),
        ("redis", "7.2", ""),
        ("registry.example.org:5000/team/app", "1.2.3", ""),
        ("gcr.io/datadoghq/cluster-agent", "7.70.0", ""),
        ("gcr.io/datadoghq/operator", "1.18.0", ""),
    ];
    let expected: Vec<_> =
        expected.iter().map(|(name, tag, digest)| ((*name).into(), (*tag).into(), (*digest).into())).collect();
    // The way a line ends is the editor's.
    for text in [sample.clone(), sample.replace('\n', "\r\n")] {
        ensure!(
            renovated(&config, "fleet/imagemirror.yaml", &text)? == expected,
            "{:#?}",
            renovated(&config, "imagemirror.yaml", &text)?
        );
    }
    for (file, is_read) in [
        ("imagemirror.yaml", true),
        ("apps/imagemirrors/datadog.yml", true),
        ("apps/datadog.imagemirror.yaml", true),
        ("apps/deployment.yaml", false),
        ("apps/imagemirror.md", false),
    ] {
        ensure!(renovated(&config, file, &sample)?.is_empty() != is_read, "{file}");
    }
    Ok(())
}

/// What `docs/guides/flux.md` shows between fences, and the sample.
fn objects_of_flux() -> Result<Vec<Value>> {
    let page = read("docs/guides/flux.md")?;
    let blocks = page.split("```yaml\n").skip(1).filter_map(|rest| Some(rest.split_once("\n```")?.0.to_owned()));
    let mut objects = Vec::new();
    for text in blocks.chain([read("gitops/flux/sync.yaml")?]) {
        objects.extend(serde_saphyr::from_multiple::<Value>(&text)?);
    }
    let is_of_flux = |object: &Value| object["apiVersion"].as_str().is_some_and(|it| it.contains(".fluxcd.io/"));
    objects.retain(is_of_flux);
    Ok(objects)
}

#[tokio::test]
async fn the_sample_for_flux_is_what_flux_reads_and_what_it_names_builds_and_is_taken() -> Result<()> {
    let objects = objects_of_flux()?;
    let decode = |objects: &[Value]| {
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        (gitops(), text.join("\n---\n"))
    };
    let (program, text) = decode(&objects);
    let count = run(Command::new(program.await?).arg("decode"), Some(&text))?;
    ensure!(count.trim() == objects.len().to_string() && objects.len() >= 5, "{count} of {}", objects.len());
    let mut wrong = objects.clone();
    wrong[1]["spec"]["waits"] = json!(true);
    let (program, text) = decode(&wrong);
    ensure!(run(Command::new(program.await?).arg("decode"), Some(&text)).is_err(), "any field is taken");

    let place = Place::new("flux-sample").await?;
    let kustomizations = objects.iter().filter(|object| object["kind"] == "Kustomization");
    let mut built = Vec::new();
    for path in kustomizations.filter_map(|object| object["spec"]["path"].as_str()) {
        let objects = kubectl(place.env, &["kustomize", &format!("{ROOT}/{path}")])?;
        let objects = objects.replace("namespace: monitoring", &format!("namespace: {}", place.namespace));
        let mut apply = Command::new(place.env.tools.join("kubectl"));
        apply.arg("--kubeconfig").arg(&place.env.kubeconfig);
        built.push(run(apply.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]), Some(&objects))?);
    }
    let taken = built.concat();
    ensure!(taken.contains("imagemirror.imagemirror.dev/datadog") && taken.contains("deployment.apps/"), "{taken}");
    Ok(())
}
