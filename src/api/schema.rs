//! The schema of the definition, applied without an API server: types, required and unknown fields, enumerations,
//! patterns, bounds, sets and maps are read from the definition itself, so that nothing is written twice. What the CEL
//! rules say is checked in `mirror`.

use std::{collections::BTreeMap, fmt, sync::LazyLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use regex::Regex;
use serde::{Deserialize, Deserializer, de::Error as _, de::IgnoredAny};
use serde_json::{Map, Number, Value};

/// What the schema refuses, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field, such as `spec.images[0].source`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.what)
    }
}

/// What the API server's schema refuses in an object as it was written.
#[must_use]
pub fn check(object: &Value) -> Vec<Violation> {
    const KNOWN: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    let mut found = Found::default();
    for name in object.as_object().into_iter().flat_map(Map::keys).filter(|name| !KNOWN.contains(&name.as_str())) {
        found.unknown(name);
    }
    found.metadata(&object["metadata"]);
    match &object["spec"] {
        Value::Null => found.add("spec", "is required"),
        spec => SPEC.check("spec", spec, None, &mut found),
    }
    found.0
}

/// What the schema refuses in a spec.
#[must_use]
pub fn check_spec(spec: &Value) -> Vec<Violation> {
    let mut found = Found::default();
    SPEC.check("spec", spec, None, &mut found);
    found.0
}

/// The value as the API server keeps it: a field that is null is absent, and 5.0 is 5.
#[must_use]
pub fn as_kept(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let present = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(present.map(|(name, value)| (name, as_kept(value))).collect())
        }
        Value::Array(entries) => Value::Array(entries.into_iter().map(as_kept).collect()),
        Value::Number(number) => whole(&number).map_or(Value::Number(number), Value::from),
        other => other,
    }
}

fn whole(number: &Number) -> Option<i64> {
    // JSON has no other way to write one; what is larger than an i64 is printed with an exponent.
    number.as_i64().or_else(|| format!("{:.1}", number.as_f64()?).strip_suffix(".0")?.parse().ok())
}

static SPEC: LazyLock<Node> = LazyLock::new(|| {
    #[allow(clippy::expect_used, reason = "it is made of constants, and a test reads it")]
    spec().expect("the definition's schema")
});

fn spec() -> Result<Node, serde_json::Error> {
    let mut crd = super::crd()?;
    let spec = crd.pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties/spec");
    Node::deserialize(spec.map(Value::take).unwrap_or_default())
}

/// One field of the schema. A keyword that is not here would go unchecked, and is an error.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    #[serde(rename = "type")]
    type_: Type,
    #[serde(default)]
    description: String,
    #[serde(default)]
    properties: BTreeMap<String, Node>,
    #[serde(default)]
    required: Vec<String>,
    items: Option<Box<Node>>,
    #[serde(default, rename = "enum")]
    values: Vec<String>,
    #[serde(default, deserialize_with = "regex")]
    pattern: Option<Regex>,
    min_length: Option<usize>,
    max_length: Option<usize>,
    min_items: Option<usize>,
    max_items: Option<usize>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    #[serde(default, rename = "x-kubernetes-list-type")]
    list: ListType,
    #[serde(default, rename = "x-kubernetes-list-map-keys")]
    keys: Vec<String>,
    /// The rules are checked in `mirror`; an `int32` has bounds beside its format.
    #[serde(rename = "x-kubernetes-validations")]
    _rules: Option<IgnoredAny>,
    #[serde(rename = "format")]
    _format: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Object,
    Array,
    String,
    Integer,
    Boolean,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ListType {
    #[default]
    Atomic,
    Set,
    Map,
}

fn regex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Regex>, D::Error> {
    let pattern = String::deserialize(deserializer)?;
    Regex::new(&pattern).map(Some).map_err(D::Error::custom)
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Object => "an object",
            Self::Array => "a list",
            Self::String => "a string",
            Self::Integer => "a whole number",
            Self::Boolean => "true or false",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Object => value.is_object(),
            Self::Array => value.is_array(),
            Self::String => value.is_string(),
            Self::Integer => value.as_number().and_then(whole).is_some(),
            Self::Boolean => value.is_boolean(),
        }
    }
}

impl Node {
    fn check(&self, field: &str, value: &Value, example: Option<&str>, found: &mut Found) {
        let example = self.example().or(example);
        if !self.type_.fits(value) {
            let quotes = if self.type_ == Type::String && !value.is_object() && !value.is_array() {
                ": put it in quotes"
            } else {
                ""
            };
            return found.add(field, &format!("must be {}{quotes}", self.type_.name()));
        }
        match value {
            Value::Object(fields) => self.fields(field, fields, found),
            Value::Array(entries) => self.entries(field, entries, example, found),
            Value::String(text) => self.text(field, text, example, found),
            Value::Number(number) => self.number(field, number.as_f64().unwrap_or(f64::NAN), found),
            _ => {}
        }
    }

    fn fields(&self, field: &str, fields: &Map<String, Value>, found: &mut Found) {
        let is_present = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
        for name in self.required.iter().filter(|name| !is_present(name)) {
            found.add(&format!("{field}.{name}"), "is required");
        }
        for (name, value) in fields {
            let field = format!("{field}.{name}");
            match self.properties.get(name) {
                None => found.unknown(&field),
                Some(_) if value.is_null() => {}
                Some(node) => node.check(&field, value, None, found),
            }
        }
    }

