//! The chart beyond what it renders: its own suites, its alerts and dashboard, its policy, and what becomes of objects when
//! it is upgraded, uninstalled and installed again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Env, Image, Process,
    controlplane::{ControlPlane, Reach},
    proxy::{Action, Matcher},
    tools,
};

use crate::{
    support::{PATIENCE, Place, eventually, free_port, kubectl, rendered_chart, run},
    telemetry::documented,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/imagemirror");

#[tokio::test]
async fn the_suites_of_the_chart_pass() -> Result<()> {
    let tools = tools::find_chart().await?;
    let said = run(Command::new(tools.path("helm-unittest")).args(["--strict", "--color=false", CHART]), None)?;
    ensure!(said.contains("Charts:      1 passed"), "{said}");
    Ok(())
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(Path::new(ROOT).join(path)).with_context(|| path.to_owned())
}

/// The values of a key, wherever it is.
fn all<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get(key).and_then(Value::as_str));
            fields.values().for_each(|value| all(value, key, found));
        }
        Value::Array(values) => values.iter().for_each(|value| all(value, key, found)),
        _ => {}
    }
}

/// What is wrong with an expression: a metric that does not exist, or a label that the metrics in it do not have.
fn unknown(asked: &Value, table: &crate::telemetry::Table) -> Vec<String> {
    // What Prometheus itself adds.
    let targets = ["job", "instance"].map(str::to_owned);
    let (mut wrong, mut known) = (Vec::new(), BTreeSet::from(targets));
    for (metric, labels) in asked["metrics"].as_object().into_iter().flatten() {
        let row = |name: &str| table.get(name).map(|(kind, labels)| (kind.as_str(), labels.clone()));
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| row(metric.strip_suffix(suffix)?));
        let of_histogram = of_histogram.filter(|(kind, _)| *kind == "histogram").map(|(kind, mut labels)| {
            labels.insert("le".to_owned());
            (kind, labels)
        });
        let Some((_, has)) = row(metric).filter(|(kind, _)| *kind != "histogram").or(of_histogram) else {
            wrong.push(format!("there is no metric {metric}"));
            continue;
        };
        let used = labels.as_array().into_iter().flatten().filter_map(Value::as_str);
        wrong.extend(used.filter(|label| !has.contains(*label)).map(|label| format!("{metric} has no label {label}")));
        known.extend(has);
    }
    let groups = asked["groups"].as_array().into_iter().flatten().filter_map(Value::as_str);
    wrong.extend(groups.filter(|label| !known.contains(*label)).map(|label| format!("nothing has the label {label}")));
    wrong
}

