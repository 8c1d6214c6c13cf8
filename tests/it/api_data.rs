//! What the API accepts and refuses, as data: `tests/api/*.yaml`, asked of the API server and of the command line, which
//! must agree. `tests/api/README.md` says how the files are read.

use std::{collections::BTreeMap, fs, process::Command, sync::LazyLock};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, stream};
use imagemirror::api::schema;
use regex::{Captures, Regex};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::support::{Place, condition, message};

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/api");
/// Cases that are asked about at once: other tests run beside.
const AT_ONCE: usize = 4;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    initial: Value,
    cases: Vec<Entry>,
    #[serde(default)]
    unknown: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    field: String,
    #[serde(default)]
    with: BTreeMap<String, Value>,
    #[serde(default)]
    accepted: Vec<Value>,
    #[serde(default)]
    refused: BTreeMap<String, Vec<Value>>,
    #[serde(default)]
    invalid: BTreeMap<String, Vec<Value>>,
}

/// One object, and what is expected of it.
#[derive(Clone, Debug)]
struct Case {
    field: String,
    object: Value,
    expected: Expected,
}

#[derive(Clone, Debug)]
enum Expected {
    Accepted,
    /// By the API server with these words.
    Refused(String),
    /// By command line and operator, with these words.
    Invalid(String),
    /// The field does not exist.
    Unknown,
}

fn files() -> Result<Vec<File>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(DIR)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = fs::read_to_string(&path)?;
            files.push(serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?);
        }
    }
    ensure!(files.len() > 5, "no cases in {DIR}");
    Ok(files)
}

impl File {
    fn cases(&self) -> Result<Vec<Case>> {
        let mut cases = Vec::new();
        for entry in &self.cases {
            let mut add = |value: &Value, expected: Expected| -> Result<()> {
                let mut object = self.initial.clone();
                for (pointer, value) in entry.with.iter().chain([(&entry.field, value)]) {
                    set(&mut object, pointer, expand(value)).with_context(|| pointer.clone())?;
                }
                cases.push(Case { field: entry.field.clone(), object, expected });
                Ok(())
            };
            for value in &entry.accepted {
                add(value, Expected::Accepted)?;
            }
            for (text, values) in &entry.refused {
                values.iter().try_for_each(|value| add(value, Expected::Refused(text.clone())))?;
            }
            for (text, values) in &entry.invalid {
                values.iter().try_for_each(|value| add(value, Expected::Invalid(text.clone())))?;
            }
        }
        for field in &self.unknown {
            let mut object = self.initial.clone();
            set(&mut object, field, json!("x"))?;
            cases.push(Case { field: field.clone(), object, expected: Expected::Unknown });
        }
        Ok(cases)
    }
}

/// Puts a value at a JSON pointer; what is missing on the way is made.
fn set(at: &mut Value, pointer: &str, value: Value) -> Result<()> {
    let Some(rest) = pointer.strip_prefix('/') else {
        *at = value;
        return Ok(());
    };
    let (part, rest) = rest.find('/').map_or((rest, ""), |end| rest.split_at(end));
    if let Ok(index) = part.parse::<usize>() {
        if at.is_null() {
            *at = json!([]);
        }
        let entries = at.as_array_mut().context("no list")?;
        if index == entries.len() {
            entries.push(Value::Null);
        }
        return set(entries.get_mut(index).context("no such entry")?, rest, value);
    }
    if at.is_null() {
        *at = json!({});
    }
    let fields = at.as_object_mut().context("no object")?;
    if rest.is_empty() && value == "<absent>" {
        fields.remove(part);
        return Ok(());
    }
    set(fields.entry(part).or_insert(Value::Null), rest, value)
}

/// Writes out what is said in short.
fn expand(value: &Value) -> Value {
    match value {
        Value::String(text) => repeated(text).into(),
        Value::Array(entries) => entries.iter().map(expand).collect(),
        Value::Object(fields) => match (fields.get("times").and_then(Value::as_u64), fields.get("of")) {
            (Some(times), Some(of)) => (0..times).map(|n| expand(&numbered(of, n))).collect(),
            _ => fields.iter().map(|(name, value)| (name.clone(), expand(value))).collect::<Map<_, _>>().into(),
        },
        other => other.clone(),
    }
}

/// `<text*3>` three times.
fn repeated(text: &str) -> String {
    #[allow(clippy::expect_used, reason = "a constant")]
    static PATTERN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"<([^<>*]+)\*([0-9]+)>").expect("a pattern"));
    let times = |found: &Captures<'_>| found[1].repeat(found[2].parse().unwrap_or_default());
    PATTERN.replace_all(text, times).into_owned()
}

