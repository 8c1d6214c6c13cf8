//! What is installed: the chart, the kustomize base, the samples, the image.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::support::{Place, kubectl, rendered_chart, run};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn apply_dry(place: &Place, objects: &str) -> Result<String> {
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["-n", &place.namespace]);
    apply.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]);
    run(&mut apply, Some(objects))
}

#[tokio::test]
async fn the_chart_is_clean_and_the_api_server_takes_what_it_renders() -> Result<()> {
    let place = Place::new("chart").await?;
    // Pods that would not pass restricted security are refused here.
    let label = "pod-security.kubernetes.io/enforce=restricted";
    kubectl(place.env, &["label", "namespace", &place.namespace, label])?;
    let chart = Path::new(ROOT).join("charts/imagemirror");
    run(Command::new(place.env.tools.join("helm")).args(["lint", "--strict"]).arg(chart), None)?;
    let watched = format!("watchNamespaces={{{}}}", place.namespace);
    for values in [&[][..], &["--set", &watched], &["--set", "replicaCount=2,crds.keep=false,logFormat=text"]] {
        let objects = rendered_chart(place.env, &place.namespace, values)?;
        let taken = apply_dry(&place, &objects).with_context(|| format!("rendered with {values:?}"))?;
        for kind in
            ["customresourcedefinition", "serviceaccount", "deployment.apps", "service/", "role.rbac", "configmap"]
        {
            ensure!(taken.contains(kind), "no {kind} in {taken}");
        }
        let has_cluster_role = objects.contains("kind: ClusterRole\n");
        ensure!(has_cluster_role != values.contains(&watched.as_str()), "a ClusterRole beside watchNamespaces");
    }
    ensure!(!Path::new(ROOT).join("charts/imagemirror/crds").exists(), "helm never upgrades a crds/ folder");
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
    }
    Ok(())
}

#[tokio::test]
async fn the_kustomize_base_builds_and_the_api_server_takes_it() -> Result<()> {
    let place = Place::new("kustomize").await?;
    let base = format!("{ROOT}/config/default");
    let objects = kubectl(place.env, &["kustomize", &base])?;
    // Its namespace does not exist here: what is in it is checked in the test's own.
    let objects = objects.replace("imagemirror-system", &place.namespace);
    let mut documents: Vec<Value> = serde_saphyr::from_multiple(&objects)?;
    documents.retain(|object| object["kind"] != "Namespace");
    ensure!(documents.len() >= 6, "only {} objects", documents.len());
    let text: Vec<String> = documents.iter().map(ToString::to_string).collect();
    apply_dry(&place, &text.join("\n---\n"))?;
    Ok(())
}

#[tokio::test]
async fn every_sample_and_every_example_of_the_readme_is_valid() -> Result<()> {
    let place = Place::new("samples").await?;
    let mut checked = 0;
    let mut texts: Vec<String> = Vec::new();
    for entry in fs::read_dir(Path::new(ROOT).join("config/samples"))? {
        texts.push(fs::read_to_string(entry?.path())?);
    }
    for file in ["README.md", "docs/architecture.md", "docs/operations.md", "docs/reasons.md"] {
        let text = fs::read_to_string(Path::new(ROOT).join(file))?;
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split_once("\n```"));
        texts.extend(blocks.map(|(block, _)| block.to_owned()));
    }
    for text in texts {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        for mut document in documents {
            if document["kind"] != "ImageMirror" {
                continue;
            }
            document["metadata"]["namespace"] = place.namespace.clone().into();
            apply_dry(&place, &document.to_string()).with_context(|| format!("in {text}"))?;
            imagemirror::mirror::validate(&serde_json::from_value(document)?)?;
            checked += 1;
        }
    }
    ensure!(checked >= 3, "only {checked} ImageMirrors were found");
    Ok(())
}

#[tokio::test]
async fn kubectl_explains_the_fields() -> Result<()> {
    let place = Place::new("explain").await?;
    let text = kubectl(place.env, &["explain", "imagemirror.spec", "--api-version=imagemirror.dev/v1alpha1"])?;
    for part in ["images", "imagePullSecrets", "How often everything is compared again", "When absent: 1h"] {
        ensure!(text.contains(part), "no {part:?} in {text}");
    }
    Ok(())
}

/// The root file system of the image that `make image` has assembled.
fn image_root() -> Result<PathBuf> {
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
    let root = tempfile::tempdir()?.keep();
    for layer in manifest["layers"].as_array().context("no layers")? {
        let digest = layer["digest"].as_str().context("no digest")?;
        let blob = layout.join("blobs").join(digest.replace(':', "/"));
        run(Command::new("tar").arg("-xf").arg(blob).arg("-C").arg(&root), None)?;
    }
    Ok(root)
}

#[test]
fn the_image_runs_with_nothing_around_it() -> Result<()> {
    let root = image_root()?;
    let outcome = run_in(&root);
    fs::remove_dir_all(&root)?;
    outcome
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