#[tokio::test]
async fn alerts_and_dashboard_ask_for_what_the_operator_says_and_each_alert_has_a_runbook() -> Result<()> {
    let alerts: Value = serde_saphyr::from_str(&read("charts/imagemirror/files/alerts.yaml")?)?;
    let dashboard: Value = serde_json::from_str(&read("charts/imagemirror/files/dashboard.json")?)?;
    let mut expressions = Vec::new();
    all(&alerts, "expr", &mut expressions);
    let of_alerts = expressions.len();
    all(&dashboard, "expr", &mut expressions);
    ensure!(of_alerts >= 8 && expressions.len() >= of_alerts + 10, "only {} expressions", expressions.len());

    let promql = tools::find_chart().await?.path("promql");
    let table = documented()?;
    let ask = |expressions: &[&str]| -> Result<Vec<(Value, Vec<String>)>> {
        let lines = expressions.iter().map(|text| json!(text.replace("$__rate_interval", "5m")).to_string() + "\n");
        let said = run(&mut Command::new(&promql), Some(&lines.collect::<String>()))?;
        let asked = said.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        Ok(asked
            .into_iter()
            .map(|asked| (unknown(&asked, &table), asked))
            .map(|(wrong, asked)| (asked, wrong))
            .collect())
    };
    let asked = ask(&expressions)?;
    ensure!(asked.len() == expressions.len(), "{asked:?}");
    for (expression, (asked, wrong)) in expressions.iter().zip(&asked) {
        ensure!(asked["metrics"].as_object().is_some_and(|metrics| !metrics.is_empty()), "{expression}: {asked}");
        ensure!(wrong.is_empty(), "{expression}: {wrong:?}");
    }
    for wrong in ["sum(imagemirror_image)", "imagemirror_leader{host='a'}", "sum by (pod) (imagemirror_leader)"] {
        ensure!(!ask(&[wrong])?[0].1.is_empty(), "nothing is found wrong with {wrong}");
    }
    ensure!(ask(&["sum(imagemirror_leader"]).is_err());

    let mut names = Vec::new();
    all(&alerts, "alert", &mut names);
    let runbooks = read("docs/runbooks.md")?;
    let sections: Vec<&str> = runbooks.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    ensure!(sections == names, "{sections:?} of docs/runbooks.md, and {names:?}");
    for section in runbooks.split("\n## ").skip(1) {
        for part in ["**Means**: ", "**Look at**: ", "**Do**: "] {
            ensure!(section.contains(part), "no {part:?} in {section}");
        }
    }
    // Labels that are named in words are those that the alert has.
    for rule in
        alerts["groups"].as_array().into_iter().flatten().filter_map(|group| group["rules"].as_array()).flatten()
    {
        let (text, expression) = (rule["annotations"].to_string(), rule["expr"].as_str().unwrap_or_default());
        for label in text.split("$labels.").skip(1).filter_map(|rest| rest.split_once(' ')).map(|(label, _)| label) {
            ensure!(expression.contains(label), "{text} names {label}, which {expression} does not leave");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_admission_policy_says_where_a_namespace_may_write() -> Result<()> {
    let place = Place::new("policy-targets").await?;
    let watched = format!(
        "watchNamespaces={{{}}},admissionPolicy.enabled=true,admissionPolicy.targetRegistries={{a.example.com}}",
        place.namespace
    );
    let only = ["--show-only", "templates/admissionpolicy.yaml", "--set", &watched];
    let objects = rendered_chart(place.env, &place.namespace, &only)?;
    let apply = |object: &str| {
        let mut apply = Command::new(place.env.tools.join("kubectl"));
        apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["apply", "-f", "-"]);
        run(&mut apply, Some(object))
    };
    apply(&objects)?;
    let write = async |registry: &str| -> Result<(), String> {
        let spec = json!({"target": {"registry": registry}, "images": [{"source": "quay.io/a/b:1"}], "suspend": true});
        place.apply("m", &spec).await.map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    // Policies are learned of by a watch.
    let refusal = |registry: &str, rest: &str| {
        format!("the namespace {} may not write to {registry}; it may write to {rest}", place.namespace)
    };
    let refused = async |registry: &'static str, rest: &str| {
        let wanted = refusal(registry, rest);
        eventually(&wanted, || async { Ok(write(registry).await.is_err_and(|error| error.contains(&wanted))) }).await
    };
    let outcome = async {
        refused("b.example.com:8443", "a.example.com").await?;
        write("a.example.com").await.map_err(anyhow::Error::msg)?;
        let annotate = |value: &str| {
            let annotation = format!("imagemirror.dev/target-registries={value}");
            kubectl(place.env, &["annotate", "--overwrite", "namespace", &place.namespace, &annotation])
        };
        annotate("b.example.com:8443, c.example.com")?;
        eventually("the annotation to count", || async { Ok(write("b.example.com:8443").await.is_ok()) }).await?;
        write("c.example.com").await.map_err(anyhow::Error::msg)?;
        refused("d.example.com", "a.example.com, b.example.com:8443, c.example.com").await?;
        annotate("")?;
        refused("c.example.com", "a.example.com").await?;
        // Another namespace is not bound by it.
        let other = Place::new("policy-other").await?;
        let spec =
            json!({"target": {"registry": "d.example.com"}, "images": [{"source": "quay.io/a/b:1"}], "suspend": true});
        other.apply("m", &spec).await?;
        Ok(())
    };
    let outcome = outcome.await;
    let name = format!("{}.imagemirror.target-registries", place.namespace);
    kubectl(place.env, &["delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", &name])?;
    outcome
}

#[tokio::test]
async fn the_pod_of_helm_test_asks_until_the_operator_is_ready() -> Result<()> {
    let place = Place::new("probe").await?;
    let only = ["--show-only", "templates/tests/readiness.yaml"];
    let documents: Vec<Value> = serde_saphyr::from_multiple(&rendered_chart(place.env, &place.namespace, &only)?)?;
    let pod = documents.iter().find(|object| object["kind"] == "Pod").context("no Pod")?;
    let arguments: Vec<String> = serde_json::from_value(pod["spec"]["containers"][0]["args"].clone())?;
    let service = format!("http://imagemirror-test.{}:8080", place.namespace);
    // The proxy is served by this thread, too.
    let probe = async |listen: &str, timeout: &str| -> Result<Output> {
        let arguments = arguments.iter().map(|argument| argument.replace(&service, &format!("http://{listen}")));
        let mut probe = tokio::process::Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        Ok(probe.args(arguments).args(["--timeout", timeout]).output().await?)
    };
    let nobody = probe(&format!("127.0.0.1:{}", free_port()?), "10ms").await?;
    ensure!(nobody.status.code() == Some(1), "{nobody:?}");
    // It cannot reach the API server, until it can.
    let api = place.api_proxy().await?;
    api.rule(Matcher::new(), Action::respond(500));
    let operator = place.operator()?;
    eventually("the probes to be served", || async { Ok(operator.get("/livez").await?.0 == 200) }).await?;
    let waiting = probe(&operator.listen, "10ms").await?;
    let said = String::from_utf8(waiting.stderr)?;
    ensure!(waiting.status.code() == Some(1) && said.contains("is not ready: crd: waiting for"), "{said}");
    api.clear();
    let ready = probe(&operator.listen, "60s").await?;
    let said = String::from_utf8_lossy(&ready.stdout);
    ensure!(ready.status.success() && said.contains("crd: ready"), "{ready:?}");
    Ok(())
}

/// A control plane for a test that installs and uninstalls what there is one of in a cluster.
struct Cluster {
    env: &'static Env,
    plane: ControlPlane,
    directory: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Result<Self> {
        let env = Env::get();
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let directory = tempfile::tempdir_in(&env.run_dir)?;
        fs::create_dir(directory.path().join("logs"))?;
        let tools = tools::Tools { dir: env.tools.clone() };
        let plane = ControlPlane::start(&tools, directory.path(), &env.ca()?, &env.ca_path, Reach::Loopback).await?;
        Ok(Self { env, plane, directory })
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> Command {
        let mut tool = Command::new(self.env.tools.join(name));
        tool.args(arguments).arg("--kubeconfig").arg(&self.plane.kubeconfig);
        tool
    }

    fn helm(&self, arguments: &[&str]) -> Result<String> {
        run(self.tool("helm", arguments).args(["--namespace", "default"]), None)
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.tool("kubectl", arguments), None)
    }

    fn get(&self, what: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&["get", what, "-o", "json"])?)?)
    }

    /// The chart with a CRD that has none of these fields.
    fn chart_before(&self, fields: &[&str]) -> Result<PathBuf> {
        let chart = self.directory.path().join("imagemirror");
        run(Command::new("cp").arg("-R").arg(CHART).arg(&chart), None)?;
        let mut crd: Value = serde_saphyr::from_str(&read("charts/imagemirror/files/crd.yaml")?)?;
        for field in fields {
            let (parent, name) = field.rsplit_once('.').unwrap_or(("", field));
            let path: String = parent.split('.').flat_map(|part| ["/properties/", part]).collect();
            let path = format!("/spec/versions/0/schema/openAPIV3Schema{path}/properties");
            let removed = crd.pointer_mut(&path).and_then(Value::as_object_mut).and_then(|names| names.remove(name));
            ensure!(removed.is_some(), "there is no field {field}");
        }
        fs::write(chart.join("files/crd.yaml"), crd.to_string())?;
        Ok(chart)
    }

    fn operator(&self) -> Result<Process> {
        let config = self.directory.path().join("operator.yaml");
        fs::write(
            &config,
            json!({"networks": {"allow": ["127.0.0.0/8"]}, "timing": {"apiBackoffMax": "1s"}}).to_string(),
        )?;
        let mut operator = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        operator.arg("operator").arg("--config").arg(&config).arg("--kubeconfig").arg(&self.plane.kubeconfig);
        operator.args(["--lease-namespace", "default", "--listen", &format!("127.0.0.1:{}", free_port()?)]);
        Process::spawn("operator", operator, &self.env.log("upgrade-operator"))
    }

    /// Applies the object and waits until the operator has seen it through.
    fn mirror(&self, spec: &Value) -> Result<Value> {
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
            "metadata": {"name": "m", "namespace": "default"}, "spec": spec,
        });
        // A field that the schema does not have is dropped, as for a user who does not look at warnings.
        let mut apply = self.tool("kubectl", &["apply", "--validate=ignore", "-f", "-"]);
        run(&mut apply, Some(&object.to_string()))?;
        self.ready()
    }

    fn ready(&self) -> Result<Value> {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["wait", "--for=condition=Ready", "imagemirrors.imagemirror.dev/m", &timeout])?;
        self.get("imagemirrors.imagemirror.dev/m")
    }
}

