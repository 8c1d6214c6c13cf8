//! What the structure promises: the engine knows no Kubernetes, and generated files are current.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn sources(path: &Path, found: &mut Vec<(String, String)>) -> Result<()> {
    if path.is_file() {
        found.push((path.display().to_string(), fs::read_to_string(path)?));
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        sources(&entry?.path(), found)?;
    }
    Ok(())
}

#[test]
fn the_engine_imports_nothing_of_kubernetes_or_of_the_layers_above_it() -> Result<()> {
    let mut found = Vec::new();
    for module in ["oci", "auth", "registry", "copy", "plan.rs", "schedule.rs", "sync.rs", "reason.rs"] {
        sources(&Path::new(ROOT).join("src").join(module), &mut found)?;
    }
    ensure!(found.len() > 20, "only {} files were looked at", found.len());
    for (path, text) in found {
        for forbidden in
            ["kube::", "k8s_openapi", "crate::api", "crate::controller", "crate::cli", "crate::mirror", "crate::config"]
        {
            ensure!(!text.contains(forbidden), "{path} has {forbidden}");
        }
    }
    Ok(())
}

#[test]
fn the_environment_is_read_in_one_place() -> Result<()> {
    let mut found = Vec::new();
    sources(&Path::new(ROOT).join("src"), &mut found)?;
    for (path, text) in found {
        let expected = match path.rsplit_once("/src/").map(|(_, file)| file) {
            // What clap does not read for flags: logins under names that their user has chosen, and their configuration's place.
            Some("cli/logins.rs") => continue,
            // One variable of Azure's own, whose others its crate reads by itself.
            Some("auth/cloud/entra.rs") => 1,
            _ => 0,
        };
        ensure!(text.matches("env::var").count() == expected, "{path} reads the environment");
    }
    Ok(())
}

#[test]
fn nothing_under_spec_has_a_default_in_the_schema() -> Result<()> {
    fn defaults(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let path = format!("{path}/{name}");
                    if name == "default" {
                        found.push(path.clone());
                    }
                    defaults(value, &path, found);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| defaults(item, path, found)),
            _ => {}
        }
    }
    let crd = imagemirror::api::crd()?;
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema/properties").context("no schema")?;
    let mut found = Vec::new();
    defaults(&schema["spec"], "spec", &mut found);
    ensure!(found.is_empty(), "{found:?}");
    ensure!(schema["status"]["default"]["observedGeneration"] == -1, "a new object must look unobserved");
    Ok(())
}

#[test]
fn every_field_of_the_spec_is_described() -> Result<()> {
    fn check(value: &Value, path: &str) -> Result<()> {
        for (name, field) in value["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            ensure!(field["description"].as_str().is_some_and(|text| text.len() > 10), "{path} has no description");
            check(field, &path)?;
            check(&field["items"], &path)?;
        }
        Ok(())
    }
    let crd = imagemirror::api::crd()?;
    check(crd.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec").context("no schema")?, "spec")
}

#[test]
fn every_reason_is_documented() -> Result<()> {
    let text = fs::read_to_string(Path::new(ROOT).join("docs/reasons.md"))?;
    let source = fs::read_to_string(Path::new(ROOT).join("src/reason.rs"))?;
    let names = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \""))
        .map(|(name, _)| name);
    let names: Vec<_> = names.collect();
    ensure!(names.len() > 20, "only {names:?}");
    for name in names {
        ensure!(text.contains(&format!("`{name}`")), "docs/reasons.md does not have {name}");
    }
    Ok(())
}