/// `<n>` is the number of the entry; in a list inside, that of the inner one.
fn numbered(value: &Value, n: u64) -> Value {
    match value {
        Value::String(text) => text.replace("<n>", &n.to_string()).into(),
        Value::Object(fields) if fields.contains_key("times") => value.clone(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), numbered(value, n))).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// `/spec/images/0/source` as `spec.images[0].source`.
fn path(pointer: &str) -> String {
    let part = |part: &str| if part.parse::<u8>().is_ok() { format!("[{part}]") } else { format!(".{part}") };
    pointer.split('/').skip(1).map(part).collect::<String>().trim_start_matches('.').to_owned()
}

/// What the API server says to a create or an update that is not carried out: the object, or why not.
async fn ask(place: &Place, method: &str, name: &str, object: &Value, fields: &str) -> Result<Result<Value, String>> {
    let path = format!("/apis/imagemirror.dev/v1alpha1/namespaces/{}/imagemirrors{name}", place.namespace);
    let request = http::Request::builder()
        .method(method)
        .uri(format!("{path}?dryRun=All&fieldValidation={fields}"))
        .header("Content-Type", "application/json")
        .body(serde_json::to_vec(object)?)?;
    match place.client.request::<Value>(request).await {
        Ok(kept) => Ok(Ok(kept)),
        Err(kube::Error::Api(status)) => Ok(Err(status.message.clone())),
        Err(error) => Err(error.into()),
    }
}

/// Whether the command line accepts the object, and what it says.
async fn command_line(object: &Value) -> Result<(bool, String)> {
    use std::io::Write as _;
    let text = object.to_string();
    let outcome = tokio::task::spawn_blocking(move || -> Result<_> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        command.args(["validate", "-f", "-"]).stdin(std::process::Stdio::piped());
        let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()?;
        child.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
        Ok(child.wait_with_output()?)
    });
    let output = outcome.await??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => Ok((true, said)),
        Some(2) => Ok((false, said)),
        code => bail!("it ended with {code:?}: {said}"),
    }
}

impl Case {
    /// What is not as expected, if anything.
    async fn judge(&self, place: &Place, stored: &BTreeMap<String, Value>) -> Result<()> {
        let mut answers = vec![ask(place, "POST", "", &self.object, "Strict").await?];
        if let Some(metadata) = self.object["metadata"]["name"].as_str().and_then(|name| stored.get(name)) {
            let mut update = self.object.clone();
            for key in ["name", "resourceVersion"] {
                update["metadata"][key] = metadata[key].clone();
            }
            let name = format!("/{}", metadata["name"].as_str().unwrap_or_default());
            answers.push(ask(place, "PUT", &name, &update, "Strict").await?);
        }
        for answer in &answers {
            match (&self.expected, answer) {
                (Expected::Accepted | Expected::Invalid(_), Ok(kept)) => {
                    let written = schema::as_kept(self.object["spec"].clone());
                    ensure!(kept["spec"] == written, "it was kept as {}", kept["spec"]);
                }
                (Expected::Refused(text), Err(said)) => ensure!(said.contains(text), "the API server said {said}"),
                (Expected::Unknown, Err(said)) => {
                    let text = format!("unknown field \"{}\"", path(&self.field));
                    ensure!(said.contains(&text), "the API server said {said}");
                    let kept = ask(place, "POST", "", &self.object, "Ignore").await?;
                    let kept = kept.map_err(anyhow::Error::msg)?;
                    ensure!(kept.pointer(&self.field).is_none(), "the API server kept it: {kept}");
                }
                (_, Ok(_)) => bail!("the API server accepted it"),
                (_, Err(said)) => bail!("the API server refused it: {said}"),
            }
        }
        let (accepts, said) = command_line(&self.object).await?;
        ensure!(accepts == matches!(self.expected, Expected::Accepted), "the command line: accepted {accepts}, {said}");
        let words = match &self.expected {
            Expected::Accepted => return Ok(()),
            Expected::Refused(text) | Expected::Invalid(text) => text,
            Expected::Unknown => "there is no such field",
        };
        let field = path(&self.field);
        // Of an entry of a list the list is named.
        let field = field.trim_end_matches("[0]");
        ensure!(said.contains(field) || said.contains(words), "the command line said {said}");
        Ok(())
    }
}

