//! Namespaces are walls: what an operator may do and does, in the namespaces of the objects that it serves and in others.

use std::{collections::BTreeSet, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::images::Image;

use crate::{
    audit::asked,
    support::{Place, golden, kubectl, message, rendered_chart, run},
};

#[test]
fn no_field_of_the_spec_names_a_namespace() -> Result<()> {
    fn names(value: &Value, found: &mut BTreeSet<String>) {
        for (name, field) in value["properties"].as_object().into_iter().flatten() {
            found.insert(name.clone());
            names(field, found);
        }
        if value["items"].is_object() {
            names(&value["items"], found);
        }
    }
    let crd = imagemirror::api::crd()?;
    let spec = crd.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec").context("no spec")?;
    let mut found = BTreeSet::new();
    names(spec, &mut found);
    ensure!(found.len() > 30, "only {found:?}");
    let spaces: Vec<_> = found.iter().filter(|name| name.to_lowercase().contains("namespace")).collect();
    ensure!(spaces.is_empty(), "{spaces:?}");
    Ok(())
}

/// Two tenants under one operator: the first has Secrets, and the second tries to name them.
#[tokio::test]
async fn secrets_of_another_namespace_cannot_be_had_whatever_they_are_called() -> Result<()> {
    let rich = Place::new("walls").await?;
    let poor = Place::new("poor").await?;
    let (source, target) = (&rich.env.source, &rich.env.target);
    let image = Image::single(411, &[1000]);
    for place in [&rich, &poor] {
        place.push(source, "agent", "1", &image).await?;
    }
    rich.serve(&poor)?;
    let _operator = rich.operator()?;
    let path = format!("../../{}/secrets/pull", rich.namespace);
    let spec = |names: Value| {
        let mut spec = poor.spec(source, target, &[("agent", &["1"])]);
        for (field, value) in names.as_object().into_iter().flatten() {
            spec[field] = value.clone();
        }
        spec
    };
    // What the API server does not even store.
    for names in [
        json!({"imagePullSecrets": [{"name": path}]}),
        json!({"imagePullSecrets": [{"name": format!("{}/pull", rich.namespace)}]}),
        json!({"imagePullSecrets": [{"name": "pull", "namespace": rich.namespace}]}),
        json!({"serviceAccountName": format!("{}/default", rich.namespace)}),
        json!({"serviceAccountName": format!("system:serviceaccount:{}:default", rich.namespace)}),
        json!({"target": {"registry": target.host, "secretRef": {"name": "push", "namespace": rich.namespace}}}),
        json!({"registries": [{"host": source.host, "certSecretRef": {"name": format!("../{}/ca", rich.namespace)}}]}),
        json!({"registries": [{"host": source.host, "proxySecretRef": {"name": "p", "namespace": rich.namespace}}]}),
        json!({"namespace": rich.namespace}),
    ] {
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror",
            "metadata": {"name": "m", "namespace": poor.namespace}, "spec": spec(names.clone()),
        });
        let mut create = Command::new(poor.env.tools.join("kubectl"));
        create.arg("--kubeconfig").arg(&poor.env.kubeconfig).args(["create", "--validate=strict", "-f", "-"]);
        ensure!(run(&mut create, Some(&object.to_string())).is_err(), "{names} was stored");
    }
    // What it stores: names that are those of the other's Secrets, and a ServiceAccount, whose names nobody checks.
    poor.kubectl(&["create", "serviceaccount", "puller"])?;
    let secrets = json!({"imagePullSecrets": [{"name": path}, {"name": "pull"}]}).to_string();
    poor.kubectl(&["patch", "serviceaccount", "puller", "-p", &secrets])?;
    let own = poor.kubectl(&["get", "secret", "pull", "-o", "yaml"])?;
    for secret in ["pull", "push"] {
        poor.kubectl(&["delete", "secret", secret])?;
    }
    poor.apply("named", &spec(json!({}))).await?;
    let mut by_account = spec(json!({"imagePullSecrets": [], "serviceAccountName": "puller"}));
    by_account["target"]["repository"] = json!(format!("{}/by-account", poor.prefix));
    poor.apply("by-account", &by_account).await?;
    let said =
        message(&poor.until_reason("named", "SecretNotFound").await?.status.unwrap_or_default(), "Ready").to_owned();
    ensure!(said.contains("\"push\" does not exist in this namespace") && !said.contains(&rich.namespace), "{said}");
    poor.pull_secret("push", &[target]).await?;
    let status = poor.until_reason("by-account", "SecretInvalid").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("is not the name of a Secret"), "{status:?}");
    let seen = || -> Result<BTreeSet<(String, String)>> {
        Ok(asked(rich.env, &rich.namespace)?.into_iter().map(|asked| (asked.namespace, asked.name)).collect())
    };
    let expected = |place: &Place, names: &[&str]| -> BTreeSet<(String, String)> {
        names.iter().map(|name| (place.namespace.clone(), (*name).to_owned())).collect()
    };
    let of_poor = expected(&poor, &["ca", "pull", "push", "puller"]);
    ensure!(seen()? == of_poor, "{:?}", seen()?);
    // Its own Secret of that name is another one. And the other tenant is served, too.
    let mut apply = Command::new(poor.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&poor.env.kubeconfig).args(["apply", "-f", "-"]);
    run(&mut apply, Some(&own))?;
    poor.until_ready("named").await?;
    rich.apply("m", &rich.spec(source, target, &[("agent", &["1"])])).await?;
    rich.until_ready("m").await?;
    let all: BTreeSet<_> = of_poor.into_iter().chain(expected(&rich, &["ca", "pull", "push"])).collect();
    ensure!(seen()? == all, "{:?}", seen()?);
    Ok(())
}