#[tokio::test]
async fn objects_live_through_an_upgrade_and_through_another_release() -> Result<()> {
    let place = Place::new("upgrade").await?;
    let open = &place.env.open;
    let image = Image::single(510, &[1000]);
    place.push(open, "agent", "1", &image).await?;
    let mut spec = json!({
        "target": {"registry": open.host, "repository": format!("{}/copy", place.prefix)},
        "registries": [{"host": open.host, "plainHTTP": true}],
        "images": [{"source": format!("{}/{}:1", open.host, place.repository("agent"))}],
        "timeout": "5m",
    });

    let cluster = Cluster::start().await?;
    let before = cluster.chart_before(&["spec.timeout", "spec.policy"])?;
    let before = before.to_str().context("path")?;
    cluster.helm(&["install", "one", before])?;
    let crd = || cluster.get("crd/imagemirrors.imagemirror.dev");
    let has = |crd: &Value, field: &str| {
        let path = format!("/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/{field}");
        crd.pointer(&path).is_some()
    };
    ensure!(!has(&crd()?, "timeout"));
    let _operator = cluster.operator()?;
    let old = cluster.mirror(&spec)?;
    ensure!(old["spec"]["timeout"].is_null(), "the old CRD has the field after all: {old}");

    cluster.helm(&["upgrade", "one", CHART])?;
    ensure!(has(&crd()?, "timeout") && has(&crd()?, "policy"), "helm did not upgrade the CRD");
    let kept = cluster.ready()?;
    for part in ["/metadata/uid", "/metadata/generation", "/spec"] {
        ensure!(kept.pointer(part) == old.pointer(part), "{part} has changed: {kept}");
    }
    // The upgraded schema reaches every part of the API server by a watch.
    spec["policy"] = json!({"overwrite": "Never"});
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let new = loop {
        let new = cluster.mirror(&spec)?;
        if !new["spec"]["policy"].is_null() {
            break new;
        }
        ensure!(tokio::time::Instant::now() < deadline, "the new field is not kept: {new}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    ensure!(new["spec"]["timeout"] == "5m" && new["metadata"]["uid"] == old["metadata"]["uid"], "{new}");

    cluster.helm(&["uninstall", "one"])?;
    ensure!(cluster.get("imagemirrors.imagemirror.dev/m")?["metadata"]["uid"] == old["metadata"]["uid"]);
    let refused = cluster.helm(&["install", "two", CHART]).err().context("helm asks nothing")?.to_string();
    ensure!(refused.contains("invalid ownership metadata"), "{refused}");
    // As the chart's README says.
    ensure!(
        read("charts/imagemirror/README.md")?
            .contains("helm install other charts/imagemirror --namespace imagemirror-system --take-ownership\n")
    );
    cluster.helm(&["install", "two", CHART, "--take-ownership"])?;
    cluster.helm(&["upgrade", "two", CHART, "--set", "logLevel=debug"])?;
    let owner = crd()?["metadata"]["annotations"]["meta.helm.sh/release-name"].clone();
    let kept = cluster.ready()?;
    ensure!(owner == "two" && kept["metadata"]["uid"] == old["metadata"]["uid"], "{owner}: {kept}");
    // And beside it a second release, which leaves the CRD to the first.
    cluster.helm(&["install", "three", CHART, "--set", "crds.enabled=false,watchNamespaces={default}"])?;
    cluster.helm(&["uninstall", "three"])?;
    ensure!(cluster.get("imagemirrors.imagemirror.dev/m")?["metadata"]["uid"] == old["metadata"]["uid"]);

    let roles = cluster.get("clusterrole/edit")?["rules"].to_string();
    ensure!(roles.contains("imagemirrors"), "it is not aggregated: {roles}");
    Ok(())
}

/// The files of values that stand for installations.
pub(crate) fn installations() -> Result<BTreeMap<String, String>> {
    let entries = fs::read_dir(Path::new(CHART).join("ci"))?.collect::<Result<Vec<_>, _>>()?;
    let files = entries.into_iter().map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        (name, entry.path().to_string_lossy().into_owned())
    });
    Ok(files.collect())
}