#[tokio::test]
async fn the_api_server_and_the_command_line_agree_on_every_case() -> Result<()> {
    let place = Place::new("api-data").await?;
    // What is updated has another name than what is created.
    let (mut cases, mut stored) = (Vec::new(), BTreeMap::new());
    for file in files()? {
        cases.extend(file.cases()?);
        let name = file.initial["metadata"]["name"].as_str().context("no name")?.to_owned();
        let object = place.apply(&format!("stored-{name}"), &file.initial["spec"]).await?;
        stored.insert(name, serde_json::to_value(&object.metadata)?);
    }
    let judged = cases.iter().map(|case| async {
        let value = case.object.pointer(&case.field).map(ToString::to_string).unwrap_or_default();
        let outcome = case.judge(&place, &stored).await;
        outcome.err().map(|error| format!("{} = {value:.60}, {:?}: {error:.300}", case.field, case.expected))
    });
    let wrong: Vec<Option<String>> = stream::iter(judged).buffer_unordered(AT_ONCE).collect().await;
    let wrong: Vec<String> = wrong.into_iter().flatten().collect();
    ensure!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));

    // What neither schema nor rules can see, the operator says.
    let _operator = place.operator()?;
    let place = &place;
    let stalled = cases.iter().enumerate().map(|(n, case)| async move {
        let Expected::Invalid(text) = &case.expected else { return Ok(()) };
        let name = format!("invalid-{n}");
        place.apply(&name, &case.object["spec"]).await?;
        let status = place.until_reason(&name, "InvalidSpec").await?.status.unwrap_or_default();
        let said = message(&status, "Ready");
        ensure!(said.contains(text) && condition(&status, "Stalled").0 == "True", "{text}: the operator says {said}");
        Ok(())
    });
    let outcomes: Vec<Result<()>> = stream::iter(stalled).buffer_unordered(AT_ONCE).collect().await;
    outcomes.into_iter().collect()
}

/// The fields of a schema with what it says of each.
fn fields(pointer: &str, schema: &Value, found: &mut Vec<(String, Value)>) {
    found.push((pointer.to_owned(), schema.clone()));
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        fields(&format!("{pointer}/{name}"), schema, found);
    }
    if schema["items"].is_object() {
        fields(&format!("{pointer}/0"), &schema["items"], found);
    }
}

#[test]
fn no_field_and_no_rule_is_without_a_case() -> Result<()> {
    // What the API server says where a keyword of the schema refuses something.
    const SAID: [(&str, &str); 11] = [
        ("type", "must be of type"),
        ("pattern", "should match"),
        ("minLength", "should be at least"),
        ("maxLength", "Too long"),
        ("minItems", "should have at least"),
        ("maxItems", "must have at most"),
        ("minimum", "should be greater"),
        ("maximum", "should be less"),
        ("enum", "Unsupported value"),
        ("x-kubernetes-list-map-keys", "Duplicate value"),
        ("required", "Required value"),
    ];
    let entries: Vec<Entry> = files()?.into_iter().flat_map(|file| file.cases).collect();
    let crd = imagemirror::api::crd()?;
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").context("no schema")?;
    let mut found = Vec::new();
    fields("/spec", &schema["properties"]["spec"], &mut found);
    ensure!(found.len() > 40, "only {} fields", found.len());
    let mut missing = Vec::new();
    for (field, schema) in found {
        let refuses = |field: &str, text: &str| {
            let refused = entries.iter().filter(|entry| entry.field == field).flat_map(|entry| &entry.refused);
            refused.into_iter().any(|(said, values)| said.contains(text) && !values.is_empty())
        };
        let is_entry = field.ends_with("/0") && schema["type"] == "object";
        let of_entry = |field: &str| if is_entry { field.trim_end_matches("/0").to_owned() } else { field.to_owned() };
        for (keyword, text) in SAID.into_iter().filter(|(keyword, _)| schema.get(keyword).is_some()) {
            let fields: Vec<String> = match schema[keyword].as_array() {
                Some(names) if keyword == "required" => {
                    names.iter().map(|name| format!("{field}/{}", name.as_str().unwrap_or_default())).collect()
                }
                _ => vec![of_entry(&field)],
            };
            missing.extend(fields.iter().filter(|field| !refuses(field, text)).map(|field| format!("{field}: {text}")));
        }
        if schema["x-kubernetes-list-type"] == "set" && !refuses(&field, "Duplicate value") {
            missing.push(format!("{field}: Duplicate value"));
        }
        let is_value = !matches!(schema["type"].as_str(), Some("object"));
        if is_value && !entries.iter().any(|entry| entry.field == field && !entry.accepted.is_empty()) {
            missing.push(format!("{field}: accepted"));
        }
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let message = rule["message"].as_str().context("a rule without a message")?;
            let said = |entry: &Entry| entry.refused.keys().any(|text| message.contains(text.as_str()));
            if !entries.iter().any(said) {
                missing.push(format!("{field}: {message}"));
            }
        }
    }
    ensure!(missing.is_empty(), "no case in {DIR} for\n{}", missing.join("\n"));
    Ok(())
}