#[tokio::test]
async fn an_installation_for_one_namespace_works_with_nothing_of_the_cluster_but_the_definition() -> Result<()> {
    let place = Place::new("namespaced").await?;
    let watched = format!("watchNamespaces={{{}}},crds.enabled=false", place.namespace);
    let objects = rendered_chart(place.env, &place.namespace, &["--set", &watched])?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(&objects)?;
    let documents: Vec<_> = documents.into_iter().filter(|object| !object.is_null()).collect();
    ensure!(documents.len() >= 6, "only {} objects", documents.len());
    for object in &documents {
        ensure!(object["metadata"]["namespace"] == place.namespace.as_str(), "it is of the cluster: {object}");
    }
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["apply", "-f", "-"]);
    run(&mut apply, Some(&objects))?;
    let image = Image::single(412, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let _operator = place.operator()?;
    place.apply("m", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("m").await?;
    let bindings: Value = serde_json::from_str(&kubectl(place.env, &["get", "clusterrolebindings", "-o", "json"])?)?;
    let of_it = |binding: &&Value| binding["subjects"].to_string().contains(&place.namespace);
    let bound: Vec<_> = bindings["items"].as_array().into_iter().flatten().filter(of_it).collect();
    ensure!(bound.is_empty(), "{bound:?}");
    Ok(())
}

#[tokio::test]
async fn the_rights_are_those_of_the_golden_files() -> Result<()> {
    let place = Place::new("rights").await?;
    let other = Place::new("rights-other").await?;
    let operator = format!("system:serviceaccount:{}:imagemirror", place.namespace);
    let rights = || -> Result<String> {
        let mut text = Vec::new();
        for (what, namespace) in [("its own", &place.namespace), ("another", &other.namespace)] {
            let list = kubectl(place.env, &["auth", "can-i", "--list", "--as", &operator, "-n", namespace])?;
            let list = list.replace(&place.namespace, "NAMESPACE");
            let lines: Vec<_> = list.lines().map(str::trim_end).collect();
            text.push(format!("# In {what} namespace\n{}\n", lines.join("\n")));
        }
        Ok(text.join("\n"))
    };
    golden("tests/golden/rights-of-one-namespace.txt", &rights()?)?;
    let only = ["--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccount.yaml"];
    let objects = rendered_chart(place.env, &place.namespace, &only)?;
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["apply", "-f", "-"]);
    run(&mut apply, Some(&objects))?;
    // The roles of the other installation would hide what is missing in this one.
    for kind in ["rolebinding", "role"] {
        place.kubectl(&["delete", kind, &format!("{}:imagemirror", place.namespace)])?;
    }
    // Authorisation learns of bindings by a watch.
    crate::support::eventually("the rights in the cluster", || async {
        Ok(rights()?.matches("secrets ").count() == 2)
    })
    .await?;
    let outcome = golden("tests/golden/rights-of-the-cluster.txt", &rights()?);
    for kind in ["clusterrolebinding", "clusterrole"] {
        kubectl(place.env, &["delete", kind, &format!("{}:imagemirror", place.namespace)])?;
    }
    outcome
}
