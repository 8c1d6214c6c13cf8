//! The reference of the API, made of the definition's own words: each field with its type, its bounds, what it means, and
//! what the API server says when it refuses it. `make generate` writes it, `make check-generated` compares.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::support::golden;

const HEAD: &str = "\
# The API

`ImageMirror` of the group `imagemirror.dev`, version `v1alpha1`; in a namespace; short name `imir`. `make generate` writes this page from
the definition. `kubectl explain imagemirror.spec --api-version=imagemirror.dev/v1alpha1` says the same, and
[which images, where to, and when](../images.md) what the fields do together. `[]` stands for each entry of a list.

Beside the fields, two annotations are read: `imagemirror.dev/requestedAt` on an ImageMirror (a new value asks for a sync now), and
`imagemirror.dev/registry` on a Secret of the type `kubernetes.io/basic-auth` (the `host[:port][/path]` that it is for).
";

#[test]
fn the_reference_of_the_api_is_current() -> Result<()> {
    let crd = imagemirror::api::crd()?;
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").context("no schema")?;
    let mut page = HEAD.to_owned();
    rules(schema, &mut page)?;
    for (part, title) in [("spec", "spec"), ("status", "status")] {
        write!(page, "\n## {title}\n\n{}\n", words(&schema["properties"][part]))?;
        rules(&schema["properties"][part], &mut page)?;
        fields(part, &schema["properties"][part], &mut page)?;
    }
    golden("docs/reference/api.md", &page)
}

/// The fields of an object, with those of the objects in it.
fn fields(path: &str, schema: &Value, page: &mut String) -> Result<()> {
    let required = schema["required"].as_array();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let is_required = required.is_some_and(|names| names.iter().any(|required| required == name));
        let kind = kind(field)?;
        write!(page, "\n### `{path}`\n\n{}{kind}\n", if is_required { "Required; " } else { "" })?;
        let text = words(field);
        // What is true of a field alone is said first.
        let (text, absent) =
            text.split_once(" When absent: ").map_or((&*text, None), |(text, rest)| (text, Some(rest)));
        write!(page, "\n{text}\n")?;
        if let Some(absent) = absent {
            write!(page, "\nWhen absent: {absent}\n")?;
        }
        for schema in [field, &field["items"]] {
            rules(schema, page)?;
        }
        fields(&path, field, page)?;
        fields(&format!("{path}[]"), &field["items"], page)?;
    }
    Ok(())
}

/// What the API server answers to what its rules refuse.
fn rules(schema: &Value, page: &mut String) -> Result<()> {
    let rules = schema["x-kubernetes-validations"].as_array();
    for (number, rule) in rules.into_iter().flatten().enumerate() {
        let gap = if number == 0 { "\nRefused with:\n\n" } else { "" };
        writeln!(page, "{gap}- `{}`", rule["message"].as_str().context("a rule without a message")?)?;
    }
    Ok(())
}

/// The type of a field and its bounds.
fn kind(field: &Value) -> Result<String> {
    let name = field["type"].as_str().context("no type")?;
    if name == "array" {
        let unique = match field["x-kubernetes-list-type"].as_str() {
            Some("set") => ", each once".to_owned(),
            Some("map") => {
                format!(", one for each `{}`", field["x-kubernetes-list-map-keys"][0].as_str().context("no key")?)
            }
            _ => String::new(),
        };
        return Ok(format!("list{}{unique}; an entry: {}", bounds(field, "Items", "entries"), kind(&field["items"])?));
    }
    let mut kind = match field["format"].as_str() {
        Some("date-time") => "time".to_owned(),
        _ => name.to_owned(),
    };
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<_> = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`")).collect();
        kind = format!("one of {}", values.join(", "));
    }
    kind += &bounds(field, "Length", "characters");
    kind += &bounds(field, "imum", "");
    if let Some(pattern) = field["pattern"].as_str() {
        write!(kind, ", matches `{pattern}`")?;
    }
    Ok(kind)
}

/// `minItems` and `maxItems` and the like.
fn bounds(field: &Value, of: &str, what: &str) -> String {
    let bound = |which: &str| field[format!("{which}{of}")].as_f64();
    let text = match (bound("min"), bound("max")) {
        (Some(min), Some(max)) => format!(", {min} to {max} {what}"),
        (None, Some(max)) => format!(", at most {max} {what}"),
        (Some(min), None) => format!(", at least {min} {what}"),
        (None, None) => String::new(),
    };
    text.trim_end().to_owned()
}

/// A description in one line.
fn words(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}
