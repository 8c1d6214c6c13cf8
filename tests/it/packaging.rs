//! What is installed: the chart, the kustomize base, the samples, the image.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    chart::installations,
    docs::{blocks, pages},
    support::{Place, kubectl, rendered_chart, run},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn apply_dry(place: &Place, objects: &str) -> Result<String> {
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["-n", &place.namespace]);
    apply.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]);
    run(&mut apply, Some(objects))
}

/// The same, without a warning.
fn apply_clean(place: &Place, objects: &str) -> Result<String> {
    let path = place.env.run_dir.join(format!("{}.yaml", place.namespace));
    fs::write(&path, objects)?;
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig);
    let output = apply.args(["apply", "--dry-run=server", "--validate=strict", "-f"]).arg(&path).output()?;
    let said = String::from_utf8(output.stderr)?;
    // Of what is there already, and was not made with `kubectl apply`.
    let warning = said.lines().find(|line| !line.contains("last-applied-configuration"));
    ensure!(output.status.success() && warning.is_none(), "{said}");
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test]
async fn the_chart_is_clean_and_the_api_server_takes_what_it_renders() -> Result<()> {
    let place = Place::new("chart").await?;
    // Pods that would not pass restricted security are refused here, and warned of where a Deployment would make them.
    for mode in ["enforce", "warn"] {
        let label = format!("pod-security.kubernetes.io/{mode}=restricted");
        kubectl(place.env, &["label", "namespace", &place.namespace, &label])?;
    }
    let chart = Path::new(ROOT).join("charts/imagemirror");
    let watched = format!("watchNamespaces={{{}}}", place.namespace);
    let files = installations()?;
    ensure!(files.len() >= 5, "{files:?}");
    let more = [("crds.keep=false,logFormat=text".to_owned(), None), (watched, None)];
    let cases = files.iter().map(|(name, file)| (String::new(), Some((name.as_str(), file.as_str()))));
    for (set, file) in cases.chain(more) {
        let mut values = if set.is_empty() { Vec::new() } else { vec!["--set", set.as_str()] };
        values.extend(file.into_iter().flat_map(|(_, file)| ["--values", file]));
        let mut lint = Command::new(place.env.tools.join("helm"));
        lint.args(["lint", "--strict", "--kube-version", "1.34.4"]).args(&values);
        run(lint.arg(&chart), None)?;
        let objects = rendered_chart(place.env, &place.namespace, &values)?;
        let documents: Vec<Value> = serde_saphyr::from_multiple(&objects)?;
        // The API server of the tests does not know the Prometheus operator.
        let is_known = |object: &&Value| object["apiVersion"] != "monitoring.coreos.com/v1";
        let known: Vec<String> = documents.iter().filter(is_known).map(ToString::to_string).collect();
        let taken = apply_clean(&place, &known.join("\n---\n")).with_context(|| format!("rendered with {values:?}"))?;
        for kind in [
            "customresourcedefinition",
            "serviceaccount",
            "deployment.apps",
            "service/",
            "role.rbac",
            "configmap",
            "pod/",
        ] {
            ensure!(taken.contains(kind), "no {kind} in {taken}");
        }
        let has = |kind: &str| documents.iter().any(|object| object["kind"] == kind);
        let is_everything = file.is_some_and(|(name, _)| name == "everything-values.yaml");
        for kind in
            ["ServiceMonitor", "PrometheusRule", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
        {
            ensure!(has(kind) == is_everything, "{kind} with {values:?}");
        }
        for kind in ["PodDisruptionBudget", "NetworkPolicy"] {
            ensure!(!is_everything || has(kind), "no {kind} with {values:?}");
        }
        let is_namespaced =
            values.iter().any(|value| value.contains("watchNamespaces") || value.contains("namespaced"));
        ensure!(has("ClusterRole") != is_namespaced, "a ClusterRole beside watchNamespaces");
    }
    ensure!(!chart.join("crds").exists(), "helm never upgrades a crds/ folder");
    Ok(())
}

/// The egress rule for registries, with these values.
fn registries_of_policy(place: &Place, values: &str) -> Result<Vec<Value>> {
    let only = ["--show-only", "templates/networkpolicy.yaml", "--set", "networkPolicy.enabled=true", "--set", values];
    let policy: Value = serde_saphyr::from_str(&rendered_chart(place.env, &place.namespace, &only)?)?;
    let rules = policy["spec"]["egress"].as_array().context("no egress")?;
    let is_for_registries = |rule: &&Value| rule["ports"] == serde_json::json!([{"port": 443, "protocol": "TCP"}]);
    let rule = rules.iter().find(is_for_registries);
    ensure!(rule.is_none_or(|rule| rule["to"].is_array()), "a rule without peers allows all: {policy}");
    Ok(rule.and_then(|rule| rule["to"].as_array()).cloned().unwrap_or_default())
}

#[tokio::test]
async fn the_network_policy_denies_what_the_operator_denies() -> Result<()> {
    let place = Place::new("policy").await?;
    let networks = |peers: &[Value], field: &str| -> Vec<String> {
        let found = peers.iter().flat_map(|peer| match &peer["ipBlock"][field] {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        });
        found.filter_map(|network| network.as_str().map(ToOwned::to_owned)).collect()
    };
    let peers =
        registries_of_policy(&place, "config.networks.deny={10.96.0.0/12,fd00::1},config.networks.allow={10.96.0.10}")?;
    let mut denied: Vec<&str> = imagemirror::registry::SURROUNDINGS.to_vec();
    denied.extend(["10.96.0.0/12", "fd00::1/128"]);
    let mut except = networks(&peers, "except");
    denied.sort_unstable();
    except.sort_unstable();
    ensure!(except == denied, "{except:?}");
    ensure!(networks(&peers, "cidr") == ["0.0.0.0/0", "::/0", "10.96.0.10/32"], "{peers:?}");
    let only =
        registries_of_policy(&place, "config.networks.deny={0.0.0.0/0,::/0},config.networks.allow={10.1.0.0/16}")?;
    ensure!(networks(&only, "cidr") == ["10.1.0.0/16"], "{only:?}");
    ensure!(registries_of_policy(&place, "config.networks.deny={0.0.0.0/0,::/0}")?.is_empty());
    Ok(())
}

#[tokio::test]
async fn the_operator_accepts_the_configuration_that_the_chart_renders() -> Result<()> {
    let place = Place::new("chart-config").await?;
    let only =
        ["--show-only", "templates/configmap.yaml", "--set", "config.limits.runs=7,config.timing.headTimeout=5s"];
    let rendered: Value = serde_saphyr::from_str(&rendered_chart(place.env, &place.namespace, &only)?)?;
    let files = rendered["data"].as_object().context("no data")?;
    ensure!(files.len() == 1, "{files:?}");
    for text in files.values() {
        let config = imagemirror::config::Config::parse(text.as_str().unwrap_or_default(), Path::new("chart"))?;
        ensure!(config.limits.runs == 7 && config.timing.head_timeout.as_secs() == 5);
        ensure!(config.log == imagemirror::config::Log::default(), "{:?}", config.log);
    }
    Ok(())
}

#[tokio::test]
async fn metrics_are_secure_when_the_chart_is_told_so_and_the_rights_for_that_come_with_it() -> Result<()> {
    let place = Place::new("chart-metrics").await?;
    let watched = format!("watchNamespaces={{{}}}", place.namespace);
    let render = |set: &str| rendered_chart(place.env, &place.namespace, &["--set", &watched, "--set", set]);
    let secure = "metrics.secure.enabled=true,metrics.secure.certSecret=cert";
    let (open, unauthenticated) =
        (render("nameOverride=")?, render(&format!("{secure},metrics.secure.authentication=None"))?);
    for rendered in [&open, &unauthenticated] {
        ensure!(!rendered.contains("reviews") && !rendered.contains("kind: ClusterRole\n"), "rights without need");
    }
    let rendered = render(secure)?;
    apply_dry(&place, &rendered)?;
    ensure!(rendered.matches("reviews]\n  verbs: [create]\n").count() == 2, "{rendered}");
    for (text, in_open, in_secure) in
        [("targetPort: https\n", 0, 1), ("secretName: cert\n", 0, 1), ("--metrics-listen=0.0.0.0:8443\n", 0, 1)]
    {
        ensure!(open.matches(text).count() == in_open && rendered.matches(text).count() == in_secure, "{text}");
    }
    let documents: Vec<Value> = serde_saphyr::from_multiple(&rendered)?;
    let config =
        documents.iter().find_map(|object| object["data"]["operator.yaml"].as_str()).context("no configuration")?;
    let metrics = imagemirror::config::Config::parse(config, Path::new("chart"))?.metrics;
    ensure!(metrics.authentication == imagemirror::config::Authentication::TokenReview, "{metrics:?}");
    let refused =
        render("metrics.secure.enabled=true").err().context("it is rendered without a certificate")?.to_string();
    ensure!(refused.contains("metrics.secure.certSecret is empty"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_change_of_the_configuration_makes_new_pods_but_for_the_log_level() -> Result<()> {
    let place = Place::new("chart-level").await?;
    let render = |template: &str, set: &str| {
        rendered_chart(
            place.env,
            &place.namespace,
            &["--show-only", &format!("templates/{template}.yaml"), "--set", set],
        )
    };
    for (template, set, is_another) in [
        ("deployment", "logLevel=debug", false),
        ("configmap", "logLevel=debug", true),
        ("deployment", "logFormat=text", true),
        ("deployment", "config.limits.runs=7", true),
    ] {
        ensure!((render(template, set)? != render(template, "logLevel=info")?) == is_another, "{template} with {set}");
    }
    // A file that is mounted alone stays as it was when the pod began.
    ensure!(!render("deployment", "logLevel=info")?.contains("subPath"));
    Ok(())
}

#[tokio::test]
async fn the_kustomize_base_and_its_overlay_build_and_the_api_server_takes_them() -> Result<()> {
    let place = Place::new("kustomize").await?;
    let mut built = Vec::new();
    for dir in ["default", "overlays/example"] {
        let mut objects = kubectl(place.env, &["kustomize", &format!("{ROOT}/config/{dir}")])?;
        // Their namespaces do not exist here: what is in them is checked in others, in which nothing has its name.
        for (namespace, other) in
            [("imagemirror-system", &*place.namespace), ("team-a", "default"), ("team-b", "default")]
        {
            objects = objects.replace(&format!("namespace: {namespace}\n"), &format!("namespace: {other}\n"));
        }
        let mut documents: Vec<Value> = serde_saphyr::from_multiple(&objects)?;
        documents.retain(|object| object["kind"] != "Namespace");
        ensure!(documents.len() >= 6, "only {} objects", documents.len());
        let text: Vec<String> = documents.iter().map(ToString::to_string).collect();
        apply_clean(&place, &text.join("\n---\n")).with_context(|| dir.to_owned())?;
        let config = documents.iter().find_map(|object| object["data"]["operator.yaml"].as_str()).context("none")?;
        let watched = imagemirror::config::Config::parse(config, Path::new(dir))?.watch_namespaces;
        let count = |kind: &str| documents.iter().filter(|object| object["kind"] == kind).count();
        let image = documents.iter().find(|object| object["kind"] == "Deployment").context("no Deployment")?;
        let image = image["spec"]["template"]["spec"]["containers"][0]["image"].clone();
        built.push((watched.len(), count("ClusterRoleBinding"), count("RoleBinding"), image));
    }
    // The one for its Lease, and one for each namespace.
    let version = env!("CARGO_PKG_VERSION");
    let expected = [
        (0, 1, 1, format!("imagemirror:{version}").into()),
        (2, 0, 3, format!("registry.example.com/imagemirror:{version}").into()),
    ];
    ensure!(built == expected, "{built:?}");
    Ok(())
}

/// What users are shown as YAML: the samples, and what stands between fences in the documentation. And how many
/// `ImageMirror`s there are in all of it, however they are shown.
fn shown() -> Result<(Vec<(PathBuf, String)>, usize)> {
    let (mut shown, mut objects) = (Vec::new(), 0);
    let mut samples = Vec::new();
    for dir in ["config/samples", "gitops/flux/images", "gitops/renovate"] {
        for entry in fs::read_dir(Path::new(ROOT).join(dir))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = fs::read_to_string(&path)?;
                samples.push((path, text));
            }
        }
    }
    for (path, text) in pages()?.into_iter().chain(samples) {
        objects += text.lines().filter(|line| line.trim() == "kind: ImageMirror").count();
        let is_page = path.extension().is_some_and(|extension| extension == "md");
        let blocks = if is_page { blocks(&text) } else { vec![("yaml".to_owned(), text)] };
        let blocks = blocks.into_iter().filter(|(language, _)| language == "yaml");
        shown.extend(blocks.map(|(_, block)| (path.clone(), block)));
    }
    Ok((shown, objects))
}

#[tokio::test]
async fn every_object_that_users_are_shown_is_valid() -> Result<()> {
    let place = Place::new("samples").await?;
    let (texts, objects) = shown()?;
    let mut checked = 0;
    for (path, text) in texts {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        for mut document in documents.into_iter().filter(|document| document["kind"] == "ImageMirror") {
            let mut validate = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
            validate.args(["validate", "-f", "-"]);
            run(&mut validate, Some(&document.to_string())).with_context(|| path.display().to_string())?;
            document["metadata"]["namespace"] = place.namespace.clone().into();
            apply_dry(&place, &document.to_string()).with_context(|| path.display().to_string())?;
            checked += 1;
        }
    }
    ensure!(checked >= 3 && checked == objects, "{checked} of {objects} ImageMirrors were found");
    Ok(())
}

/// Keys of values.yaml that stand at the top of a block.
const OF_THE_CHART: [&str; 2] = ["config", "networkPolicy"];

#[tokio::test]
async fn values_of_the_chart_that_users_are_shown_are_values_and_what_the_operator_reads() -> Result<()> {
    let place = Place::new("shown-values").await?;
    let mut checked = 0;
    for (path, text) in shown()?.0 {
        let values: Vec<Value> = serde_saphyr::from_multiple(&text).with_context(|| path.display().to_string())?;
        if !OF_THE_CHART.iter().any(|key| values.iter().any(|values| values.get(key).is_some())) {
            continue;
        }
        let file = place.env.run_dir.join(format!("{}.yaml", place.namespace));
        fs::write(&file, &text)?;
        let arguments = ["--values", file.to_str().context("a path")?, "--show-only", "templates/configmap.yaml"];
        let rendered =
            rendered_chart(place.env, &place.namespace, &arguments).with_context(|| path.display().to_string())?;
        let rendered: Value = serde_saphyr::from_str(&rendered)?;
        let config = rendered["data"]["operator.yaml"].as_str().context("no configuration")?;
        imagemirror::config::Config::parse(config, Path::new("chart")).with_context(|| path.display().to_string())?;
        checked += 1;
    }
    ensure!(checked >= 3, "{checked} blocks were found");
    Ok(())
}

fn schema() -> Result<Value> {
    let crd = imagemirror::api::crd()?;
    Ok(crd.pointer("/spec/versions/0/schema/openAPIV3Schema").context("no schema")?.clone())
}

/// The fields of a schema with their paths; `[]` stands for the entries of a list.
fn fields<'a>(path: &str, schema: &'a Value, found: &mut Vec<(String, &'a Value)>) {
    found.push((path.to_owned(), schema));
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        fields(&format!("{path}.{name}"), field, found);
    }
    if schema["items"].is_object() {
        fields(&format!("{path}[]"), &schema["items"], found);
    }
}

#[test]
fn every_field_says_what_it_is_and_what_when_absent_and_none_has_a_default() -> Result<()> {
    let schema = schema()?;
    let mut found = Vec::new();
    fields("spec", &schema["properties"]["spec"], &mut found);
    let mut wrong = Vec::new();
    for (path, field) in &found {
        let description =
            field["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
        let (parent, name) = path.rsplit_once('.').unwrap_or_default();
        let of_parent = found.iter().find(|(path, _)| path == parent).map(|(_, parent)| &parent["required"]);
        let is_required =
            of_parent.and_then(Value::as_array).is_some_and(|names| names.iter().any(|field| field == name));
        let is_entry = path.ends_with("[]");
        if description.is_empty() && !(is_entry && field["type"] != "object") {
            wrong.push(format!("{path} has no description"));
        }
        if !(is_required || is_entry || path == "spec" || description.contains("When absent:")) {
            wrong.push(format!("{path} does not say what happens when it is absent: {description}"));
        }
        if field.get("default").is_some() {
            wrong.push(format!("{path} has a default"));
        }
        wrong.extend(wrong_example(path, field, &description));
    }
    let mut of_status = Vec::new();
    fields("status", &schema["properties"]["status"], &mut of_status);
    wrong.extend(of_status.iter().filter(|(_, field)| field["description"].is_null()).map(|(path, _)| path.clone()));
    ensure!(found.len() > 40 && wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// An example is one that the schema takes.
fn wrong_example(path: &str, field: &Value, description: &str) -> Option<String> {
    let (_, rest) = description.split_once("Example: `")?;
    let example: Value = serde_saphyr::from_str(rest.split_once('`')?.0).ok()?;
    // A part of the path is an object, or a list of one entry.
    let put = |value: Value, part: &str| match part.strip_suffix("[]") {
        Some(name) => serde_json::json!({name: [value]}),
        None => serde_json::json!({part: value}),
    };
    let example = if field["type"] == "string" {
        example.as_str().map_or(example.to_string().into(), Value::from)
    } else {
        example
    };
    let spec = path.split('.').skip(1).collect::<Vec<_>>().into_iter().rev().fold(example, put);
    let path = path.replace("[]", "[0]");
    let refused = imagemirror::api::schema::check_spec(&spec);
    refused.iter().find(|refused| refused.field.starts_with(&path)).map(|refused| format!("the example of {refused}"))
}

#[tokio::test]
async fn the_api_server_takes_the_definition_without_a_warning_and_kubectl_explains_all_of_it() -> Result<()> {
    let place = Place::new("explain").await?;
    let apply = |crd: &Value| -> Result<String> {
        let path = place.env.run_dir.join(format!("{}.crd.json", place.namespace));
        fs::write(&path, crd.to_string())?;
        let mut apply = Command::new(place.env.tools.join("kubectl"));
        apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["apply", "--server-side", "--dry-run=server"]);
        let output = apply.args(["--force-conflicts", "-f"]).arg(&path).output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{said}");
        Ok(said)
    };
    let mut crd = imagemirror::api::crd()?;
    let said = apply(&crd)?;
    ensure!(said.is_empty(), "{said}");
    let interval = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/interval";
    crd.pointer_mut(interval).context("no interval")?["format"] = "unheard-of".into();
    ensure!(apply(&crd)?.contains("Warning"), "kubectl would not print a warning");

    let explain = |path: &str, more: &[&str]| {
        kubectl(place.env, &[&["explain", path, "--api-version=imagemirror.dev/v1alpha1"], more].concat())
    };
    let text = explain("imagemirror.spec", &["--recursive"])?;
    let schema = schema()?;
    let mut found = Vec::new();
    fields("spec", &schema["properties"]["spec"], &mut found);
    for (path, _) in found.iter().filter(|(path, _)| path.contains('.') && !path.ends_with("[]")) {
        let name = path.rsplit('.').next().unwrap_or_default();
        ensure!(text.split_whitespace().any(|word| word == name), "no {path} in {text}");
    }
    for (path, what) in [
        ("imagemirror.spec", "How often everything is compared again"),
        ("imagemirror.spec.interval", "When absent: 1h"),
        ("imagemirror.spec.images.select.sortBy", "Numerical"),
        ("imagemirror.spec.policy.overwrite", "absent: Always"),
        ("imagemirror.status.conditions", "Reconciling (only when true)"),
    ] {
        let text = explain(path, &[])?;
        ensure!(text.contains(what), "no {what:?} in {text}");
    }
    Ok(())
}

/// The image that `make image` has assembled.
pub(crate) struct Assembled {
    /// Its root file system.
    pub(crate) root: tempfile::TempDir,
    /// The variables that it sets.
    pub(crate) variables: Vec<(String, String)>,
}

pub(crate) fn assembled() -> Result<Assembled> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| Path::new(ROOT).join("target"), PathBuf::from);
    let layout = target.join("image/oci");
    let read = |digest: &str| -> Result<Value> {
        let path = layout.join("blobs").join(digest.replace(':', "/"));
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    };
    let index = fs::read(layout.join("index.json"))
        .with_context(|| format!("no image in {}: `make test` assembles it first", layout.display()))?;
    let index: Value = serde_json::from_slice(&index)?;
    let manifest = read(index["manifests"][0]["digest"].as_str().context("no manifest")?)?;
    let config = read(manifest["config"]["digest"].as_str().context("no config")?)?;
    ensure!(config["config"]["User"] == "65532" || config["config"]["User"] == "65532:65532", "{config}");
    ensure!(config["config"]["Entrypoint"] == serde_json::json!(["/imagemirror"]), "{config}");
    let variables = config["config"]["Env"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let variables = variables.filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name.into(), value.into()));
    let root = tempfile::tempdir()?;
    for layer in manifest["layers"].as_array().context("no layers")? {
        let digest = layer["digest"].as_str().context("no digest")?;
        let blob = layout.join("blobs").join(digest.replace(':', "/"));
        run(Command::new("tar").arg("-xf").arg(blob).arg("-C").arg(root.path()), None)?;
    }
    Ok(Assembled { root, variables: variables.collect() })
}

#[test]
fn the_image_runs_with_nothing_around_it() -> Result<()> {
    run_in(assembled()?.root.path())
}

fn run_in(root: &Path) -> Result<()> {
    for shell in ["bin/sh", "bin/bash", "busybox"] {
        ensure!(!root.join(shell).exists(), "{shell} is in the image");
    }
    let mut version = if nix::unistd::geteuid().is_root() {
        Command::new("chroot")
    } else {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "chroot"]);
        unshare
    };
    let output = version.arg(root).args(["/imagemirror", "--version"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("unshare failed") {
        println!("skipped: without root and user namespaces there is no chroot here");
        return Ok(());
    }
    ensure!(output.status.success(), "{said}");
    ensure!(String::from_utf8_lossy(&output.stdout).trim() == concat!("imagemirror ", env!("CARGO_PKG_VERSION")));
    Ok(())
}
