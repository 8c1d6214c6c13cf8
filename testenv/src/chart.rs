//! What the comments in a chart's values.yaml say, for its README.md (the table between two marks) and its
//! values.schema.json (the descriptions). `make generate` writes them, `make check-generated` compares.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const BEGIN: &str = "<!-- values.yaml says: -->\n";
const END: &str = "<!-- (generated) -->\n";

/// A key of values.yaml, with the comment above it.
struct Entry {
    path: Vec<String>,
    description: String,
    /// As it is written beside the key: nothing where the value follows below.
    default: String,
}

/// Writes both files of the chart in `dir`; with `check`, compares them instead.
pub fn run(dir: &Path, check: bool) -> Result<()> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).with_context(|| format!("read {name} of the chart"));
    let entries = entries(&read("values.yaml")?);
    let (readme, schema) = (read("README.md")?, read("values.schema.json")?);
    let new = [
        ("README.md", table(&readme, &entries)?, readme),
        ("values.schema.json", described(&schema, &entries)?, schema),
    ];
    for (name, new, old) in new {
        ensure!(!check || new == old, "{name} of the chart is not current: run `make generate`");
        if new != old {
            fs::write(dir.join(name), new)?;
        }
    }
    Ok(())
}

fn entries(text: &str) -> Vec<Entry> {
    let (mut entries, mut comment) = (Vec::new(), Vec::new());
    // The keys that the next line may be below, with their indentation.
    let mut above: Vec<(usize, String)> = Vec::new();
    for line in text.lines() {
        let content = line.trim_start();
        let indentation = line.len() - content.len();
        if let Some(words) = content.strip_prefix('#') {
            comment.push(words.trim().to_owned());
        } else if let Some((key, default)) = content.split_once(':').filter(|_| !content.starts_with("- ")) {
            above.retain(|(of_it, _)| *of_it < indentation);
            above.push((indentation, key.to_owned()));
            let path = above.iter().map(|(_, key)| key.clone()).collect();
            entries.push(Entry { path, description: comment.join(" "), default: default.trim().to_owned() });
            comment.clear();
        } else {
            comment.clear();
        }
    }
    entries
}

/// Whether values below it have descriptions of their own.
fn is_section(path: &[String], entries: &[Entry]) -> bool {
    let is_below = |entry: &Entry| entry.path.len() > path.len() && entry.path.starts_with(path);
    entries.iter().any(|entry| is_below(entry) && !entry.description.is_empty())
}

/// The values that the table has, each with a description.
fn values(entries: &[Entry]) -> Result<Vec<&Entry>> {
    let mut values = Vec::new();
    for entry in entries {
        let parents = (1..entry.path.len()).map(|length| &entry.path[..length]);
        if parents.into_iter().all(|parent| is_section(parent, entries)) && !is_section(&entry.path, entries) {
            ensure!(!entry.description.is_empty(), "{} has no comment in values.yaml", entry.path.join("."));
            values.push(entry);
        }
    }
    Ok(values)
}

fn table(readme: &str, entries: &[Entry]) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).context("README.md has no mark where the values begin")?;
    let (_, after) = rest.split_once(END).context("README.md has no mark where the values end")?;
    let rows = values(entries)?.into_iter().map(|entry| {
        let default =
            if entry.default.is_empty() { "see values.yaml".to_owned() } else { format!("`{}`", entry.default) };
        format!("| `{}` | {default} | {} |\n", entry.path.join("."), entry.description.replace('|', "\\|"))
    });
    let rows: String = rows.collect();
    Ok(format!("{before}{BEGIN}\n| value | default | meaning |\n|---|---|---|\n{rows}\n{END}{after}"))
}

fn described(schema: &str, entries: &[Entry]) -> Result<String> {
    let mut schema: Value = serde_json::from_str(schema)?;
    let pointer = |path: &[String]| path.iter().flat_map(|key| ["/properties/", key]).collect::<String>();
    let sections: Vec<_> = entries.iter().filter(|entry| is_section(&entry.path, entries)).collect();
    for entry in values(entries)?.iter().chain(&sections) {
        let Some(Value::Object(property)) = schema.pointer_mut(&pointer(&entry.path)) else {
            bail!("{} is not in values.schema.json", entry.path.join("."));
        };
        if !entry.description.is_empty() {
            property.insert("description".to_owned(), entry.description.clone().into());
        }
    }
    let whole = Vec::new();
    for path in sections.iter().map(|entry| &entry.path).chain([&whole]) {
        let section = schema.pointer(&pointer(path)).context("no section")?;
        for key in section["properties"].as_object().into_iter().flat_map(|properties| properties.keys()) {
            let is_it = |entry: &Entry| entry.path.split_last() == Some((key, path));
            ensure!(entries.iter().any(is_it), "{key} of values.schema.json is not in values.yaml");
        }
        ensure!(
            path.first().is_some_and(|key| key == "global") || section["additionalProperties"] == false,
            "values.schema.json takes any name in {path:?}"
        );
    }
    Ok(format!("{schema:#}\n"))
}