    fn entries(&self, field: &str, entries: &[Value], example: Option<&str>, found: &mut Found) {
        found.bounds(field, "entries", entries.len(), self.min_items, self.max_items);
        for (index, entry) in entries.iter().enumerate() {
            if let Some(node) = &self.items {
                node.check(&format!("{field}[{index}]"), entry, example, found);
            }
        }
        let key = |entry: &Value| match self.list {
            ListType::Atomic => None,
            ListType::Set => Some(entry.to_string()),
            ListType::Map => Some(self.keys.iter().map(|key| entry[key].to_string()).collect()),
        };
        let keys: Vec<String> = entries.iter().filter_map(key).collect();
        for (index, key) in keys.iter().enumerate().filter(|(index, key)| keys[..*index].contains(key)) {
            found.add(&format!("{field}[{index}]"), &format!("{key} is listed twice"));
        }
    }

    fn text(&self, field: &str, text: &str, example: Option<&str>, found: &mut Found) {
        found.bounds(field, "characters", text.chars().count(), self.min_length, self.max_length);
        let shown: String = text.chars().take(80).collect();
        if !self.values.is_empty() && !self.values.iter().any(|value| value == text) {
            found.add(field, &format!("{shown:?} is none of {}", self.values.join(", ")));
        }
        if self.pattern.as_ref().is_some_and(|pattern| !pattern.is_match(text)) {
            let example = example.map(|example| format!(", for example {example}")).unwrap_or_default();
            found.add(field, &format!("{shown:?} does not have the form that is wanted{example}"));
        }
    }

    fn number(&self, field: &str, number: f64, found: &mut Found) {
        if let Some(minimum) = self.minimum.filter(|minimum| number < *minimum) {
            found.add(field, &format!("write at least {minimum}"));
        }
        if let Some(maximum) = self.maximum.filter(|maximum| number > *maximum) {
            found.add(field, &format!("write at most {maximum}"));
        }
    }

    /// What the description gives as an example.
    fn example(&self) -> Option<&str> {
        let (_, rest) = self.description.split_once("Example:")?;
        let (example, _) = rest.split_once('`')?.1.split_once('`')?;
        Some(example)
    }
}

#[derive(Default)]
struct Found(Vec<Violation>);

impl Found {
    fn add(&mut self, field: &str, what: &str) {
        self.0.push(Violation { field: field.to_owned(), what: what.to_owned() });
    }

    fn unknown(&mut self, field: &str) {
        self.add(field, "there is no such field; correct its name, or remove it");
    }

    fn bounds(&mut self, field: &str, of: &str, size: usize, min: Option<usize>, max: Option<usize>) {
        if let Some(min) = min.filter(|min| size < *min) {
            self.add(field, &format!("has {size} {of}, at least {min} are needed"));
        }
        if let Some(max) = max.filter(|max| size > *max) {
            self.add(field, &format!("has {size} {of}, at most {max} may be"));
        }
    }

    /// What every object has. The rules are Kubernetes' own, but for the length of the name.
    fn metadata(&mut self, metadata: &Value) {
        const NAME: &str = "metadata.name";
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let is_label = |label: &str| {
            label.starts_with(is_word) && label.ends_with(is_word) && label.chars().all(|c| is_word(c) || c == '-')
        };
        match metadata["name"].as_str() {
            None | Some("") => self.add(NAME, "is required"),
            Some(name) if name.len() > 52 => self.add(NAME, "must be at most 52 characters"),
            Some(name) if !name.split('.').all(is_label) => {
                self.add(NAME, "use lower-case letters, digits, '-' and '.', with a letter or digit at both ends");
            }
            Some(_) => {}
        }
        // What our own type knows comes out again.
        let known = ObjectMeta::deserialize(metadata).ok().and_then(|known| serde_json::to_value(known).ok());
        let Some(known) = known else { return };
        for (name, value) in metadata.as_object().into_iter().flatten() {
            if !value.is_null() && known.get(name).is_none() {
                self.unknown(&format!("metadata.{name}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_schema_has_no_keyword_that_goes_unchecked() {
        assert!(spec().unwrap().properties.contains_key("images"));
    }

    #[test]
    fn what_is_refused_is_named_with_its_field() {
        let object = |field: &str, value: Value| {
            let images = json!([{"source": "gcr.io/a", "tags": ["1"]}]);
            let mut spec = json!({"images": images, "target": {"registry": "t.io"}});
            spec[field] = value;
            json!({"metadata": {"name": "m"}, "spec": spec})
        };
        for (field, value, expected) in [
            ("tagret", json!({}), "spec.tagret: there is no such field; correct its name, or remove it"),
            ("target", Value::Null, "spec.target: is required"),
            ("suspend", json!("yes"), "spec.suspend: must be true or false"),
            ("interval", json!(30), "spec.interval: must be a string: put it in quotes"),
            (
                "images",
                json!([{"source": "gcr.io/a", "tags": ["1", "1"]}]),
                "spec.images[0].tags[1]: \"1\" is listed twice",
            ),
            (
                "images",
                json!([{"source": "gcr.io/a", "platforms": ["amd64"]}]),
                "spec.images[0].platforms[0]: \"amd64\" does not have the form that is wanted, for example [\"linux/amd64\", \"linux/arm64\"]",
            ),
        ] {
            let found: Vec<String> = check(&object(field, value)).iter().map(ToString::to_string).collect();
            assert_eq!(found, [expected]);
        }
        assert_eq!(check(&object("interval", Value::Null)), []);
    }
}
